//! A small NBD client: one connection, simple replies, requests may be in flight side by side.
//!
//! It exists because a test must know which request was answered, and with what; no tool tells. Protocol:
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const INIT_MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPT_MAGIC: &[u8; 8] = b"IHAVEOPT";
const FLAG_FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
const OPT_GO: u32 = 7;
const OPT_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// NBD_CMD_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// NBD_CMD_READ
    Read = 0,
    /// NBD_CMD_WRITE
    Write = 1,
    /// NBD_CMD_DISC
    Disconnect = 2,
    /// NBD_CMD_FLUSH
    Flush = 3,
    /// NBD_CMD_TRIM
    Trim = 4,
}

/// Why a request has no good answer.
#[derive(Debug)]
pub enum NbdError {
    /// The server answered with this error number.
    Refused(u32),
    /// The connection broke or said nothing in time: the request may have been done.
    Lost(std::io::Error),
}

impl From<std::io::Error> for NbdError {
    fn from(e: std::io::Error) -> Self {
        Self::Lost(e)
    }
}

fn broken(what: impl Into<String>) -> NbdError {
    NbdError::Lost(std::io::Error::other(what.into()))
}

/// One connection in its transmission phase.
pub struct Client {
    stream: UnixStream,
    next: u64,
    /// Length of the data that will come with the reply.
    expected: HashMap<u64, usize>,
    /// Size of the export in bytes.
    pub size: u64,
}

impl Client {
    /// Connects and chooses the export.
    pub fn connect(socket: &Path, export: &str) -> Result<Self, NbdError> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        if &hello[..8] != INIT_MAGIC || &hello[8..16] != OPT_MAGIC {
            return Err(broken(format!("not an NBD server: {hello:02x?}")));
        }
        stream.write_all(&FLAG_FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes())?;
        let size = go(&mut stream, export)?;
        Ok(Self { stream, next: 1, expected: HashMap::new(), size })
    }

    /// How long [`Client::reply`] waits.
    pub fn patience(&self, limit: Duration) {
        self.stream.set_read_timeout(Some(limit)).unwrap_or_else(|e| panic!("timeout: {e}"));
    }

    /// Sends a request without waiting; returns its handle. `length` is that of `data` for a write.
    pub fn send(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<u64, NbdError> {
        let handle = self.next;
        self.next += 1;
        let mut message = Vec::with_capacity(28 + data.len());
        message.extend(REQUEST_MAGIC.to_be_bytes());
        message.extend(0u16.to_be_bytes());
        message.extend((command as u16).to_be_bytes());
        message.extend(handle.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(data);
        let expected = if command == Command::Read { length as usize } else { 0 };
        self.expected.insert(handle, expected);
        self.stream.write_all(&message)?;
        Ok(handle)
    }

    /// The next reply, of whichever request: its handle and data, or the error it carries.
    pub fn reply(&mut self) -> Result<(u64, Result<Vec<u8>, u32>), NbdError> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        let (magic, error) = (be32(&head[0..]), be32(&head[4..]));
        let handle = (u64::from(be32(&head[8..])) << 32) | u64::from(be32(&head[12..]));
        let length = self.expected.remove(&handle);
        let (true, Some(length)) = (magic == SIMPLE_REPLY_MAGIC, length) else {
            return Err(broken(format!("not a reply to any request: {head:02x?}")));
        };
        if error != 0 {
            return Ok((handle, Err(error)));
        }
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok((handle, Ok(data)))
    }

    fn round_trip(
        &mut self,
        command: Command,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<Vec<u8>, NbdError> {
        let handle = self.send(command, offset, length, data)?;
        match self.reply()? {
            (answered, _) if answered != handle => Err(broken("a reply to an older request")),
            (_, Ok(data)) => Ok(data),
            (_, Err(error)) => Err(NbdError::Refused(error)),
        }
    }

    /// Reads; nothing else may be in flight.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, NbdError> {
        self.round_trip(Command::Read, offset, length, &[])
    }

    /// Writes; nothing else may be in flight.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        self.round_trip(Command::Write, offset, data.len() as u32, data).map(drop)
    }

    /// Flushes; nothing else may be in flight.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.round_trip(Command::Flush, 0, 0, &[]).map(drop)
    }

    /// Says good-bye.
    pub fn disconnect(mut self) {
        let _ = self.send(Command::Disconnect, 0, 0, &[]);
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |n, b| (n << 8) | u32::from(*b))
}

/// NBD_OPT_GO; returns the size of the export.
fn go(stream: &mut UnixStream, export: &str) -> Result<u64, NbdError> {
    let mut message = OPT_MAGIC.to_vec();
    message.extend(OPT_GO.to_be_bytes());
    message.extend((export.len() as u32 + 6).to_be_bytes());
    message.extend((export.len() as u32).to_be_bytes());
    message.extend(export.as_bytes());
    message.extend(0u16.to_be_bytes());
    stream.write_all(&message)?;
    let mut size = None;
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head)?;
        let magic = (u64::from(be32(&head[0..])) << 32) | u64::from(be32(&head[4..]));
        let (kind, length) = (be32(&head[12..]), be32(&head[16..]) as usize);
        if magic != OPT_REPLY_MAGIC || length > 65536 {
            return Err(broken(format!("not an option reply: {head:02x?}")));
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body)?;
        match kind {
            REP_ACK => return size.ok_or_else(|| broken("no NBD_INFO_EXPORT")),
            REP_INFO if body.len() >= 12 && body[..2] == INFO_EXPORT.to_be_bytes() => {
                size = Some((u64::from(be32(&body[2..])) << 32) | u64::from(be32(&body[6..])));
            }
            REP_INFO => {}
            error => {
                let text = String::from_utf8_lossy(&body);
                return Err(broken(format!("export {export}: refused ({error:#x}) {text}")));
            }
        }
    }
}
