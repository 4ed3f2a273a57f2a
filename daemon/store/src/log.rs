//! The write-ahead log: a ring of preallocated segments, one append at a time.
//!
//! An LSN is a position in the endless log, in bytes; segment `lsn / segment_bytes` of it lies in
//! file number `segment % segments`. A record carries its own LSN, so what an earlier round left
//! in the ring is never taken for a record of this one.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use sheepdog_types::{BLOCK_SIZE, LayerKey};

use crate::format::{HEADER, Header, Kind, Mark, NO_SLAB, RECORD_ALIGN, Superblock};
use crate::layer::SlabRef;
use crate::medium::VFile;

/// The segment files and the arithmetic of positions in them.
pub(crate) struct Ring {
    pub(crate) files: Vec<Arc<dyn VFile>>,
    pub(crate) segment_bytes: u64,
    pub(crate) seed: u32,
}

/// Name of a segment file.
pub(crate) fn segment_name(number: usize) -> String {
    format!("log/{number:04}")
}

impl Ring {
    pub(crate) fn new(superblock: &Superblock, files: Vec<Arc<dyn VFile>>) -> Self {
        Self { files, segment_bytes: superblock.segment_bytes, seed: superblock.record_seed() }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.segment_bytes * self.files.len() as u64
    }

    pub(crate) fn segment(&self, lsn: u64) -> u64 {
        lsn / self.segment_bytes
    }

    pub(crate) fn file_number(&self, lsn: u64) -> usize {
        (self.segment(lsn) % self.files.len() as u64) as usize
    }

    /// Where `lsn` is, for people.
    pub(crate) fn name(&self, lsn: u64) -> String {
        segment_name(self.file_number(lsn))
    }

    pub(crate) fn offset(&self, lsn: u64) -> u64 {
        lsn % self.segment_bytes
    }

    pub(crate) fn read(&self, buf: &mut [u8], lsn: u64) -> io::Result<()> {
        self.files[self.file_number(lsn)].read_at(buf, self.offset(lsn))
    }

    /// The file that holds `lsn`, and where in it.
    pub(crate) fn place(&self, lsn: u64) -> (&Arc<dyn VFile>, u64) {
        (&self.files[self.file_number(lsn)], self.offset(lsn))
    }

    /// Reads what the page cache holds; false if that is not all.
    pub(crate) fn read_cached(&self, buf: &mut [u8], lsn: u64) -> io::Result<bool> {
        self.files[self.file_number(lsn)].read_cached(buf, self.offset(lsn))
    }

    /// The files that hold `from..to`.
    pub(crate) fn files_of(&self, from: u64, to: u64) -> Vec<&Arc<dyn VFile>> {
        let last = self.segment(to.saturating_sub(1).max(from));
        let count = self.files.len() as u64;
        let segments = self.segment(from)..=last;
        segments.map(|segment| &self.files[(segment % count) as usize]).collect()
    }

    /// The largest record that fits into a segment.
    pub(crate) fn max_record(&self) -> u64 {
        self.segment_bytes - HEADER as u64
    }

    /// Where a record of `len` bytes goes if the log ends at `end`: there, or in the next segment.
    /// An end record always fits behind it.
    fn position(&self, end: u64, len: u64) -> u64 {
        let fits = self.offset(end) + len + HEADER as u64 <= self.segment_bytes;
        if fits { end } else { (self.segment(end) + 1) * self.segment_bytes }
    }

    /// The last LSN that may be written while the log starts at `start`: never into the file of
    /// the segment that `start` is in.
    fn limit(&self, start: u64) -> u64 {
        self.segment(start) * self.segment_bytes + self.bytes()
    }
}

/// The end of the log, and what goes with it. Whoever holds its lock decides the order of all
/// changes.
pub(crate) struct LogState {
    /// Replay starts here; before it the ring may be overwritten.
    pub(crate) start: u64,
    /// The next record goes here.
    pub(crate) end: u64,
    pub(crate) incarnation: u32,
    /// Grows with each checkpoint; changes since the last one carry it.
    pub(crate) generation: u64,
    /// Layers with changes of this generation.
    pub(crate) dirty: Vec<LayerKey>,
    /// Slabs that new layers may take.
    pub(crate) slabs: Slabs,
    /// Changed blocks that wait in memory: of this generation, and of a running checkpoint.
    pub(crate) waiting: u64,
    pub(crate) applying: u64,
    /// End of the last record whose bytes went straight to a slab.
    pub(crate) direct_to: u64,
    /// A durable record says that everything before this was durable.
    pub(crate) proven: u64,
    /// The end of the last record that says so, and what it says; it may not be durable yet.
    pub(crate) noted: (u64, u64),
    scratch: Vec<u8>,
}

/// Changed blocks that may wait for a checkpoint, 16 bytes of memory each (I10).
const MAX_WAITING: u64 = 1 << 20;

/// The free slabs.
#[derive(Default)]
pub(crate) struct Slabs {
    free: BTreeMap<u32, SlabRef>,
    /// No slab from here on was ever used.
    pub(crate) next: u32,
    /// `index` and `sums` have room for this many.
    pub(crate) room: u32,
}

impl Slabs {
    /// `index` and `sums` have room for at least so many slabs now.
    pub(crate) fn note_room(&mut self, slabs: u32) {
        self.room = self.room.max(slabs);
    }

    /// The number of the lowest free slab.
    pub(crate) fn lowest(&self) -> u32 {
        self.free.first_key_value().map_or(self.next, |(slab, _)| *slab)
    }

    /// The lowest free slab; `None` if `index` and `sums` must grow first.
    pub(crate) fn take(&mut self) -> Option<SlabRef> {
        (self.lowest() < self.room).then(|| self.take_this(self.lowest())).flatten()
    }

    /// A certain slab, if it is free. `index` and `sums` may have no room for it yet.
    pub(crate) fn take_this(&mut self, slab: u32) -> Option<SlabRef> {
        if slab >= self.next {
            if slab == NO_SLAB {
                return None;
            }
            self.free.extend((self.next..slab).map(|slab| (slab, SlabRef::unused(slab))));
            self.next = slab + 1;
            return Some(SlabRef::unused(slab));
        }
        self.free.remove(&slab)
    }

    pub(crate) fn give(&mut self, slab: SlabRef) {
        self.free.insert(slab.slab, slab);
    }

    /// All free slabs that were used at some time.
    pub(crate) fn free(&self) -> impl Iterator<Item = &SlabRef> {
        self.free.values()
    }
}

impl LogState {
    pub(crate) fn new(start: u64, end: u64, incarnation: u32) -> Self {
        Self {
            start,
            end,
            incarnation,
            generation: 1,
            dirty: Vec::new(),
            slabs: Slabs::default(),
            waiting: 0,
            applying: 0,
            direct_to: start,
            proven: start,
            noted: (start, start),
            scratch: Vec::with_capacity(HEADER),
        }
    }

    /// Changed blocks in memory.
    pub(crate) fn blocks_in_memory(&self) -> u64 {
        self.waiting + self.applying
    }

    /// Whether a record of `len` bytes that changes `blocks` has room. The last segment is kept for
    /// records that free space (`privileged`), so that a full disk can be emptied again; behind
    /// those, there still is room for a *synced* record, which a checkpoint may need.
    pub(crate) fn has_room(&self, ring: &Ring, len: u64, blocks: u64, privileged: bool) -> bool {
        let kept = if privileged { 0 } else { ring.segment_bytes };
        let waiting = self.blocks_in_memory();
        let limit = if privileged { 2 * MAX_WAITING } else { MAX_WAITING };
        let end = ring.position(self.end, len) + len;
        ring.position(end, HEADER as u64) + 2 * HEADER as u64 + kept <= ring.limit(self.start)
            && (waiting == 0 || waiting + blocks <= limit)
    }

    /// Whether a *synced* record has room.
    pub(crate) fn has_room_for_note(&self, ring: &Ring) -> bool {
        let len = HEADER as u64;
        ring.position(self.end, len) + 2 * len <= ring.limit(self.start)
    }

    /// More than half of the log, or of what may wait in memory, is in use.
    pub(crate) fn is_filling(&self, ring: &Ring) -> bool {
        self.end - self.start > ring.bytes() / 2 || self.blocks_in_memory() > MAX_WAITING / 2
    }

    /// Writes a record, with one system call unless a segment ends. Fills in the header's LSN,
    /// incarnation and `durable`. On an error the log's end stays where it was: what was written
    /// lies behind it and is overwritten by the next record.
    pub(crate) fn append(
        &mut self,
        ring: &Ring,
        durable: u64,
        header: &mut Header,
        tables: &[&[u8]],
        data: &[u8],
    ) -> io::Result<()> {
        let len = header.record_len();
        let position = ring.position(self.end, len);
        if position != self.end {
            self.write(ring, durable, self.end, &mut Header::control(Kind::End), &[], &[])?;
        }
        self.write(ring, durable, position, header, tables, data)?;
        self.end = position + len;
        Ok(())
    }

    fn write(
        &mut self,
        ring: &Ring,
        durable: u64,
        lsn: u64,
        header: &mut Header,
        tables: &[&[u8]],
        data: &[u8],
    ) -> io::Result<()> {
        (header.lsn, header.durable, header.incarnation) = (lsn, durable, self.incarnation);
        self.scratch.clear();
        header.encode(ring.seed, tables, &mut self.scratch);
        let file = &ring.files[ring.file_number(lsn)];
        if data.is_empty() {
            file.write_at(&[&self.scratch], ring.offset(lsn))
        } else {
            file.write_at(&[&self.scratch, data], ring.offset(lsn))
        }
    }
}

/// A record read back.
pub(crate) struct Record<'a> {
    pub(crate) header: Header,
    /// States and checksums; verified.
    pub(crate) tables: &'a [u8],
    /// The bytes of its blocks if they are in the log; not verified.
    pub(crate) data: &'a [u8],
}

impl Record<'_> {
    /// The checksums of the blocks.
    pub(crate) fn crcs(&self) -> impl Iterator<Item = u32> + '_ {
        let count = self.header.table_len().min(4 * self.header.count as usize);
        crate::format::crcs_from_bytes(&self.tables[self.tables.len() - count..])
    }

    /// Whether its bytes, if it has any, match their checksums.
    pub(crate) fn is_intact(&self) -> bool {
        self.data.chunks_exact(BLOCK_SIZE).zip(self.crcs()).all(|(b, crc)| crc32c::crc32c(b) == crc)
    }
}

/// Reads the log from its start at opening.
pub(crate) struct Replay<'a> {
    ring: &'a Ring,
    /// LSN of the next record.
    pub(crate) position: u64,
    start: u64,
    incarnation: u32,
    mark: &'a Mark,
    buf: Vec<u8>,
}

impl<'a> Replay<'a> {
    /// From the log's start as of `mark`.
    pub(crate) fn new(ring: &'a Ring, mark: &'a Mark) -> Self {
        let start = mark.log_start;
        Self { ring, position: start, start, incarnation: 0, mark, buf: Vec::new() }
    }

    /// The next record; `None` where the log ends or is torn. End records are followed, not
    /// returned. The bytes of blocks are read only `with_data`.
    pub(crate) fn next(&mut self, with_data: bool) -> io::Result<Option<Record<'_>>> {
        loop {
            let Some(header) = self.load(with_data)? else { return Ok(None) };
            self.incarnation = header.incarnation;
            if header.kind == Kind::End {
                self.position = (self.ring.segment(self.position) + 1) * self.ring.segment_bytes;
                continue;
            }
            self.position += header.record_len();
            let (tables, data) = self.buf.split_at(header.table_len());
            return Ok(Some(Record { header, tables, data }));
        }
    }

    /// Reads the record at the position and verifies its header and tables.
    fn load(&mut self, with_data: bool) -> io::Result<Option<Header>> {
        let ring = self.ring;
        let left = ring.segment_bytes - ring.offset(self.position);
        if left < HEADER as u64 || self.position >= ring.limit(self.start) {
            return Ok(None);
        }
        let mut head = [0; HEADER];
        ring.read(&mut head, self.position)?;
        let Some(header) = Header::decode(&head) else { return Ok(None) };
        let expected = header.lsn == self.position
            && (self.incarnation..=self.mark.incarnation).contains(&header.incarnation)
            && (header.incarnation == self.mark.incarnation || header.lsn < self.mark.prior_end)
            && header.record_len() <= left;
        if !expected {
            return Ok(None);
        }
        let data = if with_data { header.data_len() } else { 0 };
        self.buf.resize(header.table_len() + data, 0);
        ring.read(&mut self.buf, self.position + HEADER as u64)?;
        let tables = &self.buf[..header.table_len()];
        Ok(Header::is_sealed(&head, tables, ring.seed).then_some(header))
    }

    /// Up to which LSN the log is known to have been durable once, and what says so: the mark, its
    /// own records from the start on, and any record that is left behind its end.
    pub(crate) fn find_proof(mut self) -> io::Result<Proof> {
        // An opening makes the log durable before it writes the mark.
        let durable = self.start.max(self.mark.prior_end);
        let mut proof = Proof { durable, said_at: durable, end: self.start };
        while let Some(record) = self.next(false)? {
            proof.hear(&record.header);
        }
        proof.end = self.position;
        const CHUNK: usize = 1 << 20;
        let ring = self.ring;
        let mut lsn = self.position;
        let limit = ring.limit(self.start);
        while lsn < limit {
            let left = ring.segment_bytes - ring.offset(lsn);
            let len = left.min(CHUNK as u64) as usize;
            self.buf.resize(len, 0);
            ring.read(&mut self.buf, lsn)?;
            for at in (0..len).step_by(RECORD_ALIGN) {
                let Some(head) = self.buf[at..].first_chunk::<4>() else { break };
                if *head == *b"SDLR" {
                    self.stray(lsn + at as u64)?.iter().for_each(|header| proof.hear(header));
                }
            }
            lsn += len as u64;
        }
        Ok(proof)
    }

    /// A whole record at `lsn`, of this round of the ring, whether or not it counts.
    fn stray(&self, lsn: u64) -> io::Result<Option<Header>> {
        let left = self.ring.segment_bytes - self.ring.offset(lsn);
        if left < HEADER as u64 {
            return Ok(None);
        }
        let mut head = [0; HEADER];
        self.ring.read(&mut head, lsn)?;
        let Some(header) = Header::decode(&head) else { return Ok(None) };
        if header.lsn != lsn || header.record_len() > left {
            return Ok(None);
        }
        let mut tables = vec![0; header.table_len()];
        self.ring.read(&mut tables, lsn + HEADER as u64)?;
        Ok(Header::is_sealed(&head, &tables, self.ring.seed).then_some(header))
    }
}

/// What is known of a log without looking at its blocks.
pub(crate) struct Proof {
    /// Everything before this LSN was durable once.
    pub(crate) durable: u64,
    /// LSN of the record that says so.
    pub(crate) said_at: u64,
    /// The unbroken chain of records ends here.
    pub(crate) end: u64,
}

impl Proof {
    fn hear(&mut self, header: &Header) {
        if header.durable > self.durable {
            (self.durable, self.said_at) = (header.durable, header.lsn);
        }
    }
}
