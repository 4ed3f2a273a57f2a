//! Checks of what callers hand in, before any lock is taken.

use std::collections::BTreeMap;

use sheepdog_types::{BLOCK_SIZE, Version};

use crate::api::{BlockRange, BlockState, LayerImage, LayerPatch, LayerSums, Payload};
use crate::error::WriteError;
use crate::states::States;

/// A write whose range is inside the object and whose bytes match their checksums.
pub(crate) struct CheckedWrite<'a> {
    pub(crate) range: BlockRange,
    /// Empty if the blocks are cleared, or there are none.
    pub(crate) crcs: &'a [u32],
    pub(crate) bytes: &'a [u8],
}

impl<'a> CheckedWrite<'a> {
    pub(crate) fn new(first: u16, payload: Payload<'a>) -> Result<Self, WriteError> {
        let (count, crcs, bytes): (usize, &[u32], &[u8]) = match payload {
            Payload::Data { bytes, crcs } => (crcs.len(), crcs, bytes),
            Payload::Zero { count, .. } => (usize::from(count), &[], &[]),
            Payload::Nothing => return Ok(Self { range: BlockRange::NONE, crcs: &[], bytes: &[] }),
        };
        let range = BlockRange::new(first, count)
            .ok_or(WriteError::Invalid("no blocks, or blocks past the object's end"))?;
        if bytes.len() != crcs.len() * BLOCK_SIZE {
            return Err(WriteError::Invalid("not one checksum for each block"));
        }
        match first_mismatch(bytes, crcs) {
            Some(at) => Err(WriteError::Checksum { block: first + at as u16 }),
            None => Ok(Self { range, crcs, bytes }),
        }
    }
}

/// The first block of `bytes` that does not match its checksum.
pub(crate) fn first_mismatch(bytes: &[u8], crcs: &[u32]) -> Option<usize> {
    bytes.chunks_exact(BLOCK_SIZE).zip(crcs).position(|(block, &crc)| crc32c::crc32c(block) != crc)
}

/// What a layer is by its sums.
pub(crate) struct Picture {
    pub(crate) states: States,
    /// The data blocks, ascending, and their checksums.
    pub(crate) blocks: Vec<(u16, u32)>,
}

impl Picture {
    /// Checks that sums are consistent in themselves.
    pub(crate) fn of(sums: &LayerSums) -> Result<Self, WriteError> {
        if sums.version == Version::NONE {
            return Err(WriteError::Invalid("a layer without a version"));
        }
        let mut end = 0;
        let mut states = States::default();
        for run in &sums.runs {
            if run.range.first() < end {
                return Err(WriteError::Invalid("the layer's runs overlap or are out of order"));
            }
            end = run.range.end();
            run.range.blocks().for_each(|block| states.set(block, run.state));
        }
        if usize::from(states.data_blocks()) != sums.crcs.len() {
            return Err(WriteError::Invalid("the layer's runs and checksums do not agree"));
        }
        let blocks = states.blocks(BlockState::Data).zip(sums.crcs.iter().copied()).collect();
        Ok(Self { states, blocks })
    }
}

/// Checks that an image is consistent in itself and undamaged; gives its block states.
pub(crate) fn image(image: &LayerImage) -> Result<States, WriteError> {
    let picture = Picture::of(&image.sums)?;
    if picture.blocks.len() * BLOCK_SIZE != image.data.len() {
        return Err(WriteError::Invalid("the image's checksums and data do not agree"));
    }
    match first_mismatch(&image.data, &image.sums.crcs) {
        Some(at) => Err(WriteError::Checksum { block: picture.blocks[at].0 }),
        None => Ok(picture.states),
    }
}

/// Checks that a patch is consistent in itself and undamaged; gives what the layer is afterwards,
/// and the checksum of each block that is given.
pub(crate) fn patch(patch: &LayerPatch) -> Result<(Picture, BTreeMap<u16, u32>), WriteError> {
    let picture = Picture::of(&patch.sums)?;
    if patch.blocks.windows(2).any(|pair| pair[0].end() > pair[1].first()) {
        return Err(WriteError::Invalid("the patch's blocks overlap or are out of order"));
    }
    let mut given = BTreeMap::new();
    let mut bytes = patch.data.chunks_exact(BLOCK_SIZE);
    for block in patch.blocks.iter().flat_map(|range| range.blocks()) {
        let at = picture.blocks.binary_search_by_key(&block, |(block, _)| *block);
        let (Ok(at), Some(bytes)) = (at, bytes.next()) else {
            return Err(WriteError::Invalid("the patch's blocks and data do not agree"));
        };
        let crc = picture.blocks[at].1;
        if crc32c::crc32c(bytes) != crc {
            return Err(WriteError::Checksum { block });
        }
        given.insert(block, crc);
    }
    if given.len() * BLOCK_SIZE != patch.data.len() {
        return Err(WriteError::Invalid("the patch's blocks and data do not agree"));
    }
    Ok((picture, given))
}

/// `crcs` as bytes, in `small` if they fit.
pub(crate) fn crc_bytes<'a>(
    crcs: &[u32],
    small: &'a mut [u8; 128],
    large: &'a mut Vec<u8>,
) -> &'a [u8] {
    if crcs.len() * 4 > small.len() {
        crate::format::crcs_to_bytes(crcs, large);
        return large;
    }
    for (bytes, crc) in small.chunks_exact_mut(4).zip(crcs) {
        bytes.copy_from_slice(&crc.to_le_bytes());
    }
    &small[..crcs.len() * 4]
}
