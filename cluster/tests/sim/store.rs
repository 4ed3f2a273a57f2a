//! A replica's disk in memory: what is there now, what survives a power loss, and how it got there.

use super::rng::Rng;
use sheepdog_cluster::message::{Blocks, Body, Failure, Reply};
use sheepdog_types::{BLOCK_SIZE, LayerKey, Version, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

type Block = Arc<Vec<u8>>;

/// A layer: its version, and the blocks that are not zero.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Image {
    pub version: Version,
    pub blocks: BTreeMap<u16, Block>,
}

#[derive(Clone)]
enum Change {
    Write { version: Version, first: u16, blocks: Vec<Option<Block>> },
    Replace(Image),
}

impl Image {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Replace(image) => *self = image.clone(),
            Change::Write { version, first, blocks } => {
                self.version = *version;
                for (at, block) in blocks.iter().enumerate() {
                    let at = first + at as u16;
                    match block {
                        Some(block) => self.blocks.insert(at, Arc::clone(block)),
                        None => self.blocks.remove(&at),
                    };
                }
            }
        }
    }
}

#[derive(Default)]
struct Layer {
    now: Image,
    durable: Image,
    /// What leads from `durable` to `now`.
    volatile: Vec<Change>,
}

impl Layer {
    fn change(&mut self, change: Change) {
        self.now.apply(&change);
        self.volatile.push(change);
    }
}

#[derive(Default)]
pub struct Store {
    layers: BTreeMap<LayerKey, Layer>,
    damaged: BTreeSet<(LayerKey, u16)>,
    /// Per mille of the writes that find no space.
    pub full: u64,
    /// One of them was refused, and the cluster was not told yet.
    pub refused: bool,
}

/// A write as it comes in a call.
pub struct Write<'a> {
    pub key: LayerKey,
    pub prev: Version,
    pub version: Version,
    pub first: u16,
    pub body: Body,
    pub blocks: Option<&'a Blocks>,
}

impl Store {
    pub fn version(&self, key: LayerKey) -> Version {
        self.layers.get(&key).map_or(Version::NONE, |l| l.now.version)
    }

    pub fn image(&self, key: LayerKey) -> Image {
        self.layers.get(&key).map_or_else(Image::default, |l| l.now.clone())
    }

    pub fn layers(&self) -> impl Iterator<Item = (LayerKey, Version)> {
        let there = self.layers.iter().filter(|(_, l)| l.now.version != Version::NONE);
        there.map(|(k, l)| (*k, l.now.version))
    }

    pub fn listing(&self) -> BTreeMap<LayerKey, Version> {
        self.layers().collect()
    }

    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> {
        self.layers.keys().map(|key| key.object.volume)
    }

    pub fn delete_volume(&mut self, volume: VolumeId) {
        self.layers.retain(|key, _| key.object.volume != volume);
        self.damaged.retain(|(key, _)| key.object.volume != volume);
    }

    pub fn delete(&mut self, key: LayerKey) {
        self.layers.remove(&key);
        self.damaged.retain(|(k, _)| *k != key);
    }

    pub fn describe(&self) -> String {
        self.listing().iter().map(|(key, version)| format!("{key}:{version} ")).collect()
    }

    /// The write contract: applied if the layer is at `prev`; done already if it is further.
    pub fn write(&mut self, write: &Write, skip_prev: bool, rng: &mut Rng) -> Reply {
        let have = self.version(write.key);
        if write.version.writer == have.writer && write.version.seq <= have.seq {
            return Reply::Done;
        }
        if have != write.prev && !skip_prev {
            return Reply::Failed(Failure::Behind { have });
        }
        if self.full > 0 && write.body != Body::Nothing && rng.chance(self.full) {
            return Reply::Failed(Failure::NoSpace);
        }
        let blocks: Vec<Option<Block>> = match (write.body, write.blocks) {
            (Body::Data { .. }, Some(blocks)) => blocks
                .bytes()
                .chunks_exact(BLOCK_SIZE)
                .zip(blocks.crcs())
                .map(|(bytes, crc)| {
                    assert_eq!(crc32c::crc32c(bytes), *crc, "the gateway sent a wrong checksum");
                    Some(Arc::new(bytes.to_vec()))
                })
                .collect(),
            (body, _) => vec![None; usize::from(body.count())],
        };
        assert_eq!(blocks.len(), usize::from(write.body.count()), "tail and head differ");
        for at in write.first..write.first + write.body.count() {
            self.damaged.remove(&(write.key, at));
        }
        let change = Change::Write { version: write.version, first: write.first, blocks };
        self.layers.entry(write.key).or_default().change(change);
        Reply::Done
    }

    pub fn replace(&mut self, key: LayerKey, image: Image) {
        self.damaged.retain(|(k, _)| *k != key);
        self.layers.entry(key).or_default().change(Change::Replace(image));
    }

    /// The bytes of some blocks, or the first one that is damaged.
    pub fn read(&self, key: LayerKey, first: u16, count: u16) -> Result<Vec<u8>, u16> {
        let mut bytes = vec![0; usize::from(count) * BLOCK_SIZE];
        let layer = self.layers.get(&key);
        for (chunk, at) in bytes.chunks_exact_mut(BLOCK_SIZE).zip(first..) {
            if self.damaged.contains(&(key, at)) {
                return Err(at);
            }
            if let Some(block) = layer.and_then(|l| l.now.blocks.get(&at)) {
                chunk.copy_from_slice(block);
            }
        }
        Ok(bytes)
    }

    pub fn flush(&mut self) {
        for layer in self.layers.values_mut().filter(|l| !l.volatile.is_empty()) {
            layer.durable = layer.now.clone();
            layer.volatile.clear();
        }
    }

    /// Each layer keeps what was durable and a part, from the beginning, of what came after.
    pub fn lose_power(&mut self, rng: &mut Rng, everything: bool) {
        for layer in self.layers.values_mut() {
            let kept = if everything { 0 } else { rng.below(layer.volatile.len() as u64 + 1) };
            for change in layer.volatile.drain(..).take(kept as usize) {
                layer.durable.apply(&change);
            }
            layer.now = layer.durable.clone();
        }
    }

    /// Damages a block that has data, of a layer that may be damaged; whether there was one.
    pub fn damage(&mut self, rng: &mut Rng, may_be: impl Fn(LayerKey, Version) -> bool) -> bool {
        let all: Vec<(LayerKey, u16)> = self
            .layers
            .iter()
            .filter(|(key, l)| may_be(**key, l.now.version))
            .flat_map(|(key, l)| l.now.blocks.keys().map(|at| (*key, *at)))
            .collect();
        rng.pick(&all).is_some_and(|block| self.damaged.insert(block))
    }

    /// Whether `other` can make a layer equal to this one: only blocks whose checksums differ are moved.
    pub fn can_give(&self, key: LayerKey, other: &Self) -> bool {
        let damaged = || self.damaged.iter().filter(|(k, _)| *k == key);
        let (here, there) = (self.image(key), other.image(key));
        let is_equal = |block: &(LayerKey, u16)| {
            here.blocks.get(&block.1) == there.blocks.get(&block.1)
                && !other.damaged.contains(block)
        };
        damaged().all(|block| there.version != Version::NONE && is_equal(block))
    }

    pub fn has_damage(&self) -> bool {
        !self.damaged.is_empty()
    }
}
