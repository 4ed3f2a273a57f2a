//! The replicated state machine: what the cluster log agrees on.
//!
//! ```text
//!   disk:   (new) ── Enter ──► up ◄── Enter ── down
//!                              │                ▲
//!                              └───── Down ─────┘
//!   sync:   complete ──Down──► missed since e ──Enter, Synced──► complete
//!           complete ──Enter with a new incarnation──► restarted ──Synced──► complete
//! ```
//!
//! `missed_since` tells that a disk lacks writes of the epochs in which it was not up.
//! `restarted` tells that it was up all along as far as the log knows, but that its daemon came
//! back: writes that were acknowledged and not yet flushed may be lost on it, flushed ones not.

use crate::command::{
    Answer, Command, DiskInfo, LOG_VERSION, MAX_NODES, MAX_VOLUMES, NodeInfo, Outcome, Refusal,
    VolumeSpec, decode_versioned, encode_versioned,
};
use crate::history::{EpochRecord, MAX_HISTORY};
use serde::{Deserialize, Serialize};
use sheepdog_types::{ClusterId, DiskId, Epoch, Layer, NodeId, VolumeId, WriterGen};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `IP:PORT`.
    pub address: String,
    /// Failure zone.
    pub zone: String,
    /// Serving, as far as the log knows.
    pub up: bool,
    /// Of its latest entry.
    pub incarnation: u64,
    /// Epoch of its latest entry.
    pub entered: Epoch,
}

/// A disk of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The node it is part of.
    pub node: NodeId,
    /// Share of the ring.
    pub weight: u64,
    /// Its node announced it at its latest entry.
    pub present: bool,
    /// First epoch whose writes it may lack.
    pub missed_since: Option<Epoch>,
    /// It may lack writes that were acknowledged but not flushed before its node came back.
    pub restarted: bool,
    /// It has to compare itself with its peers in this epoch or a later one.
    pub sync_from: Option<Epoch>,
}

impl Disk {
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
            Command::CreateVolume { spec, at } => self.create_volume(spec, at),
            Command::DeleteVolume { name } => self.delete_volume(&name),
            Command::Attach { name, gateway, incarnation, at } => {
                self.attach(&name, gateway, incarnation, at)
            }
            Command::Detach { volume, writer } => self.detach(volume, writer),
        }
    }

    /// The state as bytes, for a snapshot of the log.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode_versioned(self)
    }

    /// The state from a snapshot.
    ///
    /// # Errors
    /// A text for people: another version ([`LOG_VERSION`] is understood) or malformed bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        decode_versioned(bytes)
            .map_err(|e| format!("cluster state (version {LOG_VERSION} is understood): {e}"))
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

    fn enter(&mut self, info: NodeInfo, at: u64) -> Answer {
        self.check_entry(&info)?;
        let known = self.nodes.get(&info.id);
        if let Some(node) = known
            && node.up
            && node.incarnation == info.incarnation
        {
            return Ok(Outcome::Entered { epoch: node.entered }); // a repeated proposal
        }
        let verb = if known.is_some() { "came back" } else { "joined" };
        let mut cause = format!("{} {verb}", info.address);
        let epoch = self.epoch.next();
        let were_up: Vec<DiskId> =
            self.disks.keys().copied().filter(|d| self.disk_up(*d)).collect();
        let came_up = info.disks.iter().map(|d| d.id).filter(|d| !were_up.contains(d)).collect();
        let node = Node {
            address: info.address,
            zone: info.zone,
            up: true,
            incarnation: info.incarnation,
            entered: epoch,
        };
        self.nodes.insert(info.id, node);
        for disk in &info.disks {
            self.enter_disk(info.id, disk, epoch);
        }
        let went_down = self.leave_out(info.id, &info.disks, &were_up, epoch);
        for disk in &went_down {
            cause += &format!(" without disk {disk}");
        }
        self.begin_epoch(EpochRecord { epoch, came_up, went_down, cause, at });
        self.replan(at);
        Ok(Outcome::Entered { epoch: self.epoch })
    }

    fn check_entry(&self, info: &NodeInfo) -> Result<(), Refusal> {
        if !self.nodes.contains_key(&info.id) && self.nodes.len() >= MAX_NODES {
            return Err(Refusal::Limit { what: "nodes".into(), limit: MAX_NODES });
        }
        let rival =
            self.nodes.iter().find(|(id, n)| **id != info.id && n.up && n.address == info.address);
        if let Some((&node, _)) = rival {
            return Err(Refusal::AddressInUse { address: info.address.clone(), node });
        }
        for disk in &info.disks {
            if let Some(known) = self.disks.get(&disk.id)
                && known.node != info.id
            {
                return Err(Refusal::DiskElsewhere { disk: disk.id, node: known.node });
            }
        }
        Ok(())
    }

    fn enter_disk(&mut self, node: NodeId, info: &DiskInfo, epoch: Epoch) {
        let empty_cluster = self.volumes.is_empty();
        let disk = self.disks.entry(info.id).or_insert(Disk {
            node,
            weight: info.weight,
            present: true,
            missed_since: Some(Epoch(0)),
            restarted: false,
            sync_from: None,
        });
        disk.weight = info.weight;
        disk.present = true;
        if empty_cluster {
            (disk.missed_since, disk.restarted, disk.sync_from) = (None, false, None);
        } else {
            disk.restarted = true;
            disk.sync_from = Some(epoch);
        }
    }

    /// Disks of `node` that came back without: they are down although their node is up. Gives those
    /// that were up before.
    fn leave_out(
        &mut self,
        node: NodeId,
        announced: &[DiskInfo],
        were_up: &[DiskId],
        epoch: Epoch,
    ) -> Vec<DiskId> {
        let mut went_down = Vec::new();
        for (id, disk) in self.disks.iter_mut().filter(|(_, d)| d.node == node) {
            if !announced.iter().any(|d| d.id == *id) {
                disk.present = false;
                disk.missed_since.get_or_insert(epoch);
                disk.sync_from = None;
                went_down.extend(were_up.contains(id).then_some(*id));
            }
        }
        went_down
    }

    fn down(&mut self, id: NodeId, incarnation: u64, reason: &str, at: u64) -> Answer {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Err(Refusal::NotMember(id));
        };
        if !node.up || node.incarnation != incarnation {
            return Ok(Outcome::Done); // it happened already, or the node is back
        }
        node.up = false;
        let cause = format!("{} is down: {reason}", node.address);
        let epoch = self.epoch.next();
        let mut went_down = Vec::new();
        for (disk_id, disk) in self.disks.iter_mut().filter(|(_, d)| d.node == id) {
            disk.missed_since.get_or_insert(epoch);
            disk.sync_from = None;
            went_down.extend(disk.present.then_some(*disk_id));
        }
        self.begin_epoch(EpochRecord { epoch, came_up: Vec::new(), went_down, cause, at });
        Ok(Outcome::Done)
    }

    fn synced(&mut self, id: DiskId, incarnation: u64, basis: Epoch, at: u64) -> Answer {
        let Some(disk) = self.disks.get_mut(&id) else {
            return Ok(Outcome::Done);
        };
        let current = self.nodes.get(&disk.node);
        let fresh = disk.present && current.is_some_and(|n| n.up && n.incarnation == incarnation);
        if !fresh || disk.sync_from.is_some_and(|from| basis < from) {
            return Ok(Outcome::Done); // it says nothing about what is needed by now
        }
        (disk.missed_since, disk.restarted, disk.sync_from) = (None, false, None);
        self.revision += 1;
        self.promote_if_synced(at);
        Ok(Outcome::Done)
    }

    /// Compares the ring with the disks there are, and starts a move when they differ.
    fn replan(&mut self, at: u64) {
        let wanted: RingMembers = self
            .disks
            .iter()
            .filter_map(|(id, disk)| {
                let zone = self.nodes.get(&disk.node)?.zone.clone();
                Some((*id, RingMember { node: disk.node, zone, weight: disk.weight }))
            })
            .collect();
        if self.volumes.is_empty() || wanted == self.ring {
            self.place(wanted, None);
        } else if self.next_ring.as_ref() != Some(&wanted) {
            for id in wanted.keys() {
                if self.disk_up(*id)
                    && let Some(disk) = self.disks.get_mut(id)
                {
                    disk.sync_from = Some(self.epoch);
                }
            }
            self.place(self.ring.clone(), Some(wanted));
        }
        self.promote_if_synced(at);
    }

    fn place(&mut self, ring: RingMembers, next: Option<RingMembers>) {
        if self.ring != ring || self.next_ring != next {
            (self.ring, self.next_ring) = (ring, next);
            self.placement_since = self.epoch;
        }
    }

    /// Makes the next ring the ring once every disk of it holds what it must hold. A disk that is
    /// down holds the move up: it may be the only one to get some slot.
    fn promote_if_synced(&mut self, at: u64) {
        let Some(next) = &self.next_ring else { return };
        let ready = |id| self.disk_up(id) && self.disks.get(&id).is_some_and(Disk::complete);
        if next.keys().all(|id| ready(*id)) {
            let ring = next.clone();
            let epoch = self.epoch.next();
            let cause = "data moved to the new placement".to_string();
            let (came_up, went_down) = (Vec::new(), Vec::new());
            self.begin_epoch(EpochRecord { epoch, came_up, went_down, cause, at });
            self.place(ring, None);
        }
    }

    fn begin_epoch(&mut self, record: EpochRecord) {
        self.epoch = record.epoch;
        self.revision += 1;
        self.history.push(record);
        if self.history.len() > MAX_HISTORY {
            self.history.remove(0);
        }
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
        let node = self.nodes.get(&gateway).filter(|n| n.up && n.incarnation == incarnation);
        if node.is_none() {
            return Err(Refusal::NotMember(gateway));
        }
        if let Some(attachment) = &volume.attachment
            && attachment.gateway != gateway
            && let Some(holder) = self.live_holder(attachment.gateway)
        {
            return Err(Refusal::AttachedElsewhere { name: name.into(), holder });
        }
        let writer = WriterGen(volume.writer.0 + 1);
        let mut volume = Volume::clone(&volume);
        volume.writer = writer;
        volume.attachment = Some(Attachment { gateway, writer, since: at });
        let id = volume.id;
        self.put_volume(volume);
        Ok(Outcome::Attached { volume: id, writer })
    }

    fn detach(&mut self, id: VolumeId, writer: WriterGen) -> Answer {
        if let Some(volume) = self.volumes.get(&id)
            && volume.attachment.as_ref().is_some_and(|a| a.writer == writer)
        {
            let mut volume = Volume::clone(volume);
            volume.attachment = None;
            self.put_volume(volume);
        }
        Ok(Outcome::Done)
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
