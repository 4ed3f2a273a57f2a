//! The store without threads: applies changes, answers reads, syncs the log. Background work is
//! asked for through [`Signals`](crate::background::Signals).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::Errno;
use sheepdog_types::{LayerKey, SlotId, Version, VolumeId};

use crate::api::{
    Applied, BlockRange, BlockState, LayerImage, LayerStat, Options, Payload, StoreIds, Usage,
};
use crate::background::Signals;
use crate::check::{self, CheckedWrite};
use crate::checkpoint::Checkpointer;
use crate::error::{FlushError, WriteError};
use crate::format::{FLAG_ABSENT, FLAG_RELEASE, Header, Kind};
use crate::layer::Entry;
use crate::log::{LogState, Ring};
use crate::medium::{Medium, VFile};
use crate::states::States;
use crate::table::Table;

/// Locks, also after a panic elsewhere: every holder keeps the structure valid at each step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

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

/// Lock order: `checkpointer`, `syncing`, `log`, a shard of `table`.
pub(crate) struct Engine {
    pub(crate) ids: StoreIds,
    pub(crate) options: Options,
    pub(crate) medium: Arc<dyn Medium>,
    pub(crate) files: Files,
    pub(crate) ring: Ring,
    pub(crate) table: Table,
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
    pub(crate) checkpointer: Mutex<Checkpointer>,
    /// Data blocks that may be stored in all.
    pub(crate) limit: AtomicU64,
    /// Set once, when the log can no longer be trusted to become durable.
    pub(crate) failed: OnceLock<Arc<str>>,
    pub(crate) stuck: Mutex<Option<Stuck>>,
    pub(crate) signals: Signals,
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
        if let Payload::Zero { absent, release, .. } = payload {
            header.kind = Kind::Clear;
            header.flags = (u8::from(absent) * FLAG_ABSENT) | (u8::from(release) * FLAG_RELEASE);
        }
        let privileged = header.kind == Kind::Clear;
        let log = self.lock_with_room(header.record_len(), privileged, || {
            self.check_write(key, prev, version, &write)
        })?;
        let Some(mut log) = log else { return Ok(Applied::Already) };
        let mut small = [0; 128];
        let mut large = Vec::new();
        let tables = check::crc_bytes(write.crcs, &mut small, &mut large);
        self.append(&mut log, &mut header, &[tables], write.bytes)?;
        self.apply_write(&mut log, &header, write.crcs.iter().copied());
        self.finish(log);
        if privileged {
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
        if !write.crcs.is_empty() {
            let (first, end) = (write.range.first(), write.range.end());
            let held = layer.map_or(0, |layer| layer.data_in(first, end));
            self.check_space(u64::from(write.range.count() - held))?;
        }
        Ok(Some(()))
    }

    fn check_space(&self, more: u64) -> Result<(), WriteError> {
        let used = self.table.used.load(SeqCst);
        if more > 0 && used + more > self.limit.load(SeqCst) {
            return Err(WriteError::NoSpace);
        }
        Ok(())
    }

    /// The log, locked, with room for a record of `len` bytes, after `check` said yes under that
    /// lock. Waits for a checkpoint if the log is full: that is the back-pressure on writers.
    fn lock_with_room(
        &self,
        len: u64,
        privileged: bool,
        check: impl Fn() -> Result<Option<()>, WriteError>,
    ) -> Result<Option<MutexGuard<'_, LogState>>, WriteError> {
        if len > self.ring.max_record() {
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
            if log.has_room(&self.ring, len, privileged) {
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

    fn append(
        &self,
        log: &mut LogState,
        header: &mut Header,
        tables: &[&[u8]],
        data: &[u8],
    ) -> Result<(), WriteError> {
        let durable = self.durable.load(SeqCst);
        log.append(&self.ring, durable, header, tables, data).map_err(|error| {
            if Errno::from_io_error(&error) == Some(Errno::NOSPC) {
                return WriteError::NoSpace;
            }
            WriteError::Failed(self.fail("cannot write the log", &error))
        })
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
        mut crcs: impl Iterator<Item = u32>,
    ) {
        let state = match header.kind {
            Kind::Data => BlockState::Data,
            _ if header.flags & FLAG_ABSENT != 0 => BlockState::Absent,
            _ => BlockState::Zero,
        };
        let release = header.flags & FLAG_RELEASE != 0;
        let (first, end) = (header.first, header.first + header.count as u16);
        let data = header.data_lsn();
        let entries = (first..end).map(|block| Entry {
            block,
            state,
            release,
            crc: crcs.next().unwrap_or(0),
            lsn: data + u64::from(block - first) * sheepdog_types::BLOCK_SIZE as u64,
        });
        let mut shard = self.table.shard_of(header.key.object);
        let layer = shard.get_or_insert(header.key);
        let old = (layer.version, layer.data_blocks);
        let range = (first, end, state);
        if layer.change(log.generation, header.version, range, entries) {
            log.dirty.push(header.key);
        }
        self.table.count(header.key, old, (layer.version, layer.data_blocks));
    }

    /// Publishes a whole new content, or with [`Version::NONE`] a deletion; also used by replay.
    pub(crate) fn apply_replace(
        &self,
        log: &mut LogState,
        key: LayerKey,
        version: Version,
        entries: Vec<Entry>,
    ) {
        let mut shard = self.table.shard_of(key.object);
        let layer = shard.get_or_insert(key);
        let old = (layer.version, layer.data_blocks);
        if layer.replace(log.generation, version, entries) {
            log.dirty.push(key);
        }
        self.table.count(key, old, (layer.version, layer.data_blocks));
    }

    /// Ends a change: tells flushes how far they must sync and wakes background work if due.
    fn finish(&self, log: MutexGuard<'_, LogState>) {
        let (start, end) = (log.start, log.end);
        self.changed_to.store(end, SeqCst);
        drop(log);
        self.signals.changed(end - self.durable.load(SeqCst).min(end));
        if end - start > self.ring.bytes() / 2 {
            self.signals.request_checkpoint();
        }
    }

    /// A checkpoint that found the disk full may succeed now.
    fn space_freed(&self) {
        if lock(&self.stuck).is_some() {
            self.signals.retry_checkpoint();
        }
    }

    /// See [`crate::Store::install`].
    pub(crate) fn install(
        &self,
        key: LayerKey,
        expect: Option<Version>,
        image: &LayerImage,
    ) -> Result<bool, WriteError> {
        check::image(image)?;
        let prev = expect.unwrap_or(Version::NONE);
        let mut header = Header {
            count: image.sums.crcs.len() as u32,
            key,
            prev,
            version: image.sums.version,
            ..Header::control(Kind::Install)
        };
        let log = self.lock_with_room(header.record_len(), false, || {
            let shard = self.table.shard_of(key.object);
            let layer = shard.get(key);
            if layer.map_or(Version::NONE, |layer| layer.version) != prev {
                return Ok(None);
            }
            let held = layer.map_or(0, |layer| u64::from(layer.data_blocks));
            self.check_space(u64::from(header.count).saturating_sub(held))?;
            Ok(Some(()))
        })?;
        let Some(mut log) = log else { return Ok(false) };
        let mut states = States::default();
        for run in &image.sums.runs {
            (run.range.first()..run.range.end()).for_each(|block| states.set(block, run.state));
        }
        let mut crcs = Vec::new();
        crate::format::crcs_to_bytes(&image.sums.crcs, &mut crcs);
        self.append(&mut log, &mut header, &[states.bytes(), &crcs], &image.data)?;
        let entries = install_entries(&header, &states, image.sums.crcs.iter().copied());
        self.apply_replace(&mut log, key, header.version, entries);
        self.finish(log);
        Ok(true)
    }

    /// See [`crate::Store::delete`] and [`crate::Store::delete_at`].
    pub(crate) fn delete(
        &self,
        key: LayerKey,
        expect: Option<Version>,
    ) -> Result<bool, WriteError> {
        let mut header = Header { key, ..Header::control(Kind::Delete) };
        let log = self.lock_with_room(header.record_len(), true, || {
            let version = self.table.shard_of(key.object).version(key);
            let wanted = version != Version::NONE && expect.is_none_or(|e| e == version);
            Ok(wanted.then_some(()))
        })?;
        let Some(mut log) = log else { return Ok(false) };
        header.prev = self.table.shard_of(key.object).version(key);
        self.append(&mut log, &mut header, &[], &[])?;
        self.apply_replace(&mut log, key, Version::NONE, Vec::new());
        self.finish(log);
        self.space_freed();
        Ok(true)
    }

    /// See [`crate::Store::delete_volume`].
    pub(crate) fn delete_volume(&self, volume: VolumeId) -> Result<usize, WriteError> {
        let mut header = Header::control(Kind::DeleteVolume);
        header.key.object.volume = volume;
        let len = header.record_len();
        let log = self.lock_with_room(len, true, || Ok(Some(())))?;
        let Some(mut log) = log else { return Ok(0) };
        let keys = self.table.keys_of(volume);
        if keys.is_empty() {
            return Ok(0);
        }
        self.append(&mut log, &mut header, &[], &[])?;
        for key in &keys {
            self.apply_replace(&mut log, *key, Version::NONE, Vec::new());
        }
        self.finish(log);
        self.space_freed();
        Ok(keys.len())
    }

    /// Makes every change applied before the call durable; one caller at a time syncs, the others
    /// find it done. Never tries again after a failure: the kernel may have dropped the bytes.
    pub(crate) fn sync_log(&self) -> Result<(), FlushError> {
        let wanted = self.changed_to.load(SeqCst);
        let _one = lock(&self.syncing);
        let from = self.durable.load(SeqCst);
        if from >= wanted {
            return Ok(());
        }
        if let Some(reason) = self.failed.get() {
            return Err(FlushError(reason.clone()));
        }
        let to = lock(&self.log).end;
        self.signals.sync_begins();
        if let Err(error) = self.ring.sync(from, to) {
            return Err(FlushError(self.fail("cannot sync the log", &error)));
        }
        self.durable.store(to, SeqCst);
        self.note_synced();
        Ok(())
    }

    /// Leaves a record of what is durable, so that later damage to it is not mistaken for a torn
    /// tail. The record itself need not become durable: it only matters if it does.
    fn note_synced(&self) {
        let mut log = lock(&self.log);
        let mut header = Header::control(Kind::Synced);
        if log.has_room(&self.ring, header.record_len(), false) {
            let durable = self.durable.load(SeqCst);
            if let Err(error) = log.append(&self.ring, durable, &mut header, &[], &[]) {
                tracing::debug!(%error, "no note of the last sync");
            }
        }
    }

    pub(crate) fn stats(&self, slot: SlotId) -> Vec<LayerStat> {
        let shard = self.table.shard(slot);
        let mut stats: Vec<_> = shard
            .existing()
            .map(crate::layer::LayerState::stat)
            .filter(|stat| stat.key.object.slot() == slot)
            .collect();
        drop(shard);
        stats.sort_unstable_by_key(|stat| stat.key);
        stats
    }

    pub(crate) fn usage(&self) -> Usage {
        let block = sheepdog_types::BLOCK_SIZE as u64;
        Usage {
            capacity: self.limit.load(SeqCst).max(self.table.used.load(SeqCst)) * block,
            used: self.table.used.load(SeqCst) * block,
            objects: self.table.objects.load(SeqCst),
        }
    }
}

/// The entries of an installed layer; `crcs` are those of its data blocks.
pub(crate) fn install_entries(
    header: &Header,
    states: &States,
    mut crcs: impl Iterator<Item = u32>,
) -> Vec<Entry> {
    let mut lsn = header.data_lsn();
    let mut entries = Vec::new();
    for block in BlockRange::ALL.first()..BlockRange::ALL.end() {
        let state = states.get(block);
        if state == BlockState::Absent {
            continue;
        }
        let mut entry = Entry { block, state, release: true, crc: 0, lsn: 0 };
        if state == BlockState::Data {
            (entry.crc, entry.lsn) = (crcs.next().unwrap_or(0), lsn);
            lsn += sheepdog_types::BLOCK_SIZE as u64;
        }
        entries.push(entry);
    }
    entries
}
