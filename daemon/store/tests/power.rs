//! The power of the file system fails under load; what was flushed is there, and of the rest each
//! write is there wholly or not at all.

mod common;

use std::path::Path;
use std::time::Duration;

use common::history::{Bounds, Found, History};
use common::lab::{Disk, Fs};
use common::worker::{Task, Worker};
use common::{Rng, lab, opening_options};
use sheepdog_store::Store;

/// A new store is made after so many rounds.
const ROUNDS_PER_STORE: u64 = 8;

/// Not a test: the process that uses the disk.
#[test]
fn worker() {
    common::worker::run_if_asked();
}

#[test]
fn i3_flushed_writes_survive_a_power_cut_on_ext4() {
    let name = "i3_flushed_writes_survive_a_power_cut_on_ext4";
    lab::run(name, &[Fs::Ext4, Fs::Xfs], |dir| cut_again_and_again(name, Fs::Ext4, dir));
}

#[test]
fn i3_flushed_writes_survive_a_power_cut_on_xfs() {
    let name = "i3_flushed_writes_survive_a_power_cut_on_xfs";
    lab::run(name, &[Fs::Xfs], |dir| cut_again_and_again(name, Fs::Xfs, dir));
}

#[test]
fn i3_flushed_writes_are_in_every_image_of_ext4() {
    let name = "i3_flushed_writes_are_in_every_image_of_ext4";
    lab::run(name, &[Fs::Ext4, Fs::Xfs], |dir| copy_again_and_again(name, Fs::Ext4, dir));
}

#[test]
fn i3_flushed_writes_are_in_every_image_of_xfs() {
    let name = "i3_flushed_writes_are_in_every_image_of_xfs";
    lab::run(name, &[Fs::Xfs], |dir| copy_again_and_again(name, Fs::Xfs, dir));
}

/// `xfs_io shutdown`: the file system writes nothing any more, whatever was not synced is gone.
fn cut_again_and_again(name: &str, fs: Fs, dir: &Path) {
    let (seed, rounds) = (common::seed(name), common::rounds(20));
    let mut rng = Rng::new(seed, u64::MAX);
    let disk = Disk::make(fs, dir, "disk", 512);
    let store = disk.at().join("store");
    let mut history = History::new(seed);
    let (mut lost, mut spared, mut flushes) = (0, 0, 0);
    for round in 0..rounds {
        if round % ROUNDS_PER_STORE == 0 {
            common::new_store(&store, &mut rng);
            history = History::new(seed);
        }
        let before;
        (history, before) = run_until_cut(history, &disk, &store, (seed, round), &mut rng);
        let bounds = before.until(&history.flushed());
        let found = check_twice(&history, &store, &bounds, &mut rng);
        (lost, spared, flushes) =
            (lost + found.lost, spared + found.spared, history.flushes + flushes);
        history.settle(&found);
    }
    println!(
        "{name}: {rounds} cuts, {flushes} flushes; not flushed: {spared} writes there, {lost} lost"
    );
    assert!(rounds < 10 || lost > 0, "the power cuts did not take anything");
    assert!(rounds < 10 || flushes > 0, "nothing was ever flushed");
}

/// One life of the store, from power on to power off. Also gives what was flushed before the cut,
/// which must be there. A flush that is answered while the file system shuts down may be a lie that
/// no power cut could tell: ext4 (Linux 6.18) answers an `fdatasync` with success if the shutdown
/// comes between its write of the data and its look at a journal that is aborted by then.
fn run_until_cut(
    history: History,
    disk: &Disk,
    store: &Path,
    (seed, round): (u64, u64),
    rng: &mut Rng,
) -> (History, Bounds) {
    let mut worker = Worker::start(history, store, seed, round, Task::Write);
    if rng.chance(10) {
        // Any time: while it starts, opens the store, or reads it.
        std::thread::sleep(Duration::from_micros(rng.below(20_000)));
    } else {
        worker.wait_for(rng.below(300));
    }
    if rng.chance(25) {
        // First only the process dies. What the next one finds, it makes durable by opening.
        let (history, _) = worker.kill();
        worker = Worker::start(history, store, seed, round, Task::Open);
        worker.wait_until_ready();
    }
    let before = worker.flushed();
    disk.cut_power();
    let (history, _) = worker.kill();
    disk.restore_power();
    (history, before)
}

/// The store is right, also when it is opened once more.
fn check_twice(history: &History, dir: &Path, bounds: &Bounds, rng: &mut Rng) -> Found {
    let store = Store::open(dir, opening_options(rng)).expect("opens after a power cut");
    let found = history.check(&store, bounds);
    store.close().expect("the log is applied");
    let store = Store::open(dir, opening_options(rng)).expect("opens again");
    let again = history.check(&store, bounds);
    assert_eq!(found.states, again.states, "opened twice");
    found
}

/// Images of the block device while the store is in use, each of one moment
/// (see [`Disk::snapshot`]): mounting one is a power-on after a cut at that moment.
fn copy_again_and_again(name: &str, fs: Fs, dir: &Path) {
    let (seed, rounds) = (common::seed(name), common::rounds(15));
    let mut rng = Rng::new(seed, u64::MAX);
    let outer = Disk::make(Fs::Xfs, dir, "outer", 2048);
    let disk = Disk::make(fs, outer.at(), "disk", 384);
    let store = disk.at().join("store");
    let copy = dir.join("copy");
    let (mut lost, mut spared, mut round) = (0, 0, 0);
    while round < rounds {
        common::new_store(&store, &mut rng);
        let mut worker = Worker::start(History::new(seed), &store, seed, round, Task::Write);
        for _ in 0..ROUNDS_PER_STORE.min(rounds - round) {
            round += 1;
            worker.wait_for(worker.told() + rng.below(300));
            worker.ping();
            let before = worker.flushed();
            let image = disk.snapshot(&copy);
            worker.ping();
            let bounds = before.until(&worker.flushed());
            // So that its load does not slow down what follows.
            worker.pause();
            image.power_on();
            let found = check_twice(&worker.history(), &copy.join("store"), &bounds, &mut rng);
            (lost, spared) = (lost + found.lost, spared + found.spared);
            image.discard();
            worker.resume();
        }
        let history = worker.quit();
        let bounds = history.acknowledged();
        check_twice(&history, &store, &bounds, &mut rng);
    }
    println!("{name}: {rounds} images; not flushed: {spared} writes there, {lost} not");
    assert!(rounds < 10 || lost > 0, "no image was taken under load");
}
