//! One object layer in memory: what is in the slab, overlaid by what is in the log only.
//!
//! ```text
//!   live     changes since the running (or next) checkpoint began    ── in the log
//!   frozen   changes that the running checkpoint is applying         ── in the log, durable
//!   base     what the last checkpoint committed                      ── in the slab
//! ```
//! The newest that says something of a block decides. A `reset` overlay (delete, install) hides
//! all below it.

use std::sync::Arc;

use sheepdog_types::{BLOCK_SIZE, BLOCKS_PER_OBJECT, LayerKey, OBJECT_SIZE, Version};

use crate::api::{BlockState, LayerStat};
use crate::states::States;

/// Where the bytes of a data block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At this LSN of the log.
    Log(u64),
    /// At this offset of the data file.
    Slab(u64),
}

/// A block as the layer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    Absent,
    Zero,
    Data { crc: u32, place: Place },
}

impl Located {
    pub(crate) fn state(self) -> BlockState {
        match self {
            Self::Absent => BlockState::Absent,
            Self::Zero => BlockState::Zero,
            Self::Data { .. } => BlockState::Data,
        }
    }
}

/// A changed block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) block: u16,
    pub(crate) state: BlockState,
    /// Of a cleared block: give its space back.
    pub(crate) release: bool,
    pub(crate) crc: u32,
    /// LSN of the bytes of a data block.
    pub(crate) lsn: u64,
}

/// Changes of a layer since some checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    /// The checkpoint it belongs to.
    pub(crate) generation: u64,
    /// Nothing below counts.
    pub(crate) reset: bool,
    /// The layer's version with these changes; [`Version::NONE`]: deleted.
    pub(crate) version: Version,
    /// Ascending by block, each block once.
    pub(crate) entries: Vec<Entry>,
}

impl Overlay {
    pub(crate) fn find(&self, block: u16) -> Option<&Entry> {
        let at = self.entries.binary_search_by_key(&block, |entry| entry.block).ok()?;
        Some(&self.entries[at])
    }

    /// Replaces what is said of the blocks `first..end` by `new`, which covers just those.
    fn splice(&mut self, first: u16, end: u16, new: impl Iterator<Item = Entry>) {
        if self.entries.last().is_none_or(|last| last.block < first) {
            self.entries.extend(new);
            return;
        }
        let from = self.entries.partition_point(|entry| entry.block < first);
        let to = self.entries.partition_point(|entry| entry.block < end);
        self.entries.splice(from..to, new);
    }

    /// Puts `newer` on top of this.
    fn merge(&mut self, newer: Self) {
        self.version = newer.version;
        self.generation = newer.generation;
        if newer.reset {
            self.reset = true;
            self.entries = newer.entries;
            return;
        }
        for entry in newer.entries {
            self.splice(entry.block, entry.block + 1, std::iter::once(entry));
        }
    }
}

/// Where a slab is and which of its two index records counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlabRef {
    pub(crate) slab: u32,
    /// 0 or 1: the committed index record and checksum table.
    pub(crate) slot: u8,
    /// Part of the committed record in the index digest; 0 if the slab was never used.
    pub(crate) hash: u64,
}

impl SlabRef {
    /// Offset of `block` in the data file.
    pub(crate) fn offset(&self, block: u16) -> u64 {
        u64::from(self.slab) * OBJECT_SIZE + u64::from(block) * BLOCK_SIZE as u64
    }
}

/// What a checkpoint committed of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    pub(crate) slab: SlabRef,
    pub(crate) content: Content,
}

/// States and checksums of all blocks of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Content {
    pub(crate) states: Box<States>,
    pub(crate) crcs: Box<[u32; BLOCKS_PER_OBJECT]>,
}

impl Default for Content {
    fn default() -> Self {
        Self { states: Box::default(), crcs: Box::new([0; BLOCKS_PER_OBJECT]) }
    }
}

impl Content {
    /// The content after `overlay`.
    pub(crate) fn apply(&mut self, overlay: &Overlay) {
        if overlay.reset {
            *self.states = States::default();
            self.crcs.fill(0);
        }
        for entry in &overlay.entries {
            self.states.set(entry.block, entry.state);
            self.crcs[usize::from(entry.block)] = entry.crc;
        }
    }
}

/// One object layer.
#[derive(Debug)]
pub(crate) struct LayerState {
    pub(crate) key: LayerKey,
    /// Of the newest change; [`Version::NONE`] while a deleted layer waits for a checkpoint.
    pub(crate) version: Version,
    pub(crate) data_blocks: u16,
    pub(crate) zero_blocks: u16,
    pub(crate) live: Option<Overlay>,
    pub(crate) frozen: Option<Arc<Overlay>>,
    pub(crate) base: Option<Base>,
}

impl LayerState {
    pub(crate) fn new(key: LayerKey) -> Self {
        Self {
            key,
            version: Version::NONE,
            data_blocks: 0,
            zero_blocks: 0,
            live: None,
            frozen: None,
            base: None,
        }
    }

    pub(crate) fn exists(&self) -> bool {
        self.version != Version::NONE
    }

    pub(crate) fn stat(&self) -> LayerStat {
        LayerStat {
            key: self.key,
            version: self.version,
            data_blocks: self.data_blocks,
            zero_blocks: self.zero_blocks,
        }
    }

    pub(crate) fn locate(&self, block: u16) -> Located {
        for overlay in [self.live.as_ref(), self.frozen.as_deref()].into_iter().flatten() {
            if let Some(entry) = overlay.find(block) {
                return match entry.state {
                    BlockState::Absent => Located::Absent,
                    BlockState::Zero => Located::Zero,
                    BlockState::Data => {
                        Located::Data { crc: entry.crc, place: Place::Log(entry.lsn) }
                    }
                };
            }
            if overlay.reset {
                return Located::Absent;
            }
        }
        let Some(base) = &self.base else { return Located::Absent };
        match base.content.states.get(block) {
            BlockState::Absent => Located::Absent,
            BlockState::Zero => Located::Zero,
            BlockState::Data => Located::Data {
                crc: base.content.crcs[usize::from(block)],
                place: Place::Slab(base.slab.offset(block)),
            },
        }
    }

    /// The overlay that takes changes of `generation`, and whether it was made just now.
    fn live_mut(&mut self, generation: u64) -> (&mut Overlay, bool) {
        self.freeze_before(generation);
        let fresh = self.live.is_none();
        let version = self.version;
        let overlay = self.live.get_or_insert_with(|| Overlay {
            generation,
            reset: false,
            version,
            entries: Vec::new(),
        });
        (overlay, fresh)
    }

    /// Hands changes of older generations to the checkpoint. There is at most one running, and it
    /// began all older generations, so `frozen` is free then.
    pub(crate) fn freeze_before(&mut self, generation: u64) {
        if self.live.as_ref().is_some_and(|live| live.generation < generation) {
            debug_assert!(self.frozen.is_none(), "one checkpoint at a time");
            self.frozen = self.live.take().map(Arc::new);
        }
    }

    /// Takes the changes back from a checkpoint that failed; true if no live ones were there.
    pub(crate) fn unfreeze(&mut self, generation: u64) -> bool {
        let Some(frozen) = self.frozen.take() else { return false };
        let mut merged = Arc::unwrap_or_clone(frozen);
        merged.generation = generation;
        let newer = self.live.take();
        let alone = newer.is_none();
        if let Some(newer) = newer {
            merged.merge(newer);
        }
        self.live = Some(merged);
        alone
    }

    /// Blocks of `first..end` that hold data now.
    pub(crate) fn data_in(&self, first: u16, end: u16) -> u16 {
        self.count_in(first, end).0
    }

    /// Data and zero blocks in `first..end`.
    fn count_in(&self, first: u16, end: u16) -> (u16, u16) {
        let states = (first..end).map(|block| self.locate(block).state());
        states.fold((0, 0), |(data, zero), state| match state {
            BlockState::Absent => (data, zero),
            BlockState::Data => (data + 1, zero),
            BlockState::Zero => (data, zero + 1),
        })
    }

    /// Changes the blocks `first..end` to `entries`, all in the state `state`. True if the layer
    /// had no change of this generation before.
    pub(crate) fn change(
        &mut self,
        generation: u64,
        version: Version,
        (first, end, state): (u16, u16, BlockState),
        entries: impl Iterator<Item = Entry>,
    ) -> bool {
        let (data, zero) = self.count_in(first, end);
        self.data_blocks -= data;
        self.zero_blocks -= zero;
        match state {
            BlockState::Data => self.data_blocks += end - first,
            BlockState::Zero => self.zero_blocks += end - first,
            BlockState::Absent => {}
        }
        self.version = version;
        let (live, fresh) = self.live_mut(generation);
        live.version = version;
        live.splice(first, end, entries);
        fresh
    }

    /// Replaces the whole content; [`Version::NONE`] deletes. True as in [`LayerState::change`].
    pub(crate) fn replace(
        &mut self,
        generation: u64,
        version: Version,
        entries: Vec<Entry>,
    ) -> bool {
        let count = |state| entries.iter().filter(|entry| entry.state == state).count() as u16;
        self.data_blocks = count(BlockState::Data);
        self.zero_blocks = count(BlockState::Zero);
        self.version = version;
        let (live, fresh) = self.live_mut(generation);
        *live = Overlay { generation, reset: true, version, entries };
        fresh
    }
}
