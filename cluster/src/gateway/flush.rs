//! Flush: everything acknowledged before it is durable on every replica (I3).

use super::request::{Kind, Origin, Piece, PieceKind};
use super::{Gateway, Purpose, is_passing};
use crate::message::{Reply, Request};
use sheepdog_types::{BlockError, DiskId, Epoch, OBJECT_SIZE, ObjectIndex, Op, Token};
use std::collections::BTreeMap;

/// What is not durable yet.
#[derive(Debug, Default)]
pub(super) struct FlushState {
    /// Counts writes; a flush covers those up to the count at its start.
    clock: u64,
    /// Last write to each disk, and the epoch in which the disk became dirty.
    dirty: BTreeMap<DiskId, Dirty>,
    /// Last write to each object.
    unflushed: BTreeMap<ObjectIndex, u64>,
    /// A dirty disk went away or was restarted: the objects have to be compared before a flush.
    verify: bool,
    /// Acknowledged writes are gone; the next flush has to say so.
    lost: bool,
    /// An earlier gateway of this volume may have left acknowledged writes unflushed, nobody knows
    /// of which objects.
    inherited: bool,
    /// A call was rejected for a passing reason.
    pub retry: bool,
    /// Guest requests that wait for a flush.
    running: Vec<u64>,
    epoch: Epoch,
}

#[derive(Debug)]
struct Dirty {
    last_write: u64,
    since: Epoch,
}

/// A flush in progress.
#[derive(Debug, Default)]
pub(super) struct GuestFlush {
    started: u64,
    /// Calls are out; before that, objects are compared.
    syncing: bool,
    /// Acknowledged writes were lost while it ran.
    lost: bool,
    /// Disks that have not answered, and the call each was sent; 0 for none.
    waiting: Vec<(DiskId, u64)>,
}

impl FlushState {
    pub fn new(epoch: Epoch) -> Self {
        Self { epoch, ..Self::default() }
    }

    pub fn note_write(&mut self, disk: DiskId, object: ObjectIndex) {
        self.clock += 1;
        let last_write = self.clock;
        let since = self.epoch;
        self.dirty.entry(disk).or_insert(Dirty { last_write, since }).last_write = last_write;
        self.unflushed.insert(object, last_write);
    }
}

impl Gateway {
    /// What earlier gateways wrote may not be durable anywhere: the first flush goes to all disks.
    pub(super) fn inherit_unflushed(&mut self) {
        self.flush.inherited = true;
        self.flush.clock += 1;
        let (last_write, since) = (self.flush.clock, self.view.epoch);
        let up = self.view.disks.iter().filter(|(_, d)| d.up).map(|(id, _)| *id);
        self.flush.dirty = up.map(|id| (id, Dirty { last_write, since })).collect();
    }

    /// Whether the writes of earlier gateways are on enough replicas for a flush to count. With
    /// fewer, they would be forgotten if the few failed before the others have compared.
    fn inheritance_is_safe(&self) -> bool {
        let config = &self.config;
        let objects = config.size.div_ceil(OBJECT_SIZE);
        !self.flush.inherited
            || self.view.is_intact(config.volume, objects, config.copies, config.min_copies)
    }

    /// Fails the flushes that run, or the next one.
    pub(super) fn note_lost_writes(&mut self) {
        let running = self.flush.running.clone();
        self.flush.lost |= running.is_empty();
        for id in running {
            if let Some(flush) = self.guest_flush(id) {
                flush.lost = true;
            }
        }
    }

    pub(super) fn begin_flush(&mut self, token: Token) {
        let id = self.admit(token, Origin::Plain(Op::Flush), 0, Kind::Flush(GuestFlush::default()));
        self.start_flush(id);
    }

    /// Starts the flush of a request that is held open by one piece.
    pub(super) fn start_flush(&mut self, id: u64) {
        let started = self.flush.clock;
        let Some(request) = self.requests.get_mut(id) else { return };
        request.kind = Kind::Flush(GuestFlush { started, ..GuestFlush::default() });
        self.flush.running.push(id);
        self.touch_unflushed(id);
        self.finish_piece(id, Ok(()));
    }

    /// Waits until every object written since the last flush is known to be equal on enough
    /// replicas of the current epoch. A flush that only a lonely survivor answered would be
    /// forgotten when the others come back without it.
    fn touch_unflushed(&mut self, id: u64) {
        if !self.flush.verify {
            return;
        }
        let objects: Vec<ObjectIndex> = self.flush.unflushed.keys().copied().collect();
        for object in objects {
            let kind = PieceKind::Touch;
            self.add_piece(Piece { request: id, object, start: 0, end: 0, kind });
        }
    }

    /// All objects are compared: asks the disks.
    pub(super) fn on_flush_piece_done(&mut self, id: u64) {
        if std::mem::take(&mut self.flush.lost) {
            self.note_lost_writes();
        }
        if self.guest_flush(id).is_some_and(|f| f.lost) {
            self.end_flush(id);
            return;
        }
        if !self.inheritance_is_safe() {
            return; // goes on with a later revision
        }
        let disks: Vec<DiskId> = self.flush.dirty.keys().copied().collect();
        let waiting = disks.into_iter().map(|disk| (disk, 0)).collect();
        if let Some(flush) = self.guest_flush(id) {
            (flush.syncing, flush.waiting) = (true, waiting);
        }
        self.transmit_flush(id);
    }

    fn guest_flush(&mut self, id: u64) -> Option<&mut GuestFlush> {
        match &mut self.requests.get_mut(id)?.kind {
            Kind::Flush(flush) => Some(flush),
            _ => None,
        }
    }

    fn transmit_flush(&mut self, id: u64) {
        let Some(flush) = self.guest_flush(id).filter(|f| f.syncing) else { return };
        let mut waiting = std::mem::take(&mut flush.waiting);
        // Another flush may have made a disk clean, and the disk be gone since.
        waiting.retain(|(disk, _)| self.flush.dirty.contains_key(disk));
        for (disk, call) in &mut waiting {
            if self.calls.get(*call).is_none() {
                let purpose = Purpose::Flush { request: id };
                *call = self.call(*disk, Request::Flush, None, purpose).unwrap_or(0);
            }
        }
        let done = waiting.is_empty();
        if let Some(flush) = self.guest_flush(id) {
            flush.waiting = waiting;
        }
        if done {
            self.end_flush(id);
        }
    }

    pub(super) fn on_flush_reply(&mut self, id: u64, disk: DiskId, reply: &Reply) {
        if *reply != Reply::Done {
            debug_assert!(
                is_passing(reply) || matches!(reply, Reply::Failed(_) | Reply::Rejected(_))
            );
            // A disk that cannot flush leaves the cluster; the new epoch goes on without it.
            self.flush.retry = true;
            return;
        }
        let Some(flush) = self.guest_flush(id) else { return };
        let started = flush.started;
        flush.waiting.retain(|(d, _)| *d != disk);
        let done = flush.syncing && flush.waiting.is_empty();
        if self.flush.dirty.get(&disk).is_some_and(|d| d.last_write <= started) {
            self.flush.dirty.remove(&disk);
        }
        if done {
            self.end_flush(id);
        }
    }

    fn end_flush(&mut self, id: u64) {
        let (started, lost) = self.guest_flush(id).map_or((0, false), |f| (f.started, f.lost));
        let error = lost.then_some(BlockError::Io);
        self.flush.running.retain(|r| *r != id);
        if error.is_none() {
            self.flush.unflushed.retain(|_, last_write| *last_write > started);
            self.flush.verify = false;
            self.flush.inherited = false;
        }
        if let Some(request) = self.requests.get_mut(id) {
            request.error = error;
        }
        self.end_request(id);
    }

    /// Sends again what has no reply.
    pub(super) fn resend_flushes(&mut self) {
        self.flush.retry = false;
        for id in self.flush.running.clone() {
            self.transmit_flush(id);
        }
    }

    /// A new revision: flushes that counted on a disk that is gone or restarted start again.
    pub(super) fn review_flushes(&mut self) {
        let view = &self.view;
        let flush = &mut self.flush;
        flush.epoch = view.epoch;
        let before = flush.dirty.len();
        flush.dirty.retain(|disk, dirty| {
            view.disks.get(disk).is_some_and(|d| d.up && d.entered <= dirty.since)
        });
        let lost_one = flush.dirty.len() < before;
        flush.verify |= lost_one;
        self.forget_calls(|p| matches!(p, Purpose::Flush { .. }));
        for id in self.flush.running.clone() {
            let held_back =
                self.requests.get(id).is_some_and(|r| r.pieces == 0) && !self.is_syncing(id);
            if lost_one || held_back {
                self.restart_flush(id);
            } else {
                self.transmit_flush(id);
            }
        }
    }

    fn is_syncing(&mut self, id: u64) -> bool {
        self.guest_flush(id).is_some_and(|f| f.syncing)
    }

    fn restart_flush(&mut self, id: u64) {
        let Some(flush) = self.guest_flush(id) else { return };
        flush.syncing = false;
        flush.waiting.clear();
        if let Some(request) = self.requests.get_mut(id) {
            request.pieces += 1;
        }
        self.touch_unflushed(id);
        self.finish_piece(id, Ok(()));
    }
}
