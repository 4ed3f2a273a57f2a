//! Messages that no frontend sends.
#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod support;

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use support::driver::Rng;
use support::guest::{Guest, Setup, driver, event_fd};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const CONNECTIONS: u64 = 400;

/// Descriptors of all kinds.
struct Descriptors {
    short: File,
    long: File,
    event: vmm_sys_util::eventfd::EventFd,
    socket: (UnixStream, UnixStream),
    null: File,
    directory: File,
}

impl Descriptors {
    fn new() -> Self {
        let short = tempfile::tempfile().unwrap();
        short.set_len(100).unwrap();
        let long = tempfile::tempfile().unwrap();
        long.set_len(1 << 20).unwrap();
        Self {
            short,
            long,
            event: event_fd(),
            socket: UnixStream::pair().unwrap(),
            null: File::open("/dev/null").unwrap(),
            directory: File::open("/").unwrap(),
        }
    }

    fn any(&self, rng: &mut Rng) -> RawFd {
        match rng.below(8) {
            0 => self.short.as_raw_fd(),
            1..4 => self.long.as_raw_fd(),
            4 => self.socket.0.as_raw_fd(),
            5 => self.null.as_raw_fd(),
            6 => self.directory.as_raw_fd(),
            _ => self.event.as_raw_fd(),
        }
    }
}

fn number(rng: &mut Rng, size: usize) -> Vec<u8> {
    let value = match rng.below(9) {
        0 => 0,
        1 => 1,
        2 => rng.below(20),
        3 => 1 << rng.below(64),
        4 => u64::MAX - rng.below(4096),
        5 => 4096 * rng.below(300),
        6 => rng.below(1 << 21),
        7 => 16,
        _ => rng.next(),
    };
    value.to_ne_bytes()[..size].to_vec()
}

/// Fields of each message, in bytes; most of the time those that it really has.
fn fields(code: u32, rng: &mut Rng) -> &'static [usize] {
    if rng.below(12) == 0 {
        return [&[][..], &[8], &[4, 4], &[1], &[8, 8, 8]][rng.below(5) as usize];
    }
    match code {
        2 | 12 | 13 | 14 | 16 => &[8],
        5 => &[4, 4, 8, 8, 8, 8],
        6 => &[8, 8],
        8 | 10 | 11 | 18 => &[4, 4],
        9 => &[4, 4, 8, 8, 8, 8],
        24 => &[4, 4, 4, 8],
        25 => &[4, 4, 4, 1],
        31 | 32 => &[8, 8, 2, 2, 4],
        37 | 38 => &[8, 8, 8, 8, 8],
        _ => &[],
    }
}

fn send_random(socket: &UnixStream, descriptors: &Descriptors, rng: &mut Rng) -> bool {
    const CODES: [u32; 20] =
        [1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 17, 18, 24, 25, 31, 32, 37, 38];
    let code =
        if rng.below(20) == 0 { rng.below(46) as u32 } else { CODES[rng.below(20) as usize] };
    let body: Vec<u8> = fields(code, rng).iter().flat_map(|&size| number(rng, size)).collect();
    let wants_file = matches!(code, 5 | 6 | 12 | 13 | 14 | 32 | 37);
    let count = if rng.below(15) == 0 { rng.below(4) } else { u64::from(wants_file) };
    let files: Vec<RawFd> = (0..count).map(|_| descriptors.any(rng)).collect();
    let flags = if rng.below(30) == 0 { rng.next() as u32 } else { 1 };
    let mut head = Vec::new();
    for word in [code, flags, body.len() as u32] {
        head.extend(word.to_ne_bytes());
    }
    // One that ends the connection on purpose: nothing to learn from its failure.
    socket.send_with_fds(&[head.as_slice()], &files).is_ok()
        && (body.is_empty() || socket.send_with_fds(&[body.as_slice()], &[]).is_ok())
}

#[test]
fn random_messages() {
    let setup = Setup::new();
    let server = setup.start();
    let descriptors = Descriptors::new();
    let mut rng = Rng::from_env();
    for round in 0..CONNECTIONS {
        let guest = Guest::connect(&setup.path(), 0);
        let mut driver = driver(&guest);
        // The server is as good as new, whatever the connection before has done.
        guest.write(&mut driver, 3, round as u8, false);
        assert_eq!(guest.read(&mut driver, 3, true), round as u8);
        // SAFETY: the frontend, which has the socket, lives until the end of this round.
        let socket = unsafe { BorrowedFd::borrow_raw(guest.frontend.as_raw_fd()) };
        let socket = UnixStream::from(socket.try_clone_to_owned().unwrap());
        socket.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        for _ in 0..rng.below(20) + 1 {
            if !send_random(&socket, &descriptors, &mut rng) {
                break;
            }
            let _ = guest.kick.write(1);
        }
    }
    assert!(server.clients() <= 1);
}

#[test]
fn in_flight_regions_for_other_queues_than_there_are_end_the_connection() {
    let setup = Setup::new();
    let _server = setup.start();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    for (queues, size) in [(3, 16), (1, 32), (u16::MAX, u16::MAX)] {
        let mut guest = Guest::connect(&setup.path(), 0);
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        assert!(guest.frontend.get_inflight_fd(&wanted).is_err(), "{queues} {size}");
        let mut guest = Guest::connect(&setup.path(), 0);
        let given = VhostUserInflight::new(1 << 20, 0, queues, size);
        assert!(guest.frontend.set_inflight_fd(&given, file.as_raw_fd()).is_err());
    }
    let mut guest = Guest::connect(&setup.path(), 0);
    let small = VhostUserInflight::new(64, 0, 2, 16);
    assert!(guest.frontend.set_inflight_fd(&small, file.as_raw_fd()).is_err());
}
