//! Tracking of requests in flight, so that a successor of this process finds them.
//!
//! The frontend keeps a piece of shared memory for us and gives it to whoever serves its queues
//! next. The format is that of "Inflight I/O tracking" in QEMU's `docs/interop/vhost-user.rst`, for
//! split rings. In the byte order of the host, for each queue, at a multiple of 64:
//!
//! ```text
//!  0 features: u64 = 0     8 version: u16 = 1 (0: nothing here yet)     10 entries: u16
//! 12 last batch, its newest head: u16                                  14 used index: u16
//! 16 for each descriptor: in flight: u8, padding, next in the batch: u16 at 6, counter: u64 at 8
//! ```
//!
//! This process may die between any two stores. What makes that harmless is their order, which
//! each store keeps by being a release:
//!
//! ```text
//! taken:      counter, in flight = 1; only then is the request carried out
//! completed:  data and status; next, last batch; used ring, its index; in flight = 0; used index
//! ```
//!
//! If the used index here is not that of the ring, the death was in the middle of the last line,
//! and the requests of the last batch are in the used ring: they are no longer in flight. We answer
//! one request at a time, so a batch is one request; others' regions may have longer ones.
//!
//! Nothing that comes back is trusted: all indices are checked, and the walk along a batch has as
//! many steps as the used indices differ.

use std::ffi::c_uint;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vm_memory::AtomicInteger;

use crate::mapping::{Mapping, invalid};

const VERSION: u16 = 1;
const FEATURES_AT: usize = 0;
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_INDEX_AT: usize = 14;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const NEXT_IN_ENTRY: usize = 6;
const COUNTER_IN_ENTRY: usize = 8;
/// Queues are kept apart by cache lines.
const ALIGN: usize = 64;

/// Bytes for one queue.
fn queue_bytes(entries: u16) -> usize {
    (HEADER_BYTES + usize::from(entries) * ENTRY_BYTES).next_multiple_of(ALIGN)
}

/// Bytes for `queues` queues.
pub(crate) fn region_bytes(queues: u16, entries: u16) -> u64 {
    (usize::from(queues) * queue_bytes(entries)) as u64
}

/// Memory for `queues` queues of `entries` descriptors, which cannot be truncated.
pub(crate) fn create(queues: u16, entries: u16) -> io::Result<File> {
    let flags: c_uint = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string with an end; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(c"vhost-inflight".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(region_bytes(queues, entries))?;
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS on a descriptor that `file` owns touches no memory.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Maps what the frontend gave back: one part for each of `queues` queues.
pub(crate) fn map(
    file: File,
    offset: u64,
    len: u64,
    queues: u16,
    entries: u16,
) -> io::Result<Vec<QueueRegion>> {
    if len < region_bytes(queues, entries) {
        return Err(invalid("the in-flight region is too small for its queues"));
    }
    let map = Arc::new(Mapping::new(file, offset, len)?);
    let queue = |index| {
        let at = usize::from(index) * queue_bytes(entries);
        QueueRegion { map: map.clone(), at, entries, counter: 0 }
    };
    Ok((0..queues).map(queue).collect())
}

/// One queue's part of the region. All access is under the lock of its ring.
pub(crate) struct QueueRegion {
    map: Arc<Mapping>,
    at: usize,
    entries: u16,
    /// The next request's place in the order.
    counter: u64,
}

/// What a predecessor left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing: this is the first start of the ring.
    Fresh,
    /// The heads of requests that were taken and not answered, in the order they were taken.
    InFlight(Vec<u16>),
}

impl QueueRegion {
    /// Finishes what a predecessor was doing when it died, and finds what it had in flight. The
    /// ring has `size` entries, and `used` is its used index.
    ///
    /// # Errors
    /// What is wrong with the region. Whoever wrote it, it cannot be continued.
    pub(crate) fn recover(&mut self, size: u16, used: u16) -> Result<Found, &'static str> {
        if size > self.entries {
            return Err("the in-flight region has fewer entries than the ring");
        }
        match self.u16_at(VERSION_AT).load(Ordering::Acquire) {
            0 => {
                self.initialise(used);
                return Ok(Found::Fresh);
            }
            VERSION => {}
            _ => return Err("the in-flight region has an unknown version"),
        }
        if self.features().load(Ordering::Relaxed) != 0 {
            return Err("the in-flight region has unknown features");
        }
        if self.u16_at(ENTRIES_AT).load(Ordering::Relaxed) != self.entries {
            return Err("the in-flight region has another size than announced");
        }
        self.finish_batch(size, used)?;
        self.find(size)
    }

    fn initialise(&mut self, used: u16) {
        for head in 0..self.entries {
            self.set_in_flight(head, false);
        }
        store(self.features(), 0);
        store(self.u16_at(ENTRIES_AT), self.entries);
        store(self.u16_at(LAST_BATCH_AT), 0);
        store(self.u16_at(USED_INDEX_AT), used);
        store(self.u16_at(VERSION_AT), VERSION);
        self.counter = 0;
    }

    /// The requests of the last batch are answered if the used ring says so.
    fn finish_batch(&self, size: u16, used: u16) -> Result<(), &'static str> {
        let batch = used.wrapping_sub(self.u16_at(USED_INDEX_AT).load(Ordering::Acquire));
        if batch > size {
            return Err("the in-flight region belongs to another ring");
        }
        let mut head = self.u16_at(LAST_BATCH_AT).load(Ordering::Acquire);
        for _ in 0..batch {
            if head >= self.entries {
                return Err("the in-flight region's last batch leaves it");
            }
            self.set_in_flight(head, false);
            head = self.next(head).load(Ordering::Acquire);
        }
        if batch > 0 {
            store(self.u16_at(USED_INDEX_AT), used);
        }
        Ok(())
    }

    fn find(&mut self, size: u16) -> Result<Found, &'static str> {
        let in_flight = |&head: &u16| self.in_flight(head).load(Ordering::Acquire) != 0;
        let heads = (0..self.entries).filter(in_flight);
        let mut found: Vec<(u64, u16)> =
            heads.map(|head| (self.counter_of(head).load(Ordering::Acquire), head)).collect();
        found.sort_unstable();
        if found.iter().any(|&(_, head)| head >= size) {
            return Err("the in-flight region names a descriptor that the ring does not have");
        }
        self.counter = found.last().map_or(0, |&(newest, _)| newest.wrapping_add(1));
        Ok(Found::InFlight(found.into_iter().map(|(_, head)| head).collect()))
    }

    /// A request was taken off the available ring. `head` is inside the ring.
    pub(crate) fn taken(&mut self, head: u16) {
        store(self.counter_of(head), self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.set_in_flight(head, true);
    }

    /// A request is about to be put into the used ring.
    pub(crate) fn completing(&self, head: u16) {
        store(self.next(head), self.u16_at(LAST_BATCH_AT).load(Ordering::Relaxed));
        store(self.u16_at(LAST_BATCH_AT), head);
    }

    /// A request is in the used ring, whose index is now `used`.
    pub(crate) fn completed(&self, head: u16, used: u16) {
        self.set_in_flight(head, false);
        store(self.u16_at(USED_INDEX_AT), used);
    }

    fn set_in_flight(&self, head: u16, value: bool) {
        store(self.in_flight(head), u8::from(value));
    }

    fn features(&self) -> &AtomicU64 {
        self.map.at(self.at + FEATURES_AT)
    }

    fn u16_at(&self, field: usize) -> &AtomicU16 {
        self.map.at(self.at + field)
    }

    fn entry(&self, head: u16) -> usize {
        assert!(head < self.entries, "heads are checked where they come from");
        self.at + HEADER_BYTES + usize::from(head) * ENTRY_BYTES
    }

    fn in_flight(&self, head: u16) -> &AtomicU8 {
        self.map.at(self.entry(head))
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.map.at(self.entry(head) + NEXT_IN_ENTRY)
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        self.map.at(self.entry(head) + COUNTER_IN_ENTRY)
    }
}

/// Stores so that nothing that was stored before can seem to come after it.
fn store<A: AtomicInteger>(atomic: &A, value: A::V) {
    atomic.store(value, Ordering::Release);
    may_die_here();
}

/// Tests have the process die at each of these points.
pub(crate) fn may_die_here() {
    #[cfg(test)]
    crate::testing::death::point();
}

#[cfg(test)]
mod tests;
