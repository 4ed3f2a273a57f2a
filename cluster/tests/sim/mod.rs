//! A simulated cluster. Real are the agreed state, views, gateways, admission and the plan of a
//! synchronisation; everything else (time, the log's delivery, leases, network, disks, crashes,
//! guests) is made here from one seed. A step is 10 ms.

#![allow(dead_code)] // each of the tests and the command uses a part

#[macro_use]
mod trace;
pub mod checker;
pub mod cli;
mod faults;
mod gateways;
mod guest;
mod log;
mod migration;
mod net;
mod node;
pub mod rng;
pub mod scenario;
mod serve;
mod store;
mod sync;
pub mod topology;
pub mod world;
