//! Listening sockets: Unix sockets guarded by their file's mode, and TCP.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Path of a Unix socket.
    Unix(PathBuf),
    /// Address and port; the port is the real one even if 0 was asked for.
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// A bound socket. The file of a Unix socket is removed when this is dropped, if it is still the
/// one that was made.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    address: Address,
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Binds a Unix socket at `path` with file permissions `mode` (such as `0o660`).
    ///
    /// # Errors
    /// `AddrInUse` if a server listens there or the path is something other than a socket; a
    /// socket file that nobody listens on is replaced. Otherwise what the system said.
    pub fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        let fd = match bind_unix(path, mode) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                bind_unix(path, mode)
            }
            other => other,
        };
        let fd = fd.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        let meta = std::fs::symlink_metadata(path)?;
        let file = Some((meta.dev(), meta.ino()));
        let listener = Self { fd, address: Address::Unix(path.to_owned()), file };
        // The process's umask may have taken bits away.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        rustix::net::listen(&listener.fd, BACKLOG)?;
        Ok(listener)
    }

    /// Binds a TCP socket; port 0 takes a free one.
    ///
    /// # Errors
    /// What the system said, with the address.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let explain = |e: io::Error| io::Error::new(e.kind(), format!("{address}: {e}"));
        let listener = TcpListener::bind(address).map_err(explain)?;
        listener.set_nonblocking(true)?;
        let address = Address::Tcp(listener.local_addr()?);
        Ok(Self { fd: listener.into(), address, file: None })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Accepts one connection, without waiting.
    pub(crate) fn accept(&self) -> rustix::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::accept_with(&self.fd, flags)?;
        if let Address::Tcp(_) = self.address {
            // Fails only if the client is gone already, which its thread will see.
            let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        }
        Ok(socket)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let (Address::Unix(path), Some(file)) = (&self.address, self.file) else { return };
        let ours =
            std::fs::symlink_metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == file);
        if ours && let Err(error) = std::fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "could not remove the socket file");
        }
    }
}

fn unix_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Binds without a moment in which the file has wider permissions than `mode`: the socket's own
/// mode is what Linux gives to the file, less the umask.
fn bind_unix(path: &Path, mode: u32) -> io::Result<OwnedFd> {
    let fd = unix_socket()?;
    rustix::fs::fchmod(&fd, rustix::fs::Mode::from_raw_mode(mode))?;
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}

/// Removes the socket file at `path` if nobody listens on it.
fn remove_stale(path: &Path) -> io::Result<()> {
    let in_use =
        |what| io::Error::new(io::ErrorKind::AddrInUse, format!("{}: {what}", path.display()));
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(in_use("exists and is not a socket; choose another path or remove it"));
    }
    match rustix::net::connect(&unix_socket()?, &SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::CONNREFUSED) => std::fs::remove_file(path),
        _ => Err(in_use("another server listens on this socket; stop it or choose another path")),
    }
}
