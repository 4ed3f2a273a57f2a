//! The store without threads: applies changes and syncs the log. Background work is asked for
//! through [`Signals`](crate::background::Signals).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::Errno;
use sheepdog_types::{BLOCK_SIZE, LayerKey, SlotId, Version, VolumeId};

use crate::api::{
    Applied, BlockRange, BlockState, LayerImage, LayerStat, Options, Payload, StoreIds, Usage,
};
use crate::background::Signals;
use crate::check::{self, CheckedWrite};
use crate::checkpoint::{Checkpointer, GROW_SLABS, index_offset, sums_offset};
use crate::damage::Damage;
use crate::error::{FlushError, WriteError};
use crate::format::{FLAG_ABSENT, FLAG_DIRECT, FLAG_RELEASE, Header, Kind};
use crate::layer::{Entry, LayerState, Place, SlabRef};
use crate::log::{LogState, Ring};
use crate::medium::{Medium, VFile};
use crate::states::States;
use crate::table::Table;

/// Locks, also after a panic elsewhere: every holder keeps the structure valid at each step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A write of so many blocks goes straight to the slab if nothing is there: it then costs half the
/// bytes, but a flush has a second file to sync.
pub(crate) const DIRECT_BLOCKS: usize = 64;

/// The files beside the log.
pub(crate) struct Files {
    pub(crate) superblock: Arc<dyn VFile>,
    pub(crate) data: Arc<dyn VFile>,
    pub(crate) index: Arc<dyn VFile>,
    pub(crate) sums: Arc<dyn VFile>,
}

/// Why the log cannot be applied at the moment.
#[derive(Clone, Debug)]
pub(crate) enum Stuck {
    Full,
    Failing(Arc<str>),
}

/// Lock order: `checkpointer`, `syncing`, `slabs_syncing`, `log`, a shard of `table`.
pub(crate) struct Engine {
    pub(crate) ids: StoreIds,
    pub(crate) options: Options,
    /// [`DIRECT_BLOCKS`], but tests may take another number.
    pub(crate) direct_blocks: usize,
    pub(crate) medium: Arc<dyn Medium>,
    pub(crate) files: Files,
    pub(crate) ring: Ring,
    pub(crate) table: Table,
    pub(crate) damage: Damage,
    pub(crate) log: Mutex<LogState>,
    /// Signalled when the log has room again, or never will.
    pub(crate) room: Condvar,
    /// End of the last record that changes something.
    pub(crate) changed_to: AtomicU64,
    /// The log is durable up to here.
    pub(crate) durable: AtomicU64,
    /// Changes up to here are in the slabs.
    pub(crate) applied_to: AtomicU64,
    pub(crate) syncing: Mutex<()>,
    /// Held while the slabs are synced and, if that fails, until the store is out of service: the
    /// kernel tells of lost bytes once, so whoever syncs next would hear that all is well.
    pub(crate) slabs_syncing: Mutex<()>,
    pub(crate) checkpointer: Mutex<Checkpointer>,
    /// Data blocks that may be stored in all.
    pub(crate) limit: AtomicU64,
    /// Data blocks that went straight to slabs, of which no checkpoint has heard.
    pub(crate) direct_written: AtomicU64,
    /// Set once, when the log can no longer be trusted to become durable.
    pub(crate) failed: OnceLock<Arc<str>>,
    pub(crate) stuck: Mutex<Option<Stuck>>,
    pub(crate) signals: Signals,
}

/// What a record needs.
#[derive(Clone, Copy)]
pub(crate) struct Need {
    pub(crate) len: u64,
    pub(crate) blocks: u64,
    pub(crate) privileged: bool,
}

impl Need {
    pub(crate) fn of(header: &Header, blocks: u32) -> Self {
        let privileged = matches!(header.kind, Kind::Clear | Kind::Delete | Kind::DeleteVolume);
        Self { len: header.record_len(), blocks: u64::from(blocks), privileged }
    }
}

impl Engine {
    /// See [`crate::Store::write`].
    pub(crate) fn write(
        &self,
        key: LayerKey,
        prev: Version,
        version: Version,
        first: u16,
        payload: Payload<'_>,
    ) -> Result<Applied, WriteError> {
        if version.seq <= prev.seq || version.writer < prev.writer {
            return Err(WriteError::Invalid("the version does not follow the one before"));
        }
        let write = CheckedWrite::new(first, payload)?;
        let mut header = Header {
            first,
            count: u32::from(write.range.count()),
            key,
            prev,
            version,
            ..Header::control(Kind::Data)
        };
        match payload {
            Payload::Data { .. } => {}
            Payload::Zero { absent, release, .. } => {
                header.kind = Kind::Clear;
                header.flags =
                    (u8::from(absent) * FLAG_ABSENT) | (u8::from(release) * FLAG_RELEASE);
            }
            Payload::Nothing => header.kind = Kind::Clear,
        }
        let need = Need::of(&header, header.count);
        let log = self.lock_with_room(need, || self.check_write(key, prev, version, &write))?;
        let Some(mut log) = log else { return Ok(Applied::Already) };
        let old = self.table.shard_of(key.object).get(key).and_then(LayerState::slab);
        let slab = old.map_or_else(|| self.take_slab(&mut log, need.privileged), Ok)?;
        let written = self.append_write(&mut log, &mut header, slab, &write);
        if let Err(error) = written {
            if old.is_none() {
                log.slabs.give(slab);
            }
            return Err(error);
        }
        self.apply_write(&mut log, &header, slab, write.crcs.iter().copied());
        self.finish(log);
        self.damage.heal(key, write.range.first(), write.range.end());
        if need.privileged {
            self.space_freed();
        }
        Ok(Applied::Now)
    }

    /// Whether the write may be applied (`Some`), was (`None`), or must not be.
    fn check_write(
        &self,
        key: LayerKey,
        prev: Version,
        version: Version,
        write: &CheckedWrite<'_>,
    ) -> Result<Option<()>, WriteError> {
        let shard = self.table.shard_of(key.object);
        let layer = shard.get(key);
        let have = layer.map_or(Version::NONE, |layer| layer.version);
        if have != prev {
            let repeated = version.writer == have.writer && version.seq <= have.seq;
            return if repeated { Ok(None) } else { Err(WriteError::Behind { have }) };
        }
        if let Some(newer) = shard.newest_existing(key.object).filter(|newest| *newest > key.layer)
        {
            return Err(WriteError::Frozen { newer });
        }
        if !write.crcs.is_empty() {
            let (first, end) = (write.range.first(), write.range.end());
            let held = layer.map_or(0, |layer| layer.data_in(first, end));
            self.check_space(u64::from(write.range.count() - held))?;
        }
        Ok(Some(()))
    }

    pub(crate) fn check_space(&self, more: u64) -> Result<(), WriteError> {
        let fits = || more == 0 || self.table.used.load(SeqCst) + more <= self.limit.load(SeqCst);
        if fits() {
            return Ok(());
        }
        self.look_for_space();
        if fits() { Ok(()) } else { Err(WriteError::NoSpace) }
    }

    /// Others may have freed space or taken it, or the file system may have grown. Not amid a
    /// checkpoint: part of what it brings to the slabs is there, and counts twice.
    fn look_for_space(&self) {
        if let Ok(checkpointer) = self.checkpointer.try_lock()
            && lock(&self.stuck).is_none()
        {
            self.update_limit(&checkpointer);
        }
    }

    /// The log, locked, with room for what is needed, after `check` said yes under that lock.
    /// Waits for a checkpoint if the log is full: that is the back-pressure on writers.
    pub(crate) fn lock_with_room(
        &self,
        need: Need,
        check: impl Fn() -> Result<Option<()>, WriteError>,
    ) -> Result<Option<MutexGuard<'_, LogState>>, WriteError> {
        if need.len > self.ring.max_record() {
            return Err(WriteError::Invalid("larger than a log segment"));
        }
        let mut log = lock(&self.log);
        loop {
            if check()?.is_none() {
                return Ok(None);
            }
            if let Some(reason) = self.failed.get() {
                return Err(WriteError::Failed(reason.clone()));
            }
            if log.has_room(&self.ring, need.len, need.blocks, need.privileged) {
                return Ok(Some(log));
            }
            match lock(&self.stuck).clone() {
                Some(Stuck::Full) => return Err(WriteError::NoSpace),
                Some(Stuck::Failing(reason)) => return Err(WriteError::Failed(reason)),
                None => {}
            }
            if self.signals.in_background() {
                self.signals.request_checkpoint();
                log = self.room.wait(log).unwrap_or_else(PoisonError::into_inner);
            } else {
                drop(log);
                // A failure shows as `stuck` or `failed` in the next round.
                let _ = self.checkpoint();
                log = lock(&self.log);
            }
        }
    }

    /// A free slab, whose index records and checksum tables have their space. A `privileged` change
    /// of a layer that does not exist yet gets one also where the file system has no space for
    /// these: it waits in the log until a checkpoint finds some.
    fn take_slab(&self, log: &mut LogState, privileged: bool) -> Result<SlabRef, WriteError> {
        if let Some(slab) = log.slabs.take() {
            return Ok(slab);
        }
        let lowest = log.slabs.lowest();
        let room = lowest.checked_add(GROW_SLABS).ok_or(WriteError::NoSpace)?;
        let grown = self.extend_tables(room);
        let what = "cannot extend the store's tables";
        match grown.map_err(|error| self.no_space_or_failed(what, &error)) {
            Err(WriteError::NoSpace) if privileged => {}
            other => {
                other?;
                log.slabs.note_room(room);
            }
        }
        log.slabs.take_this(lowest).ok_or(WriteError::NoSpace)
    }

    /// Makes room in `index` and `sums` for `slabs` slabs.
    pub(crate) fn extend_tables(&self, slabs: u32) -> io::Result<()> {
        self.files.index.allocate(index_offset(slabs, 0))?;
        self.files.sums.allocate(sums_offset(slabs, 0))
    }

    fn no_space_or_failed(&self, what: &str, error: &io::Error) -> WriteError {
        match Errno::from_io_error(error) {
            Some(Errno::NOSPC) => WriteError::NoSpace,
            _ => WriteError::Failed(self.fail(what, error)),
        }
    }

    /// Appends the record of a write, and writes its bytes: to the log, or to the slab before.
    fn append_write(
        &self,
        log: &mut LogState,
        header: &mut Header,
        slab: SlabRef,
        write: &CheckedWrite<'_>,
    ) -> Result<(), WriteError> {
        header.slab = slab.slab;
        let mut small = [0; 128];
        let mut large = Vec::new();
        let tables = check::crc_bytes(write.crcs, &mut small, &mut large);
        if !self.write_direct(header, slab, write)? {
            return self.append(log, header, &[tables], write.bytes);
        }
        header.flags |= FLAG_DIRECT;
        self.append(log, header, &[tables], &[])?;
        log.direct_to = log.end;
        Ok(())
    }

    /// Writes a large first write to its slab; false if it must go to the log. A crash before its
    /// record is in the log leaves bytes in the slab that no index record counts.
    fn write_direct(
        &self,
        header: &Header,
        slab: SlabRef,
        write: &CheckedWrite<'_>,
    ) -> Result<bool, WriteError> {
        let (first, end) = (write.range.first(), write.range.end());
        let takes = |layer: &LayerState| layer.takes_direct(first, end);
        if write.crcs.len() < self.direct_blocks
            || !self.table.shard_of(header.key.object).get(header.key).is_none_or(takes)
        {
            return Ok(false);
        }
        let Err(error) = self.files.data.write_at(&[write.bytes], slab.offset(first)) else {
            return Ok(true);
        };
        self.punch_or_warn(slab, (first, end));
        if Errno::from_io_error(&error) == Some(Errno::NOSPC) {
            return Err(WriteError::NoSpace);
        }
        tracing::warn!(disk = %self.ids.disk, %error, "cannot write to a slab: the log takes it");
        Ok(false)
    }

    /// Gives back what a change that was refused has left in a slab.
    fn punch_or_warn(&self, slab: SlabRef, blocks: (u16, u16)) {
        if let Err(error) = self.punch(slab, Some(blocks)) {
            tracing::warn!(disk = %self.ids.disk, %error, "cannot release space");
        }
    }

    pub(crate) fn append(
        &self,
        log: &mut LogState,
        header: &mut Header,
        tables: &[&[u8]],
        data: &[u8],
    ) -> Result<(), WriteError> {
        let durable = self.durable.load(SeqCst);
        let appended = log.append(&self.ring, durable, header, tables, data);
        appended.map_err(|error| self.no_space_or_failed("cannot write the log", &error))?;
        self.note_direct(header);
        Ok(())
    }

    /// Counts the blocks of a record that are in a slab already.
    pub(crate) fn note_direct(&self, header: &Header) {
        if header.is_direct() {
            self.direct_written.fetch_add(u64::from(header.count), SeqCst);
        }
    }

    /// Puts the store out of service for writes.
    pub(crate) fn fail(&self, what: &str, error: &io::Error) -> Arc<str> {
        let reason = self.failed.get_or_init(|| {
            tracing::error!(disk = %self.ids.disk, %error, "{what}: the disk takes no more writes; replace it");
            format!("{what}: {error}").into()
        });
        self.room.notify_all();
        reason.clone()
    }

    /// Publishes an appended write; also used by replay.
    pub(crate) fn apply_write(
        &self,
        log: &mut LogState,
        header: &Header,
        slab: SlabRef,
        mut crcs: impl Iterator<Item = u32>,
    ) {
        let state = match header.kind {
            Kind::Data => BlockState::Data,
            _ if header.flags & FLAG_ABSENT != 0 => BlockState::Absent,
            _ => BlockState::Zero,
        };
        let release = header.flags & FLAG_RELEASE != 0;
        let (first, end) = (header.first, header.first + header.count as u16);
        let place = |block: u16| {
            if header.is_direct() {
                return Place::Slab(slab.offset(block)).into();
            }
            let at = u64::from(block - first) * BLOCK_SIZE as u64;
            Place::Log(header.data_lsn() + at).into()
        };
        let entries = (first..end).map(|block| Entry {
            block,
            state,
            release,
            crc: crcs.next().unwrap_or(0),
            place: place(block),
        });
        let mut shard = self.table.shard_of(header.key.object);
        let layer = shard.get_or_insert(header.key);
        let old = (layer.version, layer.data_blocks);
        let range = (first, end, state);
        if layer.change(log.generation, (header.version, slab), range, entries) {
            log.dirty.push(header.key);
        }
        log.waiting += u64::from(header.count);
        self.table.count(header.key, old, (layer.version, layer.data_blocks));
    }

    /// Publishes a whole new content, or with [`Version::NONE`] a deletion; also used by replay.
    /// `keep`: another layer took over some of the old content.
    pub(crate) fn apply_replace(
        &self,
        log: &mut LogState,
        key: LayerKey,
        new: (Version, Option<SlabRef>),
        keep: bool,
        entries: Vec<Entry>,
    ) {
        let mut shard = self.table.shard_of(key.object);
        let layer = shard.get_or_insert(key);
        let old = (layer.version, layer.data_blocks);
        log.waiting += entries.len() as u64;
        if layer.replace(log.generation, new, keep, entries) {
            log.dirty.push(key);
        }
        self.table.count(key, old, (layer.version, layer.data_blocks));
    }

    fn apply_delete(&self, log: &mut LogState, key: LayerKey) {
        self.apply_replace(log, key, (Version::NONE, None), false, Vec::new());
        self.damage.heal(key, 0, u16::MAX);
    }

    /// Deletes all layers of a volume, which these are, from memory; also used by replay.
    pub(crate) fn apply_delete_volume(&self, log: &mut LogState, keys: &[LayerKey]) {
        keys.iter().for_each(|key| self.apply_delete(log, *key));
    }

    /// Ends a change: tells flushes how far they must sync and wakes background work if due.
    pub(crate) fn finish(&self, log: MutexGuard<'_, LogState>) {
        let (end, filling) = (log.end, log.is_filling(&self.ring));
        self.changed_to.store(end, SeqCst);
        drop(log);
        self.signals.changed(end - self.durable.load(SeqCst).min(end));
        if filling {
            self.signals.request_checkpoint();
        }
    }

    /// A checkpoint that found the disk full may succeed now.
    pub(crate) fn space_freed(&self) {
        if lock(&self.stuck).is_some() {
            self.signals.retry_checkpoint();
        }
    }

    /// See [`crate::Store::install`]. The bytes go to a new slab first.
    pub(crate) fn install(
        &self,
        key: LayerKey,
        expect: Option<Version>,
        image: &LayerImage,
    ) -> Result<bool, WriteError> {
        let states = check::image(image)?;
        let prev = expect.unwrap_or(Version::NONE);
        let mut header = Header {
            flags: FLAG_DIRECT,
            count: image.sums.crcs.len() as u32,
            key,
            prev,
            version: image.sums.version,
            ..Header::control(Kind::Install)
        };
        let check = || {
            let shard = self.table.shard_of(key.object);
            let layer = shard.get(key);
            if layer.map_or(Version::NONE, |layer| layer.version) != prev {
                return Ok(None);
            }
            let held = layer.map_or(0, |layer| u64::from(layer.data_blocks));
            self.check_space(u64::from(header.count).saturating_sub(held))?;
            Ok(Some(()))
        };
        let mut log = lock(&self.log);
        if check()?.is_none() {
            return Ok(false);
        }
        let slab = self.take_slab(&mut log, false)?;
        drop(log);
        let need = Need::of(&header, u32::from(BlockRange::ALL.count()));
        let locked = self.write_image(slab, &states, &image.data);
        let locked = locked.and_then(|()| self.lock_with_room(need, check));
        let mut crcs = Vec::new();
        crate::format::crcs_to_bytes(&image.sums.crcs, &mut crcs);
        header.slab = slab.slab;
        let appended = locked.and_then(|log| {
            let Some(mut log) = log else { return Ok(None) };
            self.append(&mut log, &mut header, &[states.bytes(), &crcs], &[]).map(|()| Some(log))
        });
        let Ok(Some(mut log)) = appended else {
            self.punch_or_warn(slab, (0, BlockRange::ALL.end()));
            lock(&self.log).slabs.give(slab);
            return appended.map(|_| false);
        };
        log.direct_to = log.end;
        let entries = install_entries(slab, &states, image.sums.crcs.iter().copied());
        self.apply_replace(&mut log, key, (header.version, Some(slab)), false, entries);
        self.finish(log);
        self.damage.heal(key, 0, u16::MAX);
        Ok(true)
    }

    /// Writes an image's data blocks to their places in a slab of their own.
    fn write_image(&self, slab: SlabRef, states: &States, data: &[u8]) -> Result<(), WriteError> {
        let mut at = 0;
        for run in states.runs(BlockState::Data) {
            let bytes = &data[at..at + run.bytes()];
            at += run.bytes();
            let written = self.files.data.write_at(&[bytes], slab.offset(run.first()));
            written.map_err(|error| match Errno::from_io_error(&error) {
                Some(Errno::NOSPC) => WriteError::NoSpace,
                _ => WriteError::Failed(format!("cannot write to a slab: {error}").into()),
            })?;
        }
        Ok(())
    }

    /// See [`crate::Store::delete`] and [`crate::Store::delete_at`].
    pub(crate) fn delete(
        &self,
        key: LayerKey,
        expect: Option<Version>,
    ) -> Result<bool, WriteError> {
        let mut header = Header { key, ..Header::control(Kind::Delete) };
        let log = self.lock_with_room(Need::of(&header, 0), || {
            let version = self.table.shard_of(key.object).version(key);
            let wanted = version != Version::NONE && expect.is_none_or(|e| e == version);
            Ok(wanted.then_some(()))
        })?;
        let Some(mut log) = log else { return Ok(false) };
        header.prev = self.table.shard_of(key.object).version(key);
        self.append(&mut log, &mut header, &[], &[])?;
        self.apply_delete(&mut log, key);
        self.finish(log);
        self.space_freed();
        Ok(true)
    }

    /// See [`crate::Store::delete_volume`].
    pub(crate) fn delete_volume(&self, volume: VolumeId) -> Result<usize, WriteError> {
        let mut header = Header::control(Kind::DeleteVolume);
        header.key.object.volume = volume;
        let log = self.lock_with_room(Need::of(&header, 0), || Ok(Some(())))?;
        let Some(mut log) = log else { return Ok(0) };
        let keys = self.table.keys_of(volume);
        if keys.is_empty() {
            return Ok(0);
        }
        self.append(&mut log, &mut header, &[], &[])?;
        self.apply_delete_volume(&mut log, &keys);
        self.finish(log);
        self.space_freed();
        Ok(keys.len())
    }

    /// Makes every change applied before the call durable; one caller at a time syncs, the others
    /// find it done. Never tries again after a failure: the kernel may have dropped the bytes.
    pub(crate) fn sync_log(&self) -> Result<(), FlushError> {
        let wanted = self.changed_to.load(SeqCst);
        let _one = lock(&self.syncing);
        if self.durable.load(SeqCst) >= wanted {
            return Ok(());
        }
        self.sync_all()?;
        let mut log = lock(&self.log);
        // It need not become durable: it only matters if it does.
        if log.has_room(&self.ring, crate::format::HEADER as u64, 0, false)
            && let Err(error) = self.note(&mut log)
        {
            tracing::debug!(%error, "no note of the last sync");
        }
        Ok(())
    }

    /// Syncs the log and what was written directly. The caller holds `syncing`.
    fn sync_all(&self) -> Result<(), FlushError> {
        let from = self.durable.load(SeqCst);
        let (to, direct) = {
            let log = lock(&self.log);
            (log.end, log.direct_to > from)
        };
        let _slabs = direct.then(|| lock(&self.slabs_syncing));
        if let Some(reason) = self.failed.get() {
            return Err(FlushError(reason.clone()));
        }
        self.signals.sync_begins();
        let mut files = self.ring.files_of(from, to);
        if direct {
            files.push(&self.files.data);
        }
        if let Err(error) = self.medium.sync_all(&files).into_iter().collect::<io::Result<()>>() {
            return Err(FlushError(self.fail("cannot make the log durable", &error)));
        }
        self.durable.store(to, SeqCst);
        let mut log = lock(&self.log);
        if log.noted.0 <= to {
            log.proven = log.noted.1;
        }
        Ok(())
    }

    /// Leaves a record of what is durable, so that later damage to it is not mistaken for a torn
    /// tail.
    fn note(&self, log: &mut LogState) -> io::Result<()> {
        let durable = self.durable.load(SeqCst);
        log.append(&self.ring, durable, &mut Header::control(Kind::Synced), &[], &[])?;
        log.noted = (log.end, durable);
        Ok(())
    }

    /// Makes the log durable up to `to`, and durable that it is. Replay does not compare the bytes
    /// of direct writes before such a record: a checkpoint may have changed them since.
    pub(crate) fn prove(&self, to: u64) -> Result<(), FlushError> {
        self.sync_log()?;
        let _one = lock(&self.syncing);
        let mut log = lock(&self.log);
        let needed = log.direct_to > log.proven && log.proven < to;
        if !needed {
            return Ok(());
        }
        let noted = if log.has_room_for_note(&self.ring) {
            self.note(&mut log)
        } else {
            Err(io::Error::other("no room in the log"))
        };
        drop(log);
        noted.map_err(|error| FlushError(self.fail("cannot write the log", &error)))?;
        self.sync_all()
    }

    pub(crate) fn stats(&self, slot: SlotId) -> Vec<LayerStat> {
        let shard = self.table.shard(slot);
        let mut stats: Vec<_> =
            shard.existing_in(slot).map(|(key, layer)| layer.stat(key)).collect();
        drop(shard);
        stats.sort_unstable_by_key(|stat| stat.key);
        stats
    }

    pub(crate) fn usage(&self) -> Usage {
        self.look_for_space();
        let block = BLOCK_SIZE as u64;
        Usage {
            capacity: self.limit.load(SeqCst).max(self.table.used.load(SeqCst)) * block,
            used: self.table.used.load(SeqCst) * block,
            objects: self.table.objects.load(SeqCst),
        }
    }
}

/// The entries of an installed layer; `crcs` are those of its data blocks.
pub(crate) fn install_entries(
    slab: SlabRef,
    states: &States,
    mut crcs: impl Iterator<Item = u32>,
) -> Vec<Entry> {
    let blocks = 0..BlockRange::ALL.end();
    let present = blocks.filter(|block| states.get(*block) != BlockState::Absent);
    let entry = |block| {
        let state = states.get(block);
        let crc = if state == BlockState::Data { crcs.next().unwrap_or(0) } else { 0 };
        Entry { block, state, release: true, crc, place: Place::Slab(slab.offset(block)).into() }
    };
    present.map(entry).collect()
}
