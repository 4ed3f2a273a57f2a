//! The disks of this node: added, removed, listed.

use super::nodes::{disk_state, is_complete};
use super::{change, refused};
use crate::api::{DiskInfo, DiskState};
use crate::cluster::lock;
use crate::dir::DiskEntry;
use crate::membership::{self, local_state, own_disks};
use crate::node::{Node, now, random_id};
use crate::replica::Disk;
use sheepdog_cluster::command::{Command, MAX_WEIGHT, Refusal};
use sheepdog_store::{Store, StoreIds};
use sheepdog_types::DiskId;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Takes a new disk into service.
///
/// # Errors
/// A text for people.
pub async fn add(
    node: &Arc<Node>,
    path: PathBuf,
    weight: Option<u64>,
) -> Result<Vec<DiskInfo>, String> {
    if !path.is_absolute() {
        return Err("the path of a disk has to be absolute; nothing was changed".into());
    }
    if weight.is_some_and(|weight| weight > MAX_WEIGHT) {
        return Err(refused(Refusal::BadWeight(weight.unwrap_or_default())));
    }
    let changing = node.disk_changes.lock().await;
    let replaced = check_path(node, &path)?;
    let (worker, place) = (Arc::clone(node), path.clone());
    let made = tokio::task::spawn_blocking(move || make(&worker, place, weight, replaced));
    let id = made.await.map_err(|e| e.to_string())??;
    drop(changing);
    bring_up(node, id).await?;
    if let Some(old) = replaced {
        retire(node, old, true).await?;
    }
    Ok(listed(node, id))
}

/// The failed disk that was at this path, if any. One in service is in the way.
fn check_path(node: &Node, path: &Path) -> Result<Option<DiskId>, String> {
    let known = own_disks(node).into_iter().find(|(_, known)| known == path);
    let Some((info, _)) = known else { return Ok(None) };
    match node.replica.disk(info.id) {
        Some(disk) if disk.store.failure().is_none() => Err(format!(
            "{} is disk {} of this node already; nothing was changed",
            path.display(),
            info.id
        )),
        _ => Ok(Some(info.id)),
    }
}

/// Makes the store and remembers it. Blocks.
fn make(
    node: &Arc<Node>,
    path: PathBuf,
    weight: Option<u64>,
    replaced: Option<DiskId>,
) -> Result<DiskId, String> {
    check_empty(&path)?;
    let id = DiskId(random_id().map_err(|e| e.to_string())?);
    let (cluster, owner) = (node.identity().cluster.clone(), node.cluster.node);
    let cluster = cluster.parse().map_err(|_| "the cluster id of this node is damaged")?;
    let ids = StoreIds { cluster, node: owner, disk: id };
    let made = Store::create(&path, ids, node.store_options.clone());
    let store = made.map_err(|e| format!("{}: {e}; no disk was added", path.display()))?;
    let weight = weight.unwrap_or((store.usage().capacity >> 30).max(1));
    let entry = DiskEntry { id: id.to_string(), path: path.clone(), weight };
    let remembered = node.change_identity(|identity| {
        if let Some(old) = replaced {
            identity.disks.retain(|entry| entry.id != old.to_string());
        }
        identity.disks.push(entry);
    });
    if let Err(error) = remembered {
        return Err(format!(
            "{error}; no disk was added. Empty {} before the next try",
            path.display()
        ));
    }
    if let Some(old) = replaced {
        lock(&node.unopened).remove(&old);
        membership::close(node, old);
    }
    node.open_disk(Disk::new(id, path, store));
    tracing::info!(disk = %id, "a disk was added");
    Ok(id)
}

/// A store is made only where nothing is: whatever is there may be data, of this disk or another.
fn check_empty(path: &Path) -> Result<(), String> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| format!("{}: {e}; nothing was changed", path.display()))?,
    };
    for entry in entries {
        let name = entry.map_err(|e| format!("{}: {e}", path.display()))?.file_name();
        if name != "lost+found" {
            return Err(format!(
                "{} is not empty (it has '{}'); empty it first if nobody needs what is there; \
                 nothing was changed",
                path.display(),
                name.display()
            ));
        }
    }
    Ok(())
}

/// Tells the cluster of a disk that this node has opened. It is told again by itself if this fails.
async fn bring_up(node: &Node, id: DiskId) -> Result<(), String> {
    let info = own_disks(node).into_iter().find(|(info, _)| info.id == id);
    let Some((disk, _)) = info else { return Err("the disk was removed meanwhile".into()) };
    let incarnation = node.cluster.incarnation();
    let command = Command::DiskUp { node: node.cluster.node, incarnation, disk, at: now() };
    let told = match node.propose(&command).await {
        // Another life of the daemon: it announces the disk when it enters.
        Ok(Ok(_) | Err(Refusal::NotMember(_))) => {
            node.wait_for(super::APPLY_TIMEOUT, |state| state.disk_up(id)).await
        }
        Ok(Err(refusal)) => return Err(format!("the disk was made, but {refusal}")),
        Err(_) => false,
    };
    if told {
        return Ok(());
    }
    Err("the disk was made and comes into service as soon as this node reaches the cluster: see \
         `dog node disk list`"
        .into())
}

/// Moves the data of a disk away; it is closed once it is no member any more.
///
/// # Errors
/// A text for people.
pub async fn remove(node: &Arc<Node>, name: &str, force: bool) -> Result<Vec<DiskInfo>, String> {
    let (by_id, by_path) = (name.parse::<DiskId>().ok(), Path::new(name));
    let mut disks = own_disks(node).into_iter();
    let found = disks.find(|(info, path)| by_id == Some(info.id) || path == by_path);
    let Some((info, _)) = found else {
        return Err(format!(
            "this node has no disk '{name}'; `dog node disk list` shows what it has; nothing was \
             changed"
        ));
    };
    if !retire(node, info.id, force).await? {
        membership::forget_disk(node, info.id).await; // the cluster never knew it
    }
    Ok(listed(node, info.id))
}

/// Has a disk leave the cluster; false if the cluster does not know it.
async fn retire(node: &Node, disk: DiskId, force: bool) -> Result<bool, String> {
    if !node.cluster.state().disks.contains_key(&disk) {
        return Ok(node.cluster.state().removed_disks.contains(&disk));
    }
    let command = Command::RetireDisk { disk, force, at: now() };
    change(node, &command, |state| state.disks.get(&disk).is_none_or(|d| d.retiring)).await?;
    Ok(true)
}

fn listed(node: &Node, id: DiskId) -> Vec<DiskInfo> {
    let mut disks = list(node);
    disks.retain(|disk| disk.id == id.to_string());
    disks
}

/// The disks of this node.
#[must_use]
pub fn list(node: &Node) -> Vec<DiskInfo> {
    let unopened = lock(&node.unopened).clone();
    let disks = own_disks(node).into_iter().map(|(info, path)| {
        let state = node.cluster.state();
        let agreed = state.disks.get(&info.id);
        let open = node.replica.disk(info.id);
        let usage = open.as_ref().map(|disk| disk.store.usage());
        let failure = open.and_then(|disk| disk.store.failure()).map(|reason| reason.to_string());
        let agreed_state = agreed.map(|disk| disk_state(&state, disk));
        let local = local_state(node, info.id, agreed_state.or(Some(DiskState::Down)));
        DiskInfo {
            id: info.id.to_string(),
            path: Some(path.display().to_string()),
            state: local,
            weight: agreed.map_or(info.weight, |disk| disk.weight),
            capacity: usage.as_ref().map(|usage| usage.capacity),
            used: usage.as_ref().map(|usage| usage.used),
            complete: local == DiskState::Up && agreed.is_some_and(|d| is_complete(&state, d)),
            failure: failure
                .or_else(|| unopened.get(&info.id).cloned())
                .or_else(|| node.recoveries.out_of_service(info.id)),
        }
    });
    disks.collect()
}
