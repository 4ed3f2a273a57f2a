//! One virtqueue as the frontend configures it, and all that is written into its rings.
//!
//! ```text
//!            kick set, enabled              GET_VRING_BASE              nothing in flight
//!  stopped ───────────────────► running ──────────────────► stopping ───────────────────► stopped
//!             (begin)                     (takes nothing)                  (end)
//! ```
//!
//! Nothing is written into the rings of a ring that is stopped: the guest may have been moved to
//! another host by then.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::chain::Chain;
use crate::dirty::DirtyLog;
use crate::inflight::{Found, QueueRegion, may_die_here};

/// Bytes of the used ring before its elements: flags and index.
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

/// A virtqueue's configuration and state.
pub(crate) struct Ring {
    queue: Queue,
    enabled: bool,
    /// Running or stopping.
    begun: bool,
    kick: Option<Arc<File>>,
    call: Option<Arc<File>>,
    err: Option<Arc<File>>,
    /// Chains taken and not in the used ring yet. A guest may offer a descriptor again as soon as it
    /// sees it there, so this is counted under the same lock.
    outstanding: usize,
    inflight: Option<QueueRegion>,
    /// Requests that a predecessor had in flight, the oldest first.
    resubmit: VecDeque<u16>,
    /// Where writes of the used ring are noted while they are.
    log: Option<Arc<DirtyLog>>,
    /// Address of the used ring in that log, if this ring is to be logged.
    log_address: Option<u64>,
}

/// A chain that was answered.
pub(crate) struct Answered {
    pub(crate) head: u16,
    /// Bytes written into the chain.
    pub(crate) written: u32,
    /// Bytes that are no longer in flight.
    pub(crate) released: u32,
    /// The back end has failed the request.
    pub(crate) failed: bool,
}

/// What [`Ring::take`] found.
pub(crate) enum Taken<'m> {
    /// A new request.
    New(u16, Chain<'m>),
    /// One that was already counted in flight when the ring began.
    Again(u16, Chain<'m>),
    Empty,
    /// The ring is not running.
    Stopped,
}

/// The ring cannot be trusted any more, and why.
pub(crate) struct Broken(pub(crate) String);

impl From<&str> for Broken {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl Ring {
    pub(crate) fn new(max_size: u16) -> Result<Self, QueueError> {
        Ok(Self {
            queue: Queue::new(max_size)?,
            enabled: false,
            begun: false,
            kick: None,
            call: None,
            err: None,
            outstanding: 0,
            inflight: None,
            resubmit: VecDeque::new(),
            log: None,
            log_address: None,
        })
    }

    /// Sets the number of entries: a power of two.
    pub(crate) fn set_size(&mut self, size: u16) -> Result<(), QueueError> {
        self.queue.try_set_size(size)
    }

    pub(crate) fn set_addresses(
        &mut self,
        descriptors: GuestAddress,
        available: GuestAddress,
        used: GuestAddress,
    ) -> Result<(), QueueError> {
        self.queue.try_set_desc_table_address(descriptors)?;
        self.queue.try_set_avail_ring_address(available)?;
        self.queue.try_set_used_ring_address(used)
    }

    /// Sets where in the available ring to begin.
    pub(crate) fn set_base(&mut self, base: u16) {
        self.queue.set_next_avail(base);
    }

    pub(crate) fn set_event_idx(&mut self, enabled: bool) {
        self.queue.set_event_idx(enabled);
    }

    pub(crate) fn set_inflight(&mut self, region: Option<QueueRegion>) {
        self.inflight = region;
    }

    pub(crate) fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
    }

    pub(crate) fn set_log_address(&mut self, address: Option<u64>) {
        self.log_address = address;
    }

    pub(crate) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Sets the descriptor that the guest kicks, and gives the one before. The ring is started.
    pub(crate) fn set_kick(&mut self, kick: Arc<File>) -> Option<Arc<File>> {
        set_nonblocking(&kick);
        self.queue.set_ready(true);
        self.kick.replace(kick)
    }

    pub(crate) fn kick(&self) -> Option<Arc<File>> {
        self.kick.clone()
    }

    pub(crate) fn set_call(&mut self, call: Option<File>) {
        call.iter().for_each(set_nonblocking);
        self.call = call.map(Arc::new);
        self.announce();
    }

    pub(crate) fn set_err(&mut self, err: Option<File>) {
        err.iter().for_each(set_nonblocking);
        self.err = err.map(Arc::new);
    }

    /// The guest's notification, to be signalled after the ring's lock is released.
    pub(crate) fn call(&self) -> Option<Arc<File>> {
        self.call.clone()
    }

    /// The frontend's notification that the ring is broken.
    pub(crate) fn err(&self) -> Option<Arc<File>> {
        self.err.clone()
    }

    /// Entries in the ring.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where in the available ring to go on.
    pub(crate) fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Whether the ring is running or stopping.
    pub(crate) fn begun(&self) -> bool {
        self.begun
    }

    /// Whether the ring was started; it need not be enabled.
    pub(crate) fn started(&self) -> bool {
        self.queue.ready()
    }

    /// Whether [`Ring::begin`] is due.
    pub(crate) fn can_begin(&self) -> bool {
        self.started() && self.enabled && !self.begun
    }

    /// Whether requests may be in the ring for us.
    pub(crate) fn has_work(&self) -> bool {
        self.begun && (!self.resubmit.is_empty() || self.running())
    }

    fn running(&self) -> bool {
        self.begun && self.started() && self.enabled
    }

    /// Begins to run: finds the place in the rings, and what a predecessor had in flight. Gives
    /// how many requests that were.
    pub(crate) fn begin(&mut self, memory: &GuestMemoryMmap) -> Result<usize, Broken> {
        self.begun = true;
        if !self.queue.is_valid(memory) {
            return Err("its rings are not inside guest memory".into());
        }
        let used = self.queue.used_idx(memory, Ordering::Acquire).map_err(unreadable)?.0;
        self.queue.set_next_used(used);
        if let Some(region) = &mut self.inflight
            && let Found::InFlight(heads) = region.recover(self.queue.size(), used)?
        {
            // All that was ever taken is either in the used ring or in flight. What the frontend
            // took for the base is not to be relied on: it may have looked too early.
            self.queue.set_next_avail(used.wrapping_add(heads.len() as u16));
            self.resubmit = heads.into();
        }
        self.outstanding = self.resubmit.len();
        self.announce();
        Ok(self.resubmit.len())
    }

    /// Takes no more requests, other than those of a predecessor.
    pub(crate) fn stop(&mut self) {
        self.queue.set_ready(false);
    }

    /// The ring is at rest: forgets its descriptors, and gives the one that is kicked.
    pub(crate) fn end(&mut self) -> Option<Arc<File>> {
        self.begun = false;
        self.call = None;
        self.kick.take()
    }

    /// Gives up what a predecessor had in flight and was not taken yet: it stays in the region.
    /// Gives how many requests those are.
    pub(crate) fn give_up(&mut self) -> usize {
        std::mem::take(&mut self.resubmit).len()
    }

    /// Tells the guest once, whatever is in the used ring: a predecessor may have died before it
    /// could. So does each new descriptor, because QEMU starts a ring with one that leads nowhere.
    fn announce(&self) {
        if self.begun {
            self.call.iter().for_each(|call| signal(call));
        }
    }

    /// Takes the next request.
    pub(crate) fn take<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Taken<'m>, Broken> {
        let (table, size) = (GuestAddress(self.queue.desc_table()), self.queue.size());
        if let Some(head) = self.resubmit.pop_front() {
            return Ok(Taken::Again(head, Chain::new(memory, table, size, head)));
        }
        if !self.running() {
            return Ok(Taken::Stopped);
        }
        let available = self.queue.iter(memory);
        let available = available
            .map_err(|error| Broken(format!("its available ring is bad: {error}")))?
            .next();
        let Some(chain) = available else { return Ok(Taken::Empty) };
        let head = chain.head_index();
        if head >= size {
            return Err("a descriptor chain begins outside of its table".into());
        }
        // Every chain taken has a descriptor of its own, unless the guest gave one twice.
        if self.outstanding >= usize::from(size) {
            return Err("more requests are in flight than the ring has entries".into());
        }
        self.outstanding += 1;
        if let Some(region) = &mut self.inflight {
            region.taken(head);
        }
        Ok(Taken::New(head, Chain::new(memory, table, size, head)))
    }

    /// Moves answered chains to the used ring; says whether the guest wants to be told. A
    /// connection that is `closing` leaves those that failed in flight if they are tracked: the
    /// failure may be that of a back end that is going away, and a successor may succeed.
    pub(crate) fn publish(
        &mut self,
        memory: &GuestMemoryMmap,
        done: &[Answered],
        closing: bool,
    ) -> Result<bool, Broken> {
        let leave_failed = closing && self.inflight.is_some();
        for answered in done.iter().filter(|answered| !(leave_failed && answered.failed)) {
            self.publish_one(memory, answered).map_err(unwritable)?;
        }
        if !self.queue.event_idx_enabled() {
            // The used index must be visible before the guest's wish is read.
            fence(Ordering::SeqCst);
            let flags = memory.load(GuestAddress(self.queue.avail_ring()), Ordering::SeqCst);
            let flags: u16 = flags.map_err(|error| unreadable(QueueError::GuestMemory(error)))?;
            if u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 != 0 {
                return Ok(false);
            }
        }
        self.queue.needs_notification(memory).map_err(unreadable)
    }

    fn publish_one(
        &mut self,
        memory: &GuestMemoryMmap,
        answered: &Answered,
    ) -> Result<(), QueueError> {
        if let Some(region) = &self.inflight {
            region.completing(answered.head);
        }
        let slot = u64::from(self.queue.next_used() % self.queue.size());
        self.queue.add_used(memory, answered.head, answered.written)?;
        self.outstanding -= 1;
        may_die_here();
        self.log_used(USED_HEADER_BYTES + slot * USED_ELEMENT_BYTES, USED_ELEMENT_BYTES);
        self.log_used(0, USED_HEADER_BYTES);
        if let Some(region) = &self.inflight {
            region.completed(answered.head, self.queue.next_used());
        }
        Ok(())
    }

    /// Asks the guest to kick, or not to. When enabling, says whether requests came in meanwhile.
    pub(crate) fn notifications(
        &mut self,
        memory: &GuestMemoryMmap,
        enable: bool,
    ) -> Result<bool, Broken> {
        if !self.running() {
            return Ok(false);
        }
        let more = if enable {
            self.queue.enable_notification(memory)
        } else {
            self.queue.disable_notification(memory).map(|()| false)
        };
        if self.queue.event_idx_enabled() {
            let elements = u64::from(self.queue.size()) * USED_ELEMENT_BYTES;
            self.log_used(USED_HEADER_BYTES + elements, size_of::<u16>() as u64);
        } else {
            self.log_used(0, size_of::<u16>() as u64);
        }
        more.map_err(|error| Broken(format!("its rings cannot be accessed: {error}")))
    }

    /// Notes a write of `len` bytes at `offset` in the used ring.
    fn log_used(&self, offset: u64, len: u64) {
        if let (Some(log), Some(address)) = (&self.log, self.log_address)
            && let Some(at) = address.checked_add(offset)
        {
            log.mark(at, len);
        }
    }
}

fn unreadable(error: QueueError) -> Broken {
    Broken(format!("its rings cannot be read: {error}"))
}

fn unwritable(error: QueueError) -> Broken {
    Broken(format!("its used ring cannot be written: {error}"))
}

/// Takes the event off a kick descriptor. The worker is woken by edges, so it is no harm if
/// nothing can be read.
pub(crate) fn clear_kick(kick: &File) {
    let mut kick = kick;
    let _ = kick.read(&mut [0; 8]);
}

/// Writes one event. A full counter means that the guest has an event pending anyway; a closed
/// descriptor means that nobody listens: neither is our problem.
pub(crate) fn signal(call: &File) {
    let mut call = call;
    if let Err(error) = call.write(&1u64.to_ne_bytes()) {
        tracing::debug!(%error, "the guest's notification could not be written");
    }
}

/// Locks a mutex whose content is valid even if a holder panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sees to it that a descriptor of the frontend's cannot block our threads.
fn set_nonblocking(file: &File) {
    let fd = file.as_raw_fd();
    // SAFETY: F_GETFL and F_SETFL on a descriptor that `file` owns touch no memory.
    let failed = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0
    };
    if failed {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "a ring's event descriptor could not be made non-blocking");
    }
}
