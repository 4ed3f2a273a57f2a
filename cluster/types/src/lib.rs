//! Ids, units and the [`Block`] trait: the vocabulary that every other crate shares.
//!
//! This crate depends on nothing but the standard library, does no I/O, and reads no clock.

#![forbid(unsafe_code)]

mod block;
mod id;
mod size;

pub use block::{
    Block, BlockError, BlockInfo, Burst, Completion, Done, MAX_REQUEST_BYTES, Op, Request, Sink,
    Token,
};
pub use id::{
    ClusterId, DiskId, Epoch, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, SlotId, Version,
    VolumeId, WriterGen, hash64,
};
pub use size::{ParseSizeError, format_size, parse_size};

/// Bytes in one block, the unit of checksums and of space accounting.
pub const BLOCK_SIZE: usize = 4096;
/// Blocks in one object.
pub const BLOCKS_PER_OBJECT: usize = 1024;
/// Bytes in one object (4 MiB), the unit of placement.
pub const OBJECT_SIZE: u64 = (BLOCK_SIZE * BLOCKS_PER_OBJECT) as u64;
/// Slots in the hash space; all objects of a slot share their replica set.
pub const SLOTS: usize = 1 << 16;
/// Largest volume: 2^32 objects of 4 MiB, 16 PiB.
pub const MAX_VOLUME_SIZE: u64 = OBJECT_SIZE << 32;
