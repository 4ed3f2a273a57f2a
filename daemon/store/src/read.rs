//! Reading: find the blocks under a short lock, read them without it, verify every one (I7).
//!
//! Between the two steps a checkpoint may have moved a block from the log to its slab and the old
//! place may have been written again. Such a read fails its checksum, or its place cannot be read;
//! then both steps are done once more under the lock, where no block can move.

use std::io;

use sheepdog_types::{BLOCK_SIZE, Layer, LayerKey, ObjectId};

use crate::api::{BlockRange, BlockRun, BlockState, LayerImage, LayerStat, LayerSums, ReadOutcome};
use crate::engine::Engine;
use crate::error::ReadError;
use crate::format::ZERO_CRC;
use crate::layer::{LayerState, Located, Place};
use crate::table::Shard;

/// Adjacent blocks that lie adjacent in one place.
struct Piece {
    key: LayerKey,
    /// First block in the object.
    block: u16,
    /// First block in the caller's buffer.
    at: usize,
    count: usize,
    /// `None`: zeroes.
    place: Option<Place>,
}

impl Piece {
    fn continues_with(&self, key: LayerKey, block: u16, place: Option<Place>) -> bool {
        let bytes = (self.count * BLOCK_SIZE) as u64;
        let next = match (self.place, place) {
            (None, None) => true,
            (Some(Place::Log(a)), Some(Place::Log(b))) => a + bytes == b,
            (Some(Place::Slab(a)), Some(Place::Slab(b))) => a + bytes == b,
            _ => false,
        };
        next && self.key == key && usize::from(self.block) + self.count == usize::from(block)
    }
}

#[derive(Default)]
struct Plan {
    pieces: Vec<Piece>,
    blocks: usize,
}

impl Plan {
    fn push(&mut self, key: LayerKey, block: u16, place: Option<Place>) {
        let at = self.blocks;
        self.blocks += 1;
        match self.pieces.last_mut() {
            Some(last) if last.continues_with(key, block, place) => last.count += 1,
            _ => self.pieces.push(Piece { key, block, at, count: 1, place }),
        }
    }
}

/// The first layer of the chain that says something of `block`.
fn resolve(layers: &[&LayerState], block: u16) -> Option<(LayerKey, Located)> {
    layers
        .iter()
        .map(|layer| (layer.key, layer.locate(block)))
        .find(|(_, located)| *located != Located::Absent)
}

fn chain_of<'a>(shard: &'a Shard, object: ObjectId, chain: &[Layer]) -> Vec<&'a LayerState> {
    let layers = shard.layers(object);
    chain.iter().filter_map(|layer| layers.iter().find(|state| state.key.layer == *layer)).collect()
}

impl Engine {
    /// See [`crate::Store::read`].
    pub(crate) fn read(
        &self,
        object: ObjectId,
        chain: &[Layer],
        first: u16,
        buf: &mut [u8],
        crcs: &mut [u32],
    ) -> Result<ReadOutcome, ReadError> {
        let range =
            BlockRange::new(first, crcs.len()).filter(|range| range.bytes() == buf.len()).ok_or(
                ReadError::Invalid("no blocks, blocks past the object, or sizes that differ"),
            )?;
        let newest = *chain.first().ok_or(ReadError::Invalid("no layers to read from"))?;
        let plan = |shard: &Shard, crcs: &mut [u32]| {
            let layers = chain_of(shard, object, chain);
            let mut plan = Plan::default();
            let mut outcome = ReadOutcome {
                version: shard.version(LayerKey { object, layer: newest }),
                absent: 0,
            };
            for (block, crc) in (range.first()..range.end()).zip(crcs) {
                let found = resolve(&layers, block);
                outcome.absent += u16::from(found.is_none());
                (*crc, _) = plan.add(found, object, newest, block);
            }
            (plan, outcome)
        };
        let shard = self.table.shard_of(object);
        let (pieces, outcome) = plan(&shard, crcs);
        drop(shard);
        if self.read_pieces(&pieces, buf, crcs).is_ok() {
            return Ok(outcome);
        }
        let shard = self.table.shard_of(object);
        let (pieces, outcome) = plan(&shard, crcs);
        self.read_pieces(&pieces, buf, crcs).map(|()| outcome)
    }

    fn read_pieces(&self, plan: &Plan, buf: &mut [u8], crcs: &[u32]) -> Result<(), ReadError> {
        for piece in &plan.pieces {
            let out = &mut buf[piece.at * BLOCK_SIZE..][..piece.count * BLOCK_SIZE];
            let Some(place) = piece.place else {
                out.fill(0);
                continue;
            };
            self.read_place(place, out).map_err(|source| ReadError::Io {
                key: piece.key,
                block: piece.block,
                source,
            })?;
            let crcs = &crcs[piece.at..][..piece.count];
            if let Some(bad) = crate::check::first_mismatch(out, crcs) {
                let block = piece.block + bad as u16;
                return Err(ReadError::Checksum { key: piece.key, block });
            }
        }
        Ok(())
    }

    fn read_place(&self, place: Place, out: &mut [u8]) -> io::Result<()> {
        match place {
            Place::Log(lsn) => self.ring.read(out, lsn),
            Place::Slab(offset) => self.files.data.read_at(out, offset),
        }
    }

    /// See [`crate::Store::block_states`].
    pub(crate) fn block_states(
        &self,
        object: ObjectId,
        chain: &[Layer],
        range: BlockRange,
    ) -> Vec<BlockRun> {
        let shard = self.table.shard_of(object);
        let layers = chain_of(&shard, object, chain);
        runs(range, |block| {
            resolve(&layers, block).map_or(BlockState::Absent, |(_, located)| located.state())
        })
    }

    /// See [`crate::Store::stat`].
    pub(crate) fn stat(&self, key: LayerKey) -> Option<LayerStat> {
        let shard = self.table.shard_of(key.object);
        shard.get(key).filter(|layer| layer.exists()).map(LayerState::stat)
    }

    /// See [`crate::Store::stat_object`].
    pub(crate) fn stat_object(&self, object: ObjectId) -> Vec<LayerStat> {
        let shard = self.table.shard_of(object);
        let layers = shard.layers(object).iter();
        layers.filter(|layer| layer.exists()).map(LayerState::stat).collect()
    }

    /// See [`crate::Store::sums`].
    pub(crate) fn sums(&self, key: LayerKey) -> Option<LayerSums> {
        let shard = self.table.shard_of(key.object);
        Some(plan_image(shard.get(key).filter(|layer| layer.exists())?).0)
    }

    /// See [`crate::Store::image`].
    pub(crate) fn image(&self, key: LayerKey) -> Result<Option<LayerImage>, ReadError> {
        let plan = |shard: &Shard| {
            let layer = shard.get(key).filter(|layer| layer.exists());
            layer.map(plan_image)
        };
        let planned = plan(&self.table.shard_of(key.object));
        let Some((sums, pieces)) = planned else { return Ok(None) };
        let mut data = vec![0; pieces.blocks * BLOCK_SIZE];
        if self.read_pieces(&pieces, &mut data, &sums.crcs).is_ok() {
            return Ok(Some(LayerImage { sums, data }));
        }
        let shard = self.table.shard_of(key.object);
        let Some((sums, pieces)) = plan(&shard) else { return Ok(None) };
        data.resize(pieces.blocks * BLOCK_SIZE, 0);
        self.read_pieces(&pieces, &mut data, &sums.crcs)?;
        Ok(Some(LayerImage { sums, data }))
    }
}

impl Plan {
    /// Adds a block as `found`; gives its checksum and state.
    fn add(
        &mut self,
        found: Option<(LayerKey, Located)>,
        object: ObjectId,
        newest: Layer,
        block: u16,
    ) -> (u32, BlockState) {
        match found {
            Some((key, Located::Data { crc, place })) => {
                self.push(key, block, Some(place));
                (crc, BlockState::Data)
            }
            other => {
                self.push(LayerKey { object, layer: newest }, block, None);
                (ZERO_CRC, other.map_or(BlockState::Absent, |(_, located)| located.state()))
            }
        }
    }
}

/// What an image of `layer` holds and where its data is.
fn plan_image(layer: &LayerState) -> (LayerSums, Plan) {
    let mut sums = LayerSums { version: layer.version, runs: Vec::new(), crcs: Vec::new() };
    let mut plan = Plan::default();
    sums.runs = runs(BlockRange::ALL, |block| {
        let located = layer.locate(block);
        if let Located::Data { crc, place } = located {
            sums.crcs.push(crc);
            plan.push(layer.key, block, Some(place));
        }
        located.state()
    });
    sums.runs.retain(|run| run.state != BlockState::Absent);
    (sums, plan)
}

/// The blocks of `range` as runs of equal state.
fn runs(range: BlockRange, mut state: impl FnMut(u16) -> BlockState) -> Vec<BlockRun> {
    let mut runs = Vec::new();
    let mut run = (range.first(), state(range.first()));
    let mut close = |from: u16, to: u16, state| {
        let range = BlockRange::new(from, usize::from(to - from));
        runs.extend(range.map(|range| BlockRun { range, state }));
    };
    for block in range.first() + 1..range.end() {
        let now = state(block);
        if now != run.1 {
            close(run.0, block, run.1);
            run = (block, now);
        }
    }
    close(run.0, range.end(), run.1);
    runs
}
