//! The scripts in `scenarios/`, each a test. `scripts/simulate --scenario FILE --trace` shows one.

#![allow(clippy::unwrap_used)] // helpers of tests

mod sim;

use sim::scenario::{self, Error};
use sim::world::Options;

/// A script has to hold whatever the network's delays are.
const SEEDS: u64 = 10;

fn run(name: &str) {
    let path = format!("{}/tests/scenarios/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap();
    for seed in 1..=SEEDS {
        match scenario::run(&text, Options { trace: true, ..Options::seed(seed) }) {
            Ok(_) => {}
            Err(Error::Syntax(problem)) => panic!("{name}: {problem}"),
            Err(Error::Run(failure)) => {
                let skip = failure.trace.len().saturating_sub(40);
                let tail = failure.trace[skip..].join("\n");
                panic!("{name}, seed {seed}: {}\n{tail}", failure.problem);
            }
        }
    }
}

macro_rules! scripts {
    ($($name:ident,)*) => {
        $(#[test] fn $name() { run(stringify!($name)); })*

        #[test]
        fn every_script_is_a_test() {
            let tests = [$(stringify!($name)),*];
            let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios");
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_stem().unwrap().to_str().unwrap();
                let is_script = path.extension().is_some_and(|e| e == "txt");
                assert!(!is_script || tests.contains(&name), "{name} is not listed here");
            }
        }
    };
}

scripts! {
    asymmetric_cut,
    deaf_gateway,
    deleted_while_away,
    fewer_zones_than_copies,
    frozen_gateway,
    full_disk,
    given_up,
    join_storm,
    leader_cut_off,
    lonely_survivor,
    move_to_a_full_disk,
    only_one_knows,
    partition_heals,
    power_loss_order_123,
    power_loss_order_213,
    power_loss_order_321,
    rolling_restart,
    takeover,
    three_blackouts,
    two_nodes_restart,
    wrong_epoch,
}
