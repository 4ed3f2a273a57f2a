//! Messages of the data path, and their frames on the wire (documented in `docs/protocol.md`).
//!
//! ```text
//!   0  u32  length of what follows
//!   4  u32  CRC-32C of everything from byte 8 to the end of the head
//!   8  u64  id, chosen by the caller, repeated by the reply
//!  16  u16  length of the head
//!  18       head (postcard), then the tail: n × u32 CRC-32C, n × 4096 bytes
//! ```
//! All integers are little-endian. The tail is covered by the checksums of its blocks (I7), which
//! whoever stores or uses the blocks verifies.

use crate::recovery::Policy;
use serde::{Deserialize, Serialize};
use sheepdog_types::{
    BLOCK_SIZE, BLOCKS_PER_OBJECT, DiskId, Epoch, Layer, LayerKey, ObjectId, SlotId, Version,
    VolumeId, WriterGen,
};
use std::sync::Arc;
use thiserror::Error;

/// Bytes before the head.
pub const FRAME_HEADER: usize = 18;
/// Largest head in bytes.
pub const MAX_HEAD: usize = 48 << 10;
/// Largest frame in bytes: a whole object, its checksums and its head.
pub const MAX_FRAME: usize =
    FRAME_HEADER + MAX_HEAD + BLOCKS_PER_OBJECT * (BLOCK_SIZE + size_of::<u32>());
/// Most entries of a [`Reply::Listing`].
pub const MAX_LISTING: usize = 512;

/// Whole blocks with their checksums, shared between the replicas they go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    buffer: Arc<Vec<u8>>,
    start: usize,
    crcs: Vec<u32>,
}

impl Blocks {
    /// The `count` blocks of `buffer` from byte `start`; computes their checksums.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    #[must_use]
    pub fn new(buffer: Arc<Vec<u8>>, start: usize, count: usize) -> Self {
        let bytes = &buffer[start..start + count * BLOCK_SIZE];
        let crcs = bytes.chunks_exact(BLOCK_SIZE).map(crc32c::crc32c).collect();
        Self { buffer, start, crcs }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.start + self.crcs.len() * BLOCK_SIZE]
    }

    /// CRC-32C of each block.
    #[must_use]
    pub fn crcs(&self) -> &[u32] {
        &self.crcs
    }

    /// Number of blocks.
    #[must_use]
    pub fn count(&self) -> usize {
        self.crcs.len()
    }
}

/// What a write puts into its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// The blocks of the tail.
    Data {
        /// Number of blocks.
        count: u16,
    },
    /// Zeroes.
    Zero {
        /// Number of blocks.
        count: u16,
        /// Space may be released.
        release: bool,
    },
    /// No block; only the version changes, so that what was undone stays undone wherever it may
    /// still be. A full disk takes it.
    Nothing,
}

impl Body {
    /// Number of blocks.
    #[must_use]
    pub fn count(self) -> u16 {
        match self {
            Self::Data { count } | Self::Zero { count, .. } => count,
            Self::Nothing => 0,
        }
    }
}

/// What a call asks of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Applies a write if the layer is at `prev` (I5).
    Write {
        /// Where.
        key: LayerKey,
        /// Version before.
        prev: Version,
        /// Version after.
        version: Version,
        /// First block.
        first: u16,
        /// What.
        body: Body,
    },
    /// Reads blocks of the newest content.
    Read {
        /// Where.
        object: ObjectId,
        /// The live layer.
        layer: Layer,
        /// First block.
        first: u16,
        /// Number of blocks.
        count: u16,
    },
    /// Asks for the version of a layer. Recoveries of the layer that are under way are given up
    /// first: the caller decides by the answer, and nothing else may change the layer after it.
    Stat {
        /// Which.
        key: LayerKey,
    },
    /// Makes the layer equal to another disk's, if it still is at `expect`, the other one at
    /// `target`, and the epoch the one of the call, all when the copy is put in place.
    Recover {
        /// Which.
        key: LayerKey,
        /// Version that the caller saw on this disk.
        expect: Version,
        /// Disk to copy from.
        from: DiskId,
        /// Version there.
        target: Version,
    },
    /// Makes everything applied before durable (I3).
    Flush,
    /// Promises never to serve an older writer of this volume again (I4).
    Fence {
        /// The volume.
        volume: VolumeId,
    },
    /// Asks for a whole layer.
    Fetch {
        /// Which.
        key: LayerKey,
    },
    /// Asks for the layers that `holder` has to have too, in order of slot and key.
    List {
        /// The disk that compares itself.
        holder: DiskId,
        /// First slot.
        from: SlotId,
        /// Last slot.
        to: SlotId,
        /// Continue after this layer, which is in slot `from`.
        after: Option<LayerKey>,
    },
    /// Asks for the checksums of a layer's blocks.
    Sums {
        /// Which.
        key: LayerKey,
    },
    /// Asks for some data blocks of a layer at a version.
    FetchBlocks {
        /// Which.
        key: LayerKey,
        /// The version that they must be of.
        version: Version,
        /// The blocks, ascending.
        spans: Vec<Span>,
    },
    /// Asks for the digests of some slots, over the layers of the volumes with this number of copies and
    /// fewest copies ([`slot_digest`](crate::recovery::slot_digest)).
    Digests {
        /// Copies and fewest copies.
        policy: Policy,
        /// At most [`MAX_DIGESTS`].
        slots: Vec<SlotId>,
    },
}

/// Adjacent blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// First block.
    pub first: u16,
    /// Number of blocks.
    pub count: u16,
}

/// A call to one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Epoch of the caller; the replica must be in the same one.
    pub epoch: Epoch,
    /// The disk asked.
    pub disk: DiskId,
    /// Writer generation of the caller, or of the gateway that waits for a copy; 0 from a disk that
    /// recovers in the background.
    pub writer: WriterGen,
    /// What is asked.
    pub request: Request,
}

/// Why a replica did not even try. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
pub enum Reject {
    /// The caller's epoch is over.
    #[error("the request is from an old epoch; the replica is in epoch {now}")]
    StaleEpoch {
        /// The replica's epoch.
        now: Epoch,
    },
    /// The replica has not heard of the caller's epoch yet.
    #[error("the replica is still in epoch {now}")]
    NotYet {
        /// The replica's epoch.
        now: Epoch,
    },
    /// The replica's lease ran out, so others may have gone on without it (I8).
    #[error("the replica has no lease")]
    NoLease,
    /// A newer writer has the volume (I4).
    #[error("writer generation {newest} has the volume")]
    Fenced {
        /// The newest generation the replica knows.
        newest: WriterGen,
    },
    /// There is no such volume (any more).
    #[error("there is no such volume")]
    NoVolume,
    /// The disk is not here, or does not hold this slot in this epoch.
    #[error("the disk does not hold this slot in this epoch")]
    NotMember,
    /// The call makes no sense, whatever the state.
    #[error("malformed call")]
    Malformed,
}

/// Why a replica tried and failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
pub enum Failure {
    /// The layer is at another version than the call needs. Nothing was written.
    #[error("the layer is at version {have}")]
    Behind {
        /// Its version.
        have: Version,
    },
    /// A block does not match its checksum (I7). Nothing was written.
    #[error("block {block} does not match its checksum")]
    Checksum {
        /// The block, counted in its object.
        block: u16,
    },
    /// No space left. Nothing was written.
    #[error("no space left on the disk")]
    NoSpace,
    /// The disk failed. It may be written or not.
    #[error("the disk failed")]
    Disk,
    /// The disk to copy from could not be reached or refused. Nothing was written.
    #[error("the source of the recovery did not answer")]
    Source,
    /// Too many recoveries wait already. Nothing was written.
    #[error("too many recoveries wait")]
    Busy,
}

/// A run of blocks in the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// First block.
    pub first: u16,
    /// Number of blocks.
    pub count: u16,
    /// The blocks are zero; otherwise they have data.
    pub zero: bool,
}

/// The answer to a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Done,
    /// Blocks in the tail.
    Data {
        /// Number of blocks.
        count: u16,
    },
    /// The version of the layer; [`Version::NONE`] when there is none.
    Version {
        /// The version.
        version: Version,
    },
    /// A layer; the data blocks of its runs are the tail, in order.
    Image {
        /// Its version; [`Version::NONE`] when there is none.
        version: Version,
        /// Blocks that are not absent.
        runs: Vec<Run>,
    },
    /// Layers.
    Listing {
        /// Their keys and versions, in order of slot and key.
        layers: Vec<(LayerKey, Version)>,
        /// There are more after the last of these.
        more: bool,
    },
    /// Not tried.
    Rejected(Reject),
    /// Tried and failed.
    Failed(Failure),
    /// What a layer is, without its data: in the head, so that its checksum covers them.
    Sums {
        /// Its version; [`Version::NONE`] when there is none.
        version: Version,
        /// Blocks that are not absent.
        runs: Vec<Run>,
        /// CRC-32C of each data block, in order.
        crcs: Vec<u32>,
    },
    /// The digests asked for, in their order.
    Digests {
        /// One for each slot.
        digests: Vec<u64>,
    },
}

/// The blocks that a call or reply carries behind its head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tail<'a> {
    crcs: &'a [u8],
    data: &'a [u8],
}

impl<'a> Tail<'a> {
    /// The checksums.
    pub fn crcs(&self) -> impl ExactSizeIterator<Item = u32> + 'a {
        self.crcs.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]))
    }

    /// The bytes of the blocks.
    #[must_use]
    pub fn data(&self) -> &'a [u8] {
        self.data
    }
}

/// Why bytes are not a frame. The connection has to be closed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// A length field is impossible.
    #[error("impossible frame length {0}")]
    Length(u64),
    /// The head does not match its checksum.
    #[error("damaged frame")]
    Checksum,
    /// The head is not understood.
    #[error("unknown message: {0}")]
    Head(String),
    /// The tail is not what the head announces.
    #[error("the frame carries {got} bytes of blocks, its head announces {expected}")]
    Tail {
        /// Bytes there.
        got: usize,
        /// Bytes announced.
        expected: usize,
    },
}

/// A message that can stand in the head of a frame.
pub trait Message: Serialize + for<'a> Deserialize<'a> {
    /// Number of blocks in the tail.
    fn tail_blocks(&self) -> usize;
}

impl Message for Call {
    fn tail_blocks(&self) -> usize {
        match self.request {
            Request::Write { body: Body::Data { count }, .. } => usize::from(count),
            _ => 0,
        }
    }
}

impl Message for Reply {
    fn tail_blocks(&self) -> usize {
        match self {
            Self::Data { count } => usize::from(*count),
            Self::Image { runs, .. } => {
                runs.iter().filter(|r| !r.zero).map(|r| usize::from(r.count)).sum()
            }
            _ => 0,
        }
    }
}

/// Bytes of the frame that [`encode`] makes of this head and its blocks.
pub fn frame_bytes<M: Message>(head: &M) -> usize {
    let bytes = postcard::to_extend(head, Vec::new());
    let head_len = bytes.expect("plain data always serialises into memory").len();
    FRAME_HEADER + head_len + head.tail_blocks() * (BLOCK_SIZE + size_of::<u32>())
}

/// Appends a frame to `out`.
///
/// # Panics
/// If the tail is not as long as the head announces, which is an error of the caller.
pub fn encode<M: Message>(out: &mut Vec<u8>, id: u64, head: &M, crcs: &[u32], data: &[u8]) {
    assert_eq!(head.tail_blocks(), crcs.len(), "tail and head must agree");
    assert_eq!(data.len(), crcs.len() * BLOCK_SIZE, "every block has one checksum");
    let start = out.len();
    out.reserve(FRAME_HEADER + 96 + crcs.len() * 4 + data.len());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    let body = postcard::to_extend(head, std::mem::take(out));
    *out = body.expect("plain data always serialises into memory");
    let head_len = out.len() - start - FRAME_HEADER;
    assert!(head_len <= MAX_HEAD, "heads are bounded by construction");
    out[start + 16..start + 18].copy_from_slice(&(head_len as u16).to_le_bytes());
    let crc = crc32c::crc32c(&out[start + 8..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    for crc in crcs {
        out.extend_from_slice(&crc.to_le_bytes());
    }
    out.extend_from_slice(data);
    let len = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
}

/// One frame taken off the front of a buffer.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a, M> {
    /// The caller's id.
    pub id: u64,
    /// The message.
    pub head: M,
    /// Its blocks.
    pub tail: Tail<'a>,
    /// Bytes of the buffer that the frame takes.
    pub consumed: usize,
}

/// Bytes that the frame at the front of `bytes` takes in all, as soon as that can be told.
///
/// # Errors
/// [`FrameError::Length`]; check it before buffering more.
pub fn frame_len(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some(prefix) = bytes.first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_le_bytes(*prefix) as usize + 4;
    if (FRAME_HEADER..=MAX_FRAME).contains(&len) {
        Ok(Some(len))
    } else {
        Err(FrameError::Length(len as u64))
    }
}

/// The frame at the front of `bytes`; `None` while it is incomplete.
///
/// # Errors
/// [`FrameError`]; the stream cannot be used any more.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<Option<Frame<'_, M>>, FrameError> {
    let Some(len) = frame_len(bytes)? else { return Ok(None) };
    if bytes.len() < len {
        return Ok(None);
    }
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let head_end = FRAME_HEADER + u16_at(16);
    if head_end > len {
        return Err(FrameError::Length(head_end as u64));
    }
    let crc = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    if crc32c::crc32c(&bytes[8..head_end]) != crc {
        return Err(FrameError::Checksum);
    }
    let mut id = [0; 8];
    id.copy_from_slice(&bytes[8..16]);
    let head: M = postcard::from_bytes(&bytes[FRAME_HEADER..head_end])
        .map_err(|e| FrameError::Head(e.to_string()))?;
    let blocks = head.tail_blocks();
    let (got, expected) = (len - head_end, blocks * (BLOCK_SIZE + 4));
    if got != expected {
        return Err(FrameError::Tail { got, expected });
    }
    let (crcs, data) = bytes[head_end..len].split_at(blocks * 4);
    Ok(Some(Frame { id: u64::from_le_bytes(id), head, tail: Tail { crcs, data }, consumed: len }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_types::ObjectIndex;

    fn write_call(count: u16) -> Call {
        let object = ObjectId { volume: VolumeId(3), index: ObjectIndex(9) };
        Call {
            epoch: Epoch(5),
            disk: DiskId(77),
            writer: WriterGen(2),
            request: Request::Write {
                key: LayerKey { object, layer: Layer(0) },
                prev: Version { writer: WriterGen(2), seq: 4 },
                version: Version { writer: WriterGen(2), seq: 5 },
                first: 7,
                body: Body::Data { count },
            },
        }
    }

    fn sample() -> Vec<u8> {
        let data = Arc::new((0..3 * BLOCK_SIZE).map(|i| (i % 251) as u8).collect::<Vec<u8>>());
        let blocks = Blocks::new(data, BLOCK_SIZE, 2);
        let mut out = vec![0xEE];
        encode(&mut out, 42, &write_call(2), blocks.crcs(), blocks.bytes());
        out.remove(0);
        out
    }

    #[test]
    fn frames_round_trip() {
        let bytes = sample();
        let frame = decode::<Call>(&bytes).unwrap().unwrap();
        assert_eq!((frame.id, frame.consumed), (42, bytes.len()));
        assert_eq!(frame.head, write_call(2));
        assert_eq!(frame.tail.data().len(), 2 * BLOCK_SIZE);
        let crcs: Vec<u32> = frame.tail.crcs().collect();
        assert_eq!(crcs[1], crc32c::crc32c(&frame.tail.data()[BLOCK_SIZE..]));
    }

    #[test]
    fn every_prefix_is_incomplete() {
        let bytes = sample();
        for len in 0..bytes.len() {
            assert_eq!(decode::<Call>(&bytes[..len]), Ok(None), "{len}");
        }
    }

    #[test]
    fn any_damage_before_the_tail_is_found() {
        let bytes = sample();
        let head_end = FRAME_HEADER + usize::from(u16::from_le_bytes([bytes[16], bytes[17]]));
        for at in 0..head_end {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                let outcome = decode::<Call>(&damaged);
                assert!(!matches!(outcome, Ok(Some(_))), "byte {at} bit {bit}: {outcome:?}");
            }
        }
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_buffered() {
        assert_eq!(frame_len(&[1, 2]), Ok(None));
        assert!(frame_len(&u32::MAX.to_le_bytes()).is_err());
        assert!(frame_len(&[0; 4]).is_err());
        assert!(frame_len(b"GET / HTTP/1.1").is_err());
    }

    #[test]
    fn the_largest_image_fits() {
        let runs: Vec<Run> =
            (0..1024).map(|first| Run { first, count: 1, zero: first % 2 == 1 }).collect();
        let head = Reply::Image { version: Version::NONE, runs };
        let data = vec![1u8; 512 * BLOCK_SIZE];
        let mut out = Vec::new();
        encode(&mut out, 1, &head, &[7; 512], &data);
        assert_eq!(decode::<Reply>(&out).unwrap().unwrap().head, head);
        assert_eq!(frame_bytes(&head), out.len());
    }

    #[test]
    fn the_largest_sums_and_requests_for_blocks_fit() {
        let version = Version { writer: WriterGen(u64::MAX), seq: u64::MAX };
        let run = |first| Run { first, count: 1, zero: first % 2 == 1 };
        let runs = (0..BLOCKS_PER_OBJECT as u16).map(run).collect();
        let head = Reply::Sums { version, runs, crcs: vec![u32::MAX; BLOCKS_PER_OBJECT] };
        let mut out = Vec::new();
        encode(&mut out, 1, &head, &[], &[]);
        assert_eq!(decode::<Reply>(&out).unwrap().unwrap().head, head);
        assert_eq!(frame_bytes(&head), out.len());
        let mut call = write_call(0);
        let spans = (0..512).map(|at| Span { first: 2 * at, count: 1 }).collect();
        let Request::Write { key, .. } = call.request else { panic!("it is a write") };
        call.request = Request::FetchBlocks { key, version, spans };
        out.clear();
        encode(&mut out, 1, &call, &[], &[]);
        assert_eq!(decode::<Call>(&out).unwrap().unwrap().head, call);
    }
}
