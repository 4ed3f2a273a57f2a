//! The dirty log of a live migration: one bit for each page of guest memory that we have written.
//!
//! It is marked after the write and before the guest is told of it. Whoever switches it on or off
//! does so under the locks under which it is marked, so a write that was not marked was complete
//! before the log was switched on, and nothing is marked after it was switched off.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::mapping::Mapping;

/// Bytes for which a bit stands, whatever the page size of the host is.
const PAGE_BYTES: u64 = 4096;

/// A log that the frontend reads and clears meanwhile.
pub(crate) struct DirtyLog(Mapping);

impl DirtyLog {
    pub(crate) fn new(file: std::fs::File, offset: u64, len: u64) -> io::Result<Self> {
        Mapping::new(file, offset, len).map(Self)
    }

    /// Whether there is a bit for the page of `addr`.
    pub(crate) fn covers(&self, addr: u64) -> bool {
        addr / PAGE_BYTES < self.0.len() as u64 * 8
    }

    /// Marks `len` bytes at guest address `addr`. What the log does not cover is not marked.
    pub(crate) fn mark(&self, addr: u64, len: u64) {
        if len == 0 || !self.covers(addr) {
            return;
        }
        let last = addr.saturating_add(len - 1) / PAGE_BYTES;
        for page in addr / PAGE_BYTES..=last.min(self.0.len() as u64 * 8 - 1) {
            // Release: whoever sees the bit sees what was written.
            let byte: &AtomicU8 = self.0.at((page / 8) as usize);
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn marks(len: u64, ranges: &[(u64, u64)]) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let log = DirtyLog::new(file.try_clone().unwrap(), 4096, len).unwrap();
        ranges.iter().for_each(|&(addr, bytes)| log.mark(addr, bytes));
        let mut all = Vec::new();
        file.read_to_end(&mut all).unwrap();
        assert!(all[..4096].iter().all(|&b| b == 0), "marked before the log");
        all.split_off(4096)
    }

    #[test]
    fn exactly_the_pages_touched_are_marked() {
        assert_eq!(marks(4, &[(0, 1)])[..2], [1, 0]);
        assert_eq!(marks(4, &[(4095, 2), (9 * 4096, 4096)])[..2], [0b11, 0b10]);
        assert_eq!(marks(4, &[(7 * 4096, 4097), (5, 0)])[..2], [0x80, 1]);
    }

    #[test]
    fn a_log_that_is_too_small_is_never_left() {
        let hostile =
            [(15 * 4096, 1 << 20), (16 * 4096, 1), (u64::MAX, u64::MAX), (u64::MAX - 4096, 8192)];
        let found = marks(2, &hostile);
        assert_eq!(found[..2], [0, 0x80]);
        assert!(found[2..].iter().all(|&b| b == 0));
    }
}
