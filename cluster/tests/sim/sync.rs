//! The driver of [`Recovery`]: calls that are answered late or never, copies, flush, `Synced`.

use super::net::Origin;
use super::node::Disk;
use super::world::{Mutant, World};
use sheepdog_cluster::message::{self, Call, Failure, MAX_LISTING, Reply, Request};
use sheepdog_cluster::recovery::{Action, Effect, Local, Recovery, slot_digest};
use sheepdog_cluster::replica;
use sheepdog_types::{Epoch, LayerKey, SlotId, Version};
use std::sync::Arc;

pub struct Sync {
    machine: Recovery,
    epoch: Epoch,
    /// Asked, not answered yet.
    calls: Vec<(u64, Call)>,
    ticks: u64,
}

impl Sync {
    pub fn lacks_space_in(&self, epoch: Epoch) -> bool {
        self.epoch == epoch && self.machine.progress().problem == Some(Failure::NoSpace)
    }

    pub fn describe(&self) -> String {
        format!("as of {} asked {} {:?}", self.epoch, self.calls.len(), self.machine.progress())
    }
}

impl Local for Disk {
    fn layers(&self, slot: SlotId) -> Vec<(LayerKey, Version)> {
        self.store.layers().filter(|(key, _)| key.object.slot() == slot).collect()
    }

    fn keys(&self) -> Vec<LayerKey> {
        self.store.layers().map(|(key, _)| key).collect()
    }
}

impl World {
    pub fn run_syncs(&mut self) {
        if self.syncs_held {
            return;
        }
        for at in 0..self.disks.len() {
            let (id, node) = (self.disks[at].id, self.disks[at].node);
            let needed = self.view_of(node).disks.get(&id).is_some_and(|d| d.sync_from.is_some());
            let ready = self.disks[at].used && self.nodes[node].runs(self.now) && self.serves(node);
            if needed && ready && self.rng.chance(300) {
                self.run_sync(at);
            } else if !needed {
                self.disks[at].sync = None;
            }
        }
    }

    fn run_sync(&mut self, at: usize) {
        let node = self.disks[at].node;
        let view = Arc::clone(self.view_of(node));
        let (id, node_id) = (self.disks[at].id, self.nodes[node].id);
        let mut sync = self.disks[at].sync.take().unwrap_or_else(|| Sync {
            machine: Recovery::new(node_id, id, Arc::clone(&view)),
            epoch: view.epoch,
            calls: Vec::new(),
            ticks: 0,
        });
        if sync.epoch != view.epoch {
            sync.calls.clear();
            sync.epoch = view.epoch;
        }
        sync.machine.handle_view(view);
        self.answer_calls(at, &mut sync);
        sync.ticks += 1;
        if sync.ticks.is_multiple_of(8) && sync.machine.wants_tick() {
            sync.machine.handle_tick();
        }
        let effects: Vec<Effect> =
            std::iter::from_fn(|| sync.machine.poll_effect(&self.disks[at])).collect();
        self.disks[at].sync = Some(sync);
        for effect in effects {
            self.run_sync_effect(at, effect);
        }
    }

    /// Some are answered now, others another time.
    fn answer_calls(&mut self, at: usize, sync: &mut Sync) {
        for (id, call) in std::mem::take(&mut sync.calls) {
            if !self.rng.chance(700) {
                sync.calls.push((id, call));
                continue;
            }
            let reply = self.answer_sync(at, &call);
            sync.machine.handle_reply(id, reply);
        }
    }

    fn answer_sync(&mut self, at: usize, call: &Call) -> Option<Reply> {
        let here = self.disks[at].node;
        let peer = self.disk_index(call.disk);
        let there = self.disks[peer].node;
        let reachable = self.nodes[there].runs(self.now) && self.net.both(here, there);
        if !reachable || !self.disks[peer].used {
            return None;
        }
        let (id, lease) = (self.nodes[there].id, self.serves(there));
        let view = self.view_of(there);
        if let Err(reject) = replica::admit(view, id, lease, call) {
            return Some(Reply::Rejected(reject));
        }
        let disk = &self.disks[peer];
        let reply = match &call.request {
            Request::Digests { policy, slots } => {
                let digest = |s: &SlotId| slot_digest(view, *policy, &disk.layers(*s));
                Reply::Digests { digests: slots.iter().map(digest).collect() }
            }
            Request::List { from, to, after, .. } => {
                let place = |key: &LayerKey| (key.object.slot(), *key);
                let listing = disk.store.layers();
                let mut layers: Vec<(LayerKey, Version)> = listing
                    .filter(|(key, _)| (*from..=*to).contains(&key.object.slot()))
                    .filter(|(key, _)| after.is_none_or(|after| place(key) > place(&after)))
                    .collect();
                layers.sort_unstable_by_key(|(key, _)| place(key));
                let more = layers.len() > MAX_LISTING;
                layers.truncate(MAX_LISTING);
                Reply::Listing { layers, more }
            }
            other => panic!("a recovery does not ask {other:?}"),
        };
        if self.count_traffic {
            let mut frame = Vec::new();
            message::encode(&mut frame, 1, call, &[], &[]);
            message::encode(&mut frame, 1, &reply, &[], &[]);
            self.traffic.sync += frame.len() as u64;
        }
        Some(reply)
    }

    fn run_sync_effect(&mut self, at: usize, effect: Effect) {
        match effect {
            Effect::Call { id, call, .. } => {
                if let Some(sync) = &mut self.disks[at].sync {
                    sync.calls.push((id, call));
                }
            }
            Effect::Act { id, action: Action::Copy { key, expect, from, target } } => {
                if self.mutant == Mutant::SyncNothing {
                    self.sync_done(at, self.epoch_of(at), id, Ok(()));
                } else {
                    self.start_copy(at, key, (expect, target), from, None, Origin::Sync { id });
                }
            }
            Effect::Act { id, action: Action::Delete { key } } => {
                if self.mutant != Mutant::ForgetDelete && self.mutant != Mutant::SyncNothing {
                    note!(self, "disk {} deletes {key}", at + 101);
                    self.disks[at].store.delete(key);
                }
                self.sync_done(at, self.epoch_of(at), id, Ok(()));
            }
            Effect::Finish { id, command } => {
                if self.mutant != Mutant::SyncedWithoutFlush {
                    self.disks[at].store.flush();
                }
                let epoch = self.epoch_of(at);
                self.sync_done(at, epoch, id, Ok(()));
                self.stats.synced += 1;
                if let Some(command) = command {
                    self.propose(self.disks[at].node, command);
                }
            }
        }
    }

    fn epoch_of(&self, at: usize) -> Epoch {
        self.disks[at].sync.as_ref().map_or(Epoch(0), |sync| sync.epoch)
    }

    fn sync_done(&mut self, at: usize, epoch: Epoch, id: u64, outcome: Result<(), Failure>) {
        if let Some(sync) = self.disks[at].sync.as_mut().filter(|sync| sync.epoch == epoch) {
            sync.machine.handle_done(id, outcome);
        }
    }

    pub fn sync_copied(&mut self, at: usize, epoch: Epoch, id: u64, result: Result<(), Reply>) {
        let outcome = match result {
            Ok(()) => Ok(()),
            Err(Reply::Failed(failure)) => Err(failure),
            Err(_) => Err(Failure::Source),
        };
        self.sync_done(at, epoch, id, outcome);
    }
}
