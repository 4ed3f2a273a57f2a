//! Answers as `dog` prints them: the JSON as it came, or texts and tables for people.

use crate::hint::hint;
use crate::table::{Align, Table};
use crate::time::format_time;
use serde::de::DeserializeOwned;
use serde_json::{Value, from_value};
use sheepdog::api::{
    Ack, ClusterInfo, Detached, DiskInfo, DiskState, ExportInfo, Health, NodeInfo, NodeState,
    Protocol, Request, SlotCounts, Status, VolumeInfo,
};
use sheepdog_types::format_size;
use std::fmt::Display;

pub use admin::{given_up, progress};

/// What [`ExportInfo::state`] says when all is well.
const SERVING: &str = "serving";

/// One document, indented, ended by a newline.
pub fn json(value: &Value) -> String {
    format!("{value:#}\n")
}

/// The answer to `request` for people.
///
/// # Errors
/// The answer is not of the type that [`Request`] promises.
pub fn human(request: &Request, mut value: Value) -> serde_json::Result<String> {
    make_printable(&mut value);
    match request {
        Request::ClusterInfo => show(value, cluster_info),
        Request::ClusterHealth => show(value, health),
        Request::ClusterSettings { .. } | Request::ClusterSet { .. } => {
            show_list(value, admin::settings)
        }
        Request::ClusterRecoverPlan { .. } => show(value, admin::recover_plan),
        Request::ClusterRecover { .. } => Ok(given_up()),
        Request::NodeList => show_list(value, node_list),
        Request::NodeDrain { .. } => show(value, admin::drained),
        Request::NodeUndrain { .. } => show(value, admin::undrained),
        Request::NodeRemove { node, .. } => Ok(admin::removed(&printable(node))),
        Request::NodeSetZone { .. } => show(value, admin::zone_set),
        Request::NodeSetWeight { .. } => show(value, |node: &NodeInfo| admin::weight_set(node)),
        Request::NodeDiskAdd { .. } => show_list(value, admin::disk_added),
        Request::NodeDiskRemove { .. } => show_list(value, admin::disk_removed),
        Request::NodeDiskList => show_list(value, admin::disk_list),
        Request::NodeRecovery => show(value, admin::recovery),
        Request::NodeScrubStart { .. } | Request::NodeScrubStatus | Request::NodeScrubPause => {
            show_list(value, scrub::list)
        }
        Request::VolumeCreate { .. } => show(value, volume_created),
        Request::VolumeList => show_list(value, volume_list),
        Request::VolumeInfo { .. } => show(value, volume_info),
        Request::VolumeEndHandover { .. } => show(value, handover_ended),
        Request::VolumeDetach { .. } => show(value, volume_detached),
        Request::VolumeDelete { name } => Ok(format!("Deleted volume {}.\n", printable(name))),
        Request::ExportAdd { .. } => show(value, export_added),
        Request::ExportList => show_list(value, export_list),
        Request::ExportRemove { .. } => show_list(value, export_removed),
    }
}

fn show<T: DeserializeOwned>(value: Value, text: fn(&T) -> String) -> serde_json::Result<String> {
    from_value(value).map(|answer| text(&answer))
}

fn show_list<T: DeserializeOwned>(
    value: Value,
    text: fn(&[T]) -> String,
) -> serde_json::Result<String> {
    from_value::<Vec<T>>(value).map(|answer| text(&answer))
}

/// `text` with control characters written out, but line feeds: a terminal obeys control
/// characters, and names come from whoever made the volume.
pub fn printable(text: &str) -> String {
    escape(text, |c| c.is_control() && c != '\n')
}

/// [`printable`] for all texts of an answer, line feeds too, so that none spoils a table.
fn make_printable(value: &mut Value) {
    match value {
        Value::String(text) => *text = escape(text, char::is_control),
        Value::Array(values) => values.iter_mut().for_each(make_printable),
        Value::Object(fields) => fields.values_mut().for_each(make_printable),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn escape(text: &str, which: fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if which(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// A value that may be absent.
fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

fn size_or_dash(bytes: Option<u64>) -> String {
    or_dash(bytes.map(format_size))
}

/// Names and values below each other.
fn fields<const N: usize>(fields: [(&str, String); N]) -> String {
    let mut table = Table::plain([Align::Left, Align::Left]);
    for (name, value) in fields {
        table.row([name.into(), value]);
    }
    table.render()
}

fn cluster_info(info: &ClusterInfo) -> String {
    let mut text = fields([
        ("Cluster", info.cluster.clone()),
        ("Release", format!("{}, cluster version {}", info.version, info.cluster_version)),
        ("Epoch", info.epoch.to_string()),
        ("Leader", or_dash(info.leader.as_ref())),
        ("Voters", info.voters.join(", ")),
        ("Nodes", format!("{}, {} up", info.nodes, info.nodes_up)),
        ("Volumes", info.volumes.to_string()),
    ]);
    for (at, (name, value)) in info.settings.iter().enumerate() {
        text.push_str(if at == 0 { "\nSettings\n" } else { "" });
        text.push_str(&format!("  {name} = {value}\n"));
    }
    if !info.epochs.is_empty() {
        let mut table = Table::new([
            ("EPOCH", Align::Right),
            ("TIME (UTC)", Align::Left),
            ("WHAT HAPPENED", Align::Left),
        ]);
        for past in &info.epochs {
            table.row([past.epoch.to_string(), format_time(past.at), past.cause.clone()]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}

/// The health in a line.
pub fn health_line(health: &Health) -> String {
    let SlotCounts { complete, degraded, waiting, .. } = health.slots;
    let status = match health.status {
        Status::Ok => "ok",
        Status::Degraded => "degraded",
        Status::Unavailable => "unavailable",
    };
    let slots = format!("{complete} slots complete, {degraded} degraded, {waiting} waiting");
    format!("{status}: epoch {}, {slots}", health.epoch)
}

fn health(health: &Health) -> String {
    let status = match health.status {
        Status::Ok => "ok: all replicas of everything are there",
        Status::Degraded => "degraded: all I/O goes on, with fewer replicas than wanted",
        Status::Unavailable => "unavailable: some I/O waits",
    };
    let SlotCounts { total, complete, degraded, waiting } = health.slots;
    let mut text = fields([
        ("Health", status.into()),
        ("Epoch", health.epoch.to_string()),
        ("Slots", format!("{total}: {complete} complete, {degraded} degraded, {waiting} waiting")),
    ]);
    if !health.reasons.is_empty() {
        text.push('\n');
    }
    for reason in &health.reasons {
        text.push_str(&format!("- {reason}\n"));
    }
    text
}

/// Each line says everything about a disk and its node, for `grep`.
fn node_list(nodes: &[NodeInfo]) -> String {
    let mut table = Table::new([
        ("NODE", Align::Left),
        ("ADDRESS", Align::Left),
        ("ZONE", Align::Left),
        ("STATE", Align::Left),
        ("DISK", Align::Left),
        ("WEIGHT", Align::Right),
        ("USED", Align::Right),
        ("CAPACITY", Align::Right),
        ("DATA", Align::Left),
        ("PATH", Align::Left),
    ]);
    for node in nodes {
        // A node without disks has a line too.
        let disks = if node.disks.is_empty() {
            vec![["-"; 6].map(String::from)]
        } else {
            node.disks.iter().map(disk_cells).collect()
        };
        for [id, weight, used, capacity, data, path] in disks {
            let NodeInfo { id: name, address, zone, .. } = node.clone();
            let state = node_state(node).into();
            table.row([name, address, zone, state, id, weight, used, capacity, data, path]);
        }
    }
    table.render()
}

fn node_state(node: &NodeInfo) -> &'static str {
    match node.state {
        NodeState::Up => "up",
        NodeState::Down => "down",
        NodeState::Out => "out",
        NodeState::Draining if node.drained => "drained",
        NodeState::Draining => "draining",
        NodeState::Removed => "removed",
    }
}

fn disk_cells(disk: &DiskInfo) -> [String; 6] {
    [
        disk.id.clone(),
        disk.weight.to_string(),
        size_or_dash(disk.used),
        size_or_dash(disk.capacity),
        disk_data(disk).into(),
        or_dash(disk.path.as_ref()),
    ]
}

/// How a disk is, in a word.
fn disk_data(disk: &DiskInfo) -> &'static str {
    match disk.state {
        DiskState::Up if disk.complete => "complete",
        DiskState::Up => "synchronising",
        DiskState::Down => "down",
        DiskState::Failed => "failed",
        DiskState::Out => "out",
        DiskState::Leaving => "leaving",
    }
}

fn volume_created(volume: &VolumeInfo) -> String {
    let VolumeInfo { name, size, copies, min_copies, .. } = volume;
    let copies_text = if *copies == 1 { "copy" } else { "copies" };
    let size = format_size(*size);
    format!(
        "Created volume {name}: {size}, {copies} {copies_text}, I/O needs at least {min_copies}.\n"
    )
}

fn volume_list(volumes: &[VolumeInfo]) -> String {
    if volumes.is_empty() {
        return "No volumes. Create one with `dog volume create NAME SIZE`.\n".into();
    }
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("SIZE", Align::Right),
        ("USED", Align::Right),
        ("COPIES", Align::Right),
        ("SNAPSHOTS", Align::Right),
        ("CREATED (UTC)", Align::Left),
        ("ATTACHED TO", Align::Left),
    ]);
    for volume in volumes {
        table.row([
            volume.name.clone(),
            format_size(volume.size),
            size_or_dash(volume.used),
            volume.copies.to_string(),
            volume.snapshots.len().to_string(),
            format_time(volume.created),
            or_dash(volume.attached_to.as_ref()),
        ]);
    }
    table.render()
}

fn ack_text(ack: Ack) -> &'static str {
    match ack {
        Ack::Flush => "acknowledged when all replicas have them, durable after a flush",
        Ack::Commit => "acknowledged when durable on all replicas",
    }
}

fn dash() -> String {
    "-".into()
}

/// What may be the matter with the replicas of a volume, beside what the health of the cluster tells.
fn settled_text(volume: &VolumeInfo) -> &'static str {
    match (volume.settled, &volume.attached_to) {
        (true, _) => "settled",
        (false, Some(_)) => {
            "being compared, because an earlier gateway may have ended in the middle of writes"
        }
        (false, None) => {
            "to be compared when it is attached: its last gateway may have ended in the middle of writes"
        }
    }
}

fn volume_detached(done: &Detached) -> String {
    let Detached { volume, detached_from, attached_since, writer, broken, clients } = done;
    let since = format_time(*attached_since);
    let mut text = format!(
        "Detached volume {volume} from {detached_from}, which had it since {since} UTC (writer \
         generation {writer}).\n"
    );
    if *broken {
        let of = match clients {
            Some(clients) => format!("its clients ({clients}) get"),
            None => "it did not say how many clients it has; they get".into(),
        };
        text.push_str(&format!(
            "The lock was broken: {detached_from} is fenced, {of} I/O errors. What they had not flushed \
             may or may not be written.\nIts exports of {volume} stay, out of service: remove them with \
             `dog --node {detached_from} export remove {volume}`.\n"
        ));
    }
    text
}

fn handover_ended(volume: &VolumeInfo) -> String {
    match &volume.attached_to {
        Some(holder) => format!("Volume {} stays with {holder}.\n", volume.name),
        None => format!("No node has volume {}, and none waits for it.\n", volume.name),
    }
}

fn handover_text(volume: &VolumeInfo) -> String {
    let Some(handover) = &volume.handover else { return dash() };
    let since = format_time(handover.since);
    format!("from {} to {}, open since {since} UTC", handover.from, handover.to)
}

fn volume_info(volume: &VolumeInfo) -> String {
    let mut text = fields([
        ("Name", volume.name.clone()),
        ("Id", volume.id.to_string()),
        ("Size", format!("{} ({} bytes)", format_size(volume.size), volume.size)),
        ("Used", size_or_dash(volume.used)),
        ("Copies", format!("{}, I/O needs at least {}", volume.copies, volume.min_copies)),
        ("Writes", ack_text(volume.ack).into()),
        ("Attached to", or_dash(volume.attached_to.as_ref())),
        ("Attached since", volume.attached_since.map_or_else(dash, |at| format_time(at) + " UTC")),
        ("Handed over", handover_text(volume)),
        ("Clients", or_dash(volume.clients.map(|clients| clients.to_string()).as_ref())),
        ("Writer", volume.writer.to_string()),
        ("Replicas", settled_text(volume).into()),
        ("Created", format!("{} UTC", format_time(volume.created))),
        ("Parent", or_dash(volume.parent.as_ref())),
        ("Snapshots", volume.snapshots.len().to_string()),
    ]);
    if !volume.snapshots.is_empty() {
        let mut table = Table::new([("SNAPSHOT", Align::Left), ("CREATED (UTC)", Align::Left)]);
        for snapshot in &volume.snapshots {
            table.row([snapshot.tag.clone(), format_time(snapshot.created)]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}

/// The protocol as the options and the JSON name it.
fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Nbd => "nbd",
        Protocol::VhostUser => "vhost-user",
    }
}

fn export_added(export: &ExportInfo) -> String {
    let ExportInfo { volume, protocol, address, state, .. } = export;
    let protocol = protocol_name(*protocol);
    let mut text = format!("Exported volume {volume} over {protocol} at {address}.\n");
    if state != SERVING {
        text.push_str(&format!("It does not serve yet: {state}.\n"));
    }
    text + "\n" + &hint(export)
}

fn export_list(exports: &[ExportInfo]) -> String {
    if exports.is_empty() {
        return "No exports on this node. Add one with `dog export add VOLUME`.\n".into();
    }
    let mut table = Table::new([
        ("VOLUME", Align::Left),
        ("PROTOCOL", Align::Left),
        ("ADDRESS", Align::Left),
        ("CLIENTS", Align::Right),
        ("STATE", Align::Left),
    ]);
    for export in exports {
        table.row([
            export.volume.clone(),
            protocol_name(export.protocol).into(),
            export.address.clone(),
            export.clients.to_string(),
            export.state.clone(),
        ]);
    }
    table.render()
}

fn export_removed(exports: &[ExportInfo]) -> String {
    if exports.is_empty() {
        return "There was no such export on this node.\n".into();
    }
    let line = |ExportInfo { volume, protocol, address, .. }: &ExportInfo| {
        let protocol = protocol_name(*protocol);
        format!("Removed the export of volume {volume} over {protocol} at {address}.\n")
    };
    exports.iter().map(line).collect()
}

mod admin;
mod scrub;
#[cfg(test)]
mod tests;
