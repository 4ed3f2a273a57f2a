//! Volumes: created, seen, detached, deleted.

use super::exports::release;
use super::stats::all_stats;
use super::{APPLY_TIMEOUT, change, refused};
use crate::api::{Detached, HandoverInfo, VolumeInfo};
use crate::control::{NodeReply, NodeRequest, NodeStats};
use crate::node::{Node, now};
use sheepdog_cluster::command::{Command, VolumeSpec};
use sheepdog_cluster::state::{Attachment, ClusterState, Volume};
use sheepdog_types::{NodeId, VolumeId, WriterGen};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// How long a node that gives a volume back may take to finish what is in progress.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(20);

fn volumes(state: &ClusterState, stats: &BTreeMap<NodeId, Option<NodeStats>>) -> Vec<VolumeInfo> {
    let complete = stats.values().all(Option::is_some);
    let mut used: BTreeMap<u64, u64> = BTreeMap::new();
    for (volume, bytes) in stats.values().flatten().flat_map(|s| &s.volumes) {
        *used.entry(*volume).or_default() += bytes;
    }
    let describe = |v: &Arc<Volume>| {
        let bytes = complete.then(|| used.get(&v.id.0).copied().unwrap_or(0));
        VolumeInfo { clients: clients_of(v, stats), ..describe_volume(state, v, bytes) }
    };
    let mut list: Vec<VolumeInfo> = state.volumes.values().map(describe).collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

/// Clients of the gateway of a volume, if that answers.
fn clients_of(volume: &Volume, stats: &BTreeMap<NodeId, Option<NodeStats>>) -> Option<u32> {
    let gateway = volume.attachment.as_ref()?.gateway;
    let stats = stats.get(&gateway)?.as_ref()?;
    let found = stats.clients.iter().find(|(id, _)| *id == volume.id);
    Some(found.map_or(0, |(_, clients)| *clients))
}

fn describe_volume(state: &ClusterState, volume: &Volume, used: Option<u64>) -> VolumeInfo {
    let holder = volume.attachment.as_ref().and_then(|a| state.nodes.get(&a.gateway));
    let address =
        |id: NodeId| state.nodes.get(&id).map_or_else(|| id.to_string(), |n| n.address.clone());
    let handover = volume.handover.map(|h| HandoverInfo {
        from: address(h.from),
        to: address(h.to),
        since: h.since,
    });
    VolumeInfo {
        name: volume.spec.name.clone(),
        id: volume.id.0,
        size: volume.spec.size,
        used,
        copies: volume.spec.copies,
        min_copies: volume.spec.min_copies,
        ack: volume.spec.ack,
        attached_to: holder.map(|n| n.address.clone()),
        attached_since: volume.attachment.as_ref().map(|a| a.since),
        writer: volume.writer.0,
        clients: None,
        settled: !volume.unsettled,
        handover,
        created: volume.created,
        parent: None,
        snapshots: Vec::new(),
    }
}

/// All volumes, by name.
pub async fn list(node: &Arc<Node>) -> Vec<VolumeInfo> {
    let stats = all_stats(node).await;
    volumes(&node.cluster.state(), &stats)
}

pub async fn info(node: &Arc<Node>, name: &str) -> Result<VolumeInfo, String> {
    list(node)
        .await
        .into_iter()
        .find(|v| v.name == name)
        .ok_or_else(|| format!("there is no volume '{name}'"))
}

pub async fn create(node: &Arc<Node>, spec: VolumeSpec) -> Result<VolumeInfo, String> {
    let name = spec.name.clone();
    spec.validate().map_err(refused)?;
    let command = Command::CreateVolume { spec, at: now() };
    change(node, &command, |state| state.volume_named(&name).is_some()).await?;
    let state = node.cluster.state();
    let volume = state.volume_named(&name);
    let volume = volume.ok_or_else(|| format!("volume '{name}' was deleted meanwhile"))?;
    Ok(describe_volume(&state, volume, Some(0)))
}

pub async fn delete(node: &Arc<Node>, name: String) -> Result<(), String> {
    let command = Command::DeleteVolume { name: name.clone() };
    change(node, &command, |state| state.volume_named(&name).is_none()).await?;
    Ok(())
}

/// Ends the hand-over of a volume: the node that has it keeps it.
///
/// # Errors
/// A text for people.
pub async fn end_handover(node: &Arc<Node>, name: &str) -> Result<VolumeInfo, String> {
    let volume = node.cluster.state().volume_named(name).cloned();
    let volume = volume.ok_or_else(|| format!("there is no volume '{name}'"))?;
    if volume.handover.is_none() {
        return Err(format!("volume '{name}' is not being handed over; nothing was changed"));
    }
    let command = Command::CloseHandover { volume: volume.id, writer: None };
    let closed =
        |state: &ClusterState| state.volumes.get(&volume.id).is_none_or(|v| v.handover.is_none());
    change(node, &command, closed).await?;
    info(node, name).await
}

/// Ends the attachment of a volume.
///
/// # Errors
/// A text for people.
pub async fn detach(node: &Arc<Node>, name: &str, force: bool) -> Result<Detached, String> {
    let (volume, holder) = {
        let state = node.cluster.state();
        let volume = state.volume_named(name).cloned();
        let volume = volume.ok_or_else(|| format!("there is no volume '{name}'"))?;
        let gateway = volume.attachment.as_ref().map(|a| a.gateway);
        (volume, gateway.and_then(|id| state.nodes.get(&id)).cloned())
    };
    let Some(Attachment { gateway, writer, since }) = volume.attachment.clone() else {
        return Err(format!("volume '{name}' is not attached; nothing was changed"));
    };
    let up = holder.as_ref().is_some_and(|n| n.up);
    let address = holder.map_or_else(|| gateway.to_string(), |n| n.address);
    let mut detached = Detached {
        volume: name.into(),
        detached_from: address.clone(),
        attached_since: since,
        writer: writer.0,
        broken: false,
        clients: None,
    };
    if up && !force {
        let who = format!(
            "volume '{name}' is attached to {address} for {} s (writer generation {writer})",
            now().saturating_sub(since)
        );
        match ask_to_release(node, gateway, &address, volume.id, writer).await {
            Ok(0) => detached.clients = Some(0),
            Ok(clients) => {
                return Err(format!(
                    "{who}, and has {clients} client{} there; nothing was changed. Disconnect them, or \
                     break the lock with --force: their I/O fails from then on",
                    if clients == 1 { "" } else { "s" }
                ));
            }
            Err(problem) => {
                return Err(format!(
                    "{who}, which was asked to give it back: {problem}. Ask again, or break the lock \
                     with --force: I/O of clients that it has fails from then on"
                ));
            }
        }
    } else {
        if up {
            detached.broken = true;
            let stats = all_stats(node).await;
            detached.clients = clients_of(&volume, &stats);
        }
        // The other node of a hand-over must not take back what was taken away by force.
        let close = Command::CloseHandover { volume: volume.id, writer: None };
        node.propose(&close).await?.map_err(refused)?;
        let command = Command::Detach { volume: volume.id, writer, settled: false };
        node.propose(&command).await?.map_err(refused)?;
    }
    let over = |state: &ClusterState| {
        let volume = state.volumes.get(&volume.id);
        let attachment = volume.and_then(|v| v.attachment.as_ref());
        attachment.is_none_or(|a| a.writer != writer)
    };
    if node.wait_for(APPLY_TIMEOUT, over).await {
        Ok(detached)
    } else {
        Err("it is agreed, but this node does not hear of it; `dog volume info` shows it".into())
    }
}

/// Asks a node to give a volume back; gives the number of clients for which it does not.
async fn ask_to_release(
    node: &Arc<Node>,
    holder: NodeId,
    address: &str,
    volume: VolumeId,
    writer: WriterGen,
) -> Result<u32, String> {
    if holder == node.cluster.node {
        return release(node, volume, writer).await;
    }
    let request = NodeRequest::Release { volume, writer };
    match timeout(RELEASE_TIMEOUT, node.client.ask(address, &request)).await {
        Ok(Ok(NodeReply::Released { clients })) => Ok(clients),
        Ok(Ok(_)) => Err("it gave an answer that makes no sense".into()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it did not answer in time, and may still do so".into()),
    }
}
