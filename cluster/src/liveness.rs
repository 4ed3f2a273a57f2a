//! Who has to leave when nodes cannot reach each other, and how soon a node may enter again.
//!
//! Both are decided by the leader of the cluster log, from what it heard lately; nothing of it is
//! part of the agreed state. Two leaders may decide differently, one after the other: that costs
//! an epoch, never data.

use sheepdog_types::NodeId;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A node that may be told to leave, or to stay out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub id: NodeId,
    /// It is up; otherwise it wants to enter.
    pub up: bool,
    /// It votes in the cluster log.
    pub voter: bool,
    /// It has disks.
    pub storage: bool,
    /// Volumes that are attached to it.
    pub volumes: usize,
}

/// Who reaches whom, as far as somebody looked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Graph {
    /// The leader, which never leaves: who cannot reach the leader has no lease.
    pub me: NodeId,
    /// Up nodes and those that want to enter.
    pub nodes: Vec<Candidate>,
    /// Voters of the cluster log, whether they are among `nodes` or not.
    pub voters: usize,
    /// Nodes with disks that have to stay.
    pub min_storage: usize,
    /// Pairs of which the first cannot reach the second.
    pub broken: BTreeSet<(NodeId, NodeId)>,
}

impl Graph {
    /// The nodes without which all others reach each other, in no particular order.
    ///
    /// No node of them could stay. When that would leave too few voters or nodes with disks, no
    /// node that is up has to leave, and only those stay out that cannot reach one of them.
    #[must_use]
    pub fn excluded(&self) -> BTreeSet<NodeId> {
        let excluded = self.cover(|_| true);
        if self.suffices_without(&excluded) {
            return excluded;
        }
        self.cover(|node| !node.up)
    }

    /// Takes the node with the most broken links out until none is left. Of equals the one goes
    /// that is not in yet, then the one with fewer volumes, then the one with the higher id.
    fn cover(&self, may_leave: impl Fn(&Candidate) -> bool) -> BTreeSet<NodeId> {
        let mut excluded: Vec<NodeId> = Vec::new();
        loop {
            let is_left = |id: &NodeId| !excluded.contains(id);
            let worst = self
                .nodes
                .iter()
                .filter(|node| node.id != self.me && is_left(&node.id) && may_leave(node))
                .map(|node| (self.links_of(node.id).filter(is_left).count(), node))
                .filter(|(links, _)| *links > 0)
                .max_by_key(|(links, node)| (*links, !node.up, Reverse(node.volumes), node.id));
            let Some((_, worst)) = worst else { break };
            excluded.push(worst.id);
        }
        // A later choice may have made an earlier one needless.
        let mut needed: BTreeSet<NodeId> = excluded.iter().copied().collect();
        for id in excluded {
            if self.links_of(id).all(|other| needed.contains(&other)) {
                needed.remove(&id);
            }
        }
        needed
    }

    /// The nodes that `id` cannot reach or that cannot reach it, each once.
    fn links_of(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let is_broken = move |other: NodeId| {
            self.broken.contains(&(id, other)) || self.broken.contains(&(other, id))
        };
        self.nodes.iter().map(|n| n.id).filter(move |other| *other != id && is_broken(*other))
    }

    fn suffices_without(&self, excluded: &BTreeSet<NodeId>) -> bool {
        if !self.nodes.iter().any(|node| node.up && excluded.contains(&node.id)) {
            return true;
        }
        let left = || self.nodes.iter().filter(|node| !excluded.contains(&node.id));
        let voters = left().filter(|node| node.voter).count();
        let storage = left().filter(|node| node.storage).count();
        voters > self.voters / 2 && storage >= self.min_storage
    }
}

/// Entries within a short time that cost a node nothing.
const FREE_ENTRIES: u32 = 4;
/// Time without another entry after which one of the past ones is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(120);
/// Time between two entries once there were too many; it doubles with each further one.
const FIRST_HOLD: Duration = Duration::from_secs(2);
/// Longest time between two entries.
const LONGEST_HOLD: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
struct Entries {
    incarnation: u64,
    /// Entries that are not forgotten.
    count: u32,
    latest: Duration,
}

/// Makes nodes that come and go all the time wait longer each time: every entry is a new epoch
/// for everybody. Times count from any fixed moment.
#[derive(Clone, Debug, Default)]
pub struct Damping {
    nodes: BTreeMap<NodeId, Entries>,
}

impl Damping {
    /// Notes the incarnation with which a node was last seen in the agreed state.
    pub fn observe(&mut self, node: NodeId, incarnation: u64, now: Duration) {
        let first = Entries { incarnation, count: 0, latest: now };
        let known = self.nodes.entry(node).or_insert(first);
        if known.incarnation == incarnation && known.count > 0 {
            return;
        }
        known.count = known.count.saturating_sub(known.forgotten(now)).saturating_add(1);
        (known.incarnation, known.latest) = (incarnation, now);
    }

    /// How long a node has to wait from now on before it may enter; `None` if it may at once.
    #[must_use]
    pub fn hold(&self, node: NodeId, now: Duration) -> Option<Duration> {
        let known = self.nodes.get(&node)?;
        let count = known.count.saturating_sub(known.forgotten(now));
        let excess = count.checked_sub(FREE_ENTRIES + 1)?;
        let hold = FIRST_HOLD.saturating_mul(1 << excess.min(16)).min(LONGEST_HOLD);
        let left = (known.latest + hold).checked_sub(now)?;
        (!left.is_zero()).then_some(left)
    }

    /// Entries of a node that are not forgotten.
    #[must_use]
    pub fn entries(&self, node: NodeId, now: Duration) -> u32 {
        self.nodes.get(&node).map_or(0, |known| known.count.saturating_sub(known.forgotten(now)))
    }
}

impl Entries {
    fn forgotten(&self, now: Duration) -> u32 {
        let calm = now.saturating_sub(self.latest).as_secs() / FORGET_AFTER.as_secs();
        u32::try_from(calm).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEADER: u64 = 1;

    /// Nodes 1 to `count`, all of them up voters with disks; node 1 leads.
    fn graph(count: u64, broken: &[(u64, u64)]) -> Graph {
        let node =
            |id| Candidate { id: NodeId(id), up: true, voter: id <= 5, storage: true, volumes: 0 };
        Graph {
            me: NodeId(LEADER),
            nodes: (1..=count).map(node).collect(),
            voters: count.min(5) as usize,
            min_storage: 1,
            broken: broken.iter().map(|(a, b)| (NodeId(*a), NodeId(*b))).collect(),
        }
    }

    fn node(graph: &mut Graph, id: u64) -> &mut Candidate {
        graph.nodes.iter_mut().find(|n| n.id == NodeId(id)).unwrap()
    }

    fn excluded(graph: &Graph) -> Vec<u64> {
        graph.excluded().iter().map(|id| id.0).collect()
    }

    #[test]
    fn nobody_leaves_while_all_reach_each_other() {
        assert!(excluded(&graph(5, &[])).is_empty());
    }

    #[test]
    fn of_two_that_cannot_reach_each_other_one_leaves() {
        assert_eq!(excluded(&graph(5, &[(2, 3)])), [3]);
        assert_eq!(excluded(&graph(5, &[(3, 2)])), [3]);
        assert_eq!(excluded(&graph(5, &[(2, 3), (3, 2)])), [3]);
        let mut busy = graph(5, &[(2, 3)]);
        node(&mut busy, 3).volumes = 1;
        assert_eq!(excluded(&busy), [2]);
        node(&mut busy, 2).up = false;
        node(&mut busy, 2).volumes = 9;
        assert_eq!(excluded(&busy), [2], "who is in stays in");
    }

    #[test]
    fn the_leader_stays() {
        let mut graph = graph(3, &[(1, 3), (1, 2)]);
        graph.voters = 1;
        assert_eq!(excluded(&graph), [2, 3]);
    }

    #[test]
    fn who_has_the_most_broken_links_leaves_alone() {
        let mut graph = graph(5, &[(2, 3), (4, 2), (5, 2), (1, 2)]);
        node(&mut graph, 2).volumes = 100;
        assert_eq!(excluded(&graph), [2]);
    }

    #[test]
    fn two_broken_pairs_cost_two_nodes() {
        assert_eq!(excluded(&graph(6, &[(2, 3), (4, 5)])), [3, 5]);
    }

    #[test]
    fn nobody_leaves_needlessly() {
        // The middle of a star goes first by its links, and its ends have others that go anyway.
        let star = [(4, 5), (4, 6), (4, 7), (4, 8)];
        let leaves = [(5, 9), (5, 10), (6, 11), (6, 12), (7, 13), (7, 14), (8, 15), (8, 16)];
        assert_eq!(excluded(&graph(16, &[&star[..], &leaves].concat())), [5, 6, 7, 8]);
    }

    #[test]
    fn never_so_many_leave_that_too_few_stay() {
        let mut graph = graph(3, &[(2, 3)]);
        graph.min_storage = 3;
        assert!(excluded(&graph).is_empty());
        graph.min_storage = 2;
        assert_eq!(excluded(&graph), [3]);
        graph.voters = 5; // two more are down: three are needed
        assert!(excluded(&graph).is_empty());
        node(&mut graph, 3).voter = false;
        assert!(excluded(&graph).is_empty());
        node(&mut graph, 3).up = false;
        assert_eq!(excluded(&graph), [3], "who is not in costs nobody anything");
    }

    #[test]
    fn one_bad_node_keeps_no_others_out() {
        let mut graph = graph(4, &[(3, 2), (4, 2)]);
        node(&mut graph, 3).up = false;
        node(&mut graph, 4).up = false;
        assert_eq!(excluded(&graph), [2]);
        // Unless it is needed itself.
        graph.min_storage = 4;
        assert_eq!(excluded(&graph), [3, 4]);
    }

    #[test]
    fn random_graphs_are_covered_by_no_more_than_needed() {
        let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7u64);
        println!("SEED={seed}");
        let mut state = seed;
        let mut draw = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..500 {
            let count = 2 + draw(8);
            let links: Vec<_> = (0..draw(12))
                .map(|_| (1 + draw(count), 1 + draw(count)))
                .filter(|(a, b)| a != b)
                .collect();
            let mut graph = graph(count, &links);
            (graph.voters, graph.min_storage) = (0, 0);
            for id in 2..=count {
                node(&mut graph, id).up = draw(3) > 0;
                node(&mut graph, id).volumes = draw(3) as usize;
            }
            let excluded = graph.excluded();
            assert!(!excluded.contains(&NodeId(LEADER)));
            let is_left = |without: &BTreeSet<NodeId>| {
                graph.broken.iter().any(|(a, b)| !without.contains(a) && !without.contains(b))
            };
            assert!(!is_left(&excluded), "{graph:?}: {excluded:?}");
            for id in &excluded {
                let mut fewer = excluded.clone();
                fewer.remove(id);
                assert!(is_left(&fewer), "{id} left needlessly: {graph:?}: {excluded:?}");
            }
        }
    }

    const NODE: NodeId = NodeId(7);

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn a_few_quick_restarts_are_free() {
        let mut damping = Damping::default();
        for entry in 1..=u64::from(FREE_ENTRIES) {
            assert_eq!(damping.hold(NODE, seconds(entry)), None, "before entry {entry}");
            damping.observe(NODE, entry, seconds(entry));
            damping.observe(NODE, entry, seconds(entry)); // seen again
        }
        assert_eq!(damping.entries(NODE, seconds(9)), FREE_ENTRIES);
        assert_eq!(damping.hold(NODE, seconds(5)), None);
    }

    #[test]
    fn a_crash_loop_waits_longer_each_time_up_to_a_bound() {
        let mut damping = Damping::default();
        let (mut now, mut waits) = (Duration::ZERO, Vec::new());
        for entry in 1..20 {
            damping.observe(NODE, entry, now);
            let wait = damping.hold(NODE, now).unwrap_or_default();
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(damping.hold(NODE, now), None);
        }
        assert_eq!(waits[..10], [0, 0, 0, 0, 2, 4, 8, 16, 32, 60]);
        assert!(waits[10..].iter().all(|wait| *wait == 60), "{waits:?}");
        assert_eq!(damping.hold(NodeId(8), now), None, "others are not held up");
    }

    #[test]
    fn stability_is_rewarded() {
        let mut damping = Damping::default();
        for entry in 1..=8 {
            damping.observe(NODE, entry, seconds(0));
        }
        assert_eq!(damping.hold(NODE, seconds(0)), Some(seconds(16)));
        assert_eq!(damping.hold(NODE, seconds(6)), Some(seconds(10)));
        damping.observe(NODE, 9, 3 * FORGET_AFTER);
        assert_eq!(damping.entries(NODE, 3 * FORGET_AFTER), 6);
        let calm = 20 * FORGET_AFTER;
        damping.observe(NODE, 10, calm);
        assert_eq!((damping.entries(NODE, calm), damping.hold(NODE, calm)), (1, None));
    }
}
