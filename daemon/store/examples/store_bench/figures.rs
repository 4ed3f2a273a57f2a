//! What is measured, and how it is printed.

use std::fmt;

use rustix::time::{ClockId, clock_gettime};

fn micros(clock: ClockId) -> f64 {
    let now = clock_gettime(clock);
    now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
}

/// CPU time of this process so far, all its threads, user and system, in µs.
pub(crate) fn process_cpu() -> f64 {
    micros(ClockId::ProcessCPUTime)
}

/// CPU time of the calling thread so far in µs.
pub(crate) fn thread_cpu() -> f64 {
    micros(ClockId::ThreadCPUTime)
}

/// Resident memory of this process that is no file's, in bytes.
pub(crate) fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or(f64::NAN) * 1024.0
}

/// Named numbers; displayed as a JSON object on one line.
#[derive(Default)]
pub(crate) struct Figures(Vec<(&'static str, String)>);

impl Figures {
    pub(crate) fn set(&mut self, name: &'static str, value: f64) {
        self.0.push((name, number(value)));
    }

    pub(crate) fn list(&mut self, name: &'static str, values: &[f64]) {
        let values: Vec<_> = values.iter().map(|value| number(*value)).collect();
        self.0.push((name, format!("[{}]", values.join(", "))));
    }
}

fn number(value: f64) -> String {
    // JSON has no NaN and no infinity.
    if value.is_finite() { format!("{value:.6}") } else { "null".into() }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields: Vec<_> =
            self.0.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
        write!(f, "{{{}}}", fields.join(", "))
    }
}

/// The middle value; NaN of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
