//! What a live migration needs: the log of pages written, and queues that are really at rest.
#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use support::driver::Driver;
use support::guest::{Guest, SIZE, Setup};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{Bytes, GuestAddress};

const LOG_ALL: u64 = 1 << 26;
/// For a guest of 1 MiB.
const LOG_BYTES: usize = 32;
/// Page of the guest's status byte, and of its buffer.
const STATUS: u64 = 0x10;
const BUFFER: u64 = 0x11;
/// Page at which the used ring is logged: not where the ring is, so that it cannot be mistaken.
const USED: u64 = 0x77;

struct Log(File);

impl Log {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        Self(file)
    }

    fn region(&self, bytes: usize) -> VhostUserDirtyLogRegion {
        let mmap_handle = self.0.as_raw_fd();
        VhostUserDirtyLogRegion { mmap_size: bytes as u64, mmap_offset: 0, mmap_handle }
    }

    fn give_to(&self, guest: &Guest, bytes: usize) {
        guest.frontend.set_log_base(0, Some(self.region(bytes))).unwrap();
    }

    /// Pages marked since the last look.
    fn pages(&self) -> BTreeSet<u64> {
        let mut bytes = [0; LOG_BYTES * 2];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        self.0.write_all_at(&[0; LOG_BYTES * 2], 0).unwrap();
        (0..bytes.len() as u64 * 8).filter(|p| bytes[*p as usize / 8] & 1 << (p % 8) != 0).collect()
    }
}

/// Waits until the worker has gone to sleep: it writes into the used ring before it does.
fn at_rest(guest: &Guest) {
    while guest.mem.read_obj::<u16>(GuestAddress(0x2000)).unwrap() != 0 {
        std::thread::yield_now();
    }
    // Takes the ring's lock, under which the write was made and marked.
    guest.frontend.set_vring_call(guest.index, &guest.call).unwrap();
}

fn set(pages: &[u64]) -> BTreeSet<u64> {
    pages.iter().copied().collect()
}

#[test]
fn exactly_what_is_written_is_marked_and_only_while_it_is_asked_for() {
    let setup = Setup::new();
    let _server = setup.start();
    let mut guest = Guest::connect(&setup.path(), 0);
    let mem = guest.mem.clone();
    let mut driver = Driver::new(&mem, SIZE);
    let log = Log::new();
    log.give_to(&guest, LOG_BYTES);
    guest.read(&mut driver, 0, false);
    at_rest(&guest);
    assert_eq!(log.pages(), set(&[]), "not asked for yet");

    guest.frontend.set_features(guest.features | LOG_ALL).unwrap();
    guest.read(&mut driver, 0, false);
    at_rest(&guest);
    assert_eq!(log.pages(), set(&[STATUS, BUFFER]));
    guest.write(&mut driver, 0, 7, false);
    at_rest(&guest);
    assert_eq!(log.pages(), set(&[STATUS]), "the buffer of a write is not written");

    guest.set_addresses(Some(USED << 12));
    guest.read(&mut driver, 0, true);
    at_rest(&guest);
    assert_eq!(log.pages(), set(&[STATUS, BUFFER, USED]));

    // The log grows: the new one is used at once, and the old one is let go.
    let larger = Log::new();
    larger.give_to(&guest, LOG_BYTES * 2);
    guest.write(&mut driver, 1, 7, false);
    at_rest(&guest);
    assert_eq!((log.pages(), larger.pages()), (set(&[]), set(&[STATUS, USED])));

    // Cancelled, and tried again.
    guest.frontend.set_features(guest.features).unwrap();
    guest.set_addresses(None);
    guest.read(&mut driver, 0, false);
    at_rest(&guest);
    assert_eq!(larger.pages(), set(&[]), "no longer asked for");
    guest.frontend.set_features(guest.features | LOG_ALL).unwrap();
    guest.read(&mut driver, 0, false);
    at_rest(&guest);
    assert_eq!(larger.pages(), set(&[STATUS, BUFFER]));
}

#[test]
fn requests_in_flight_when_logging_begins_are_marked_before_the_queue_is_at_rest() {
    let setup = Setup::new();
    let _server = setup.start();
    let mut guest = Guest::connect(&setup.path(), 1);
    let mem = guest.mem.clone();
    let mut driver = Driver::new(&mem, SIZE);
    setup.disk.hold();
    // A read over the border of two pages, and a request that is answered without the disk.
    driver.header(0x10000, 0, 0);
    let parts = [(0x10000, 16, false), (0x12f00, 512, true), (0x14000, 1, true)];
    let head = driver.chain(&parts);
    driver.offer(head);
    guest.kick();
    setup.disk.wait_held(1);
    at_rest(&guest);
    let log = Log::new();
    log.give_to(&guest, LOG_BYTES);
    guest.frontend.set_features(guest.features | LOG_ALL).unwrap();
    guest.set_addresses(Some(USED << 12));
    let at_first = log.pages();

    driver.header(0x10100, 8, 0);
    let head = driver.chain(&[(0x10100, 16, false), (0x16000, 20, true), (0x18000, 1, true)]);
    driver.offer(head);
    guest.kick();
    guest.used(&mut driver);
    at_rest(&guest);
    let then = log.pages();
    let disk = setup.disk.clone();
    let release = std::thread::spawn(move || disk.release());
    let base = guest.frontend.get_vring_base(1).unwrap();
    let at_rest = log.pages();
    release.join().unwrap();
    // Only now: a server with requests that are held never stops.
    assert_eq!((at_first, base), (set(&[]), 2));
    assert_eq!(then, set(&[0x16, 0x18, USED]));
    assert_eq!(at_rest, set(&[0x12, 0x13, 0x14, USED]));
    // At rest: a kick changes nothing.
    let before: [u8; 32] = mem.read_obj(GuestAddress(0x2000)).unwrap();
    guest.kick();
    guest.frontend.get_features().unwrap();
    assert_eq!(mem.read_obj::<[u8; 32]>(GuestAddress(0x2000)).unwrap(), before);
    assert_eq!(log.pages(), set(&[]));
}

#[test]
fn a_log_that_is_too_small_is_never_left_and_one_that_is_too_short_is_refused() {
    let setup = Setup::new();
    let _server = setup.start();
    let mut guest = Guest::connect(&setup.path(), 0);
    let mem = guest.mem.clone();
    let mut driver = Driver::new(&mem, SIZE);
    let log = Log::new();
    log.give_to(&guest, 2); // up to page 15
    guest.frontend.set_features(guest.features | LOG_ALL).unwrap();
    guest.set_addresses(Some(u64::MAX - 7));
    guest.read(&mut driver, 0, false);
    at_rest(&guest);
    guest.set_addresses(Some(0xf << 12));
    guest.read(&mut driver, 0, false);
    at_rest(&guest);
    assert_eq!(log.pages(), set(&[0xf]));

    log.0.set_len(8).unwrap();
    assert!(guest.frontend.set_log_base(0, Some(log.region(LOG_BYTES))).is_err());
}
