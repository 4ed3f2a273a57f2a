//! Applying the log: changes go to the slabs, index and checksum tables become durable, one mark
//! commits them all, the log is released.
//!
//! Until the mark is durable a crash leads back to the checkpoint before: its index records and
//! checksum tables are untouched (the other of two slots is written), and whatever was changed in
//! `data` is changed again by replaying the log, which was made durable first (I6).

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use rustix::io::Errno;
use sheepdog_types::{BLOCK_SIZE, BLOCKS_PER_OBJECT, LayerKey, OBJECT_SIZE};

use crate::api::{BlockRange, BlockState};
use crate::engine::{Engine, Stuck, lock};
use crate::format::{
    IndexRecord, IndexedLayer, Mark, SECTOR, SUPER_PART, crcs_to_bytes, slot_hash,
};
use crate::io::Buffer;
use crate::layer::{Base, Dropped, Entry, Overlay, Place, SlabRef};
use crate::medium::VFile;
use crate::states::{CompactStates, States};
use crate::table::Sums;

/// Bytes of a checksum table.
pub(crate) const SUMS_BYTES: usize = 4 * BLOCKS_PER_OBJECT;
/// A checksum table and the copy of its index record behind it.
pub(crate) const SUMS_PART: usize = SUMS_BYTES + SECTOR;
/// `index` and `sums` grow by this many slabs at a time.
pub(crate) const GROW_SLABS: u32 = 64;
/// Largest copy to a slab at once.
const COPY_BLOCKS: usize = 256;

/// Bytes written to slabs at once where that pays.
const BATCH_BYTES: usize = 8 << 20;

/// Offset of an index record.
pub(crate) fn index_offset(slab: u32, slot: u8) -> u64 {
    (u64::from(slab) * 2 + u64::from(slot)) * SECTOR as u64
}

/// Offset of a checksum table; the copy of the index record follows it.
pub(crate) fn sums_offset(slab: u32, slot: u8) -> u64 {
    (u64::from(slab) * 2 + u64::from(slot)) * SUMS_PART as u64
}

/// Offset of the copy of an index record.
pub(crate) fn copy_offset(slab: u32, slot: u8) -> u64 {
    sums_offset(slab, slot) + SUMS_BYTES as u64
}

/// What checkpoints keep between each other.
pub(crate) struct Checkpointer {
    /// The last committed mark.
    pub(crate) mark: Mark,
    /// Index records that an interrupted checkpoint left: erased before the next one commits.
    pub(crate) leftovers: BTreeSet<(u32, u8)>,
    /// Data blocks in slabs.
    pub(crate) blocks: u64,
    /// Reused for copies.
    pub(crate) buf: Vec<u8>,
    /// Blocks to be written to slabs together.
    pub(crate) batch: Vec<(u64, Buffer)>,
}

/// The changes that a checkpoint applies.
struct Job {
    generation: u64,
    keys: Vec<LayerKey>,
    /// They are in the log before this LSN.
    to: u64,
    /// Blocks of them that went straight to slabs.
    direct: u64,
}

/// States and checksums of a layer's blocks.
struct Content {
    states: States,
    sums: Sums,
}

impl Content {
    fn apply(&mut self, entries: &[Entry]) {
        for entry in entries {
            self.states.set(entry.block, entry.state);
            self.sums[usize::from(entry.block)] = entry.crc;
        }
    }
}

/// A layer whose next index record is written but not committed.
struct Staged {
    key: LayerKey,
    frozen: Arc<Overlay>,
    /// What its base becomes; none if it is deleted.
    base: Option<Base>,
    /// What its slab becomes; none if there was no need to write a record.
    record: Option<Written>,
    /// Slabs that become free, with their new records.
    freed: Vec<(Dropped, Option<Written>)>,
    old_blocks: u16,
    new_blocks: u16,
}

/// An index record that is not committed.
#[derive(Clone, Copy)]
struct Written {
    old: SlabRef,
    new: SlabRef,
}

impl Staged {
    fn records(&self) -> impl Iterator<Item = &Written> {
        self.record.iter().chain(self.freed.iter().filter_map(|(_, written)| written.as_ref()))
    }

    /// The slabs that nobody uses any more.
    fn free_slabs(&self) -> impl Iterator<Item = SlabRef> {
        self.freed.iter().map(|(dropped, written)| written.map_or(dropped.slab, |w| w.new))
    }
}

impl Engine {
    /// Applies everything that is in the log now and releases it. After an error nothing is lost:
    /// the changes stay in the log and are taken up by the next call.
    pub(crate) fn checkpoint(&self) -> io::Result<()> {
        let mut checkpointer = lock(&self.checkpointer);
        if let Some(reason) = self.failed.get() {
            // What became durable is not known: going on could undo it.
            return Err(io::Error::other(reason.to_string()));
        }
        let job = {
            let mut log = lock(&self.log);
            if log.dirty.is_empty() {
                return Ok(());
            }
            log.generation += 1;
            log.applying = std::mem::take(&mut log.waiting);
            let keys = std::mem::take(&mut log.dirty);
            let direct = self.direct_written.load(SeqCst);
            Job { generation: log.generation, keys, to: log.end, direct }
        };
        let result = self.run(&mut checkpointer, &job);
        let stuck = result.as_ref().err().map(|error| self.give_back(&job, error));
        let mut log = lock(&self.log);
        let applied = std::mem::take(&mut log.applying);
        if stuck.is_none() {
            self.applied_to.store(job.to, SeqCst);
            self.direct_written.fetch_sub(job.direct, SeqCst);
            self.update_limit(&checkpointer);
            log.start = job.to;
        } else {
            log.waiting += applied;
        }
        *lock(&self.stuck) = stuck;
        self.room.notify_all();
        result
    }

    fn run(&self, checkpointer: &mut Checkpointer, job: &Job) -> io::Result<()> {
        self.prove(job.to).map_err(|error| io::Error::other(error.0.to_string()))?;
        self.erase_leftovers(checkpointer)?;
        checkpointer.batch.clear();
        let mut staged = Vec::with_capacity(job.keys.len());
        self.stage_all(checkpointer, job, &mut staged)?;
        self.commit(checkpointer, job, &staged)?;
        self.publish(checkpointer, &staged);
        Ok(())
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
        // Behind the end of a file there is nothing to erase, and a full disk has no space for it.
        let erase = |file: &Arc<dyn VFile>, offset| match offset < file.len()? {
            true => file.write_at(&[&[0; SECTOR]], offset),
            false => Ok(()),
        };
        for &(slab, slot) in &checkpointer.leftovers {
            erase(&self.files.index, index_offset(slab, slot))?;
            erase(&self.files.sums, copy_offset(slab, slot))?;
        }
        Ok(())
    }

    fn stage_all(
        &self,
        checkpointer: &mut Checkpointer,
        job: &Job,
        staged: &mut Vec<Staged>,
    ) -> io::Result<()> {
        for key in &job.keys {
            let mut shard = self.table.shard_of(key.object);
            let Some(layer) = shard.get_mut(*key) else { continue };
            layer.freeze_before(job.generation);
            let Some(frozen) = layer.frozen.clone() else { continue };
            let old_blocks =
                layer.base.as_ref().map_or(0, |base| base.states.expand().data_blocks());
            staged.push(Staged {
                key: *key,
                frozen,
                base: None,
                record: None,
                freed: Vec::new(),
                old_blocks,
                new_blocks: 0,
            });
        }
        // What frees space comes first, the rest in the order of the disk.
        staged.sort_by_key(|staged| staged.frozen.slab.map(|slab| slab.slab));
        for layer in staged.iter_mut() {
            self.free_dropped(checkpointer, layer)?;
        }
        self.make_room(staged)?;
        for layer in staged {
            self.stage(checkpointer, layer)?;
        }
        self.write_batch(checkpointer, 0)
    }

    /// Extends `index` and `sums` for slabs that were taken without: on a full disk, or before a
    /// power cut that shortened these files.
    fn make_room(&self, staged: &[Staged]) -> io::Result<()> {
        let slabs = staged.iter().filter_map(|layer| layer.frozen.slab).map(|slab| slab.slab + 1);
        let needed = slabs.max().unwrap_or(0);
        if needed > lock(&self.log).slabs.room {
            self.extend_tables(needed)?; // writers go on meanwhile
            lock(&self.log).slabs.note_room(needed);
        }
        Ok(())
    }

    /// Gives back what the layer left, unless another layer still needs it.
    fn free_dropped(&self, cp: &mut Checkpointer, layer: &mut Staged) -> io::Result<()> {
        let frozen = Arc::clone(&layer.frozen);
        for dropped in &frozen.dropped {
            if !dropped.keep {
                self.files.data.punch(dropped.slab.offset(0), OBJECT_SIZE)?;
            }
            layer.freed.push((*dropped, None));
            if dropped.slab.hash != 0 {
                let written = self.write_record(cp, dropped.slab, None)?;
                if let Some((_, record)) = layer.freed.last_mut() {
                    *record = Some(written);
                }
            }
        }
        Ok(())
    }

    /// Writes a layer's frozen changes to its slab, and its next index record and checksum table
    /// to the slots that do not count yet.
    fn stage(&self, cp: &mut Checkpointer, layer: &mut Staged) -> io::Result<()> {
        let frozen = Arc::clone(&layer.frozen);
        let Some(slab) = frozen.slab else { return Ok(()) };
        let mut content = self.base_content(layer.key, &frozen)?;
        self.release(slab, &frozen)?;
        self.copy(cp, layer.key, slab, &frozen)?;
        content.apply(&frozen.entries);
        layer.new_blocks = content.states.data_blocks();
        crcs_to_bytes(&content.sums, &mut cp.buf);
        let sums_crc = crc32c::crc32c(&cp.buf);
        let (key, version, states) = (layer.key, frozen.version, content.states.clone());
        let record = IndexedLayer { key, version, sums_crc, states };
        let written = self.write_record(cp, slab, Some(record))?;
        layer.record = Some(written);
        let states = CompactStates::new(content.states);
        layer.base = Some(Base { slab: written.new, sums_crc, states });
        Ok(())
    }

    /// The committed content that `frozen` changes.
    fn base_content(&self, key: LayerKey, frozen: &Overlay) -> io::Result<Content> {
        let empty = Content { states: States::default(), sums: [0; BLOCKS_PER_OBJECT] };
        if frozen.reset {
            return Ok(empty);
        }
        let base = self.table.shard_of(key.object).get(key).and_then(|layer| layer.base.clone());
        let Some(base) = base else { return Ok(empty) };
        let states = base.states.expand();
        if states.data_blocks() == 0 {
            return Ok(Content { states, ..empty });
        }
        let sums = *self.sums_or_distrust(key, &base)?;
        Ok(Content { states, sums })
    }

    /// Punches holes where `frozen` gives up blocks.
    fn release(&self, slab: SlabRef, frozen: &Overlay) -> io::Result<()> {
        let mut hole: Option<(u16, u16)> = None;
        let gone = |entry: &&Entry| entry.state != BlockState::Data && entry.release;
        for block in frozen.entries.iter().filter(gone).map(|entry| entry.block) {
            match &mut hole {
                Some((_, end)) if *end == block => *end += 1,
                _ => {
                    self.punch(slab, hole.replace((block, block + 1)))?;
                }
            }
        }
        self.punch(slab, hole)
    }

    pub(crate) fn punch(&self, slab: SlabRef, hole: Option<(u16, u16)>) -> io::Result<()> {
        let Some((first, end)) = hole else { return Ok(()) };
        let len = u64::from(end - first) * BLOCK_SIZE as u64;
        self.files.data.punch(slab.offset(first), len)
    }

    /// Copies the data blocks of `frozen` that are not in the slab yet to it, in runs.
    fn copy(
        &self,
        cp: &mut Checkpointer,
        key: LayerKey,
        slab: SlabRef,
        frozen: &Overlay,
    ) -> io::Result<()> {
        let mut entries = frozen
            .entries
            .iter()
            .filter(|entry| entry.state == BlockState::Data)
            .filter(|entry| entry.place != Place::Slab(slab.offset(entry.block)).into())
            .peekable();
        let mut run: Vec<&Entry> = Vec::new();
        while let Some(first) = entries.next() {
            run.clear();
            run.push(first);
            while run.len() < COPY_BLOCKS
                && let Some(next) = entries.next_if(|next| follows(first, run.len(), next))
            {
                run.push(next);
            }
            cp.buf.resize(run.len() * BLOCK_SIZE, 0);
            self.read_place(first.place.unpack(), &mut cp.buf)?;
            for (entry, block) in run.iter().zip(cp.buf.chunks_exact(BLOCK_SIZE)) {
                if crc32c::crc32c(block) != entry.crc {
                    // Its checksum goes with it, so it is never taken for good.
                    tracing::error!(disk = %self.ids.disk, layer = %key, block = entry.block,
                        "a block was damaged in the log");
                    self.damage.report(key, entry.block);
                }
            }
            let offset = slab.offset(first.block);
            if self.files.data.likes_batches() {
                cp.batch.push((offset, Buffer::from(&cp.buf[..])));
                self.write_batch(cp, BATCH_BYTES)?;
            } else {
                self.files.data.write_at(&[&cp.buf], offset)?;
            }
        }
        Ok(())
    }

    /// Writes the blocks that were put together, if they are at least `bytes`.
    fn write_batch(&self, cp: &mut Checkpointer, bytes: usize) -> io::Result<()> {
        if cp.batch.iter().map(|(_, part)| part.len()).sum::<usize>() < bytes {
            return Ok(());
        }
        self.files.data.write_many(std::mem::take(&mut cp.batch))
    }

    /// Writes the next index record of `slab` and its copy, and with a layer the checksum table
    /// in `cp.buf`.
    fn write_record(
        &self,
        cp: &mut Checkpointer,
        slab: SlabRef,
        layer: Option<IndexedLayer>,
    ) -> io::Result<Written> {
        let new = slab.flipped(0);
        // Noted before the first write, so that a failure knows what to take back.
        cp.leftovers.insert((new.slab, new.slot));
        let free = layer.is_none();
        let checkpoint = cp.mark.checkpoint + 1;
        let bytes = IndexRecord { slab: new.slab, checkpoint, layer }.encode();
        if free {
            self.files.sums.write_at(&[&bytes], copy_offset(new.slab, new.slot))?;
        } else {
            self.files.sums.write_at(&[&cp.buf, &bytes], sums_offset(new.slab, new.slot))?;
        }
        self.files.index.write_at(&[&bytes], index_offset(new.slab, new.slot))?;
        Ok(Written { old: slab, new: slab.flipped(slot_hash(&bytes)) })
    }

    fn commit(&self, cp: &mut Checkpointer, job: &Job, staged: &[Staged]) -> io::Result<()> {
        self.sync_slabs()?;
        let mut digest = cp.mark.index_digest;
        for written in staged.iter().flat_map(Staged::records) {
            digest = digest.wrapping_sub(written.old.hash).wrapping_add(written.new.hash);
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

    /// Makes durable what was written for a commit.
    fn sync_slabs(&self) -> io::Result<()> {
        let _one = lock(&self.slabs_syncing);
        if let Some(reason) = self.failed.get() {
            return Err(io::Error::other(reason.to_string()));
        }
        let files = [&self.files.data, &self.files.sums, &self.files.index];
        let synced = self.medium.sync_all(&files);
        if let Some(Err(error)) = synced.first() {
            // Of what was written directly, and is in no log, anything may be lost now.
            self.fail("cannot make slabs durable", error);
        }
        synced.into_iter().collect()
    }

    /// Brings the layers in memory to what was committed, and frees what they left.
    fn publish(&self, cp: &mut Checkpointer, staged: &[Staged]) {
        cp.leftovers.clear();
        for layer in staged {
            cp.blocks = cp.blocks + u64::from(layer.new_blocks) - u64::from(layer.old_blocks);
            let mut shard = self.table.shard_of(layer.key.object);
            let Some(state) = shard.get_mut(layer.key) else { continue };
            state.frozen = None;
            state.base = layer.base.clone();
            if let Some(written) = &layer.record {
                state.slab_committed(written.new);
            }
            shard.remove_if_gone(layer.key);
        }
        for (dropped, _) in staged.iter().flat_map(|layer| &layer.freed) {
            if dropped.keep
                && let Err(error) = self.punch(dropped.slab, Some((0, BlockRange::ALL.end())))
            {
                tracing::warn!(disk = %self.ids.disk, %error, "cannot release space");
            }
        }
        let mut log = lock(&self.log);
        staged.iter().flat_map(Staged::free_slabs).for_each(|slab| log.slabs.give(slab));
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

    /// Sets how many blocks may be stored: the capacity given, or what the file system offers
    /// beyond those in the slabs, less a reserve for the store's own tables.
    pub(crate) fn update_limit(&self, checkpointer: &Checkpointer) {
        let held = checkpointer.blocks + self.direct_written.load(SeqCst);
        let block = BLOCK_SIZE as u64;
        let given = self.options.capacity.map_or(u64::MAX, |bytes| bytes / block);
        let offered = match self.medium.space() {
            Ok((total, available)) => {
                let reserve = (total / 64).clamp(1 << 20, 256 << 20);
                held + available.saturating_sub(reserve) / block
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

/// Whether `next` goes `count` blocks behind `first`, and lies so in the same place.
fn follows(first: &Entry, count: usize, next: &Entry) -> bool {
    let bytes = (count * BLOCK_SIZE) as u64;
    let adjacent = match (first.place.unpack(), next.place.unpack()) {
        (Place::Log(a), Place::Log(b)) | (Place::Slab(a), Place::Slab(b)) => a + bytes == b,
        _ => false,
    };
    adjacent && usize::from(next.block) == usize::from(first.block) + count
}
