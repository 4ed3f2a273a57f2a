//! The write-ahead log: a ring of preallocated segments, one append at a time.
//!
//! An LSN is a position in the endless log, in bytes; segment `lsn / segment_bytes` of it lies in
//! file number `segment % segments`. A record carries its own LSN, so what an earlier round left
//! in the ring is never taken for a record of this one.

use std::io;
use std::sync::Arc;

use sheepdog_types::LayerKey;

use crate::format::{HEADER, Header, Kind, RECORD_ALIGN, Superblock};
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

    /// Makes `from..to` durable.
    pub(crate) fn sync(&self, from: u64, to: u64) -> io::Result<()> {
        let last = self.segment(to.saturating_sub(1).max(from));
        for segment in self.segment(from)..=last {
            self.files[(segment % self.files.len() as u64) as usize].sync()?;
        }
        Ok(())
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

/// The end of the log. Whoever holds its lock decides the order of all changes.
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
    scratch: Vec<u8>,
}

impl LogState {
    pub(crate) fn new(start: u64, end: u64, incarnation: u32) -> Self {
        let scratch = Vec::with_capacity(HEADER);
        Self { start, end, incarnation, generation: 1, dirty: Vec::new(), scratch }
    }

    /// Whether a record of `len` bytes has room. The last segment is kept for records that free
    /// space (`privileged`), so that a full disk can be emptied again.
    pub(crate) fn has_room(&self, ring: &Ring, len: u64, privileged: bool) -> bool {
        let kept = if privileged { 0 } else { ring.segment_bytes };
        ring.position(self.end, len) + len + HEADER as u64 + kept <= ring.limit(self.start)
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

/// A record read back, its checksums verified.
pub(crate) struct Record<'a> {
    pub(crate) header: Header,
    pub(crate) tables: &'a [u8],
}

/// Reads the log from its start at opening.
pub(crate) struct Replay<'a> {
    ring: &'a Ring,
    /// LSN of the next record.
    pub(crate) position: u64,
    start: u64,
    incarnation: u32,
    newest: u32,
    buf: Vec<u8>,
}

impl<'a> Replay<'a> {
    /// From `start`; no record was written by an incarnation after `newest`.
    pub(crate) fn new(ring: &'a Ring, start: u64, newest: u32) -> Self {
        Self { ring, position: start, start, incarnation: 0, newest, buf: Vec::new() }
    }

    /// The next record; `None` where the log ends or is torn. End records are followed, not
    /// returned.
    pub(crate) fn next(&mut self) -> io::Result<Option<Record<'_>>> {
        loop {
            let Some(header) = self.load()? else { return Ok(None) };
            self.incarnation = header.incarnation;
            if header.kind == Kind::End {
                self.position = (self.ring.segment(self.position) + 1) * self.ring.segment_bytes;
                continue;
            }
            self.position += header.record_len();
            return Ok(Some(Record { header, tables: &self.buf[..header.table_len()] }));
        }
    }

    /// Reads and verifies the record at the position; its tables and data go to `buf`.
    fn load(&mut self) -> io::Result<Option<Header>> {
        let ring = self.ring;
        let left = ring.segment_bytes - ring.offset(self.position);
        if left < HEADER as u64 || self.position >= ring.limit(self.start) {
            return Ok(None);
        }
        let mut head = [0; HEADER];
        ring.read(&mut head, self.position)?;
        let Some(header) = Header::decode(&head) else { return Ok(None) };
        let expected = header.lsn == self.position
            && (self.incarnation..=self.newest).contains(&header.incarnation)
            && header.record_len() <= left;
        if !expected {
            return Ok(None);
        }
        self.buf.resize(header.table_len() + header.data_len(), 0);
        ring.read(&mut self.buf, self.position + HEADER as u64)?;
        let (tables, data) = self.buf.split_at(header.table_len());
        let crcs = &tables[tables.len() - header.data_len() / sheepdog_types::BLOCK_SIZE * 4..];
        let intact = Header::is_sealed(&head, tables, ring.seed)
            && crate::format::crcs_from_bytes(crcs)
                .zip(data.chunks_exact(sheepdog_types::BLOCK_SIZE))
                .all(|(crc, block)| crc32c::crc32c(block) == crc);
        Ok(intact.then_some(header))
    }

    /// After the last record: whether some later record proves that the log was durable beyond
    /// this point. Then the record here is not a torn tail but damage. Returns that proof's LSN.
    pub(crate) fn find_proof_of_loss(&mut self) -> io::Result<Option<u64>> {
        const CHUNK: usize = 1 << 20;
        let ring = self.ring;
        let mut lsn = self.position;
        while lsn < ring.limit(self.start) {
            let left = ring.segment_bytes - ring.offset(lsn);
            let len = left.min(CHUNK as u64) as usize;
            self.buf.resize(len, 0);
            ring.read(&mut self.buf, lsn)?;
            for at in (0..len).step_by(RECORD_ALIGN) {
                let Some(head) = self.buf[at..].first_chunk::<4>() else { break };
                if *head == *b"SDLR" && self.is_proof(lsn + at as u64)? {
                    return Ok(Some(lsn + at as u64));
                }
            }
            lsn += len as u64;
        }
        Ok(None)
    }

    fn is_proof(&self, lsn: u64) -> io::Result<bool> {
        let left = self.ring.segment_bytes - self.ring.offset(lsn);
        if left < HEADER as u64 {
            return Ok(false);
        }
        let mut head = [0; HEADER];
        self.ring.read(&mut head, lsn)?;
        let Some(header) = Header::decode(&head) else { return Ok(false) };
        if header.lsn != lsn || header.durable <= self.position || header.record_len() > left {
            return Ok(false);
        }
        let mut tables = vec![0; header.table_len()];
        self.ring.read(&mut tables, lsn + HEADER as u64)?;
        Ok(Header::is_sealed(&head, &tables, self.ring.seed))
    }
}
