//! The store under test and those who write to it.

use std::path::Path;
use std::time::{Duration, Instant};

use sheepdog_store::{Applied, Options, Payload, Store, StoreIds};
use sheepdog_types::{
    BLOCK_SIZE, BLOCKS_PER_OBJECT, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId,
    ObjectIndex, Version, VolumeId, WriterGen, hash64,
};

use crate::Failure;

/// Blocks of a large write: 1 MiB.
pub(crate) const LARGE: usize = 256;

/// Opens the store in `dir`; makes it if there is none.
pub(crate) fn open(dir: &Path) -> Result<Store, Failure> {
    let ids = StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };
    let store = if dir.join("superblock").exists() {
        Store::open(dir, Options::default())
    } else {
        Store::create(dir, ids, Options::default())
    };
    Ok(store?)
}

pub(crate) fn key(volume: u32, index: u32, layer: u32) -> LayerKey {
    let volume = VolumeId(volume.into());
    LayerKey { object: ObjectId { volume, index: ObjectIndex(index) }, layer: Layer(layer) }
}

/// What is written: 1 MiB of blocks, with the checksums that came with them from elsewhere.
pub(crate) struct Blocks {
    bytes: Vec<u8>,
    crcs: Vec<u32>,
}

impl Blocks {
    fn new(bytes: Vec<u8>) -> Self {
        let crcs = bytes.chunks_exact(BLOCK_SIZE).map(crc32c::crc32c).collect();
        Self { bytes, crcs }
    }

    pub(crate) fn random() -> Self {
        let words = (0..(LARGE * BLOCK_SIZE / 8) as u64).map(hash64);
        Self::new(words.flat_map(u64::to_le_bytes).collect())
    }

    pub(crate) fn zeroes() -> Self {
        Self::new(vec![0; LARGE * BLOCK_SIZE])
    }

    /// One block.
    pub(crate) fn small(&self, n: u64) -> Payload<'_> {
        let at = n as usize % LARGE;
        Payload::Data {
            bytes: &self.bytes[at * BLOCK_SIZE..][..BLOCK_SIZE],
            crcs: &self.crcs[at..][..1],
        }
    }

    /// All of them.
    pub(crate) fn large(&self) -> Payload<'_> {
        Payload::Data { bytes: &self.bytes, crcs: &self.crcs }
    }

    /// The bytes of one block.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..BLOCK_SIZE]
    }
}

/// The only writer of some objects: it knows their versions.
pub(crate) struct Writer<'a> {
    store: &'a Store,
    layers: Vec<(LayerKey, Version)>,
    random: u64,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(store: &'a Store, keys: impl Iterator<Item = LayerKey>, seed: u64) -> Self {
        let version = |key| store.stat(key).map_or(Version::NONE, |stat| stat.version);
        let layers = keys.map(|key| (key, version(key))).collect();
        Self { store, layers, random: hash64(seed) }
    }

    /// Writes to its `at`-th object.
    pub(crate) fn write(
        &mut self,
        at: usize,
        first: u16,
        payload: Payload<'_>,
    ) -> Result<(), Failure> {
        let (key, version) = &mut self.layers[at];
        let next = version.next(WriterGen(1));
        if self.store.write(*key, *version, next, first, payload)? != Applied::Now {
            return Err("two writers of one object: nothing was measured".into());
        }
        *version = next;
        Ok(())
    }

    pub(crate) fn write_anywhere(&mut self, blocks: &Blocks) -> Result<(), Failure> {
        self.random = hash64(self.random);
        let at = (self.random >> 32) as usize % self.layers.len();
        let block = self.random as usize % BLOCKS_PER_OBJECT;
        self.write(at, block as u16, blocks.small(self.random >> 16))
    }

    /// Writes all its objects in full, in order, 1 MiB at a time.
    pub(crate) fn fill(&mut self, blocks: &Blocks) -> Result<(), Failure> {
        for at in 0..self.layers.len() {
            for first in (0..BLOCKS_PER_OBJECT).step_by(LARGE) {
                self.write(at, first as u16, blocks.large())?;
            }
        }
        Ok(())
    }
}

/// `writers` of them, who share the objects of a volume.
pub(crate) fn writers(
    store: &Store,
    volume: u32,
    objects: u32,
    writers: u32,
    seed: u64,
) -> Vec<Writer<'_>> {
    let mine = |n| (n..objects).step_by(writers as usize).map(|index| key(volume, index, 0));
    (0..writers.min(objects)).map(|n| Writer::new(store, mine(n), seed ^ u64::from(n))).collect()
}

/// When a load ends.
#[derive(Clone, Copy)]
pub(crate) enum End {
    After(Duration),
    Operations(u64),
}

impl End {
    /// Runs `operation` with 0, 1, 2… until the end; gives their number.
    pub(crate) fn repeat<E>(
        self,
        mut operation: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<u64, E> {
        let started = Instant::now();
        for n in 0.. {
            let over = match self {
                Self::After(time) => started.elapsed() >= time,
                Self::Operations(count) => n >= count,
            };
            if over {
                return Ok(n);
            }
            operation(n)?;
        }
        unreachable!("an endless range")
    }
}
