//! CPU time and wall time of the store's common operations.
//!
//! `cargo run --release -p sheepdog-store --example bench -- [DIR] [OPERATIONS]`; DIR is
//! `/dev/shm` if not given, to measure the code and not a disk. "thread" is the CPU time of the
//! calling thread for each operation, "process" includes applying the log in the background.

use std::path::PathBuf;
use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};
use sheepdog_store::{Options, Payload, Store, StoreIds};
use sheepdog_types::{
    BLOCK_SIZE, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Version,
    VolumeId, WriterGen, hash64,
};

const OBJECTS: u64 = 256;

fn micros(clock: ClockId) -> f64 {
    let now = clock_gettime(clock);
    now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
}

fn measure(name: &str, operations: u64, mut run: impl FnMut(u64)) {
    let clocks = [ClockId::ThreadCPUTime, ClockId::ProcessCPUTime];
    let (before, wall) = (clocks.map(micros), Instant::now());
    (0..operations).for_each(&mut run);
    let n = operations as f64;
    let wall = wall.elapsed().as_secs_f64() * 1e6 / n;
    let [thread, process] = [0, 1].map(|i| (micros(clocks[i]) - before[i]) / n);
    println!("{name:<24} thread {thread:6.2} µs  process {process:6.2} µs  wall {wall:6.2} µs");
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let parent = args.next().map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    let operations = args.next().map_or(Ok(200_000), |text| text.parse())?;
    let dir = parent.join(format!("sheepdog-store-bench-{}", std::process::id()));
    let ids = StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };
    let store = Store::create(&dir, ids, Options::default())?;
    let result = run(&store, operations);
    drop(store);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn run(store: &Store, operations: u64) -> Result<(), Box<dyn std::error::Error>> {
    let key = |n: u64| LayerKey {
        object: ObjectId { volume: VolumeId(1), index: ObjectIndex((hash64(n) % OBJECTS) as u32) },
        layer: Layer(0),
    };
    let block = |n: u64| (hash64(n ^ 77) % 1024) as u16;
    let bytes = vec![0x5A; BLOCK_SIZE];
    let crcs = [crc32c::crc32c(&bytes)];
    let mut versions = vec![Version::NONE; OBJECTS as usize];
    let mut write = |n: u64| {
        let (key, payload) = (key(n), Payload::Data { bytes: &bytes, crcs: &crcs });
        let prev = versions[key.object.index.0 as usize];
        let next = prev.next(WriterGen(1));
        store.write(key, prev, next, block(n), payload).expect("the disk has room");
        versions[key.object.index.0 as usize] = next;
    };
    measure("write 4K, first round", operations, &mut write);
    measure("write 4K, again", operations, &mut write);
    measure("write 4K + flush", operations / 10, |n| {
        write(n);
        store.flush_wait().expect("the disk works");
    });
    let (mut buf, mut read) = (vec![0; BLOCK_SIZE], [0]);
    let mut read_one = |n: u64| {
        store
            .read(key(n).object, &[Layer(0)], block(n), &mut buf, &mut read)
            .expect("the disk works");
    };
    measure("read 4K", operations, &mut read_one);
    measure("crc32c of 4K alone", operations, |_| {
        std::hint::black_box(crc32c::crc32c(std::hint::black_box(&bytes)));
    });
    Ok(())
}
