//! What a run is like: nodes, disks, zones, volumes, and which faults it has.

use super::rng::Rng;
use super::world::Time;
use sheepdog_cluster::state::{ClusterState, RingMembers};
use sheepdog_cluster::view::View;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// How often each kind of fault happens, in millionths per step; 0 for never.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultPlan {
    /// A process dies; what it wrote stays.
    pub crash: u64,
    /// A node loses its power, and with it what was not synced.
    pub power: u64,
    /// All nodes lose their power at once.
    pub blackout: u64,
    /// A process stops for a while, and goes on as if nothing had happened.
    pub freeze: u64,
    /// The thread of a gateway that takes views does not run for a while.
    pub deaf: u64,
    /// A pair of nodes cannot talk.
    pub cut: u64,
    /// One direction between two nodes is cut.
    pub one_way: u64,
    /// A node is cut off from all others.
    pub isolate: u64,
    /// The cluster falls into two parts.
    pub split: u64,
    /// A connection breaks.
    pub reset: u64,
    /// A node is slow for a while.
    pub slow: u64,
    /// A disk fails, and its node goes on without it.
    pub disk: u64,
    /// A disk has no space for a while.
    pub full: u64,
    /// A block rots.
    pub rot: u64,
    /// A new node joins.
    pub join: u64,
    /// A volume is deleted, and another one made.
    pub volumes: u64,
    /// The youngest node, or a disk of it, is drained, takes data again, or is removed.
    pub drain: u64,
    /// Steps after which others take the place of a disk that is down; 0 for never.
    pub out: Time,
    /// A volume moves to another gateway.
    pub hand_over: u64,
    /// A guest begins to move to another node while it runs.
    pub migrate: u64,
    /// Clocks run at different speeds.
    pub skew: bool,
    /// Longest delay of a message, in steps.
    pub delay: u64,
}

impl FaultPlan {
    /// Some of the faults, some often and some rarely.
    pub fn random(rng: &mut Rng) -> Self {
        let mut some = |often: u64| match rng.below(4) {
            0 | 1 => 0,
            2 => often / 3,
            _ => often,
        };
        let mut plan = Self {
            crash: some(3_000),
            power: some(1_000),
            blackout: some(400),
            freeze: some(1_500),
            deaf: some(4_000),
            cut: some(4_000),
            one_way: some(4_000),
            isolate: some(1_500),
            split: some(700),
            reset: some(10_000),
            slow: some(2_000),
            disk: some(600),
            full: some(2_000),
            rot: some(8_000),
            join: some(1_000),
            volumes: some(1_500),
            drain: some(1_500),
            out: some(900),
            hand_over: some(1_000),
            migrate: some(5_000),
            skew: some(1) > 0,
            delay: 0,
        };
        plan.delay = [2, 4, 12, 30][rng.below(4) as usize];
        // A block that rots while another copy is away may be the last one: nothing can be asked
        // of the cluster then.
        if plan.rot > 0 && rng.chance(700) {
            plan.rot = 0;
        }
        if plan.rot > 0 {
            plan = Self {
                rot: plan.rot,
                reset: plan.reset,
                full: 0,
                hand_over: plan.hand_over,
                migrate: plan.migrate,
                delay: plan.delay.min(12),
                ..Self::default()
            };
        }
        plan
    }
}

/// Which node has how many disks and is in which zone. Drawn from a few patterns of which every
/// cluster is a beginning, so that rings need not be placed anew for every seed.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    pub pattern: usize,
    pub nodes: usize,
    /// Disks of every node, if they are not drawn.
    pub each: Option<usize>,
    /// Number of zones, if it is not drawn.
    pub zones: Option<usize>,
    /// The last nodes have no disks, and vote instead of the others.
    pub witnesses: usize,
}

/// Disks of the nodes, over and over, and number of zones (0: each node is one).
const PATTERNS: [(&[usize], usize); 4] =
    [(&[1], 0), (&[1, 2], 3), (&[2, 1, 3], 0), (&[1, 1, 2, 0], 4)];

impl Topology {
    pub fn random(rng: &mut Rng, nodes: Option<usize>) -> Self {
        let pattern = rng.below(PATTERNS.len() as u64) as usize;
        let drawn = rng.range(5, 12) as usize;
        Self { pattern, nodes: nodes.unwrap_or(drawn), each: None, zones: None, witnesses: 0 }
    }

    /// One disk in each node, each a zone.
    pub fn plain(nodes: usize) -> Self {
        Self { pattern: 0, nodes, each: None, zones: None, witnesses: 0 }
    }

    pub fn disks(self, node: usize) -> usize {
        if node < self.nodes && node >= self.nodes - self.witnesses {
            return 0;
        }
        let disks = PATTERNS[self.pattern].0;
        self.each.unwrap_or(disks[node % disks.len()])
    }

    pub fn zone(self, node: usize) -> String {
        match self.zones.unwrap_or(PATTERNS[self.pattern].1) {
            0 => format!("z{}", node + 1),
            zones => format!("z{}", node % zones + 1),
        }
    }
}

/// Copies and least copies of a volume.
pub fn random_copies(rng: &mut Rng) -> (u8, u8) {
    [(3, 2), (3, 2), (3, 1), (2, 1), (4, 2), (5, 3), (3, 3)][rng.below(7) as usize]
}

/// How long a fault of some kind lasts.
pub fn duration(rng: &mut Rng, now: Time) -> Time {
    now + match rng.below(4) {
        0 => rng.range(1, 20),
        1 => rng.range(20, 150),
        2 => rng.range(100, 400),
        _ => rng.range(300, 900),
    }
}

type Rings = (RingMembers, Option<RingMembers>);

/// Views with the rings of earlier runs. Placing a ring costs more than a run.
static PLACED: LazyLock<Mutex<HashMap<String, Arc<View>>>> = LazyLock::new(Mutex::default);
/// A ring takes a MiB.
const MAX_PLACED: usize = 400;

fn key(rings: &Rings) -> String {
    let ring = |members: &RingMembers| -> String {
        let one = |(disk, m): (&_, &sheepdog_cluster::state::RingMember)| {
            format!("{disk:?}{:?}{}{};", m.node, m.zone, m.weight)
        };
        members.iter().map(one).collect()
    };
    format!("{}|{}", ring(&rings.0), rings.1.as_ref().map(ring).unwrap_or_default())
}

/// The view of a state; `previous` is the one before it.
pub fn build_view(state: &ClusterState, previous: Option<&Arc<View>>, moved: bool) -> Arc<View> {
    if let (Some(previous), false) = (previous, moved) {
        return Arc::new(View::build(state, Some(previous)));
    }
    let key = key(&(state.ring.clone(), state.next_ring.clone()));
    let known = PLACED.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    if let Some(known) = known {
        return Arc::new(View::build(state, Some(&known)));
    }
    let view = Arc::new(View::build(state, previous.map(AsRef::as_ref)));
    let mut placed = PLACED.lock().unwrap_or_else(PoisonError::into_inner);
    if placed.len() >= MAX_PLACED {
        placed.clear();
    }
    placed.insert(key, Arc::clone(&view));
    view
}
