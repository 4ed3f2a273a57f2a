//! What can be set, and what can go wrong at the start.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use openraft::{Config, SnapshotPolicy};

use super::db::FORMAT;

/// The settings of a [`RaftLog`](super::RaftLog). All members should use the same.
#[derive(Debug, Clone)]
pub struct Options {
    /// How often the leader tells the others that it is there.
    pub heartbeat: Duration,
    /// A follower that heard nothing from a leader stands for election after a random time
    /// between these two. The first bounds how old a quorum's acknowledgement may be for
    /// [`is_confirmed_leader`](crate::ClusterLog::is_confirmed_leader), the second is how long a
    /// follower refuses its vote to others: their difference is what clocks may drift apart.
    pub election_timeout: (Duration, Duration),
    /// How long a proposal or a change of the members may take before it fails.
    pub propose_timeout: Duration,
    /// How long sending and installing a snapshot may take.
    pub snapshot_timeout: Duration,
    /// How many entries make a new snapshot.
    pub snapshot_every: u64,
    /// How many entries that a snapshot covers are kept all the same, for members that are only
    /// a little behind.
    pub keep_entries: u64,
    /// How many members vote, at most.
    pub max_voters: usize,
    /// How many proposals this node handles at a time; more of them wait.
    pub max_inflight: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_timeout: (Duration::from_millis(500), Duration::from_millis(1000)),
            propose_timeout: Duration::from_secs(5),
            snapshot_timeout: Duration::from_secs(30),
            snapshot_every: 1000,
            keep_entries: 1000,
            max_voters: 5,
            max_inflight: 64,
        }
    }
}

/// Settings that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cluster log options: {0}")]
pub struct OptionsError(String);

impl Options {
    /// Checks the options and translates them.
    pub(super) fn to_config(&self) -> Result<Config, OptionsError> {
        if self.max_voters == 0 || self.max_inflight == 0 || self.snapshot_every == 0 {
            return Err(OptionsError(
                "max_voters, max_inflight and snapshot_every must be at least 1".into(),
            ));
        }
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let config = Config {
            cluster_name: "sheepdog".into(),
            heartbeat_interval: millis(self.heartbeat).max(1),
            election_timeout_min: millis(self.election_timeout.0),
            election_timeout_max: millis(self.election_timeout.1),
            install_snapshot_timeout: millis(self.snapshot_timeout),
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_every),
            max_in_snapshot_log_to_keep: self.keep_entries,
            replication_lag_threshold: self.snapshot_every.saturating_add(self.keep_entries),
            max_payload_entries: 256,
            max_append_entries: Some(256),
            api_channel_size: Some(1024),
            notification_channel_size: Some(4096),
            // A node that was cut off must not depose the leader when it comes back.
            enable_pre_vote: Some(true),
            // A restarted leader must not lead on a promise that others no longer keep.
            enable_leader_restore: Some(false),
            backoff: "50ms 100ms 200ms ...500ms".into(),
            ..Config::default()
        };
        config.validate().map_err(|error| OptionsError(error.to_string()))
    }
}

/// Why a [`RaftLog`](super::RaftLog) could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The options contradict each other.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// Another process, or another part of this one, has the database open.
    #[error("{path} is in use by another process: is this node running already?")]
    Locked {
        /// The database file.
        path: PathBuf,
    },
    /// The database is damaged, or the file is no database. It was left as it is.
    #[error(
        "{path} is damaged or not a database ({why}): move it away and let this node join the \
         cluster again under a new id"
    )]
    Corrupt {
        /// The database file.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// The database is a sound one of another program or version. It was left as it is.
    #[error(
        "{path} was written by another release or program: it is a {found:?}, this release reads \
         {FORMAT:?}; use the release that wrote it, or a newer one (docs/upgrade.md)"
    )]
    Foreign {
        /// The database file.
        path: PathBuf,
        /// What was found where the format's name was expected.
        found: String,
    },
    /// The database belongs to another node. It was left as it is.
    #[error("{path} is the cluster log of node {found:#x}, but this is node {expected:#x}")]
    WrongNode {
        /// The database file.
        path: PathBuf,
        /// The node that it belongs to.
        found: u64,
        /// The node that was to be started.
        expected: u64,
    },
    /// The database could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The database file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// What the database holds cannot be used.
    #[error("{path}: cannot start the cluster log: {why}")]
    Start {
        /// The database file.
        path: PathBuf,
        /// What went wrong.
        why: String,
    },
}
