//! `sheep check` and `sheep dump`: looking at a disk whose daemon is stopped.

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use sheepdog_store::{DumpItem, DumpValue, Finding, OpenError, Progress, Report, Severity};
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What to do instead of running.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Verify a disk whose daemon is stopped: all structures, all checksums. Changes nothing.
    ///
    /// Reads every block once. Prints totals, then a line for each finding: `damage` is lost on
    /// this disk (another replica has it), `repairable` has a second copy from which the daemon
    /// repairs it, `note` does no harm.
    ///
    /// Exit codes: 0 clean (notes do not count), 1 damaged, repairable or not checked, 2 usage.
    ///
    /// Examples:
    ///   sheep check /var/lib/sheepdog
    ///   sheep check --json /srv/disk1 | jq '.findings[]'
    #[command(verbatim_doc_comment)]
    Check(Where),
    /// List what a disk holds whose daemon is stopped: slabs, log, layers. Changes nothing.
    ///
    /// Prints a line for each structure, with its file and offset. It verifies no stored blocks:
    /// that is `sheep check`.
    ///
    /// Exit codes: 0 done, 1 not possible, 2 usage.
    ///
    /// Examples:
    ///   sheep dump /var/lib/sheepdog
    ///   sheep dump --json /srv/disk1 | jq 'select(.kind == "layer")'
    #[command(verbatim_doc_comment)]
    Dump(Where),
}

/// Which disk, and how to print.
#[derive(Debug, Args)]
pub struct Where {
    /// Directory of a disk, or that of a node with its disk in DIR/disk.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print JSON: `check` one object, `dump` one a line.
    #[arg(long)]
    json: bool,
}

impl Where {
    /// The directory of the store.
    fn store(&self) -> PathBuf {
        let inner = self.dir.join("disk");
        let is_store = |dir: &Path| dir.join("superblock").exists();
        if !is_store(&self.dir) && is_store(&inner) { inner } else { self.dir.clone() }
    }
}

impl Command {
    /// Does it.
    pub fn run(&self) -> ExitCode {
        let (name, done) = match self {
            Self::Check(place) => ("check", check(place)),
            Self::Dump(place) => ("dump", dump(place)),
        };
        match done {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(what) => {
                // With nowhere to complain to, the exit code still tells.
                let _ = writeln!(io::stderr(), "sheep {name}: {what}");
                ExitCode::FAILURE
            }
        }
    }
}

fn explain(error: &OpenError) -> String {
    match error {
        OpenError::Locked { .. } => format!("{error}: stop that daemon first"),
        OpenError::NotAStore { .. } => {
            format!("{error}; give the directory of a disk, or of a node with its disk in DIR/disk")
        }
        _ => error.to_string(),
    }
}

/// Whether the store is clean.
fn check(place: &Where) -> Result<bool, String> {
    let dir = place.store();
    let mut shown = Meter::default();
    let report = sheepdog_store::check(&dir, &mut |progress| shown.show(progress));
    shown.clear();
    let report = report.map_err(|error| explain(&error))?;
    let text = if place.json {
        format!("{:#}\n", report_json(&dir, &report))
    } else {
        report_text(&dir, &report)
    };
    let mut out = io::stdout().lock();
    finish(out.write_all(text.as_bytes()).and_then(|()| out.flush()))?;
    Ok(report.is_clean())
}

fn dump(place: &Where) -> Result<bool, String> {
    let dir = place.store();
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut written = if place.json { Ok(()) } else { writeln!(out, "{}", dir.display()) };
    let listed = sheepdog_store::dump(&dir, &mut |item| {
        written = if place.json {
            writeln!(out, "{}", item_json(item))
        } else {
            writeln!(out, "{}", item_text(&item))
        };
        written.is_ok()
    });
    listed.map_err(|error| explain(&error))?;
    finish(written.and_then(|()| out.flush()))?;
    Ok(true)
}

/// A reader that has left (`sheep dump … | head`) has read enough.
fn finish(written: io::Result<()>) -> Result<(), String> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write the output: {error}"))
        }
        _ => Ok(()),
    }
}

/// How far it is, on a terminal.
#[derive(Default)]
struct Meter {
    last: Option<(&'static str, u64)>,
}

impl Meter {
    fn show(&mut self, progress: Progress) {
        let percent = progress.done.saturating_mul(100) / progress.total.max(1);
        let now = Some((progress.stage, percent));
        if self.last == now || !io::stderr().is_terminal() {
            return;
        }
        self.last = now;
        let mut err = io::stderr();
        let _ = write!(err, "\r\x1b[K{}: {percent}%", progress.stage).and_then(|()| err.flush());
    }

    fn clear(&self) {
        if self.last.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn report_text(dir: &Path, report: &Report) -> String {
    let totals = &report.totals;
    let mut text = format!("{}\n", dir.display());
    // Writing to a string does not fail.
    let mut line = |arguments: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{arguments}");
    };
    if let Some(ids) = report.ids {
        line(format_args!("cluster {}, node {}, disk {}", ids.cluster, ids.node, ids.disk));
        line(format_args!(
            "{} layers, {} data blocks, {} zero blocks; {} slabs in use, {} free",
            totals.layers, totals.data_blocks, totals.zero_blocks, totals.slabs, totals.free_slabs
        ));
        let stopped = if totals.clean { "stopped in order" } else { "not stopped in order" };
        line(format_args!(
            "checkpoint {}, opening {}, {stopped}; {} bytes of log wait ({} records)",
            totals.checkpoint, totals.incarnation, totals.log_bytes, totals.log_records
        ));
        line(format_args!("content digest {:016x}", totals.digest));
        line(format_args!(
            "{} data blocks match their checksums, {} are lost",
            totals.verified_blocks, totals.damaged_blocks
        ));
    }
    for finding in &report.findings {
        line(format_args!("{}", finding_text(finding)));
    }
    if report.not_kept() > 0 {
        line(format_args!("and {} more", report.not_kept()));
    }
    if let Some(why) = report.incomplete {
        line(format_args!("not all could be checked: {why}"));
    }
    let [damage, repairable, notes] = report.counts;
    let verdict = if report.is_clean() { "clean" } else { "NOT clean" };
    line(format_args!("{verdict}: {damage} damage, {repairable} repairable, {notes} notes"));
    text
}

fn finding_text(finding: &Finding) -> String {
    let mut text = format!("{}: {}", finding.severity.name(), finding.file);
    if let Some(offset) = finding.offset {
        let _ = write!(text, ", offset {offset}");
    }
    if let Some(slab) = finding.slab {
        let _ = write!(text, ", slab {slab}");
    }
    if let Some(layer) = finding.layer {
        let _ = write!(text, ", layer {layer}");
    }
    if let Some(block) = finding.block {
        let _ = match finding.blocks {
            0 | 1 => write!(text, ", block {block}"),
            blocks => write!(text, ", {blocks} blocks from {block} on"),
        };
    }
    format!("{text}: {}", finding.what)
}

fn report_json(dir: &Path, report: &Report) -> Value {
    let totals = &report.totals;
    let id = |of: fn(&sheepdog_store::StoreIds) -> String| report.ids.as_ref().map(of);
    json!({
        "dir": dir.display().to_string(),
        "clean": report.is_clean(),
        "incomplete": report.incomplete,
        "cluster": id(|ids| ids.cluster.to_string()),
        "node": id(|ids| ids.node.to_string()),
        "disk": id(|ids| ids.disk.to_string()),
        "layers": totals.layers,
        "data_blocks": totals.data_blocks,
        "zero_blocks": totals.zero_blocks,
        "verified_blocks": totals.verified_blocks,
        "damaged_blocks": totals.damaged_blocks,
        "slabs": totals.slabs,
        "free_slabs": totals.free_slabs,
        "log_start": totals.log_start,
        "log_bytes": totals.log_bytes,
        "log_records": totals.log_records,
        "checkpoint": totals.checkpoint,
        "incarnation": totals.incarnation,
        "stopped_in_order": totals.clean,
        "digest": format!("{:016x}", totals.digest),
        "damage": report.count(Severity::Damage),
        "repairable": report.count(Severity::Repairable),
        "notes": report.count(Severity::Note),
        "not_listed": report.not_kept(),
        "findings": report.findings.iter().map(finding_json).collect::<Vec<_>>(),
    })
}

fn finding_json(finding: &Finding) -> Value {
    json!({
        "severity": finding.severity.name(),
        "file": finding.file,
        "offset": finding.offset,
        "slab": finding.slab,
        "layer": finding.layer.map(|layer| layer.to_string()),
        "block": finding.block,
        "blocks": finding.blocks,
        "what": finding.what,
    })
}

fn item_json(item: DumpItem) -> Value {
    let mut object = Map::from_iter([("kind".to_owned(), item.kind.into())]);
    object.extend(item.fields.into_iter().map(|(name, value)| {
        let value = match value {
            DumpValue::Number(number) => number.into(),
            DumpValue::Text(text) => text.into(),
            DumpValue::Flag(flag) => flag.into(),
        };
        (name.to_owned(), value)
    }));
    object.into()
}

fn item_text(item: &DumpItem) -> String {
    let mut text = item.kind.to_owned();
    for (name, value) in &item.fields {
        let _ = match value {
            DumpValue::Number(number) => write!(text, " {name}={number}"),
            DumpValue::Text(value) if value.contains(' ') => write!(text, " {name}={value:?}"),
            DumpValue::Text(value) => write!(text, " {name}={value}"),
            DumpValue::Flag(flag) => write!(text, " {name}={}", if *flag { "yes" } else { "no" }),
        };
    }
    text
}
