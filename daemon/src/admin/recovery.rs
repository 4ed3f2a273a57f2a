//! How far the background recovery of the whole cluster is.

use super::health::waiting_text;
use super::stats::ask_all;
use crate::api::{NodeRecovery, Recovery, RecoveryInfo, RecoveryState};
use crate::control::{NodeReply, NodeRequest};
use crate::node::Node;
use crate::recovery::DiskProgress;
use sheepdog_cluster::recovery::Stage;
use sheepdog_cluster::view::View;
use std::sync::Arc;
use std::time::Duration;

/// How long the answers of other nodes are waited for.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The background recovery of this node's disks.
#[must_use]
pub fn local_recovery(node: &Node) -> Vec<RecoveryInfo> {
    let view = node.cluster.view();
    node.recoveries.progress().into_iter().map(|progress| describe(&view, progress)).collect()
}

fn describe(view: &View, of: DiskProgress) -> RecoveryInfo {
    let DiskProgress { disk, progress, moved, bytes_per_second, eta_seconds, full } = of;
    let wants = view.disks.get(&disk).is_some_and(|d| d.up && d.sync_from.is_some());
    let state = match progress.stage {
        // A check of a complete disk keeps nobody waiting.
        _ if full => RecoveryState::Waiting,
        _ if progress.check && !wants => RecoveryState::Idle,
        _ if wants && progress.paused => RecoveryState::Paused,
        Stage::Idle if wants => RecoveryState::Waiting,
        Stage::Idle => RecoveryState::Idle,
        Stage::Comparing => RecoveryState::Comparing,
        Stage::Copying | Stage::Cleaning | Stage::Finishing => RecoveryState::Copying,
        Stage::Waiting => RecoveryState::Waiting,
    };
    let waits_for = match &progress.blocked {
        _ if full => Some("room on the disk".into()),
        Some((slots, why)) => Some(format!("{slots} slots {}", waiting_text(view, why, None))),
        None if state == RecoveryState::Waiting => progress.problem.map(|p| p.to_string()),
        None => None,
    };
    RecoveryInfo {
        disk: disk.to_string(),
        state,
        slots_total: progress.slots_total,
        slots_done: progress.slots_done,
        objects_copied: progress.layers_done,
        objects_planned: progress.layers_done + progress.layers_left,
        bytes_moved: moved.bytes,
        bytes_per_second,
        eta_seconds,
        waits_for,
    }
}

/// The background recovery of all up nodes.
pub async fn recovery(node: &Arc<Node>) -> Recovery {
    let mut replies = ask_all(node, &NodeRequest::Recovery, TIMEOUT).await;
    let view = node.cluster.view();
    let nodes = view.nodes.iter().filter(|(_, n)| n.up).map(|(id, peer)| {
        let disks = match replies.remove(id).flatten() {
            Some(NodeReply::Recovery(disks)) => Some(disks),
            _ if *id == node.cluster.node => Some(local_recovery(node)),
            _ => None,
        };
        NodeRecovery { node: id.to_string(), address: peer.address.clone(), disks }
    });
    let nodes = nodes.collect();
    Recovery { paused: view.settings.recovery_paused, nodes }
}
