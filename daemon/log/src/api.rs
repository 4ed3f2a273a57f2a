//! The interfaces between the cluster log, what it drives and what drives it.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

/// A boxed future: keeps the interfaces usable as trait objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The replicated state machine that a driver feeds.
///
/// All calls come from one task at a time, and must neither block nor wait.
pub trait StateMachine: Send + Sync + 'static {
    /// Applies the command at `index` and returns the response for its proposer.
    ///
    /// Called in order of `index`, which has gaps (the driver keeps some entries for itself),
    /// and exactly once per index since the last [`StateMachine::restore`], or since the start
    /// of the process if there was none. It must be deterministic: all that it may depend on is
    /// the state and its arguments. A command it dislikes is answered with a response that says
    /// so; it is part of the log all the same.
    ///
    /// # Errors
    /// The command is not understood, although others may: this process is older than they are. The
    /// state must be as before; the driver stops, as it can no longer follow the log.
    fn apply(&self, index: u64, command: &[u8]) -> Result<Vec<u8>, String>;

    /// Whether a command may enter the log. Asked on the leader, before it appends: what not all
    /// members understand must not get there.
    ///
    /// # Errors
    /// Why it is rejected, for people.
    fn check(&self, command: &[u8]) -> Result<(), String> {
        let _ = command;
        Ok(())
    }

    /// The whole state as bytes, at most [`MAX_SNAPSHOT`](crate::MAX_SNAPSHOT) of them.
    fn snapshot(&self) -> Vec<u8>;

    /// Replaces the whole state by that of `snapshot`.
    ///
    /// # Errors
    /// The snapshot cannot be read. The state must then be as before; the driver stops, as it
    /// can no longer follow the log.
    fn restore(&self, snapshot: &[u8]) -> Result<(), String>;
}

/// How a driver reaches the other members.
pub trait Transport: Send + Sync + 'static {
    /// Sends `request` to node `peer`, last known at `addr`, and returns what that node's
    /// `handle_rpc` answered. The caller drops the future when it has waited long enough.
    ///
    /// Requests and responses are at most [`MAX_FRAME`](crate::MAX_FRAME) bytes. The transport
    /// must not let a large frame (a snapshot) hold back the small ones for long: heartbeats
    /// behind it would time out and cost the leader its lease.
    fn call<'a>(
        &'a self,
        peer: u64,
        addr: &'a str,
        request: Vec<u8>,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>>;
}

/// Why a [`Transport::call`] brought no response.
///
/// The difference that matters is whether the request may have been handled: after `Refused` and
/// `Unreachable` it was certainly not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The peer's host refused the connection: nobody listens there. The request was not sent.
    #[error("connection refused")]
    Refused,
    /// No connection could be made. The request was not sent.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// No response came in time. The request may have been handled.
    #[error("timed out")]
    Timeout,
    /// The connection broke after the request was sent. The request may have been handled.
    #[error("connection lost: {0}")]
    Closed(String),
}

impl TransportError {
    /// Whether the request certainly did not reach the peer.
    pub fn is_not_sent(&self) -> bool {
        matches!(self, Self::Refused | Self::Unreachable(_))
    }
}

/// Why a proposal, or a change of the members, was not confirmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The request can never succeed. It was not committed; trying again does not help.
    #[error("rejected, nothing was changed: {0}")]
    Rejected(String),
    /// The command was not committed and never will be. It is safe to try again.
    #[error("not committed, safe to try again: {0}")]
    NotCommitted(String),
    /// The command may have been committed, or may be yet. Look at the state before trying
    /// again, or propose only commands that do no harm twice.
    #[error("may or may not have been committed: {0}")]
    Unknown(String),
    /// There was no leader with a quorum in reach in time. The command was not committed and
    /// never will be; it is safe to try again.
    #[error("no leader with a quorum in reach, nothing was changed: {0}")]
    Unavailable(String),
}

/// What a node knows of the log and its members at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogStatus {
    /// This node.
    pub id: u64,
    /// The leader that this node last knew of. It may be long gone: a node that is cut off
    /// keeps naming it.
    pub leader: Option<u64>,
    /// Whether this node believes itself to be the leader. A deposed leader that is cut off
    /// believes so for a while: see [`ClusterLog::is_confirmed_leader`].
    pub is_leader: bool,
    /// The current term. Each term has at most one leader.
    pub term: u64,
    /// Index of the last log entry that was applied here; 0 if none.
    pub last_applied: u64,
    /// Index of the last log entry that is stored here; 0 if none.
    pub last_log: u64,
    /// Index of the last log entry that the snapshot stored here covers; 0 if none.
    pub snapshot: u64,
    /// The members that vote.
    pub voters: BTreeSet<u64>,
    /// The members that receive the log and do not vote.
    pub learners: BTreeSet<u64>,
    /// Whether a change of the members is under way. While voters change, a quorum of the old
    /// *and* of the new ones is needed.
    pub is_changing: bool,
    /// The addresses of all members.
    pub addresses: BTreeMap<u64, String>,
    /// On a leader: the latest moment at which it sent what a quorum has since acknowledged. A
    /// change of only this field wakes no watcher.
    pub quorum_acked: Option<Instant>,
    /// Why the driver stopped for good, if it did: this node no longer takes part and must be
    /// restarted, after the cause (a full or failing disk, as a rule) is gone.
    pub failure: Option<String>,
}

impl LogStatus {
    /// How long ago a quorum last acknowledged this node as leader; `None` if it is not leader.
    ///
    /// The time counts from when the acknowledged message was *sent*, so it is safe to
    /// measure leases with.
    pub fn quorum_acked_within(&self) -> Option<Duration> {
        self.quorum_acked.map(|at| at.elapsed())
    }

    /// Whether `node` is a member, voting or not.
    pub fn is_member(&self, node: u64) -> bool {
        self.voters.contains(&node) || self.learners.contains(&node)
    }

    /// Whether both say the same, but for the time of the last acknowledgement.
    pub(crate) fn same_but_for_time(&self, other: &Self) -> bool {
        let mut other = other.clone();
        other.quorum_acked = self.quorum_acked;
        *self == other
    }
}

/// A driver of the cluster log.
///
/// Every call may be made on every member; what only the leader can do is forwarded to it.
pub trait ClusterLog: Send + Sync + 'static {
    /// Appends `command` to the log and returns the state machine's response to it, once a
    /// quorum has stored it and the leader has applied it. This node may apply it later.
    ///
    /// # Errors
    /// See [`ProposeError`], which says for each case whether the command may be committed.
    /// Dropping the future leaves that unknown.
    fn propose(&self, command: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, ProposeError>>;

    /// What this node knows at this moment.
    fn status(&self) -> LogStatus;

    /// A receiver that wakes at every change of the status (but for `quorum_acked`).
    fn watch(&self) -> tokio::sync::watch::Receiver<LogStatus>;

    /// Whether this node is leader and a quorum confirmed it so recently that no other node can
    /// have become leader since. Only such a node may decide about leases.
    fn is_confirmed_leader(&self) -> bool;

    /// How long ago this node last heard of a leader of a term before `term`, or was one; `None`
    /// while it may acknowledge one yet. So far back at most lies what a quorum with this node
    /// acknowledged such a leader.
    fn heard_before(&self, term: u64) -> Option<Duration>;

    /// Adds the node `id`, reachable at `addr`, to the members. It returns when the membership
    /// is committed; the node then receives the log, and becomes a voter, by itself, once it has
    /// caught up and while there are fewer voters than wanted. Adding a member again changes at
    /// most its address.
    ///
    /// # Errors
    /// See [`ProposeError`]. It is safe to repeat in every case.
    fn add_member(&self, id: u64, addr: String) -> BoxFuture<'_, Result<(), ProposeError>>;

    /// Removes the node `id` from the members for good. Removing what is not a member succeeds.
    ///
    /// # Errors
    /// See [`ProposeError`]; the last voter cannot be removed. It is safe to repeat.
    fn remove_member(&self, id: u64) -> BoxFuture<'_, Result<(), ProposeError>>;

    /// Tells all members that the member `id` is now reachable at `addr`.
    ///
    /// # Errors
    /// See [`ProposeError`]; `id` must be a member. It is safe to repeat.
    fn update_address(&self, id: u64, addr: String) -> BoxFuture<'_, Result<(), ProposeError>>;

    /// Tells the driver which nodes are up, most wanted as voters first, and which have been down
    /// for so long that nobody counts on their return. While this node leads, a voter that is not
    /// up is replaced by an up member that is caught up, in the background. Where there is none,
    /// the gone lose their votes as far as the rest can then bear more deaths; they get them back
    /// when they are up. On other nodes it has no effect until they lead.
    fn reconcile_members(&self, up: &[u64], gone: &[u64]);

    /// Tells the driver that the process of `leader` is known to be dead, so that another takes
    /// over at once instead of after [`Options::election_timeout`](crate::Options). To be called
    /// on every member that knows; it has an effect only where that node is the known leader,
    /// and there is one member that takes over.
    ///
    /// It must be certain: a refused connection from a live host, or a new incarnation. A leader
    /// wrongly declared dead is deposed, and its lease does not protect it. The log itself stays
    /// correct in any case.
    fn leader_died(&self, leader: u64) -> BoxFuture<'_, ()>;

    /// Before a planned [`shutdown`](ClusterLog::shutdown): a leader has another voter that has all
    /// entries take over, so that nobody has to notice that it is gone. Returns when another leads, when
    /// there is nobody to, or after [`Options::election_timeout`](crate::Options): then the others elect
    /// one as after a death. This node proposes nothing any more meanwhile.
    fn hand_over(&self) -> BoxFuture<'_, ()>;

    /// Stops taking part and releases the files. Calls made afterwards fail.
    fn shutdown(&self) -> BoxFuture<'_, ()>;
}
