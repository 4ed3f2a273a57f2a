//! The cluster as plain state machines: placement, membership and epochs, the write path of a
//! volume, the checks of a replica, and recovery.
//!
//! Nothing here does I/O, reads a clock or draws random numbers. Events go in through `handle_*`
//! methods; what has to be done comes out, in order, through `poll_effect`. One process can
//! therefore run many simulated nodes deterministically.

#![forbid(unsafe_code)]

pub mod command;
pub mod gateway;
pub mod history;
pub mod liveness;
pub mod message;
pub mod recovery;
pub mod replica;
pub mod ring;
pub mod settings;
pub mod slab;
pub mod state;
pub mod view;
