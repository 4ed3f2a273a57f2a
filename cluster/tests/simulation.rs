//! Whole clusters under random faults, from seeds: `SEED=n` replays one, `SEEDS=n` runs so many
//! from `FIRST=n` on, `TRACE=1` prints every message.

#![allow(clippy::unwrap_used)] // helpers of tests

mod sim;

use sim::{Mutant, Options, Stats, run};
use std::panic::catch_unwind;

const DEFAULT_SEEDS: u64 = 250;
/// Seeds within which a mutant has to be found.
const MUTANT_SEEDS: u64 = 800;

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

/// The number of seeds until the simulator finds `mutant`.
fn find(mutant: Mutant) -> u64 {
    for seed in 1..=MUTANT_SEEDS {
        let outcome = catch_unwind(|| run(Options { seed, mutant }));
        if !matches!(outcome, Ok(Ok(_))) {
            println!("{mutant:?} found by seed {seed}: {outcome:?}");
            return seed;
        }
    }
    panic!("{MUTANT_SEEDS} seeds did not find {mutant:?}");
}

macro_rules! finds {
    ($($name:ident: $mutant:ident,)*) => {
        $(#[test] fn $name() { find(Mutant::$mutant); })*
    };
}

finds! {
    a_replica_that_ignores_epochs_is_found: SkipEpoch,
    a_replica_that_ignores_the_version_before_is_found: SkipPrev,
    a_replica_that_acknowledges_what_it_drops_is_found: AckBeforeApply,
    a_disk_that_lies_about_flushes_is_found: FlushLies,
    a_replica_that_serves_old_writers_is_found: NotFenced,
    a_recovery_that_copies_nothing_is_found: RecoverNothing,
    a_sync_that_copies_nothing_is_found: SyncNothing,
    a_replica_that_ignores_checksums_is_found: ReadDamaged,
}
