//! The values that go in and out of a store.

use std::time::Duration;

use sheepdog_types::{BLOCK_SIZE, BLOCKS_PER_OBJECT, ClusterId, DiskId, LayerKey, NodeId, Version};

/// Whose store this is; written once, at creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreIds {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node that the disk belongs to.
    pub node: NodeId,
    /// The disk.
    pub disk: DiskId,
}

/// Settings of a store. `log_bytes` and `segment_bytes` count at creation only.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of log that may wait to be applied: bounds memory, restart time and disk space, and
    /// is allocated at creation.
    pub log_bytes: u64,
    /// Bytes of one log segment, a multiple of 4096. The largest write or layer image must fit, so
    /// less than 5 MiB is for tests only.
    pub segment_bytes: u64,
    /// Limit in bytes for stored blocks; otherwise what the file system offers.
    pub capacity: Option<u64>,
    /// A write is made durable after this time even if nobody flushes.
    pub sync_after: Duration,
    /// The log is applied and emptied after this time even if it is short.
    pub checkpoint_after: Duration,
    /// How the slabs are read and written. The log and the tables always use the page cache.
    pub cache: Cache,
    /// What carries out I/O that has to wait for the disk.
    pub io: IoBackend,
    /// Memory for the checksum tables of objects that were used lately: 4 KiB serve 4 MiB.
    pub sums_cache_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            log_bytes: 128 << 20,
            segment_bytes: 8 << 20,
            capacity: None,
            sync_after: Duration::from_secs(1),
            checkpoint_after: Duration::from_secs(10),
            sums_cache_bytes: 32 << 20,
            cache: Cache::Page,
            io: IoBackend::Auto,
        }
    }
}

/// Whether slabs go through the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Cache {
    /// Through the page cache: reads of what was used lately do not touch the disk.
    #[default]
    Page,
    /// Past it (`O_DIRECT`): the host's memory is left to the guests, which cache by themselves.
    Direct,
}

/// What carries out I/O that has to wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IoBackend {
    /// io_uring, or threads where the kernel refuses it.
    #[default]
    Auto,
    /// io_uring only.
    Uring,
    /// A few threads.
    Threads,
}

impl From<IoBackend> for crate::io::Choice {
    fn from(backend: IoBackend) -> Self {
        match backend {
            IoBackend::Auto => Self::Auto,
            IoBackend::Uring => Self::Uring,
            IoBackend::Threads => Self::Threads,
        }
    }
}

/// Blocks that were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlocksRead {
    /// What was found.
    pub outcome: ReadOutcome,
    /// The blocks.
    pub data: Vec<u8>,
    /// The CRC-32C of each.
    pub crcs: Vec<u32>,
}

/// A run of blocks inside one object, never empty and never past its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    first: u16,
    count: u16,
}

impl BlockRange {
    /// All blocks of an object.
    pub const ALL: Self = Self { first: 0, count: BLOCKS_PER_OBJECT as u16 };
    /// Of a change that is of the version alone.
    pub(crate) const NONE: Self = Self { first: 0, count: 0 };

    /// `count` blocks of 4 KiB from `first`; `None` if there are none or some lie past the object.
    #[must_use]
    pub fn new(first: u16, count: usize) -> Option<Self> {
        let fits = count > 0 && usize::from(first) + count <= BLOCKS_PER_OBJECT;
        fits.then_some(Self { first, count: count as u16 })
    }

    /// First block.
    #[must_use]
    pub fn first(self) -> u16 {
        self.first
    }

    /// Number of blocks.
    #[must_use]
    pub fn count(self) -> u16 {
        self.count
    }

    /// `blocks`, which ascend, in as few ranges as there can be.
    #[must_use]
    pub fn of_blocks(blocks: impl IntoIterator<Item = u16>) -> Vec<Self> {
        let mut ranges: Vec<Self> = Vec::new();
        for block in blocks {
            match ranges.last_mut() {
                Some(last) if last.end() == block => last.count += 1,
                _ => ranges.extend(Self::new(block, 1)),
            }
        }
        ranges
    }

    /// The blocks.
    pub fn blocks(self) -> impl ExactSizeIterator<Item = u16> {
        self.first..self.end()
    }

    /// The block after the last one.
    #[must_use]
    pub fn end(self) -> u16 {
        self.first + self.count
    }

    /// Bytes in the range.
    #[must_use]
    pub fn bytes(self) -> usize {
        usize::from(self.count) * BLOCK_SIZE
    }
}

/// What a layer knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// Nothing: an older layer decides.
    Absent,
    /// Bytes with a checksum.
    Data,
    /// Zeroes, whatever older layers hold.
    Zero,
}

/// Adjacent blocks in the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// Which blocks.
    pub range: BlockRange,
    /// Their state.
    pub state: BlockState,
}

/// What a write does to its blocks.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// New bytes: `n * 4096` of them and `n` checksums (CRC-32C of each block).
    Data {
        /// The bytes.
        bytes: &'a [u8],
        /// One checksum for each block, computed where the data came from (I7).
        crcs: &'a [u32],
    },
    /// The blocks read as zeroes (discard, write-zeroes).
    Zero {
        /// Number of blocks.
        count: u16,
        /// Make the blocks *absent*: only where no older layer and no parent volume can hold data,
        /// since an absent block falls through to those. All replicas must be told the same (I5).
        absent: bool,
        /// Give the blocks' space back to the file system.
        release: bool,
    },
    /// All blocks stay as they are, only the version changes. Full disks take it.
    Nothing,
}

/// What became of an accepted write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It was applied by this call.
    Now,
    /// The layer had it already (a repeated request); nothing was done.
    Already,
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOutcome {
    /// Version of the newest layer of the chain; [`Version::NONE`] if it does not exist here.
    pub version: Version,
    /// Blocks that no layer of the chain holds; they were filled with zeroes.
    pub absent: u16,
}

/// Summary of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerStat {
    /// Which layer of which object.
    pub key: LayerKey,
    /// Its last write.
    pub version: Version,
    /// Blocks with data.
    pub data_blocks: u16,
    /// Blocks that are zero without taking space.
    pub zero_blocks: u16,
}

/// A layer's version, block states and checksums, without its data: what replicas compare to find
/// the blocks that differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSums {
    /// The layer's last write.
    pub version: Version,
    /// Data and zero runs in ascending order; what is between them is absent.
    pub runs: Vec<BlockRun>,
    /// CRC-32C of each data block, in ascending order of blocks.
    pub crcs: Vec<u32>,
}

/// A whole layer at one version, as recovery moves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerImage {
    /// Version, states and checksums.
    pub sums: LayerSums,
    /// The data blocks, in ascending order of blocks.
    pub data: Vec<u8>,
}

/// What makes another layer of one that is stored: all that the layer is afterwards, and the bytes
/// of the blocks that are not stored yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPatch {
    /// Version, states and checksums afterwards, of all blocks. Data blocks that are not given must
    /// be stored with just these checksums.
    pub sums: LayerSums,
    /// The data blocks that are given, in ascending order.
    pub blocks: Vec<BlockRange>,
    /// Their bytes.
    pub data: Vec<u8>,
}

/// How a stored layer differs from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDifference {
    /// Version of the stored layer.
    pub version: Version,
    /// Data blocks of the other one that are not stored, or are known to be damaged; ascending.
    pub blocks: Vec<BlockRange>,
}

/// Some data blocks of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPart {
    /// CRC-32C of each.
    pub crcs: Vec<u32>,
    /// The blocks.
    pub data: Vec<u8>,
}

/// Space on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of blocks that can be stored in all.
    pub capacity: u64,
    /// Bytes of data blocks stored, exact.
    pub used: u64,
    /// Object layers stored.
    pub objects: u64,
}

/// What a scrub of one layer found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubbedLayer {
    /// Data blocks that were read.
    pub blocks: u16,
    /// Those that do not match their checksum or cannot be read, ascending.
    pub bad: Vec<u16>,
}

/// A damaged block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BadBlock {
    /// The layer that holds it.
    pub key: LayerKey,
    /// Block of the object.
    pub block: u16,
}

/// The damage that reads and scrubs have found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DamageReport {
    /// Damaged blocks found since the store was opened, repaired or not.
    pub found: u64,
    /// Those that nothing repaired yet, at most 4096, ascending.
    pub blocks: Vec<BadBlock>,
}
