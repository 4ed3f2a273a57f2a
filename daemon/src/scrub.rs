//! Background scrubbing of this node's disks: reads all that is stored, at a bounded rate, so that
//! damage is found while other replicas can repair it.
//!
//! ```text
//!   idle ── start ──► running ◄── start ── paused
//!     ▲                 │ │                  ▲
//!     └──── finished ───┘ └────── pause ─────┘
//! ```
//! A thread exists only while a scrub runs. Progress is not kept over a restart of the daemon: the
//! next scrub begins at the beginning.

use crate::api::{DamagedBlock, ScrubInfo, ScrubResult, ScrubState};
use crate::cluster::lock;
use crate::node::now;
use crate::replica::Disk;
use sheepdog_cluster::state::ClusterState;
use sheepdog_store::{BadBlock, ScrubbedLayer};
use sheepdog_types::{BLOCK_SIZE, LayerKey, OBJECT_SIZE};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes read per second unless told: a few percent of what a disk can do, 18 hours per TiB.
pub const DEFAULT_RATE: u64 = 16 << 20;
/// Slowest rate that is taken: a layer of 4 MiB then takes a quarter of an hour.
pub const MIN_RATE: u64 = 4096;
/// Damaged blocks that are named; all are counted.
const NAMED: usize = 100;

/// Where a scrub is.
#[derive(Debug, Default)]
struct Progress {
    /// The last layer that was read.
    after: Option<LayerKey>,
    blocks: u64,
    bad: u64,
    started_at: u64,
}

#[derive(Debug)]
struct State {
    phase: ScrubState,
    /// Bytes per second.
    rate: u64,
    /// Number of the thread that may go on.
    thread: u64,
    progress: Progress,
    last: Option<ScrubResult>,
    stopped: bool,
}

struct Shared {
    disk: Arc<Disk>,
    state: Mutex<State>,
    /// The phase or the rate changed.
    changed: Condvar,
}

/// Scrubs one disk. See the [module](self).
pub struct Scrubber {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Scrubber {
    /// An idle scrubber.
    #[must_use]
    pub fn new(disk: Arc<Disk>) -> Self {
        let state = State {
            phase: ScrubState::Idle,
            rate: DEFAULT_RATE,
            thread: 0,
            progress: Progress::default(),
            last: None,
            stopped: false,
        };
        let shared = Shared { disk, state: Mutex::new(state), changed: Condvar::new() };
        Self { shared: Arc::new(shared), threads: Mutex::default() }
    }

    /// Starts a scrub, or goes on with a paused one. One that runs goes on with the new rate, in
    /// bytes per second; without one the rate stays as it was.
    ///
    /// # Errors
    /// A text for people; nothing was changed.
    pub fn start(&self, rate: Option<u64>) -> Result<(), String> {
        if rate.is_some_and(|rate| rate < MIN_RATE) {
            return Err(format!("a rate below {MIN_RATE} bytes per second; nothing was changed"));
        }
        let mut threads = lock(&self.threads);
        let mut state = lock(&self.shared.state);
        if state.stopped {
            return Err("this node is stopping; nothing was changed".into());
        }
        if state.phase != ScrubState::Running {
            let (shared, number) = (Arc::clone(&self.shared), state.thread + 1);
            let thread = std::thread::Builder::new().name("scrub".into());
            let thread = thread.spawn(move || shared.run(number));
            threads.retain(|thread| !thread.is_finished());
            threads.push(thread.map_err(|e| format!("no thread: {e}; nothing was changed"))?);
            if state.phase == ScrubState::Idle {
                state.progress = Progress { started_at: now(), ..Progress::default() };
            }
            (state.phase, state.thread) = (ScrubState::Running, number);
            tracing::info!(disk = %self.shared.disk.id, "scrubbing");
        }
        state.rate = rate.unwrap_or(state.rate);
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Pauses a scrub that runs, at once as far as others can see; false if none does.
    pub fn pause(&self) -> bool {
        let mut state = lock(&self.shared.state);
        let runs = state.phase == ScrubState::Running;
        if runs {
            state.phase = ScrubState::Paused;
            self.shared.changed.notify_all();
        }
        runs
    }

    /// Ends for good, waiting for the layer that is being read.
    pub fn stop(&self) {
        let mut threads = lock(&self.threads);
        lock(&self.shared.state).stopped = true;
        self.shared.changed.notify_all();
        for thread in threads.drain(..) {
            // Whatever made it panic was reported by the panic.
            let _ = thread.join();
        }
    }

    /// How it is; `cluster` knows the names of volumes.
    #[must_use]
    pub fn info(&self, cluster: &ClusterState) -> ScrubInfo {
        let Shared { disk, state, .. } = &*self.shared;
        let damage = disk.store.damage();
        let used = disk.store.usage().used;
        let state = lock(state);
        let begun = state.phase != ScrubState::Idle;
        let bytes_done = if begun { state.progress.blocks * BLOCK_SIZE as u64 } else { 0 };
        ScrubInfo {
            disk: disk.id.to_string(),
            path: disk.path.display().to_string(),
            state: state.phase,
            rate: state.rate,
            started_at: begun.then_some(state.progress.started_at),
            bytes_done,
            bytes_total: used.max(bytes_done),
            found: if begun { state.progress.bad } else { 0 },
            last: state.last.clone(),
            damaged_blocks: damage.blocks.len() as u64,
            damaged: damage.blocks.iter().take(NAMED).map(|bad| name(bad, cluster)).collect(),
        }
    }
}

fn name(bad: &BadBlock, cluster: &ClusterState) -> DamagedBlock {
    let LayerKey { object, layer } = bad.key;
    DamagedBlock {
        volume: cluster.volumes.get(&object.volume).map(|volume| volume.spec.name.clone()),
        volume_id: object.volume.0,
        offset: u64::from(object.index.0) * OBJECT_SIZE + u64::from(bad.block) * BLOCK_SIZE as u64,
        layer: layer.0,
    }
}

impl Shared {
    fn run(&self, number: u64) {
        // What was read last, and when that began: the next read waits for the rate.
        let (mut begin, mut cost) = (Instant::now(), 0);
        while let Some((after, due)) = self.wait(number, begin, cost) {
            begin = due.max(Instant::now());
            let Some(key) = self.disk.store.next_layer(after) else {
                return self.finish(number);
            };
            let layer = self.disk.store.scrub_layer(key);
            // An empty layer costs something, too.
            cost = (u64::from(layer.blocks) + 1) * BLOCK_SIZE as u64;
            self.count(number, key, &layer);
        }
    }

    /// Waits until `cost` bytes since `begin` are no more than the rate allows; gives the layer to
    /// go on after and when that was. `None` if this thread has to end.
    fn wait(&self, number: u64, begin: Instant, cost: u64) -> Option<(Option<LayerKey>, Instant)> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped || state.phase != ScrubState::Running || state.thread != number {
                return None;
            }
            let due = begin + Duration::from_secs_f64(cost as f64 / state.rate as f64);
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Some((state.progress.after, due));
            }
            let woken = self.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn count(&self, number: u64, key: LayerKey, layer: &ScrubbedLayer) {
        for block in &layer.bad {
            tracing::error!(disk = %self.disk.id, layer = %key, block, "scrub: a damaged block");
        }
        let mut state = lock(&self.state);
        // If it was paused and started again meanwhile, another thread reads this layer again.
        if state.thread == number {
            state.progress.after = Some(key);
            state.progress.blocks += u64::from(layer.blocks);
            state.progress.bad += layer.bad.len() as u64;
        }
    }

    fn finish(&self, number: u64) {
        let mut state = lock(&self.state);
        if state.thread != number || state.phase == ScrubState::Idle {
            return;
        }
        let result = ScrubResult {
            started_at: state.progress.started_at,
            finished_at: now(),
            bytes: state.progress.blocks * BLOCK_SIZE as u64,
            found: state.progress.bad,
        };
        let (bytes, damaged) = (result.bytes, result.found);
        tracing::info!(disk = %self.disk.id, bytes, damaged, "scrubbed");
        state.last = Some(result);
        state.phase = ScrubState::Idle;
    }
}

#[cfg(test)]
mod tests;
