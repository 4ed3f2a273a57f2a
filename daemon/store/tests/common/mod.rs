//! Shared by the tests on real file systems: random changes whose every block says what it is, a
//! model of what a store may hold after a crash, and file systems to crash.
//!
//! A *worker* (another process, or this one) changes a store and tells before each call what it
//! is about to do and after it that it was answered. [`History`](history::History) keeps what it
//! told and knows which states of each layer are right afterwards.

// Each test program uses a part of this.
#![allow(dead_code)]

pub mod actor;
pub mod content;
pub mod history;
pub mod lab;
pub mod worker;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sheepdog_store::{Options, Store, StoreIds};
use sheepdog_types::{
    ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, VolumeId, hash64,
};

/// Writers of a workload; each has a volume of its own.
pub const WRITERS: u8 = 3;
/// Objects of each volume.
pub const OBJECTS: u8 = 2;
/// Layers of each object.
pub const LAYERS: u8 = 3;

/// Whose store it is.
pub const IDS: StoreIds = StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };

/// A layer that a workload uses.
pub fn key(writer: u8, object: u8, layer: u8) -> LayerKey {
    let volume = VolumeId(u64::from(writer) + 1);
    let object = ObjectId { volume, index: ObjectIndex(u32::from(object)) };
    LayerKey { object, layer: Layer(u32::from(layer)) }
}

/// All layers of one writer.
pub fn keys_of(writer: u8) -> impl Iterator<Item = LayerKey> {
    (0..OBJECTS).flat_map(move |o| (0..LAYERS).map(move |l| key(writer, o, l)))
}

/// All layers that workloads use.
pub fn all_keys() -> impl Iterator<Item = LayerKey> {
    (0..WRITERS).flat_map(keys_of)
}

/// Random numbers (SplitMix64); the same for the same seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(hash64(hash64(seed) ^ stream))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        hash64(self.0)
    }

    /// From 0 to `end` exclusive.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The seed of this run: SEED of the environment, else another one each time. It is printed.
pub fn seed(test: &str) -> u64 {
    let given = std::env::var("SEED").ok().map(|text| text.parse().expect("SEED is a number"));
    let clock = || {
        let now = std::time::UNIX_EPOCH.elapsed().expect("a clock past 1970");
        hash64(now.as_nanos() as u64) >> 16
    };
    let seed = given.unwrap_or_else(clock);
    println!("{test}: SEED={seed}");
    seed
}

/// Rounds of a randomised test: ROUNDS of the environment or `usual`.
pub fn rounds(usual: u64) -> u64 {
    std::env::var("ROUNDS").map_or(usual, |text| text.parse().expect("ROUNDS is a number"))
}

/// A log just large enough for the largest write, so that it wraps and is applied all the time.
pub fn creation_options(rng: &mut Rng) -> Options {
    let segment_bytes = 5 * (1 << 20) + 4096 * rng.below(256);
    let log_bytes = segment_bytes * rng.between(4, 5);
    Options { log_bytes, segment_bytes, ..Options::default() }
}

/// Options with background work at random intervals.
pub fn opening_options(rng: &mut Rng) -> Options {
    Options {
        sync_after: Duration::from_millis([2, 10, 100, 1000][rng.below(4) as usize]),
        checkpoint_after: Duration::from_millis([5, 50, 500, 5000][rng.below(4) as usize]),
        ..Options::default()
    }
}

/// Held while another thread's test starts processes, and while a store is open in this one: until it becomes another
/// program, a child has all descriptors of its parent, and with them the lock of a store that is closed meanwhile.
pub fn no_store_at_a_start() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a new store in `dir`, in place of what is there.
pub fn new_store(dir: &Path, rng: &mut Rng) {
    // There is nothing the first time.
    let _ = std::fs::remove_dir_all(dir);
    let _turn = no_store_at_a_start();
    let store = Store::create(dir, IDS, creation_options(rng)).expect("a new store");
    store.close().expect("nothing to apply");
}
