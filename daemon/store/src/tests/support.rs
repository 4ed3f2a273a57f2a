//! The only place where tests touch the inside of the store: opening it on a simulated medium,
//! changing it, and observing all that it says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use sheepdog_types::{
    BLOCK_SIZE, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId, SlotId, Version,
};

pub(super) use super::oracle::*;
use super::sim::SimMedium;
use crate::engine::Engine;
use crate::{
    Applied, BlockRange, BlockState, LayerImage, OpenError, Options, Payload, StoreIds, WriteError,
};

pub(super) const IDS: StoreIds =
    StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };

/// Blocks of a write that goes straight to the slab in any store.
pub(super) const LARGE_BLOCKS: u16 = crate::engine::DIRECT_BLOCKS as u16;

/// The seed of a randomised test: from the environment, or new; printed, so that it can be rerun.
pub(super) fn seed() -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    println!("SEED={seed}");
    seed
}

/// A number from the environment.
pub(super) fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// The smallest store there is.
pub(super) fn small() -> Options {
    Options { log_bytes: 256 << 10, segment_bytes: 64 << 10, ..Options::default() }
}

/// The smallest store that takes a write of [`LARGE_BLOCKS`].
pub(super) fn large() -> Options {
    let segment_bytes = (usize::from(LARGE_BLOCKS) * BLOCK_SIZE + (64 << 10)) as u64;
    Options { log_bytes: 4 * segment_bytes, segment_bytes, ..Options::default() }
}

pub(super) fn new_sim(medium: &SimMedium) -> Engine {
    create_sim(medium, &small()).unwrap();
    open_sim(medium).unwrap()
}

pub(super) fn create_sim(medium: &SimMedium, options: &Options) -> Result<(), OpenError> {
    crate::open::create(medium, IDS, options)
}

/// Opens; the geometry is that of creation.
pub(super) fn open_sim(medium: &SimMedium) -> Result<Engine, OpenError> {
    crate::open::open(Arc::new(medium.clone()), Path::new("/sim"), small())
}

/// Whether a change of up to `bytes` can be made now without waiting for a checkpoint or a lock:
/// then it can be made in the midst of a checkpoint, by the same thread.
pub(super) fn has_room(engine: &Engine, bytes: u64) -> bool {
    engine.log.try_lock().is_ok_and(|log| log.has_room(&engine.ring, bytes, 1024, false))
}

/// Where the log begins and ends.
pub(super) fn log_range(engine: &Engine) -> (u64, u64) {
    let log = engine.log.lock().unwrap();
    (log.start, log.end)
}

impl Op {
    /// Does the change in a store that is in the state `model`.
    pub(super) fn apply_to_store(&self, engine: &Engine, model: &Model) -> Result<(), WriteError> {
        let prev = |key| version_in(model, key);
        match self {
            Self::Write { key, version, first, tags } => {
                let (bytes, crcs) = blocks_of(tags);
                let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
                let applied = engine.write(*key, prev(*key), *version, *first, payload)?;
                assert_eq!(applied, Applied::Now);
            }
            Self::Clear { key, version, first, count, absent, release } => {
                let (count, absent, release) = (*count, *absent, *release);
                let payload = match count {
                    0 => Payload::Nothing,
                    _ => Payload::Zero { count, absent, release },
                };
                let applied = engine.write(*key, prev(*key), *version, *first, payload)?;
                assert_eq!(applied, Applied::Now);
            }
            Self::Install { key, layer } => {
                let expect = model.get(key).map(|layer| layer.version);
                assert!(engine.install(*key, expect, &image_of(layer))?);
            }
            Self::Patch { key, layer, again } => {
                let old = &model[key];
                let mut given = new_blocks(old, layer);
                let patch = patch_of(layer, &given);
                let difference = engine.compare(*key, &patch.sums).unwrap().unwrap();
                let differing = difference.blocks.iter().flat_map(|range| range.blocks());
                assert_eq!(difference.version, old.version);
                assert_eq!(differing.collect::<Vec<_>>(), given, "what differs");
                // Nothing less will do.
                if let Some((_, fewer)) = given.split_last() {
                    assert!(!engine.patch(*key, old.version, &patch_of(layer, fewer))?);
                }
                given.extend(again);
                given.sort_unstable();
                assert!(engine.patch(*key, old.version, &patch_of(layer, &given))?);
            }
            Self::Delete { key } => {
                assert_eq!(engine.delete(*key, None)?, model.contains_key(key));
            }
            Self::Merge { key, lower } => {
                let below = LayerKey { layer: *lower, ..*key };
                let both = model.contains_key(key) && model.contains_key(&below);
                assert_eq!(engine.merge(key.object, key.layer, *lower)?, both);
            }
            Self::DeleteVolume { volume } => {
                let count = model.keys().filter(|key| key.object.volume == *volume).count();
                assert_eq!(engine.delete_volume(*volume)?, count);
            }
        }
        Ok(())
    }
}

/// Splits runs into single blocks, to compare images.
pub(super) fn in_single_blocks(mut image: LayerImage) -> LayerImage {
    let runs = std::mem::take(&mut image.sums.runs);
    for run in runs {
        let blocks = run.range.first()..run.range.end();
        image.sums.runs.extend(blocks.map(|block| crate::BlockRun {
            range: BlockRange::new(block, 1).unwrap(),
            state: run.state,
        }));
    }
    image
}

/// Versions of all layers of a store.
pub(super) fn versions(engine: &Engine) -> BTreeMap<LayerKey, Version> {
    crate::table::Table::shard_slots()
        .flat_map(|slot| {
            let shard = engine.table.shard(slot);
            shard.existing().map(|(key, layer)| (key, layer.version)).collect::<Vec<_>>()
        })
        .collect()
}

/// All that a store holds, after checking that what it says in different ways agrees: images,
/// sums, counts, reads through layers, block states, digests, usage.
pub(super) fn observe(engine: &Engine) -> Result<Model, String> {
    let mut model = Model::new();
    for (key, version) in versions(engine) {
        let image = engine.image(key).map_err(|error| format!("{key}: {error}"))?;
        let image = image.ok_or(format!("{key} is listed and has no image"))?;
        let layer = layer_of(&image).map_err(|what| format!("{key}: {what}"))?;
        let stat = engine.stat(key).ok_or(format!("{key} is listed and has no summary"))?;
        let said = (stat.version, (stat.data_blocks, stat.zero_blocks));
        if layer.version != version || said != (version, layer.counts()) {
            return Err(format!("{key}: at {version} the summary says {said:?}"));
        }
        // Of one layer: it costs as much as the image.
        if model.is_empty() && engine.sums(key).unwrap().as_ref() != Some(&image.sums) {
            return Err(format!("{key}: the sums are not those of the image"));
        }
        model.insert(key, layer);
    }
    let objects: BTreeSet<_> = model.keys().map(|key| key.object).collect();
    for object in &objects {
        check_reads(engine, &model, *object)?;
    }
    // Objects that were deleted must be out of the digests, too.
    let few = (1..3).flat_map(|volume| (0..4).map(move |index| key(volume, index, 0).object));
    for object in objects.into_iter().chain(few) {
        let slot = slot_of(object);
        let (expected, said) = (digest_of_slot(&model, slot), engine.table.digest(SlotId(slot)));
        if expected != said {
            return Err(format!("the digest of slot {slot} is {said:x}, should be {expected:x}"));
        }
    }
    let used: u64 = model.values().map(|layer| u64::from(layer.counts().0)).sum();
    let usage = engine.usage();
    if (usage.used, usage.objects) != (used * BLOCK_SIZE as u64, model.len() as u64) {
        return Err(format!("{usage:?}, though {used} blocks of {} layers are", model.len()));
    }
    Ok(model)
}

/// Reads an object through all its layers and compares with the model.
fn check_reads(engine: &Engine, model: &Model, object: ObjectId) -> Result<(), String> {
    let all = LayerKey { object, layer: Layer(0) }..=LayerKey { object, layer: Layer(u32::MAX) };
    let layers = || model.range(all.clone());
    let chain: Vec<_> = layers().map(|(key, _)| key.layer).rev().collect();
    let end = layers().filter_map(|(_, layer)| layer.blocks.keys().next_back()).max();
    let count = usize::from(end.copied().unwrap_or(0)) + 1;
    let (mut buf, mut crcs) = (vec![7; count * BLOCK_SIZE], vec![7; count]);
    let read = engine.read(object, &chain, 0, &mut buf, &mut crcs);
    let outcome = read.map_err(|error| format!("{object}: {error}"))?;
    let states = engine.block_states(object, &chain, BlockRange::new(0, count).unwrap());
    let states =
        states.iter().flat_map(|run| (run.range.first()..run.range.end()).map(|_| run.state));
    let mut absent = 0;
    for ((block, bytes), state) in (0u16..).zip(buf.chunks_exact(BLOCK_SIZE)).zip(states) {
        let (tag, expected) = match through(model, object, &chain, block) {
            Some(Block::Data(tag)) => (tag, BlockState::Data),
            Some(Block::Zero) => (0, BlockState::Zero),
            None => (0, BlockState::Absent),
        };
        absent += u16::from(expected == BlockState::Absent);
        if tag_of(bytes) != Some(tag) || crcs[usize::from(block)] != crc32c::crc32c(bytes) {
            return Err(format!("{object}: block {block} read through {chain:?} differs"));
        }
        if state != expected {
            return Err(format!("{object}: block {block} is {expected:?}, said to be {state:?}"));
        }
    }
    let newest = version_in(model, LayerKey { object, layer: chain[0] });
    match (outcome.version, outcome.absent) == (newest, absent) {
        true => Ok(()),
        false => Err(format!("{object}: {outcome:?}, expected {newest} and {absent} absent")),
    }
}

/// Whether a store holds just what `model` says: versions, states, bytes, digests, counts.
pub(super) fn check_equal(engine: &Engine, model: &Model) -> Result<(), String> {
    let found = observe(engine)?;
    if found == *model { Ok(()) } else { Err(differences(model, &found)) }
}

/// Runs `work` for all numbers below `count` on all cores. A panic ends the run; its number is
/// given to `failed` first.
pub(super) fn in_parallel(count: u64, work: impl Fn(u64) + Sync, failed: impl Fn(u64) + Sync) {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    let next = AtomicU64::new(0);
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let run = || {
        loop {
            let number = next.fetch_add(1, Relaxed);
            if number >= count {
                return;
            }
            let work = std::panic::AssertUnwindSafe(|| work(number));
            if let Err(panic) = std::panic::catch_unwind(work) {
                next.store(count, Relaxed);
                failed(number);
                std::panic::resume_unwind(panic);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(run)).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        results.into_iter().for_each(|result| result.unwrap());
    });
}
