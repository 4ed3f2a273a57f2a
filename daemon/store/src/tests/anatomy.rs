//! What each byte of a store is for: the map by which tests damage one structure at a time.
//!
//! This knows the format (version 3) and changes with it, as does [`expected`], the table of what
//! damage to each kind of structure must lead to.

use std::collections::BTreeSet;
use std::ops::Range;

use sheepdog_types::{BLOCK_SIZE, BLOCKS_PER_OBJECT, LayerKey, OBJECT_SIZE};

use super::sim::SimMedium;
use super::support::{Block, Model, tag_of};
use crate::BlockState;
use crate::checkpoint::{SUMS_BYTES, copy_offset, index_offset, sums_offset};
use crate::format::{HEADER, Header, IndexRecord, Kind as Record, Mark, SECTOR, Superblock};
use crate::log::segment_name;

/// A kind of structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Superblock,
    Mark,
    RecordHeader,
    RecordTables,
    /// A block in a record.
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
    /// The copy of an index record behind its checksum table.
    IndexCopy,
    Sums,
    SumsOther,
    /// A block that is read from its slab.
    SlabBlock,
    /// A block that went straight to its slab; only the log knows of it.
    SlabDirect,
    /// A block in the slab of a layer that goes, read as one of the layer that it goes into.
    SlabMerged,
    /// In a slab that its layer left, as only the log knows.
    SlabDropped,
    /// A block of a slab that no layer reads, a hole, a free slab.
    SlabGarbage,
}

impl Kind {
    /// All of them; each must be hit.
    pub(super) const ALL: [Self; 19] = [
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
        Self::IndexCopy,
        Self::Sums,
        Self::SumsOther,
        Self::SlabBlock,
        Self::SlabDirect,
        Self::SlabMerged,
        Self::SlabDropped,
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
        Kind::RecordHeader | Kind::RecordTables => {
            Expected::Refused { file: structure.file.clone(), place: structure.place.clone() }
        }
        // Of these there is a second copy.
        Kind::Superblock | Kind::Mark => Expected::Unharmed,
        Kind::IndexInUse | Kind::IndexFree | Kind::IndexCopy => Expected::Unharmed,
        // These do not count.
        Kind::RecordPadding | Kind::LogTail | Kind::LogGarbage => Expected::Unharmed,
        Kind::IndexOther | Kind::SumsOther => Expected::Unharmed,
        Kind::SlabDropped | Kind::SlabGarbage => Expected::Unharmed,
        // Blocks that nobody reads any more do not count either.
        Kind::RecordData if structure.blocks.is_empty() => Expected::Unharmed,
        Kind::Sums if structure.blocks.is_empty() => Expected::Unharmed,
        Kind::RecordData | Kind::Sums => Expected::Reported(structure.blocks.clone()),
        Kind::SlabBlock | Kind::SlabDirect | Kind::SlabMerged => {
            Expected::Reported(structure.blocks.clone())
        }
    }
}

/// The map of a store that holds `model`, in which each block ever written has other bytes. It must
/// not have stopped in order.
pub(super) struct Anatomy {
    structures: Vec<Structure>,
    /// Layers that left their slabs, as the log says.
    dropped: BTreeSet<LayerKey>,
    /// Blocks that are read from the log, even where their slab has the same bytes: a patch may
    /// give again what there is.
    logged: BTreeSet<(LayerKey, u16)>,
}

/// The block of the model that has these bytes, in the same place of its object.
fn reader(model: &Model, block: u16, bytes: &[u8]) -> Option<(LayerKey, u16)> {
    let content = Block::Data(tag_of(bytes)?);
    let holds = |(_, layer): &(_, &super::support::ModelLayer)| {
        layer.blocks.get(&block).is_some_and(|held| *held == content)
    };
    model.iter().find(holds).map(|(key, _)| (*key, block))
}

impl Anatomy {
    pub(super) fn of(medium: &SimMedium, model: &Model) -> Self {
        let (dropped, logged) = (BTreeSet::new(), BTreeSet::new());
        let mut this = Self { structures: Vec::new(), dropped, logged };
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
        this.add_log(medium, &superblock, &mark, model);
        for slab in 0..(medium.file_len("index") / index_offset(1, 0)) as u32 {
            let pair = [0, 1].map(|slot| {
                IndexRecord::decode(&sector("index", index_offset(slab, slot)), slab)
                    .filter(|record| record.checkpoint <= mark.checkpoint)
            });
            this.add_slab(medium, slab, &pair, model);
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

    fn add_log(&mut self, medium: &SimMedium, superblock: &Superblock, mark: &Mark, model: &Model) {
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
            self.note_dropped(&header);
            let mut at = offset;
            let parts = [
                (Kind::RecordHeader, HEADER as u64),
                (Kind::RecordTables, header.table_len() as u64),
            ];
            for (kind, len) in parts {
                self.add(&file, at, len, kind).place = format!("offset {offset}");
                at += len;
            }
            let tables = medium.bytes(&file, offset + HEADER as u64, header.table_len());
            for block in blocks_of(&header, &tables) {
                let bytes = medium.bytes(&file, at, BLOCK_SIZE);
                let reader = reader(model, block, &bytes);
                self.logged.extend(reader);
                let structure = self.add(&file, at, BLOCK_SIZE as u64, Kind::RecordData);
                structure.blocks = reader.into_iter().collect();
                at += BLOCK_SIZE as u64;
            }
            self.add(&file, at, offset + len - at, Kind::RecordPadding);
        }
    }

    fn note_dropped(&mut self, header: &Header) {
        let key = match header.kind {
            Record::Install | Record::Delete => header.key,
            Record::Merge => LayerKey { layer: header.lower, ..header.key },
            _ => return,
        };
        self.dropped.insert(key);
    }

    fn add_slab(
        &mut self,
        medium: &SimMedium,
        slab: u32,
        pair: &[Option<IndexRecord>; 2],
        model: &Model,
    ) {
        let number = |record: &Option<IndexRecord>| record.as_ref().map(|r| r.checkpoint);
        let counts = u8::from(number(&pair[1]) > number(&pair[0]));
        let committed = pair[usize::from(counts)].as_ref();
        let committed = committed.and_then(|record| record.layer.as_ref());
        let mut checked = BTreeSet::new();
        for block in 0..BLOCKS_PER_OBJECT as u16 {
            let at = u64::from(slab) * OBJECT_SIZE + u64::from(block) * BLOCK_SIZE as u64;
            let bytes = medium.bytes("data", at, BLOCK_SIZE);
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            let reader = reader(model, block, &bytes).filter(|read| !self.logged.contains(read));
            let is_data = |states: &crate::states::States| states.get(block) == BlockState::Data;
            let base = committed.filter(|layer| is_data(&layer.states));
            let left = || committed.is_some_and(|layer| self.dropped.contains(&layer.key));
            let kind = match (reader, base) {
                (Some((key, _)), Some(layer)) if layer.key == key => Kind::SlabBlock,
                (Some(_), Some(_)) => Kind::SlabMerged,
                (Some(_), None) => Kind::SlabDirect,
                (None, _) if left() => Kind::SlabDropped,
                (None, _) => Kind::SlabGarbage,
            };
            checked.extend(reader.filter(|_| base.is_some()));
            let structure = self.add("data", at, BLOCK_SIZE as u64, kind);
            structure.blocks = reader.into_iter().collect();
        }
        for (slot, record) in (0..).zip(pair) {
            let in_use = record.as_ref().is_some_and(|record| record.layer.is_some());
            let (index, sums) = match (slot == counts && record.is_some(), in_use) {
                (true, true) => (Kind::IndexInUse, Kind::Sums),
                (true, false) => (Kind::IndexFree, Kind::SumsOther),
                _ => (Kind::IndexOther, Kind::SumsOther),
            };
            let sector = SECTOR as u64;
            self.add("index", index_offset(slab, slot), sector, index);
            self.add("sums", copy_offset(slab, slot), sector, Kind::IndexCopy);
            let table = self.add("sums", sums_offset(slab, slot), SUMS_BYTES as u64, sums);
            if sums == Kind::Sums {
                table.blocks.clone_from(&checked);
            }
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

/// The blocks whose bytes a record carries.
fn blocks_of(header: &Header, tables: &[u8]) -> Vec<u16> {
    if header.kind == Record::Patch {
        // Two bits for each block, 1: data.
        let is_data = |block: &u16| tables[usize::from(block / 4)] >> (block % 4 * 2) & 3 == 1;
        return (0..BLOCKS_PER_OBJECT as u16).filter(is_data).collect();
    }
    (header.first..header.first + (header.data_len() / BLOCK_SIZE) as u16).collect()
}
