//! The driver of resynchronisation: listings, plan, copies, flush, `Synced`.

use super::net::Origin;
use super::world::{Mutant, World};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::message::{self, Call, Failure, Reply, Request};
use sheepdog_cluster::replica;
use sheepdog_cluster::resync::{self, Action, Listings};
use sheepdog_cluster::view::{View, Waiting};
use sheepdog_types::{DiskId, Epoch, LayerKey, SlotId, Version, WriterGen};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

pub struct Sync {
    basis: Epoch,
    missing: Vec<DiskId>,
    listings: Listings,
    actions: Option<VecDeque<Action>>,
    copying: bool,
}

impl Sync {
    pub fn describe(&self) -> String {
        let actions = self.actions.as_ref().map(VecDeque::len);
        format!("as of {} missing {:?} actions {actions:?}", self.basis, self.missing)
    }
}

/// The plan for the slots that the disk has to compare; `slots` are those with objects.
fn plan_slots(
    view: &View,
    disk: DiskId,
    slots: &BTreeSet<SlotId>,
    listings: &Listings,
) -> Result<Vec<Action>, Waiting> {
    let mut actions = Vec::new();
    for &slot in slots {
        let of_slot = |l: &BTreeMap<LayerKey, Version>| {
            l.iter().filter(|(k, _)| k.object.slot() == slot).map(|(k, v)| (*k, *v)).collect()
        };
        let part = listings.iter().map(|(d, l)| (*d, of_slot(l))).collect();
        actions.extend(resync::plan_window(view, disk, (slot, slot), &part)?);
    }
    Ok(actions)
}

impl World {
    /// The slots of all objects that there may be.
    fn used_slots(&self) -> BTreeSet<SlotId> {
        let objects = self.volumes.iter().flat_map(|v| {
            let count = v.size.div_ceil(sheepdog_types::OBJECT_SIZE) as u32;
            let id = |index| sheepdog_types::ObjectId {
                volume: v.id,
                index: sheepdog_types::ObjectIndex(index),
            };
            (0..count).map(move |index| id(index).slot())
        });
        objects.collect()
    }

    pub fn run_syncs(&mut self) {
        if self.syncs_held {
            return;
        }
        for at in 0..self.disks.len() {
            let disk = &self.disks[at];
            let node = disk.node;
            let needed =
                self.view_of(node).disks.get(&disk.id).is_some_and(|d| {
                    d.sync_from.is_some() || d.restarted || d.missed_since.is_some()
                });
            if !needed && disk.sync.is_none() {
                continue;
            }
            let ready = disk.used && self.nodes[node].runs(self.now) && self.serves(node);
            if ready && self.rng.chance(120) {
                self.run_sync(at, needed);
            }
        }
    }

    fn run_sync(&mut self, at: usize, needed: bool) {
        let view = Arc::clone(self.view_of(self.disks[at].node));
        let disk = self.disks[at].id;
        let Some(sync) = &self.disks[at].sync else {
            let mut missing = resync::peers(&view, disk);
            missing.push(disk);
            let (listings, actions) = (Listings::new(), None);
            let basis = view.epoch;
            self.disks[at].sync = Some(Sync { basis, missing, listings, actions, copying: false });
            return;
        };
        if sync.basis != view.epoch || !needed {
            self.disks[at].sync = None;
        } else if !sync.missing.is_empty() {
            self.ask_listings(at);
        } else if sync.actions.is_none() {
            match plan_slots(&view, disk, &self.used_slots(), &sync.listings) {
                Ok(actions) => {
                    if let Some(sync) = &mut self.disks[at].sync {
                        sync.actions = Some(actions.into());
                    }
                }
                Err(_) => self.disks[at].sync = None,
            }
        } else if !sync.copying {
            self.next_action(at);
        }
    }

    /// Some listings arrive, others another time.
    fn ask_listings(&mut self, at: usize) {
        let Some(sync) = &self.disks[at].sync else { return };
        for disk in sync.missing.clone() {
            if self.rng.chance(600) {
                self.ask_listing(at, disk);
            }
        }
    }

    fn ask_listing(&mut self, at: usize, disk: DiskId) {
        let (from, to) = (SlotId(0), SlotId(u16::MAX));
        let request = Request::List { holder: self.disks[at].id, from, to, after: None };
        let here = self.disks[at].node;
        let call = Call { epoch: self.view_of(here).epoch, disk, writer: WriterGen(0), request };
        let peer = self.disk_index(disk);
        let there = self.disks[peer].node;
        let reachable = self.nodes[there].runs(self.now) && self.net.both(here, there);
        let (id, lease) = (self.nodes[there].id, self.serves(there));
        if !reachable
            || !self.disks[peer].used
            || replica::admit(self.view_of(there), id, lease, &call).is_err()
        {
            return;
        }
        let listing = self.disks[peer].store.listing();
        if self.count_traffic {
            let layers = listing.iter().map(|(k, v)| (*k, *v)).collect();
            let reply = Reply::Listing { layers, more: false };
            let mut frame = Vec::new();
            message::encode(&mut frame, 1, &call, &[], &[]);
            message::encode(&mut frame, 1, &reply, &[], &[]);
            self.traffic.sync += frame.len() as u64;
        }
        if let Some(sync) = &mut self.disks[at].sync {
            sync.missing.retain(|d| *d != disk);
            sync.listings.insert(disk, listing);
        }
    }

    fn next_action(&mut self, at: usize) {
        let Some(sync) = &mut self.disks[at].sync else { return };
        let action = sync.actions.as_mut().and_then(VecDeque::pop_front);
        match action {
            Some(_) if self.mutant == Mutant::SyncNothing => {}
            Some(Action::Copy { key, expect, from, target }) => {
                sync.copying = true;
                self.start_copy(at, key, (expect, target), from, None, Origin::Sync);
            }
            Some(Action::Delete { .. }) if self.mutant == Mutant::ForgetDelete => {}
            Some(Action::Delete { key }) => {
                note!(self, "disk {} deletes {key}", at + 101);
                self.disks[at].store.delete(key);
            }
            None => {
                let basis = sync.basis;
                let disk = &mut self.disks[at];
                disk.sync = None;
                if self.mutant != Mutant::SyncedWithoutFlush {
                    disk.store.flush();
                }
                let (id, node) = (disk.id, disk.node);
                let incarnation = self.nodes[node].incarnation;
                self.stats.synced += 1;
                let command = Command::Synced { disk: id, incarnation, basis, at: self.now };
                self.propose(node, command);
            }
        }
    }

    pub fn sync_copied(&mut self, at: usize, epoch: Epoch, result: Result<(), Reply>) {
        let Some(sync) = self.disks[at].sync.as_mut().filter(|s| s.basis == epoch) else { return };
        sync.copying = false;
        match result {
            Ok(()) | Err(Reply::Failed(Failure::Behind { .. })) => {}
            Err(_) => self.disks[at].sync = None,
        }
    }
}
