//! Guest requests, and the pieces per object that they are cut into.

use super::object::Range;
use super::{Gateway, flush::GuestFlush};
use crate::command::Ack;
use sheepdog_types::{
    BLOCK_SIZE, BlockError, Done, MAX_REQUEST_BYTES, OBJECT_SIZE, ObjectIndex, Op, Token,
};
use std::sync::Arc;

const BLOCK: u32 = BLOCK_SIZE as u32;
/// Most pieces of one request in progress: a discard may touch every object of a volume.
const MAX_PIECES: u32 = 64;

/// A request of the guest in progress.
#[derive(Debug)]
pub(super) struct GuestRequest {
    token: Option<Token>,
    /// What it was, should it go back to the caller.
    origin: Origin,
    /// Pieces in progress.
    pub pieces: u32,
    pub error: Option<BlockError>,
    /// Bytes counted against the bound of the gateway.
    bytes: u64,
    /// Pieces are being cut off: those done at once must not cut further ones off.
    spawning: bool,
    pub kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Read { len: u32, data: Vec<u8> },
    Write { fua: bool },
    Zero { next: u64, end: u64, release: bool, edges: bool, fua: bool },
    Flush(GuestFlush),
}

/// An [`Op`] that shares its data.
#[derive(Debug)]
pub(super) enum Origin {
    Write {
        offset: u64,
        data: Arc<Vec<u8>>,
        fua: bool,
    },
    /// Any other.
    Plain(Op),
}

impl Origin {
    fn into_op(self) -> Op {
        match self {
            Self::Write { offset, data, fua } => {
                Op::Write { offset, data: Arc::unwrap_or_clone(data), fua }
            }
            Self::Plain(op) => op,
        }
    }
}

/// The part of a request that lies in one object.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub request: u64,
    pub object: ObjectIndex,
    /// First byte in the object.
    pub start: u32,
    /// Byte after the last.
    pub end: u32,
    pub kind: PieceKind,
}

#[derive(Clone, Debug)]
pub(super) enum PieceKind {
    /// Does nothing once the object is open.
    Touch,
    /// Fills the request's data from byte `at`.
    Read { at: usize },
    /// Writes the bytes of `data` from `at`.
    Write { data: Arc<Vec<u8>>, at: usize },
    /// Writes zeroes; whole blocks only.
    Zero { release: bool },
}

impl PieceKind {
    pub fn writes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. })
    }
}

impl Piece {
    /// The blocks it touches.
    pub fn range(&self) -> Range {
        Range { first: (self.start / BLOCK) as u16, end: self.end.div_ceil(BLOCK) as u16 }
    }

    /// Whether it writes a part of a block.
    pub fn is_partial(&self) -> bool {
        matches!(self.kind, PieceKind::Write { .. })
            && !(self.start.is_multiple_of(BLOCK) && self.end.is_multiple_of(BLOCK))
    }
}

impl GuestRequest {
    /// The request as it came.
    pub fn take_back(self) -> Option<(Op, Token)> {
        Some((self.origin.into_op(), self.token?))
    }
}

/// Cuts `offset..end` at object borders: (object, first byte, byte after the last) each.
fn cut(offset: u64, end: u64) -> impl Iterator<Item = (ObjectIndex, u32, u32)> {
    let mut at = offset;
    std::iter::from_fn(move || {
        let (object, start) = (at / OBJECT_SIZE, at % OBJECT_SIZE);
        let stop = (start + (end - at)).min(OBJECT_SIZE);
        (at < end).then(|| {
            at += stop - start;
            (ObjectIndex(object as u32), start as u32, stop as u32)
        })
    })
}

impl Gateway {
    /// Starts a request of the guest.
    pub(super) fn begin(&mut self, op: Op, token: Token) {
        if let Err(error) = self.validate(&op) {
            self.complete(token, Err(error));
            return;
        }
        let commits = self.config.ack == Ack::Commit;
        match op {
            Op::Read { offset, len } => self.begin_read(offset, len, token),
            Op::Write { offset, data, fua } => {
                self.begin_write(offset, data, fua || commits, token)
            }
            Op::Flush => self.begin_flush(token),
            Op::Discard { offset, len } => {
                let op = Op::Discard { offset, len };
                let kind = Kind::Zero {
                    next: offset,
                    end: offset + len,
                    release: true,
                    edges: false,
                    fua: commits,
                };
                self.begin_zero(op, kind, token);
            }
            Op::WriteZeroes { offset, len, may_unmap, fua } => {
                let op = Op::WriteZeroes { offset, len, may_unmap, fua };
                let kind = Kind::Zero {
                    next: offset,
                    end: offset + len,
                    release: may_unmap,
                    edges: true,
                    fua: fua || commits,
                };
                self.begin_zero(op, kind, token);
            }
        }
    }

    fn validate(&self, op: &Op) -> Result<(), BlockError> {
        let (offset, len, limit) = match op {
            Op::Read { offset, len } => (*offset, u64::from(*len), MAX_REQUEST_BYTES),
            Op::Write { offset, data, .. } => (*offset, data.len() as u64, MAX_REQUEST_BYTES),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
                (*offset, *len, u64::MAX)
            }
            Op::Flush => return Ok(()),
        };
        let end = offset.checked_add(len).ok_or(BlockError::OutOfRange)?;
        if end > self.config.size {
            return Err(BlockError::OutOfRange);
        }
        if len > limit { Err(BlockError::Invalid) } else { Ok(()) }
    }

    /// Registers a request that holds itself open with one piece while others are added.
    pub(super) fn admit(&mut self, token: Token, origin: Origin, bytes: u64, kind: Kind) -> u64 {
        self.active_bytes += bytes;
        let token = Some(token);
        self.requests.insert(GuestRequest {
            token,
            origin,
            pieces: 1,
            error: None,
            bytes,
            spawning: false,
            kind,
        })
    }

    pub(super) fn add_piece(&mut self, piece: Piece) {
        if let Some(request) = self.requests.get_mut(piece.request) {
            request.pieces += 1;
            self.start_piece(piece);
        }
    }

    fn begin_read(&mut self, offset: u64, len: u32, token: Token) {
        let kind = Kind::Read { len, data: Vec::new() };
        let origin = Origin::Plain(Op::Read { offset, len });
        let request = self.admit(token, origin, u64::from(len), kind);
        let mut at = 0;
        for (object, start, end) in cut(offset, offset + u64::from(len)) {
            let kind = PieceKind::Read { at };
            at += (end - start) as usize;
            self.add_piece(Piece { request, object, start, end, kind });
        }
        self.finish_piece(request, Ok(()));
    }

    fn begin_write(&mut self, offset: u64, data: Vec<u8>, fua: bool, token: Token) {
        let len = data.len() as u64;
        let data = Arc::new(data);
        let origin = Origin::Write { offset, data: Arc::clone(&data), fua };
        let request = self.admit(token, origin, len, Kind::Write { fua });
        let mut at = 0;
        for (object, start, end) in cut(offset, offset + len) {
            let kind = PieceKind::Write { data: Arc::clone(&data), at };
            at += (end - start) as usize;
            self.add_piece(Piece { request, object, start, end, kind });
        }
        self.finish_piece(request, Ok(()));
    }

    fn begin_zero(&mut self, op: Op, kind: Kind, token: Token) {
        let request = self.admit(token, Origin::Plain(op), 0, kind);
        self.spawn_zero_pieces(request);
        self.finish_piece(request, Ok(()));
    }

    /// Cuts further pieces off a zeroing request, as many as may be in progress.
    fn spawn_zero_pieces(&mut self, id: u64) {
        match self.requests.get_mut(id) {
            Some(request) if !request.spawning => request.spawning = true,
            _ => return,
        }
        self.cut_zero_pieces(id);
        if let Some(request) = self.requests.get_mut(id) {
            request.spawning = false;
        }
    }

    fn cut_zero_pieces(&mut self, id: u64) {
        while let Some(request) = self.requests.get_mut(id)
            && request.pieces < MAX_PIECES
            && let Kind::Zero { next, end, release, edges, .. } = &mut request.kind
            && next < end
        {
            let (release, edges) = (*release, *edges);
            let Some((object, start, stop)) = cut(*next, *end).next() else { return };
            *next += u64::from(stop - start);
            // The last block of a volume may be cut short; nothing else lives behind its end.
            let volume_ends = *next == self.config.size;
            let whole_end =
                if volume_ends { stop.next_multiple_of(BLOCK) } else { stop / BLOCK * BLOCK };
            let whole_start = start.next_multiple_of(BLOCK);
            let mut parts = Vec::with_capacity(3);
            if whole_start >= whole_end {
                if edges {
                    parts.push((start, stop, false));
                }
            } else {
                if edges && start < whole_start {
                    parts.push((start, whole_start, false));
                }
                parts.push((whole_start, whole_end, true));
                if edges && whole_end < stop {
                    parts.push((whole_end, stop, false));
                }
            }
            for (start, end, whole) in parts {
                let kind = if whole {
                    PieceKind::Zero { release }
                } else {
                    PieceKind::Write { data: Arc::new(vec![0; (end - start) as usize]), at: 0 }
                };
                self.add_piece(Piece { request: id, object, start, end, kind });
            }
        }
    }

    /// One piece of a request is done.
    pub(super) fn finish_piece(&mut self, id: u64, outcome: Result<(), BlockError>) {
        let Some(request) = self.requests.get_mut(id) else { return };
        request.pieces -= 1;
        if let Err(error) = outcome {
            request.error.get_or_insert(error);
        }
        if let Kind::Zero { next, end, .. } = &request.kind
            && next < end
            && request.error.is_none()
            && !request.spawning
            && request.pieces < MAX_PIECES / 2
        {
            // Held open by one more piece, so that pieces done at once cannot finish it early.
            request.pieces += 1;
            self.spawn_zero_pieces(id);
            if let Some(request) = self.requests.get_mut(id) {
                request.pieces -= 1;
            }
        }
        let Some(request) = self.requests.get_mut(id) else { return };
        if request.pieces > 0 {
            return;
        }
        let wants_flush = request.error.is_none()
            && matches!(request.kind, Kind::Write { fua: true } | Kind::Zero { fua: true, .. });
        if wants_flush {
            request.kind = Kind::Flush(GuestFlush::default());
            request.pieces = 1;
            self.start_flush(id);
        } else if matches!(request.kind, Kind::Flush(_)) && request.error.is_none() {
            self.on_flush_piece_done(id);
        } else {
            self.end_request(id);
        }
    }

    /// Answers the guest.
    pub(super) fn end_request(&mut self, id: u64) {
        let Some(mut request) = self.requests.remove(id) else { return };
        self.active_bytes -= request.bytes;
        let completion = match (request.error, request.kind) {
            (Some(error), _) => Err(error),
            (None, Kind::Read { len, mut data, .. }) => {
                data.resize(len as usize, 0); // objects never written leave no trace
                Ok(Done::Data(data))
            }
            (None, _) => Ok(Done::Nothing),
        };
        if let Some(token) = request.token.take() {
            self.complete(token, completion);
        }
    }

    /// Puts what a piece read into its place.
    pub(super) fn deliver(&mut self, piece: &Piece, at: usize, bytes: Vec<u8>, skip: usize) {
        let wanted = (piece.end - piece.start) as usize;
        let Some(request) = self.requests.get_mut(piece.request) else { return };
        let Kind::Read { len, data, .. } = &mut request.kind else { return };
        if wanted == *len as usize && bytes.len() == wanted {
            *data = bytes; // the whole request in one piece: no copy
        } else {
            data.resize(*len as usize, 0);
            data[at..at + wanted].copy_from_slice(&bytes[skip..skip + wanted]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_object_borders() {
        let pieces: Vec<_> = cut(OBJECT_SIZE - 512, 2 * OBJECT_SIZE + 1).collect();
        let size = OBJECT_SIZE as u32;
        assert_eq!(
            pieces,
            [(ObjectIndex(0), size - 512, size), (ObjectIndex(1), 0, size), (ObjectIndex(2), 0, 1)]
        );
        assert_eq!(cut(7, 7).count(), 0);
    }
}
