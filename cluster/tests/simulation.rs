//! Whole clusters under random faults, from seeds: `SEED=n` replays one, `SEEDS=n` runs so many.

mod sim;

use sim::{Mutant, Options, Stats, run};

const DEFAULT_SEEDS: u64 = 60;

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("FIRST").unwrap_or(1);
            first..first + number("SEEDS").unwrap_or(default)
        }
    }
}

#[test]
fn guests_see_nothing_but_what_they_wrote() {
    let mut total = Stats::default();
    let mut failures = Vec::new();
    for seed in seeds(DEFAULT_SEEDS) {
        match run(Options { seed, mutant: Mutant::None }) {
            Ok(stats) => {
                total.steps += stats.steps;
                total.requests += stats.requests;
                total.epochs += stats.epochs;
                total.crashes += stats.crashes;
                total.takeovers += stats.takeovers;
                total.recovered += stats.recovered;
            }
            Err(problem) => failures.push(format!("seed {seed}: {problem}")),
        }
    }
    println!("{total:?}");
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}
