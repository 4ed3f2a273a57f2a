//! The store of one disk: object layers in a directory, durable and checksummed.
//!
//! A change is appended to a write-ahead log and answered; [`Store::flush`] makes everything
//! answered before it durable. A checkpoint applies the log to 4 MiB slabs and releases it. Every
//! 4 KiB block has a CRC-32C that is verified when it comes in and each time it is read (I7).
//! The files are described in `docs/on-disk.md`.
//!
//! ```text
//!   write ──► log (page cache) ──► answered          read ──► live, frozen: log    ──► verify
//!   flush ──► fdatasync(log)   ──► durable                    base:         slab
//!   checkpoint ──► slabs, sums, index, fdatasync ──► mark ──► log released
//! ```
//!
//! All methods are synchronous and may be called from many threads. Reads take a short lock of
//! one shard; they never wait for a write or a sync. Writes are ordered by one lock that is held
//! for one `pwritev`; they wait only while the log is full, for a checkpoint.
//!
//! Memory: about 140 bytes for each stored layer of an object (272 more if its blocks are in
//! different states), 16 bytes for each block that waits for a checkpoint, at most 32 MiB of
//! those, and a cache of checksum tables ([`Options::sums_cache_bytes`]).

// `io::uring` alone may.
#![deny(unsafe_code)]

mod api;
mod background;
mod check;
mod checkpoint;
mod damage;
mod engine;
mod error;
mod format;
mod index;
mod io;
mod later;
mod layer;
mod lockfile;
mod log;
mod medium;
mod merge;
mod offline;
mod open;
mod patch;
mod read;
mod scrub;
mod states;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use sheepdog_types::{Layer, LayerKey, ObjectId, SlotId, Version, VolumeId};

pub use api::{
    Applied, BadBlock, BlockRange, BlockRun, BlockState, BlocksRead, Cache, DamageReport,
    IoBackend, LayerDifference, LayerImage, LayerPart, LayerPatch, LayerStat, LayerSums, Options,
    Payload, ReadOutcome, ScrubbedLayer, StoreIds, Usage,
};
use engine::Engine;
pub use error::{FlushError, OpenError, ReadError, WriteError};
use lockfile::LockFile;
use medium::Directory;
pub use offline::{DumpItem, DumpValue, Finding, Progress, Report, Severity, Totals, check, dump};
use read::Mode;

/// The store of one disk.
///
/// Dropping it applies the log and stops its threads, as [`Store::close`] does, but without
/// telling of errors; nothing is lost by them, the next opening replays the log.
pub struct Store {
    engine: Arc<Engine>,
    threads: Vec<JoinHandle<()>>,
    _lock: LockFile,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.engine.ids.disk)
    }
}

impl Store {
    /// Makes a store in `dir`, which is created if missing, and opens it.
    ///
    /// # Errors
    /// [`OpenError::Exists`] if there is a store already; [`OpenError::InvalidOptions`];
    /// [`OpenError::Locked`]; [`OpenError::Io`].
    pub fn create(dir: &Path, ids: StoreIds, options: Options) -> Result<Self, OpenError> {
        std::fs::create_dir_all(dir.join("log"))
            .map_err(OpenError::io(format!("cannot create {}", dir.display())))?;
        let lock = LockFile::take(dir)?;
        if dir.join(open::SUPERBLOCK).exists() {
            return Err(OpenError::Exists(dir.into()));
        }
        let medium =
            Directory::new(dir, &options).map_err(OpenError::io("cannot start the I/O engine"))?;
        open::create(&medium, ids, &options)?;
        drop(medium);
        Self::start(dir, options, lock)
    }

    /// Opens the store in `dir`: reads the index and replays the log.
    ///
    /// # Errors
    /// [`OpenError`]; the store is left as it was.
    pub fn open(dir: &Path, options: Options) -> Result<Self, OpenError> {
        if !dir.join(open::SUPERBLOCK).exists() {
            return Err(OpenError::NotAStore { dir: dir.into(), reason: "no superblock" });
        }
        let lock = LockFile::take(dir)?;
        Self::start(dir, options, lock)
    }

    /// Removes the store in `dir`, if there is one, with all that is in `dir`. Interrupted, it leaves what is no
    /// store: that can be removed again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(dir: &Path) -> std::io::Result<()> {
        let absent = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
        for removed in
            [std::fs::remove_file(dir.join(open::SUPERBLOCK)), std::fs::remove_dir_all(dir)]
        {
            removed.or_else(|error| if absent(&error) { Ok(()) } else { Err(error) })?;
        }
        Ok(())
    }

    fn start(dir: &Path, options: Options, lock: LockFile) -> Result<Self, OpenError> {
        let medium =
            Directory::new(dir, &options).map_err(OpenError::io("cannot start the I/O engine"))?;
        let medium = Arc::new(medium);
        let engine = Arc::new(open::open(medium, dir, options)?);
        let threads = engine.start_threads().map_err(OpenError::io("cannot start threads"))?;
        Ok(Self { engine, threads, _lock: lock })
    }

    /// Whose store this is.
    #[must_use]
    pub fn ids(&self) -> StoreIds {
        self.engine.ids
    }

    /// What carries out I/O that has to wait: `io_uring` or `threads`.
    #[must_use]
    pub fn io_backend(&self) -> &'static str {
        self.engine.medium.io().map_or("none", io::IoEngine::kind)
    }

    /// Applies one write of an object layer, from block `first` on. On return it is ordered and
    /// visible to reads, and safe from a crash of the process, but durable only after a flush.
    ///
    /// It is applied if the layer's version is `prev` ([`Version::NONE`]: the layer is new). If
    /// the layer already has `version` or a later one of the same writer, nothing is done.
    ///
    /// # Errors
    /// [`WriteError`]; each variant says whether the write may have been done.
    pub fn write(
        &self,
        key: LayerKey,
        prev: Version,
        version: Version,
        first: u16,
        payload: Payload<'_>,
    ) -> Result<Applied, WriteError> {
        self.engine.write(key, prev, version, first, payload)
    }

    /// Reads `crcs.len()` blocks from `first` on into `buf` (4096 bytes each), each from the first
    /// layer of `chain` (newest first) that holds it; blocks that none holds are zeroes. `crcs`
    /// receives the CRC-32C of each block.
    ///
    /// # Errors
    /// [`ReadError`]: a damaged block is never returned as data.
    pub fn read(
        &self,
        object: ObjectId,
        chain: &[Layer],
        first: u16,
        buf: &mut [u8],
        crcs: &mut [u32],
    ) -> Result<ReadOutcome, ReadError> {
        self.engine.read(object, chain, first, buf, crcs)
    }

    /// Like [`Store::read`], if the page cache answers; `None` if the disk would have to.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn try_read(
        &self,
        object: ObjectId,
        chain: &[Layer],
        first: u16,
        buf: &mut [u8],
        crcs: &mut [u32],
    ) -> Result<Option<ReadOutcome>, ReadError> {
        self.engine.read_as(Mode::Cached, object, chain, first, buf, crcs)
    }

    /// [`Store::read`] of `count` blocks for callers that must not wait: calls `done` when the
    /// disk has answered, on another thread, or at once. It must not block. Waits itself only
    /// while thousands of reads do.
    pub fn read_later(
        &self,
        object: ObjectId,
        chain: &[Layer],
        first: u16,
        count: u16,
        done: Box<dyn FnOnce(Result<BlocksRead, ReadError>) + Send>,
    ) {
        later::read(&self.engine, object, chain, (first, count), done);
    }

    /// The states of `range` as seen through `chain` (newest first), as adjacent runs.
    #[must_use]
    pub fn block_states(
        &self,
        object: ObjectId,
        chain: &[Layer],
        range: BlockRange,
    ) -> Vec<BlockRun> {
        self.engine.block_states(object, chain, range)
    }

    /// Summary of one layer; `None` if it does not exist.
    #[must_use]
    pub fn stat(&self, key: LayerKey) -> Option<LayerStat> {
        self.engine.stat(key)
    }

    /// Summaries of all layers of an object, newest first.
    #[must_use]
    pub fn stat_object(&self, object: ObjectId) -> Vec<LayerStat> {
        self.engine.stat_object(object)
    }

    /// Makes every change that was applied before this call durable, then calls `done`: on the
    /// calling thread if there is nothing to do, else on the flusher's, which serves all waiting
    /// flushes with one `fdatasync`. `done` must not block.
    pub fn flush(&self, done: Box<dyn FnOnce(Result<(), FlushError>) + Send>) {
        self.engine.flush(done);
    }

    /// [`Store::flush`], waiting for it.
    ///
    /// # Errors
    /// [`FlushError`]: changes may be lost; the store takes no more writes.
    pub fn flush_wait(&self) -> Result<(), FlushError> {
        self.engine.flush_wait()
    }

    /// The layers of a slot, ascending by key.
    #[must_use]
    pub fn list(&self, slot: SlotId) -> Vec<LayerStat> {
        self.engine.stats(slot)
    }

    /// Calls `each` for every slot that has layers, with these, ascending by key. Slots come in no
    /// particular order; layers that change meanwhile are seen as before or after.
    pub fn list_all(&self, mut each: impl FnMut(SlotId, &[LayerStat])) {
        for slot in table::Table::shard_slots() {
            let mut stats: Vec<_> =
                self.engine.table.shard(slot).existing().map(|(key, l)| l.stat(key)).collect();
            stats.sort_unstable_by_key(|stat| (stat.key.object.slot(), stat.key));
            for slot in stats.chunk_by(|a, b| a.key.object.slot() == b.key.object.slot()) {
                each(slot[0].key.object.slot(), slot);
            }
        }
    }

    /// Hash over (key, version) of a slot's layers, in any order; 0 without layers. Equal content
    /// gives equal digests on every node and after every restart.
    #[must_use]
    pub fn digest(&self, slot: SlotId) -> u64 {
        self.engine.table.digest(slot)
    }

    /// A layer's version, states and checksums, without its data.
    ///
    /// # Errors
    /// [`ReadError`] if the layer's checksum table is damaged or cannot be read.
    pub fn sums(&self, key: LayerKey) -> Result<Option<LayerSums>, ReadError> {
        self.engine.sums(key)
    }

    /// A whole layer at one version; `None` if it does not exist.
    ///
    /// # Errors
    /// [`ReadError`] if a block is damaged or cannot be read.
    pub fn image(&self, key: LayerKey) -> Result<Option<LayerImage>, ReadError> {
        self.engine.image(key)
    }

    /// Replaces a layer by `image`, if its version is `expect` (`None`: if it does not exist);
    /// false if it is another. After a crash the layer is the old or the new one, never a mixture.
    ///
    /// # Errors
    /// [`WriteError`]; nothing was changed, except with [`WriteError::Failed`] perhaps.
    pub fn install(
        &self,
        key: LayerKey,
        expect: Option<Version>,
        image: &LayerImage,
    ) -> Result<bool, WriteError> {
        self.engine.install(key, expect, image)
    }

    /// How the layer `key` differs from one with the sums `other`: what [`Store::patch`] needs to
    /// make it equal; `None` if there is no such layer. If it is at the version of `other`, all of
    /// it is read and verified, so that no damage is taken for equal; else blocks count as damaged
    /// if they are known to be. Blocks are compared by their checksums.
    ///
    /// # Errors
    /// [`ReadError`] if the layer's checksum table is damaged or cannot be read, or if `other`
    /// contradicts itself.
    pub fn compare(
        &self,
        key: LayerKey,
        other: &LayerSums,
    ) -> Result<Option<LayerDifference>, ReadError> {
        self.engine.compare(key, other)
    }

    /// Data blocks of a layer at a version, at most all of them once, in ascending order; `None` if
    /// it is at another version.
    ///
    /// # Errors
    /// [`ReadError`] if a block is damaged or cannot be read; [`ReadError::Invalid`] if one is not a
    /// data block.
    pub fn part(
        &self,
        key: LayerKey,
        version: Version,
        blocks: &[BlockRange],
    ) -> Result<Option<LayerPart>, ReadError> {
        self.engine.part(key, version, blocks)
    }

    /// Makes a layer what `patch` says, if its version is `expect`, by changing only the blocks that
    /// differ; after a crash it is the old or the new one, never a mixture. False if it is at
    /// another version, or if a block that is not given is not stored as the patch says or is known
    /// to be damaged. The space of blocks that are no longer data is given back.
    ///
    /// # Errors
    /// [`WriteError`]; nothing was changed, except with [`WriteError::Failed`] perhaps. With
    /// [`WriteError::Damaged`] only [`Store::install`] helps.
    pub fn patch(
        &self,
        key: LayerKey,
        expect: Version,
        patch: &LayerPatch,
    ) -> Result<bool, WriteError> {
        self.engine.patch(key, expect, patch)
    }

    /// Deletes a layer; false if there was none. Durable after the next flush.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`], [`WriteError::Failed`].
    pub fn delete(&self, key: LayerKey) -> Result<bool, WriteError> {
        self.engine.delete(key, None)
    }

    /// Deletes a layer if it is at `version`; false if it is not. Durable after the next flush.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`], [`WriteError::Failed`].
    pub fn delete_at(&self, key: LayerKey, version: Version) -> Result<bool, WriteError> {
        self.engine.delete(key, Some(version))
    }

    /// Deletes all layers of a volume, at once also after a crash; gives their number. Durable
    /// after the next flush. Looks at every layer of the disk.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`], [`WriteError::Failed`].
    pub fn delete_volume(&self, volume: VolumeId) -> Result<usize, WriteError> {
        self.engine.delete_volume(volume)
    }

    /// Merges `lower`, which goes, into the newer layer `upper` of the same object: blocks that
    /// are absent in `upper` become what `lower` held, so a read through both gives the same as
    /// before. The version of `upper` stays. False if one of them does not exist. Durable after
    /// the next flush; blocks are moved by the next checkpoint.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`], [`WriteError::Damaged`], [`WriteError::Failed`],
    /// [`WriteError::Invalid`] if `lower` is not older than `upper`.
    pub fn merge(&self, object: ObjectId, upper: Layer, lower: Layer) -> Result<bool, WriteError> {
        self.engine.merge(object, upper, lower)
    }

    /// The layer after `after` (`None`: the first) in an order that visits each layer once; `None`
    /// after the last. Layers that are made or deleted meanwhile may be left out.
    #[must_use]
    pub fn next_layer(&self, after: Option<LayerKey>) -> Option<LayerKey> {
        self.engine.table.next_after(after)
    }

    /// Reads all that is stored of a layer from the disk and verifies it. Damaged blocks are also
    /// in [`Store::damage`] from then on, those that are right no longer. A layer that changes
    /// meanwhile is judged by what it holds when it is read; one that is gone has no blocks.
    #[must_use]
    pub fn scrub_layer(&self, key: LayerKey) -> ScrubbedLayer {
        self.engine.scrub_layer(key)
    }

    /// The damage that reads and scrubs have found. A block is repaired by any write of it.
    #[must_use]
    pub fn damage(&self) -> DamageReport {
        self.engine.damage_report()
    }

    /// Why the disk takes no more changes until it is opened again; `None` while it does.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<str>> {
        self.engine.failed.get().cloned()
    }

    /// Space on the disk. Without a given capacity it is what the file system offers now.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.engine.usage()
    }

    /// Answers waiting flushes, applies the log and stops.
    ///
    /// # Errors
    /// What kept the log from being applied. Nothing is lost that was flushed: the next opening
    /// replays the log.
    pub fn close(mut self) -> std::io::Result<()> {
        self.stop_threads();
        self.engine.shut_down()
    }

    fn stop_threads(&mut self) {
        self.engine.stop_threads();
        for thread in self.threads.drain(..) {
            // Whatever made a thread panic was reported by the panic.
            let _ = thread.join();
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.threads.is_empty() {
            return;
        }
        self.stop_threads();
        if let Err(error) = self.engine.shut_down() {
            tracing::warn!(disk = %self.engine.ids.disk, %error, "not stopped cleanly");
        }
    }
}
