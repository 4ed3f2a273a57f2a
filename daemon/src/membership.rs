//! Keeps the membership true: the leader gives the place of what is down for long to others and has the
//! log forget removed nodes; each node reports its disks that fail or come, lets go of those that
//! were removed, and stops when it was removed itself.

use crate::api::DiskState;
use crate::cluster::lock;
use crate::control::{NodeReply, NodeRequest};
use crate::node::{Node, now};
use crate::replica::Disk;
use sheepdog_cluster::command::{Command, DiskInfo, Refusal};
use sheepdog_cluster::state::ClusterState;
use sheepdog_log::ClusterLog;
use sheepdog_types::{DiskId, Epoch, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// Pause between two looks of the leader.
const LEAD_EVERY: Duration = Duration::from_millis(500);
/// Pause between two looks of a node at itself.
const TEND_EVERY: Duration = Duration::from_millis(200);
/// How long a refusal to take the place of disks is believed.
const REFUSED_FOR: Duration = Duration::from_secs(30);
/// How long a node may be outside the cluster before it asks whether it was removed.
const DOUBT: Duration = Duration::from_secs(1);
/// How long the answer to that is waited for.
const ASK: Duration = Duration::from_secs(1);
/// How long a removed node stays, so that the log can do without its vote.
const LINGER: Duration = Duration::from_secs(10);
/// How long others may go on using a disk that is being closed.
const CLOSE: Duration = Duration::from_secs(5);
/// What a store consists of.
const STORE_FILES: [&str; 6] = ["superblock", "index", "data", "sums", "log", "lock"];

/// What the leader does until the node stops. Who is down every node watches, so that another leader
/// does not begin to wait anew.
pub async fn lead(node: Arc<Node>) {
    let (mut disks, mut nodes) = (Absent::default(), Absent::default());
    let mut refused: Option<Instant> = None;
    loop {
        sleep(LEAD_EVERY).await;
        let now = Instant::now();
        let (due, gone, up) = {
            let state = node.cluster.state();
            let interval = state.settings.down_out_interval;
            let due = disks.due(absent_disks(&state), interval, now);
            let down = state.nodes.iter().filter(|(_, n)| !n.up).map(|(id, n)| (id.0, n.entered));
            let gone = nodes.due(down, interval, now);
            let up = state.nodes.iter().filter(|(_, n)| n.up).map(|(id, _)| id.0);
            (due, gone, up.collect::<Vec<_>>())
        };
        if !node.log.is_confirmed_leader() {
            refused = None;
            continue;
        }
        node.log.reconcile_members(&up, &gone);
        if !due.is_empty() && refused.is_none_or(|at| at.elapsed() >= REFUSED_FOR) {
            tracing::warn!(?due, "disks stayed down for long; others take their place");
            match node.propose(&Command::Out { disks: due, at: self::now() }).await {
                Ok(Ok(_)) => {}
                Ok(Err(refusal)) => {
                    tracing::warn!(%refusal, "nobody can take their place now");
                    refused = Some(Instant::now());
                }
                Err(error) => tracing::warn!(error, "nobody takes their place yet"),
            }
        }
        forget_in_log(&node).await;
    }
}

/// The disks that are down and whose place nobody has taken, and when they last came.
fn absent_disks(state: &ClusterState) -> impl Iterator<Item = (DiskId, Epoch)> {
    let waits =
        |(id, disk): &(&DiskId, &sheepdog_cluster::state::Disk)| !state.disk_up(**id) && !disk.out;
    state.disks.iter().filter(waits).map(|(id, disk)| (*id, disk.entered))
}

/// Since when this node has seen each of them down, by when they came before: it may have come and gone
/// again between two looks. A daemon that starts begins anew.
#[derive(Debug)]
struct Absent<T>(BTreeMap<(T, Epoch), Instant>);

impl<T> Default for Absent<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Ord + Copy> Absent<T> {
    /// Those of `down` that have been so for `interval` seconds; 0 is never.
    fn due(
        &mut self,
        down: impl Iterator<Item = (T, Epoch)>,
        interval: u64,
        now: Instant,
    ) -> Vec<T> {
        let seen = std::mem::take(&mut self.0);
        self.0 = down.map(|life| (life, seen.get(&life).copied().unwrap_or(now))).collect();
        let interval = Duration::from_secs(interval);
        let passed = |since: Instant| now.saturating_duration_since(since) >= interval;
        let due = self.0.iter().filter(|(_, since)| !interval.is_zero() && passed(**since));
        due.map(|((id, _), _)| *id).collect()
    }
}

/// Has the cluster log do without nodes that were removed. Itself last: then it leads no more.
async fn forget_in_log(node: &Node) {
    let status = node.log.status();
    let mut removed: Vec<NodeId> = {
        let state = node.cluster.state();
        let gone = |id: &NodeId| status.is_member(id.0);
        state.removed_nodes.iter().copied().filter(gone).collect()
    };
    removed.sort_by_key(|id| *id == node.cluster.node);
    for id in removed {
        match node.log.remove_member(id.0).await {
            Ok(()) => tracing::info!(node = %id, "the cluster log does without a removed node"),
            Err(error) => tracing::warn!(node = %id, %error, "it stays in the cluster log for now"),
        }
    }
}

/// What a node does about itself until it stops.
pub async fn tend(node: Arc<Node>) {
    let mut outside_since = None;
    loop {
        sleep(TEND_EVERY).await;
        if node.cluster.has_entered(&node.cluster.view()) {
            outside_since = None;
            report_disks(&node).await;
        } else {
            let since = *outside_since.get_or_insert_with(Instant::now);
            if since.elapsed() > DOUBT {
                outside_since = None; // not again at once
                if was_removed(&node).await {
                    return leave(&node).await;
                }
            }
        }
        if node.cluster.state().removed_nodes.contains(&node.cluster.node) {
            return leave(&node).await;
        }
        let removed: Vec<DiskId> = {
            let state = node.cluster.state();
            let ids = own_disks(&node).into_iter().map(|(info, _)| info.id);
            ids.filter(|id| state.removed_disks.contains(id)).collect()
        };
        for disk in removed {
            forget_disk(&node, disk).await;
        }
    }
}

/// The disks that `node.json` names.
#[must_use]
pub fn own_disks(node: &Node) -> Vec<(DiskInfo, PathBuf)> {
    let identity = node.identity();
    let known = |entry: &crate::dir::DiskEntry| {
        Some((DiskInfo { id: entry.id.parse().ok()?, weight: entry.weight }, entry.path.clone()))
    };
    identity.disks.iter().filter_map(known).collect()
}

/// Tells the cluster of disks of this node that failed, and of those that came.
async fn report_disks(node: &Node) {
    let (incarnation, id) = (node.cluster.incarnation(), node.cluster.node);
    // A full disk left service on purpose, and comes back when there is room.
    let full = node.recoveries.progress().into_iter().filter(|p| p.full).map(|p| p.disk);
    let full: BTreeSet<DiskId> = full.collect();
    for (info, _) in own_disks(node) {
        let Some(disk) = node.replica.disk(info.id) else { continue };
        let (up, removed, entered) = {
            let state = node.cluster.state();
            let entered = state.disks.get(&info.id).map_or(Epoch(0), |d| d.entered);
            (state.disk_up(info.id), state.removed_disks.contains(&info.id), entered)
        };
        let command = match disk.store.failure() {
            Some(reason) if up => {
                tracing::error!(disk = %info.id, %reason, "a disk is out of service");
                let reason = reason.to_string();
                Command::DiskDown { disk: info.id, incarnation, entered, reason, at: now() }
            }
            None if !up && !removed && !full.contains(&info.id) => {
                Command::DiskUp { node: id, incarnation, disk: info, at: now() }
            }
            _ => continue,
        };
        match node.propose(&command).await {
            Ok(Ok(_)) => {}
            Ok(Err(Refusal::NotMember(_))) => return, // it enters again, with what it has
            Ok(Err(refusal)) => {
                tracing::warn!(disk = %disk.id, %refusal, "a disk is not in service")
            }
            Err(error) => tracing::warn!(disk = %disk.id, error, "the cluster cannot be told yet"),
        }
    }
}

/// Answers [`NodeRequest::Removed`].
#[must_use]
pub fn is_removed(node: &Node, id: NodeId) -> NodeReply {
    let removed = node.cluster.state().removed_nodes.contains(&id);
    NodeReply::Removed { removed, in_log: node.log.status().is_member(id.0) }
}

/// Whether another member says that this node was removed. Its own log may never tell it.
async fn was_removed(node: &Node) -> bool {
    ask_others(node, |removed, _| removed).await
}

/// Whether some member's answer to [`NodeRequest::Removed`] says so.
async fn ask_others(node: &Node, says_so: impl Fn(bool, bool) -> bool) -> bool {
    let me = node.cluster.node;
    let mut addresses: Vec<String> = node.log.status().addresses.into_values().collect();
    let known = node.cluster.view();
    let others = known.nodes.iter().filter(|(id, _)| **id != me);
    addresses.extend(others.map(|(_, n)| n.address.clone()));
    addresses.extend(node.identity().join.iter().cloned());
    addresses.sort_unstable();
    addresses.dedup();
    let own = node.identity().address.clone();
    let question = NodeRequest::Removed { node: me };
    for address in addresses.iter().filter(|address| **address != own) {
        let ask = node.client.ask(address, &question);
        if let Ok(Ok(NodeReply::Removed { removed, in_log })) = timeout(ASK, ask).await
            && says_so(removed, in_log)
        {
            return true;
        }
    }
    false
}

/// This node was removed: it stops, as soon as the log can do without its vote.
async fn leave(node: &Node) {
    let begin = Instant::now();
    while begin.elapsed() < LINGER && !ask_others(node, |removed, in_log| removed && !in_log).await
    {
        sleep(TEND_EVERY).await;
    }
    let refusal = Refusal::Removed(node.cluster.node);
    node.expelled.send_replace(Some(refusal.to_string()));
}

/// Lets go of a disk that is no member any more: its store is closed, `node.json` forgets it, and
/// its files are set aside so that nobody takes them for a store. Failing that, they stay, and the
/// cluster refuses the disk.
pub async fn forget_disk(node: &Arc<Node>, id: DiskId) {
    let _changing = node.disk_changes.lock().await;
    let Some((_, path)) = own_disks(node).into_iter().find(|(info, _)| info.id == id) else {
        return;
    };
    let gone = |entry: &crate::dir::DiskEntry| entry.id == id.to_string();
    if let Err(error) = node.change_identity(|i| i.disks.retain(|entry| !gone(entry))) {
        tracing::error!(disk = %id, %error, "a removed disk cannot be forgotten yet");
        return;
    }
    lock(&node.unopened).remove(&id);
    let worker = Arc::clone(node);
    let aside = tokio::task::spawn_blocking(move || {
        close(&worker, id);
        set_aside(&path, id)
    });
    match aside.await {
        Ok(Ok(to)) => {
            tracing::info!(disk = %id, to = %to.display(), "a disk was removed; its files are set aside");
        }
        Ok(Err(error)) => {
            tracing::warn!(disk = %id, %error, "a disk was removed; its files could not be set aside");
        }
        Err(error) => tracing::error!(disk = %id, %error, "a disk was removed"),
    }
}

/// Closes a disk, waiting for what still uses it. Blocks.
pub fn close(node: &Node, id: DiskId) {
    let Some(mut disk) = node.close_disk(id) else { return };
    node.recoveries.forget(id);
    node.cluster.nudge(); // its recovery ends
    if let Err(error) = disk.store.flush_wait() {
        tracing::error!(disk = %id, %error, "the last flush failed");
    }
    let begin = Instant::now();
    while begin.elapsed() < CLOSE {
        match Arc::try_unwrap(disk) {
            Ok(Disk { store, .. }) => {
                if let Err(error) = store.close() {
                    tracing::warn!(disk = %id, %error, "not closed cleanly");
                }
                return;
            }
            Err(shared) => disk = shared,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    tracing::warn!(disk = %id, "a closed disk is still in use");
}

/// Where the files of a removed disk go.
fn aside(path: &Path, id: DiskId) -> PathBuf {
    path.join(format!("removed-{id}"))
}

fn set_aside(path: &Path, id: DiskId) -> std::io::Result<PathBuf> {
    let to = aside(path, id);
    std::fs::create_dir_all(&to)?;
    for name in STORE_FILES {
        // Without a superblock of its name it is no store, wherever the files go.
        let new = if name == "superblock" { "superblock.removed" } else { name };
        match std::fs::rename(path.join(name), to.join(new)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    std::fs::File::open(path)?.sync_all()?;
    Ok(to)
}

/// Whether a disk is in service here, or why it is not.
#[must_use]
pub fn local_state(node: &Node, id: DiskId, agreed: Option<DiskState>) -> DiskState {
    let works = node.replica.disk(id).is_some_and(|disk| disk.store.failure().is_none());
    match agreed {
        Some(state) if works => state,
        Some(DiskState::Out) => DiskState::Out,
        _ => DiskState::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_cluster::command::{LOG_VERSION, NodeInfo, Outcome};
    use sheepdog_types::ClusterId;

    fn cluster() -> ClusterState {
        let mut state = ClusterState::default();
        state.apply(Command::Found { cluster: ClusterId(1) }).unwrap();
        for id in 1..=3 {
            enter(&mut state, id, 1);
        }
        state
    }

    fn enter(state: &mut ClusterState, id: u64, incarnation: u64) {
        let node = NodeInfo {
            id: NodeId(id),
            incarnation,
            address: format!("127.0.0.1:{id}"),
            zone: id.to_string(),
            disks: vec![DiskInfo { id: DiskId(100 + id), weight: 1 }],
            version: LOG_VERSION,
        };
        state.apply(Command::Enter { node, at: 0 }).unwrap();
    }

    fn down(state: &mut ClusterState, id: u64, incarnation: u64) {
        let reason = String::new();
        let command = Command::Down { node: NodeId(id), incarnation, reason, at: 0 };
        assert_eq!(state.apply(command), Ok(Outcome::Done));
    }

    #[test]
    fn a_disk_is_due_only_after_the_whole_interval() {
        let mut state = cluster();
        let (mut absent, begin) = (Absent::default(), Instant::now());
        let mut due = |state: &ClusterState, seconds| {
            let now = begin + Duration::from_secs(seconds);
            absent.due(absent_disks(state), state.settings.down_out_interval, now)
        };
        assert!(due(&state, 0).is_empty());
        down(&mut state, 2, 1);
        assert!(due(&state, 1000).is_empty(), "seen down for the first time");
        assert!(due(&state, 1599).is_empty());
        assert_eq!(due(&state, 1600), [DiskId(102)]);
        assert_eq!(due(&state, 1630), [DiskId(102)], "as long as nobody took its place");
        // It came back in between, which nobody saw: the time begins anew.
        enter(&mut state, 2, 2);
        down(&mut state, 2, 2);
        assert!(due(&state, 1701).is_empty());
        assert!(due(&state, 2300).is_empty());
        assert_eq!(due(&state, 2301), [DiskId(102)]);
        state.apply(Command::Out { disks: vec![DiskId(102)], at: 0 }).unwrap();
        assert!(due(&state, 9999).is_empty(), "it is out");
    }

    #[test]
    fn never_is_never() {
        let (mut absent, begin) = (Absent::default(), Instant::now());
        for seconds in [0, 1 << 30] {
            let now = begin + Duration::from_secs(seconds);
            assert!(absent.due([(1, Epoch(1))].into_iter(), 0, now).is_empty());
        }
    }

    #[test]
    fn files_of_a_removed_disk_are_no_store_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let ids =
            sheepdog_store::StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };
        let options = sheepdog_store::Options::default;
        sheepdog_store::Store::create(dir.path(), ids, options()).unwrap().close().unwrap();
        std::fs::write(dir.path().join("notes"), "not ours").unwrap();
        let to = set_aside(dir.path(), DiskId(3)).unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["notes", "removed-0000000000000003"]);
        for path in [dir.path(), &to] {
            assert!(sheepdog_store::Store::open(path, options()).is_err());
        }
        assert!(to.join("data").exists());
    }
}
