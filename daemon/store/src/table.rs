//! All layers of the disk in memory, in shards by slot, with what is counted over them.
//!
//! A layer takes about 140 bytes, and 272 more if its blocks are in different states. Checksum
//! tables are read when needed; each shard keeps a bounded number of them.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sheepdog_types::{
    BLOCKS_PER_OBJECT, Layer, LayerKey, ObjectId, ObjectIndex, SLOTS, SlotId, Version, VolumeId,
    hash64,
};

use crate::layer::{LayerState, SlabRef};

const SHARDS: usize = 256;

/// The checksums of a layer's blocks, as a checkpoint committed them.
pub(crate) type Sums = [u32; BLOCKS_PER_OBJECT];

/// A layer's key in the order of the table: by slot, then object, newest layer first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Ordered {
    slot: u16,
    volume: u64,
    index: u32,
    layer: Reverse<u32>,
}

impl Ordered {
    fn new(key: LayerKey) -> Self {
        let LayerKey { object, layer } = key;
        Self {
            slot: object.slot().0,
            volume: object.volume.0,
            index: object.index.0,
            layer: Reverse(layer.0),
        }
    }

    fn key(self) -> LayerKey {
        let object = ObjectId { volume: VolumeId(self.volume), index: ObjectIndex(self.index) };
        LayerKey { object, layer: Layer(self.layer.0) }
    }

    fn bounds_of(object: ObjectId) -> RangeInclusive<Self> {
        let newest = Self::new(LayerKey { object, layer: Layer(u32::MAX) });
        newest..=Self { layer: Reverse(0), ..newest }
    }

    fn bounds_of_slot(slot: SlotId) -> RangeInclusive<Self> {
        let at = |volume, index, layer| Self { slot: slot.0, volume, index, layer: Reverse(layer) };
        at(0, 0, u32::MAX)..=at(u64::MAX, u32::MAX, 0)
    }
}

struct CachedSums {
    slab: SlabRef,
    sums: Arc<Sums>,
    used: Cell<bool>,
}

/// Layers of the objects of some slots.
#[derive(Default)]
pub(crate) struct Shard {
    layers: BTreeMap<Ordered, LayerState>,
    cache: Vec<CachedSums>,
    hand: usize,
}

impl Shard {
    /// All layers kept of `object`, newest first, deleted ones included.
    pub(crate) fn layers(&self, object: ObjectId) -> impl Iterator<Item = (LayerKey, &LayerState)> {
        self.layers.range(Ordered::bounds_of(object)).map(|(place, layer)| (place.key(), layer))
    }

    /// The newest layer of `object` that exists.
    pub(crate) fn newest_existing(&self, object: ObjectId) -> Option<Layer> {
        self.layers(object).find(|(_, layer)| layer.exists()).map(|(key, _)| key.layer)
    }

    pub(crate) fn get(&self, key: LayerKey) -> Option<&LayerState> {
        self.layers.get(&Ordered::new(key))
    }

    pub(crate) fn get_mut(&mut self, key: LayerKey) -> Option<&mut LayerState> {
        self.layers.get_mut(&Ordered::new(key))
    }

    pub(crate) fn version(&self, key: LayerKey) -> Version {
        self.get(key).map_or(Version::NONE, |layer| layer.version)
    }

    pub(crate) fn get_or_insert(&mut self, key: LayerKey) -> &mut LayerState {
        self.layers.entry(Ordered::new(key)).or_default()
    }

    /// Forgets a layer that is deleted and has nothing left to apply.
    pub(crate) fn remove_if_gone(&mut self, key: LayerKey) {
        if self.get(key).is_some_and(LayerState::is_gone) {
            self.layers.remove(&Ordered::new(key));
        }
    }

    /// Layers that exist, ascending by slot.
    pub(crate) fn existing(&self) -> impl Iterator<Item = (LayerKey, &LayerState)> {
        let all = self.layers.iter().map(|(place, layer)| (place.key(), layer));
        all.filter(|(_, layer)| layer.exists())
    }

    /// Layers of `slot` that exist.
    pub(crate) fn existing_in(
        &self,
        slot: SlotId,
    ) -> impl Iterator<Item = (LayerKey, &LayerState)> {
        let all = self.layers.range(Ordered::bounds_of_slot(slot));
        all.map(|(place, layer)| (place.key(), layer)).filter(|(_, layer)| layer.exists())
    }

    /// The first layer that exists after `key` in the order of [`Shard::existing`].
    pub(crate) fn next_after(&self, key: Option<LayerKey>) -> Option<LayerKey> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = key.map_or(Unbounded, |key| Excluded(Ordered::new(key)));
        let mut rest = self.layers.range((from, Unbounded));
        rest.find(|(_, layer)| layer.exists()).map(|(place, _)| place.key())
    }

    /// The kept checksum table of a slab.
    pub(crate) fn sums(&self, slab: SlabRef) -> Option<Arc<Sums>> {
        let cached = self.cache.iter().find(|cached| cached.slab == slab)?;
        cached.used.set(true);
        Some(Arc::clone(&cached.sums))
    }

    /// Keeps a checksum table instead of one that was not used lately (second chance).
    pub(crate) fn keep_sums(&mut self, slab: SlabRef, sums: Arc<Sums>, limit: usize) {
        let new = CachedSums { slab, sums, used: Cell::new(true) };
        if let Some(same) = self.cache.iter_mut().find(|cached| cached.slab.slab == slab.slab) {
            *same = new;
            return;
        }
        if self.cache.len() < limit {
            self.cache.push(new);
            return;
        }
        while self.cache[self.hand].used.take() {
            self.hand = (self.hand + 1) % self.cache.len();
        }
        self.cache[self.hand] = new;
        self.hand = (self.hand + 1) % self.cache.len();
    }
}

/// The layers of a disk.
pub(crate) struct Table {
    shards: Vec<Mutex<Shard>>,
    digests: Vec<AtomicU64>,
    /// Checksum tables that each shard may keep, at least 1.
    sums_per_shard: usize,
    /// Data blocks of all layers.
    pub(crate) used: AtomicU64,
    /// Layers that exist.
    pub(crate) objects: AtomicU64,
}

impl Table {
    /// `cache_bytes` may be used for checksum tables.
    pub(crate) fn new(cache_bytes: u64) -> Self {
        let tables = usize::try_from(cache_bytes).unwrap_or(usize::MAX) / size_of::<Sums>();
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            digests: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            sums_per_shard: (tables / SHARDS).max(1),
            used: AtomicU64::new(0),
            objects: AtomicU64::new(0),
        }
    }

    /// The shard of `slot`. Held shortly; never while waiting for the disk, except by a read that
    /// met a concurrent change.
    pub(crate) fn shard(&self, slot: SlotId) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[usize::from(slot.0) % SHARDS];
        // A panic in another thread left at worst a counter behind, not a broken structure.
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn shard_of(&self, object: ObjectId) -> MutexGuard<'_, Shard> {
        self.shard(object.slot())
    }

    /// Keeps a checksum table that was read, for the next reads.
    pub(crate) fn keep_sums(&self, object: ObjectId, slab: SlabRef, sums: &Arc<Sums>) {
        self.shard_of(object).keep_sums(slab, Arc::clone(sums), self.sums_per_shard);
    }

    /// One representative slot of each shard.
    pub(crate) fn shard_slots() -> impl Iterator<Item = SlotId> {
        (0..SHARDS as u16).map(SlotId)
    }

    /// The layer after `key` in an order that visits each layer once.
    pub(crate) fn next_after(&self, key: Option<LayerKey>) -> Option<LayerKey> {
        let from = key.map_or(0, |key| usize::from(key.object.slot().0) % SHARDS);
        let first = self.shard(SlotId(from as u16)).next_after(key);
        first.or_else(|| {
            (from + 1..SHARDS).find_map(|shard| self.shard(SlotId(shard as u16)).next_after(None))
        })
    }

    pub(crate) fn keys_of(&self, volume: VolumeId) -> Vec<LayerKey> {
        let keys = |slot| {
            let shard = self.shard(slot);
            let keys = shard.existing().map(|(key, _)| key);
            keys.filter(|key| key.object.volume == volume).collect::<Vec<_>>()
        };
        Self::shard_slots().flat_map(keys).collect()
    }

    pub(crate) fn digest(&self, slot: SlotId) -> u64 {
        self.digests[usize::from(slot.0)].load(Relaxed)
    }

    /// Counts a layer that went from one version and number of data blocks to another.
    pub(crate) fn count(&self, key: LayerKey, old: (Version, u16), new: (Version, u16)) {
        let change = u64::from(new.1).wrapping_sub(u64::from(old.1));
        self.used.fetch_add(change, Relaxed);
        let existing = |version: Version| u64::from(version != Version::NONE);
        self.objects.fetch_add(existing(new.0).wrapping_sub(existing(old.0)), Relaxed);
        let change = layer_hash(key, new.0).wrapping_sub(layer_hash(key, old.0));
        self.digests[usize::from(key.object.slot().0)].fetch_add(change, Relaxed);
    }
}

/// A layer's part in the digest of its slot.
///
/// The digest is compared between replicas, so this function is a part of the protocol.
pub(crate) fn layer_hash(key: LayerKey, version: Version) -> u64 {
    if version == Version::NONE {
        return 0;
    }
    let place = u64::from(key.object.index.0) << 32 | u64::from(key.layer.0);
    [key.object.volume.0, place, version.writer.0, version.seq]
        .into_iter()
        .fold(0, |hash, word| hash64(hash ^ word))
}
