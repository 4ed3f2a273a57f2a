//! Checks of what callers hand in, before any lock is taken.

use sheepdog_types::{BLOCK_SIZE, Version};

use crate::api::{BlockRange, BlockState, LayerImage, Payload};
use crate::error::WriteError;
use crate::states::States;

/// A write whose range is inside the object and whose bytes match their checksums.
pub(crate) struct CheckedWrite<'a> {
    pub(crate) range: BlockRange,
    /// Empty if the blocks are cleared.
    pub(crate) crcs: &'a [u32],
    pub(crate) bytes: &'a [u8],
}

impl<'a> CheckedWrite<'a> {
    pub(crate) fn new(first: u16, payload: Payload<'a>) -> Result<Self, WriteError> {
        let (count, crcs, bytes): (usize, &[u32], &[u8]) = match payload {
            Payload::Data { bytes, crcs } => (crcs.len(), crcs, bytes),
            Payload::Zero { count, .. } => (usize::from(count), &[], &[]),
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

/// Checks that an image is consistent in itself and undamaged; gives its block states.
pub(crate) fn image(image: &LayerImage) -> Result<States, WriteError> {
    let sums = &image.sums;
    if sums.version == Version::NONE {
        return Err(WriteError::Invalid("an image without a version"));
    }
    let mut end = 0;
    let mut states = States::default();
    let mut blocks = Vec::with_capacity(sums.crcs.len().min(sheepdog_types::BLOCKS_PER_OBJECT));
    for run in &sums.runs {
        if run.range.first() < end {
            return Err(WriteError::Invalid("the image's runs overlap or are out of order"));
        }
        end = run.range.end();
        (run.range.first()..end).for_each(|block| states.set(block, run.state));
        if run.state == BlockState::Data {
            blocks.extend(run.range.first()..end);
        }
    }
    if blocks.len() != sums.crcs.len() || blocks.len() * BLOCK_SIZE != image.data.len() {
        return Err(WriteError::Invalid("the image's runs, checksums and data do not agree"));
    }
    match first_mismatch(&image.data, &sums.crcs) {
        Some(at) => Err(WriteError::Checksum { block: blocks[at] }),
        None => Ok(states),
    }
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
