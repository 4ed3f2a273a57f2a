//! Nodes: processes that come and go, their clocks, leases and disks.

use super::store::Store;
use super::sync::Sync;
use super::world::{Mutant, Time, World};
use sheepdog_cluster::command::{Command, DiskInfo, LOG_VERSION, NodeInfo};
use sheepdog_types::{DiskId, NodeId};
use std::collections::BTreeSet;

/// In thousandths of a step. A lease holds so long from when its renewal was sent, on the clock of who has it.
pub const LEASE: Time = 150_000;
/// The leader waits so much longer, from when it was received, on its own clock.
pub const LEASE_MARGIN: Time = 50_000;
const RENEW_EVERY: Time = 25;
/// How often a node frees what belongs to deleted volumes.
pub const PURGE_EVERY: Time = 32;
/// An entry that had no effect is tried again after this.
const ENTER_EVERY: Time = 60;

pub struct Disk {
    pub id: DiskId,
    pub node: usize,
    pub store: Store,
    /// It answers every call with an error.
    pub failed: bool,
    /// In service, as far as its node is concerned.
    pub used: bool,
    /// Since it went out of service, the log has said so.
    pub left: bool,
    pub sync: Option<Sync>,
    /// It is failed or full until then.
    pub trouble_until: Time,
    /// It was removed from the cluster.
    pub gone: bool,
}

pub struct Node {
    pub id: NodeId,
    pub zone: String,
    /// Indexes of its disks.
    pub disks: Vec<usize>,
    pub incarnation: u64,
    /// Its process runs.
    pub alive: bool,
    /// Its host runs, so that its port refuses connections when the process does not.
    pub host: bool,
    /// Stopped until then; it does not notice.
    pub frozen_until: Time,
    /// Speed of its clock, per mille.
    pub rate: u64,
    /// Messages to and from it take longer by this factor, until then.
    pub slow: (u64, Time),
    /// On its own clock.
    pub lease_until: Time,
    /// The view that it knows.
    pub applied: usize,
    renew_at: Time,
    enter_at: Time,
    /// The last renewal was not answered: the next one needs a new connection.
    pub unanswered: bool,
    /// When it last heard of a leader, on its own clock.
    pub heard: Option<Time>,
    pub start_at: Time,
    /// It was removed from the cluster.
    pub gone: bool,
}

impl Node {
    pub fn clock(&self, now: Time) -> Time {
        now * self.rate
    }

    pub fn runs(&self, now: Time) -> bool {
        self.alive && self.frozen_until <= now
    }
}

impl World {
    /// A new node, empty, which wants to enter.
    pub fn add_node(&mut self, zone: String, disks: usize) -> usize {
        let at = self.nodes.len();
        let first = self.disks.len();
        for n in first..first + disks {
            self.disks.push(Disk {
                id: DiskId(n as u64 + 101),
                node: at,
                store: Store::default(),
                failed: false,
                used: true,
                left: false,
                sync: None,
                trouble_until: 0,
                gone: false,
            });
        }
        let rate = if self.plan.skew { self.rng.range(870, 1150) } else { 1000 };
        self.nodes.push(Node {
            id: NodeId(at as u64 + 1),
            zone,
            disks: (first..first + disks).collect(),
            incarnation: 1,
            alive: true,
            host: true,
            frozen_until: 0,
            rate,
            slow: (1, 0),
            lease_until: 0,
            applied: 0,
            renew_at: 0,
            enter_at: 0,
            unanswered: false,
            heard: None,
            start_at: 0,
            gone: false,
        });
        self.net.grow(self.nodes.len());
        for instance in &mut self.instances {
            instance.ports.push(Default::default());
        }
        at
    }

    pub fn enter_command(&self, at: usize) -> Command {
        let node = &self.nodes[at];
        let used = node.disks.iter().map(|d| &self.disks[*d]).filter(|d| d.used);
        Command::Enter {
            node: NodeInfo {
                id: node.id,
                incarnation: node.incarnation,
                address: format!("10.0.{}.{}:7000", at / 250, at % 250 + 1),
                zone: node.zone.clone(),
                disks: used.map(|d| DiskInfo { id: d.id, weight: 1 }).collect(),
                version: LOG_VERSION,
            },
            at: self.now,
        }
    }

    /// Whether its incarnation has entered as far as it knows.
    pub fn has_entered(&self, at: usize) -> bool {
        let node = &self.nodes[at];
        let known = self.view_of(at).nodes.get(&node.id);
        known.is_some_and(|n| n.up && n.incarnation == node.incarnation)
    }

    /// Whether it believes that it may serve.
    pub fn serves(&self, at: usize) -> bool {
        let node = &self.nodes[at];
        let lease = node.clock(self.now) < node.lease_until || self.mutant == Mutant::NoSelfFence;
        node.alive && lease && self.has_entered(at)
    }

    /// Enters under a new incarnation, in the same process.
    pub fn enter_again(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.incarnation += 1;
        (node.lease_until, node.enter_at) = (0, 0);
        for disk in node.disks.clone() {
            self.disks[disk].sync = None;
        }
    }

    /// Starts the process of a node.
    pub fn start_node(&mut self, at: usize) {
        if self.nodes[at].gone {
            return;
        }
        note!(self, "n{} starts", at + 1);
        let disks = self.nodes[at].disks.clone();
        for disk in disks {
            let disk = &mut self.disks[disk];
            let works = !disk.failed && !disk.gone;
            (disk.used, disk.left) = (works, !works);
        }
        let node = &mut self.nodes[at];
        (node.alive, node.host, node.unanswered) = (true, true, false);
        self.enter_again(at);
        self.after_change();
    }

    /// The process of a node ends.
    pub fn stop_node(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        (node.alive, node.lease_until, node.frozen_until) = (false, 0, 0);
        node.heard = None;
        for disk in node.disks.clone() {
            self.disks[disk].sync = None;
        }
        for instance in 0..self.instances.len() {
            self.break_link(instance, at);
            if self.instances[instance].node == at {
                self.instances[instance].alive = false;
                (0..self.nodes.len()).for_each(|to| self.break_link(instance, to));
                self.lose_gateway(instance);
            }
        }
        self.lose_clients(at);
        self.strain();
    }

    fn lose_gateway(&mut self, instance: usize) {
        let volume = &mut self.volumes[self.instances[instance].volume];
        if volume.active == Some(instance) {
            volume.active = None;
        }
    }

    pub fn run_nodes(&mut self) {
        for at in 0..self.nodes.len() {
            if self.nodes[at].gone {
                continue;
            }
            if self.log.state.removed_nodes.contains(&self.nodes[at].id) {
                note!(self, "n{} is not needed any more", at + 1);
                self.nodes[at].gone = true;
                self.stop_node(at);
                for disk in self.nodes[at].disks.clone() {
                    self.give_back(disk);
                }
                continue;
            }
            if !self.nodes[at].alive {
                if self.restarts && self.now >= self.nodes[at].start_at {
                    self.start_node(at);
                }
            } else if self.nodes[at].runs(self.now) {
                self.keep_lease(at);
                if self.now.is_multiple_of(PURGE_EVERY) {
                    self.purge(at);
                }
            }
        }
    }

    /// A removed disk is used for something else.
    pub fn give_back(&mut self, at: usize) {
        let disk = &mut self.disks[at];
        (disk.gone, disk.used, disk.sync, disk.store) = (true, false, None, Store::default());
    }

    fn keep_lease(&mut self, at: usize) {
        if self.now < self.nodes[at].renew_at {
            return;
        }
        if self.has_entered(at) {
            self.nodes[at].renew_at = self.now + RENEW_EVERY;
            self.renew(at);
        } else if self
            .view_of(at)
            .nodes
            .get(&self.nodes[at].id)
            .is_some_and(|n| !n.up && n.incarnation == self.nodes[at].incarnation)
        {
            note!(self, "n{} hears that it is down", at + 1);
            self.enter_again(at);
        } else if self.now >= self.nodes[at].enter_at {
            self.nodes[at].enter_at = self.now + ENTER_EVERY;
            let command = self.enter_command(at);
            self.propose(at, command);
        }
    }

    /// Frees what belongs to deleted volumes.
    fn purge(&mut self, at: usize) {
        if self.mutant == Mutant::ForgetDelete {
            return;
        }
        let view = std::sync::Arc::clone(self.view_of(at));
        for &disk in &self.nodes[at].disks.clone() {
            let store = &mut self.disks[disk].store;
            let volumes: BTreeSet<_> = store.volumes().collect();
            for volume in volumes {
                if volume <= view.last_volume && !view.volumes.contains_key(&volume) {
                    store.delete_volume(volume);
                }
            }
        }
    }
}
