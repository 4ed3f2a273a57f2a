//! Membership, disks, settings and recovery for people.

use super::{disk_data, or_dash, size_or_dash};
use crate::table::{Align, Table};
use crate::time::format_time;
use sheepdog::api::{
    DiskInfo, NodeInfo, RecoverPlan, Recovery, RecoveryInfo, RecoveryState, SettingInfo, VolumeLoss,
};
use sheepdog_types::format_size;

/// Characters of a progress bar.
const BAR: usize = 30;

/// A line for each setting.
pub fn settings(settings: &[SettingInfo]) -> String {
    let columns = ["SETTING", "VALUE", "VALUES", "MEANING"];
    let mut table = Table::new(columns.map(|name| (name, Align::Left)));
    for setting in settings.iter().cloned() {
        table.row([setting.name, setting.value, setting.values, setting.meaning]);
    }
    table.render()
}

/// What `dog node drain` says.
pub fn drained(node: &NodeInfo) -> String {
    let NodeInfo { address, drained, .. } = node;
    if *drained {
        return format!("Node {address} is drained: its disks hold nothing that others need.\n");
    }
    format!(
        "Node {address} is being drained: its data move to others, and its copies count until they \
         have them.\n`dog node list` says when it is drained, `dog node recovery` how far that is.\n"
    )
}

/// What `dog node undrain` says.
pub fn undrained(node: &NodeInfo) -> String {
    format!("Node {} takes data again.\n", node.address)
}

/// What `dog node remove` says.
pub fn removed(node: &str) -> String {
    format!(
        "Removed node {node}. Its daemon stops by itself, and nothing with its directory can come \
         back.\n"
    )
}

/// What `dog node set-zone` says.
pub fn zone_set(node: &NodeInfo) -> String {
    format!("Node {} is in zone {} now.\n", node.address, node.zone)
}

/// What `dog node set-weight` says.
pub fn weight_set(node: &NodeInfo) -> String {
    let weights = node.disks.iter().map(|d| format!("disk {} has weight {}", d.id, d.weight));
    format!("Node {}: {}.\n", node.address, weights.collect::<Vec<_>>().join(", "))
}

/// What `dog node disk add` says.
pub fn disk_added(disks: &[DiskInfo]) -> String {
    let line = |disk: &DiskInfo| {
        let (id, path) = (&disk.id, or_dash(disk.path.as_ref()));
        format!("Added disk {id} at {path} with weight {}; it takes its share now.\n", disk.weight)
    };
    disks.iter().map(line).collect()
}

/// What `dog node disk remove` says.
pub fn disk_removed(disks: &[DiskInfo]) -> String {
    if disks.is_empty() {
        return "The disk is removed and closed. Its files are in the directory removed-DISK beside \
                where they were; nobody needs them.\n"
            .into();
    }
    let line = |disk: &DiskInfo| {
        let (id, path) = (&disk.id, or_dash(disk.path.as_ref()));
        format!(
            "Disk {id} leaves: its data move to others. When `dog node disk list` does not show it \
             any more, its files are in {path}/removed-{id}, and nobody needs them.\n"
        )
    };
    disks.iter().map(line).collect()
}

/// The disks of a node.
pub fn disk_list(disks: &[DiskInfo]) -> String {
    if disks.is_empty() {
        return "No disks on this node. Add one with `dog node disk add PATH`.\n".into();
    }
    let mut table = Table::new([
        ("DISK", Align::Left),
        ("WEIGHT", Align::Right),
        ("USED", Align::Right),
        ("CAPACITY", Align::Right),
        ("DATA", Align::Left),
        ("PATH", Align::Left),
    ]);
    for disk in disks {
        table.row([
            disk.id.clone(),
            disk.weight.to_string(),
            size_or_dash(disk.used),
            size_or_dash(disk.capacity),
            disk_data(disk).into(),
            or_dash(disk.path.as_ref()),
        ]);
    }
    let failed = disks.iter().filter_map(|disk| {
        disk.failure.as_ref().map(|failure| format!("\n- disk {}: {failure}\n", disk.id))
    });
    table.render() + &failed.collect::<String>()
}

/// What `dog cluster recover` says at the end.
pub fn given_up() -> String {
    "Given up. Nothing waits for these disks any more; see `dog cluster health`.\n".into()
}

/// What would be lost.
pub fn recover_plan(plan: &RecoverPlan) -> String {
    let mut text = String::new();
    if plan.waiting.is_empty() {
        text.push_str("Nothing waits for anybody.\n");
    }
    for group in &plan.waiting {
        text.push_str(&format!("{} slots {}\n", group.slots, group.reason));
    }
    if plan.disks.is_empty() {
        text.push_str("There is nothing to give up.\n");
        return text;
    }
    text.push_str("\nTo be given up, so that nobody waits for them any more:\n");
    for lost in &plan.disks {
        let since = lost.down_since.map(|at| format!(", down since {} UTC", format_time(at)));
        let since = since.unwrap_or_default();
        text.push_str(&format!("- disk {} of node {}{since}\n", lost.disk, lost.address));
    }
    if plan.volumes.is_empty() {
        text.push_str("\nNothing would be lost.\n");
    } else {
        text.push_str("\nTo be lost, in objects of 4 MiB, written or not:\n");
        plan.volumes.iter().for_each(|volume| text.push_str(&lost_line(volume)));
    }
    if plan.still_waiting > 0 {
        let still = plan.still_waiting;
        text.push_str(&format!("\n{still} slots would go on waiting for other disks.\n"));
    }
    text
}

fn lost_line(loss: &VolumeLoss) -> String {
    let VolumeLoss { volume, objects, gone, older, .. } = loss;
    let mut parts = Vec::new();
    if *gone > 0 {
        parts.push(format!("{gone} without any replica left: they will read as zeroes"));
    }
    if *older > 0 {
        let since = match (loss.older_since_epoch, loss.older_since) {
            (Some(epoch), Some(at)) => format!("since {} UTC (epoch {epoch})", format_time(at)),
            (Some(epoch), None) => format!("since epoch {epoch}"),
            (None, _) => "since longer ago than is remembered".into(),
        };
        parts.push(format!("{older} with an older replica only: writes {since} may be missing"));
    }
    format!("- volume {volume}, of {objects}: {}\n", parts.join("; "))
}

/// The recovery of each disk.
pub fn recovery(recovery: &Recovery) -> String {
    let mut table = Table::new([
        ("NODE", Align::Left),
        ("DISK", Align::Left),
        ("RECOVERY", Align::Left),
        ("SLOTS", Align::Right),
        ("OBJECTS", Align::Right),
        ("MOVED", Align::Right),
        ("RATE", Align::Right),
        ("LEFT", Align::Right),
        ("WAITS FOR", Align::Left),
    ]);
    for node in &recovery.nodes {
        let Some(disks) = &node.disks else {
            let mut cells = ["-"; 9].map(String::from);
            (cells[0], cells[2]) = (node.address.clone(), "no answer".into());
            table.row(cells);
            continue;
        };
        for disk in disks {
            let works = disk.state != RecoveryState::Idle;
            let shown = |text: String| if works { text } else { "-".into() };
            table.row([
                node.address.clone(),
                disk.disk.clone(),
                state(disk.state).into(),
                shown(format!("{}/{}", disk.slots_done, disk.slots_total)),
                shown(format!("{}/{}", disk.objects_copied, disk.objects_planned)),
                shown(format_size(disk.bytes_moved)),
                shown(format!("{}/s", format_size(disk.bytes_per_second))),
                or_dash(disk.eta_seconds.map(duration)),
                or_dash(disk.waits_for.as_ref()),
            ]);
        }
    }
    let paused = "\nPaused: `dog node recovery resume` has it go on.\n";
    table.render() + if recovery.paused { paused } else { "" }
}

fn state(state: RecoveryState) -> &'static str {
    match state {
        RecoveryState::Idle => "idle",
        RecoveryState::Comparing => "comparing",
        RecoveryState::Copying => "copying",
        RecoveryState::Waiting => "waiting",
        RecoveryState::Paused => "paused",
    }
}

/// The recovery of all disks in a line.
pub fn progress(recovery: &Recovery) -> String {
    let disks = recovery.nodes.iter().filter_map(|node| node.disks.as_ref()).flatten();
    let busy: Vec<&RecoveryInfo> = disks.filter(|disk| disk.state != RecoveryState::Idle).collect();
    if busy.is_empty() {
        return "no recovery".into();
    }
    let sum = |of: fn(&RecoveryInfo) -> u64| busy.iter().map(|disk| of(disk)).sum::<u64>();
    let (done, total) = (sum(|d| d.slots_done), sum(|d| d.slots_total).max(1));
    let (copied, planned) = (sum(|d| d.objects_copied), sum(|d| d.objects_planned));
    let percent = done * 100 / total;
    let filled = (percent as usize * BAR / 100).min(BAR);
    let bar = format!("{}{}", "#".repeat(filled), "-".repeat(BAR - filled));
    let disks = if busy.len() == 1 { "1 disk".into() } else { format!("{} disks", busy.len()) };
    let rate = format_size(sum(|d| d.bytes_per_second));
    let mut text =
        format!("[{bar}] {percent:3} %, {disks}, {copied} of {planned} objects, {rate}/s");
    if recovery.paused {
        text.push_str(", paused");
    } else if let Some(eta) = busy.iter().filter_map(|disk| disk.eta_seconds).max() {
        text.push_str(&format!(", {} left", duration(eta)));
    }
    text
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h", seconds.div_ceil(3600)),
    }
}
