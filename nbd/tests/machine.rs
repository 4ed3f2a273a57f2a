//! The protocol machine without sockets: raw bytes in, events and bytes out.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::Random;
use common::client::{self as nbd, info_data, request_bytes};
use common::memory::{Fixed, Memory};
use sheepdog_nbd::machine::handshake::{Agreed, Gate, Handshake, MAX_OPTION_DATA, Step};
use sheepdog_nbd::machine::input::Input;
use sheepdog_nbd::machine::reply::Refusal;
use sheepdog_nbd::machine::transmission::{Event, Transmission};
use sheepdog_nbd::machine::wire::Errno;
use sheepdog_types::Op;

const CAPACITY: usize = 64 << 10;

enum End {
    Waiting,
    Agreed(Agreed),
    Closed,
}

/// Feeds `bytes` in pieces of `step`; the end, what was sent after the greeting, what is left.
fn shake(bytes: &[u8], step: usize, gate: Gate) -> (End, Vec<u8>, Vec<u8>) {
    let exports = Fixed::one("a", Memory::new(1 << 20));
    let (mut input, mut out) = (Input::new(CAPACITY), Vec::new());
    let mut machine = Handshake::start(&mut out);
    assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
    out.clear();
    for piece in bytes.chunks(step) {
        assert_eq!(input.push(piece), piece.len(), "the buffer must never be full");
        loop {
            match machine.handle(&mut input, &*exports, gate, &mut out) {
                Step::NeedInput => break,
                Step::Answered => {}
                Step::Transmission(agreed) => {
                    return (End::Agreed(agreed), out, input.bytes().to_vec());
                }
                Step::Close(_) => return (End::Closed, out, vec![]),
            }
        }
    }
    (End::Waiting, out, input.bytes().to_vec())
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn with_flags(flags: u32, options: &[Vec<u8>]) -> Vec<u8> {
    [flags.to_be_bytes().to_vec(), options.concat()].concat()
}

/// Kinds of the option replies in `out`, which must be well formed.
fn kinds(mut out: &[u8]) -> Vec<u32> {
    let mut kinds = vec![];
    while !out.is_empty() {
        assert_eq!(out[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        let field = |at: usize| u32::from_be_bytes(out[at..at + 4].try_into().unwrap());
        kinds.push(field(12));
        out = &out[20 + field(16) as usize..];
    }
    kinds
}

#[test]
fn the_result_does_not_depend_on_how_bytes_arrive() {
    let junk = vec![9; MAX_OPTION_DATA + 100];
    let options =
        [option(99, b"xyz"), option(98, &junk), option(8, b""), option(7, &info_data("a", &[3]))];
    let bytes = [with_flags(3, &options), b"rest".to_vec()].concat();
    let (_, whole, _) = shake(&bytes, CAPACITY, Gate::Open);
    assert_eq!(kinds(&whole), [0x8000_0001, 0x8000_0001, 1, 3, 3, 1]);
    for step in [1, 2, 3, 7, 28, 1000] {
        let (end, out, rest) = shake(&bytes[..bytes.len() - 4], step, Gate::Open);
        let End::Agreed(agreed) = end else { panic!("step {step}") };
        assert!(agreed.structured && !agreed.read_only && agreed.name == "a");
        assert_eq!((out, rest), (whole.clone(), vec![]), "step {step}");
    }
}

#[test]
fn bytes_after_go_belong_to_transmission() {
    let bytes = [with_flags(3, &[option(7, &info_data("", &[]))]), b"rest".to_vec()].concat();
    let (end, _, rest) = shake(&bytes, CAPACITY, Gate::Open);
    assert!(matches!(end, End::Agreed(agreed) if agreed.name == "a"));
    assert_eq!(rest, b"rest");
}

#[test]
fn export_name_answers_with_or_without_padding() {
    for (flags, len) in [(3, 10), (1, 134), (2, 10), (0, 134)] {
        let (end, out, _) = shake(&with_flags(flags, &[option(1, b"a")]), 5, Gate::Open);
        assert!(matches!(end, End::Agreed(_)));
        assert_eq!(out.len(), len);
        assert_eq!(out[..8], (1u64 << 20).to_be_bytes());
        assert_eq!(out[8..10], [0x01, 0x6d], "flags without SEND_DF");
        assert!(out[10..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn violations_close_the_connection() {
    let long = vec![b'x'; 5000];
    let very_long = vec![b'x'; MAX_OPTION_DATA + 1];
    for bytes in [
        with_flags(4, &[]),
        with_flags(1 << 31 | 3, &[]),
        with_flags(3, &[b"NOTMAGIC\0\0\0\x07\0\0\0\0".to_vec()]),
        with_flags(2, &[option(7, &info_data("a", &[]))]),
        with_flags(3, &[option(1, b"unknown")]),
        with_flags(3, &[option(1, b"\xff")]),
        with_flags(3, &[option(1, &long)]),
        with_flags(3, &[option(1, &very_long)]),
    ] {
        let (end, out, _) = shake(&bytes, CAPACITY, Gate::Open);
        assert!(matches!(end, End::Closed), "{bytes:?}");
        assert_eq!(out, b"");
    }
}

#[test]
fn a_closed_gate_errors_options_but_not_abort() {
    let options =
        [option(3, b""), option(7, &info_data("a", &[])), option(99, b""), option(2, b"")];
    for (gate, kind) in [(Gate::Stopping, 0x8000_0007), (Gate::Full, 0x8000_0002)] {
        let (end, out, _) = shake(&with_flags(3, &options), CAPACITY, gate);
        assert!(matches!(end, End::Closed));
        assert_eq!(kinds(&out), [kind, kind, kind, 1]);
        let (end, ..) = shake(&with_flags(3, &[option(1, b"a")]), CAPACITY, gate);
        assert!(matches!(end, End::Closed));
    }
}

#[test]
fn random_handshakes_never_panic() {
    let mut random = Random::new();
    for _ in 0..3000 {
        let mut bytes = with_flags(3, &[]);
        for _ in 0..random.below(6) {
            let len = random.below(40) as usize;
            let mut next = option(random.below(12) as u32, &random.bytes(len));
            if random.below(4) == 0 {
                let at = random.below(next.len() as u64) as usize;
                next[at] ^= 1 << random.below(8);
            }
            bytes.extend(next);
        }
        let (_, out, _) = shake(&bytes, 1 + random.below(60) as usize, Gate::Open);
        assert!(out.len() < 4096);
    }
}

/// Feeds `bytes` in pieces of `step` and collects events, with tickets counting from 0.
fn run(machine: &mut Transmission, bytes: &[u8], step: usize, direct: bool) -> Vec<Event> {
    let (mut input, mut events, mut next) = (Input::new(CAPACITY), vec![], 0);
    for mut piece in bytes.chunks(step) {
        if direct && let Some(space) = machine.payload_space() {
            let n = space.len().min(piece.len());
            space[..n].copy_from_slice(&piece[..n]);
            machine.payload_received(n);
            piece = &piece[n..];
        }
        assert_eq!(input.push(piece), piece.len());
        loop {
            let event = machine.poll(&mut input, |_| {
                next += 1;
                Some(next - 1)
            });
            match event {
                Event::NeedInput => break,
                Event::Disconnect | Event::Violation(_) => {
                    events.push(event);
                    return events;
                }
                event => events.push(event),
            }
        }
    }
    events
}

fn refused(ticket: u64, errno: Errno) -> impl Fn(&Event) -> bool {
    move |event| {
        matches!(event, Event::Answer { ticket: t, outcome: Err(Refusal { errno: e, .. }) }
            if *t == ticket && *e == errno)
    }
}

#[test]
fn requests_become_operations_however_bytes_arrive() {
    let data: Vec<u8> = (0..100).collect();
    let bytes = [
        request_bytes(nbd::READ, nbd::FUA, 1, 5, 6),
        [request_bytes(nbd::WRITE, nbd::FUA, 2, 7, 100), data.clone()].concat(),
        request_bytes(nbd::FLUSH, 0, 3, 0, 0),
        request_bytes(nbd::TRIM, 0, 4, 8, u32::MAX),
        request_bytes(nbd::TRIM, nbd::FUA, 5, 8, 9),
        request_bytes(nbd::WRITE_ZEROES, 0, 6, 1, 2),
        request_bytes(nbd::WRITE_ZEROES, nbd::FUA | nbd::NO_HOLE, 7, 1, u32::MAX),
        request_bytes(nbd::DISC, 0, 8, 0, 0),
    ]
    .concat();
    let request = |ticket, op| Event::Request { ticket, op, then_flush: false };
    let zeroes = |len, may_unmap, fua| Op::WriteZeroes { offset: 1, len, may_unmap, fua };
    let expected = || {
        vec![
            request(0, Op::Read { offset: 5, len: 6 }),
            request(1, Op::Write { offset: 7, data: data.clone(), fua: true }),
            request(2, Op::Flush),
            request(3, Op::Discard { offset: 8, len: u32::MAX.into() }),
            Event::Request { ticket: 4, op: Op::Discard { offset: 8, len: 9 }, then_flush: true },
            request(5, zeroes(2, true, false)),
            request(6, zeroes(u32::MAX.into(), false, true)),
            Event::Disconnect,
        ]
    };
    for step in [1, 2, 27, 28, 29, 50, 1000] {
        for direct in [false, true] {
            let events = run(&mut Transmission::new(true, false), &bytes, step, direct);
            assert_eq!(events, expected(), "step {step}, direct {direct}");
        }
    }
}

#[test]
fn empty_ranges_need_no_device() {
    for command in [nbd::READ, nbd::WRITE, nbd::TRIM, nbd::WRITE_ZEROES] {
        let bytes = request_bytes(command, 0, 1, 4, 0);
        let events = run(&mut Transmission::new(true, false), &bytes, 100, false);
        assert_eq!(events, [Event::Answer { ticket: 0, outcome: Ok(()) }]);
    }
}

#[test]
fn refusals_have_the_right_number() {
    let plain = || Transmission::new(false, false);
    let structured = || Transmission::new(true, false);
    let read_only = || Transmission::new(true, true);
    let stopped = || {
        let mut machine = structured();
        machine.stop();
        machine
    };
    let large = (32 << 20) + 1;
    let end = u64::MAX - 10;
    let cases: &[(&dyn Fn() -> Transmission, _, _, _, _, _)] = &[
        (&plain, nbd::READ, nbd::DF, 0, 8, Errno::Inval),
        (&structured, nbd::READ, nbd::NO_HOLE, 0, 8, Errno::Inval),
        (&structured, nbd::READ, 1 << 15, 0, 8, Errno::Inval),
        (&structured, nbd::READ, 0, 0, large, Errno::Inval),
        (&structured, nbd::READ, 0, end, 11, Errno::Inval),
        (&structured, nbd::TRIM, 0, end, 11, Errno::Inval),
        (&structured, nbd::WRITE_ZEROES, 0, end, 11, Errno::NoSpc),
        (&structured, nbd::WRITE_ZEROES, nbd::FAST_ZERO, 0, 8, Errno::Inval),
        (&structured, nbd::TRIM, nbd::NO_HOLE, 0, 8, Errno::Inval),
        (&structured, nbd::FLUSH, nbd::DF, 0, 0, Errno::Inval),
        (&structured, nbd::CACHE, 0, 0, 8, Errno::Inval),
        (&structured, nbd::BLOCK_STATUS, nbd::REQ_ONE, 0, 8, Errno::Inval),
        (&structured, nbd::RESIZE, 0, 0, 8, Errno::Inval),
        (&structured, 4711, 0, 0, 8, Errno::Inval),
        (&read_only, nbd::TRIM, 0, 0, 8, Errno::Perm),
        (&read_only, nbd::WRITE_ZEROES, 0, 0, 8, Errno::Perm),
        (&read_only, nbd::WRITE_ZEROES, 0, 0, 0, Errno::Perm),
        (&stopped, nbd::READ, 0, 0, 8, Errno::Shutdown),
        (&stopped, nbd::FLUSH, 0, 0, 0, Errno::Shutdown),
    ];
    for &(machine, command, flags, offset, len, errno) in cases {
        let bytes = request_bytes(command, flags, 1, offset, len);
        let events = run(&mut machine(), &bytes, 100, false);
        let context = format!("{command} {flags} {offset} {len}: {events:?}");
        assert!(events.len() == 1 && refused(0, errno)(&events[0]), "{context}");
    }
}

#[test]
fn payload_of_refused_writes_is_skipped() {
    let payload = request_bytes(nbd::DISC, 0, 9, 0, 0).repeat(10);
    let len = payload.len() as u32;
    for (read_only, flags, offset, errno) in [
        (true, 0, 0, Errno::Perm),
        (false, nbd::NO_HOLE, 0, Errno::Inval),
        (false, 0, u64::MAX - 1, Errno::NoSpc),
    ] {
        let write = [request_bytes(nbd::WRITE, flags, 1, offset, len), payload.clone()].concat();
        let bytes = [write, request_bytes(nbd::FLUSH, 0, 2, 0, 0)].concat();
        for step in [1, 30, 1000] {
            let events = run(&mut Transmission::new(true, read_only), &bytes, step, true);
            assert!(refused(0, errno)(&events[0]), "{events:?}");
            let flush = Event::Request { ticket: 1, op: Op::Flush, then_flush: false };
            assert_eq!(events[1..], [flush]);
        }
    }
}

#[test]
fn nothing_is_allocated_before_admission() {
    let mut machine = Transmission::new(true, false);
    let mut input = Input::new(CAPACITY);
    input.push(&request_bytes(nbd::WRITE, 0, 1, 0, 32 << 20));
    assert_eq!(machine.poll(&mut input, |_| None), Event::Blocked);
    assert!(machine.payload_space().is_none() && machine.incomplete().is_none());
    assert_eq!(input.bytes().len(), 28, "the header stays for the next attempt");
    assert_eq!(machine.poll(&mut input, |_| Some(3)), Event::NeedInput);
    assert_eq!(machine.payload_space().map(|space| space.len()), Some(32 << 20));
    assert_eq!(machine.incomplete(), Some(3));
    // One byte more is never stored.
    let mut machine = Transmission::new(true, false);
    input.push(&request_bytes(nbd::WRITE, 0, 1, 0, (32 << 20) + 1));
    assert_eq!(machine.poll(&mut input, |_| Some(3)), Event::NeedInput);
    assert!(machine.payload_space().is_none());
}

#[test]
fn random_requests_never_panic() {
    let mut random = Random::new();
    for _ in 0..3000 {
        let mut bytes = vec![];
        for _ in 0..random.below(8) {
            let len = random.below(200) as u32;
            let (command, flags) = (random.below(10) as u16, random.below(40) as u16);
            let offset = if random.below(5) == 0 { random.next() } else { random.below(1 << 20) };
            let mut next = request_bytes(command, flags, random.next(), offset, len);
            if command == nbd::WRITE {
                next.extend(random.bytes(len as usize));
            }
            if random.below(6) == 0 {
                let at = random.below(next.len() as u64) as usize;
                next[at] ^= 1 << random.below(8);
            }
            bytes.extend(next);
        }
        let step = 1 + random.below(300) as usize;
        let direct = random.below(2) == 0;
        let mut machine = Transmission::new(random.below(2) == 0, random.below(2) == 0);
        run(&mut machine, &bytes, step, direct);
        assert!(machine.payload_space().map_or(0, |space| space.len()) <= 32 << 20);
    }
}

#[test]
fn input_keeps_order_while_it_wraps() {
    let mut random = Random::new();
    let (mut input, mut sent, mut seen) = (Input::new(100), 0u64, 0u64);
    while seen < 10_000 {
        let piece: Vec<u8> = (0..random.below(60)).map(|i| (sent + i) as u8).collect();
        sent += input.push(&piece) as u64;
        let n = random.below(input.bytes().len() as u64 + 1) as usize;
        assert!(input.bytes().iter().zip(seen..).all(|(&byte, at)| byte == at as u8));
        input.consume(n);
        seen += n as u64;
    }
}
