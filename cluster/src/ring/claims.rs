//! The claims of the disks, and who gets a replica of each slot.
//!
//! A disk of rate `r` makes claim `n` (from 0) at time `-ln(1 - (n + 1) / SLOTS) / r`: what lies at
//! the evenly spaced points of the exponential distribution. Of such clocks, the chance to be the
//! first is proportional to the rate. Claims are handled tick by tick; in a tick a disk of average
//! rate makes one claim.

use std::iter::successors;

use sheepdog_types::{SLOTS, hash64};

use super::shares::{Plan, Share};

/// Fraction bits of a claim time.
const TIME_BITS: u32 = 40;
/// Fraction bits of a disk's pace, its rate divided by the average.
const PACE_BITS: u32 = 24;
/// Claims per slot after which the bounds are given up for what is still open: by then a slot whose
/// disks are not full has long been decided.
const PATIENCE: usize = 64;
/// No disk.
const NOBODY: u32 = u32::MAX;

/// Gives every slot one more replica, as an index into the ring's members. `earlier` are the
/// replicas it has.
pub(super) fn level(plan: &Plan, earlier: &[&[u32]]) -> Box<[u32]> {
    let shares = plan.shares(earlier.len());
    let mut race = Race::new(plan, &shares, earlier);
    // The bounds may leave a slot open when only full disks are in a zone that it lacks. A slot
    // without its replica is worse than a disk over its bound.
    let patience = (SLOTS * PATIENCE).div_ceil(plan.disks.len().max(1)).min(SLOTS);
    race.run(patience);
    if race.open > 0 {
        race.rooms.fill(u32::MAX);
        race.run(usize::MAX);
    }
    race.winners
}

/// The claim times of a disk of rate 1: the sums of `1/SLOTS + 1/(SLOTS - 1) + …`, which are the
/// mean order statistics of `SLOTS` exponential variables (Rényi 1953) and need no logarithm.
static TIMES: [u64; SLOTS] = {
    let mut times = [0; SLOTS];
    let (mut n, mut time) = (0, 0);
    while n < SLOTS {
        time += (1 << TIME_BITS) / (SLOTS - n) as u64;
        times[n] = time;
        n += 1;
    }
    times
};

/// The ends of the ticks. When a disk of average rate has claimed all slots, ever longer ticks follow,
/// until the slowest disk has.
fn ticks_of_average_rate() -> impl Iterator<Item = u128> {
    let longer = |now: &u128| Some(now + now / 64).filter(|now| now >> 80 == 0);
    let last = u128::from(TIMES[SLOTS - 1]);
    TIMES.iter().map(|&time| u128::from(time)).chain(successors(Some(last), longer).skip(1))
}

/// The order in which a disk claims the slots: a permutation of them.
#[derive(Clone, Copy)]
struct Order {
    add: [u16; 3],
    multiply: [u16; 3],
}

impl Order {
    fn new(key: u64) -> Self {
        let (a, b) = (hash64(key ^ 1), hash64(key ^ 2));
        let part = |hash: u64, index: u32| (hash >> (16 * index)) as u16;
        Self {
            add: [part(a, 0), part(a, 1), part(a, 2)],
            multiply: [part(b, 0) | 1, part(b, 1) | 1, part(b, 2) | 1],
        }
    }

    /// The slot of claim `n`. Each step can be undone (an odd factor has an inverse modulo 2^16),
    /// so no slot comes twice.
    fn slot(self, n: u16) -> u16 {
        let ([a, b, c], [k, l, m]) = (self.add, self.multiply);
        let x = n.wrapping_add(a).wrapping_mul(k);
        let x = (x ^ (x >> 8)).wrapping_add(b).wrapping_mul(l);
        let x = (x ^ (x >> 8)).wrapping_add(c).wrapping_mul(m);
        x ^ (x >> 8)
    }
}

/// A disk that claims.
struct Runner {
    order: Order,
    /// Its rate by the average rate.
    pace: u64,
    /// The number of its next claim.
    next: u32,
}

/// All disks claiming one replica of all slots.
struct Race<'a> {
    plan: &'a Plan,
    /// The zone (or node) of each member, and of which no slot gets a second replica here.
    groups: Vec<u32>,
    earlier: &'a [&'a [u32]],
    runners: Vec<Runner>,
    /// How many more slots each disk may hold.
    rooms: Vec<u32>,
    /// One bit for each slot that is still open.
    open_slots: Vec<u64>,
    open: usize,
    winners: Box<[u32]>,
}

impl<'a> Race<'a> {
    fn new(plan: &'a Plan, shares: &[Share], earlier: &'a [&'a [u32]]) -> Self {
        let spread = plan.spreads_over_zones(earlier.len());
        let members = plan.disks.iter().map(|disk| disk.member as usize + 1).max().unwrap_or(0);
        let mut groups = vec![NOBODY; members];
        let mut loads = vec![0u32; members];
        for disk in &plan.disks {
            groups[disk.member as usize] = if spread { disk.zone } else { disk.node };
        }
        for &member in earlier.iter().copied().flatten() {
            loads[member as usize] += 1;
        }
        let total: u128 = shares.iter().map(|share| u128::from(share.rate)).sum();
        let runner = |(share, key): (&Share, u64)| Runner {
            order: Order::new(key),
            // Fits: at most the number of disks, with PACE_BITS of fraction.
            pace: (((u128::from(share.rate) * shares.len() as u128) << PACE_BITS) / total).max(1)
                as u64,
            next: 0,
        };
        let room =
            |(share, member): (&Share, u32)| share.bound.saturating_sub(loads[member as usize]);
        Self {
            plan,
            groups,
            earlier,
            runners: shares.iter().zip(plan.disks.iter().map(|d| d.key)).map(runner).collect(),
            rooms: shares.iter().zip(plan.disks.iter().map(|d| d.member)).map(room).collect(),
            open_slots: vec![u64::MAX; SLOTS / 64],
            open: SLOTS,
            winners: vec![NOBODY; SLOTS].into(),
        }
    }

    /// Handles the claims of the first `ticks` ticks, until no slot is open.
    fn run(&mut self, ticks: usize) {
        self.runners.iter_mut().for_each(|runner| runner.next = 0);
        let count = self.runners.len();
        for (tick, now) in ticks_of_average_rate().take(ticks).enumerate() {
            // To and fro, so that no disk is always before another when both claim at once.
            for turn in 0..count {
                let disk = if tick % 2 == 0 { turn } else { count - 1 - turn };
                self.tick(disk, now);
            }
            if self.open == 0 {
                return;
            }
        }
    }

    /// Handles the claims that a disk makes until `now`.
    fn tick(&mut self, disk: usize, now: u128) {
        let Runner { order, pace, next } = self.runners[disk];
        let until = ((now * u128::from(pace)) >> PACE_BITS).min(u128::from(u64::MAX)) as u64;
        let mut claim = next as usize;
        while claim < SLOTS && TIMES[claim] <= until {
            let slot = usize::from(order.slot(claim as u16));
            claim += 1;
            if self.open_slots[slot / 64] >> (slot % 64) & 1 == 1 {
                self.claim(disk, slot);
            }
        }
        self.runners[disk].next = claim as u32;
    }

    /// Gives an open slot to a disk that has room for it, unless its zone (or node) has a replica.
    fn claim(&mut self, disk: usize, slot: usize) {
        let member = self.plan.disks[disk].member;
        let group = |member: u32| self.groups[member as usize];
        let taken = |level: &&[u32]| group(level[slot]) == group(member);
        if self.rooms[disk] == 0 || self.earlier.iter().any(taken) {
            return;
        }
        self.rooms[disk] -= 1;
        self.open_slots[slot / 64] &= !(1 << (slot % 64));
        self.open -= 1;
        self.winners[slot] = member;
    }
}
