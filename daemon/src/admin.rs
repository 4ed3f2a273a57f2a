//! Answers what `dog` asks.

use crate::api::{
    ClusterInfo, DiskInfo, EpochInfo, Health, NodeInfo, Protocol, Request, Response, ScrubInfo,
    SlotCounts, Status, VolumeInfo,
};
use crate::control::{DiskHealth, DiskStats, NodeReply, NodeRequest, NodeStats};
use crate::exports::ExportSpec;
use crate::node::{Node, now};
use crate::replica::Disk;
use serde::Serialize;
use sheepdog_cluster::command::{Command, Outcome, VolumeSpec, default_min_copies};
use sheepdog_cluster::gateway::{Config, Phase};
use sheepdog_cluster::state::{ClusterState, Volume};
use sheepdog_cluster::view::{View, Waiting};
use sheepdog_log::ClusterLog;
use sheepdog_types::{DiskId, NodeId, SLOTS, SlotId, VolumeId, WriterGen};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Copies of a volume that does not say.
const DEFAULT_COPIES: u8 = 3;
/// Voters of the cluster log that there are once enough nodes are up.
const VOTERS: usize = 5;
/// Epochs shown.
const EPOCHS_SHOWN: usize = 100;
/// How long the answers of other nodes are waited for.
const STATS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long they are waited for when the health of the cluster is asked for.
const DISKS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an agreed change may take to reach this node.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an attach waits for other nodes to fence older writers.
const FENCE_TIMEOUT: Duration = Duration::from_secs(10);
/// Reasons of one kind that are listed before the rest is only counted.
const REASONS: usize = 20;

/// Answers one request, as JSON.
pub async fn answer(node: &Arc<Node>, body: &[u8]) -> Vec<u8> {
    let response = match serde_json::from_slice::<Request>(body) {
        Ok(request) => match handle(node, request).await {
            Ok(value) => Response::Ok(value),
            Err(text) => Response::Error(text),
        },
        Err(error) => Response::Error(format!(
            "this node does not understand the request ({error}); nothing was changed. \
             Use a dog of the same release"
        )),
    };
    serde_json::to_vec(&response).unwrap_or_else(|e| {
        format!(r#"{{"error":"the answer cannot be encoded: {e}"}}"#).into_bytes()
    })
}

async fn handle(node: &Arc<Node>, request: Request) -> Result<serde_json::Value, String> {
    match request {
        Request::ClusterInfo => json(cluster_info(node)),
        Request::ClusterHealth => {
            let disks = all_disks(node).await;
            let node = Arc::clone(node);
            let health = tokio::task::spawn_blocking(move || health(&node, &disks)).await;
            json(health.map_err(|e| e.to_string())?)
        }
        Request::NodeList => json(node_list(node).await),
        Request::NodeScrubStart { rate } => {
            node.scrubbers.iter().try_for_each(|scrubber| scrubber.start(rate))?;
            json(scrubs(node))
        }
        Request::NodeScrubStatus => json(scrubs(node)),
        Request::NodeScrubPause => {
            node.scrubbers.iter().for_each(|scrubber| _ = scrubber.pause());
            json(scrubs(node))
        }
        Request::VolumeCreate { name, size, copies, min_copies, ack } => {
            let copies = copies.unwrap_or(DEFAULT_COPIES);
            let min_copies = min_copies.unwrap_or_else(|| default_min_copies(copies));
            json(create_volume(node, VolumeSpec { name, size, copies, min_copies, ack }).await?)
        }
        Request::VolumeList => {
            let stats = all_stats(node).await;
            json(volumes(&node.cluster.state(), &stats))
        }
        Request::VolumeInfo { name } => json(volume_info(node, &name).await?),
        Request::VolumeDelete { name } => delete_volume(node, name).await,
        Request::ExportAdd { volume, protocol, address } => {
            json(add_export(node, ExportSpec { volume, protocol, address }).await?)
        }
        Request::ExportList => json(node.exports.list()),
        Request::ExportRemove { volume, protocol, address } => {
            remove_export(node, volume, protocol, address).await
        }
    }
}

fn json(value: impl Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|e| e.to_string())
}

fn scrubs(node: &Node) -> Vec<ScrubInfo> {
    let state = node.cluster.state();
    node.scrubbers.iter().map(|scrubber| scrubber.info(&state)).collect()
}

fn cluster_info(node: &Node) -> ClusterInfo {
    let status = node.log.status();
    let state = node.cluster.state();
    let address = |id: &u64| status.addresses.get(id).cloned().unwrap_or_else(|| id.to_string());
    let epochs = state.history.iter().rev().take(EPOCHS_SHOWN).map(|record| EpochInfo {
        epoch: record.epoch.0,
        at: record.at,
        cause: record.cause.clone(),
    });
    ClusterInfo {
        cluster: node.identity.cluster.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        epoch: state.epoch.0,
        leader: status.leader.as_ref().map(address),
        voters: status.voters.iter().map(address).collect(),
        nodes: state.nodes.len(),
        nodes_up: state.nodes.values().filter(|n| n.up).count(),
        volumes: state.volumes.len(),
        epochs: epochs.collect(),
    }
}

/// How a slot is, for one policy.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum SlotState {
    Complete,
    Degraded,
    Waiting,
}

fn health(node: &Node, disks: &[DiskHealth]) -> Health {
    let view = node.cluster.view();
    let policies: BTreeSet<(usize, usize)> = view
        .volumes
        .values()
        .map(|v| (usize::from(v.spec.copies), usize::from(v.spec.min_copies)))
        .collect();
    let mut reasons = node_reasons(node, &view, disks);
    let mut slots = SlotCounts { total: SLOTS, ..SlotCounts::default() };
    let mut waiting: BTreeMap<String, usize> = BTreeMap::new();
    for slot in 0..=u16::MAX {
        let states = policies.iter().map(|&(copies, min)| {
            let (state, reason) = slot_state(&view, SlotId(slot), copies, min);
            if let Some(reason) = reason {
                *waiting.entry(reason).or_default() += 1;
            }
            state
        });
        match states.max().unwrap_or(SlotState::Complete) {
            SlotState::Complete => slots.complete += 1,
            SlotState::Degraded => slots.degraded += 1,
            SlotState::Waiting => slots.waiting += 1,
        }
    }
    let more = waiting.len().saturating_sub(REASONS);
    let shown = waiting.into_iter().take(REASONS);
    reasons.extend(shown.map(|(reason, count)| format!("{count} slots {reason}")));
    if more > 0 {
        reasons.push(format!("and {more} other groups of slots that wait"));
    }
    let nodes = view.nodes.values().filter(|n| n.up).count();
    if slots.degraded > 0 && policies.iter().any(|(copies, _)| nodes < *copies) {
        reasons.push(format!("{nodes} nodes are up, fewer than the copies that some volumes want"));
    }
    let serving = node.cluster.may_serve(&view);
    let status = match () {
        () if slots.waiting > 0 || !serving => Status::Unavailable,
        () if slots.degraded > 0 || !reasons.is_empty() => Status::Degraded,
        () => Status::Ok,
    };
    Health { status, epoch: view.epoch.0, slots, reasons }
}

fn node_reasons(node: &Node, view: &View, disks: &[DiskHealth]) -> Vec<String> {
    let mut reasons = Vec::new();
    let log = node.log.status();
    if let Some(failure) = &log.failure {
        reasons.push(format!("the cluster log of this node has stopped: {failure}; restart it"));
    }
    if log.leader.is_none() {
        reasons.push("no majority of the voters of the cluster log can be reached".into());
    }
    let wanted = view.nodes.values().filter(|n| n.up).count().min(VOTERS);
    if log.voters.len() < wanted {
        reasons.push(format!(
            "the cluster log has {} of {wanted} voters; a new node becomes one within seconds",
            log.voters.len()
        ));
    }
    if !node.cluster.has_entered(view) {
        let obstacle = node.obstacle();
        let colon = if obstacle.is_empty() { "" } else { ": " };
        reasons.push(format!("this node has not entered the cluster yet{colon}{obstacle}"));
    } else if !node.cluster.lease.is_held() {
        reasons.push("this node has no lease: the log's leader does not hear of it".into());
    }
    for down in view.nodes.values().filter(|n| !n.up) {
        reasons.push(format!("node {} is down", down.address));
    }
    for disk in view.disks.values().filter(|d| d.up && d.sync_from.is_some()) {
        let address = view.nodes.get(&disk.node).map_or("?", |n| n.address.as_str());
        reasons.push(format!("a disk of node {address} is being synchronised"));
    }
    reasons.extend(disk_reasons(view, disks));
    let total = reasons.len();
    if total > 2 * REASONS {
        reasons.truncate(2 * REASONS);
        reasons.push(format!("and {} more", total - 2 * REASONS));
    }
    reasons
}

/// What is wrong with disks of nodes that are up.
fn disk_reasons(view: &View, known: &[DiskHealth]) -> Vec<String> {
    let mut reasons = Vec::new();
    for (id, disk) in &view.disks {
        let Some(node) = view.nodes.get(&disk.node).filter(|n| n.up) else { continue };
        let told = known.iter().find(|d| d.id == *id);
        let failure = told.and_then(|d| d.failure.as_deref());
        let which = format!("disk {id} of node {}", node.address);
        match (disk.up, failure) {
            (_, Some(failure)) => reasons.push(format!("{which} is out of service: {failure}")),
            (false, None) => reasons.push(format!("{which} is out of service")),
            (true, None) => {}
        }
        if let Some(DiskHealth { damaged: count @ 1.., .. }) = told {
            let blocks = if *count == 1 { "block" } else { "blocks" };
            reasons.push(format!("{which}: {count} damaged {blocks}"));
        }
    }
    reasons
}

fn slot_state(
    view: &View,
    slot: SlotId,
    copies: usize,
    min_copies: usize,
) -> (SlotState, Option<String>) {
    let names = |disks: &[DiskId]| {
        let mut addresses: Vec<&str> = disks
            .iter()
            .filter_map(|d| view.nodes.get(&view.node_of(*d)?))
            .map(|n| n.address.as_str())
            .collect();
        addresses.sort_unstable();
        addresses.join(", ")
    };
    match view.slot(slot, copies, min_copies) {
        Ok(_) => {
            let home = view.home(slot, copies);
            let good =
                |d: DiskId| view.disks.get(&d).is_some_and(|d| d.up && d.sync_from.is_none());
            let complete = home.len() == copies && home.iter().all(good);
            (if complete { SlotState::Complete } else { SlotState::Degraded }, None)
        }
        Err(Waiting::TooFew { up, down }) => {
            let reason = format!(
                "have {up} of at least {min_copies} copies up and wait for one of: {}",
                names(&down)
            );
            (SlotState::Waiting, Some(reason))
        }
        Err(Waiting::For(disks)) => {
            let reason = format!("wait for the newest data, which is on: {}", names(&disks));
            (SlotState::Waiting, Some(reason))
        }
        Err(Waiting::Forgotten) => {
            let reason = "wait: too long ago to tell who has the newest data".to_owned();
            (SlotState::Waiting, Some(reason))
        }
    }
}

/// Space on this node's disks, and used by volumes.
#[must_use]
pub fn local_stats(node: &Node) -> NodeStats {
    let view = node.cluster.view();
    let mut stats = NodeStats::default();
    let mut volumes: BTreeMap<VolumeId, u64> = BTreeMap::new();
    for disk in node.replica.disks() {
        let usage = disk.store.usage();
        stats.disks.push(DiskStats {
            id: disk.id,
            path: disk.path.display().to_string(),
            capacity: usage.capacity,
            used: usage.used,
        });
        disk.store.list_all(|slot, layers| {
            for layer in layers {
                let volume = layer.key.object.volume;
                let Some(known) = view.volumes.get(&volume) else { continue };
                let home = view.home(slot, usize::from(known.spec.copies));
                if home.iter().find(|d| view.is_up(*d)) == Some(disk.id) {
                    *volumes.entry(volume).or_default() += u64::from(layer.data_blocks) * 4096;
                }
            }
        });
    }
    stats.volumes = volumes.into_iter().map(|(id, bytes)| (id.0, bytes)).collect();
    stats
}

/// How well this node's disks are.
#[must_use]
pub fn local_disks(node: &Node) -> Vec<DiskHealth> {
    let health = |disk: &Arc<Disk>| DiskHealth {
        id: disk.id,
        damaged: disk.store.damage().blocks.len() as u64,
        failure: disk.store.failure().map(|reason| reason.to_string()),
    };
    node.replica.disks().map(health).collect()
}

/// How well the disks of all up nodes are, as far as these answer.
async fn all_disks(node: &Arc<Node>) -> Vec<DiskHealth> {
    let view = node.cluster.view();
    let mut disks = local_disks(node);
    let mut asked = Vec::new();
    for (_, peer) in view.nodes.iter().filter(|(id, n)| n.up && **id != node.cluster.node) {
        let (address, node) = (peer.address.clone(), Arc::clone(node));
        asked.push(tokio::spawn(async move {
            let ask = node.client.ask(&address, &NodeRequest::Disks);
            tokio::time::timeout(DISKS_TIMEOUT, ask).await
        }));
    }
    for task in asked {
        if let Ok(Ok(Ok(NodeReply::Disks(others)))) = task.await {
            disks.extend(others);
        }
    }
    disks
}

/// The statistics of all up nodes; `None` for those that do not answer.
async fn all_stats(node: &Arc<Node>) -> BTreeMap<NodeId, Option<NodeStats>> {
    let view = node.cluster.view();
    let mut asked = Vec::new();
    for (id, peer) in view.nodes.iter().filter(|(_, n)| n.up) {
        let (id, address, node) = (*id, peer.address.clone(), Arc::clone(node));
        asked.push((id, tokio::spawn(async move { stats_of(&node, id, &address).await })));
    }
    let mut stats = BTreeMap::new();
    for (id, task) in asked {
        stats.insert(id, task.await.ok().flatten());
    }
    stats
}

async fn stats_of(node: &Arc<Node>, id: NodeId, address: &str) -> Option<NodeStats> {
    if id == node.cluster.node {
        let node = Arc::clone(node);
        return tokio::task::spawn_blocking(move || local_stats(&node)).await.ok();
    }
    let ask = node.client.ask(address, &NodeRequest::Stats);
    match tokio::time::timeout(STATS_TIMEOUT, ask).await {
        Ok(Ok(NodeReply::Stats(stats))) => Some(stats),
        _ => None,
    }
}

async fn node_list(node: &Arc<Node>) -> Vec<NodeInfo> {
    let stats = all_stats(node).await;
    let state = node.cluster.state();
    let nodes = state.nodes.iter().map(|(id, member)| {
        let of_node = stats.get(id).and_then(Option::as_ref);
        let disks = state.disks.iter().filter(|(_, d)| d.node == *id).map(|(disk, known)| {
            let measured = of_node.and_then(|s| s.disks.iter().find(|d| d.id == *disk));
            DiskInfo {
                id: disk.to_string(),
                path: measured.map(|d| d.path.clone()),
                capacity: measured.map(|d| d.capacity),
                used: measured.map(|d| d.used),
                complete: member.up && known.missed_since.is_none() && known.sync_from.is_none(),
            }
        });
        NodeInfo {
            id: id.to_string(),
            address: member.address.clone(),
            zone: member.zone.clone(),
            state: if member.up { "up" } else { "down" }.into(),
            disks: disks.collect(),
        }
    });
    nodes.collect()
}

fn volumes(state: &ClusterState, stats: &BTreeMap<NodeId, Option<NodeStats>>) -> Vec<VolumeInfo> {
    let complete = stats.values().all(Option::is_some);
    let mut used: BTreeMap<u64, u64> = BTreeMap::new();
    for (volume, bytes) in stats.values().flatten().flat_map(|s| &s.volumes) {
        *used.entry(*volume).or_default() += bytes;
    }
    let describe = |v: &Arc<Volume>| {
        let bytes = complete.then(|| used.get(&v.id.0).copied().unwrap_or(0));
        describe_volume(state, v, bytes)
    };
    let mut list: Vec<VolumeInfo> = state.volumes.values().map(describe).collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

fn describe_volume(state: &ClusterState, volume: &Volume, used: Option<u64>) -> VolumeInfo {
    let holder = volume.attachment.as_ref().and_then(|a| state.nodes.get(&a.gateway));
    VolumeInfo {
        name: volume.spec.name.clone(),
        id: volume.id.0,
        size: volume.spec.size,
        used,
        copies: volume.spec.copies,
        min_copies: volume.spec.min_copies,
        ack: volume.spec.ack,
        attached_to: holder.map(|n| n.address.clone()),
        writer: volume.writer.0,
        created: volume.created,
        parent: None,
        snapshots: Vec::new(),
    }
}

async fn volume_info(node: &Arc<Node>, name: &str) -> Result<VolumeInfo, String> {
    let stats = all_stats(node).await;
    volumes(&node.cluster.state(), &stats)
        .into_iter()
        .find(|v| v.name == name)
        .ok_or_else(|| format!("there is no volume '{name}'"))
}

async fn create_volume(node: &Arc<Node>, spec: VolumeSpec) -> Result<VolumeInfo, String> {
    let name = spec.name.clone();
    spec.validate().map_err(refused)?;
    let answer = node.propose(&Command::CreateVolume { spec, at: now() }).await?;
    answer.map_err(refused)?;
    node.wait_for(APPLY_TIMEOUT, |state| state.volume_named(&name).is_some()).await;
    let state = node.cluster.state();
    let volume = state.volume_named(&name);
    let volume = volume.ok_or("the volume was created, but this node does not hear of it")?;
    Ok(describe_volume(&state, volume, Some(0)))
}

fn refused(refusal: sheepdog_cluster::command::Refusal) -> String {
    format!("{refusal}; nothing was changed")
}

async fn delete_volume(node: &Arc<Node>, name: String) -> Result<serde_json::Value, String> {
    let answer = node.propose(&Command::DeleteVolume { name: name.clone() }).await?;
    answer.map_err(refused)?;
    node.wait_for(APPLY_TIMEOUT, |state| state.volume_named(&name).is_none()).await;
    Ok(serde_json::Value::Null)
}

async fn add_export(node: &Arc<Node>, spec: ExportSpec) -> Result<crate::api::ExportInfo, String> {
    node.exports.check(&spec)?;
    attach(node, &spec.volume).await?;
    let volume = spec.volume.clone();
    let exports = Arc::clone(&node.exports);
    let added = tokio::task::spawn_blocking(move || exports.add(spec)).await;
    let outcome = added.map_err(|e| e.to_string())?;
    if outcome.is_err()
        && let Some((volume, writer)) = node.exports.release_unused(&volume)
    {
        detach(node, volume, writer).await;
    }
    outcome
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
    let outcome = node.propose(&command).await?.map_err(refused)?;
    let Outcome::Attached { volume: id, writer } = outcome else {
        return Err("an answer of the cluster log that makes no sense".into());
    };
    let known = |state: &ClusterState| state.volumes.get(&id).is_some_and(|v| v.writer >= writer);
    if !node.wait_for(APPLY_TIMEOUT, known).await {
        return Err("the volume is attached, but this node does not hear of it; try again".into());
    }
    let volume = node.cluster.state().volumes.get(&id).cloned();
    let volume = volume.ok_or_else(|| format!("volume '{name}' was deleted meanwhile"))?;
    let config = Config {
        node: node.cluster.node,
        volume: id,
        size: volume.spec.size,
        copies: usize::from(volume.spec.copies),
        min_copies: usize::from(volume.spec.min_copies),
        layer: volume.layer,
        writer,
        ack: volume.spec.ack,
    };
    let (exports, owned) = (Arc::clone(&node.exports), name.to_owned());
    let phase = tokio::task::spawn_blocking(move || {
        exports.attach(&owned, config);
        exports.device(&owned).map(|device| device.wait_settled(FENCE_TIMEOUT))
    });
    match phase.await.map_err(|e| e.to_string())? {
        Some(Phase::Serving) => Ok(()),
        // It goes on by itself: an up node that does not answer is declared down sooner or later.
        Some(Phase::Fencing) => Ok(()),
        Some(Phase::Fenced) | None => {
            Err(format!("volume '{name}' was attached elsewhere at the same time"))
        }
    }
}

async fn detach(node: &Arc<Node>, volume: VolumeId, writer: WriterGen) {
    let answer = node.propose(&Command::Detach { volume, writer }).await;
    if let Err(error) = answer {
        tracing::warn!(%volume, error, "not detached; another node can attach it once this one is down");
    }
}

async fn remove_export(
    node: &Arc<Node>,
    volume: String,
    protocol: Option<Protocol>,
    address: Option<String>,
) -> Result<serde_json::Value, String> {
    let exports = Arc::clone(&node.exports);
    let removed =
        tokio::task::spawn_blocking(move || exports.remove(&volume, protocol, address.as_deref()));
    let removed = removed.await.map_err(|e| e.to_string())??;
    if let Some((volume, writer)) = removed.detach {
        detach(node, volume, writer).await;
    }
    json(removed.exports)
}
