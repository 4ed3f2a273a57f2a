//! Applying the log: changes go to the slabs, index and checksum tables become durable, one mark
//! commits them all, the log is released.
//!
//! Until the mark is durable a crash leads back to the checkpoint before: its index records and
//! checksum tables are untouched (the other of two slots is written), and whatever was changed in
//! `data` is changed again by replaying the log, which was made durable first (I6).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use rustix::io::Errno;
use sheepdog_types::{BLOCK_SIZE, BLOCKS_PER_OBJECT, LayerKey, OBJECT_SIZE, Version};

use crate::api::BlockState;
use crate::engine::{Engine, Files, Stuck, lock};
use crate::format::{
    IndexRecord, IndexedLayer, Mark, SECTOR, SUPER_PART, crcs_to_bytes, slot_hash,
};
use crate::layer::{Base, Content, Overlay, SlabRef};

/// Bytes of a checksum table.
pub(crate) const SUMS_BYTES: usize = 4 * BLOCKS_PER_OBJECT;
/// `index` and `sums` grow by this many slabs at a time.
const GROW_SLABS: u64 = 64;
/// Largest copy from the log to a slab at once.
const COPY_BLOCKS: usize = 256;

/// Offset of an index record.
pub(crate) fn index_offset(slab: u32, slot: u8) -> u64 {
    (u64::from(slab) * 2 + u64::from(slot)) * SECTOR as u64
}

/// Offset of a checksum table.
pub(crate) fn sums_offset(slab: u32, slot: u8) -> u64 {
    (u64::from(slab) * 2 + u64::from(slot)) * SUMS_BYTES as u64
}

/// What checkpoints keep between each other.
pub(crate) struct Checkpointer {
    /// The last committed mark.
    pub(crate) mark: Mark,
    /// Free slabs below `next_slab`.
    pub(crate) free: Vec<SlabRef>,
    /// No slab from here on was ever used.
    pub(crate) next_slab: u32,
    /// Index records that an interrupted checkpoint left: erased before the next one commits.
    pub(crate) leftovers: Vec<(u32, u8)>,
    /// Data blocks in slabs.
    pub(crate) blocks: u64,
    /// Reused for copies.
    pub(crate) buf: Vec<u8>,
}

impl Checkpointer {
    /// A slab for a new layer; [`Checkpointer::free`] takes it back.
    fn allocate(&mut self, files: &Files) -> io::Result<SlabRef> {
        if let Some(slab) = self.free.pop() {
            return Ok(slab);
        }
        let slabs = (u64::from(self.next_slab) + 1).next_multiple_of(GROW_SLABS);
        files.index.allocate(slabs * 2 * SECTOR as u64)?;
        files.sums.allocate(slabs * 2 * SUMS_BYTES as u64)?;
        let slab = self.next_slab;
        self.next_slab = slab.checked_add(1).ok_or_else(|| io::Error::from(Errno::NOSPC))?;
        // Slot 1 counts as the committed one, so slot 0 is written first.
        Ok(SlabRef { slab, slot: 1, hash: 0 })
    }
}

/// The changes that a checkpoint applies.
struct Job {
    generation: u64,
    keys: Vec<LayerKey>,
    /// They are in the log before this LSN.
    to: u64,
}

/// A layer whose next index record is written but not committed.
struct Staged {
    key: LayerKey,
    /// The slab as committed; `None` if the layer came and went without ever having one.
    old: Option<SlabRef>,
    /// What the slab becomes.
    new: Option<SlabRef>,
    /// The slab was free before.
    fresh: bool,
    old_blocks: u16,
    new_blocks: u16,
}

impl Engine {
    /// Applies everything that is in the log now and releases it. After an error nothing is lost:
    /// the changes stay in the log and are taken up by the next call.
    pub(crate) fn checkpoint(&self) -> io::Result<()> {
        let mut checkpointer = lock(&self.checkpointer);
        let job = {
            let mut log = lock(&self.log);
            if log.dirty.is_empty() {
                return Ok(());
            }
            log.generation += 1;
            let keys = std::mem::take(&mut log.dirty);
            Job { generation: log.generation, keys, to: log.end }
        };
        let result = self.run(&mut checkpointer, &job);
        let stuck = result.as_ref().err().map(|error| self.give_back(&job, error));
        if stuck.is_none() {
            self.applied_to.store(job.to, SeqCst);
            self.update_limit(checkpointer.blocks);
        }
        let mut log = lock(&self.log);
        if stuck.is_none() {
            log.start = job.to;
        }
        *lock(&self.stuck) = stuck;
        self.room.notify_all();
        result
    }

    fn run(&self, checkpointer: &mut Checkpointer, job: &Job) -> io::Result<()> {
        self.sync_log().map_err(|error| io::Error::other(error.0.to_string()))?;
        self.erase_leftovers(checkpointer)?;
        let mut staged = Vec::with_capacity(job.keys.len());
        let result = self
            .stage_all(checkpointer, job, &mut staged)
            .and_then(|()| self.commit(checkpointer, job, &staged));
        match result {
            Ok(()) => self.publish(checkpointer, staged),
            Err(_) => {
                for new in staged.iter().filter_map(|staged| staged.new) {
                    checkpointer.leftovers.push((new.slab, new.slot));
                }
                let fresh = staged.iter().filter(|staged| staged.fresh);
                checkpointer.free.extend(fresh.filter_map(|staged| staged.old));
            }
        }
        result
    }

    /// Makes the changes of a failed checkpoint wait for the next one.
    fn give_back(&self, job: &Job, error: &io::Error) -> Stuck {
        let mut log = lock(&self.log);
        let generation = log.generation;
        for key in &job.keys {
            if let Some(layer) = self.table.shard_of(key.object).get_mut(*key) {
                layer.freeze_before(generation);
                if layer.unfreeze(generation) {
                    log.dirty.push(*key);
                }
            }
        }
        if Errno::from_io_error(error) == Some(Errno::NOSPC) {
            // Nothing new until a checkpoint has found room for what is accepted already.
            self.limit.store(0, SeqCst);
            return Stuck::Full;
        }
        Stuck::Failing(format!("cannot apply the log: {error}").into())
    }

    fn erase_leftovers(&self, checkpointer: &mut Checkpointer) -> io::Result<()> {
        for &(slab, slot) in &checkpointer.leftovers {
            self.files.index.write_at(&[&[0; SECTOR]], index_offset(slab, slot))?;
        }
        Ok(())
    }

    fn stage_all(
        &self,
        checkpointer: &mut Checkpointer,
        job: &Job,
        staged: &mut Vec<Staged>,
    ) -> io::Result<()> {
        let mut work: Vec<_> = job.keys.iter().filter_map(|key| self.freeze(*key, job)).collect();
        // What frees space comes first, the rest in the order of the disk.
        work.sort_by_key(|(_, frozen, base)| {
            (frozen.version != Version::NONE, base.map_or(u32::MAX, |slab| slab.slab))
        });
        for (key, frozen, _) in work {
            self.stage(checkpointer, key, &frozen, staged)?;
        }
        Ok(())
    }

    fn freeze(
        &self,
        key: LayerKey,
        job: &Job,
    ) -> Option<(LayerKey, Arc<Overlay>, Option<SlabRef>)> {
        let mut shard = self.table.shard_of(key.object);
        let layer = shard.get_mut(key)?;
        layer.freeze_before(job.generation);
        let base = layer.base.as_ref().map(|base| base.slab);
        Some((key, layer.frozen.clone()?, base))
    }

    /// Writes a layer's frozen changes to its slab, and its next index record and checksum table
    /// to the slots that do not count yet.
    fn stage(
        &self,
        checkpointer: &mut Checkpointer,
        key: LayerKey,
        frozen: &Overlay,
        staged: &mut Vec<Staged>,
    ) -> io::Result<()> {
        let base = self.table.shard_of(key.object).get(key).and_then(|layer| layer.base.clone());
        let deleted = frozen.version == Version::NONE;
        let fresh = base.is_none();
        if deleted && fresh {
            let nothing =
                Staged { key, old: None, new: None, fresh: false, old_blocks: 0, new_blocks: 0 };
            staged.push(nothing);
            return Ok(());
        }
        let from = match &base {
            Some(base) => base.slab,
            None => checkpointer.allocate(&self.files)?,
        };
        let mut content = base.map_or_else(Content::default, |base| base.content);
        let old_blocks = content.states.data_blocks();
        // Noted before the first write, so that a failure knows what to take back.
        let (old, new) = (Some(from), SlabRef { slot: 1 - from.slot, ..from });
        staged.push(Staged { key, old, new: Some(new), fresh, old_blocks, new_blocks: 0 });
        if deleted {
            self.files.data.punch(from.offset(0), OBJECT_SIZE)?;
            content = Content::default();
        } else {
            self.release(from, &content, frozen)?;
            self.copy(checkpointer, from, frozen)?;
            content.apply(frozen);
        }
        let layer = (!deleted).then_some((key, frozen.version, &content));
        let hash = self.write_record(checkpointer, new, layer)?;
        if let Some(last) = staged.last_mut() {
            last.new_blocks = content.states.data_blocks();
            last.new = Some(SlabRef { hash, ..new });
        }
        Ok(())
    }

    /// Punches holes where blocks of the slab hold data that `frozen` gives up.
    fn release(&self, slab: SlabRef, content: &Content, frozen: &Overlay) -> io::Result<()> {
        let mut hole: Option<(u16, u16)> = None;
        for block in content.states.blocks(BlockState::Data) {
            let gone = match frozen.find(block) {
                Some(entry) => entry.state != BlockState::Data && entry.release,
                None => frozen.reset,
            };
            if !gone {
                continue;
            }
            match &mut hole {
                Some((_, end)) if *end == block => *end += 1,
                _ => {
                    self.punch(slab, hole.replace((block, block + 1)))?;
                }
            }
        }
        self.punch(slab, hole)
    }

    fn punch(&self, slab: SlabRef, hole: Option<(u16, u16)>) -> io::Result<()> {
        let Some((first, end)) = hole else { return Ok(()) };
        let len = u64::from(end - first) * BLOCK_SIZE as u64;
        self.files.data.punch(slab.offset(first), len)
    }

    /// Copies the data blocks of `frozen` from the log to the slab, in runs.
    fn copy(&self, cp: &mut Checkpointer, slab: SlabRef, frozen: &Overlay) -> io::Result<()> {
        let mut entries =
            frozen.entries.iter().filter(|entry| entry.state == BlockState::Data).peekable();
        while let Some(first) = entries.next() {
            let mut count = 1;
            while count < COPY_BLOCKS
                && entries.peek().is_some_and(|next| {
                    usize::from(next.block) == usize::from(first.block) + count
                        && next.lsn == first.lsn + (count * BLOCK_SIZE) as u64
                })
            {
                entries.next();
                count += 1;
            }
            cp.buf.resize(count * BLOCK_SIZE, 0);
            self.ring.read(&mut cp.buf, first.lsn)?;
            self.files.data.write_at(&[&cp.buf], slab.offset(first.block))?;
        }
        Ok(())
    }

    /// Writes an index record and its checksum table; gives the record's part in the digest.
    fn write_record(
        &self,
        cp: &mut Checkpointer,
        slab: SlabRef,
        layer: Option<(LayerKey, Version, &Content)>,
    ) -> io::Result<u64> {
        let mut record =
            IndexRecord { slab: slab.slab, checkpoint: cp.mark.checkpoint + 1, layer: None };
        if let Some((key, version, content)) = layer {
            crcs_to_bytes(&content.crcs[..], &mut cp.buf);
            let sums_crc = crc32c::crc32c(&cp.buf);
            self.files.sums.write_at(&[&cp.buf], sums_offset(slab.slab, slab.slot))?;
            let states = (*content.states).clone();
            record.layer = Some(IndexedLayer { key, version, sums_crc, states });
        }
        let bytes = record.encode();
        self.files.index.write_at(&[&bytes], index_offset(slab.slab, slab.slot))?;
        Ok(slot_hash(&bytes))
    }

    fn commit(&self, cp: &mut Checkpointer, job: &Job, staged: &[Staged]) -> io::Result<()> {
        self.files.data.sync()?;
        self.files.sums.sync()?;
        self.files.index.sync()?;
        let mut digest = cp.mark.index_digest;
        for layer in staged {
            if let (Some(old), Some(new)) = (layer.old, layer.new) {
                digest = digest.wrapping_sub(old.hash).wrapping_add(new.hash);
            }
        }
        let mark = Mark {
            sequence: cp.mark.sequence + 1,
            checkpoint: cp.mark.checkpoint + 1,
            log_start: job.to,
            index_digest: digest,
            clean: false,
            ..cp.mark
        };
        self.write_mark(cp, mark)
    }

    /// Writes both copies of a mark, one after the other: at each moment one of them is whole, and
    /// afterwards either may be damaged. If that fails, it is not known which mark counts: the
    /// store goes out of service.
    pub(crate) fn write_mark(&self, cp: &mut Checkpointer, mark: Mark) -> io::Result<()> {
        let bytes = mark.encode();
        for copy in Mark::COPIES {
            let written = self.files.superblock.write_at(&[&bytes], copy * SUPER_PART);
            if let Err(error) = written.and_then(|()| self.files.superblock.sync()) {
                self.fail("cannot write the checkpoint mark", &error);
                return Err(error);
            }
        }
        cp.mark = mark;
        Ok(())
    }

    /// Brings the layers in memory to what was committed.
    fn publish(&self, cp: &mut Checkpointer, staged: Vec<Staged>) {
        cp.leftovers.clear();
        for layer in staged {
            cp.blocks = cp.blocks + u64::from(layer.new_blocks) - u64::from(layer.old_blocks);
            let mut shard = self.table.shard_of(layer.key.object);
            let Some(state) = shard.get_mut(layer.key) else { continue };
            let Some(frozen) = state.frozen.take() else { continue };
            match layer.new {
                Some(slab) if frozen.version != Version::NONE => {
                    let content = state.base.take().map_or_else(Content::default, |b| b.content);
                    let mut base = Base { slab, content };
                    base.content.apply(&frozen);
                    state.base = Some(base);
                }
                freed => {
                    state.base = None;
                    cp.free.extend(freed);
                    shard.remove_if_gone(layer.key);
                }
            }
        }
    }

    /// Sets how many blocks may be stored: the capacity given, or what the file system offers
    /// beyond `applied` blocks, less a reserve for the store's own tables.
    pub(crate) fn update_limit(&self, applied: u64) {
        let block = BLOCK_SIZE as u64;
        let given = self.options.capacity.map_or(u64::MAX, |bytes| bytes / block);
        let offered = match self.medium.space() {
            Ok((total, available)) => {
                let reserve = (total / 64).clamp(1 << 20, 256 << 20);
                applied + available.saturating_sub(reserve) / block
            }
            Err(error) => {
                tracing::warn!(disk = %self.ids.disk, %error, "cannot ask for free space");
                u64::MAX
            }
        };
        self.limit.store(given.min(offered).min(1 << 50), SeqCst);
    }

    /// The last checkpoint of an orderly stop. Does nothing after a failure: the next start
    /// replays the log.
    pub(crate) fn shut_down(&self) -> io::Result<()> {
        self.checkpoint()?;
        let mut checkpointer = lock(&self.checkpointer);
        let log = lock(&self.log);
        if self.failed.get().is_some() || !log.dirty.is_empty() {
            return Err(io::Error::other("the log could not be applied"));
        }
        let end = log.end;
        drop(log);
        let sequence = checkpointer.mark.sequence + 1;
        let mark = Mark { sequence, log_start: end, clean: true, ..checkpointer.mark };
        self.write_mark(&mut checkpointer, mark)
    }
}
