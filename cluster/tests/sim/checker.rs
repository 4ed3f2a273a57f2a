//! What the guest may see. Knows nothing of replicas: it judges operations by when they began and
//! ended.
//!
//! The volume is cut into cells that no operation splits. A cell has entries, the values that it
//! may have had since the last flush: *current* ones may be read now. A write that ended replaces
//! all entries that had ended when it began. A read that overlaps no write fixes the value like a
//! write does: what was seen stays. A flush drops what was replaced before it began.

use super::rng::mix;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Identifies what a write wrote; 0 is zeroes.
pub type Value = u32;
pub type Time = u64;

#[derive(Clone, Debug)]
struct Entry {
    value: Value,
    begin: Time,
    end: Time,
    current: bool,
}

struct Cell {
    bytes: Range<u64>,
    entries: Vec<Entry>,
    writing: Vec<Value>,
}

/// What an operation does to the volume.
#[derive(Clone, Debug)]
pub enum Kind {
    Read,
    Write { value: Value, fua: bool },
    Flush,
}

struct Operation {
    kind: Kind,
    /// Where; for reads the position in the data.
    cells: Vec<usize>,
    offset: u64,
    begin: Time,
    /// Reads: what each cell may have been since it began.
    legal: Vec<BTreeSet<Value>>,
    /// Reads: nothing was being written meanwhile.
    stable: bool,
}

#[derive(Default)]
pub struct Checker {
    cells: Vec<Cell>,
    running: BTreeMap<u64, Operation>,
}

/// The eight bytes that `value` puts at `8 * word`.
fn word(value: Value, word: u64) -> [u8; 8] {
    if value == 0 {
        return [0; 8];
    }
    (mix((u64::from(value) << 40) ^ word) | 0x0101_0101_0101_0101).to_le_bytes()
}

/// Calls `part` with each word of a range and the part of it that is inside.
fn words(value: Value, range: &Range<u64>, mut part: impl FnMut(&[u8]) -> bool) -> bool {
    let mut offset = range.start;
    while offset < range.end {
        let (at, skip) = (offset / 8, (offset % 8) as usize);
        let end = (at * 8 + 8).min(range.end);
        if !part(&word(value, at)[skip..skip + (end - offset) as usize]) {
            return false;
        }
        offset = end;
    }
    true
}

/// What `value` puts into a range.
pub fn pattern(value: Value, range: Range<u64>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
    words(value, &range, |part| {
        bytes.extend_from_slice(part);
        true
    });
    bytes
}

/// Whether `bytes` are what `value` puts into a range.
fn is_pattern(value: Value, range: &Range<u64>, bytes: &[u8]) -> bool {
    let mut at = 0;
    words(value, range, |part| {
        let same = bytes[at..at + part.len()] == *part;
        at += part.len();
        same
    })
}

impl Checker {
    /// Cells between neighbouring `cuts`, all zero.
    pub fn add_region(&mut self, cuts: &[u64]) {
        for pair in cuts.windows(2) {
            let entry = Entry { value: 0, begin: 0, end: 0, current: true };
            let cell = Cell { bytes: pair[0]..pair[1], entries: vec![entry], writing: Vec::new() };
            self.cells.push(cell);
        }
    }

    fn cells_in(&self, range: &Range<u64>) -> Vec<usize> {
        let inside = |c: &Cell| range.start <= c.bytes.start && c.bytes.end <= range.end;
        (0..self.cells.len()).filter(|i| inside(&self.cells[*i])).collect()
    }

    pub fn idle(&self) -> bool {
        self.running.is_empty()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn begin(&mut self, tag: u64, kind: Kind, range: Range<u64>, now: Time) {
        let cells = self.cells_in(&range);
        let mut legal = Vec::new();
        let mut stable = true;
        for &at in &cells {
            let cell = &mut self.cells[at];
            if let Kind::Write { value, .. } = kind {
                cell.writing.push(value);
                for op in self.running.values_mut() {
                    if let Some(n) = op.cells.iter().position(|c| *c == at)
                        && matches!(op.kind, Kind::Read)
                    {
                        op.legal[n].insert(value);
                        op.stable = false;
                    }
                }
            } else {
                let current = cell.entries.iter().filter(|e| e.current).map(|e| e.value);
                legal.push(current.chain(cell.writing.iter().copied()).collect());
                stable &= cell.writing.is_empty();
            }
        }
        let op = Operation { kind, cells, offset: range.start, begin: now, legal, stable };
        self.running.insert(tag, op);
    }

    /// An operation ended well; `data` is what a read returned.
    pub fn done(&mut self, tag: u64, data: &[u8], now: Time) -> Result<(), String> {
        let Some(op) = self.running.remove(&tag) else {
            return Err(format!("request {tag} completed twice"));
        };
        match op.kind {
            Kind::Read => self.judge_read(tag, &op, data, now)?,
            Kind::Write { value, fua } => {
                for &at in &op.cells {
                    self.cells[at].stop_writing(value);
                    self.cells[at].settle(value, op.begin, now, fua);
                }
            }
            Kind::Flush => {
                for cell in &mut self.cells {
                    cell.harden(op.begin);
                }
            }
        }
        Ok(())
    }

    fn judge_read(
        &mut self,
        tag: u64,
        op: &Operation,
        data: &[u8],
        now: Time,
    ) -> Result<(), String> {
        for (&at, legal) in op.cells.iter().zip(&op.legal) {
            let cell = &mut self.cells[at];
            let skip = (cell.bytes.start - op.offset) as usize;
            let got = &data[skip..skip + (cell.bytes.end - cell.bytes.start) as usize];
            let is = |v: &Value| is_pattern(*v, &cell.bytes, got);
            let found: Vec<Value> = legal.iter().copied().filter(is).collect();
            let Some(&value) = found.last() else {
                return Err(format!(
                    "read {tag} of {:?} returned {:?}..., legal: {legal:?}, began {}, now {now}, {:?}",
                    cell.bytes,
                    &got[..got.len().min(8)],
                    op.begin,
                    cell.entries,
                ));
            };
            if op.stable && found.len() == 1 {
                cell.settle(value, op.begin, now, false);
            }
        }
        Ok(())
    }

    /// When a running operation began.
    pub fn began(&self, tag: u64) -> Option<Time> {
        self.running.get(&tag).map(|op| op.begin)
    }

    pub fn is_flush(&self, tag: u64) -> bool {
        self.running.get(&tag).is_some_and(|op| match op.kind {
            Kind::Flush => true,
            Kind::Write { fua, .. } => fua,
            Kind::Read => false,
        })
    }

    /// An operation failed, or nobody will ever answer it: it may have happened or not.
    pub fn abandon(&mut self, tag: u64, now: Time) {
        let Some(op) = self.running.remove(&tag) else { return };
        if let Kind::Write { value, .. } = op.kind {
            for at in op.cells {
                self.cells[at].stop_writing(value);
                // Begun at 0: it replaces nothing, as it may not have happened.
                let entry = Entry { value, begin: 0, end: now, current: true };
                self.cells[at].entries.push(entry);
            }
        }
    }

    pub fn abandon_all(&mut self, now: Time) {
        let tags: Vec<u64> = self.running.keys().copied().collect();
        tags.into_iter().for_each(|tag| self.abandon(tag, now));
    }

    /// What was not flushed may be gone.
    pub fn lose(&mut self, now: Time) {
        for cell in &mut self.cells {
            for entry in &mut cell.entries {
                (entry.begin, entry.end, entry.current) = (0, now, true);
            }
        }
        for op in self.running.values_mut().filter(|op| matches!(op.kind, Kind::Read)) {
            op.stable = false;
            for (legal, at) in op.legal.iter_mut().zip(&op.cells) {
                legal.extend(self.cells[*at].entries.iter().map(|e| e.value));
            }
        }
    }
}

impl Cell {
    fn stop_writing(&mut self, value: Value) {
        if let Some(at) = self.writing.iter().position(|v| *v == value) {
            self.writing.remove(at);
        }
    }

    fn settle(&mut self, value: Value, begin: Time, end: Time, durable: bool) {
        for entry in self.entries.iter_mut().filter(|e| e.end < begin) {
            entry.current = false;
        }
        self.entries.retain(|e| !(e.end < begin && (durable || e.value == value)));
        self.entries.push(Entry { value, begin, end, current: true });
    }

    fn harden(&mut self, begin: Time) {
        let ended: Vec<Time> =
            self.entries.iter().filter(|e| e.end < begin).map(|e| e.begin).collect();
        self.entries.retain(|e| !ended.iter().any(|b| *b > e.end));
    }
}
