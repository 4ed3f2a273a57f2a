//! Accepting connections, counting them, and stopping.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::connection;
use crate::exports::Exports;
use crate::listener::{Address, Listener};
use crate::machine::handshake::Gate;

/// Connections above [`Limits::max_connections`] that are still told why they are refused;
/// beyond them a connection is closed at once.
const REFUSED_POLITELY: usize = 16;

/// Bounds of a server. Memory is bounded by `max_connections` times `max_bytes` and a receive
/// buffer of 128 KiB each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections served at once; more are refused.
    pub max_connections: usize,
    /// Requests in flight per connection, replies not yet sent included.
    pub max_requests: usize,
    /// Data bytes of these requests. One request may exceed it when it is alone.
    pub max_bytes: u64,
    /// A client that has not entered transmission after this time is disconnected.
    pub handshake: Duration,
    /// How long a connection that ends waits for its requests and for its client to read replies.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_requests: 256,
            max_bytes: 64 << 20,
            handshake: Duration::from_secs(30),
            linger: Duration::from_secs(30),
        }
    }
}

/// What a connection's thread, its completions and the server share.
pub(crate) struct Link {
    socket: OwnedFd,
    kick: OwnedFd,
    stop: AtomicBool,
    /// Name of the export, once in transmission.
    export: OnceLock<String>,
}

impl Link {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        let (kick, stop) = (new_kick()?, AtomicBool::new(false));
        Ok(Self { socket, kick, stop, export: OnceLock::new() })
    }

    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// The descriptor that becomes readable by [`Link::kick`].
    pub fn kicked(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Wakes the connection thread.
    pub fn kick(&self) {
        kick(&self.kick);
    }

    /// Forgets earlier kicks.
    pub fn clear_kick(&self) {
        clear(&self.kick);
    }

    /// Whether the client has closed its end, even if not all that it had sent was read.
    pub fn hung_up(&self) -> bool {
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&at_once)).is_ok() && fds[0].revents().intersects(gone)
    }

    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    pub fn entered(&self, export: &str) {
        // A connection enters transmission once, so this cannot have been set.
        let _ = self.export.set(export.to_owned());
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
    }
}

fn new_kick() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

fn kick(fd: &OwnedFd) {
    // The only possible failure is a counter near 2^64, which is readable anyway.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

fn clear(fd: &OwnedFd) {
    // EAGAIN says that there was no kick.
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

struct Member {
    link: Arc<Link>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Registry {
    members: HashMap<u64, Member>,
    next: u64,
    /// Threads that are about to end and need to be joined.
    ended: Vec<u64>,
}

/// What all threads of a server share.
pub(crate) struct Shared {
    pub exports: Arc<dyn Exports>,
    pub limits: Limits,
    registry: Mutex<Registry>,
    stop: AtomicBool,
    kick: OwnedFd,
}

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the threads of connections that ended.
    fn reap(&self) {
        let mut registry = self.registry();
        let ended = std::mem::take(&mut registry.ended);
        let threads: Vec<_> = ended.iter().filter_map(|id| registry.members.remove(id)).collect();
        drop(registry);
        threads.into_iter().for_each(Member::join);
    }
}

impl Member {
    fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("a connection thread panicked; only its client was disconnected");
        }
    }
}

/// Ends a connection when its thread does, even by a panic.
struct Leave {
    shared: Arc<Shared>,
    link: Arc<Link>,
    id: u64,
}

impl Drop for Leave {
    fn drop(&mut self) {
        // The socket may live on in completions that come late; the client must see the end now.
        let _ = rustix::net::shutdown(&self.link.socket, rustix::net::Shutdown::Both);
        self.shared.registry().ended.push(self.id);
        kick(&self.shared.kick);
    }
}

/// The NBD server: binds sockets and starts serving on them.
#[derive(Debug)]
pub struct Server;

impl Server {
    /// See [`Listener::unix`].
    ///
    /// # Errors
    /// As there.
    pub fn bind_unix(path: impl AsRef<Path>, mode: u32) -> io::Result<Listener> {
        Listener::unix(path.as_ref(), mode)
    }

    /// See [`Listener::tcp`].
    ///
    /// # Errors
    /// As there.
    pub fn bind_tcp(address: SocketAddr) -> io::Result<Listener> {
        Listener::tcp(address)
    }

    /// Serves `exports` on `listener` until the handle is stopped or dropped.
    ///
    /// # Errors
    /// If no thread or descriptor can be made.
    pub fn start(
        listener: Listener,
        exports: Arc<dyn Exports>,
        limits: Limits,
    ) -> io::Result<ServerHandle> {
        let shared = Arc::new(Shared {
            exports,
            limits,
            registry: Mutex::default(),
            stop: AtomicBool::new(false),
            kick: new_kick()?,
        });
        let address = listener.address().clone();
        let thread = thread::Builder::new().name("nbd-accept".into()).spawn({
            let shared = shared.clone();
            move || accept_loop(&listener, &shared)
        })?;
        Ok(ServerHandle { shared, address, acceptor: Mutex::new(Some(thread)) })
    }
}

/// A running server. Dropping it stops it.
pub struct ServerHandle {
    shared: Arc<Shared>,
    address: Address,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl ServerHandle {
    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> &Address {
        &self.address
    }

    /// Clients that use an export now. Others may be in their handshake.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.count(|link| link.export.get().is_some())
    }

    /// Clients that use the export called `name` now.
    #[must_use]
    pub fn clients_of(&self, name: &str) -> usize {
        self.count(|link| link.export.get().is_some_and(|export| export == name))
    }

    /// All connections, also those in their handshake.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.count(|_| true)
    }

    fn count(&self, counts: impl Fn(&Link) -> bool) -> usize {
        let registry = self.shared.registry();
        let live = registry.members.iter().filter(|(id, _)| !registry.ended.contains(id));
        live.filter(|(_, member)| counts(&member.link)).count()
    }

    /// Stops accepting, lets requests in flight finish, refuses later ones with `ESHUTDOWN`,
    /// closes all connections and joins all threads.
    ///
    /// When it returns, no request is in the device any more, unless one took longer than
    /// [`Limits::linger`]. Must not be called by a device from within its `submit`.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        kick(&self.shared.kick);
        let acceptor = self.acceptor.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(acceptor) = acceptor else { return };
        if acceptor.join().is_err() {
            tracing::error!("the accepting thread panicked");
        }
        let members = std::mem::take(&mut self.shared.registry().members);
        members.values().for_each(|member| member.link.stop());
        members.into_values().for_each(Member::join);
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept_loop(listener: &Listener, shared: &Arc<Shared>) {
    let mut starved = false;
    while !shared.stop.load(Ordering::Acquire) {
        shared.reap();
        match listener.accept() {
            Ok(socket) => {
                starved = false;
                if let Err(error) = admit(shared, socket) {
                    tracing::warn!(%error, "a connection was closed: no thread for it");
                }
            }
            Err(Errno::AGAIN) => wait(shared, Some(listener)),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                if !std::mem::replace(&mut starved, true) {
                    tracing::warn!(%error, "cannot accept connections; raise the limit of open \
                                            files if this goes on");
                }
                wait(shared, None);
            }
        }
    }
}

/// Waits for a kick and for a connection; without `listener`, for a kick or 100 ms.
fn wait(shared: &Shared, listener: Option<&Listener>) {
    let kicked = PollFd::new(&shared.kick, PollFlags::IN);
    let pause = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    // A failed poll (EINTR) is a wake-up for nothing.
    let _ = match listener {
        Some(fd) => poll(&mut [kicked, PollFd::new(fd, PollFlags::IN)], None),
        None => poll(&mut [kicked], Some(&pause)),
    };
    clear(&shared.kick);
}

/// Starts a thread for an accepted connection, or refuses it.
fn admit(shared: &Arc<Shared>, socket: OwnedFd) -> io::Result<()> {
    let mut registry = shared.registry();
    let others = registry.members.len() - registry.ended.len();
    let max = shared.limits.max_connections;
    let gate = if others < max { Gate::Open } else { Gate::Full };
    if others >= max + REFUSED_POLITELY {
        tracing::warn!(max, "a connection was closed: there are as many as there may be");
        return Ok(());
    }
    let link = Arc::new(Link::new(socket)?);
    let id = registry.next;
    registry.next += 1;
    let thread = thread::Builder::new().name("nbd-conn".into()).spawn({
        let (shared, link) = (shared.clone(), link.clone());
        move || {
            let leave = Leave { shared, link, id };
            connection::run(&leave.link, &leave.shared, gate);
        }
    })?;
    // The thread can only leave after this, for it needs the registry.
    registry.members.insert(id, Member { link, thread });
    Ok(())
}
