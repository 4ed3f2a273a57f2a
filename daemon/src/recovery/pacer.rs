//! How fast background recovery may go: as fast as clients do not feel it, and no faster than the
//! operator allows.
//!
//! After each step recovery pauses for a multiple of the time that the step took. While no volume of
//! this node has requests in progress, the multiple is 0. Otherwise it follows the measured latency of
//! the volumes' requests: the latency during steps is compared with that during pauses, and the
//! multiple grows while the first is much higher.
//!
//! Latencies come from Little's law: the time that requests spent in progress, summed over all of
//! them, divided by how many ended. That costs two counters, not a clock for each request.

use crate::cluster::lock;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Latency during steps, by the latency during pauses, above which pauses get longer.
const TOLERATED: f64 = 1.5;
/// How much longer or shorter.
const LONGER: f64 = 1.5;
const SHORTER: f64 = 0.9;
/// Longest pause: recovery goes on, if at a fortieth of its speed.
const MAX_PAUSE: f64 = 40.0;
/// Shortest pause while clients are busy: without any, there would be nothing to compare with.
const MIN_PAUSE: f64 = 0.2;
/// Longest single pause.
const MAX_SLEEP: Duration = Duration::from_secs(2);
/// Requests that make a measurement.
const SAMPLE: u64 = 8;

/// What the clients of this node have experienced since its start.
#[derive(Debug, Default)]
pub struct Clients {
    /// Nanoseconds that requests spent in progress.
    busy: AtomicU64,
    /// Requests that ended.
    ended: AtomicU64,
}

impl Clients {
    /// `requests` were in progress for `time`, and `ended` of them ended.
    pub fn note(&self, requests: u64, time: Duration, ended: u64) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.busy.fetch_add(nanos.saturating_mul(requests), Ordering::Relaxed);
        self.ended.fetch_add(ended, Ordering::Relaxed);
    }

    fn read(&self) -> (u64, u64) {
        (self.busy.load(Ordering::Relaxed), self.ended.load(Ordering::Relaxed))
    }
}

/// The latency of requests in one of two conditions, in nanoseconds.
#[derive(Debug, Default)]
struct Latency {
    mean: f64,
    busy: u64,
    ended: u64,
}

impl Latency {
    /// Adds what happened; true when that made a new measurement.
    fn add(&mut self, busy: u64, ended: u64) -> bool {
        self.busy += busy;
        self.ended += ended;
        if self.ended < SAMPLE {
            return false;
        }
        let latest = self.busy as f64 / self.ended as f64;
        self.mean = if self.mean == 0.0 { latest } else { 0.7 * self.mean + 0.3 * latest };
        (self.busy, self.ended) = (0, 0);
        true
    }
}

#[derive(Debug)]
struct State {
    running: u32,
    /// What clients had experienced when `running` last became 0 or 1.
    seen: (u64, u64),
    during_steps: Latency,
    during_pauses: Latency,
    pause: f64,
    resume_at: Instant,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Pacer {
    clients: std::sync::Arc<Clients>,
    state: Mutex<State>,
}

impl Pacer {
    /// A pacer that looks at these clients.
    #[must_use]
    pub fn new(clients: std::sync::Arc<Clients>) -> Self {
        let state = State {
            running: 0,
            seen: clients.read(),
            during_steps: Latency::default(),
            during_pauses: Latency::default(),
            pause: MIN_PAUSE,
            resume_at: Instant::now(),
        };
        Self { clients, state: Mutex::new(state) }
    }

    /// How long to wait before the next step may be asked for again; `None` when it begins now, and
    /// [`Pacer::end`] has to follow.
    pub fn begin(&self, now: Instant) -> Option<Duration> {
        let mut state = lock(&self.state);
        if now < state.resume_at {
            return Some(state.resume_at - now);
        }
        if state.running == 0 {
            let (busy, ended) = state.since(self.clients.read());
            let _ = state.during_pauses.add(busy, ended);
        }
        state.running += 1;
        None
    }

    /// A step that took `time` has ended.
    pub fn end(&self, now: Instant, time: Duration) {
        let mut state = lock(&self.state);
        state.running -= 1;
        let clients = self.clients.read();
        let idle = clients == state.seen;
        if state.running == 0 {
            let (busy, ended) = state.since(clients);
            if state.during_steps.add(busy, ended) {
                state.adapt();
            }
        }
        if !idle {
            let pause = time.mul_f64(state.pause).min(MAX_SLEEP);
            state.resume_at = state.resume_at.max(now) + pause;
        }
    }
}

impl State {
    /// What happened since the last call: nanoseconds in progress, requests that ended.
    fn since(&mut self, clients: (u64, u64)) -> (u64, u64) {
        let before = std::mem::replace(&mut self.seen, clients);
        (clients.0.saturating_sub(before.0), clients.1.saturating_sub(before.1))
    }

    fn adapt(&mut self) {
        if self.during_pauses.mean == 0.0 {
            return; // nothing to compare with yet
        }
        let felt = self.during_steps.mean > TOLERATED * self.during_pauses.mean;
        let factor = if felt { LONGER } else { SHORTER };
        self.pause = (self.pause * factor).clamp(MIN_PAUSE, MAX_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Runs steps of 10 ms whose clients have these latencies; gives the share of time in steps.
    fn run(during_steps: u64, during_pauses: u64) -> f64 {
        let clients = Arc::new(Clients::default());
        let pacer = Pacer::new(Arc::clone(&clients));
        let step = Duration::from_millis(10);
        let (mut now, mut stepping) = (Instant::now(), Duration::ZERO);
        let start = now;
        // Each millisecond eight requests end.
        let serve = |time: Duration, latency: u64| {
            let ended = 8 * time.as_millis() as u64;
            clients.note(1, Duration::from_micros(latency) * ended as u32, ended);
        };
        for _ in 0..300 {
            while let Some(pause) = pacer.begin(now) {
                serve(pause, during_pauses);
                now += pause;
            }
            serve(step, during_steps);
            now += step;
            stepping += step;
            pacer.end(now, step);
        }
        stepping.as_secs_f64() / (now - start).as_secs_f64()
    }

    #[test]
    fn recovery_yields_to_clients_that_feel_it_and_only_to_them() {
        let (felt, unfelt) = (run(1000, 200), run(220, 200));
        assert!(felt < 0.05, "{felt}");
        assert!(unfelt > 0.8, "{unfelt}");
        assert!(run(0, 0) > 0.8);
    }

    #[test]
    fn without_clients_there_are_no_pauses() {
        let pacer = Pacer::new(Arc::default());
        let now = Instant::now();
        for _ in 0..100 {
            assert_eq!(pacer.begin(now), None);
            pacer.end(now, Duration::from_secs(1));
        }
    }
}
