//! The handshake over real sockets, seen by an independent client.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use common::client::{ACK, Client, EPERM, READ, WRITE, info_data};
use common::memory::{Fixed, Memory};
use common::{Dir, Random, limits, serve, until};
use sheepdog_nbd::{Limits, Server, ServerHandle};
use sheepdog_types::Block;

const UNSUP: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;

fn two() -> (ServerHandle, Dir) {
    let (a, b): (Arc<dyn Block>, Arc<dyn Block>) = (Memory::new(1 << 20), Memory::with(4096, true));
    serve(Arc::new(Fixed(vec![("a".into(), a), ("b".into(), b)])), limits())
}

#[test]
fn list_names_every_export() {
    let (server, _dir) = two();
    let mut client = Client::hello(server.local_addr());
    let replies = client.option_all(3, b"");
    let kinds: Vec<_> = replies.iter().map(|reply| reply.kind).collect();
    assert_eq!(kinds, [2, 2, ACK]);
    assert_eq!(replies[0].data, b"\0\0\0\x01a");
    assert_eq!(replies[1].data, b"\0\0\0\x01b");
    assert_eq!(client.option(3, b"x").kind, INVALID);
}

#[test]
fn names_that_the_protocol_forbids_are_not_sent() {
    let exports = ["n".repeat(4097), "nul\0".into(), "n".repeat(4096)];
    let exports = exports.map(|name| (name, Memory::new(16) as Arc<dyn Block>));
    let (server, _dir) = serve(Arc::new(Fixed(exports.into())), limits());
    let replies = Client::hello(server.local_addr()).option_all(3, b"");
    assert_eq!(replies.iter().map(|reply| reply.data.len()).collect::<Vec<_>>(), [4100, 0]);
}

#[test]
fn unknown_options_leave_the_session_usable() {
    let (server, _dir) = two();
    let mut client = Client::hello(server.local_addr());
    for option in [0, 4, 5, 9, 10, 11, 12345] {
        let reply = client.option(option, b"some data");
        assert_eq!(reply.kind, UNSUP, "option {option}");
        assert!(!reply.data.is_empty(), "an error has a text");
    }
    assert_eq!(client.option(999, &vec![7; 300_000]).kind, UNSUP);
    assert_eq!(client.option(8, b"x").kind, INVALID);
    client.option_go("a");
    client.write(10, b"works");
    assert_eq!(client.read(9, 7), b"\0works\0");
}

#[test]
fn malformed_info_is_refused_and_survived() {
    let (server, _dir) = two();
    let mut client = Client::hello(server.local_addr());
    let long_name = "n".repeat(4097);
    for data in [
        &b""[..],
        b"\0\0\0\x05a\0\0",
        b"\xff\xff\xff\xffa\0\0",
        b"\0\0\0\x01a\0\x01",
        b"\0\0\0\x01a\0\0extra",
        b"\0\0\0\x01\xff\0\0",
        b"\0\0\0\x01\0\0\0",
        &info_data(&long_name, &[]),
    ] {
        assert_eq!(client.option(6, data).kind, INVALID, "{data:?}");
        assert_eq!(client.option(7, data).kind, INVALID, "{data:?}");
    }
    assert_eq!(client.option(6, &info_data("a", &[9; 5000])).kind, TOO_BIG);
    client.option_go("a");
    assert_eq!(client.size, 1 << 20);
}

#[test]
fn unavailable_exports_say_why() {
    let (server, _dir) = two();
    let mut client = Client::hello(server.local_addr());
    for (name, kind, text) in [
        ("c", UNKNOWN, "no export has this name"),
        ("broken", UNKNOWN, "the export is not available: no quorum"),
        ("private", POLICY, "refused: not for you"),
        // There are two exports, so none is the default.
        ("", UNKNOWN, "no export has this name"),
    ] {
        for option in [6, 7] {
            let reply = client.option(option, &info_data(name, &[0, 1, 2, 3]));
            assert_eq!((reply.kind, reply.data), (kind, text.into()), "{name}");
        }
    }
}

#[test]
fn info_answers_what_was_asked_and_go_the_same() {
    let (server, _dir) = serve(Fixed::one("only", Memory::new(5000)), limits());
    let mut client = Client::hello(server.local_addr());
    assert_eq!(client.option(8, b"").kind, ACK);
    let replies = client.option_all(6, &info_data("", &[3, 1, 99, 2, 1]));
    let data: Vec<_> = replies.iter().map(|reply| reply.data.clone()).collect();
    // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, DF, CAN_MULTI_CONN.
    let export = [&[0, 0][..], &5000u64.to_be_bytes(), &[0x01, 0xed]].concat();
    let sizes = [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0].to_vec();
    let text = b"\0\x02Sheepdog volume, serial mem-1".to_vec();
    assert_eq!(data, [export.clone(), b"\0\x01only".to_vec(), text, sizes, vec![]]);
    let again = client.option_all(7, &info_data("", &[3, 1, 99, 2, 1]));
    assert_eq!(again.iter().map(|reply| reply.data.clone()).collect::<Vec<_>>(), data);
    client.structured = true;
    assert_eq!(client.call(READ, 0, 0, 0, b"").errno, 0, "in transmission");
    let mut other = Client::hello(server.local_addr());
    let replies = other.option_all(6, &info_data("only", &[]));
    assert_eq!(replies.len(), 2, "nothing that was not asked for");
    assert_eq!(replies[0].data[10..], [0x01, 0x6d], "no DF without structured replies");
}

#[test]
fn read_only_exports_are_flagged_and_refuse_writes() {
    let (server, _dir) = two();
    let mut client = Client::go(server.local_addr(), "b", true);
    assert_eq!(client.flags, 0x018f, "READ_ONLY, and neither TRIM nor WRITE_ZEROES");
    assert_eq!(client.call(WRITE, 0, 0, 5, b"hello").errno, EPERM);
    assert_eq!(client.read(0, 5), [0; 5]);
}

#[test]
fn abort_is_acknowledged_and_closes() {
    let (server, _dir) = two();
    let mut client = Client::hello(server.local_addr());
    assert_eq!(client.option(2, b"ignored").kind, ACK);
    client.assert_closed();
}

#[test]
fn export_name_enters_transmission_or_closes() {
    let (server, _dir) = two();
    let mut client = Client::connect(server.local_addr());
    client.put(&1u32.to_be_bytes());
    client.send_option(1, b"a");
    let answer = client.take(8 + 2 + 124);
    assert_eq!(answer[..8], (1u64 << 20).to_be_bytes());
    client.write(0, b"x");
    assert_eq!(client.read(0, 2), b"x\0");
    let mut client = Client::hello(server.local_addr());
    client.send_option(1, b"nope");
    client.assert_closed();
}

#[test]
fn unknown_client_flags_close() {
    let (server, _dir) = two();
    let mut client = Client::connect(server.local_addr());
    client.put(&7u32.to_be_bytes());
    client.assert_closed();
}

#[test]
fn too_many_clients_are_told_so() {
    let limits = Limits { max_connections: 2, ..limits() };
    let (server, _dir) = serve(Fixed::one("a", Memory::new(4096)), limits);
    let mut first = Client::go(server.local_addr(), "a", false);
    let _half_open = Client::hello(server.local_addr());
    let mut third = Client::hello(server.local_addr());
    let reply = third.option(7, &info_data("a", &[]));
    assert_eq!(reply.kind, POLICY);
    assert_eq!(reply.data, b"the server has as many clients as it may have");
    assert_eq!((server.clients(), server.clients_of("a"), server.clients_of("b")), (1, 1, 0));
    assert_eq!(server.connections(), 3);
    assert_eq!(first.read(0, 2), [0, 0]);
    // Beyond the polite ones, connections are closed at once.
    let polite: Vec<_> = (0..15).map(|_| Client::hello(server.local_addr())).collect();
    let mut late = common::client::raw(server.local_addr());
    assert_eq!(late.read(&mut [0]).unwrap(), 0);
    // Closing one makes room again.
    drop((third, polite));
    first.put(&common::client::request_bytes(2, 0, 1, 0, 0));
    first.assert_closed();
    until(|| server.connections() <= 1);
    Client::go(server.local_addr(), "a", false);
}

#[test]
fn a_client_that_does_not_finish_its_handshake_is_dropped() {
    let limits = Limits { handshake: Duration::from_millis(50), ..limits() };
    let (server, _dir) = serve(Fixed::one("a", Memory::new(4096)), limits);
    let mut silent = Client::connect(server.local_addr());
    let mut slow = Client::connect(server.local_addr());
    // On a busy machine it is dropped before it has said that much.
    let _ = slow.stream.write_all(b"\0\0\0\x03IHAVE");
    silent.assert_closed();
    slow.assert_closed();
    until(|| server.connections() == 0);
}

#[test]
fn a_client_that_reads_no_answers_cannot_pile_them_up() {
    let limits = Limits { handshake: Duration::from_millis(300), ..limits() };
    let exports: Vec<(String, Arc<dyn Block>)> = (0..200)
        .map(|i| (format!("{i}{}", "n".repeat(4000)), Memory::new(16) as Arc<dyn Block>))
        .collect();
    let (server, _dir) = serve(Arc::new(Fixed(exports)), limits);
    let mut client = Client::connect(server.local_addr());
    let flags = client.stream.write_all(&3u32.to_be_bytes());
    let list = [&b"IHAVEOPT"[..], &[0, 0, 0, 3, 0, 0, 0, 0]].concat().repeat(4096);
    // The server stops reading after a list; our writes end when it gives up on us.
    let rest = (0..100).map(|_| client.stream.write_all(&list));
    let error = std::iter::once(flags).chain(rest).find_map(Result::err).unwrap();
    assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
}

#[test]
fn garbage_gets_no_further_than_its_own_connection() {
    let (server, _dir) = two();
    let mut random = Random::new();
    for round in 0..60 {
        let mut client = Client::connect(server.local_addr());
        if round % 2 == 0 {
            client.put(&3u32.to_be_bytes());
        }
        let len = 1 + random.below(5000) as usize;
        // The server may have closed already: that is fine.
        let _ = client.stream.write_all(&random.bytes(len));
    }
    assert_eq!(Client::go(server.local_addr(), "a", true).read(0, 1), [0]);
}

#[test]
fn tcp_serves_as_well() {
    let listener = Server::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let exports = Fixed::one("a", Memory::new(1 << 20));
    let server = Server::start(listener, exports, limits()).unwrap();
    let mut client = Client::go(server.local_addr(), "a", true);
    client.write(1000, &[7; 100_000]);
    assert_eq!(client.read(1000, 100_000), [7; 100_000]);
    server.stop();
    client.assert_closed();
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let dir = Dir::new();
    drop(UnixListener::bind(dir.socket()).unwrap());
    let listener = Server::bind_unix(dir.socket(), 0o640).unwrap();
    let mode = std::fs::metadata(dir.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    let error = Server::bind_unix(dir.socket(), 0o600).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    assert!(error.to_string().contains("another server listens"), "{error}");
    drop(listener);
    assert!(!dir.socket().exists(), "the socket file is removed");
    std::fs::write(dir.socket(), b"precious").unwrap();
    let error = Server::bind_unix(dir.socket(), 0o600).unwrap_err();
    assert!(error.to_string().contains("not a socket"), "{error}");
    assert_eq!(std::fs::read(dir.socket()).unwrap(), b"precious");
}

#[test]
fn a_socket_file_that_was_replaced_is_not_removed() {
    let dir = Dir::new();
    let listener = Server::bind_unix(dir.socket(), 0o600).unwrap();
    std::fs::remove_file(dir.socket()).unwrap();
    // Held open so that the file number cannot be the same.
    let _other = UnixListener::bind(dir.socket()).unwrap();
    drop(listener);
    assert!(dir.socket().exists());
}
