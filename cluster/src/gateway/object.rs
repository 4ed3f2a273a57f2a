//! One object of the volume, as the gateway knows it.

use super::Gateway;
use super::open::Opening;
use super::request::{Piece, PieceKind};
use super::write::InFlight;
use crate::view::Disks;
use sheepdog_types::{DiskId, Epoch, ObjectIndex, Version};
use std::collections::VecDeque;

/// What is remembered of every object used since the attach: about 60 bytes when idle.
#[derive(Debug, Default)]
pub(super) struct Object {
    /// Version of the last write sent, or found when the object was opened.
    pub version: Version,
    /// Version of the last write that all members acknowledged.
    pub settled: Version,
    /// Highest sequence ever used, so that none is used twice for different bytes.
    pub highest_seq: u64,
    /// Epoch in which the replicas were last made equal.
    pub verified: Option<Epoch>,
    /// Present while something is in progress.
    pub work: Option<Box<Work>>,
}

/// What is in progress on an object.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub opening: Option<Opening>,
    /// Writes not acknowledged by all members, in order.
    pub writes: VecDeque<InFlight>,
    /// Pieces that wait for the object to open, or for an overlapping read-modify-write.
    pub waiting: VecDeque<Piece>,
    /// Block ranges that a read-modify-write has to itself.
    pub locks: Vec<Range>,
    /// A disk that returned a damaged block and is to be repaired.
    pub suspect: Option<DiskId>,
    /// Members that were told to copy, and whose answer did not count any more: they may have.
    pub copies: Disks,
    /// A member ran out of space: go back to the oldest version that is not acknowledged yet.
    pub roll_back: bool,
}

/// Blocks `first..end` of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub first: u16,
    pub end: u16,
}

impl Range {
    pub fn overlaps(self, other: Self) -> bool {
        self.first < other.end && other.first < self.end
    }
}

impl Work {
    fn is_empty(&self) -> bool {
        self.is_over() && self.copies.is_empty()
    }

    /// Whether nothing is left to do but to remember the copies for the next flush.
    fn is_over(&self) -> bool {
        self.opening.is_none()
            && self.writes.is_empty()
            && self.waiting.is_empty()
            && self.locks.is_empty()
            && self.suspect.is_none()
            && !self.roll_back
    }

    /// Whether `piece` may start although the first `ahead` waiting pieces have not.
    fn may_start(&self, piece: &Piece, ahead: usize) -> bool {
        if !piece.kind.writes() {
            return true;
        }
        let range = piece.range();
        let earlier = self.waiting.iter().take(ahead);
        if self.locks.iter().any(|lock| lock.overlaps(range))
            || earlier.filter(|p| p.kind.writes()).any(|p| p.range().overlaps(range))
        {
            return false;
        }
        // A read-modify-write reads what is there: nothing may be under way.
        !piece.is_partial() || !self.writes.iter().any(|w| w.range().overlaps(range))
    }
}

impl Object {
    /// Whether something is under way that may leave the replicas different.
    pub fn is_busy(&self) -> bool {
        self.verified.is_none() || self.work.as_ref().is_some_and(|work| !work.is_over())
    }

    pub fn opening(&self) -> Option<&Opening> {
        self.work.as_ref()?.opening.as_ref()
    }

    pub fn work(&mut self) -> &mut Work {
        self.work.get_or_insert_default()
    }
}

impl Gateway {
    pub(super) fn object(&mut self, index: ObjectIndex) -> &mut Object {
        self.objects.entry(index).or_default()
    }

    /// Starts `piece`, or lets it wait.
    pub(super) fn start_piece(&mut self, piece: Piece) {
        let index = piece.object;
        let ready = self.open_members(index).is_some() && !self.retry.contains(&index);
        let free = self
            .objects
            .get(&index)
            .and_then(|o| o.work.as_ref())
            .is_none_or(|work| work.may_start(&piece, work.waiting.len()));
        if ready && free {
            self.run_piece(piece);
        } else {
            self.object(index).work().waiting.push_back(piece);
            self.active.insert(index);
            if !ready && !self.retry.contains(&index) {
                self.open_if_possible(index);
            }
        }
    }

    fn run_piece(&mut self, piece: Piece) {
        match piece.kind {
            PieceKind::Touch => self.finish_piece(piece.request, Ok(())),
            PieceKind::Read { .. } => self.run_read(piece),
            PieceKind::Write { .. } | PieceKind::Zero { .. } => self.run_write(piece),
        }
    }

    /// Starts every waiting piece that may, in order.
    pub(super) fn run_waiting(&mut self, index: ObjectIndex) {
        let mut at = 0;
        while self.open_members(index).is_some() && !self.retry.contains(&index) {
            let Some(work) = self.objects.get_mut(&index).and_then(|o| o.work.as_mut()) else {
                break;
            };
            let Some(piece) = work.waiting.get(at) else { break };
            if !work.may_start(piece, at) {
                at += 1;
            } else if let Some(piece) = work.waiting.remove(at) {
                self.run_piece(piece);
            }
        }
        self.rest_if_idle(index);
    }

    /// Frees what only an object with work in progress needs.
    pub(super) fn rest_if_idle(&mut self, index: ObjectIndex) {
        if let Some(object) = self.objects.get_mut(&index)
            && object.work.as_ref().is_none_or(|w| w.is_empty())
        {
            object.work = None;
            self.active.remove(&index);
        }
    }

    /// A new epoch began: goes on with an active object if its replicas are still the ones that
    /// were made equal, otherwise opens it again.
    pub(super) fn review_object(&mut self, index: ObjectIndex) {
        self.retry.remove(&index);
        self.cancel_opening(index);
        self.resume_object(index);
    }

    /// Sends again what has no reply, and starts what waits.
    pub(super) fn resume_object(&mut self, index: ObjectIndex) {
        self.retry.remove(&index);
        if self.objects.get(&index).is_some_and(|o| o.opening().is_some()) {
            return;
        }
        if self.open_members(index).is_some() {
            self.note_copies(index);
            self.resend_writes(index);
            self.run_waiting(index);
        } else {
            self.open_if_possible(index);
        }
    }
}
