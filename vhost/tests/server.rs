//! The server over its real socket, driven by frontends in this process.
#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod support;

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sheepdog_types::Block;
use sheepdog_vhost::{Config, ServerHandle, StartError, VhostServer};
use support::disk::Disk;
use support::driver::{AVAIL, DATA, DESC, Driver, USED};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

const QUEUES: u64 = 2;
const SIZE: u16 = 16;
/// Each queue has its own part of guest memory, as region number `queue`.
const MEM: usize = 1 << 20;
/// Only ever waited for by a test that fails.
const PATIENCE_MS: i32 = 30_000;
/// How long something that must not happen is given to happen.
const TOO_EARLY: Duration = Duration::from_millis(200);

struct Setup {
    dir: tempfile::TempDir,
    disk: Arc<Disk>,
}

impl Setup {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), disk: Arc::new(Disk::new(1 << 20)) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("volume.sock")
    }

    fn start(&self) -> ServerHandle {
        let config = Config { queues: QUEUES as u16, queue_size: SIZE, mode: 0o600 };
        VhostServer::start(self.path(), self.disk.clone(), config).unwrap()
    }
}

/// A VM with one queue at index `index`, and memory of its own.
struct Guest {
    frontend: Frontend,
    mem: GuestMemoryMmap,
    index: usize,
    kick: EventFd,
    call: EventFd,
    wait: Epoll,
}

fn event_fd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
}

impl Guest {
    fn connect(path: &Path, index: usize) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEM as u64).unwrap();
        let backing = Some(FileOffset::new(file, 0));
        let ranges = [(GuestAddress(0), MEM, backing)];
        let mem = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let (call, wait) = (event_fd(), Epoll::new().unwrap());
        let event = EpollEvent::new(EventSet::IN, 0);
        wait.ctl(ControlOperation::Add, call.as_raw_fd(), event).unwrap();
        let frontend = Frontend::connect(path, QUEUES).unwrap();
        let mut guest = Self { frontend, mem, index, kick: event_fd(), call, wait };
        guest.negotiate();
        guest.start_queue(0);
        guest
    }

    fn negotiate(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let mut features = frontend.get_features().unwrap();
        features &= !(1 << 29); // without event index: the driver here does not know it
        let protocol = frontend.get_protocol_features().unwrap();
        for needed in [
            VhostUserProtocolFeatures::MQ,
            VhostUserProtocolFeatures::CONFIG,
            VhostUserProtocolFeatures::REPLY_ACK,
            VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
        ] {
            assert!(protocol.contains(needed), "{needed:?}");
        }
        frontend.set_protocol_features(protocol).unwrap();
        // Wait for an answer to every message: no message is on its way when a test goes on.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), QUEUES);
        frontend.set_features(features).unwrap();
        let region = self.mem.iter().next().unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[region]).unwrap();
    }

    fn start_queue(&mut self, base: u16) {
        let region = self.mem.iter().next().unwrap();
        let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap() as u64;
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: host + DESC,
            used_ring_addr: host + USED,
            avail_ring_addr: host + AVAIL,
            log_addr: None,
        };
        let (index, frontend) = (self.index, &mut self.frontend);
        frontend.set_vring_num(index, SIZE).unwrap();
        frontend.set_vring_addr(index, &config).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_call(index, &self.call).unwrap();
        frontend.set_vring_kick(index, &self.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }

    fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits for the next used chain.
    fn used(&self, driver: &mut Driver) -> (u16, u32) {
        loop {
            if let Some(used) = driver.used() {
                return used;
            }
            let woken = self.wait.wait(PATIENCE_MS, &mut [EpollEvent::default()]).unwrap();
            assert_eq!(woken, 1, "no signal came");
            let _ = self.call.read();
        }
    }

    /// Offers one request, by an indirect table if `indirect`; gives its head.
    fn offer(
        &self,
        driver: &mut Driver,
        kind: u32,
        sector: u64,
        write: bool,
        indirect: bool,
    ) -> u16 {
        driver.header(DATA, kind, sector);
        let parts = [(DATA, 16, false), (DATA + 0x1000, 512, !write), (DATA + 0x100, 1, true)];
        let head =
            if indirect { driver.indirect(DATA + 0x8000, &parts) } else { driver.chain(&parts) };
        driver.offer(head);
        head
    }

    fn write(&self, driver: &mut Driver, sector: u64, fill: u8, indirect: bool) {
        self.mem.write_slice(&[fill; 512], GuestAddress(DATA + 0x1000)).unwrap();
        let head = self.offer(driver, 1, sector, true, indirect);
        self.kick();
        assert_eq!(self.used(driver), (head, 1));
        assert_eq!(driver.get::<u8>(DATA + 0x100), 0);
    }

    fn read(&self, driver: &mut Driver, sector: u64, indirect: bool) -> u8 {
        let head = self.offer(driver, 0, sector, false, indirect);
        self.kick();
        assert_eq!(self.used(driver), (head, 513));
        let data: [u8; 32] = driver.get(DATA + 0x1000);
        assert!(data.iter().all(|&b| b == data[0]));
        data[0]
    }
}

fn driver(guest: &Guest) -> Driver<'_> {
    Driver::new(&guest.mem, SIZE)
}

#[test]
fn every_queue_serves_direct_and_indirect_chains() {
    let setup = Setup::new();
    let _server = setup.start();
    for index in 0..QUEUES as usize {
        let guest = Guest::connect(&setup.path(), index);
        let mut driver = driver(&guest);
        for indirect in [false, true] {
            let fill = 1 + 2 * index as u8 + u8::from(indirect);
            guest.write(&mut driver, 5, fill, indirect);
            assert_eq!(guest.read(&mut driver, 5, !indirect), fill);
        }
    }
}

#[test]
fn a_new_client_finds_the_old_ones_data_and_no_descriptor_is_lost() {
    let setup = Setup::new();
    let server = setup.start();
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = None;
    for round in 0..8 {
        let guest = Guest::connect(&setup.path(), 0);
        let mut driver = driver(&guest);
        assert_eq!(server.clients(), 1);
        if round > 0 {
            assert_eq!(guest.read(&mut driver, 9, false), round);
        }
        guest.write(&mut driver, 9, round + 1, false);
        // Other tests of this process open descriptors too: a leak would be 16 or more.
        let now = *before.get_or_insert_with(open);
        assert!(open() < now + 16 || round < 7);
    }
}

#[test]
fn get_vring_base_waits_for_requests_in_flight_and_the_queue_starts_again() {
    let setup = Setup::new();
    let _server = setup.start();
    let mut guest = Guest::connect(&setup.path(), 0);
    setup.disk.hold();
    let mem = guest.mem.clone();
    let mut driver = Driver::new(&mem, SIZE);
    guest.offer(&mut driver, 1, 0, true, false);
    guest.kick();
    setup.disk.wait_held(1);
    let frontend = guest.frontend.clone();
    let (answered, answer) = mpsc::channel();
    let stop = thread::spawn(move || answered.send(frontend.get_vring_base(0).unwrap()).unwrap());
    assert!(answer.recv_timeout(TOO_EARLY).is_err(), "answered with a request in flight");
    setup.disk.release();
    assert_eq!(answer.recv().unwrap(), 1);
    stop.join().unwrap();
    // Answered before the answer to GET_VRING_BASE.
    assert!(driver.used().is_some());
    // What is offered now waits for the queue to be started again.
    guest.offer(&mut driver, 4, 0, true, false);
    guest.kick();
    guest.start_queue(1);
    guest.used(&mut driver);
    assert_eq!(setup.disk.ops(), ["write 0+512 fua=false", "flush"]);
}

#[test]
fn stopping_drains_what_is_in_flight() {
    let setup = Setup::new();
    let server = setup.start();
    let guest = Guest::connect(&setup.path(), 1);
    setup.disk.hold();
    let mut driver = driver(&guest);
    for _ in 0..3 {
        guest.offer(&mut driver, 1, 0, true, false);
    }
    guest.kick();
    setup.disk.wait_held(3);
    let (stopped, wait_stopped) = mpsc::channel();
    let stop = thread::spawn(move || {
        server.stop();
        stopped.send(()).unwrap();
    });
    assert!(wait_stopped.recv_timeout(TOO_EARLY).is_err(), "stopped with requests in flight");
    setup.disk.release();
    stop.join().unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used()).count(), 3);
    assert!(!setup.path().exists());
}

#[test]
fn stopping_does_not_wait_for_an_idle_client() {
    let setup = Setup::new();
    let server = setup.start();
    let guest = Guest::connect(&setup.path(), 0);
    server.stop();
    assert!(guest.frontend.get_features().is_err());
    // And without any client.
    setup.start().stop();
    assert!(!setup.path().exists());
}

#[test]
fn the_configuration_space_is_read_in_any_piece_and_write_cache_can_be_turned_off() {
    let setup = Setup::new();
    let _server = setup.start();
    let mut guest = Guest::connect(&setup.path(), 0);
    let flags = VhostUserConfigFlags::WRITABLE;
    for size in [8, 36, 60, 200] {
        let (_, config) =
            guest.frontend.get_config(0, size, flags, &vec![0; size as usize]).unwrap();
        assert_eq!(config[..8], 2048u64.to_le_bytes());
        if size > 32 {
            assert_eq!(config[32], 1, "the write cache is on");
        }
    }
    guest.frontend.set_config(32, flags, &[0]).unwrap();
    guest.frontend.set_config(0, flags, &[9, 9, 9, 9]).unwrap();
    assert_eq!(guest.frontend.get_config(32, 1, flags, &[0]).unwrap().1, [0]);
    assert_eq!(guest.frontend.get_config(0, 4, flags, &[0; 4]).unwrap().1, 2048u32.to_le_bytes());
    let mem = guest.mem.clone();
    guest.write(&mut Driver::new(&mem, SIZE), 0, 1, false);
    assert_eq!(setup.disk.ops(), ["write 0+512 fua=true"]);
}

#[test]
fn a_protocol_error_ends_that_connection_only() {
    let setup = Setup::new();
    let _server = setup.start();
    let guest = Guest::connect(&setup.path(), 0);
    assert!(guest.frontend.set_vring_num(0, SIZE + 1).is_err());
    assert!(guest.frontend.get_features().is_err());
    let guest = Guest::connect(&setup.path(), 0);
    guest.write(&mut driver(&guest), 0, 1, false);
}

#[test]
fn a_second_client_is_turned_away_and_the_first_keeps_working() {
    let setup = Setup::new();
    let server = setup.start();
    let guest = Guest::connect(&setup.path(), 0);
    let second = Frontend::connect(setup.path(), 1).unwrap();
    assert!(second.set_owner().and_then(|()| second.get_features()).is_err());
    assert_eq!(server.clients(), 1);
    guest.write(&mut driver(&guest), 0, 1, false);
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let setup = Setup::new();
    drop(UnixListener::bind(setup.path()).unwrap());
    let server = setup.start();
    let mode = fs::metadata(setup.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = VhostServer::start(setup.path(), setup.disk.clone(), Config::default());
    assert!(matches!(again, Err(StartError::AddrInUse(_))), "{again:?}");
    let guest = Guest::connect(&setup.path(), 0);
    guest.write(&mut driver(&guest), 0, 1, false);
    drop(guest);
    server.stop();

    fs::write(setup.path(), "not a socket").unwrap();
    let refused = VhostServer::start(setup.path(), setup.disk.clone(), Config::default());
    assert!(matches!(refused, Err(StartError::NotASocket(_))), "{refused:?}");
    assert_eq!(fs::read(setup.path()).unwrap(), b"not a socket");
    let nowhere = VhostServer::start("/no/such/dir/x", setup.disk.clone(), Config::default());
    assert!(matches!(nowhere, Err(StartError::Io { .. })), "{nowhere:?}");
}

#[test]
fn nonsense_configurations_are_refused() {
    let setup = Setup::new();
    for (queues, queue_size) in [(0, 128), (65, 128), (1, 0), (1, 100), (1, 2048)] {
        let config = Config { queues, queue_size, ..Config::default() };
        let refused = VhostServer::start(setup.path(), setup.disk.clone(), config);
        assert!(matches!(refused, Err(StartError::Config(_))), "{queues} {queue_size}");
    }
    assert!(!setup.path().exists());
}

/// An independent driver, with event index, several queues at once and more requests than one.
mod with_virtio_driver {
    use super::*;
    use virtio_driver::{
        VhostUser, VirtioBlkConfig, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport,
        VirtioFeatureFlags,
    };

    const BLOCK: usize = 4096;
    const AT_ONCE: usize = 4;

    /// Runs what `enqueue` put into `queue` and gives the results in order of completion.
    fn run(
        transport: &VirtioBlkTransport,
        queue: &mut VirtioBlkQueue<usize>,
        index: usize,
        count: usize,
    ) -> io::Result<Vec<(usize, i32)>> {
        if queue.avail_notif_needed() {
            transport.get_submission_notifier(index).notify()?;
        }
        let call = transport.get_completion_fd(index);
        let wait = Epoll::new()?;
        wait.ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        let mut done = Vec::new();
        loop {
            queue.set_used_notif_enabled(true);
            done.extend(queue.completions().map(|c| (c.context, c.ret)));
            if done.len() >= count {
                return Ok(done);
            }
            let woken = wait.wait(PATIENCE_MS, &mut [EpollEvent::default()])?;
            assert_eq!(woken, 1, "no signal came after {done:?}");
            let _ = call.read();
        }
    }

    #[test]
    fn many_requests_on_all_queues() {
        let setup = Setup::new();
        let _server = setup.start();
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | !0xFF_FFFF_FFFF
            | 0xFFFF;
        let path = setup.path();
        let mut transport: Box<VirtioBlkTransport> = Box::new(
            VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path.to_str().unwrap(), features)
                .unwrap(),
        );
        let mut queues =
            VirtioBlkQueue::<usize>::setup_queues(transport.as_mut(), QUEUES as usize, SIZE)
                .unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len((BLOCK * AT_ONCE) as u64).unwrap();
        let offset = Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let ranges = [(GuestAddress(0), BLOCK * AT_ONCE, offset)];
        let mem = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        let base = mem.get_host_address(GuestAddress(0)).unwrap();
        transport.map_mem_region(base as usize, BLOCK * AT_ONCE, file.as_raw_fd(), 0).unwrap();
        let buffer = |n: usize| base.wrapping_add(n * BLOCK);

        for round in 0..40 {
            for (index, queue) in queues.iter_mut().enumerate() {
                let offset = |n: usize| ((index * AT_ONCE + n) * BLOCK) as u64;
                let fill = |n: usize| (round * 31 + index * 7 + n) as u8;
                for n in 0..AT_ONCE {
                    let at = GuestAddress((n * BLOCK) as u64);
                    mem.write_slice(&[fill(n); BLOCK], at).unwrap();
                    // SAFETY: the buffers stay mapped, and untouched until `run` has returned.
                    unsafe { queue.write_raw(offset(n), buffer(n), BLOCK, n) }.unwrap();
                }
                let mut done = run(transport.as_ref(), queue, index, AT_ONCE).unwrap();
                done.sort_unstable();
                assert_eq!(done, [(0, 0), (1, 0), (2, 0), (3, 0)]);
                for n in 0..AT_ONCE {
                    // SAFETY: as above.
                    unsafe { queue.read_raw(offset(n), buffer(AT_ONCE - 1 - n), BLOCK, n) }
                        .unwrap();
                }
                run(transport.as_ref(), queue, index, AT_ONCE).unwrap();
                for n in 0..AT_ONCE {
                    let mut got = [0; BLOCK];
                    let at = GuestAddress(((AT_ONCE - 1 - n) * BLOCK) as u64);
                    mem.read_slice(&mut got, at).unwrap();
                    assert!(got.iter().all(|&b| b == fill(n)), "round {round} block {n}");
                }
            }
        }
        setup.disk.ops();
        queues[0].discard(0, 4096, 0).unwrap();
        queues[0].write_zeroes(4096, 4096, true, 1).unwrap();
        queues[0].flush(2).unwrap();
        let done = run(transport.as_ref(), &mut queues[0], 0, 3).unwrap();
        assert_eq!(done, [(0, 0), (1, 0), (2, 0)]);
        let ops = setup.disk.ops();
        assert_eq!(ops, ["discard 0+4096", "zero 4096+4096 unmap=true fua=false", "flush"]);
        // Out of order, and a failure: the device ends at 1 MiB.
        setup.disk.hold();
        for n in 0..AT_ONCE {
            let beyond = if n == 2 { 1 << 20 } else { 0 };
            // SAFETY: as above.
            unsafe { queues[1].read_raw(beyond, buffer(n), BLOCK, n) }.unwrap();
        }
        let released = setup.disk.clone();
        let release = thread::spawn(move || {
            released.wait_held(AT_ONCE);
            released.release();
        });
        let done = run(transport.as_ref(), &mut queues[1], 1, AT_ONCE).unwrap();
        release.join().unwrap();
        assert_eq!(done, [(3, 0), (2, -libc::EIO), (1, 0), (0, 0)]);
        assert_eq!(setup.disk.info().size, 1 << 20);
    }
}
