//! Exports of this node, and the attachments that they need.

use super::{APPLY_TIMEOUT, refused};
use crate::api::{ExportInfo, Protocol};
use crate::exports::ExportSpec;
use crate::node::{Node, now};
use sheepdog_cluster::command::{Command, Outcome};
use sheepdog_cluster::gateway::{Config, Phase};
use sheepdog_cluster::state::ClusterState;
use sheepdog_types::{VolumeId, WriterGen};
use std::sync::Arc;
use std::time::Duration;

/// How long an attach waits for other nodes to fence older writers.
const FENCE_TIMEOUT: Duration = Duration::from_secs(10);

pub async fn add(
    node: &Arc<Node>,
    volume: String,
    protocol: Protocol,
    address: String,
) -> Result<ExportInfo, String> {
    let spec = ExportSpec { volume, protocol, address };
    node.exports.check(&spec)?;
    attach(node, &spec.volume).await?;
    let volume = spec.volume.clone();
    let exports = Arc::clone(&node.exports);
    let added = tokio::task::spawn_blocking(move || exports.add(spec)).await;
    let outcome = added.map_err(|e| e.to_string())?;
    if outcome.is_err()
        && let Some((volume, writer)) = node.exports.release_unused(&volume)
    {
        detach(node, volume, writer).await;
    }
    outcome
}

/// Attaches a volume to this node, unless it is, and waits until its gateway serves.
///
/// # Errors
/// A text for people.
pub async fn attach(node: &Arc<Node>, name: &str) -> Result<(), String> {
    if node.exports.is_attached(name) {
        return Ok(());
    }
    let command = Command::Attach {
        name: name.to_owned(),
        gateway: node.cluster.node,
        incarnation: node.cluster.incarnation(),
        at: now(),
    };
    let outcome = node.propose(&command).await?.map_err(refused)?;
    let Outcome::Attached { volume: id, writer } = outcome else {
        return Err("an answer of the cluster log that makes no sense".into());
    };
    let known = |state: &ClusterState| state.volumes.get(&id).is_some_and(|v| v.writer >= writer);
    if !node.wait_for(APPLY_TIMEOUT, known).await {
        return Err("the volume is attached, but this node does not hear of it; try again".into());
    }
    let volume = node.cluster.state().volumes.get(&id).cloned();
    let volume = volume.ok_or_else(|| format!("volume '{name}' was deleted meanwhile"))?;
    let config = Config {
        node: node.cluster.node,
        volume: id,
        size: volume.spec.size,
        copies: usize::from(volume.spec.copies),
        min_copies: usize::from(volume.spec.min_copies),
        layer: volume.layer,
        writer,
        ack: volume.spec.ack,
    };
    let (exports, owned) = (Arc::clone(&node.exports), name.to_owned());
    let phase = tokio::task::spawn_blocking(move || {
        exports.attach(&owned, config);
        exports.device(&owned).map(|device| device.wait_settled(FENCE_TIMEOUT))
    });
    match phase.await.map_err(|e| e.to_string())? {
        Some(Phase::Serving) => Ok(()),
        // It goes on by itself: an up node that does not answer is declared down sooner or later.
        Some(Phase::Fencing) => Ok(()),
        Some(Phase::Fenced) | None => {
            Err(format!("volume '{name}' was attached elsewhere at the same time"))
        }
    }
}

async fn detach(node: &Arc<Node>, volume: VolumeId, writer: WriterGen) {
    let answer = node.propose(&Command::Detach { volume, writer }).await;
    if let Err(error) = answer {
        tracing::warn!(%volume, error, "not detached; another node can attach it once this one is down");
    }
}

pub async fn remove(
    node: &Arc<Node>,
    volume: String,
    protocol: Option<Protocol>,
    address: Option<String>,
) -> Result<Vec<ExportInfo>, String> {
    let exports = Arc::clone(&node.exports);
    let removed =
        tokio::task::spawn_blocking(move || exports.remove(&volume, protocol, address.as_deref()));
    let removed = removed.await.map_err(|e| e.to_string())??;
    if let Some((volume, writer)) = removed.detach {
        detach(node, volume, writer).await;
    }
    Ok(removed.exports)
}
