//! Which disks are on the ring, and how data move to another one.

use super::{ClusterState, Disk, RingMember, RingMembers};
use crate::command::{Answer, Outcome, Refusal};
use crate::history::{EpochRecord, MAX_HISTORY};
use sheepdog_types::{DiskId, Epoch};

impl ClusterState {
    pub(super) fn synced(&mut self, id: DiskId, incarnation: u64, basis: Epoch, at: u64) -> Answer {
        let Some(disk) = self.disks.get_mut(&id) else {
            return Ok(Outcome::Done);
        };
        let current = self.nodes.get(&disk.node);
        let fresh = disk.present && current.is_some_and(|n| n.up && n.incarnation == incarnation);
        // It may say nothing about what is needed by now, or about another life of the disk.
        if !fresh || basis < disk.entered || disk.sync_from.is_some_and(|from| basis < from) {
            return Ok(Outcome::Done);
        }
        (disk.missed_since, disk.restarted, disk.sync_from) = (None, false, None);
        disk.lost = false;
        self.revision += 1;
        self.promote_if_synced(at);
        Ok(Outcome::Done)
    }

    /// Whether a disk is on the ring, or about to be.
    #[must_use]
    pub fn on_ring(&self, disk: DiskId) -> bool {
        let on = |ring: &RingMembers| ring.contains_key(&disk);
        on(&self.ring) || self.next_ring.as_ref().is_some_and(on)
    }

    /// Whether a disk is to hold data.
    #[must_use]
    pub fn is_wanted(&self, disk: &Disk) -> bool {
        let stays = self.nodes.get(&disk.node).is_some_and(|n| !n.draining && !n.removed);
        stays && !disk.out && !disk.retiring && disk.weight > 0
    }

    /// Compares the ring with the disks there are, and starts a move when they differ. To be called
    /// in a new epoch.
    pub(super) fn replan(&mut self, at: u64) {
        let wanted: RingMembers = self
            .disks
            .iter()
            .filter(|(_, disk)| self.is_wanted(disk))
            .filter_map(|(id, disk)| {
                let zone = self.nodes.get(&disk.node)?.zone.clone();
                Some((*id, RingMember { node: disk.node, zone, weight: disk.weight }))
            })
            .collect();
        if self.volumes.is_empty() || wanted == self.ring {
            if self.next_ring.is_some() {
                self.compare_all(); // what was copied for nothing goes
            }
            self.place(wanted, None);
        } else if wanted.is_empty() {
            self.place(self.ring.clone(), None); // nowhere to go: the data stay where they are
        } else if self.next_ring.as_ref() != Some(&wanted) {
            self.compare_all();
            self.place(self.ring.clone(), Some(wanted));
        }
        self.promote_if_synced(at);
    }

    pub(super) fn set_full(&mut self, id: DiskId, incarnation: u64, full: bool, at: u64) -> Answer {
        let Some(disk) = self.disks.get(&id) else { return Err(Refusal::NoSuchDisk(id)) };
        let Some(node) = self.nodes.get(&disk.node) else { return Ok(Outcome::Done) };
        let to_come = self.next_ring.as_ref().is_some_and(|next| next.contains_key(&id));
        if disk.full == full || !to_come || !self.disk_up(id) || node.incarnation != incarnation {
            return Ok(Outcome::Done);
        }
        let what = if full { "has no room for what moves to it" } else { "has room again" };
        self.begin_epoch(self.next_record(format!("disk {id} of {} {what}", node.address), at));
        // Who is written to changes: replicas that were equal before need not be so after it.
        self.placement_since = self.epoch;
        if let Some(disk) = self.disks.get_mut(&id) {
            disk.full = full;
            disk.sync_from = Some(self.epoch);
        }
        Ok(Outcome::Done)
    }

    /// Has every disk in service compare itself with the others.
    fn compare_all(&mut self) {
        let up: Vec<DiskId> = self.disks.keys().copied().filter(|d| self.disk_up(*d)).collect();
        for id in up {
            if let Some(disk) = self.disks.get_mut(&id) {
                disk.sync_from = Some(self.epoch);
            }
        }
    }

    fn place(&mut self, ring: RingMembers, next: Option<RingMembers>) {
        if self.ring != ring || self.next_ring != next {
            (self.ring, self.next_ring) = (ring, next);
            self.placement_since = self.epoch;
            self.disks.values_mut().for_each(|disk| disk.full = false); // a smaller share may fit
        }
        self.forget_removed();
    }

    /// Makes the next ring the ring once every disk of it holds what it must hold. A disk that is
    /// down holds the move up until it is out: it may be the only one to get some slot.
    pub(super) fn promote_if_synced(&mut self, at: u64) {
        let Some(next) = &self.next_ring else { return };
        let has_all = |disk: &Disk| disk.complete() && !disk.full;
        let ready = |id| self.disk_up(id) && self.disks.get(&id).is_some_and(has_all);
        if next.keys().all(|id| ready(*id)) {
            let ring = next.clone();
            let cause = "data moved to the new placement".to_string();
            self.begin_epoch(self.next_record(cause, at));
            // What a disk has no more business with is deleted by its next comparison.
            self.compare_all();
            self.place(ring, None);
        }
    }

    /// Forgets removed nodes and retired disks once no ring names them.
    fn forget_removed(&mut self) {
        let leaves = |id: &DiskId, disk: &Disk| {
            let removed = self.nodes.get(&disk.node).is_none_or(|n| n.removed);
            (removed || disk.retiring) && !self.on_ring(*id)
        };
        let gone: Vec<DiskId> =
            self.disks.iter().filter(|(id, d)| leaves(id, d)).map(|(id, _)| *id).collect();
        for id in gone {
            if self.disks.remove(&id).is_some_and(|disk| disk.retiring) {
                self.removed_disks.insert(id);
            }
        }
        let owners: Vec<_> = self.disks.values().map(|d| d.node).collect();
        self.nodes.retain(|id, node| !node.removed || owners.contains(id));
    }

    /// An epoch that differs in nothing yet.
    pub(super) fn next_record(&self, cause: String, at: u64) -> EpochRecord {
        EpochRecord { epoch: self.epoch.next(), cause, at, ..EpochRecord::default() }
    }

    pub(super) fn begin_epoch(&mut self, record: EpochRecord) {
        self.epoch = record.epoch;
        self.revision += 1;
        self.history.push(record);
        if self.history.len() > MAX_HISTORY {
            self.history.remove(0);
        }
    }
}
