//! What giving up disks that are gone for good would lose, and the giving up.

use super::health::{down_since, policies, waiting_text};
use super::{change, refused};
use crate::api::{LostDisk, RecoverPlan, VolumeLoss, WaitingGroup};
use crate::node::{Node, now};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::state::{ClusterState, Disk, Volume};
use sheepdog_cluster::view::{View, Waiting};
use sheepdog_types::{DiskId, Epoch, OBJECT_SIZE, ObjectId, ObjectIndex, SLOTS, SlotId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Objects of a volume that are looked at one by one; of more, each slot has its share.
const COUNTED: u64 = 1 << 22;

/// What giving up the disks that `targets` name (all that are waited for when empty) would lose.
///
/// # Errors
/// A text for people.
pub async fn plan(node: &Node, targets: Vec<String>) -> Result<RecoverPlan, String> {
    let (state, view) = {
        let state = node.cluster.state();
        (state.clone(), node.cluster.view())
    };
    let planned = tokio::task::spawn_blocking(move || {
        let disks =
            if targets.is_empty() { waited_for(&state, &view) } else { named(&state, &targets)? };
        foresee(&state, &view, &disks)
    });
    planned.await.map_err(|e| e.to_string())?
}

/// Gives up disks, unless the cluster has changed since the plan of `epoch`.
///
/// # Errors
/// A text for people.
pub async fn give_up(node: &Arc<Node>, disks: &[String], epoch: u64) -> Result<(), String> {
    let now_at = node.cluster.view().epoch.0;
    if now_at != epoch {
        return Err(format!(
            "the cluster has changed since (epoch {now_at} instead of {epoch}): nothing was \
             changed. Look again at what would be lost"
        ));
    }
    let parse = |id: &String| id.parse().map_err(|_| format!("'{id}' is not the id of a disk"));
    let disks = disks.iter().map(parse).collect::<Result<Vec<DiskId>, String>>()?;
    let lost = disks.clone();
    let reached = |state: &ClusterState| {
        lost.iter().all(|id| state.disks.get(id).is_none_or(Disk::is_given_up))
    };
    change(node, &Command::GiveUp { disks, at: now() }, reached).await?;
    Ok(())
}

/// The disks that an operator names, by their ids or by nodes.
fn named(state: &ClusterState, targets: &[String]) -> Result<BTreeSet<DiskId>, String> {
    let mut disks = BTreeSet::new();
    for target in targets {
        if let Some(disk) = target.parse().ok().filter(|disk| state.disks.contains_key(disk)) {
            disks.insert(disk);
            continue;
        }
        let node = super::nodes::find_node(state, target)?;
        disks.extend(state.disks.iter().filter(|(_, d)| d.node == node).map(|(id, _)| *id));
    }
    if let Some(up) = disks.iter().find(|id| state.disk_up(**id)) {
        return Err(refused(sheepdog_cluster::command::Refusal::DiskIsUp(*up)));
    }
    Ok(disks)
}

/// The disks without which some slot waits.
fn waited_for(state: &ClusterState, view: &View) -> BTreeSet<DiskId> {
    let mut disks = BTreeSet::new();
    for (copies, min) in policies(view) {
        for slot in 0..=u16::MAX {
            match view.slot(SlotId(slot), copies, min) {
                Ok(_) => {}
                Err(Waiting::TooFew { down, .. }) => disks.extend(down),
                Err(Waiting::For(whom)) => disks.extend(whom),
                Err(Waiting::Forgotten) => {
                    disks.extend(view.home(SlotId(slot), copies).iter());
                }
            }
        }
    }
    disks.retain(|id| !state.disk_up(*id) && state.disks.get(id).is_some_and(|d| !d.is_given_up()));
    disks
}

/// What becomes of a slot's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Nothing is lost, or nothing can be told yet.
    Kept,
    /// There is no replica left.
    Gone,
    /// The newest replica left may lack writes since this epoch; `None` if too long ago.
    Older(Option<Epoch>),
}

/// Compares the cluster as it is with one in which `disks` are given up.
fn foresee(
    state: &ClusterState,
    view: &View,
    disks: &BTreeSet<DiskId>,
) -> Result<RecoverPlan, String> {
    let mut after = state.clone();
    let command = Command::GiveUp { disks: disks.iter().copied().collect(), at: 0 };
    after.apply(command).map_err(refused)?;
    let then = View::build(&after, Some(view));
    let (mut waiting, mut still_waiting) = (BTreeMap::new(), BTreeSet::new());
    let mut fates = BTreeMap::new();
    for (copies, min) in policies(view) {
        let mut of_policy = Vec::with_capacity(SLOTS);
        for slot in (0..=u16::MAX).map(SlotId) {
            if let Err(why) = view.slot(slot, copies, min) {
                *waiting.entry(waiting_text(view, &why, Some(min))).or_insert(0) += 1;
            }
            // Where it is known what there is, others take over; that takes its time.
            if view.slot(slot, copies, min).is_err() && then.sources(slot, copies, min).is_err() {
                still_waiting.insert(slot);
            }
            of_policy.push(fate(view, &then, slot, copies, min));
        }
        fates.insert((copies, min), of_policy);
    }
    let volumes = view.volumes.values().filter_map(|volume| {
        let policy = (usize::from(volume.spec.copies), usize::from(volume.spec.min_copies));
        fates.get(&policy).and_then(|fates| loss(state, volume, fates))
    });
    let group = |(reason, slots)| WaitingGroup { slots, reason };
    Ok(RecoverPlan {
        epoch: state.epoch.0,
        disks: disks.iter().map(|id| lost_disk(state, *id)).collect(),
        volumes: volumes.collect(),
        waiting: waiting.into_iter().map(group).collect(),
        still_waiting: still_waiting.len(),
    })
}

fn fate(now: &View, then: &View, slot: SlotId, copies: usize, min: usize) -> Fate {
    let before = now.sources(slot, copies, min);
    let Ok(left) = then.sources(slot, copies, min) else { return Fate::Kept };
    match before {
        Ok(sources) if sources.is_empty() || !left.is_empty() => Fate::Kept,
        Ok(_) => Fate::Gone,
        Err(_) if left.is_empty() => Fate::Gone,
        Err(why) => {
            // Whoever of them has missed least is the newest.
            let missed = left.iter().filter_map(|d| now.disks.get(&d)?.missed_since).max();
            Fate::Older(missed.filter(|epoch| epoch.0 > 0 && why != Waiting::Forgotten))
        }
    }
}

fn loss(state: &ClusterState, volume: &Volume, fates: &[Fate]) -> Option<VolumeLoss> {
    let objects = volume.spec.size.div_ceil(OBJECT_SIZE);
    let mut of_slot = vec![0_u64; SLOTS];
    for index in 0..objects.min(COUNTED) {
        let object = ObjectId { volume: volume.id, index: ObjectIndex(index as u32) };
        of_slot[usize::from(object.slot().0)] += 1;
    }
    let scale = |count: u64| {
        if objects <= COUNTED { count } else { count.saturating_mul(objects / COUNTED) }
    };
    let (mut gone, mut older, mut since, mut forgotten) = (0, 0, None, false);
    for (count, fate) in of_slot.iter().zip(fates).filter(|(count, _)| **count > 0) {
        match fate {
            Fate::Kept => {}
            Fate::Gone => gone += scale(*count),
            Fate::Older(epoch) => {
                older += scale(*count);
                forgotten |= epoch.is_none();
                since = since.into_iter().chain(*epoch).min();
            }
        }
    }
    let since = since.filter(|_| !forgotten);
    let at = |epoch: Epoch| state.history.iter().find(|r| r.epoch == epoch).map(|r| r.at);
    (gone + older > 0).then(|| VolumeLoss {
        volume: volume.spec.name.clone(),
        objects,
        gone,
        older,
        older_since_epoch: since.map(|epoch| epoch.0),
        older_since: since.and_then(at),
    })
}

fn lost_disk(state: &ClusterState, id: DiskId) -> LostDisk {
    let node = state.disks.get(&id).and_then(|disk| state.nodes.get(&disk.node));
    LostDisk {
        disk: id.to_string(),
        address: node.map_or_else(|| "?".into(), |n| n.address.clone()),
        down_since: down_since(state, id),
    }
}

#[cfg(test)]
mod tests;
