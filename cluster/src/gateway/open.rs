//! Opening an object: making its replicas equal before it is used.

use super::{Effect, Gateway, Purpose};
use crate::message::{Body, Failure, Reply, Request};
use crate::view::SlotView;
use sheepdog_types::{DiskId, ObjectIndex, Version};

/// An opening in progress.
#[derive(Debug)]
pub(super) struct Opening {
    slot: SlotView,
    /// What each member answered.
    versions: Vec<(DiskId, Version)>,
    /// Members that still copy, or take the version that supersedes what was undone.
    changing: Vec<DiskId>,
    target: Version,
    /// All had one version; now they take the target, which has the same content.
    superseding: bool,
    /// Calls to forget when the opening is abandoned.
    calls: Vec<u64>,
}

impl Gateway {
    /// Begins to open the object if its slot can be served in this epoch.
    pub(super) fn open_if_possible(&mut self, index: ObjectIndex) {
        if self.object(index).opening().is_some() {
            return;
        }
        let Some(slot) = self.slot_of(index) else { return };
        self.active.insert(index);
        self.drop_write_calls(index);
        let key = self.key(index);
        let mut calls = Vec::with_capacity(slot.members.len());
        for disk in slot.members.iter() {
            let purpose = Purpose::Stat { object: index };
            if let Some(id) = self.call(disk, Request::Stat { key }, None, purpose) {
                calls.push(id);
            }
        }
        let opening = Opening {
            slot,
            versions: Vec::with_capacity(calls.len()),
            changing: Vec::new(),
            superseding: false,
            target: Version::NONE,
            calls,
        };
        let complete = opening.calls.len() == opening.slot.members.len();
        self.object(index).work().opening = Some(opening);
        if !complete {
            self.abandon_opening(index); // a member cannot be reached now
        }
    }

    /// Forgets an opening without trying again.
    pub(super) fn cancel_opening(&mut self, index: ObjectIndex) {
        let opening = self.object(index).work().opening.take();
        for id in opening.into_iter().flat_map(|o| o.calls) {
            self.calls.remove(id);
        }
    }

    /// Gives an opening up until the next tick.
    pub(super) fn abandon_opening(&mut self, index: ObjectIndex) {
        self.cancel_opening(index);
        self.retry.insert(index);
        self.counters.resent += 1;
    }

    /// The replicas may differ: none is used before they were compared.
    pub(super) fn close_object(&mut self, index: ObjectIndex) {
        self.object(index).verified = None;
        self.active.insert(index);
    }

    pub(super) fn on_stat_reply(&mut self, index: ObjectIndex, disk: DiskId, reply: &Reply) {
        let writer = self.config.writer;
        let &Reply::Version { version } = reply else {
            self.abandon_opening(index);
            return;
        };
        let object = self.objects.entry(index).or_default();
        let settled = object.settled;
        let Some(work) = object.work.as_mut() else { return };
        let (suspect, roll_back) = (work.suspect, work.roll_back);
        let Some(mut opening) = work.opening.take() else { return };
        opening.versions.push((disk, version));
        if opening.versions.len() < opening.slot.members.len() {
            work.opening = Some(opening);
            return;
        }
        let of_authorities = || {
            let is_one = |d: &DiskId| opening.slot.authorities.contains(*d);
            opening.versions.iter().filter(move |(d, _)| is_one(d)).map(|(_, v)| *v)
        };
        // A damaged copy does not count while a whole one has all that was acknowledged: what it
        // has beyond is sent again. Nor does a write of this gateway that failed and was undone.
        let standing = |v: Version| {
            v.writer != writer || v == settled || work.writes.iter().any(|w| w.is_next_to(v))
        };
        let usable = || {
            let authorities = opening.slot.authorities;
            let of = opening.versions.iter();
            of.filter(move |(d, _)| authorities.contains(*d) && suspect != Some(*d))
                .map(|(_, v)| *v)
                .filter(|v| *v >= settled && standing(*v))
        };
        // What is not acknowledged may be undone; nothing older may.
        let target = (if roll_back { usable().min() } else { usable().max() })
            .or_else(|| of_authorities().max())
            .unwrap_or(Version::NONE);
        opening.target = target;
        object.highest_seq =
            opening.versions.iter().map(|(_, v)| v.seq).fold(object.highest_seq, u64::max);
        // The same version means the same bytes (I5), whoever has it.
        let good = opening
            .versions
            .iter()
            .filter(|(d, v)| *v == target && suspect != Some(*d))
            .map(|(d, _)| *d)
            .max_by_key(|d| opening.slot.authorities.contains(*d));
        let wrong: Vec<(DiskId, Version)> = opening
            .versions
            .iter()
            .filter(|(d, v)| *v != target || (suspect == Some(*d) && good.is_some()))
            .copied()
            .collect();
        work.opening = Some(opening);
        if wrong.is_empty() {
            self.on_equal(index);
        } else if let Some(from) = good {
            let key = self.key(index);
            let copy = |(disk, expect)| (disk, Request::Recover { key, expect, from, target });
            self.change_members(index, wrong.into_iter().map(copy).collect());
        } else {
            self.abandon_opening(index); // the only good copy is the damaged one
        }
    }

    fn change_members(&mut self, index: ObjectIndex, changes: Vec<(DiskId, Request)>) {
        let Some(opening) = self.object(index).work().opening.as_mut() else { return };
        opening.changing = changes.iter().map(|(disk, _)| *disk).collect();
        let mut complete = true;
        for (disk, request) in changes {
            self.object(index).work().copies.insert(disk);
            let id = self.call(disk, request, None, Purpose::Change { object: index });
            complete &= id.is_some();
            if let (Some(id), Some(opening)) = (id, self.object(index).work().opening.as_mut()) {
                opening.calls.push(id);
            }
            self.flush.note_write(disk, index);
        }
        if !complete {
            self.abandon_opening(index);
        }
    }

    /// All members have the same version. A write that was undone may still be on a disk that is
    /// away: a version that is newer makes sure that it never counts again.
    fn on_equal(&mut self, index: ObjectIndex) {
        let (key, writer) = (self.key(index), self.config.writer);
        let object = self.object(index);
        let work = object.work.get_or_insert_default();
        let Some(opening) = work.opening.as_mut() else { return };
        if !work.roll_back || opening.superseding {
            return self.finish_opening(index);
        }
        let prev = opening.target;
        let version = Version { writer, seq: object.highest_seq.max(prev.seq) + 1 };
        object.highest_seq = version.seq;
        (opening.superseding, opening.target) = (true, version);
        let members = opening.slot.members;
        self.renumber_writes(index, prev, version);
        let touch =
            |disk| (disk, Request::Write { key, prev, version, first: 0, body: Body::Nothing });
        self.change_members(index, members.iter().map(touch).collect());
    }

    pub(super) fn on_change_reply(&mut self, index: ObjectIndex, disk: DiskId, reply: &Reply) {
        if *reply == Reply::Failed(Failure::NoSpace) && !self.object(index).work().roll_back {
            self.object(index).work().roll_back = true;
        }
        if *reply != Reply::Done {
            let work = self.object(index).work();
            if work.suspect == Some(disk) {
                // No other copy is whole either. Each block may still be read where it is.
                work.suspect = None;
            }
            self.abandon_opening(index);
            return;
        }
        self.counters.recovered += 1;
        self.flush.note_write(disk, index); // a flush may have overtaken the copy
        self.object(index).work().copies.remove(disk);
        let Some(opening) = self.object(index).work().opening.as_mut() else { return };
        opening.changing.retain(|d| *d != disk);
        if !opening.changing.is_empty() {
            return;
        }
        if opening.versions.iter().any(|(_, version)| *version > opening.target) {
            // A disk that synchronises itself may have begun to copy what was just undone. To ask
            // again ends such copies; those that begin from now on find nothing of it.
            self.cancel_opening(index);
            self.open_if_possible(index);
        } else {
            self.on_equal(index);
        }
    }

    /// Copies of earlier openings may have been made after a flush, and nobody looked at the answer: the next
    /// flush has to go there (I3). None can be made any more, since all members were asked for their version.
    pub(super) fn note_copies(&mut self, index: ObjectIndex) {
        let work = self.objects.get_mut(&index).and_then(|o| o.work.as_mut());
        let copies = work.map(|work| std::mem::take(&mut work.copies)).unwrap_or_default();
        // One that is down is not waited for; it compares itself when it is back.
        let view = &self.view;
        for disk in copies.iter().filter(|disk| view.is_up(*disk)) {
            self.flush.note_write(disk, index);
        }
    }

    fn finish_opening(&mut self, index: ObjectIndex) {
        let epoch = self.epoch();
        let object = self.objects.entry(index).or_default();
        let Some(work) = object.work.as_mut() else { return };
        let Some(opening) = work.opening.take() else { return };
        work.suspect = None;
        work.roll_back = false;
        object.verified = Some(epoch);
        object.version = opening.target;
        let lost = opening.target < object.settled;
        object.settled = opening.target;
        self.counters.opened += 1;
        if lost {
            self.note_lost_writes();
            self.effects.push_back(Effect::LostWrites { object: self.object_id(index) });
        }
        self.note_reconciled(index);
        self.note_copies(index);
        self.continue_writes(index, opening.target);
        self.run_waiting(index);
    }
}
