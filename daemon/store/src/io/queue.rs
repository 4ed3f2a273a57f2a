//! What the engines share: the queue of waiting operations, and the account of each batch.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Buffer, Callback, Done, Limits, Op};

/// How often an operation is tried again that the kernel cannot do right now. Files and disks
/// say that rarely and once; a descriptor that does not block would say it forever.
const TRIES: u32 = 100;

thread_local! {
    /// Whether this thread belongs to an engine, any engine.
    static ON_ENGINE: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one of an engine.
pub(super) fn enter_engine_thread() {
    ON_ENGINE.set(true);
}

pub(super) fn on_engine_thread() -> bool {
    ON_ENGINE.get()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The account of a batch.
struct Batch {
    state: Mutex<BatchState>,
}

struct BatchState {
    done: Vec<Option<Done>>,
    left: usize,
    callback: Option<Callback>,
}

impl Batch {
    fn finish(&self, index: usize, done: Done) {
        let mut state = lock(&self.state);
        state.done[index] = Some(done);
        state.left -= 1;
        if state.left > 0 {
            return;
        }
        let done = mem::take(&mut state.done);
        let callback = state.callback.take();
        drop(state);
        if let Some(callback) = callback {
            call(callback, done.into_iter().flatten().collect());
        }
    }
}

/// A panic in a caller's function must not take the disk's engine with it.
fn call(callback: Callback, done: Vec<Done>) {
    if std::panic::catch_unwind(AssertUnwindSafe(|| callback(done))).is_err() {
        tracing::error!("a callback of the I/O engine panicked");
    }
}

/// What to do next with an operation.
#[derive(Debug)]
pub(super) enum Step {
    /// Issue it (again) for what is left of it.
    Again,
    /// It has ended.
    Ended(io::Result<()>),
}

/// One operation on its way, and whom to tell. Must be ended by [`Task::finish`].
pub(super) struct Task {
    pub(super) op: Op,
    /// Bytes transferred.
    pub(super) done: usize,
    tries: u32,
    index: usize,
    batch: Arc<Batch>,
}

impl Task {
    /// Whether there is something to issue at all.
    pub(super) fn first_step(&self) -> Step {
        let (Op::Read { offset, buf, .. } | Op::Write { offset, buf, .. }) = &self.op else {
            return Step::Again;
        };
        if buf.is_empty() {
            return Step::Ended(Ok(()));
        }
        // Also keeps out -1, which means the current position to io_uring.
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return Step::Ended(Err(io::ErrorKind::InvalidInput.into()));
        }
        Step::Again
    }

    /// Takes note of what a system call for this operation gave: bytes transferred, or an error.
    pub(super) fn advance(&mut self, result: io::Result<usize>) -> Step {
        let count = match result {
            Ok(count) => count,
            Err(error) => return self.failed(error),
        };
        let end = match &self.op {
            Op::Sync { .. } => return Step::Ended(Ok(())),
            Op::Read { .. } => io::ErrorKind::UnexpectedEof,
            Op::Write { .. } => io::ErrorKind::WriteZero,
        };
        if count == 0 {
            return Step::Ended(Err(end.into()));
        }
        self.done += count;
        if self.done < self.op.len() { Step::Again } else { Step::Ended(Ok(())) }
    }

    fn failed(&mut self, error: io::Error) -> Step {
        match error.kind() {
            io::ErrorKind::Interrupted => Step::Again,
            io::ErrorKind::WouldBlock if self.tries < TRIES => {
                self.tries += 1;
                Step::Again
            }
            _ => Step::Ended(Err(error)),
        }
    }

    /// Ends it; calls the callback if it was the last of its batch.
    pub(super) fn finish(self, result: io::Result<()>) {
        self.batch.finish(self.index, Done { op: self.op, result });
    }

    /// Ends it with an error, and leaks the file and the buffer, which the kernel may still use.
    pub(super) fn abandon(self, reason: &str) {
        let Self { op, index, batch, .. } = self;
        let file = Arc::clone(op.file());
        let told = match &op {
            Op::Read { offset, .. } => Op::Read { file, offset: *offset, buf: Buffer::new(0) },
            Op::Write { offset, .. } => Op::Write { file, offset: *offset, buf: Buffer::new(0) },
            Op::Sync { .. } => Op::Sync { file },
        };
        mem::forget(op);
        let text = format!("the I/O engine failed ({reason}); the operation may have been done");
        batch.finish(index, Done { op: told, result: Err(io::Error::other(text)) });
    }
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Task>,
    waiting_bytes: usize,
    /// The ring's thread takes nothing before it is woken through the event.
    sleeping: bool,
    /// Threads that wait for `work`.
    parked: usize,
    /// Submitters that wait for `room`.
    blocked: usize,
    stopping: bool,
}

/// How matters stand after [`Queue::take`].
pub(super) struct Taken {
    /// Nothing waits, and whoever submits next rings the event: the caller may sleep in the
    /// kernel. If not, it may sleep only while it has no room for more, since then it is woken
    /// by what it has in flight.
    pub(super) asleep: bool,
    /// The engine is to end when nothing waits and nothing is in flight.
    pub(super) stopping: bool,
}

/// Operations that wait for their turn.
///
/// No wake-up is lost, because whether somebody sleeps is decided under the same lock as whether
/// something waits. A thread declares itself asleep (`sleeping`, `parked`) only while it holds the
/// lock and has seen that nothing waits; whoever queues something after that holds the lock too,
/// so it sees the declaration and wakes. The ring's thread is still on its way into the kernel
/// then: the event counts, and the ring always has a read of it in flight, or submits one with
/// the very call that goes to sleep, so that the call returns. `sleeping` is taken back by the
/// first who wakes, so a burst of submissions costs one wake-up, and none while the thread works.
pub(super) struct Queue {
    state: Mutex<State>,
    limits: Limits,
    work: Condvar,
    room: Condvar,
    /// Counter (`eventfd`) that wakes the thread of a ring.
    event: Option<Arc<File>>,
}

impl Queue {
    pub(super) fn new(limits: Limits, event: Option<Arc<File>>) -> Self {
        let state = Mutex::default();
        Self { state, limits, work: Condvar::new(), room: Condvar::new(), event }
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// See [`super::IoEngine::submit`].
    pub(super) fn submit(&self, ops: Vec<Op>, callback: Callback) {
        if ops.is_empty() {
            return call(callback, Vec::new());
        }
        let count = ops.len();
        let done = std::iter::repeat_with(|| None).take(count).collect();
        let state = BatchState { done, left: count, callback: Some(callback) };
        let batch = Arc::new(Batch { state: Mutex::new(state) });
        let bytes: usize = ops.iter().map(Op::len).sum();
        let tasks = ops.into_iter().enumerate().map(|(index, op)| {
            let batch = Arc::clone(&batch);
            Task { op, done: 0, tries: 0, index, batch }
        });

        let mut state = self.wait_for_room();
        state.waiting.extend(tasks);
        state.waiting_bytes += bytes;
        self.wake(state, count);
    }

    fn is_full(&self, state: &State) -> bool {
        state.waiting.len() >= self.limits.waiting_ops
            || state.waiting_bytes >= self.limits.waiting_bytes
    }

    fn wait_for_room(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        if !on_engine_thread() {
            while self.is_full(&state) {
                state.blocked += 1;
                state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.blocked -= 1;
            }
        }
        state
    }

    /// Wakes who is needed for `count` more tasks.
    fn wake(&self, mut state: MutexGuard<'_, State>, count: usize) {
        let asleep = mem::take(&mut state.sleeping);
        let parked = state.parked.min(count);
        drop(state);
        for _ in 0..parked {
            self.work.notify_one();
        }
        if asleep {
            self.ring_event();
        }
    }

    /// Makes the ring's read of the event end, now or when it is submitted.
    pub(super) fn ring_event(&self) {
        if let Some(event) = &self.event {
            let rung = event.as_ref().write_all(&1u64.to_ne_bytes());
            // It fails only if 2^64 - 2 wake-ups have not been read.
            debug_assert!(rung.is_ok(), "{rung:?}");
        }
    }

    fn take_some(&self, state: &mut State, count: usize, tasks: &mut Vec<Task>) {
        tasks.extend(state.waiting.drain(..count));
        state.waiting_bytes -= tasks.iter().map(|task| task.op.len()).sum::<usize>();
        if state.blocked > 0 && !self.is_full(state) {
            self.room.notify_all();
        }
    }

    /// Moves up to `room` waiting tasks to `tasks`, which must be empty.
    pub(super) fn take(&self, room: usize, tasks: &mut Vec<Task>) -> Taken {
        let mut state = lock(&self.state);
        let count = room.min(state.waiting.len());
        self.take_some(&mut state, count, tasks);
        state.sleeping = count < room;
        Taken { asleep: state.sleeping, stopping: state.stopping }
    }

    /// Waits for a task; `None` when the engine is to end and nothing waits.
    pub(super) fn take_one(&self, scratch: &mut Vec<Task>) -> Option<Task> {
        let mut state = lock(&self.state);
        while state.waiting.is_empty() {
            if state.stopping {
                return None;
            }
            state.parked += 1;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.parked -= 1;
        }
        self.take_some(&mut state, 1, scratch);
        drop(state);
        scratch.pop()
    }

    /// Lets the threads end when nothing waits any more.
    pub(super) fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopping = true;
        self.wake(state, usize::MAX);
    }

    /// Answers everything with an error, until the engine is dropped.
    pub(super) fn refuse_all(&self, reason: &str) {
        let mut scratch = Vec::new();
        while let Some(task) = self.take_one(&mut scratch) {
            let text = format!("the I/O engine failed before ({reason}); nothing was done");
            task.finish(Err(io::Error::other(text)));
        }
    }

    /// Whether the ring's thread has declared itself asleep.
    #[cfg(test)]
    pub(super) fn is_sleeping(&self) -> bool {
        lock(&self.state).sleeping
    }

    #[cfg(test)]
    pub(super) fn event(&self) -> Option<Arc<File>> {
        self.event.clone()
    }

    /// Threads that wait for work.
    #[cfg(test)]
    pub(super) fn parked(&self) -> usize {
        lock(&self.state).parked
    }

    /// Tasks and bytes that wait, and blocked submitters.
    #[cfg(test)]
    pub(super) fn load(&self) -> (usize, usize, usize) {
        let state = lock(&self.state);
        (state.waiting.len(), state.waiting_bytes, state.blocked)
    }
}
