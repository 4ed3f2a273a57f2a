//! Bytes on the disk: superblock, checkpoint mark, index record, log record header.
//!
//! `docs/on-disk.md` is the description of these; integers are little-endian. Decoding takes any
//! bytes and never panics.

use sheepdog_types::{
    BLOCKS_PER_OBJECT, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Version,
    VolumeId, WriterGen, hash64,
};

use crate::api::StoreIds;
use crate::states::{STATES_BYTES, States};

/// The format that this code reads and writes.
pub(crate) const FORMAT: u32 = 3;
/// Bytes of each part of the superblock file: two copies of the superblock, two marks.
pub(crate) const SUPER_PART: u64 = 4096;
/// Bytes of an encoded superblock or mark, one sector.
pub(crate) const SECTOR: usize = 512;
/// Bytes of a log record header.
pub(crate) const HEADER: usize = 96;
/// Records start at multiples of this in their segment.
pub(crate) const RECORD_ALIGN: usize = 32;
/// CRC-32C of a block of zeroes.
pub(crate) const ZERO_CRC: u32 = 0x98F9_4189;

const SUPER_MAGIC: u64 = u64::from_le_bytes(*b"SHEEPDSK");
const MARK_MAGIC: u64 = u64::from_le_bytes(*b"SHEEPMRK");
const INDEX_MAGIC: u32 = u32::from_le_bytes(*b"SDIX");
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"SDLR");

fn put<const N: usize>(buf: &mut [u8], at: usize, bytes: [u8; N]) {
    buf[at..at + N].copy_from_slice(&bytes);
}

fn get<const N: usize>(buf: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&buf[at..at + N]);
    out
}

fn u32_at(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(buf, at))
}

fn u64_at(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(buf, at))
}

fn seal_sector(buf: &mut [u8; SECTOR]) {
    let crc = crc32c::crc32c(&buf[..SECTOR - 4]);
    put(buf, SECTOR - 4, crc.to_le_bytes());
}

fn sector_is_sealed(buf: &[u8; SECTOR]) -> bool {
    crc32c::crc32c(&buf[..SECTOR - 4]) == u32_at(buf, SECTOR - 4)
}

/// The unchanging description of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) ids: StoreIds,
    pub(crate) segment_bytes: u64,
    pub(crate) segments: u32,
}

/// Why bytes are not a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SuperError {
    NoMagic,
    /// Another format version.
    Other(u32),
    Damaged,
}

impl Superblock {
    pub(crate) fn encode(&self) -> [u8; SECTOR] {
        let mut buf = [0; SECTOR];
        put(&mut buf, 0, SUPER_MAGIC.to_le_bytes());
        put(&mut buf, 8, FORMAT.to_le_bytes());
        put(&mut buf, 16, self.ids.cluster.0.to_le_bytes());
        put(&mut buf, 24, self.ids.node.0.to_le_bytes());
        put(&mut buf, 32, self.ids.disk.0.to_le_bytes());
        put(&mut buf, 40, self.segment_bytes.to_le_bytes());
        put(&mut buf, 48, self.segments.to_le_bytes());
        seal_sector(&mut buf);
        buf
    }

    pub(crate) fn decode(buf: &[u8; SECTOR]) -> Result<Self, SuperError> {
        if u64_at(buf, 0) != SUPER_MAGIC {
            return Err(SuperError::NoMagic);
        }
        if !sector_is_sealed(buf) {
            return Err(SuperError::Damaged);
        }
        if u32_at(buf, 8) != FORMAT {
            return Err(SuperError::Other(u32_at(buf, 8)));
        }
        let this = Self {
            ids: StoreIds {
                cluster: ClusterId(u64_at(buf, 16)),
                node: NodeId(u64_at(buf, 24)),
                disk: DiskId(u64_at(buf, 32)),
            },
            segment_bytes: u64_at(buf, 40),
            segments: u32_at(buf, 48),
        };
        this.geometry_is_valid().then_some(this).ok_or(SuperError::Damaged)
    }

    /// Bounds: segments of 64 KiB to 1 GiB in whole pages, 4 to 4096 of them.
    pub(crate) fn geometry_is_valid(&self) -> bool {
        (64 << 10..=1 << 30).contains(&self.segment_bytes)
            && self.segment_bytes.is_multiple_of(4096)
            && (4..=4096).contains(&self.segments)
    }

    /// Log records of one store never pass for those of another.
    pub(crate) fn record_seed(&self) -> u32 {
        crc32c::crc32c(&self.encode()[16..40])
    }
}

/// The commit point of a checkpoint: everything in `data`, `index` and `sums` up to it is durable,
/// the log goes on from `log_start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Grows with each mark written.
    pub(crate) sequence: u64,
    /// Number of the checkpoint; index records with a higher one are not committed.
    pub(crate) checkpoint: u64,
    /// LSN from which the log is replayed.
    pub(crate) log_start: u64,
    /// Sum of [`slot_hash`] over the committed index records.
    pub(crate) index_digest: u64,
    /// Grows with each opening; stamped on log records.
    pub(crate) incarnation: u32,
    /// The log holds nothing from `log_start` on.
    pub(crate) clean: bool,
    /// Where the log of all incarnations before this one ends: what they wrote behind it does not
    /// count, whatever becomes of it.
    pub(crate) prior_end: u64,
}

impl Mark {
    pub(crate) fn encode(&self) -> [u8; SECTOR] {
        let mut buf = [0; SECTOR];
        put(&mut buf, 0, MARK_MAGIC.to_le_bytes());
        put(&mut buf, 8, self.sequence.to_le_bytes());
        put(&mut buf, 16, self.checkpoint.to_le_bytes());
        put(&mut buf, 24, self.log_start.to_le_bytes());
        put(&mut buf, 32, self.index_digest.to_le_bytes());
        put(&mut buf, 40, self.incarnation.to_le_bytes());
        buf[44] = u8::from(self.clean);
        put(&mut buf, 48, self.prior_end.to_le_bytes());
        seal_sector(&mut buf);
        buf
    }

    pub(crate) fn decode(buf: &[u8; SECTOR]) -> Option<Self> {
        if u64_at(buf, 0) != MARK_MAGIC || !sector_is_sealed(buf) {
            return None;
        }
        let this = Self {
            sequence: u64_at(buf, 8),
            checkpoint: u64_at(buf, 16),
            log_start: u64_at(buf, 24),
            index_digest: u64_at(buf, 32),
            incarnation: u32_at(buf, 40),
            clean: buf[44] != 0,
            prior_end: u64_at(buf, 48),
        };
        // Leaves room to count on without overflow.
        let sane = [this.sequence, this.checkpoint, this.log_start, this.prior_end]
            .into_iter()
            .all(|number| number < 1 << 62);
        (sane && this.incarnation < u32::MAX).then_some(this)
    }

    /// The parts of the superblock file that hold the two copies, in the order of writing.
    pub(crate) const COPIES: [u64; 2] = [2, 3];
}

/// One of the two index records of a slab.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct IndexRecord {
    pub(crate) slab: u32,
    pub(crate) checkpoint: u64,
    /// `None`: the slab is free.
    pub(crate) layer: Option<IndexedLayer>,
}

/// What an index record says of the layer in its slab.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct IndexedLayer {
    pub(crate) key: LayerKey,
    pub(crate) version: Version,
    pub(crate) sums_crc: u32,
    pub(crate) states: States,
}

const INDEX_STATES: usize = 64;

impl IndexRecord {
    pub(crate) fn encode(&self) -> [u8; SECTOR] {
        let mut buf = [0; SECTOR];
        put(&mut buf, 0, INDEX_MAGIC.to_le_bytes());
        put(&mut buf, 4, self.slab.to_le_bytes());
        put(&mut buf, 8, self.checkpoint.to_le_bytes());
        if let Some(layer) = &self.layer {
            put(&mut buf, 16, layer.key.object.volume.0.to_le_bytes());
            put(&mut buf, 24, layer.key.object.index.0.to_le_bytes());
            put(&mut buf, 28, layer.key.layer.0.to_le_bytes());
            put(&mut buf, 32, layer.version.writer.0.to_le_bytes());
            put(&mut buf, 40, layer.version.seq.to_le_bytes());
            put(&mut buf, 48, layer.sums_crc.to_le_bytes());
            buf[52] = 1;
            buf[INDEX_STATES..INDEX_STATES + STATES_BYTES].copy_from_slice(layer.states.bytes());
        }
        seal_sector(&mut buf);
        buf
    }

    pub(crate) fn decode(buf: &[u8; SECTOR], slab: u32) -> Option<Self> {
        let found = u32_at(buf, 0) == INDEX_MAGIC && u32_at(buf, 4) == slab;
        if !found || !sector_is_sealed(buf) {
            return None;
        }
        let layer = if buf[52] == 1 {
            Some(IndexedLayer {
                key: key_at(buf, 16),
                version: version_at(buf, 32),
                sums_crc: u32_at(buf, 48),
                states: States::from_bytes(get(buf, INDEX_STATES))?,
            })
        } else {
            None
        };
        Some(Self { slab, checkpoint: u64_at(buf, 8), layer })
    }
}

/// Part of a committed index record (its encoded bytes) in [`Mark::index_digest`].
pub(crate) fn slot_hash(record: &[u8; SECTOR]) -> u64 {
    let crc = u64::from(u32_at(record, SECTOR - 4));
    hash64(hash64(crc << 32 | u64::from(u32_at(record, 4))) ^ u64_at(record, 8))
}

fn key_at(buf: &[u8], at: usize) -> LayerKey {
    LayerKey {
        object: ObjectId {
            volume: VolumeId(u64_at(buf, at)),
            index: ObjectIndex(u32_at(buf, at + 8)),
        },
        layer: Layer(u32_at(buf, at + 12)),
    }
}

fn version_at(buf: &[u8], at: usize) -> Version {
    Version { writer: WriterGen(u64_at(buf, at)), seq: u64_at(buf, at + 8) }
}

/// What a log record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Blocks with data: checksums follow, then bytes unless these are in the slab.
    Data,
    /// Blocks become zero or absent.
    Clear,
    /// The whole layer is replaced: states and checksums follow; the bytes are in its new slab.
    Install,
    /// The layer goes.
    Delete,
    /// All layers of the volume go.
    DeleteVolume,
    /// Another layer of the object, which goes, shows through this one's absent blocks no longer:
    /// they become what it held.
    Merge,
    /// The log goes on in the next segment.
    End,
    /// Nothing; its `durable` field proves what was durable.
    Synced,
    /// Some blocks of the layer change, each in its own way: changes and checksums follow, then
    /// bytes.
    Patch,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Data,
        Self::Clear,
        Self::Install,
        Self::Delete,
        Self::DeleteVolume,
        Self::End,
        Self::Synced,
        Self::Merge,
        Self::Patch,
    ];

    fn code(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Clear => 2,
            Self::Install => 3,
            Self::Delete => 4,
            Self::DeleteVolume => 5,
            Self::End => 6,
            Self::Synced => 7,
            Self::Merge => 8,
            Self::Patch => 9,
        }
    }
}

/// [`Header::flags`]: cleared blocks are absent, not zero.
pub(crate) const FLAG_ABSENT: u8 = 1;
/// [`Header::flags`]: the space of cleared blocks is released.
pub(crate) const FLAG_RELEASE: u8 = 2;
/// [`Header::flags`]: the bytes are not in the record, they were written to the slab before.
pub(crate) const FLAG_DIRECT: u8 = 4;
/// [`Header::slab`] of a record that needs none.
pub(crate) const NO_SLAB: u32 = u32::MAX;

/// Start of a log record. Tables (states, checksums) and data follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    /// First block.
    pub(crate) first: u16,
    /// Blocks written or cleared; for an install the data blocks, for a patch those it carries.
    pub(crate) count: u32,
    /// Position in the endless log, in bytes.
    pub(crate) lsn: u64,
    /// Everything before this LSN was durable when the record was written.
    pub(crate) durable: u64,
    pub(crate) incarnation: u32,
    pub(crate) key: LayerKey,
    /// The layer's version before.
    pub(crate) prev: Version,
    /// The layer's version after; for a merge the version of the layer that goes.
    pub(crate) version: Version,
    /// The slab that the layer has from this record on.
    pub(crate) slab: u32,
    /// For a merge the layer that goes.
    pub(crate) lower: Layer,
}

impl Header {
    /// A header that is about no layer.
    pub(crate) fn control(kind: Kind) -> Self {
        let object = ObjectId { volume: VolumeId(0), index: ObjectIndex(0) };
        Self {
            kind,
            flags: 0,
            first: 0,
            count: 0,
            lsn: 0,
            durable: 0,
            incarnation: 0,
            key: LayerKey { object, layer: Layer(0) },
            prev: Version::NONE,
            version: Version::NONE,
            slab: NO_SLAB,
            lower: Layer(0),
        }
    }

    /// Whether the blocks are in the slab, not in the record.
    pub(crate) fn is_direct(&self) -> bool {
        self.flags & FLAG_DIRECT != 0
    }

    /// Bytes of states or changes and of checksums after the header.
    pub(crate) fn table_len(&self) -> usize {
        match self.kind {
            Kind::Data => 4 * self.count as usize,
            Kind::Install | Kind::Patch => STATES_BYTES + 4 * self.count as usize,
            _ => 0,
        }
    }

    /// Bytes of data after the tables.
    pub(crate) fn data_len(&self) -> usize {
        match self.kind {
            Kind::Data | Kind::Patch if !self.is_direct() => {
                self.count as usize * sheepdog_types::BLOCK_SIZE
            }
            _ => 0,
        }
    }

    /// Bytes of the whole record, padding included.
    pub(crate) fn record_len(&self) -> u64 {
        let len = HEADER + self.table_len() + self.data_len();
        len.next_multiple_of(RECORD_ALIGN) as u64
    }

    /// LSN of the first byte of data.
    pub(crate) fn data_lsn(&self) -> u64 {
        self.lsn + (HEADER + self.table_len()) as u64
    }

    /// Appends the header and `tables` to `out`, sealed with a checksum over both.
    pub(crate) fn encode(&self, seed: u32, tables: &[&[u8]], out: &mut Vec<u8>) {
        let mut buf = [0; HEADER];
        put(&mut buf, 0, RECORD_MAGIC.to_le_bytes());
        buf[4] = self.kind.code();
        buf[5] = self.flags;
        put(&mut buf, 6, self.first.to_le_bytes());
        put(&mut buf, 8, self.lsn.to_le_bytes());
        put(&mut buf, 16, self.durable.to_le_bytes());
        put(&mut buf, 24, self.incarnation.to_le_bytes());
        put(&mut buf, 28, self.count.to_le_bytes());
        put(&mut buf, 32, self.key.object.volume.0.to_le_bytes());
        put(&mut buf, 40, self.key.object.index.0.to_le_bytes());
        put(&mut buf, 44, self.key.layer.0.to_le_bytes());
        put(&mut buf, 48, self.prev.writer.0.to_le_bytes());
        put(&mut buf, 56, self.prev.seq.to_le_bytes());
        put(&mut buf, 64, self.version.writer.0.to_le_bytes());
        put(&mut buf, 72, self.version.seq.to_le_bytes());
        put(&mut buf, 80, self.slab.to_le_bytes());
        put(&mut buf, 84, self.lower.0.to_le_bytes());
        let mut crc = crc32c::crc32c_append(seed, &buf[..HEADER - 4]);
        for table in tables {
            crc = crc32c::crc32c_append(crc, table);
        }
        put(&mut buf, HEADER - 4, crc.to_le_bytes());
        out.extend_from_slice(&buf);
        for table in tables {
            out.extend_from_slice(table);
        }
    }

    /// The header in `buf`, not yet verified: see [`Header::is_sealed`]. Its lengths are bounded.
    pub(crate) fn decode(buf: &[u8; HEADER]) -> Option<Self> {
        if u32_at(buf, 0) != RECORD_MAGIC {
            return None;
        }
        let this = Self {
            kind: Kind::ALL.into_iter().find(|kind| kind.code() == buf[4])?,
            flags: buf[5],
            first: u16::from_le_bytes(get(buf, 6)),
            lsn: u64_at(buf, 8),
            durable: u64_at(buf, 16),
            incarnation: u32_at(buf, 24),
            count: u32_at(buf, 28),
            key: key_at(buf, 32),
            prev: version_at(buf, 48),
            version: version_at(buf, 64),
            slab: u32_at(buf, 80),
            lower: Layer(u32_at(buf, 84)),
        };
        let last = u64::from(this.first) + u64::from(this.count);
        (last <= BLOCKS_PER_OBJECT as u64).then_some(this)
    }

    /// Whether `buf` and the `tables` after it carry the right checksum.
    pub(crate) fn is_sealed(buf: &[u8; HEADER], tables: &[u8], seed: u32) -> bool {
        let crc = crc32c::crc32c_append(seed, &buf[..HEADER - 4]);
        crc32c::crc32c_append(crc, tables) == u32_at(buf, HEADER - 4)
    }
}

/// Checksums as bytes.
pub(crate) fn crcs_to_bytes(crcs: &[u32], out: &mut Vec<u8>) {
    out.resize(crcs.len() * 4, 0);
    for (bytes, crc) in out.chunks_exact_mut(4).zip(crcs) {
        bytes.copy_from_slice(&crc.to_le_bytes());
    }
}

/// Checksums from bytes.
pub(crate) fn crcs_from_bytes(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|chunk| u32_at(chunk, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_zeroes() {
        assert_eq!(crc32c::crc32c(&[0; sheepdog_types::BLOCK_SIZE]), ZERO_CRC);
    }

    #[test]
    fn sectors_round_trip_and_any_flipped_bit_is_seen() {
        let ids = StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };
        let superblock = Superblock { ids, segment_bytes: 1 << 20, segments: 9 };
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
        let mark = Mark {
            sequence: 5,
            checkpoint: 6,
            log_start: 7,
            index_digest: 8,
            incarnation: 9,
            clean: true,
            prior_end: 10,
        };
        assert_eq!(Mark::decode(&mark.encode()), Some(mark));
        let mut states = States::default();
        states.set(3, crate::BlockState::Zero);
        let key = Header::control(Kind::End).key;
        let version = Version { writer: WriterGen(4), seq: 5 };
        let layer = Some(IndexedLayer { key, version, sums_crc: 77, states });
        let record = IndexRecord { slab: 8, checkpoint: 2, layer };
        assert_eq!(IndexRecord::decode(&record.encode(), 8), Some(record.clone()));
        assert_eq!(IndexRecord::decode(&record.encode(), 9), None);
        for bit in 0..SECTOR * 8 {
            let flip = |mut bytes: [u8; SECTOR]| {
                bytes[bit / 8] ^= 1 << (bit % 8);
                bytes
            };
            assert!(Superblock::decode(&flip(superblock.encode())).is_err());
            assert!(Mark::decode(&flip(mark.encode())).is_none());
            assert!(IndexRecord::decode(&flip(record.encode()), 8).is_none());
        }
    }

    #[test]
    fn record_headers_round_trip() {
        for kind in Kind::ALL {
            let header = Header {
                flags: 7,
                slab: 12,
                lower: Layer(13),
                first: 7,
                count: 3,
                lsn: 64,
                durable: 32,
                incarnation: 2,
                prev: Version { writer: WriterGen(1), seq: 2 },
                version: Version { writer: WriterGen(3), seq: 4 },
                ..Header::control(kind)
            };
            let tables = vec![9; header.table_len()];
            let mut bytes = Vec::new();
            header.encode(5, &[&tables], &mut bytes);
            let head: [u8; HEADER] = get(&bytes, 0);
            assert_eq!(Header::decode(&head), Some(header));
            assert!(Header::is_sealed(&head, &bytes[HEADER..], 5));
            assert!(!Header::is_sealed(&head, &bytes[HEADER..], 6), "another store's record");
        }
        let long = Header { first: 1000, count: 25, ..Header::control(Kind::Data) };
        let mut bytes = Vec::new();
        long.encode(0, &[], &mut bytes);
        assert_eq!(Header::decode(&get(&bytes, 0)), None, "past the object");
    }
}
