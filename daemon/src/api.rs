//! The administration interface: what `dog` asks a `sheep`, as JSON over the node's port.
//!
//! The texts of `--json` are these types; `docs/protocol.md` documents them. Fields may be added,
//! none is removed or changes its meaning.

use serde::{Deserialize, Serialize};
pub use sheepdog_cluster::command::Ack;

/// A question or order to one node; it speaks for the whole cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// [`ClusterInfo`].
    ClusterInfo,
    /// [`Health`].
    ClusterHealth,
    /// A list of [`NodeInfo`].
    NodeList,
    /// Answers [`VolumeInfo`].
    VolumeCreate {
        /// Its name.
        name: String,
        /// Bytes.
        size: u64,
        /// Replicas; 3 when absent.
        copies: Option<u8>,
        /// Fewest replicas with which I/O goes on; by default 2 of 3, 1 of 1 or 2.
        min_copies: Option<u8>,
        /// When writes are acknowledged.
        #[serde(default)]
        ack: Ack,
    },
    /// A list of [`VolumeInfo`].
    VolumeList,
    /// [`VolumeInfo`].
    VolumeInfo {
        /// Its name.
        name: String,
    },
    /// Answers null.
    VolumeDelete {
        /// Its name.
        name: String,
    },
    /// Attaches the volume to this node and serves it; answers [`ExportInfo`].
    ExportAdd {
        /// The volume.
        volume: String,
        /// How.
        protocol: Protocol,
        /// Absolute path of the socket, or `IP:PORT` (NBD only).
        address: String,
    },
    /// The exports of this node, a list of [`ExportInfo`].
    ExportList,
    /// Stops exports of this node; answers the list of [`ExportInfo`] that were removed.
    ExportRemove {
        /// The volume.
        volume: String,
        /// Only this protocol.
        protocol: Option<Protocol>,
        /// Only this address.
        address: Option<String>,
    },
}

/// How an export is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// NBD over a Unix or TCP socket.
    Nbd,
    /// vhost-user-blk over a Unix socket.
    VhostUser,
}

/// An answer: `{"ok": …}` or `{"error": "…"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// What was asked for.
    Ok(serde_json::Value),
    /// What happened, whether something was changed, and what to do.
    Error(String),
}

/// The cluster in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Id of the cluster.
    pub cluster: String,
    /// Release of the node that answers.
    pub version: String,
    /// Current epoch.
    pub epoch: u64,
    /// Address of the leader of the cluster log, if this node knows one.
    pub leader: Option<String>,
    /// Addresses of the voters of the cluster log.
    pub voters: Vec<String>,
    /// Members, up or not.
    pub nodes: usize,
    /// Members that are up.
    pub nodes_up: usize,
    /// Volumes.
    pub volumes: usize,
    /// Past epochs, newest first, at most 100.
    pub epochs: Vec<EpochInfo>,
}

/// A past epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochInfo {
    /// Its number.
    pub epoch: u64,
    /// Seconds since 1970.
    pub at: u64,
    /// What happened.
    pub cause: String,
}

/// How the cluster is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The worst of what follows.
    pub status: Status,
    /// Current epoch.
    pub epoch: u64,
    /// The slots of all volumes.
    pub slots: SlotCounts,
    /// Why it is not ok, and for whom it waits; empty when it is.
    pub reasons: Vec<String>,
}

/// The state of the cluster in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// All replicas of everything are there.
    Ok,
    /// All I/O goes on, with fewer replicas than wanted somewhere.
    Degraded,
    /// Some I/O waits.
    Unavailable,
}

/// Slots by their state; `complete + degraded + waiting = total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotCounts {
    /// All.
    pub total: usize,
    /// With all replicas up and complete.
    pub complete: usize,
    /// Serving, with fewer replicas.
    pub degraded: usize,
    /// Not serving.
    pub waiting: usize,
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its id.
    pub id: String,
    /// `IP:PORT`.
    pub address: String,
    /// Failure zone.
    pub zone: String,
    /// `up` or `down`.
    pub state: String,
    /// Its disks.
    pub disks: Vec<DiskInfo>,
}

/// A disk of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its id.
    pub id: String,
    /// Where it is; absent while its node does not answer.
    pub path: Option<String>,
    /// Bytes that it can hold; absent while its node does not answer.
    pub capacity: Option<u64>,
    /// Bytes of data blocks; absent while its node does not answer.
    pub used: Option<u64>,
    /// It holds everything that it must hold; otherwise it is being synchronised.
    pub complete: bool,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its name.
    pub name: String,
    /// Its id, never used again.
    pub id: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes of data blocks, each counted once; absent while a node that knows does not answer.
    pub used: Option<u64>,
    /// Replicas of each object.
    pub copies: u8,
    /// Fewest replicas with which I/O goes on.
    pub min_copies: u8,
    /// When writes are acknowledged: `flush` or `commit`.
    pub ack: Ack,
    /// Address of the gateway that has it.
    pub attached_to: Option<String>,
    /// Writer generation: how many times it was attached.
    pub writer: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// Volume and snapshot it was cloned from.
    pub parent: Option<String>,
    /// Its snapshots.
    pub snapshots: Vec<SnapshotInfo>,
}

/// A snapshot of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its name.
    pub tag: String,
    /// Seconds since 1970.
    pub created: u64,
}

/// An export of the node that answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportInfo {
    /// The volume.
    pub volume: String,
    /// How it is served.
    pub protocol: Protocol,
    /// Path of the socket or `IP:PORT`.
    pub address: String,
    /// Clients connected now.
    pub clients: usize,
    /// `serving`, or why not.
    pub state: String,
}
