//! What goes wrong, and how it ends.

use super::node::Disk;
use super::topology::{duration, random_copies};
use super::world::{Time, World};
use sheepdog_cluster::command::{Command, DiskInfo};
use sheepdog_cluster::state::Volume;
use sheepdog_types::{DiskId, OBJECT_SIZE, ObjectId, ObjectIndex, Version, VolumeId};
use std::sync::Arc;

impl World {
    fn happens(&mut self, per_million: u64) -> bool {
        per_million > 0 && self.rng.below(1_000_000) < per_million
    }

    fn some_node(&mut self) -> usize {
        self.rng.below(self.nodes.len() as u64) as usize
    }

    /// Whether another failure would be one too many for what is demanded otherwise: half of the
    /// losses are left to be survived in peace.
    fn spared(&mut self) -> bool {
        self.tainted && !self.doubled && (self.now / 512).is_multiple_of(2)
    }

    pub fn run_faults(&mut self) {
        self.end_faults();
        let plan = self.plan;
        if self.happens(plan.reset) && !self.instances.is_empty() {
            let from = self.rng.below(self.instances.len() as u64) as usize;
            let to = self.some_node();
            self.break_link(from, to);
        }
        if !self.spared() {
            self.fail_nodes();
            self.fail_network();
            self.fail_disks();
        }
        self.change_things();
    }

    fn fail_nodes(&mut self) {
        let plan = self.plan;
        if self.happens(plan.crash) {
            let at = self.some_node();
            self.crash(at);
        }
        if self.happens(plan.power) {
            let at = self.some_node();
            self.lose_power(at);
        }
        if self.happens(plan.blackout) {
            self.lose_all_power(false, true);
        }
        if self.happens(plan.freeze) {
            let at = self.some_node();
            if self.nodes[at].runs(self.now) {
                let until = duration(&mut self.rng, self.now);
                self.freeze(at, until);
            }
        }
        if self.happens(plan.deaf) && !self.instances.is_empty() {
            let at = self.rng.below(self.instances.len() as u64) as usize;
            let until = duration(&mut self.rng, self.now);
            let node = self.instances[at].node + 1;
            note!(self, "a gateway on n{node} hears nothing of the log until t={until}");
            self.instances[at].deaf_until = until;
        }
        if self.happens(plan.slow) {
            let (at, factor) = (self.some_node(), self.rng.range(3, 40));
            let until = duration(&mut self.rng, self.now);
            note!(self, "n{} is slow until t={until}", at + 1);
            self.nodes[at].slow = (factor, until);
        }
    }

    fn fail_network(&mut self) {
        let plan = self.plan;
        let (a, b) = (self.some_node(), self.some_node());
        if self.happens(plan.cut) {
            self.cut(a, b);
            self.cut(b, a);
            self.heal_later();
        }
        if self.happens(plan.one_way) {
            self.cut(a, b);
            self.heal_later();
        }
        if self.happens(plan.isolate) {
            let direction = self.rng.below(3);
            for other in 0..self.nodes.len() {
                if direction != 1 {
                    self.cut(a, other);
                }
                if direction != 2 {
                    self.cut(other, a);
                }
            }
            self.heal_later();
        }
        if self.happens(plan.split) {
            let side: Vec<bool> = self.nodes.iter().map(|_| self.rng.chance(500)).collect();
            for a in 0..side.len() {
                for b in 0..side.len() {
                    if side[a] != side[b] {
                        self.cut(a, b);
                    }
                }
            }
            self.heal_later();
        }
    }

    pub fn cut(&mut self, from: usize, to: usize) {
        if from != to {
            note!(self, "cut n{} -> n{}", from + 1, to + 1);
            self.net.set(from, to, true);
        }
    }

    fn heal_later(&mut self) {
        let at = duration(&mut self.rng, self.now);
        self.net.heal_at = self.net.heal_at.max(at);
    }

    fn end_faults(&mut self) {
        if self.net.heal_at == self.now {
            note!(self, "the network is whole again");
            self.net.heal();
        }
        for at in 0..self.disks.len() {
            let disk = &mut self.disks[at];
            if self.now < disk.trouble_until {
                continue;
            }
            if disk.store.full > 0 {
                disk.store.full = 0;
                note!(self, "disk {} has space again", at + 101);
            } else if disk.failed {
                disk.failed = false;
                note!(self, "disk {} works again", at + 101);
            }
        }
    }

    /// Disks that failed leave the cluster, and come back into service when they work again.
    pub fn run_disks(&mut self) {
        if !self.now.is_multiple_of(8) {
            return;
        }
        for at in 0..self.disks.len() {
            let disk = &self.disks[at];
            let node = disk.node;
            if disk.gone {
                continue;
            }
            if self.log.state.removed_disks.contains(&disk.id) {
                note!(self, "disk {} is not needed any more", at + 101);
                self.give_back(at);
                continue;
            }
            if !self.nodes[node].runs(self.now) || !self.has_entered(node) {
                continue;
            }
            if disk.used {
                let known = self.view_of(node).disks.get(&disk.id);
                if known.is_some_and(|d| !d.up) {
                    // An old command came late.
                    let disk = &mut self.disks[at];
                    (disk.used, disk.left, disk.sync) = (false, true, None);
                } else {
                    self.tell_of_space(at);
                }
                continue;
            }
            let (id, failed, left) = (disk.id, disk.failed, disk.left);
            let up = self.view_of(node).is_up(id);
            let entered =
                self.view_of(node).disks.get(&id).map_or(sheepdog_types::Epoch(0), |d| d.entered);
            let incarnation = self.nodes[node].incarnation;
            let now = self.now;
            match (up, failed, left) {
                (true, false, true) => self.disks[at].used = true,
                (true, ..) => {
                    let reason = "it failed".to_string();
                    let command =
                        Command::DiskDown { disk: id, incarnation, entered, reason, at: now };
                    self.propose(node, command);
                }
                (false, false, true) => {
                    let (node_id, disk) = (self.nodes[node].id, DiskInfo { id, weight: 1 });
                    let command = Command::DiskUp { node: node_id, incarnation, disk, at: now };
                    self.propose(node, command);
                }
                (false, ..) => self.disks[at].left = true,
            }
        }
        self.take_out();
    }

    /// A disk that data move to says that it has no room, or has room again.
    fn tell_of_space(&mut self, at: usize) {
        let refused = std::mem::take(&mut self.disks[at].store.refused);
        let Disk { id, node, ref sync, ref store, .. } = self.disks[at];
        let view = Arc::clone(self.view_of(node));
        let (is_full, has_room) = (view.is_full(id), store.full == 0);
        let lacks = sync.as_ref().is_some_and(|sync| sync.lacks_space_in(view.epoch)) || refused;
        if !view.is_to_come(id) {
            return;
        }
        // Somebody else may fill the disk, or make room, at any time.
        let changes = self.calm || self.rng.chance(30);
        let spurious = self.plan.full > 0 && !self.calm && self.rng.chance(10);
        if is_full && has_room && changes || !is_full && (lacks || spurious) {
            let incarnation = self.nodes[node].incarnation;
            let command = Command::DiskFull { disk: id, incarnation, full: !is_full, at: self.now };
            self.propose(node, command);
        }
    }

    /// The leader gives up waiting for disks that were down for long.
    fn take_out(&mut self) {
        let Some(leader) = self.log.leader.filter(|_| self.plan.out > 0) else { return };
        let view = Arc::clone(self.view_of(leader));
        let now = self.now;
        self.down_since.retain(|disk, _| !view.is_up(*disk));
        for (id, _) in view.disks.iter().filter(|(_, d)| !d.up) {
            self.down_since.entry(*id).or_insert(now);
        }
        let long = |since: Time| now > since + self.plan.out;
        let disks: Vec<DiskId> = self
            .down_since
            .iter()
            .filter(|(id, since)| long(**since) && view.disks.get(id).is_some_and(|d| !d.out))
            .map(|(id, _)| *id)
            .collect();
        if !disks.is_empty() && !self.calm && now.is_multiple_of(64) {
            self.propose(leader, Command::Out { disks, at: now });
        }
    }

    fn fail_disks(&mut self) {
        let plan = self.plan;
        let at = self.rng.below(self.disks.len() as u64) as usize;
        let until = duration(&mut self.rng, self.now);
        if self.happens(plan.disk) && !self.disks[at].failed && !self.disks[at].gone {
            note!(self, "disk {} fails until t={until}", at + 101);
            self.taint();
            let disk = &mut self.disks[at];
            (disk.failed, disk.trouble_until) = (true, until);
            (disk.used, disk.left, disk.sync) = (false, false, None);
            disk.store.full = 0;
            disk.store.lose_power(&mut self.rng, false);
        }
        if self.happens(plan.full) && !self.disks[at].failed {
            note!(self, "disk {} is full until t={until}", at + 101);
            let disk = &mut self.disks[at];
            disk.trouble_until = until;
            disk.store.full = if self.rng.chance(500) { 1000 } else { 400 };
        }
        if self.happens(plan.rot) {
            self.rot();
        }
    }

    /// Long enough apart that no request meets two of them.
    fn rot(&mut self) {
        let quiet = self.now > self.rotted + 200
            && self.all_well()
            && self.disks.iter().all(|d| !d.store.has_damage());
        let at = self.rng.below(self.disks.len() as u64) as usize;
        // Of what only one replica has, nobody could give a block back.
        let versions: Vec<_> = self.disks.iter().map(|d| d.store.listing()).collect();
        let everywhere = |key, version| {
            let found: Vec<Version> =
                versions.iter().filter_map(|all| all.get(&key)).copied().collect();
            found.len() > 1 && found.iter().all(|other| *other == version)
        };
        if quiet && self.disks[at].store.damage(&mut self.rng, everywhere) {
            note!(self, "a block of disk {} rots", at + 101);
            self.rotted = self.now;
        }
    }

    fn change_things(&mut self) {
        let plan = self.plan;
        if self.happens(plan.join) && self.nodes.len() < self.topology.nodes + 3 {
            self.join();
        }
        if self.happens(plan.volumes) {
            self.replace_volume();
        }
        if self.happens(plan.drain) {
            self.move_data();
        }
        if self.happens(plan.drain) {
            self.give_up();
        }
        if self.happens(plan.hand_over) {
            let at = self.rng.below(self.volumes.len() as u64) as usize;
            self.detach(at);
        }
    }

    /// The youngest node, or the last of its disks, gives its data away, takes some again, or leaves for good.
    fn move_data(&mut self) {
        let (Some(leader), Some((id, node))) =
            (self.log.leader, self.log.state.nodes.last_key_value())
        else {
            return;
        };
        let (node, draining, at) = (*id, node.draining, self.now);
        let mine: Vec<(DiskId, u64)> = self
            .log
            .state
            .disks
            .iter()
            .filter(|(_, d)| d.node == node)
            .map(|(id, d)| (*id, d.weight))
            .collect();
        let votes = self.voters().contains(&self.node_index(node));
        let command = match (self.rng.below(8), mine.last()) {
            (0 | 1, Some((disk, weight))) => {
                let weight = if *weight == 0 { 1 } else { 0 };
                Command::SetWeight { disk: *disk, weight, force: false, at }
            }
            (2, Some((disk, _))) if mine.len() > 1 => {
                Command::RetireDisk { disk: *disk, force: false, at }
            }
            (3, _) => {
                let zone = self.topology.zone(self.rng.below(self.nodes.len() as u64) as usize);
                Command::SetZone { node, zone, at }
            }
            (4 | 5, _) if draining && !votes => {
                let command = Command::RemoveNode { node, force: false, at };
                if self.log.state.nodes[&node].up {
                    command
                } else {
                    // Who removes a dead node makes sure that nobody waits for it.
                    if self.all_served() {
                        self.commit_now(command);
                    }
                    return;
                }
            }
            _ => Command::Drain { node, on: !draining, force: false, at },
        };
        self.propose(leader, command);
    }

    /// A disk that is down is given up, if nobody waits for it: that must lose nothing.
    fn give_up(&mut self) {
        let state = &self.log.state;
        let is_down = |id: &DiskId| !state.disk_up(*id) && !state.disks[id].lost;
        let down: Vec<DiskId> = state.disks.keys().copied().filter(is_down).collect();
        let Some(disk) = self.rng.pick(&down) else { return };
        if self.log.leader.is_some() && self.all_served() {
            self.commit_now(Command::GiveUp { disks: vec![disk], at: self.now });
        }
    }

    /// Nothing waits for a disk that is down.
    fn all_served(&self) -> bool {
        let view = self.latest();
        let is_served = |(id, volume): (&VolumeId, &Arc<Volume>)| {
            let (copies, least) = (volume.spec.copies, volume.spec.min_copies);
            (0..volume.spec.size.div_ceil(OBJECT_SIZE)).all(|index| {
                let object = ObjectId { volume: *id, index: ObjectIndex(index as u32) };
                view.slot(object.slot(), usize::from(copies), usize::from(least)).is_ok()
            })
        };
        view.volumes.iter().all(is_served)
    }

    fn undrain_all(&mut self) {
        let draining: Vec<_> =
            self.log.state.nodes.iter().filter(|(_, n)| n.draining).map(|(id, _)| *id).collect();
        for node in draining {
            self.commit_now(Command::Drain { node, on: false, force: true, at: self.now });
        }
    }

    pub fn join(&mut self) -> usize {
        let n = self.nodes.len();
        let (zone, disks) = (self.topology.zone(n), self.topology.disks(n));
        let at = self.add_node(zone, disks);
        note!(self, "n{} joins with {disks} disks", at + 1);
        at
    }

    fn replace_volume(&mut self) {
        let at = self.rng.below(self.volumes.len() as u64) as usize;
        if self.volumes[at].doomed || self.volumes.len() >= 6 || self.log.leader.is_none() {
            return;
        }
        self.volumes[at].doomed = true;
        let (copies, min_copies) = random_copies(&mut self.rng);
        self.create_volume(copies, min_copies);
    }

    /// The process of a node dies, and is started again after a while.
    pub fn crash(&mut self, at: usize) {
        if !self.nodes[at].alive {
            return;
        }
        note!(self, "n{} crashes", at + 1);
        self.stats.crashes += 1;
        self.stop_node(at);
        self.nodes[at].start_at = duration(&mut self.rng, self.now);
    }

    pub fn lose_power(&mut self, at: usize) {
        if !self.nodes[at].host {
            return;
        }
        note!(self, "n{} loses power", at + 1);
        self.stats.crashes += 1;
        self.taint();
        for disk in self.nodes[at].disks.clone() {
            self.disks[disk].store.lose_power(&mut self.rng, false);
        }
        if self.nodes[at].alive {
            // It is one failure, not two.
            let doubled = self.doubled;
            self.stop_node(at);
            self.doubled = doubled;
        }
        self.nodes[at].host = false;
        self.nodes[at].start_at = duration(&mut self.rng, self.now);
    }

    /// All nodes at once; `everything` that was not flushed is gone.
    pub fn lose_all_power(&mut self, everything: bool, may_lose: bool) {
        note!(self, "all nodes lose power");
        self.stats.crashes += 1;
        for at in 0..self.nodes.len() {
            if self.nodes[at].alive {
                self.stop_node(at);
            }
            for disk in self.nodes[at].disks.clone() {
                self.disks[disk].store.lose_power(&mut self.rng, everything);
            }
            self.nodes[at].host = false;
            self.nodes[at].start_at = duration(&mut self.rng, self.now);
        }
        self.stragglers.clear();
        self.jobs.clear();
        if may_lose {
            (self.tainted, self.doubled) = (true, true);
            self.after_change();
        }
    }

    /// Faults end, and what is broken is mended.
    pub fn heal_all(&mut self) {
        self.calm = true;
        self.syncs_held = false;
        self.net.heal();
        self.plan.delay = self.plan.delay.min(4);
        for at in 0..self.disks.len() {
            self.disks[at].store.full = 0;
            self.disks[at].failed = false;
        }
        for node in &mut self.nodes {
            node.frozen_until = node.frozen_until.min(self.now);
            node.slow = (1, 0);
            node.start_at = node.start_at.min(self.now + 100);
        }
        self.log.proposals.retain(|(_, _, c)| !matches!(c, Command::Drain { .. }));
        self.undrain_all();
        self.restarts = true;
        self.guests = true;
    }
}
