//! Volumes: created, seen, deleted.

use super::stats::all_stats;
use super::{change, refused};
use crate::api::VolumeInfo;
use crate::control::NodeStats;
use crate::node::{Node, now};
use sheepdog_cluster::command::{Command, VolumeSpec};
use sheepdog_cluster::state::{ClusterState, Volume};
use sheepdog_types::NodeId;
use std::collections::BTreeMap;
use std::sync::Arc;

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
