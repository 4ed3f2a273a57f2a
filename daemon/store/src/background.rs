//! The two threads of a store: the flusher syncs the log, the checkpointer applies it.
//!
//! Both sleep without a timeout while there is nothing to do.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::{Engine, lock};
use crate::error::FlushError;

/// Unsynced bytes after which the flusher starts on its own.
const SYNC_BYTES: u64 = 8 << 20;
/// How long a checkpoint that failed waits before it is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Told when a flush is done.
pub(crate) type Done = Box<dyn FnOnce(Result<(), FlushError>) + Send>;

#[derive(Default)]
struct Flushes {
    waiting: Vec<Done>,
    sync_now: bool,
    stop: bool,
}

#[derive(Default)]
struct Requests {
    checkpoint: bool,
    retry_now: bool,
    stop: bool,
}

/// How the engine and the threads talk.
#[derive(Default)]
pub(crate) struct Signals {
    background: AtomicBool,
    flushes: Mutex<Flushes>,
    flusher: Condvar,
    /// The flusher looks at the log by itself before long.
    watching: AtomicBool,
    sync_asked: AtomicBool,
    requests: Mutex<Requests>,
    checkpointer: Condvar,
    checkpoint_asked: AtomicBool,
    /// Whether a thread that waits for its flush syncs for all that wait, and told when it is done.
    leading: Mutex<bool>,
    led: Condvar,
}

impl Signals {
    /// Whether the threads run.
    pub(crate) fn in_background(&self) -> bool {
        self.background.load(SeqCst)
    }

    /// A change was applied; `unsynced` bytes of log are not durable.
    pub(crate) fn changed(&self, unsynced: u64) {
        if !self.in_background() {
            return;
        }
        if !self.watching.load(SeqCst) && !self.watching.swap(true, SeqCst) {
            let _flushes = lock(&self.flushes);
            self.flusher.notify_one();
        }
        if unsynced > SYNC_BYTES
            && !self.sync_asked.load(SeqCst)
            && !self.sync_asked.swap(true, SeqCst)
        {
            lock(&self.flushes).sync_now = true;
            self.flusher.notify_one();
        }
    }

    /// A sync takes up everything appended so far.
    pub(crate) fn sync_begins(&self) {
        self.sync_asked.store(false, SeqCst);
    }

    pub(crate) fn request_checkpoint(&self) {
        if !self.in_background() {
            return;
        }
        if !self.checkpoint_asked.load(SeqCst) && !self.checkpoint_asked.swap(true, SeqCst) {
            lock(&self.requests).checkpoint = true;
            self.checkpointer.notify_one();
        }
    }

    /// Tries a checkpoint that failed again at once.
    pub(crate) fn retry_checkpoint(&self) {
        if self.in_background() {
            lock(&self.requests).retry_now = true;
            self.checkpointer.notify_one();
        }
    }
}

impl Engine {
    /// Starts the threads. They end after [`Engine::stop_threads`].
    pub(crate) fn start_threads(
        self: &Arc<Self>,
    ) -> std::io::Result<Vec<std::thread::JoinHandle<()>>> {
        self.signals.background.store(true, SeqCst);
        let spawn = |name: &str, run: fn(&Self)| {
            let engine = Arc::clone(self);
            std::thread::Builder::new().name(name.into()).spawn(move || run(&engine))
        };
        let flusher = spawn("store-flush", Self::run_flusher)?;
        match spawn("store-apply", Self::run_checkpointer) {
            Ok(checkpointer) => {
                // Replayed changes are waiting already.
                if self.has_unapplied() {
                    self.signals.request_checkpoint();
                }
                Ok(vec![flusher, checkpointer])
            }
            Err(error) => {
                self.stop_threads();
                let _ = flusher.join();
                Err(error)
            }
        }
    }

    /// Tells the threads to end; waiting flushes are answered first.
    pub(crate) fn stop_threads(&self) {
        lock(&self.signals.flushes).stop = true;
        self.signals.flusher.notify_one();
        lock(&self.signals.requests).stop = true;
        self.signals.checkpointer.notify_one();
    }

    /// See [`crate::Store::flush`].
    pub(crate) fn flush(&self, done: Done) {
        if self.changed_to.load(SeqCst) <= self.durable.load(SeqCst) {
            return done(Ok(()));
        }
        if let Some(reason) = self.failed.get() {
            return done(Err(FlushError(reason.clone())));
        }
        let mut flushes = lock(&self.signals.flushes);
        flushes.waiting.push(done);
        drop(flushes);
        self.signals.flusher.notify_one();
    }

    /// See [`crate::Store::flush_wait`]. A thread that waits anyhow needs no other: the first syncs,
    /// those that come meanwhile wait for it, and then one of them syncs for all of them.
    pub(crate) fn flush_wait(&self) -> Result<(), FlushError> {
        let wanted = self.changed_to.load(SeqCst);
        let mut leading = lock(&self.signals.leading);
        while self.durable.load(SeqCst) < wanted {
            if std::mem::replace(&mut *leading, true) {
                leading = self.signals.led.wait(leading).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(leading);
            let result = self.sync_log();
            leading = lock(&self.signals.leading);
            *leading = false;
            self.signals.led.notify_all();
            result?;
        }
        Ok(())
    }

    fn has_unsynced(&self) -> bool {
        self.changed_to.load(SeqCst) > self.durable.load(SeqCst) && self.failed.get().is_none()
    }

    fn has_unapplied(&self) -> bool {
        self.changed_to.load(SeqCst) > self.applied_to.load(SeqCst) && self.failed.get().is_none()
    }

    fn run_flusher(&self) {
        let signals = &self.signals;
        let mut unapplied_since: Option<Instant> = None;
        let mut flushes = lock(&signals.flushes);
        loop {
            if !flushes.waiting.is_empty() {
                let waiting = std::mem::take(&mut flushes.waiting);
                drop(flushes);
                let result = self.sync_log();
                answer(waiting, &result);
                flushes = lock(&signals.flushes);
                continue;
            }
            if flushes.stop {
                return;
            }
            if std::mem::take(&mut flushes.sync_now) {
                flushes = self.sync_unlocked(flushes);
                continue;
            }
            let (guard, elapsed) = self.watch(flushes);
            flushes = guard;
            if !elapsed || !flushes.waiting.is_empty() {
                continue;
            }
            flushes = self.sync_unlocked(flushes);
            if !self.has_unapplied() {
                unapplied_since = None;
            } else if unapplied_since.get_or_insert_with(Instant::now).elapsed()
                >= self.options.checkpoint_after
            {
                unapplied_since = None;
                signals.request_checkpoint();
            }
        }
    }

    /// Sleeps: with a timeout while there is something to sync or apply, else until woken. True if
    /// the timeout passed.
    fn watch<'a>(&self, flushes: MutexGuard<'a, Flushes>) -> (MutexGuard<'a, Flushes>, bool) {
        let signals = &self.signals;
        // A writer publishes its change before it looks at `watching`, so either it wakes this
        // thread or the change is seen here.
        signals.watching.store(false, SeqCst);
        if self.has_unsynced() || self.has_unapplied() {
            signals.watching.store(true, SeqCst);
            let timeout = self.options.sync_after;
            let (guard, result) = signals
                .flusher
                .wait_timeout(flushes, timeout)
                .unwrap_or_else(PoisonError::into_inner);
            return (guard, result.timed_out());
        }
        let guard = signals.flusher.wait(flushes).unwrap_or_else(PoisonError::into_inner);
        signals.watching.store(true, SeqCst);
        (guard, false)
    }

    fn sync_unlocked<'a>(&'a self, flushes: MutexGuard<'a, Flushes>) -> MutexGuard<'a, Flushes> {
        drop(flushes);
        if self.has_unsynced() {
            // A failure was logged and is told to whoever flushes or writes next.
            let _ = self.sync_log();
        }
        lock(&self.signals.flushes)
    }

    fn run_checkpointer(&self) {
        let signals = &self.signals;
        let mut retry = false;
        let mut requests = lock(&signals.requests);
        loop {
            if requests.stop {
                return;
            }
            let due = std::mem::take(&mut requests.checkpoint)
                || retry && std::mem::take(&mut requests.retry_now);
            if due {
                drop(requests);
                signals.checkpoint_asked.store(false, SeqCst);
                retry = self.checkpoint_or_warn(retry);
                requests = lock(&signals.requests);
            } else if retry {
                let (guard, result) = signals
                    .checkpointer
                    .wait_timeout(requests, RETRY)
                    .unwrap_or_else(PoisonError::into_inner);
                requests = guard;
                requests.checkpoint |= result.timed_out();
            } else {
                requests.retry_now = false;
                requests =
                    signals.checkpointer.wait(requests).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// True if the checkpoint should be tried again later.
    fn checkpoint_or_warn(&self, again: bool) -> bool {
        let Err(error) = self.checkpoint() else { return false };
        if !again {
            tracing::warn!(disk = %self.ids.disk, %error,
                "cannot apply the log (tried again every 2 s; free space or replace the disk)");
        }
        self.failed.get().is_none()
    }
}

fn answer(waiting: Vec<Done>, result: &Result<(), FlushError>) {
    for done in waiting {
        let result = result.clone();
        // A panic in a caller's function must not take the disk's flusher with it.
        if std::panic::catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
            tracing::error!("a flush callback panicked");
        }
    }
}
