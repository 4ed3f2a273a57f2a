//! The seam between front ends (NBD, vhost-user) and what serves their I/O.
//!
//! A front end hands batches of [`Request`]s to a [`Block`]. Each request carries a [`Token`],
//! which is completed exactly once, on any thread, possibly before [`Block::submit`] returns.
//! A completion lands in the front end's [`Sink`]; after a burst of completions the completer
//! calls [`Sink::flush`] once, so that one interrupt or one socket write serves the whole burst.
//!
//! ```text
//!   front end ── submit(batch) ──► Block ... work ... token.complete() ──► Sink::complete(tag, …)
//!                                            end of burst ───────────────► Sink::flush()
//! ```

use std::fmt;
use std::sync::Arc;

/// Largest data length of one request; front ends refuse or split what is larger.
pub const MAX_REQUEST_BYTES: u64 = 32 << 20;

/// What a front end must know of a device to describe it to its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Bytes. Any byte range inside it may be read or written.
    pub size: u64,
    /// Writes are refused with [`BlockError::ReadOnly`].
    pub read_only: bool,
    /// Serial number shown to guests; at most 20 bytes are used.
    pub serial: String,
}

/// One operation. Offsets and lengths are in bytes, of any alignment; a range outside the device
/// is answered with [`BlockError::OutOfRange`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads `len` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes to read.
        len: u32,
    },
    /// Writes `data`. It is the front end's stable copy: a guest may change its own memory while
    /// the request is in flight, and replicas must not differ.
    Write {
        /// First byte.
        offset: u64,
        /// What to write.
        data: Vec<u8>,
        /// Complete only when the data is durable on all replicas.
        fua: bool,
    },
    /// Makes every write completed before this durable (I3).
    Flush,
    /// The range is not needed; it reads as zeroes or old data is never seen again. Never fails
    /// for want of support.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Space may be released.
        may_unmap: bool,
        /// Complete only when durable on all replicas.
        fua: bool,
    },
}

/// What a successful request gives back.
#[derive(Debug, PartialEq, Eq)]
pub enum Done {
    /// The bytes of a [`Op::Read`], as many as asked for.
    Data(Vec<u8>),
    /// Every other operation.
    Nothing,
}

/// Why a request failed. Nothing was written unless the variant says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockError {
    /// The range is not inside the device. Nothing was written.
    OutOfRange,
    /// The device is read-only. Nothing was written.
    ReadOnly,
    /// No space left on a disk that must hold the data. A part may have been written.
    NoSpace,
    /// The request is malformed or larger than [`MAX_REQUEST_BYTES`]. Nothing was written.
    Invalid,
    /// The data is unavailable or damaged, or the device is fenced. A part may have been written.
    Io,
    /// The device is being taken away. Nothing was written.
    Shutdown,
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfRange => "range outside the device (nothing was written)",
            Self::ReadOnly => "the device is read-only (nothing was written)",
            Self::NoSpace => "no space left (a part may have been written)",
            Self::Invalid => "malformed request (nothing was written)",
            Self::Io => "input/output error (a part may have been written)",
            Self::Shutdown => "the device is shutting down (nothing was written)",
        })
    }
}

impl std::error::Error for BlockError {}

/// The outcome of a request.
pub type Completion = Result<Done, BlockError>;

/// Where a front end receives completions. Called on any thread; must not block.
pub trait Sink: Send + Sync {
    /// Request `tag` ended with `completion`. Cheap: record it, do not wake anybody yet.
    fn complete(&self, tag: u64, completion: Completion);

    /// A burst of completions ended: tell the client (interrupt, socket write).
    fn flush(&self);

    /// Whether a client still waits for its requests, as far as can be told now. A device asks, seldom, before
    /// it begins a request late: what a client that is gone has left must not be written after somebody
    /// else has used the volume.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// The duty to complete one request exactly once. Dropping it completes the request with
/// [`BlockError::Io`], so that a lost request can never hang a guest.
pub struct Token {
    tag: u64,
    sink: Option<Arc<dyn Sink>>,
}

impl Token {
    /// A token that completes as `tag` in `sink`.
    #[must_use]
    pub fn new(tag: u64, sink: Arc<dyn Sink>) -> Self {
        Self { tag, sink: Some(sink) }
    }

    /// Completes the request; the sink is flushed when `burst` ends.
    pub fn complete(mut self, completion: Completion, burst: &mut Burst) {
        if let Some(sink) = self.sink.take() {
            sink.complete(self.tag, completion);
            burst.note(sink);
        }
    }

    /// Whether somebody still waits for this request: see [`Sink::is_wanted`].
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.sink.as_ref().is_some_and(|sink| sink.is_wanted())
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if let Some(sink) = self.sink.take() {
            sink.complete(self.tag, Err(BlockError::Io));
            sink.flush();
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.tag)
    }
}

/// Collects the sinks touched by a burst of completions and flushes each once when dropped.
#[derive(Default)]
pub struct Burst {
    sinks: Vec<Arc<dyn Sink>>,
}

impl Burst {
    /// An empty burst.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn note(&mut self, sink: Arc<dyn Sink>) {
        if !self.sinks.iter().any(|known| Arc::ptr_eq(known, &sink)) {
            self.sinks.push(sink);
        }
    }
}

impl Drop for Burst {
    fn drop(&mut self) {
        for sink in self.sinks.drain(..) {
            sink.flush();
        }
    }
}

/// One operation and the duty to complete it.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Whom to tell.
    pub token: Token,
}

/// A block device as front ends see it: a volume, or in tests a piece of memory.
pub trait Block: Send + Sync {
    /// The device's description. Its size may grow; it never shrinks.
    fn info(&self) -> BlockInfo;

    /// Takes all requests out of `batch`. They may complete in any order, on any thread, also
    /// before this returns. Requests in flight together have no order among each other.
    fn submit(&self, batch: &mut Vec<Request>);

    /// A client is gone: its requests are no longer wanted, and those that wait for something may end now,
    /// with an error that nobody sees.
    fn client_gone(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Sink for Log {
        fn complete(&self, tag: u64, completion: Completion) {
            self.0.lock().unwrap().push(format!("{tag} {}", completion.is_ok()));
        }
        fn flush(&self) {
            self.0.lock().unwrap().push("flush".into());
        }
    }

    #[test]
    fn a_burst_flushes_each_sink_once() {
        let log = Arc::new(Log::default());
        let mut burst = Burst::new();
        for tag in 0..3 {
            Token::new(tag, log.clone()).complete(Ok(Done::Nothing), &mut burst);
        }
        drop(burst);
        assert_eq!(*log.0.lock().unwrap(), ["0 true", "1 true", "2 true", "flush"]);
    }

    #[test]
    fn a_dropped_token_fails_its_request() {
        let log = Arc::new(Log::default());
        drop(Token::new(4, log.clone()));
        assert_eq!(*log.0.lock().unwrap(), ["4 false", "flush"]);
    }
}
