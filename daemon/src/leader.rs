//! What a node does while it leads the cluster log: it keeps the leases of all nodes, declares
//! those *down* whose lease ran out or whose process is gone, and lets others in.
//!
//! A lease is granted only while a quorum confirmed the leader so recently that nobody else can
//! lead, and counts from that confirmation. A new leader waits a whole lease before it declares
//! anybody down: from when a majority of the voters last heard of a predecessor, or, where it does
//! not learn that, from when it became leader (I8).

use crate::cluster::{LEASE, LEASE_MARGIN, lock};
use crate::control::{NodeReply, NodeRequest};
use crate::liveness::survey::{self, Applicants, Entrant};
use crate::node::{Node, now};
use crate::tasks::refuses;
use sheepdog_cluster::command::{Command, NodeInfo, decode_answer, encode_command};
use sheepdog_cluster::liveness::Damping;
use sheepdog_cluster::view::View;
use sheepdog_log::ClusterLog;
use sheepdog_types::{ClusterId, NodeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// How long the answers of other voters about earlier leaders are waited for.
const LOOK_BACK: Duration = Duration::from_millis(300);

/// A lease that was granted.
#[derive(Debug)]
struct Renewal {
    incarnation: u64,
    at: Instant,
    /// Up nodes that its holder could not reach then.
    unreachable: Vec<NodeId>,
    /// Not granted in this term: an earlier leader may have, as late as [`Leases::heard`].
    inherited: bool,
}

/// When the leases of the up nodes were renewed, in one term of this node as leader.
#[derive(Debug, Default)]
struct Leases {
    term: u64,
    renewed: HashMap<NodeId, Renewal>,
    /// The last moment of which an earlier leader's leases can count, once it is known.
    heard: Option<Instant>,
    /// No quorum confirmed this node for a while.
    interrupted: bool,
    /// Incarnations that get no lease any more, and why. They are down when they say that they
    /// have stopped, or when their lease has run out.
    condemned: HashMap<NodeId, (u64, String)>,
}

impl Leases {
    /// To be called whenever this node is known to lead in `term`: forgets an earlier term, in
    /// which whoever is up may have got a lease. Nobody could renew one while it was not known.
    fn lead(&mut self, term: u64, up: impl Iterator<Item = (NodeId, u64)>, now: Instant) {
        let inherited = self.term != term;
        if inherited {
            *self = Self { term, ..Self::default() };
        } else if !self.interrupted {
            return;
        }
        self.interrupted = false;
        for (id, incarnation) in up {
            let renewal = Renewal { incarnation, at: now, unreachable: Vec::new(), inherited };
            self.renewed.insert(id, renewal);
        }
    }

    /// The nodes of `up` whose lease ran out. One that is seen for the first time, in this term or
    /// with this incarnation, has a whole lease from now on.
    fn expired(
        &mut self,
        up: impl Iterator<Item = (NodeId, u64)>,
        now: Instant,
    ) -> Vec<(NodeId, u64)> {
        let mut expired = Vec::new();
        for (id, incarnation) in up {
            let first =
                || Renewal { incarnation, at: now, unreachable: Vec::new(), inherited: false };
            let renewed = self.renewed.entry(id).or_insert_with(first);
            if renewed.incarnation != incarnation {
                *renewed = first();
            }
            let inherited = self.heard.filter(|_| renewed.inherited);
            let at = inherited.map_or(renewed.at, |heard| renewed.at.min(heard));
            if now.saturating_duration_since(at) > LEASE + LEASE_MARGIN {
                expired.push((id, incarnation));
            }
        }
        expired
    }

    /// Why an incarnation gets no lease any more.
    fn condemned(&self, id: NodeId, incarnation: u64) -> Option<&str> {
        let (condemned, reason) = self.condemned.get(&id)?;
        (*condemned == incarnation).then_some(reason)
    }
}

/// What this node keeps in mind while it leads.
#[derive(Debug, Default)]
pub struct Leader {
    leases: Mutex<Leases>,
    /// Kept on every node, so that a new leader goes on with it.
    damping: Mutex<Option<(Instant, Damping)>>,
    /// Nodes that may not enter yet.
    pub applicants: Mutex<Applicants>,
    /// Wakes [`survey::judge`]: somebody cannot reach somebody.
    pub complained: Notify,
}

impl Leader {
    /// Renews the lease of a node, which cannot reach some others.
    pub fn renew(
        &self,
        node: &Node,
        id: NodeId,
        incarnation: u64,
        unreachable: Vec<NodeId>,
    ) -> NodeReply {
        if !node.log.is_confirmed_leader() {
            return NodeReply::NotLeader;
        }
        let view = node.cluster.view();
        if !view.nodes.get(&id).is_some_and(|n| n.up && n.incarnation == incarnation) {
            return NodeReply::EnterAgain;
        }
        // A later leader finds out when a quorum last acknowledged this one, not when this one
        // last granted a lease: so that is when leases begin.
        let status = node.log.status();
        let age = match status.quorum_acked_within() {
            // A sole voter is its own quorum, and asks nobody.
            _ if status.voters.len() == 1 => 0,
            Some(age) => u64::try_from(age.as_millis()).unwrap_or(u64::MAX).saturating_add(1),
            None => return NodeReply::NotLeader,
        };
        let mut leases = lock(&self.leases);
        leases.lead(status.term, others_up(node, &view), Instant::now());
        if let Some(reason) = leases.condemned(id, incarnation) {
            return NodeReply::Yield(reason.to_owned());
        }
        if unreachable.iter().any(|lost| view.nodes.get(lost).is_some_and(|n| n.up)) {
            self.complained.notify_one();
        }
        let renewal = Renewal { incarnation, at: Instant::now(), unreachable, inherited: false };
        leases.renewed.insert(id, renewal);
        NodeReply::Granted(age)
    }

    /// The up nodes whose leases ran out; empty while this node does not lead.
    fn expired(&self, node: &Node) -> Vec<(NodeId, u64, String)> {
        let mut leases = lock(&self.leases);
        if !node.log.is_confirmed_leader() {
            leases.interrupted = true;
            return Vec::new();
        }
        let view = node.cluster.view();
        let is_up = |id: &NodeId, incarnation: u64| {
            view.nodes.get(id).is_some_and(|n| n.up && n.incarnation == incarnation)
        };
        leases.condemned.retain(|id, (incarnation, _)| is_up(id, *incarnation));
        leases.lead(node.log.status().term, others_up(node, &view), Instant::now());
        let expired = leases.expired(others_up(node, &view), Instant::now());
        let with_reason = |(id, incarnation)| {
            let reason = leases.condemned(id, incarnation).unwrap_or("its lease ran out");
            (id, incarnation, reason.to_owned())
        };
        expired.into_iter().map(with_reason).collect()
    }

    /// Once in each term: asks the voters when they last heard of an earlier leader. What a majority
    /// says bounds what any quorum can have acknowledged, and so how long leases hold that this
    /// node did not grant.
    async fn look_back(&self, node: &Node) {
        let status = node.log.status();
        let is_known = {
            let leases = lock(&self.leases);
            leases.term == status.term && leases.heard.is_some()
        };
        if is_known || status.is_changing || !node.log.is_confirmed_leader() {
            return;
        }
        let me = node.cluster.node.0;
        let mut asked = JoinSet::new();
        for voter in status.voters.iter().filter(|voter| **voter != me) {
            let Some(address) = status.addresses.get(voter).cloned() else { continue };
            let (client, request) =
                (Arc::clone(&node.client), NodeRequest::HeardBefore { term: status.term });
            asked.spawn(async move {
                let ask = tokio::time::timeout(LOOK_BACK, client.ask(&address, &request));
                let Ok(Ok(NodeReply::Heard(ago))) = ask.await else { return None };
                Instant::now().checked_sub(Duration::from_millis(ago?))
            });
        }
        let own = node.log.heard_before(status.term);
        let mut heard: Vec<Instant> =
            own.and_then(|ago| Instant::now().checked_sub(ago)).into_iter().collect();
        while heard.len() <= status.voters.len() / 2 {
            let Some(answer) = asked.join_next().await else { return };
            heard.extend(answer.ok().flatten());
        }
        let now = node.log.status();
        let mut leases = lock(&self.leases);
        if leases.term == now.term && now.term == status.term && now.voters == status.voters {
            leases.heard = heard.into_iter().max();
        }
    }

    /// Declares down who has no lease.
    pub async fn tend(&self, node: &Node) {
        for (id, incarnation, reason) in self.expired(node) {
            declare_down(node, id, incarnation, &reason).await;
        }
        self.look_back(node).await;
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

    /// An incarnation says that it has stopped serving for good.
    pub async fn left(&self, node: &Node, id: NodeId, incarnation: u64) {
        let reason = lock(&self.leases).condemned(id, incarnation).map(str::to_owned);
        let Some(reason) = reason else { return };
        if node.log.is_confirmed_leader() {
            declare_down(node, id, incarnation, &reason).await;
        }
    }

    /// Pairs of which the first said that it cannot reach the second when it last renewed its
    /// lease.
    #[must_use]
    pub fn complaints(&self, node: &Node) -> Vec<(NodeId, NodeId)> {
        let view = node.cluster.view();
        let leases = lock(&self.leases);
        let is_current = |id: &NodeId, renewal: &Renewal| {
            view.nodes.get(id).is_some_and(|n| n.up && n.incarnation == renewal.incarnation)
        };
        let current = leases.renewed.iter().filter(|(id, renewal)| is_current(id, renewal));
        current.flat_map(|(id, r)| r.unreachable.iter().map(|lost| (*id, *lost))).collect()
    }

    /// Gives an incarnation of a node no lease any more.
    pub fn condemn(&self, id: NodeId, incarnation: u64, reason: String) {
        tracing::warn!(node = %id, reason, "a node has to leave the cluster");
        lock(&self.leases).condemned.insert(id, (incarnation, reason));
    }

    /// Whether an incarnation gets no lease any more.
    #[must_use]
    pub fn is_condemned(&self, id: NodeId, incarnation: u64) -> bool {
        lock(&self.leases).condemned(id, incarnation).is_some()
    }

    /// Counts entries. They are told apart from those of the past, which the log repeats at the
    /// start, by that this node has entered.
    pub fn observe(&self, node: &Node, view: &View) {
        let mut damping = lock(&self.damping);
        if damping.is_none() && !node.cluster.has_entered(view) {
            return;
        }
        let (begin, damping) = damping.get_or_insert_with(|| (Instant::now(), Damping::default()));
        for (id, member) in &view.nodes {
            damping.observe(*id, member.incarnation, begin.elapsed());
        }
    }

    /// How long a node has to wait before it may enter again, and why.
    fn hold(&self, id: NodeId) -> Option<(Duration, String)> {
        let damping = lock(&self.damping);
        let (begin, damping) = damping.as_ref()?;
        let now = begin.elapsed();
        let count = damping.entries(id, now);
        let reason = format!(
            "it has entered {count} times within minutes, so it has to wait longer each time"
        );
        damping.hold(id, now).map(|left| (left, reason))
    }

    /// Lets a node in, or says why not. Whatever the answer: no earlier incarnation of it serves.
    pub async fn admit(&self, node: &Node, info: NodeInfo, unreachable: Vec<NodeId>) -> NodeReply {
        if !node.log.is_confirmed_leader() {
            return NodeReply::NotLeader;
        }
        if node.cluster.state().cluster == ClusterId(0) {
            return NodeReply::NotFounded;
        }
        let (id, incarnation) = (info.id, info.incarnation);
        let view = node.cluster.view();
        if view.nodes.get(&id).is_some_and(|n| n.up && n.incarnation == incarnation) {
            return NodeReply::Entered; // the answer was lost
        }
        if let Some((wait, reason)) = self.hold(id) {
            depose(node, id, incarnation, &reason).await;
            let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            return NodeReply::StayOut { reason, wait: wait.max(1) };
        }
        let storage = !info.disks.is_empty();
        let entrant = Entrant { id, address: &info.address, storage };
        if let Err(reason) = survey::examine(node, entrant, unreachable).await {
            depose(node, id, incarnation, &reason).await;
            return NodeReply::StayOut { reason, wait: 0 };
        }
        lock(&self.applicants).remove(id);
        let command = Command::Enter { node: info, at: now() };
        let answer = node.log.propose(encode_command(&command)).await;
        let reason = match answer.map(|bytes| decode_answer(&bytes)) {
            Ok(Ok(_)) => return NodeReply::Entered,
            Ok(Err(refusal)) => format!("refused: {refusal}"),
            Err(error) => error.to_string(),
        };
        NodeReply::StayOut { reason, wait: 0 }
    }
}

/// The other nodes that are up, and their incarnations.
fn others_up(node: &Node, view: &View) -> impl Iterator<Item = (NodeId, u64)> {
    let others = view.nodes.iter().filter(|(id, n)| n.up && **id != node.cluster.node);
    others.map(|(id, n)| (*id, n.incarnation))
}

/// A node that is up by the log has begun another life and may not enter: it is down.
async fn depose(node: &Node, id: NodeId, incarnation: u64, reason: &str) {
    let view = node.cluster.view();
    if let Some(old) = view.nodes.get(&id).filter(|n| n.up && n.incarnation != incarnation) {
        declare_down(node, id, old.incarnation, reason).await;
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
            let up = std::iter::once((NODE, incarnation));
            leases.lead(term, up.clone(), begin + after);
            leases.expired(up, begin + after)
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

    #[test]
    fn i8_a_new_leader_waits_for_leases_of_the_last_one() {
        let limit = LEASE + LEASE_MARGIN;
        let moment = Duration::from_millis(1);
        let heard = Instant::now();
        let elected = heard + Duration::from_secs(1);
        let mut leases = Leases::default();
        let up = |incarnation| std::iter::once((NODE, incarnation));
        leases.lead(3, up(7), elected);
        assert!(leases.expired(up(7), heard + limit + moment).is_empty(), "nobody knows better");
        leases.heard = Some(heard);
        assert!(leases.expired(up(7), heard + limit).is_empty());
        assert_eq!(leases.expired(up(7), heard + limit + moment), [(NODE, 7)]);
        // What entered since has its lease from this leader, and so has what it granted one.
        let entered = heard + limit + moment;
        assert!(leases.expired(up(8), entered + moment).is_empty());
        assert!(leases.expired(up(8), entered + moment + limit).is_empty());
        assert_eq!(leases.expired(up(8), entered + limit + 2 * moment), [(NODE, 8)]);
        // Leases that this leader granted do not end sooner because it was in doubt for a while.
        let doubted = entered + 2 * limit;
        leases.interrupted = true;
        leases.lead(3, up(8), doubted);
        assert!(leases.expired(up(8), doubted + limit).is_empty());
        assert_eq!(leases.expired(up(8), doubted + limit + moment), [(NODE, 8)]);
        // And a later term knows nothing of it.
        leases.lead(4, up(8), entered + 9 * limit);
        assert!(leases.expired(up(8), entered + 10 * limit).is_empty());
    }
}
