//! The cluster as the data path sees it: an immutable picture of one revision of the state.

use crate::command::MAX_COPIES;
use crate::history::{EpochRecord, Forgotten, Standing, holders, needed_at_home};
use crate::ring::{Member, Ring};
use crate::settings::Settings;
use crate::state::{ClusterState, RingMembers, Volume};
use sheepdog_types::{DiskId, Epoch, NodeId, ObjectId, ObjectIndex, SLOTS, SlotId, VolumeId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A small set of disks, in placement order, without allocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disks {
    len: u8,
    ids: [DiskId; 2 * MAX_COPIES],
}

impl Disks {
    /// The disks as a slice.
    #[must_use]
    pub fn as_slice(&self) -> &[DiskId] {
        &self.ids[..usize::from(self.len)]
    }

    /// Adds a disk unless it is there already or the set is full.
    pub fn insert(&mut self, disk: DiskId) {
        if !self.contains(disk) && usize::from(self.len) < self.ids.len() {
            self.ids[usize::from(self.len)] = disk;
            self.len += 1;
        }
    }

    /// Removes a disk, if it is there; the others keep their order.
    pub fn remove(&mut self, disk: DiskId) {
        if let Some(at) = self.as_slice().iter().position(|d| *d == disk) {
            self.ids.copy_within(at + 1..usize::from(self.len), at);
            self.len -= 1;
        }
    }

    /// Whether the set holds `disk`.
    #[must_use]
    pub fn contains(&self, disk: DiskId) -> bool {
        self.as_slice().contains(&disk)
    }

    /// Iterates over the disks in order.
    pub fn iter(&self) -> impl Iterator<Item = DiskId> + '_ {
        self.as_slice().iter().copied()
    }

    /// Number of disks.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl FromIterator<DiskId> for Disks {
    fn from_iter<I: IntoIterator<Item = DiskId>>(iter: I) -> Self {
        let mut disks = Self::default();
        iter.into_iter().for_each(|disk| disks.insert(disk));
        disks
    }
}

/// A disk as the data path sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskView {
    /// Its node.
    pub node: NodeId,
    /// The node is up and has this disk.
    pub up: bool,
    /// Epoch in which it last came into service.
    pub entered: Epoch,
    /// It was down for so long that others take its place.
    pub out: bool,
    /// It was given up, and has not synchronised itself since: nobody waits for it.
    pub lost: bool,
    /// It, or its node, is to hold nothing.
    pub draining: bool,
    /// It has no room for what the next ring gives it.
    pub full: bool,
    /// First epoch whose writes it may lack.
    pub missed_since: Option<Epoch>,
    /// It may lack unflushed writes from before it came back.
    pub restarted: bool,
    /// It has to compare itself with its peers as of this epoch.
    pub sync_from: Option<Epoch>,
}

impl DiskView {
    /// It is up and lacks nothing that was acknowledged.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.up && self.missed_since.is_none() && !self.restarted
    }
}

/// A node as the data path sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// `IP:PORT`.
    pub address: String,
    /// Serving, as far as the log knows.
    pub up: bool,
    /// Of its latest entry.
    pub incarnation: u64,
    /// Its disks are to hold nothing.
    pub draining: bool,
}

/// Why a slot cannot serve I/O now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Fewer disks of the slot are up than `min_copies`, or than it takes to know who is newest.
    TooFew {
        /// How many are up.
        up: usize,
        /// The disks that are down.
        down: Vec<DiskId>,
    },
    /// The disks that are up may lack the newest writes; any one of these has them.
    For(Vec<DiskId>),
    /// The history was cut before it could be told who has the newest writes.
    Forgotten,
}

/// The replicas of a slot in one epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// Every up disk that a write must reach.
    pub members: Disks,
    /// The members whose newest version counts.
    pub authorities: Disks,
}

/// One revision of the cluster.
#[derive(Debug)]
pub struct View {
    /// The epoch.
    pub epoch: Epoch,
    /// Grows with every change the data path must see.
    pub revision: u64,
    /// First epoch with this placement.
    pub placement_since: Epoch,
    /// All disks.
    pub disks: BTreeMap<DiskId, DiskView>,
    /// All nodes.
    pub nodes: BTreeMap<NodeId, NodeView>,
    /// Highest volume id ever given out.
    pub last_volume: VolumeId,
    /// All volumes.
    pub volumes: Arc<BTreeMap<VolumeId, Arc<Volume>>>,
    /// Settings of the cluster.
    pub settings: Settings,
    history: Vec<EpochRecord>,
    ring: PlacedRing,
    next: Option<PlacedRing>,
}

#[derive(Clone, Debug)]
struct PlacedRing {
    members: RingMembers,
    ring: Arc<Ring>,
}

impl PlacedRing {
    fn build(members: &RingMembers) -> Self {
        let mut zones: Vec<&str> = members.values().map(|m| m.zone.as_str()).collect();
        zones.sort_unstable();
        zones.dedup();
        let zone_of = |name: &str| zones.binary_search(&name).map_or(0, |at| at as u32);
        let list: Vec<Member> = members
            .iter()
            .map(|(disk, m)| Member {
                disk: *disk,
                node: m.node,
                zone: zone_of(&m.zone),
                weight: m.weight,
            })
            .collect();
        Self { members: members.clone(), ring: Arc::new(Ring::new(&list)) }
    }

    /// Reuses a ring of `previous` when its members are the same: placement costs milliseconds.
    fn reuse_or_build(members: &RingMembers, previous: Option<&View>) -> Self {
        previous
            .into_iter()
            .flat_map(|view| std::iter::once(&view.ring).chain(view.next.as_ref()))
            .find(|placed| placed.members == *members)
            .cloned()
            .unwrap_or_else(|| Self::build(members))
    }

    fn place(&self, slot: SlotId, copies: usize) -> Disks {
        self.ring.place(slot, copies).iter().map(|replica| replica.disk).collect()
    }
}

impl View {
    /// The picture of `state`; rings are taken over from `previous` where they did not change.
    #[must_use]
    pub fn build(state: &ClusterState, previous: Option<&View>) -> Self {
        let nodes = state.nodes.iter().map(|(id, node)| {
            let (address, up) = (node.address.clone(), node.up);
            let (incarnation, draining) = (node.incarnation, node.draining);
            (*id, NodeView { address, up, incarnation, draining })
        });
        let disks = state.disks.iter().map(|(id, disk)| {
            let node = state.nodes.get(&disk.node);
            let view = DiskView {
                node: disk.node,
                up: disk.present && node.is_some_and(|n| n.up),
                entered: disk.entered,
                out: disk.out,
                lost: disk.lost,
                draining: disk.retiring || node.is_some_and(|n| n.draining || n.removed),
                full: disk.full,
                missed_since: disk.missed_since,
                restarted: disk.restarted,
                sync_from: disk.sync_from,
            };
            (*id, view)
        });
        Self {
            epoch: state.epoch,
            revision: state.revision,
            placement_since: state.placement_since,
            disks: disks.collect(),
            nodes: nodes.collect(),
            last_volume: state.last_volume,
            volumes: Arc::clone(&state.volumes),
            settings: state.settings.clone(),
            history: state.history.clone(),
            ring: PlacedRing::reuse_or_build(&state.ring, previous),
            next: state.next_ring.as_ref().map(|m| PlacedRing::reuse_or_build(m, previous)),
        }
    }

    /// Whether writes of `slot` have to reach `disk`.
    #[must_use]
    pub fn is_member(&self, slot: SlotId, copies: usize, disk: DiskId) -> bool {
        self.ring.place(slot, copies).contains(disk)
            || !self.is_full(disk) && self.comes(slot, copies).contains(disk)
    }

    /// Whether `disk` may have data of `slot`: a full one keeps what it got for the next ring.
    #[must_use]
    pub fn may_hold(&self, slot: SlotId, copies: usize, disk: DiskId) -> bool {
        self.ring.place(slot, copies).contains(disk) || self.comes(slot, copies).contains(disk)
    }

    /// The disks that are to hold `slot`'s data by the next ring.
    fn comes(&self, slot: SlotId, copies: usize) -> Disks {
        self.next.as_ref().map_or_else(Disks::default, |next| next.place(slot, copies))
    }

    /// Whether data are to move to a disk, or within it.
    #[must_use]
    pub fn is_to_come(&self, disk: DiskId) -> bool {
        self.next.as_ref().is_some_and(|next| next.members.contains_key(&disk))
    }

    /// Whether a disk has no room for what is to move to it.
    #[must_use]
    pub fn is_full(&self, disk: DiskId) -> bool {
        self.disks.get(&disk).is_some_and(|d| d.full)
    }

    /// The disks that hold `slot`'s data by placement, up or not.
    #[must_use]
    pub fn home(&self, slot: SlotId, copies: usize) -> Disks {
        self.ring.place(slot, copies)
    }

    /// Whether a disk is on the ring, or about to be.
    #[must_use]
    pub fn on_ring(&self, disk: DiskId) -> bool {
        let rings = std::iter::once(&self.ring).chain(&self.next);
        rings.map(|placed| &placed.members).any(|members| members.contains_key(&disk))
    }

    /// The node of a disk.
    #[must_use]
    pub fn node_of(&self, disk: DiskId) -> Option<NodeId> {
        self.disks.get(&disk).map(|d| d.node)
    }

    /// Whether `disk` is up.
    #[must_use]
    pub fn is_up(&self, disk: DiskId) -> bool {
        self.disks.get(&disk).is_some_and(|d| d.up)
    }

    /// How many of `home` have to be up for I/O, and to have every acknowledged write before a
    /// gateway may take what others wrote for safe.
    fn needed(&self, home: &Disks, min_copies: usize) -> usize {
        let in_place = |d: &DiskId| self.disks.get(d).is_none_or(|d| !d.out);
        needed_at_home(min_copies, home.iter().filter(in_place).count())
    }

    /// Whether every slot of `objects` objects of `volume` has at least `min_copies` up replicas
    /// that lack no acknowledged write; fewer where disks are out.
    #[must_use]
    pub fn is_intact(
        &self,
        volume: VolumeId,
        objects: u64,
        copies: usize,
        min_copies: usize,
    ) -> bool {
        if self.disks.values().all(DiskView::is_intact) {
            return self.disks.len() >= min_copies;
        }
        let enough = |slot: SlotId| {
            let home = self.home(slot, copies);
            let count =
                home.iter().filter(|d| self.disks.get(d).is_some_and(DiskView::is_intact)).count();
            count >= self.needed(&home, min_copies)
        };
        if objects >= SLOTS as u64 {
            return (0..=u16::MAX).all(|slot| enough(SlotId(slot)));
        }
        (0..objects as u32)
            .all(|index| enough(ObjectId { volume, index: ObjectIndex(index) }.slot()))
    }

    /// Whether replicas that were made equal in `epoch` still are, each having been written ever
    /// since: the placement is the same and none of them has been away or restarted.
    #[must_use]
    pub fn unbroken_since(&self, epoch: Epoch, members: &Disks) -> bool {
        self.placement_since <= epoch
            && members.iter().all(|d| self.disks.get(&d).is_some_and(|d| d.entered <= epoch))
    }

    /// Who serves `slot` for a volume with this policy.
    ///
    /// # Errors
    /// [`Waiting`], which names whom it waits for.
    pub fn slot(
        &self,
        slot: SlotId,
        copies: usize,
        min_copies: usize,
    ) -> Result<SlotView, Waiting> {
        let home = self.home(slot, copies);
        let mut members: Disks = home.iter().filter(|d| self.is_up(*d)).collect();
        let at_home = members.len();
        let takes = |d: &DiskId| self.is_up(*d) && !self.is_full(*d);
        self.comes(slot, copies).iter().filter(takes).for_each(|d| members.insert(d));
        // Those to come make up for disks that are out, not for disks that are only down: whoever
        // looks back at this epoch has to know whether it took writes.
        if at_home < self.needed(&home, min_copies) || members.len() < min_copies {
            let down = home.iter().filter(|d| !self.is_up(*d)).collect();
            return Err(Waiting::TooFew { up: members.len(), down });
        }
        let authorities = self.authorities(&home, min_copies)?;
        Ok(SlotView { members, authorities })
    }

    /// The up disks that know what is newest in `slot`, also when too few are up for I/O. Empty when
    /// no disk that could know is left, so that there is nothing to know.
    ///
    /// # Errors
    /// [`Waiting`], which names whom it waits for.
    pub fn sources(
        &self,
        slot: SlotId,
        copies: usize,
        min_copies: usize,
    ) -> Result<Disks, Waiting> {
        self.authorities(&self.home(slot, copies), min_copies)
    }

    /// The up disks of a slot whose newest version counts.
    ///
    /// A disk that was never away and not restarted has every acknowledged write. Without one,
    /// every disk that was there whenever the slot took writes ([`holders`]) has all flushed ones,
    /// and the newest version among them counts.
    fn authorities(&self, home: &Disks, min_copies: usize) -> Result<Disks, Waiting> {
        let view = |disk: &DiskId| self.disks.get(disk);
        let up_with = |keep: &dyn Fn(&DiskView) -> bool| -> Disks {
            home.iter().filter(|d| view(d).is_some_and(|v| v.up && keep(v))).collect()
        };
        let intact = up_with(&DiskView::is_intact);
        if !intact.is_empty() {
            return Ok(intact);
        }
        let standings: Vec<Standing> = home
            .iter()
            .filter_map(|disk| {
                let DiskView { up, out, missed_since, .. } = *view(&disk)?;
                Some(Standing { disk, up, out, missed_since })
            })
            .collect();
        // What was given up may have let others take writes: who has them, nobody can tell any
        // more. Then the newest version that is left counts.
        let is_given_up = |d: &DiskId| view(d).is_none_or(|v| v.lost);
        let some_given_up = home.iter().any(|d| is_given_up(&d));
        let left = || {
            let kept = up_with(&|v| !v.lost);
            if kept.is_empty() { up_with(&|_| true) } else { kept }
        };
        let eligible = match holders(&self.history, &standings, min_copies) {
            Ok(holding) if holding.is_empty() => left(),
            Ok(holding) => {
                let up: Disks = holding.iter().copied().filter(|d| self.is_up(*d)).collect();
                // Nobody waits for what was given up, even where nothing was ever written.
                let mut awaited = holding;
                awaited.retain(|d| !is_given_up(d));
                if up.is_empty() && !awaited.is_empty() {
                    return Err(Waiting::For(awaited));
                }
                if up.is_empty() || some_given_up { left() } else { up }
            }
            // The operator knows that it takes what is left, however old.
            Err(Forgotten) if some_given_up => left(),
            Err(Forgotten) => return Err(Waiting::Forgotten),
        };
        Ok(eligible)
    }
}
