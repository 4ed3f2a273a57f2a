//! Writes: numbered per object, sent to all members in parallel, in order (I2, I5).

use super::object::Range;
use super::read::{ReadPiece, ReadTarget};
use super::request::{Piece, PieceKind};
use super::{Gateway, Purpose};
use crate::message::{Blocks, Body, Failure, Reply, Request};
use sheepdog_types::{BLOCK_SIZE, BlockError, DiskId, ObjectIndex, Version};
use std::sync::Arc;

/// A write that not all members have acknowledged.
#[derive(Debug)]
pub(super) struct InFlight {
    version: Version,
    prev: Version,
    first: u16,
    body: Body,
    blocks: Option<Arc<Blocks>>,
    /// Members that have not acknowledged, and the call each was sent; 0 for none.
    pending: Vec<(DiskId, u64)>,
    /// Guest request it is a piece of.
    request: u64,
    /// It came out of a read-modify-write that still has its blocks to itself.
    locked: bool,
}

impl InFlight {
    /// Whether this write makes `version`, or follows it.
    pub fn is_next_to(&self, version: Version) -> bool {
        version == self.version || version == self.prev
    }

    /// Whether a replica at `version` has this write.
    fn is_part_of(&self, version: Version) -> bool {
        self.version.seq <= version.seq && self.version.writer == version.writer
    }

    pub fn range(&self) -> Range {
        Range { first: self.first, end: self.first + self.body.count() }
    }
}

/// A write of parts of blocks, which are read first.
#[derive(Debug)]
pub(super) struct ReadModifyWrite {
    piece: Piece,
    /// The blocks, complete once the edges are in.
    buffer: Vec<u8>,
    edges: u8,
    error: Option<BlockError>,
}

impl Gateway {
    pub(super) fn run_write(&mut self, piece: Piece) {
        let range = piece.range();
        let count = range.end - range.first;
        match &piece.kind {
            PieceKind::Zero { .. } if self.never_written(piece.object) => {
                self.finish_piece(piece.request, Ok(()));
            }
            &PieceKind::Zero { release } => {
                self.send_write(&piece, Body::Zero { count, release }, None, false);
            }
            PieceKind::Write { .. } if piece.is_partial() => self.begin_rmw(piece),
            PieceKind::Write { data, at } => {
                let blocks = Blocks::new(Arc::clone(data), *at, usize::from(count));
                self.send_write(&piece, Body::Data { count }, Some(Arc::new(blocks)), false);
            }
            PieceKind::Read { .. } | PieceKind::Touch => {}
        }
    }

    /// Gives a write its version and sends it to all members of its open object.
    fn send_write(&mut self, piece: &Piece, body: Body, blocks: Option<Arc<Blocks>>, locked: bool) {
        let index = piece.object;
        let Some(members) = self.open_members(index) else {
            self.finish_piece(piece.request, Err(BlockError::Io));
            return;
        };
        let writer = self.config.writer;
        let object = self.object(index);
        let prev = object.version;
        let seq = object.highest_seq.max(prev.seq) + 1;
        let version = Version { writer, seq };
        (object.version, object.highest_seq) = (version, seq);
        let mut write = InFlight {
            version,
            prev,
            first: piece.range().first,
            body,
            blocks,
            pending: members.iter().map(|disk| (disk, 0)).collect(),
            request: piece.request,
            locked,
        };
        self.transmit(index, &mut write);
        self.object(index).work().writes.push_back(write);
        self.active.insert(index);
    }

    /// Sends a write to every member that has neither acknowledged it nor a call under way.
    fn transmit(&mut self, index: ObjectIndex, write: &mut InFlight) {
        let key = self.key(index);
        for (disk, call) in &mut write.pending {
            if self.calls.get(*call).is_some() {
                continue;
            }
            let request = Request::Write {
                key,
                prev: write.prev,
                version: write.version,
                first: write.first,
                body: write.body,
            };
            let purpose = Purpose::Write { object: index };
            *call = self.call(*disk, request, write.blocks.clone(), purpose).unwrap_or(0);
            self.flush.note_write(*disk, index);
        }
    }

    pub(super) fn on_write_reply(
        &mut self,
        index: ObjectIndex,
        disk: DiskId,
        call: u64,
        reply: &Reply,
    ) {
        let Some(work) = self.objects.get_mut(&index).and_then(|o| o.work.as_mut()) else {
            return;
        };
        // Only the latest call of a write counts: an earlier one may have been answered before
        // the disk was away.
        let current = |w: &InFlight| w.pending.contains(&(disk, call));
        let Some(at) = work.writes.iter().position(current) else { return };
        match reply {
            Reply::Done => {
                work.writes[at].pending.retain(|(d, _)| *d != disk);
                if work.writes[at].pending.is_empty() {
                    self.settle(index, at, Ok(()));
                }
            }
            Reply::Failed(Failure::NoSpace) if !self.is_to_come(index, disk) => {
                // Closed first, so that nothing is chained to a write that is not there.
                self.close_object(index);
                self.object(index).work().roll_back = true;
                self.open_if_possible(index);
                self.settle(index, at, Err(BlockError::NoSpace));
            }
            Reply::Failed(Failure::Behind { .. }) => {
                self.close_object(index);
                self.open_if_possible(index);
            }
            _ => {
                self.retry.insert(index);
                self.counters.resent += 1;
            }
        }
    }

    /// Ends the write at place `at`: all members have it, or it failed for good.
    fn settle(&mut self, index: ObjectIndex, at: usize, outcome: Result<(), BlockError>) {
        let object = self.object(index);
        let Some(write) = object.work().writes.remove(at) else { return };
        if outcome.is_ok() {
            object.settled = object.settled.max(write.version);
        }
        if write.locked {
            object.work().locks.retain(|lock| *lock != write.range());
        }
        for (_, call) in write.pending {
            self.calls.remove(call);
        }
        self.finish_piece(write.request, outcome);
        self.run_waiting(index);
    }

    /// Forgets the calls of all writes of an object, so that they are sent again.
    pub(super) fn drop_write_calls(&mut self, index: ObjectIndex) {
        let Some(work) = self.objects.get_mut(&index).and_then(|o| o.work.as_mut()) else {
            return;
        };
        for (_, call) in work.writes.iter_mut().flat_map(|w| &mut w.pending) {
            self.calls.remove(std::mem::take(call));
        }
    }

    /// Sends again, in order, what members of an open object have not acknowledged.
    pub(super) fn resend_writes(&mut self, index: ObjectIndex) {
        let Some(members) = self.open_members(index) else { return };
        let mut writes = std::mem::take(&mut self.object(index).work().writes);
        for write in &mut writes {
            write.pending.retain(|(disk, _)| members.contains(*disk));
            self.transmit(index, write);
        }
        self.object(index).work().writes = writes;
        self.settle_acknowledged(index);
    }

    /// Lets the writes in flight that `content` does not have follow `version`. Their calls are gone.
    pub(super) fn renumber_writes(
        &mut self,
        index: ObjectIndex,
        content: Version,
        version: Version,
    ) {
        let writer = self.config.writer;
        let object = self.object(index);
        let (mut prev, mut highest) = (version, object.highest_seq);
        let to_come = |w: &&mut InFlight| !w.is_part_of(content);
        for write in object.work().writes.iter_mut().filter(to_come) {
            highest += 1;
            (write.prev, write.version) = (prev, Version { writer, seq: highest });
            prev = write.version;
        }
        object.highest_seq = highest;
    }

    /// Goes on with the writes in flight after all members were made equal at `target`.
    pub(super) fn continue_writes(&mut self, index: ObjectIndex, target: Version) {
        let Some(members) = self.open_members(index) else { return };
        let writer = self.config.writer;
        let object = self.object(index);
        let mut highest = object.highest_seq;
        let mut writes = std::mem::take(&mut object.work().writes);
        let mut prev = target;
        for write in &mut writes {
            if write.is_part_of(target) {
                write.pending.clear(); // part of what all members have
                continue;
            }
            if write.prev != prev {
                highest += 1;
                (write.prev, write.version) = (prev, Version { writer, seq: highest });
            }
            prev = write.version;
            write.pending = members.iter().map(|disk| (disk, 0)).collect();
            self.transmit(index, write);
        }
        let object = self.object(index);
        (object.version, object.highest_seq) = (prev, highest);
        object.work().writes = writes;
        self.settle_acknowledged(index);
    }

    fn settle_acknowledged(&mut self, index: ObjectIndex) {
        let done = |g: &Self| {
            let work = g.objects.get(&index)?.work.as_ref()?;
            work.writes.iter().position(|w| w.pending.is_empty())
        };
        while let Some(at) = done(self) {
            self.settle(index, at, Ok(()));
        }
    }

    fn begin_rmw(&mut self, piece: Piece) {
        let PieceKind::Write { data, at } = &piece.kind else { return };
        let (range, index) = (piece.range(), piece.object);
        let base = usize::from(range.first) * BLOCK_SIZE;
        let skip = piece.start as usize - base;
        let len = (piece.end - piece.start) as usize;
        let mut buffer = vec![0; usize::from(range.end - range.first) * BLOCK_SIZE];
        buffer[skip..skip + len].copy_from_slice(&data[*at..*at + len]);
        let first_partial = skip != 0;
        let last_partial = !(skip + len).is_multiple_of(BLOCK_SIZE);
        let one_block = range.end - range.first == 1;
        let read_last = last_partial && !(one_block && first_partial);
        self.object(index).work().locks.push(range);
        self.active.insert(index);
        let fresh = self.never_written(index);
        let edges = u8::from(first_partial) + u8::from(read_last);
        let id = self.rmws.insert(ReadModifyWrite { piece, buffer, edges, error: None });
        for (wanted, last, block) in
            [(first_partial, false, range.first), (read_last, true, range.end - 1)]
        {
            if !wanted {
                continue;
            }
            if fresh {
                self.on_edge(id, last, Ok(vec![0; BLOCK_SIZE]));
                continue;
            }
            self.dispatch_read(ReadPiece {
                object: index,
                first: block,
                count: 1,
                tried: Vec::new(),
                target: ReadTarget::Edge { rmw: id, last },
            });
        }
    }

    /// An edge block of a read-modify-write arrived.
    pub(super) fn on_edge(&mut self, id: u64, last: bool, outcome: Result<Vec<u8>, BlockError>) {
        let Some(rmw) = self.rmws.get_mut(id) else { return };
        match outcome {
            Ok(block) => rmw.merge_edge(&block, last),
            Err(error) => rmw.error = Some(error),
        }
        rmw.edges -= 1;
        if rmw.edges > 0 {
            return;
        }
        let Some(rmw) = self.rmws.remove(id) else { return };
        let index = rmw.piece.object;
        if let Some(error) = rmw.error {
            let range = rmw.piece.range();
            self.object(index).work().locks.retain(|lock| *lock != range);
            self.finish_piece(rmw.piece.request, Err(error));
            self.run_waiting(index);
            return;
        }
        let count = rmw.buffer.len() / BLOCK_SIZE;
        let blocks = Arc::new(Blocks::new(Arc::new(rmw.buffer), 0, count));
        if self.open_members(index).is_some() {
            self.send_write(&rmw.piece, Body::Data { count: count as u16 }, Some(blocks), true);
        } else {
            // The object closed meanwhile: read again what the members agree on.
            let range = rmw.piece.range();
            let work = self.object(index).work();
            work.locks.retain(|lock| *lock != range);
            work.waiting.push_front(rmw.piece);
            self.open_if_possible(index);
        }
    }
}

impl ReadModifyWrite {
    /// Fills the bytes of an edge block that the guest does not write.
    fn merge_edge(&mut self, block: &[u8], last: bool) {
        let base = usize::from(self.piece.range().first) * BLOCK_SIZE;
        let start = self.piece.start as usize - base;
        let end = self.piece.end as usize - base;
        let at = if last { self.buffer.len() - BLOCK_SIZE } else { 0 };
        for (offset, byte) in block.iter().enumerate() {
            if !(start..end).contains(&(at + offset)) {
                self.buffer[at + offset] = *byte;
            }
        }
    }
}
