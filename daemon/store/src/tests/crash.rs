//! I3, I5, I6, I9 across crashes: after each, the store is as it was after one of the changes
//! since the last flush, no older, and wholly.

use super::sim::SimMedium;
use super::support::{Model, Op, Rng, check_equal, new_sim, open_sim, seed};
use crate::engine::Engine;
use crate::error::WriteError;

/// What may be found after a crash: the states since the last flush, oldest first.
struct History {
    states: Vec<Model>,
}

impl History {
    fn now(&self) -> &Model {
        self.states.last().unwrap()
    }

    fn flushed(&mut self) {
        self.states.drain(..self.states.len() - 1);
    }

    /// Finds the state of `engine` and goes on from there.
    fn recover(&mut self, engine: &Engine) {
        let equal = |model: &Model| check_equal(engine, model);
        let found = self.states.iter().rposition(|model| equal(model).is_ok());
        let Some(found) = found else {
            let errors: Vec<_> =
                self.states.iter().map(|model| equal(model).unwrap_err()).collect();
            panic!("no state since the last flush fits: {errors:#?}");
        };
        // It was found on the medium and made durable by opening.
        let state = self.states.swap_remove(found);
        self.states = vec![state];
    }
}

/// Random changes, flushes and checkpoints until the power goes or `steps` are done.
fn run(engine: &Engine, medium: &SimMedium, history: &mut History, rng: &mut Rng, steps: u64) {
    for _ in 0..steps {
        match rng.below(100) {
            0..15 => {
                if engine.sync_log().is_ok() {
                    history.flushed();
                }
            }
            15..22 => {
                if engine.checkpoint().is_ok() {
                    history.flushed();
                }
            }
            _ => {
                let op = Op::random(rng, history.now(), 12);
                let mut next = history.now().clone();
                op.apply_to_model(&mut next);
                match op.apply_to_store(engine, history.now()) {
                    Ok(()) | Err(WriteError::Failed(_)) => history.states.push(next),
                    Err(error) => panic!("{op:?}: {error}"),
                }
            }
        }
        if !medium.has_power() {
            return;
        }
    }
}

fn one_history(seed: u64) {
    let mut rng = Rng(seed);
    let medium = SimMedium::default();
    let mut engine = new_sim(&medium);
    let mut history = History { states: vec![Model::new()] };
    for _ in 0..4 {
        if rng.chance(80) {
            let changes = rng.below(120);
            medium.set_fuse(changes);
        }
        let steps = 5 + rng.below(60);
        run(&engine, &medium, &mut history, &mut rng, steps);
        drop(engine);
        if medium.has_power() && rng.chance(30) {
            medium.kill();
            // Everything applied is there after the death of the process alone.
            let last = history.now().clone();
            engine = open_sim(&medium).unwrap();
            check_equal(&engine, &last).unwrap();
            history.flushed();
        } else {
            let keep = [0, 20, 50, 90, 100][rng.below(5) as usize];
            medium.lose_power(&mut rng, keep);
            engine = open_or_crash_again(&medium, &mut rng);
            history.recover(&engine);
        }
        if rng.chance(50) {
            drop(engine);
            engine = open_sim(&medium).unwrap();
            check_equal(&engine, history.now()).unwrap();
        }
    }
}

/// Opens after a power cut; sometimes the power goes again meanwhile.
fn open_or_crash_again(medium: &SimMedium, rng: &mut Rng) -> Engine {
    if rng.chance(30) {
        medium.set_fuse(rng.below(6));
        let opened = open_sim(medium);
        drop(opened);
        medium.lose_power(rng, 50);
    }
    open_sim(medium).unwrap()
}

#[test]
fn i3_i5_i6_i9_power_cuts_leave_a_state_since_the_last_flush() {
    let first = seed();
    // Unoptimised code runs a tenth of what optimised code does in the same time.
    let usual = if cfg!(debug_assertions) { 200 } else { 2000 };
    let count = std::env::var("HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(usual);
    for seed in (0..count).map(|n: u64| first.wrapping_add(n)) {
        let result = std::panic::catch_unwind(|| one_history(seed));
        if let Err(panic) = result {
            println!("failed with SEED={seed} HISTORIES=1");
            std::panic::resume_unwind(panic);
        }
    }
}
