//! What a store should hold: a model that shares no code with the store, only its public types,
//! and computes slots and digests from their description by itself.

use std::collections::BTreeMap;

use sheepdog_types::{
    BLOCK_SIZE, Layer, LayerKey, ObjectId, ObjectIndex, Version, VolumeId, WriterGen,
};

use crate::{BlockRange, BlockRun, BlockState, LayerImage, LayerPatch, LayerSums};

/// SplitMix64.
#[derive(Clone)]
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The finaliser of SplitMix64.
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// One step of the hash of the protocol.
fn hash(word: u64) -> u64 {
    mix(word.wrapping_add(0x9E37_79B9_7F4A_7C15))
}

/// The slot of an object.
pub(super) fn slot_of(object: ObjectId) -> u16 {
    (hash(hash(object.volume.0) ^ u64::from(object.index.0)) >> 48) as u16
}

/// What a layer adds to the digest of its slot.
fn digest_of(key: LayerKey, version: Version) -> u64 {
    let mut digest = hash(key.object.volume.0);
    digest = hash(digest ^ (u64::from(key.object.index.0) << 32 | u64::from(key.layer.0)));
    digest = hash(digest ^ version.writer.0);
    hash(digest ^ version.seq)
}

/// CRC-32C, bit by bit.
pub(super) fn crc_of(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        let mut crc = crc ^ u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ ((crc & 1) * 0x82F6_3B78);
        }
        crc
    })
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

/// The tag of a block; `None` if its bytes are not those of one tag.
pub(super) fn tag_of(bytes: &[u8]) -> Option<u64> {
    let tag = *bytes.first_chunk::<8>()?;
    bytes.chunks_exact(8).all(|word| *word == tag).then_some(u64::from_le_bytes(tag))
}

pub(super) fn blocks_of(tags: &[u64]) -> (Vec<u8>, Vec<u32>) {
    let mut bytes = Vec::with_capacity(tags.len() * BLOCK_SIZE);
    tags.iter().for_each(|tag| bytes.extend_from_slice(&bytes_of(*tag)));
    let crcs = bytes.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
    (bytes, crcs)
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

impl ModelLayer {
    /// Blocks with data and zero blocks.
    pub(super) fn counts(&self) -> (u16, u16) {
        let data = self.blocks.values().filter(|block| matches!(block, Block::Data(_))).count();
        (data as u16, (self.blocks.len() - data) as u16)
    }
}

/// A whole store.
pub(super) type Model = BTreeMap<LayerKey, ModelLayer>;

/// The digest of a slot of a store with this content.
pub(super) fn digest_of_slot(model: &Model, slot: u16) -> u64 {
    model
        .iter()
        .filter(|(key, _)| slot_of(key.object) == slot)
        .fold(0, |sum: u64, (key, layer)| sum.wrapping_add(digest_of(*key, layer.version)))
}

/// A block of an object seen through layers, newest first.
pub(super) fn through(
    model: &Model,
    object: ObjectId,
    chain: &[Layer],
    block: u16,
) -> Option<Block> {
    chain.iter().find_map(|layer| {
        model.get(&LayerKey { object, layer: *layer })?.blocks.get(&block).copied()
    })
}

/// A change of the store.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write {
        key: LayerKey,
        version: Version,
        first: u16,
        tags: Vec<u64>,
    },
    /// Of no block: only the version changes.
    Clear {
        key: LayerKey,
        version: Version,
        first: u16,
        count: u16,
        absent: bool,
        release: bool,
    },
    Install {
        key: LayerKey,
        layer: ModelLayer,
    },
    /// The layer, which exists, becomes this one.
    Patch {
        key: LayerKey,
        layer: ModelLayer,
        /// These blocks are given although they do not differ.
        again: Vec<u16>,
    },
    Delete {
        key: LayerKey,
    },
    DeleteVolume {
        volume: VolumeId,
    },
    /// The older layer goes into `key`.
    Merge {
        key: LayerKey,
        lower: Layer,
    },
}

impl Op {
    /// A random change that `model` allows, in the first `span` blocks of few objects.
    pub(super) fn random(rng: &mut Rng, model: &Model, span: u16) -> Self {
        let any = key(1 + rng.below(2), rng.below(4) as u32, rng.below(3) as u32);
        let action = rng.below(100);
        // Only the newest layer of an object takes writes.
        let key = if action < 80 { newest_from(model, any) } else { any };
        let now = version_in(model, key);
        let version = version(now.writer.0.max(1) + u64::from(rng.chance(5)), now.seq + 1);
        let first = rng.below(u64::from(span)) as u16;
        let count = 1 + rng.below(u64::from((span - first).min(6))) as u16;
        match action {
            0..60 => {
                let tags = (0..count).map(|_| 1 + rng.next() / 2).collect();
                Self::Write { key, version, first, tags }
            }
            60..80 => {
                let (absent, release) = (rng.chance(50), rng.chance(50));
                let count = if rng.chance(15) { 0 } else { count };
                Self::Clear { key, version, first, count, absent, release }
            }
            80..90 if model.contains_key(&key) && rng.chance(60) => {
                Self::random_patch(rng, model, key, version, span)
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
            90..95 => Self::Delete { key },
            95..99 => Self::Merge {
                key: LayerKey { layer: Layer(2), ..key },
                lower: Layer(rng.below(2) as u32),
            },
            _ => Self::DeleteVolume { volume: key.object.volume },
        }
    }

    /// Some blocks of a layer that exists become others.
    fn random_patch(
        rng: &mut Rng,
        model: &Model,
        key: LayerKey,
        version: Version,
        span: u16,
    ) -> Self {
        let mut layer = ModelLayer { version, ..model[&key].clone() };
        let (mut again, mut given) = (Vec::new(), 0);
        for block in 0..span {
            let old = layer.blocks.get(&block).copied();
            match rng.below(10) {
                0..3 if given < 10 => {
                    layer.blocks.insert(block, Block::Data(1 + rng.next() / 2));
                    given += 1;
                }
                3 => drop(layer.blocks.insert(block, Block::Zero)),
                4 => drop(layer.blocks.remove(&block)),
                5 if given < 10 && matches!(old, Some(Block::Data(_))) => {
                    again.push(block);
                    given += 1;
                }
                _ => {}
            }
        }
        Self::Patch { key, layer, again }
    }

    pub(super) fn apply_to_model(&self, model: &mut Model) {
        match self {
            Self::Write { key, version, first, tags } => {
                let layer = model.entry(*key).or_default();
                layer.version = *version;
                layer.blocks.extend((*first..).zip(tags.iter().copied().map(Block::Data)));
            }
            Self::Clear { key, version, first, count, absent, .. } => {
                let layer = model.entry(*key).or_default();
                layer.version = *version;
                for block in *first..first + count {
                    layer.blocks.remove(&block);
                    if !absent {
                        layer.blocks.insert(block, Block::Zero);
                    }
                }
            }
            Self::Install { key, layer } | Self::Patch { key, layer, .. } => {
                model.insert(*key, layer.clone());
            }
            Self::Delete { key } => {
                model.remove(key);
            }
            Self::DeleteVolume { volume } => model.retain(|key, _| key.object.volume != *volume),
            Self::Merge { key, lower } => {
                let lower = LayerKey { layer: *lower, ..*key };
                if !model.contains_key(key) {
                    return;
                }
                let blocks = model.remove(&lower).unwrap_or_default().blocks;
                let upper = model.entry(*key).or_default();
                for (block, content) in blocks {
                    upper.blocks.entry(block).or_insert(content);
                }
            }
        }
    }
}

/// The newest layer of the key's object, or the key itself if that is newer.
pub(super) fn newest_from(model: &Model, key: LayerKey) -> LayerKey {
    let newer = key..=LayerKey { layer: Layer(u32::MAX), ..key };
    model.range(newer).next_back().map_or(key, |(newest, _)| *newest)
}

pub(super) fn version_in(model: &Model, key: LayerKey) -> Version {
    model.get(&key).map_or(Version::NONE, |layer| layer.version)
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

/// The data blocks of `layer` that `old` does not hold.
pub(super) fn new_blocks(old: &ModelLayer, layer: &ModelLayer) -> Vec<u16> {
    let blocks = layer
        .blocks
        .iter()
        .filter(|(block, new)| matches!(new, Block::Data(_)) && old.blocks.get(block) != Some(new));
    blocks.map(|(block, _)| *block).collect()
}

/// The patch that makes it of one that holds all data blocks but those `given`.
pub(super) fn patch_of(layer: &ModelLayer, given: &[u16]) -> LayerPatch {
    let tags: Vec<u64> = given
        .iter()
        .map(|block| match layer.blocks[block] {
            Block::Data(tag) => tag,
            Block::Zero => panic!("only data is given"),
        })
        .collect();
    let ranges = given.iter().map(|block| BlockRange::new(*block, 1).unwrap()).collect();
    LayerPatch { sums: image_of(layer).sums, blocks: ranges, data: blocks_of(&tags).0 }
}

/// What an image says, or what is wrong with it.
pub(super) fn layer_of(image: &LayerImage) -> Result<ModelLayer, String> {
    let mut layer = ModelLayer { version: image.sums.version, blocks: BTreeMap::new() };
    let mut data = image.data.chunks_exact(BLOCK_SIZE).zip(&image.sums.crcs);
    let mut end = 0;
    for run in &image.sums.runs {
        if run.range.first() < end {
            return Err("runs overlap".into());
        }
        end = run.range.end();
        for block in run.range.first()..end {
            let content = match run.state {
                BlockState::Absent => return Err("an absent run".into()),
                BlockState::Zero => Block::Zero,
                BlockState::Data => {
                    let (bytes, crc) = data.next().ok_or("less data than runs say")?;
                    if crc32c::crc32c(bytes) != *crc {
                        return Err(format!("block {block} does not match its checksum"));
                    }
                    Block::Data(tag_of(bytes).ok_or(format!("block {block} is torn"))?)
                }
            };
            layer.blocks.insert(block, content);
        }
    }
    if data.next().is_some() || image.data.len() != image.sums.crcs.len() * BLOCK_SIZE {
        return Err("more data than runs say".into());
    }
    Ok(layer)
}

/// What may be found after a crash: `base`, or that after the first few of `ops`.
#[derive(Clone, Default)]
pub(super) struct History {
    /// What is durable.
    base: Model,
    /// Changes since; how many there were before them.
    ops: Vec<Op>,
    before: usize,
    now: Model,
    /// A change of which it is not known whether it was done; not in `now`.
    doubtful: Option<Op>,
}

impl History {
    pub(super) fn of(model: Model) -> Self {
        Self { base: model.clone(), now: model, ..Self::default() }
    }

    /// The state after all changes.
    pub(super) fn now(&self) -> &Model {
        &self.now
    }

    /// Changes so far, for [`History::durable_to`].
    pub(super) fn count(&self) -> usize {
        self.before + self.ops.len()
    }

    pub(super) fn push(&mut self, op: Op) {
        op.apply_to_model(&mut self.now);
        self.ops.push(op);
    }

    /// A change that may be found, now or after the next crash.
    pub(super) fn push_doubtful(&mut self, op: Op) {
        self.doubtful = Some(op);
    }

    pub(super) fn is_doubtful(&self) -> bool {
        self.doubtful.is_some()
    }

    /// The first `count` changes are durable.
    pub(super) fn durable_to(&mut self, count: usize) {
        let done = count.saturating_sub(self.before).min(self.ops.len());
        for op in self.ops.drain(..done) {
            op.apply_to_model(&mut self.base);
        }
        self.before += done;
    }

    pub(super) fn all_durable(&mut self) {
        self.durable_to(self.count());
    }

    /// All states that may be found, oldest first.
    pub(super) fn states(&self) -> Vec<Model> {
        let mut states = vec![self.base.clone()];
        for op in self.ops.iter().chain(&self.doubtful) {
            let mut next = states.last().unwrap().clone();
            op.apply_to_model(&mut next);
            states.push(next);
        }
        states
    }

    /// Goes on from `found`, which is durable; an error if it must not be there.
    pub(super) fn recover(&mut self, found: &Model) -> Result<(), String> {
        let mut state = self.base.clone();
        let mut fits = state == *found;
        for op in self.ops.iter().chain(&self.doubtful) {
            op.apply_to_model(&mut state);
            fits |= state == *found;
        }
        if !fits {
            let states: Vec<_> =
                self.states().iter().map(|state| differences(state, found)).collect();
            return Err(format!("no state since the last flush fits: {states:#?}"));
        }
        *self = Self::of(found.clone());
        Ok(())
    }

    /// As [`History::recover`] after the death of the process alone: nothing is lost.
    pub(super) fn recover_all(&mut self, found: &Model) -> Result<(), String> {
        let mut with = self.now.clone();
        self.doubtful.iter().for_each(|op| op.apply_to_model(&mut with));
        if *found != self.now && *found != with {
            return Err(format!("something is lost: {}", differences(&self.now, found)));
        }
        *self = Self::of(found.clone());
        Ok(())
    }
}

/// How `found` is not what is expected, in few words.
pub(super) fn differences(expected: &Model, found: &Model) -> String {
    let mut keys: Vec<_> = expected.keys().chain(found.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let mut text = String::new();
    for key in keys {
        let (want, have) = (expected.get(key), found.get(key));
        if want == have {
            continue;
        }
        let versions = [want, have].map(|layer| layer.map_or(Version::NONE, |l| l.version));
        text += &format!("{key}: version {} expected, {} found", versions[0], versions[1]);
        if let (Some(want), Some(have)) = (want, have) {
            let differs = |block: &u16| want.blocks.get(block) != have.blocks.get(block);
            let blocks: Vec<_> = (0..1024).filter(differs).take(8).collect();
            text += &format!(", blocks {blocks:?} differ");
        }
        text += "; ";
    }
    text
}

#[test]
fn the_model_counts_by_itself_and_agrees_with_the_published_values() {
    // CRC-32C of "123456789" (RFC 3720, B.4 uses the same polynomial); first value of SplitMix64.
    assert_eq!(crc_of(b"123456789"), 0xE306_9283);
    assert_eq!(hash(0), 0xE220_A839_7B1D_CDAF);
    for tag in [0, 1, u64::MAX, 0x0123_4567_89AB_CDEF] {
        assert_eq!(crc_of(&bytes_of(tag)), crc32c::crc32c(&bytes_of(tag)));
    }
    for index in 0..100 {
        let object = key(u64::from(index) % 7, index, 0).object;
        assert_eq!(slot_of(object), object.slot().0);
    }
}
