//! A process that writes is killed with SIGKILL; every write that it had acknowledged is there.

mod common;

use std::path::Path;
use std::time::Duration;

use common::history::{Found, History};
use common::lab::{Disk, Fs};
use common::worker::{Task, Worker};
use common::{Rng, lab, opening_options};
use sheepdog_store::Store;

/// A new store is made after so many rounds.
const ROUNDS_PER_STORE: u64 = 25;

/// Not a test: the process that is killed.
#[test]
fn worker() {
    common::worker::run_if_asked();
}

#[test]
fn i3_acknowledged_writes_survive_sigkill() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    kill_again_and_again("i3_acknowledged_writes_survive_sigkill", dir.path(), 20);
}

#[test]
fn i3_acknowledged_writes_survive_sigkill_on_ext4() {
    on(Fs::Ext4, "i3_acknowledged_writes_survive_sigkill_on_ext4");
}

#[test]
fn i3_acknowledged_writes_survive_sigkill_on_xfs() {
    on(Fs::Xfs, "i3_acknowledged_writes_survive_sigkill_on_xfs");
}

fn on(fs: Fs, name: &str) {
    lab::run(name, &[fs], |dir| {
        let disk = Disk::make(fs, dir, "disk", 512);
        kill_again_and_again(name, disk.at(), 80);
    });
}

fn kill_again_and_again(name: &str, dir: &Path, rounds: u64) {
    let (seed, rounds) = (common::seed(name), common::rounds(rounds));
    let mut rng = Rng::new(seed, u64::MAX);
    let dir = dir.join("store");
    let mut history = History::new(seed);
    let (mut lost, mut spared) = (0, 0);
    for round in 0..rounds {
        if round % ROUNDS_PER_STORE == 0 {
            common::new_store(&dir, &mut rng);
            history = History::new(seed);
        }
        let worker = Worker::start(history, &dir, seed, round, Task::Write);
        if rng.chance(10) {
            // Any time: while it starts, opens the store, or reads it.
            std::thread::sleep(Duration::from_micros(rng.below(20_000)));
        } else {
            let most = if rng.chance(10) { 400 } else { 100 };
            worker.wait_for(rng.below(most));
        }
        let stopped;
        (history, stopped) = worker.kill();
        assert!(!stopped, "the store failed the worker; see above");
        if rng.chance(20) {
            // A second one dies when it has just replayed the log, or while it does.
            let worker = Worker::start(history, &dir, seed, round, Task::Open);
            if rng.chance(50) {
                worker.wait_until_ready();
            } else {
                std::thread::sleep(Duration::from_micros(rng.below(15_000)));
            }
            (history, _) = worker.kill();
        }
        let found = check_twice(&history, &dir, &mut rng);
        (lost, spared) = (lost + found.lost, spared + found.spared);
        history.settle(&found);
    }
    println!("{name}: {rounds} rounds; in flight at the end: {spared} done, {lost} not");
}

/// What was acknowledged is there, also when the store is opened once more.
fn check_twice(history: &History, dir: &Path, rng: &mut Rng) -> Found {
    let bounds = history.acknowledged();
    let _turn = common::no_store_at_a_start();
    let store = Store::open(dir, opening_options(rng)).expect("opens after SIGKILL");
    let found = history.check(&store, &bounds);
    store.close().expect("the log is applied");
    let store = Store::open(dir, opening_options(rng)).expect("opens again");
    let again = history.check(&store, &bounds);
    assert_eq!(found.states, again.states, "opened twice");
    found
}
