//! Verifying every block that counts.

use std::path::Path;

use sheepdog_types::{BLOCK_SIZE, LayerKey};

use super::index::{self, states_of, sums_of};
use super::replay::{self, Base, Change, LayerModel, Log, Model, Place, slab_offset};
use super::{Disk, Finding, Progress, Report, Severity, Totals, Unreadable};
use crate::api::BlockState;
use crate::checkpoint::sums_offset;
use crate::error::OpenError;
use crate::open::{DATA, INDEX, SUMS};
use crate::states::States;
use crate::table::layer_hash;

/// Blocks that are read at once.
const READ_BLOCKS: usize = 256;

/// Verifies a store that is not in use: every structure, every checksum. Changes nothing; while it
/// runs no daemon can open the store. `progress` is called about once for each MiB.
///
/// # Errors
/// [`OpenError::NotAStore`], [`OpenError::Locked`], [`OpenError::OtherFormat`], [`OpenError::Io`]
/// if a file cannot be opened. Damage of any kind is no error: it is in the report.
pub fn check(dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Report, OpenError> {
    examine(dir, progress).map(|(report, _)| report)
}

/// [`check`], and what it found the layers to be.
pub(crate) fn examine(
    dir: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Report, Model), OpenError> {
    let mut report = Report::default();
    let Some(disk) = Disk::open(dir, &mut report)? else {
        return Ok((report, Model::default()));
    };
    let mut model = index::read(&disk, &mut report, progress);
    let log = replay::replay(&disk, &mut model, &mut report, progress, &mut |_| {});
    report.totals = totals(&disk, &model, &log);
    if model.log_is_cut {
        report.incomplete.get_or_insert(
            "the log cannot be followed to its end: blocks that it replaced may be named as damaged",
        );
    }
    let mut check = Check {
        disk: &disk,
        report: &mut report,
        buf: vec![0; READ_BLOCKS * BLOCK_SIZE],
        runs: Runs::default(),
        lost_in_log: Vec::new(),
    };
    check.all(&model, progress);
    check.note_superseded(&log);
    Ok((report, model))
}

fn totals(disk: &Disk, model: &Model, log: &Log) -> Totals {
    let existing = || model.layers.iter().filter(|(_, layer)| layer.exists());
    Totals {
        layers: existing().count() as u64,
        slabs: model.slabs_used(),
        free_slabs: u64::from(model.slabs_end) - model.slabs_used(),
        log_bytes: log.end - disk.mark.log_start,
        log_records: log.records,
        log_start: disk.mark.log_start,
        checkpoint: disk.mark.checkpoint,
        incarnation: disk.mark.incarnation,
        clean: disk.mark.clean,
        digest: existing()
            .fold(0, |sum, (key, layer)| sum.wrapping_add(layer_hash(*key, layer.version))),
        ..Totals::default()
    }
}

/// Blocks of a layer that lie one after the other, with their checksums.
#[derive(Default)]
struct Runs {
    first: u16,
    place: Option<Place>,
    /// `None`: the checksum is lost.
    crcs: Vec<Option<u32>>,
}

impl Runs {
    /// Adds a block; false if it does not continue the run.
    fn push(&mut self, block: u16, place: Place, crc: Option<u32>) -> bool {
        let bytes = (self.crcs.len() * BLOCK_SIZE) as u64;
        let follows = match (self.place, place) {
            (None, _) => true,
            (Some(Place::Log(from)), Place::Log(at))
            | (Some(Place::Data(from)), Place::Data(at)) => {
                usize::from(block - self.first) == self.crcs.len()
                    && from + bytes == at
                    && self.crcs.len() < READ_BLOCKS
            }
            _ => false,
        };
        if follows {
            if self.place.is_none() {
                (self.first, self.place) = (block, Some(place));
            }
            self.crcs.push(crc);
        }
        follows
    }
}

struct Check<'a> {
    disk: &'a Disk,
    report: &'a mut Report,
    buf: Vec<u8>,
    runs: Runs,
    /// Damaged blocks of the log that count, by LSN.
    lost_in_log: Vec<u64>,
}

impl Check<'_> {
    fn all(&mut self, model: &Model, progress: &mut dyn FnMut(Progress)) {
        // In the order of the disk.
        let based = model.layers.iter().filter_map(|(key, layer)| Some((layer.base?, *key)));
        let mut slabs: Vec<(u32, LayerKey)> = based.map(|(base, key)| (base.slab, key)).collect();
        slabs.sort_unstable_by_key(|(slab, _)| *slab);
        let bytes = |layer: &LayerModel| {
            let base = layer.visible_base().map_or(0, |base| u64::from(base.data_blocks));
            (base + layer.changes.len() as u64) * BLOCK_SIZE as u64
        };
        let total = model.layers.values().map(bytes).sum();
        let mut done = 0;
        let mut advance = |layer: &LayerModel| {
            progress(Progress { stage: "blocks", done, total });
            done += bytes(layer);
        };
        for (_, key) in slabs {
            let Some(layer) = model.layers.get(&key) else { continue };
            advance(layer);
            self.slab(key, layer);
            self.changes(key, layer);
        }
        for (key, layer) in model.layers.iter().filter(|(_, layer)| layer.base.is_none()) {
            advance(layer);
            self.changes(*key, layer);
        }
    }

    /// Verifies what was committed of a layer: the checksum table, and the blocks that still count.
    fn slab(&mut self, key: LayerKey, layer: &LayerModel) {
        let Some(base) = &layer.base else { return };
        let about = |finding: Finding| finding.slab(base.slab).layer(key);
        let Some(states) = states_of(self.disk, base) else {
            return self
                .report
                .add(about(Finding::damage(INDEX, "a record cannot be read any more")));
        };
        let counts = |block: &u16| !layer.hidden && !layer.changes.contains_key(block);
        let blocks: Vec<u16> = states.blocks(BlockState::Data).filter(counts).collect();
        if layer.exists() && !layer.hidden {
            self.report.totals.data_blocks += blocks.len() as u64;
            self.report.totals.zero_blocks +=
                states.blocks(BlockState::Zero).filter(counts).count() as u64;
        }
        match sums_of(self.disk, base) {
            Ok(sums) => {
                for block in blocks {
                    let place = Place::Data(slab_offset(base.slab, block));
                    self.push(key, block, place, Some(sums[usize::from(block)]));
                }
                self.end_run(key);
            }
            Err(what) => self.lost_table(key, base, &states, &blocks, what),
        }
    }

    /// Reports a damaged checksum table: all blocks that depend on it are lost.
    fn lost_table(
        &mut self,
        key: LayerKey,
        base: &Base,
        states: &States,
        blocks: &[u16],
        what: String,
    ) {
        let lost = blocks.len() as u32;
        self.report.totals.damaged_blocks += u64::from(lost);
        let (severity, what) = match (lost, states.data_blocks()) {
            (0, _) => (Severity::Note, format!("{what}; no block needs it")),
            _ => (Severity::Damage, format!("{what}: the layer's blocks cannot be verified")),
        };
        let finding = Finding::new(severity, SUMS, what).at(sums_offset(base.slab, base.slot));
        let (block, blocks) = (blocks.first().copied(), lost);
        self.report.add(Finding { block, blocks, ..finding.slab(base.slab).layer(key) });
    }

    /// Verifies the blocks that the log changed.
    fn changes(&mut self, key: LayerKey, layer: &LayerModel) {
        for (block, change) in &layer.changes {
            match *change {
                Change::Absent => {}
                Change::Zero => self.report.totals.zero_blocks += 1,
                Change::Data { crc, place } => {
                    self.report.totals.data_blocks += 1;
                    self.push(key, *block, place.place(), Some(crc));
                }
                Change::Unknown { place } => {
                    self.report.totals.data_blocks += 1;
                    self.push(key, *block, place.place(), None);
                }
            }
        }
        self.end_run(key);
    }

    fn push(&mut self, key: LayerKey, block: u16, place: Place, crc: Option<u32>) {
        if !self.runs.push(block, place, crc) {
            self.end_run(key);
            self.runs.push(block, place, crc);
        }
    }

    /// Reads the run and compares it with its checksums.
    fn end_run(&mut self, key: LayerKey) {
        let run = std::mem::take(&mut self.runs);
        let Some(place) = run.place else { return };
        let whole = self.read(place, 0, run.crcs.len()).is_ok();
        let mut bad: Option<(usize, usize, String)> = None;
        for (at, crc) in run.crcs.iter().enumerate() {
            // After an error block by block, to know which.
            let read = if whole { Ok(()) } else { self.read(place, at, 1) };
            let bytes = &self.buf[if whole { at * BLOCK_SIZE } else { 0 }..][..BLOCK_SIZE];
            let what = match (read, crc) {
                (Err(error), _) => error.to_string(),
                (Ok(()), None) => "the checksum is lost: its table was damaged".into(),
                (Ok(()), Some(crc)) if crc32c::crc32c(bytes) != *crc => {
                    "does not match its checksum".into()
                }
                _ => {
                    self.report.totals.verified_blocks += 1;
                    continue;
                }
            };
            match &mut bad {
                Some((_, end, same)) if *end == at && *same == what => *end += 1,
                _ => {
                    if let Some(bad) = bad.replace((at, at + 1, what)) {
                        self.lost_blocks(key, run.first, place, bad);
                    }
                }
            }
        }
        if let Some(bad) = bad {
            self.lost_blocks(key, run.first, place, bad);
        }
    }

    /// Reads `count` blocks from the one at `at` of a run that begins at `place`.
    fn read(&mut self, place: Place, at: usize, count: usize) -> Result<(), Unreadable> {
        let buf = &mut self.buf[..count * BLOCK_SIZE];
        let skip = (at * BLOCK_SIZE) as u64;
        match place {
            Place::Log(lsn) => self.disk.read_log(buf, lsn + skip),
            Place::Data(offset) => self.disk.data.read(buf, offset + skip),
        }
    }

    fn lost_blocks(
        &mut self,
        key: LayerKey,
        first: u16,
        place: Place,
        (from, to, what): (usize, usize, String),
    ) {
        self.report.totals.damaged_blocks += (to - from) as u64;
        let skip = (from * BLOCK_SIZE) as u64;
        let mut finding = match place {
            Place::Log(lsn) => {
                let blocks = (from..to).map(|at| lsn + (at * BLOCK_SIZE) as u64);
                self.lost_in_log.extend(blocks);
                let (file, offset) = self.disk.log_place(lsn + skip);
                Finding::damage(file, what).at(offset)
            }
            Place::Data(offset) => {
                let slab = (offset / sheepdog_types::OBJECT_SIZE) as u32;
                Finding::damage(DATA, what).at(offset + skip).slab(slab)
            }
        };
        (finding.block, finding.blocks) = (Some(first + from as u16), (to - from) as u32);
        self.report.add(finding.layer(key));
    }

    /// Damaged blocks of the log that were replaced later harm nobody, but tell of the disk.
    fn note_superseded(&mut self, log: &Log) {
        self.lost_in_log.sort_unstable();
        for bad in &log.bad {
            if self.lost_in_log.binary_search(&bad.lsn).is_ok() {
                continue;
            }
            let (file, offset) = self.disk.log_place(bad.lsn);
            let what = "a block that was replaced later does not match its checksum";
            let finding = Finding::new(Severity::Note, file, what).at(offset).layer(bad.key);
            self.report.add(Finding { block: Some(bad.block), blocks: 1, ..finding });
        }
    }
}
