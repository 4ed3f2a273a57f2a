//! I11 on real file systems that are full: nothing is lost, reads, deletes and discards go on, and
//! when there is space again so do writes.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::cell::RefCell;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::actor::Actor;
use common::content::Change;
use common::history::{Bounds, Event, History, Record};
use common::lab::{Disk, Fs, Hog};
use common::{IDS, Rng, WRITERS, creation_options, keys_of, lab, opening_options};
use sheepdog_store::{OpenError, Options, Store, WriteError};
use sheepdog_types::LayerKey;

/// Enough for the store, its log and more than the workload can hold.
const MEBIBYTES: u64 = 256;
/// So many writes of 4 MiB are more than the log takes twice over.
const WRITES: usize = 16;
/// It does not take this long to see that there is space again.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn i11_each_operation_survives_a_full_ext4() {
    let name = "i11_each_operation_survives_a_full_ext4";
    lab::run(name, &[Fs::Ext4], |dir| each_operation(name, Fs::Ext4, dir));
}

#[test]
fn i11_each_operation_survives_a_full_tmpfs() {
    let name = "i11_each_operation_survives_a_full_tmpfs";
    lab::run(name, &[Fs::Tmpfs], |dir| each_operation(name, Fs::Tmpfs, dir));
}

#[test]
fn i11_any_workload_survives_a_full_ext4() {
    let name = "i11_any_workload_survives_a_full_ext4";
    // The power is cut with a tool of xfs.
    lab::run(name, &[Fs::Ext4, Fs::Xfs], |dir| any_workload(name, Fs::Ext4, dir));
}

#[test]
fn i11_any_workload_survives_a_full_xfs() {
    let name = "i11_any_workload_survives_a_full_xfs";
    lab::run(name, &[Fs::Xfs], |dir| any_workload(name, Fs::Xfs, dir));
}

#[test]
fn i11_a_store_that_finds_no_space_is_not_created() {
    let name = "i11_a_store_that_finds_no_space_is_not_created";
    lab::run(name, &[Fs::Ext4], |dir| {
        let disk = Disk::make(Fs::Ext4, dir, "disk", MEBIBYTES);
        let store = disk.at().join("store");
        let mut rng = Rng::new(0, 0);
        let hog = Hog::new(&disk);
        // None at all, or less than the log takes.
        for spare in [0, 10] {
            hog.take_all_but(spare);
            match Store::create(&store, IDS, creation_options(&mut rng)) {
                Err(OpenError::Io { what, source }) => {
                    assert_eq!(source.kind(), ErrorKind::StorageFull, "{what}");
                }
                other => panic!("{other:?}"),
            }
            let opened = Store::open(&store, Options::default());
            assert!(matches!(opened, Err(OpenError::NotAStore { .. })), "{opened:?}");
            hog.release();
        }
        Store::create(&store, IDS, creation_options(&mut rng)).unwrap().close().unwrap();
    });
}

#[test]
fn i11_space_that_somebody_else_frees_is_used() {
    let name = "i11_space_that_somebody_else_frees_is_used";
    lab::run(name, &[Fs::Ext4], |dir| {
        let mut bench = Bench::new(name, Fs::Ext4, dir, MEBIBYTES);
        bench.hog.take_all();
        let store = bench.open();
        assert_eq!(
            bench.actor(&store, 0).write(first_of(0), 1, 64).unwrap(),
            Some(WriteError::NoSpace)
        );
        let full = store.usage();
        bench.hog.release();
        // Also without a write that asks for it.
        let free = store.usage();
        assert!(full.capacity < 16 << 20 && free.capacity > 64 << 20, "{full:?}, then {free:?}");
        write_when_there_is_space(&mut bench.actor(&store, 0), first_of(0));
        bench.check(&store);
    });
}

/// What is done just after the disk became full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    WriteSmall,
    WriteLarge,
    Overwrite,
    Discard,
    Install,
    Patch,
    Delete,
    DeleteVolume,
    NewLayer,
    Flush,
    /// By its timer.
    Checkpoint,
    Close,
    Open,
}

const OPERATIONS: [Operation; 13] = [
    Operation::WriteSmall,
    Operation::WriteLarge,
    Operation::Overwrite,
    Operation::Discard,
    Operation::Install,
    Operation::Patch,
    Operation::Delete,
    Operation::DeleteVolume,
    Operation::NewLayer,
    Operation::Flush,
    Operation::Checkpoint,
    Operation::Close,
    Operation::Open,
];

/// A store with all that is known of it.
struct Bench {
    disk: Disk,
    dir: PathBuf,
    hog: Hog,
    seed: u64,
    rng: Rng,
    history: RefCell<History>,
    openings: u64,
}

impl Bench {
    fn new(name: &str, fs: Fs, dir: &Path, mebibytes: u64) -> Self {
        let seed = common::seed(name);
        let mut rng = Rng::new(seed, u64::MAX);
        let disk = Disk::make(fs, dir, "disk", mebibytes);
        let hog = Hog::new(&disk);
        let dir = disk.at().join("store");
        common::new_store(&dir, &mut rng);
        let history = RefCell::new(History::new(seed));
        Self { disk, dir, hog, seed, rng, history, openings: 0 }
    }

    fn open(&mut self) -> Store {
        let options = opening_options(&mut self.rng);
        self.open_with(options)
    }

    fn open_with(&mut self, options: Options) -> Store {
        self.openings += 1;
        let store = Store::open(&self.dir, options).expect("a full disk can be opened");
        self.history.borrow_mut().take(Record { writer: 0, event: Event::Ready });
        store
    }

    fn actor<'a>(&'a self, store: &'a Store, writer: u8) -> Actor<'a, impl FnMut(Record) + 'a> {
        let report = |record| self.history.borrow_mut().take(record);
        Actor::new(store, self.seed, writer, self.openings, report).expect("reads work")
    }

    /// Everything acknowledged is there.
    fn check(&self, store: &Store) {
        let bounds = self.history.borrow().acknowledged();
        self.check_within(store, &bounds);
    }

    fn check_within(&self, store: &Store, bounds: &Bounds) {
        let found = self.history.borrow().check(store, bounds);
        self.history.borrow_mut().settle(&found);
    }
}

/// On a full disk only its being full may keep a store from applying its log.
fn close(store: Store) {
    if let Err(error) = store.close() {
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
    }
}

fn each_operation(name: &str, fs: Fs, dir: &Path) {
    let mut bench = Bench::new(name, fs, dir, if fs == Fs::Tmpfs { 128 } else { MEBIBYTES });
    for pending in [false, true] {
        for operation in OPERATIONS {
            println!("{operation:?}, pending: {pending}");
            one_operation(&mut bench, operation, pending);
        }
    }
}

/// Fills the disk, does one thing, then everything else that must work on a full disk, and frees
/// the disk. `pending`: the log holds new blocks when the disk becomes full.
fn one_operation(bench: &mut Bench, operation: Operation, pending: bool) {
    let mut store = prepare(bench, operation, pending);
    bench.hog.take_all();
    let refused = match operation {
        Operation::Close => {
            close(store);
            store = bench.open();
            None
        }
        Operation::Open => {
            // What the log holds cannot be applied now, so opening finds it there.
            close(store);
            store = bench.open();
            bench.check(&store);
            close(store);
            store = bench.open();
            None
        }
        _ => do_it(&mut bench.actor(&store, 0), operation),
    };
    let needs_none = operation == Operation::Overwrite && !pending;
    assert!(refused.is_none() || !needs_none, "{operation:?} needs no space: {refused:?}");
    bench.check(&store);
    bench.actor(&store, 0).flush().expect("flushes need no space");
    fill(bench, &store);
    bench.check(&store);
    store = leave_full(bench, store);
    come_back(bench, &store);
    close(store);
}

/// A store with some layers, of which the first and the last of each volume are in their slabs.
fn prepare(bench: &mut Bench, operation: Operation, pending: bool) -> Store {
    bench.hog.release();
    let store = bench.open();
    assert_eq!(bench.actor(&store, 2).delete_volume().unwrap(), None);
    for writer in 0..2 {
        let mut actor = bench.actor(&store, writer);
        assert_eq!(actor.delete_volume().unwrap(), None);
        for key in [first_of(writer), last_of(writer)] {
            assert_eq!(actor.write(key, 200, 400).unwrap(), None);
            assert_eq!(actor.install(key).unwrap(), None);
            assert_eq!(actor.change(key, Change::Write { first: 100, count: 50 }).unwrap(), None);
        }
    }
    store.close().expect("there is space");
    let often = Options { checkpoint_after: Duration::from_millis(1), ..fast_sync() };
    // Only where it is meant to should the log be applied behind the back of this test.
    let seldom = Options { checkpoint_after: Duration::from_secs(3600), ..fast_sync() };
    let store = bench.open_with(if operation == Operation::Checkpoint { often } else { seldom });
    if pending {
        let mut actor = bench.actor(&store, 1);
        for key in keys_of(1) {
            assert_eq!(actor.write(key, 1, 64).unwrap(), None);
        }
        assert_eq!(actor.write(first_of(1), 500, 600).unwrap(), None);
    }
    store
}

fn fast_sync() -> Options {
    Options { sync_after: Duration::from_millis(5), ..Options::default() }
}

fn first_of(writer: u8) -> LayerKey {
    keys_of(writer).next().expect("a layer")
}

fn last_of(writer: u8) -> LayerKey {
    keys_of(writer).last().expect("a layer")
}

/// Does `operation` to the layers of a writer; gives why it was refused.
fn do_it(actor: &mut Actor<'_, impl FnMut(Record)>, operation: Operation) -> Option<WriteError> {
    let (old, new) = (first_of(0), keys_of(0).nth(1).expect("two layers"));
    let done = match operation {
        Operation::WriteSmall => actor.write(old, 1, 64),
        Operation::WriteLarge => actor.write(old, 256, 1024),
        Operation::Overwrite => actor.change(old, Change::Write { first: 110, count: 10 }),
        Operation::Discard => actor.clear(old),
        Operation::Install => actor.install(old),
        Operation::Patch => actor.patch(old),
        Operation::Delete => actor.delete(old),
        Operation::DeleteVolume => actor.delete_volume(),
        Operation::NewLayer => actor.write(new, 1, 64),
        Operation::Flush => actor.flush().map(|()| None),
        // New blocks, until a checkpoint has found no place for some.
        Operation::Checkpoint => {
            let deadline = Instant::now() + PATIENCE;
            while actor.write(new, 1, 8).unwrap().is_none() {
                assert!(Instant::now() < deadline, "a full disk takes new blocks for ever");
                actor.flush().unwrap();
            }
            Ok(None)
        }
        Operation::Close | Operation::Open => unreachable!("not a matter of a writer"),
    };
    done.unwrap_or_else(|error| panic!("{operation:?} on a full disk: {error:?}"))
}

/// Writes new blocks until there is no space, then does what needs none.
fn fill(bench: &Bench, store: &Store) {
    let mut actor = bench.actor(store, 2);
    let keys: Vec<_> = keys_of(2).collect();
    // Also after the first refusal: what was accepted before may be written over, until the log is
    // full; and it must not make room by forgetting what could not be applied.
    let writes = keys.iter().cycle().take(WRITES);
    let refused = writes.filter(|key| actor.write(**key, 1024, 1024).unwrap().is_some()).count();
    assert!(refused > 0, "4 MiB were written {WRITES} times on a full disk");
    drop(actor);
    let mut actor = bench.actor(store, 0);
    for _ in 0..20 {
        actor.clear(last_of(0)).unwrap();
        actor.read(0).unwrap();
    }
    actor.flush().unwrap();
}

/// The disk is full when the store is closed and when it is opened.
fn leave_full(bench: &mut Bench, store: Store) -> Store {
    close(store);
    bench.hog.take_all();
    let store =
        bench.open_with(Options { checkpoint_after: Duration::from_millis(20), ..fast_sync() });
    bench.check(&store);
    let mut actor = bench.actor(&store, 1);
    assert_eq!(actor.delete(last_of(1)).unwrap(), None);
    actor.clear(first_of(1)).unwrap();
    actor.flush().unwrap();
    drop(actor);
    bench.check(&store);
    store
}

/// There is space again.
fn come_back(bench: &Bench, store: &Store) {
    bench.hog.release();
    // The store looks for space when something changes in it.
    bench.actor(store, 1).clear(first_of(1)).unwrap();
    let mut actor = bench.actor(store, 2);
    assert_eq!(actor.delete_volume().unwrap(), None);
    keys_of(2).take(3).for_each(|key| write_when_there_is_space(&mut actor, key));
    actor.flush().unwrap();
    drop(actor);
    bench.check(store);
}

/// There is space, which the store will see soon.
fn write_when_there_is_space(actor: &mut Actor<'_, impl FnMut(Record)>, key: LayerKey) {
    let deadline = Instant::now() + PATIENCE;
    while actor.write(key, 1024, 1024).unwrap().is_some() {
        assert!(Instant::now() < deadline, "there is space, but the store does not see it");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Random changes while somebody else takes and gives space, with restarts and power cuts.
fn any_workload(name: &str, fs: Fs, dir: &Path) {
    let mebibytes = if fs == Fs::Xfs { 320 } else { MEBIBYTES };
    let mut bench = Bench::new(name, fs, dir, mebibytes);
    let rounds = common::rounds(30);
    let (mut done, mut refused) = (0, 0);
    for _ in 0..rounds {
        let store = bench.open();
        let mut rng = bench.rng.clone();
        let mut actors: Vec<_> = (0..WRITERS).map(|writer| bench.actor(&store, writer)).collect();
        for _ in 0..rng.below(200) {
            match rng.below(100) {
                0 => bench.hog.release(),
                1..3 => bench.hog.take_all(),
                3..6 => bench.hog.take_all_but(rng.below(48)),
                _ => {
                    let actor = &mut actors[rng.below(WRITERS.into()) as usize];
                    match actor.step().expect("a full disk is not a failure") {
                        None => done += 1,
                        Some(_) => refused += 1,
                    }
                }
            }
        }
        drop(actors);
        bench.rng = rng;
        end_somehow(&mut bench, store);
    }
    println!("{name}: {rounds} rounds, {done} calls done, {refused} refused");
    assert!(rounds < 10 || refused > 0, "the disk was never full");
}

/// Closes the store or cuts its power, and looks at what it holds then.
fn end_somehow(bench: &mut Bench, store: Store) {
    let bounds = match bench.rng.below(3) {
        0 => {
            close(store);
            bench.history.borrow().acknowledged()
        }
        1 => {
            bench.check(&store);
            drop(store);
            bench.history.borrow().acknowledged()
        }
        _ => {
            bench.disk.cut_power();
            drop(store);
            bench.hog.close();
            bench.disk.restore_power();
            bench.hog.reopen(&bench.disk);
            bench.history.borrow().flushed()
        }
    };
    let store = bench.open();
    bench.check_within(&store, &bounds);
    close(store);
}
