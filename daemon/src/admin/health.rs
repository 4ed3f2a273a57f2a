//! Whether all data is served with all replicas, and if not, why.

use super::stats::all_disks;
use crate::api::{Health, SlotCounts, Status};
use crate::control::DiskHealth;
use crate::node::{Node, now};
use crate::wire::incompatible;
use sheepdog_cluster::state::{ClusterState, Disk, Volume};
use sheepdog_cluster::view::{View, Waiting};
use sheepdog_log::ClusterLog;
use sheepdog_types::{DiskId, SLOTS, SlotId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Voters of the cluster log that there are once enough nodes are up.
const VOTERS: usize = 5;
/// Reasons of one kind that are listed before the rest is only counted.
const REASONS: usize = 20;

/// How a slot is, for one policy.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum SlotState {
    Complete,
    Degraded,
    Waiting,
}

/// How the cluster is, as this node sees it.
pub async fn health(node: &Arc<Node>) -> Result<Health, String> {
    let disks = all_disks(node).await;
    let node = Arc::clone(node);
    let health = tokio::task::spawn_blocking(move || judge(&node, &disks)).await;
    health.map_err(|e| e.to_string())
}

/// Copies and min_copies of all volumes.
pub fn policies(view: &View) -> BTreeSet<(usize, usize)> {
    let policy = |v: &Arc<Volume>| (usize::from(v.spec.copies), usize::from(v.spec.min_copies));
    view.volumes.values().map(policy).collect()
}

fn judge(node: &Node, disks: &[DiskHealth]) -> Health {
    let view = node.cluster.view();
    let policies = policies(&view);
    let mut reasons = node_reasons(node, &view, disks);
    let mut slots = SlotCounts { total: SLOTS, ..SlotCounts::default() };
    let mut waiting: BTreeMap<String, usize> = BTreeMap::new();
    for slot in 0..=u16::MAX {
        let states = policies.iter().map(|&(copies, min)| {
            let (state, reason) = slot_state(&view, SlotId(slot), copies, min);
            if let Some(reason) = reason {
                *waiting.entry(reason).or_default() += 1;
            }
            state
        });
        match states.max().unwrap_or(SlotState::Complete) {
            SlotState::Complete => slots.complete += 1,
            SlotState::Degraded => slots.degraded += 1,
            SlotState::Waiting => slots.waiting += 1,
        }
    }
    let more = waiting.len().saturating_sub(REASONS);
    let shown = waiting.into_iter().take(REASONS);
    reasons.extend(shown.map(|(reason, count)| format!("{count} slots {reason}")));
    if more > 0 {
        reasons.push(format!("and {more} other groups of slots that wait"));
    }
    let hold = view.disks.iter().filter(|(id, d)| d.up && !d.draining && view.on_ring(**id));
    let nodes = hold.map(|(_, d)| d.node).collect::<BTreeSet<_>>().len();
    if slots.degraded > 0 && policies.iter().any(|(copies, _)| nodes < *copies) {
        reasons
            .push(format!("{nodes} nodes hold data, fewer than the copies that some volumes want"));
    }
    let serving = node.cluster.may_serve(&view);
    let status = match () {
        () if slots.waiting > 0 || !serving => Status::Unavailable,
        () if slots.degraded > 0 || !reasons.is_empty() => Status::Degraded,
        () => Status::Ok,
    };
    Health { status, epoch: view.epoch.0, slots, reasons }
}

fn node_reasons(node: &Node, view: &View, disks: &[DiskHealth]) -> Vec<String> {
    let mut reasons = Vec::new();
    let log = node.log.status();
    if let Some(failure) = &log.failure {
        reasons.push(format!("the cluster log of this node has stopped: {failure}; restart it"));
    }
    if log.leader.is_none() {
        reasons.push("no majority of the voters of the cluster log can be reached".into());
    }
    let wanted = view.nodes.values().filter(|n| n.up).count().min(VOTERS);
    if log.voters.len() < wanted {
        reasons.push(format!(
            "the cluster log has {} of {wanted} voters; a new node becomes one within seconds",
            log.voters.len()
        ));
    }
    if !node.cluster.has_entered(view) {
        let obstacle = node.obstacle();
        let colon = if obstacle.is_empty() { "" } else { ": " };
        reasons.push(format!("this node has not entered the cluster yet{colon}{obstacle}"));
    } else if !node.cluster.lease.is_held() {
        reasons.push("this node has no lease: the log's leader does not hear of it".into());
    }
    for (id, member) in view.nodes.iter() {
        if let Some(theirs) = node.incompatible.of(*id, &member.address) {
            let address = &member.address;
            reasons.push(format!("no connection to node {address}: {}", incompatible(theirs)));
        }
    }
    reasons.extend(absent_reasons(&node.cluster.state(), disks));
    for disk in view.disks.values().filter(|d| d.up && d.sync_from.is_some()) {
        let address = view.nodes.get(&disk.node).map_or("?", |n| n.address.as_str());
        reasons.push(format!("a disk of node {address} is being synchronised"));
    }
    for (id, disk) in view.disks.iter().filter(|(_, d)| d.up && d.full) {
        let address = view.nodes.get(&disk.node).map_or("?", |n| n.address.as_str());
        reasons.push(format!(
            "disk {id} of node {address} is full: data cannot move to it; free space on it, or add disks"
        ));
    }
    reasons.extend(damage_reasons(view, disks));
    if view.settings.recovery_paused && view.disks.values().any(|d| d.up && d.sync_from.is_some()) {
        reasons.push("background recovery is paused; `dog node recovery resume` ends that".into());
    }
    let total = reasons.len();
    if total > 2 * REASONS {
        reasons.truncate(2 * REASONS);
        reasons.push(format!("and {} more", total - 2 * REASONS));
    }
    reasons
}

/// Damaged blocks on disks.
fn damage_reasons(view: &View, known: &[DiskHealth]) -> Vec<String> {
    let mut reasons = Vec::new();
    for DiskHealth { id, damaged, .. } in known {
        if *damaged > 0
            && let Some(node) = view.node_of(*id).and_then(|node| view.nodes.get(&node))
        {
            let blocks = if *damaged == 1 { "block" } else { "blocks" };
            let address = &node.address;
            reasons.push(format!("disk {id} of node {address}: {damaged} damaged {blocks}"));
        }
    }
    reasons
}

/// Who is not there, and when others take their place.
fn absent_reasons(state: &ClusterState, known: &[DiskHealth]) -> Vec<String> {
    let mut reasons = Vec::new();
    for (id, node) in &state.nodes {
        let disks: BTreeMap<DiskId, &Disk> =
            state.disks.iter().filter(|(_, d)| d.node == *id).map(|(id, d)| (*id, d)).collect();
        let address = &node.address;
        if node.removed {
            reasons.push(format!("node {address} was removed; its data are not elsewhere yet"));
        } else if !node.up {
            let place = successor(state, disks.iter());
            reasons.push(format!("node {address} is {place}"));
        } else {
            for (id, disk) in &disks {
                let failure = known.iter().find(|d| d.id == *id).and_then(|d| d.failure.as_deref());
                if disk.present && failure.is_none() {
                    continue;
                }
                let which = format!("disk {id} of node {address} is out of service");
                let why = failure.map_or_else(String::new, |failure| format!(": {failure}"));
                let place = successor(state, std::iter::once((id, disk)));
                let place = place.strip_prefix("down").unwrap_or("; others take its place");
                reasons.push(format!("{which}{why}{place}"));
            }
        }
    }
    reasons
}

/// `down` or `out`, and when others take the place of these disks.
fn successor<'a>(
    state: &ClusterState,
    disks: impl Iterator<Item = (&'a DiskId, &'a &'a Disk)>,
) -> String {
    let (mut any, mut all_out, mut since) = (false, true, None);
    for (id, disk) in disks {
        (any, all_out) = (true, all_out && disk.out);
        since = since.max(down_since(state, *id));
    }
    let interval = state.settings.down_out_interval;
    match since {
        _ if !any => "down".into(),
        _ if all_out => "out: others take its place".into(),
        _ if interval == 0 => "down; nobody takes its place (down-out-interval is never)".into(),
        _ if !others_may_take_over(state) => {
            "down; nobody takes its place, for most disks would be missing".into()
        }
        // Clocks of different nodes, and a new leader waits anew.
        Some(at) if at + interval > now() => {
            format!("down, others take its place in {}", minutes(at + interval - now()))
        }
        _ => "down, others take its place soon".into(),
    }
}

/// Whether a further disk could go out: more than half of all have to stay.
fn others_may_take_over(state: &ClusterState) -> bool {
    state.disks.values().filter(|d| !d.out).count() > state.disks.len() / 2 + 1
}

/// When a disk last went down, seconds since 1970, if that is remembered.
pub fn down_since(state: &ClusterState, disk: DiskId) -> Option<u64> {
    state.history.iter().rev().find(|r| r.went_down.contains(&disk)).map(|r| r.at)
}

fn minutes(seconds: u64) -> String {
    match seconds {
        0..90 => format!("{seconds} s"),
        90..5400 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h", seconds.div_ceil(3600)),
    }
}

fn slot_state(
    view: &View,
    slot: SlotId,
    copies: usize,
    min_copies: usize,
) -> (SlotState, Option<String>) {
    match view.slot(slot, copies, min_copies) {
        Ok(_) => {
            let home = view.home(slot, copies);
            let good =
                |d: DiskId| view.disks.get(&d).is_some_and(|d| d.up && d.sync_from.is_none());
            let complete = home.len() == copies && home.iter().all(good);
            (if complete { SlotState::Complete } else { SlotState::Degraded }, None)
        }
        Err(waiting) => (SlotState::Waiting, Some(waiting_text(view, &waiting, Some(min_copies)))),
    }
}

/// Why a slot waits, and for whom, for people. It needs so many copies.
pub fn waiting_text(view: &View, waiting: &Waiting, needed: Option<usize>) -> String {
    let names = |disks: &[DiskId]| {
        let mut addresses: Vec<&str> = disks
            .iter()
            .filter_map(|d| view.nodes.get(&view.node_of(*d)?))
            .map(|n| n.address.as_str())
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses.join(", ")
    };
    match waiting {
        Waiting::TooFew { up, down } => {
            let needed = needed.map_or_else(String::new, |n| format!(" of at least {n}"));
            format!("have {up}{needed} copies up and wait for one of: {}", names(down))
        }
        Waiting::For(disks) => format!("wait for the newest data, which is on: {}", names(disks)),
        Waiting::Forgotten => "wait: too long ago to tell who has the newest data".into(),
    }
}
