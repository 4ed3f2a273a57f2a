//! The store with its threads on real files, against a model in memory.

use std::collections::BTreeSet;
use std::time::Duration;

use sheepdog_types::{BLOCK_SIZE, Layer, Version};

use super::support::{Block, IDS, Model, Op, Rng, blocks_of, bytes_of, check_equal, key};
use super::support::{image_of, in_single_blocks, seed, small, version};
use crate::format::ZERO_CRC;
use crate::{
    Applied, BlockRange, BlockState, OpenError, Options, Payload, ReadError, Store, WriteError,
};

const SPAN: u16 = 12;

fn options() -> Options {
    Options { sync_after: Duration::from_millis(5), checkpoint_after: Duration::ZERO, ..small() }
}

/// The model's answer for a block seen through layers, newest first.
fn through(model: &Model, object: u32, chain: &[Layer], block: u16) -> Option<Block> {
    chain.iter().find_map(|layer| model.get(&key(1, object, layer.0))?.blocks.get(&block).copied())
}

fn check_read(store: &Store, model: &Model, rng: &mut Rng) {
    let index = rng.below(4) as u32;
    let mut chain: Vec<_> = [2, 1, 0].map(Layer).into_iter().filter(|_| rng.chance(70)).collect();
    if chain.is_empty() {
        chain.push(Layer(1));
    }
    let first = rng.below(u64::from(SPAN)) as u16;
    let count = 1 + rng.below(20) as usize;
    let (mut buf, mut crcs) = (vec![7; count * BLOCK_SIZE], vec![7; count]);
    let object = key(1, index, 0).object;
    let outcome = store.read(object, &chain, first, &mut buf, &mut crcs).unwrap();
    let range = BlockRange::new(first, count).unwrap();
    let runs = store.block_states(object, &chain, range);
    assert!(runs.windows(2).all(|pair| pair[0].state != pair[1].state));
    let mut absent = 0;
    for (at, block) in (range.first()..range.end()).enumerate() {
        let found = through(model, index, &chain, block);
        let (bytes, crc, state) = match found {
            Some(Block::Data(tag)) => {
                (bytes_of(tag), crc32c::crc32c(&bytes_of(tag)), BlockState::Data)
            }
            Some(Block::Zero) => (vec![0; BLOCK_SIZE], ZERO_CRC, BlockState::Zero),
            None => (vec![0; BLOCK_SIZE], ZERO_CRC, BlockState::Absent),
        };
        absent += u16::from(found.is_none());
        assert_eq!(buf[at * BLOCK_SIZE..][..BLOCK_SIZE], bytes, "block {block}");
        assert_eq!(crcs[at], crc);
        let within = |run: &&crate::BlockRun| (run.range.first()..run.range.end()).contains(&block);
        assert_eq!(runs.iter().find(within).unwrap().state, state);
    }
    let newest = model.get(&key(1, index, chain[0].0)).map_or(Version::NONE, |l| l.version);
    assert_eq!((outcome.version, outcome.absent), (newest, absent));
}

#[test]
fn a_store_answers_as_the_model_does_also_after_restarts() {
    let mut rng = Rng(seed());
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path(), IDS, options()).unwrap();
    let mut model = Model::new();
    for step in 0..1500 {
        let op = Op::random(&mut rng, &model, SPAN);
        op.apply_to_store(&store.engine, &model).unwrap();
        op.apply_to_model(&mut model);
        check_read(&store, &model, &mut rng);
        if rng.chance(3) {
            store.flush_wait().unwrap();
        }
        if step % 300 == 299 {
            check_equal(&store.engine, &model).unwrap();
            if rng.chance(50) {
                store.close().unwrap();
            } else {
                drop(store);
            }
            store = Store::open(dir.path(), options()).unwrap();
            assert_eq!(store.ids(), IDS);
            check_equal(&store.engine, &model).unwrap();
        }
    }
    let mut listed = BTreeSet::new();
    store.list_all(|slot, stats| {
        assert_eq!(store.list(slot), stats);
        listed.extend(stats.iter().map(|stat| stat.key));
    });
    assert_eq!(listed, model.keys().copied().collect());
}

#[test]
fn images_move_layers_between_stores() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = Store::create(a.path(), IDS, options()).unwrap();
    let to = Store::create(b.path(), IDS, options()).unwrap();
    let key = key(1, 0, 0);
    let (bytes, crcs) = blocks_of(&[1, 2, 3]);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    from.write(key, Version::NONE, version(1, 1), 1021, payload).unwrap();
    let mut image = from.image(key).unwrap().unwrap();
    assert_eq!(from.sums(key).unwrap().as_ref(), Some(&image.sums));
    assert!(!to.install(key, Some(version(1, 1)), &image).unwrap(), "another version is there");
    assert!(to.install(key, None, &image).unwrap());
    let copied = to.image(key).unwrap().map(in_single_blocks);
    assert_eq!(copied, Some(in_single_blocks(image.clone())));
    let slot = key.object.slot();
    assert_eq!(from.digest(slot), to.digest(slot));
    image.data[BLOCK_SIZE] ^= 1;
    let bad = to.install(key, Some(version(1, 1)), &image);
    assert_eq!(bad, Err(WriteError::Checksum { block: 1022 }));
    image.data.pop();
    let bad = to.install(key, Some(version(1, 1)), &image);
    assert!(matches!(bad, Err(WriteError::Invalid(_))));
}

#[test]
fn i5_writes_follow_each_other_or_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path(), IDS, options()).unwrap();
    let key = key(1, 0, 0);
    let (bytes, crcs) = blocks_of(&[1]);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    let write = |prev, version| store.write(key, prev, version, 0, payload);
    assert_eq!(write(Version::NONE, version(1, 1)), Ok(Applied::Now));
    assert_eq!(write(Version::NONE, version(1, 1)), Ok(Applied::Already));
    let behind = Err(WriteError::Behind { have: version(1, 1) });
    assert_eq!(write(version(1, 2), version(1, 3)), behind, "a gap");
    assert_eq!(write(Version::NONE, version(2, 1)), behind, "another writer's first");
    assert_eq!(write(version(1, 1), version(2, 2)), Ok(Applied::Now), "a takeover");
    assert!(matches!(write(version(2, 2), version(2, 2)), Err(WriteError::Invalid(_))));
    let wrong = Payload::Data { bytes: &bytes, crcs: &[crcs[0] ^ 1] };
    let refused = store.write(key, version(2, 2), version(2, 3), 9, wrong);
    assert_eq!(refused, Err(WriteError::Checksum { block: 9 }));
    for (first, count) in [(0, 0), (1023, 2), (5000, 1)] {
        let zero = Payload::Zero { count, absent: false, release: true };
        let refused = store.write(key, version(2, 2), version(2, 3), first, zero);
        assert!(matches!(refused, Err(WriteError::Invalid(_))));
    }
    let mut buf = [0; BLOCK_SIZE];
    let bad = store.read(key.object, &[], 0, &mut buf, &mut [0]);
    assert!(matches!(bad, Err(ReadError::Invalid(_))));
    let bad = store.read(key.object, &[Layer(0)], 1023, &mut buf, &mut [0, 0]);
    assert!(matches!(bad, Err(ReadError::Invalid(_))));
}

#[test]
fn i9_a_layer_that_moved_on_is_not_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path(), IDS, options()).unwrap();
    let key = key(1, 0, 0);
    let zero = Payload::Zero { count: 1, absent: false, release: true };
    store.write(key, Version::NONE, version(1, 1), 0, zero).unwrap();
    store.write(key, version(1, 1), version(1, 2), 0, zero).unwrap();
    assert_eq!(store.delete_at(key, version(1, 1)), Ok(false));
    assert_eq!(store.stat(key).unwrap().version, version(1, 2));
    assert_eq!(store.delete_at(key, version(1, 2)), Ok(true));
    assert_eq!(store.stat(key), None);
    assert_eq!(store.delete_at(key, version(1, 2)), Ok(false));
}

#[test]
fn openings_that_must_fail_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let none = Store::open(dir.path(), options()).unwrap_err();
    assert!(matches!(none, OpenError::NotAStore { .. }), "{none}");
    let store = Store::create(dir.path(), IDS, options()).unwrap();
    match Store::open(dir.path(), options()).unwrap_err() {
        OpenError::Locked { pid, .. } => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other}"),
    }
    drop(store);
    let exists = Store::create(dir.path(), IDS, options()).unwrap_err();
    assert!(matches!(exists, OpenError::Exists(_)), "{exists}");
    std::fs::remove_file(dir.path().join("index")).unwrap();
    match Store::open(dir.path(), options()).unwrap_err() {
        OpenError::Corrupt { file, .. } => assert_eq!(file, "index"),
        other => panic!("{other}"),
    }
}

#[test]
fn what_an_interrupted_removal_leaves_is_no_store() {
    let dir = tempfile::tempdir().unwrap();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    drop(Store::create(&real, IDS, options()).unwrap());
    // Of a directory by a link only what comes first is removed: the superblock, and the link.
    std::os::unix::fs::symlink(&real, &link).unwrap();
    Store::remove(&link).unwrap();
    let left = Store::open(&real, options()).unwrap_err();
    assert!(matches!(left, OpenError::NotAStore { .. }), "{left}");
    for _ in 0..2 {
        Store::remove(&real).unwrap();
        assert!(!real.exists());
    }
}

#[test]
fn i11_the_capacity_is_exact_and_space_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let capacity = Some(10 * BLOCK_SIZE as u64);
    let store = Store::create(dir.path(), IDS, Options { capacity, ..options() }).unwrap();
    let (bytes, crcs) = blocks_of(&[1, 2, 3, 4, 5, 6]);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    let (a, b) = (key(1, 0, 0), key(1, 1, 0));
    store.write(a, Version::NONE, version(1, 1), 0, payload).unwrap();
    assert_eq!(store.write(b, Version::NONE, version(1, 1), 0, payload), Err(WriteError::NoSpace));
    store.write(a, version(1, 1), version(1, 2), 0, payload).unwrap();
    let usage = store.usage();
    assert_eq!((usage.capacity, usage.used), (40960, 24576));
    let clear = Payload::Zero { count: 2, absent: true, release: true };
    store.write(a, version(1, 2), version(1, 3), 0, clear).unwrap();
    store.write(b, Version::NONE, version(1, 1), 0, payload).unwrap();
    assert_eq!(store.usage().used, 40960);
}

#[test]
fn i10_writers_outrun_the_log_and_readers_see_every_version() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path(), IDS, options()).unwrap();
    std::thread::scope(|scope| {
        for index in 0..4 {
            let store = &store;
            scope.spawn(move || write_and_read(store, index));
        }
    });
    store.close().unwrap();
    let store = Store::open(dir.path(), options()).unwrap();
    for index in 0..4 {
        assert_eq!(store.stat(key(1, index, 0)).unwrap().version, version(1, 400));
    }
}

fn write_and_read(store: &Store, index: u32) {
    let key = key(1, index, 0);
    for seq in 1..=400 {
        let (bytes, crcs) = blocks_of(&[seq, seq + 1]);
        let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
        let prev = if seq == 1 { Version::NONE } else { version(1, seq - 1) };
        let first = (seq % 3) as u16;
        store.write(key, prev, version(1, seq), first, payload).unwrap();
        let (mut buf, mut read) = (vec![0; bytes.len()], [0; 2]);
        let outcome = store.read(key.object, &[Layer(0)], first, &mut buf, &mut read).unwrap();
        assert_eq!((outcome.version, &buf), (version(1, seq), &bytes));
        if seq % 50 == 0 {
            store.flush_wait().unwrap();
        }
    }
}

#[test]
fn an_image_of_everything_fits_a_default_segment() {
    let dir = tempfile::tempdir().unwrap();
    let big = Options { log_bytes: 32 << 20, ..Options::default() };
    let store = Store::create(dir.path(), IDS, big).unwrap();
    let blocks = (0..1024).map(|block| (block, Block::Data(1 + u64::from(block)))).collect();
    let layer = super::support::ModelLayer { version: version(1, 1), blocks };
    assert!(store.install(key(1, 0, 0), None, &image_of(&layer)).unwrap());
    let model = Model::from([(key(1, 0, 0), layer)]);
    check_equal(&store.engine, &model).unwrap();
    drop(store);
    let store = Store::open(dir.path(), Options::default()).unwrap();
    check_equal(&store.engine, &model).unwrap();
}

#[test]
fn many_layers_are_loaded_by_several_threads() {
    const COUNT: u32 = 40_000;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path(), IDS, Options::default()).unwrap();
    let zero = Payload::Zero { count: 1, absent: false, release: false };
    for index in 0..COUNT {
        store.write(key(1, index, 0), Version::NONE, version(1, 1), 3, zero).unwrap();
    }
    // Slabs with a record that says that they are free.
    store.flush_wait().unwrap();
    store.close().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    for index in (0..COUNT).step_by(1000) {
        assert!(store.delete(key(1, index, 0)).unwrap());
    }
    store.close().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    assert_eq!(store.usage().objects, u64::from(COUNT - COUNT / 1000));
    for index in 0..COUNT {
        let stat = store.stat(key(1, index, 0));
        assert_eq!(stat.map_or(0, |stat| stat.zero_blocks), u16::from(index % 1000 != 0));
    }
    assert_eq!(store.engine.log.lock().unwrap().slabs.free().count(), 40);
}
