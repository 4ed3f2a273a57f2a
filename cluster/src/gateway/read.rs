//! Reads: from one member of an open object, this node's own disk first.

use super::request::{Piece, PieceKind};
use super::{Gateway, Purpose, ReplyData, is_passing};
use crate::message::{Failure, Reply, Request};
use sheepdog_types::{BLOCK_SIZE, BlockError, DiskId, ObjectIndex, Version};

/// Blocks to read, and whom they are for.
#[derive(Debug)]
pub(super) struct ReadPiece {
    pub object: ObjectIndex,
    pub first: u16,
    pub count: u16,
    /// Disks whose copy could not be read.
    pub tried: Vec<DiskId>,
    pub target: ReadTarget,
}

#[derive(Debug)]
pub(super) enum ReadTarget {
    /// A piece of a guest's read.
    Guest(Piece),
    /// An edge block of a read-modify-write.
    Edge { rmw: u64, last: bool },
}

impl Gateway {
    pub(super) fn run_read(&mut self, piece: Piece) {
        if self.never_written(piece.object) {
            self.finish_piece(piece.request, Ok(()));
            return;
        }
        let range = piece.range();
        self.dispatch_read(ReadPiece {
            object: piece.object,
            first: range.first,
            count: range.end - range.first,
            tried: Vec::new(),
            target: ReadTarget::Guest(piece),
        });
    }

    /// Whether an open object has no content on any replica, and this node may answer by itself for it.
    ///
    /// It may if it has a disk, because a newer gateway has fenced that one, and with it this node, before it
    /// wrote anything. A node without a disk may not have heard of it (I1, I4): it asks a replica.
    pub(super) fn never_written(&self, index: ObjectIndex) -> bool {
        let me = self.config.node;
        self.objects.get(&index).is_some_and(|o| o.version == Version::NONE)
            && self.view.disks.values().any(|d| d.up && d.node == me)
    }

    /// Asks the best member that was not tried yet.
    pub(super) fn dispatch_read(&mut self, piece: ReadPiece) {
        let Some(members) = self.open_members(piece.object) else {
            self.open_if_possible(piece.object);
            self.retry_reads.push(piece);
            return;
        };
        let me = self.config.node;
        let is_local = |d: &DiskId| self.view.node_of(*d) == Some(me);
        let reachable =
            |d: &DiskId| self.view.node_of(*d).is_some_and(|n| !self.unreachable.contains(&n));
        let mut untried = members.iter().filter(|d| !piece.tried.contains(d)).peekable();
        if untried.peek().is_none() {
            self.finish_read(&piece, Err(BlockError::Io));
            return;
        }
        let candidates: Vec<DiskId> = untried.filter(reachable).collect();
        let best =
            candidates.iter().copied().find(is_local).or_else(|| candidates.first().copied());
        let Some(disk) = best else {
            self.retry_reads.push(piece);
            return;
        };
        let request = Request::Read {
            object: self.object_id(piece.object),
            layer: self.config.layer,
            first: piece.first,
            count: piece.count,
        };
        self.call(disk, request, None, Purpose::Read(piece));
    }

    pub(super) fn on_read_reply(
        &mut self,
        mut piece: ReadPiece,
        disk: DiskId,
        reply: &Reply,
        data: ReplyData,
    ) {
        let complete = data.bytes.len() == usize::from(piece.count) * BLOCK_SIZE;
        match reply {
            Reply::Data { .. } if complete => self.finish_read(&piece, Ok(data.bytes)),
            reply if is_passing(reply) => self.retry_reads.push(piece),
            reply => {
                if matches!(reply, Reply::Failed(Failure::Checksum { .. })) {
                    // Repaired from another member before the object is used again.
                    self.counters.checksum_failures += 1;
                    self.object(piece.object).work().suspect = Some(disk);
                    self.close_object(piece.object);
                }
                piece.tried.push(disk);
                self.dispatch_read(piece);
            }
        }
    }

    fn finish_read(&mut self, read: &ReadPiece, outcome: Result<Vec<u8>, BlockError>) {
        match &read.target {
            ReadTarget::Edge { rmw, last } => self.on_edge(*rmw, *last, outcome),
            ReadTarget::Guest(piece) => {
                let result = outcome.map(|bytes| {
                    if let PieceKind::Read { at } = piece.kind {
                        let skip = piece.start as usize - usize::from(read.first) * BLOCK_SIZE;
                        self.deliver(piece, at, bytes, skip);
                    }
                });
                self.finish_piece(piece.request, result);
            }
        }
    }

    /// Asks again for what waits for a member.
    pub(super) fn resend_reads(&mut self) {
        for piece in std::mem::take(&mut self.retry_reads) {
            self.counters.resent += 1;
            self.dispatch_read(piece);
        }
        // A member that went down never answers.
        let view = &self.view;
        let lost: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, p)| matches!(p.purpose, Purpose::Read(_)) && !view.is_up(p.disk))
            .map(|(id, _)| id)
            .collect();
        for id in lost {
            if let Some(Purpose::Read(piece)) = self.calls.remove(id).map(|p| p.purpose) {
                self.dispatch_read(piece);
            }
        }
    }
}
