//! What a worker told, and which states of each layer may be found after a crash.

use std::collections::{BTreeMap, HashMap};

use sheepdog_store::{LayerStat, Store};
use sheepdog_types::{BLOCK_SIZE, LayerKey, SLOTS, SlotId, Version, WriterGen, hash64};

use super::content::{Change, LayerModel, Op};
use super::{all_keys, key, keys_of};

/// Bytes of an encoded [`Record`].
pub const RECORD_BYTES: usize = 32;

/// What a writer of a worker tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub writer: u8,
    pub event: Event,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The store is open.
    Ready,
    /// About to change a layer.
    Begin(Op),
    /// About to delete all layers of the writer's volume.
    BeginVolume,
    /// What was begun was acknowledged.
    Done,
    /// What was begun was refused and not done.
    Refused,
    /// About to flush.
    FlushBegin,
    /// The flush was acknowledged.
    Flushed,
    /// Answer to the ping of this number.
    Pong(u64),
    /// The store gave an error, the writer stops.
    Stopped,
}

impl Record {
    pub fn encode(self) -> [u8; RECORD_BYTES] {
        let mut out = [0; RECORD_BYTES];
        out[1] = self.writer;
        out[0] = match self.event {
            Event::Ready => 1,
            Event::Begin(op) => encode_op(&mut out, &op),
            Event::BeginVolume => 2,
            Event::Done => 3,
            Event::Refused => 4,
            Event::FlushBegin => 5,
            Event::Flushed => 6,
            Event::Stopped => 7,
            Event::Pong(number) => {
                out[24..].copy_from_slice(&number.to_le_bytes());
                8
            }
        };
        out
    }

    pub fn decode(bytes: &[u8; RECORD_BYTES]) -> Self {
        let number = |at: usize| u64::from_le_bytes(bytes[at..][..8].try_into().expect("8 bytes"));
        let event = match bytes[0] {
            1 => Event::Ready,
            2 => Event::BeginVolume,
            3 => Event::Done,
            4 => Event::Refused,
            5 => Event::FlushBegin,
            6 => Event::Flushed,
            7 => Event::Stopped,
            8 => Event::Pong(number(24)),
            kind => {
                let version = Version { writer: WriterGen(number(16)), seq: number(24) };
                Event::Begin(decode_op(kind, bytes, version))
            }
        };
        Self { writer: bytes[1], event }
    }
}

/// Fills in all but the first byte, which it gives.
fn encode_op(out: &mut [u8; RECORD_BYTES], op: &Op) -> u8 {
    let (kind, (first, count), flags) = match op.change {
        Change::Write { first, count } => (16, (first, count), 0),
        Change::Clear { first, count, absent, release } => {
            (17, (first, count), u8::from(absent) | u8::from(release) << 1)
        }
        Change::Install => (18, (0, 0), 0),
        Change::Delete => (19, (0, 0), 0),
        Change::Patch => (20, (0, 0), 0),
    };
    (out[2], out[3]) = (op.key.object.index.0 as u8, op.key.layer.0 as u8);
    out[4..6].copy_from_slice(&first.to_le_bytes());
    out[6..8].copy_from_slice(&count.to_le_bytes());
    out[8] = flags;
    out[16..24].copy_from_slice(&op.version.writer.0.to_le_bytes());
    out[24..].copy_from_slice(&op.version.seq.to_le_bytes());
    kind
}

fn decode_op(kind: u8, bytes: &[u8; RECORD_BYTES], version: Version) -> Op {
    let first = u16::from_le_bytes([bytes[4], bytes[5]]);
    let count = u16::from_le_bytes([bytes[6], bytes[7]]);
    let change = match kind {
        16 => Change::Write { first, count },
        17 => {
            let (absent, release) = (bytes[8] & 1 != 0, bytes[8] & 2 != 0);
            Change::Clear { first, count, absent, release }
        }
        18 => Change::Install,
        19 => Change::Delete,
        20 => Change::Patch,
        _ => panic!("no such record: {bytes:x?}"),
    };
    Op { key: key(bytes[1], bytes[2], bytes[3]), version, change }
}

/// One layer since its last known state.
#[derive(Clone, Debug, Default)]
struct LayerHistory {
    base: LayerModel,
    /// What was begun since, with the number of the call, which deletions of a volume share.
    ops: Vec<(Op, u64)>,
    /// So many of them were acknowledged.
    acked: usize,
    /// So many of them are durable.
    durable: usize,
}

impl LayerHistory {
    fn newest(&self) -> Version {
        self.ops.last().map_or(self.base.version, |(op, _)| op.version)
    }

    fn version_after(&self, count: usize) -> Version {
        if count == 0 { self.base.version } else { self.ops[count - 1].0.version }
    }

    fn state_after(&self, seed: u64, count: usize) -> LayerModel {
        let mut state = self.base.clone();
        self.ops[..count].iter().for_each(|(op, _)| state.apply(seed, op));
        state
    }
}

/// How many of the changes of each layer must and may be found.
#[derive(Clone, Debug)]
pub struct Bounds(BTreeMap<LayerKey, (usize, usize)>);

impl Bounds {
    /// What must be there by these, and what may be there by `later`.
    pub fn until(mut self, later: &Self) -> Self {
        for (key, (_, most)) in &mut self.0 {
            *most = later.0[key].1;
        }
        self
    }
}

/// What was found: how many of the changes of each layer.
#[derive(Clone, Debug)]
pub struct Found {
    kept: BTreeMap<LayerKey, usize>,
    pub states: BTreeMap<LayerKey, LayerModel>,
    /// Changes that were begun and are not there.
    pub lost: usize,
    /// Changes that are there although they did not have to be.
    pub spared: usize,
}

/// All that the workers of a store told.
#[derive(Clone, Debug)]
pub struct History {
    seed: u64,
    layers: BTreeMap<LayerKey, LayerHistory>,
    /// The layers that the call in progress of each writer changes.
    in_flight: HashMap<u8, Vec<LayerKey>>,
    /// What was acknowledged when the flush in progress of each writer began.
    flushing: HashMap<u8, BTreeMap<LayerKey, usize>>,
    calls: u64,
    pub flushes: u64,
}

impl History {
    /// Of a new store.
    pub fn new(seed: u64) -> Self {
        let layers = all_keys().map(|key| (key, LayerHistory::default())).collect();
        let (in_flight, flushing) = (HashMap::new(), HashMap::new());
        Self { seed, layers, in_flight, flushing, calls: 0, flushes: 0 }
    }

    fn layer(&mut self, key: LayerKey) -> &mut LayerHistory {
        self.layers.get_mut(&key).expect("a layer of the workload")
    }

    pub fn take(&mut self, record: Record) {
        let writer = record.writer;
        match record.event {
            // What an opening finds it makes durable before it returns.
            Event::Ready => self.layers.values_mut().for_each(|layer| layer.durable = layer.acked),
            Event::Begin(op) => self.begin(writer, &[op]),
            Event::BeginVolume => {
                let there = |key: &LayerKey| self.layers[key].newest() != Version::NONE;
                let delete = |key| Op { key, version: Version::NONE, change: Change::Delete };
                let ops: Vec<_> = keys_of(writer).filter(there).map(delete).collect();
                self.begin(writer, &ops);
            }
            Event::Done => {
                for key in self.in_flight.remove(&writer).expect("a call in progress") {
                    self.layer(key).acked += 1;
                }
            }
            Event::Refused => {
                for key in self.in_flight.remove(&writer).expect("a call in progress") {
                    self.layer(key).ops.pop();
                }
            }
            Event::FlushBegin => {
                let acked = self.layers.iter().map(|(key, layer)| (*key, layer.acked)).collect();
                self.flushing.insert(writer, acked);
            }
            Event::Flushed => {
                for (key, acked) in self.flushing.remove(&writer).expect("a flush in progress") {
                    let layer = self.layer(key);
                    layer.durable = layer.durable.max(acked);
                }
                self.flushes += 1;
            }
            Event::Pong(_) | Event::Stopped => {}
        }
    }

    fn begin(&mut self, writer: u8, ops: &[Op]) {
        self.calls += 1;
        let call = self.calls;
        let keys = ops.iter().map(|op| op.key).collect();
        assert_eq!(self.in_flight.insert(writer, keys), None, "one call at a time");
        for op in ops {
            self.layer(op.key).ops.push((*op, call));
        }
    }

    /// After the death of the process: what was acknowledged must be there.
    pub fn acknowledged(&self) -> Bounds {
        self.bounds(|layer| layer.acked)
    }

    /// After a power cut: what was flushed must be there.
    pub fn flushed(&self) -> Bounds {
        self.bounds(|layer| layer.durable)
    }

    fn bounds(&self, least: impl Fn(&LayerHistory) -> usize) -> Bounds {
        let bounds = |layer| (least(layer), layer.ops.len());
        Bounds(self.layers.iter().map(|(key, layer)| (*key, bounds(layer))).collect())
    }

    /// Each layer after all that was begun.
    pub fn state(&self, key: LayerKey) -> LayerModel {
        let layer = &self.layers[&key];
        layer.state_after(self.seed, layer.ops.len())
    }

    /// Reads the whole store. Panics unless each layer is, in every byte, in one state that
    /// `bounds` allow, and all summaries agree with it.
    pub fn check(&self, store: &Store, bounds: &Bounds) -> Found {
        let mut found =
            Found { kept: BTreeMap::new(), states: BTreeMap::new(), lost: 0, spared: 0 };
        let mut possible = BTreeMap::new();
        for (key, layer) in &self.layers {
            let (least, most) = bounds.0[key];
            let state = LayerModel::observe(store, self.seed, *key).expect("reads work");
            let fits = |count: &usize| layer.version_after(*count) == state.version;
            let counts: Vec<_> = (least..=most).filter(fits).collect();
            let Some(&count) = counts.last() else {
                panic!(
                    "{key} is at version {}, but must have {least} and may have {most} of {:?} \
                     after version {}",
                    state.version, layer.ops, layer.base.version
                );
            };
            let right = layer.state_after(self.seed, count);
            if state != right {
                let differ = |block: &usize| state.cells[*block] != right.cells[*block];
                let block = (0..right.cells.len()).find(differ).expect("a block differs");
                panic!(
                    "block {block} of {key} at version {}: {:?} instead of {:?}",
                    state.version, state.cells[block], right.cells[block]
                );
            }
            found.lost += most - count;
            found.spared += count - least;
            found.kept.insert(*key, count);
            found.states.insert(*key, state);
            possible.insert(*key, counts);
        }
        self.check_volume_deletions(bounds, &possible);
        check_summaries(store, &found.states);
        found
    }

    /// Deleting a volume deletes all its layers or none.
    fn check_volume_deletions(&self, bounds: &Bounds, possible: &BTreeMap<LayerKey, Vec<usize>>) {
        let mut calls: HashMap<u64, (Vec<LayerKey>, Vec<LayerKey>)> = HashMap::new();
        for (key, layer) in &self.layers {
            let ops = layer.ops[..bounds.0[key].1].iter().enumerate();
            for (at, (op, call)) in ops.filter(|(_, (op, _))| op.change == Change::Delete) {
                let (surely, never) = calls.entry(*call).or_default();
                if possible[key].iter().all(|count| *count > at) {
                    surely.push(op.key);
                } else if possible[key].iter().all(|count| *count <= at) {
                    never.push(op.key);
                }
            }
        }
        for (done, not) in calls.values() {
            assert!(
                done.is_empty() || not.is_empty(),
                "one deletion of a volume deleted {done:?}, but not {not:?}"
            );
        }
    }

    /// Goes on from what was found.
    pub fn settle(&mut self, found: &Found) {
        for (key, layer) in &mut self.layers {
            let base = found.states[key].clone();
            *layer = LayerHistory { base, ..LayerHistory::default() };
        }
        self.in_flight.clear();
        self.flushing.clear();
    }
}

/// Compares listings, counters and digests with the layers that were read.
fn check_summaries(store: &Store, states: &BTreeMap<LayerKey, LayerModel>) {
    let existing = || states.iter().filter(|(_, state)| state.exists());
    let mut listed: BTreeMap<LayerKey, LayerStat> = BTreeMap::new();
    store.list_all(|slot, stats| {
        assert_eq!(store.list(slot), stats, "slot {slot}");
        listed.extend(stats.iter().map(|stat| (stat.key, *stat)));
    });
    assert!(listed.keys().eq(existing().map(|(key, _)| key)), "the layers listed: {listed:?}");
    for (key, state) in existing() {
        let stat = listed[key];
        assert_eq!(store.stat(*key), Some(stat));
        assert_eq!(stat.version, state.version);
        assert_eq!(u64::from(stat.data_blocks), state.data_blocks(), "data blocks of {key}");
        let zeroes = state.cells.iter().filter(|cell| matches!(cell, super::content::Cell::Zero));
        assert_eq!(usize::from(stat.zero_blocks), zeroes.count(), "zero blocks of {key}");
    }
    let mut digests = vec![0u64; SLOTS];
    for (key, state) in existing() {
        let digest = &mut digests[usize::from(key.object.slot().0)];
        *digest = digest.wrapping_add(layer_hash(*key, state.version));
    }
    for (slot, digest) in (0..=u16::MAX).map(SlotId).zip(digests) {
        assert_eq!(store.digest(slot), digest, "digest of slot {slot}");
    }
    let usage = store.usage();
    assert_eq!(usage.objects, existing().count() as u64);
    let blocks: u64 = existing().map(|(_, state)| state.data_blocks()).sum();
    assert_eq!(usage.used, blocks * BLOCK_SIZE as u64);
}

/// A layer's part in the digest of its slot: replicas of all releases must agree on it.
fn layer_hash(key: LayerKey, version: Version) -> u64 {
    let place = u64::from(key.object.index.0) << 32 | u64::from(key.layer.0);
    let words = [key.object.volume.0, place, version.writer.0, version.seq];
    words.into_iter().fold(0, |hash, word| hash64(hash ^ word))
}
