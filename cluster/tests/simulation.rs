//! Whole clusters under random faults, from seeds: `SEED=n` replays one, `SEEDS=n` runs so many
//! from that one on, `TRACE=1` prints what happens. `scripts/simulate` does the same by hand.

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
    let (first, usual) = number("SEED").map_or((1, DEFAULT_SEEDS), |seed| (seed, 1));
    first..first + number("SEEDS").unwrap_or(usual)
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

/// Random faults seldom find these: it takes what the scripts tell. Gives how many of 10 runs find it.
fn found_by(script: &str, mutant: Mutant) -> usize {
    let path = format!("{}/tests/scenarios/{script}.txt", env!("CARGO_MANIFEST_DIR"));
    let script = std::fs::read_to_string(path).unwrap();
    let outcome = |seed| scenario::run(&script, Options { mutant, ..Options::seed(seed) });
    (1..=10).filter(|seed| matches!(outcome(*seed), Err(scenario::Error::Run(_)))).count()
}

fn is_found_by(script: &str, mutant: Mutant) {
    assert_eq!(found_by(script, mutant), 10);
}

#[test]
fn a_replica_that_ignores_epochs_is_found() {
    is_found_by("deaf_gateway", Mutant::SkipEpoch);
}

#[test]
fn a_leader_that_forgets_leases_is_found() {
    is_found_by("leader_cut_off", Mutant::ForgetLeases);
}

#[test]
fn a_takeover_that_leaves_unused_objects_different_is_found() {
    // Sometimes the replica that the writes did not reach leaves the cluster at once, and comes back equal.
    let found = found_by("takeover", Mutant::NoReconcile);
    assert!(found >= 7, "{found}");
}

finds! {
    a_replica_that_ignores_the_version_before_is_found: SkipPrev,
    a_replica_that_acknowledges_what_it_drops_is_found: AckBeforeApply,
    a_disk_that_lies_about_flushes_is_found: FlushLies,
    a_replica_that_serves_old_writers_is_found: NotFenced,
    a_gateway_that_takes_what_was_in_flight_for_settled_is_found: WatermarkTooHigh,
    a_recovery_that_copies_nothing_is_found: RecoverNothing,
    a_sync_that_copies_nothing_is_found: SyncNothing,
    a_replica_that_ignores_checksums_is_found: ReadDamaged,
    a_node_that_serves_without_a_lease_is_found: NoSelfFence,
    a_gateway_that_believes_incomplete_replicas_is_found: ServeIncomplete,
    a_node_that_forgets_a_delete_is_found: ForgetDelete,
    a_write_that_counts_too_early_is_found: AckAtMinCopies,
    a_placement_that_counts_too_early_is_found: PromoteEarly,
    a_sync_that_is_not_flushed_is_found: SyncedWithoutFlush,
    a_fenced_gateway_that_answers_is_found: FencedAnswers,
}
