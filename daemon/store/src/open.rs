//! Creating a store, and opening one: read the superblock, the index and the checksum tables,
//! replay the log. Bytes of any kind end in an error, never in a panic.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use sheepdog_types::{BLOCK_SIZE, LayerKey, OBJECT_SIZE, Version};

use crate::api::{BlockRange, BlockState, Options, StoreIds};
use crate::background::Signals;
use crate::checkpoint::Checkpointer;
use crate::damage::Damage;
use crate::engine::{DIRECT_BLOCKS, Engine, Files, install_entries, lock};
use crate::error::OpenError;
use crate::format::{
    FORMAT, Header, Kind, Mark, SECTOR, SUPER_PART, SuperError, Superblock, crcs_from_bytes,
};
use crate::layer::{LayerState, SlabRef};
use crate::log::{LogState, Record, Replay, Ring, segment_name};
use crate::medium::{Medium, VFile};
use crate::states::{Changes, STATES_BYTES, States};

/// Slabs that a record may be ahead of those known: as many changes may have taken one, but have no
/// record yet. It bounds what a wrong record can make of the tables.
const MAX_AHEAD: u32 = 4096;

pub(crate) const SUPERBLOCK: &str = "superblock";
pub(crate) const DATA: &str = "data";
pub(crate) const INDEX: &str = "index";
pub(crate) const SUMS: &str = "sums";

/// Creates a store's files. The superblock comes last: without it there is no store.
pub(crate) fn create(
    medium: &dyn Medium,
    ids: StoreIds,
    options: &Options,
) -> Result<(), OpenError> {
    if options.segment_bytes == 0 || options.log_bytes / options.segment_bytes > 4096 {
        return Err(OpenError::InvalidOptions("more than 4096 log segments"));
    }
    let segments = (options.log_bytes / options.segment_bytes) as u32;
    let superblock = Superblock { ids, segment_bytes: options.segment_bytes, segments };
    if !superblock.geometry_is_valid() {
        return Err(OpenError::InvalidOptions(
            "log segments must be 64 KiB to 1 GiB, a multiple of 4096, and at least 4",
        ));
    }
    let make = |name: &str, len: u64| {
        let made = medium.open(name, true).and_then(|file| {
            file.allocate(len)?;
            file.sync()
        });
        made.map_err(OpenError::io(format!("cannot create {name}")))
    };
    for number in 0..segments as usize {
        make(&segment_name(number), options.segment_bytes)?;
    }
    for name in [DATA, INDEX, SUMS] {
        make(name, 0)?;
    }
    medium.sync_names().map_err(OpenError::io("cannot sync the directory"))?;
    let mark = Mark {
        sequence: 1,
        checkpoint: 0,
        log_start: 0,
        index_digest: 0,
        incarnation: 0,
        clean: true,
        prior_end: 0,
    };
    write_superblock(medium, &superblock, &mark)
        .map_err(OpenError::io("cannot write the superblock"))
}

fn write_superblock(medium: &dyn Medium, superblock: &Superblock, mark: &Mark) -> io::Result<()> {
    let file = medium.open(SUPERBLOCK, true)?;
    file.allocate(4 * SUPER_PART)?;
    for copy in Mark::COPIES {
        file.write_at(&[&mark.encode()], copy * SUPER_PART)?;
    }
    file.sync()?;
    for copy in 0..2 {
        file.write_at(&[&superblock.encode()], copy * SUPER_PART)?;
    }
    file.sync()?;
    medium.sync_names()
}

/// Opens a store, without threads. `dir` is for messages only.
pub(crate) fn open(
    medium: Arc<dyn Medium>,
    dir: &Path,
    options: Options,
) -> Result<Engine, OpenError> {
    let file = match medium.open(SUPERBLOCK, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(OpenError::NotAStore { dir: dir.into(), reason: "no superblock" });
        }
        other => other.map_err(OpenError::io("cannot open superblock"))?,
    };
    let superblock = read_superblock(file.as_ref())?;
    let mark = read_mark(file.as_ref())?;
    let part = |name: &str| match medium.open(name, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(OpenError::corrupt(name, "the file is missing"))
        }
        other => other.map_err(OpenError::io(format!("cannot open {name}"))),
    };
    let segments: Vec<_> = (0..superblock.segments as usize).map(segment_name).collect();
    let mut files = Vec::with_capacity(segments.len());
    for name in &segments {
        let file = part(name)?;
        if file.len().map_err(OpenError::io(format!("cannot read {name}")))?
            < superblock.segment_bytes
        {
            return Err(OpenError::corrupt(name, "the file is too short"));
        }
        files.push(file);
    }
    let ring = Ring::new(&superblock, files);
    let files =
        Files { superblock: file, data: part(DATA)?, index: part(INDEX)?, sums: part(SUMS)? };
    let loaded = crate::index::load(&files, mark, options.sums_cache_bytes)?;
    let mut log = LogState::new(mark.log_start, mark.log_start, mark.incarnation + 1);
    (log.slabs.next, log.slabs.room) = (loaded.next, loaded.room);
    loaded.free.into_iter().for_each(|slab| log.slabs.give(slab));
    let checkpointer = Checkpointer {
        mark,
        leftovers: loaded.leftovers,
        blocks: loaded.blocks,
        buf: Vec::new(),
        batch: Vec::new(),
    };
    let engine = Engine {
        ids: superblock.ids,
        options,
        direct_blocks: DIRECT_BLOCKS,
        medium,
        files,
        ring,
        table: loaded.table,
        damage: Damage::default(),
        log: Mutex::new(log),
        room: Condvar::new(),
        changed_to: AtomicU64::new(mark.log_start),
        durable: AtomicU64::new(mark.log_start),
        applied_to: AtomicU64::new(mark.log_start),
        syncing: Mutex::default(),
        slabs_syncing: Mutex::default(),
        checkpointer: Mutex::new(checkpointer),
        limit: AtomicU64::new(0),
        direct_written: AtomicU64::new(0),
        failed: OnceLock::new(),
        stuck: Mutex::default(),
        signals: Signals::default(),
    };
    engine.recover(mark)?;
    Ok(engine)
}

fn read_sector(file: &dyn VFile, name: &str, offset: u64) -> Result<[u8; SECTOR], OpenError> {
    let mut buf = [0; SECTOR];
    match file.read_at(&mut buf, offset) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(OpenError::corrupt(name, "the file is too short"))
        }
        other => other.map(|()| buf).map_err(OpenError::io(format!("cannot read {name}"))),
    }
}

/// The superblock from whichever copy is whole; the other is repaired.
fn read_superblock(file: &dyn VFile) -> Result<Superblock, OpenError> {
    let mut copies = Vec::new();
    for copy in 0..2 {
        copies.push(Superblock::decode(&read_sector(file, SUPERBLOCK, copy * SUPER_PART)?));
    }
    if let Some(&Err(SuperError::Other(found))) =
        copies.iter().find(|copy| matches!(copy, Err(SuperError::Other(_))))
    {
        return Err(OpenError::OtherFormat { found, supported: FORMAT });
    }
    let Some(good) = copies.iter().find_map(|copy| copy.ok()) else {
        return Err(OpenError::corrupt(SUPERBLOCK, "both copies are damaged (offsets 0, 4096)"));
    };
    for (copy, state) in (0..).zip(&copies) {
        if state.is_err() {
            tracing::warn!("superblock: copy {copy} is damaged, repaired from the other");
            file.write_at(&[&good.encode()], copy * SUPER_PART)
                .and_then(|()| file.sync())
                .map_err(OpenError::io("cannot repair the superblock"))?;
        }
    }
    Ok(good)
}

/// The newest mark. The other copy is made equal before anything else is written.
fn read_mark(file: &dyn VFile) -> Result<Mark, OpenError> {
    let mut copies = Vec::new();
    for copy in Mark::COPIES {
        copies.push((copy, Mark::decode(&read_sector(file, SUPERBLOCK, copy * SUPER_PART)?)));
    }
    let newest = copies.iter().filter_map(|(_, mark)| *mark).max_by_key(|mark| mark.sequence);
    let newest = newest.ok_or_else(|| {
        OpenError::corrupt(SUPERBLOCK, "both checkpoint marks are damaged (offsets 8192, 12288)")
    })?;
    for (copy, mark) in copies {
        if mark == Some(newest) {
            continue;
        }
        if mark.is_none() {
            tracing::warn!("superblock: checkpoint mark {copy} is damaged, repaired");
        }
        file.write_at(&[&newest.encode()], copy * SUPER_PART)
            .and_then(|()| file.sync())
            .map_err(OpenError::io("cannot repair the checkpoint mark"))?;
    }
    Ok(newest)
}

impl Engine {
    /// Brings the store from its last checkpoint to the end of its log, and makes that durable.
    fn recover(&self, mark: Mark) -> Result<(), OpenError> {
        let end = if mark.clean { mark.log_start } else { self.replay(&mark)? };
        let io = |what: &'static str| OpenError::io(what);
        if end > mark.log_start {
            // After a mere crash of the process all this may be in the page cache only.
            let mut files = self.ring.files_of(mark.log_start, end);
            if lock(&self.log).direct_to > mark.log_start {
                files.push(&self.files.data);
            }
            let synced: io::Result<()> = self.medium.sync_all(&files).into_iter().collect();
            synced.map_err(io("cannot sync the log"))?;
        }
        self.durable.store(end, SeqCst);
        {
            let mut log = lock(&self.log);
            (log.end, log.noted) = (end, (end, log.proven));
            if log.dirty.is_empty() {
                self.applied_to.store(end, SeqCst);
            }
        }
        self.changed_to.store(end, SeqCst);
        let mut checkpointer = lock(&self.checkpointer);
        let next = Mark {
            sequence: mark.sequence + 1,
            incarnation: mark.incarnation + 1,
            clean: false,
            prior_end: end,
            ..mark
        };
        self.write_mark(&mut checkpointer, next).map_err(io("cannot write the mark"))?;
        if !mark.clean {
            self.punch_free();
        }
        self.update_limit(&checkpointer);
        Ok(())
    }

    /// An interrupted checkpoint or write may have written to slabs that are free. That their
    /// space comes back can wait: a full file system may have none for that.
    fn punch_free(&self) {
        let Ok(end) = self.files.data.len() else { return };
        let log = lock(&self.log);
        let used = log.slabs.free().filter(|slab| slab.offset(0) < end);
        let mut holes: Vec<_> = used.map(|slab| (slab.offset(0), OBJECT_SIZE)).collect();
        let unused = u64::from(log.slabs.next) * OBJECT_SIZE;
        holes.extend((unused < end).then(|| (unused, end - unused)));
        for (offset, len) in holes {
            if let Err(error) = self.files.data.punch(offset, len) {
                tracing::warn!(disk = %self.ids.disk, %error, "cannot release the space of free slabs");
                return;
            }
        }
    }

    /// Applies the records of the log to the layers in memory. Gives the end of the log.
    fn replay(&self, mark: &Mark) -> Result<u64, OpenError> {
        let io = || OpenError::io("cannot read the log");
        let proof = Replay::new(&self.ring, mark).find_proof().map_err(io())?;
        if proof.end < proof.durable {
            let what = format!(
                "is damaged, though the one at LSN {} shows that it was durable",
                proof.said_at
            );
            return Err(self.damaged_record(proof.end, &what));
        }
        let mut log = lock(&self.log);
        log.proven = proof.durable;
        let mut replay = Replay::new(&self.ring, mark);
        let mut records = 0u64;
        let mut end = replay.position;
        while let Some(record) = replay.next(true).map_err(io())? {
            if !self.is_whole(&record, proof.durable).map_err(OpenError::io("cannot read data"))? {
                break;
            }
            records += 1;
            end = record.header.lsn + record.header.record_len();
            self.replay_record(&mut log, &record)?;
            self.note_direct(&record.header);
        }
        let bytes = end - mark.log_start;
        tracing::info!(disk = %self.ids.disk, records, bytes, "the log was replayed");
        Ok(end)
    }

    /// Whether a record and the bytes it stands for reached the medium. If it was durable once,
    /// damaged bytes are bit rot: the record counts, and whoever reads those blocks is told.
    fn is_whole(&self, record: &Record<'_>, durable: u64) -> io::Result<bool> {
        let header = &record.header;
        if header.lsn < durable {
            if !record.is_intact() {
                tracing::error!(disk = %self.ids.disk, layer = %header.key,
                    file = self.ring.name(header.lsn), offset = self.ring.offset(header.lsn),
                    "the log holds damaged blocks");
            }
            return Ok(true);
        }
        if !header.is_direct() {
            return Ok(record.is_intact());
        }
        let slab = SlabRef::unused(header.slab);
        let mut crcs = record.crcs();
        let runs: Vec<_> = match (header.kind, install_states(header, record.tables)) {
            (Kind::Install, Some((states, _))) => states.runs(BlockState::Data).collect(),
            (Kind::Data, _) => {
                BlockRange::new(header.first, header.count as usize).into_iter().collect()
            }
            _ => return Ok(true),
        };
        let mut buf = Vec::new();
        for run in runs {
            buf.resize(run.bytes(), 0);
            match self.files.data.read_at(&mut buf, slab.offset(run.first())) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                other => other?,
            }
            if !buf.chunks_exact(BLOCK_SIZE).all(|b| Some(crc32c::crc32c(b)) == crcs.next()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn damaged_record(&self, lsn: u64, what: &str) -> OpenError {
        let at = self.ring.offset(lsn);
        let what = format!("the record at offset {at} (LSN {lsn}) {what}");
        OpenError::corrupt(self.ring.name(lsn), what)
    }

    fn replay_record(&self, log: &mut LogState, record: &Record<'_>) -> Result<(), OpenError> {
        let Record { header, tables, .. } = record;
        let key = header.key;
        let follows = match header.kind {
            Kind::Synced | Kind::DeleteVolume | Kind::End => true,
            Kind::Delete => self.version_is(header),
            _ => self.version_is(header) && header.version != Version::NONE,
        };
        let damaged = |what: &str| Err(self.damaged_record(header.lsn, what));
        if !follows {
            return damaged(&format!("does not follow the version of {key}"));
        }
        match header.kind {
            Kind::Data | Kind::Clear => {
                let Some(slab) = self.replay_slab(log, header, true) else {
                    return damaged("names a slab that it cannot have");
                };
                self.apply_write(log, header, slab, record.crcs());
            }
            Kind::Install => {
                let Some((states, crcs)) = install_states(header, tables) else {
                    return damaged("has wrong block states");
                };
                let Some(slab) = self.replay_slab(log, header, false) else {
                    return damaged("names a slab that it cannot have");
                };
                let entries = install_entries(slab, &states, crcs_from_bytes(crcs));
                self.apply_replace(log, key, (header.version, Some(slab)), false, entries);
            }
            Kind::Delete => {
                self.apply_replace(log, key, (Version::NONE, None), false, Vec::new());
            }
            Kind::DeleteVolume => {
                self.apply_delete_volume(log, &self.table.keys_of(key.object.volume));
            }
            Kind::Merge => {
                let lower = LayerKey { object: key.object, layer: header.lower };
                if lower.layer >= key.layer
                    || self.table.shard_of(key.object).version(lower) != header.version
                {
                    return damaged(&format!("does not follow the version of {lower}"));
                }
                let base = self
                    .table
                    .shard_of(key.object)
                    .get(lower)
                    .and_then(|layer| layer.visible_base().cloned());
                let sums = base.map(|base| self.sums_or_distrust(lower, &base)).transpose();
                let sums = sums.map_err(OpenError::io("cannot read sums"))?;
                let moved = self.merge_entries(key, lower, sums.as_deref());
                self.apply_merge(log, key, lower, &moved);
            }
            Kind::Patch => {
                let changes = Changes::of_record(tables, header.count);
                let Some(changes) = changes.filter(|_| header.prev != Version::NONE) else {
                    return damaged("has wrong block changes");
                };
                if self.replay_slab(log, header, true).is_none() {
                    return damaged("names a slab that it cannot have");
                }
                self.apply_patch(log, header, &changes, record.crcs());
            }
            Kind::Synced | Kind::End => {}
        }
        if header.is_direct() {
            log.direct_to = header.lsn + header.record_len();
        }
        Ok(())
    }

    /// The slab that a record names: that of its layer, or for a new content a free one.
    fn replay_slab(&self, log: &mut LogState, header: &Header, keep: bool) -> Option<SlabRef> {
        let shard = self.table.shard_of(header.key.object);
        let has = shard.get(header.key).and_then(LayerState::slab).filter(|_| keep);
        drop(shard);
        if let Some(slab) = has {
            return (slab.slab == header.slab).then_some(slab);
        }
        // The next checkpoint makes room for it in the tables, if they have none (any more).
        let ahead = header.slab.saturating_sub(log.slabs.next.max(log.slabs.room));
        (ahead <= MAX_AHEAD).then(|| log.slabs.take_this(header.slab)).flatten()
    }

    fn version_is(&self, header: &Header) -> bool {
        let shard = self.table.shard_of(header.key.object);
        shard.version(header.key) == header.prev
    }
}

/// The block states and the bytes of the checksums of an install record; `None` if they make no
/// sense.
fn install_states<'a>(header: &Header, tables: &'a [u8]) -> Option<(States, &'a [u8])> {
    let (states, crcs) = tables.split_first_chunk::<STATES_BYTES>()?;
    let states = States::from_bytes(*states)?;
    (u32::from(states.data_blocks()) == header.count).then_some((states, crcs))
}
