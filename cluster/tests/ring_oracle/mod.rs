//! The rule of the ring, written down as directly as possible: all claims of all disks in one
//! sorted list, walked from its start for each replica. Shares no code with the ring.

use std::collections::BTreeMap;

use sheepdog_cluster::ring::Member;
use sheepdog_types::{DiskId, hash64};

const SLOTS: usize = 65_536;
const ONE: u128 = 1 << 32;

struct Claim {
    /// Tick, turn in the tick, and number of the claim among those of its disk.
    when: (usize, usize, usize),
    disk: usize,
    slot: usize,
}

/// The disks of every slot, for distinct members of positive weight and enough nodes.
pub fn place_all(members: &[Member], copies: usize) -> Vec<Vec<DiskId>> {
    let mut disks = members.to_vec();
    disks.sort_by_key(|member| hash64(member.disk.0));
    let zones: std::collections::BTreeSet<_> = disks.iter().map(|member| member.zone).collect();
    let mut placed: Vec<Vec<usize>> = vec![Vec::new(); SLOTS];
    let mut loads = vec![0; disks.len()];
    let mut held = vec![0; disks.len()];
    let mut rates = vec![1; disks.len()];
    for replica in 0..copies {
        let spread = replica < zones.len();
        let group = |disk: usize| if spread { disks[disk].zone.into() } else { disks[disk].node.0 };
        add_rates(&mut rates, &disks, &mut held, replica, group);
        let margin = [125, 115, 109][replica.min(2)];
        let bound = |disk: usize| {
            let dither = u128::from(hash64(disks[disk].disk.0)) % ONE;
            ((held[disk] * SLOTS as u128 * margin / 100 + dither) / ONE) as usize
        };
        let claims = claims(&disks, &rates);
        let patience = (SLOTS * 64).div_ceil(disks.len()).min(SLOTS);
        for bounded in [true, false] {
            for claim in &claims {
                let slot = &placed[claim.slot];
                let same = |&other: &usize| group(other) == group(claim.disk);
                let late = claim.when.0 >= patience || loads[claim.disk] >= bound(claim.disk);
                if slot.len() == replica && !slot.iter().any(same) && !(bounded && late) {
                    placed[claim.slot].push(claim.disk);
                    loads[claim.disk] += 1;
                }
            }
        }
    }
    let id = |disk: &usize| disks[*disk].disk;
    placed.iter().map(|slot| slot.iter().map(id).collect()).collect()
}

/// Adds the rates of all disks for one replica to `rates`, and what they should get of it to `held`.
fn add_rates(
    rates: &mut [u128],
    disks: &[Member],
    held: &mut [u128],
    replica: usize,
    group: impl Fn(usize) -> u64,
) {
    let (mut weights, mut had) = (BTreeMap::new(), BTreeMap::new());
    for (disk, member) in disks.iter().enumerate() {
        *weights.entry(group(disk)).or_insert(0) += u128::from(member.weight);
        *had.entry(group(disk)).or_insert(0) += held[disk];
    }
    let missing = |of: u64| target(&weights, of, replica + 1).saturating_sub(had[&of]);
    let missing: BTreeMap<u64, u128> = weights.keys().map(|&of| (of, missing(of))).collect();
    let all_missing: u128 = missing.values().sum();
    let gains = missing.iter().map(|(&of, missing)| (of, missing * ONE / all_missing)).collect();
    let group_rates = group_rates(gains, &had, replica as u128);
    for (disk, member) in disks.iter().enumerate() {
        let of = group(disk);
        let (weight, total) = (u128::from(member.weight), weights[&of]);
        held[disk] += missing[&of] * ONE / all_missing * weight / total;
        rates[disk] += group_rates[&of] * (1 << 24) * weight / total;
    }
}

fn group_rates(
    gains: BTreeMap<u64, u128>,
    had: &BTreeMap<u64, u128>,
    earlier: u128,
) -> BTreeMap<u64, u128> {
    let mut rates = gains.clone();
    for _ in 0..16 {
        let mut next = BTreeMap::new();
        for of in gains.keys() {
            let chance = gains[of] * ONE / (ONE.saturating_sub(had[of])).max(1);
            let others: u128 =
                rates.iter().filter(|(g, _)| *g != of).map(|(g, r)| r * had[g]).sum();
            let absent = others * earlier / (earlier * ONE).saturating_sub(had[of]).max(1);
            let competing = rates.values().sum::<u128>().saturating_sub(absent);
            next.insert(*of, chance.min(ONE * 1023 / 1024) * competing / ONE);
        }
        let sum: u128 = next.values().sum();
        rates = next.into_iter().map(|(of, rate)| (of, rate * ONE / sum)).collect();
    }
    rates
}

/// What a group should hold of `copies` replicas: set aside the heaviest group while its
/// proportional part is more than it can take.
fn target(weights: &BTreeMap<u64, u128>, group: u64, copies: usize) -> u128 {
    let (mut rest, mut copies) = (weights.clone(), copies as u128);
    loop {
        let total: u128 = rest.values().sum();
        let (&heaviest, &weight) = rest.iter().max_by_key(|(_, weight)| **weight).unwrap();
        if weight * copies < total {
            return rest[&group] * copies * ONE / total;
        }
        if heaviest == group || rest[&group] == weight {
            return ONE;
        }
        rest.remove(&heaviest);
        copies = copies.saturating_sub(1);
    }
}

fn term(index: usize) -> u128 {
    (1 << 40) / (SLOTS - index) as u128
}

/// All claims of all disks, sorted by time.
fn claims(disks: &[Member], rates: &[u128]) -> Vec<Claim> {
    let times: Vec<u128> = (0..SLOTS)
        .scan(0, |time, index| {
            *time += term(index);
            Some(*time)
        })
        .collect();
    let total: u128 = rates.iter().sum();
    let mut claims = Vec::new();
    for (disk, member) in disks.iter().enumerate() {
        let pace = ((rates[disk] * disks.len() as u128 * (1 << 24)) / total).max(1);
        let mut tick = 0;
        let mut now = times[0];
        for (number, &time) in times.iter().enumerate() {
            // The first tick by which a clock of this pace has come to the time of the claim.
            while now * pace / (1 << 24) < time {
                tick += 1;
                now = if tick < SLOTS { times[tick] } else { now + now / 64 };
            }
            let turn = if tick % 2 == 0 { disk } else { disks.len() - 1 - disk };
            let slot = slot_of_claim(hash64(member.disk.0), number);
            claims.push(Claim { when: (tick, turn, number), disk, slot });
        }
    }
    claims.sort_unstable_by_key(|claim| claim.when);
    claims
}

fn slot_of_claim(key: u64, number: usize) -> usize {
    let mut x = number as u64;
    for round in 0..3 {
        let add = (hash64(key ^ 1) >> (16 * round)) % 65_536;
        let multiply = ((hash64(key ^ 2) >> (16 * round)) % 65_536) | 1;
        x = (x + add) * multiply % 65_536;
        x ^= x / 256;
    }
    x as usize
}
