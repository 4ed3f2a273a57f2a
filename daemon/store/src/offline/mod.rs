//! Looking at a store that is not in use: [`check`] verifies all of it, [`dump`] lists it.
//!
//! This reads by itself what `docs/on-disk.md` describes. It shares the codecs of records with the
//! store, but not the code that opens one, so that the two are witnesses of each other. Nothing is
//! written: files are opened for reading only, and the lock is taken without touching its content.
//!
//! ```text
//!   superblock, marks ──► index (two records, two copies) ──► log ──► blocks that count in the end
//!      mod.rs                  index.rs                    replay.rs        check.rs
//! ```
//!
//! Memory: about 150 bytes for each layer, about 30 for each block that the log changed, of which
//! there may be 4 Mi, and one table at a time. A thousand findings are kept, the others counted.

mod check;
mod dump;
mod index;
mod replay;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags};
use sheepdog_types::LayerKey;

pub use check::check;
pub use dump::{DumpItem, DumpValue, dump};

#[cfg(test)]
pub(crate) use check::examine;

use crate::api::StoreIds;
use crate::error::OpenError;
use crate::format::{FORMAT, Mark, SECTOR, SUPER_PART, SuperError, Superblock};
use crate::lockfile::lock;
use crate::log::segment_name;
use crate::open::{DATA, INDEX, SUMS, SUPERBLOCK};

/// Findings that are kept; further ones are counted (I10).
const MAX_FINDINGS: usize = 1000;

/// What a finding means for the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something is lost on this disk: only another replica can bring it back.
    Damage,
    /// One of two copies is bad: nothing is lost, the store repairs it from the other.
    Repairable,
    /// Nothing is wrong with what counts.
    Note,
}

impl Severity {
    /// The word for it: `damage`, `repairable` or `note`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Damage => "damage",
            Self::Repairable => "repairable",
            Self::Note => "note",
        }
    }
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it means for the data.
    pub severity: Severity,
    /// The file, relative to the store's directory.
    pub file: String,
    /// Where in the file, in bytes.
    pub offset: Option<u64>,
    /// The slab, if it is about one.
    pub slab: Option<u32>,
    /// The layer that it concerns, if that is known.
    pub layer: Option<LayerKey>,
    /// The first block of the layer that it concerns.
    pub block: Option<u16>,
    /// Number of blocks, one after the other, that it concerns.
    pub blocks: u32,
    /// What is wrong.
    pub what: String,
}

impl Finding {
    fn new(severity: Severity, file: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            severity,
            file: file.into(),
            offset: None,
            slab: None,
            layer: None,
            block: None,
            blocks: 0,
            what: what.into(),
        }
    }

    fn damage(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(Severity::Damage, file, what)
    }

    fn at(self, offset: u64) -> Self {
        Self { offset: Some(offset), ..self }
    }

    fn slab(self, slab: u32) -> Self {
        Self { slab: Some(slab), ..self }
    }

    fn layer(self, key: LayerKey) -> Self {
        Self { layer: Some(key), ..self }
    }
}

/// What a store holds, with the changes that wait in its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Object layers.
    pub layers: u64,
    /// Blocks of 4 KiB with data.
    pub data_blocks: u64,
    /// Blocks that are zero without taking space.
    pub zero_blocks: u64,
    /// Blocks whose bytes were read and matched their checksums.
    pub verified_blocks: u64,
    /// Blocks that are lost: they do not match, cannot be read, or their checksums are damaged.
    pub damaged_blocks: u64,
    /// Slabs in use, those that wait for a checkpoint to be freed included.
    pub slabs: u64,
    /// Slabs that were used at some time and are free.
    pub free_slabs: u64,
    /// Bytes of log that wait to be applied.
    pub log_bytes: u64,
    /// Records in them.
    pub log_records: u64,
    /// Where the log begins.
    pub log_start: u64,
    /// Number of the last checkpoint.
    pub checkpoint: u64,
    /// How often the store was opened.
    pub incarnation: u32,
    /// It was stopped in order.
    pub clean: bool,
    /// Sum of the digests of all slots: equal content gives equal sums.
    pub digest: u64,
}

/// The result of [`check`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Whose store it is; none if the superblock is lost.
    pub ids: Option<StoreIds>,
    /// What it holds.
    pub totals: Totals,
    /// The first thousand findings.
    pub findings: Vec<Finding>,
    /// Number of findings of each severity, in the order of [`Severity`].
    pub counts: [u64; 3],
    /// Why not all could be checked: something everything else depends on is damaged.
    pub incomplete: Option<&'static str>,
}

impl Report {
    /// Nothing is damaged, and no copy is.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.count(Severity::Damage) + self.count(Severity::Repairable) == 0
            && self.incomplete.is_none()
    }

    /// Number of findings, those that were not kept included.
    #[must_use]
    pub fn count(&self, severity: Severity) -> u64 {
        self.counts[severity as usize]
    }

    /// Findings that were counted but not kept.
    #[must_use]
    pub fn not_kept(&self) -> u64 {
        self.counts.iter().sum::<u64>() - self.findings.len() as u64
    }

    pub(crate) fn add(&mut self, finding: Finding) {
        self.counts[finding.severity as usize] += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        } else if finding.severity == Severity::Damage
            && let Some(lesser) = self.findings.iter_mut().rfind(|f| f.severity == Severity::Note)
        {
            // What is lost matters more.
            *lesser = finding;
        }
    }
}

/// How far a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is read now.
    pub stage: &'static str,
    /// Bytes read in this stage.
    pub done: u64,
    /// Bytes to read in this stage.
    pub total: u64,
}

/// Why bytes could not be read.
#[derive(Debug)]
enum Unreadable {
    /// The file ends before, or is missing.
    Ends,
    Io(io::Error),
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ends => f.write_str("the file ends before it"),
            Self::Io(error) => write!(f, "cannot be read: {error}"),
        }
    }
}

/// One file of the store, for reading.
struct Part {
    name: String,
    file: Option<File>,
    len: u64,
}

impl Part {
    /// A file that is missing or no file is a finding and reads as empty.
    fn open(dir: &Path, name: &str, report: &mut Report) -> Result<Self, OpenError> {
        let part = |file, len| Self { name: name.into(), file, len };
        // Something else than a file in its place must not make the open wait.
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(dir.join(name));
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                report.add(Finding::damage(name, "the file is missing"));
                return Ok(part(None, 0));
            }
            other => other.map_err(OpenError::io(format!("cannot open {name}")))?,
        };
        let about = file.metadata().map_err(OpenError::io(format!("cannot read {name}")))?;
        if !about.is_file() {
            report.add(Finding::damage(name, "is not a file"));
            return Ok(part(None, 0));
        }
        Ok(part(Some(file), about.len()))
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), Unreadable> {
        let Some(file) = &self.file else { return Err(Unreadable::Ends) };
        file.read_exact_at(buf, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Unreadable::Ends,
            _ => Unreadable::Io(error),
        })
    }

    /// What is behind the file's end reads as zeroes.
    fn read_padded(&self, buf: &mut [u8], offset: u64) -> Result<(), Unreadable> {
        let held = self.len.saturating_sub(offset).min(buf.len() as u64) as usize;
        buf[held..].fill(0);
        if held == 0 { Ok(()) } else { self.read(&mut buf[..held], offset) }
    }
}

/// Keeps a daemon out while the store is read.
struct ReadLock {
    _file: Option<File>,
}

impl ReadLock {
    /// Takes the daemon's lock, shared: several checks may run, no daemon may. The file is not
    /// changed, so its content names the daemon that had it last.
    fn take(dir: &Path) -> Result<Self, OpenError> {
        let file = match File::open(dir.join("lock")) {
            // Nobody can hold what does not exist.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { _file: None });
            }
            other => other.map_err(OpenError::io("cannot open the lock file"))?,
        };
        lock(&file, FlockOperation::NonBlockingLockShared, dir)?;
        Ok(Self { _file: Some(file) })
    }
}

/// The files of a store whose superblock and mark are known.
struct Disk {
    superblock: Superblock,
    mark: Mark,
    data: Part,
    index: Part,
    sums: Part,
    segments: Vec<Part>,
    _lock: ReadLock,
}

/// The start of each part of the superblock file: an error says why it cannot be read.
type SuperParts = [Result<[u8; SECTOR], Unreadable>; 4];

/// Opens the superblock. Without one there is no store.
fn open_superblock(dir: &Path) -> Result<(ReadLock, Part, SuperParts), OpenError> {
    if !dir.join(SUPERBLOCK).exists() {
        return Err(OpenError::NotAStore { dir: dir.into(), reason: "no superblock" });
    }
    let lock = ReadLock::take(dir)?;
    let file = Part::open(dir, SUPERBLOCK, &mut Report::default())?;
    if file.file.is_none() {
        return Err(OpenError::NotAStore { dir: dir.into(), reason: "superblock is no file" });
    }
    let parts = [0, 1, 2, 3].map(|part| {
        let mut sector = [0; SECTOR];
        file.read(&mut sector, part * SUPER_PART).map(|()| sector)
    });
    Ok((lock, file, parts))
}

/// The superblock, from whichever copy is whole.
fn read_superblock(
    parts: &SuperParts,
    report: &mut Report,
) -> Result<Option<Superblock>, OpenError> {
    let copies = [0, 1].map(|copy: usize| match &parts[copy] {
        Ok(sector) => Superblock::decode(sector),
        Err(_) => Err(SuperError::Damaged),
    });
    let other = copies.iter().find_map(|copy| match copy {
        Err(SuperError::Other(found)) => Some(*found),
        _ => None,
    });
    if let Some(found) = other {
        return Err(OpenError::OtherFormat { found, supported: FORMAT });
    }
    let good = copies.iter().find_map(|copy| copy.ok());
    let severity = if good.is_some() { Severity::Repairable } else { Severity::Damage };
    for ((part, copy), sector) in (0..).zip(&copies).zip(parts) {
        if copy.is_err() {
            let why = why(sector, "a copy of the superblock");
            report.add(Finding::new(severity, SUPERBLOCK, why).at(part * SUPER_PART));
        }
    }
    if let [Ok(first), Ok(second)] = copies
        && first != second
    {
        report.add(Finding::damage(SUPERBLOCK, "the two copies differ").at(SUPER_PART));
    }
    Ok(good)
}

fn why(sector: &Result<[u8; SECTOR], Unreadable>, what: &str) -> String {
    match sector {
        Ok(_) => format!("{what} is damaged"),
        Err(error) => format!("{what}: {error}"),
    }
}

/// The mark that counts.
fn read_mark(parts: &SuperParts, report: &mut Report) -> Option<Mark> {
    let marks = Mark::COPIES.map(|part| {
        let sector = &parts[part as usize];
        (part, sector, sector.as_ref().ok().and_then(Mark::decode))
    });
    let newest = marks.iter().filter_map(|(.., mark)| *mark).max_by_key(|mark| mark.sequence);
    let severity = if newest.is_some() { Severity::Repairable } else { Severity::Damage };
    for (part, sector, mark) in marks {
        let add =
            |severity, what: String| Finding::new(severity, SUPERBLOCK, what).at(part * SUPER_PART);
        match (mark, newest) {
            (None, _) => report.add(add(severity, why(sector, "a copy of the checkpoint mark"))),
            (Some(mark), Some(newest)) if mark.sequence < newest.sequence => report.add(add(
                Severity::Note,
                "a copy of the checkpoint mark is older: a crash came between the two".into(),
            )),
            (Some(mark), Some(newest)) if mark != newest => report.add(add(
                Severity::Damage,
                "the two checkpoint marks have the same number and differ".into(),
            )),
            _ => {}
        }
    }
    newest
}

impl Disk {
    /// Opens the files of the store in `dir`; `None` if the superblock or the mark is lost.
    fn open(dir: &Path, report: &mut Report) -> Result<Option<Self>, OpenError> {
        let (lock, _, parts) = open_superblock(dir)?;
        let superblock = read_superblock(&parts, report)?;
        let mark = read_mark(&parts, report);
        report.ids = superblock.map(|superblock| superblock.ids);
        let (Some(superblock), Some(mark)) = (superblock, mark) else {
            report.incomplete = Some("without a superblock and a mark nothing else can be checked");
            return Ok(None);
        };
        let mut segments = Vec::new();
        for number in 0..superblock.segments as usize {
            let part = Part::open(dir, &segment_name(number), report)?;
            if part.file.is_some() && part.len < superblock.segment_bytes {
                report.add(Finding::damage(&part.name, "the file is too short").at(part.len));
            }
            segments.push(part);
        }
        let mut part = |name| Part::open(dir, name, report);
        let (data, index, sums) = (part(DATA)?, part(INDEX)?, part(SUMS)?);
        Ok(Some(Self { superblock, mark, data, index, sums, segments, _lock: lock }))
    }
}
