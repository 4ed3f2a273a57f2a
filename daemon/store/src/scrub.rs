//! Scrubbing: reads what is stored of a layer from the disk and verifies it, also what nobody
//! asks for, so that damage is found while other replicas can repair it.
//!
//! As a read does, it finds the blocks under a short lock and reads them without it. What does not
//! match is judged again under the lock, where no block can move: only that counts. Checksum
//! tables are read from `sums` even if memory keeps them, and `data` without the page cache as far
//! as that holds nothing unwritten.

use std::sync::Arc;

use sheepdog_types::{BLOCK_SIZE, LayerKey};

use crate::api::{BadBlock, BlockRange, DamageReport, ScrubbedLayer};
use crate::checkpoint::{SUMS_BYTES, sums_offset};
use crate::engine::Engine;
use crate::layer::{LayerState, Located, Place, SlabRef};
use crate::read::Wanted;
use crate::table::{Shard, Sums};

/// Blocks that are looked up, read and, if need be, judged again at a time.
const PIECE_BLOCKS: u16 = 64;

/// A data block, where it is, and what has to be there.
#[derive(Clone, Copy)]
struct Target {
    block: u16,
    place: Place,
    /// `None`: the checksum table is damaged.
    crc: Option<u32>,
}

impl Target {
    fn is_followed_by(&self, next: &Self) -> bool {
        let bytes = BLOCK_SIZE as u64;
        match (self.place, next.place) {
            (Place::Log(a), Place::Log(b)) | (Place::Slab(a), Place::Slab(b)) => a + bytes == b,
            _ => false,
        }
    }
}

/// The checksum table of a committed slab; `None` if it is damaged or cannot be read.
type SlabSums = Option<Arc<Sums>>;

/// The data blocks of a layer in `range`; `Err`: the checksum table that is needed for it.
fn targets(
    shard: &Shard,
    key: LayerKey,
    range: BlockRange,
    sums: Option<&(SlabRef, SlabSums)>,
) -> Result<Vec<Target>, Wanted> {
    let Some(layer) = shard.get(key).filter(|layer| layer.exists()) else { return Ok(Vec::new()) };
    let wanted = layer.wanted(key);
    let mut targets = Vec::new();
    for block in range.first()..range.end() {
        let (place, crc) = match layer.locate(block) {
            Located::Absent | Located::Zero => continue,
            Located::Data { crc, place } => (place, Some(crc)),
            Located::Base { offset } => {
                let sums = match (&wanted, sums) {
                    (Some(wanted), Some((slab, sums))) if *slab == wanted.slab => sums,
                    (Some(wanted), _) => return Err(*wanted),
                    // Blocks in the base are visible only if the base is.
                    (None, _) => continue,
                };
                (Place::Slab(offset), sums.as_ref().map(|sums| sums[usize::from(block)]))
            }
        };
        targets.push(Target { block, place, crc });
    }
    Ok(targets)
}

impl Engine {
    /// See [`crate::Store::scrub_layer`].
    pub(crate) fn scrub_layer(&self, key: LayerKey) -> ScrubbedLayer {
        let mut found = ScrubbedLayer::default();
        let mut buf = vec![0; usize::from(PIECE_BLOCKS) * BLOCK_SIZE];
        let mut sums = None;
        for first in (0..BlockRange::ALL.end()).step_by(usize::from(PIECE_BLOCKS)) {
            let Some(range) = BlockRange::new(first, usize::from(PIECE_BLOCKS)) else { break };
            let targets = loop {
                let planned = targets(&self.table.shard_of(key.object), key, range, sums.as_ref());
                match planned {
                    Ok(targets) => break targets,
                    Err(wanted) => sums = Some((wanted.slab, self.read_sums(&wanted))),
                }
            };
            found.blocks += targets.len() as u16;
            let suspects = self.suspects(&targets, &mut buf);
            let bad = if suspects.is_empty() { suspects } else { self.judge(key, &suspects) };
            self.heal_all_but(key, range, &bad);
            found.bad.extend(bad);
        }
        found
    }

    fn read_sums(&self, wanted: &Wanted) -> SlabSums {
        let at = sums_offset(wanted.slab.slab, wanted.slab.slot);
        self.files.sums.uncache(at, SUMS_BYTES as u64);
        self.load_sums(wanted).ok()
    }

    /// The blocks that cannot be read or do not match, unless they moved meanwhile.
    fn suspects(&self, targets: &[Target], buf: &mut [u8]) -> Vec<u16> {
        let mut suspects = Vec::new();
        for run in targets.chunk_by(Target::is_followed_by) {
            let out = &mut buf[..run.len() * BLOCK_SIZE];
            if let Place::Slab(offset) = run[0].place {
                self.files.data.uncache(offset, out.len() as u64);
            }
            let whole = self.read_place(run[0].place, out).is_ok();
            for (target, bytes) in run.iter().zip(out.chunks_exact_mut(BLOCK_SIZE)) {
                let read = whole || self.read_place(target.place, bytes).is_ok();
                if !read || target.crc != Some(crc32c::crc32c(bytes)) {
                    suspects.push(target.block);
                }
            }
        }
        suspects
    }

    /// Those of `suspects` that are damaged, judged under the lock, and remembers them.
    fn judge(&self, key: LayerKey, suspects: &[u16]) -> Vec<u16> {
        let shard = self.table.shard_of(key.object);
        let Some(layer) = shard.get(key).filter(|layer| layer.exists()) else { return Vec::new() };
        let sums = layer.wanted(key).map(|wanted| self.load_sums(&wanted).ok());
        let mut bytes = [0; BLOCK_SIZE];
        let mut is_bad = |block: u16| {
            let (place, crc) = match layer.locate(block) {
                Located::Absent | Located::Zero => return false,
                Located::Data { crc, place } => (place, Some(crc)),
                Located::Base { offset } => {
                    let sums = sums.as_ref().and_then(Option::as_ref);
                    (Place::Slab(offset), sums.map(|sums| sums[usize::from(block)]))
                }
            };
            let read = self.read_place(place, &mut bytes);
            read.is_err() || crc != Some(crc32c::crc32c(&bytes))
        };
        let bad: Vec<u16> = suspects.iter().copied().filter(|block| is_bad(*block)).collect();
        // Under the lock: a write that comes next heals them.
        bad.iter().for_each(|block| self.damage.report(key, *block));
        bad
    }

    fn heal_all_but(&self, key: LayerKey, range: BlockRange, bad: &[u16]) {
        let mut from = range.first();
        for block in bad {
            self.damage.heal(key, from, *block);
            from = block + 1;
        }
        self.damage.heal(key, from, range.end());
    }

    /// See [`crate::Store::damage`].
    pub(crate) fn damage_report(&self) -> DamageReport {
        let mut blocks = Vec::new();
        for (key, block) in self.damage.known() {
            let exists = self.table.shard_of(key.object).get(key).is_some_and(LayerState::exists);
            if exists {
                blocks.push(BadBlock { key, block });
            } else {
                // It went into another layer: who reads it there finds it again.
                self.damage.heal(key, block, block + 1);
            }
        }
        DamageReport { found: self.damage.found(), blocks }
    }
}
