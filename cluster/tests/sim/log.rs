//! The cluster log as its users see it: a leader with a majority of the voters commits, everybody
//! whom it reaches hears of it some time; and what the leader does with leases.

use super::node::{LEASE, LEASE_MARGIN};
use super::topology::build_view;
use super::world::{Mutant, Time, World};
use sheepdog_cluster::command::{Answer, Command, Outcome, encode_command};
use sheepdog_cluster::liveness::{Candidate, Graph};
use sheepdog_cluster::state::{ClusterState, Volume};
use sheepdog_cluster::view::View;
use sheepdog_types::NodeId;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The first nodes vote.
const VOTERS: usize = 5;

/// What a leader knows of a node's lease.
#[derive(Clone, Copy)]
struct Renewal {
    incarnation: u64,
    /// By the leader's clock.
    at: Time,
    /// Granted by an earlier leader, if at all.
    inherited: bool,
}

#[derive(Default)]
pub struct Log {
    /// After all that is committed.
    pub state: ClusterState,
    /// One for each revision.
    pub views: Vec<Arc<View>>,
    pub leader: Option<usize>,
    elect_at: Time,
    /// When it arrives, who sent it, and the command.
    pub proposals: Vec<(Time, usize, Command)>,
    /// Renewals under way: arrival at the leader, who, incarnation, and when it was sent.
    renewals: Vec<(Time, usize, u64, Time)>,
    /// Answers under way: arrival, to whom, incarnation, when the renewal was sent, granted.
    answers: Vec<(Time, usize, u64, Time, bool)>,
    renewed: BTreeMap<NodeId, Renewal>,
    /// Incarnations that the leader gives no lease any more.
    condemned: BTreeMap<NodeId, u64>,
    /// When each voter last heard of the leader before this one, as far as it knows; on its clock.
    heard_before: Vec<Option<Time>>,
    /// The latest that a majority of them knows, by the leader's clock: older leases are not longer.
    granted_until: Option<Time>,
    /// What each revision cost whoever applied it: whether rings changed, and the time.
    pub costs: Vec<(bool, Duration)>,
}

impl World {
    /// Commits a command, now.
    pub fn commit(&mut self, command: Command) -> Answer {
        self.traffic.commands += encode_command(&command).len() as u64;
        let text = if self.trace.on { describe(&command) } else { String::new() };
        let started = Instant::now();
        let before = (self.log.state.revision, self.log.state.epoch);
        let rings = (self.log.state.ring.clone(), self.log.state.next_ring.clone());
        let answer = self.log.state.apply(command);
        if self.mutant == Mutant::PromoteEarly
            && let Some(next) = self.log.state.next_ring.take()
        {
            self.log.state.ring = next;
        }
        let state = &self.log.state;
        if before == (state.revision, state.epoch) {
            note!(self, "log: {text}, changes nothing ({answer:?})");
            return answer;
        }
        let moved = rings != (state.ring.clone(), state.next_ring.clone());
        let view = if self.mutant == Mutant::ServeIncomplete {
            build_view(&trusting(state), self.log.views.last(), moved)
        } else {
            build_view(state, self.log.views.last(), moved)
        };
        self.log.views.push(view);
        if self.log.views.len().is_multiple_of(256) {
            self.forget_views();
        }
        self.log.costs.push((moved, started.elapsed()));
        note!(self, "epoch {}: {text}", self.log.state.epoch);
        answer
    }

    /// Lets go of views that everybody is past: a thousand nodes make thousands of large ones.
    fn forget_views(&mut self) {
        let nodes = self.nodes.iter().filter(|node| !node.gone).map(|node| node.applied);
        let gateways = self.instances.iter().map(|instance| instance.view_at);
        let oldest = nodes.chain(gateways).min().unwrap_or(0);
        let keep = Arc::clone(&self.log.views[oldest]);
        self.log.views[..oldest].fill(keep);
    }

    /// Sends a command to the leader. It may get lost, and it may come twice.
    pub fn propose(&mut self, from: usize, command: Command) {
        let at = self.now + self.rng.range(1, 4);
        let may_come_twice = !matches!(command, Command::Attach { .. });
        if !self.calm && may_come_twice && self.rng.chance(20) {
            let later = at + self.rng.range(1, 100);
            self.log.proposals.push((later, from, command.clone()));
        }
        self.log.proposals.push((at, from, command));
    }

    pub fn run_log(&mut self) {
        self.elect();
        self.be_heard();
        self.receive_proposals();
        self.receive_renewals();
        if self.now.is_multiple_of(10) {
            self.look_back();
            self.expire_leases();
            self.look_around();
        }
        self.find_dead_processes();
        self.deliver_log();
    }

    pub fn voters(&self) -> Range<usize> {
        let (nodes, witnesses) = (self.topology.nodes, self.topology.witnesses);
        let able = if witnesses > 0 { witnesses } else { nodes }.min(VOTERS);
        let count = if able.is_multiple_of(2) { able - 1 } else { able }.max(1);
        let first = if witnesses > 0 { nodes - witnesses } else { 0 };
        first..first + count
    }

    fn has_quorum(&self, at: usize) -> bool {
        let voters = self.voters();
        let voter = |v: &usize| self.nodes[*v].runs(self.now) && self.net.both(at, *v);
        let reached = voters.clone().filter(voter).count();
        reached > voters.len() / 2
    }

    fn elect(&mut self) {
        match self.log.leader {
            Some(at) if !self.nodes[at].runs(self.now) || !self.has_quorum(at) => {
                note!(self, "n{} leads no more", at + 1);
                self.log.leader = None;
                self.log.elect_at = self.now + self.rng.range(20, 100);
            }
            Some(_) => {}
            None if self.now >= self.log.elect_at => {
                let able: Vec<usize> = self
                    .voters()
                    .filter(|v| self.nodes[*v].runs(self.now) && self.has_quorum(*v))
                    .collect();
                self.log.elect_at = self.now + 10;
                if let Some(leader) = self.rng.pick(&able) {
                    self.lead(leader);
                }
            }
            None => {}
        }
    }

    fn receive_proposals(&mut self) {
        let now = self.now;
        if self.log.proposals.iter().all(|p| p.0 > now) {
            return;
        }
        let all = std::mem::take(&mut self.log.proposals);
        let (due, later): (Vec<_>, Vec<_>) = all.into_iter().partition(|p| p.0 <= now);
        self.log.proposals = later;
        for (_, from, command) in due {
            let Some(leader) = self.log.leader else { continue };
            if self.net.both(from, leader) {
                self.commit_now(command);
            }
        }
    }

    /// Commits, and notes what it means for the guests.
    pub fn commit_now(&mut self, command: Command) {
        let attach = match &command {
            Command::Attach { gateway, incarnation, .. }
            | Command::TakeOver { gateway, incarnation, .. } => {
                Some((self.node_index(*gateway), *incarnation))
            }
            _ => None,
        };
        let goes_on = matches!(command, Command::TakeOver { .. });
        if matches!(command, Command::Down { .. }) {
            self.strain();
        }
        let before = self.log.views.len();
        let answer = self.commit(command);
        if before != self.log.views.len() {
            self.after_change();
        }
        if let (Some((node, incarnation)), Ok(Outcome::Attached { volume: id, writer })) =
            (attach, answer)
            && let Some(at) = self.volumes.iter().position(|v| v.id == id)
        {
            if goes_on {
                self.pass_on(at);
            } else {
                self.volumes[at].active = None;
                self.forget_guest(at);
                self.stats.takeovers += 1;
            }
            let entry = self.log.views.len() - 1;
            self.volumes[at].attaching = Some((node, incarnation, writer, entry));
        }
    }

    /// Asks the leader for another lease.
    pub fn renew(&mut self, at: usize) {
        let Some(leader) = self.log.leader else { return };
        // Without an answer to the last one, a connection has to be made first.
        let arrives = if self.nodes[at].unanswered {
            self.net.both(at, leader)
        } else {
            self.net.open(at, leader)
        };
        self.nodes[at].unanswered = true;
        if arrives {
            let delay = self.delay(at, leader).min(60);
            let incarnation = self.nodes[at].incarnation;
            self.log.renewals.push((self.now + delay, at, incarnation, self.now));
        }
    }

    fn receive_renewals(&mut self) {
        let now = self.now;
        for n in (0..self.log.renewals.len()).rev() {
            let (due, from, incarnation, sent) = self.log.renewals[n];
            if due > now {
                continue;
            }
            self.log.renewals.swap_remove(n);
            let Some(leader) = self.log.leader else { continue };
            let id = self.nodes[from].id;
            let known = self.view_of(leader).nodes.get(&id);
            let granted = known.is_some_and(|k| k.up && k.incarnation == incarnation)
                && self.log.condemned.get(&id) != Some(&incarnation);
            if granted {
                let clock = self.nodes[leader].clock(now);
                let renewal = Renewal { incarnation, at: clock, inherited: false };
                self.log.renewed.insert(id, renewal);
            }
            if self.net.open(leader, from) {
                let delay = self.delay(leader, from).min(60);
                self.log.answers.push((now + delay, from, incarnation, sent, granted));
            }
        }
        for n in (0..self.log.answers.len()).rev() {
            let (due, to, incarnation, sent, granted) = self.log.answers[n];
            if due > now || (self.nodes[to].alive && !self.nodes[to].runs(now)) {
                continue;
            }
            self.log.answers.swap_remove(n);
            if !self.nodes[to].alive || self.nodes[to].incarnation != incarnation {
                continue;
            }
            self.nodes[to].unanswered = false;
            if granted {
                let until = self.nodes[to].clock(sent) + LEASE;
                self.nodes[to].lease_until = self.nodes[to].lease_until.max(until);
            } else {
                note!(self, "n{} hears that it has to enter again", to + 1);
                self.enter_again(to);
            }
        }
    }

    fn expire_leases(&mut self) {
        let Some(leader) = self.log.leader else { return };
        let clock = self.nodes[leader].clock(self.now);
        let view = Arc::clone(self.view_of(leader));
        let me = self.nodes[leader].id;
        for (id, node) in view.nodes.iter().filter(|(id, n)| n.up && **id != me) {
            let first = Renewal { incarnation: node.incarnation, at: clock, inherited: false };
            let renewed = self.log.renewed.entry(*id).or_insert(first);
            if renewed.incarnation != node.incarnation {
                *renewed = first;
            }
            let granted = self.log.granted_until.filter(|_| renewed.inherited);
            let at = granted.map_or(renewed.at, |granted| granted.min(renewed.at));
            if clock - at > LEASE + LEASE_MARGIN {
                self.declare_down(leader, *id, node.incarnation, "its lease ran out");
            }
        }
    }

    /// The predecessors of a new leader may have granted leases at the last moment.
    pub fn lead(&mut self, leader: usize) {
        note!(self, "n{} leads", leader + 1);
        self.log.leader = Some(leader);
        let at = self.nodes[leader].clock(self.now);
        let view = self.view_of(leader);
        let up = view.nodes.iter().filter(|(_, n)| n.up);
        let lease = |incarnation| Renewal { incarnation, at, inherited: true };
        let leases: BTreeMap<NodeId, Renewal> =
            up.map(|(id, n)| (*id, lease(n.incarnation))).collect();
        self.log.renewed = leases;
        self.log.condemned.clear();
        self.log.heard_before = self.voters().map(|voter| self.nodes[voter].heard).collect();
        self.log.granted_until = None;
    }

    /// Voters keep in mind when they last heard of a leader: none grants a lease without a majority.
    fn be_heard(&mut self) {
        let Some(leader) = self.log.leader else { return };
        for voter in self.voters() {
            if self.nodes[voter].runs(self.now) && self.net.both(leader, voter) {
                self.nodes[voter].heard = Some(self.nodes[voter].clock(self.now));
            }
        }
    }

    /// A new leader asks the voters how long ago they heard of an earlier one.
    fn look_back(&mut self) {
        let Some(leader) = self.log.leader else { return };
        if self.log.granted_until.is_some() {
            return;
        }
        let (now, voters) = (self.now, self.voters());
        let before = voters.clone().zip(&self.log.heard_before);
        let reached = |v: usize| self.nodes[v].runs(now) && self.net.both(leader, v);
        let ago = |(v, heard): (usize, &Option<Time>)| {
            heard.filter(|_| reached(v)).map(|heard| self.nodes[v].clock(now) - heard)
        };
        let known: Vec<Time> = before.filter_map(ago).collect();
        if self.mutant == Mutant::ForgetLeases {
            self.log.granted_until = Some(0);
        } else if known.len() > voters.len() / 2 {
            let least = known.iter().min().copied().unwrap_or(0);
            self.log.granted_until = Some(self.nodes[leader].clock(now).saturating_sub(least));
        }
    }

    /// Now and then the leader asks who reaches whom, and has those leave without whom all others do.
    fn look_around(&mut self) {
        let Some(leader) = self.log.leader else { return };
        if self.net.is_whole() || !self.rng.chance(50) {
            return;
        }
        let view = Arc::clone(self.view_of(leader));
        let up = || view.nodes.iter().filter(|(_, n)| n.up).map(|(id, _)| *id);
        let at = |id: NodeId| self.node_index(id);
        let cut = |a: &NodeId, b: &NodeId| a != b && !self.net.both(at(*a), at(*b));
        let attached = |id| {
            let holder = |v: &Volume| v.attachment.as_ref().is_some_and(|a| a.gateway == id);
            view.volumes.values().filter(|v| holder(v)).count()
        };
        let candidate = |id| Candidate {
            id,
            up: true,
            voter: self.voters().contains(&at(id)),
            storage: view.disks.values().any(|d| d.up && d.node == id),
            volumes: attached(id),
        };
        let graph = Graph {
            me: self.nodes[leader].id,
            nodes: up().map(candidate).collect(),
            voters: self.voters().len(),
            min_storage: 2,
            broken: up()
                .flat_map(|a| up().map(move |b| (a, b)))
                .filter(|(a, b)| cut(a, b))
                .collect(),
        };
        for id in graph.excluded() {
            note!(self, "{id} has to leave: not everybody reaches it");
            self.log.condemned.insert(id, view.nodes[&id].incarnation);
        }
    }

    fn declare_down(&mut self, leader: usize, node: NodeId, incarnation: u64, reason: &str) {
        let pending = |c: &Command| matches!(c, Command::Down { node: n, .. } if *n == node);
        if !self.log.proposals.iter().any(|(_, _, c)| pending(c)) {
            let reason = reason.to_string();
            let command = Command::Down { node, incarnation, reason, at: self.now };
            self.propose(leader, command);
        }
    }

    /// A host that is there refuses connections for a process that is not.
    fn find_dead_processes(&mut self) {
        let Some(leader) = self.log.leader else { return };
        if !self.now.is_multiple_of(3) {
            return;
        }
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            if node.alive || !node.host || !self.net.both(leader, at) || !self.rng.chance(200) {
                continue;
            }
            let (id, view) = (self.nodes[at].id, Arc::clone(self.view_of(leader)));
            if let Some(known) = view.nodes.get(&id).filter(|n| n.up) {
                self.declare_down(leader, id, known.incarnation, "its process is gone");
            }
        }
    }

    fn deliver_log(&mut self) {
        let Some(leader) = self.log.leader else { return };
        let last = self.log.views.len() - 1;
        self.nodes[leader].applied = last;
        for at in 0..self.nodes.len() {
            if self.nodes[at].applied == last || !self.nodes[at].runs(self.now) {
                continue;
            }
            let chance = if self.nodes[at].slow.1 > self.now { 40 } else { 400 };
            if self.rng.chance(chance) && self.hears(at, leader) {
                let most = (last - self.nodes[at].applied) as u64;
                self.nodes[at].applied += self.rng.range(1, most) as usize;
            }
        }
    }

    /// From the leader or a voter that the leader reaches.
    fn hears(&self, at: usize, leader: usize) -> bool {
        let via = |v: usize| {
            self.nodes[v].runs(self.now) && self.net.both(v, at) && self.net.both(v, leader)
        };
        self.net.both(at, leader) || self.voters().any(via)
    }
}

/// Every disk that is up counts as complete.
fn trusting(state: &ClusterState) -> ClusterState {
    let mut state = state.clone();
    for id in state.disks.keys().copied().collect::<Vec<_>>() {
        if state.disk_up(id)
            && let Some(disk) = state.disks.get_mut(&id)
        {
            (disk.missed_since, disk.restarted) = (None, false);
        }
    }
    state
}

fn describe(command: &Command) -> String {
    match command {
        Command::Enter { node, .. } => {
            let disks: Vec<u64> = node.disks.iter().map(|d| d.id.0).collect();
            format!("n{} enters as {} with disks {disks:?}", node.id.0, node.incarnation)
        }
        Command::Down { node, incarnation, reason, .. } => {
            format!("n{} ({incarnation}) is down: {reason}", node.0)
        }
        Command::Synced { disk, basis, .. } => format!("disk {} is synced as of {basis}", disk.0),
        Command::Attach { name, gateway, .. } => format!("n{} attaches {name}", gateway.0),
        other => format!("{other:?}"),
    }
}
