//! Creating a store, and opening one: read the superblock, the index and the checksum tables,
//! replay the log. Bytes of any kind end in an error, never in a panic.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use sheepdog_types::{BLOCK_SIZE, OBJECT_SIZE, Version};

use crate::api::{BlockState, Options, StoreIds};
use crate::background::Signals;
use crate::checkpoint::{Checkpointer, SUMS_BYTES, sums_offset};
use crate::engine::{Engine, Files, install_entries, lock};
use crate::error::OpenError;
use crate::format::{
    FORMAT, Header, IndexRecord, IndexedLayer, Kind, Mark, SECTOR, SUPER_PART, SuperError,
    Superblock, crcs_from_bytes, slot_hash,
};
use crate::layer::{Base, Content, SlabRef};
use crate::log::{LogState, Replay, Ring, segment_name};
use crate::medium::{Medium, VFile};
use crate::states::{STATES_BYTES, States};
use crate::table::Table;

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
    let table = Table::new();
    let checkpointer = read_index(&files, &table, mark)?;
    let engine = Engine {
        ids: superblock.ids,
        options,
        medium,
        files,
        ring,
        table,
        log: Mutex::new(LogState::new(mark.log_start, mark.log_start, mark.incarnation + 1)),
        room: Condvar::new(),
        changed_to: AtomicU64::new(mark.log_start),
        durable: AtomicU64::new(mark.log_start),
        applied_to: AtomicU64::new(mark.log_start),
        syncing: Mutex::default(),
        checkpointer: Mutex::new(checkpointer),
        limit: AtomicU64::new(0),
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
    if let Some(&Err(SuperError::Newer(found))) =
        copies.iter().find(|copy| matches!(copy, Err(SuperError::Newer(_))))
    {
        return Err(OpenError::NewerFormat { found, supported: FORMAT });
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

/// Loads what the checkpoint `mark` committed.
fn read_index(files: &Files, table: &Table, mark: Mark) -> Result<Checkpointer, OpenError> {
    const CHUNK_SLABS: u64 = 512;
    let mut reader = IndexReader {
        files,
        table,
        digest: 0,
        first_damaged: None,
        checkpointer: Checkpointer {
            mark,
            free: Vec::new(),
            next_slab: 0,
            leftovers: Vec::new(),
            blocks: 0,
            buf: Vec::new(),
        },
    };
    let slab_bytes = 2 * SECTOR as u64;
    let len = files.index.len().map_err(OpenError::io("cannot read index"))?;
    // After a power cut the file may end with the first record of a pair.
    let slabs = len.div_ceil(slab_bytes).min(u64::from(u32::MAX));
    let mut buf = Vec::new();
    for from in (0..slabs).step_by(CHUNK_SLABS as usize) {
        let count = CHUNK_SLABS.min(slabs - from);
        buf.clear();
        buf.resize((count * slab_bytes) as usize, 0);
        let held = (len - from * slab_bytes).min(buf.len() as u64) as usize;
        files
            .index
            .read_at(&mut buf[..held], from * slab_bytes)
            .map_err(OpenError::io("cannot read index"))?;
        for (slab, bytes) in (from as u32..).zip(buf.chunks_exact(2 * SECTOR)) {
            reader.slab(slab, bytes)?;
        }
    }
    if reader.digest != mark.index_digest {
        let what = reader.first_damaged.map_or_else(
            || "records are missing or from another time".into(),
            |slab| format!("a record of slab {slab} is damaged"),
        );
        return Err(OpenError::corrupt(INDEX, what));
    }
    Ok(reader.checkpointer)
}

struct IndexReader<'a> {
    files: &'a Files,
    table: &'a Table,
    digest: u64,
    first_damaged: Option<u32>,
    checkpointer: Checkpointer,
}

impl IndexReader<'_> {
    /// Takes up the committed one of a slab's two records, if it has one.
    fn slab(&mut self, slab: u32, bytes: &[u8]) -> Result<(), OpenError> {
        let mut committed: Option<(SlabRef, IndexRecord)> = None;
        let limit = self.checkpointer.mark.checkpoint;
        for (slot, bytes) in (0u8..).zip(bytes.chunks_exact(SECTOR)) {
            let Some(bytes) = bytes.first_chunk::<SECTOR>() else { continue };
            if *bytes == [0; SECTOR] {
                continue;
            }
            self.use_slabs_below(slab);
            match IndexRecord::decode(bytes, slab) {
                None => self.first_damaged = self.first_damaged.or(Some(slab)),
                Some(record) if record.checkpoint > limit => {
                    self.checkpointer.leftovers.push((slab, slot));
                }
                Some(record) => {
                    let newer = committed
                        .as_ref()
                        .is_none_or(|(_, known)| known.checkpoint < record.checkpoint);
                    if newer {
                        let hash = slot_hash(bytes);
                        committed = Some((SlabRef { slab, slot, hash }, record));
                    }
                }
            }
        }
        let Some((place, record)) = committed else {
            if self.checkpointer.next_slab == slab + 1 {
                self.checkpointer.free.push(SlabRef { slab, slot: 1, hash: 0 });
            }
            return Ok(());
        };
        self.digest = self.digest.wrapping_add(place.hash);
        match record.layer {
            Some(layer) => self.layer(place, layer),
            None => {
                self.checkpointer.free.push(place);
                Ok(())
            }
        }
    }

    /// Slabs that were skipped on the way to `slab` were never used.
    fn use_slabs_below(&mut self, slab: u32) {
        let next = &mut self.checkpointer.next_slab;
        let skipped = (*next..slab).map(|slab| SlabRef { slab, slot: 1, hash: 0 });
        self.checkpointer.free.extend(skipped);
        *next = (*next).max(slab + 1);
    }

    fn layer(&mut self, place: SlabRef, layer: IndexedLayer) -> Result<(), OpenError> {
        let damaged =
            |what: &str| OpenError::corrupt(INDEX, format!("slab {}: {what}", place.slab));
        if layer.version == Version::NONE {
            return Err(damaged("a layer without a version"));
        }
        let crcs = self.sums(place, &layer)?;
        let mut shard = self.table.shard_of(layer.key.object);
        let state = shard.get_or_insert(layer.key);
        if state.base.is_some() {
            return Err(damaged("its layer has another slab too"));
        }
        state.version = layer.version;
        state.data_blocks = layer.states.data_blocks();
        state.zero_blocks = layer.states.zero_blocks();
        let content = Content { states: Box::new(layer.states), crcs };
        state.base = Some(Base { slab: place, content });
        self.checkpointer.blocks += u64::from(state.data_blocks);
        self.table.count(layer.key, (Version::NONE, 0), (layer.version, state.data_blocks));
        Ok(())
    }

    fn sums(
        &self,
        place: SlabRef,
        layer: &IndexedLayer,
    ) -> Result<Box<[u32; SUMS_BYTES / 4]>, OpenError> {
        let mut bytes = [0; SUMS_BYTES];
        let read = self.files.sums.read_at(&mut bytes, sums_offset(place.slab, place.slot));
        let whole = match read {
            Ok(()) => crc32c::crc32c(&bytes) == layer.sums_crc,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(OpenError::io("cannot read sums")(error)),
        };
        let mut crcs = Box::new([0; SUMS_BYTES / 4]);
        for (crc, value) in crcs.iter_mut().zip(crcs_from_bytes(&bytes)) {
            *crc = value;
        }
        if !whole {
            tracing::error!(layer = %layer.key, slab = place.slab,
                "sums: the checksum table is damaged: the layer's blocks are treated as damaged");
            self.distrust(place, &layer.states, &mut crcs)?;
        }
        Ok(crcs)
    }

    /// Makes sure that no block of a slab whose checksums are lost matches its checksum, so that
    /// each read reports it and a replica repairs it.
    fn distrust(
        &self,
        place: SlabRef,
        states: &States,
        crcs: &mut [u32; SUMS_BYTES / 4],
    ) -> Result<(), OpenError> {
        let mut block_bytes = vec![0; BLOCK_SIZE];
        for block in states.blocks(BlockState::Data) {
            match self.files.data.read_at(&mut block_bytes, place.offset(block)) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => block_bytes.fill(0),
                other => other.map_err(OpenError::io("cannot read data"))?,
            }
            crcs[usize::from(block)] = !crc32c::crc32c(&block_bytes);
        }
        Ok(())
    }
}

impl Engine {
    /// Brings the store from its last checkpoint to the end of its log, and makes that durable.
    fn recover(&self, mark: Mark) -> Result<(), OpenError> {
        let end = if mark.clean { mark.log_start } else { self.replay(mark)? };
        let io = |what: &'static str| OpenError::io(what);
        if end > mark.log_start {
            // After a mere crash of the process the log may be in the page cache only.
            self.ring.sync(mark.log_start, end).map_err(io("cannot sync the log"))?;
        }
        self.durable.store(end, SeqCst);
        lock(&self.log).end = end;
        if lock(&self.log).dirty.is_empty() {
            self.applied_to.store(end, SeqCst);
        }
        self.changed_to.store(end, SeqCst);
        let mut checkpointer = lock(&self.checkpointer);
        let next = Mark {
            sequence: mark.sequence + 1,
            incarnation: mark.incarnation + 1,
            clean: false,
            ..mark
        };
        self.write_mark(&mut checkpointer, next).map_err(io("cannot write the mark"))?;
        if !mark.clean {
            self.punch_free(&checkpointer).map_err(io("cannot release free slabs"))?;
        }
        self.update_limit(checkpointer.blocks);
        Ok(())
    }

    /// An interrupted checkpoint may have written to slabs that are free.
    fn punch_free(&self, checkpointer: &Checkpointer) -> io::Result<()> {
        let end = self.files.data.len()?;
        for slab in &checkpointer.free {
            if slab.offset(0) < end {
                self.files.data.punch(slab.offset(0), OBJECT_SIZE)?;
            }
        }
        let unused = u64::from(checkpointer.next_slab) * OBJECT_SIZE;
        if unused < end { self.files.data.punch(unused, end - unused) } else { Ok(()) }
    }

    /// Applies the records of the log to the layers in memory. Gives the end of the log.
    fn replay(&self, mark: Mark) -> Result<u64, OpenError> {
        let mut log = lock(&self.log);
        let mut replay = Replay::new(&self.ring, mark.log_start, mark.incarnation);
        let io = || OpenError::io("cannot read the log");
        let mut records = 0u64;
        while let Some(record) = replay.next().map_err(io())? {
            records += 1;
            self.replay_record(&mut log, &record.header, record.tables)?;
        }
        if let Some(proof) = replay.find_proof_of_loss().map_err(io())? {
            let at = replay.position;
            return Err(OpenError::corrupt(
                self.ring.name(at),
                format!(
                    "the record at offset {} (LSN {at}) is damaged, though the one at LSN {proof} \
                     shows that it was durable",
                    self.ring.offset(at)
                ),
            ));
        }
        tracing::info!(disk = %self.ids.disk, records, bytes = replay.position - mark.log_start,
            "the log was replayed");
        Ok(replay.position)
    }

    fn replay_record(
        &self,
        log: &mut LogState,
        header: &Header,
        tables: &[u8],
    ) -> Result<(), OpenError> {
        let key = header.key;
        let follows = match header.kind {
            Kind::Synced | Kind::DeleteVolume | Kind::End => true,
            Kind::Delete => self.version_is(header),
            _ => self.version_is(header) && header.version != Version::NONE,
        };
        let damaged = |what: &str| {
            let at = self.ring.offset(header.lsn);
            let what = format!("the record at offset {at} (LSN {}) {what}", header.lsn);
            Err(OpenError::corrupt(self.ring.name(header.lsn), what))
        };
        if !follows {
            return damaged(&format!("does not follow the version of {key}"));
        }
        match header.kind {
            Kind::Data => self.apply_write(log, header, crcs_from_bytes(tables)),
            Kind::Clear => self.apply_write(log, header, std::iter::empty()),
            Kind::Install => {
                let Some((states, crcs)) = tables.split_first_chunk::<STATES_BYTES>() else {
                    return damaged("has no block states");
                };
                let states = States::from_bytes(*states)
                    .filter(|states| u32::from(states.data_blocks()) == header.count);
                let Some(states) = states else { return damaged("has wrong block states") };
                let entries = install_entries(header, &states, crcs_from_bytes(crcs));
                self.apply_replace(log, key, header.version, entries);
            }
            Kind::Delete => self.apply_replace(log, key, Version::NONE, Vec::new()),
            Kind::DeleteVolume => {
                for key in self.table.keys_of(key.object.volume) {
                    self.apply_replace(log, key, Version::NONE, Vec::new());
                }
            }
            Kind::Synced | Kind::End => {}
        }
        Ok(())
    }

    fn version_is(&self, header: &Header) -> bool {
        let shard = self.table.shard_of(header.key.object);
        shard.version(header.key) == header.prev
    }
}
