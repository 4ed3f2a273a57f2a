//! A process that writes is killed with SIGKILL; every write that it had acknowledged is there.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use sheepdog_store::{Options, Payload, Store, StoreIds};
use sheepdog_types::{
    BLOCK_SIZE, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Version,
    VolumeId, WriterGen,
};

const DIR: &str = "SHEEPDOG_STORE_KILL_DIR";
const OBJECTS: u64 = 8;

fn options() -> Options {
    // Small, so that checkpoints are under way when the process dies.
    Options { log_bytes: 512 << 10, segment_bytes: 64 << 10, ..Options::default() }
}

fn key(number: u64) -> LayerKey {
    let object = ObjectId { volume: VolumeId(1), index: ObjectIndex((number % OBJECTS) as u32) };
    LayerKey { object, layer: Layer(0) }
}

fn version(seq: u64) -> Version {
    if seq == 0 { Version::NONE } else { Version { writer: WriterGen(1), seq } }
}

fn block(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK_SIZE / 8)
}

/// Where write `number` of an object goes.
fn place(number: u64) -> u16 {
    (number / OBJECTS % 100) as u16
}

/// Runs in the child process only: writes from where the store is until it is killed.
#[test]
fn child_writes_until_killed() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let store = Store::open(Path::new(&dir), options()).unwrap();
    let have = |number| store.stat(key(number)).map_or(0, |stat| stat.version.seq);
    let mut number = (0..OBJECTS).map(have).sum::<u64>();
    let mut out = std::io::stdout().lock();
    loop {
        let (key, seq) = (key(number), number / OBJECTS);
        let bytes = block(number);
        let payload = Payload::Data { bytes: &bytes, crcs: &[crc32c::crc32c(&bytes)] };
        store.write(key, version(seq), version(seq + 1), place(number), payload).unwrap();
        writeln!(out, "acked {number}").unwrap();
        number += 1;
    }
}

#[test]
fn i3_acknowledged_writes_survive_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let ids = StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };
    Store::create(dir.path(), ids, options()).unwrap().close().unwrap();
    let mut acked = 0;
    for round in 1..=5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_writes_until_killed", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let last_acked = |line: String| line.strip_prefix("acked ")?.parse::<u64>().ok();
        let goal = acked + 300 * round;
        acked = lines.by_ref().filter_map(last_acked).find(|&n| n >= goal).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        acked = lines.filter_map(last_acked).last().unwrap_or(acked);
        check(dir.path(), acked);
    }
}

/// Checks that the writes up to `acked` are there, at most one more, and nothing else.
fn check(dir: &Path, acked: u64) {
    let store = Store::open(dir, options()).expect("opens after SIGKILL");
    let count = (0..OBJECTS).filter_map(|n| store.stat(key(n))).map(|s| s.version.seq).sum::<u64>();
    // The last line may have been cut off, so one more write may be there.
    assert!((acked + 1..=acked + 2).contains(&count), "{count} writes, {acked} acknowledged");
    let first = count.saturating_sub(OBJECTS * 100);
    let (mut buf, mut crcs) = ([0; BLOCK_SIZE], [0]);
    for number in first..count {
        let object = key(number).object;
        let read = store.read(object, &[Layer(0)], place(number), &mut buf, &mut crcs);
        read.expect("an undamaged block");
        assert_eq!(buf[..], block(number), "write {number} of {count}");
    }
}
