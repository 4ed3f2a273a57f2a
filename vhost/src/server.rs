//! The socket and the life of a connection.
//!
//! ```text
//!            connect                 disconnect, stop               nothing in flight
//!  listening ───────► Connected ─────────────────────► Draining ─────────────────────► Ended
//!      ▲               a second client is turned away    a new client waits              │
//!      └────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A new client is served only after the old one's requests have all ended: else an old write
//! could land after a new one.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, mem};

use sheepdog_types::Block;
use vhost::vhost_user::Error as ProtocolError;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::connection::Connection;
use crate::ring::lock;

/// How long a second client waits for the first to go before it is turned away: a restarted QEMU
/// may connect before the end of its predecessor has been noticed.
const TAKEOVER_GRACE: Duration = Duration::from_secs(1);
/// Pause after a connection could not be set up for want of descriptors, memory or threads.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// How a server offers its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Virtqueues offered, 1 to 64. Each has a thread, which sleeps unless its queue is used.
    pub queues: u16,
    /// Most entries of a virtqueue: a power of two, at most 1024.
    pub queue_size: u16,
    /// Permission bits of the socket file.
    pub mode: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { queues: 4, queue_size: 1024, mode: 0o600 }
    }
}

/// Why a server did not start. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(&'static str),
    /// Another process serves this socket.
    #[error("{} is served by another process: stop it or choose another path", .0.display())]
    AddrInUse(PathBuf),
    /// Something that is not a socket is in the way.
    #[error("{} exists and is not a socket: remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The operating system refused.
    #[error("cannot listen on {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Serves block devices over vhost-user.
#[derive(Debug)]
pub struct VhostServer;

impl VhostServer {
    /// Serves `block` at `path`, to one client after the other. A stale socket file is replaced.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left behind then.
    pub fn start(
        path: impl AsRef<Path>,
        block: Arc<dyn Block>,
        config: Config,
    ) -> Result<ServerHandle, StartError> {
        if !(1..=64).contains(&config.queues) {
            return Err(StartError::Config("a device has 1 to 64 queues"));
        }
        if !config.queue_size.is_power_of_two() || config.queue_size > 1024 {
            return Err(StartError::Config("a queue's size is a power of two up to 1024"));
        }
        let path = path.as_ref().to_path_buf();
        let listener = listen(&path, config.mode)?;
        let socket = SocketFile::of(&path);
        let failed = |source| StartError::Io { path: path.clone(), source };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
        let epoll = watch(&listener, &wake).map_err(failed)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let server = Arc::new(Server {
            name,
            block,
            config,
            wake,
            stopping: AtomicBool::new(false),
            connection: Mutex::new(Phase::Ended),
            changed: Condvar::new(),
        });
        let acceptor = server.clone();
        let thread = thread::Builder::new()
            .name("vhost-accept".into())
            .spawn(move || acceptor.run(&listener, &epoll))
            .map_err(failed)?;
        tracing::info!(socket = %path.display(), "serving vhost-user-blk");
        Ok(ServerHandle { server, thread: Some(thread), _socket: socket })
    }
}

/// A running server. Dropping it stops it.
pub struct ServerHandle {
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
    _socket: SocketFile,
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerHandle").field("name", &self.server.name).finish_non_exhaustive()
    }
}

impl ServerHandle {
    /// Clients connected now: 0 or 1.
    #[must_use]
    pub fn clients(&self) -> usize {
        usize::from(matches!(*lock(&self.server.connection), Phase::Connected(_)))
    }

    /// Disconnects the client, waits until the back end has completed what is in flight, ends all
    /// threads and removes the socket file. It takes as long as the back end needs to complete or
    /// fail its requests.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.server.stopping.store(true, Ordering::SeqCst);
        if let Phase::Connected(connection) = &*lock(&self.server.connection) {
            hang_up(connection);
        }
        // A non-blocking counter far from full: this cannot fail.
        let _ = self.server.wake.write(1);
        self.server.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(device = %self.server.name, "the accepting thread had panicked");
        }
    }
}

enum Phase {
    /// A client is served over this socket.
    Connected(UnixStream),
    Draining,
    Ended,
}

struct Server {
    name: String,
    block: Arc<dyn Block>,
    config: Config,
    wake: EventFd,
    stopping: AtomicBool,
    connection: Mutex<Phase>,
    changed: Condvar,
}

impl Server {
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn set_phase(&self, phase: Phase) {
        *lock(&self.connection) = phase;
        self.changed.notify_all();
    }

    /// Accepts clients until the server is stopped.
    fn run(self: Arc<Self>, listener: &UnixListener, epoll: &Epoll) {
        let mut serving: Option<JoinHandle<()>> = None;
        let mut events = [EpollEvent::default(); 2];
        while !self.stopping() {
            match epoll.wait(-1, &mut events) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(device = %self.name, %error, "no more clients can connect");
                    break;
                }
            }
            if self.stopping() {
                break;
            }
            if !self.wait_for_turn() {
                if !self.stopping() {
                    self.turn_away(listener);
                }
                continue;
            }
            serving.take().map(JoinHandle::join);
            match self.clone().connect(listener) {
                Ok(thread) => serving = Some(thread),
                Err(error) => {
                    tracing::error!(device = %self.name, %error, "a client could not be served");
                    self.set_phase(Phase::Ended);
                    self.pause();
                }
            }
        }
        serving.take().map(JoinHandle::join);
    }

    /// Whether the connection before has ended, within a grace while its client is still there.
    fn wait_for_turn(&self) -> bool {
        let mut phase = lock(&self.connection);
        loop {
            let (next, timed_out) = match *phase {
                Phase::Ended => return true,
                _ if self.stopping() => return false,
                Phase::Draining => {
                    let next = self.changed.wait(phase);
                    (next.unwrap_or_else(PoisonError::into_inner), false)
                }
                Phase::Connected(_) => {
                    let next = self.changed.wait_timeout(phase, TAKEOVER_GRACE);
                    let (next, timeout) = next.unwrap_or_else(PoisonError::into_inner);
                    (next, timeout.timed_out())
                }
            };
            phase = next;
            if timed_out && matches!(*phase, Phase::Connected(_)) {
                return false;
            }
        }
    }

    fn turn_away(&self, listener: &UnixListener) {
        if listener.accept().is_ok() {
            tracing::warn!(
                device = %self.name,
                "a second client was turned away: a device has one client at a time"
            );
        }
    }

    fn pause(&self) {
        let phase = lock(&self.connection);
        drop(self.changed.wait_timeout(phase, RETRY_PAUSE));
    }

    /// Accepts the waiting client and serves it on a thread of its own.
    fn connect(self: Arc<Self>, listener: &UnixListener) -> io::Result<JoinHandle<()>> {
        let (socket, _) = listener.accept()?;
        let phase = socket.try_clone()?;
        let (name, block) = (self.name.clone(), self.block.clone());
        let connection = Connection::new(name, block, &self.config, socket)?;
        self.set_phase(Phase::Connected(phase.try_clone()?));
        if self.stopping() {
            hang_up(&phase);
        }
        tracing::info!(device = %self.name, "a client connected");
        let serve = move || {
            self.serve(connection);
            self.set_phase(Phase::Ended);
        };
        thread::Builder::new().name("vhost-connection".into()).spawn(serve)
    }

    /// Serves one connection to its end.
    fn serve(&self, mut connection: Connection) {
        let end = connection.run();
        self.set_phase(Phase::Draining);
        match end {
            ProtocolError::Disconnected
            | ProtocolError::PartialMessage
            | ProtocolError::SocketBroken(_) => {
                tracing::info!(device = %self.name, "the client disconnected");
            }
            error => {
                tracing::warn!(device = %self.name, %error, "the connection ended: protocol error");
            }
        }
        drop(connection);
    }
}

/// Ends a connection; the thread that serves it notices.
fn hang_up(socket: &UnixStream) {
    // It fails only if the other side was faster.
    let _ = socket.shutdown(Shutdown::Both);
}

/// The socket file, removed on drop if it is still ours.
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn of(path: &Path) -> Self {
        Self { path: path.into(), identity: Self::identity(path) }
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && Self::identity(&self.path) == self.identity {
            // Best effort: a file left behind is recognised as stale by the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds `path`, after removing a socket that nobody listens on.
fn listen(path: &Path, mode: u32) -> Result<UnixListener, StartError> {
    let failed = |source| StartError::Io { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(StartError::NotASocket(path.into()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(failed(error)),
            // Connected, or its backlog is full.
            _ => return Err(StartError::AddrInUse(path.into())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => StartError::AddrInUse(path.into()),
        _ => failed(error),
    })?;
    let socket = SocketFile::of(path);
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    mem::forget(socket);
    Ok(listener)
}

fn watch(listener: &UnixListener, wake: &EventFd) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    for fd in [listener.as_raw_fd(), wake.as_raw_fd()] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, fd as u64))?;
    }
    Ok(epoll)
}
