//! An NBD server for anything that implements [`sheepdog_types::Block`].
//!
//! [`machine`] is the protocol without sockets: bytes in, events and bytes out. [`Server`] runs it
//! over Unix and TCP sockets with one thread per connection, and completions are written to the
//! socket by whichever thread completes them.
//!
//! ```text
//!  client ─ socket ─► connection thread ─ machine ─ Block::submit(batch) ─► device
//!    ▲                                                                        │
//!    └────────── outbox (one sendmsg per burst) ◄── Sink::complete, flush ────┘
//! ```
//!
//! Bounds per connection are in [`Limits`]; past them a connection is no longer read from, so the
//! client waits. What is and is not implemented of the protocol is in `docs/nbd-conformance.md`.

#![forbid(unsafe_code)]

mod connection;
mod exports;
mod listener;
pub mod machine;
mod outbox;
mod server;

pub use exports::{Exports, OpenError};
pub use listener::{Address, Listener};
pub use server::{Limits, Server, ServerHandle};
