//! I3, I5, I6, I9 across crashes, in random histories: after each power cut the store is as it was
//! after one of the changes since the last flush, no older, and wholly; after the death of the
//! process alone nothing is lost.
//!
//! A history is a few lives of a store on one medium. In a life several writers change it, between
//! and within flushes and checkpoints; some changes of the medium fail. It ends by a power cut at
//! any change of the medium, also while the store is opened or checkpoints, or by a kill.
//! `SEED=n HISTORIES=1` replays one; with `TRACE=1` and `--nocapture` it tells each change of the
//! medium.
//!
//! # What these tests can see
//!
//! To see that they can fail, break one line of the store, then run
//! `HISTORIES=6000 cargo test -p sheepdog-store --lib crash` and, for what is marked (b), the tests
//! `damage`. The store was broken in these ways, each of which was noticed:
//!
//! * `checkpoint::run` does not sync the log first; `checkpoint::commit` does not sync `data`,
//!   `sums` or `index`, or writes the mark before these; `write_mark` does not sync.
//! * A checkpoint writes the index record, or the table of checksums, that counts; does not erase
//!   what an interrupted one left; releases the log before the mark is durable; takes the log's end
//!   for the mark when it ends, not when it begins; forgets the changes of one that failed.
//! * A freed slab is used again before the mark that frees it.
//! * `Ring::sync` leaves out a segment; opening does not sync the log that it replayed.
//! * Replay does not compare incarnations, or LSNs; does not verify checksums of data, or of
//!   headers; incarnations do not grow; the mark keeps saying that the log is empty.
//! * Index records of an uncommitted checkpoint count.
//! * A torn tail is not told from damage (b).
//! * `prove` does nothing, or does not sync its note; flushes or opening do not sync what was written
//!   straight to slabs; `is_whole` takes unproven direct records as they are, or compares proven ones.
//! * `prior_end` does not count; writes go straight to slabs over what is committed or waits there.
//! * A dropped slab is free at once, or before the commit; one that a merge needs is punched before.
//! * `slab_committed` is not called; a write publishes the slab that it looked up before its append.
//! * A failed sync of slabs in a checkpoint does not fail the store, or a flush may run before that
//!   is known; a merge does not wait for a checkpoint that applies the lower layer (by the tests
//!   below, not by histories).
//!
//! Not noticed, since nothing depends on them as long as sectors are not torn: which of two good
//! marks counts while they differ, and a sync between writing the two.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use sheepdog_types::LayerKey;

use super::sim::{Fault, PAGE, SECTOR, SimMedium, random_fate};
use super::support::{
    Block, History, LARGE_BLOCKS, Model, ModelLayer, Op, Rng, blocks_of, check_equal, create_sim,
    has_room, in_parallel, key, large, log_range, observe, open_sim, seed, setting, small,
    version_in,
};
use crate::engine::Engine;
use crate::error::{OpenError, WriteError};
use crate::{Applied, Payload};

/// Blocks that histories use.
const SPAN: u16 = 12;

struct World {
    medium: SimMedium,
    rng: Rng,
    history: Arc<Mutex<History>>,
    /// What the medium writes in one piece.
    unit: usize,
    /// Also with writes of [`LARGE_BLOCKS`].
    large: bool,
    /// Writes of so many blocks go straight to the slab.
    direct_blocks: usize,
}

/// A change that the state of the store allows.
fn random_op(rng: &mut Rng, now: &Model, large: bool) -> Op {
    let op = Op::random(rng, now, SPAN);
    if !large || !rng.chance(20) {
        return op;
    }
    let large_first = rng.below(u64::from(SPAN)) as u16 * 4;
    let mut tags = (0..LARGE_BLOCKS + rng.below(9) as u16).map(|_| 1 + rng.next() / 2);
    match op {
        Op::Write { key, version, first, .. } => {
            Op::Write { key, version, first: first * 4, tags: tags.collect() }
        }
        Op::Install { key, layer } => {
            let blocks = (0..SPAN).zip(tags.by_ref().map(Block::Data)).collect();
            Op::Install { key, layer: ModelLayer { blocks, ..layer } }
        }
        Op::Patch { key, mut layer, .. } => {
            // With the up to ten that it has, one record of these still fits into a segment.
            let tags = tags.take(usize::from(LARGE_BLOCKS));
            layer.blocks.extend((large_first..).zip(tags.map(Block::Data)));
            Op::Patch { key, layer, again: Vec::new() }
        }
        other => other,
    }
}

/// Whether it would wait for the checkpoint in whose midst this is.
fn waits_for_checkpoint(engine: &Engine, op: &Op) -> bool {
    let Op::Merge { key, lower } = op else { return false };
    if engine.checkpointer.try_lock().is_ok() {
        return false;
    }
    let generation = engine.log.lock().unwrap().generation;
    let shard = engine.table.shard_of(key.object);
    let lower = shard.get(LayerKey { layer: *lower, ..*key });
    lower.is_some_and(|layer| layer.has_changes_before(generation))
}

/// Makes a random change; false if the store takes no more.
fn change(engine: &Engine, history: &Mutex<History>, rng: &mut Rng, large: bool) -> bool {
    let mut history = history.lock().unwrap();
    let op = random_op(rng, history.now(), large);
    if waits_for_checkpoint(engine, &op) {
        return true;
    }
    match op.apply_to_store(engine, history.now()) {
        Ok(()) => history.push(op),
        Err(WriteError::NoSpace) => {}
        Err(WriteError::Failed(_)) => {
            // Of what was refused since the first failure nothing was tried.
            if !history.is_doubtful() {
                history.push_doubtful(op);
            }
            return false;
        }
        Err(error) => panic!("{op:?}: {error}"),
    }
    true
}

/// Sends a write again, and one that does not follow: neither may change anything.
fn repeat(engine: &Engine, history: &Mutex<History>, rng: &mut Rng) {
    let history = history.lock().unwrap();
    let key = key(1 + rng.below(2), rng.below(4) as u32, rng.below(3) as u32);
    let now = version_in(history.now(), key);
    let (bytes, crcs) = blocks_of(&[rng.next()]);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    if now.seq > 1 {
        let old = |back| super::support::version(now.writer.0, now.seq - back);
        assert_eq!(engine.write(key, old(1), now, 3, payload), Ok(Applied::Already));
    }
    let ahead = super::support::version(now.writer.0 + 1, now.seq + 1);
    let gap = engine.write(key, ahead, ahead.next(ahead.writer), 3, payload);
    assert_eq!(gap, Err(WriteError::Behind { have: now }));
}

fn flush(engine: &Engine, history: &Mutex<History>) {
    if engine.syncing.try_lock().is_err() {
        // In the midst of a sync of the same thread.
        return;
    }
    let direct = || engine.log.lock().unwrap().direct_to > engine.durable.load(SeqCst);
    if engine.slabs_syncing.try_lock().is_err() && direct() {
        // It would wait for the same sync.
        return;
    }
    let count = history.lock().unwrap().count();
    if engine.sync_log().is_ok() {
        history.lock().unwrap().durable_to(count);
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let medium = SimMedium::default();
        let large_store = rng.below(100) < 3;
        create_sim(&medium, &if large_store { large() } else { small() }).unwrap();
        let unit = if rng.chance(50) { SECTOR } else { PAGE };
        let direct_blocks = [1, 2, 4, crate::engine::DIRECT_BLOCKS][rng.below(4) as usize];
        Self { medium, rng, history: Arc::default(), unit, large: large_store, direct_blocks }
    }

    fn open(&self) -> Result<Engine, OpenError> {
        let mut engine = open_sim(&self.medium)?;
        engine.direct_blocks = self.direct_blocks;
        Ok(engine)
    }

    /// A checkpoint in the midst of which others write and flush.
    fn checkpoint(&mut self, engine: &Arc<Engine>) {
        let count = self.history.lock().unwrap().count();
        if self.rng.chance(60) {
            let (writer, history) = (engine.clone(), self.history.clone());
            let rng = Mutex::new(Rng(self.rng.next()));
            let (percent, large) = (10 + self.rng.below(60), self.large);
            self.medium.set_hook(Some(Arc::new(move |file: &str| {
                let Ok(mut rng) = rng.try_lock() else { return };
                if file.starts_with("log/") || !rng.chance(percent) {
                    return;
                }
                if rng.chance(15) {
                    flush(&writer, &history);
                } else if has_room(&writer, if large { 2 << 20 } else { 60 << 10 }) {
                    change(&writer, &history, &mut rng, large);
                }
            })));
        }
        let result = engine.checkpoint();
        self.medium.set_hook(None);
        if result.is_ok() {
            self.history.lock().unwrap().durable_to(count);
        }
    }

    /// Random changes, flushes and checkpoints until the power or the store goes.
    fn live(&mut self, engine: &Arc<Engine>) {
        let steps = 3 + self.rng.below(25);
        for _ in 0..steps {
            match self.rng.below(100) {
                0..15 => flush(engine, &self.history),
                15..23 => self.checkpoint(engine),
                23..25 => check_equal(engine, self.history.lock().unwrap().now()).unwrap(),
                25..28 if self.medium.has_power() => {
                    repeat(engine, &self.history, &mut self.rng);
                }
                _ => {
                    if !change(engine, &self.history, &mut self.rng, self.large) {
                        break;
                    }
                }
            }
            if !self.medium.has_power() {
                break;
            }
        }
        // Reads go on, whatever failed, and know nothing of what was refused.
        if self.rng.chance(20) {
            check_equal(engine, self.history.lock().unwrap().now()).unwrap();
        }
        if self.medium.has_power() && self.rng.chance(15) && engine.shut_down().is_ok() {
            self.history.lock().unwrap().all_durable();
        }
    }

    fn set_trouble(&mut self) {
        let rng = &mut self.rng;
        if rng.chance(80) {
            self.medium.set_fuse(rng.below(90));
        }
        if rng.chance(25) {
            let prefix = ["log/", "data", "sums", "index", "superblock", ""][rng.below(6) as usize];
            let errno = if rng.chance(50) { Errno::IO } else { Errno::NOSPC };
            let count = [1, 2, 5, u64::MAX][rng.below(4) as usize];
            self.medium.set_faults(Some(Fault { prefix, errno, after: rng.below(30), count }));
        }
    }

    fn cut_power(&mut self) {
        let keep = [0, 20, 50, 80, 95, 100][self.rng.below(6) as usize];
        self.medium.lose(self.unit, &mut random_fate(&mut self.rng, keep));
    }

    /// Opens after a power cut; sometimes the power goes again meanwhile, also twice.
    fn reopen(&mut self) -> Engine {
        while self.rng.chance(30) {
            self.medium.set_fuse(self.rng.below(8));
            drop(self.open());
            self.cut_power();
        }
        self.open().unwrap()
    }

    /// Ends a life and begins the next.
    fn crash(&mut self, engine: Arc<Engine>) -> Arc<Engine> {
        drop(engine);
        // What a failed sync left behind looks durable to the next process. That a store cannot
        // see; the documented answer is to replace the disk.
        let misleading = self.medium.has_dead_pages("log/") || self.medium.has_dead_pages("data");
        let killed = self.medium.has_power() && !misleading && self.rng.chance(30);
        let engine = if killed {
            self.medium.kill();
            self.open().unwrap()
        } else {
            self.cut_power();
            self.reopen()
        };
        let found = observe(&engine).unwrap();
        let mut history = self.history.lock().unwrap();
        let fits = if killed { history.recover_all(&found) } else { history.recover(&found) };
        fits.unwrap();
        drop(history);
        if self.rng.chance(50) {
            return Arc::new(engine);
        }
        // Once more: opening made durable what it found.
        drop(engine);
        self.cut_power();
        let engine = self.reopen();
        check_equal(&engine, &found).unwrap();
        Arc::new(engine)
    }
}

fn one_history(seed: u64) {
    let mut world = World::new(seed);
    let mut engine = Arc::new(world.open().unwrap());
    for _ in 0..1 + world.rng.below(3) {
        world.set_trouble();
        world.live(&engine);
        engine = world.crash(engine);
    }
}

#[test]
fn i3_i5_i6_i9_power_cuts_leave_a_state_since_the_last_flush() {
    let first = seed();
    let count = setting("HISTORIES", 100_000);
    in_parallel(
        count,
        |number| one_history(first.wrapping_add(number)),
        |number| println!("failed with SEED={} HISTORIES=1", first.wrapping_add(number)),
    );
    println!("{count} histories");
}

/// A power cut keeps the second of two un-flushed records and loses the first, so the second is
/// lost, too. The next life writes a record in the place of the first, applies it and lets go of
/// the log up to its end: just where the second still lies. It must not come back to life.
#[test]
fn i5_i9_what_a_crash_undid_is_not_replayed_after_a_later_checkpoint() {
    let write = |index, tag| Op::Write {
        key: key(1, index, 0),
        version: super::support::version(1, 1),
        first: 0,
        tags: vec![tag],
    };
    let medium = SimMedium::default();
    create_sim(&medium, &small()).unwrap();
    let engine = open_sim(&medium).unwrap();
    write(0, 1).apply_to_store(&engine, &Model::new()).unwrap();
    write(1, 2).apply_to_store(&engine, &Model::new()).unwrap();
    let second = medium.disk().unsynced()[1].number;
    medium.lose(SECTOR, &mut |unit| {
        unit.numbers.partition_point(|number| *number <= second)
            * usize::from(unit.numbers.contains(&second))
    });
    let engine = open_sim(&medium).unwrap();
    let mut model = Model::new();
    check_equal(&engine, &model).unwrap();
    write(0, 3).apply_to_store(&engine, &model).unwrap();
    write(0, 3).apply_to_model(&mut model);
    engine.checkpoint().unwrap();
    medium.lose(SECTOR, &mut |_| 0);
    check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
}

/// The changes of the lower layer are on their way from the log to its slab: what the upper one
/// takes over must not be read from the log once that is released.
#[test]
fn i5_a_merge_waits_for_the_checkpoint_that_applies_the_lower_layer() {
    let medium = SimMedium::default();
    create_sim(&medium, &small()).unwrap();
    let engine = Arc::new(open_sim(&medium).unwrap());
    let mut model = Model::new();
    let merge = Op::Merge { key: key(1, 0, 1), lower: sheepdog_types::Layer(0) };
    for (layer, first) in [(0, 3), (1, 5)] {
        let version = super::support::version(1, 1);
        let op = Op::Write { key: key(1, 0, layer), version, first, tags: vec![11, 12, 13] };
        op.apply_to_store(&engine, &model).unwrap();
        op.apply_to_model(&mut model);
    }
    let (to_here, merged) = std::sync::mpsc::channel();
    let merged = Mutex::new(Some(merged));
    let (merger, before) = (engine.clone(), model.clone());
    let started = merge.clone();
    medium.set_hook(Some(Arc::new(move |_: &str| {
        // Once, at the first thing that the checkpoint does: it makes the log durable.
        let Some(merged) = merged.lock().unwrap().take() else { return };
        let (merger, merge) = (merger.clone(), started.clone());
        let (before, to_here) = (before.clone(), to_here.clone());
        std::thread::spawn(move || to_here.send(merge.apply_to_store(&merger, &before)));
        // A store that does not wait has ample time to merge; one that does makes this wait.
        let early = merged.recv_timeout(std::time::Duration::from_millis(300));
        assert!(early.is_err(), "it did not wait: {early:?}");
    })));
    engine.checkpoint().unwrap();
    medium.set_hook(None);
    // That it is done shows in the layer that goes.
    while engine.stat(key(1, 0, 0)).is_some() {
        std::thread::yield_now();
    }
    merge.apply_to_model(&mut model);
    let released = log_range(&engine).0;
    medium.tamper("log/0000", |flip, _| (0..released).for_each(|at| flip(at, 0xFF)));
    check_equal(&engine, &model).unwrap();
}

/// A write is in the midst of its append while a checkpoint commits the layer's other index record.
#[test]
fn i5_a_write_during_a_commit_does_not_bring_back_the_record_before() {
    use std::sync::mpsc::channel;
    let medium = SimMedium::default();
    create_sim(&medium, &small()).unwrap();
    let engine = Arc::new(open_sim(&medium).unwrap());
    let mut model = Model::new();
    let key = key(1, 0, 0);
    let write = |seq| Op::Write {
        key,
        version: super::support::version(1, seq),
        first: 0,
        tags: vec![seq],
    };
    let slab = move |engine: &Engine| {
        let shard = engine.table.shard_of(key.object);
        shard.get(key).and_then(|layer| layer.base.as_ref().map(|base| base.slab))
    };
    for seq in 1..=2 {
        write(seq).apply_to_store(&engine, &model).unwrap();
        write(seq).apply_to_model(&mut model);
        if seq == 1 {
            engine.checkpoint().unwrap();
        }
    }
    let old = slab(&engine);
    let begin = Mutex::new(Some((engine.clone(), model.clone(), write(3))));
    let (to_checkpoint, in_append) = channel();
    let in_append = Mutex::new(in_append);
    let (watched, began) = (engine.clone(), AtomicBool::new(false));
    medium.set_hook(Some(Arc::new(move |file: &str| {
        if file == "superblock" {
            let Some((engine, model, op)) = begin.lock().unwrap().take() else { return };
            began.store(true, SeqCst);
            std::thread::spawn(move || op.apply_to_store(&engine, &model).unwrap());
            in_append.lock().unwrap().recv().unwrap();
        } else if file.starts_with("log/") && began.load(SeqCst) {
            to_checkpoint.send(()).unwrap();
            while slab(&watched) == old {
                std::thread::yield_now();
            }
        }
    })));
    engine.checkpoint().unwrap();
    write(3).apply_to_model(&mut model);
    while engine.stat(key).is_none_or(|stat| stat.version.seq < 3) {
        std::thread::yield_now();
    }
    medium.set_hook(None);
    engine.checkpoint().unwrap();
    drop(engine);
    check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
}

/// The kernel tells of bytes that it lost once: to the checkpoint. A flush of what went straight to
/// slabs, which syncs the same file meanwhile or later, must not be told that all is durable.
#[test]
fn i3_what_a_checkpoint_failed_to_sync_is_not_flushed() {
    let medium = SimMedium::default();
    create_sim(&medium, &small()).unwrap();
    let mut engine = open_sim(&medium).unwrap();
    engine.direct_blocks = 1;
    let engine = Arc::new(engine);
    let model = Model::new();
    let write = |index, tag| Op::Write {
        key: key(1, index, 0),
        version: super::support::version(1, 1),
        first: 0,
        tags: vec![tag],
    };
    write(0, 1).apply_to_store(&engine, &model).unwrap();
    let (to_here, flushed) = std::sync::mpsc::channel();
    let flushed = Arc::new(Mutex::new(flushed));
    let (steps, hooked, outcome) = (Mutex::new(0), medium.clone(), flushed.clone());
    let (other, second) = (engine.clone(), write(1, 2));
    medium.set_hook(Some(Arc::new(move |file: &str| {
        let Ok(mut step) = steps.try_lock() else { return };
        match (*step, file) {
            // Of the one layer all is written, now the slabs are to be synced.
            (0, "index") => {
                second.apply_to_store(&other, &Model::new()).unwrap();
                let fault = Fault { prefix: "data", errno: Errno::IO, after: 0, count: 1 };
                hooked.set_faults(Some(fault));
                *step = 1;
            }
            // That of `data` has failed.
            (1, "sums") => {
                *step = 2;
                let (other, to_here) = (other.clone(), to_here.clone());
                std::thread::spawn(move || to_here.send(other.sync_log()));
                drop(step);
                let limit = std::time::Duration::from_millis(300);
                let early = outcome.lock().unwrap().recv_timeout(limit);
                assert!(!matches!(early, Ok(Ok(()))), "a flush of lost bytes");
            }
            _ => {}
        }
    })));
    engine.checkpoint().unwrap_err();
    medium.set_hook(None);
    flushed.lock().unwrap().recv().unwrap().unwrap_err();
    engine.sync_log().unwrap_err();
}
