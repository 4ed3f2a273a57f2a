//! Blocks that say which write of which layer they are from, and the model of one layer.

use sheepdog_store::{
    BlockRange, BlockRun, BlockState, LayerImage, LayerPatch, LayerSums, ReadError, Store,
};
use sheepdog_types::{BLOCK_SIZE, BLOCKS_PER_OBJECT, LayerKey, Version, WriterGen, hash64};

use super::Rng;
use super::actor::Stopped;

const WORDS: usize = BLOCK_SIZE / 8;
/// Odd, so that all words of a block differ.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// Words of a block from its header: the header, then a sequence that depends on all of it.
fn fill(block: &mut [u8], header: [u64; 6]) {
    let start = header.into_iter().fold(0, |hash, word| hash64(hash ^ word));
    for (i, word) in block.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&start.wrapping_add(STEP.wrapping_mul(i as u64)).to_le_bytes());
    }
    for (word, value) in block.chunks_exact_mut(8).zip(header) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn header(seed: u64, key: LayerKey, version: Version, block: u16) -> [u64; 6] {
    let place = u64::from(key.object.index.0) << 32 | u64::from(key.layer.0);
    [seed, key.object.volume.0, place, version.writer.0, version.seq, u64::from(block)]
}

/// The bytes that the write `version` of a layer puts into the blocks from `first` on.
pub fn bytes_of(seed: u64, key: LayerKey, version: Version, blocks: &[u16]) -> Vec<u8> {
    let mut bytes = vec![0; blocks.len() * BLOCK_SIZE];
    for (out, block) in bytes.chunks_exact_mut(BLOCK_SIZE).zip(blocks) {
        fill(out, header(seed, key, version, *block));
    }
    bytes
}

/// Which write a block is from. Panics if it is not, in every byte, one of this layer and place.
pub fn identify(seed: u64, key: LayerKey, block: u16, bytes: &[u8]) -> Version {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    }
    let version = Version { writer: WriterGen(words[3]), seq: words[4] };
    let mut right = [0; BLOCK_SIZE];
    fill(&mut right, header(seed, key, version, block));
    if bytes != right {
        let wrong = bytes.iter().zip(&right).filter(|(a, b)| a != b).count();
        panic!(
            "block {block} of {key} is torn, foreign or damaged: {wrong} bytes differ from those \
             of version {version}, which it begins with; first words {:x?}",
            &words[..6]
        );
    }
    version
}

pub fn crcs_of(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(BLOCK_SIZE).map(crc32c::crc32c).collect()
}

/// What a layer knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    Absent,
    Zero,
    /// Written by this version.
    Data(Version),
}

impl Cell {
    pub fn state(self) -> BlockState {
        match self {
            Self::Absent => BlockState::Absent,
            Self::Zero => BlockState::Zero,
            Self::Data(_) => BlockState::Data,
        }
    }
}

/// What a change does to its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Write {
        first: u16,
        count: u16,
    },
    /// Of no block: only the version changes.
    Clear {
        first: u16,
        count: u16,
        absent: bool,
        release: bool,
    },
    /// Its content follows from seed, layer and version.
    Install,
    /// Some blocks, which follow from seed, layer and version, become others at once.
    Patch,
    Delete,
}

/// A change of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    pub key: LayerKey,
    /// The layer's version afterwards; none: deleted.
    pub version: Version,
    pub change: Change,
}

/// A layer as it should be, or as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerModel {
    /// None: there is no such layer.
    pub version: Version,
    pub cells: Vec<Cell>,
}

impl Default for LayerModel {
    fn default() -> Self {
        Self { version: Version::NONE, cells: vec![Cell::Absent; BLOCKS_PER_OBJECT] }
    }
}

impl LayerModel {
    pub fn exists(&self) -> bool {
        self.version != Version::NONE
    }

    pub fn apply(&mut self, seed: u64, op: &Op) {
        let range = |first: u16, count: u16| usize::from(first)..usize::from(first + count);
        match op.change {
            Change::Write { first, count } => {
                self.cells[range(first, count)].fill(Cell::Data(op.version));
            }
            Change::Clear { first, count, absent, .. } => {
                let cell = if absent { Cell::Absent } else { Cell::Zero };
                self.cells[range(first, count)].fill(cell);
            }
            Change::Install => self.cells = install_cells(seed, op.key, op.version),
            Change::Patch => patch_cells(seed, op.key, op.version, &mut self.cells),
            Change::Delete => self.cells.fill(Cell::Absent),
        }
        self.version = op.version;
    }

    pub fn data_blocks(&self) -> u64 {
        self.cells.iter().filter(|cell| matches!(cell, Cell::Data(_))).count() as u64
    }

    /// Reads a layer and looks at every byte of it. Fails only if the file system does.
    pub fn observe(store: &Store, seed: u64, key: LayerKey) -> Result<Self, Stopped> {
        let image = match store.image(key) {
            Ok(image) => image,
            Err(error @ ReadError::Io { .. }) => return Err(Stopped(error.to_string())),
            Err(error) => panic!("{error}"),
        };
        let Some(LayerImage { sums, data }) = image else { return Ok(Self::default()) };
        assert_eq!(sums.crcs, crcs_of(&data), "checksums of {key}");
        let mut found = Self { version: sums.version, ..Self::default() };
        let mut data = data.chunks_exact(BLOCK_SIZE);
        for run in &sums.runs {
            for block in run.range.first()..run.range.end() {
                found.cells[usize::from(block)] = match run.state {
                    BlockState::Absent => Cell::Absent,
                    BlockState::Zero => Cell::Zero,
                    BlockState::Data => {
                        let bytes = data.next().expect("bytes for each data block");
                        Cell::Data(identify(seed, key, block, bytes))
                    }
                };
            }
        }
        assert!(data.next().is_none(), "{key}: more bytes than data blocks");
        Ok(found)
    }
}

/// The blocks of an installed layer: runs of data, zeroes and nothing.
fn install_cells(seed: u64, key: LayerKey, version: Version) -> Vec<Cell> {
    let stream =
        header(seed, key, version, 0).into_iter().fold(7, |hash, word| hash64(hash ^ word));
    let mut rng = Rng::new(seed, stream);
    let mut cells = vec![Cell::Absent; BLOCKS_PER_OBJECT];
    let longest = [8, 40, 300, 3000][rng.below(4) as usize];
    let mut at = 0;
    while at < cells.len() {
        let cell = [Cell::Data(version), Cell::Zero, Cell::Absent, Cell::Absent];
        let cell = cell[rng.below(4) as usize];
        let end = cells.len().min(at + rng.between(1, longest) as usize);
        cells[at..end].fill(cell);
        at = end;
    }
    cells
}

/// What a patch to `version` makes of the blocks of a layer: most runs stay.
fn patch_cells(seed: u64, key: LayerKey, version: Version, cells: &mut [Cell]) {
    let stream =
        header(seed, key, version, 0).into_iter().fold(9, |hash, word| hash64(hash ^ word));
    let mut rng = Rng::new(seed, stream);
    let longest = [3, 30, 200][rng.below(3) as usize];
    let mut at = 0;
    while at < cells.len() {
        let end = cells.len().min(at + rng.between(1, longest) as usize);
        match rng.below(8) {
            0 => cells[at..end].fill(Cell::Data(version)),
            1 => cells[at..end].fill(Cell::Zero),
            2 => cells[at..end].fill(Cell::Absent),
            _ => {}
        }
        at = end;
    }
}

/// The patch that makes a layer that is as `old` what it is at `version`: it carries what is new,
/// and of the rest the checksums only.
pub fn patch(seed: u64, key: LayerKey, version: Version, old: &LayerModel) -> LayerPatch {
    let mut cells = old.cells.clone();
    patch_cells(seed, key, version, &mut cells);
    let new: Vec<_> = blocks_where(&cells, |cell| cell == Cell::Data(version));
    let crc = |block: u16| match cells[usize::from(block)] {
        Cell::Data(written) => crcs_of(&bytes_of(seed, key, written, &[block])),
        _ => Vec::new(),
    };
    let crcs = (0..BLOCKS_PER_OBJECT as u16).flat_map(crc).collect();
    LayerPatch {
        sums: LayerSums { version, runs: runs_of(&cells), crcs },
        blocks: BlockRange::of_blocks(new.iter().copied()),
        data: bytes_of(seed, key, version, &new),
    }
}

fn blocks_where(cells: &[Cell], wanted: impl Fn(Cell) -> bool) -> Vec<u16> {
    let blocks = (0..).zip(cells).filter(|(_, cell)| wanted(**cell));
    blocks.map(|(block, _)| block).collect()
}

/// The runs of blocks that are not absent.
fn runs_of(cells: &[Cell]) -> Vec<BlockRun> {
    let mut runs = Vec::new();
    let mut at = 0;
    for run in cells.chunk_by(|a, b| a.state() == b.state()) {
        let range = BlockRange::new(at, run.len()).expect("inside an object");
        runs.push(BlockRun { range, state: run[0].state() });
        at = range.end();
    }
    runs.retain(|run| run.state != BlockState::Absent);
    runs
}

/// The image that an install of `version` puts in place.
pub fn install_image(seed: u64, key: LayerKey, version: Version) -> LayerImage {
    let cells = install_cells(seed, key, version);
    let blocks = blocks_where(&cells, |cell| matches!(cell, Cell::Data(_)));
    let data = bytes_of(seed, key, version, &blocks);
    LayerImage { sums: LayerSums { version, runs: runs_of(&cells), crcs: crcs_of(&data) }, data }
}
