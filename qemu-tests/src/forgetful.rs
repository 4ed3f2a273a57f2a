//! A way to a vhost-user server on which the log of a migration gets lost: to see that a test would notice.
//!
//! Messages: <https://www.qemu.org/docs/master/interop/vhost-user.html>.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

const HEADER_BYTES: usize = 12;
const SET_LOG_BASE: u32 = 6;
/// Most file descriptors of a message: one for each region of memory.
const MAX_FDS: usize = 8;

/// Listens at `socket` and passes on to the server at `server`, whose log goes where nobody looks.
pub fn lose_log(socket: &Path, server: &Path) {
    let listener = UnixListener::bind(socket);
    let listener = listener.unwrap_or_else(|e| panic!("{}: {e}", socket.display()));
    let server = server.to_owned();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            if let Err(e) = pass_on(client, &server) {
                eprintln!("a connection to {} was not passed on: {e}", server.display());
            }
        }
    });
}

fn pass_on(client: UnixStream, server: &Path) -> io::Result<()> {
    let server = UnixStream::connect(server)?;
    let (client_too, server_too) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || until_it_ends(&client, &server, pass_request));
    thread::spawn(move || until_it_ends(&server_too, &client_too, pass_bytes));
    Ok(())
}

fn until_it_ends(
    from: &UnixStream,
    to: &UnixStream,
    pass: fn(&UnixStream, &UnixStream) -> io::Result<()>,
) {
    while pass(from, to).is_ok() {}
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn pass_request(from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    let mut message = vec![0; HEADER_BYTES];
    let (n, mut fds) = receive(from, &mut message)?;
    let mut from = from;
    from.read_exact(&mut message[n..])?;
    let field = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| message[at + i]));
    let (request, bytes) = (field(0), field(8) as usize);
    message.resize(HEADER_BYTES + bytes, 0);
    from.read_exact(&mut message[HEADER_BYTES..])?;
    if request == SET_LOG_BASE {
        // Its payload: the size of the log and where it begins in the file.
        let number = |at: usize| {
            let bytes = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| message[HEADER_BYTES + at + i]);
            u64::from_ne_bytes(bytes)
        };
        let file = memfd_create("lost-log", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, number(0) + number(8))?;
        fds = vec![file];
    }
    send(to, &message, &fds)
}

fn pass_bytes(from: &UnixStream, to: &UnixStream) -> io::Result<()> {
    let mut bytes = [0; 4096];
    let (n, fds) = receive(from, &mut bytes)?;
    send(to, &bytes[..n], &fds)
}

fn receive(from: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(bytes)];
    let got = recvmsg(from, into, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok((got, fds)) }
}

fn send(to: &UnixStream, mut bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let mut fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        match sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        fds.clear();
    }
    Ok(())
}
