//! I11 on a real file system that is full: a small tmpfs in a mount namespace of its own.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use sheepdog_store::{Options, Payload, Store, StoreIds, WriteError};
use sheepdog_types::{
    BLOCK_SIZE, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Version,
    VolumeId, WriterGen,
};

const DIR: &str = "SHEEPDOG_STORE_SMALL_DISK";
const BLOCKS: usize = 256;

fn options() -> Options {
    Options { log_bytes: 16 << 20, segment_bytes: 2 << 20, ..Options::default() }
}

fn key(index: u32) -> LayerKey {
    let object = ObjectId { volume: VolumeId(1), index: ObjectIndex(index) };
    LayerKey { object, layer: Layer(0) }
}

/// Writes 1 MiB of `fill` to an object.
fn write(store: &Store, index: u32, fill: u8) -> Result<(), WriteError> {
    let bytes = vec![fill; BLOCKS * BLOCK_SIZE];
    let crcs = vec![crc32c::crc32c(&bytes[..BLOCK_SIZE]); BLOCKS];
    let prev = store.stat(key(index)).map_or(Version::NONE, |stat| stat.version);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    store.write(key(index), prev, prev.next(WriterGen(1)), 0, payload).map(|_| ())
}

fn check(store: &Store, index: u32, fill: u8) {
    let (mut buf, mut crcs) = (vec![0; BLOCKS * BLOCK_SIZE], vec![0; BLOCKS]);
    let read = store.read(key(index).object, &[Layer(0)], 0, &mut buf, &mut crcs);
    read.expect("reads go on");
    assert!(buf.iter().all(|byte| *byte == fill), "object {index}");
}

/// Writes objects until the disk is full; gives their number.
fn fill(store: &Store, from: u32) -> u32 {
    let full = (from..1000).find(|&index| match write(store, index, index as u8) {
        Ok(()) => false,
        Err(WriteError::NoSpace) => true,
        Err(error) => panic!("{error}"),
    });
    full.expect("the disk is smaller than this")
}

/// Runs in the child process only, whose DIR is a tmpfs of 64 MiB.
#[test]
fn child_fills_its_disk() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let dir = Path::new(&dir);
    let ids = StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };
    let store = Store::create(&dir.join("store"), ids, options()).unwrap();
    let count = fill(&store, 0);
    assert!(count > 20, "only {count} MiB of 64 could be used");
    store.flush_wait().unwrap();
    (0..count).for_each(|index| check(&store, index, index as u8));
    // Somebody else takes what was left: what waits in the log cannot be applied now.
    let mut hog = std::fs::File::create(dir.join("hog")).unwrap();
    while hog.write(&[1; 4096]).is_ok() {}
    write(&store, 0, 200).unwrap();
    assert_eq!(write(&store, count, 1), Err(WriteError::NoSpace));
    drop(store);
    let store = Store::open(&dir.join("store"), options()).unwrap();
    check(&store, 0, 200);
    (1..count).for_each(|index| check(&store, index, index as u8));
    // More than the log may still hold: that is applied first, and takes from what is freed here.
    for index in 1..20 {
        assert!(store.delete(key(index)).unwrap());
    }
    store.close().unwrap();
    let store = Store::open(&dir.join("store"), options()).unwrap();
    write(&store, 1, 99).unwrap();
    check(&store, 1, 99);
    assert!(store.stat(key(2)).is_none());
}

#[test]
fn i11_a_full_file_system_is_not_fatal() {
    if !Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|s| s.success()) {
        println!("skipped: no right to make a mount namespace");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script =
        "mount -t tmpfs -o size=64m none \"$0\" && exec \"$1\" --exact child_fills_its_disk";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .args([dir.path(), &std::env::current_exe().unwrap()])
        .env(DIR, dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
