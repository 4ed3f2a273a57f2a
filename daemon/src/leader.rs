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

/// When the leases of the up nodes were renewed, in one term of this node as leader.
#[derive(Debug, Default)]
struct Leases {
    term: u64,
    renewed: HashMap<NodeId, (u64, Instant)>,
}

impl Leases {
    /// The nodes of `up` whose lease ran out. One that is seen for the first time, in this term or
    /// with this incarnation, has a whole lease from now on.
    fn expired(
        &mut self,
        term: u64,
        up: impl Iterator<Item = (NodeId, u64)>,
        now: Instant,
    ) -> Vec<(NodeId, u64)> {
        if self.term != term {
            self.term = term;
            self.renewed.clear();
        }
        let mut expired = Vec::new();
        for (id, incarnation) in up {
            let renewed = self.renewed.entry(id).or_insert((incarnation, now));
            if renewed.0 != incarnation {
                *renewed = (incarnation, now);
            }
            if now.saturating_duration_since(renewed.1) > LEASE + LEASE_MARGIN {
                expired.push((id, incarnation));
            }
        }
        expired
    }
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
        lock(&self.leases).renewed.insert(id, (incarnation, Instant::now()));
        NodeReply::Granted
    }

    /// The up nodes whose leases ran out; empty while this node does not lead.
    fn expired(&self, node: &Node) -> Vec<(NodeId, u64)> {
        let mut leases = lock(&self.leases);
        if !node.log.is_confirmed_leader() {
            leases.renewed.clear();
            return Vec::new();
        }
        let view = node.cluster.view();
        let others = view.nodes.iter().filter(|(id, n)| n.up && **id != node.cluster.node);
        let others = others.map(|(id, n)| (*id, n.incarnation));
        leases.expired(node.log.status().term, others, Instant::now())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const NODE: NodeId = NodeId(1);

    #[test]
    fn i8_a_lease_runs_out_only_after_its_whole_length() {
        let mut leases = Leases::default();
        let begin = Instant::now();
        let limit = LEASE + LEASE_MARGIN;
        let mut at = |term, incarnation, after: Duration| {
            leases.expired(term, std::iter::once((NODE, incarnation)), begin + after)
        };
        let moment = Duration::from_millis(1);
        assert!(at(1, 7, Duration::ZERO).is_empty());
        assert!(at(1, 7, limit).is_empty());
        assert_eq!(at(1, 7, limit + moment), [(NODE, 7)]);
        // It comes back long after its last renewal: a new incarnation has a new lease.
        assert!(at(1, 8, 5 * limit).is_empty());
        assert_eq!(at(1, 8, 6 * limit + moment), [(NODE, 8)]);
        // A new term: the leader before may have renewed it at the last moment.
        assert!(at(2, 8, 7 * limit).is_empty());
        assert_eq!(at(2, 8, 8 * limit + moment), [(NODE, 8)]);
    }
}
