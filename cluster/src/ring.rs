//! The placement ring: which disks hold the replicas of a slot.
//!
//! A pure function of the membership: two nodes that agree on the members of an epoch agree on
//! every placement, whatever happened before and in whatever order the members are listed. All
//! arithmetic is in integers, so that it is the same on every machine.
//!
//! # The rule
//!
//! Every disk goes round the 2^16 slots in an order of its own, a permutation keyed by its id, and
//! claims one slot after the other (`ring/claims.rs`). The claims are its virtual nodes; a disk of twice
//! the weight claims twice as fast. The first replica of a slot is the disk that claims it first.
//! The second is the next one in another zone, and so on; when every zone has its replica, the
//! next ones go to nodes that have none yet. A disk that already holds its share of the replicas
//! up to this one, plus a margin, is passed over (`ring/shares.rs`).
//!
//! So `place(slot, n)` is always the beginning of `place(slot, n + 1)`: volumes with different
//! numbers of copies share the replica sets, and the peering, of their slots.
//!
//! # Why not one circle of random points
//!
//! With 1000 disks and 3 copies a disk holds 197 of the 196,608 replicas. If each falls on it
//! independently of the others (a circle of many random points, rendezvous hashing, straw2), their
//! number has a standard deviation of √197, 7 %, and the fullest disk is more than 20 % over
//! the mean, however many points there are: it is the slots that are few. Here
//!
//! - a disk's claims are evenly spread: exactly one slot is its first choice, one its second, and
//!   so on. That leaves 4 %, and, as each slot still takes the earliest claims, a disk that
//!   joins or leaves moves nothing but its own replicas;
//! - the margin cuts off what is left over it, as consistent hashing with bounded loads does
//!   (Mirrokni, Thorup, Zadimoghaddam 2016). Bounding the loads of a circle of random points
//!   would move far more than its share with every change; here hardly any disk is at its bound.
//!
//! The price is that placements cannot be found one by one; [`Ring::new`] computes them all.

mod claims;
mod shares;

use std::fmt;
use std::ops::Deref;
use std::sync::OnceLock;

use sheepdog_types::{DiskId, NodeId, SlotId};

/// The most replicas that a slot can have.
pub const MAX_COPIES: usize = 8;

/// Replicas per slot that [`Ring::new`] places at once; further ones are placed when first asked
/// for.
const EAGER_COPIES: usize = 3;

/// A disk on the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// The disk. Each disk is a member once; of several entries the least one counts.
    pub disk: DiskId,
    /// The node it is in: a slot never has two replicas on one node.
    pub node: NodeId,
    /// Its failure domain, as a number that the caller gives to each zone name. Only equality
    /// counts: placements do not depend on which number a zone has.
    pub zone: u32,
    /// Its share of the replicas, relative to the other members, in any unit (GiB of capacity).
    /// A disk of weight 0 holds nothing.
    pub weight: u64,
}

/// Where one replica of a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Replica {
    /// The disk.
    pub disk: DiskId,
    /// The node of that disk.
    pub node: NodeId,
}

/// The replicas of one slot, in ring order. A slice of at most [`MAX_COPIES`] of them.
#[derive(Clone, Copy)]
pub struct Placement {
    replicas: [Replica; MAX_COPIES],
    len: usize,
}

impl Deref for Placement {
    type Target = [Replica];

    fn deref(&self) -> &[Replica] {
        &self.replicas[..self.len]
    }
}

impl PartialEq for Placement {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Placement {}

impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// The placement of all slots for one membership.
///
/// Takes 256 KiB for each replica that has been asked for, and at least three of them.
#[derive(Clone)]
pub struct Ring {
    members: Vec<Member>,
    /// What places the replicas: the members that can hold any, and their shares.
    plan: shares::Plan,
    /// For each replica, the first being 0: the disk of every slot, as an index into `members`.
    levels: [OnceLock<Box<[u32]>>; MAX_COPIES],
}

impl Ring {
    /// Places all slots on `members`.
    ///
    /// Takes some 20 ms for a thousand disks: once for each epoch, not for each request.
    #[must_use]
    pub fn new(members: &[Member]) -> Self {
        let mut members = members.to_vec();
        members.sort_unstable();
        members.dedup_by_key(|member| member.disk);
        let plan = shares::Plan::new(&members);
        let ring = Self { members, plan, levels: Default::default() };
        for replica in 0..ring.copies(EAGER_COPIES) {
            ring.level(replica);
        }
        ring
    }

    /// The first `copies` replicas of `slot`, in ring order: on disks of different zones, and when
    /// there are fewer zones than copies, the rest on different nodes.
    ///
    /// Fewer than `copies` when there are fewer nodes, or more than [`MAX_COPIES`] are asked for.
    /// Allocates nothing up to three copies; the first question for a fourth (fifth, …) replica
    /// takes some milliseconds to place it for all slots.
    #[must_use]
    pub fn place(&self, slot: SlotId, copies: usize) -> Placement {
        let nowhere = Replica { disk: DiskId(0), node: NodeId(0) };
        let mut placement = Placement { replicas: [nowhere; MAX_COPIES], len: self.copies(copies) };
        for (replica, place) in placement.replicas[..placement.len].iter_mut().enumerate() {
            let index = self.level(replica)[usize::from(slot.0)];
            let Member { disk, node, .. } = self.members[index as usize];
            *place = Replica { disk, node };
        }
        placement
    }

    /// All members, those of weight 0 as well, in the order of their disk ids.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member that is this disk.
    #[must_use]
    pub fn member(&self, disk: DiskId) -> Option<&Member> {
        let index = self.members.binary_search_by_key(&disk, |member| member.disk).ok()?;
        Some(&self.members[index])
    }

    /// How many replicas a slot has when `copies` are asked for: no node has two.
    #[must_use]
    pub fn copies(&self, copies: usize) -> usize {
        copies.min(MAX_COPIES).min(self.plan.nodes())
    }

    fn level(&self, replica: usize) -> &[u32] {
        self.levels[replica].get_or_init(|| {
            let earlier: Vec<&[u32]> = (0..replica).map(|earlier| self.level(earlier)).collect();
            claims::level(&self.plan, &earlier)
        })
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("members", &self.members).finish_non_exhaustive()
    }
}
