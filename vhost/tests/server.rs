//! The server over its real socket, driven by frontends in this process.
#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod support;

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sheepdog_types::Block;
use sheepdog_vhost::{Config, StartError, VhostServer};
use support::driver::Driver;
use support::guest::{Guest, PATIENCE_MS, QUEUES, SIZE, Setup, driver};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// How long something that must not happen is given to happen.
const TOO_EARLY: Duration = Duration::from_millis(200);

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
    let too_early = answer.recv_timeout(TOO_EARLY);
    setup.disk.release();
    assert!(too_early.is_err(), "answered with a request in flight");
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
    let too_early = wait_stopped.recv_timeout(TOO_EARLY);
    setup.disk.release();
    assert!(too_early.is_err(), "stopped with requests in flight");
    stop.join().unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used()).count(), 3);
    assert!(!setup.path().exists());
}

#[test]
fn what_a_client_leaves_is_not_wanted_and_the_next_one_is_served() {
    let setup = Setup::new();
    let server = setup.start();
    setup.disk.hold();
    setup.disk.let_go();
    let guest = Guest::connect(&setup.path(), 1);
    guest.offer(&mut driver(&guest), 1, 0, true, false);
    guest.kick();
    setup.disk.wait_held(1);
    assert_eq!(setup.disk.wanted(), 1);
    drop(guest);
    // It is served when the requests of the one before have ended.
    let next = Guest::connect(&setup.path(), 1);
    assert_eq!(setup.disk.held(), 0);
    setup.disk.release();
    next.write(&mut driver(&next), 0, 1, false);
    assert_eq!(setup.disk.ops().len(), 1);
    server.stop();
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
        VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
        VirtioBlkTransport, VirtioFeatureFlags,
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
            | VirtioBlkFeatureFlags::all().bits();
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
