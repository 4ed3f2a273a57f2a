//! Requests over real sockets, seen by an independent client.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::client::*;
use common::memory::{Deferred, Fixed, Memory};
use common::{Random, limits, serve, until};
use sheepdog_nbd::Limits;
use sheepdog_types::{Block, BlockInfo, Burst, Done, Request};

const SIZE: u64 = 1 << 20;

#[test]
fn every_command_works_with_both_reply_styles() {
    for structured in [false, true] {
        let memory = Memory::new(SIZE as usize);
        let (server, _dir) = serve(Fixed::one("a", memory.clone()), limits());
        let mut client = Client::go(server.local_addr(), "a", structured);
        client.write(3, b"hello");
        let answer = client.call(READ, FUA, 2, 7, b"");
        assert_eq!((&answer.data[..], answer.structured), (&b"\0hello\0"[..], structured));
        assert_eq!(client.call(WRITE, FUA, 8, 3, b"abc").errno, 0);
        assert_eq!(client.call(WRITE_ZEROES, NO_HOLE | FUA, 4, 1, b"").errno, 0);
        assert_eq!(client.read(3, 8), b"h\0lloabc");
        assert_eq!(client.call(TRIM, 0, 3, 1, b"").errno, 0);
        assert_eq!(client.read(3, 2), b"\0\0");
        assert_eq!(client.call(FLUSH, FUA, 0, 0, b"").errno, 0);
        assert_eq!(memory.flushes(), 1);
        client.request(DISC, 0, 0, 0, b"");
        client.assert_closed();
    }
}

#[test]
fn trim_with_fua_is_followed_by_a_flush() {
    let memory = Memory::new(SIZE as usize);
    let device = Deferred::new(memory.clone());
    let (server, _dir) = serve(Fixed::one("a", device), limits());
    let mut client = Client::go(server.local_addr(), "a", true);
    assert_eq!(client.call(TRIM, FUA, 0, 4096, b"").errno, 0);
    assert_eq!(memory.flushes(), 1);
    // A trim that failed is answered with its error, without a flush.
    assert_eq!(client.call(TRIM, FUA, SIZE, 4096, b"").errno, EINVAL);
    assert_eq!(memory.flushes(), 1);
}

#[test]
fn errors_carry_number_and_text_and_keep_the_session() {
    for structured in [false, true] {
        let (server, _dir) = serve(Fixed::one("a", Memory::new(SIZE as usize)), limits());
        let mut client = Client::go(server.local_addr(), "a", structured);
        let df = if structured { 0 } else { DF };
        for (command, flags, offset, len, errno) in [
            (READ, 0, SIZE - 1, 2, EINVAL),
            (READ, 0, u64::MAX, 2, EINVAL),
            (READ, 0, 0, (32 << 20) + 1, EINVAL),
            (READ, REQ_ONE | df, 0, 1, EINVAL),
            (TRIM, 0, SIZE, 1, EINVAL),
            (WRITE_ZEROES, 0, SIZE, 1, ENOSPC),
            (WRITE_ZEROES, FAST_ZERO, 0, 1, EINVAL),
            (CACHE, 0, 0, 1, EINVAL),
            (BLOCK_STATUS, 0, 0, 1, EINVAL),
            (RESIZE, 0, 0, 1, EINVAL),
            (77, 0, 0, 1, EINVAL),
        ] {
            let answer = client.call(command, flags, offset, len, b"");
            assert_eq!(answer.errno, errno, "command {command} at {offset}");
            assert_eq!((answer.structured, !answer.text.is_empty()), (structured, structured));
        }
        assert_eq!(client.call(WRITE, 0, SIZE - 1, 2, b"xy").errno, ENOSPC);
        assert_eq!(client.call(WRITE, 64, 0, 2, b"xy").errno, EINVAL);
        let large = vec![1; (32 << 20) + 1];
        assert_eq!(client.call(WRITE, 0, 0, large.len() as u32, &large).errno, EINVAL);
        for command in [READ, WRITE, TRIM, WRITE_ZEROES] {
            assert_eq!(client.call(command, 0, 5, 0, b"").errno, 0, "empty range");
        }
        assert_eq!(client.read(0, 2), [0, 0]);
    }
}

#[test]
fn df_reads_of_any_size_are_one_chunk() {
    let memory = Memory::new(40 << 20);
    Random::new()
        .bytes(4096)
        .iter()
        .zip(memory.bytes()[30 << 20..].iter_mut())
        .for_each(|(from, to)| *to = *from);
    let (server, _dir) = serve(Fixed::one("a", memory.clone()), limits());
    let mut client = Client::go(server.local_addr(), "a", true);
    for len in [1, 65536, 32 << 20] {
        let answer = client.call(READ, DF, 123, len, b"");
        assert!(answer.data == memory.bytes()[123..][..len as usize]);
    }
}

#[test]
fn replies_out_of_order_find_their_requests() {
    let memory = Memory::new(SIZE as usize);
    for (i, byte) in memory.bytes().iter_mut().enumerate() {
        *byte = (i / 512) as u8;
    }
    let device = Deferred::new(memory);
    let (server, _dir) = serve(Fixed::one("a", device.clone()), limits());
    let mut client = Client::go(server.local_addr(), "a", true);
    device.set_closed(true);
    let cookies: Vec<u64> = (0..20).map(|i| client.request(READ, 0, i * 512, 512, b"")).collect();
    device.wait_submitted(20);
    device.set_closed(false);
    let mut order = vec![];
    for _ in 0..20 {
        // The offset is checked by hand, as it depends on the cookie.
        let head = client.take(20);
        let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
        let at = cookies.iter().position(|&known| known == cookie).unwrap() as u64;
        assert_eq!(client.take_u64(), at * 512);
        assert_eq!(client.take(512), [at as u8; 512]);
        order.push(at);
    }
    assert!(order.windows(2).any(|pair| pair[0] > pair[1]), "the device reverses: {order:?}");
}

#[test]
fn random_operations_agree_with_a_model() {
    let mut random = Random::new();
    for threaded in [false, true] {
        let memory = Memory::new(SIZE as usize);
        let device: Arc<dyn Block> =
            if threaded { Deferred::new(memory.clone()) } else { memory.clone() };
        let (server, _dir) = serve(Fixed::one("a", device), limits());
        let mut client = Client::go(server.local_addr(), "a", random.below(2) == 0);
        let mut model = vec![0u8; SIZE as usize];
        for _ in 0..300 {
            let offset = random.below(SIZE) as usize;
            let max = [16, 5000, 300_000][random.below(3) as usize];
            let len = random.below(max).min(SIZE - offset as u64) as usize;
            let (range, at, n) = (offset..offset + len, offset as u64, len as u32);
            match random.below(4) {
                0 => {
                    model[range].fill(0);
                    assert_eq!(client.call(WRITE_ZEROES, 0, at, n, b"").errno, 0);
                }
                1 => assert!(client.read(at, n) == model[range]),
                _ => {
                    let data = random.bytes(len);
                    model[range].copy_from_slice(&data);
                    client.write(at, &data);
                }
            }
        }
        assert!(*memory.bytes() == model);
    }
}

#[test]
fn a_wrong_magic_ends_the_session_after_what_is_in_flight() {
    let device = Deferred::new(Memory::new(4096));
    let (server, _dir) = serve(Fixed::one("a", device.clone()), limits());
    let mut client = Client::go(server.local_addr(), "a", true);
    device.set_closed(true);
    let cookie = client.request(WRITE, 0, 0, 3, b"abc");
    client.put(&[0x11; 28]);
    device.set_closed(false);
    assert_eq!(client.answer(WRITE, 0, 3).cookie, cookie);
    client.assert_closed();
}

#[test]
fn disc_waits_for_requests_in_flight() {
    let memory = Memory::new(4096);
    let device = Deferred::new(memory.clone());
    let (server, _dir) = serve(Fixed::one("a", device.clone()), limits());
    let mut client = Client::go(server.local_addr(), "a", true);
    device.set_closed(true);
    let cookies = [client.request(WRITE, 0, 0, 3, b"abc"), client.request(READ, 0, 8, 3, b"")];
    client.request(DISC, 0xffff, 0, 0, b"");
    client.request(WRITE, 0, 0, 3, b"xyz");
    device.wait_submitted(2);
    device.set_closed(false);
    // The last chunk of a read is 28 + 3 bytes, the reply to a write 16.
    let replies = client.take(28 + 3 + 16);
    for cookie in cookies {
        assert!(replies.windows(8).any(|bytes| bytes == cookie.to_be_bytes()));
    }
    client.assert_closed();
    assert_eq!(memory.bytes()[..3], *b"abc");
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    let memory = Memory::new(SIZE as usize);
    let device = Deferred::new(memory.clone());
    let (server, _dir) = serve(Fixed::one("a", device.clone()), limits());
    // In the middle of a header, in the middle of a payload (small and large), with reads and
    // writes in flight.
    for bytes in [
        request_bytes(READ, 0, 1, 0, 4)[..20].to_vec(),
        [request_bytes(WRITE, 0, 1, 0, 4), b"abc".to_vec()].concat(),
        [request_bytes(WRITE, 0, 1, 0, 1 << 20), vec![1; 300_000]].concat(),
        [request_bytes(WRITE, 64, 1, 0, 1 << 20), vec![1; 300_000]].concat(),
    ] {
        let mut client = Client::go(server.local_addr(), "a", true);
        client.put(&bytes);
    }
    device.set_closed(true);
    let mut client = Client::go(server.local_addr(), "a", true);
    client.request(WRITE, 0, 0, 4, b"kept");
    client.request(READ, 0, 0, SIZE as u32, b"");
    device.wait_submitted(2);
    drop(client);
    device.set_closed(false);
    until(|| server.connections() == 0);
    assert_eq!(memory.bytes()[..5], *b"kept\0");
    assert_eq!(device.submitted(), 2, "incomplete writes never reach the device");
    assert_eq!(Client::go(server.local_addr(), "a", false).read(0, 4), b"kept");
}

/// Keeps all requests, until it hears that their client is gone or is told to fail them.
#[derive(Default)]
struct Waiting(Mutex<Vec<Request>>);

impl Waiting {
    fn fail(&self, which: impl Fn(&Request) -> bool) {
        let ended: Vec<_> =
            self.0.lock().unwrap().extract_if(.., |request| which(request)).collect();
        drop(ended);
    }
}

impl Block for Waiting {
    fn info(&self) -> BlockInfo {
        BlockInfo { size: SIZE, read_only: false, serial: String::new() }
    }

    fn submit(&self, batch: &mut Vec<Request>) {
        self.0.lock().unwrap().append(batch);
    }

    fn client_gone(&self) {
        self.fail(|request| !request.token.is_wanted());
    }
}

#[test]
fn a_device_learns_whose_requests_are_not_wanted_any_more() {
    let (limits, device) = (Limits { max_requests: 4, ..limits() }, Arc::new(Waiting::default()));
    let (server, _dir) = serve(Fixed::one("a", device.clone()), limits);
    let held = |count| until(|| device.0.lock().unwrap().len() == count);
    let mut stays = Client::go(server.local_addr(), "a", true);
    stays.request(READ, 0, 0, 4, b"");
    held(1);
    // One that says good-bye, and one that just vanishes with more behind it than is read.
    for vanishes in [false, true] {
        let mut goes = Client::go(server.local_addr(), "a", true);
        let requests = if vanishes { limits.max_requests + 5 } else { 1 };
        (0..requests).for_each(|_| _ = goes.request(WRITE, 0, 0, 4, b"left"));
        held(1 + requests.min(limits.max_requests));
        if !vanishes {
            goes.request(DISC, 0, 0, 0, b"");
        }
        drop(goes);
        if vanishes {
            // Nobody has read so far, but a look tells.
            let wanted = || device.0.lock().unwrap().iter().filter(|r| r.token.is_wanted()).count();
            until(|| wanted() == 1);
        }
        until(|| {
            if vanishes {
                device.client_gone(); // the window lets more in
            }
            server.connections() == 1
        });
        held(1);
    }
    device.fail(|_| true);
    assert_eq!(stays.answer(READ, 0, 4).errno, EIO);
}

#[test]
fn a_slow_reader_is_bounded_by_the_window() {
    let limits = Limits { max_requests: 8, max_bytes: 1 << 20, ..limits() };
    let device = Deferred::new(Memory::new(SIZE as usize));
    let (server, _dir) = serve(Fixed::one("a", device.clone()), limits);
    let mut client = Client::go(server.local_addr(), "a", true);
    let len = 300_000;
    device.set_closed(true);
    let cookies: Vec<_> = (0..20).map(|_| client.request(READ, 0, 0, len, b"")).collect();
    device.wait_submitted(3);
    device.set_closed(false);
    // The device is idle and nothing was read: only what fits into window and socket was begun.
    let mut other = Client::go(server.local_addr(), "a", true);
    other.read(0, 1);
    assert!(device.submitted() < 8, "{} requests were submitted", device.submitted());
    let mut seen: Vec<_> = (0..20).map(|_| client.answer(READ, 0, len).cookie).collect();
    seen.sort_unstable();
    assert_eq!(seen, cookies);
    assert_eq!(device.submitted(), 21);
}

#[test]
fn replies_from_two_threads_stay_whole_when_the_socket_fills() {
    let len = 100_000;
    let device = Deferred::new(Memory::new(SIZE as usize));
    let (server, _dir) = serve(Fixed::one("a", device), limits());
    let mut client = Client::go(server.local_addr(), "a", true);
    for _ in 0..10 {
        // The device's thread answers reads while the connection's thread answers the others
        // and writes on when the socket has room.
        let cookies: Vec<_> =
            (0..120).map(|i| client.request([READ, 77][i % 2], 0, 0, len, b"")).collect();
        let mut seen: Vec<_> = (0..120).map(|_| client.answer(READ, 0, len).cookie).collect();
        seen.sort_unstable();
        assert_eq!(seen, cookies);
    }
}

#[test]
fn the_window_counts_requests_and_refusals() {
    let limits = Limits { max_requests: 4, ..limits() };
    let device = Deferred::new(Memory::new(SIZE as usize));
    let (server, _dir) = serve(Fixed::one("a", device.clone()), limits);
    let mut client = Client::go(server.local_addr(), "a", false);
    device.set_closed(true);
    // In one piece, so that a server without the bound would take them all at once.
    let pair = [request_bytes(FLUSH, 0, 1, 0, 0), request_bytes(77, 0, 2, 0, 0)].concat();
    client.put(&pair.repeat(50));
    device.wait_submitted(4);
    assert_eq!(device.submitted(), 4);
    let mut refusals = 0;
    device.set_closed(false);
    for _ in 0..100 {
        refusals += usize::from(client.answer(FLUSH, 0, 0).errno == EINVAL);
    }
    assert_eq!((refusals, device.submitted()), (50, 50));
}

#[test]
fn a_request_larger_than_the_window_passes_alone() {
    let limits = Limits { max_bytes: 4096, ..limits() };
    let (server, _dir) = serve(Fixed::one("a", Memory::new(SIZE as usize)), limits);
    let mut client = Client::go(server.local_addr(), "a", true);
    client.write(0, &[3; 100_000]);
    for _ in 0..3 {
        client.request(READ, 0, 0, 100_000, b"");
    }
    for _ in 0..3 {
        assert_eq!(client.answer(READ, 0, 100_000).data, [3; 100_000]);
    }
}

#[test]
fn stop_finishes_what_is_in_flight_and_refuses_the_rest() {
    let memory = Memory::new(SIZE as usize);
    let device = Deferred::new(memory.clone());
    let (server, dir) = serve(Fixed::one("a", device.clone()), limits());
    let mut client = Client::go(server.local_addr(), "a", true);
    let mut idle = Client::go(server.local_addr(), "a", true);
    let mut greeted = Client::hello(server.local_addr());
    let mut partial = Client::go(server.local_addr(), "a", true);
    partial.put(&[request_bytes(WRITE, 0, 1, 100, 1000), vec![1; 10]].concat());
    device.set_closed(true);
    let first = client.request(WRITE, 0, 0, 4, b"kept");
    device.wait_submitted(1);
    thread::scope(|scope| {
        let stopping = scope.spawn(|| server.stop());
        idle.assert_closed();
        greeted.assert_closed();
        partial.assert_closed();
        // The busy connection may hear of the stop a little later. This never reaches the device.
        while client.call(READ, REQ_ONE, 0, 1, b"").errno == EINVAL {}
        assert_eq!(client.call(READ, 0, 0, 1, b"").errno, ESHUTDOWN);
        assert_eq!(client.call(WRITE, 0, 0, 4, b"late").errno, ESHUTDOWN);
        assert_eq!(device.submitted(), 1);
        assert!(!stopping.is_finished());
        device.set_closed(false);
        assert_eq!(client.answer(WRITE, 0, 4).cookie, first);
        client.assert_closed();
        stopping.join().unwrap();
    });
    assert_eq!(memory.bytes()[..4], *b"kept");
    assert_eq!(memory.bytes()[100..110], [0; 10]);
    assert!(!dir.socket().exists());
    assert_eq!(server.connections(), 0);
}

#[test]
fn stop_does_not_wait_for_ever() {
    let limits = Limits { linger: Duration::from_millis(50), ..limits() };
    let device = Deferred::new(Memory::new(SIZE as usize));
    let (server, _dir) = serve(Fixed::one("a", device.clone()), limits);
    let mut client = Client::go(server.local_addr(), "a", true);
    device.set_closed(true);
    client.request(READ, 0, 0, 4, b"");
    device.wait_submitted(1);
    server.stop();
    client.assert_closed();
    // The completion that comes too late is dropped.
    device.set_closed(false);
}

#[test]
fn stop_ends_with_a_client_that_never_reads() {
    let limits = Limits { linger: Duration::from_millis(50), ..limits() };
    let (server, _dir) = serve(Fixed::one("a", Memory::new(8 << 20)), limits);
    let mut client = Client::go(server.local_addr(), "a", true);
    for _ in 0..20 {
        client.request(READ, 0, 0, 8 << 20, b"");
    }
    server.stop();
    assert_eq!(server.connections(), 0);
}

#[test]
fn stop_ends_with_a_client_that_never_stops_sending() {
    let limits = Limits { linger: Duration::from_millis(50), ..limits() };
    let (server, dir) = serve(Fixed::one("a", Memory::new(4096)), limits);
    let mut client = Client::go(server.local_addr(), "a", false);
    // A refused write of almost 4 GiB is skipped, so the flood needs no replies.
    client.request(WRITE, 0, 0, u32::MAX, b"");
    let flood = thread::spawn(move || {
        let piece = vec![0; 1 << 20];
        (0..4000).find_map(|_| client.stream.write_all(&piece).err()).is_some()
    });
    server.stop();
    assert!(flood.join().unwrap(), "the connection is closed under the flood");
    assert!(!dir.socket().exists());
}

/// Answers reads with the wrong length, panics on writes, and drops all other requests.
struct Faulty;

impl Block for Faulty {
    fn info(&self) -> BlockInfo {
        BlockInfo { size: SIZE, read_only: false, serial: String::new() }
    }

    fn submit(&self, batch: &mut Vec<Request>) {
        for Request { op, token } in batch.drain(..) {
            match op {
                sheepdog_types::Op::Read { .. } => {
                    token.complete(Ok(Done::Data(vec![0; 3])), &mut Burst::new());
                }
                sheepdog_types::Op::Write { .. } => panic!("on purpose"),
                _ => drop(token),
            }
        }
    }
}

#[test]
fn a_faulty_device_gives_errors_not_lost_replies() {
    let (server, _dir) = serve(Fixed::one("a", Arc::new(Faulty)), limits());
    for structured in [false, true] {
        let mut client = Client::go(server.local_addr(), "a", structured);
        assert_eq!(client.call(READ, 0, 0, 4, b"").errno, EIO);
        assert_eq!(client.call(FLUSH, 0, 0, 0, b"").errno, EIO);
        assert_eq!(client.call(TRIM, FUA, 0, 4, b"").errno, EIO);
    }
    let mut client = Client::go(server.local_addr(), "a", false);
    assert_eq!(client.call(WRITE, 0, 0, 4, b"abcd").errno, EIO);
    client.assert_closed();
    assert_eq!(Client::go(server.local_addr(), "a", false).call(FLUSH, 0, 0, 0, b"").errno, EIO);
}

#[test]
fn garbage_in_transmission_is_survived() {
    let mut random = Random::new();
    let (server, _dir) = serve(Fixed::one("a", Memory::new(SIZE as usize)), limits());
    for _ in 0..60 {
        let mut client = Client::go(server.local_addr(), "a", random.below(2) == 0);
        for _ in 0..random.below(5) {
            let (command, flags) = (random.below(9) as u16, random.below(20) as u16);
            let len = random.below(300) as u32;
            let bytes = request_bytes(command, flags, random.next(), random.below(SIZE), len);
            let payload = random.bytes(len as usize);
            // The server may have closed already: that is fine.
            let _ = client.stream.write_all(&[bytes, payload].concat());
        }
        let len = random.below(3000) as usize;
        let _ = client.stream.write_all(&random.bytes(len));
    }
    assert_eq!(Client::go(server.local_addr(), "a", true).read(0, 0), b"");
}

#[test]
fn many_connections_see_each_others_writes() {
    let device = Deferred::new(Memory::new(SIZE as usize));
    let (server, _dir) = serve(Fixed::one("a", device), limits());
    let address = server.local_addr();
    thread::scope(|scope| {
        for i in 0..8u64 {
            scope.spawn(move || {
                let mut client = Client::go(address, "a", true);
                for n in 0..50u8 {
                    client.write(i * 8192, &[n; 8192]);
                    assert_eq!(client.read(i * 8192, 8192), [n; 8192]);
                }
            });
        }
    });
    let mut client = Client::go(address, "a", true);
    assert!(client.read(0, 65536).iter().all(|&byte| byte == 49));
}
