//! Which slab holds which layer: the index, and the copies of its records in `sums`.

use sheepdog_types::{BLOCKS_PER_OBJECT, Version};

use super::replay::{Base, LayerModel, Model};
use super::{Disk, Finding, Progress, Report, Severity};
use crate::checkpoint::{copy_offset, index_offset, sums_offset};
use crate::format::{IndexRecord, SECTOR, crcs_from_bytes, slot_hash};
use crate::open::{INDEX, SUMS};
use crate::states::States;

/// Bytes of a checksum table.
pub(super) const TABLE: usize = 4 * BLOCKS_PER_OBJECT;

/// Which copies of records in `sums` are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    /// None: the index is whole.
    Index,
    /// Those of records that are damaged in the index.
    CopiesOfDamaged,
    /// All: the newest record counts, wherever it is. A write to the index may have been lost.
    Newest,
}

/// A sector that should hold a record.
enum Seen {
    Empty,
    Bad,
    /// With its part in the index digest.
    Record(Box<IndexRecord>, u64),
}

impl Seen {
    fn new(sector: &[u8; SECTOR], slab: u32) -> Self {
        if *sector == [0; SECTOR] {
            return Self::Empty;
        }
        match IndexRecord::decode(sector, slab) {
            Some(record) => Self::Record(Box::new(record), slot_hash(sector)),
            None => Self::Bad,
        }
    }

    fn record(&self) -> Option<(&IndexRecord, u64)> {
        match self {
            Self::Record(record, hash) => Some((&**record, *hash)),
            _ => None,
        }
    }
}

/// All that is said of one slab.
struct Slab {
    number: u32,
    own: [Seen; 2],
    copies: [Seen; 2],
}

/// The record that counts.
#[derive(Clone, Copy)]
struct Chosen<'a> {
    slot: u8,
    from_copy: bool,
    record: &'a IndexRecord,
    hash: u64,
}

impl Slab {
    fn is_empty(&self) -> bool {
        self.own.iter().chain(&self.copies).all(|seen| matches!(seen, Seen::Empty))
    }

    /// The newest committed record among those that `trust` admits.
    fn choose(&self, trust: Trust, committed: u64) -> Option<Chosen<'_>> {
        let mut chosen: Option<Chosen<'_>> = None;
        for slot in [0u8, 1] {
            let (own, copy) = (&self.own[usize::from(slot)], &self.copies[usize::from(slot)]);
            let believed = match trust {
                Trust::Index => false,
                Trust::CopiesOfDamaged => matches!(own, Seen::Bad),
                Trust::Newest => true,
            };
            let copy = believed.then_some(copy).and_then(Seen::record).map(|seen| (seen, true));
            let own = own.record().map(|seen| (seen, false));
            for ((record, hash), from_copy) in own.into_iter().chain(copy) {
                let newer = chosen.is_none_or(|c| c.record.checkpoint < record.checkpoint);
                if record.checkpoint <= committed && newer {
                    chosen = Some(Chosen { slot, from_copy, record, hash });
                }
            }
        }
        chosen
    }
}

/// Reads `index` and `sums` slab by slab.
struct Reader<'a> {
    disk: &'a Disk,
    /// The index from this slab on.
    chunk: Vec<u8>,
    chunk_from: u32,
}

const CHUNK_SLABS: u32 = 512;

impl<'a> Reader<'a> {
    fn new(disk: &'a Disk) -> Self {
        Self { disk, chunk: Vec::new(), chunk_from: 0 }
    }

    fn slab(&mut self, number: u32) -> Slab {
        const SLAB: usize = 2 * SECTOR;
        if self.chunk.is_empty() || number - self.chunk_from >= CHUNK_SLABS {
            self.chunk.resize(CHUNK_SLABS as usize * SLAB, 0);
            self.chunk_from = number;
            let from = index_offset(number, 0);
            if self.disk.index.read_padded(&mut self.chunk, from).is_err() {
                for (sector, at) in
                    self.chunk.chunks_exact_mut(SECTOR).zip((from..).step_by(SECTOR))
                {
                    // What cannot be read is as good as damaged.
                    if self.disk.index.read_padded(sector, at).is_err() {
                        sector.fill(0xFF);
                    }
                }
            }
        }
        let at = (number - self.chunk_from) as usize * SLAB;
        let own = [at, at + SECTOR].map(|at| {
            let sector = self.chunk[at..].first_chunk();
            sector.map_or(Seen::Bad, |sector| Seen::new(sector, number))
        });
        let copies = [0, 1].map(|slot| {
            let mut sector = [0; SECTOR];
            match self.disk.sums.read_padded(&mut sector, copy_offset(number, slot)) {
                Ok(()) => Seen::new(&sector, number),
                Err(_) => Seen::Bad,
            }
        });
        Slab { number, own, copies }
    }
}

/// Number of slabs that the files may tell of.
fn slab_count(disk: &Disk, trust: Trust) -> u32 {
    let slabs = disk.index.len.div_ceil(index_offset(1, 0));
    let copies = if trust == Trust::Newest { disk.sums.len / sums_offset(1, 0) } else { 0 };
    slabs.max(copies).min(u64::from(u32::MAX)) as u32
}

/// Calls `each` for every slab.
fn for_each_slab(
    disk: &Disk,
    trust: Trust,
    stage: &'static str,
    progress: &mut dyn FnMut(Progress),
    mut each: impl FnMut(&Slab),
) {
    let mut reader = Reader::new(disk);
    let count = slab_count(disk, trust);
    for number in 0..count {
        if number % CHUNK_SLABS == 0 {
            let [done, total] = [number, count].map(|slabs| index_offset(slabs, 0));
            progress(Progress { stage, done, total });
        }
        each(&reader.slab(number));
    }
}

/// Loads what the mark committed, and compares each record with its copy.
pub(super) fn read(disk: &Disk, report: &mut Report, progress: &mut dyn FnMut(Progress)) -> Model {
    let right = [Trust::Index, Trust::CopiesOfDamaged, Trust::Newest].into_iter().find(|trust| {
        let mut digest = 0u64;
        for_each_slab(disk, *trust, "index", progress, |slab| {
            let chosen = slab.choose(*trust, disk.mark.checkpoint);
            digest = digest.wrapping_add(chosen.map_or(0, |chosen| chosen.hash));
        });
        digest == disk.mark.index_digest
    });
    let trust = right.unwrap_or(Trust::Newest);
    let mut load =
        Load { disk, report, model: Model::default(), trust, lost: right.is_none(), named: false };
    for_each_slab(disk, trust, "index and its copies", progress, |slab| load.take(slab));
    if load.lost {
        load.report.incomplete = Some("layers may be missing from the index");
    }
    if load.lost && !load.named {
        let what = "records are missing or from another time: they are not those of the mark";
        load.report.add(Finding::damage(INDEX, what));
    }
    load.model
}

struct Load<'a> {
    disk: &'a Disk,
    report: &'a mut Report,
    model: Model,
    trust: Trust,
    /// The records are not those that were committed, whatever is believed.
    lost: bool,
    /// A damaged record was named as the reason.
    named: bool,
}

impl Load<'_> {
    fn take(&mut self, slab: &Slab) {
        if slab.is_empty() {
            return;
        }
        self.model.slabs_end = slab.number + 1;
        let chosen = slab.choose(self.trust, self.disk.mark.checkpoint);
        self.compare(slab, chosen);
        let Some(chosen) = chosen else { return };
        let Some(layer) = &chosen.record.layer else { return };
        let place = index_offset(slab.number, chosen.slot);
        let mut add = |what: &str| {
            let finding = Finding::damage(INDEX, what).at(place).slab(slab.number);
            self.report.add(finding.layer(layer.key));
        };
        self.model.take_slab(slab.number);
        if layer.version == Version::NONE {
            return add("a layer without a version");
        }
        if self.model.layers.contains_key(&layer.key) {
            return add("its layer has another slab too");
        }
        let base = Base {
            slab: slab.number,
            slot: chosen.slot,
            from_copy: chosen.from_copy,
            sums_crc: layer.sums_crc,
            data_blocks: layer.states.data_blocks(),
        };
        self.model.layers.insert(layer.key, LayerModel::of(layer.version, base));
    }

    /// Reports records that are damaged or differ from their copies.
    fn compare(&mut self, slab: &Slab, chosen: Option<Chosen<'_>>) {
        let number = slab.number;
        for slot in [0u8, 1] {
            let (own, copy) = (&slab.own[usize::from(slot)], &slab.copies[usize::from(slot)]);
            let counts = chosen.filter(|chosen| chosen.slot == slot);
            let key = counts.and_then(|c| c.record.layer.as_ref()).map(|layer| layer.key);
            let mut add = |severity, file, offset, what: &str| {
                let finding = Finding::new(severity, file, what).at(offset).slab(number);
                self.report.add(Finding { layer: key, ..finding });
            };
            let at = index_offset(number, slot);
            let hash = |seen: &Seen| seen.record().map(|(_, hash)| hash);
            match counts {
                Some(counts) if counts.from_copy => {
                    let how = if matches!(own, Seen::Bad) { "damaged" } else { "missing or old" };
                    let what =
                        format!("the record of slab {number} is {how}, its copy in sums is whole");
                    add(Severity::Repairable, INDEX, at, &what);
                }
                Some(counts) if hash(copy) != Some(counts.hash) => {
                    let what = format!("the copy of the index record of slab {number} is damaged");
                    add(Severity::Repairable, SUMS, copy_offset(number, slot), &what);
                }
                Some(_) => {}
                None if matches!(own, Seen::Bad) && self.lost => {
                    let what = format!(
                        "the record of slab {number} is damaged, and so is its copy in sums"
                    );
                    add(Severity::Damage, INDEX, at, &what);
                    self.named = true;
                }
                None if matches!(own, Seen::Bad) => {
                    let what = format!("a record of slab {number} that does not count is damaged");
                    add(Severity::Note, INDEX, at, &what);
                }
                None => {}
            }
        }
    }
}

/// What `base` says of its layer's blocks; `None` if it cannot be read any more.
pub(super) fn states_of(disk: &Disk, base: &Base) -> Option<States> {
    let mut sector = [0; SECTOR];
    let (part, at) = if base.from_copy {
        (&disk.sums, copy_offset(base.slab, base.slot))
    } else {
        (&disk.index, index_offset(base.slab, base.slot))
    };
    part.read(&mut sector, at).ok()?;
    Some(IndexRecord::decode(&sector, base.slab)?.layer?.states)
}

/// The checksums that `base` says were committed, or why they cannot be had.
pub(super) fn sums_of(disk: &Disk, base: &Base) -> Result<Vec<u32>, String> {
    let mut table = vec![0; TABLE];
    let read = disk.sums.read(&mut table, sums_offset(base.slab, base.slot));
    read.map_err(|error| format!("the checksum table: {error}"))?;
    if crc32c::crc32c(&table) != base.sums_crc {
        return Err("the checksum table is damaged".into());
    }
    Ok(crcs_from_bytes(&table).collect())
}
