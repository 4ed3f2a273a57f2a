//! Scrubs of the disks of a node.

use super::or_dash;
use crate::table::{Align, Table};
use crate::time::format_time;
use sheepdog::api::{ScrubInfo, ScrubResult, ScrubState};
use sheepdog_types::format_size;

/// A line for each disk, then the blocks that are damaged.
pub fn list(scrubs: &[ScrubInfo]) -> String {
    let mut table = Table::new([
        ("DISK", Align::Left),
        ("SCRUB", Align::Left),
        ("DONE", Align::Right),
        ("OF", Align::Right),
        ("RATE", Align::Right),
        ("STARTED (UTC)", Align::Left),
        ("LAST FINISHED (UTC)", Align::Left),
        ("DAMAGED", Align::Right),
        ("PATH", Align::Left),
    ]);
    for scrub in scrubs {
        let begun = scrub.state != ScrubState::Idle;
        table.row([
            scrub.disk.clone(),
            state(scrub.state).into(),
            or_dash(begun.then(|| format_size(scrub.bytes_done))),
            format_size(scrub.bytes_total),
            format!("{}/s", format_size(scrub.rate)),
            or_dash(scrub.started_at.map(format_time)),
            or_dash(scrub.last.as_ref().map(|last: &ScrubResult| format_time(last.finished_at))),
            scrub.damaged_blocks.to_string(),
            scrub.path.clone(),
        ]);
    }
    table.render() + &damaged(scrubs)
}

fn state(state: ScrubState) -> &'static str {
    match state {
        ScrubState::Idle => "idle",
        ScrubState::Running => "running",
        ScrubState::Paused => "paused",
    }
}

fn damaged(scrubs: &[ScrubInfo]) -> String {
    if scrubs.iter().all(|scrub| scrub.damaged_blocks == 0) {
        return String::new();
    }
    let mut table = Table::new([
        ("DAMAGED ON DISK", Align::Left),
        ("VOLUME", Align::Left),
        ("OFFSET", Align::Right),
    ]);
    let mut more = 0;
    for scrub in scrubs {
        for block in &scrub.damaged {
            let deleted = || format!("id {} (deleted)", block.volume_id);
            let volume = block.volume.clone().unwrap_or_else(deleted);
            table.row([scrub.disk.clone(), volume, block.offset.to_string()]);
        }
        more += scrub.damaged_blocks.saturating_sub(scrub.damaged.len() as u64);
    }
    let mut text = format!("\n{}", table.render());
    if more > 0 {
        text.push_str(&format!("and {more} more\n"));
    }
    text
}
