//! All layers of the disk in memory, in shards by slot, with what is counted over them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sheepdog_types::{LayerKey, ObjectId, SLOTS, SlotId, Version, VolumeId, hash64};

use crate::layer::LayerState;

const SHARDS: usize = 256;

/// Hashes ids with [`hash64`]: they are few words, and not chosen by an attacker.
#[derive(Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }
    fn write_u64(&mut self, word: u64) {
        self.0 = hash64(self.0 ^ word);
    }
}

/// Layers of the objects of some slots; each object's layers newest first.
#[derive(Default)]
pub(crate) struct Shard {
    objects: HashMap<ObjectId, Vec<LayerState>, BuildHasherDefault<IdHasher>>,
}

impl Shard {
    /// All layers kept of `object`, newest first, deleted ones included.
    pub(crate) fn layers(&self, object: ObjectId) -> &[LayerState] {
        self.objects.get(&object).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn get(&self, key: LayerKey) -> Option<&LayerState> {
        self.layers(key.object).iter().find(|layer| layer.key == key)
    }

    pub(crate) fn get_mut(&mut self, key: LayerKey) -> Option<&mut LayerState> {
        self.objects.get_mut(&key.object)?.iter_mut().find(|layer| layer.key == key)
    }

    pub(crate) fn version(&self, key: LayerKey) -> Version {
        self.get(key).map_or(Version::NONE, |layer| layer.version)
    }

    pub(crate) fn get_or_insert(&mut self, key: LayerKey) -> &mut LayerState {
        let layers = self.objects.entry(key.object).or_default();
        let at = layers.partition_point(|layer| layer.key.layer > key.layer);
        if layers.get(at).is_none_or(|layer| layer.key != key) {
            layers.insert(at, LayerState::new(key));
        }
        &mut layers[at]
    }

    /// Forgets a layer that is deleted and has nothing left to apply.
    pub(crate) fn remove_if_gone(&mut self, key: LayerKey) {
        let Some(layers) = self.objects.get_mut(&key.object) else { return };
        layers.retain(|layer| {
            let gone = !layer.exists()
                && layer.live.is_none()
                && layer.frozen.is_none()
                && layer.base.is_none();
            layer.key != key || !gone
        });
        if layers.is_empty() {
            self.objects.remove(&key.object);
        }
    }

    /// Layers that exist.
    pub(crate) fn existing(&self) -> impl Iterator<Item = &LayerState> {
        self.objects.values().flatten().filter(|layer| layer.exists())
    }

    fn keys_of(&self, volume: VolumeId) -> impl Iterator<Item = LayerKey> + '_ {
        self.existing().map(|layer| layer.key).filter(move |key| key.object.volume == volume)
    }
}

/// The layers of a disk.
pub(crate) struct Table {
    shards: Vec<Mutex<Shard>>,
    digests: Vec<AtomicU64>,
    /// Data blocks of all layers.
    pub(crate) used: AtomicU64,
    /// Layers that exist.
    pub(crate) objects: AtomicU64,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            digests: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
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

    /// One representative slot of each shard.
    pub(crate) fn shard_slots() -> impl Iterator<Item = SlotId> {
        (0..SHARDS as u16).map(SlotId)
    }

    pub(crate) fn keys_of(&self, volume: VolumeId) -> Vec<LayerKey> {
        Self::shard_slots()
            .flat_map(|slot| self.shard(slot).keys_of(volume).collect::<Vec<_>>())
            .collect()
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
