//! Exports of this node, and the attachments that they need.

use super::{APPLY_TIMEOUT, change, refused};
use crate::api::{ExportInfo, Protocol};
use crate::exports::{ExportSpec, GiveBack};
use crate::node::{Node, now};
use crate::seat::Seat;
use sheepdog_cluster::command::{Command, Outcome};
use sheepdog_cluster::gateway::Phase;
use sheepdog_cluster::state::{ClusterState, Volume};
use sheepdog_types::{VolumeId, WriterGen};
use std::sync::Arc;
use std::time::Duration;

/// How long an attach waits for other nodes to fence older writers.
const FENCE_TIMEOUT: Duration = Duration::from_secs(10);

pub async fn add(
    node: &Arc<Node>,
    volume: String,
    protocol: Protocol,
    address: String,
    incoming: bool,
) -> Result<ExportInfo, String> {
    let spec = ExportSpec { volume, protocol, address };
    if incoming {
        return add_incoming(node, spec).await;
    }
    node.exports.check(&spec)?;
    attach(node, &spec.volume).await?;
    let volume = spec.volume.clone();
    let exports = Arc::clone(&node.exports);
    let adding = Arc::clone(&exports);
    let added = tokio::task::spawn_blocking(move || adding.add(spec)).await;
    let outcome = added.map_err(|e| e.to_string())?;
    if outcome.is_err()
        && let Ok(Some(attachment)) =
            tokio::task::spawn_blocking(move || exports.release_unused(&volume)).await
    {
        give_back(node, attachment).await;
    }
    outcome
}

/// Adds an export of a volume that another node has, to be taken over when a client needs it. If the
/// export is still there from an earlier migration, it is enough that it may.
async fn add_incoming(node: &Arc<Node>, spec: ExportSpec) -> Result<ExportInfo, String> {
    let stands = node.exports.stands(&spec);
    if !stands {
        node.exports.check(&spec)?;
    }
    let (name, me) = (spec.volume.clone(), node.cluster.node);
    let command = Command::OpenHandover {
        name: name.clone(),
        to: me,
        incarnation: node.cluster.incarnation(),
        at: now(),
    };
    let open = |state: &ClusterState| {
        let volume = state.volume_named(&name);
        volume.is_some_and(|v| v.handover.is_some_and(|h| h.involves(me)))
    };
    change(node, &command, open).await?;
    let volume = node.cluster.state().volume_named(&name).cloned();
    let volume = volume.ok_or_else(|| format!("volume '{name}' was deleted meanwhile"))?;
    let exports = Arc::clone(&node.exports);
    let id = volume.id;
    let add = move || {
        exports.stand_by(&volume);
        if stands {
            let found = exports.list().into_iter().find(|e| e.address == spec.address);
            return found.ok_or_else(|| "the export was removed meanwhile".to_owned());
        }
        exports.add(spec)
    };
    let added = tokio::task::spawn_blocking(add).await.map_err(|e| e.to_string())?;
    if added.is_err() && !node.exports.list().iter().any(|e| e.volume == name) {
        let exports = Arc::clone(&node.exports);
        let unused = tokio::task::spawn_blocking(move || exports.release_unused(&name)).await;
        if let Ok(Some(attachment)) = unused {
            give_back(node, attachment).await;
        }
        close_handover(node, id).await;
    }
    added
}

/// Attaches a volume to this node, unless it is, and waits until its gateway serves.
///
/// # Errors
/// A text for people.
pub async fn attach(node: &Arc<Node>, name: &str) -> Result<(), String> {
    if node.exports.is_attached(name) {
        return Ok(());
    }
    let command = Command::Attach {
        name: name.to_owned(),
        gateway: node.cluster.node,
        incarnation: node.cluster.incarnation(),
        at: now(),
    };
    get(node, name, &command).await
}

/// Attaches a volume that clients of this node need, from the other node of its hand-over if need be, unless
/// there is a newer generation than `seen`.
///
/// # Errors
/// A text for people.
pub async fn take_over(node: &Arc<Node>, seat: &Seat, seen: WriterGen) -> Result<(), String> {
    let command = Command::TakeOver {
        volume: seat.volume(),
        gateway: node.cluster.node,
        incarnation: node.cluster.incarnation(),
        seen,
        at: now(),
    };
    get(node, seat.name(), &command).await
}

/// Has the cluster attach a volume to this node.
async fn get(node: &Arc<Node>, name: &str, command: &Command) -> Result<(), String> {
    let outcome = node.propose(command).await?.map_err(refused)?;
    let Outcome::Attached { volume: id, writer } = outcome else {
        return Err("an answer of the cluster log that makes no sense".into());
    };
    let known = |state: &ClusterState| state.volumes.get(&id).is_some_and(|v| v.writer >= writer);
    if !node.wait_for(APPLY_TIMEOUT, known).await {
        return Err("the volume is attached, but this node does not hear of it; try again".into());
    }
    let volume = node.cluster.state().volumes.get(&id).cloned();
    let volume = volume.ok_or_else(|| format!("volume '{name}' was deleted meanwhile"))?;
    let exports = Arc::clone(&node.exports);
    let phase = tokio::task::spawn_blocking(move || {
        exports.attach(&volume, writer).wait_settled(FENCE_TIMEOUT)
    });
    match phase.await.map_err(|e| e.to_string())? {
        Phase::Serving => Ok(()),
        // It goes on by itself: an up node that does not answer is declared down sooner or later.
        Phase::Fencing => Ok(()),
        Phase::Fenced => Err(format!("volume '{name}' was attached elsewhere at the same time")),
    }
}

async fn give_back(node: &Arc<Node>, attachment: GiveBack) {
    if let Err(error) = node.propose(&attachment.command()).await {
        let volume = attachment.volume;
        tracing::warn!(%volume, error, "not detached; another node can attach it once this one is down");
    }
}

/// The node that has the volume keeps it, and this one is out of it.
pub async fn close_handover(node: &Arc<Node>, volume: VolumeId) {
    let me = node.cluster.node;
    let is_part = |v: &Arc<Volume>| v.handover.is_some_and(|h| h.involves(me));
    if !node.cluster.view().volumes.get(&volume).is_some_and(is_part) {
        return;
    }
    let close = Command::CloseHandover { volume, writer: None };
    if let Err(error) = node.propose(&close).await {
        tracing::warn!(%volume, error, "its hand-over stays open; `dog volume end-handover` ends it");
    }
}

/// Stops serving a volume and gives it back, unless it has clients; says how many.
///
/// # Errors
/// A text for people.
pub async fn release(node: &Arc<Node>, volume: VolumeId, writer: WriterGen) -> Result<u32, String> {
    let exports = Arc::clone(&node.exports);
    let name = node.cluster.state().volumes.get(&volume).map(|v| v.spec.name.clone());
    let name = name.ok_or("this node knows no such volume; nothing was changed")?;
    let released = tokio::task::spawn_blocking(move || exports.release(&name, volume, writer));
    match released.await.map_err(|e| e.to_string())?? {
        Ok(attachment) => {
            node.propose(&attachment.command()).await?.map_err(refused)?;
            close_handover(node, volume).await;
            Ok(0)
        }
        Err(clients) => Ok(clients),
    }
}

pub async fn remove(
    node: &Arc<Node>,
    volume: String,
    protocol: Option<Protocol>,
    address: Option<String>,
) -> Result<Vec<ExportInfo>, String> {
    let exports = Arc::clone(&node.exports);
    let removed =
        tokio::task::spawn_blocking(move || exports.remove(&volume, protocol, address.as_deref()));
    let removed = removed.await.map_err(|e| e.to_string())??;
    if let Some(attachment) = removed.detach {
        give_back(node, attachment).await;
    }
    if let Some(volume) = removed.last_of {
        close_handover(node, volume).await;
    }
    Ok(removed.exports)
}
