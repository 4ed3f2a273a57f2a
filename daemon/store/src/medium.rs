//! The files of a store, behind a trait so that tests can cut the power.
//!
//! What is assumed of a medium is written down in `docs/on-disk.md`.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate, statvfs};
use rustix::io::{Errno, ReadWriteFlags};

use crate::api::{Cache, Options};
use crate::io::{Buffer, Done, IoEngine, Op};

/// One file. All methods may be called from many threads.
pub(crate) trait VFile: Send + Sync {
    /// Fills `buf` from `offset`; `UnexpectedEof` if the file ends before.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Like [`VFile::read_at`], if that needs no wait for the disk; false if it does.
    fn read_cached(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read_at(buf, offset).map(|()| true)
    }
    /// Writes all of `parts`, one after the other, from `offset`, extending the file if needed.
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;
    /// Makes everything written before durable (`fdatasync`).
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Extends the file to at least `len` bytes that can be written without needing space.
    fn allocate(&self, len: u64) -> io::Result<()>;
    /// Gives the space of a range back; it reads as zeroes. A hint: may do nothing.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Forgets what memory holds of a range and the disk has, too, so that the next read asks the
    /// disk. A hint: may do nothing.
    fn uncache(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }
    /// The file, if the [`Medium::io`] engine can work on it.
    fn handle(&self) -> Option<&Arc<File>> {
        None
    }
    /// Whether many writes at once are better than one after the other.
    fn likes_batches(&self) -> bool {
        false
    }
    /// Writes all of `parts` to their offsets, in any order.
    fn write_many(&self, parts: Vec<(u64, Buffer)>) -> io::Result<()> {
        parts.iter().try_for_each(|(offset, bytes)| self.write_at(&[bytes], *offset))
    }
}

/// A directory of files.
pub(crate) trait Medium: Send + Sync {
    /// Opens `name`; creates it if `create`.
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn VFile>>;
    /// Makes created names durable.
    fn sync_names(&self) -> io::Result<()>;
    /// [`VFile::sync`] of each of `files`; they may be done at once.
    fn sync_all(&self, files: &[&Arc<dyn VFile>]) -> Vec<io::Result<()>> {
        files.iter().map(|file| file.sync()).collect()
    }
    /// What works on several files at once, if the medium has it.
    fn io(&self) -> Option<&IoEngine> {
        None
    }
    /// Total and available bytes of the file system.
    fn space(&self) -> io::Result<(u64, u64)>;
}

/// A directory of the operating system.
pub(crate) struct Directory {
    path: PathBuf,
    cache: Cache,
    io: Arc<IoEngine>,
}

impl Directory {
    /// Starts the I/O engine for the files in `path`.
    pub(crate) fn new(path: &Path, options: &Options) -> io::Result<Self> {
        let io = Arc::new(IoEngine::start("store-io", options.io.into())?);
        Ok(Self { path: path.into(), cache: options.cache, io })
    }
}

impl Medium for Directory {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn VFile>> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(create).truncate(create);
        if self.cache == Cache::Page || name != crate::open::DATA {
            return Ok(Arc::new(DiskFile(Arc::new(options.open(path)?))));
        }
        options.custom_flags(OFlags::DIRECT.bits() as i32);
        let file = DiskFile(Arc::new(options.open(path)?));
        Ok(Arc::new(DirectFile { file, io: Arc::clone(&self.io) }))
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(self.path.join("log"))?.sync_all()?;
        File::open(&self.path)?.sync_all()
    }

    fn sync_all(&self, files: &[&Arc<dyn VFile>]) -> Vec<io::Result<()>> {
        let handles: Vec<_> = files.iter().filter_map(|file| file.handle()).collect();
        if files.len() == 1 || handles.len() != files.len() {
            return files.iter().map(|file| file.sync()).collect();
        }
        let syncs = handles.into_iter().map(|file| Op::Sync { file: Arc::clone(file) });
        self.io.run(syncs.collect()).into_iter().map(|done| done.result).collect()
    }

    fn io(&self) -> Option<&IoEngine> {
        Some(&self.io)
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        let stat = statvfs(&self.path)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok((bytes(stat.f_blocks), bytes(stat.f_bavail)))
    }
}

/// A file in the page cache.
struct DiskFile(Arc<File>);

impl DiskFile {
    fn write_slowly(&self, parts: &[&[u8]], mut skip: usize, mut offset: u64) -> io::Result<()> {
        for part in parts {
            let rest = &part[skip.min(part.len())..];
            self.0.write_all_at(rest, offset + skip.min(part.len()) as u64)?;
            skip -= skip.min(part.len());
            offset += part.len() as u64;
        }
        Ok(())
    }
}

impl VFile for DiskFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn read_cached(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        let len = buf.len();
        let mut slices = [IoSliceMut::new(buf)];
        match rustix::io::preadv2(&self.0, &mut slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(done) => Ok(done == len),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            // The file system cannot tell.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.read_at(buf, offset).map(|()| true),
            Err(error) => Err(error.into()),
        }
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        if let [single] = parts {
            return self.0.write_all_at(single, offset);
        }
        let mut slices = [IoSlice::new(&[]); 4];
        let count = parts.len().min(slices.len());
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        let done = match rustix::io::pwritev(&self.0, &slices[..count], offset) {
            Ok(done) => done,
            Err(Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if done == total { Ok(()) } else { self.write_slowly(parts, done, offset) }
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let have = self.len()?;
        if have >= len {
            return Ok(());
        }
        match fallocate(&self.0, FallocateFlags::empty(), have, len - have) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.0.set_len(len),
            other => Ok(other?),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(
            &self.0,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        ) {
            // A full xfs may have no space for what it has to note of a hole.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOSPC) => Ok(()),
            other => Ok(other?),
        }
    }

    fn uncache(&self, offset: u64, len: u64) {
        // A hint: without it the page cache is verified.
        let _ = fadvise(&self.0, offset, NonZeroU64::new(len), Advice::DontNeed);
    }

    fn handle(&self) -> Option<&Arc<File>> {
        Some(&self.0)
    }
}

/// A file past the page cache (`O_DIRECT`): offsets and lengths are multiples of a block.
struct DirectFile {
    file: DiskFile,
    io: Arc<IoEngine>,
}

impl DirectFile {
    fn run(&self, op: Op) -> io::Result<Op> {
        let done = self.io.run(vec![op]).pop();
        let Done { op, result } = done.ok_or_else(|| io::Error::other("no answer"))?;
        result.map(|()| op)
    }
}

impl VFile for DirectFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let file = Arc::clone(&self.file.0);
        let op = self.run(Op::Read { file, offset, buf: Buffer::new(buf.len()) })?;
        buf.copy_from_slice(&op.into_buffer());
        Ok(())
    }

    fn read_cached(&self, _: &mut [u8], _: u64) -> io::Result<bool> {
        Ok(false)
    }

    fn write_at(&self, parts: &[&[u8]], mut offset: u64) -> io::Result<()> {
        let writes = parts.iter().map(|part| {
            let at = offset;
            offset += part.len() as u64;
            (at, Buffer::from(*part))
        });
        self.write_many(writes.collect())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.file.allocate(len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch(offset, len)
    }

    fn handle(&self) -> Option<&Arc<File>> {
        Some(&self.file.0)
    }

    fn likes_batches(&self) -> bool {
        true
    }

    fn write_many(&self, parts: Vec<(u64, Buffer)>) -> io::Result<()> {
        let ops = parts.into_iter().map(|(offset, buf)| {
            let file = Arc::clone(&self.file.0);
            Op::Write { file, offset, buf }
        });
        self.io.run(ops.collect()).into_iter().try_for_each(|done| done.result)
    }
}
