//! Real nodes with a flipped bit on a disk: `dog node scrub` finds and names it.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use serde_json::{Value, json};
use sheepdog_store::{Options, Payload, Store};
use sheepdog_types::{
    BLOCK_SIZE, Layer, LayerKey, OBJECT_SIZE, ObjectId, ObjectIndex, Version, VolumeId, WriterGen,
};
use std::fs::File;
use std::net::TcpListener;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Held while a process is started, and while a store is open in this one: until it becomes another program, a
/// child has all descriptors of its parent, and with them the lock of a store that another test closes meanwhile.
fn no_store_at_a_start() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A node, running or not; killed when it is dropped.
struct Node {
    address: String,
    dir: PathBuf,
    process: Option<Child>,
}

impl Node {
    fn new(dir: &Path) -> Self {
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = free.local_addr().unwrap().to_string();
        Self { address, dir: dir.into(), process: None }
    }

    fn start(&mut self, join: Option<&str>) {
        let mut sheep = Command::new(env!("CARGO_BIN_EXE_sheep"));
        sheep.arg("--dir").arg(&self.dir).args(["--listen", &self.address]);
        sheep.args(join.iter().flat_map(|join| ["--join", join])).stdin(Stdio::null());
        let _turn = no_store_at_a_start();
        self.process = Some(sheep.stderr(log(&self.dir)).spawn().unwrap());
    }

    /// SIGTERM; must be a clean end.
    fn stop(&mut self) {
        let mut process = self.process.take().unwrap();
        let id = rustix::process::Pid::from_child(&process);
        rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
        assert!(process.wait().unwrap().success());
    }

    /// What `dog --json` says; `None` if it failed.
    fn try_dog(&self, args: &[&str]) -> Option<Value> {
        let mut dog = Command::new(env!("CARGO_BIN_EXE_dog"));
        dog.args(["--node", &self.address, "--json"]).args(args).stdin(Stdio::null());
        let turn = no_store_at_a_start();
        let dog = dog.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(turn);
        let output = dog.wait_with_output().unwrap();
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    fn dog(&self, args: &[&str]) -> Value {
        self.try_dog(args).unwrap_or_else(|| panic!("dog {args:?} failed"))
    }

    /// Asks until the answer is as wanted; gives it.
    #[track_caller]
    fn wait(&self, args: &[&str], wanted: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        loop {
            let answer = self.try_dog(args);
            match answer {
                Some(answer) if wanted(&answer) => return answer,
                _ if begin.elapsed() < Duration::from_secs(60) => {}
                answer => panic!("dog {args:?} in vain: {answer:?}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_healthy(&self) {
        self.wait(&["cluster", "health"], |health| health["status"] == "ok");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// The end of the log, for whoever looks at a failed test, is beside the node's directory.
fn log(dir: &Path) -> File {
    File::options().create(true).append(true).open(dir.with_extension("log")).unwrap()
}

/// The bytes of block `number` of the test's object.
fn block(number: u16) -> Vec<u8> {
    let word = 0x5EED_0000_0000_0000 | u64::from(number);
    word.to_le_bytes().repeat(BLOCK_SIZE / 8)
}

/// Writes blocks of the volume's object 2 into the store of a node that does not run.
fn write_to_store(dir: &Path, volume: &Value, blocks: Range<u16>) {
    let _turn = no_store_at_a_start();
    let store = Store::open(&dir.join("disk"), Options::default()).unwrap();
    let object =
        ObjectId { volume: VolumeId(volume["id"].as_u64().unwrap()), index: ObjectIndex(2) };
    let bytes: Vec<u8> = blocks.clone().flat_map(block).collect();
    let crcs: Vec<u32> = bytes.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
    let version = Version { writer: WriterGen(1), seq: 1 };
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    let key = LayerKey { object, layer: Layer(0) };
    store.write(key, Version::NONE, version, blocks.start, payload).unwrap();
    store.close().unwrap();
}

/// Flips a bit of block `number` where the store has put it.
fn flip_in_data(dir: &Path, number: u16) {
    let data = File::options().read(true).write(true).open(dir.join("disk/data")).unwrap();
    let blocks = data.metadata().unwrap().len() / BLOCK_SIZE as u64;
    let mut bytes = vec![0; BLOCK_SIZE];
    let mut places = (0..blocks).map(|at| at * BLOCK_SIZE as u64).filter(|at| {
        data.read_exact_at(&mut bytes, *at).unwrap();
        bytes == block(number)
    });
    let place = places.next().expect("the block is in the file");
    let mut byte = [0];
    data.read_exact_at(&mut byte, place + 99).unwrap();
    data.write_all_at(&[byte[0] ^ 4], place + 99).unwrap();
}

#[test]
fn a_flipped_bit_is_found_named_and_in_the_health_of_the_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = [0, 1].map(|n| Node::new(&dir.path().join(format!("node{n}"))));
    nodes[0].start(None);
    nodes[0].wait_healthy();
    let first = nodes[0].address.clone();
    nodes[1].start(Some(&first));
    nodes[1].wait_healthy();
    nodes[0].wait(&["node", "list"], |list| list.as_array().is_some_and(|list| list.len() == 2));
    let volume = nodes[0].dog(&["volume", "create", "vm1", "64M", "--copies", "2"]);
    nodes.iter_mut().for_each(Node::stop);
    for node in &nodes {
        write_to_store(&node.dir, &volume, 7..10);
    }
    // On both, or the one would be repaired from the other.
    nodes.iter().for_each(|node| flip_in_data(&node.dir, 8));
    nodes.iter_mut().for_each(|node| node.start(None));
    nodes.iter().for_each(Node::wait_healthy);

    let scrub = |node: &Node| {
        let started = node.dog(&["node", "scrub", "start", "--rate", "1G"]);
        assert_eq!((&started[0]["rate"], started[1].is_null()), (&json!(1 << 30), true));
        let finished =
            |scrubs: &Value| scrubs[0]["state"] == "idle" && !scrubs[0]["last"].is_null();
        let scrubs = node.wait(&["node", "scrub", "status"], finished);
        assert_eq!(scrubs[0]["last"]["bytes"], json!(3 * BLOCK_SIZE));
        scrubs[0].clone()
    };
    let offset = 2 * OBJECT_SIZE + 8 * BLOCK_SIZE as u64;
    let named = json!({"volume": "vm1", "volume_id": volume["id"], "offset": offset, "layer": 0});
    let mut reasons = Vec::new();
    let told = |health: &Value, reasons: &[String]| {
        let told = health["reasons"].as_array().cloned().unwrap_or_default();
        health["status"] == "degraded" && reasons.iter().all(|r| told.contains(&json!(r)))
    };
    for node in &nodes {
        let bad = scrub(node);
        assert_eq!((&bad["last"]["found"], &bad["damaged_blocks"]), (&json!(1), &json!(1)));
        assert_eq!(bad["damaged"], json!([named]));
        let disk = bad["disk"].as_str().unwrap();
        reasons.push(format!("disk {disk} of node {}: 1 damaged block", node.address));
        // Trying to repair it finds that of the other node as well, if that takes so long.
        for node in &nodes {
            node.wait(&["cluster", "health"], |health| told(health, &reasons));
        }
    }
    for node in &nodes {
        let all = |health: &Value| {
            told(health, &reasons) && health["reasons"].as_array().map(Vec::len) == Some(2)
        };
        node.wait(&["cluster", "health"], all);
    }
    // Found again, not counted twice.
    assert_eq!(scrub(&nodes[1])["damaged_blocks"], json!(1));
    nodes.iter_mut().for_each(Node::stop);
}

#[test]
fn a_scrub_is_paused_and_goes_on_and_does_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::new(&dir.path().join("node"));
    node.start(None);
    node.wait_healthy();
    let volume = node.dog(&["volume", "create", "vm1", "64M", "--copies", "1"]);
    node.stop();
    write_to_store(&node.dir, &volume, 0..200);
    node.start(None);
    node.wait_healthy();
    assert_eq!(node.dog(&["node", "scrub", "pause"])[0]["state"], "idle", "nothing to pause");
    // Minutes of waiting after the only layer, which is read at once.
    node.dog(&["node", "scrub", "start", "--rate", "4K"]);
    let status = ["node", "scrub", "status"];
    let done = json!(200 * BLOCK_SIZE);
    node.wait(&status, |scrubs| scrubs[0]["bytes_done"] == done);
    let paused = node.dog(&["node", "scrub", "pause"]);
    assert_eq!((&paused[0]["state"], &paused[0]["bytes_done"]), (&json!("paused"), &done));
    // Anew it would take those minutes; where it paused, nothing is left to read.
    node.dog(&["node", "scrub", "start"]);
    node.wait(&status, |scrubs| scrubs[0]["last"]["bytes"] == done);
    node.dog(&["node", "scrub", "start"]);
    node.wait(&status, |scrubs| scrubs[0]["bytes_done"] == done);
    node.stop();
}
