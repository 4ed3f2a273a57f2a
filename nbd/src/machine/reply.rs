//! Replies of the transmission phase, as a short header and an owned body, so that data read from
//! a device goes to the socket without being copied.

use sheepdog_types::{BlockError, Completion, Done};

use super::wire::{
    Errno, MAX_STRING, RequestHead, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, cmd,
};

/// Longest reply header: a structured chunk header and its offset.
const MAX_HEAD: usize = 28;

/// Why a request is refused: the error number and a text for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error number.
    pub errno: Errno,
    /// What was wrong; sent to clients that negotiated structured replies.
    pub text: &'static str,
}

/// One whole reply: `head` then `body`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    head: [u8; MAX_HEAD],
    head_len: u8,
    body: Vec<u8>,
}

impl Reply {
    /// The reply to `request`, which was refused or ended with `outcome`.
    ///
    /// A read is always answered with a structured chunk once those are negotiated; other
    /// requests then get a structured chunk only for errors, which carry a text.
    #[must_use]
    pub fn new(request: &RequestHead, structured: bool, outcome: Result<Done, Refusal>) -> Self {
        let reading = request.command == cmd::READ;
        match outcome {
            Ok(Done::Data(data)) if reading && !data.is_empty() => {
                Self::data(request, structured, data)
            }
            Ok(_) if reading && structured => Self::chunk(request, chunk::NONE, 0),
            Ok(_) => Self::simple(request, 0),
            Err(refusal) if structured => Self::error_chunk(request, refusal),
            Err(refusal) => Self::simple(request, refusal.errno as u32),
        }
    }

    /// The bytes before the body.
    #[must_use]
    pub fn head(&self) -> &[u8] {
        &self.head[..usize::from(self.head_len)]
    }

    /// The bytes after the head: data of a read, or the rest of an error chunk.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Bytes of the whole reply.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head().len() + self.body.len()
    }

    /// Never: a reply has at least 16 bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    fn empty() -> Self {
        Self { head: [0; MAX_HEAD], head_len: 0, body: Vec::new() }
    }

    fn put(&mut self, bytes: &[u8]) {
        let at = usize::from(self.head_len);
        self.head[at..at + bytes.len()].copy_from_slice(bytes);
        self.head_len += bytes.len() as u8;
    }

    fn simple(request: &RequestHead, errno: u32) -> Self {
        let mut reply = Self::empty();
        reply.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        reply.put(&errno.to_be_bytes());
        reply.put(&request.cookie.to_be_bytes());
        reply
    }

    /// Header of the only chunk of a reply, with `len` bytes to follow.
    fn chunk(request: &RequestHead, kind: u16, len: u32) -> Self {
        let mut reply = Self::empty();
        reply.put(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        reply.put(&chunk::DONE.to_be_bytes());
        reply.put(&kind.to_be_bytes());
        reply.put(&request.cookie.to_be_bytes());
        reply.put(&len.to_be_bytes());
        reply
    }

    fn data(request: &RequestHead, structured: bool, data: Vec<u8>) -> Self {
        let mut reply = if structured {
            let mut reply = Self::chunk(request, chunk::OFFSET_DATA, data.len() as u32 + 8);
            reply.put(&request.offset.to_be_bytes());
            reply
        } else {
            Self::simple(request, 0)
        };
        reply.body = data;
        reply
    }

    fn error_chunk(request: &RequestHead, refusal: Refusal) -> Self {
        let text = &refusal.text[..refusal.text.floor_char_boundary(MAX_STRING)];
        let mut reply = Self::chunk(request, chunk::ERROR, text.len() as u32 + 6);
        reply.put(&(refusal.errno as u32).to_be_bytes());
        reply.put(&(text.len() as u16).to_be_bytes());
        reply.body = text.as_bytes().to_vec();
        reply
    }
}

/// What a device's `completion` of `request` means in the protocol. A read that gave another
/// number of bytes than asked for is an error: the client would lose the message boundary.
pub fn outcome(request: &RequestHead, completion: Completion) -> Result<Done, Refusal> {
    let refusal = |errno, text| Err(Refusal { errno, text });
    match completion {
        Ok(done) if request.command != cmd::READ => Ok(done),
        Ok(Done::Data(data)) if data.len() == request.len as usize => Ok(Done::Data(data)),
        Ok(_) => refusal(Errno::Io, "the device gave another number of bytes than asked for"),
        Err(BlockError::OutOfRange) => Err(past_the_end(request)),
        Err(BlockError::ReadOnly) => Err(READ_ONLY),
        Err(BlockError::NoSpace) => {
            refusal(Errno::NoSpc, "no space left (a part may have been written)")
        }
        Err(BlockError::Invalid) => refusal(Errno::Inval, "malformed request"),
        Err(BlockError::Io) if writes(request) => {
            refusal(Errno::Io, "input/output error (a part may have been written)")
        }
        Err(BlockError::Io) => refusal(Errno::Io, "input/output error"),
        Err(BlockError::Shutdown) => Err(SHUTDOWN),
    }
}

/// The refusal of a range that is not inside the export: `ENOSPC` for what writes data, else
/// `EINVAL`.
#[must_use]
pub fn past_the_end(request: &RequestHead) -> Refusal {
    const TEXT: &str = "the range is not inside the export";
    let errno = if matches!(request.command, cmd::WRITE | cmd::WRITE_ZEROES) {
        Errno::NoSpc
    } else {
        Errno::Inval
    };
    Refusal { errno, text: TEXT }
}

/// Whether `request` changes the export.
#[must_use]
pub fn writes(request: &RequestHead) -> bool {
    matches!(request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES)
}

/// The refusal of a write to a read-only export.
pub const READ_ONLY: Refusal = Refusal { errno: Errno::Perm, text: "the export is read-only" };
/// The refusal of everything while the server goes away.
pub const SHUTDOWN: Refusal =
    Refusal { errno: Errno::Shutdown, text: "the server is shutting down" };
