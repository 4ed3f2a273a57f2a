//! The shell around the cluster core: sockets, threads, the cluster log driver, exports and the
//! administration interface. The binaries `sheep` and `dog` are thin covers of this library.
//!
//! Data goes over plain threads ([`duplex`], [`peers`], [`serve`], [`volume`]): a request is worked
//! on by the thread that brings it. Control goes over tokio tasks ([`listener`], [`tasks`],
//! [`leader`], [`admin`]).

#![forbid(unsafe_code)]

pub mod admin;
pub mod api;
pub mod cluster;
pub mod control;
pub mod dir;
pub mod duplex;
pub mod exports;
pub mod incompatible;
pub mod leader;
pub mod listener;
pub mod liveness;
pub mod membership;
pub mod node;
pub mod peers;
pub mod pool;
pub mod recovery;
pub mod replica;
pub mod scrub;
pub mod seat;
pub mod serve;
pub mod tasks;
pub mod volume;
pub mod wire;
