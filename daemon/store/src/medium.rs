//! The files of a store, behind a trait so that tests can cut the power.
//!
//! What is assumed of a medium is written down in `docs/on-disk.md`.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate, statvfs};
use rustix::io::Errno;

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
    /// Total and available bytes of the file system.
    fn space(&self) -> io::Result<(u64, u64)>;
}

/// A directory of the operating system.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Medium for Directory {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn VFile>> {
        let path = self.0.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(create).truncate(create);
        Ok(Arc::new(DiskFile(options.open(path)?)))
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(self.0.join("log"))?.sync_all()?;
        File::open(&self.0)?.sync_all()
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        let stat = statvfs(&self.0)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok((bytes(stat.f_blocks), bytes(stat.f_bavail)))
    }
}

struct DiskFile(File);

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
}
