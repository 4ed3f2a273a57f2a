//! The I/O engine of a disk: reads, writes and syncs that do not hold up the thread that asks.
//!
//! ```text
//!   submit ──► queue (bounded) ──► io_uring, one thread ─┐
//!                              └─► or 4 threads, pread … ├──► callback, once per batch
//!                                                        ┘
//! ```
//!
//! A batch of operations is submitted with a function that is called once, when all of them have
//! ended; they run in parallel and in no order. Batches are not ordered either: what must come
//! after something is submitted by its callback.
//!
//! Two engines do the same: `io_uring` ([`uring`]) and a pool of threads ([`pool`]) for where the
//! kernel, or who guards it, refuses `io_uring`. Both go through [`queue`], which bounds what
//! waits, and both let [`queue::Task::advance`] judge what a system call said, so short transfers,
//! interruptions and errors come out the same.
//!
//! # Bounds
//! Per engine ([`Limits`]): 128 operations are with the kernel (4 with the pool), each with one
//! buffer of its submitter. While 4096 operations or 64 MiB wait for their turn,
//! [`IoEngine::submit`] blocks; a batch is taken as a whole, so what waits exceeds the bounds by
//! at most one batch. Submissions by a callback are not held up, since the thread they would hold
//! up is the one that makes room: a callback should submit no more than one batch.
//!
//! # What must never happen
//! The kernel reads and writes buffers whose addresses it was given long before. So an operation
//! in flight, buffer and file included, belongs to the engine until the kernel has answered; it
//! cannot be cancelled. Where no answer can come any more (the ring broke, or its thread
//! panicked), it is leaked, its submitter gets an error and an empty buffer, and the engine answers
//! everything after that with an error.

mod buffer;
mod pool;
mod queue;
#[cfg(test)]
mod tests;
#[allow(unsafe_code, reason = "the kernel is handed addresses of buffers")]
mod uring;

use std::fs::File;
use std::io;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

pub(crate) use buffer::Buffer;
use queue::Queue;

/// One operation on a file: a regular one, or a block device.
#[derive(Debug)]
pub(crate) enum Op {
    /// Fills all of `buf` from `offset` (bytes) on; `UnexpectedEof` if the file ends before.
    Read { file: Arc<File>, offset: u64, buf: Buffer },
    /// Writes all of `buf` at `offset` (bytes). After an error, any part of it may be written.
    Write { file: Arc<File>, offset: u64, buf: Buffer },
    /// `fdatasync`: what was written to the file by operations that ended before this was
    /// submitted is durable. An error is reported once; what it concerns may be lost.
    Sync { file: Arc<File> },
}

impl Op {
    pub(crate) fn file(&self) -> &Arc<File> {
        match self {
            Self::Read { file, .. } | Self::Write { file, .. } | Self::Sync { file } => file,
        }
    }

    /// Bytes to transfer.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Read { buf, .. } | Self::Write { buf, .. } => buf.len(),
            Self::Sync { .. } => 0,
        }
    }

    /// The buffer; an empty one from a sync.
    pub(crate) fn into_buffer(self) -> Buffer {
        match self {
            Self::Read { buf, .. } | Self::Write { buf, .. } => buf,
            Self::Sync { .. } => Buffer::new(0),
        }
    }
}

/// An operation that ended.
#[derive(Debug)]
pub(crate) struct Done {
    /// As it was submitted. Its buffer is empty if the kernel may still use the memory, which
    /// only happens when the engine itself failed.
    pub(crate) op: Op,
    /// The system's error, of this operation only. `InvalidInput`: it reaches beyond the largest
    /// offset of a file, nothing was done.
    pub(crate) result: io::Result<()>,
}

/// Told of the operations of a batch, in the order of submission, when all have ended. Called on a
/// thread of the engine, so it must not block; a panic in it is caught and logged.
pub(crate) type Callback = Box<dyn FnOnce(Vec<Done>) + Send>;

/// Which engine to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// `io_uring`; the pool, with a line in the log, if it is refused.
    Auto,
    /// `io_uring` or an error.
    Uring,
    /// The pool of threads.
    Threads,
}

/// Bounds of an engine.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Operations that the kernel works on at a time (`io_uring`).
    in_flight: u16,
    /// Operations that wait before submitters block.
    waiting_ops: usize,
    /// Bytes that wait before submitters block.
    waiting_bytes: usize,
    /// Bytes of one system call or entry of the ring; longer operations continue.
    piece: usize,
}

const LIMITS: Limits =
    Limits { in_flight: 128, waiting_ops: 4096, waiting_bytes: 64 << 20, piece: 1 << 30 };

/// The engine. Dropping it waits until everything submitted has ended (except when a callback
/// drops it: then it ends by itself, after that).
pub(crate) struct IoEngine {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
    kind: &'static str,
}

impl IoEngine {
    /// Starts an engine; `name` appears in its threads' names and in the log.
    ///
    /// # Errors
    /// Why `io_uring` is refused, if it was [`Choice::Uring`]; that no thread can be started.
    pub(crate) fn start(name: &str, choice: Choice) -> io::Result<Self> {
        Self::start_with(name, choice, LIMITS, uring::Ring::open)
    }

    fn start_with(
        name: &str,
        choice: Choice,
        limits: Limits,
        open: impl FnOnce(Limits) -> io::Result<uring::Ring> + Send + 'static,
    ) -> io::Result<Self> {
        if choice != Choice::Threads {
            match uring::start(name, limits, open) {
                Ok((queue, thread)) => {
                    return Ok(Self { queue, threads: vec![thread], kind: "io_uring" });
                }
                Err(error) if choice == Choice::Uring => {
                    let text = format!("io_uring cannot be used: {}", uring::explain(&error));
                    return Err(io::Error::new(error.kind(), text));
                }
                Err(error) => tracing::warn!(
                    engine = name,
                    reason = uring::explain(&error),
                    "io_uring cannot be used; threads do the I/O, at more CPU time"
                ),
            }
        }
        let (queue, threads) = pool::start(name, limits)?;
        Ok(Self { queue, threads, kind: "threads" })
    }

    /// `io_uring` or `threads`.
    pub(crate) fn kind(&self) -> &'static str {
        self.kind
    }

    /// Does `ops` in parallel and in no order; calls `done` once, when all have ended (at once, on
    /// this thread, if there are none). Blocks while too much waits, see [the bounds](self).
    pub(crate) fn submit(&self, ops: Vec<Op>, done: Callback) {
        self.queue.submit(ops, done);
    }

    /// [`IoEngine::submit`], waiting for it.
    ///
    /// # Panics
    /// If called from a callback, which would wait for itself.
    pub(crate) fn run(&self, ops: Vec<Op>) -> Vec<Done> {
        assert!(!queue::on_engine_thread(), "IoEngine::run in a callback waits for itself");
        let (sender, receiver) = mpsc::sync_channel(1);
        self.submit(
            ops,
            Box::new(move |done| {
                // The receiver waits below.
                let _ = sender.send(done);
            }),
        );
        receiver.recv().expect("a batch is always answered")
    }
}

impl Drop for IoEngine {
    fn drop(&mut self) {
        self.queue.stop();
        let me = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != me) {
            // Whatever made a thread panic was reported by the panic.
            let _ = thread.join();
        }
    }
}
