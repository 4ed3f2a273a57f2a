//! Nodes and disks that come, go, fail, and leave for good.

use super::{ClusterState, Disk, Node};
use crate::command::{
    Answer, DiskInfo, MAX_DISKS, MAX_NODES, MAX_REMOVED, MAX_WEIGHT, NodeInfo, Outcome, Refusal,
    check_zone,
};
use crate::history::EpochRecord;
use sheepdog_types::{DiskId, Epoch, NodeId};
use std::collections::BTreeSet;

impl ClusterState {
    pub(super) fn enter(&mut self, mut info: NodeInfo, at: u64) -> Answer {
        self.check_entry(&info)?;
        info.disks.retain(|d| !self.removed_disks.contains(&d.id));
        let known = self.nodes.get(&info.id);
        if let Some(node) = known
            && node.up
            && node.incarnation == info.incarnation
        {
            return Ok(Outcome::Entered { epoch: node.entered }); // a repeated proposal
        }
        let verb = if known.is_some() { "came back" } else { "joined" };
        let mut record = self.next_record(format!("{} {verb}", info.address), at);
        let were_up: Vec<DiskId> =
            self.disks.keys().copied().filter(|d| self.disk_up(*d)).collect();
        record.came_up = info.disks.iter().map(|d| d.id).filter(|d| !were_up.contains(d)).collect();
        let zone = match known {
            Some(node) if node.announced_zone == info.zone => node.zone.clone(),
            _ => info.zone.clone(),
        };
        let node = Node {
            address: info.address,
            zone,
            announced_zone: info.zone,
            up: true,
            incarnation: info.incarnation,
            entered: record.epoch,
            draining: known.is_some_and(|n| n.draining),
            removed: false,
            version: info.version,
        };
        self.nodes.insert(info.id, node);
        self.raise_version(&mut record);
        for disk in &info.disks {
            self.enter_disk(info.id, disk, &mut record);
        }
        self.leave_out(info.id, &info.disks, &were_up, &mut record);
        for disk in &record.went_down {
            record.cause += &format!(" without disk {disk}");
        }
        self.begin_epoch(record);
        self.replan(at);
        Ok(Outcome::Entered { epoch: self.epoch })
    }

    fn check_entry(&self, info: &NodeInfo) -> Result<(), Refusal> {
        if self.removed_nodes.contains(&info.id) {
            return Err(Refusal::Removed(info.id));
        }
        if info.version < self.version {
            let (node, version, agreed) = (info.id, info.version, self.version);
            return Err(Refusal::TooOld { node, version, agreed });
        }
        check_zone(&info.zone)?;
        if !self.nodes.contains_key(&info.id) && self.nodes.len() >= MAX_NODES {
            return Err(Refusal::Limit { what: "nodes".into(), limit: MAX_NODES });
        }
        let rival =
            self.nodes.iter().find(|(id, n)| **id != info.id && n.up && n.address == info.address);
        if let Some((&node, _)) = rival {
            return Err(Refusal::AddressInUse { address: info.address.clone(), node });
        }
        info.disks.iter().try_for_each(|disk| self.check_disk(info.id, disk))
    }

    /// What all members understand may be used from now on.
    fn raise_version(&mut self, record: &mut EpochRecord) {
        let least = self.nodes.values().filter(|n| !n.removed).map(|n| n.version).min();
        if let Some(version) = least.filter(|version| *version > self.version) {
            if self.version > 0 {
                record.cause += &format!("; the cluster is at version {version} now");
            }
            self.version = version;
        }
    }

    fn check_disk(&self, node: NodeId, disk: &DiskInfo) -> Result<(), Refusal> {
        check_weight(disk.weight)?;
        match self.disks.get(&disk.id) {
            Some(known) if known.node != node => {
                Err(Refusal::DiskElsewhere { disk: disk.id, node: known.node })
            }
            None if self.disks.len() >= MAX_DISKS => {
                Err(Refusal::Limit { what: "disks".into(), limit: MAX_DISKS })
            }
            _ => Ok(()),
        }
    }

    /// Takes a disk into service in the epoch of `record`.
    fn enter_disk(&mut self, node: NodeId, info: &DiskInfo, record: &mut EpochRecord) {
        let empty_cluster = self.volumes.is_empty();
        let epoch = record.epoch;
        let disk = self.disks.entry(info.id).or_insert(Disk {
            node,
            weight: info.weight,
            announced_weight: info.weight,
            present: true,
            entered: epoch,
            out: false,
            lost: false,
            retiring: false,
            full: false,
            missed_since: Some(Epoch(0)),
            restarted: false,
            sync_from: None,
        });
        if disk.announced_weight != info.weight {
            (disk.weight, disk.announced_weight) = (info.weight, info.weight);
        }
        (disk.present, disk.entered) = (true, epoch);
        disk.full = false; // or it says so again
        if disk.out {
            disk.out = false;
            record.came_in.push(info.id);
        }
        if empty_cluster {
            (disk.missed_since, disk.restarted, disk.sync_from) = (None, false, None);
            disk.lost = false;
        } else {
            disk.restarted = true;
            disk.sync_from = Some(epoch);
        }
    }

    /// Disks of `node` that came back without: they are down although their node is up.
    fn leave_out(
        &mut self,
        node: NodeId,
        announced: &[DiskInfo],
        were_up: &[DiskId],
        record: &mut EpochRecord,
    ) {
        for (id, disk) in self.disks.iter_mut().filter(|(_, d)| d.node == node) {
            if !announced.iter().any(|d| d.id == *id) {
                disk.leave(record.epoch);
                record.went_down.extend(were_up.contains(id).then_some(*id));
            }
        }
    }

    pub(super) fn down(&mut self, id: NodeId, incarnation: u64, reason: &str, at: u64) -> Answer {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Err(Refusal::NotMember(id));
        };
        if !node.up || node.incarnation != incarnation {
            return Ok(Outcome::Done); // it happened already, or the node is back
        }
        let cause = format!("{} is down: {reason}", node.address);
        let mut record = self.next_record(cause, at);
        self.stop_node(id, &mut record);
        self.begin_epoch(record);
        Ok(Outcome::Done)
    }

    /// Takes a node and its disks out of service.
    fn stop_node(&mut self, id: NodeId, record: &mut EpochRecord) {
        let was_up = self.nodes.get_mut(&id).is_some_and(|n| std::mem::take(&mut n.up));
        for (disk_id, disk) in self.disks.iter_mut().filter(|(_, d)| d.node == id) {
            record.went_down.extend((was_up && disk.present).then_some(*disk_id));
            disk.missed_since.get_or_insert(record.epoch);
            disk.sync_from = None;
        }
    }

    pub(super) fn bring_disk_up(
        &mut self,
        node: NodeId,
        incarnation: u64,
        disk: &DiskInfo,
        at: u64,
    ) -> Answer {
        let address = match self.nodes.get(&node) {
            Some(n) if n.up && n.incarnation == incarnation => n.address.clone(),
            _ => return Err(Refusal::NotMember(node)),
        };
        if self.removed_disks.contains(&disk.id) {
            return Err(Refusal::DiskRemoved(disk.id));
        }
        self.check_disk(node, disk)?;
        if self.disk_up(disk.id) {
            return Ok(Outcome::Done);
        }
        let cause = format!("disk {} of {address} came into service", disk.id);
        let mut record = self.next_record(cause, at);
        record.came_up.push(disk.id);
        self.enter_disk(node, disk, &mut record);
        self.begin_epoch(record);
        self.replan(at);
        Ok(Outcome::Done)
    }

    pub(super) fn take_disk_down(
        &mut self,
        id: DiskId,
        (incarnation, entered): (u64, Epoch),
        reason: &str,
        at: u64,
    ) -> Answer {
        let Some(disk) = self.disks.get(&id) else { return Err(Refusal::NoSuchDisk(id)) };
        let Some(node) = self.nodes.get(&disk.node) else { return Ok(Outcome::Done) };
        let same_life = node.incarnation == incarnation && disk.entered == entered;
        if !node.up || !same_life || !disk.present {
            return Ok(Outcome::Done);
        }
        let cause = format!("disk {id} of {} is out of service: {reason}", node.address);
        let mut record = self.next_record(cause, at);
        record.went_down.push(id);
        self.with_disk(id, |disk| disk.leave(record.epoch));
        self.begin_epoch(record);
        Ok(Outcome::Done)
    }

    pub(super) fn take_out(&mut self, disks: &[DiskId], at: u64) -> Answer {
        let down: Vec<DiskId> = self
            .disks
            .iter()
            .filter(|(id, d)| disks.contains(id) && !d.out && !self.disk_up(**id))
            .map(|(id, _)| *id)
            .collect();
        let total = self.disks.len();
        let stay = self.disks.values().filter(|d| !d.out).count();
        // More than half have to stay: when most are gone, moving data helps nobody.
        let room = stay.saturating_sub(total / 2 + 1);
        let gone = &down[..room.min(down.len())];
        if gone.is_empty() {
            let refusal = Refusal::TooManyOut { left: stay - down.len().min(1), total };
            return if down.is_empty() { Ok(Outcome::Done) } else { Err(refusal) };
        }
        let cause = format!("{} stayed down for long: others take their place", self.owners(gone));
        self.leave_ring(gone, cause, at, |_| {});
        Ok(Outcome::Done)
    }

    pub(super) fn give_up(&mut self, disks: &[DiskId], at: u64) -> Answer {
        for id in disks {
            if !self.disks.contains_key(id) {
                return Err(Refusal::NoSuchDisk(*id));
            }
            if self.disk_up(*id) {
                return Err(Refusal::DiskIsUp(*id));
            }
        }
        let fresh = |id: &&DiskId| self.disks.get(*id).is_some_and(|d| !d.is_given_up());
        let gone: Vec<DiskId> = disks.iter().filter(fresh).copied().collect();
        if gone.is_empty() {
            return Ok(Outcome::Done);
        }
        let cause = format!("what only {} had was given up", self.owners(&gone));
        self.leave_ring(&gone, cause, at, |disk| {
            disk.lost = true;
            disk.missed_since = Some(Epoch(0)); // it is never asked for anything again
        });
        Ok(Outcome::Done)
    }

    /// Takes disks that are down off the ring.
    fn leave_ring(&mut self, disks: &[DiskId], cause: String, at: u64, also: impl Fn(&mut Disk)) {
        let mut record = self.next_record(cause, at);
        for id in disks {
            self.with_disk(*id, |disk| {
                if !std::mem::replace(&mut disk.out, true) {
                    record.went_out.push(*id);
                }
                also(disk);
            });
        }
        self.begin_epoch(record);
        self.replan(at);
    }

    pub(super) fn drain(&mut self, id: NodeId, on: bool, force: bool, at: u64) -> Answer {
        let Some(node) = self.nodes.get(&id).filter(|n| !n.removed) else {
            return Err(Refusal::NotMember(id));
        };
        if node.draining == on {
            return Ok(Outcome::Done);
        }
        if on && !force {
            self.check_enough_left(|disk| disk.node == id)?;
        }
        let verb = if on { "is drained" } else { "takes data again" };
        let record = self.next_record(format!("{} {verb}", node.address), at);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.draining = on;
        }
        self.begin_epoch(record);
        self.replan(at);
        Ok(Outcome::Done)
    }

    pub(super) fn remove_node(&mut self, id: NodeId, force: bool, at: u64) -> Answer {
        if self.removed_nodes.contains(&id) {
            return Ok(Outcome::Done);
        }
        let Some(node) = self.nodes.get(&id) else { return Err(Refusal::NotMember(id)) };
        if node.up && !force {
            if self.disks.iter().any(|(disk, d)| d.node == id && self.on_ring(*disk)) {
                return Err(Refusal::NotDrained(id));
            }
            let holds = |a: &super::Attachment| a.gateway == id;
            let served = self.volumes.values().find(|v| v.attachment.as_ref().is_some_and(holds));
            if let Some(volume) = served {
                let volume = volume.spec.name.clone();
                return Err(Refusal::Serves { node: id, volume });
            }
        }
        if self.removed_nodes.len() >= MAX_REMOVED {
            return Err(Refusal::Limit { what: "removed nodes".into(), limit: MAX_REMOVED });
        }
        let mut record = self.next_record(format!("{} was removed", node.address), at);
        self.stop_node(id, &mut record);
        self.end_handovers(id);
        for (disk_id, disk) in self.disks.iter_mut().filter(|(_, d)| d.node == id) {
            disk.leave(record.epoch);
            if !std::mem::replace(&mut disk.out, true) {
                record.went_out.push(*disk_id);
            }
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.removed = true;
        }
        self.removed_nodes.insert(id);
        self.raise_version(&mut record);
        self.begin_epoch(record);
        self.replan(at);
        Ok(Outcome::Done)
    }

    pub(super) fn set_zone(&mut self, id: NodeId, zone: String, at: u64) -> Answer {
        check_zone(&zone)?;
        let Some(node) = self.nodes.get(&id).filter(|n| !n.removed) else {
            return Err(Refusal::NotMember(id));
        };
        if node.zone == zone {
            return Ok(Outcome::Done);
        }
        let record = self.next_record(format!("{} is in zone {zone} now", node.address), at);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.zone = zone;
        }
        self.begin_epoch(record);
        self.replan(at);
        Ok(Outcome::Done)
    }

    pub(super) fn set_weight(&mut self, id: DiskId, weight: u64, force: bool, at: u64) -> Answer {
        check_weight(weight)?;
        let Some(disk) = self.disks.get(&id) else { return Err(Refusal::NoSuchDisk(id)) };
        if disk.weight == weight {
            return Ok(Outcome::Done);
        }
        if weight == 0 && !force {
            self.check_enough_left(|other| std::ptr::eq(other, disk))?;
        }
        let record = self.next_record(format!("disk {id} has weight {weight} now"), at);
        self.with_disk(id, |disk| disk.weight = weight);
        self.begin_epoch(record);
        self.replan(at);
        Ok(Outcome::Done)
    }

    pub(super) fn retire_disk(&mut self, id: DiskId, force: bool, at: u64) -> Answer {
        if self.removed_disks.contains(&id) {
            return Ok(Outcome::Done);
        }
        let Some(disk) = self.disks.get(&id) else { return Err(Refusal::NoSuchDisk(id)) };
        if disk.retiring {
            return Ok(Outcome::Done);
        }
        if !force && self.disk_up(id) {
            self.check_enough_left(|other| std::ptr::eq(other, disk))?;
        }
        if self.removed_disks.len() >= MAX_REMOVED {
            return Err(Refusal::Limit { what: "removed disks".into(), limit: MAX_REMOVED });
        }
        let owner = self.owners(&[id]);
        let record = self.next_record(format!("disk {id} of {owner} is to be removed"), at);
        self.with_disk(id, |disk| disk.retiring = true);
        self.begin_epoch(record);
        self.replan(at);
        Ok(Outcome::Done)
    }

    /// Refuses what would leave fewer nodes on the ring than volumes have copies.
    fn check_enough_left(&self, leaves: impl Fn(&Disk) -> bool) -> Result<(), Refusal> {
        let copies = self.volumes.values().map(|v| usize::from(v.spec.copies)).max().unwrap_or(1);
        let nodes = |keep: &dyn Fn(&Disk) -> bool| {
            let wanted = self.disks.values().filter(|d| self.is_wanted(d) && keep(d));
            wanted.map(|d| d.node).collect::<BTreeSet<NodeId>>().len()
        };
        let (before, left) = (nodes(&|_| true), nodes(&|d| !leaves(d)));
        if left < copies && left < before {
            return Err(Refusal::TooFewLeft { left, copies });
        }
        Ok(())
    }

    /// The addresses of the nodes of some disks, for people.
    fn owners(&self, disks: &[DiskId]) -> String {
        let nodes: BTreeSet<NodeId> =
            disks.iter().filter_map(|d| self.disks.get(d)).map(|d| d.node).collect();
        let names: Vec<&str> =
            nodes.iter().filter_map(|n| self.nodes.get(n)).map(|n| n.address.as_str()).collect();
        names.join(", ")
    }

    fn with_disk(&mut self, id: DiskId, change: impl FnOnce(&mut Disk)) {
        if let Some(disk) = self.disks.get_mut(&id) {
            change(disk);
        }
    }
}

impl Disk {
    /// It is no longer in service from `epoch` on.
    fn leave(&mut self, epoch: Epoch) {
        self.present = false;
        self.missed_since.get_or_insert(epoch);
        self.sync_from = None;
    }
}

fn check_weight(weight: u64) -> Result<(), Refusal> {
    if weight > MAX_WEIGHT { Err(Refusal::BadWeight(weight)) } else { Ok(()) }
}
