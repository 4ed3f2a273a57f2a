//! What the tests share: randomness from a seed, and a model that knows nothing of the store.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sheepdog_types::{
    BLOCK_SIZE, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Version,
    VolumeId, WriterGen,
};

use super::sim::SimMedium;
use crate::engine::Engine;
use crate::{
    Applied, BlockRange, BlockRun, BlockState, LayerImage, LayerSums, OpenError, Options, Payload,
    StoreIds, WriteError,
};

/// SplitMix64.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The seed of a randomised test: from the environment, or new; printed, so that it can be rerun.
pub(super) fn seed() -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    println!("SEED={seed}");
    seed
}

pub(super) const IDS: StoreIds =
    StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };

pub(super) fn small() -> Options {
    Options { log_bytes: 256 << 10, segment_bytes: 64 << 10, ..Options::default() }
}

pub(super) fn key(volume: u64, index: u32, layer: u32) -> LayerKey {
    let object = ObjectId { volume: VolumeId(volume), index: ObjectIndex(index) };
    LayerKey { object, layer: Layer(layer) }
}

pub(super) fn version(writer: u64, seq: u64) -> Version {
    Version { writer: WriterGen(writer), seq }
}

/// The bytes of a block with a tag: different for each tag in every sector.
pub(super) fn bytes_of(tag: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(BLOCK_SIZE / 8)
}

pub(super) fn blocks_of(tags: &[u64]) -> (Vec<u8>, Vec<u32>) {
    let bytes: Vec<u8> = tags.iter().flat_map(|tag| bytes_of(*tag)).collect();
    let crcs = bytes.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
    (bytes, crcs)
}

pub(super) fn new_sim(medium: &SimMedium) -> Engine {
    crate::open::create(medium, IDS, &small()).unwrap();
    open_sim(medium).unwrap()
}

pub(super) fn open_sim(medium: &SimMedium) -> Result<Engine, OpenError> {
    crate::open::open(Arc::new(medium.clone()), Path::new("/sim"), small())
}

/// A block in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    Data(u64),
    Zero,
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct ModelLayer {
    pub(super) version: Version,
    pub(super) blocks: BTreeMap<u16, Block>,
}

/// A whole store.
pub(super) type Model = BTreeMap<LayerKey, ModelLayer>;

/// A change of the store.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write { key: LayerKey, version: Version, first: u16, tags: Vec<u64> },
    Clear { key: LayerKey, version: Version, first: u16, count: u16, absent: bool, release: bool },
    Install { key: LayerKey, layer: ModelLayer },
    Delete { key: LayerKey },
    DeleteVolume { volume: VolumeId },
}

impl Op {
    /// A random change that `model` allows, in the first `span` blocks of few objects.
    pub(super) fn random(rng: &mut Rng, model: &Model, span: u16) -> Self {
        let key = key(1 + rng.below(2), rng.below(4) as u32, rng.below(3) as u32);
        let now = model.get(&key).map_or(Version::NONE, |layer| layer.version);
        let version = version(now.writer.0.max(1) + u64::from(rng.chance(5)), now.seq + 1);
        let first = rng.below(u64::from(span)) as u16;
        let count = 1 + rng.below(u64::from((span - first).min(6))) as u16;
        match rng.below(100) {
            0..60 => {
                let tags = (0..count).map(|_| 1 + rng.next() / 2).collect();
                Self::Write { key, version, first, tags }
            }
            60..80 => {
                let (absent, release) = (rng.chance(50), rng.chance(50));
                Self::Clear { key, version, first, count, absent, release }
            }
            80..90 => {
                let mut blocks = BTreeMap::new();
                for block in 0..span {
                    if blocks.len() == 10 || rng.chance(60) {
                        continue;
                    }
                    let data = Block::Data(1 + rng.next() / 2);
                    blocks.insert(block, if rng.chance(70) { data } else { Block::Zero });
                }
                Self::Install { key, layer: ModelLayer { version, blocks } }
            }
            90..99 => Self::Delete { key },
            _ => Self::DeleteVolume { volume: key.object.volume },
        }
    }

    pub(super) fn apply_to_model(&self, model: &mut Model) {
        match self.clone() {
            Self::Write { key, version, first, tags } => {
                let layer = model.entry(key).or_default();
                layer.version = version;
                layer.blocks.extend((first..).zip(tags.into_iter().map(Block::Data)));
            }
            Self::Clear { key, version, first, count, absent, .. } => {
                let layer = model.entry(key).or_default();
                layer.version = version;
                for block in first..first + count {
                    layer.blocks.remove(&block);
                    if !absent {
                        layer.blocks.insert(block, Block::Zero);
                    }
                }
            }
            Self::Install { key, layer } => {
                model.insert(key, layer);
            }
            Self::Delete { key } => {
                model.remove(&key);
            }
            Self::DeleteVolume { volume } => model.retain(|key, _| key.object.volume != volume),
        }
    }

    /// Does the change in a store that is in the state `model`.
    pub(super) fn apply_to_store(&self, engine: &Engine, model: &Model) -> Result<(), WriteError> {
        let prev = |key| model.get(key).map_or(Version::NONE, |layer| layer.version);
        match self {
            Self::Write { key, version, first, tags } => {
                let (bytes, crcs) = blocks_of(tags);
                let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
                let applied = engine.write(*key, prev(key), *version, *first, payload)?;
                assert_eq!(applied, Applied::Now);
            }
            Self::Clear { key, version, first, count, absent, release } => {
                let payload = Payload::Zero { count: *count, absent: *absent, release: *release };
                let applied = engine.write(*key, prev(key), *version, *first, payload)?;
                assert_eq!(applied, Applied::Now);
            }
            Self::Install { key, layer } => {
                let expect = model.get(key).map(|layer| layer.version);
                assert!(engine.install(*key, expect, &image_of(layer))?);
            }
            Self::Delete { key } => {
                assert_eq!(engine.delete(*key, None)?, model.contains_key(key));
            }
            Self::DeleteVolume { volume } => {
                let count = model.keys().filter(|key| key.object.volume == *volume).count();
                assert_eq!(engine.delete_volume(*volume)?, count);
            }
        }
        Ok(())
    }
}

/// The image that the store should give of a layer; a run for each block.
pub(super) fn image_of(layer: &ModelLayer) -> LayerImage {
    let mut sums = LayerSums { version: layer.version, runs: Vec::new(), crcs: Vec::new() };
    let mut data = Vec::new();
    for (&block, content) in &layer.blocks {
        let state = match content {
            Block::Zero => BlockState::Zero,
            Block::Data(tag) => {
                let bytes = bytes_of(*tag);
                sums.crcs.push(crc32c::crc32c(&bytes));
                data.extend(bytes);
                BlockState::Data
            }
        };
        sums.runs.push(BlockRun { range: BlockRange::new(block, 1).unwrap(), state });
    }
    LayerImage { sums, data }
}

/// Splits runs into single blocks, to compare images.
pub(super) fn in_single_blocks(mut image: LayerImage) -> LayerImage {
    let runs = std::mem::take(&mut image.sums.runs);
    for run in runs {
        let blocks = run.range.first()..run.range.end();
        image.sums.runs.extend(
            blocks.map(|block| BlockRun {
                range: BlockRange::new(block, 1).unwrap(),
                state: run.state,
            }),
        );
    }
    image
}

/// Versions of all layers of a store.
pub(super) fn versions(engine: &Engine) -> BTreeMap<LayerKey, Version> {
    crate::table::Table::shard_slots()
        .flat_map(|slot| {
            let shard = engine.table.shard(slot);
            shard.existing().map(|layer| (layer.key, layer.version)).collect::<Vec<_>>()
        })
        .collect()
}

/// Whether a store holds just what `model` says: versions, states, bytes, digests, counts.
pub(super) fn check_equal(engine: &Engine, model: &Model) -> Result<(), String> {
    let expected: BTreeMap<_, _> = model.iter().map(|(key, l)| (*key, l.version)).collect();
    if versions(engine) != expected {
        return Err(format!("versions {:?}, expected {expected:?}", versions(engine)));
    }
    let mut digests = BTreeMap::new();
    let mut used = 0;
    for (key, layer) in model {
        let image = engine.image(*key).map_err(|error| error.to_string())?;
        if image.map(in_single_blocks) != Some(image_of(layer)) {
            return Err(format!("the content of {key} differs"));
        }
        let data = |block: &&Block| matches!(block, Block::Data(_));
        let blocks = layer.blocks.values().filter(data).count();
        used += blocks as u64;
        let stat = engine.stat(*key).unwrap();
        let zeroes = layer.blocks.len() - blocks;
        assert_eq!((stat.data_blocks, stat.zero_blocks), (blocks as u16, zeroes as u16), "{key}");
        let digest = digests.entry(key.object.slot()).or_insert(0u64);
        *digest = digest.wrapping_add(crate::table::layer_hash(*key, layer.version));
    }
    for (slot, expected) in digests {
        assert_eq!(engine.table.digest(slot), expected, "digest of slot {slot}");
    }
    let usage = engine.usage();
    assert_eq!((usage.used, usage.objects), (used * BLOCK_SIZE as u64, model.len() as u64));
    Ok(())
}
