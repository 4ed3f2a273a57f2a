//! The cluster log: an agreed, totally ordered sequence of small commands that every node of a
//! cluster applies to the same state machine.
//!
//! Three interfaces meet here, and none of them knows what a command means: commands, responses
//! and snapshots are opaque bytes.
//!
//! - [`StateMachine`] is what the log drives. The daemon implements it over a pure state.
//! - [`Transport`] is what the log sends with. The daemon implements it over its one TCP port,
//!   and hands what arrives to [`RaftLog::handle_rpc`].
//! - [`ClusterLog`] is what the daemon drives. It is the interface of a *driver*; [`RaftLog`] is
//!   the embedded one, Raft over a small database in the node's directory.
//!
//! # Life of a command
//!
//! ```text
//! propose ─► leader known? ─ self ─► append (fsync) ─► quorum has it ─► apply ─► response
//!                │                                                       (on every member)
//!                └─ other member ─► Transport::call ─► its handle_rpc ─► the same
//! ```
//!
//! # What is promised
//!
//! - A command whose `propose` returned `Ok` is on the disks of a majority of the voters, and
//!   every member applies it, at the same index, after the same predecessors.
//! - Votes and log entries are synced before they are answered for.
//! - A node that was restarted does not vote, and does not stand for election, for one full
//!   leader lease ([`Options::election_timeout`]'s upper bound): the promise it made to a leader
//!   before the restart is kept although it was only in memory.
//! - Memory is bounded: commands by [`MAX_COMMAND`], proposals in flight by
//!   [`Options::max_inflight`], frames by [`MAX_FRAME`], snapshots by [`MAX_SNAPSHOT`].
//!
//! # Logging
//!
//! The Raft library reports each state change at `info` through `tracing`, which is noise to an
//! operator. Use a filter such as `info,openraft=warn`; this crate says what matters itself.

mod api;
mod raft;

pub use api::{
    BoxFuture, ClusterLog, LogStatus, ProposeError, StateMachine, Transport, TransportError,
};
pub use raft::{
    MAX_COMMAND, MAX_FRAME, MAX_SNAPSHOT, OpenError, Options, OptionsError, RaftLog, RpcError,
};
