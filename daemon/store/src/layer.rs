//! One object layer in memory: what is in the slab, overlaid by what is in the log only.
//!
//! ```text
//!   live     changes since the running (or next) checkpoint began
//!   frozen   changes that the running checkpoint is applying          (their log is durable)
//!   base     what the last checkpoint committed                       (in the slab)
//! ```
//! The newest that says something of a block decides. A `reset` overlay (delete, install) hides
//! all below it. The bytes of a changed block are in the log or, if they were written directly or
//! came from another layer by a merge, in a slab.

use std::sync::Arc;

use sheepdog_types::{BLOCK_SIZE, LayerKey, OBJECT_SIZE, Version};

use crate::api::{BlockState, LayerStat};
use crate::states::CompactStates;

/// Where the bytes of a data block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At this LSN of the log.
    Log(u64),
    /// At this offset of the data file.
    Slab(u64),
}

/// A [`Place`] in eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackedPlace(u64);

impl PackedPlace {
    const SLAB: u64 = 1 << 63;

    pub(crate) fn unpack(self) -> Place {
        if self.0 & Self::SLAB == 0 {
            Place::Log(self.0)
        } else {
            Place::Slab(self.0 & !Self::SLAB)
        }
    }
}

impl From<Place> for PackedPlace {
    fn from(place: Place) -> Self {
        match place {
            Place::Log(lsn) => Self(lsn),
            Place::Slab(offset) => Self(offset | Self::SLAB),
        }
    }
}

/// A block as the layer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Located {
    Absent,
    Zero,
    Data {
        crc: u32,
        place: Place,
    },
    /// Data in the slab at this offset, its checksum in the committed table.
    Base {
        offset: u64,
    },
}

impl Located {
    pub(crate) fn state(self) -> BlockState {
        match self {
            Self::Absent => BlockState::Absent,
            Self::Zero => BlockState::Zero,
            Self::Data { .. } | Self::Base { .. } => BlockState::Data,
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
    /// Of a data block.
    pub(crate) place: PackedPlace,
}

impl Entry {
    pub(crate) fn located(&self) -> Located {
        match self.state {
            BlockState::Absent => Located::Absent,
            BlockState::Zero => Located::Zero,
            BlockState::Data => Located::Data { crc: self.crc, place: self.place.unpack() },
        }
    }
}

/// A slab that its layer left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropped {
    pub(crate) slab: SlabRef,
    /// Another layer's blocks are still read from it: it must stay until the commit.
    pub(crate) keep: bool,
}

/// Changes of a layer since some checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    /// The checkpoint it belongs to.
    pub(crate) generation: u64,
    /// Nothing below counts.
    pub(crate) reset: bool,
    /// Where the changes go; none if the layer is deleted.
    pub(crate) slab: Option<SlabRef>,
    /// The layer's version with these changes; [`Version::NONE`]: deleted.
    pub(crate) version: Version,
    /// Ascending by block, each block once.
    pub(crate) entries: Vec<Entry>,
    pub(crate) dropped: Vec<Dropped>,
}

impl Overlay {
    pub(crate) fn find(&self, block: u16) -> Option<&Entry> {
        let at = self.entries.binary_search_by_key(&block, |entry| entry.block).ok()?;
        Some(&self.entries[at])
    }

    fn touches(&self, first: u16, end: u16) -> bool {
        let at = self.entries.partition_point(|entry| entry.block < first);
        self.entries.get(at).is_some_and(|entry| entry.block < end)
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
        self.slab = newer.slab;
        self.dropped.extend(newer.dropped);
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
    /// Part of the committed record in the index digest; 0 if there is none.
    pub(crate) hash: u64,
}

impl SlabRef {
    /// A slab without a committed record. Slot 1 counts as the one in use, so that slot 0 is
    /// written first.
    pub(crate) fn unused(slab: u32) -> Self {
        Self { slab, slot: 1, hash: 0 }
    }

    /// Offset of `block` in the data file.
    pub(crate) fn offset(&self, block: u16) -> u64 {
        u64::from(self.slab) * OBJECT_SIZE + u64::from(block) * BLOCK_SIZE as u64
    }

    /// The same slab with the other record counting.
    pub(crate) fn flipped(&self, hash: u64) -> Self {
        Self { slab: self.slab, slot: 1 - self.slot, hash }
    }
}

/// What a checkpoint committed of a layer. The checksums are in `sums`.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    pub(crate) slab: SlabRef,
    /// Checksum of the checksum table.
    pub(crate) sums_crc: u32,
    pub(crate) states: CompactStates,
}

/// One object layer.
#[derive(Debug, Default)]
pub(crate) struct LayerState {
    /// Of the newest change; [`Version::NONE`] while a deleted layer waits for a checkpoint.
    pub(crate) version: Version,
    pub(crate) data_blocks: u16,
    pub(crate) zero_blocks: u16,
    pub(crate) live: Option<Box<Overlay>>,
    pub(crate) frozen: Option<Arc<Overlay>>,
    pub(crate) base: Option<Base>,
}

impl LayerState {
    pub(crate) fn exists(&self) -> bool {
        self.version != Version::NONE
    }

    /// Deleted, and nothing of it is left to apply.
    pub(crate) fn is_gone(&self) -> bool {
        !self.exists() && self.live.is_none() && self.frozen.is_none() && self.base.is_none()
    }

    pub(crate) fn stat(&self, key: LayerKey) -> LayerStat {
        LayerStat {
            key,
            version: self.version,
            data_blocks: self.data_blocks,
            zero_blocks: self.zero_blocks,
        }
    }

    /// The slab that new changes go to; none if the layer does not exist.
    pub(crate) fn slab(&self) -> Option<SlabRef> {
        match (&self.live, &self.frozen) {
            (Some(live), _) => live.slab,
            (None, Some(frozen)) => frozen.slab,
            (None, None) => self.base.as_ref().map(|base| base.slab),
        }
    }

    fn overlays(&self) -> impl Iterator<Item = &Overlay> {
        [self.live.as_deref(), self.frozen.as_deref()].into_iter().flatten()
    }

    /// Whether a checkpoint is applying, or is about to apply, changes of a generation before.
    pub(crate) fn has_changes_before(&self, generation: u64) -> bool {
        self.frozen.is_some() || self.live.as_ref().is_some_and(|live| live.generation < generation)
    }

    /// The committed content, unless an overlay hides all of it.
    pub(crate) fn visible_base(&self) -> Option<&Base> {
        if self.overlays().any(|overlay| overlay.reset) { None } else { self.base.as_ref() }
    }

    pub(crate) fn locate(&self, block: u16) -> Located {
        for overlay in self.overlays() {
            if let Some(entry) = overlay.find(block) {
                return entry.located();
            }
            if overlay.reset {
                return Located::Absent;
            }
        }
        let Some(base) = &self.base else { return Located::Absent };
        match base.states.get(block) {
            BlockState::Absent => Located::Absent,
            BlockState::Zero => Located::Zero,
            BlockState::Data => Located::Base { offset: base.slab.offset(block) },
        }
    }

    /// Whether bytes for `first..end` may go straight to the slab: it holds nothing there that the
    /// last checkpoint committed, and no change waits that a checkpoint would write or punch there.
    pub(crate) fn takes_direct(&self, first: u16, end: u16) -> bool {
        for overlay in self.overlays() {
            if overlay.touches(first, end) {
                return false;
            }
            if overlay.reset {
                return true;
            }
        }
        self.base
            .as_ref()
            .is_none_or(|base| (first..end).all(|block| base.states.get(block) != BlockState::Data))
    }

    /// The overlay that takes changes of `generation`, and whether it was made just now.
    fn live_mut(&mut self, generation: u64) -> (&mut Overlay, bool) {
        self.freeze_before(generation);
        let fresh = self.live.is_none();
        let (version, slab) = (self.version, self.slab());
        let overlay = self.live.get_or_insert_with(|| {
            Box::new(Overlay {
                generation,
                reset: false,
                slab,
                version,
                entries: Vec::new(),
                dropped: Vec::new(),
            })
        });
        (overlay, fresh)
    }

    /// Hands changes of older generations to the checkpoint. There is at most one running, and it
    /// began all older generations, so `frozen` is free then.
    pub(crate) fn freeze_before(&mut self, generation: u64) {
        if self.live.as_ref().is_some_and(|live| live.generation < generation) {
            debug_assert!(self.frozen.is_none(), "one checkpoint at a time");
            self.frozen = self.live.take().map(|live| Arc::new(*live));
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
            merged.merge(*newer);
        }
        self.live = Some(Box::new(merged));
        alone
    }

    /// The slab's other index record counts now.
    pub(crate) fn slab_committed(&mut self, slab: SlabRef) {
        let Some(live) = &mut self.live else { return };
        let refs = live.slab.iter_mut().chain(live.dropped.iter_mut().map(|d| &mut d.slab));
        refs.filter(|known| known.slab == slab.slab).for_each(|known| *known = slab);
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

    /// Changes the blocks `first..end` to `entries`, all in the state `state`; `slab` is what the
    /// layer has, or gets if it is new. True if the layer
    /// had no change of this generation before.
    pub(crate) fn change(
        &mut self,
        generation: u64,
        (version, slab): (Version, SlabRef),
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
        let (live, fresh) = self.live_mut(generation);
        live.version = version;
        // Of a slab that the layer has, a checkpoint may know more than the caller.
        live.slab.get_or_insert(slab);
        live.splice(first, end, entries);
        self.version = version;
        fresh
    }

    /// Takes up blocks that were absent until now. True as in [`LayerState::change`].
    pub(crate) fn absorb(&mut self, generation: u64, entries: &[Entry]) -> bool {
        for entry in entries {
            match entry.state {
                BlockState::Data => self.data_blocks += 1,
                BlockState::Zero => self.zero_blocks += 1,
                BlockState::Absent => {}
            }
        }
        let (live, fresh) = self.live_mut(generation);
        for entry in entries {
            live.splice(entry.block, entry.block + 1, std::iter::once(*entry));
        }
        fresh
    }

    /// Changes the blocks of `entries`, ascending, of a layer that exists. True as in
    /// [`LayerState::change`].
    pub(crate) fn patch(&mut self, generation: u64, version: Version, entries: &[Entry]) -> bool {
        for entry in entries {
            let (data, zero) = self.count_in(entry.block, entry.block + 1);
            self.data_blocks -= data;
            self.zero_blocks -= zero;
            match entry.state {
                BlockState::Data => self.data_blocks += 1,
                BlockState::Zero => self.zero_blocks += 1,
                BlockState::Absent => {}
            }
        }
        let (live, fresh) = self.live_mut(generation);
        live.version = version;
        for run in entries.chunk_by(|a, b| a.block + 1 == b.block) {
            live.splice(run[0].block, run[0].block + run.len() as u16, run.iter().copied());
        }
        self.version = version;
        fresh
    }

    /// Replaces the whole content, which goes to another slab; [`Version::NONE`] deletes. `keep` is
    /// that of the old slab's [`Dropped`]. True as in [`LayerState::change`].
    pub(crate) fn replace(
        &mut self,
        generation: u64,
        (version, slab): (Version, Option<SlabRef>),
        keep: bool,
        entries: Vec<Entry>,
    ) -> bool {
        let count = |state| entries.iter().filter(|entry| entry.state == state).count() as u16;
        self.data_blocks = count(BlockState::Data);
        self.zero_blocks = count(BlockState::Zero);
        let old = self.slab();
        let (live, fresh) = self.live_mut(generation);
        live.dropped.extend(old.map(|slab| Dropped { slab, keep }));
        (live.reset, live.slab, live.version, live.entries) = (true, slab, version, entries);
        self.version = version;
        fresh
    }
}
