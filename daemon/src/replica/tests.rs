use super::copies::{Copies, Right};
use super::{Copy, Disk, Moved, Replica};
use crate::cluster::{Cluster, boot_time};
use sheepdog_cluster::command::{
    Ack, Command, DiskInfo, LOG_VERSION, NodeInfo, VolumeSpec, encode_command,
};
use sheepdog_cluster::message::{Call, Failure, Reply, Request};
use sheepdog_log::StateMachine;
use sheepdog_store::{
    BlockRange, BlockRun, BlockState, LayerImage, LayerSums, Options, Payload, Store, StoreIds,
};
use sheepdog_types::{
    BLOCK_SIZE, BLOCKS_PER_OBJECT, ClusterId, DiskId, Epoch, Layer, LayerKey, NodeId, ObjectId,
    ObjectIndex, Version, VolumeId, WriterGen, hash64,
};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

const HERE: DiskId = DiskId(1);
const THERE: DiskId = DiskId(2);
const ALL: u64 = BLOCKS_PER_OBJECT as u64;

fn key(index: u32) -> LayerKey {
    let object = ObjectId { volume: VolumeId(1), index: ObjectIndex(index) };
    LayerKey { object, layer: Layer(0) }
}

fn version(seq: u64) -> Version {
    if seq == 0 { Version::NONE } else { Version { writer: WriterGen(1), seq } }
}

fn bytes_of(tag: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(BLOCK_SIZE / 8)
}

/// A node with two disks, in a directory.
struct Bench {
    dir: tempfile::TempDir,
    cluster: Arc<Cluster>,
    replica: Option<Arc<Replica>>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Arc::new(Cluster::new(NodeId(1), 5));
        let disks = [HERE, THERE].map(|id| DiskInfo { id, weight: 1 });
        let node = NodeInfo {
            id: NodeId(1),
            incarnation: 5,
            address: "127.0.0.1:1".into(),
            zone: "z".into(),
            disks: disks.into(),
            version: LOG_VERSION,
        };
        cluster.apply(1, &encode_command(&Command::Found { cluster: ClusterId(1) })).unwrap();
        cluster.apply(2, &encode_command(&Command::Enter { node, at: 0 })).unwrap();
        // Longer than any test.
        cluster.lease.renew(boot_time() + 3_600_000_000_000);
        let mut this = Self { dir, cluster, replica: None };
        this.restart(|_| {});
        this
    }

    fn path(&self, disk: DiskId) -> PathBuf {
        self.dir.path().join(disk.0.to_string())
    }

    /// Applies the logs of both disks; then something happens to them.
    fn restart(&mut self, meanwhile: impl FnOnce(&Self)) {
        let old = self.replica.take();
        assert!(old.is_none_or(|old| Arc::into_inner(old).is_some()), "nobody else uses it");
        meanwhile(self);
        let options = || Options { log_bytes: 32 << 20, ..Options::default() };
        let disks = [HERE, THERE].map(|id| {
            let (path, ids) =
                (self.path(id), StoreIds { cluster: ClusterId(1), node: NodeId(1), disk: id });
            let store = match Store::open(&path, options()) {
                Err(_) => Store::create(&path, ids, options()).unwrap(),
                Ok(store) => store,
            };
            Disk::new(id, path, store)
        });
        self.replica = Some(Replica::new(Arc::clone(&self.cluster), disks.into()).unwrap());
    }

    fn replica(&self) -> &Arc<Replica> {
        self.replica.as_ref().unwrap()
    }

    fn disk(&self, id: DiskId) -> Arc<Disk> {
        self.replica().disk(id).unwrap()
    }

    fn epoch(&self) -> Epoch {
        self.cluster.view().epoch
    }

    /// Puts a layer with these blocks (0: zero) on a disk.
    fn install(
        &self,
        disk: DiskId,
        key: LayerKey,
        seq: u64,
        tags: impl Iterator<Item = (u16, u64)>,
    ) {
        let mut image = LayerImage {
            sums: LayerSums { version: version(seq), runs: Vec::new(), crcs: Vec::new() },
            data: Vec::new(),
        };
        for (block, tag) in tags {
            let state = if tag == 0 { BlockState::Zero } else { BlockState::Data };
            image.sums.runs.push(BlockRun { range: BlockRange::new(block, 1).unwrap(), state });
            if tag != 0 {
                image.data.extend(bytes_of(tag));
                image.sums.crcs.push(crc32c::crc32c(&bytes_of(tag)));
            }
        }
        let have = self.disk(disk).store.stat(key).map(|stat| stat.version);
        assert!(self.disk(disk).store.install(key, have, &image).unwrap());
    }

    fn recover(&self, key: LayerKey, expect: u64, target: u64) -> Result<Moved, Failure> {
        let copy = Copy { key, expect: version(expect), from: THERE, target: version(target) };
        self.replica().recover(&self.disk(HERE), copy, self.epoch(), None)
    }

    /// As a gateway's call, perhaps of one that is given up again.
    fn recover_exactly(
        &self,
        (expect, target): (u64, u64),
        given_up: bool,
    ) -> Result<Moved, Failure> {
        let replica = self.replica();
        let ticket = replica.copies.ask(HERE, key(0));
        if given_up {
            replica.copies.give_up(HERE, key(0));
        }
        let (expect, target) = (version(expect), version(target));
        let copy = Copy { key: key(0), expect, from: THERE, target };
        replica.recover(&self.disk(HERE), copy, self.epoch(), Some((ticket, WriterGen(1))))
    }

    #[track_caller]
    fn assert_equal(&self, key: LayerKey) {
        let [here, there] = [HERE, THERE].map(|disk| self.disk(disk).store.image(key).unwrap());
        assert!(here == there, "the two are equal");
        let slot = key.object.slot();
        assert_eq!(self.disk(HERE).store.digest(slot), self.disk(THERE).store.digest(slot));
    }

    /// Flips a bit of the block with a tag where the store has put it; the disks are closed.
    fn flip(&self, disk: DiskId, tag: u64) {
        let path = self.path(disk).join("data");
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let mut bytes = vec![0; BLOCK_SIZE];
        let blocks = file.metadata().unwrap().len() / BLOCK_SIZE as u64;
        let at = (0..blocks).map(|block| block * BLOCK_SIZE as u64).find(|at| {
            file.read_exact_at(&mut bytes, *at).unwrap();
            bytes == bytes_of(tag)
        });
        file.write_all_at(&[!bytes_of(tag)[9]], at.unwrap() + 9).unwrap();
    }
}

/// All blocks with data, different ones for each `salt`.
fn full(salt: u64) -> impl Iterator<Item = (u16, u64)> {
    (0..BLOCKS_PER_OBJECT as u16).map(move |block| (block, (salt << 16) + u64::from(block) + 1))
}

#[test]
fn recovery_moves_just_the_blocks_that_differ() {
    let bench = Bench::new();
    bench.install(HERE, key(0), 1, full(1));
    // One in a hundred has other data, some are zero, some are gone.
    let newer = full(1).filter(|(block, _)| block % 500 != 7).map(|(block, tag)| match block {
        _ if block % 100 == 3 => (block, 77 << 32 | tag),
        _ if block % 300 == 5 => (block, 0),
        _ => (block, tag),
    });
    bench.install(THERE, key(0), 9, newer);
    let moved = bench.recover(key(0), 1, 9).unwrap();
    assert_eq!((moved.layers, moved.blocks), (1, 11));
    let blocks = moved.blocks * BLOCK_SIZE as u64;
    assert!(moved.bytes < blocks * 6 / 5, "{moved:?}");
    bench.assert_equal(key(0));
    // Back to the older one, as when a write is undone; now nothing differs but states.
    let same = bench.disk(THERE).store.image(key(0)).unwrap().unwrap();
    let back = LayerImage { sums: LayerSums { version: version(4), ..same.sums }, data: same.data };
    assert!(bench.disk(THERE).store.install(key(0), Some(version(9)), &back).unwrap());
    let moved = bench.recover_exactly((9, 4), false).unwrap();
    assert_eq!((moved.layers, moved.blocks), (1, 0));
    bench.assert_equal(key(0));
}

#[test]
fn a_layer_that_is_missing_or_mostly_different_is_moved_as_a_whole() {
    let bench = Bench::new();
    bench.install(THERE, key(0), 3, full(1));
    let moved = bench.recover(key(0), 0, 3).unwrap();
    assert_eq!((moved.layers, moved.blocks), (1, ALL));
    bench.assert_equal(key(0));
    bench.install(THERE, key(0), 4, full(2));
    let moved = bench.recover(key(0), 3, 4).unwrap();
    assert_eq!((moved.layers, moved.blocks), (1, ALL));
    bench.assert_equal(key(0));
    // Again: there is nothing to do, and nothing moves.
    assert_eq!(bench.recover(key(0), 3, 4), Ok(Moved::default()));
}

#[test]
fn i9_a_layer_that_is_not_there_any_more_goes() {
    let bench = Bench::new();
    bench.install(HERE, key(0), 3, full(1));
    assert_eq!(bench.recover(key(0), 3, 4), Err(Failure::Source), "it should be there");
    let moved = bench.recover(key(0), 3, 0).unwrap();
    assert_eq!((moved.layers, moved.blocks), (1, 0));
    assert_eq!(bench.disk(HERE).store.stat(key(0)), None);
}

#[test]
fn i8_nothing_is_put_in_place_without_lease_in_another_epoch_or_for_a_call_given_up() {
    let bench = Bench::new();
    bench.install(HERE, key(0), 1, full(1));
    bench.install(THERE, key(0), 2, full(1).take(9));
    assert_eq!(bench.recover_exactly((1, 2), true), Err(Failure::Source));
    assert_eq!(bench.recover_exactly((1, 3), false), Err(Failure::Source), "not there yet");
    assert_eq!(bench.recover_exactly((3, 2), false), Err(Failure::Behind { have: version(1) }));
    let copy = Copy { key: key(0), expect: version(1), from: THERE, target: version(2) };
    for epoch in [bench.epoch().0 - 1, bench.epoch().0 + 1] {
        let refused = bench.replica().recover(&bench.disk(HERE), copy, Epoch(epoch), None);
        assert_eq!(refused, Err(Failure::Source));
    }
    let from_itself = Copy { from: HERE, ..copy };
    let refused = bench.replica().recover(&bench.disk(HERE), from_itself, bench.epoch(), None);
    assert_eq!(refused, Err(Failure::Source));
    bench.cluster.lease.drop_now();
    assert_eq!(bench.recover(key(0), 1, 2), Err(Failure::Source));
    assert_eq!(bench.disk(HERE).store.stat(key(0)).unwrap().version, version(1));
    bench.cluster.lease.renew(boot_time() + 3_600_000_000_000);
    assert_eq!(bench.recover_exactly((1, 2), false).map(|moved| moved.layers), Ok(1));
    assert_eq!(bench.recover_exactly((1, 2), false), Ok(Moved::default()), "a repeated call");
    bench.assert_equal(key(0));
}

#[test]
fn i7_damaged_blocks_are_repaired_from_another_disk_and_nothing_else_is_moved() {
    let mut bench = Bench::new();
    for disk in [HERE, THERE] {
        bench.install(disk, key(0), 2, full(1));
    }
    let tag = |block: u64| (1 << 16) + block + 1;
    bench.restart(|bench| {
        // Each has damage elsewhere, which is in nobody's way.
        bench.flip(HERE, tag(30));
        bench.flip(HERE, tag(500));
        bench.flip(THERE, tag(31));
    });
    let repair = |here, from, seq| {
        bench.replica().repair(&bench.disk(here), key(0), from, version(seq), bench.epoch())
    };
    let behind = Err(Failure::Behind { have: version(2) });
    assert_eq!(repair(HERE, THERE, 1), behind, "another version");
    let moved = repair(HERE, THERE, 2).unwrap();
    assert_eq!((moved.layers, moved.blocks), (1, 2));
    assert!(moved.bytes < 16 << 10, "{moved:?}");
    let damage = bench.disk(HERE).store.damage();
    assert_eq!((damage.found, damage.blocks.len()), (2, 0));
    assert_eq!(repair(THERE, HERE, 2).map(|moved| moved.blocks), Ok(1));
    bench.assert_equal(key(0));
}

#[test]
fn i7_what_is_damaged_at_the_source_too_is_left_as_it_is() {
    let mut bench = Bench::new();
    for disk in [HERE, THERE] {
        bench.install(disk, key(0), 2, full(1));
    }
    bench.restart(|bench| {
        bench.flip(HERE, 1 << 16 | 31);
        bench.flip(THERE, 1 << 16 | 31);
    });
    let repair =
        bench.replica().repair(&bench.disk(HERE), key(0), THERE, version(2), bench.epoch());
    assert_eq!(repair, Err(Failure::Source));
    assert_eq!(bench.disk(HERE).store.damage().blocks.len(), 1);
}

#[test]
fn i7_damage_here_is_not_taken_for_equal() {
    let mut bench = Bench::new();
    bench.install(HERE, key(0), 1, full(1));
    bench.install(
        THERE,
        key(0),
        2,
        full(1).map(|(block, tag)| (block, tag + (u64::from(block == 9) << 40))),
    );
    bench.restart(|bench| bench.flip(HERE, 1 << 16 | 31));
    assert!(bench.disk(HERE).store.image(key(0)).is_err(), "somebody reads it");
    let moved = bench.recover(key(0), 1, 2).unwrap();
    assert_eq!((moved.layers, moved.blocks), (1, 2));
    bench.assert_equal(key(0));
}

/// What write number `seq` puts where.
fn nth_write(seq: u64) -> (u16, u64) {
    ((hash64(seq) % 40) as u16, seq << 8 | 1)
}

#[test]
fn i5_copies_of_a_layer_that_goes_on_are_of_one_version() {
    const WRITES: u64 = 1500;
    let bench = Bench::new();
    let done = AtomicBool::new(false);
    let write = |seq| {
        let (block, tag) = nth_write(seq);
        let (bytes, crcs) = (bytes_of(tag), [crc32c::crc32c(&bytes_of(tag))]);
        let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
        bench
            .disk(THERE)
            .store
            .write(key(0), version(seq - 1), version(seq), block, payload)
            .unwrap();
    };
    write(1);
    let (mut copies, mut blocks) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (2..=WRITES).for_each(write);
            done.store(true, SeqCst);
        });
        loop {
            let last = done.load(SeqCst);
            let have = bench.disk(HERE).store.stat(key(0)).map_or(0, |stat| stat.version.seq);
            if let Ok(moved) = bench.recover(key(0), have, have.max(1)) {
                (copies, blocks) = (copies + 1, blocks + moved.blocks);
            }
            let image = bench.disk(HERE).store.image(key(0)).unwrap().unwrap();
            let mut right = std::collections::BTreeMap::new();
            right.extend((1..=image.sums.version.seq).map(nth_write));
            let data: Vec<u8> = right.into_values().flat_map(bytes_of).collect();
            assert!(image.data == data, "at version {}", image.sums.version);
            if last && image.sums.version == version(WRITES) {
                break;
            }
        }
    });
    println!("{copies} copies with {blocks} blocks");
    bench.assert_equal(key(0));
}

#[test]
fn who_gives_a_copy_up_waits_for_the_one_being_put_in_place_and_for_no_other() {
    let copies = Copies::default();
    let ticket = copies.ask(HERE, key(0));
    let own = copies.begin(HERE, key(0));
    let placing = copies.place(HERE, key(0), own.right()).unwrap();
    let placed = AtomicBool::new(false);
    copies.give_up(HERE, key(1));
    copies.give_up(THERE, key(0));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            copies.give_up(HERE, key(0));
            assert!(placed.load(SeqCst), "waited");
        });
        // Long enough for a thread that does not wait.
        (0..1000).for_each(|_| std::thread::yield_now());
        placed.store(true, SeqCst);
        drop(placing);
        waiting.join().unwrap();
    });
    assert!(copies.place(HERE, key(0), Right::Ticket(ticket)).is_none(), "it was given up");
    let (old, new) = (copies.ask(HERE, key(0)), copies.ask(HERE, key(0)));
    copies.forget(HERE, key(0), old);
    assert!(copies.place(HERE, key(0), Right::Ticket(old)).is_none(), "a newer one was asked for");
    assert!(copies.place(HERE, key(0), Right::Ticket(new)).is_some());
    copies.forget(HERE, key(0), new);
    assert!(copies.place(HERE, key(0), Right::Ticket(new)).is_none());
}

#[test]
fn i4_a_fence_waits_for_writes_that_were_admitted_before() {
    let bench = Bench::new();
    let replica = bench.replica();
    let call = |request| Call { epoch: bench.epoch(), disk: HERE, writer: WriterGen(1), request };
    let volume = VolumeId(1);
    let spec =
        VolumeSpec { name: "v".into(), size: 1 << 20, copies: 1, min_copies: 1, ack: Ack::Flush };
    let attach = Command::Attach { name: "v".into(), gateway: NodeId(1), incarnation: 5, at: 0 };
    bench.cluster.apply(3, &encode_command(&Command::CreateVolume { spec, at: 0 })).unwrap();
    bench.cluster.apply(4, &encode_command(&attach)).unwrap();
    let (sender, answers) = std::sync::mpsc::channel();
    let fence = || {
        let sender = sender.clone();
        let later =
            || -> super::Later { Box::new(move |answer| sender.send(answer.reply).unwrap()) };
        let at_once = replica.execute(&call(Request::Fence { volume }), &[], &[], later);
        assert!(at_once.is_none(), "{at_once:?}");
    };
    let disk = bench.disk(HERE);
    // A write that waits in the store for space in the log.
    let writing = super::shared(&disk.writing);
    fence();
    // Long enough for one that does not wait.
    (0..1000).for_each(|_| std::thread::yield_now());
    assert!(answers.try_recv().is_err(), "the write may still land");
    drop(writing);
    assert_eq!(answers.recv().unwrap(), Reply::Done);
    fence();
    assert_eq!(answers.recv().unwrap(), Reply::Done);
}
