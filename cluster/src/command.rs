//! Commands of the cluster log, and what the state machine answers.
//!
//! Encoded with postcard behind one byte, the first *cluster version* that understands it. Each node
//! announces the newest version that its release understands; the agreed one is the lowest of these, and
//! only rises. Nothing newer than the agreed version gets into the log, so every member understands every
//! entry. What a version has said it says for ever: a released variant gets no field, and none goes or
//! moves; what is new is a new variant at the end, with a version of its own in [`Command::since`].

use crate::settings::Setting;
use serde::{Deserialize, Serialize};
use sheepdog_types::{
    ClusterId, DiskId, Epoch, MAX_VOLUME_SIZE, NodeId, VolumeId, WriterGen, format_size,
};
use thiserror::Error;

/// Newest cluster version that this release understands: commands, their answers, and the state.
pub const LOG_VERSION: u8 = 6;
/// Oldest one. (Those before were never released.)
pub const OLDEST_LOG_VERSION: u8 = 6;

/// Most copies of an object.
pub const MAX_COPIES: usize = 8;
/// Longest volume name, in bytes.
pub const MAX_NAME: usize = 128;
/// Most volumes of a cluster (I10).
pub const MAX_VOLUMES: usize = 100_000;
/// Most nodes of a cluster (I10).
pub const MAX_NODES: usize = 4096;
/// Most disks of a cluster (I10).
pub const MAX_DISKS: usize = 16 * 4096;
/// Most removed nodes, and most removed disks, that are remembered so that none comes back (I10).
pub const MAX_REMOVED: usize = 100_000;
/// Longest zone name, in bytes.
pub const MAX_ZONE: usize = 128;
/// Highest weight of a disk: 16 EiB in GiB.
pub const MAX_WEIGHT: u64 = 1 << 34;

/// A disk as its node announces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its id, from its superblock.
    pub id: DiskId,
    /// Share of the ring: its capacity in GiB, at least 1, unless the operator set it.
    pub weight: u64,
}

/// A node as it announces itself when it enters the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its id, from its directory.
    pub id: NodeId,
    /// Drawn at random by each start of the daemon.
    pub incarnation: u64,
    /// `IP:PORT` that peers connect to.
    pub address: String,
    /// Failure zone.
    pub zone: String,
    /// Its disks; none for a pure gateway.
    pub disks: Vec<DiskInfo>,
    /// Newest cluster version that its release understands, see [`LOG_VERSION`].
    pub version: u8,
}

/// What a volume is created with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Unique among the volumes that exist.
    pub name: String,
    /// Bytes, a multiple of 512.
    pub size: u64,
    /// Replicas of each object.
    pub copies: u8,
    /// Fewest replicas with which I/O goes on.
    pub min_copies: u8,
    /// When a write is acknowledged.
    pub ack: Ack,
}

/// When a gateway acknowledges a write of its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ack {
    /// When every replica has it in memory. It is durable after the next flush, as with a disk that
    /// has a volatile write cache.
    #[default]
    Flush,
    /// When it is durable on every replica, as with a disk without a write cache.
    Commit,
}

/// One entry of the cluster log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Founds the cluster; the first entry of every log.
    Found {
        /// Its id.
        cluster: ClusterId,
    },
    /// A node joins, or comes back with a new incarnation. Makes a new epoch.
    Enter {
        /// The node.
        node: NodeInfo,
        /// Wall clock of the proposer in seconds since 1970, for people.
        at: u64,
    },
    /// A node lost its lease or its process is gone. Makes a new epoch.
    Down {
        /// The node.
        node: NodeId,
        /// Ignored when the node has entered again since.
        incarnation: u64,
        /// For people.
        reason: String,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// A disk holds everything that it must hold as of `basis`.
    Synced {
        /// The disk.
        disk: DiskId,
        /// Incarnation of its node; ignored when it has entered again since.
        incarnation: u64,
        /// The epoch whose placement was compared.
        basis: Epoch,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// A disk of an up node comes into service while its node runs. Makes a new epoch.
    DiskUp {
        /// The node.
        node: NodeId,
        /// Incarnation of the node; refused when it is not the current one.
        incarnation: u64,
        /// The disk, new or known.
        disk: DiskInfo,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// A disk failed although its node is up. Makes a new epoch.
    DiskDown {
        /// The disk.
        disk: DiskId,
        /// Incarnation of its node; ignored when it has entered again since.
        incarnation: u64,
        /// Epoch in which it came into service; ignored when it has come again since.
        entered: Epoch,
        /// For people.
        reason: String,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// A disk that data move to has no room for them, or has room again. While it is full it takes
    /// only what it has to hold by the placement in force, and the move waits. Makes a new epoch.
    DiskFull {
        /// The disk.
        disk: DiskId,
        /// Incarnation of its node; ignored when it has entered again since.
        incarnation: u64,
        /// Whether it is full.
        full: bool,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Disks were down for so long that others have to take their place. Makes a new epoch.
    Out {
        /// The disks; those that are up, or out already, are left alone.
        disks: Vec<DiskId>,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Moves all data away from a node that stays up, or lets it come back.
    Drain {
        /// The node.
        node: NodeId,
        /// Away, or back.
        on: bool,
        /// Even if too few nodes stay for the copies that volumes want.
        force: bool,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Ends the membership of a node for good.
    RemoveNode {
        /// The node.
        node: NodeId,
        /// Even if it is up and has data or volumes.
        force: bool,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Moves a node to another failure zone.
    SetZone {
        /// The node.
        node: NodeId,
        /// The zone.
        zone: String,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Changes a disk's share of the ring; 0 moves everything away.
    SetWeight {
        /// The disk.
        disk: DiskId,
        /// The new share.
        weight: u64,
        /// Even if too few nodes stay for the copies that volumes want.
        force: bool,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Ends the membership of a disk for good, as soon as its data are elsewhere.
    RetireDisk {
        /// The disk.
        disk: DiskId,
        /// Even if too few nodes stay for the copies that volumes want.
        force: bool,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Disks are gone for good: nobody waits for what only they had.
    GiveUp {
        /// The disks, none of which may be up.
        disks: Vec<DiskId>,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Changes a setting of the cluster.
    Set {
        /// Which, to what.
        setting: Setting,
    },
    /// Creates a volume.
    CreateVolume {
        /// Its description.
        spec: VolumeSpec,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Deletes a volume that is not attached.
    DeleteVolume {
        /// Its name.
        name: String,
    },
    /// Gives a volume to a gateway, with a new writer generation.
    Attach {
        /// Name of the volume.
        name: String,
        /// The gateway.
        gateway: NodeId,
        /// Incarnation of the gateway; refused when it is not the current one.
        incarnation: u64,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Gives a volume back. Ignored when it was attached again since.
    Detach {
        /// The volume.
        volume: VolumeId,
        /// The generation that is given back.
        writer: WriterGen,
        /// Nothing of it is under way, and all replicas are equal. Otherwise the generation ends with
        /// this: whoever still uses it is fenced, and the next gateway looks for what differs.
        settled: bool,
    },
    /// All replicas of a volume were made equal after a takeover. Ignored when it was attached again since.
    Settled {
        /// The volume.
        volume: VolumeId,
        /// The generation that did it.
        writer: WriterGen,
    },
    /// Lets a second node take a volume over from its holder, and the holder take it back: a migration
    /// between the two begins.
    OpenHandover {
        /// Name of the volume.
        name: String,
        /// The node that may take it over.
        to: NodeId,
        /// Incarnation of that node; refused when it is not the current one.
        incarnation: u64,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
    /// Ends that: the node that has the volume keeps it.
    CloseHandover {
        /// The volume.
        volume: VolumeId,
        /// Only if this is still the newest generation of the volume.
        writer: Option<WriterGen>,
    },
    /// Gives a volume to a gateway whose guest uses it, from the other node of an open hand-over if need be,
    /// with a new writer generation.
    TakeOver {
        /// The volume.
        volume: VolumeId,
        /// The gateway.
        gateway: NodeId,
        /// Incarnation of the gateway; refused when it is not the current one.
        incarnation: u64,
        /// The newest generation that the gateway knew when it wanted the volume; refused when it is older.
        seen: WriterGen,
        /// Wall clock of the proposer, seconds since 1970.
        at: u64,
    },
}

/// What the state machine answers to a command that succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, or there was nothing to do.
    Done,
    /// The node is a member from this epoch on.
    Entered {
        /// The epoch.
        epoch: Epoch,
    },
    /// The volume was created.
    Created {
        /// Its id.
        volume: VolumeId,
    },
    /// The volume is attached.
    Attached {
        /// Its id.
        volume: VolumeId,
        /// The new writer generation.
        writer: WriterGen,
    },
}

/// Why a command was refused. The state is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
pub enum Refusal {
    /// The encoding is not understood.
    #[error("this release does not understand the command ({0}); upgrade this node")]
    Unknown(String),
    /// The log was founded already.
    #[error("the cluster exists already")]
    AlreadyFounded,
    /// Nothing can happen before the cluster is founded.
    #[error("the cluster is not founded yet")]
    NotFounded,
    /// The node's release is older than what the cluster has agreed on.
    #[error(
        "node {node} understands cluster version {version}, but the cluster has agreed on version \
         {agreed}; upgrade sheep on that node (docs/upgrade.md)"
    )]
    TooOld {
        /// The node.
        node: NodeId,
        /// Newest version that it understands.
        version: u8,
        /// What all members understand.
        agreed: u8,
    },
    /// Not all members understand the command yet.
    #[error(
        "this needs cluster version {needed}, but the cluster is at version {agreed} until these nodes \
         are upgraded, or removed: {behind}"
    )]
    TooNew {
        /// The version that understands it.
        needed: u8,
        /// What all members understand.
        agreed: u8,
        /// Addresses of those that do not.
        behind: String,
    },
    /// Another node uses this address.
    #[error("address {address} belongs to node {node}, which is up")]
    AddressInUse {
        /// The address.
        address: String,
        /// Who has it.
        node: NodeId,
    },
    /// A disk is known as part of another node.
    #[error("disk {disk} belongs to node {node}")]
    DiskElsewhere {
        /// The disk.
        disk: DiskId,
        /// Its node.
        node: NodeId,
    },
    /// The node is not a member, is down, or has another incarnation by now.
    #[error("node {0} is not an up member of this cluster with that incarnation")]
    NotMember(NodeId),
    /// A bound of the cluster is reached.
    #[error("the cluster has its maximum of {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: String,
        /// The bound.
        limit: usize,
    },
    /// The node was removed from the cluster.
    #[error(
        "node {0} was removed from this cluster and cannot come back; to use the host again, empty its \
         directory and disks, and join it as a new node"
    )]
    Removed(NodeId),
    /// There is no such disk.
    #[error("there is no disk {0}")]
    NoSuchDisk(DiskId),
    /// The disk was removed from the cluster.
    #[error("disk {0} was removed from this cluster; empty its directory to use it again")]
    DiskRemoved(DiskId),
    /// The disk is up.
    #[error("disk {0} is up; only what is down can be given up")]
    DiskIsUp(DiskId),
    /// Most disks would be out of the ring: that is no time to move data.
    #[error("{left} of {total} disks would be left; more than half have to stay")]
    TooManyOut {
        /// Disks that would stay.
        left: usize,
        /// Disks there are.
        total: usize,
    },
    /// Too few nodes would be left for the copies that volumes want.
    #[error(
        "{left} nodes with disks would be left for volumes with {copies} copies; add nodes first, or force it"
    )]
    TooFewLeft {
        /// Nodes that would stay.
        left: usize,
        /// The most copies of a volume.
        copies: usize,
    },
    /// The node still has data.
    #[error("node {0} is up and its disks hold data; drain it first, or force it")]
    NotDrained(NodeId),
    /// The node still serves a volume.
    #[error(
        "node {node} is up and serves volume '{volume}'; remove its exports first, or force it"
    )]
    Serves {
        /// The node.
        node: NodeId,
        /// One of its volumes.
        volume: String,
    },
    /// The zone name breaks the rules.
    #[error("'{0}' is not a zone name: use 1 to 128 characters, none of them a control character")]
    BadZone(String),
    /// The weight breaks the rules.
    #[error("{0} is not a weight: use 0 to {MAX_WEIGHT} (GiB of capacity, as a rule)")]
    BadWeight(u64),
    /// The value of a setting breaks the rules.
    #[error("{0}")]
    BadSetting(String),
    /// The name breaks the rules.
    #[error(
        "'{0}' is not a volume name: use 1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    )]
    BadName(String),
    /// The size breaks the rules.
    #[error("{0} bytes is not a volume size: use a multiple of 512 from 512 to {max}", max = format_size(MAX_VOLUME_SIZE))]
    BadSize(u64),
    /// Copies or min_copies break the rules.
    #[error(
        "{copies} copies with at least {min_copies} is not possible: 1 ≤ min-copies ≤ copies ≤ {MAX_COPIES}"
    )]
    BadCopies {
        /// Asked for.
        copies: u8,
        /// Asked for.
        min_copies: u8,
    },
    /// Too few nodes with disks are up.
    #[error(
        "the volume needs at least {needed} nodes (min-copies) but {up} are up; add nodes, or use fewer copies"
    )]
    TooFewNodes {
        /// Nodes needed.
        needed: usize,
        /// Nodes up.
        up: usize,
    },
    /// A volume of this name exists.
    #[error("volume '{0}' exists already")]
    Exists(String),
    /// No volume of this name exists.
    #[error("there is no volume '{0}'")]
    NoSuchVolume(String),
    /// Another gateway has the volume.
    #[error("volume '{name}' is attached to {holder}; remove its exports there first")]
    AttachedElsewhere {
        /// The volume.
        name: String,
        /// Address of the gateway that has it.
        holder: String,
    },
    /// Nobody has the volume, so nobody hands it over.
    #[error(
        "no node that is up has volume '{0}', so there is nothing to take over; export it without --incoming"
    )]
    NothingToTakeOver(String),
    /// The node has the volume itself.
    #[error("this node has volume '{0}' itself, so there is nothing to take over")]
    HasItItself(String),
    /// Another node is waiting to take the volume over.
    #[error("volume '{name}' is being handed over to {to} already; remove its export there first")]
    HandoverElsewhere {
        /// The volume.
        name: String,
        /// Address of the node that waits for it.
        to: String,
    },
    /// The volume was attached, or given back by force, after the proposer looked.
    #[error("volume '{0}' was attached again meanwhile")]
    AttachedMeanwhile(String),
}

/// The answer to a command.
pub type Answer = Result<Outcome, Refusal>;

impl Command {
    /// The first cluster version that understands this command.
    #[must_use]
    pub fn since(&self) -> u8 {
        OLDEST_LOG_VERSION // a variant that is added later names its own
    }
}

/// Encodes a command as a log entry.
#[must_use]
pub fn encode_command(command: &Command) -> Vec<u8> {
    encode_versioned(command.since(), command)
}

/// The cluster version that a log entry or an answer was encoded for.
#[must_use]
pub fn version_of(bytes: &[u8]) -> u8 {
    bytes.first().copied().unwrap_or_default()
}

/// Decodes a log entry.
///
/// # Errors
/// [`Refusal::Unknown`] for another version or malformed bytes.
pub fn decode_command(bytes: &[u8]) -> Result<Command, Refusal> {
    decode_versioned(bytes)
}

/// Encodes the answer to a command of this version, which its proposer understands.
#[must_use]
pub fn encode_answer(version: u8, answer: &Answer) -> Vec<u8> {
    encode_versioned(version.clamp(OLDEST_LOG_VERSION, LOG_VERSION), answer)
}

/// Decodes an answer.
///
/// # Errors
/// [`Refusal::Unknown`] for another version or malformed bytes.
pub fn decode_answer(bytes: &[u8]) -> Answer {
    decode_versioned::<Answer>(bytes)?
}

pub(crate) fn encode_versioned<T: Serialize>(version: u8, value: &T) -> Vec<u8> {
    let start = vec![version];
    postcard::to_extend(value, start).expect("plain data always serialises into memory")
}

pub(crate) fn decode_versioned<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Result<T, Refusal> {
    match bytes.split_first() {
        Some((&(OLDEST_LOG_VERSION..=LOG_VERSION), body)) => {
            postcard::from_bytes(body).map_err(|e| Refusal::Unknown(format!("malformed: {e}")))
        }
        Some((version, _)) => Err(Refusal::Unknown(format!("cluster version {version}"))),
        None => Err(Refusal::Unknown("empty".into())),
    }
}

/// Checks the name of a failure zone.
///
/// # Errors
/// [`Refusal::BadZone`].
pub fn check_zone(zone: &str) -> Result<(), Refusal> {
    if zone.is_empty() || zone.len() > MAX_ZONE || zone.chars().any(char::is_control) {
        return Err(Refusal::BadZone(zone.chars().take(MAX_ZONE + 1).collect()));
    }
    Ok(())
}

impl VolumeSpec {
    /// Checks name, size and copies.
    ///
    /// # Errors
    /// [`Refusal::BadName`], [`Refusal::BadSize`] or [`Refusal::BadCopies`].
    pub fn validate(&self) -> Result<(), Refusal> {
        let ok = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
        let first = self.name.bytes().next();
        if self.name.len() > MAX_NAME
            || !first.is_some_and(|c| c.is_ascii_alphanumeric())
            || !self.name.bytes().all(ok)
        {
            return Err(Refusal::BadName(self.name.chars().take(MAX_NAME + 1).collect()));
        }
        if self.size == 0 || self.size > MAX_VOLUME_SIZE || !self.size.is_multiple_of(512) {
            return Err(Refusal::BadSize(self.size));
        }
        if self.min_copies == 0
            || self.min_copies > self.copies
            || usize::from(self.copies) > MAX_COPIES
        {
            return Err(Refusal::BadCopies { copies: self.copies, min_copies: self.min_copies });
        }
        Ok(())
    }
}

/// The `min_copies` of a volume that does not say: 1 of 1 or 2, 2 of 3 or 4, 3 of 5.
#[must_use]
pub fn default_min_copies(copies: u8) -> u8 {
    copies.div_ceil(2).max(1)
}
