//! Listing what a store holds, structure by structure.

use std::path::Path;

use sheepdog_types::{LayerKey, Version};

use super::index::{self, states_of};
use super::replay::{self, Change};
use super::{Disk, Report, open_superblock};
use crate::api::BlockState;
use crate::checkpoint::{index_offset, sums_offset};
use crate::error::OpenError;
use crate::format::{Header, Kind, Mark, NO_SLAB, SUPER_PART, Superblock};
use crate::open::{DATA, INDEX, SUPERBLOCK};

/// A value of a [`DumpItem`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DumpValue {
    /// A number.
    Number(u64),
    /// A name, an id in hexadecimal, a version, a key.
    Text(String),
    /// Yes or no.
    Flag(bool),
}

impl From<u64> for DumpValue {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<u32> for DumpValue {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<bool> for DumpValue {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<String> for DumpValue {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for DumpValue {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

/// One structure of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpItem {
    /// `superblock`, `mark`, `slab`, `record`, `log end`, `layer` or `finding`.
    pub kind: &'static str,
    /// What it says, in the order of printing.
    pub fields: Vec<(&'static str, DumpValue)>,
}

impl DumpItem {
    fn new(kind: &'static str, file: &str, offset: u64) -> Self {
        Self { kind, fields: vec![("file", file.into()), ("offset", offset.into())] }
    }

    fn with(mut self, name: &'static str, value: impl Into<DumpValue>) -> Self {
        self.fields.push((name, value.into()));
        self
    }

    fn with_versions(self, prev: Version, version: Version) -> Self {
        self.with("prev", prev.to_string()).with("version", version.to_string())
    }
}

/// Lists a store that is not in use: the copies of superblock and mark, the slabs, the log, and
/// the layers as they are with the log. Reads no blocks of slabs, except to find the log's end.
/// Changes nothing. `each` gets the structures one by one and ends the listing by returning false.
///
/// # Errors
/// As [`super::check`].
pub fn dump(dir: &Path, each: &mut dyn FnMut(DumpItem) -> bool) -> Result<(), OpenError> {
    let (_lock, _, parts) = open_superblock(dir)?;
    for (part, sector) in (0..).zip(&parts) {
        let name = if part < 2 { "superblock" } else { "mark" };
        let item = DumpItem::new(name, SUPERBLOCK, part * SUPER_PART);
        let decoded = sector.as_ref().ok().and_then(|sector| match part {
            0 | 1 => Superblock::decode(sector).ok().map(|found| superblock(item.clone(), &found)),
            _ => Mark::decode(sector).map(|found| mark(item.clone(), &found)),
        });
        if !each(decoded.unwrap_or_else(|| item.with("damaged", true))) {
            return Ok(());
        }
    }
    let mut report = Report::default();
    if let Some(disk) = Disk::open(dir, &mut report)? {
        list(&disk, &mut report, each);
    }
    Ok(())
}

fn superblock(item: DumpItem, found: &Superblock) -> DumpItem {
    item.with("cluster", found.ids.cluster.to_string())
        .with("node", found.ids.node.to_string())
        .with("disk", found.ids.disk.to_string())
        .with("segment_bytes", found.segment_bytes)
        .with("segments", found.segments)
}

fn mark(item: DumpItem, found: &Mark) -> DumpItem {
    item.with("sequence", found.sequence)
        .with("checkpoint", found.checkpoint)
        .with("log_start", found.log_start)
        .with("prior_end", found.prior_end)
        .with("incarnation", found.incarnation)
        .with("clean", found.clean)
        .with("index_digest", format!("{:016x}", found.index_digest))
}

fn list(disk: &Disk, report: &mut Report, each: &mut dyn FnMut(DumpItem) -> bool) {
    let mut model = index::read(disk, report, &mut |_| {});
    let mut more = true;
    let mut based: Vec<_> = model
        .layers
        .iter()
        .filter_map(|(key, layer)| Some((layer.base?, *key, layer.version)))
        .collect();
    based.sort_unstable_by_key(|(base, ..)| base.slab);
    for (base, key, version) in based {
        let states = states_of(disk, &base).unwrap_or_default();
        let item = DumpItem::new("slab", INDEX, index_offset(base.slab, base.slot))
            .with("slab", base.slab)
            .with("slot", u32::from(base.slot))
            .with("layer", key.to_string())
            .with("version", version.to_string())
            .with("data_blocks", u32::from(states.data_blocks()))
            .with("zero_blocks", u32::from(states.zero_blocks()))
            .with("sums_offset", sums_offset(base.slab, base.slot))
            .with("data_offset", replay::slab_offset(base.slab, 0));
        if !each(item) {
            return;
        }
    }
    let log = replay::replay(disk, &mut model, report, &mut |_| {}, &mut |header| {
        more = more && each(record(disk, header));
    });
    let (file, offset) = disk.log_place(log.end);
    more = more && each(DumpItem::new("log end", file, offset).with("lsn", log.end));
    for (key, layer) in model.layers.iter().filter(|(_, layer)| layer.exists()) {
        more = more && each(layer_item(disk, *key, layer));
    }
    for finding in &report.findings {
        let item = DumpItem::new("finding", &finding.file, finding.offset.unwrap_or(0));
        let item = item.with("severity", finding.severity.name());
        more = more && each(item.with("what", finding.what.clone()));
    }
}

fn record(disk: &Disk, header: &Header) -> DumpItem {
    let (file, offset) = disk.log_place(header.lsn);
    let kind = match header.kind {
        Kind::Data => "data",
        Kind::Clear => "clear",
        Kind::Install => "install",
        Kind::Delete => "delete",
        Kind::DeleteVolume => "delete volume",
        Kind::Merge => "merge",
        Kind::Patch => "patch",
        Kind::End => "end",
        Kind::Synced => "synced",
    };
    let mut item = DumpItem::new("record", file, offset)
        .with("lsn", header.lsn)
        .with("what", kind)
        .with("incarnation", header.incarnation)
        .with("durable", header.durable);
    if header.kind == Kind::DeleteVolume {
        item = item.with("volume", header.key.object.volume.to_string());
    } else if !matches!(header.kind, Kind::End | Kind::Synced) {
        item = item.with("layer", header.key.to_string());
        item = item.with_versions(header.prev, header.version);
    }
    if matches!(header.kind, Kind::Data | Kind::Clear | Kind::Install | Kind::Patch) {
        item = item.with("first", u32::from(header.first)).with("blocks", header.count);
    }
    if header.kind == Kind::Merge {
        item = item.with("lower", header.lower.to_string());
    }
    if header.slab != NO_SLAB {
        item = item.with("slab", header.slab);
    }
    if header.is_direct() { item.with("direct", true) } else { item }
}

fn layer_item(disk: &Disk, key: LayerKey, layer: &replay::LayerModel) -> DumpItem {
    let mut states =
        layer.visible_base().and_then(|base| states_of(disk, base)).unwrap_or_default();
    for (block, change) in &layer.changes {
        let state = match change {
            Change::Absent => BlockState::Absent,
            Change::Zero => BlockState::Zero,
            Change::Data { .. } | Change::Unknown { .. } => BlockState::Data,
        };
        states.set(*block, state);
    }
    let slab = layer.slab.unwrap_or(NO_SLAB);
    DumpItem::new("layer", DATA, replay::slab_offset(slab, 0))
        .with("slab", slab)
        .with("layer", key.to_string())
        .with("version", layer.version.to_string())
        .with("data_blocks", u32::from(states.data_blocks()))
        .with("zero_blocks", u32::from(states.zero_blocks()))
        .with("changed_blocks", layer.changes.len() as u64)
}
