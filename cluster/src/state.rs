//! The replicated state machine: what the cluster log agrees on.
//!
//! ```text
//!   disk:   (new) ── Enter, DiskUp ──► up ◄── Enter, DiskUp ── down ── Out, GiveUp ──► down, out
//!                                      │                         ▲                        │
//!                                      └───── Down, DiskDown ────┘◄─────── Enter, DiskUp ─┘ (up)
//!   sync:   complete ──Down──► missed since e ──Enter, Synced──► complete
//!           complete ──Enter with a new incarnation──► restarted ──Synced──► complete
//!   ring:   on it ◄── neither out nor draining, weight above 0 ──► off it, once the others have its data
//! ```
//!
//! `missed_since` tells that a disk lacks writes of the epochs in which it was not up.
//! `restarted` tells that it was up all along as far as the log knows, but that its daemon came
//! back: writes that were acknowledged and not yet flushed may be lost on it, flushed ones not.
//!
//! Who comes and goes is in `state/membership.rs`, what that means for the rings in `state/placement.rs`.

mod membership;
mod placement;

use crate::command::{
    Answer, Command, LOG_VERSION, MAX_VOLUMES, OLDEST_LOG_VERSION, Outcome, Refusal, VolumeSpec,
    decode_versioned, encode_versioned,
};
use crate::history::EpochRecord;
use crate::settings::{Setting, Settings};
use serde::{Deserialize, Serialize};
use sheepdog_types::{ClusterId, DiskId, Epoch, Layer, NodeId, VolumeId, WriterGen};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `IP:PORT`.
    pub address: String,
    /// Failure zone.
    pub zone: String,
    /// The zone that it announced when it last entered. An operator may have moved it since.
    pub announced_zone: String,
    /// Serving, as far as the log knows.
    pub up: bool,
    /// Of its latest entry.
    pub incarnation: u64,
    /// Epoch of its latest entry.
    pub entered: Epoch,
    /// Its disks are to hold nothing.
    pub draining: bool,
    /// It is no member any more; remembered while a ring names its disks.
    pub removed: bool,
    /// Newest cluster version that its release understands, as it said when it last entered.
    pub version: u8,
}

/// A disk of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The node it is part of.
    pub node: NodeId,
    /// Share of the ring.
    pub weight: u64,
    /// The weight that its node announced last. An operator may have changed it since.
    pub announced_weight: u64,
    /// Its node has it in service.
    pub present: bool,
    /// Epoch in which it last came into service.
    pub entered: Epoch,
    /// It was down for so long that others take its place.
    pub out: bool,
    /// It was given up, and has not synchronised itself since: nobody waits for what only it had.
    pub lost: bool,
    /// It leaves the cluster once its data are elsewhere.
    pub retiring: bool,
    /// It has no room for what the next ring gives it.
    pub full: bool,
    /// First epoch whose writes it may lack.
    pub missed_since: Option<Epoch>,
    /// It may lack writes that were acknowledged but not flushed before its node came back.
    pub restarted: bool,
    /// It has to compare itself with its peers in this epoch or a later one.
    pub sync_from: Option<Epoch>,
}

impl Disk {
    /// It was given up, and has not come back since.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        self.lost && self.out
    }

    fn complete(&self) -> bool {
        self.missed_since.is_none() && !self.restarted && self.sync_from.is_none()
    }
}

/// A disk's place on a ring, kept by value: an older ring keeps older weights and zones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingMember {
    /// Its node.
    pub node: NodeId,
    /// Failure zone of the node.
    pub zone: String,
    /// Share of the ring.
    pub weight: u64,
}

/// The members of a ring.
pub type RingMembers = BTreeMap<DiskId, RingMember>;

/// Who has a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The gateway.
    pub gateway: NodeId,
    /// Its writer generation.
    pub writer: WriterGen,
    /// Seconds since 1970.
    pub since: u64,
}

/// A volume may go back and forth between two nodes: its VM is being migrated.
///
/// ```text
///            OpenHandover              TakeOver by `to`                 `from` lost its last client
///   closed ───────────────► `from` has it ◄────────► `to` has it ──────────────────────────────────► closed
///                             TakeOver by `from`         either side lost its exports, an operator ──►
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Who had the volume when it began.
    pub from: NodeId,
    /// Who may take it over.
    pub to: NodeId,
    /// Seconds since 1970.
    pub since: u64,
}

impl Handover {
    /// Whether `node` may take the volume from the other one.
    #[must_use]
    pub fn involves(&self, node: NodeId) -> bool {
        node == self.from || node == self.to
    }

    /// The other one of the two.
    #[must_use]
    pub fn other(&self, node: NodeId) -> NodeId {
        if node == self.from { self.to } else { self.from }
    }
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Never used for another volume.
    pub id: VolumeId,
    /// Name, size, copies.
    pub spec: VolumeSpec,
    /// Seconds since 1970.
    pub created: u64,
    /// The writable layer.
    pub layer: Layer,
    /// Newest writer generation given out (I4).
    pub writer: WriterGen,
    /// Who has it.
    pub attachment: Option<Attachment>,
    /// Between whom it may go back and forth now.
    pub handover: Option<Handover>,
    /// An earlier gateway may have ended in the middle of writes, which some replicas have and others have
    /// not; nobody has looked for all of them since.
    pub unsettled: bool,
}

/// The whole agreed state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// `ClusterId(0)` before the log is founded.
    pub cluster: ClusterId,
    /// Current epoch.
    pub epoch: Epoch,
    /// Grows with every change that the data path must see.
    pub revision: u64,
    /// All members.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Their disks.
    pub disks: BTreeMap<DiskId, Disk>,
    /// The placement whose disks hold the data.
    pub ring: RingMembers,
    /// The placement that disks are being synchronised for; writes go to both.
    pub next_ring: Option<RingMembers>,
    /// First epoch with this ring and next ring.
    pub placement_since: Epoch,
    /// Volumes by id.
    pub volumes: Arc<BTreeMap<VolumeId, Arc<Volume>>>,
    /// Highest volume id ever given out (I9).
    pub last_volume: VolumeId,
    /// Past epochs, oldest first.
    pub history: Vec<EpochRecord>,
    /// Settings of the cluster.
    pub settings: Settings,
    /// Nodes that were removed: none of them comes back.
    pub removed_nodes: BTreeSet<NodeId>,
    /// Disks that were removed: none of them comes back.
    pub removed_disks: BTreeSet<DiskId>,
    /// The cluster version: what all members understand. It never falls.
    pub version: u8,
}

impl ClusterState {
    /// Applies one committed command. Deterministic; a refused command changes nothing.
    ///
    /// # Errors
    /// [`Refusal`], which is the answer to whoever proposed it.
    pub fn apply(&mut self, command: Command) -> Answer {
        if let Command::Found { cluster } = command {
            return self.found(cluster);
        }
        if self.cluster == ClusterId(0) {
            return Err(Refusal::NotFounded);
        }
        match command {
            Command::Found { .. } => Err(Refusal::AlreadyFounded),
            Command::Enter { node, at } => self.enter(node, at),
            Command::Down { node, incarnation, reason, at } => {
                self.down(node, incarnation, &reason, at)
            }
            Command::Synced { disk, incarnation, basis, at } => {
                self.synced(disk, incarnation, basis, at)
            }
            Command::DiskUp { node, incarnation, disk, at } => {
                self.bring_disk_up(node, incarnation, &disk, at)
            }
            Command::DiskDown { disk, incarnation, entered, reason, at } => {
                self.take_disk_down(disk, (incarnation, entered), &reason, at)
            }
            Command::DiskFull { disk, incarnation, full, at } => {
                self.set_full(disk, incarnation, full, at)
            }
            Command::Out { disks, at } => self.take_out(&disks, at),
            Command::Drain { node, on, force, at } => self.drain(node, on, force, at),
            Command::RemoveNode { node, force, at } => self.remove_node(node, force, at),
            Command::SetZone { node, zone, at } => self.set_zone(node, zone, at),
            Command::SetWeight { disk, weight, force, at } => {
                self.set_weight(disk, weight, force, at)
            }
            Command::RetireDisk { disk, force, at } => self.retire_disk(disk, force, at),
            Command::GiveUp { disks, at } => self.give_up(&disks, at),
            Command::Set { setting } => self.set(&setting),
            Command::CreateVolume { spec, at } => self.create_volume(spec, at),
            Command::DeleteVolume { name } => self.delete_volume(&name),
            Command::Attach { name, gateway, incarnation, at } => {
                self.attach(&name, gateway, incarnation, at)
            }
            Command::Detach { volume, writer, settled } => self.detach(volume, writer, settled),
            Command::Settled { volume, writer } => self.settle(volume, writer),
            Command::OpenHandover { name, to, incarnation, at } => {
                self.open_handover(&name, to, incarnation, at)
            }
            Command::CloseHandover { volume, writer } => self.close_handover(volume, writer),
            Command::TakeOver { volume, gateway, incarnation, seen, at } => {
                self.take_over(volume, gateway, incarnation, seen, at)
            }
        }
    }

    /// Whether all members understand what was encoded for this cluster version.
    ///
    /// # Errors
    /// [`Refusal::TooNew`], which names those that do not.
    pub fn check_version(&self, needed: u8) -> Result<(), Refusal> {
        if needed <= self.version.max(OLDEST_LOG_VERSION) {
            return Ok(());
        }
        let behind = self.nodes.values().filter(|n| !n.removed && n.version < needed);
        let behind: Vec<&str> = behind.map(|n| n.address.as_str()).collect();
        Err(Refusal::TooNew { needed, agreed: self.version, behind: behind.join(", ") })
    }

    /// The state as bytes, for a snapshot of the log. All members understand it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode_versioned(self.version.clamp(OLDEST_LOG_VERSION, LOG_VERSION), self)
    }

    /// The state from a snapshot.
    ///
    /// # Errors
    /// A text for people: a version that is not understood, or malformed bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        decode_versioned(bytes).map_err(|refusal| {
            let known = format!("{OLDEST_LOG_VERSION} to {LOG_VERSION}");
            format!("the cluster state (versions {known} are understood): {refusal}")
        })
    }

    /// The volume called `name`.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<&Arc<Volume>> {
        self.volumes.values().find(|v| v.spec.name == name)
    }

    /// Whether `disk` is there and its node is up.
    #[must_use]
    pub fn disk_up(&self, disk: DiskId) -> bool {
        let node_up = |id| self.nodes.get(&id).is_some_and(|n| n.up);
        self.disks.get(&disk).is_some_and(|d| d.present && node_up(d.node))
    }

    /// Nodes with disks that are up.
    #[must_use]
    pub fn storage_nodes_up(&self) -> usize {
        let mut nodes: Vec<NodeId> =
            self.disks.iter().filter(|(id, _)| self.disk_up(**id)).map(|(_, d)| d.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes.len()
    }

    fn found(&mut self, cluster: ClusterId) -> Answer {
        if self.cluster != ClusterId(0) {
            return Err(Refusal::AlreadyFounded);
        }
        self.cluster = cluster;
        Ok(Outcome::Done)
    }

    fn set(&mut self, setting: &Setting) -> Answer {
        setting.check()?;
        self.settings.set(setting);
        self.revision += 1;
        Ok(Outcome::Done)
    }

    fn create_volume(&mut self, spec: VolumeSpec, at: u64) -> Answer {
        spec.validate()?;
        if self.volume_named(&spec.name).is_some() {
            return Err(Refusal::Exists(spec.name));
        }
        if self.volumes.len() >= MAX_VOLUMES {
            return Err(Refusal::Limit { what: "volumes".into(), limit: MAX_VOLUMES });
        }
        let (needed, up) = (usize::from(spec.min_copies), self.storage_nodes_up());
        if up < needed {
            return Err(Refusal::TooFewNodes { needed, up });
        }
        self.last_volume = VolumeId(self.last_volume.0 + 1);
        let id = self.last_volume;
        let volume = Volume {
            id,
            spec,
            created: at,
            layer: Layer(0),
            writer: WriterGen(0),
            attachment: None,
            handover: None,
            unsettled: false,
        };
        self.put_volume(volume);
        Ok(Outcome::Created { volume: id })
    }

    fn delete_volume(&mut self, name: &str) -> Answer {
        let volume = self.find_volume(name)?;
        if let Some(attachment) = &volume.attachment
            && let Some(holder) = self.live_holder(attachment.gateway)
        {
            return Err(Refusal::AttachedElsewhere { name: name.into(), holder });
        }
        Arc::make_mut(&mut self.volumes).remove(&volume.id);
        self.revision += 1;
        Ok(Outcome::Done)
    }

    fn attach(&mut self, name: &str, gateway: NodeId, incarnation: u64, at: u64) -> Answer {
        let volume = self.find_volume(name)?;
        self.check_up(gateway, incarnation)?;
        if let Some(attachment) = &volume.attachment
            && attachment.gateway != gateway
            && let Some(holder) = self.live_holder(attachment.gateway)
        {
            return Err(Refusal::AttachedElsewhere { name: name.into(), holder });
        }
        Ok(self.give(&volume, gateway, at))
    }

    /// Gives a volume to a gateway, as a new generation.
    fn give(&mut self, volume: &Volume, gateway: NodeId, at: u64) -> Outcome {
        let (mut volume, writer) = (volume.clone(), WriterGen(volume.writer.0 + 1));
        volume.writer = writer;
        volume.unsettled |= volume.attachment.is_some();
        volume.attachment = Some(Attachment { gateway, writer, since: at });
        volume.handover = volume.handover.filter(|h| h.involves(gateway));
        let id = volume.id;
        self.put_volume(volume);
        Outcome::Attached { volume: id, writer }
    }

    fn open_handover(&mut self, name: &str, to: NodeId, incarnation: u64, at: u64) -> Answer {
        let mut volume = Volume::clone(&*self.find_volume(name)?);
        self.check_up(to, incarnation)?;
        let holder = volume.attachment.as_ref().map(|a| a.gateway);
        let from = holder.filter(|holder| self.live_holder(*holder).is_some());
        let from = from.ok_or_else(|| Refusal::NothingToTakeOver(name.into()))?;
        if from == to {
            // A guest that has gone and is to come back may have had no request: nothing was taken over yet.
            let open = volume.handover.filter(|h| h.involves(to));
            return open.map(|_| Outcome::Done).ok_or_else(|| Refusal::HasItItself(name.into()));
        }
        let open = volume.handover.map(|h| (h.from, h.to));
        if let Some((_, waiting)) = open.filter(|(a, b)| ![*a, *b].contains(&to))
            && let Some(address) = self.live_holder(waiting)
        {
            return Err(Refusal::HandoverElsewhere { name: name.into(), to: address });
        }
        if open != Some((from, to)) {
            volume.handover = Some(Handover { from, to, since: at });
            self.put_volume(volume);
        }
        Ok(Outcome::Done)
    }

    fn close_handover(&mut self, id: VolumeId, writer: Option<WriterGen>) -> Answer {
        // Who left after it had handed the volume over must not close the way back, opened meanwhile.
        let left = |volume: &Volume, handover: &Handover, writer| {
            let holder = volume.attachment.as_ref().map(|a| a.gateway);
            writer == volume.writer && holder != Some(handover.from)
        };
        if let Some(volume) = self.volumes.get(&id)
            && let Some(handover) = &volume.handover
            && writer.is_none_or(|writer| left(volume, handover, writer))
        {
            let closed = Volume { handover: None, ..Volume::clone(volume) };
            self.put_volume(closed);
        }
        Ok(Outcome::Done)
    }

    fn take_over(
        &mut self,
        id: VolumeId,
        gateway: NodeId,
        incarnation: u64,
        seen: WriterGen,
        at: u64,
    ) -> Answer {
        let volume = self.volumes.get(&id).cloned();
        let volume = volume.ok_or_else(|| Refusal::NoSuchVolume(id.to_string()))?;
        let name = || volume.spec.name.clone();
        self.check_up(gateway, incarnation)?;
        // A proposal that was late must not take the volume from whoever was given it meanwhile.
        if volume.writer != seen {
            return Err(Refusal::AttachedMeanwhile(name()));
        }
        if let Some(attachment) = &volume.attachment
            && attachment.gateway != gateway
            && !volume.handover.is_some_and(|h| h.involves(gateway))
            && let Some(holder) = self.live_holder(attachment.gateway)
        {
            return Err(Refusal::AttachedElsewhere { name: name(), holder });
        }
        Ok(self.give(&volume, gateway, at))
    }

    /// A node leaves for good.
    fn end_handovers(&mut self, node: NodeId) {
        let involved = |v: &&Arc<Volume>| v.handover.is_some_and(|h| h.involves(node));
        let ids: Vec<VolumeId> = self.volumes.values().filter(involved).map(|v| v.id).collect();
        for id in ids {
            // It only refuses what does not exist.
            let _ = self.close_handover(id, None);
        }
    }

    fn check_up(&self, node: NodeId, incarnation: u64) -> Result<(), Refusal> {
        let found = self.nodes.get(&node).filter(|n| n.up && n.incarnation == incarnation);
        found.map(|_| ()).ok_or(Refusal::NotMember(node))
    }

    fn detach(&mut self, id: VolumeId, writer: WriterGen, settled: bool) -> Answer {
        if let Some(mut volume) = self.attached_with(id, writer) {
            volume.attachment = None;
            if !settled {
                volume.unsettled = true;
                volume.writer = WriterGen(writer.0 + 1);
            }
            self.put_volume(volume);
        }
        Ok(Outcome::Done)
    }

    fn settle(&mut self, id: VolumeId, writer: WriterGen) -> Answer {
        if let Some(mut volume) = self.attached_with(id, writer) {
            volume.unsettled = false;
            self.put_volume(volume);
        }
        Ok(Outcome::Done)
    }

    /// A copy of the volume, if this generation has it.
    fn attached_with(&self, id: VolumeId, writer: WriterGen) -> Option<Volume> {
        let volume = self.volumes.get(&id)?;
        let attachment = volume.attachment.as_ref()?;
        (attachment.writer == writer).then(|| Volume::clone(volume))
    }

    fn find_volume(&self, name: &str) -> Result<Arc<Volume>, Refusal> {
        self.volume_named(name).cloned().ok_or_else(|| Refusal::NoSuchVolume(name.into()))
    }

    /// The address of `gateway` while its lock counts, that is while it is up.
    fn live_holder(&self, gateway: NodeId) -> Option<String> {
        self.nodes.get(&gateway).filter(|n| n.up).map(|n| n.address.clone())
    }

    fn put_volume(&mut self, volume: Volume) {
        Arc::make_mut(&mut self.volumes).insert(volume.id, Arc::new(volume));
        self.revision += 1;
    }
}
