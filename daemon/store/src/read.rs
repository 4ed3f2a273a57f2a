//! Reading: find the blocks under a short lock, read them without it, verify every one (I7).
//!
//! Between the two steps a checkpoint may have moved a block from the log to its slab and the old
//! place may have been written again. Such a read fails its checksum, or its place cannot be read;
//! then all is done once more under the lock, where no block can move. The same goes for the
//! checksum table of a layer, which is read from `sums` if it is not kept in memory.

use std::io;
use std::sync::Arc;

use sheepdog_types::{BLOCK_SIZE, Layer, LayerKey, ObjectId, Version};
use smallvec::SmallVec;

use crate::api::{
    BlockRange, BlockRun, BlockState, LayerImage, LayerPart, LayerStat, LayerSums, ReadOutcome,
};
use crate::checkpoint::{SUMS_BYTES, sums_offset};
use crate::engine::Engine;
use crate::error::ReadError;
use crate::format::{ZERO_CRC, crcs_from_bytes};
use crate::io::{Buffer, Op};
use crate::layer::{Base, LayerState, Located, Place, SlabRef};
use crate::table::{Shard, Sums};

/// Whether a read may wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Wait,
    /// Only what the page cache holds.
    Cached,
}

/// A checksum table that a plan needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    key: LayerKey,
    /// The first block that is wanted by it.
    block: u16,
    pub(crate) slab: SlabRef,
    sums_crc: u32,
}

impl Wanted {
    /// Where the table is in `sums`.
    pub(crate) fn offset(&self) -> u64 {
        sums_offset(self.slab.slab, self.slab.slot)
    }

    /// The table from its bytes.
    pub(crate) fn decode(&self, bytes: &[u8]) -> Result<Arc<Sums>, ReadError> {
        if bytes.len() != SUMS_BYTES || crc32c::crc32c(bytes) != self.sums_crc {
            return Err(ReadError::Checksum { key: self.key, block: self.block });
        }
        let mut sums = Arc::new([0; SUMS_BYTES / 4]);
        for (crc, value) in Arc::make_mut(&mut sums).iter_mut().zip(crcs_from_bytes(bytes)) {
            *crc = value;
        }
        Ok(sums)
    }
}

/// Checksum tables read for one operation; so it does not depend on what is kept.
pub(crate) type Loaded = Vec<(SlabRef, Arc<Sums>)>;

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

/// Where to read from, and what has to come out. Small reads need no allocation.
#[derive(Default)]
pub(crate) struct Plan {
    pieces: SmallVec<[Piece; 2]>,
    crcs: SmallVec<[u32; 16]>,
}

impl Plan {
    /// What the blocks must match.
    pub(crate) fn crcs(&self) -> &[u32] {
        &self.crcs
    }

    /// Whether `bytes` are the blocks from `at` on.
    pub(crate) fn matches(&self, at: usize, bytes: &[u8]) -> bool {
        let crcs = self.crcs.get(at..at + bytes.len() / BLOCK_SIZE);
        crcs.is_some_and(|crcs| crate::check::first_mismatch(bytes, crcs).is_none())
    }

    fn push(&mut self, key: LayerKey, block: u16, crc: u32, place: Option<Place>) {
        let at = self.crcs.len();
        self.crcs.push(crc);
        match self.pieces.last_mut() {
            Some(last) if last.continues_with(key, block, place) => last.count += 1,
            _ => self.pieces.push(Piece { key, block, at, count: 1, place }),
        }
    }
}

/// A layer of a chain, with its checksum table once it was needed.
struct Link<'a> {
    key: LayerKey,
    layer: &'a LayerState,
    sums: Option<Arc<Sums>>,
}

impl Link<'_> {
    /// The checksum of a block in the slab.
    fn crc(&mut self, shard: &Shard, loaded: &Loaded, block: u16) -> Result<u32, Wanted> {
        if self.sums.is_none() {
            let Some(wanted) = self.layer.wanted_for(self.key, block) else { return Ok(0) };
            let known = loaded.iter().find(|(slab, _)| *slab == wanted.slab);
            let known = known.map(|(_, sums)| Arc::clone(sums));
            self.sums = known.or_else(|| shard.sums(wanted.slab));
            if self.sums.is_none() {
                return Err(wanted);
            }
        }
        Ok(self.sums.as_ref().map_or(0, |sums| sums[usize::from(block)]))
    }
}

impl LayerState {
    fn wanted_for(&self, key: LayerKey, block: u16) -> Option<Wanted> {
        let base = self.visible_base()?;
        Some(Wanted { key, block, slab: base.slab, sums_crc: base.sums_crc })
    }

    /// The checksum table that belongs to what is committed and visible of the layer.
    pub(crate) fn wanted(&self, key: LayerKey) -> Option<Wanted> {
        self.wanted_for(key, 0)
    }
}

fn chain_of<'a>(shard: &'a Shard, object: ObjectId, chain: &[Layer]) -> SmallVec<[Link<'a>; 2]> {
    let link = |layer: &Layer| {
        let key = LayerKey { object, layer: *layer };
        shard.get(key).map(|layer| Link { key, layer, sums: None })
    };
    chain.iter().filter_map(link).collect()
}

/// The first layer of the chain that says something of `block`.
fn resolve(links: &[Link<'_>], block: u16) -> Option<(usize, Located)> {
    let located = links.iter().enumerate().map(|(at, link)| (at, link.layer.locate(block)));
    located.into_iter().find(|(_, located)| *located != Located::Absent)
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
        let read = self.read_as(Mode::Wait, object, chain, first, buf, crcs)?;
        read.ok_or(ReadError::Invalid("a read that may wait did not"))
    }

    /// As `mode` says; `None` if it would have to wait and must not.
    pub(crate) fn read_as(
        &self,
        mode: Mode,
        object: ObjectId,
        chain: &[Layer],
        first: u16,
        buf: &mut [u8],
        crcs: &mut [u32],
    ) -> Result<Option<ReadOutcome>, ReadError> {
        let range =
            BlockRange::new(first, crcs.len()).filter(|range| range.bytes() == buf.len()).ok_or(
                ReadError::Invalid("no blocks, blocks past the object, or sizes that differ"),
            )?;
        let newest = *chain.first().ok_or(ReadError::Invalid("no layers to read from"))?;
        let newest = LayerKey { object, layer: newest };
        self.fetch(
            mode,
            object,
            |shard, loaded| plan_read(shard, loaded, newest, chain, range),
            |plan, outcome| {
                if !self.read_pieces(mode, plan, buf)? {
                    return Ok(None);
                }
                crcs.copy_from_slice(&plan.crcs);
                Ok(Some(outcome))
            },
        )
    }

    /// Plans and carries out a read; again, under the lock, if something moved between the two.
    fn fetch<T, R>(
        &self,
        mode: Mode,
        object: ObjectId,
        plan: impl Fn(&Shard, &Loaded) -> Result<(Plan, T), Wanted>,
        mut carry_out: impl FnMut(&Plan, T) -> Result<Option<R>, ReadError>,
    ) -> Result<Option<R>, ReadError> {
        let mut loaded = Loaded::new();
        loop {
            let planned = plan(&self.table.shard_of(object), &loaded);
            let result = match planned {
                Ok((plan, value)) => carry_out(&plan, value),
                Err(wanted) => match self.load_for(mode, &wanted, &mut loaded) {
                    Ok(true) => continue,
                    Ok(false) => return Ok(None),
                    Err(error) => Err(error),
                },
            };
            match result {
                Ok(done) => return Ok(done),
                Err(_) => break,
            }
        }
        let shard = self.table.shard_of(object);
        let result = loop {
            match plan(&shard, &loaded) {
                Ok((plan, value)) => break carry_out(&plan, value),
                Err(wanted) => match self.load_sums(&wanted) {
                    Ok(sums) => loaded.push((wanted.slab, sums)),
                    Err(error) => break Err(error),
                },
            }
        };
        drop(shard);
        if let Err(ReadError::Checksum { key, block } | ReadError::Io { key, block, .. }) = &result
        {
            self.damage.report(*key, *block);
        }
        result
    }

    /// Reads a checksum table and keeps it; false if that would have to wait.
    fn load_for(
        &self,
        mode: Mode,
        wanted: &Wanted,
        loaded: &mut Loaded,
    ) -> Result<bool, ReadError> {
        let sums = if mode == Mode::Cached {
            let mut bytes = [0; SUMS_BYTES];
            if !matches!(self.files.sums.read_cached(&mut bytes, wanted.offset()), Ok(true)) {
                return Ok(false);
            }
            wanted.decode(&bytes)?
        } else {
            self.load_sums(wanted)?
        };
        self.keep_sums(wanted, &sums);
        loaded.push((wanted.slab, sums));
        Ok(true)
    }

    pub(crate) fn keep_sums(&self, wanted: &Wanted, sums: &Arc<Sums>) {
        self.table.keep_sums(wanted.key.object, wanted.slab, sums);
    }

    /// Reads a checksum table from `sums`.
    pub(crate) fn load_sums(&self, wanted: &Wanted) -> Result<Arc<Sums>, ReadError> {
        let Wanted { key, block, .. } = *wanted;
        let mut bytes = [0; SUMS_BYTES];
        match self.files.sums.read_at(&mut bytes, wanted.offset()) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => wanted.decode(&[]),
            Err(source) => Err(ReadError::Io { key, block, source }),
            Ok(()) => wanted.decode(&bytes),
        }
    }

    /// The reads that a plan needs, with the first block of each in the caller's buffer; `None` if
    /// they cannot be done by the I/O engine.
    pub(crate) fn read_ops(&self, plan: &Plan) -> Option<(Vec<usize>, Vec<Op>)> {
        let mut ops = (Vec::new(), Vec::new());
        for piece in &plan.pieces {
            let Some(place) = piece.place else { continue };
            let (file, offset) = match place {
                Place::Log(lsn) => self.ring.place(lsn),
                Place::Slab(offset) => (&self.files.data, offset),
            };
            let buf = Buffer::new(piece.count * BLOCK_SIZE);
            ops.0.push(piece.at);
            ops.1.push(Op::Read { file: Arc::clone(file.handle()?), offset, buf });
        }
        Some(ops)
    }

    /// Whether what a table was read for still is as it was.
    pub(crate) fn base_is(&self, wanted: &Wanted) -> bool {
        let shard = self.table.shard_of(wanted.key.object);
        let base = shard.get(wanted.key).and_then(LayerState::visible_base);
        base.is_some_and(|base| base.slab == wanted.slab)
    }

    /// The checksums of what is committed of a layer. If the table is damaged, checksums that match
    /// none of its blocks, so that each read reports them and a replica repairs them.
    pub(crate) fn sums_or_distrust(&self, key: LayerKey, base: &Base) -> io::Result<Arc<Sums>> {
        let wanted = Wanted { key, block: 0, slab: base.slab, sums_crc: base.sums_crc };
        match self.load_sums(&wanted) {
            Ok(sums) => return Ok(sums),
            Err(ReadError::Io { source, .. }) => return Err(source),
            Err(_) => {}
        }
        tracing::error!(disk = %self.ids.disk, layer = %key, slab = base.slab.slab,
            "sums: the checksum table is damaged: the layer's blocks are treated as damaged");
        let mut sums = Arc::new([0; SUMS_BYTES / 4]);
        let crcs = Arc::make_mut(&mut sums);
        let mut bytes = vec![0; BLOCK_SIZE];
        for block in base.states.expand().blocks(BlockState::Data) {
            match self.files.data.read_at(&mut bytes, base.slab.offset(block)) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => bytes.fill(0),
                // What cannot be read is as good as damaged.
                Err(_) => continue,
                Ok(()) => {}
            }
            crcs[usize::from(block)] = !crc32c::crc32c(&bytes);
            self.damage.report(key, block);
        }
        Ok(sums)
    }

    /// False if it would have to wait.
    fn read_pieces(&self, mode: Mode, plan: &Plan, buf: &mut [u8]) -> Result<bool, ReadError> {
        for piece in &plan.pieces {
            let out = &mut buf[piece.at * BLOCK_SIZE..][..piece.count * BLOCK_SIZE];
            let Some(place) = piece.place else {
                out.fill(0);
                continue;
            };
            match mode {
                Mode::Cached if !self.read_cached(place, out) => return Ok(false),
                Mode::Cached => {}
                Mode::Wait => self.read_piece(piece, place, out)?,
            }
            let crcs = &plan.crcs[piece.at..][..piece.count];
            if let Some(bad) = crate::check::first_mismatch(out, crcs) {
                let block = piece.block + bad as u16;
                return Err(ReadError::Checksum { key: piece.key, block });
            }
        }
        Ok(true)
    }

    fn read_piece(&self, piece: &Piece, place: Place, out: &mut [u8]) -> Result<(), ReadError> {
        let Err(mut source) = self.read_place(place, out) else { return Ok(()) };
        let mut bad = piece.block;
        // Name the block that cannot be read, not the run it is in.
        for (block, out) in (piece.block..).zip(out.chunks_exact_mut(BLOCK_SIZE)) {
            let at = u64::from(block - piece.block) * BLOCK_SIZE as u64;
            let place = match place {
                Place::Log(lsn) => Place::Log(lsn + at),
                Place::Slab(offset) => Place::Slab(offset + at),
            };
            if let Err(error) = self.read_place(place, out) {
                (bad, source) = (block, error);
                break;
            }
        }
        Err(ReadError::Io { key: piece.key, block: bad, source })
    }

    pub(crate) fn read_place(&self, place: Place, out: &mut [u8]) -> io::Result<()> {
        match place {
            Place::Log(lsn) => self.ring.read(out, lsn),
            Place::Slab(offset) => self.files.data.read_at(out, offset),
        }
    }

    fn read_cached(&self, place: Place, out: &mut [u8]) -> bool {
        let read = match place {
            Place::Log(lsn) => self.ring.read_cached(out, lsn),
            Place::Slab(offset) => self.files.data.read_cached(out, offset),
        };
        // What cannot be read at all is found out by whoever waits for it.
        matches!(read, Ok(true))
    }

    /// See [`crate::Store::block_states`].
    pub(crate) fn block_states(
        &self,
        object: ObjectId,
        chain: &[Layer],
        range: BlockRange,
    ) -> Vec<BlockRun> {
        let shard = self.table.shard_of(object);
        let links = chain_of(&shard, object, chain);
        runs(range, |block| {
            resolve(&links, block).map_or(BlockState::Absent, |(_, located)| located.state())
        })
    }

    /// See [`crate::Store::stat`].
    pub(crate) fn stat(&self, key: LayerKey) -> Option<LayerStat> {
        let shard = self.table.shard_of(key.object);
        shard.get(key).filter(|layer| layer.exists()).map(|layer| layer.stat(key))
    }

    /// See [`crate::Store::stat_object`].
    pub(crate) fn stat_object(&self, object: ObjectId) -> Vec<LayerStat> {
        let shard = self.table.shard_of(object);
        let layers = shard.layers(object).filter(|(_, layer)| layer.exists());
        layers.map(|(key, layer)| layer.stat(key)).collect()
    }

    /// See [`crate::Store::sums`].
    pub(crate) fn sums(&self, key: LayerKey) -> Result<Option<LayerSums>, ReadError> {
        self.fetch_layer(key, |_, sums| Ok(Some(sums)))
    }

    /// See [`crate::Store::image`].
    pub(crate) fn image(&self, key: LayerKey) -> Result<Option<LayerImage>, ReadError> {
        self.fetch_layer(key, |plan, sums| {
            let mut data = vec![0; plan.crcs.len() * BLOCK_SIZE];
            self.read_pieces(Mode::Wait, plan, &mut data)?;
            Ok(Some(LayerImage { sums, data }))
        })
    }

    /// See [`crate::Store::part`].
    pub(crate) fn part(
        &self,
        key: LayerKey,
        version: Version,
        blocks: &[BlockRange],
    ) -> Result<Option<LayerPart>, ReadError> {
        if blocks.windows(2).any(|pair| pair[0].end() > pair[1].first()) {
            return Err(ReadError::Invalid("ranges that overlap or are out of order"));
        }
        let part = self.fetch(
            Mode::Wait,
            key.object,
            |shard, loaded| match shard.get(key).filter(|layer| layer.version == version) {
                Some(layer) => {
                    let wanted = blocks.iter().flat_map(|range| range.blocks());
                    Ok((plan_blocks(shard, loaded, key, layer, wanted)?, true))
                }
                None => Ok((Plan::default(), false)),
            },
            |plan, found| {
                let mut data = vec![0; plan.crcs.len() * BLOCK_SIZE];
                self.read_pieces(Mode::Wait, plan, &mut data)?;
                Ok(Some(found.then(|| LayerPart { crcs: plan.crcs.to_vec(), data })))
            },
        )?;
        let part = part.flatten();
        let count = blocks.iter().map(|range| usize::from(range.count())).sum();
        match &part {
            Some(part) if part.crcs.len() != count => {
                Err(ReadError::Invalid("blocks that hold no data"))
            }
            _ => Ok(part),
        }
    }

    fn fetch_layer<R>(
        &self,
        key: LayerKey,
        carry_out: impl Fn(&Plan, LayerSums) -> Result<Option<R>, ReadError>,
    ) -> Result<Option<R>, ReadError> {
        self.fetch(
            Mode::Wait,
            key.object,
            |shard, loaded| match shard.get(key).filter(|layer| layer.exists()) {
                Some(layer) => {
                    let (sums, plan) = plan_image(shard, loaded, key, layer)?;
                    Ok((plan, Some(sums)))
                }
                None => Ok((Plan::default(), None)),
            },
            |plan, sums| sums.map_or(Ok(None), |sums| carry_out(plan, sums)),
        )
    }
}

pub(crate) fn plan_read(
    shard: &Shard,
    loaded: &Loaded,
    newest: LayerKey,
    chain: &[Layer],
    range: BlockRange,
) -> Result<(Plan, ReadOutcome), Wanted> {
    let mut links = chain_of(shard, newest.object, chain);
    let mut plan = Plan::default();
    let mut outcome = ReadOutcome { version: shard.version(newest), absent: 0 };
    for block in range.first()..range.end() {
        let found = resolve(&links, block);
        outcome.absent += u16::from(found.is_none());
        match found {
            Some((at, Located::Data { crc, place })) => {
                plan.push(links[at].key, block, crc, Some(place));
            }
            Some((at, Located::Base { offset })) => {
                let crc = links[at].crc(shard, loaded, block)?;
                plan.push(links[at].key, block, crc, Some(Place::Slab(offset)));
            }
            _ => plan.push(newest, block, ZERO_CRC, None),
        }
    }
    Ok((plan, outcome))
}

/// What an image of `layer` holds and where its data is.
fn plan_image(
    shard: &Shard,
    loaded: &Loaded,
    key: LayerKey,
    layer: &LayerState,
) -> Result<(LayerSums, Plan), Wanted> {
    let plan = plan_blocks(shard, loaded, key, layer, BlockRange::ALL.blocks())?;
    let mut runs = runs(BlockRange::ALL, |block| layer.locate(block).state());
    runs.retain(|run| run.state != BlockState::Absent);
    Ok((LayerSums { version: layer.version, runs, crcs: plan.crcs.to_vec() }, plan))
}

/// Where the data blocks among `blocks` are.
fn plan_blocks(
    shard: &Shard,
    loaded: &Loaded,
    key: LayerKey,
    layer: &LayerState,
    blocks: impl Iterator<Item = u16>,
) -> Result<Plan, Wanted> {
    let mut plan = Plan::default();
    let mut link = Link { key, layer, sums: None };
    for block in blocks {
        match layer.locate(block) {
            Located::Data { crc, place } => plan.push(key, block, crc, Some(place)),
            Located::Base { offset } => {
                let crc = link.crc(shard, loaded, block)?;
                plan.push(key, block, crc, Some(Place::Slab(offset)));
            }
            Located::Absent | Located::Zero => {}
        }
    }
    Ok(plan)
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
