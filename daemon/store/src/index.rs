//! Loading the index: what the last checkpoint committed.

use std::collections::BTreeSet;
use std::io;

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

/// Loads what the checkpoint `mark` committed. If the records are not just those, each is looked
/// for in its copy too.
pub(crate) fn load(files: &Files, mark: Mark, cache_bytes: u64) -> Result<Loaded, OpenError> {
    let index_len = files.index.len().map_err(OpenError::io("cannot read index"))?;
    let sums_len = files.sums.len().map_err(OpenError::io("cannot read sums"))?;
    // After a power cut the file may end with the first record of a pair.
    let in_index = index_len.div_ceil(index_offset(1, 0));
    let in_sums = sums_len / sums_offset(1, 0);
    let mut scan = Scan::new(files, mark, cache_bytes, false);
    let scanned = scan.run(in_index);
    if scanned.is_err() || scan.digest != mark.index_digest {
        let first_damaged = scan.damaged;
        scan = Scan::new(files, mark, cache_bytes, true);
        scan.run(in_index.max(in_sums))?;
        if scan.digest != mark.index_digest {
            let what = first_damaged.map_or_else(
                || "records are missing or from another time".into(),
                |slab| format!("a record of slab {slab} is damaged, and so is its copy in sums"),
            );
            return Err(OpenError::corrupt(INDEX, what));
        }
    }
    repair(files, &scan.repairs)?;
    let mut loaded = scan.loaded;
    loaded.free.retain(|slab| slab.slab < loaded.next);
    let room = (index_len / index_offset(1, 0)).min(in_sums);
    loaded.room = u32::try_from(room).unwrap_or(u32::MAX);
    Ok(loaded)
}

/// One pass over the index.
struct Scan<'a> {
    files: &'a Files,
    mark: Mark,
    /// Look at the copies too.
    careful: bool,
    digest: u64,
    /// The first slab with a record that is neither whole nor empty.
    damaged: Option<u32>,
    /// Records that only their copy has.
    repairs: Vec<(SlabRef, [u8; SECTOR])>,
    loaded: Loaded,
}

impl<'a> Scan<'a> {
    fn new(files: &'a Files, mark: Mark, cache_bytes: u64, careful: bool) -> Self {
        let loaded = Loaded {
            table: Table::new(cache_bytes),
            free: Vec::new(),
            next: 0,
            room: 0,
            leftovers: BTreeSet::new(),
            blocks: 0,
        };
        Self { files, mark, careful, digest: 0, damaged: None, repairs: Vec::new(), loaded }
    }

    fn run(&mut self, slabs: u64) -> Result<(), OpenError> {
        const CHUNK_SLABS: u64 = 256;
        let index = &self.files.index;
        let slab_bytes = index_offset(1, 0);
        let len = index.len().map_err(OpenError::io("cannot read index"))?;
        let slabs = slabs.min(u64::from(u32::MAX));
        let mut buf = vec![0; (CHUNK_SLABS * slab_bytes) as usize];
        for from in (0..slabs).step_by(CHUNK_SLABS as usize) {
            let wanted = (CHUNK_SLABS.min(slabs - from) * slab_bytes) as usize;
            let held = len.saturating_sub(from * slab_bytes).min(wanted as u64) as usize;
            index
                .read_at(&mut buf[..held], from * slab_bytes)
                .map_err(OpenError::io("cannot read index"))?;
            buf[held..].fill(0);
            for (slab, bytes) in (from as u32..).zip(buf[..wanted].chunks_exact(2 * SECTOR)) {
                self.slab(slab, bytes)?;
            }
        }
        Ok(())
    }

    /// Takes up the committed one of a slab's two records. A slab without one is free.
    fn slab(&mut self, slab: u32, bytes: &[u8]) -> Result<(), OpenError> {
        let mut committed: Option<(SlabRef, IndexRecord)> = None;
        let mut repair = None;
        for (slot, bytes) in (0u8..).zip(bytes.chunks_exact(SECTOR)) {
            let Some(bytes) = bytes.first_chunk::<SECTOR>() else { continue };
            let copy = if self.careful { read_copy(self.files, slab, slot)? } else { [0; SECTOR] };
            let Some((record, from)) = self.record((slab, slot), bytes, &copy) else { continue };
            if record.checkpoint > self.mark.checkpoint {
                self.loaded.leftovers.insert((slab, slot));
            } else if committed.as_ref().is_none_or(|(_, c)| c.checkpoint < record.checkpoint) {
                let place = SlabRef { slab, slot, hash: slot_hash(from) };
                repair = (from != bytes).then_some((place, *from));
                committed = Some((place, record));
            }
        }
        self.repairs.extend(repair);
        let Some((place, record)) = committed else {
            self.loaded.free.push(SlabRef::unused(slab));
            return Ok(());
        };
        self.digest = self.digest.wrapping_add(place.hash);
        match record.layer {
            Some(layer) => {
                self.loaded.blocks += u64::from(publish(&self.loaded.table, place, layer)?);
            }
            None => self.loaded.free.push(place),
        }
        Ok(())
    }

    /// The record of a slot, and the bytes it was found in: its own, or those of the copy if that
    /// is whole and its own are damaged, or are older than it.
    fn record<'b>(
        &mut self,
        (slab, slot): (u32, u8),
        bytes: &'b [u8; SECTOR],
        copy: &'b [u8; SECTOR],
    ) -> Option<(IndexRecord, &'b [u8; SECTOR])> {
        if *bytes == [0; SECTOR] && *copy == [0; SECTOR] {
            return None;
        }
        self.loaded.next = self.loaded.next.max(slab + 1);
        let own = IndexRecord::decode(bytes, slab);
        if own.is_none() && *bytes != [0; SECTOR] {
            tracing::debug!(slab, slot, "index: a damaged record");
            self.damaged.get_or_insert(slab);
        }
        let limit = self.mark.checkpoint;
        let copied = IndexRecord::decode(copy, slab).filter(|copied| {
            own.as_ref().is_none_or(|own| {
                own.checkpoint > limit
                    || (own.checkpoint < copied.checkpoint && copied.checkpoint <= limit)
            })
        });
        match (copied, own) {
            (Some(record), _) => Some((record, copy)),
            (None, Some(record)) => Some((record, bytes)),
            (None, None) => None,
        }
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
