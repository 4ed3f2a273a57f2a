//! What a node does while it leads the cluster log: it keeps the leases of all nodes, and declares
//! those *down* whose lease ran out or whose process is gone.
//!
//! A lease is granted only while a quorum confirmed the leader so recently that nobody else can
//! lead. A new leader waits a whole lease before it declares anybody down: its predecessor may
//! have granted one at the last moment (I8).

use crate::cluster::{LEASE, LEASE_MARGIN, lock};
use crate::control::NodeReply;
use crate::node::{Node, now};
use crate::tasks::refuses;
use sheepdog_cluster::command::{Command, encode_command};
use sheepdog_log::ClusterLog;
use sheepdog_types::NodeId;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;

#[derive(Debug, Default)]
struct Leases {
    /// Since when this node leads without interruption.
    since: Option<(u64, Instant)>,
    renewed: HashMap<NodeId, Instant>,
}

/// The leases that this node keeps while it leads.
#[derive(Debug, Default)]
pub struct Leader {
    leases: Mutex<Leases>,
}

impl Leader {
    /// Renews the lease of a node.
    pub fn renew(&self, node: &Node, id: NodeId, incarnation: u64) -> NodeReply {
        if !node.log.is_confirmed_leader() {
            return NodeReply::NotLeader;
        }
        let view = node.cluster.view();
        if !view.nodes.get(&id).is_some_and(|n| n.up && n.incarnation == incarnation) {
            return NodeReply::EnterAgain;
        }
        lock(&self.leases).renewed.insert(id, Instant::now());
        NodeReply::Granted
    }

    /// The up nodes whose leases ran out; empty while this node does not lead.
    fn expired(&self, node: &Node) -> Vec<(NodeId, u64)> {
        let mut leases = lock(&self.leases);
        if !node.log.is_confirmed_leader() {
            leases.since = None;
            leases.renewed.clear();
            return Vec::new();
        }
        let term = node.log.status().term;
        let since = match leases.since {
            Some((led, since)) if led == term => since,
            _ => {
                let since = Instant::now();
                leases.since = Some((term, since));
                since
            }
        };
        let view = node.cluster.view();
        let limit = LEASE + LEASE_MARGIN;
        view.nodes
            .iter()
            .filter(|(id, n)| n.up && **id != node.cluster.node)
            .filter(|(id, _)| {
                let renewed = leases.renewed.get(id).copied().unwrap_or(since);
                renewed.max(since).elapsed() > limit
            })
            .map(|(id, n)| (*id, n.incarnation))
            .collect()
    }

    /// Declares down who has no lease, and tells the log which nodes may vote.
    pub async fn tend(&self, node: &Node) {
        for (id, incarnation) in self.expired(node) {
            declare_down(node, id, incarnation, "its lease ran out").await;
        }
        if node.log.status().is_leader {
            let view = node.cluster.view();
            let up: Vec<u64> =
                view.nodes.iter().filter(|(_, n)| n.up).map(|(id, _)| id.0).collect();
            node.log.reconcile_members(&up);
        }
    }

    /// A node's port is said to refuse connections: looks for itself, and declares it down if so.
    pub async fn probe(&self, node: &Node, id: NodeId) {
        let view = node.cluster.view();
        let Some(suspect) = view.nodes.get(&id).filter(|n| n.up) else { return };
        if !node.log.is_confirmed_leader() || id == node.cluster.node {
            return;
        }
        if refuses(node, id).await {
            let reason = "its process is gone (connection refused)";
            declare_down(node, id, suspect.incarnation, reason).await;
        }
    }
}

async fn declare_down(node: &Node, id: NodeId, incarnation: u64, reason: &str) {
    tracing::warn!(node = %id, reason, "declaring a node down");
    let reason = reason.to_owned();
    let command = Command::Down { node: id, incarnation, reason, at: now() };
    if let Err(error) = node.log.propose(encode_command(&command)).await {
        tracing::warn!(node = %id, %error, "cannot declare it down yet");
    }
}
