//! `sheep check` and `sheep dump`: the real binary, on the disk of a real daemon.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sheepdog_store::{BlockState, Options, Payload, Store, StoreIds};
use sheepdog_types::{
    BLOCK_SIZE, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Version,
    VolumeId, WriterGen,
};

/// Held while a process is started, and while a store is open in this one: until it becomes another program, a
/// child has all descriptors of its parent, and with them the lock of a store that another test closes meanwhile.
fn no_store_at_a_start() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a command to its end.
fn run(command: &mut Command) -> Output {
    let turn = no_store_at_a_start();
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    drop(turn);
    child.wait_with_output().unwrap()
}

fn sheep(arguments: &[&str], dir: &Path) -> Output {
    run(Command::new(env!("CARGO_BIN_EXE_sheep")).args(arguments).arg(dir))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A store with one layer of three blocks, from block 5 on in slab 0, stopped in order.
fn store(dir: &Path) {
    let _turn = no_store_at_a_start();
    let ids = StoreIds { cluster: ClusterId(0xC1), node: NodeId(0xA2), disk: DiskId(0xD3) };
    let options = Options { log_bytes: 256 << 10, segment_bytes: 64 << 10, ..Options::default() };
    let store = Store::create(dir, ids, options).unwrap();
    let object = ObjectId { volume: VolumeId(7), index: ObjectIndex(3) };
    let key = LayerKey { object, layer: Layer(0) };
    let bytes = vec![9; 3 * BLOCK_SIZE];
    let crcs: Vec<u32> = bytes.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    let version = Version { writer: WriterGen(1), seq: 1 };
    store.write(key, Version::NONE, version, 5, payload).unwrap();
    assert_eq!(store.sums(key).unwrap().unwrap().runs[0].state, BlockState::Data);
    store.close().unwrap();
}

fn flip(dir: &Path, file: &str, offset: u64) {
    let file = File::options().read(true).write(true).open(dir.join(file)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[test]
fn a_clean_store_is_clean_for_people_and_for_scripts() {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path());
    let output = sheep(&["check"], dir.path());
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.contains("1 layers, 3 data blocks") && said.contains("\nclean: 0 damage"),
        "{said}"
    );
    assert!(output.stderr.is_empty(), "progress is for terminals");
    let output = sheep(&["check", "--json"], dir.path());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["clean"], true);
    assert_eq!((&report["verified_blocks"], &report["damage"]), (&3.into(), &0.into()));
    assert_eq!(report["cluster"], "c1".parse::<ClusterId>().unwrap().to_string());
}

#[test]
fn damage_is_named_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path());
    flip(dir.path(), "data", 6 * 4096 + 100);
    flip(dir.path(), "superblock", 4096 + 17);
    let output = sheep(&["check"], dir.path());
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("damage: data, offset 24576, slab 0"), "{said}");
    assert!(said.contains(", block 6: does not match its checksum"), "{said}");
    assert!(said.contains("repairable: superblock, offset 4096"), "{said}");
    assert!(said.ends_with("NOT clean: 1 damage, 1 repairable, 0 notes\n"), "{said}");
    let output = sheep(&["check", "--json"], dir.path());
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let finding = &report["findings"][1];
    assert_eq!((&finding["file"], &finding["offset"]), (&"data".into(), &24576.into()));
    assert_eq!((&finding["severity"], &finding["block"]), (&"damage".into(), &6.into()));
}

#[test]
fn what_is_repairable_alone_is_not_clean_and_the_daemons_opening_repairs_it() {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path());
    flip(dir.path(), "superblock", 8192 + 30);
    assert_eq!(sheep(&["check"], dir.path()).status.code(), Some(1));
    let turn = no_store_at_a_start();
    Store::open(dir.path(), Options::default()).unwrap().close().unwrap();
    drop(turn);
    let output = sheep(&["check"], dir.path());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
}

#[test]
fn what_is_no_store_and_wrong_usage_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["check", "dump"] {
        let output = sheep(&[command], dir.path());
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(said.starts_with(&format!("sheep {command}: ")), "{said}");
        assert!(said.contains("is not a store"), "{said}");
        let usage = run(Command::new(env!("CARGO_BIN_EXE_sheep")).arg(command));
        assert_eq!(usage.status.code(), Some(2));
        let help = sheep(&[command, "--help"], dir.path());
        assert!(help.status.success() && text(&help.stdout).contains("Changes nothing"));
    }
    // Without a subcommand, `--dir` is required as ever.
    let usage = run(&mut Command::new(env!("CARGO_BIN_EXE_sheep")));
    assert_eq!(usage.status.code(), Some(2));
    assert!(text(&usage.stderr).contains("--dir <DIR>"));
}

#[test]
fn dump_lists_structures() {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path());
    let output = sheep(&["dump", "--json"], dir.path());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let items: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let layer = items.iter().find(|item| item["kind"] == "layer").unwrap();
    assert_eq!((&layer["data_blocks"], &layer["slab"]), (&3.into(), &0.into()));
    assert_eq!(items.iter().filter(|item| item["kind"] == "mark").count(), 2);
    let output = sheep(&["dump"], dir.path());
    assert_eq!(text(&output.stdout).lines().count(), items.len() + 1);
}

/// A daemon that is ended with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_disk_of_a_running_daemon_is_refused_and_checked_after_its_death() {
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("node");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let turn = no_store_at_a_start();
    let child = Command::new(env!("CARGO_BIN_EXE_sheep"))
        .args(["--listen", &format!("127.0.0.1:{port}"), "--dir"])
        .arg(&node)
        .stderr(Stdio::piped())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    drop(turn);
    let mut daemon = Daemon(child);
    let mut log = BufReader::new(daemon.0.stderr.take().unwrap());
    // It says where it listens once its disks are open.
    let mut line = String::new();
    while !line.contains(&format!("127.0.0.1:{port}")) {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "the daemon ended");
    }
    let output = sheep(&["check"], &node);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let holder = format!("process {}", daemon.0.id());
    assert!(said.contains(&holder) && said.contains("stop that daemon"), "{said}");
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    let _ = log.read_to_string(&mut line);
    let output = sheep(&["check"], &node);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.starts_with(&node.join("disk").display().to_string()), "{said}");
}
