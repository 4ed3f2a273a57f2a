//! How much of the replicas each disk should hold, how fast it claims them, and its bound.
//!
//! Fractions are of all slots, in units of 2^-32 ([`ONE`]).

use std::collections::BTreeMap;

use sheepdog_types::{SLOTS, hash64};

use super::Member;

/// The fraction 1: a replica of every slot.
pub(super) const ONE: u64 = 1 << 32;

/// By how much the load of a disk may exceed its share, in percent, when the first, the first two,
/// the first three or more replicas are counted. Fewer replicas vary more; bounding them as
/// tightly would move more data with every change of the membership.
const MARGIN: [u64; 3] = [25, 15, 9];

/// The greatest chance that rates are made for; certainty would need an infinite one.
const MAX_CHANCE: u64 = ONE - ONE / 1024;
/// Rounds in which the rates come close enough to what the weights ask for.
const ITERATIONS: usize = 16;

/// A member that can hold replicas.
#[derive(Clone, Copy)]
pub(super) struct Disk {
    /// Index into the members of the ring.
    pub member: u32,
    /// Zones and nodes, numbered from 0 without gaps.
    pub zone: u32,
    pub node: u32,
    weight: u64,
    /// Hash of the disk's id, the source of its order of slots.
    pub key: u64,
}

/// What one disk does for one replica of the slots.
#[derive(Clone, Copy)]
pub(super) struct Share {
    /// Speed of its claims, relative to those of the other disks.
    pub rate: u64,
    /// The most slots it may hold, this replica and the earlier ones together.
    pub bound: u32,
}

/// The disks and their targets.
#[derive(Clone)]
pub(super) struct Plan {
    /// Sorted by key, so that a disk's place says nothing about its age or address.
    pub disks: Vec<Disk>,
    zones: usize,
    nodes: usize,
}

impl Plan {
    /// Leaves out what can hold nothing.
    pub fn new(members: &[Member]) -> Self {
        let (mut zones, mut nodes) = (BTreeMap::new(), BTreeMap::new());
        let mut disks = Vec::with_capacity(members.len());
        for (member, index) in members.iter().zip(0..) {
            if member.weight == 0 {
                continue;
            }
            let (next_zone, next_node) = (zones.len() as u32, nodes.len() as u32);
            disks.push(Disk {
                member: index,
                zone: *zones.entry(member.zone).or_insert(next_zone),
                node: *nodes.entry(member.node).or_insert(next_node),
                weight: member.weight,
                key: hash64(member.disk.0),
            });
        }
        disks.sort_unstable_by_key(|disk| disk.key);
        Self { disks, zones: zones.len(), nodes: nodes.len() }
    }

    /// Nodes that can hold replicas.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// Whether a replica, the first being 0, goes to a zone without one; else to such a node.
    pub fn spreads_over_zones(&self, replica: usize) -> bool {
        replica < self.zones
    }

    /// The share of each disk in one replica, the first being 0.
    pub fn shares(&self, replica: usize) -> Vec<Share> {
        // What each disk is expected to hold of the replicas so far.
        let mut held = vec![0; self.disks.len()];
        // The mean of the rates for the replicas so far (times their number). As the claims of each
        // replica are the same, a disk whose rate grows from one to the next gets, beside what the
        // new rate is for, what the growth would have got it of the earlier ones: the mean is about
        // the rate that makes up for that. At least 1, so that a disk comes to claim every slot.
        let mut rate = vec![1; self.disks.len()];
        for replica in 0..=replica {
            let groups = self.groups(replica, &held);
            let rates = rates(&groups, replica as u64);
            for (index, disk) in self.disks.iter().enumerate() {
                let group = self.group(replica, disk);
                held[index] += groups[group].part(groups[group].gain, disk);
                rate[index] += groups[group].part(rates[group] << 24, disk);
            }
        }
        let margin = MARGIN[replica.min(MARGIN.len() - 1)];
        let share = |((disk, &held), &rate): ((&Disk, &u64), &u64)| Share {
            rate,
            bound: bound(held, margin, disk.key),
        };
        self.disks.iter().zip(&held).zip(&rate).map(share).collect()
    }

    fn group(&self, replica: usize, disk: &Disk) -> usize {
        if self.spreads_over_zones(replica) { disk.zone as usize } else { disk.node as usize }
    }

    /// The zones (or nodes) between which a replica is placed, given what the disks are expected to
    /// hold of the earlier ones.
    fn groups(&self, replica: usize, held: &[u64]) -> Vec<Group> {
        let count = if self.spreads_over_zones(replica) { self.zones } else { self.nodes };
        let mut groups = vec![Group::default(); count];
        for (disk, held) in self.disks.iter().zip(held) {
            let group = &mut groups[self.group(replica, disk)];
            group.weight += u128::from(disk.weight);
            group.held += held;
        }
        fill(&mut groups, replica as u64 + 1);
        let missing = |group: &Group| u128::from(group.target.saturating_sub(group.held));
        // Zones miss 1 in all. Nodes miss more, when their zone forced too many replicas on others.
        let all_missing: u128 = groups.iter().map(missing).sum();
        for group in &mut groups {
            group.gain = (missing(group) * u128::from(ONE) / all_missing.max(1)) as u64;
        }
        groups
    }
}

/// A zone or a node.
#[derive(Clone, Default)]
struct Group {
    weight: u128,
    /// What its disks are expected to hold of the earlier replicas.
    held: u64,
    /// What they should hold with this one, at most [`ONE`].
    target: u64,
    /// What they should get of this one.
    gain: u64,
}

impl Group {
    /// The part of a disk in what its group has.
    fn part(&self, of: u64, disk: &Disk) -> u64 {
        (u128::from(of) * u128::from(disk.weight) / self.weight) as u64
    }

    /// The chance to get this replica of a slot of which it has no earlier one.
    fn chance(&self) -> u64 {
        let free = u128::from(ONE.saturating_sub(self.held).max(1));
        (u128::from(self.gain) * u128::from(ONE) / free).min(u128::from(MAX_CHANCE)) as u64
    }
}

/// The rates of claims, [`ONE`] in all, at which the groups get their gains; `earlier` replicas have
/// been placed.
///
/// The chance of a group that competes is its rate by that of all that compete: all but those that
/// have an earlier replica, which the heavy ones are more likely to have. If group `g` competes, the
/// expected rate of those that have one is the sum of `rate * held` over the others, times what the
/// others hold more because `g` holds nothing. From that the rates follow by iteration; if all groups
/// are alike, they are at once what they should be.
fn rates(groups: &[Group], earlier: u64) -> Vec<u64> {
    let mut rates: Vec<u64> = groups.iter().map(|group| group.gain).collect();
    for _ in 0..ITERATIONS {
        let total: u128 = rates.iter().map(|&rate| u128::from(rate)).sum();
        let holding = |(&rate, group): (&u64, &Group)| u128::from(rate) * u128::from(group.held);
        let all_holding: u128 = rates.iter().zip(groups).map(holding).sum();
        let next = |(rate, group): (&u64, &Group)| {
            let others = all_holding - holding((rate, group));
            let others_hold = (earlier * ONE).saturating_sub(group.held).max(1);
            let absent = others * u128::from(earlier) / u128::from(others_hold);
            u128::from(group.chance()) * total.saturating_sub(absent) / u128::from(ONE)
        };
        let next: Vec<u128> = rates.iter().zip(groups).map(next).collect();
        let sum = next.iter().sum::<u128>().max(1);
        let next = next.iter().map(|rate| (rate * u128::from(ONE) / sum) as u64).collect();
        let before = std::mem::replace(&mut rates, next);
        if before == rates {
            break;
        }
    }
    rates
}

/// Sets the targets of all groups: proportional to their weights, `copies` in all, none over
/// [`ONE`]. There are at least `copies` groups, and none without weight.
fn fill(groups: &mut [Group], copies: u64) {
    let mut heaviest_first: Vec<usize> = (0..groups.len()).collect();
    heaviest_first.sort_unstable_by_key(|&group| std::cmp::Reverse(groups[group].weight));
    let mut weight: u128 = groups.iter().map(|group| group.weight).sum();
    let mut copies = u128::from(copies);
    for index in heaviest_first {
        let group = &mut groups[index];
        if group.weight * copies >= weight {
            group.target = ONE;
            weight -= group.weight;
            copies = copies.saturating_sub(1);
        } else {
            group.target = (group.weight * copies * u128::from(ONE) / weight) as u64;
        }
    }
}

/// The most slots that a disk may hold whose share is `fraction`.
///
/// The last digit is rounded up or down by the disk's key: a new member lowers the bounds of a few
/// disks by one slot, not those of all disks at once.
fn bound(fraction: u64, margin: u64, key: u64) -> u32 {
    let slots = u128::from(fraction) * SLOTS as u128 * u128::from(100 + margin) / 100;
    let dither = u128::from(key as u32);
    ((slots + dither) / u128::from(ONE)) as u32
}
