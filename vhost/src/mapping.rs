//! Files that the frontend shares with us, mapped into memory.

use std::fs::File;
use std::io;

use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory};

/// A piece of a shared file. The other side may change its content at any moment, so it is only
/// accessed through atomics.
pub(crate) struct Mapping(MmapRegion<()>);

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`.
    ///
    /// # Errors
    /// The file is shorter, or not a regular one, or the system refuses.
    pub(crate) fn new(file: File, offset: u64, len: u64) -> io::Result<Self> {
        if !file.metadata()?.is_file() {
            return Err(invalid("what should be mapped is not a file"));
        }
        check_len(&file, offset, len)?;
        let len = usize::try_from(len).map_err(|_| invalid("too much to map"))?;
        let map = MmapRegion::from_file(FileOffset::new(file, offset), len);
        map.map(Self).map_err(io::Error::other)
    }

    /// Bytes mapped.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The integer at `offset`, which must be inside the mapping and aligned.
    pub(crate) fn at<T: AtomicInteger>(&self, offset: usize) -> &T {
        self.0.get_atomic_ref(offset).expect("callers compare with the mapping's length first")
    }
}

/// Refuses a regular file that ends before `offset + len`: touching a page behind its end would
/// raise SIGBUS.
pub(crate) fn check_len(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let end = offset.checked_add(len).ok_or_else(|| invalid("an offset is out of range"))?;
    let found = file.metadata()?;
    if len == 0 || (found.is_file() && found.len() < end) {
        return Err(invalid("a shared file is shorter than announced"));
    }
    Ok(())
}

pub(crate) fn invalid(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
