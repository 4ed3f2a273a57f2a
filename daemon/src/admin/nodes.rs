//! The nodes: seen, drained, moved, removed.

use super::health::policies;
use super::stats::{all_disks, all_stats};
use super::{change, json};
use crate::api::{DiskInfo, DiskState, NodeInfo, NodeState, Request};
use crate::control::{DiskHealth, NodeStats};
use crate::node::{Node, now};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::state::{ClusterState, Disk};
use sheepdog_cluster::view::{View, Waiting};
use sheepdog_types::{DiskId, NodeId, SlotId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Answers a request that is about nodes.
///
/// # Errors
/// A text for people.
pub async fn handle(node: &Arc<Node>, request: Request) -> Result<serde_json::Value, String> {
    match request {
        Request::NodeDrain { node: name, force } => drain(node, &name, true, force).await,
        Request::NodeUndrain { node: name } => drain(node, &name, false, false).await,
        Request::NodeRemove { node: name, force } => json(remove(node, &name, force).await?),
        Request::NodeSetZone { node: name, zone } => {
            let id = find_node(&node.cluster.state(), &name)?;
            let command = Command::SetZone { node: id, zone: zone.clone(), at: now() };
            let reached =
                |state: &ClusterState| state.nodes.get(&id).is_none_or(|n| n.zone == zone);
            change(node, &command, reached).await?;
            json(node_info(node, id).await?)
        }
        Request::NodeSetWeight { target, weight, force } => {
            let disk = find_weighted(&node.cluster.state(), &target)?;
            let command = Command::SetWeight { disk, weight, force, at: now() };
            let reached =
                |state: &ClusterState| state.disks.get(&disk).is_none_or(|d| d.weight == weight);
            change(node, &command, reached).await?;
            let owner = node.cluster.view().node_of(disk).ok_or("the disk left meanwhile")?;
            json(node_info(node, owner).await?)
        }
        _ => json(node_list(node).await),
    }
}

/// The member that an operator means by an address or an id.
///
/// # Errors
/// A text for people.
pub fn find_node(state: &ClusterState, name: &str) -> Result<NodeId, String> {
    let by_id = name.parse::<NodeId>().ok();
    if let Some(id) = by_id.filter(|id| state.removed_nodes.contains(id)) {
        return Ok(id);
    }
    // A host that was removed and joined anew has its old address.
    let mut found: Vec<_> =
        state.nodes.iter().filter(|(id, n)| by_id == Some(**id) || n.address == name).collect();
    found.sort_by_key(|(_, n)| n.removed);
    found.first().map(|(id, _)| **id).ok_or_else(|| {
        format!(
            "there is no node '{name}'; write its address (IP:PORT) or id as in `dog node list`; \
             nothing was changed"
        )
    })
}

/// The disk that an operator means by its id, or by a node that has only one.
fn find_weighted(state: &ClusterState, name: &str) -> Result<DiskId, String> {
    if let Some(disk) = name.parse().ok().filter(|disk| state.disks.contains_key(disk)) {
        return Ok(disk);
    }
    let node = find_node(state, name).map_err(|_| {
        format!(
            "there is no disk or node '{name}'; write the id of a disk as in `dog node list`; \
             nothing was changed"
        )
    })?;
    let mut disks = state.disks.iter().filter(|(_, d)| d.node == node).map(|(id, _)| *id);
    match (disks.next(), disks.next()) {
        (Some(disk), None) => Ok(disk),
        (None, _) => Err(format!("node {name} has no disks; nothing was changed")),
        (Some(_), Some(_)) => Err(format!(
            "node {name} has several disks; write the id of one as in `dog node list`; nothing \
             was changed"
        )),
    }
}

async fn drain(
    node: &Arc<Node>,
    name: &str,
    on: bool,
    force: bool,
) -> Result<serde_json::Value, String> {
    let id = find_node(&node.cluster.state(), name)?;
    let command = Command::Drain { node: id, on, force, at: now() };
    let reached = |state: &ClusterState| state.nodes.get(&id).is_none_or(|n| n.draining == on);
    change(node, &command, reached).await?;
    json(node_info(node, id).await?)
}

async fn remove(node: &Arc<Node>, name: &str, force: bool) -> Result<(), String> {
    let id = find_node(&node.cluster.state(), name)?;
    if !force && !node.cluster.view().nodes.get(&id).is_some_and(|n| n.up) {
        let view = node.cluster.view();
        let never_back: BTreeSet<DiskId> = {
            let state = node.cluster.state();
            let removed =
                |d: &Disk| d.is_given_up() || state.nodes.get(&d.node).is_none_or(|n| n.removed);
            let disks = state.disks.iter().filter(|(_, d)| d.node == id || removed(d));
            disks.map(|(disk, _)| *disk).collect()
        };
        let waiting = tokio::task::spawn_blocking(move || waiting_for(&view, &never_back)).await;
        let waiting = waiting.map_err(|e| e.to_string())?;
        if waiting > 0 {
            return Err(format!(
                "node {name} is down, and {waiting} slots wait for nobody but its disks: \
                 removing it loses the newest data of these, if it ever comes back or not. Start \
                 it, or see `dog cluster recover`, or force it; nothing was changed"
            ));
        }
    }
    let command = Command::RemoveNode { node: id, force, at: now() };
    change(node, &command, |state| state.removed_nodes.contains(&id)).await?;
    Ok(())
}

/// Slots that wait for nobody but some of these disks.
fn waiting_for(view: &View, whom: &BTreeSet<DiskId>) -> usize {
    let only = |disks: &[DiskId]| disks.iter().all(|disk| whom.contains(disk));
    let policies = policies(view);
    let waits = |slot: &u16| {
        policies.iter().any(|&(copies, min)| match view.slot(SlotId(*slot), copies, min) {
            Err(Waiting::TooFew { down, .. }) => !down.is_empty() && only(&down),
            Err(Waiting::For(disks)) => only(&disks),
            Err(Waiting::Forgotten) | Ok(_) => false,
        })
    };
    (0..=u16::MAX).filter(waits).count()
}

/// All members, as far as known also those that are removed and not forgotten yet.
pub async fn node_list(node: &Arc<Node>) -> Vec<NodeInfo> {
    let (stats, health) = tokio::join!(all_stats(node), all_disks(node));
    let state = node.cluster.state();
    let known = Known { stats: &stats, health: &health };
    state.nodes.keys().filter_map(|id| describe(&state, *id, &known)).collect()
}

async fn node_info(node: &Arc<Node>, id: NodeId) -> Result<NodeInfo, String> {
    let text = id.to_string();
    let info = node_list(node).await.into_iter().find(|info| info.id == text);
    info.ok_or_else(|| "it was done, but the node has left meanwhile".into())
}

/// What the nodes told of their disks.
struct Known<'a> {
    stats: &'a BTreeMap<NodeId, Option<NodeStats>>,
    health: &'a [DiskHealth],
}

fn describe(state: &ClusterState, id: NodeId, known: &Known<'_>) -> Option<NodeInfo> {
    let member = state.nodes.get(&id)?;
    let mut disks = state.disks.iter().filter(|(_, d)| d.node == id).peekable();
    let all_out = disks.peek().is_some() && state.disks.values().all(|d| d.node != id || d.out);
    let of_node = known.stats.get(&id).and_then(Option::as_ref);
    let on_ring = state.disks.iter().any(|(disk, d)| d.node == id && state.on_ring(*disk));
    let disks = disks.map(|(disk, d)| {
        let measured = of_node.and_then(|s| s.disks.iter().find(|m| m.id == *disk));
        let failure = known.health.iter().find(|h| h.id == *disk).and_then(|h| h.failure.clone());
        DiskInfo {
            id: disk.to_string(),
            path: measured.map(|m| m.path.clone()),
            state: disk_state(state, d),
            weight: d.weight,
            capacity: measured.map(|m| m.capacity),
            used: measured.map(|m| m.used),
            complete: is_complete(state, d),
            failure,
        }
    });
    Some(NodeInfo {
        id: id.to_string(),
        address: member.address.clone(),
        zone: member.zone.clone(),
        state: match () {
            () if member.removed => NodeState::Removed,
            () if !member.up && all_out => NodeState::Out,
            () if !member.up => NodeState::Down,
            () if member.draining => NodeState::Draining,
            () => NodeState::Up,
        },
        drained: member.draining && !on_ring,
        entered: member.entered.0,
        cluster_version: member.version,
        disks: disks.collect(),
    })
}

/// How a disk takes part.
pub fn disk_state(state: &ClusterState, disk: &Disk) -> DiskState {
    let node_up = state.nodes.get(&disk.node).is_some_and(|n| n.up);
    match () {
        () if node_up && disk.present && disk.retiring => DiskState::Leaving,
        () if node_up && disk.present => DiskState::Up,
        () if disk.out => DiskState::Out,
        () if node_up => DiskState::Failed,
        () => DiskState::Down,
    }
}

/// Whether a disk is up and holds everything that it must hold.
pub fn is_complete(state: &ClusterState, disk: &Disk) -> bool {
    let up = disk.present && state.nodes.get(&disk.node).is_some_and(|n| n.up);
    up && disk.missed_since.is_none() && disk.sync_from.is_none() && !disk.full
}
