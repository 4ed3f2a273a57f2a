//! The gateway of a volume, step by step against three replicas that a test answers for.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{attach, attached, disk, down, enter, key, view};
use sheepdog_cluster::command::{Ack, Command};
use sheepdog_cluster::gateway::{Config, Effect, Gateway, MAX_ACTIVE_REQUESTS, Phase, ReplyData};
use sheepdog_cluster::message::{Body, Call, Failure, Reject, Reply, Request};
use sheepdog_cluster::state::ClusterState;
use sheepdog_types::{
    BLOCK_SIZE, BlockError, Completion, DiskId, Done, Layer, NodeId, OBJECT_SIZE, ObjectId,
    ObjectIndex, Op, Sink, SlotId, Token, Version, VolumeId, WriterGen,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

const SIZE: u64 = 4 * OBJECT_SIZE;
const BLOCK: u64 = BLOCK_SIZE as u64;

#[derive(Default)]
struct Inbox(Mutex<Vec<(u64, Completion)>>);

impl Sink for Inbox {
    fn complete(&self, tag: u64, completion: Completion) {
        self.0.lock().unwrap().push((tag, completion));
    }
    fn flush(&self) {}
}

/// A gateway on node 1 and the calls that have no answer yet.
struct Bench {
    state: ClusterState,
    gateway: Gateway,
    calls: VecDeque<(u64, NodeId, Call)>,
    inbox: Arc<Inbox>,
    /// Versions of the layers of each disk.
    versions: BTreeMap<(DiskId, u32), Version>,
    returned: Vec<(Op, Token)>,
    lost: usize,
    tag: u64,
    most_calls: usize,
}

impl Bench {
    fn new(min_copies: u8, size: u64) -> Self {
        Self::with_ack(min_copies, size, Ack::Flush)
    }

    fn with_ack(min_copies: u8, size: u64, ack: Ack) -> Self {
        let state = attached(min_copies, size);
        let config = Config {
            node: NodeId(1),
            volume: VolumeId(1),
            size,
            copies: 3,
            min_copies: usize::from(min_copies),
            layer: Layer(0),
            writer: WriterGen(1),
            ack,
        };
        let gateway = Gateway::new(config, view(&state));
        let (calls, inbox, versions) = (VecDeque::new(), Arc::default(), BTreeMap::new());
        let mut bench = Self {
            state,
            gateway,
            calls,
            inbox,
            versions,
            returned: Vec::new(),
            lost: 0,
            tag: 0,
            most_calls: 0,
        };
        bench.pump();
        bench
    }

    /// The gateway before died while node 1 had the volume.
    fn taken_over(size: u64) -> Self {
        let mut bench = Self::new(2, size);
        attach(&mut bench.state, "vm", 1, 1).unwrap();
        let config = Config { writer: WriterGen(2), ..bench.gateway.config().clone() };
        bench.gateway = Gateway::new(config, view(&bench.state));
        bench.calls.clear();
        bench.pump();
        bench
    }

    fn serving() -> Self {
        let mut bench = Self::new(2, SIZE);
        bench.answer_all();
        assert_eq!(bench.gateway.phase(), Phase::Serving);
        bench
    }

    fn pump(&mut self) {
        while let Some(effect) = self.gateway.poll_effect() {
            match effect {
                Effect::Call { id, node, call, .. } => self.calls.push_back((id, node, call)),
                Effect::Complete { token, completion } => {
                    token.complete(completion, &mut sheepdog_types::Burst::new());
                }
                Effect::Return { op, token } => self.returned.push((op, token)),
                Effect::LostWrites { .. } => self.lost += 1,
            }
        }
        self.most_calls = self.most_calls.max(self.calls.len());
    }

    fn submit(&mut self, op: Op) -> u64 {
        self.tag += 1;
        let token = Token::new(self.tag, self.inbox.clone());
        self.gateway.handle_request(op, token);
        self.pump();
        self.tag
    }

    fn write(&mut self, offset: u64, len: u64) -> u64 {
        self.submit(Op::Write { offset, data: vec![5; len as usize], fua: false })
    }

    fn outcome(&self, tag: u64) -> Option<Result<usize, BlockError>> {
        let inbox = self.inbox.0.lock().unwrap();
        let (_, completion) = inbox.iter().find(|(t, _)| *t == tag)?;
        Some(completion.as_ref().map_err(|e| *e).map(|done| match done {
            Done::Data(data) => data.len(),
            Done::Nothing => 0,
        }))
    }

    /// What a healthy replica answers.
    fn good_reply(&mut self, call: &Call) -> (Reply, Vec<u8>) {
        let disk = call.disk;
        let reply = match &call.request {
            Request::Write { key, version, .. } => {
                self.versions.insert((disk, key.object.index.0), *version);
                Reply::Done
            }
            Request::Recover { key, target, .. } => {
                self.versions.insert((disk, key.object.index.0), *target);
                Reply::Done
            }
            Request::Stat { key } => {
                let version = self.versions.get(&(disk, key.object.index.0)).copied();
                Reply::Version { version: version.unwrap_or_default() }
            }
            Request::Read { count, .. } => {
                return (Reply::Data { count: *count }, vec![5; usize::from(*count) * BLOCK_SIZE]);
            }
            Request::Digests { slots, .. } => digests(slots, None),
            _ => Reply::Done,
        };
        (reply, Vec::new())
    }

    fn reply(&mut self, id: u64, reply: Reply, bytes: Vec<u8>) {
        self.gateway.handle_reply(id, reply, ReplyData { bytes });
        self.pump();
    }

    /// Answers calls until there are none, or `odd` said something else than all is well.
    fn answer_with(&mut self, mut odd: impl FnMut(&Call) -> Option<Reply>) {
        let mut steps = 0;
        while let Some((id, _, call)) = self.calls.pop_front() {
            let (reply, bytes) = match odd(&call) {
                Some(reply) => (reply, Vec::new()),
                None => self.good_reply(&call),
            };
            self.reply(id, reply, bytes);
            steps += 1;
            assert!(steps < 1_000_000, "it never ends");
        }
    }

    fn answer_all(&mut self) {
        self.answer_with(|_| None);
    }

    fn show(&mut self) {
        self.gateway.handle_view(view(&self.state));
        self.pump();
    }

    fn tick(&mut self) {
        self.gateway.handle_tick();
        self.pump();
    }
}

/// A write of some blocks, for which a full disk has no room.
fn is_data(call: &Call) -> bool {
    matches!(call.request, Request::Write { body: Body::Data { .. }, .. })
}

fn is_write(call: &Call) -> bool {
    matches!(call.request, Request::Write { .. })
}

#[test]
fn i3_a_volume_that_commits_answers_a_write_only_when_it_is_durable() {
    let mut bench = Bench::with_ack(2, SIZE, Ack::Commit);
    bench.answer_all();
    let discard = Op::Discard { offset: 8192, len: 4096 };
    let zeroes = Op::WriteZeroes { offset: 0, len: 4096, may_unmap: true, fua: false };
    let write = Op::Write { offset: 0, data: vec![5; 4096], fua: false };
    for op in [write, discard, zeroes] {
        let tag = bench.submit(op);
        while !bench.calls.iter().any(|(_, _, call)| matches!(call.request, Request::Flush)) {
            assert_eq!(bench.outcome(tag), None, "nothing is durable yet");
            let (id, _, call) = bench.calls.pop_front().unwrap();
            let (reply, bytes) = bench.good_reply(&call);
            bench.reply(id, reply, bytes);
        }
        assert_eq!(bench.calls.len(), 3, "a flush of each replica");
        assert_eq!(bench.outcome(tag), None, "written, not durable");
        bench.answer_all();
        assert_eq!(bench.outcome(tag), Some(Ok(0)));
    }
}

#[test]
fn i4_nothing_is_served_before_every_up_disk_is_fenced() {
    let mut bench = Bench::new(2, SIZE);
    let write = bench.write(0, BLOCK);
    assert!(bench.calls.iter().all(|(_, _, c)| matches!(c.request, Request::Fence { .. })));
    let (last, _, _) = bench.calls.pop_back().unwrap();
    bench.answer_all();
    assert_eq!((bench.gateway.phase(), bench.outcome(write)), (Phase::Fencing, None));
    bench.reply(last, Reply::Rejected(Reject::NotYet { now: bench.state.epoch }), Vec::new());
    assert!(bench.gateway.wants_tick(), "the fence is asked again");
    bench.tick();
    bench.answer_all();
    assert_eq!(bench.outcome(write), Some(Ok(0)));
}

fn digests(slots: &[SlotId], other: Option<SlotId>) -> Reply {
    let digest = |slot: &SlotId| u64::from(Some(*slot) == other);
    Reply::Digests { digests: slots.iter().map(digest).collect() }
}

/// The gateway before died; of 9 objects, one differs.
#[test]
fn i1_a_takeover_makes_equal_what_nobody_uses_and_lets_guests_go_first() {
    const OBJECTS: u32 = 9;
    let mut bench = Bench::taken_over(u64::from(OBJECTS) * OBJECT_SIZE);
    let different = 4;
    bench.versions.extend(
        [(1, 7), (2, 7), (3, 6)]
            .map(|(d, seq)| ((disk(d), different), Version { writer: WriterGen(1), seq })),
    );
    let slot = key(different).object.slot();
    let mut asked = BTreeSet::new();
    let mut opened = BTreeSet::new();
    let answer = |bench: &mut Bench, asked: &mut BTreeSet<DiskId>, opened: &mut BTreeSet<u32>| {
        bench.answer_with(|call| match &call.request {
            Request::Digests { slots, .. } => {
                asked.insert(call.disk);
                assert_eq!(slots.len(), OBJECTS as usize);
                Some(digests(slots, (call.disk == disk(3)).then_some(slot)))
            }
            Request::Stat { key } => {
                opened.insert(key.object.index.0);
                None
            }
            _ => None,
        });
    };
    // A disk that has something else to do is asked again, at a tick.
    bench.answer_with(|call| {
        let digests = matches!(call.request, Request::Digests { .. });
        digests.then_some(Reply::Failed(Failure::Busy))
    });
    assert!(!bench.gateway.is_settled() && bench.gateway.wants_tick());
    // A guest does not wait for it.
    let write = bench.write(OBJECT_SIZE, BLOCK);
    bench.answer_all();
    assert_eq!(bench.outcome(write), Some(Ok(0)));
    bench.tick();
    answer(&mut bench, &mut asked, &mut opened);
    assert_eq!(asked, [1, 2, 3].map(disk).into());
    assert_eq!(opened, [different].into(), "nothing but what differs is looked at");
    let found = [1, 2, 3].map(|d| bench.versions[&(disk(d), different)].seq);
    assert_eq!((found, bench.gateway.counters().reconciled), ([7, 7, 7], 1));
    assert!(bench.gateway.is_settled() && !bench.gateway.wants_tick());
}

#[test]
fn after_a_takeover_what_cannot_be_asked_for_now_is_looked_at_later() {
    let mut bench = Bench::taken_over(SIZE);
    let busy = |call: &Call| {
        let digests = matches!(call.request, Request::Digests { .. });
        digests.then_some(Reply::Rejected(Reject::NoLease))
    };
    bench.answer_with(busy);
    // Two of three are down: nothing can be compared, and nothing is asked for all the time.
    down(&mut bench.state, 3, 1).unwrap();
    down(&mut bench.state, 2, 1).unwrap();
    bench.show();
    bench.answer_with(busy);
    bench.tick();
    assert!(!bench.gateway.is_settled() && !bench.gateway.wants_tick());
    // They come back without the newest version. What is compared by now counts; what was skipped is opened.
    enter(&mut bench.state, 2, 2).unwrap();
    bench.show();
    bench.answer_all();
    assert!(bench.gateway.is_settled(), "{:?}", bench.gateway.counters());
    assert!(bench.gateway.counters().reconciled > 0);
}

#[test]
fn after_a_clean_detach_nothing_is_looked_for() {
    let mut bench = Bench::new(2, SIZE);
    bench.answer_with(panic_unless_fence);
    assert!(bench.gateway.is_settled());
    // A volume whose replicas may differ for a failed write is not settled.
    let bad = bench.write(0, BLOCK);
    bench.answer_with(|call| match &call.request {
        Request::Write { .. } if call.disk == disk(3) => Some(Reply::Failed(Failure::NoSpace)),
        Request::Recover { .. } => Some(Reply::Failed(Failure::Busy)),
        _ => None,
    });
    assert_eq!(bench.outcome(bad), Some(Err(BlockError::NoSpace)));
    assert!(bench.gateway.is_idle() && !bench.gateway.is_settled());
    bench.tick();
    bench.answer_all();
    assert!(bench.gateway.is_settled());
}

fn panic_unless_fence(call: &Call) -> Option<Reply> {
    assert!(matches!(call.request, Request::Fence { .. }), "{call:?}");
    None
}

/// What an old gateway left different is made equal, a flush overtakes that, and the answer to it comes when
/// nobody waits for it.
#[test]
fn i3_a_flush_goes_to_disks_that_copied_although_nobody_heard_of_it() {
    let mut bench = Bench::taken_over(SIZE);
    for (number, seq) in [(1, 2), (2, 1), (3, 1)] {
        bench.versions.insert((disk(number), 0), Version { writer: WriterGen(1), seq });
    }
    bench.submit(Op::Read { offset: 0, len: BLOCK as u32 });
    let mut held = Vec::new();
    while let Some((id, _, call)) = bench.calls.pop_front() {
        if matches!(call.request, Request::Recover { .. }) {
            held.push((id, call));
            continue;
        }
        let (reply, bytes) = bench.good_reply(&call);
        bench.reply(id, reply, bytes);
    }
    assert_eq!(held.len(), 2, "{held:?}");
    let flush = bench.submit(Op::Flush);
    bench.answer_all();
    assert_eq!(bench.outcome(flush), Some(Ok(0)));
    // One of the two copies fails, so the object is opened again; the other is made then, unheard.
    let (failed, _) = held.pop().unwrap();
    bench.reply(failed, Reply::Failed(Failure::Busy), Vec::new());
    let (id, copied) = held.pop().unwrap();
    let (reply, bytes) = bench.good_reply(&copied);
    bench.reply(id, reply, bytes);
    bench.tick();
    bench.answer_all();
    assert!(bench.versions.values().all(|v| v.seq == 2), "{:?}", bench.versions);
    let flush = bench.submit(Op::Flush);
    let asked = |(_, _, call): &(u64, NodeId, Call)| call.disk == copied.disk;
    assert!(bench.calls.iter().any(asked), "{:?}", bench.calls);
    bench.answer_all();
    assert_eq!(bench.outcome(flush), Some(Ok(0)));
    assert!(bench.gateway.is_settled());
}

#[test]
fn i2_a_write_is_acknowledged_when_all_members_have_it() {
    let mut bench = Bench::serving();
    let write = bench.write(0, BLOCK);
    let mut held = Vec::new();
    while let Some((id, node, call)) = bench.calls.pop_front() {
        if is_write(&call) && call.disk == disk(3) {
            held.push((id, node, call));
        } else {
            let (reply, bytes) = bench.good_reply(&call);
            bench.reply(id, reply, bytes);
        }
    }
    assert_eq!((held.len(), bench.outcome(write)), (1, None));
    bench.calls.extend(held);
    bench.answer_all();
    assert_eq!(bench.outcome(write), Some(Ok(0)));
}

#[test]
fn a_write_goes_on_without_a_disk_that_went_down_and_stops_below_min_copies() {
    let mut bench = Bench::serving();
    let write = bench.write(0, BLOCK);
    bench.answer_with(|c| {
        (c.disk == disk(3) && is_write(c)).then_some(Reply::Rejected(Reject::NoLease))
    });
    assert_eq!(bench.outcome(write), None);
    down(&mut bench.state, 3, 1).unwrap();
    bench.show();
    bench.answer_all();
    assert_eq!(bench.outcome(write), Some(Ok(0)));
    down(&mut bench.state, 2, 1).unwrap();
    bench.show();
    let stopped = bench.write(0, BLOCK);
    bench.answer_all();
    bench.tick();
    bench.answer_all();
    assert_eq!((bench.outcome(stopped), bench.gateway.blocked_objects()), (None, 1));
    enter(&mut bench.state, 2, 2).unwrap();
    bench.show();
    bench.answer_all();
    assert_eq!(bench.outcome(stopped), Some(Ok(0)));
}

#[test]
fn an_answer_to_an_earlier_call_does_not_count() {
    let mut bench = Bench::serving();
    let first = bench.write(0, BLOCK);
    bench.answer_all();
    assert_eq!(bench.outcome(first), Some(Ok(0)));
    let write = bench.write(0, BLOCK);
    let old = bench.calls.iter().find(|(_, _, c)| c.disk == disk(3)).unwrap().0;
    bench.calls.retain(|(_, _, c)| c.disk != disk(3));
    bench.answer_all();
    down(&mut bench.state, 3, 1).unwrap();
    enter(&mut bench.state, 3, 2).unwrap();
    bench.show();
    bench.reply(old, Reply::Done, Vec::new());
    assert_eq!(bench.outcome(write), None, "disk 3 came back without it");
    bench.answer_all();
    assert_eq!(bench.outcome(write), Some(Ok(0)));
}

#[test]
fn reads_prefer_the_own_disk_and_a_damaged_block_is_read_elsewhere_and_repaired() {
    let mut bench = Bench::serving();
    bench.write(0, 4 * BLOCK);
    bench.answer_all();
    let read = bench.submit(Op::Read { offset: 10, len: 5000 });
    assert!(bench.calls.iter().all(|(_, node, _)| *node == NodeId(1)), "{:?}", bench.calls);
    let mut seen = Vec::new();
    bench.answer_with(|call| {
        seen.push((call.disk, call.request.clone()));
        let damaged = call.disk == disk(1) && matches!(call.request, Request::Read { .. });
        damaged.then_some(Reply::Failed(Failure::Checksum { block: 0 }))
    });
    bench.tick();
    bench.answer_with(|call| {
        seen.push((call.disk, call.request.clone()));
        None
    });
    assert_eq!(bench.outcome(read), Some(Ok(5000)));
    let repaired = seen.iter().any(|(d, r)| {
        *d == disk(1) && matches!(r, Request::Recover { from, .. } if *from != disk(1))
    });
    assert!(repaired, "{seen:?}");
    assert_eq!(bench.gateway.counters().checksum_failures, 1);
}

#[test]
fn i7_a_block_that_is_damaged_everywhere_is_an_error() {
    let mut bench = Bench::serving();
    bench.write(0, BLOCK);
    bench.answer_all();
    let read = bench.submit(Op::Read { offset: 0, len: 4096 });
    for _ in 0..10 {
        bench.answer_with(|c| {
            let read = matches!(c.request, Request::Read { .. });
            read.then_some(Reply::Failed(Failure::Checksum { block: 0 }))
        });
        bench.tick();
    }
    assert_eq!(bench.outcome(read), Some(Err(BlockError::Io)));
}

#[test]
fn i11_a_full_disk_fails_the_write_and_the_others_go_back() {
    let mut bench = Bench::serving();
    let good = bench.write(0, BLOCK);
    bench.answer_all();
    let bad = bench.write(0, BLOCK);
    bench.answer_with(|c| {
        (c.disk == disk(3) && is_data(c)).then_some(Reply::Failed(Failure::NoSpace))
    });
    assert_eq!(bench.outcome(good), Some(Ok(0)));
    assert_eq!(bench.outcome(bad), Some(Err(BlockError::NoSpace)));
    let versions: Vec<u64> = bench.versions.values().map(|v| v.seq).collect();
    assert_eq!(versions, [3, 3, 3], "as before, and newer than what was undone");
    let after = bench.write(BLOCK, BLOCK);
    bench.answer_all();
    assert_eq!(bench.outcome(after), Some(Ok(0)));
    assert!(bench.versions.values().all(|v| v.seq == 4), "2 is never used twice");
}

/// A write fails, and a disk that has done it is away before it was undone there. What it has must not
/// be newer than what was read meanwhile.
#[test]
fn i11_a_failed_write_never_comes_back_from_a_disk_that_was_away() {
    let mut bench = Bench::serving();
    bench.write(0, BLOCK);
    bench.answer_all();
    let bad = bench.write(0, BLOCK);
    let mute = |c: &Call| {
        let undoes = c.disk == disk(2) && !is_data(c);
        undoes.then_some(Reply::Failed(Failure::Source))
    };
    bench.answer_with(|c| match is_data(c) && c.disk == disk(3) {
        true => Some(Reply::Failed(Failure::NoSpace)),
        false => mute(c),
    });
    assert_eq!(bench.outcome(bad), Some(Err(BlockError::NoSpace)));
    let left = bench.versions[&(disk(2), 0)];
    let read = bench.submit(Op::Read { offset: 0, len: BLOCK as u32 });
    bench.answer_with(mute);
    assert_eq!(bench.outcome(read), None, "the disk is up, and may have it");
    down(&mut bench.state, 2, 1).unwrap();
    bench.show();
    bench.answer_all();
    assert!(matches!(bench.outcome(read), Some(Ok(_))));
    for up in [1, 3] {
        assert!(bench.versions[&(disk(up), 0)] > left, "disk {up}");
    }
}

/// A write of a new object, or the copy of an old one before the write, finds no room on a disk that the
/// object only moves to: it waits until the cluster knows, and succeeds without that disk.
#[test]
fn i11_a_full_disk_that_an_object_moves_to_fails_no_write() {
    for new in [true, false] {
        let mut bench = Bench::serving();
        let object = (0..4).find(|index| {
            let object = ObjectId { volume: VolumeId(1), index: ObjectIndex(*index) };
            let mut state = bench.state.clone();
            enter(&mut state, 4, 1).unwrap();
            view(&state).is_member(object.slot(), 3, disk(4))
        });
        let offset = u64::from(object.unwrap()) * OBJECT_SIZE;
        if !new {
            bench.write(offset, BLOCK);
            bench.answer_all();
        }
        enter(&mut bench.state, 4, 1).unwrap();
        bench.show();
        let write = bench.write(offset, BLOCK);
        for _ in 0..3 {
            let full = Reply::Failed(Failure::NoSpace);
            bench.answer_with(|c| {
                let changes = is_write(c) || matches!(c.request, Request::Recover { .. });
                (c.disk == disk(4) && changes).then(|| full.clone())
            });
            assert_eq!(bench.outcome(write), None);
            bench.tick();
        }
        let full = Command::DiskFull { disk: disk(4), incarnation: 1, full: true, at: 0 };
        bench.state.apply(full).unwrap();
        bench.calls.clear();
        bench.show();
        bench.answer_all();
        assert_eq!(bench.outcome(write), Some(Ok(0)));
    }
}

#[test]
fn lost_writes_fail_every_flush_that_runs() {
    let mut bench = Bench::serving();
    bench.write(0, BLOCK);
    bench.answer_all();
    let flushes = [bench.submit(Op::Flush), bench.submit(Op::Flush)];
    bench.calls.clear(); // all nodes lose power
    bench.versions.clear();
    for node in 1..=3 {
        bench.gateway.handle_unreachable(NodeId(node));
        enter(&mut bench.state, node, 2).unwrap();
    }
    bench.show();
    for node in 1..=3 {
        bench.gateway.handle_reachable(NodeId(node));
    }
    bench.pump();
    for _ in 0..3 {
        bench.answer_all();
        bench.tick();
    }
    for flush in flushes {
        assert_eq!(bench.outcome(flush), Some(Err(BlockError::Io)));
    }
    assert_eq!(bench.lost, 1);
}

#[test]
fn i3_the_first_flush_covers_what_an_earlier_gateway_wrote() {
    let mut bench = Bench::serving();
    bench.submit(Op::Flush);
    let disks: Vec<DiskId> = bench.calls.iter().map(|(_, _, c)| c.disk).collect();
    assert_eq!(disks, [disk(1), disk(2), disk(3)]);
    bench.answer_all();
    let again = bench.submit(Op::Flush);
    assert_eq!(bench.outcome(again), Some(Ok(0)), "nothing was written since");
}

#[test]
fn a_flush_does_not_wait_for_a_clean_disk_that_is_gone() {
    let mut bench = Bench::serving();
    let (first, second) = (bench.submit(Op::Flush), bench.submit(Op::Flush));
    // The first flush is answered by all, the second by none.
    let (one, two): (VecDeque<_>, VecDeque<_>) = {
        let calls = std::mem::take(&mut bench.calls);
        let (a, b): (Vec<_>, Vec<_>) = calls.into_iter().enumerate().partition(|(n, _)| *n < 3);
        (a.into_iter().map(|c| c.1).collect(), b.into_iter().map(|c| c.1).collect())
    };
    drop(two);
    bench.calls = one;
    bench.answer_all();
    assert_eq!(bench.outcome(first), Some(Ok(0)));
    down(&mut bench.state, 3, 1).unwrap();
    bench.show();
    bench.calls.retain(|(_, _, c)| c.disk != disk(3));
    bench.answer_all();
    assert_eq!(bench.outcome(second), Some(Ok(0)));
}

#[test]
fn a_newer_writer_ends_everything() {
    for by_view in [true, false] {
        let mut bench = Bench::serving();
        let write = Op::Write { offset: 3, data: vec![7; 9000], fua: true };
        let rest = [
            Op::Read { offset: SIZE - 5, len: 5 },
            Op::Flush,
            Op::Discard { offset: 0, len: SIZE },
            Op::WriteZeroes { offset: 1, len: 7, may_unmap: true, fua: false },
        ];
        let tag = bench.submit(write.clone());
        rest.iter().for_each(|op| _ = bench.submit(op.clone()));
        if by_view {
            attach(&mut bench.state, "vm", 1, 1).unwrap();
            bench.show();
        } else {
            bench.answer_with(|_| Some(Reply::Rejected(Reject::Fenced { newest: WriterGen(2) })));
        }
        assert_eq!(bench.gateway.phase(), Phase::Fenced);
        // What was in progress comes back as it was, and so does what comes later.
        let late = Op::Read { offset: 0, len: 1 };
        bench.submit(late.clone());
        assert!(bench.gateway.is_idle());
        assert_eq!(bench.outcome(tag), None);
        let mut expected = vec![write];
        expected.extend(rest.into_iter().chain([late]));
        let returned: Vec<Op> = bench.returned.drain(..).map(|(op, _)| op).collect();
        assert_eq!(returned, expected);
        assert_eq!(bench.outcome(tag), Some(Err(BlockError::Io)), "nobody took it");
    }
}

/// A gateway with a disk is fenced by that; one without may not have heard of a newer writer.
#[test]
fn i4_a_gateway_without_a_disk_asks_even_for_what_was_never_written() {
    for without_disk in [false, true] {
        let mut bench = Bench::serving();
        if without_disk {
            let config = Config { node: NodeId(9), ..bench.gateway.config().clone() };
            bench.gateway = Gateway::new(config, view(&bench.state));
            bench.pump();
        }
        let read = Op::Read { offset: 0, len: 512 };
        let first = bench.submit(read.clone());
        bench.answer_all();
        assert_eq!(bench.outcome(first), Some(Ok(512)));
        let again = bench.submit(read);
        bench.answer_with(|_| Some(Reply::Rejected(Reject::Fenced { newest: WriterGen(2) })));
        let expected = (!without_disk).then_some(Ok(512));
        assert_eq!(bench.outcome(again), expected);
        let zeroes = Op::WriteZeroes { offset: 0, len: BLOCK, may_unmap: false, fua: false };
        let zeroed = bench.submit(zeroes);
        assert_eq!(bench.outcome(zeroed), (!without_disk).then_some(Ok(0)));
    }
}

#[test]
fn requests_outside_the_volume_or_too_large_are_refused_and_empty_ones_succeed() {
    let mut bench = Bench::serving();
    for op in [
        Op::Read { offset: SIZE, len: 1 },
        Op::Read { offset: u64::MAX, len: 2 },
        Op::Write { offset: SIZE - 1, data: vec![0; 2], fua: true },
        Op::Discard { offset: 1, len: u64::MAX },
        Op::WriteZeroes { offset: 0, len: SIZE + 1, may_unmap: true, fua: false },
    ] {
        let tag = bench.submit(op);
        assert_eq!(bench.outcome(tag), Some(Err(BlockError::OutOfRange)));
    }
    for op in [
        Op::Read { offset: SIZE, len: 0 },
        Op::Write { offset: 7, data: Vec::new(), fua: false },
        Op::Discard { offset: 3, len: 0 },
        Op::WriteZeroes { offset: 3, len: 0, may_unmap: false, fua: false },
    ] {
        let tag = bench.submit(op);
        assert_eq!(bench.outcome(tag), Some(Ok(0)));
    }
    let mut large = Bench::new(2, 100 * OBJECT_SIZE);
    large.answer_all();
    let tag = large.submit(Op::Read { offset: 0, len: (32 << 20) + 1 });
    assert_eq!(large.outcome(tag), Some(Err(BlockError::Invalid)));
}

#[test]
fn i10_a_huge_discard_takes_a_few_objects_at_a_time() {
    let objects = 20_000;
    let mut bench = Bench::new(2, objects * OBJECT_SIZE);
    bench.answer_all();
    for _ in 0..2 {
        let tag = bench.submit(Op::Discard { offset: 0, len: objects * OBJECT_SIZE });
        bench.answer_all();
        assert_eq!(bench.outcome(tag), Some(Ok(0)));
    }
    assert!(bench.most_calls <= 64 * 3, "{} calls at once", bench.most_calls);
}

#[test]
fn i10_requests_beyond_the_bound_wait_and_are_all_served() {
    let mut bench = Bench::serving();
    let tags: Vec<u64> =
        (0..2 * MAX_ACTIVE_REQUESTS as u64).map(|n| bench.write(n % 1000 * BLOCK, BLOCK)).collect();
    bench.calls.iter().for_each(|(_, _, c)| assert!(!is_write(c), "it is not open yet"));
    bench.answer_all();
    assert!(bench.most_calls <= 3 * MAX_ACTIVE_REQUESTS);
    assert!(tags.iter().all(|tag| bench.outcome(*tag) == Some(Ok(0))));
    assert!(bench.gateway.is_idle());
}

#[test]
fn a_read_of_one_block_across_an_object_border_gets_both_halves() {
    let mut bench = Bench::serving();
    bench.write(OBJECT_SIZE - BLOCK, 2 * BLOCK);
    bench.answer_all();
    let read = bench.submit(Op::Read { offset: OBJECT_SIZE - 1000, len: 4096 });
    while let Some((id, _, call)) = bench.calls.pop_front() {
        let Request::Read { object, count, .. } = call.request else { panic!("{call:?}") };
        let bytes = vec![object.index.0 as u8 + 1; usize::from(count) * BLOCK_SIZE];
        bench.reply(id, Reply::Data { count }, bytes);
    }
    let inbox = bench.inbox.0.lock().unwrap();
    let Some((_, Ok(Done::Data(data)))) = inbox.iter().find(|(t, _)| *t == read) else { panic!() };
    assert_eq!(data[..1000], [1; 1000]);
    assert_eq!(data[1000..], [2; 3096]);
}
