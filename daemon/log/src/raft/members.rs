//! Who is a member, and who of them votes.
//!
//! ```text
//!            add_member                caught up, votes are free, or a voter is down
//! stranger ────────────► learner ─────────────────────────────────────────────► voter
//!     ▲                   │   ▲                                                   │
//!     └── remove_member ──┘   └──── down, and a learner takes its place, or gone ─┘
//!     ▲                                                                           │
//!     └────────────────────────────── remove_member ──────────────────────────────┘
//! ```
//!
//! The left side is asked for; the right side happens by itself on whoever leads, so that a
//! change which a leader did not finish is finished by the next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::TransferLeaderRequest;
use openraft::{BasicNode, Instant as _, LogIdOptionExt, Membership, ServerState};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::Shared;
use super::forward::outcome_of;
use super::types::{Bytes, Changes, Metrics};
use super::wire::{Operation, Outcome};

/// How long to wait before trying again what another change was in the way of.
const RETRY: Duration = Duration::from_millis(20);
/// A learner is caught up when it lacks no more entries than this.
const CAUGHT_UP: u64 = 16;

/// What was said of the nodes, see [`ClusterLog::reconcile_members`](crate::ClusterLog).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said {
    /// Nodes that are up, most wanted first.
    pub up: Vec<u64>,
    /// Nodes on whose return nobody counts.
    pub gone: Vec<u64>,
}

/// What the leader knows when it decides who votes.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub me: u64,
    pub voters: BTreeSet<u64>,
    /// Learners that are caught up and answered a moment ago.
    pub ready: BTreeSet<u64>,
    /// `None` if nobody said.
    pub said: Option<Said>,
    pub max_voters: usize,
}

/// A change of the voters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    Promote(u64),
    Replace {
        dead: u64,
        by: u64,
    },
    /// They become learners.
    Drop(BTreeSet<u64>),
}

/// The next change that brings the voters closer to what is wanted, if any.
///
/// Replacing goes before promoting: a further voter beside a dead one would raise the quorum
/// without there being anyone more to reach it. Votes of the gone are dropped only down to an odd
/// number: of three voters one may be lost, of two none.
pub fn plan(view: &View) -> Option<Plan> {
    let said = view.said.as_ref();
    let candidate = match said {
        Some(said) => said.up.iter().copied().find(|node| view.ready.contains(node)),
        None => view.ready.first().copied(),
    };
    let is_up = |node: u64| node == view.me || said.is_none_or(|said| said.up.contains(&node));
    let (up, down): (Vec<u64>, Vec<u64>) = view.voters.iter().partition(|node| is_up(**node));
    let Some(dead) = down.first() else {
        return candidate.filter(|_| view.voters.len() < view.max_voters).map(Plan::Promote);
    };
    // Both the old voters and the new must agree to the change, so both need a quorum now.
    if up.len() <= view.voters.len() / 2 {
        return None;
    }
    if let Some(by) = candidate {
        return Some(Plan::Replace { dead: *dead, by });
    }
    let is_gone = |node: &u64| said.is_some_and(|said| said.gone.contains(node));
    let mut gone: BTreeSet<u64> = down.into_iter().filter(is_gone).collect();
    if (view.voters.len() - gone.len()).is_multiple_of(2) {
        gone.pop_last();
    }
    (!gone.is_empty()).then_some(Plan::Drop(gone))
}

impl From<Plan> for Changes {
    fn from(plan: Plan) -> Self {
        match plan {
            Plan::Promote(node) => Changes::AddVoterIds(BTreeSet::from([node])),
            Plan::Replace { dead, by } => Changes::Batch(vec![
                Changes::AddVoterIds(BTreeSet::from([by])),
                Changes::RemoveVoters(BTreeSet::from([dead])),
            ]),
            Plan::Drop(gone) => Changes::RemoveVoters(gone),
        }
    }
}

/// What `operation` still needs, given the members.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Change(Changes),
    Impossible(String),
}

fn next_step(operation: &Operation, members: &Membership<u64, BasicNode>) -> Step {
    let node = |addr: &String| BasicNode::new(addr.as_str());
    match operation {
        Operation::Propose(_) => Step::Nothing,
        Operation::AddMember(id, addr) => match members.get_node(id) {
            None => Step::Change(Changes::AddNodes(BTreeMap::from([(*id, node(addr))]))),
            Some(known) if known.addr == *addr => Step::Nothing,
            Some(_) => Step::Change(Changes::SetNodes(BTreeMap::from([(*id, node(addr))]))),
        },
        Operation::UpdateAddress(id, addr) => match members.get_node(id) {
            None => Step::Impossible(format!("node {id:#x} is not a member")),
            Some(known) if known.addr == *addr => Step::Nothing,
            Some(_) => Step::Change(Changes::SetNodes(BTreeMap::from([(*id, node(addr))]))),
        },
        Operation::RemoveMember(id) => {
            let voters: BTreeSet<u64> = members.voter_ids().collect();
            let only = BTreeSet::from([*id]);
            if voters == only {
                Step::Impossible(format!("node {id:#x} is the only voter"))
            } else if voters.contains(id) {
                Step::Change(Changes::RemoveVoters(only))
            } else if members.get_node(id).is_some() {
                Step::Change(Changes::RemoveNodes(only))
            } else {
                Step::Nothing
            }
        }
    }
}

impl Shared {
    /// Brings the members to what `operation` asks for, if this node is the leader.
    pub async fn change_members(&self, operation: &Operation, deadline: Instant) -> Outcome {
        let busy = || Outcome::NotLeader(None);
        let Ok(_changing) = timeout_at(deadline, self.changing.lock()).await else {
            return busy();
        };
        while Instant::now() < deadline {
            let metrics = self.metrics();
            if metrics.state != ServerState::Leader {
                return Self::not_leader(&metrics);
            }
            if !is_settled(&metrics) {
                sleep(RETRY).await;
                continue;
            }
            let change = match next_step(operation, metrics.membership_config.membership()) {
                Step::Nothing => return Outcome::Done(Bytes::default()),
                Step::Impossible(why) => return Outcome::Rejected(why),
                Step::Change(change) => change,
            };
            let changed = self.raft.change_membership(change, false);
            match timeout_at(deadline, changed).await {
                Ok(Ok(_)) => return Outcome::Done(Bytes::default()),
                Ok(Err(error)) if is_busy(&error) => sleep(RETRY).await,
                Ok(Err(error)) => return outcome_of(error),
                Err(_) => return Outcome::Unknown("no quorum acknowledged it in time".into()),
            }
        }
        busy()
    }

    /// Stands for election at once, without regard to the lease of the dead `leader`, if this
    /// node is the one to do so: two that stand at the same time would share the votes.
    pub async fn take_over(&self, leader: u64) {
        let metrics = self.metrics();
        let said = self.said.borrow().clone();
        let is_up = |node: &u64| said.as_ref().is_none_or(|said| said.up.contains(node));
        let membership = &metrics.membership_config;
        let heir = membership.voter_ids().find(|node| *node != leader && is_up(node));
        if metrics.current_leader != Some(leader) || heir != Some(self.id) {
            return;
        }
        tracing::info!(leader, "the leader of the cluster log has died, taking over");
        // As if the leader had handed over with its last breath.
        let transfer = TransferLeaderRequest::new(metrics.vote, self.id, metrics.last_applied);
        match self.raft.handle_transfer_leader(transfer).await {
            Ok(Ok(())) => {}
            // The ordinary election follows all the same.
            Ok(Err(error)) => tracing::info!(%error, "did not take over"),
            Err(error) => tracing::info!(%error, "did not take over"),
        }
    }

    /// Hands the lead over to another voter, once one has all entries; returns when another leads.
    pub async fn hand_over(&self) {
        let mut changes = self.raft.metrics();
        let mut heir = None;
        loop {
            let metrics = changes.borrow_watched().clone();
            if metrics.current_leader.is_some_and(|leader| leader != self.id) {
                return;
            }
            if heir.is_none() && metrics.state == ServerState::Leader {
                if metrics.membership_config.voter_ids().all(|voter| voter == self.id) {
                    return;
                }
                heir = self.heir(&metrics);
                if let Some(heir) = heir {
                    tracing::info!(heir, "handing the cluster log over");
                    // It fails only if Raft has stopped.
                    let _ = self.raft.trigger().transfer_leader(heir).await;
                }
            } else if heir.is_none() {
                return; // it does not lead, and knows of nobody who does
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// A voter that has all entries and answered a moment ago, if there is one.
    fn heir(&self, metrics: &Metrics) -> Option<u64> {
        let said = self.said.borrow().clone();
        let has_all = |voter: &u64| {
            let matched = metrics.replication.as_ref().and_then(|all| *all.get(voter)?);
            let acked = metrics.heartbeat.as_ref().and_then(|all| *all.get(voter)?);
            matched.index() == metrics.last_log_index
                && acked.is_some_and(|at| at.elapsed() < self.options.election_timeout.0)
                && said.as_ref().is_none_or(|said| said.up.contains(voter))
        };
        metrics.membership_config.voter_ids().find(|voter| *voter != self.id && has_all(voter))
    }

    /// Promotes and replaces voters while this node leads.
    pub async fn keep_members(self: Arc<Self>) {
        let mut metrics = self.raft.metrics();
        let mut said = self.said.subscribe();
        loop {
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() { return },
                changed = said.changed() => if changed.is_err() { return },
            }
            let seen = metrics.borrow_watched().clone();
            if seen.state == ServerState::Leader {
                self.keep_members_once(&seen).await;
            }
            // Metrics change with every heartbeat of every member; once per interval is enough.
            sleep(self.options.heartbeat).await;
        }
    }

    async fn keep_members_once(&self, metrics: &Metrics) {
        let Ok(_changing) = self.changing.try_lock() else {
            return;
        };
        let change = if has_unfinished_change(metrics) {
            Changes::AddVoterIds(BTreeSet::new())
        } else if is_settled(metrics)
            && let Some(plan) = plan(&self.view(metrics))
        {
            tracing::info!(?plan, "changing the voters of the cluster log");
            plan.into()
        } else {
            return;
        };
        let changed = self.raft.change_membership(change, true);
        match timeout(self.options.propose_timeout, changed).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) if is_busy(&error) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the voters could not be changed, will retry"),
            Err(_) => tracing::warn!("the change of the voters found no quorum yet, will retry"),
        }
    }

    fn view(&self, metrics: &Metrics) -> View {
        let membership = metrics.membership_config.membership();
        let committed = metrics.local_committed.next_index();
        let is_ready = |learner: &u64| {
            let matched = metrics.replication.as_ref().and_then(|all| *all.get(learner)?);
            let acked = metrics.heartbeat.as_ref().and_then(|all| *all.get(learner)?);
            matched.next_index() + CAUGHT_UP >= committed
                && matched.is_some()
                && acked.is_some_and(|at| at.elapsed() < self.options.election_timeout.1)
        };
        View {
            me: self.id,
            voters: membership.voter_ids().collect(),
            ready: membership.learner_ids().filter(is_ready).collect(),
            said: self.said.borrow().clone(),
            max_voters: self.options.max_voters,
        }
    }
}

fn is_committed(metrics: &Metrics) -> bool {
    metrics.membership_config.log_id() == metrics.committed_membership_config.log_id()
}

/// Whether the last change of the members is complete.
pub fn is_settled(metrics: &Metrics) -> bool {
    is_committed(metrics) && metrics.membership_config.get_joint_config().len() <= 1
}

/// Whether a change of the voters stopped half way: its leader died between the two steps.
fn has_unfinished_change(metrics: &Metrics) -> bool {
    is_committed(metrics) && metrics.membership_config.get_joint_config().len() > 1
}

/// Whether something else has to be finished first, which takes but a moment.
fn is_busy(error: &RaftError<super::types::Types, ClientWriteError<super::types::Types>>) -> bool {
    matches!(
        error,
        RaftError::APIError(ClientWriteError::ChangeMembershipError(
            ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_)
        ))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(voters: &[u64], ready: &[u64], up: Option<&[u64]>) -> View {
        View {
            me: 1,
            voters: voters.iter().copied().collect(),
            ready: ready.iter().copied().collect(),
            said: up.map(|up| Said { up: up.to_vec(), gone: Vec::new() }),
            max_voters: 3,
        }
    }

    #[test]
    fn a_ready_learner_is_promoted_while_votes_are_free() {
        assert_eq!(plan(&view(&[1], &[2, 3], None)), Some(Plan::Promote(2)));
        assert_eq!(plan(&view(&[1, 2], &[], None)), None);
        assert_eq!(plan(&view(&[1, 2, 3], &[4], None)), None);
    }

    #[test]
    fn the_most_wanted_learner_goes_first() {
        let view = view(&[1], &[2, 3, 4], Some(&[1, 5, 4, 2]));
        assert_eq!(plan(&view), Some(Plan::Promote(4)));
    }

    #[test]
    fn a_learner_that_is_not_up_is_left_alone() {
        assert_eq!(plan(&view(&[1], &[2], Some(&[1]))), None);
    }

    #[test]
    fn a_dead_voter_is_replaced_before_another_is_added() {
        let expected = Some(Plan::Replace { dead: 2, by: 4 });
        let mut view = view(&[1, 2, 3], &[4], Some(&[1, 3, 4]));
        assert_eq!(plan(&view), expected);
        view.max_voters = 5;
        assert_eq!(plan(&view), expected);
    }

    #[test]
    fn without_a_quorum_of_the_old_voters_nothing_is_tried() {
        assert_eq!(plan(&view(&[1, 2], &[3], Some(&[1, 3]))), None);
        assert_eq!(plan(&view(&[1, 2, 3], &[4], Some(&[1, 4]))), None);
    }

    #[test]
    fn a_voter_that_is_down_stays_when_nobody_can_take_its_place() {
        assert_eq!(plan(&view(&[1, 2, 3], &[], Some(&[1, 3]))), None);
    }

    #[test]
    fn votes_of_the_gone_are_dropped_where_that_helps() {
        let dropped = |voters: &[u64], up: &[u64], gone: &[u64]| {
            let mut view = view(voters, &[], Some(up));
            view.said.as_mut().unwrap().gone = gone.to_vec();
            plan(&view)
        };
        let drop = |gone: &[u64]| Some(Plan::Drop(gone.iter().copied().collect()));
        assert_eq!(dropped(&[1, 2, 3, 4], &[1, 2, 3], &[]), None, "it may come back");
        assert_eq!(dropped(&[1, 2, 3, 4], &[1, 2, 3], &[4]), drop(&[4]));
        assert_eq!(dropped(&[1, 2, 3, 4, 5], &[1, 2, 3], &[4]), None, "4 bear no more than 5");
        assert_eq!(dropped(&[1, 2, 3, 4, 5], &[1, 2, 3], &[4, 5]), drop(&[4, 5]));
        assert_eq!(dropped(&[1, 2, 3], &[1, 2], &[3]), None, "2 bear no more than 3");
        assert_eq!(dropped(&[1, 2, 3, 4], &[1, 2], &[3, 4]), None, "no quorum");
        assert_eq!(dropped(&[1, 2, 3, 4], &[1, 2, 3, 4], &[4]), None, "it is up");
    }

    #[test]
    fn the_leader_itself_is_up_whatever_is_said() {
        assert_eq!(plan(&view(&[1], &[2], Some(&[2]))), Some(Plan::Promote(2)));
    }
}
