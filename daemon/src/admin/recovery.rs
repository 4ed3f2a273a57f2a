//! How far the background recovery of the whole cluster is.

use super::stats::ask_all;
use crate::api::{NodeRecovery, Recovery, RecoveryInfo, RecoveryState};
use crate::control::{NodeReply, NodeRequest};
use crate::node::Node;
use sheepdog_types::SLOTS;
use std::sync::Arc;
use std::time::Duration;

/// How long the answers of other nodes are waited for.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The background recovery of this node's disks.
#[must_use]
pub fn local_recovery(node: &Node) -> Vec<RecoveryInfo> {
    let view = node.cluster.view();
    let progress = |disk: Arc<crate::replica::Disk>| {
        let wants = view.disks.get(&disk.id).is_some_and(|d| d.up && d.sync_from.is_some());
        RecoveryInfo {
            disk: disk.id.to_string(),
            state: if wants { RecoveryState::Comparing } else { RecoveryState::Idle },
            slots_total: SLOTS as u64,
            slots_done: if wants { 0 } else { SLOTS as u64 },
            objects_copied: 0,
            objects_planned: 0,
            bytes_moved: 0,
            bytes_per_second: 0,
            eta_seconds: None,
            waits_for: None,
        }
    };
    node.replica.disks().into_iter().map(progress).collect()
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
