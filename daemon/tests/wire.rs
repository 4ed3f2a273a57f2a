//! A replica at the wire: a real `sheep`, and calls made by hand as another gateway would.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use serde_json::Value;
use sheepdog::wire::{HELLO_LEN, Hello, Kind};
use sheepdog_cluster::message::{
    self, Body, Call, FRAME_HEADER, Failure, Reject, Reply, Request, Run, Span, frame_len,
};
use sheepdog_types::{
    BLOCK_SIZE, ClusterId, DiskId, Epoch, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Version,
    VolumeId, WriterGen,
};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// A one-node cluster with volume `v`, attached by an NBD export.
struct Lab {
    dir: tempfile::TempDir,
    sheep: Child,
    address: String,
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.sheep.kill();
        let _ = self.sheep.wait();
    }
}

impl Lab {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let sheep = Command::new(env!("CARGO_BIN_EXE_sheep"))
            .args(["--listen", &address, "--dir"])
            .arg(dir.path().join("node"))
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let lab = Self { dir, sheep, address };
        let begin = Instant::now();
        while lab.dog(&["cluster", "health"]).is_none_or(|h| h["status"] != "ok") {
            assert!(begin.elapsed() < PATIENCE, "not ready: {}", lab.log());
            std::thread::yield_now();
        }
        lab.dog(&["volume", "create", "v", "16M", "--copies", "1"]).unwrap();
        lab.export();
        lab
    }

    fn socket(&self) -> String {
        self.dir.path().join("v.sock").display().to_string()
    }

    fn export(&self) {
        self.dog(&["export", "add", "v", "--nbd", &self.socket()]).unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn dog(&self, arguments: &[&str]) -> Option<Value> {
        let output = Command::new(env!("CARGO_BIN_EXE_dog"))
            .args(["--node", &self.address, "--json"])
            .args(arguments)
            .output()
            .unwrap();
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    fn node(&self) -> Value {
        self.dog(&["node", "list"]).unwrap()[0].clone()
    }

    /// A data connection, as a gateway makes it.
    fn connect(&self) -> Wire {
        let info = self.dog(&["cluster", "info"]).unwrap();
        let cluster: ClusterId = info["cluster"].as_str().unwrap().parse().unwrap();
        let node = self.node();
        let id: NodeId = node["id"].as_str().unwrap().parse().unwrap();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&Hello::new(Kind::Data, cluster, id).encode()).unwrap();
        let mut answer = [0; HELLO_LEN];
        stream.read_exact(&mut answer).unwrap();
        Hello::decode(&answer).unwrap().check_answer().unwrap();
        let volume = self.dog(&["volume", "info", "v"]).unwrap();
        Wire {
            stream,
            epoch: Epoch(info["epoch"].as_u64().unwrap()),
            disk: node["disks"][0]["id"].as_str().unwrap().parse().unwrap(),
            volume: VolumeId(volume["id"].as_u64().unwrap()),
            writer: WriterGen(volume["writer"].as_u64().unwrap()),
        }
    }
}

struct Wire {
    stream: TcpStream,
    epoch: Epoch,
    disk: DiskId,
    volume: VolumeId,
    writer: WriterGen,
}

impl Wire {
    fn key(&self) -> LayerKey {
        let object = ObjectId { volume: self.volume, index: ObjectIndex(0) };
        LayerKey { object, layer: Layer(0) }
    }

    fn write(&self, prev: Version) -> Request {
        let version = prev.next(self.writer);
        Request::Write { key: self.key(), prev, version, first: 0, body: Body::Data { count: 1 } }
    }

    fn read(&self) -> Request {
        Request::Read { object: self.key().object, layer: Layer(0), first: 0, count: 1 }
    }

    fn ask(&mut self, request: Request) -> Reply {
        let block = [7u8; BLOCK_SIZE];
        let crc = crc32c::crc32c(&block);
        self.ask_with(request, &block, crc)
    }

    /// The answer, once the node has a lease: a busy machine may lose it for a moment.
    fn ask_with(&mut self, request: Request, block: &[u8], crc: u32) -> Reply {
        let begin = Instant::now();
        loop {
            let reply = self.ask_once(request.clone(), block, crc);
            if reply != Reply::Rejected(Reject::NoLease) || begin.elapsed() > PATIENCE {
                return reply;
            }
            std::thread::yield_now();
        }
    }

    fn ask_once(&mut self, request: Request, block: &[u8], crc: u32) -> Reply {
        let carries = matches!(request, Request::Write { .. });
        let (crcs, data) = if carries { (vec![crc], block) } else { (Vec::new(), &[][..]) };
        let call = Call { epoch: self.epoch, disk: self.disk, writer: self.writer, request };
        let mut frame = Vec::new();
        message::encode(&mut frame, 1, &call, &crcs, data);
        self.stream.write_all(&frame).unwrap();
        let mut answer = vec![0; FRAME_HEADER];
        self.stream.read_exact(&mut answer).unwrap();
        answer.resize(frame_len(&answer).unwrap().unwrap(), 0);
        self.stream.read_exact(&mut answer[FRAME_HEADER..]).unwrap();
        message::decode::<Reply>(&answer).unwrap().unwrap().head
    }
}

#[test]
fn i4_a_stale_writer_is_rejected_for_reads_and_writes() {
    let lab = Lab::start();
    let mut old = lab.connect();
    assert_eq!(old.ask(old.write(Version::NONE)), Reply::Done, "{}", lab.log());
    assert_eq!(old.ask(old.read()), Reply::Data { count: 1 });
    // The volume is detached and attached again: another writer has it.
    lab.dog(&["export", "remove", "v"]).unwrap();
    lab.export();
    let newest = WriterGen(old.writer.0 + 1);
    let fenced = Reply::Rejected(Reject::Fenced { newest });
    let last = Version::NONE.next(old.writer);
    assert_eq!(old.ask(old.write(last)), fenced);
    assert_eq!(old.ask(old.read()), fenced);
    assert_eq!(old.ask(Request::Stat { key: old.key() }), fenced);
    // What it had written is there for the new one.
    let mut new = lab.connect();
    assert_eq!(new.writer, newest);
    assert_eq!(new.ask(Request::Stat { key: new.key() }), Reply::Version { version: last });
    assert_eq!(new.ask(new.write(last)), Reply::Done);
}

#[test]
fn i1_another_epoch_is_answered_neither_reads_nor_writes() {
    let lab = Lab::start();
    let mut wire = lab.connect();
    let now = wire.epoch;
    for (epoch, reject) in
        [(Epoch(now.0 - 1), Reject::StaleEpoch { now }), (Epoch(now.0 + 1), Reject::NotYet { now })]
    {
        wire.epoch = epoch;
        for request in [wire.write(Version::NONE), wire.read(), Request::Flush] {
            assert_eq!(wire.ask(request), Reply::Rejected(reject));
        }
    }
    wire.epoch = now;
    wire.disk = DiskId(1);
    assert_eq!(wire.ask(wire.read()), Reply::Rejected(Reject::NotMember));
}

#[test]
fn i5_and_i7_gaps_and_damage_are_not_written() {
    let lab = Lab::start();
    let mut wire = lab.connect();
    let ahead = Version { writer: wire.writer, seq: 5 };
    let behind = Reply::Failed(Failure::Behind { have: Version::NONE });
    assert_eq!(wire.ask(wire.write(ahead)), behind);
    let damaged = wire.ask_with(wire.write(Version::NONE), &[7; BLOCK_SIZE], 12345);
    assert_eq!(damaged, Reply::Failed(Failure::Checksum { block: 0 }));
    let stat = Request::Stat { key: wire.key() };
    assert_eq!(wire.ask(stat), Reply::Version { version: Version::NONE });
}

#[test]
fn what_copies_a_layer_gets_its_sums_and_its_blocks_at_one_version_only() {
    let lab = Lab::start();
    let mut wire = lab.connect();
    let none = Reply::Sums { version: Version::NONE, runs: vec![], crcs: vec![] };
    let key = wire.key();
    assert_eq!(wire.ask(Request::Sums { key }), none);
    assert_eq!(wire.ask(wire.write(Version::NONE)), Reply::Done);
    let version = Version::NONE.next(wire.writer);
    let sums = wire.ask(Request::Sums { key });
    let crcs = vec![crc32c::crc32c(&[7; BLOCK_SIZE])];
    let runs = vec![Run { first: 0, count: 1, zero: false }];
    assert_eq!(sums, Reply::Sums { version, runs, crcs });
    let blocks = |version, first, count| Request::FetchBlocks {
        key,
        version,
        spans: vec![Span { first, count }],
    };
    assert_eq!(wire.ask(blocks(version, 0, 1)), Reply::Data { count: 1 });
    let older = wire.ask(blocks(Version::NONE, 0, 1));
    assert_eq!(older, Reply::Failed(Failure::Behind { have: version }));
    let malformed = Reply::Rejected(Reject::Malformed);
    for (first, count) in [(0, 2), (5, 1), (0, 0), (1023, 2)] {
        assert_eq!(wire.ask(blocks(version, first, count)), malformed, "{first}, {count}");
    }
}

#[test]
fn a_store_with_data_survives_the_loss_of_node_json() {
    let mut lab = Lab::start();
    let mut wire = lab.connect();
    assert_eq!(wire.ask(wire.write(Version::NONE)), Reply::Done);
    lab.sheep.kill().unwrap();
    lab.sheep.wait().unwrap();
    let node = lab.dir.path().join("node");
    let identity = std::fs::read(node.join("node.json")).unwrap();
    std::fs::remove_file(node.join("node.json")).unwrap();
    let start = || {
        let mut sheep = Command::new(env!("CARGO_BIN_EXE_sheep"));
        sheep.args(["--listen", &lab.address, "--dir"]).arg(&node).stdin(Stdio::null());
        sheep
    };
    // Bounded: a daemon that started anyway would run on.
    let bounded = start();
    let mut refused = Command::new("timeout");
    refused.arg("60").arg(bounded.get_program()).args(bounded.get_args()).stdin(Stdio::null());
    let refused = refused.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(message.contains("node.json") && message.contains("nothing was changed"), "{message}");
    // With the file back, the node is itself again.
    std::fs::write(node.join("node.json"), identity).unwrap();
    lab.sheep = start().stderr(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while lab.dog(&["volume", "info", "v"]).is_none_or(|v| v["used"] != BLOCK_SIZE) {
        assert!(begin.elapsed() < PATIENCE, "the block is gone");
        std::thread::yield_now();
    }
}

#[test]
fn a_connection_that_makes_no_sense_is_closed_and_the_node_lives_on() {
    let lab = Lab::start();
    let mut wire = lab.connect();
    wire.stream.write_all(&[0xAB; 4096]).unwrap();
    let mut rest = Vec::new();
    let _ = wire.stream.read_to_end(&mut rest); // end of file or a reset, at once
    assert!(rest.is_empty());
    assert_eq!(lab.connect().ask(Request::Flush), Reply::Done);
    assert!(Path::new(&lab.socket()).exists());
}
