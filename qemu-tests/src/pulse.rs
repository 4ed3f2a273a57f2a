//! A client that never stops writing, to see how long I/O stands still.

use crate::{Export, PATIENCE, Scribe, eventually};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Blocks of 4 KiB that it writes to: those of four objects, so that most nodes hold some.
const BLOCKS: usize = 4096;
/// Writes side by side.
const DEPTH: usize = 4;
/// Rounds of writes before a flush.
const ROUNDS: u64 = 32;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    rounds: AtomicU64,
    longest: AtomicU64,
}

/// Writes until it is told to stop. A write that fails, or is not answered for a minute, is a panic.
pub struct Pulse {
    shared: Arc<Shared>,
    thread: JoinHandle<usize>,
}

impl Pulse {
    /// Starts to write; the export has 16 MiB at least.
    pub fn start(export: &Export, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let (export, inside) = (export.clone(), Arc::clone(&shared));
        let thread = std::thread::spawn(move || beat(&export, seed, &inside));
        let pulse = Self { shared, thread };
        pulse.wait_for_more(20);
        pulse
    }

    /// Rounds of writes that were answered.
    pub fn rounds(&self) -> u64 {
        self.shared.rounds.load(Ordering::Acquire)
    }

    /// Waits until some more rounds were answered.
    pub fn wait_for_more(&self, rounds: u64) {
        let goal = self.rounds() + rounds;
        eventually(&format!("{rounds} more rounds of writes"), 2 * PATIENCE, || {
            assert!(!self.thread.is_finished(), "the writer gave up");
            (self.rounds() >= goal).then_some(())
        });
    }

    /// The longest round since this was asked last; one under way counts when it has ended.
    pub fn take_longest(&self) -> Duration {
        Duration::from_micros(self.shared.longest.swap(0, Ordering::AcqRel))
    }

    /// Stops, flushes, and reads everything back; gives the number of blocks looked at.
    pub fn verify(self) -> usize {
        self.shared.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e))
    }
}

fn beat(export: &Export, seed: u64, shared: &Shared) -> usize {
    let mut client = export.connect();
    let mut scribe = Scribe::new(seed, BLOCKS);
    while !shared.stop.load(Ordering::Acquire) {
        let begin = Instant::now();
        scribe.write(&mut client, DEPTH);
        let rounds = shared.rounds.fetch_add(1, Ordering::AcqRel);
        if rounds.is_multiple_of(ROUNDS) {
            scribe.flush(&mut client);
        }
        let took = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        shared.longest.fetch_max(took, Ordering::AcqRel);
        // A client that is always busy would starve the cluster on a machine with few cores.
        std::thread::sleep(Duration::from_millis(2));
    }
    scribe.flush(&mut client);
    scribe.verify(&mut client)
}
