//! Loading the index: what the last checkpoint committed.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use sheepdog_types::Version;

use crate::checkpoint::{copy_offset, index_offset, sums_offset};
use crate::engine::Files;
use crate::error::OpenError;
use crate::format::{IndexRecord, IndexedLayer, Mark, SECTOR, slot_hash};
use crate::layer::{Base, SlabRef};
use crate::open::INDEX;
use crate::states::CompactStates;
use crate::table::Table;

/// What the index holds.
pub(crate) struct Loaded {
    pub(crate) table: Table,
    /// Free slabs, and the number of slabs ever used.
    pub(crate) free: Vec<SlabRef>,
    pub(crate) next: u32,
    /// Slabs for which `index` and `sums` have room.
    pub(crate) room: u32,
    /// Index records that an interrupted checkpoint left.
    pub(crate) leftovers: BTreeSet<(u32, u8)>,
    /// Data blocks of all layers.
    pub(crate) blocks: u64,
}

/// Which copies of index records count.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copies {
    None,
    /// Those of records that are damaged. A whole record is better than its copy: that may be what
    /// an interrupted checkpoint left, whose record was lost.
    OfDamaged,
    /// Also those newer than their record, or without one: it may be lost.
    IfNewer,
}

/// Loads what the checkpoint `mark` committed. If the records are not just those, they are looked
/// for in their copies too.
pub(crate) fn load(files: &Files, mark: Mark, cache_bytes: u64) -> Result<Loaded, OpenError> {
    let index_len = files.index.len().map_err(OpenError::io("cannot read index"))?;
    let sums_len = files.sums.len().map_err(OpenError::io("cannot read sums"))?;
    // After a power cut the file may end with the first record of a pair.
    let in_index = index_len.div_ceil(index_offset(1, 0));
    let in_sums = sums_len / sums_offset(1, 0);
    let mut table = Table::new(cache_bytes);
    let mut scanned = scan(files, &table, mark, Copies::None, in_index);
    let first_damaged = scanned.as_ref().ok().and_then(|scan| scan.damaged);
    for copies in [Copies::OfDamaged, Copies::IfNewer] {
        if scanned.as_ref().is_ok_and(|scan| scan.digest == mark.index_digest) {
            break;
        }
        table = Table::new(cache_bytes);
        scanned = scan(files, &table, mark, copies, in_index.max(in_sums));
    }
    let mut scan = scanned?;
    if scan.digest != mark.index_digest {
        let what = first_damaged.map_or_else(
            || "records are missing or from another time".into(),
            |slab| format!("a record of slab {slab} is damaged, and so is its copy in sums"),
        );
        return Err(OpenError::corrupt(INDEX, what));
    }
    repair(files, &scan.repairs)?;
    let next = scan.next;
    scan.free.retain(|slab| slab.slab < next);
    let room = (index_len / index_offset(1, 0)).min(in_sums);
    let room = u32::try_from(room).unwrap_or(u32::MAX);
    let Scan { free, leftovers, blocks, .. } = scan;
    Ok(Loaded { table, free, next, room, leftovers, blocks })
}

/// Reads the records of `slabs` slabs into `table`, by several threads if they are many.
fn scan(
    files: &Files,
    table: &Table,
    mark: Mark,
    copies: Copies,
    slabs: u64,
) -> Result<Scan, OpenError> {
    let slabs = slabs.min(u64::from(u32::MAX));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let threads = cores.min(MAX_THREADS).min(slabs / SLABS_PER_THREAD).max(1);
    let part = slabs.div_ceil(threads).max(1);
    let scanner = Scanner { files, table, mark, copies };
    let parts = std::thread::scope(|scope| {
        let ranges = (0..threads).map(|n| (n * part).min(slabs)..((n + 1) * part).min(slabs));
        let rest: Vec<_> =
            ranges.clone().skip(1).map(|range| scope.spawn(move || scanner.run(range))).collect();
        let mut parts: Vec<_> = ranges.take(1).map(|range| scanner.run(range)).collect();
        parts.extend(rest.into_iter().map(|thread| {
            let died = |_| Err(OpenError::corrupt(INDEX, "the thread that read it panicked"));
            thread.join().unwrap_or_else(died)
        }));
        parts
    });
    parts.into_iter().try_fold(Scan::default(), |mut all, part| {
        all.add(part?);
        Ok(all)
    })
}

/// Threads that read an index, and the slabs that are worth one.
const MAX_THREADS: u64 = 4;
const SLABS_PER_THREAD: u64 = 16_384;

/// How to read the index.
#[derive(Clone, Copy)]
struct Scanner<'a> {
    files: &'a Files,
    table: &'a Table,
    mark: Mark,
    copies: Copies,
}

/// What was found in a part of the index; the layers are in the table.
#[derive(Default)]
struct Scan {
    digest: u64,
    /// The first slab with a record that is neither whole nor empty.
    damaged: Option<u32>,
    /// Records that only their copy has.
    repairs: Vec<(SlabRef, [u8; SECTOR])>,
    free: Vec<SlabRef>,
    next: u32,
    leftovers: BTreeSet<(u32, u8)>,
    blocks: u64,
}

impl Scan {
    /// Adds what was found behind this.
    fn add(&mut self, part: Self) {
        self.digest = self.digest.wrapping_add(part.digest);
        self.damaged = self.damaged.or(part.damaged);
        self.repairs.extend(part.repairs);
        self.free.extend(part.free);
        self.next = self.next.max(part.next);
        self.leftovers.extend(part.leftovers);
        self.blocks += part.blocks;
    }
}

impl Scanner<'_> {
    fn run(&self, slabs: Range<u64>) -> Result<Scan, OpenError> {
        const CHUNK_SLABS: u64 = 256;
        let mut scan = Scan::default();
        let index = &self.files.index;
        let slab_bytes = index_offset(1, 0);
        let len = index.len().map_err(OpenError::io("cannot read index"))?;
        let mut buf = vec![0; (CHUNK_SLABS * slab_bytes) as usize];
        for from in slabs.clone().step_by(CHUNK_SLABS as usize) {
            let wanted = (CHUNK_SLABS.min(slabs.end - from) * slab_bytes) as usize;
            let held = len.saturating_sub(from * slab_bytes).min(wanted as u64) as usize;
            index
                .read_at(&mut buf[..held], from * slab_bytes)
                .map_err(OpenError::io("cannot read index"))?;
            buf[held..].fill(0);
            for (slab, bytes) in (from as u32..).zip(buf[..wanted].chunks_exact(2 * SECTOR)) {
                self.slab(&mut scan, slab, bytes)?;
            }
        }
        Ok(scan)
    }

    /// Takes up the committed one of a slab's two records. A slab without one is free.
    fn slab(&self, scan: &mut Scan, slab: u32, bytes: &[u8]) -> Result<(), OpenError> {
        let mut committed: Option<(SlabRef, IndexRecord)> = None;
        let mut repair = None;
        for (slot, bytes) in (0u8..).zip(bytes.chunks_exact(SECTOR)) {
            let Some(bytes) = bytes.first_chunk::<SECTOR>() else { continue };
            let own = IndexRecord::decode(bytes, slab);
            let empty = *bytes == [0; SECTOR];
            let copy = match self.copies {
                Copies::OfDamaged if own.is_none() && !empty => read_copy(self.files, slab, slot)?,
                Copies::IfNewer => read_copy(self.files, slab, slot)?,
                _ => [0; SECTOR],
            };
            if empty && copy == [0; SECTOR] {
                continue;
            }
            scan.next = scan.next.max(slab + 1);
            if own.is_none() && !empty {
                scan.damaged.get_or_insert(slab);
            }
            let Some((record, from)) = self.choose(slab, (own, bytes), &copy) else { continue };
            if record.checkpoint > self.mark.checkpoint {
                scan.leftovers.insert((slab, slot));
            } else if committed.as_ref().is_none_or(|(_, c)| c.checkpoint < record.checkpoint) {
                let place = SlabRef { slab, slot, hash: slot_hash(from) };
                repair = (from != bytes).then_some((place, *from));
                committed = Some((place, record));
            }
        }
        scan.repairs.extend(repair);
        let Some((place, record)) = committed else {
            scan.free.push(SlabRef::unused(slab));
            return Ok(());
        };
        scan.digest = scan.digest.wrapping_add(place.hash);
        match record.layer {
            Some(layer) => {
                scan.blocks += u64::from(publish(self.table, place, layer)?);
            }
            None => scan.free.push(place),
        }
        Ok(())
    }

    /// A record or its copy, and the bytes of that: the copy if it is whole, and the record is damaged
    /// or older.
    fn choose<'b>(
        &self,
        slab: u32,
        (own, bytes): (Option<IndexRecord>, &'b [u8; SECTOR]),
        copy: &'b [u8; SECTOR],
    ) -> Option<(IndexRecord, &'b [u8; SECTOR])> {
        let limit = self.mark.checkpoint;
        let copied = IndexRecord::decode(copy, slab).filter(|copied| {
            own.as_ref().is_none_or(|own| {
                own.checkpoint > limit
                    || (own.checkpoint < copied.checkpoint && copied.checkpoint <= limit)
            })
        });
        copied.map(|record| (record, copy)).or_else(|| own.map(|record| (record, bytes)))
    }
}

/// Brings a committed layer into memory; gives the number of its data blocks.
fn publish(table: &Table, place: SlabRef, layer: IndexedLayer) -> Result<u16, OpenError> {
    let damaged = |what: &str| OpenError::corrupt(INDEX, format!("slab {}: {what}", place.slab));
    if layer.version == Version::NONE {
        return Err(damaged("a layer without a version"));
    }
    let mut shard = table.shard_of(layer.key.object);
    let state = shard.get_or_insert(layer.key);
    if state.base.is_some() {
        return Err(damaged("its layer has another slab too"));
    }
    state.version = layer.version;
    state.data_blocks = layer.states.data_blocks();
    state.zero_blocks = layer.states.zero_blocks();
    let states = CompactStates::new(layer.states);
    state.base = Some(Base { slab: place, sums_crc: layer.sums_crc, states });
    table.count(layer.key, (Version::NONE, 0), (layer.version, state.data_blocks));
    Ok(state.data_blocks)
}

fn read_copy(files: &Files, slab: u32, slot: u8) -> Result<[u8; SECTOR], OpenError> {
    let mut copy = [0; SECTOR];
    match files.sums.read_at(&mut copy, copy_offset(slab, slot)) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok([0; SECTOR]),
        other => other.map(|()| copy).map_err(OpenError::io("cannot read sums")),
    }
}

/// Writes records that only their copies in `sums` have where they belong.
fn repair(files: &Files, repairs: &[(SlabRef, [u8; SECTOR])]) -> Result<(), OpenError> {
    for (place, bytes) in repairs {
        tracing::warn!(slab = place.slab, "index: a damaged record was repaired from its copy");
        files
            .index
            .write_at(&[bytes], index_offset(place.slab, place.slot))
            .map_err(OpenError::io("cannot repair index"))?;
    }
    if repairs.is_empty() {
        return Ok(());
    }
    files.index.sync().map_err(OpenError::io("cannot repair index"))
}
