//! The administration interface: what `dog` asks a `sheep`, as JSON over the node's port.
//!
//! The texts of `--json` are these types; `docs/protocol.md` documents them. Fields may be added,
//! none is removed or changes its meaning.

use serde::{Deserialize, Serialize};
pub use sheepdog_cluster::command::Ack;
use std::collections::BTreeMap;

/// A question or order to one node; it speaks for the whole cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// [`ClusterInfo`].
    ClusterInfo,
    /// [`Health`].
    ClusterHealth,
    /// A list of [`SettingInfo`].
    ClusterSettings {
        /// Only this one.
        name: Option<String>,
    },
    /// Changes a setting; answers a list of this one [`SettingInfo`].
    ClusterSet {
        /// Its name.
        name: String,
        /// Its new value.
        value: String,
    },
    /// What giving up disks that are down would lose: a [`RecoverPlan`]. Changes nothing.
    ClusterRecoverPlan {
        /// Nodes (address or id) and disks (id); all that are waited for when empty.
        targets: Vec<String>,
    },
    /// Gives up disks, if nothing has changed since the plan; answers null.
    ClusterRecover {
        /// Ids of the disks, from the plan.
        disks: Vec<String>,
        /// Epoch of the plan.
        epoch: u64,
    },
    /// A list of [`NodeInfo`].
    NodeList,
    /// Moves all data away from a node that stays up; answers its [`NodeInfo`].
    NodeDrain {
        /// Its address or id.
        node: String,
        /// Even if too few nodes stay for the copies that volumes want.
        #[serde(default)]
        force: bool,
    },
    /// Lets a drained node take data again; answers its [`NodeInfo`].
    NodeUndrain {
        /// Its address or id.
        node: String,
    },
    /// Ends the membership of a node for good; answers null.
    NodeRemove {
        /// Its address or id.
        node: String,
        /// Even if it has data, serves volumes, or others wait for it.
        #[serde(default)]
        force: bool,
    },
    /// Moves a node to another failure zone; answers its [`NodeInfo`].
    NodeSetZone {
        /// Its address or id.
        node: String,
        /// The zone.
        zone: String,
    },
    /// Changes a disk's share of the data; answers the [`NodeInfo`] of its node.
    NodeSetWeight {
        /// Id of the disk, or address or id of a node with one disk.
        target: String,
        /// The new share, as a rule GiB of capacity.
        weight: u64,
        /// Even if too few nodes stay for the copies that volumes want.
        #[serde(default)]
        force: bool,
    },
    /// Takes a disk into service on this node; answers a list of [`DiskInfo`].
    NodeDiskAdd {
        /// Absolute path of its directory.
        path: String,
        /// Share of the data; its capacity in GiB when absent.
        weight: Option<u64>,
    },
    /// Moves the data of a disk of this node away, then ends its membership; answers a list of
    /// [`DiskInfo`] with this disk.
    NodeDiskRemove {
        /// Its id or path.
        disk: String,
        /// Even if too few nodes stay for the copies that volumes want.
        #[serde(default)]
        force: bool,
    },
    /// A list of [`DiskInfo`]: the disks of this node.
    NodeDiskList,
    /// The background recovery of the whole cluster: [`Recovery`].
    NodeRecovery,
    /// Scrubs the disks of this node, or goes on with it; answers a list of [`ScrubInfo`].
    NodeScrubStart {
        /// Bytes per second of each disk; as before when absent.
        rate: Option<u64>,
    },
    /// A list of [`ScrubInfo`], one for each disk of this node.
    NodeScrubStatus,
    /// Pauses the scrubs that run on this node; answers a list of [`ScrubInfo`].
    NodeScrubPause,
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
    /// Ends the attachment of a volume; answers [`Detached`].
    VolumeDetach {
        /// Its name.
        name: String,
        /// Even if it has clients, or the node that has it does not answer: these get I/O errors.
        #[serde(default)]
        force: bool,
    },
    /// Ends the hand-over of a volume, so that the node that has it keeps it; answers [`VolumeInfo`].
    VolumeEndHandover {
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
        /// Leaves the volume where it is until a client needs it here: for the target of a migration.
        #[serde(default)]
        incoming: bool,
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
    /// What all members understand, see `docs/upgrade.md`.
    pub cluster_version: u8,
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
    /// Settings by name.
    pub settings: BTreeMap<String, String>,
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

/// A setting of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingInfo {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// The values that there are.
    pub values: String,
    /// What it means.
    pub meaning: String,
}

/// How a node takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// It serves.
    Up,
    /// It does not answer.
    Down,
    /// It has been down for so long that others take its place.
    Out,
    /// It serves, and its data move away.
    Draining,
    /// It is no member any more; remembered until its data are elsewhere.
    Removed,
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
    /// How it takes part.
    pub state: NodeState,
    /// It is draining, and none of its disks has to hold anything any more.
    pub drained: bool,
    /// Epoch in which it last entered the cluster: grows with each start.
    pub entered: u64,
    /// Newest cluster version that its release understands.
    pub cluster_version: u8,
    /// Its disks.
    pub disks: Vec<DiskInfo>,
}

/// How a disk takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// It serves.
    Up,
    /// Its node is down.
    Down,
    /// Its node is up, without it.
    Failed,
    /// It has been down or failed for so long that others take its place.
    Out,
    /// Its data move away, then it leaves the cluster.
    Leaving,
}

/// A disk of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its id.
    pub id: String,
    /// Where it is; absent while its node does not answer.
    pub path: Option<String>,
    /// How it takes part.
    pub state: DiskState,
    /// Its share of the data.
    pub weight: u64,
    /// Bytes that it can hold; absent while its node does not answer.
    pub capacity: Option<u64>,
    /// Bytes of data blocks; absent while its node does not answer.
    pub used: Option<u64>,
    /// It holds everything that it must hold; otherwise it is being synchronised.
    pub complete: bool,
    /// Why it is out of service, as far as its node knows.
    pub failure: Option<String>,
}

/// What the background recovery of a disk does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecoveryState {
    /// Nothing: the disk holds what it must hold.
    Idle,
    /// It looks for what differs.
    Comparing,
    /// It copies.
    Copying,
    /// It waits for other nodes.
    Waiting,
    /// It stands still because it was told to.
    Paused,
}

/// The background recovery of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryInfo {
    /// Id of the disk.
    pub disk: String,
    /// What it does.
    pub state: RecoveryState,
    /// Slots that it has to compare.
    pub slots_total: u64,
    /// Slots that hold what they must hold.
    pub slots_done: u64,
    /// Objects copied or deleted so far.
    pub objects_copied: u64,
    /// Objects known to differ so far, those copied included.
    pub objects_planned: u64,
    /// Bytes copied so far.
    pub bytes_moved: u64,
    /// Bytes copied per second, lately.
    pub bytes_per_second: u64,
    /// Seconds until it is done, as far as that can be told.
    pub eta_seconds: Option<u64>,
    /// Whom it waits for.
    pub waits_for: Option<String>,
}

/// The background recovery of all disks of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecovery {
    /// Id of the node.
    pub node: String,
    /// `IP:PORT`.
    pub address: String,
    /// Its disks; absent when it does not answer.
    pub disks: Option<Vec<RecoveryInfo>>,
}

/// The background recovery of the whole cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// It stands still because an operator said so.
    pub paused: bool,
    /// Nodes that are up.
    pub nodes: Vec<NodeRecovery>,
}

/// What giving up disks would lose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoverPlan {
    /// Epoch in which it holds.
    pub epoch: u64,
    /// The disks that would be given up.
    pub disks: Vec<LostDisk>,
    /// Slots that wait now, in groups that wait for the same disks.
    pub waiting: Vec<WaitingGroup>,
    /// Slots that would go on waiting.
    pub still_waiting: usize,
    /// What volumes would lose; those that would lose nothing are left out.
    pub volumes: Vec<VolumeLoss>,
}

/// A disk that is down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostDisk {
    /// Its id.
    pub disk: String,
    /// Address of its node.
    pub address: String,
    /// Seconds since 1970 when it went down, if that is remembered.
    pub down_since: Option<u64>,
}

/// Slots that wait for the same disks for the same reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingGroup {
    /// How many.
    pub slots: usize,
    /// Why, and for whom.
    pub reason: String,
}

/// What a volume would lose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeLoss {
    /// Its name.
    pub volume: String,
    /// Places of objects of 4 MiB, written or not.
    pub objects: u64,
    /// Of these, places without any replica left: they read as zeroes.
    pub gone: u64,
    /// Of these, places with an older replica only.
    pub older: u64,
    /// Writes from this epoch on may be missing from the older ones; absent if too long ago.
    pub older_since_epoch: Option<u64>,
    /// When that epoch began, seconds since 1970.
    pub older_since: Option<u64>,
}

/// What a scrub of a disk does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubState {
    /// Nothing: none was started, or the last one finished.
    Idle,
    /// It reads.
    Running,
    /// It waits for a start to go on.
    Paused,
}

/// The scrub of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubInfo {
    /// Id of the disk.
    pub disk: String,
    /// Where it is.
    pub path: String,
    /// What it does now.
    pub state: ScrubState,
    /// Most bytes that it reads per second.
    pub rate: u64,
    /// Seconds since 1970; absent while idle.
    pub started_at: Option<u64>,
    /// Bytes of data blocks read so far; 0 while idle.
    pub bytes_done: u64,
    /// Bytes of data blocks that there are to read now.
    pub bytes_total: u64,
    /// Damaged blocks that this scrub has met so far; 0 while idle.
    pub found: u64,
    /// The last scrub that came to its end since this node was started.
    pub last: Option<ScrubResult>,
    /// Blocks that a scrub or a read has found damaged and nothing has repaired since.
    pub damaged_blocks: u64,
    /// The first of these, at most 100.
    pub damaged: Vec<DamagedBlock>,
}

/// A scrub that came to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubResult {
    /// Seconds since 1970.
    pub started_at: u64,
    /// Seconds since 1970.
    pub finished_at: u64,
    /// Bytes of data blocks read.
    pub bytes: u64,
    /// Damaged blocks that it met.
    pub found: u64,
}

/// A damaged block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedBlock {
    /// Name of the volume; absent if it is deleted.
    pub volume: Option<String>,
    /// Its id.
    pub volume_id: u64,
    /// Where in the volume, in bytes; the block has 4096 of them.
    pub offset: u64,
    /// Layer of the object.
    pub layer: u32,
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
    /// Since when, in seconds since 1970.
    pub attached_since: Option<u64>,
    /// Writer generation: grows whenever it is attached.
    pub writer: u64,
    /// Clients connected to the gateway now; absent while it is not attached, or its gateway does not answer.
    pub clients: Option<u32>,
    /// No earlier gateway can have left replicas different that nobody has looked at since.
    pub settled: bool,
    /// Between whom it is being handed over: its VM is being migrated.
    pub handover: Option<HandoverInfo>,
    /// Seconds since 1970.
    pub created: u64,
    /// Volume and snapshot it was cloned from.
    pub parent: Option<String>,
    /// Its snapshots.
    pub snapshots: Vec<SnapshotInfo>,
}

/// A volume that may go back and forth between two nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverInfo {
    /// Address of the node that had it when this began.
    pub from: String,
    /// Address of the node that may take it over.
    pub to: String,
    /// Seconds since 1970.
    pub since: u64,
}

/// An attachment that was ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// The volume.
    pub volume: String,
    /// Address of the node that had it, or its id if it is no member any more.
    pub detached_from: String,
    /// Since when it had it, in seconds since 1970.
    pub attached_since: u64,
    /// Its writer generation, which ended with it.
    pub writer: u64,
    /// The lock of a node that is up was broken: its clients get I/O errors.
    pub broken: bool,
    /// Clients that it had then; absent if it did not answer.
    pub clients: Option<u32>,
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
