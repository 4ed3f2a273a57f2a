//! What each byte of a store is for: the map by which tests damage one structure at a time.
//!
//! This knows the format (version 1) and changes with it, as does [`expected`], the table of what
//! damage to each kind of structure must lead to.

use std::collections::BTreeSet;
use std::ops::Range;

use sheepdog_types::{BLOCK_SIZE, LayerKey, OBJECT_SIZE};

use super::sim::SimMedium;
use super::support::{Block, Model};
use crate::BlockState;
use crate::format::{HEADER, Header, IndexRecord, Kind as Record, Mark, SECTOR, Superblock};
use crate::log::segment_name;

/// A kind of structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Superblock,
    Mark,
    RecordHeader,
    RecordTables,
    RecordData,
    RecordPadding,
    /// Behind everything that some record proves to have been durable.
    LogTail,
    /// Of no record that counts.
    LogGarbage,
    IndexInUse,
    IndexFree,
    /// The record of a pair that does not count.
    IndexOther,
    Sums,
    SumsOther,
    /// A block that is read from its slab.
    SlabBlock,
    /// A block of a slab that no layer reads, a hole, a free slab.
    SlabGarbage,
}

impl Kind {
    /// All of them; each must be hit.
    pub(super) const ALL: [Self; 15] = [
        Self::Superblock,
        Self::Mark,
        Self::RecordHeader,
        Self::RecordTables,
        Self::RecordData,
        Self::RecordPadding,
        Self::LogTail,
        Self::LogGarbage,
        Self::IndexInUse,
        Self::IndexFree,
        Self::IndexOther,
        Self::Sums,
        Self::SumsOther,
        Self::SlabBlock,
        Self::SlabGarbage,
    ];
}

/// A structure.
#[derive(Clone, Debug)]
pub(super) struct Structure {
    pub(super) file: String,
    pub(super) range: Range<u64>,
    pub(super) kind: Kind,
    /// How errors name its place.
    place: String,
    /// The blocks that depend on it.
    blocks: BTreeSet<(LayerKey, u16)>,
}

/// What damage of a structure leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Nothing is lost: there is a copy, or it does not matter.
    Unharmed,
    /// The store does not open, and says which file and where in it.
    Refused { file: String, place: String },
    /// Reads of just these blocks fail and name them; all else is right.
    Reported(BTreeSet<(LayerKey, u16)>),
}

/// The table.
pub(super) fn expected(structure: &Structure) -> Expected {
    match structure.kind {
        Kind::Superblock | Kind::Mark => Expected::Unharmed,
        Kind::RecordHeader
        | Kind::RecordTables
        | Kind::RecordData
        | Kind::IndexInUse
        | Kind::IndexFree => {
            Expected::Refused { file: structure.file.clone(), place: structure.place.clone() }
        }
        Kind::RecordPadding | Kind::LogTail | Kind::LogGarbage => Expected::Unharmed,
        Kind::IndexOther | Kind::SumsOther | Kind::SlabGarbage => Expected::Unharmed,
        Kind::Sums | Kind::SlabBlock => Expected::Reported(structure.blocks.clone()),
    }
}

/// The map of a store that holds `model` and held `applied` at its last checkpoint. It must not
/// have stopped in order.
pub(super) struct Anatomy {
    structures: Vec<Structure>,
}

impl Anatomy {
    pub(super) fn of(medium: &SimMedium, applied: &Model, model: &Model) -> Self {
        let mut this = Self { structures: Vec::new() };
        let sector = |file: &str, offset| {
            let bytes = medium.bytes(file, offset, SECTOR);
            *bytes.first_chunk::<SECTOR>().expect("a sector")
        };
        for copy in 0..2 {
            this.add("superblock", copy * 4096, SECTOR as u64, Kind::Superblock);
            this.add("superblock", 8192 + copy * 4096, SECTOR as u64, Kind::Mark);
        }
        let superblock = Superblock::decode(&sector("superblock", 0)).expect("a good superblock");
        let mark = Mark::decode(&sector("superblock", 8192)).expect("a good mark");
        this.add_log(medium, &superblock, &mark);
        for slab in 0..(medium.file_len("index") / (2 * SECTOR as u64)) as u32 {
            let pair = [0, 1].map(|slot| {
                let at = (u64::from(slab) * 2 + slot) * SECTOR as u64;
                IndexRecord::decode(&sector("index", at), slab)
                    .filter(|record| record.checkpoint <= mark.checkpoint)
            });
            this.add_slab(slab, &pair, applied, model);
        }
        this
    }

    fn add(&mut self, file: &str, at: u64, len: u64, kind: Kind) -> &mut Structure {
        self.structures.push(Structure {
            file: file.into(),
            range: at..at + len,
            kind,
            place: String::new(),
            blocks: BTreeSet::new(),
        });
        self.structures.last_mut().expect("just pushed")
    }

    fn add_log(&mut self, medium: &SimMedium, superblock: &Superblock, mark: &Mark) {
        let segment = superblock.segment_bytes;
        let place = |lsn: u64| {
            let number = lsn / segment % u64::from(superblock.segments);
            (segment_name(number as usize), lsn % segment)
        };
        let mut records = Vec::new();
        let mut lsn = mark.log_start;
        while lsn % segment + HEADER as u64 <= segment {
            let (file, offset) = place(lsn);
            let head = medium.bytes(&file, offset, HEADER);
            let header = Header::decode(head.first_chunk().expect("a header"));
            let Some(header) = header.filter(|header| header.lsn == lsn) else { break };
            records.push(header);
            match header.kind {
                Record::End => lsn = (lsn / segment + 1) * segment,
                _ => lsn += header.record_len(),
            }
        }
        let durable = records.iter().map(|header| header.durable).max().unwrap_or(0);
        for header in records {
            let (file, offset) = place(header.lsn);
            let len = header.record_len();
            if header.lsn >= durable {
                self.add(&file, offset, len, Kind::LogTail);
                continue;
            }
            let parts = [
                (Kind::RecordHeader, HEADER as u64),
                (Kind::RecordTables, header.table_len() as u64),
                (Kind::RecordData, header.data_len() as u64),
            ];
            let mut at = offset;
            for (kind, len) in parts {
                self.add(&file, at, len, kind).place = format!("offset {offset}");
                at += len;
            }
            self.add(&file, at, offset + len - at, Kind::RecordPadding);
        }
    }

    fn add_slab(
        &mut self,
        slab: u32,
        pair: &[Option<IndexRecord>; 2],
        applied: &Model,
        model: &Model,
    ) {
        let number = |record: &Option<IndexRecord>| record.as_ref().map(|r| r.checkpoint);
        let counts = usize::from(number(&pair[1]) > number(&pair[0]));
        let at = |slot: usize, bytes: u64| (u64::from(slab) * 2 + slot as u64) * bytes;
        for (slot, record) in pair.iter().enumerate() {
            let in_use = record.as_ref().is_some_and(|record| record.layer.is_some());
            let (index, sums) = match (slot == counts && record.is_some(), in_use) {
                (true, true) => (Kind::IndexInUse, Kind::Sums),
                (true, false) => (Kind::IndexFree, Kind::SumsOther),
                _ => (Kind::IndexOther, Kind::SumsOther),
            };
            let sector = SECTOR as u64;
            self.add("index", at(slot, sector), sector, index).place = format!("slab {slab}");
            let layer = record.as_ref().and_then(|record| record.layer.as_ref());
            let mut blocks = BTreeSet::new();
            if let Some(layer) = layer.filter(|_| index == Kind::IndexInUse) {
                let said =
                    |model: &Model, block| model.get(&layer.key)?.blocks.get(&block).copied();
                let data = layer.states.blocks(BlockState::Data);
                // A block that was written since is in the log.
                let same = data.filter(|block| {
                    let found = said(model, *block);
                    matches!(found, Some(Block::Data(_))) && found == said(applied, *block)
                });
                blocks = same.map(|block| (layer.key, block)).collect();
            }
            for (key, block) in &blocks {
                let offset = u64::from(slab) * OBJECT_SIZE + u64::from(*block) * BLOCK_SIZE as u64;
                let structure = self.add("data", offset, BLOCK_SIZE as u64, Kind::SlabBlock);
                structure.blocks = BTreeSet::from([(*key, *block)]);
            }
            self.add("sums", at(slot, 4096), 4096, sums).blocks = blocks;
        }
    }

    pub(super) fn structures(&self) -> impl Iterator<Item = &Structure> {
        self.structures.iter()
    }

    /// What the byte at `offset` belongs to.
    pub(super) fn find(&self, file: &str, offset: u64) -> Structure {
        let found = self.structures.iter().find(|s| s.file == file && s.range.contains(&offset));
        let garbage = match file {
            "data" => Kind::SlabGarbage,
            "superblock" => Kind::Superblock,
            _ => Kind::LogGarbage,
        };
        found.cloned().unwrap_or_else(|| Structure {
            file: file.into(),
            range: offset..offset + 1,
            kind: garbage,
            place: String::new(),
            blocks: BTreeSet::new(),
        })
    }
}
