use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sheepdog_types::BLOCK_SIZE;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use vmm_sys_util::eventfd::EventFd;

mod death;

use super::*;
use crate::testing::disk::Disk;
use crate::testing::driver::{AVAIL, DATA, DESC, Driver, NEXT, Part, Rng, USED};

const SIZE: u16 = 16;
const HEADER: u64 = DATA;
const BUFFER: u64 = DATA + 0x1000;
/// Status bytes: one for each request of a test.
const STATUS: u64 = DATA + 0x800;
const UNTOUCHED: u8 = 0xEE;

/// A queue whose guest memory the test can write.
struct Bench {
    disk: Arc<Disk>,
    memory: Memory,
    queue: Arc<Queue>,
    call: EventFd,
    scratch: Scratch,
}

fn event_fd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
}

fn as_file(event: &EventFd) -> File {
    use std::os::fd::{BorrowedFd, OwnedFd};
    // SAFETY: `event` is open while it is borrowed here.
    let fd: OwnedFd =
        unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }.try_clone_to_owned().unwrap();
    fd.into()
}

impl Bench {
    fn new() -> Self {
        Self::with_disk(Disk::new(1 << 20))
    }

    fn with_disk(disk: Disk) -> Self {
        let ranges = [(GuestAddress(0), 1 << 20)];
        let bench = Self::stopped(disk, GuestMemoryMmap::from_ranges(&ranges).unwrap());
        bench.start();
        // The signal at the start, in case that a predecessor could not.
        assert_eq!(bench.signals(), 1);
        bench
    }

    /// With a queue that is configured and not started.
    fn stopped(disk: Disk, memory: GuestMemoryMmap) -> Self {
        let disk = Arc::new(disk);
        let memory = Memory::new(memory);
        let shared = Arc::new(Shared {
            frontend: None,
            name: "test".into(),
            block: disk.clone(),
            memory: memory.clone(),
            writeback: AtomicBool::new(true),
            closing: AtomicBool::new(false),
        });
        let queue = Arc::new(Queue::new(0, shared, SIZE).unwrap());
        let bench = Self { disk, memory, queue, call: event_fd(), scratch: Scratch::default() };
        bench.set_addresses(DESC, AVAIL, USED);
        bench
    }

    fn set_addresses(&self, desc: u64, avail: u64, used: u64) {
        let [desc, avail, used] = [desc, avail, used].map(GuestAddress);
        self.queue.ring().set_addresses(desc, avail, used).unwrap();
    }

    fn start(&self) {
        self.queue.ring().set_call(Some(as_file(&self.call)));
        self.queue.set_kick(as_file(&event_fd())).unwrap();
        self.queue.set_enabled(true);
    }

    fn mem(&self) -> Arc<GuestMemoryMmap> {
        self.memory.memory().into_inner()
    }

    fn serve(&mut self) {
        self.queue.serve(&mut self.scratch);
    }

    /// Signals to the guest since the last look.
    fn signals(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    fn broken(&self) -> bool {
        lock(&self.queue.state).broken
    }

    fn in_flight(&self) -> usize {
        lock(&self.queue.state).in_flight
    }
}

/// Offers request `n` of `kind` with one data buffer.
fn offer(driver: &mut Driver, n: u64, kind: u32, sector: u64, data: Option<Part>) -> u16 {
    let (header, status) = (HEADER + n * 16, STATUS + n);
    driver.header(header, kind, sector);
    driver.put(status, UNTOUCHED);
    let mut parts = vec![(header, 16, false)];
    parts.extend(data);
    parts.push((status, 1, true));
    let head = driver.chain(&parts);
    driver.offer(head);
    head
}

#[test]
fn data_goes_in_and_comes_out_and_one_signal_tells_of_all() {
    let mut bench = Bench::new();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    mem.write_slice(&[7; 512], GuestAddress(BUFFER)).unwrap();
    let write = offer(&mut driver, 0, 1, 3, Some((BUFFER, 512, false)));
    let flush = offer(&mut driver, 1, 4, 0, None);
    bench.serve();
    assert_eq!(driver.used(), Some((write, 1)));
    assert_eq!(driver.used(), Some((flush, 1)));
    assert_eq!(driver.used(), None);
    assert_eq!(bench.signals(), 1);
    assert_eq!(driver.get::<u16>(STATUS), 0);

    let read = offer(&mut driver, 2, 0, 3, Some((BUFFER + 0x1000, 512, true)));
    bench.serve();
    assert_eq!(driver.used(), Some((read, 513)));
    assert_eq!(driver.get::<[u8; 32]>(BUFFER + 0x1000), [7; 32]);
    assert_eq!(bench.disk.ops(), ["write 1536+512 fua=false", "flush", "read 1536+512"]);
    assert_eq!(bench.in_flight(), 0);
}

#[test]
fn the_serial_is_padded_with_zeroes() {
    let mut bench = Bench::new();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    mem.write_slice(&[UNTOUCHED; 21], GuestAddress(BUFFER)).unwrap();
    let head = offer(&mut driver, 0, 8, 0, Some((BUFFER, 20, true)));
    bench.serve();
    assert_eq!(driver.used(), Some((head, 21)));
    assert_eq!(&driver.get::<[u8; 20]>(BUFFER)[..], b"test-disk\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(driver.get::<u8>(BUFFER + 20), UNTOUCHED);
}

#[test]
fn a_guest_that_cannot_flush_gets_durable_writes() {
    let mut bench = Bench::new();
    bench.queue.shared.writeback.store(false, Ordering::Relaxed);
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    offer(&mut driver, 0, 1, 0, Some((BUFFER, 512, false)));
    bench.serve();
    assert_eq!(bench.disk.ops(), ["write 0+512 fua=true"]);
}

#[test]
fn a_write_is_a_stable_copy() {
    let mut bench = Bench::new();
    bench.disk.hold();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    mem.write_slice(&[1; 512], GuestAddress(BUFFER)).unwrap();
    offer(&mut driver, 0, 1, 0, Some((BUFFER, 512, false)));
    bench.serve();
    mem.write_slice(&[2; 512], GuestAddress(BUFFER)).unwrap();
    bench.disk.release();
    offer(&mut driver, 1, 0, 0, Some((BUFFER, 512, true)));
    bench.serve();
    assert_eq!(driver.get::<[u8; 32]>(BUFFER), [1; 32]);
}

#[test]
fn failures_and_bad_requests_are_answered_and_the_queue_lives_on() {
    let mut bench = Bench::new();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    let beyond = offer(&mut driver, 0, 0, 1 << 20, Some((BUFFER, 512, true)));
    let odd = offer(&mut driver, 1, 0, 0, Some((BUFFER, 100, true)));
    let unknown = offer(&mut driver, 2, 77, 0, None);
    let mute = driver.chain(&[(HEADER, 16, false)]);
    driver.offer(mute);
    let good = offer(&mut driver, 3, 4, 0, None);
    bench.serve();
    let mut used: Vec<_> = std::iter::from_fn(|| driver.used()).collect();
    used.sort_unstable();
    let mut expected = [(beyond, 1), (odd, 1), (unknown, 1), (mute, 0), (good, 1)];
    expected.sort_unstable();
    assert_eq!(used, expected);
    assert_eq!(driver.get::<[u8; 4]>(STATUS), [1, 1, 2, 0]);
    assert!(!bench.broken());
}

#[test]
fn completions_in_any_order_reach_their_own_requests() {
    let mut bench = Bench::new();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    for n in 0..4u64 {
        mem.write_slice(&[n as u8 + 1; 512], GuestAddress(BUFFER)).unwrap();
        offer(&mut driver, n, 1, n, Some((BUFFER, 512, false)));
        bench.serve();
        driver.used().unwrap();
    }
    bench.disk.hold();
    let heads: Vec<u16> =
        (0..4).map(|n| offer(&mut driver, n, 0, n, Some((BUFFER + n * 512, 512, true)))).collect();
    bench.serve();
    assert_eq!((driver.used(), bench.in_flight(), bench.signals()), (None, 4, 4));
    bench.disk.release();
    for n in (0..4).rev() {
        assert_eq!(driver.used(), Some((heads[n], 513)));
        assert_eq!(driver.get::<[u8; 32]>(BUFFER + n as u64 * 512), [n as u8 + 1; 32]);
    }
    assert_eq!((bench.in_flight(), bench.signals()), (0, 1));
}

#[test]
fn a_guest_that_polls_is_not_signalled() {
    let mut bench = Bench::new();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    driver.put(AVAIL, VRING_AVAIL_F_NO_INTERRUPT as u16);
    offer(&mut driver, 0, 4, 0, None);
    bench.serve();
    assert!(driver.used().is_some());
    assert_eq!(bench.signals(), 0);
}

#[test]
fn a_descriptor_that_is_set_while_the_ring_runs_is_signalled_at_once() {
    let bench = Bench::new();
    let call = event_fd();
    bench.queue.ring().set_call(Some(as_file(&call)));
    assert_eq!(call.read().unwrap(), 1);
    bench.queue.stop();
    bench.queue.ring().set_call(Some(as_file(&call)));
    assert!(call.read().is_err());
}

#[test]
fn a_stopped_ring_is_left_alone() {
    let mut bench = Bench::new();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    offer(&mut driver, 0, 4, 0, None);
    bench.queue.set_enabled(false);
    bench.serve();
    assert_eq!(driver.used(), None);
    bench.queue.set_enabled(true);
    assert_eq!(bench.queue.stop(), 0);
    bench.serve();
    assert_eq!(driver.used(), None);
    bench.start();
    bench.serve();
    assert!(driver.used().is_some());
}

#[test]
fn draining_waits_for_what_is_in_flight() {
    let mut bench = Bench::new();
    bench.disk.hold();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    offer(&mut driver, 0, 1, 0, Some((BUFFER, 512, false)));
    offer(&mut driver, 1, 1, 8, Some((BUFFER, 512, false)));
    bench.serve();
    let queue = bench.queue.clone();
    let (drained, wait_drained) = mpsc::channel();
    let drainer = thread::spawn(move || {
        queue.stop();
        drained.send(()).unwrap();
    });
    // How long something that must not happen is given to happen.
    let too_early = wait_drained.recv_timeout(Duration::from_millis(100));
    bench.disk.release();
    assert!(too_early.is_err(), "drained while requests were in flight");
    drainer.join().unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used()).count(), 2);
}

#[test]
fn a_broken_ring_stops_until_it_is_set_up_again() {
    type Break = fn(&mut Driver);
    let ways: [(&str, Break); 3] = [
        ("index jump", |d| d.put(AVAIL + 2, SIZE + 2)),
        ("loop", |d| {
            d.desc(DESC, 0, HEADER, 16, NEXT, 0);
            d.offer(0);
        }),
        ("head out of range", |d| d.offer(SIZE)),
    ];
    for (way, break_it) in ways {
        let mut bench = Bench::new();
        let mem = bench.mem();
        let mut driver = Driver::new(&mem, SIZE);
        offer(&mut driver, 0, 4, 0, None);
        bench.serve();
        assert!(driver.used().is_some());
        break_it(&mut driver);
        bench.serve();
        assert!(bench.broken(), "{way}");
        assert_eq!(bench.in_flight(), 0, "{way}");
        // More kicks change nothing; a reset does.
        bench.serve();
        assert_eq!(driver.used(), None, "{way}");
        bench.queue.stop();
        bench.queue.ring().set_base(1);
        driver.put(AVAIL + 2, 1u16);
        bench.start();
        let mut driver = Driver::new(&mem, SIZE);
        driver.offer(0);
        offer(&mut driver, 0, 4, 0, None);
        bench.serve();
        assert!(!bench.broken(), "{way}");
        assert_eq!(std::iter::from_fn(|| driver.used()).count(), 2, "{way}");
    }
}

#[test]
fn rings_outside_memory_break_the_queue() {
    for (desc, avail, used) in
        [(1 << 30, AVAIL, USED), (DESC, (1 << 20) - 2, USED), (DESC, AVAIL, u64::MAX - 3)]
    {
        let mut bench = Bench::new();
        bench.queue.stop();
        bench.set_addresses(desc, avail, used);
        bench.start();
        assert!(bench.broken());
        bench.serve();
        assert!(bench.broken());
    }
}

#[test]
fn a_head_given_twice_cannot_exceed_the_ring() {
    let mut bench = Bench::new();
    bench.disk.hold();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    let head = offer(&mut driver, 0, 4, 0, None);
    (1..SIZE).for_each(|_| driver.offer(head));
    bench.serve();
    assert_eq!((bench.in_flight(), bench.broken()), (usize::from(SIZE), false));
    driver.offer(head);
    bench.serve();
    assert!(bench.broken());
    bench.disk.release();
    assert_eq!(bench.in_flight(), 0);
}

#[test]
fn bytes_in_flight_are_bounded_and_the_queue_resumes() {
    let mut bench = Bench::new();
    bench.disk.hold();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    driver.header(HEADER, 0, 0);
    // 16 MiB each, out of half a MiB of memory read 32 times over.
    let mut parts = vec![(HEADER, 16, false)];
    parts.extend(std::iter::repeat_n((0x80000, 0x80000 - 0x1000, true), 32));
    parts.push((0x80000, 32 * 0x1000, true));
    parts.push((STATUS, 1, true));
    let head = driver.indirect(0x60000, &parts);
    (0..6).for_each(|_| driver.offer(head));
    let _ = bench.queue.wake.resume.read();
    bench.serve();
    assert_eq!(bench.in_flight(), 4);
    assert_eq!(lock(&bench.queue.state).bytes, MAX_BYTES_IN_FLIGHT);
    bench.disk.release();
    assert!(bench.queue.wake.resume.read().is_ok(), "nobody would serve the queue again");
    bench.serve();
    assert_eq!(std::iter::from_fn(|| driver.used()).count(), 6);
    assert_eq!(lock(&bench.queue.state).bytes, 0);
}

#[test]
fn memory_is_kept_mapped_for_requests_in_flight() {
    let mut bench = Bench::new();
    bench.disk.hold();
    let mem = bench.mem();
    let mut driver = Driver::new(&mem, SIZE);
    offer(&mut driver, 0, 0, 0, Some((BUFFER, 512, true)));
    bench.serve();
    bench.memory.lock().unwrap().replace(GuestMemoryMmap::new());
    assert!(Arc::strong_count(&mem) >= 2);
    bench.disk.release();
    // The data went where it was asked for; the ring is in the new table's memory: nowhere.
    assert_eq!(driver.get::<u8>(STATUS), 0);
    assert!(bench.broken());
    assert_eq!((bench.in_flight(), Arc::strong_count(&mem)), (0, 1));
}

/// Whatever bytes a guest puts into its rings: nothing panics, nothing stays in flight, nothing
/// larger than allowed reaches the device (which asserts that).
#[test]
fn random_rings() {
    let mut rng = Rng::from_env();
    for _ in 0..3000 {
        // A device of a few blocks, so that random requests hit its end.
        let mut bench = Bench::with_disk(Disk::new(2 * BLOCK_SIZE));
        let mem = bench.mem();
        let mut driver = Driver::new(&mem, SIZE);
        if rng.below(2) == 0 {
            bench.disk.hold();
        }
        for _ in 0..rng.below(4) + 1 {
            for n in 0..SIZE {
                random_descriptor(&mut rng, &driver, DESC, n);
                random_descriptor(&mut rng, &driver, BUFFER, n);
                let kind = [0, 1, 4, 8, 11, 13, rng.next() as u32][rng.below(7) as usize];
                driver.header(HEADER + u64::from(n) * 16, kind, rng.below(20));
            }
            for _ in 0..rng.below(u64::from(SIZE)) {
                let heads = u64::from(SIZE) + u64::from(rng.below(200) == 0);
                driver.offer(rng.below(heads) as u16);
            }
            if rng.below(20) == 0 {
                driver.put(AVAIL + 2, rng.next() as u16);
            }
            bench.serve();
        }
        bench.disk.release();
        bench.serve();
        bench.queue.stop();
        assert_eq!(lock(&bench.queue.state).bytes, 0);
    }
}

fn random_descriptor(rng: &mut Rng, driver: &Driver, table: u64, n: u16) {
    let addr = match rng.below(8) {
        0 => rng.next(),
        1 => (1 << 20) - rng.below(600),
        2 => BUFFER,
        3 => rng.below(1 << 14),
        _ => HEADER + rng.below(u64::from(SIZE)) * 16,
    };
    let len = match rng.below(8) {
        0 => rng.next() as u32,
        1 => 16 * rng.below(20) as u32,
        2 => 1,
        3 | 4 => 512 * rng.below(4) as u32,
        _ => 16,
    };
    let flags = match rng.below(12) {
        0 => rng.next() as u16,
        1 => 4,
        2..6 => 3,
        6 | 7 => 2,
        _ => 1,
    };
    // Mostly forward, so that chains end; sometimes back, for loops.
    let next = if rng.below(8) == 0 { rng.below(20) as u16 } else { n + 1 };
    driver.desc(table, n, addr, len, flags, next);
}
