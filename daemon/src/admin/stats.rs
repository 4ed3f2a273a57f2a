//! What the nodes tell of their disks.

use crate::cluster::lock;
use crate::control::{DiskHealth, DiskStats, NodeReply, NodeRequest, NodeStats};
use crate::node::Node;
use crate::replica::Disk;
use sheepdog_types::{NodeId, VolumeId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// How long the answers of other nodes are waited for.
const STATS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long they are waited for when the health of the cluster is asked for.
const DISKS_TIMEOUT: Duration = Duration::from_secs(1);

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
    let clients = node.exports.clients().into_iter();
    stats.clients = clients.map(|(volume, count)| (volume, count as u32)).collect();
    stats.volumes = volumes.into_iter().map(|(id, bytes)| (id.0, bytes)).collect();
    stats
}

/// How well this node's disks are.
#[must_use]
pub fn local_disks(node: &Node) -> Vec<DiskHealth> {
    let health = |disk: Arc<Disk>| DiskHealth {
        id: disk.id,
        damaged: disk.store.damage().blocks.len() as u64,
        failure: (disk.store.failure().map(|reason| reason.to_string()))
            .or_else(|| node.recoveries.out_of_service(disk.id)),
    };
    let unopened = lock(&node.unopened).clone().into_iter().map(|(id, failure)| DiskHealth {
        id,
        damaged: 0,
        failure: Some(failure),
    });
    node.replica.disks().into_iter().map(health).chain(unopened).collect()
}

/// Asks all up nodes but this one, side by side; `None` for those that do not answer in time.
pub async fn ask_all(
    node: &Arc<Node>,
    request: &NodeRequest,
    limit: Duration,
) -> BTreeMap<NodeId, Option<NodeReply>> {
    let view = node.cluster.view();
    let mut asked = Vec::new();
    for (id, peer) in view.nodes.iter().filter(|(id, n)| n.up && **id != node.cluster.node) {
        let (address, node, request) = (peer.address.clone(), Arc::clone(node), request.clone());
        let ask = async move { timeout(limit, node.client.ask(&address, &request)).await };
        asked.push((*id, tokio::spawn(ask)));
    }
    let mut replies = BTreeMap::new();
    for (id, task) in asked {
        let reply = if let Ok(Ok(Ok(reply))) = task.await { Some(reply) } else { None };
        replies.insert(id, reply);
    }
    replies
}

/// How well the disks of all up nodes are, as far as these answer.
pub async fn all_disks(node: &Arc<Node>) -> Vec<DiskHealth> {
    let mut disks = local_disks(node);
    for reply in ask_all(node, &NodeRequest::Disks, DISKS_TIMEOUT).await.into_values().flatten() {
        if let NodeReply::Disks(others) = reply {
            disks.extend(others);
        }
    }
    disks
}

/// The statistics of all up nodes; `None` for those that do not answer.
pub async fn all_stats(node: &Arc<Node>) -> BTreeMap<NodeId, Option<NodeStats>> {
    let others = ask_all(node, &NodeRequest::Stats, STATS_TIMEOUT).await;
    let stats = |reply| if let Some(NodeReply::Stats(stats)) = reply { Some(stats) } else { None };
    let mut all: BTreeMap<_, _> =
        others.into_iter().map(|(id, reply)| (id, stats(reply))).collect();
    if node.cluster.view().nodes.get(&node.cluster.node).is_some_and(|n| n.up) {
        let here = Arc::clone(node);
        let mine = tokio::task::spawn_blocking(move || local_stats(&here)).await;
        all.insert(node.cluster.node, mine.ok());
    }
    all
}
