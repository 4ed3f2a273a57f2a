//! Releases that do not understand each other say so, and disturb nobody. What other releases say and leave
//! on disks is written here byte by byte: `docs/protocol.md`, `docs/on-disk.md`.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use sheepdog_qemu_tests::{
    Cluster, Lab, PATIENCE, Pulse, eventually, free_ports, seed, sheep_refused,
};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

const WELCOME: u8 = 0;
const WRONG_VERSION: u8 = 1;
const CONTROL: u8 = 2;
const DATA: u8 = 1;

/// A hello or an answer.
fn hello((oldest, newest): (u16, u16), code: u8, cluster: u64, node: u64) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(b"SHEEPDOG");
    bytes[8..10].copy_from_slice(&newest.to_le_bytes());
    bytes[10] = code;
    bytes[12..14].copy_from_slice(&oldest.to_le_bytes());
    bytes[16..24].copy_from_slice(&cluster.to_le_bytes());
    bytes[24..].copy_from_slice(&node.to_le_bytes());
    bytes
}

/// Says hello to a node: the connection, and its verdict and versions; nothing if it hung up.
fn greet(address: &str, hello: &[u8]) -> (TcpStream, Option<(u8, u16, u16)>) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(hello).unwrap();
    let mut answer = [0; 32];
    let answered = stream.read_exact(&mut answer).is_ok();
    let u16_at = |at| u16::from_le_bytes([answer[at], answer[at + 1]]);
    let said = answered.then(|| (answer[10], u16_at(12), u16_at(8)));
    (stream, said)
}

/// One control request; its status and answer.
fn ask(address: &str, kind: u8, body: &[u8]) -> (u8, Vec<u8>) {
    let (mut stream, said) = greet(address, &hello((1, 1), CONTROL, 0, 0));
    assert_eq!(said, Some((WELCOME, 1, 1)));
    let mut frame = (body.len() as u32 + 1).to_le_bytes().to_vec();
    frame.push(kind);
    frame.extend_from_slice(body);
    stream.write_all(&frame).unwrap();
    let mut head = [0; 5];
    stream.read_exact(&mut head).unwrap();
    let mut answer = vec![0; u32::from_le_bytes(head[..4].try_into().unwrap()) as usize - 1];
    stream.read_exact(&mut answer).unwrap();
    (head[4], answer)
}

/// postcard's unsigned numbers.
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

fn text(text: &str) -> Vec<u8> {
    [varint(text.len() as u64), text.as_bytes().to_vec()].concat()
}

fn id(value: &serde_json::Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap_or_else(|| panic!("no id: {value}")), 16).unwrap()
}

/// Something that listens like a node of another release, until it is dropped.
struct Fake {
    address: String,
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    /// Answers each hello with `answer`, and then goes on as `then` says.
    fn listen(address: &str, answer: [u8; 32], then: fn(&mut TcpStream)) -> Self {
        let listener =
            eventually("the address to be free", PATIENCE, || TcpListener::bind(address).ok());
        let address = listener.local_addr().unwrap().to_string();
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (halt, count) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if halt.load(Ordering::Acquire) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                let _ = stream.set_read_timeout(Some(PATIENCE));
                if stream.read_exact(&mut [0; 32]).is_ok() && stream.write_all(&answer).is_ok() {
                    count.fetch_add(1, Ordering::AcqRel);
                    then(&mut stream);
                }
            }
        });
        Self { address, stop, served, thread: Some(thread) }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_node_from_the_future_is_named_and_disturbs_nobody() {
    let lab = Lab::new("versions-future");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("v", "16M", 3);
    let export = cluster.export_nbd(0, "v");
    let pulse = Pulse::start(&export, seed());
    let of_cluster = id(&cluster.dog(0, &["cluster", "info"])["cluster"]);
    let node = id(&cluster.member(0, 2).unwrap()["id"]);
    let address = cluster.address(2);
    assert!(cluster.terminate(2).success());

    // As if it were upgraded too far: it speaks versions 9 and 10 only.
    let future = Fake::listen(&address, hello((9, 10), WELCOME, of_cluster, node), |_| {});
    for kind in [DATA, CONTROL, DATA, CONTROL] {
        let (mut stream, said) =
            greet(&cluster.address(0), &hello((9, 10), kind, of_cluster, node));
        assert_eq!(said, Some((WRONG_VERSION, 1, 1)));
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the connection goes no further");
    }
    let reason = eventually("the health to name the node", PATIENCE, || {
        let health = cluster.dog(0, &["cluster", "health"]);
        let reasons = health["reasons"].as_array().unwrap().clone();
        let texts = reasons.iter().filter_map(|reason| reason.as_str().map(str::to_owned));
        texts.into_iter().find(|text| text.contains("protocol versions 9 to 10"))
    });
    for part in [address.as_str(), "protocol version 1", "upgrade this end", "docs/upgrade.md"] {
        assert!(reason.contains(part), "{part:?} is not in {reason}");
    }
    // The leader of the log goes on trying, and the others go on.
    let tried = future.served.load(Ordering::Acquire);
    eventually("further tries", PATIENCE, || {
        (future.served.load(Ordering::Acquire) > tried).then_some(())
    });
    pulse.wait_for_more(50);
    for index in 0..2 {
        let log = cluster.log_text(index);
        let said = log.lines().filter(|line| line.contains("no protocol version in common"));
        assert!(said.count() <= 2, "once for each way, not for each try:\n{log}");
    }
    // One that also speaks an older version is welcome; hellos that make no sense are not answered.
    let both = greet(&cluster.address(0), &hello((1, 10), CONTROL, of_cluster, node)).1;
    assert_eq!(both, Some((WELCOME, 1, 1)));
    for versions in [(0, 1), (2, 1), (0, 0), (u16::MAX, 1)] {
        let said = greet(&cluster.address(0), &hello(versions, DATA, of_cluster, node)).1;
        assert_eq!(said, None, "{versions:?}");
    }
    println!("{} connections were tried meanwhile", future.served.load(Ordering::Acquire));
    drop(future);
    cluster.restart(2);
    cluster.wait_healthy();
    assert!(pulse.verify() > 0);
}

#[test]
fn who_would_not_understand_a_cluster_does_not_join_it() {
    let lab = Lab::new("versions-join");
    let [free, port] = free_ports::<2>();
    let dir = lab.path("stranger");
    let refused = |member: &Fake, parts: &[&str]| {
        let listen = format!("127.0.0.1:{port}");
        let dir_text = dir.display().to_string();
        let args = ["--dir", &dir_text, "--listen", &listen, "--join", &member.address];
        let refused = sheep_refused(&args);
        assert_eq!(refused.code, 1, "{}", refused.message);
        for part in parts {
            assert!(refused.message.contains(part), "{part:?} is not in {}", refused.message);
        }
        assert!(!dir.join("node.json").exists() && !dir.join("disk").exists());
    };
    let free = format!("127.0.0.1:{free}");
    {
        let future = Fake::listen(&free, hello((2, 3), WRONG_VERSION, 7, 8), |_| {});
        let parts = [&free, "protocol versions 2 to 3", "upgrade this end", "nothing was created"];
        refused(&future, &parts);
    }
    // The protocol is the same, but the cluster's commands are newer.
    let newer = Fake::listen(&free, hello((1, 2), WELCOME, 7, 8), |stream| {
        let i_am = [vec![0, 1, 7, 8], text("9.9.9"), vec![200]].concat();
        let mut head = [0; 5];
        if stream.read_exact(&mut head).is_ok() {
            let mut body = vec![0; head[0] as usize - 1];
            let _ = stream.read_exact(&mut body);
            let _ = stream.write_all(&(i_am.len() as u32).to_le_bytes());
            let _ = stream.write_all(&i_am);
        }
    });
    refused(&newer, &["cluster is at version 200", "newer", "docs/upgrade.md"]);
}

#[test]
fn nothing_older_comes_in_and_nothing_newer_enters_the_log() {
    let lab = Lab::new("versions-log");
    let cluster = Cluster::start(&lab, 2);
    let info = cluster.dog(0, &["cluster", "info"]);
    let agreed = u8::try_from(info["cluster_version"].as_u64().unwrap()).unwrap();
    for node in cluster.dog(1, &["node", "list"]).as_array().unwrap() {
        assert_eq!(node["cluster_version"], agreed, "{node}");
    }
    for via in 0..2 {
        let address = cluster.address(via);
        // A node of an older release asks to join: request 1.
        let join = [vec![1], varint(0xBAD), text("127.0.0.1:1"), vec![agreed - 1]].concat();
        let (status, answer) = ask(&address, 3, &join);
        let answer = String::from_utf8(answer).unwrap();
        assert_eq!(status, 1, "{answer}");
        for part in [&format!("cluster version {}", agreed - 1), "upgrade sheep on that node"] {
            assert!(answer.contains(part), "{part:?} is not in {answer}");
        }
        // A command of a later version is proposed: request 5 (`Operate`) 0 (`Propose`).
        let command = [agreed + 1, 99, 1, 2, 3];
        let me = id(&cluster.member(0, via).unwrap()["id"]);
        let propose =
            [vec![1], varint(1), varint(me), vec![5, 0, command.len() as u8], command.to_vec()];
        let (status, answer) = ask(&address, 1, &propose.concat());
        assert_eq!(status, 0);
        match answer[..] {
            // Done on the leader: rejected, with a text.
            [1, 4, 2, ..] => {
                let text = String::from_utf8_lossy(&answer[3..]).into_owned();
                assert!(text.contains(&format!("cluster version {}", agreed + 1)), "{text}");
            }
            // The other one says who leads.
            [1, 4, 1, ..] => assert_ne!(cluster.leader(), via),
            _ => panic!("{answer:?}"),
        }
    }
    cluster.wait_healthy();
    cluster.create("v", "16M", 2);
    assert_eq!(cluster.dog(0, &["cluster", "info"])["cluster_version"], agreed);
}

/// Starts `sheep` on `dir`, which must refuse, and leave `file` as it is.
fn refuses(dir: &Path, file: &Path, parts: &[&str]) {
    let before = std::fs::read(file).unwrap();
    let refused = sheep_refused(&["--dir", &dir.display().to_string()]);
    assert_eq!(refused.code, 1, "{}", refused.message);
    for part in parts.iter().chain(&["upgrade"]) {
        assert!(refused.message.contains(part), "{part:?} is not in {}", refused.message);
    }
    assert_eq!(std::fs::read(file).unwrap(), before, "{} was changed", file.display());
}

#[test]
fn files_from_the_future_are_left_alone() {
    let lab = Lab::new("versions-disk");
    let mut cluster = Cluster::start(&lab, 1);
    cluster.create("v", "16M", 1);
    let export = cluster.export_nbd(0, "v");
    let mut client = export.connect();
    client.write(0, &[0x5A; 4096]).unwrap();
    client.flush().unwrap();
    drop(client);
    assert!(cluster.terminate(0).success());
    let dir = cluster.dir(0).to_owned();
    let with = |file: &str, change: &dyn Fn(&mut Vec<u8>), parts: &[&str]| {
        let path = dir.join(file);
        let original = std::fs::read(&path).unwrap();
        let mut changed = original.clone();
        change(&mut changed);
        assert_ne!(changed, original);
        std::fs::write(&path, changed).unwrap();
        refuses(&dir, &path, parts);
        std::fs::write(&path, original).unwrap();
    };
    let format_2 = |bytes: &mut Vec<u8>| {
        *bytes = String::from_utf8(bytes.clone()).unwrap().replacen(": 1,", ": 2,", 1).into();
    };
    let says = ["has format 2, this release understands up to 1"];
    with("node.json", &format_2, &[says[0], "node.json"]);
    with("exports.json", &format_2, &[says[0], "exports.json"]);
    // Both copies of the superblock, with right checksums.
    let next = |bytes: &mut Vec<u8>| {
        for copy in [0, 4096] {
            let sector = &mut bytes[copy..copy + 512];
            sector[8] += 1;
            let crc = crc32c::crc32c(&sector[..508]);
            sector[508..].copy_from_slice(&crc.to_le_bytes());
        }
    };
    let format = std::fs::read(dir.join("disk/superblock")).unwrap()[8];
    let disk = dir.join("disk").display().to_string();
    let found = format!("format version {}, this release reads version {format}", format + 1);
    with("disk/superblock", &next, &[&disk, &found]);
    // Everything is as it was.
    cluster.restart(0);
    cluster.wait_healthy();
    assert_eq!(export.connect().read(0, 4096).unwrap(), [0x5A; 4096]);
}
