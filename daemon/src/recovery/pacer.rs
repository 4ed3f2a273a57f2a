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
//!
//! A node that gives data to the recovery of another one does so at the same pace ([`Pacer::give`]):
//! its volumes feel it as much, and the recovering node, which may have none, cannot know.

use crate::cluster::lock;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
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
/// Clients without a request for so long are not busy.
const CALM: Duration = Duration::from_millis(200);
/// What a node gives keeps the one that gets it busy for some time, which volumes feel too, since they write to
/// both: as long as the giving, so many times, belongs to the step.
const SETTLING: u32 = 3;
/// At most so long.
const MAX_SETTLING: Duration = Duration::from_millis(100);
/// Longest that a node which asks for data is kept waiting; it gives up after a few times that.
const MAX_WAIT: Duration = Duration::from_secs(2);

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
    /// When clients were last known to be busy.
    busy_at: Option<Instant>,
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
            busy_at: None,
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
        self.begin_by(now, None)
    }

    /// The same, but the pause ends at `latest`.
    fn begin_by(&self, now: Instant, latest: Option<Instant>) -> Option<Duration> {
        let mut state = lock(&self.state);
        let resume_at = latest.map_or(state.resume_at, |latest| latest.min(state.resume_at));
        if now < resume_at {
            return Some(resume_at - now);
        }
        let clients = self.clients.read();
        state.look(now, clients);
        if state.running == 0 {
            let (busy, ended) = state.since(clients);
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
        state.look(now, clients);
        if state.running == 0 {
            let (busy, ended) = state.since(clients);
            if state.during_steps.add(busy, ended) {
                state.adapt();
            }
        }
        if state.is_busy(now) {
            let pause = time.mul_f64(state.pause).min(MAX_SLEEP);
            state.resume_at = state.resume_at.max(now) + pause;
        }
    }

    /// Gives data to the recovery of another node, which asked for it at `asked`: blocks the calling
    /// thread for the pauses before and what belongs to the step after.
    pub fn give(&self, asked: Instant, step: impl FnOnce()) {
        while let Some(pause) = self.begin_by(Instant::now(), Some(asked + MAX_WAIT)) {
            thread::sleep(pause);
        }
        let began = Instant::now();
        step();
        thread::sleep(self.settling(Instant::now(), began.elapsed()));
        self.end(Instant::now(), began.elapsed());
    }

    /// How long the step of a node that gave for `time` goes on.
    fn settling(&self, now: Instant, time: Duration) -> Duration {
        let mut state = lock(&self.state);
        state.look(now, self.clients.read());
        if state.is_busy(now) { (time * SETTLING).min(MAX_SETTLING) } else { Duration::ZERO }
    }
}

impl State {
    /// What happened since the last call: nanoseconds in progress, requests that ended.
    fn since(&mut self, clients: (u64, u64)) -> (u64, u64) {
        let before = std::mem::replace(&mut self.seen, clients);
        (clients.0.saturating_sub(before.0), clients.1.saturating_sub(before.1))
    }

    fn look(&mut self, now: Instant, clients: (u64, u64)) {
        if clients != self.seen {
            self.busy_at = Some(now);
        }
    }

    fn is_busy(&self, now: Instant) -> bool {
        self.busy_at.is_some_and(|at| now.saturating_duration_since(at) < CALM)
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

    #[test]
    fn whoever_asks_does_not_wait_for_ever() {
        let clients = Arc::new(Clients::default());
        let pacer = Pacer::new(Arc::clone(&clients));
        let asked = Instant::now();
        lock(&pacer.state).resume_at = asked + 10 * MAX_WAIT;
        assert_eq!(pacer.begin(asked), Some(10 * MAX_WAIT));
        assert_eq!(pacer.begin_by(asked, Some(asked + MAX_WAIT)), Some(MAX_WAIT));
        assert_eq!(pacer.begin_by(asked + MAX_WAIT, Some(asked + MAX_WAIT)), None);
    }

    #[test]
    fn what_was_given_is_felt_for_longer_if_anybody_is_there() {
        let clients = Arc::new(Clients::default());
        let pacer = Pacer::new(Arc::clone(&clients));
        let (now, time) = (Instant::now(), Duration::from_millis(2));
        assert_eq!(pacer.settling(now, time), Duration::ZERO);
        clients.note(1, Duration::from_millis(1), 1);
        assert_eq!(pacer.settling(now, time), SETTLING * time);
        assert_eq!(pacer.settling(now, MAX_SETTLING), MAX_SETTLING);
        // A slow request that ends in none of the steps still counts.
        assert_eq!(pacer.begin(now), None);
        assert_eq!(pacer.settling(now + CALM / 2, time), SETTLING * time);
        assert_eq!(pacer.settling(now + CALM, time), Duration::ZERO);
    }
}
