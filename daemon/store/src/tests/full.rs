//! I10, I11: a full log waits or says so, a full or failing disk refuses changes and goes on
//! reading, and comes back.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use rustix::io::Errno;

use super::sim::{Fault, SimMedium};
use super::support::{Block, Model, ModelLayer, Op, check_equal, key, new_sim, open_sim, version};
use crate::checkpoint::GROW_SLABS;
use crate::engine::Engine;
use crate::error::{ReadError, WriteError};
use crate::medium::{Medium, VFile};

fn write(index: u32, seq: u64, tags: &[u64]) -> Op {
    let tags = tags.to_vec();
    Op::Write { key: key(1, index, 0), version: version(1, seq), first: 0, tags }
}

fn apply(engine: &Engine, model: &mut Model, op: &Op) -> Result<(), WriteError> {
    op.apply_to_store(engine, model)?;
    op.apply_to_model(model);
    Ok(())
}

#[test]
fn i11_a_full_data_file_refuses_writes_keeps_reading_and_recovers() {
    let medium = SimMedium::default();
    let mut engine = new_sim(&medium);
    let mut model = Model::new();
    apply(&engine, &mut model, &write(0, 1, &[1, 2, 3])).unwrap();
    engine.checkpoint().unwrap();
    medium.set_fault(Some(("data", Errno::NOSPC)));
    let mut seq = 1;
    let refusal = loop {
        seq += 1;
        if let Err(error) = apply(&engine, &mut model, &write(0, seq, &[seq, seq, seq])) {
            break error;
        }
        assert!(seq < 100, "the log is bounded");
    };
    assert_eq!(refusal, WriteError::NoSpace);
    check_equal(&engine, &model).unwrap();
    // New blocks are refused too, and a restart changes nothing.
    let new = write(1, 1, &[7]);
    assert_eq!(apply(&engine, &mut model, &new), Err(WriteError::NoSpace));
    engine.sync_log().unwrap();
    drop(engine);
    engine = open_sim(&medium).unwrap();
    check_equal(&engine, &model).unwrap();
    // A deletion still has room in the log, and gives space.
    apply(&engine, &mut model, &Op::Delete { key: key(1, 0, 0) }).unwrap();
    medium.set_fault(None);
    engine.checkpoint().unwrap();
    apply(&engine, &mut model, &new).unwrap();
    check_equal(&engine, &model).unwrap();
    drop(engine);
    check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
}

fn discard(index: u32) -> Op {
    let (key, version) = (key(1, index, 0), version(1, 1));
    Op::Clear { key, version, first: 3, count: 5, absent: false, release: true }
}

#[test]
fn i11_what_is_discarded_of_a_new_layer_needs_no_space() {
    // Which file cannot grow, when the tables have room for as many layers as there are.
    for full in ["index", "sums"] {
        let medium = SimMedium::default();
        let mut engine = new_sim(&medium);
        let mut model = Model::new();
        for index in 0..GROW_SLABS {
            apply(&engine, &mut model, &write(index, 1, &[7])).unwrap();
        }
        engine.checkpoint().unwrap();
        medium.set_fault(Some((full, Errno::NOSPC)));
        let new = write(GROW_SLABS, 1, &[7]);
        assert_eq!(apply(&engine, &mut model, &new), Err(WriteError::NoSpace));
        for index in GROW_SLABS..GROW_SLABS + 3 {
            apply(&engine, &mut model, &discard(index)).unwrap();
        }
        // A version alone needs none either, of an old layer or a new one.
        for (index, seq) in [(0, 2), (GROW_SLABS, 2), (GROW_SLABS + 5, 1)] {
            let (key, version) = (key(1, index, 0), version(1, seq));
            let (first, count, absent, release) = (0, 0, false, false);
            let touch = Op::Clear { key, version, first, count, absent, release };
            apply(&engine, &mut model, &touch).unwrap();
        }
        apply(&engine, &mut model, &Op::Delete { key: key(1, GROW_SLABS + 1, 0) }).unwrap();
        check_equal(&engine, &model).unwrap();
        // The log keeps it until there is space.
        let error = engine.checkpoint().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
        check_equal(&engine, &model).unwrap();
        engine.shut_down().unwrap_err();
        drop(engine);
        engine = open_sim(&medium).unwrap();
        check_equal(&engine, &model).unwrap();
        apply(&engine, &mut model, &discard(GROW_SLABS + 3)).unwrap();
        // A slab without room is for discards only.
        assert_eq!(
            apply(&engine, &mut model, &write(GROW_SLABS + 4, 1, &[7])),
            Err(WriteError::NoSpace)
        );
        medium.set_fault(None);
        engine.checkpoint().unwrap();
        apply(&engine, &mut model, &write(GROW_SLABS, 3, &[8])).unwrap();
        engine.shut_down().unwrap();
        drop(engine);
        check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
    }
}

#[test]
fn i11_a_full_disk_that_lost_the_length_of_its_tables_can_be_opened() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let mut model = Model::new();
    apply(&engine, &mut model, &write(0, 1, &[1, 2])).unwrap();
    engine.sync_log().unwrap();
    drop(engine);
    medium.lose(512, &mut |_| 0);
    assert_eq!(medium.file_len("index"), 0);
    medium.set_fault(Some(("index", Errno::NOSPC)));
    let engine = open_sim(&medium).unwrap();
    check_equal(&engine, &model).unwrap();
    apply(&engine, &mut model, &discard(1)).unwrap();
    apply(&engine, &mut model, &Op::Delete { key: key(1, 0, 0) }).unwrap();
    engine.checkpoint().unwrap_err();
    check_equal(&engine, &model).unwrap();
    medium.set_fault(None);
    engine.shut_down().unwrap();
    drop(engine);
    check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
}

#[test]
fn i11_leftovers_of_tables_that_were_lost_need_no_space() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let mut model = Model::new();
    apply(&engine, &mut model, &write(0, 1, &[1, 2])).unwrap();
    // It is written, but its sync fails.
    medium.set_faults(Some(Fault { prefix: "sums", errno: Errno::IO, after: 1, count: 1 }));
    engine.checkpoint().unwrap_err();
    drop(engine);
    medium.tamper_lens(&[("sums", 0)]);
    let engine = open_sim(&medium).unwrap();
    check_equal(&engine, &model).unwrap();
    apply(&engine, &mut model, &Op::Delete { key: key(1, 0, 0) }).unwrap();
    engine.checkpoint().unwrap();
    assert_eq!(medium.file_len("sums"), 0, "space that a full disk does not have");
    drop(engine);
    check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
}

#[test]
fn i11_an_interrupted_checkpoint_leaves_nothing_that_a_later_one_trips_over() {
    let medium = SimMedium::default();
    let mut engine = new_sim(&medium);
    let mut model = Model::new();
    for failing in ["data", "sums", "index"] {
        for index in 0..3 {
            let at = model.get(&key(1, index, 0)).map_or(0, |layer| layer.version.seq);
            apply(&engine, &mut model, &write(index, at + 1, &[at + 10, 5])).unwrap();
        }
        medium.set_fault(Some((failing, Errno::IO)));
        engine.checkpoint().unwrap_err();
        check_equal(&engine, &model).unwrap();
        medium.set_fault(None);
        // The layer that had a new slab in the failed checkpoint is not in the next one.
        apply(&engine, &mut model, &Op::Delete { key: key(1, 2, 0) }).unwrap();
        engine.checkpoint().unwrap();
        drop(engine);
        engine = open_sim(&medium).unwrap();
        check_equal(&engine, &model).unwrap();
    }
}

#[test]
fn i11_a_log_that_fails_takes_no_more_writes_and_reads_go_on() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let mut model = Model::new();
    apply(&engine, &mut model, &write(0, 1, &[1, 2, 3])).unwrap();
    engine.sync_log().unwrap();
    medium.set_fault(Some(("log/", Errno::IO)));
    let error = write(0, 2, &[4]).apply_to_store(&engine, &model).unwrap_err();
    assert!(matches!(error, WriteError::Failed(_)), "{error}");
    // The disk answers again, but what it lost meanwhile is not known.
    medium.set_fault(None);
    let error = write(0, 2, &[4]).apply_to_store(&engine, &model).unwrap_err();
    assert!(matches!(error, WriteError::Failed(_)), "{error}");
    check_equal(&engine, &model).unwrap();
}

#[test]
fn a_failed_sync_is_told_and_never_tried_again() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let mut model = Model::new();
    apply(&engine, &mut model, &write(0, 1, &[1])).unwrap();
    medium.set_fault(Some(("log/", Errno::IO)));
    engine.sync_log().unwrap_err();
    medium.set_fault(None);
    let syncs = medium.syncs();
    engine.sync_log().unwrap_err();
    engine.checkpoint().unwrap_err();
    assert_eq!(medium.syncs(), syncs);
    check_equal(&engine, &model).unwrap();
}

#[test]
fn i11_a_mark_that_may_count_is_not_undone_by_later_checkpoints() {
    // The mark's two copies are written and synced one after the other: four changes.
    for after in 0..4 {
        let medium = SimMedium::default();
        let engine = new_sim(&medium);
        let mut model = Model::new();
        apply(&engine, &mut model, &write(0, 1, &[1, 2, 3])).unwrap();
        engine.checkpoint().unwrap();
        apply(&engine, &mut model, &write(0, 2, &[4])).unwrap();
        let fault = Fault { prefix: "superblock", errno: Errno::IO, after, count: 1 };
        medium.set_faults(Some(fault));
        engine.checkpoint().unwrap_err();
        // The medium works again; the store must know that it does not know.
        engine.checkpoint().unwrap_err();
        engine.shut_down().unwrap_err();
        check_equal(&engine, &model).unwrap();
        drop(engine);
        let killed = SimMedium::from_disk(medium.disk());
        check_equal(&open_sim(&killed).unwrap(), &model).unwrap();
        medium.lose(512, &mut |_| 0);
        check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
    }
}

/// What the file system has left is told right also when much went straight to slabs, or is on its
/// way to them, and no checkpoint has counted it.
#[test]
fn i11_space_is_counted_once() {
    const TOTAL: u64 = 64 << 20;
    let medium = SimMedium::default();
    medium.offer(TOTAL);
    let mut engine = Arc::new(new_sim(&medium));
    let mut model = Model::new();
    let capacity = TOTAL - (1 << 20); // less the reserve
    let whole = |engine: &Engine| assert_eq!(engine.usage().capacity, capacity);
    let install = |index: u32, blocks: u16| {
        let blocks = (0..blocks).map(|block| (block, Block::Data(u64::from(block) + 1))).collect();
        Op::Install { key: key(1, index, 0), layer: ModelLayer { version: version(1, 1), blocks } }
    };
    for index in 0..15 {
        whole(&engine);
        apply(&engine, &mut model, &install(index, 1024)).unwrap();
    }
    apply(&engine, &mut model, &write(15, 1, &[7; 4])).unwrap();
    whole(&engine);
    engine.sync_log().unwrap();
    drop(engine);
    engine = Arc::new(open_sim(&medium).unwrap());
    whole(&engine);
    let (weak, looks) = (Arc::downgrade(&engine), Arc::new(AtomicUsize::new(0)));
    let looked = Arc::clone(&looks);
    medium.set_hook(Some(Arc::new(move |_: &str| {
        if let Some(engine) = weak.upgrade() {
            assert_eq!(engine.usage().capacity, capacity);
            looked.fetch_add(1, SeqCst);
        }
    })));
    engine.checkpoint().unwrap();
    medium.set_hook(None);
    assert!(looks.load(SeqCst) > 15);
    whole(&engine);
    // Full to the last block.
    let left = (capacity - engine.usage().used) / 4096;
    let too_much = install(16, u16::try_from(left).unwrap() + 1);
    assert_eq!(apply(&engine, &mut model, &too_much), Err(WriteError::NoSpace));
    apply(&engine, &mut model, &install(16, u16::try_from(left).unwrap())).unwrap();
    assert_eq!(engine.usage().used, capacity);
    assert_eq!(apply(&engine, &mut model, &write(17, 1, &[1])), Err(WriteError::NoSpace));
    // Somebody else takes space, and gives it back.
    apply(&engine, &mut model, &Op::Delete { key: key(1, 0, 0) }).unwrap();
    engine.checkpoint().unwrap();
    medium.offer(TOTAL - (4 << 20));
    assert_eq!(engine.usage().capacity, engine.usage().used);
    assert_eq!(apply(&engine, &mut model, &write(17, 1, &[1])), Err(WriteError::NoSpace));
    medium.offer(TOTAL);
    apply(&engine, &mut model, &write(17, 1, &[1])).unwrap();
    check_equal(&engine, &model).unwrap();
}

/// A medium whose file `data` cannot be read in one range.
struct BadSpot {
    inner: SimMedium,
    bad: std::ops::Range<u64>,
}

struct BadFile {
    inner: std::sync::Arc<dyn VFile>,
    bad: std::ops::Range<u64>,
}

impl Medium for BadSpot {
    fn open(&self, name: &str, create: bool) -> std::io::Result<std::sync::Arc<dyn VFile>> {
        let inner = self.inner.open(name, create)?;
        let bad = if name == "data" { self.bad.clone() } else { 0..0 };
        Ok(std::sync::Arc::new(BadFile { inner, bad }))
    }
    fn sync_names(&self) -> std::io::Result<()> {
        self.inner.sync_names()
    }
    fn space(&self) -> std::io::Result<(u64, u64)> {
        self.inner.space()
    }
}

impl VFile for BadFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        if offset < self.bad.end && self.bad.start < offset + buf.len() as u64 {
            return Err(Errno::IO.into());
        }
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> std::io::Result<()> {
        self.inner.write_at(parts, offset)
    }
    fn sync(&self) -> std::io::Result<()> {
        self.inner.sync()
    }
    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }
    fn allocate(&self, len: u64) -> std::io::Result<()> {
        self.inner.allocate(len)
    }
    fn punch(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.inner.punch(offset, len)
    }
}

#[test]
fn i11_a_block_that_cannot_be_read_is_named_and_the_rest_is_served() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let mut model = Model::new();
    apply(&engine, &mut model, &write(0, 1, &[1, 2, 3, 4])).unwrap();
    engine.shut_down().unwrap();
    drop(engine);
    let bad = 2 * 4096 + 512..2 * 4096 + 1024;
    let options = super::support::small();
    let medium = std::sync::Arc::new(BadSpot { inner: medium, bad });
    let engine = crate::open::open(medium, std::path::Path::new("/sim"), options).unwrap();
    let object = key(1, 0, 0).object;
    let layers = [sheepdog_types::Layer(0)];
    let read = |first: u16, count: usize| {
        let (mut buf, mut crcs) = (vec![0; count * 4096], vec![0; count]);
        engine.read(object, &layers, first, &mut buf, &mut crcs).map(|_| buf)
    };
    for (first, count) in [(0, 4), (2, 1), (1, 2)] {
        match read(first, count) {
            Err(ReadError::Io { key: named, block: 2, .. }) => assert_eq!(named, key(1, 0, 0)),
            other => panic!("{other:?}"),
        }
    }
    for (first, tag) in [(0, 1), (1, 2), (3, 4)] {
        assert_eq!(read(first, 1).unwrap(), super::oracle::bytes_of(tag));
    }
    assert_eq!(engine.damage.known(), [(key(1, 0, 0), 2)]);
    // A write is not hindered by it, and heals it in memory; the disk may do so, too.
    let op = write(0, 2, &[5, 6, 7]);
    op.apply_to_store(&engine, &model).unwrap();
    assert_eq!(read(2, 1).unwrap(), super::oracle::bytes_of(7));
    assert_eq!(engine.damage.known(), []);
}
