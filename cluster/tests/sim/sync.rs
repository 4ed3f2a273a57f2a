//! The driver of resynchronisation: listings, plan, copies, flush, `Synced`.

use super::guest::OBJECTS;
use super::net::Origin;
use super::world::{Mutant, World};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::message::{Call, Failure, Reply, Request};
use sheepdog_cluster::replica;
use sheepdog_cluster::resync::{self, Action, Listings};
use sheepdog_cluster::view::{View, Waiting};
use sheepdog_types::{
    DiskId, Epoch, LayerKey, ObjectId, ObjectIndex, SlotId, Version, VolumeId, WriterGen,
};
use std::collections::{BTreeMap, VecDeque};

pub struct Sync {
    basis: Epoch,
    missing: Vec<DiskId>,
    listings: Listings,
    actions: Option<VecDeque<Action>>,
    copying: bool,
}

/// The plan for the windows that have slots of the volumes; there is nothing in the others.
fn plan_windows(view: &View, disk: DiskId, listings: &Listings) -> Result<Vec<Action>, Waiting> {
    let objects = (0..OBJECTS).flat_map(|index| {
        let index = ObjectIndex(index);
        (1..=2).map(move |volume| ObjectId { volume: VolumeId(volume), index })
    });
    let slots: Vec<SlotId> = objects.map(ObjectId::slot).collect();
    let mut actions = Vec::new();
    for window in resync::windows() {
        let inside = |slot: &SlotId| (window.0..=window.1).contains(slot);
        if slots.iter().any(inside) {
            let of_window = |l: &BTreeMap<LayerKey, Version>| {
                l.iter().filter(|(k, _)| inside(&k.object.slot())).map(|(k, v)| (*k, *v)).collect()
            };
            let part = listings.iter().map(|(d, l)| (*d, of_window(l))).collect();
            actions.extend(resync::plan_window(view, disk, window, &part)?);
        }
    }
    Ok(actions)
}

impl World {
    pub fn run_sync(&mut self, at: usize) {
        let node = &self.nodes[at];
        if !node.alive || !node.lease || !self.rng.chance(120) {
            return;
        }
        let view = self.view_of(at);
        let disk = self.nodes[at].disk;
        let needed = view
            .disks
            .get(&disk)
            .is_some_and(|d| d.sync_from.is_some() || d.restarted || d.missed_since.is_some());
        let Some(sync) = &self.nodes[at].sync else {
            if needed {
                let mut missing = resync::peers(&view, disk);
                missing.push(disk);
                let (listings, actions) = (Listings::new(), None);
                let basis = view.epoch;
                self.nodes[at].sync =
                    Some(Sync { basis, missing, listings, actions, copying: false });
            }
            return;
        };
        if sync.basis != view.epoch || !needed {
            self.nodes[at].sync = None;
        } else if !sync.missing.is_empty() {
            self.ask_listing(at, sync.missing[0]);
        } else if sync.actions.is_none() {
            match plan_windows(&view, disk, &sync.listings) {
                Ok(actions) => {
                    if let Some(sync) = &mut self.nodes[at].sync {
                        sync.actions = Some(actions.into());
                    }
                }
                Err(_) => self.nodes[at].sync = None,
            }
        } else if !sync.copying {
            self.next_action(at);
        }
    }

    fn ask_listing(&mut self, at: usize, disk: DiskId) {
        let peer = self.disk_index(disk);
        let view = self.view_of(at);
        let holder = self.nodes[at].disk;
        let (from, to) = (SlotId(0), SlotId(u16::MAX));
        let request = Request::List { holder, from, to, after: None };
        let call = Call { epoch: view.epoch, disk, writer: WriterGen(0), request };
        let known = self.view_of(peer);
        let node = &self.nodes[peer];
        if !node.alive || replica::admit(&known, node.id, node.lease, &call).is_err() {
            return;
        }
        let listing = node.store.listing();
        if let Some(sync) = &mut self.nodes[at].sync {
            sync.missing.retain(|d| *d != disk);
            sync.listings.insert(disk, listing);
        }
    }

    fn next_action(&mut self, at: usize) {
        let Some(sync) = &mut self.nodes[at].sync else { return };
        let action = sync.actions.as_mut().and_then(VecDeque::pop_front);
        if self.trace {
            eprintln!("{} sync of {at}: {action:?}", self.now);
        }
        match action {
            Some(_) if self.mutant == Mutant::SyncNothing => {}
            Some(Action::Copy { key, expect, from, target }) => {
                sync.copying = true;
                self.start_copy(at, key, (expect, target), from, None, Origin::Sync);
            }
            Some(Action::Delete { key }) => {
                self.nodes[at].store.replace(key, Default::default());
            }
            None => {
                let basis = sync.basis;
                let node = &mut self.nodes[at];
                node.sync = None;
                node.store.flush();
                let (disk, incarnation) = (node.disk, node.incarnation);
                let _ = self.propose(Command::Synced { disk, incarnation, basis, at: self.now });
            }
        }
    }

    pub fn sync_copied(&mut self, at: usize, epoch: Epoch, result: Result<(), Reply>) {
        let Some(sync) = self.nodes[at].sync.as_mut().filter(|s| s.basis == epoch) else { return };
        sync.copying = false;
        match result {
            Ok(()) | Err(Reply::Failed(Failure::Behind { .. })) => {}
            Err(_) => self.nodes[at].sync = None,
        }
    }
}
