//! Memory that a disk can read into and write from without a copy by the kernel.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Alignment of every buffer: the largest that `O_DIRECT` asks for on the disks of today.
pub(crate) const ALIGN: usize = 4096;

/// Owned bytes at an address that is a multiple of [`ALIGN`].
///
/// A vector that is longer than needed and is never grown, so the address stays the same wherever
/// the `Buffer` is moved.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` zeroes. For `O_DIRECT` the length too must be a multiple of [`ALIGN`] (that of the
    /// disk's sectors, to be exact), which is the caller's business.
    pub(crate) fn new(len: usize) -> Self {
        if len == 0 {
            return Self { bytes: Vec::new(), start: 0, len };
        }
        // The allocator hands out large zeroed vectors without touching their pages.
        let bytes = vec![0; len + ALIGN - 1];
        let start = bytes.as_ptr().addr().wrapping_neg() % ALIGN;
        Self { bytes, start, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Self {
        let mut buffer = Self::new(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}
