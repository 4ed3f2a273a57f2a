//! A writer: random changes of the layers of one volume, each told before and after.

use std::collections::BTreeMap;

use sheepdog_store::{Applied, Payload, ReadError, Store, WriteError};
use sheepdog_types::{BLOCK_SIZE, Layer, LayerKey, Version, WriterGen};

use super::content::{
    Cell, Change, LayerModel, Op, bytes_of, crcs_of, identify, install_image, patch,
};
use super::history::{Event, Record};
use super::{LAYERS, OBJECTS, Rng, all_keys, key, keys_of};

const BLOCKS: u64 = sheepdog_types::BLOCKS_PER_OBJECT as u64;

/// Why a writer cannot go on.
#[derive(Debug)]
pub struct Stopped(pub String);

/// One writer. It alone changes the volume of its number, so it knows what reads must give.
pub struct Actor<'a, R> {
    pub store: &'a Store,
    pub report: R,
    seed: u64,
    writer: u8,
    rng: Rng,
    /// Grows with each life of a layer, so no version ever has two contents.
    next_gen: u64,
    layers: BTreeMap<LayerKey, LayerModel>,
}

impl<'a, R: FnMut(Record)> Actor<'a, R> {
    /// `round` counts the openings of the store.
    pub fn new(
        store: &'a Store,
        seed: u64,
        writer: u8,
        round: u64,
        report: R,
    ) -> Result<Self, Stopped> {
        let read = |key| Ok((key, LayerModel::observe(store, seed, key)?));
        let layers = keys_of(writer).map(read).collect::<Result<_, Stopped>>()?;
        Ok(Self {
            store,
            report,
            seed,
            writer,
            rng: Rng::new(seed, round << 8 | u64::from(writer)),
            next_gen: (round + 1) << 24,
            layers,
        })
    }

    fn tell(&mut self, event: Event) {
        (self.report)(Record { writer: self.writer, event });
    }

    /// Does one random thing. `Ok(Some(_))`: it was refused and not done.
    pub fn step(&mut self) -> Result<Option<WriteError>, Stopped> {
        let object = self.rng.below(OBJECTS.into()) as u8;
        // Mostly layer 0, seldom the newest.
        let layer = self.rng.below(LAYERS.into()).min(self.rng.below(LAYERS.into())) as u8;
        let key = key(self.writer, object, layer);
        match self.rng.below(1000) {
            0..480 => self.write(key, 1, 64),
            480..560 => self.write(key, 256, BLOCKS),
            560..650 => self.clear(key),
            650..680 => self.install(key),
            680..700 if self.layers[&key].exists() => self.patch(key),
            700..750 if self.layers[&key].exists() => self.delete(key),
            750..755 => self.delete_volume(),
            755..830 => self.flush().map(|()| None),
            830..850 => self.read_any_layer().map(|()| None),
            _ => self.read(object).map(|()| None),
        }
    }

    fn some_range(&mut self, least: u64, most: u64) -> (u16, u16) {
        let count = self.rng.between(least, most);
        // Often at the same places, so that writes overlap.
        let first = match self.rng.below(4) {
            0 => 0,
            1 => BLOCKS - count,
            _ => self.rng.between(0, BLOCKS - count),
        };
        (first as u16, count as u16)
    }

    /// The version after one more change of `key`.
    fn next_version(&mut self, key: LayerKey) -> Version {
        let have = self.layers[&key].version;
        let anew = have == Version::NONE || self.rng.chance(5);
        self.next_gen += u64::from(anew);
        let writer = if anew || have.writer.0 >> 24 != self.next_gen >> 24 {
            WriterGen(self.next_gen)
        } else {
            have.writer
        };
        have.next(writer)
    }

    pub fn write(
        &mut self,
        key: LayerKey,
        least: u64,
        most: u64,
    ) -> Result<Option<WriteError>, Stopped> {
        let (first, count) = self.some_range(least, most);
        self.change(key, Change::Write { first, count })
    }

    pub fn clear(&mut self, key: LayerKey) -> Result<Option<WriteError>, Stopped> {
        let most = [16, 128, BLOCKS][self.rng.below(3) as usize];
        let (first, count) = self.some_range(1, most);
        let count = if self.rng.chance(10) { 0 } else { count };
        let (absent, release) = (self.rng.chance(50), self.rng.chance(50));
        self.change(key, Change::Clear { first, count, absent, release })
    }

    pub fn install(&mut self, key: LayerKey) -> Result<Option<WriteError>, Stopped> {
        self.change(key, Change::Install)
    }

    pub fn patch(&mut self, key: LayerKey) -> Result<Option<WriteError>, Stopped> {
        self.change(key, Change::Patch)
    }

    pub fn delete(&mut self, key: LayerKey) -> Result<Option<WriteError>, Stopped> {
        self.change(key, Change::Delete)
    }

    /// The layer that takes writes: the newest of the key's object, if that is newer than `key`.
    fn newest_from(&self, key: LayerKey) -> LayerKey {
        let newer = self.layers.range(key..=LayerKey { layer: Layer(u32::MAX), ..key });
        newer.rev().find(|(_, layer)| layer.exists()).map_or(key, |(newest, _)| *newest)
    }

    /// Changes a layer and notes it. Writes go to [`Actor::newest_from`] it.
    pub fn change(&mut self, key: LayerKey, change: Change) -> Result<Option<WriteError>, Stopped> {
        let key = match change {
            Change::Write { .. } | Change::Clear { .. } => self.newest_from(key),
            Change::Install | Change::Patch | Change::Delete => key,
        };
        let version = match change {
            Change::Delete => Version::NONE,
            _ => self.next_version(key),
        };
        let op = Op { key, version, change };
        self.tell(Event::Begin(op));
        let done = perform(self.store, self.seed, &self.layers[&key], &op);
        let frees = matches!(change, Change::Clear { .. } | Change::Delete);
        if self.answered(done, frees)? {
            let seed = self.seed;
            self.layers.get_mut(&key).expect("an own layer").apply(seed, &op);
            return Ok(None);
        }
        Ok(Some(WriteError::NoSpace))
    }

    pub fn delete_volume(&mut self) -> Result<Option<WriteError>, Stopped> {
        let there = self.layers.values().filter(|layer| layer.exists()).count();
        self.tell(Event::BeginVolume);
        let volume = key(self.writer, 0, 0).object.volume;
        let deleted = self.store.delete_volume(volume);
        if let Ok(deleted) = deleted {
            assert_eq!(deleted, there, "layers deleted with their volume");
        }
        if self.answered(deleted.map(|_| ()), true)? {
            self.layers.values_mut().for_each(|layer| *layer = LayerModel::default());
            return Ok(None);
        }
        Ok(Some(WriteError::NoSpace))
    }

    /// True if it was done, false if the disk is full. What `frees` space is done also then.
    fn answered(&mut self, result: Result<(), WriteError>, frees: bool) -> Result<bool, Stopped> {
        match result {
            Err(error @ WriteError::NoSpace) if frees => {
                panic!("deletes and discards work on a full disk, but: {error}")
            }
            Ok(()) => self.tell(Event::Done),
            Err(WriteError::NoSpace) => self.tell(Event::Refused),
            Err(error @ (WriteError::Failed(_) | WriteError::Damaged { .. })) => {
                return Err(Stopped(error.to_string()));
            }
            Err(error) => panic!("a right request was refused: {error}"),
        }
        Ok(result.is_ok())
    }

    pub fn flush(&mut self) -> Result<(), Stopped> {
        self.tell(Event::FlushBegin);
        self.store.flush_wait().map_err(|error| Stopped(error.to_string()))?;
        self.tell(Event::Flushed);
        Ok(())
    }

    /// Reads a whole layer, perhaps while others change it: every block is one of some write of it.
    fn read_any_layer(&mut self) -> Result<(), Stopped> {
        let keys: Vec<_> = all_keys().collect();
        let key = keys[self.rng.below(keys.len() as u64) as usize];
        LayerModel::observe(self.store, self.seed, key).map(|_| ())
    }

    /// Reads a piece of an object through some of its layers and compares every block.
    pub fn read(&mut self, object: u8) -> Result<(), Stopped> {
        let (first, count) = self.some_range(1, 256);
        let mut chain: Vec<_> = (0..LAYERS).rev().collect();
        chain.retain(|_| self.rng.chance(80));
        let chain = if chain.is_empty() { vec![0] } else { chain };
        let mut bytes = vec![0xEE; usize::from(count) * BLOCK_SIZE];
        let mut crcs = vec![0; usize::from(count)];
        let id = key(self.writer, object, 0).object;
        let layers: Vec<_> = chain.iter().map(|layer| Layer(u32::from(*layer))).collect();
        let outcome = match self.store.read(id, &layers, first, &mut bytes, &mut crcs) {
            Ok(outcome) => outcome,
            Err(error @ ReadError::Io { .. }) => return Err(Stopped(error.to_string())),
            Err(error) => panic!("{error}"),
        };
        let newest = key(self.writer, object, chain[0]);
        assert_eq!(outcome.version, self.layers[&newest].version, "version of {newest}");
        assert_eq!(crcs, crcs_of(&bytes), "checksums read of {id}");
        let mut absent = 0;
        for (block, bytes) in (first..).zip(bytes.chunks_exact(BLOCK_SIZE)) {
            let cell = |layer: &u8| {
                let key = key(self.writer, object, *layer);
                let cell = self.layers[&key].cells[usize::from(block)];
                (cell != Cell::Absent).then_some((key, cell))
            };
            match chain.iter().find_map(cell) {
                Some((key, Cell::Data(version))) => {
                    let found = identify(self.seed, key, block, bytes);
                    assert_eq!(found, version, "block {block} of {key}");
                }
                other => {
                    absent += u16::from(other.is_none());
                    assert!(bytes.iter().all(|byte| *byte == 0), "block {block} of {id}: zeroes");
                }
            }
        }
        assert_eq!(outcome.absent, absent, "absent blocks of {id}");
        Ok(())
    }
}

/// Does `op` to a layer that is as `old`.
fn perform(store: &Store, seed: u64, old: &LayerModel, op: &Op) -> Result<(), WriteError> {
    let prev = old.version;
    let payload_of = |bytes, crcs| Payload::Data { bytes, crcs };
    let write = |first, payload: Payload<'_>| {
        let applied = store.write(op.key, prev, op.version, first, payload)?;
        assert_eq!(applied, Applied::Now);
        Ok(())
    };
    match op.change {
        Change::Write { first, count } => {
            let blocks: Vec<_> = (first..first + count).collect();
            let bytes = bytes_of(seed, op.key, op.version, &blocks);
            write(first, payload_of(&bytes, &crcs_of(&bytes)))
        }
        Change::Clear { first, count: 0, .. } => write(first, Payload::Nothing),
        Change::Clear { first, count, absent, release } => {
            write(first, Payload::Zero { count, absent, release })
        }
        Change::Install => {
            let expect = (prev != Version::NONE).then_some(prev);
            let image = install_image(seed, op.key, op.version);
            let installed = store.install(op.key, expect, &image)?;
            assert!(installed, "{} was at the version expected", op.key);
            Ok(())
        }
        Change::Patch => {
            let patched = store.patch(op.key, prev, &patch(seed, op.key, op.version, old))?;
            assert!(patched, "{} was as expected", op.key);
            Ok(())
        }
        Change::Delete => {
            let deleted = store.delete_at(op.key, prev)?;
            assert!(deleted, "{} was at version {prev}", op.key);
            Ok(())
        }
    }
}
