//! A data connection: one thread reads and handles whole batches of frames; any thread writes.
//!
//! Whoever has something to say appends it to the output buffer and sends as much as the socket
//! takes. What is left is sent by the reading thread when the socket has room again. A request and
//! its answer therefore cost no task switch beyond the one that the network causes.

use crate::cluster::lock;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send, sockopt};
use sheepdog_cluster::message::{FrameError, MAX_FRAME, frame_len};
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use thiserror::Error;

/// A peer that does not read its answers is not read from any more beyond this many bytes (I10).
const MAX_UNSENT: usize = 64 << 20;
/// First size of the input buffer; it grows to one frame at most.
const INPUT: usize = 256 << 10;
/// Reads without a large frame after which a grown input buffer is given back.
const SMALL_READS: u32 = 1024;

/// How long the other host may leave bytes unacknowledged. Long: one that is merely slow to take
/// them looks the same, and those that are cut off are found sooner in other ways.
const UNACKNOWLEDGED: Duration = Duration::from_secs(15);
/// How long a connection is silent before the kernel asks whether the other host still knows it.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// Why a connection ended.
#[derive(Debug, Error)]
pub enum Ended {
    /// The other end closed it.
    #[error("closed by the peer")]
    Closed,
    /// This end closed it.
    #[error("closed")]
    Stopped,
    /// What came is not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The network failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    sent: usize,
}

impl Output {
    /// Frees what was sent: a connection that is always busy would keep it for ever.
    fn forget_sent(&mut self) {
        if self.sent > INPUT.max(self.bytes.len() / 2) {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

/// A connection. See the [module](self).
#[derive(Debug)]
pub struct Duplex {
    stream: TcpStream,
    wake: OwnedFd,
    stopped: AtomicBool,
    output: Mutex<Output>,
}

impl Duplex {
    /// Takes over a connected stream.
    ///
    /// # Errors
    /// If the socket cannot be set up.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        // A connection that a firewall or a restarted host forgot: the end that has something to
        // say notices by itself, the other one is asked now and then.
        sockopt::set_tcp_user_timeout(&stream, UNACKNOWLEDGED.as_millis() as u32)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let output = Mutex::default();
        Ok(Self { stream, wake, stopped: AtomicBool::new(false), output })
    }

    /// Appends to the output; [`Duplex::flush`] sends it.
    pub fn queue(&self, append: impl FnOnce(&mut Vec<u8>)) {
        append(&mut lock(&self.output).bytes);
    }

    /// Sends what the socket takes now and leaves the rest to the reading thread. A failed socket
    /// is noticed by the reading thread.
    pub fn flush(&self) {
        if !self.send_some() {
            self.kick();
        }
    }

    /// Whether everything was sent.
    fn send_some(&self) -> bool {
        let mut output = lock(&self.output);
        while output.sent < output.bytes.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.stream, &output.bytes[output.sent..], flags) {
                Ok(count) => output.sent += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => {
                    output.forget_sent();
                    return false;
                }
            }
        }
        output.sent = 0;
        output.bytes.clear();
        output.bytes.shrink_to(MAX_FRAME);
        true
    }

    fn unsent(&self) -> usize {
        let output = lock(&self.output);
        output.bytes.len() - output.sent
    }

    /// Makes [`Duplex::run`] return.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.kick();
    }

    fn kick(&self) {
        // The counter is far from full, and a full one wakes the reader as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Reads until the connection ends. `handle` gets all complete bytes there are and says how
    /// many it used; it is called again when more came.
    pub fn run(&self, handle: impl FnMut(&[u8]) -> Result<usize, FrameError>) -> Ended {
        let ended = self.read_all(handle);
        // Others may hold this value for long: the peer has to hear of the end now.
        let _ = self.stream.shutdown(Shutdown::Both);
        ended
    }

    fn read_all(&self, mut handle: impl FnMut(&[u8]) -> Result<usize, FrameError>) -> Ended {
        let mut input: Vec<u8> = vec![0; INPUT];
        let mut filled = 0;
        let mut small_reads = 0;
        loop {
            match self.wait() {
                Ok(true) => {}
                Ok(false) => continue,
                Err(ended) => return ended,
            }
            let (_, count) = match recv(&self.stream, &mut input[filled..], RecvFlags::DONTWAIT) {
                Ok(received) => received,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => continue,
                Err(error) => return Ended::Io(error.into()),
            };
            if count == 0 {
                return Ended::Closed;
            }
            filled += count;
            let used = match handle(&input[..filled]) {
                Ok(used) => used,
                Err(error) => return Ended::Frame(error),
            };
            input.copy_within(used..filled, 0);
            filled -= used;
            let wanted = match frame_len(&input[..filled]) {
                Ok(wanted) => wanted.unwrap_or(INPUT).clamp(INPUT, MAX_FRAME),
                Err(error) => return Ended::Frame(error),
            };
            // Grown at once, given back when large frames have become rare: allocating and
            // clearing megabytes for each frame would cost more than carrying them.
            small_reads = if wanted > INPUT { 0 } else { small_reads + 1 };
            if wanted > input.len() {
                input.resize(wanted, 0);
            } else if small_reads > SMALL_READS && input.len() > INPUT && filled <= INPUT {
                input.truncate(INPUT);
                input.shrink_to_fit();
            }
        }
    }

    /// Waits for input, and sends what is left meanwhile; true when there is something to read.
    fn wait(&self) -> Result<bool, Ended> {
        if self.stopped.load(Ordering::Acquire) {
            return Err(Ended::Stopped);
        }
        let unsent = self.unsent();
        let mut interest = PollFlags::empty();
        if unsent < MAX_UNSENT {
            interest |= PollFlags::IN;
        }
        if unsent > 0 {
            interest |= PollFlags::OUT;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(self.stream.as_fd(), interest),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Ended::Io(error.into())),
        }
        let (stream, wake) = (fds[0].revents(), fds[1].revents());
        if !wake.is_empty() {
            let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        }
        if stream.contains(PollFlags::OUT) {
            self.send_some();
        }
        Ok(stream.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR))
    }
}
