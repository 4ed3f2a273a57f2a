//! What a node does all the time: leases, reports, views for its volumes, synchronising its disks.

use crate::cluster::LEASE;
use crate::control::{NodeReply, NodeRequest};
use crate::liveness::{self, survey};
use crate::node::{Node, StartError};
use crate::seat::Seat;
use crate::{admin, membership, recovery};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::state::Volume;
use sheepdog_log::ClusterLog;
use sheepdog_types::{NodeId, VolumeId};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

const RENEW_EVERY: Duration = Duration::from_millis(400);
const TEND_EVERY: Duration = Duration::from_millis(200);
const TICK_EVERY: Duration = Duration::from_millis(20);
/// How long a probe of a suspected node waits.
const PROBE: Duration = Duration::from_millis(500);
/// How often a gateway is asked whether it is done with what an earlier one left.
const SETTLED_EVERY: Duration = Duration::from_millis(200);
const EXPORT_RETRY: Duration = Duration::from_millis(500);
/// Pause after a volume could not be taken over.
const TAKE_OVER_RETRY: Duration = Duration::from_millis(200);
/// How often is looked whether the clients of a volume that was handed over have left.
const LEFT_EVERY: Duration = Duration::from_millis(200);

/// Starts everything.
///
/// # Errors
/// If a thread cannot be made.
pub fn spawn_all(node: &Arc<Node>, refusals: mpsc::Receiver<NodeId>) -> Result<(), StartError> {
    until_stop(node, keep_lease);
    until_stop(node, tend);
    until_stop(node, survey::judge);
    until_stop(node, liveness::watch_links);
    until_stop(node, tick);
    until_stop(node, follow_views);
    until_stop(node, resume_exports);
    until_stop(node, tell_settled);
    until_stop(node, take_over);
    until_stop(node, end_handovers);
    until_stop(node, recovery::run);
    until_stop(node, membership::lead);
    until_stop(node, membership::tend);
    until_stop(node, stop_when_outdated);
    until_stop(node, |node| report_refusals(node, refusals));
    Ok(())
}

/// Runs a task until the node stops.
pub fn until_stop<F>(node: &Arc<Node>, task: impl FnOnce(Arc<Node>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut stopping = node.stopping.subscribe();
    let work = task(Arc::clone(node));
    tokio::spawn(async move {
        tokio::select! {
            () = work => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
    });
}

async fn keep_lease(node: Arc<Node>) {
    node.enter().await;
    let mut status = node.log.watch();
    loop {
        match node.renew_lease().await {
            Ok(NodeReply::EnterAgain) => {
                tracing::warn!("the cluster went on without this node; entering again");
                node.enter().await;
                continue;
            }
            Ok(NodeReply::Yield(reason)) => {
                tracing::warn!(reason, "this node has to leave the cluster; trying to enter again");
                node.leave().await;
                node.enter().await;
                continue;
            }
            Ok(NodeReply::Granted(_)) => {
                tokio::select! {
                    () = sleep(RENEW_EVERY) => {}
                    () = node.peers.reach.changed() => {}
                }
                continue;
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(error, "no lease"),
        }
        // A new leader is the likeliest end of the trouble.
        tokio::select! {
            () = sleep(RENEW_EVERY / 8) => {}
            _ = status.changed() => {}
        }
    }
}

/// A release that cannot follow the log must not serve.
async fn stop_when_outdated(node: Arc<Node>) {
    let mut outdated = node.cluster.outdated.subscribe();
    if let Ok(why) = outdated.wait_for(Option::is_some).await {
        node.cluster.lease.drop_now();
        let why = why.as_deref().unwrap_or_default();
        let reason = format!("an entry of the cluster log is not understood: {why}");
        node.expelled.send_replace(Some(reason));
    }
}

async fn tend(node: Arc<Node>) {
    let mut ticks = interval(TEND_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        node.leader.tend(&node).await;
    }
}

/// Ticks the volumes while one of them wants it; an idle node makes no wake-ups.
async fn tick(node: Arc<Node>) {
    loop {
        let mut wanted = false;
        for device in node.exports.devices() {
            wanted |= device.handle_tick();
        }
        if !wanted {
            node.cluster.ticks.notified().await;
        }
        sleep(TICK_EVERY).await;
    }
}

/// Hands new views to the volumes, and frees what deleted volumes left behind.
async fn follow_views(node: Arc<Node>) {
    let mut changes = node.cluster.changes();
    let mut known = stored_volumes(&node.replica);
    let mut last_epoch = node.cluster.view().epoch;
    loop {
        changes.borrow_and_update();
        let view = node.cluster.view();
        node.leader.observe(&node, &view);
        if view.epoch != last_epoch {
            let state = node.cluster.state();
            let cause = state.history.last().map_or_else(String::new, |r| r.cause.clone());
            tracing::info!(epoch = %view.epoch, cause, "new epoch");
            last_epoch = view.epoch;
        }
        for seat in node.exports.seats() {
            seat.handle_view();
        }
        let mut gone = Vec::new();
        if node.cluster.has_entered(&view) {
            gone.extend(known.iter().filter(|v| !view.volumes.contains_key(v)).copied());
            known = view.volumes.keys().copied().collect();
        }
        if !gone.is_empty() {
            let replica = Arc::clone(&node.replica);
            tokio::task::spawn_blocking(move || purge(&replica, &gone));
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Volumes with objects on this node's disks; some may have been deleted while it was away.
fn stored_volumes(replica: &crate::replica::Replica) -> BTreeSet<VolumeId> {
    let mut volumes = BTreeSet::new();
    for disk in replica.disks() {
        disk.store.list_all(|_, layers| {
            volumes.extend(layers.iter().map(|layer| layer.key.object.volume));
        });
    }
    volumes
}

fn purge(replica: &crate::replica::Replica, volumes: &[VolumeId]) {
    for disk in replica.disks() {
        for volume in volumes {
            match disk.store.delete_volume(*volume) {
                Ok(0) => {}
                Ok(objects) => tracing::info!(%volume, objects, disk = %disk.id, "volume deleted"),
                Err(error) => tracing::error!(%volume, %error, "cannot free a deleted volume"),
            }
        }
    }
}

/// Attaches the volumes of remembered exports again and serves them.
async fn resume_exports(node: Arc<Node>) {
    let mut reported = BTreeSet::new();
    let mut changes = node.cluster.changes();
    while !node.exports.pending().is_empty() {
        while !node.cluster.has_entered(&node.cluster.view()) {
            if changes.changed().await.is_err() {
                return;
            }
        }
        for volume in node.exports.pending() {
            let outcome = match stands_by(&node, &volume) {
                Some(volume) => {
                    node.exports.stand_by(&volume);
                    Ok(())
                }
                None => admin::attach(&node, &volume).await,
            };
            match outcome {
                Ok(()) => {
                    node.exports.resume(&volume);
                }
                Err(problem) => {
                    node.exports.set_problem(&volume, &problem);
                    if reported.insert((volume.clone(), problem.clone())) {
                        tracing::warn!(volume, problem, "an export is not served yet");
                    }
                }
            }
        }
        if !node.exports.pending().is_empty() {
            sleep(EXPORT_RETRY).await;
        }
    }
}

/// The volume, if this node only stands by for it: it is being handed over, and the other node has it, or is
/// to have it.
fn stands_by(node: &Node, name: &str) -> Option<Arc<Volume>> {
    let volume = node.cluster.state().volume_named(name).cloned()?;
    let (handover, me) = (volume.handover?, node.cluster.node);
    let holder = volume.attachment.as_ref().map(|a| a.gateway);
    let other = holder.map_or(handover.to == me, |holder| holder != me);
    (other && handover.involves(me)).then_some(volume)
}

/// Attaches volumes that clients of this node need.
async fn take_over(node: Arc<Node>) {
    let mut running = JoinSet::new();
    loop {
        for seat in node.exports.seats() {
            if let Some(pause) = seat.begin_attach() {
                let node = Arc::clone(&node);
                running.spawn(async move {
                    sleep(pause).await;
                    take_over_for(&node, &seat).await;
                    seat.attach_ended();
                });
            }
        }
        while running.try_join_next().is_some() {}
        node.cluster.takeovers.notified().await;
    }
}

async fn take_over_for(node: &Arc<Node>, seat: &Seat) {
    let Some(seen) = seat.wanted() else { return };
    let volume = seat.name();
    tracing::info!(volume, "taking the volume over: a client needs it here");
    if let Err(problem) = admin::take_over(node, seat, seen).await {
        tracing::warn!(volume, problem, "not taken over");
        sleep(TAKE_OVER_RETRY).await;
    }
}

/// Ends the hand-over of a volume that this node has handed over, when its last client has left: the VM runs
/// on the other node. A new client here must not take the volume from it.
async fn end_handovers(node: Arc<Node>) {
    let mut changes = node.cluster.changes();
    loop {
        changes.borrow_and_update();
        let view = node.cluster.view();
        let me = node.cluster.node;
        let handed_over = |v: &Volume| {
            v.handover.is_some_and(|h| h.from == me)
                && v.attachment.as_ref().is_some_and(|a| a.gateway != me)
        };
        if !view.volumes.values().any(|volume| handed_over(volume)) {
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        }
        for seat in node.exports.seats() {
            let (name, id) = (seat.name(), seat.volume());
            let Some(volume) = view.volumes.get(&id).filter(|v| handed_over(v)) else { continue };
            if !seat.was_used() || node.exports.clients_of(name) > 0 {
                continue;
            }
            let close = Command::CloseHandover { volume: id, writer: Some(volume.writer) };
            match node.propose(&close).await {
                Ok(_) => {
                    tracing::info!(volume = name, "handed over: its last client here has left")
                }
                Err(problem) => tracing::debug!(volume = name, problem, "the hand-over stays open"),
            }
        }
        sleep(LEFT_EVERY).await;
    }
}

/// Tells the cluster of volumes whose replicas are all equal again after a takeover.
async fn tell_settled(node: Arc<Node>) {
    let mut changes = node.cluster.changes();
    loop {
        changes.borrow_and_update();
        let view = node.cluster.view();
        let mine =
            |v: &Volume| v.attachment.as_ref().is_some_and(|a| a.gateway == node.cluster.node);
        let unsettled = |v: &Volume| v.unsettled && mine(v);
        if !view.volumes.values().any(|volume| unsettled(volume)) {
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        }
        for device in node.exports.devices() {
            let (volume, writer) = device.attachment();
            let is_one =
                view.volumes.get(&volume).is_some_and(|v| unsettled(v) && v.writer == writer);
            if !is_one || !device.is_settled() {
                continue;
            }
            match node.propose(&Command::Settled { volume, writer }).await {
                Ok(_) => tracing::info!(%volume, "all replicas are equal after the takeover"),
                Err(problem) => tracing::debug!(%volume, problem, "cannot tell that it is settled"),
            }
        }
        sleep(SETTLED_EVERY).await;
    }
}

/// Whether a node's port refuses a connection now, which proves that its process is gone.
pub async fn refuses(node: &Node, id: NodeId) -> bool {
    let address = node.cluster.view().nodes.get(&id).map(|n| n.address.clone());
    let Some(address) = address else { return false };
    let connect = tokio::time::timeout(PROBE, tokio::net::TcpStream::connect(address)).await;
    matches!(connect, Ok(Err(e)) if e.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Tells the leader of nodes whose port refuses connections.
async fn report_refusals(node: Arc<Node>, mut refusals: mpsc::Receiver<NodeId>) {
    while let Some(first) = refusals.recv().await {
        let mut suspects = BTreeSet::from([first]);
        while let Ok(more) = refusals.try_recv() {
            suspects.insert(more);
        }
        for suspect in suspects {
            if !node.cluster.view().nodes.get(&suspect).is_some_and(|n| n.up) {
                continue;
            }
            look_at_refusing(&node, suspect).await;
            tell_of_refusing(&node, suspect).await;
        }
    }
}

/// A node's port is said to refuse connections: finds out, and does what follows from it here.
pub async fn look_at_refusing(node: &Node, suspect: NodeId) {
    let status = node.log.status();
    if status.is_leader {
        node.leader.probe(node, suspect).await;
    } else if status.leader == Some(suspect.0) && refuses(node, suspect).await {
        node.log.leader_died(suspect.0).await;
    }
}

/// Tells those who can do something about it: the leader, or the voters when it is the leader.
async fn tell_of_refusing(node: &Node, suspect: NodeId) {
    let status = node.log.status();
    let voters = status.voters.iter().filter(|voter| **voter != suspect.0);
    let told: Vec<u64> = match status.leader {
        Some(leader) if leader == suspect.0 => voters.copied().collect(),
        leader => leader.into_iter().collect(),
    };
    let mut reports = JoinSet::new();
    for id in told.into_iter().filter(|id| *id != node.cluster.node.0) {
        let Some(address) = status.addresses.get(&id).cloned() else { continue };
        let client = Arc::clone(&node.client);
        reports.spawn(async move {
            let report = NodeRequest::Refused { node: suspect };
            let ask = client.ask(&address, &report);
            let _ = tokio::time::timeout(LEASE, ask).await; // the lease covers a lost report
        });
    }
    reports.join_all().await;
}
