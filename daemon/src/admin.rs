//! Answers what `dog` asks.

mod disks;
mod exports;
mod health;
mod nodes;
mod recover;
mod recovery;
mod stats;
mod volumes;

use crate::api::{ClusterInfo, EpochInfo, Request, Response, ScrubInfo, SettingInfo};
use crate::node::Node;
use serde::Serialize;
use sheepdog_cluster::command::{Command, Outcome, Refusal, VolumeSpec, default_min_copies};
use sheepdog_cluster::settings::{NAMES, Setting, Settings};
use sheepdog_cluster::state::ClusterState;
use sheepdog_log::ClusterLog;
use std::sync::Arc;
use std::time::Duration;

pub use exports::{attach, release, take_over};
pub use recovery::local_recovery;
pub use stats::{local_disks, local_stats};

/// Copies of a volume that does not say.
const DEFAULT_COPIES: u8 = 3;
/// Epochs shown.
const EPOCHS_SHOWN: usize = 100;
/// How long an agreed change may take to reach this node.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Answers one request, as JSON.
pub async fn answer(node: &Arc<Node>, body: &[u8]) -> Vec<u8> {
    let response = match serde_json::from_slice::<Request>(body) {
        Ok(request) => match handle(node, request).await {
            Ok(value) => Response::Ok(value),
            Err(text) => Response::Error(text),
        },
        Err(error) => Response::Error(format!(
            "this node does not understand the request ({error}); nothing was changed. \
             Use a dog of the same release"
        )),
    };
    serde_json::to_vec(&response).unwrap_or_else(|e| {
        format!(r#"{{"error":"the answer cannot be encoded: {e}"}}"#).into_bytes()
    })
}

async fn handle(node: &Arc<Node>, request: Request) -> Result<serde_json::Value, String> {
    match request {
        Request::ClusterInfo => json(cluster_info(node)),
        Request::ClusterHealth => json(health::health(node).await?),
        Request::ClusterSettings { name } => json(settings(node, name.as_deref())?),
        Request::ClusterSet { name, value } => json(set(node, &name, &value).await?),
        Request::ClusterRecoverPlan { targets } => json(recover::plan(node, targets).await?),
        Request::ClusterRecover { disks, epoch } => {
            json(recover::give_up(node, &disks, epoch).await?)
        }
        Request::NodeScrubStart { rate } => {
            node.scrubbers().iter().try_for_each(|scrubber| scrubber.start(rate))?;
            json(scrubs(node))
        }
        Request::NodeScrubStatus => json(scrubs(node)),
        Request::NodeScrubPause => {
            node.scrubbers().iter().for_each(|scrubber| _ = scrubber.pause());
            json(scrubs(node))
        }
        Request::NodeRecovery => json(recovery::recovery(node).await),
        Request::NodeDiskAdd { path, weight } => json(disks::add(node, path.into(), weight).await?),
        Request::NodeDiskRemove { disk, force } => json(disks::remove(node, &disk, force).await?),
        Request::NodeDiskList => json(disks::list(node)),
        Request::VolumeCreate { name, size, copies, min_copies, ack } => {
            let copies = copies.unwrap_or(DEFAULT_COPIES);
            let min_copies = min_copies.unwrap_or_else(|| default_min_copies(copies));
            let spec = VolumeSpec { name, size, copies, min_copies, ack };
            json(volumes::create(node, spec).await?)
        }
        Request::VolumeList => json(volumes::list(node).await),
        Request::VolumeInfo { name } => json(volumes::info(node, &name).await?),
        Request::VolumeDelete { name } => json(volumes::delete(node, name).await?),
        Request::VolumeDetach { name, force } => json(volumes::detach(node, &name, force).await?),
        Request::VolumeEndHandover { name } => json(volumes::end_handover(node, &name).await?),
        Request::ExportAdd { volume, protocol, address, incoming } => {
            json(exports::add(node, volume, protocol, address, incoming).await?)
        }
        Request::ExportList => json(node.exports.list()),
        Request::ExportRemove { volume, protocol, address } => {
            json(exports::remove(node, volume, protocol, address).await?)
        }
        Request::NodeList
        | Request::NodeDrain { .. }
        | Request::NodeUndrain { .. }
        | Request::NodeRemove { .. }
        | Request::NodeSetZone { .. }
        | Request::NodeSetWeight { .. } => nodes::handle(node, request).await,
    }
}

fn json(value: impl Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|e| e.to_string())
}

/// Proposes a command and waits until this node has applied it, as far as `reached` tells.
async fn change(
    node: &Node,
    command: &Command,
    reached: impl Fn(&ClusterState) -> bool,
) -> Result<Outcome, String> {
    let outcome = node.propose(command).await?.map_err(refused)?;
    if node.wait_for(APPLY_TIMEOUT, reached).await {
        Ok(outcome)
    } else {
        Err("it is agreed, but this node does not hear of it; `dog cluster info` shows it".into())
    }
}

fn refused(refusal: Refusal) -> String {
    format!("{refusal}; nothing was changed")
}

fn scrubs(node: &Node) -> Vec<ScrubInfo> {
    let state = node.cluster.state();
    node.scrubbers().iter().map(|scrubber| scrubber.info(&state)).collect()
}

fn cluster_info(node: &Node) -> ClusterInfo {
    let status = node.log.status();
    let state = node.cluster.state();
    let address = |id: &u64| status.addresses.get(id).cloned().unwrap_or_else(|| id.to_string());
    let epochs = state.history.iter().rev().take(EPOCHS_SHOWN).map(|record| EpochInfo {
        epoch: record.epoch.0,
        at: record.at,
        cause: record.cause.clone(),
    });
    let settings = state.settings.list().into_iter().map(|(name, value)| (name.into(), value));
    ClusterInfo {
        cluster: node.identity().cluster.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        cluster_version: state.version,
        epoch: state.epoch.0,
        leader: status.leader.as_ref().map(address),
        voters: status.voters.iter().map(address).collect(),
        nodes: state.nodes.values().filter(|n| !n.removed).count(),
        nodes_up: state.nodes.values().filter(|n| n.up).count(),
        volumes: state.volumes.len(),
        settings: settings.collect(),
        epochs: epochs.collect(),
    }
}

fn settings(node: &Node, name: Option<&str>) -> Result<Vec<SettingInfo>, String> {
    let mut found = describe(&node.cluster.state().settings);
    if let Some(name) = name {
        found.retain(|setting| setting.name == name);
        if found.is_empty() {
            // It has the text with the names that there are.
            Setting::parse(name, "").map_err(refused)?;
        }
    }
    Ok(found)
}

fn describe(settings: &Settings) -> Vec<SettingInfo> {
    let describe = |(name, value): (&str, String)| {
        let known = NAMES.iter().find(|(known, ..)| *known == name);
        let (values, meaning) = known.map_or(("", ""), |(_, values, meaning)| (values, meaning));
        SettingInfo { name: name.into(), value, values: values.into(), meaning: meaning.into() }
    };
    settings.list().into_iter().map(describe).collect()
}

async fn set(node: &Node, name: &str, value: &str) -> Result<Vec<SettingInfo>, String> {
    let setting = Setting::parse(name, value).map_err(refused)?;
    let mut wanted = node.cluster.state().settings.clone();
    wanted.set(&setting);
    let value_of = |settings: &Settings| {
        settings.list().into_iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    };
    let value = value_of(&wanted);
    change(node, &Command::Set { setting }, |state| value_of(&state.settings) == value).await?;
    settings(node, Some(name))
}
