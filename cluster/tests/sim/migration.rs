//! Guests that move from one node to another while they run, and take what they have in flight along.
//!
//! What a gateway returns because another one has the volume is carried out by the next gateway of the same node,
//! as the daemon does it: the guest has a client there that still waits for it.

use super::world::{Time, Volume, World};
use sheepdog_cluster::command::Command;
use sheepdog_types::{NodeId, Op, VolumeId, WriterGen};
use std::collections::{BTreeMap, BTreeSet};

/// Where a volume's guest is, and what it waits for.
#[derive(Default)]
pub struct Migration {
    /// Where the guest asks; where the volume is, if nowhere else.
    side: Option<usize>,
    /// Gateways that another one has taken the volume from; what they answer counts, and they return the rest.
    passed: BTreeSet<usize>,
    /// Requests at a node that does not have the volume.
    waiting: Vec<(usize, Op, u64)>,
    /// The nodes that the running requests came to.
    nodes: BTreeMap<u64, usize>,
    /// Gateways in a row that were taken the volume from before they had answered anything.
    futile: u32,
    /// Nobody takes the volume over before.
    pause_until: Time,
}

/// Longest time until the volume is taken back that was lost before it was of use.
const LONGEST_PAUSE: Time = 400;

/// What becomes of requests that wait at a node.
enum Fate {
    /// The node takes the volume from this writer.
    Want(WriterGen),
    /// They fail.
    Elsewhere,
}

impl World {
    /// A request of a guest goes to the node where the guest is.
    pub fn submit_where_it_is(&mut self, volume: usize, op: Op, tag: u64) {
        let Some(node) = self.side(volume) else { return };
        let has_it = |at: &usize| self.instances[*at].node == node;
        let active = self.volumes[volume].active.filter(has_it);
        let Migration { nodes, waiting, .. } = &mut self.volumes[volume].migration;
        nodes.insert(tag, node);
        match active {
            Some(active) => self.submit(active, op, tag),
            None => waiting.push((node, op, tag)),
        }
    }

    /// The node to whose exports the guest is connected.
    pub fn side(&self, volume: usize) -> Option<usize> {
        let holder = self.instances[self.volumes[volume].active?].node;
        let side = self.volumes[volume].migration.side.unwrap_or(holder);
        let known = self.log.state.volumes.get(&self.volumes[volume].id);
        let shared =
            known.and_then(|v| v.handover).is_some_and(|h| h.involves(self.nodes[side].id));
        Some(if shared && self.nodes[side].alive { side } else { holder })
    }

    /// The log gave the volume to a node that took it over.
    pub fn pass_on(&mut self, volume: usize) {
        let volume = &mut self.volumes[volume];
        let old = volume.active.take();
        let useful = old.is_none_or(|at| self.instances[at].useful);
        let Migration { passed, futile, pause_until, .. } = &mut volume.migration;
        passed.extend(old);
        *futile = if useful { 0 } else { *futile + 1 };
        *pause_until = self.now + LONGEST_PAUSE.min(1 << (*futile).min(16));
        self.stats.handed_over += 1;
    }

    /// Somebody else has the volume now, and the guest with all that it waited for is gone.
    pub fn forget_guest(&mut self, volume: usize) {
        let volume = &mut self.volumes[volume];
        volume.migration = Migration::default();
        volume.checker.abandon_all(self.now);
    }

    /// A node's process is gone, and with it all connections of guests.
    pub fn lose_clients(&mut self, node: usize) {
        for volume in &mut self.volumes {
            let Migration { side, passed, waiting, nodes, .. } = &mut volume.migration;
            passed.retain(|at| self.instances[*at].node != node);
            waiting.retain(|(at, ..)| *at != node);
            side.take_if(|at| *at == node);
            for (tag, _) in nodes.extract_if(.., |_, at| *at == node) {
                volume.checker.abandon(tag, self.now);
            }
        }
    }

    /// Whether what this gateway answers counts although it does not have the volume any more.
    pub fn has_passed_on(&self, instance: usize) -> bool {
        self.volumes[self.instances[instance].volume].migration.passed.contains(&instance)
    }

    /// A gateway that was fenced returns a request. Gives whether somebody waits for it.
    pub fn take_back(&mut self, instance: usize, op: Op, tag: u64) -> bool {
        let node = self.instances[instance].node;
        let volume = &mut self.volumes[self.instances[instance].volume];
        let wanted =
            volume.migration.passed.contains(&instance) && volume.checker.began(tag).is_some();
        if wanted {
            self.stats.returned += 1;
            note!(self, "{} request {tag} is returned to n{}", volume.name, node + 1);
            volume.migration.waiting.push((node, op, tag));
        }
        wanted
    }

    /// A gateway was made: the one before it at the same node returns all, and what waits there goes to it.
    pub fn take_seat(&mut self, volume: usize) {
        let Some(active) = self.volumes[volume].active else { return };
        let node = self.instances[active].node;
        let passed = self.volumes[volume].migration.passed.iter().copied();
        let here: Vec<usize> = passed.filter(|at| self.instances[*at].node == node).collect();
        for at in here {
            self.instances[at].gateway.fence_off();
            self.release_held(at);
            self.collect(at);
        }
        let waiting = &mut self.volumes[volume].migration.waiting;
        let here: Vec<_> = waiting.extract_if(.., |(at, ..)| *at == node).collect();
        for (_, op, tag) in here {
            self.submit(active, op, tag);
        }
    }

    /// Whether requests wait at a node that will get the volume for them.
    pub fn is_wanted(&self, volume: usize) -> bool {
        !self.volumes[volume].migration.waiting.is_empty()
    }

    pub fn run_migrations(&mut self) {
        for at in 0..self.volumes.len() {
            if self.volumes[at].deleted {
                continue;
            }
            let volume = &mut self.volumes[at];
            volume.migration.nodes.retain(|tag, _| volume.checker.began(*tag).is_some());
            self.want_volume(at);
            if self.guests && !self.calm && !self.volumes[at].doomed {
                self.move_guest(at);
            }
        }
    }

    /// Nodes at which requests wait get the volume, or the requests fail.
    fn want_volume(&mut self, at: usize) {
        let nodes: BTreeSet<usize> =
            self.volumes[at].migration.waiting.iter().map(|(node, ..)| *node).collect();
        for node in nodes {
            let has_it = self.volumes[at].active.is_some_and(|a| self.instances[a].node == node);
            let Volume { attaching, migration, .. } = &self.volumes[at];
            let waits = attaching.is_some() || self.now < migration.pause_until;
            if has_it {
                self.take_seat(at);
            } else if !waits && self.serves(node) && self.nodes[node].runs(self.now) {
                match self.fate(node, self.volumes[at].id) {
                    Fate::Want(seen) if self.rng.chance(20) => self.take_over(at, node, seen),
                    Fate::Want(_) => {}
                    Fate::Elsewhere => self.fail_waiting(at, node),
                }
            }
        }
    }

    fn fate(&self, node: usize, volume: VolumeId) -> Fate {
        let (me, view) = (self.nodes[node].id, self.view_of(node));
        let Some(volume) = view.volumes.get(&volume) else { return Fate::Elsewhere };
        let holder = volume.attachment.as_ref().map(|a| a.gateway);
        let is_up = |id: NodeId| view.nodes.get(&id).is_some_and(|n| n.up);
        let elsewhere = holder.is_some_and(|id| id != me && is_up(id));
        if elsewhere && !volume.handover.is_some_and(|h| h.involves(me)) {
            Fate::Elsewhere
        } else {
            Fate::Want(volume.writer)
        }
    }

    fn take_over(&mut self, at: usize, node: usize, seen: WriterGen) {
        let (gateway, incarnation) = (self.nodes[node].id, self.nodes[node].incarnation);
        let (volume, at) = (self.volumes[at].id, self.now);
        self.propose(node, Command::TakeOver { volume, gateway, incarnation, seen, at });
    }

    fn fail_waiting(&mut self, at: usize, node: usize) {
        let volume = &mut self.volumes[at];
        note!(self, "n{} has lost {} for good", node + 1, volume.name);
        let failed: Vec<_> =
            volume.migration.waiting.extract_if(.., |(at, ..)| *at == node).collect();
        for (_, _, tag) in failed {
            volume.checker.abandon(tag, self.now);
        }
    }

    /// A hand-over is opened, the guest moves to the other side of it, and it is closed.
    fn move_guest(&mut self, at: usize) {
        let Some(active) = self.volumes[at].active else { return };
        let holder = self.instances[active].node;
        let Some(known) = self.log.state.volumes.get(&self.volumes[at].id) else { return };
        let (id, handover, writer) = (known.id, known.handover, known.writer);
        let Some(handover) = handover else {
            if self.rng.below(1_000_000) < self.plan.migrate {
                let to = self.rng.below(self.nodes.len() as u64) as usize;
                let (name, node) = (self.volumes[at].name.clone(), &self.nodes[to]);
                let (id, incarnation) = (node.id, node.incarnation);
                let open = Command::OpenHandover { name, to: id, incarnation, at: self.now };
                self.propose(to, open);
            }
            return;
        };
        let Some(side) = self.side(at) else { return };
        let Migration { nodes, .. } = &self.volumes[at].migration;
        let elsewhere = nodes.values().any(|node| *node != side);
        if self.rng.chance(10) && (nodes.is_empty() || self.rng.chance(500)) {
            let other = self.node_index(handover.other(self.nodes[side].id));
            note!(self, "the guest of {} moves to n{}", self.volumes[at].name, other + 1);
            self.volumes[at].migration.side = Some(other);
        } else if side == holder && !elsewhere && self.rng.chance(4) {
            let writer = self.rng.chance(500).then_some(writer);
            self.propose(holder, Command::CloseHandover { volume: id, writer });
        }
    }
}
