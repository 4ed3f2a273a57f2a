//! From a descriptor chain to a checked request (VIRTIO 1.2, section 5.2.6).
//!
//! A chain is a run of device-readable bytes followed by a run of device-writable bytes; how they
//! are cut into descriptors means nothing (2.7.4.2), so a header may be split and a status byte may
//! share a descriptor with data. The first 16 readable bytes are the header, the last writable
//! byte is the status, what lies between is data. Nothing in a chain is trusted: every address is
//! checked against guest memory and every length is bounded before anything is allocated.

use sheepdog_types::MAX_REQUEST_BYTES;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::config::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS};

/// Bytes in a sector, the unit of offsets on the wire whatever the block size is.
pub(crate) const SECTOR: u64 = 512;
/// Bytes in `struct virtio_blk_outhdr`: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// Bytes in `struct virtio_blk_discard_write_zeroes`: sector, sectors, flags.
const RANGE_BYTES: usize = 16;
/// Most descriptors of one chain. A guest that keeps to the ring's size or to `seg_max` stays far
/// below; it bounds the work and memory spent on an indirect table of 65535 entries.
const MAX_DESCRIPTORS: usize = 1026;

/// One piece of guest memory, checked to be inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) addr: GuestAddress,
    pub(crate) len: u32,
}

/// What a guest asks for. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read { offset: u64, len: u32 },
    Write { offset: u64, len: u32 },
    Flush,
    GetId,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, may_unmap: bool },
}

/// A request that is well formed, and where its answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parsed {
    pub(crate) kind: Kind,
    /// Where the status byte goes.
    pub(crate) status: GuestAddress,
}

/// Why a chain is not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A bad request in a good chain: answer `code` at `status`.
    Status { status: GuestAddress, code: u8 },
    /// There is no usable status byte: complete the chain with length 0.
    NoStatus,
    /// The chain itself is not one (a loop, an index or an indirect table out of range): the ring
    /// cannot be trusted any more.
    Broken(&'static str),
}

/// The two runs of a chain. Kept by the caller so that no request allocates.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    pub(crate) readable: Vec<Segment>,
    pub(crate) writable: Vec<Segment>,
}

/// Reads one request from `chain`. Afterwards `segments` holds the data: `readable` that of a
/// write, `writable` that of a read.
pub(crate) fn parse(
    mem: &GuestMemoryMmap,
    chain: impl Iterator<Item = Descriptor>,
    segments: &mut Segments,
) -> Result<Parsed, Refusal> {
    let in_order = split(chain, segments)?;
    let status = take_last_byte(&mut segments.writable).ok_or(Refusal::NoStatus)?;
    if !mem.check_range(status, 1, Permissions::Write) {
        return Err(Refusal::NoStatus);
    }
    let refuse = |code: u32| Refusal::Status { status, code: code as u8 };
    let io_error = refuse(VIRTIO_BLK_S_IOERR);
    if !in_order || !all_inside(mem, segments) {
        return Err(io_error);
    }
    let mut header = [0; HEADER_BYTES];
    if !take_front(mem, &mut segments.readable, &mut header) {
        return Err(io_error);
    }
    let (kind, sector) = (le32(&header, 0), le64(&header, 8));
    let kind = match kind {
        VIRTIO_BLK_T_IN => {
            let (offset, len) = extent(sector, &segments.writable).ok_or(io_error)?;
            Kind::Read { offset, len }
        }
        VIRTIO_BLK_T_OUT => {
            let (offset, len) = extent(sector, &segments.readable).ok_or(io_error)?;
            Kind::Write { offset, len }
        }
        VIRTIO_BLK_T_FLUSH => Kind::Flush,
        VIRTIO_BLK_T_GET_ID => Kind::GetId,
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            ranged(mem, kind, segments).map_err(refuse)?
        }
        _ => return Err(refuse(VIRTIO_BLK_S_UNSUPP)),
    };
    Ok(Parsed { kind, status })
}

/// Sorts a chain into its two runs; says whether all readable bytes came first.
fn split(
    chain: impl Iterator<Item = Descriptor>,
    segments: &mut Segments,
) -> Result<bool, Refusal> {
    segments.readable.clear();
    segments.writable.clear();
    let (mut count, mut in_order, mut more) = (0, true, true);
    for desc in chain {
        count += 1;
        if count > MAX_DESCRIPTORS {
            return Err(Refusal::Broken("a descriptor chain is too long"));
        }
        more = desc.has_next();
        let segment = Segment { addr: desc.addr(), len: desc.len() };
        if segment.len == 0 {
            continue;
        }
        if desc.is_write_only() {
            segments.writable.push(segment);
        } else {
            in_order &= segments.writable.is_empty();
            segments.readable.push(segment);
        }
    }
    // The iterator ends early, without a word, at a loop, at an index or an indirect table out of
    // range: then the last descriptor it gave still announces another one.
    if more {
        Err(Refusal::Broken("a descriptor chain loops or leaves its table"))
    } else {
        Ok(in_order)
    }
}

/// Cuts the last byte off a run and gives its address.
fn take_last_byte(run: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = run.last_mut()?;
    last.len -= 1;
    let (addr, left) = (last.addr.0.checked_add(u64::from(last.len)), last.len);
    if left == 0 {
        run.pop();
    }
    addr.map(GuestAddress)
}

fn all_inside(mem: &GuestMemoryMmap, segments: &Segments) -> bool {
    let inside = |run: &[Segment], access| {
        run.iter().all(|s| mem.check_range(s.addr, s.len as usize, access))
    };
    inside(&segments.readable, Permissions::Read) && inside(&segments.writable, Permissions::Write)
}

/// Moves the first bytes of a run into `out`; false if there are fewer.
fn take_front(mem: &GuestMemoryMmap, run: &mut Vec<Segment>, out: &mut [u8]) -> bool {
    let (mut filled, mut used_up) = (0, 0);
    for segment in run.iter_mut() {
        let take = (out.len() - filled).min(segment.len as usize);
        if mem.read_slice(&mut out[filled..filled + take], segment.addr).is_err() {
            return false;
        }
        filled += take;
        if take < segment.len as usize {
            // Cannot overflow: the whole segment was checked to be inside guest memory.
            segment.addr.0 += take as u64;
            segment.len -= take as u32;
            break;
        }
        used_up += 1;
        if filled == out.len() {
            break;
        }
    }
    run.drain(..used_up);
    filled == out.len()
}

/// Offset and length of a read or write: whole sectors, at least one, not more than the limit.
fn extent(sector: u64, data: &[Segment]) -> Option<(u64, u32)> {
    // At most MAX_DESCRIPTORS lengths below 2^32: no overflow.
    let len: u64 = data.iter().map(|s| u64::from(s.len)).sum();
    let offset = sector.checked_mul(SECTOR)?;
    offset.checked_add(len)?;
    if len == 0 || len > MAX_REQUEST_BYTES || !len.is_multiple_of(SECTOR) {
        return None;
    }
    Some((offset, u32::try_from(len).ok()?))
}

/// A discard or write-zeroes: exactly one range, as `max_*_seg` announces. `Err` is the status.
fn ranged(mem: &GuestMemoryMmap, kind: u32, segments: &mut Segments) -> Result<Kind, u32> {
    let mut range = [0; RANGE_BYTES];
    if !take_front(mem, &mut segments.readable, &mut range) || !segments.readable.is_empty() {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    let (sector, sectors, flags) = (le64(&range, 0), le32(&range, 8), le32(&range, 12));
    let offset = sector.checked_mul(SECTOR).ok_or(VIRTIO_BLK_S_IOERR)?;
    let len = u64::from(sectors) * SECTOR;
    offset.checked_add(len).ok_or(VIRTIO_BLK_S_IOERR)?;
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let unknown_flags = flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let discard = kind == VIRTIO_BLK_T_DISCARD;
    // VIRTIO 1.2, 5.2.6.2: unknown flags, and unmap in a discard, are answered UNSUPP.
    if unknown_flags || (discard && unmap) {
        return Err(VIRTIO_BLK_S_UNSUPP);
    }
    let limit = if discard { MAX_DISCARD_SECTORS } else { MAX_WRITE_ZEROES_SECTORS };
    if sectors == 0 || sectors > limit {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    Ok(if discard {
        Kind::Discard { offset, len }
    } else {
        Kind::WriteZeroes { offset, len, may_unmap: unmap }
    })
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

/// Copies a run of guest memory: `data` is as long as the run. False if the memory is gone.
pub(crate) fn read_run(mem: &GuestMemoryMmap, run: &[Segment], data: &mut [u8]) -> bool {
    let mut at = 0;
    run.iter().all(|s| {
        let part = data.get_mut(at..at + s.len as usize);
        at += s.len as usize;
        part.is_some_and(|part| mem.read_slice(part, s.addr).is_ok())
    })
}

/// Copies as much of `data` as fits into a run of guest memory; gives the bytes written, or
/// nothing if the memory is gone.
pub(crate) fn write_run(mem: &GuestMemoryMmap, run: &[Segment], data: &[u8]) -> Option<u32> {
    let mut at = 0;
    for s in run {
        let end = data.len().min(at + s.len as usize);
        mem.write_slice(&data[at..end], s.addr).ok()?;
        at = end;
    }
    u32::try_from(at).ok()
}

#[cfg(test)]
mod tests;
