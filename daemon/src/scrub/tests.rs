use super::*;
use sheepdog_store::{Options, Payload, Store, StoreIds};
use sheepdog_types::{
    ClusterId, DiskId, Layer, NodeId, ObjectId, ObjectIndex, Version, VolumeId, WriterGen,
};

const LAYERS: u32 = 5;
const BYTES: u64 = LAYERS as u64 * 2 * BLOCK_SIZE as u64;

/// A scrubber of a store with some layers of two blocks each.
fn scrubber(dir: &std::path::Path) -> Scrubber {
    let ids = StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };
    let store = Store::create(dir, ids, Options::default()).unwrap();
    for index in 0..LAYERS {
        let object = ObjectId { volume: VolumeId(7), index: ObjectIndex(index) };
        let bytes = [index as u8 + 1; 2 * BLOCK_SIZE];
        let crcs: Vec<u32> = bytes.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
        let key = LayerKey { object, layer: Layer(0) };
        let version = Version { writer: WriterGen(1), seq: 1 };
        let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
        store.write(key, Version::NONE, version, 3, payload).unwrap();
    }
    Scrubber::new(Arc::new(Disk::new(ids.disk, dir.into(), store)))
}

fn info(scrubber: &Scrubber) -> ScrubInfo {
    scrubber.info(&ClusterState::default())
}

/// Waits until `reached`; gives what was seen then.
fn wait(scrubber: &Scrubber, reached: impl Fn(&ScrubInfo) -> bool) -> ScrubInfo {
    let begin = Instant::now();
    loop {
        let seen = info(scrubber);
        if reached(&seen) {
            return seen;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "waited in vain: {seen:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_scrub_reads_everything_once_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let scrubber = scrubber(dir.path());
    let idle = info(&scrubber);
    assert_eq!((idle.state, idle.started_at, idle.last), (ScrubState::Idle, None, None));
    assert_eq!((idle.bytes_done, idle.bytes_total, idle.rate), (0, BYTES, DEFAULT_RATE));
    assert!(!scrubber.pause(), "there is nothing to pause");
    for _ in 0..2 {
        scrubber.start(Some(1 << 40)).unwrap();
        let done = wait(&scrubber, |seen| seen.state == ScrubState::Idle);
        let last = done.last.unwrap();
        assert_eq!((last.bytes, last.found, done.damaged_blocks), (BYTES, 0, 0));
        assert!(last.finished_at >= last.started_at && last.started_at > 0);
    }
}

#[test]
fn a_slow_scrub_is_paused_goes_on_where_it_was_and_can_be_hurried() {
    let dir = tempfile::tempdir().unwrap();
    let scrubber = scrubber(dir.path());
    // Three seconds for each layer.
    scrubber.start(Some(MIN_RATE)).unwrap();
    let running = wait(&scrubber, |seen| seen.bytes_done > 0);
    assert_eq!((running.state, running.rate), (ScrubState::Running, MIN_RATE));
    assert!(scrubber.pause());
    // A layer may be under way.
    let paused = wait(&scrubber, |seen| seen.state == ScrubState::Paused);
    assert!((1..BYTES).contains(&paused.bytes_done), "{paused:?}");
    assert_eq!(paused.started_at, running.started_at);
    scrubber.start(None).unwrap();
    assert_eq!(info(&scrubber).rate, MIN_RATE, "as before");
    assert!(info(&scrubber).bytes_done >= paused.bytes_done, "from where it was");
    scrubber.start(Some(1 << 40)).unwrap();
    let done = wait(&scrubber, |seen| seen.state == ScrubState::Idle);
    assert_eq!(done.last.unwrap().bytes, BYTES);
}

#[test]
fn a_stop_does_not_wait_for_the_rate_and_is_final() {
    let dir = tempfile::tempdir().unwrap();
    let scrubber = scrubber(dir.path());
    assert!(scrubber.start(Some(MIN_RATE - 1)).is_err());
    assert_eq!(info(&scrubber).state, ScrubState::Idle);
    scrubber.start(Some(MIN_RATE)).unwrap();
    let running = wait(&scrubber, |seen| seen.bytes_done > 0);
    scrubber.stop();
    let stopped = info(&scrubber);
    assert!(stopped.bytes_done < BYTES, "{running:?}, {stopped:?}");
    assert!(scrubber.start(None).unwrap_err().contains("stopping"));
}
