//! Reads that must not wait, and each way to do the I/O, against a model.

use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{Advice, fadvise};
use sheepdog_types::{BLOCK_SIZE, Layer, Version};

use super::oracle::{Block, Model, Op, Rng, key, through, version};
use super::support::{IDS, check_equal, seed, small};
use crate::{BlocksRead, Cache, IoBackend, Options, ReadError, Store};

const SPAN: u16 = 80;

fn read_later(store: &Store, index: u32, chain: &[Layer], first: u16, count: u16) -> BlocksRead {
    let (sender, receiver) = mpsc::channel();
    let object = key(1, index, 0).object;
    let done = Box::new(move |read: Result<BlocksRead, ReadError>| sender.send(read).unwrap());
    store.read_later(object, chain, first, count, done);
    receiver.recv_timeout(Duration::from_secs(60)).expect("an answer").unwrap()
}

/// Drops the store's files from the page cache.
fn forget(dir: &std::path::Path) {
    for name in ["data", "sums", "index"] {
        let file = std::fs::File::open(dir.join(name)).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    }
}

fn expected(model: &Model, index: u32, chain: &[Layer], first: u16, count: u16) -> Vec<u8> {
    let tag = |block| match through(model, key(1, index, 0).object, chain, block) {
        Some(Block::Data(tag)) => tag,
        Some(Block::Zero) | None => 0,
    };
    (first..first + count)
        .flat_map(|block| tag(block).to_le_bytes().repeat(BLOCK_SIZE / 8))
        .collect()
}

fn one_way(cache: Cache, io: IoBackend, rng: &mut Rng) {
    // On a real file system if there is one: a tmpfs has no disk to wait for.
    let target = std::env::current_exe().unwrap();
    let dir = tempfile::tempdir_in(target.parent().unwrap()).unwrap();
    let options =
        Options { cache, io, log_bytes: 4 << 20, segment_bytes: 1 << 20, ..Options::default() };
    let mut store = match Store::create(dir.path(), IDS, options.clone()) {
        Ok(store) => store,
        Err(error) if cache == Cache::Direct => {
            println!("skipped: this file system takes no O_DIRECT ({error})");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let mut model = Model::new();
    let mut from_disk = 0;
    for step in 0..400 {
        let mut op = Op::random(rng, &model, 12);
        if rng.chance(5) {
            // Large enough to go straight to a slab.
            let key = super::oracle::newest_from(&model, key(1, rng.below(4) as u32, 0));
            let now = super::oracle::version_in(&model, key);
            let version = version(now.writer.0.max(1), now.seq + 1);
            op = Op::Write {
                key,
                version,
                first: 10,
                tags: (0..70).map(|_| 1 + rng.next() / 2).collect(),
            };
        }
        op.apply_to_store(&store.engine, &model).unwrap();
        op.apply_to_model(&mut model);
        if step % 50 == 49 {
            store.close().unwrap();
            forget(dir.path());
            store = Store::open(dir.path(), options.clone()).unwrap();
        }
        let (index, first) = (rng.below(4) as u32, rng.below(u64::from(SPAN)) as u16);
        let count = 1 + rng.below(20) as u16;
        let chain = [Layer(2), Layer(1), Layer(0)];
        let wanted = expected(&model, index, &chain, first, count);
        let (mut buf, mut crcs) = (vec![7; wanted.len()], vec![7; usize::from(count)]);
        let object = key(1, index, 0).object;
        match store.try_read(object, &chain, first, &mut buf, &mut crcs).unwrap() {
            Some(_) => assert_eq!(buf, wanted),
            None => from_disk += 1,
        }
        let read = read_later(&store, index, &chain, first, count);
        assert_eq!(read.data, wanted, "{op:?}");
        let newest = model.get(&key(1, index, 2)).map_or(Version::NONE, |layer| layer.version);
        assert_eq!(read.outcome.version, newest);
        let crcs: Vec<_> = wanted.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
        assert_eq!(read.crcs, crcs);
    }
    check_equal(&store.engine, &model).unwrap();
    println!("{cache:?} {}: {from_disk} of 400 reads had to wait", store.io_backend());
    if cache == Cache::Direct {
        assert!(from_disk > 0);
    }
}

#[test]
fn every_way_to_do_the_io_gives_the_same() {
    let mut rng = Rng(seed());
    for cache in [Cache::Page, Cache::Direct] {
        for io in [IoBackend::Auto, IoBackend::Threads] {
            one_way(cache, io, &mut rng);
        }
    }
}

#[test]
fn i7_a_damaged_block_is_told_to_a_reader_that_does_not_wait() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path(), IDS, small()).unwrap();
    let op = Op::Write { key: key(1, 0, 0), version: version(1, 1), first: 0, tags: vec![1, 2] };
    op.apply_to_store(&store.engine, &Model::new()).unwrap();
    store.close().unwrap();
    let data = std::fs::File::options().write(true).open(dir.path().join("data")).unwrap();
    data.write_all_at(&[9], 4096 + 77).unwrap();
    let store = Store::open(dir.path(), small()).unwrap();
    let (sender, receiver) = mpsc::channel();
    let done = Box::new(move |read: Result<BlocksRead, ReadError>| sender.send(read).unwrap());
    store.read_later(key(1, 0, 0).object, &[Layer(0)], 0, 2, done);
    match receiver.recv_timeout(Duration::from_secs(60)).expect("an answer") {
        Err(ReadError::Checksum { key: named, block: 1 }) => assert_eq!(named, key(1, 0, 0)),
        other => panic!("{other:?}"),
    }
    for (layers, count) in [(&[][..], 1), (&[Layer(0)][..], 0)] {
        let (sender, receiver) = mpsc::channel();
        let done = Box::new(move |read: Result<BlocksRead, ReadError>| sender.send(read).unwrap());
        store.read_later(key(1, 0, 0).object, layers, 0, count, done);
        let read = receiver.recv_timeout(Duration::from_secs(60)).expect("an answer");
        assert!(matches!(read, Err(ReadError::Invalid(_))));
    }
}
