//! What a replica refuses, and that bytes from the network never do harm.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{attach, attached, create, disk, down, enter, key, view};
use sheepdog_cluster::command::{Command, decode_answer, decode_command};
use sheepdog_cluster::message::{Body, Call, Reject, Reply, Request, Span, decode, encode};
use sheepdog_cluster::replica::admit;
use sheepdog_cluster::state::ClusterState;
use sheepdog_types::{
    BLOCKS_PER_OBJECT, DiskId, Epoch, Layer, NodeId, OBJECT_SIZE, SlotId, Version, VolumeId,
    WriterGen, hash64,
};

const SIZE: u64 = 2 * OBJECT_SIZE;

fn call(request: Request) -> Call {
    Call { epoch: Epoch(3), disk: disk(2), writer: WriterGen(1), request }
}

fn write(first: u16, count: u16) -> Request {
    Request::Write {
        key: key(0),
        prev: Version::NONE,
        version: Version { writer: WriterGen(1), seq: 1 },
        first,
        body: Body::Data { count },
    }
}

fn fetch(spans: &[(u16, u16)]) -> Request {
    let spans = spans.iter().map(|(first, count)| Span { first: *first, count: *count });
    Request::FetchBlocks { key: key(0), version: Version::NONE, spans: spans.collect() }
}

fn check(state: &ClusterState, call: &Call) -> Result<(), Reject> {
    admit(&view(state), NodeId(2), true, call)
}

fn all_requests() -> Vec<Request> {
    let (object, layer) = (key(0).object, Layer(0));
    vec![
        write(0, 1),
        Request::Read { object, layer, first: 0, count: 1 },
        Request::Stat { key: key(0) },
        Request::Recover {
            key: key(0),
            expect: Version::NONE,
            from: disk(1),
            target: Version::NONE,
        },
        Request::Flush,
        Request::Fence { volume: VolumeId(1) },
        Request::Fetch { key: key(0) },
        Request::List { holder: disk(1), from: SlotId(0), to: SlotId(9), after: None },
        Request::Sums { key: key(0) },
        fetch(&[(0, 2), (3, 1), (1023, 1)]),
    ]
}

#[test]
fn a_replica_answers_neither_reads_nor_writes_for_an_epoch_it_is_not_part_of() {
    let state = attached(2, SIZE);
    for request in all_requests() {
        let mut call = call(request);
        assert_eq!(check(&state, &call), Ok(()), "{call:?}");
        call.epoch = Epoch(2);
        assert_eq!(check(&state, &call), Err(Reject::StaleEpoch { now: Epoch(3) }));
        call.epoch = Epoch(4);
        assert_eq!(check(&state, &call), Err(Reject::NotYet { now: Epoch(3) }));
    }
}

#[test]
fn i8_a_replica_without_a_lease_serves_nothing() {
    let state = attached(2, SIZE);
    for request in all_requests() {
        let refused = admit(&view(&state), NodeId(2), false, &call(request));
        assert_eq!(refused, Err(Reject::NoLease));
    }
}

#[test]
fn a_disk_that_is_elsewhere_or_down_is_not_served() {
    let mut state = attached(2, SIZE);
    for request in all_requests() {
        let refused = admit(&view(&state), NodeId(3), true, &call(request.clone()));
        assert_eq!(refused, Err(Reject::NotMember));
        let mut unknown = call(request);
        unknown.disk = DiskId(7);
        assert_eq!(check(&state, &unknown), Err(Reject::NotMember));
    }
    down(&mut state, 2, 1).unwrap();
    for request in all_requests() {
        let mut call = call(request);
        call.epoch = state.epoch;
        assert_eq!(check(&state, &call), Err(Reject::NotMember));
    }
}

#[test]
fn i4_a_stale_writer_is_told_who_is_newer_and_an_early_one_to_wait() {
    let mut state = attached(2, SIZE);
    attach(&mut state, "vm", 1, 1).unwrap(); // writer 2
    for request in &all_requests()[..4] {
        let refused = check(&state, &call(request.clone()));
        assert_eq!(refused, Err(Reject::Fenced { newest: WriterGen(2) }), "{request:?}");
    }
    let fence = Request::Fence { volume: VolumeId(1) };
    let mut early = call(fence);
    early.writer = WriterGen(3);
    assert_eq!(check(&state, &early), Err(Reject::NoVolume));
}

#[test]
fn a_disk_that_does_not_hold_the_slot_refuses_it() {
    let mut state = attached(2, SIZE);
    create(&mut state, "one", SIZE, 1, 1).unwrap();
    attach(&mut state, "one", 1, 1).unwrap();
    let mut other = key(0);
    other.object.volume = VolumeId(2);
    let served = |node| {
        let mut call = call(Request::Stat { key: other });
        call.disk = disk(node);
        admit(&view(&state), NodeId(node), true, &call)
    };
    let mut answers: Vec<_> = (1..=3).map(served).collect();
    answers.sort_by_key(|a| a.is_ok());
    assert_eq!(answers, [Err(Reject::NotMember), Err(Reject::NotMember), Ok(())]);
}

#[test]
fn what_makes_no_sense_is_malformed() {
    let state = attached(2, SIZE);
    let blocks = BLOCKS_PER_OBJECT as u16;
    let (object, layer) = (key(0).object, Layer(0));
    let mut bad = vec![
        write(0, 0),
        write(blocks, 1),
        write(0, blocks + 1),
        write(u16::MAX, u16::MAX),
        Request::Read { object, layer, first: 1, count: blocks },
        Request::Read { object, layer: Layer(1), first: 0, count: 1 },
        Request::Stat { key: key(2) },
        Request::Stat { key: key(u32::MAX) },
        Request::List { holder: disk(1), from: SlotId(2), to: SlotId(1), after: None },
        Request::Sums { key: key(2) },
        fetch(&[]),
        fetch(&[(0, 0)]),
        fetch(&[(1, blocks)]),
        fetch(&[(u16::MAX, u16::MAX)]),
        fetch(&[(0, 2), (1, 1)]),
        fetch(&[(3, 1), (0, 1)]),
        fetch(&[(u16::MAX, u16::MAX), (0, 1)]),
    ];
    for (writer, seq) in [(2, 1), (1, 0)] {
        let mut request = write(0, 1);
        if let Request::Write { version, .. } = &mut request {
            *version = Version { writer: WriterGen(writer), seq };
        }
        bad.push(request);
    }
    for request in bad {
        assert_eq!(check(&state, &call(request.clone())), Err(Reject::Malformed), "{request:?}");
    }
    let mut gone = call(Request::Fetch { key: key(0) });
    if let Request::Fetch { key } = &mut gone.request {
        key.object.volume = VolumeId(9);
    }
    assert_eq!(check(&state, &gone), Err(Reject::NoVolume));
}

#[test]
fn a_new_member_serves_after_it_entered() {
    let mut state = attached(2, SIZE);
    down(&mut state, 2, 1).unwrap();
    enter(&mut state, 2, 2).unwrap();
    let mut write = call(write(0, 1));
    assert!(check(&state, &write).is_err());
    write.epoch = state.epoch;
    assert_eq!(check(&state, &write), Ok(()));
}

/// Bytes that look like frames with a valid checksum, and are random behind it.
#[test]
fn random_bytes_never_panic_and_are_bounded() {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1u64);
    println!("SEED={seed}");
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_add(1);
        hash64(state)
    };
    let view = view(&attached(2, SIZE));
    let mut understood = 0;
    for _ in 0..40_000 {
        let head_len = next() % 40;
        let mut frame = vec![0; 8];
        frame.extend_from_slice(&next().to_le_bytes());
        frame.extend_from_slice(&(head_len as u16).to_le_bytes());
        frame.extend((0..head_len).map(|_| (next() % [4, 16, 256][(head_len % 3) as usize]) as u8));
        let tail = [0, 0, 0, 4100, 17][(next() % 5) as usize];
        let crc = crc32c::crc32c(&frame[8..]);
        frame.resize(frame.len() + tail, 0);
        let len = frame.len() as u32 - 4;
        frame[..4].copy_from_slice(&len.to_le_bytes());
        frame[4..8].copy_from_slice(&crc.to_le_bytes());
        if let Ok(Some(found)) = decode::<Call>(&frame) {
            understood += 1;
            let _ = admit(&view, NodeId(2), true, &found.head);
            let crcs: Vec<u32> = found.tail.crcs().collect();
            let mut again = Vec::new();
            encode(&mut again, found.id, &found.head, &crcs, found.tail.data());
            assert_eq!(decode::<Call>(&again).unwrap().unwrap().head, found.head);
        }
        let _ = decode::<Reply>(&frame);
        let _ = decode_command(&frame[8..]);
        let _ = decode_answer(&frame[8..]);
        let _ = ClusterState::decode(&[&[1], &frame[8..]].concat());
        if let Ok(command) = decode_command(&[&[1], &frame[18..]].concat()) {
            let mut cluster = attached(2, SIZE);
            let _: Result<_, _> = cluster.apply(command);
        }
    }
    assert!(understood > 100, "only {understood} frames were understood");
    let (volume, writer) = (VolumeId(u64::MAX), WriterGen(u64::MAX));
    let detach = Command::Detach { volume, writer, settled: false };
    assert!(attached(2, SIZE).apply(detach).is_ok());
}
