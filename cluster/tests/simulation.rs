//! Whole clusters under random faults, from seeds: `SEED=n` replays one, `SEEDS=n` runs so many
//! from `FIRST=n` on, `TRACE=1` prints what happens. `scripts/simulate` does the same by hand.

#![allow(clippy::unwrap_used)] // helpers of tests

mod sim;

use sim::cli::{run_seed, run_seeds};
use sim::scenario;
use sim::world::{Mutant, Options, run};

const DEFAULT_SEEDS: u64 = 100;
/// Seeds within which a mutant has to be found.
const MUTANT_SEEDS: u64 = 2000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

fn seeds() -> std::ops::Range<u64> {
    match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("FIRST").unwrap_or(1);
            first..first + number("SEEDS").unwrap_or(DEFAULT_SEEDS)
        }
    }
}

#[test]
fn guests_see_nothing_but_what_they_wrote() {
    let live = number("TRACE").is_some();
    let threads = if live { 1 } else { 2 };
    let summary = run_seeds(seeds(), Options { live, ..Options::seed(0) }, threads, false);
    println!("{:?}", summary.stats);
    let failures: Vec<String> =
        summary.failures.iter().map(|(seed, problem)| format!("seed {seed}: {problem}")).collect();
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn a_seed_is_the_same_run_again() {
    for seed in 1..=3 {
        let options = Options { trace: true, ..Options::seed(seed) };
        let (_, first) = run(options).unwrap();
        let (_, second) = run(options).unwrap();
        assert!(first.len() > 300, "{}", first.len());
        for (a, b) in first.iter().zip(&second) {
            assert_eq!(a, b);
        }
        assert_eq!(first.len(), second.len());
    }
}

/// The number of seeds until the simulator finds `mutant`.
fn find(mutant: Mutant) -> u64 {
    for seed in 1..=MUTANT_SEEDS {
        if let Err(failure) = run_seed(Options { mutant, ..Options::seed(seed) }) {
            println!("{mutant:?} found by seed {seed}: {}", failure.problem);
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

/// Random faults find it, but one in a thousand: fencing and versions catch most of what it lets pass.
#[test]
fn a_replica_that_ignores_epochs_is_found() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios/deaf_gateway.txt");
    let script = std::fs::read_to_string(path).unwrap();
    for seed in 1..=10 {
        let broken = Options { mutant: Mutant::SkipEpoch, ..Options::seed(seed) };
        let outcome = scenario::run(&script, broken);
        assert!(matches!(outcome, Err(scenario::Error::Run(_))), "seed {seed}: {outcome:?}");
    }
}

finds! {
    a_replica_that_ignores_the_version_before_is_found: SkipPrev,
    a_replica_that_acknowledges_what_it_drops_is_found: AckBeforeApply,
    a_disk_that_lies_about_flushes_is_found: FlushLies,
    a_replica_that_serves_old_writers_is_found: NotFenced,
    a_recovery_that_copies_nothing_is_found: RecoverNothing,
    a_sync_that_copies_nothing_is_found: SyncNothing,
    a_replica_that_ignores_checksums_is_found: ReadDamaged,
    a_node_that_serves_without_a_lease_is_found: NoSelfFence,
    a_gateway_that_believes_incomplete_replicas_is_found: ServeIncomplete,
    a_node_that_forgets_a_delete_is_found: ForgetDelete,
    a_write_that_counts_too_early_is_found: AckAtMinCopies,
    a_placement_that_counts_too_early_is_found: PromoteEarly,
    a_sync_that_is_not_flushed_is_found: SyncedWithoutFlush,
}
