//! Makes this node's disks equal to their peers after they joined, came back or got new slots.

use crate::node::{Node, now};
use crate::replica::{Copy, Disk};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::message::{Failure, Reply, Request};
use sheepdog_cluster::resync::{Action, Listings, peers, plan_window, windows};
use sheepdog_cluster::view::View;
use sheepdog_types::{DiskId, Epoch, LayerKey, SlotId, Version};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

const PAUSE: Duration = Duration::from_millis(200);

/// Synchronises disks whenever the agreed state says that they need it.
pub async fn run(node: Arc<Node>) {
    let mut changes = node.cluster.changes();
    let mut last_problem = String::new();
    loop {
        changes.borrow_and_update();
        let view = node.cluster.view();
        let mut failed = false;
        if node.cluster.may_serve(&view) {
            for disk in node.replica.disks() {
                let wants = view.disks.get(&disk.id).is_some_and(|d| d.sync_from.is_some());
                if wants && let Err(problem) = synchronise(&node, &disk, &view).await {
                    failed = true;
                    if problem != last_problem {
                        tracing::info!(disk = %disk.id, problem, "not synchronised yet");
                        last_problem = problem;
                    }
                }
            }
        } else {
            failed = true;
        }
        if failed {
            // Something passing: a peer that is still starting, or a lease that is not there yet.
            let _ = timeout(PAUSE, changes.changed()).await;
            sleep(PAUSE / 10).await;
        } else if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn synchronise(node: &Arc<Node>, disk: &Arc<Disk>, view: &Arc<View>) -> Result<(), String> {
    let incarnation = node.cluster.incarnation();
    let (worker, here, seen) = (Arc::clone(node), Arc::clone(disk), Arc::clone(view));
    let copied = tokio::task::spawn_blocking(move || copy_all(&worker, &here, &seen))
        .await
        .map_err(|e| e.to_string())??;
    let command = Command::Synced { disk: disk.id, incarnation, basis: view.epoch, at: now() };
    node.propose(&command).await?.map_err(|refusal| refusal.to_string())?;
    let (id, basis) = (disk.id, view.epoch);
    node.wait_for(Duration::from_secs(5), |state| {
        state.disks.get(&id).is_none_or(|d| d.sync_from.is_none_or(|from| from > basis))
    })
    .await;
    tracing::info!(disk = %disk.id, copied, epoch = %view.epoch, "the disk is synchronised");
    Ok(())
}

/// Compares all slots and copies what differs; gives the number of layers copied or deleted.
fn copy_all(node: &Node, disk: &Disk, view: &View) -> Result<usize, String> {
    let mut changed = 0;
    for window in windows() {
        let listings = list_everywhere(node, disk, view, window)?;
        let actions = plan_window(view, disk.id, window, &listings).map_err(|waiting| {
            format!("waiting for disks that have the newest data: {waiting:?}")
        })?;
        for action in actions {
            if node.cluster.view().epoch != view.epoch {
                return Err("the cluster changed meanwhile; comparing again".into());
            }
            if node.stopping.borrow().to_owned() {
                return Err("stopping".into());
            }
            carry_out(node, disk, view.epoch, action)?;
            changed += 1;
        }
    }
    // Only then does the disk count as holding what others flushed long ago.
    disk.store.flush_wait().map_err(|e| e.to_string())?;
    Ok(changed)
}

fn carry_out(node: &Node, disk: &Disk, epoch: Epoch, action: Action) -> Result<(), String> {
    match action {
        Action::Copy { key, expect, from, target } => {
            let copy = Copy { key, expect, from, target };
            match node.replica.recover(disk, copy, epoch, None) {
                Ok(_) | Err(Failure::Behind { .. }) => Ok(()),
                Err(failure) => Err(format!("copying {key} from disk {from}: {failure}")),
            }
        }
        Action::Delete { key } => {
            disk.store.delete(key).map(|_| ()).map_err(|e| format!("deleting {key}: {e}"))
        }
    }
}

fn list_everywhere(
    node: &Node,
    disk: &Disk,
    view: &View,
    window: (SlotId, SlotId),
) -> Result<Listings, String> {
    let mut listings = Listings::new();
    let mut mine = BTreeMap::new();
    for slot in window.0.0..=window.1.0 {
        mine.extend(disk.store.list(SlotId(slot)).iter().map(|s| (s.key, s.version)));
    }
    listings.insert(disk.id, mine);
    for peer in peers(view, disk.id) {
        listings.insert(peer, list_peer(node, disk.id, view, peer, window)?);
    }
    Ok(listings)
}

fn list_peer(
    node: &Node,
    holder: DiskId,
    view: &View,
    peer: DiskId,
    (mut from, to): (SlotId, SlotId),
) -> Result<BTreeMap<LayerKey, Version>, String> {
    let mut found = BTreeMap::new();
    let mut after = None;
    loop {
        let request = Request::List { holder, from, to, after };
        let answer = node
            .peers
            .ask(view, peer, request)
            .map_err(|e| format!("disk {peer} does not list its layers: {e}"))?;
        let Reply::Listing { layers, more } = answer.reply else {
            return Err(format!("disk {peer} does not list its layers: {:?}", answer.reply));
        };
        if let Some((last, _)) = layers.last() {
            (from, after) = (last.object.slot(), Some(*last));
        }
        let empty = layers.is_empty();
        found.extend(layers);
        if !more || empty {
            return Ok(found);
        }
    }
}
