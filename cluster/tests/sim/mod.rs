//! A simulated cluster: real state machine, views, gateways, admission and resync planning;
//! everything else (log delivery, network, disks, crashes, the guest) is made here from one seed.

pub mod checker;
mod faults;
mod guest;
mod net;
pub mod rng;
mod store;
mod sync;
mod world;

pub use world::{Mutant, Options, Stats, run};
