//! The log: what it proves, where it ends, and what it makes of the layers. A small model that
//! keeps only what is needed to know which blocks count in the end.

use std::collections::BTreeMap;

use sheepdog_types::{
    BLOCK_SIZE, BLOCKS_PER_OBJECT, Layer, LayerKey, OBJECT_SIZE, ObjectId, ObjectIndex, Version,
    VolumeId,
};

use super::index::{states_of, sums_of};
use super::{Disk, Finding, Progress, Report, Unreadable};
use crate::api::BlockState;
use crate::format::{FLAG_ABSENT, HEADER, Header, Kind, NO_SLAB, RECORD_ALIGN, crcs_from_bytes};
use crate::states::{Changes, STATES_BYTES, States};

/// Changed blocks that are kept (I10). A store lets fewer wait.
const MAX_CHANGES: u64 = 4 << 20;
/// Damaged blocks of the log that are remembered by place.
const MAX_BAD: usize = 1000;

/// What a checkpoint committed of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Base {
    pub(super) slab: u32,
    pub(super) slot: u8,
    /// Its index record is damaged, the copy counts.
    pub(super) from_copy: bool,
    pub(super) sums_crc: u32,
    pub(super) data_blocks: u16,
}

/// What the log says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Absent,
    Zero,
    Data {
        crc: u32,
        place: Packed,
    },
    /// Data, whose checksum is lost.
    Unknown {
        place: Packed,
    },
}

/// Where the bytes of a block are, in eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packed(u64);

/// Where the bytes of a block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At this LSN.
    Log(u64),
    /// At this offset of `data`.
    Data(u64),
}

impl Packed {
    const DATA: u64 = 1 << 63;

    pub(super) fn place(self) -> Place {
        if self.0 & Self::DATA == 0 {
            Place::Log(self.0)
        } else {
            Place::Data(self.0 & !Self::DATA)
        }
    }

    fn slab(slab: u32, block: u16) -> Self {
        Self(slab_offset(slab, block) | Self::DATA)
    }
}

/// Offset of a block in `data`.
pub(super) fn slab_offset(slab: u32, block: u16) -> u64 {
    u64::from(slab) * OBJECT_SIZE + u64::from(block) * BLOCK_SIZE as u64
}

/// A layer, with what waits in the log.
#[derive(Debug, Default)]
pub(super) struct LayerModel {
    /// [`Version::NONE`]: it is deleted.
    pub(super) version: Version,
    pub(super) base: Option<Base>,
    /// The log has replaced the base.
    pub(super) hidden: bool,
    /// Where changes go.
    pub(super) slab: Option<u32>,
    pub(super) changes: BTreeMap<u16, Change>,
}

impl LayerModel {
    pub(super) fn of(version: Version, base: Base) -> Self {
        Self { version, base: Some(base), slab: Some(base.slab), ..Self::default() }
    }

    pub(super) fn exists(&self) -> bool {
        self.version != Version::NONE
    }

    /// What is committed and still counts.
    pub(super) fn visible_base(&self) -> Option<&Base> {
        self.base.as_ref().filter(|_| !self.hidden)
    }

    fn replace(&mut self, version: Version, slab: Option<u32>) {
        (self.version, self.slab, self.hidden) = (version, slab, true);
        self.changes.clear();
    }
}

/// The layers of a store.
#[derive(Default)]
pub(crate) struct Model {
    /// Also those that are deleted but still have a slab.
    pub(super) layers: BTreeMap<LayerKey, LayerModel>,
    /// No slab from here on was ever used.
    pub(super) slabs_end: u32,
    /// Slabs in use, by bits. None becomes free before the next checkpoint.
    used: BTreeMap<u32, u64>,
    /// Changed blocks in all records.
    changes: u64,
    /// The log could not be followed to its end.
    pub(super) log_is_cut: bool,
}

impl Model {
    /// Takes a slab; false if another layer has it.
    pub(super) fn take_slab(&mut self, slab: u32) -> bool {
        self.slabs_end = self.slabs_end.max(slab + 1);
        let word = self.used.entry(slab / 64).or_insert(0);
        let bit = 1 << (slab % 64);
        let free = *word & bit == 0;
        *word |= bit;
        free
    }

    pub(super) fn slabs_used(&self) -> u64 {
        self.used.values().map(|word| u64::from(word.count_ones())).sum()
    }

    pub(super) fn version(&self, key: LayerKey) -> Version {
        self.layers.get(&key).map_or(Version::NONE, |layer| layer.version)
    }

    /// Layers that exist, with their versions.
    #[cfg(test)]
    pub(crate) fn versions(&self) -> BTreeMap<LayerKey, Version> {
        let existing = self.layers.iter().filter(|(_, layer)| layer.exists());
        existing.map(|(key, layer)| (*key, layer.version)).collect()
    }

    /// Applies a record, or tells what contradicts in it.
    fn apply(&mut self, disk: &Disk, header: &Header, tables: &[u8]) -> Result<(), String> {
        let key = header.key;
        let follows = match header.kind {
            Kind::Synced | Kind::End | Kind::DeleteVolume => true,
            Kind::Delete => self.version(key) == header.prev,
            _ => self.version(key) == header.prev && header.version != Version::NONE,
        };
        if !follows {
            return Err(format!("does not follow the version of {key}"));
        }
        self.changes += u64::from(header.count);
        if self.changes > MAX_CHANGES {
            return Err("is one more change than a store leaves waiting".into());
        }
        match header.kind {
            Kind::Synced | Kind::End => {}
            Kind::Data | Kind::Clear => self.write(header, tables)?,
            Kind::Install => self.install(header, tables)?,
            Kind::Delete => self.delete(key),
            Kind::DeleteVolume => {
                let volume = header.key.object.volume;
                let keys: Vec<_> =
                    self.layers.range(keys_of(volume)).map(|(key, _)| *key).collect();
                keys.into_iter().for_each(|key| self.delete(key));
            }
            Kind::Merge => self.merge(disk, header)?,
            Kind::Patch => self.patch(header, tables)?,
        }
        Ok(())
    }

    fn write(&mut self, header: &Header, tables: &[u8]) -> Result<(), String> {
        let has = self.layers.get(&header.key).and_then(|layer| layer.slab);
        self.slab_for(header, has)?;
        let layer = self.layers.entry(header.key).or_default();
        (layer.version, layer.slab) = (header.version, Some(header.slab));
        let mut crcs = crcs_from_bytes(tables);
        for at in 0..header.count as u16 {
            let block = header.first + at;
            let change = match header.kind {
                Kind::Data => {
                    let lsn = header.data_lsn() + u64::from(at) * BLOCK_SIZE as u64;
                    let direct = header.is_direct();
                    let place = if direct { Packed::slab(header.slab, block) } else { Packed(lsn) };
                    Change::Data { crc: crcs.next().unwrap_or(0), place }
                }
                _ if header.flags & FLAG_ABSENT != 0 => Change::Absent,
                _ => Change::Zero,
            };
            layer.changes.insert(block, change);
        }
        Ok(())
    }

    /// A layer keeps its slab; a new content takes a free one.
    fn slab_for(&mut self, header: &Header, has: Option<u32>) -> Result<(), String> {
        let fits = match has {
            Some(slab) => slab == header.slab,
            None => header.slab != NO_SLAB && self.take_slab(header.slab),
        };
        if fits { Ok(()) } else { Err("names a slab that is in use".into()) }
    }

    fn install(&mut self, header: &Header, tables: &[u8]) -> Result<(), String> {
        let (states, crcs) = install_states(header, tables).ok_or("has wrong block states")?;
        self.slab_for(header, None)?;
        let layer = self.layers.entry(header.key).or_default();
        layer.replace(header.version, Some(header.slab));
        let mut crcs = crcs_from_bytes(crcs);
        for block in 0..BLOCKS_PER_OBJECT as u16 {
            let change = match states.get(block) {
                BlockState::Absent => continue,
                BlockState::Zero => Change::Zero,
                BlockState::Data => Change::Data {
                    crc: crcs.next().unwrap_or(0),
                    place: Packed::slab(header.slab, block),
                },
            };
            layer.changes.insert(block, change);
        }
        self.changes += layer.changes.len() as u64;
        Ok(())
    }

    fn patch(&mut self, header: &Header, tables: &[u8]) -> Result<(), String> {
        let changes = Changes::of_record(tables, header.count).ok_or("has wrong block changes")?;
        let layer = self.layers.get_mut(&header.key).filter(|layer| layer.exists());
        let layer = layer.ok_or("patches a layer that does not exist")?;
        if layer.slab != Some(header.slab) {
            return Err("names a slab that its layer does not have".into());
        }
        layer.version = header.version;
        let mut crcs = crcs_from_bytes(&tables[STATES_BYTES..]);
        let mut lsn = header.data_lsn();
        for (block, state) in changes.iter() {
            let change = match state {
                BlockState::Absent => Change::Absent,
                BlockState::Zero => Change::Zero,
                BlockState::Data => {
                    let place = Packed(lsn);
                    lsn += BLOCK_SIZE as u64;
                    Change::Data { crc: crcs.next().unwrap_or(0), place }
                }
            };
            layer.changes.insert(block, change);
            // Those with data were counted by the header.
            self.changes += u64::from(state != BlockState::Data);
        }
        Ok(())
    }

    fn delete(&mut self, key: LayerKey) {
        let Some(layer) = self.layers.get_mut(&key) else { return };
        layer.replace(Version::NONE, None);
        if layer.base.is_none() {
            self.layers.remove(&key);
        }
    }

    fn merge(&mut self, disk: &Disk, header: &Header) -> Result<(), String> {
        let lower = LayerKey { layer: header.lower, ..header.key };
        if lower.layer >= header.key.layer || self.version(lower) != header.version {
            return Err(format!("does not follow the version of {lower}"));
        }
        let (Some(above), Some(below)) = (self.layers.get(&header.key), self.layers.get(&lower))
        else {
            return Err("merges layers that do not exist".into());
        };
        let covering = visible_states(disk, above)?;
        let mut moved = visible_changes(disk, below)?;
        moved.retain(|block, change| match above.changes.get(block) {
            Some(Change::Absent) => *change != Change::Absent,
            Some(_) => false,
            None => covering.get(*block) == BlockState::Absent && *change != Change::Absent,
        });
        self.changes += moved.len() as u64;
        self.delete(lower);
        let above = self.layers.entry(header.key).or_default();
        above.changes.extend(moved);
        Ok(())
    }
}

fn visible_states(disk: &Disk, layer: &LayerModel) -> Result<States, String> {
    let Some(base) = layer.visible_base() else { return Ok(States::default()) };
    states_of(disk, base)
        .ok_or_else(|| format!("is about slab {}, whose record is gone", base.slab))
}

/// All blocks of a layer as changes.
fn visible_changes(disk: &Disk, layer: &LayerModel) -> Result<BTreeMap<u16, Change>, String> {
    let states = visible_states(disk, layer)?;
    let mut changes = BTreeMap::new();
    if let Some(base) = layer.visible_base() {
        // A damaged table is reported with the slab.
        let sums = if states.data_blocks() == 0 { None } else { sums_of(disk, base).ok() };
        for block in 0..BLOCKS_PER_OBJECT as u16 {
            let place = Packed::slab(base.slab, block);
            let change = match (states.get(block), &sums) {
                (BlockState::Absent, _) => continue,
                (BlockState::Zero, _) => Change::Zero,
                (BlockState::Data, Some(sums)) => {
                    Change::Data { crc: sums[usize::from(block)], place }
                }
                (BlockState::Data, None) => Change::Unknown { place },
            };
            changes.insert(block, change);
        }
    }
    changes.extend(layer.changes.iter().map(|(block, change)| (*block, *change)));
    Ok(changes)
}

fn keys_of(volume: VolumeId) -> std::ops::RangeInclusive<LayerKey> {
    let key = |index, layer| LayerKey {
        object: ObjectId { volume, index: ObjectIndex(index) },
        layer: Layer(layer),
    };
    key(0, 0)..=key(u32::MAX, u32::MAX)
}

/// The block states and checksums of an install record; `None` if they make no sense.
fn install_states<'a>(header: &Header, tables: &'a [u8]) -> Option<(States, &'a [u8])> {
    let (states, crcs) = tables.split_first_chunk::<STATES_BYTES>()?;
    let states = States::from_bytes(*states)?;
    (u32::from(states.data_blocks()) == header.count).then_some((states, crcs))
}

/// A damaged block in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct BadBlock {
    pub(super) lsn: u64,
    pub(super) key: LayerKey,
    pub(super) block: u16,
}

/// Positions of the endless log in the ring of segments.
impl Disk {
    fn segment_of(&self, lsn: u64) -> &super::Part {
        let number = lsn / self.superblock.segment_bytes % self.segments.len() as u64;
        &self.segments[number as usize]
    }

    /// File and offset of an LSN.
    pub(super) fn log_place(&self, lsn: u64) -> (&str, u64) {
        (&self.segment_of(lsn).name, lsn % self.superblock.segment_bytes)
    }

    pub(super) fn read_log(&self, buf: &mut [u8], lsn: u64) -> Result<(), Unreadable> {
        self.segment_of(lsn).read(buf, lsn % self.superblock.segment_bytes)
    }

    /// Bytes of the segment from `lsn` on.
    fn left(&self, lsn: u64) -> u64 {
        self.superblock.segment_bytes - lsn % self.superblock.segment_bytes
    }

    /// The log never goes beyond: there its first segment begins again.
    fn log_limit(&self) -> u64 {
        let bytes = self.superblock.segment_bytes;
        (self.mark.log_start / bytes + self.segments.len() as u64) * bytes
    }

    /// A whole record at `lsn` with its tables, whether or not it counts.
    fn record_at(&self, lsn: u64, tables: &mut Vec<u8>) -> Result<Option<Header>, Unreadable> {
        if self.left(lsn) < HEADER as u64 {
            return Ok(None);
        }
        let mut head = [0; HEADER];
        self.read_log(&mut head, lsn)?;
        let Some(header) = Header::decode(&head) else { return Ok(None) };
        if header.lsn != lsn || header.record_len() > self.left(lsn) {
            return Ok(None);
        }
        tables.resize(header.table_len(), 0);
        self.read_log(tables, lsn + HEADER as u64)?;
        let sealed = Header::is_sealed(&head, tables, self.superblock.record_seed());
        Ok(sealed.then_some(header))
    }
}

/// Goes from record to record.
pub(super) struct Walk<'a> {
    disk: &'a Disk,
    pub(super) position: u64,
    incarnation: u32,
    pub(super) tables: Vec<u8>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(disk: &'a Disk) -> Self {
        Self { disk, position: disk.mark.log_start, incarnation: 0, tables: Vec::new() }
    }

    /// The next record that continues the chain, *end* records included.
    pub(super) fn next(&mut self) -> Result<Option<Header>, Unreadable> {
        let (disk, mark) = (self.disk, &self.disk.mark);
        if self.position >= disk.log_limit() {
            return Ok(None);
        }
        let Some(header) = disk.record_at(self.position, &mut self.tables)? else {
            return Ok(None);
        };
        let own = header.incarnation == mark.incarnation;
        if header.incarnation < self.incarnation
            || header.incarnation > mark.incarnation
            || !own && header.lsn >= mark.prior_end
        {
            return Ok(None);
        }
        self.incarnation = header.incarnation;
        self.position += match header.kind {
            Kind::End => disk.left(header.lsn),
            _ => header.record_len(),
        };
        Ok(Some(header))
    }
}

/// Up to where the log was durable once.
struct Proof {
    durable: u64,
    said_by: String,
    /// Where the chain of records ends.
    end: u64,
    /// Why it cannot be read on.
    error: Option<Unreadable>,
}

fn find_proof(disk: &Disk, progress: &mut dyn FnMut(Progress)) -> Proof {
    let start = disk.mark.log_start;
    let mut proof = Proof { durable: start, said_by: String::new(), end: start, error: None };
    let hear = |proof: &mut Proof, header: &Header| {
        if header.durable > proof.durable {
            proof.durable = header.durable;
            proof.said_by = format!("the record at LSN {}", header.lsn);
        }
    };
    if disk.mark.prior_end > start {
        // It was synced before that was written.
        (proof.durable, proof.said_by) = (disk.mark.prior_end, "the checkpoint mark".into());
    }
    let mut walk = Walk::new(disk);
    loop {
        match walk.next() {
            Ok(Some(header)) => hear(&mut proof, &header),
            Ok(None) => break,
            Err(error) => {
                proof.error = Some(error);
                break;
            }
        }
    }
    proof.end = walk.position;
    const CHUNK: u64 = 1 << 20;
    let (mut buf, mut tables) = (Vec::new(), Vec::new());
    let (mut lsn, limit) = (walk.position, disk.log_limit());
    while lsn < limit {
        progress(Progress { stage: "log", done: lsn - start, total: limit - start });
        buf.resize(disk.left(lsn).min(CHUNK).min(limit - lsn) as usize, 0);
        if disk.read_log(&mut buf, lsn).is_ok() {
            for at in (0..buf.len()).step_by(RECORD_ALIGN) {
                if buf[at..].starts_with(b"SDLR")
                    && let Ok(Some(header)) = disk.record_at(lsn + at as u64, &mut tables)
                {
                    hear(&mut proof, &header);
                }
            }
        }
        lsn += buf.len() as u64;
    }
    proof
}

/// Where the log ends, and what it says on the way.
pub(super) struct Log {
    pub(super) end: u64,
    pub(super) records: u64,
    /// Damaged blocks in records that were durable, up to a number, ascending.
    pub(super) bad: Vec<BadBlock>,
}

/// Follows the log to its end and calls `each` for every record that counts.
pub(super) fn replay(
    disk: &Disk,
    model: &mut Model,
    report: &mut Report,
    progress: &mut dyn FnMut(Progress),
    each: &mut dyn FnMut(&Header),
) -> Log {
    let mut log = Log { end: disk.mark.log_start, records: 0, bad: Vec::new() };
    if disk.mark.clean {
        return log;
    }
    let proof = find_proof(disk, progress);
    if proof.end < proof.durable {
        let why = proof.error.as_ref().map_or_else(|| "is damaged".into(), ToString::to_string);
        let what = format!(
            "the record (LSN {}) {why}, though {} shows that it was durable",
            proof.end, proof.said_by
        );
        cut(disk, model, report, proof.end, what);
    }
    let mut walk = Walk::new(disk);
    let mut data = Vec::new();
    while let Ok(Some(header)) = walk.next() {
        if !is_whole(disk, &header, &walk.tables, proof.durable, &mut data, &mut log) {
            break;
        }
        if header.kind == Kind::End {
            continue;
        }
        if let Err(what) = model.apply(disk, &header, &walk.tables) {
            cut(disk, model, report, header.lsn, format!("the record (LSN {}) {what}", header.lsn));
            break;
        }
        each(&header);
        log.records += 1;
        log.end = header.lsn + header.record_len();
    }
    log
}

fn cut(disk: &Disk, model: &mut Model, report: &mut Report, lsn: u64, what: String) {
    let (file, offset) = disk.log_place(lsn);
    report.add(Finding::damage(file, what).at(offset));
    model.log_is_cut = true;
}

/// Whether a record and the bytes it stands for reached the medium. Of one that was durable once,
/// damaged bytes are noted; any other is where the log ends.
fn is_whole(
    disk: &Disk,
    header: &Header,
    tables: &[u8],
    durable: u64,
    buf: &mut Vec<u8>,
    log: &mut Log,
) -> bool {
    let was_durable = header.lsn < durable;
    if header.is_direct() {
        return was_durable || slab_matches(disk, header, tables, buf);
    }
    if header.data_len() == 0 {
        return true;
    }
    buf.resize(header.data_len(), 0);
    let readable = disk.read_log(buf, header.data_lsn()).is_ok();
    let (numbers, crcs) = carried(header, tables);
    let blocks = buf.chunks_exact(BLOCK_SIZE).zip(crcs_from_bytes(crcs));
    for (((bytes, crc), block), at) in blocks.zip(numbers).zip(0u64..) {
        if readable && crc32c::crc32c(bytes) == crc {
            continue;
        }
        if !was_durable {
            return false;
        }
        if log.bad.len() < MAX_BAD {
            let lsn = header.data_lsn() + at * BLOCK_SIZE as u64;
            log.bad.push(BadBlock { lsn, key: header.key, block });
        }
    }
    true
}

/// The blocks whose bytes a record carries, and the bytes of their checksums. Of a patch that makes
/// no sense the blocks are not known, which is told when it is applied.
fn carried<'a>(header: &Header, tables: &'a [u8]) -> (Vec<u16>, &'a [u8]) {
    if header.kind != Kind::Patch {
        return ((header.first..header.first + header.count as u16).collect(), tables);
    }
    let crcs = tables.get(STATES_BYTES..).unwrap_or_default();
    match Changes::of_record(tables, header.count) {
        Some(changes) => (changes.data().collect(), crcs),
        None => (vec![0; header.count as usize], crcs),
    }
}

/// Whether the bytes of a direct record are in its slab.
fn slab_matches(disk: &Disk, header: &Header, tables: &[u8], buf: &mut Vec<u8>) -> bool {
    let (mut crcs, blocks): (_, Vec<u16>) = match header.kind {
        Kind::Install => match install_states(header, tables) {
            Some((states, crcs)) => {
                (crcs_from_bytes(crcs), states.blocks(BlockState::Data).collect())
            }
            // Told when it is applied.
            None => return true,
        },
        Kind::Data => {
            let end = header.first + header.count as u16;
            (crcs_from_bytes(tables), (header.first..end).collect())
        }
        _ => return true,
    };
    buf.resize(BLOCK_SIZE, 0);
    blocks.into_iter().all(|block| {
        let read = disk.data.read(buf, slab_offset(header.slab, block));
        read.is_ok() && crcs.next() == Some(crc32c::crc32c(buf))
    })
}
