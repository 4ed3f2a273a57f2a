//! The data path of one virtqueue.
//!
//! ```text
//!  kick ─► serve: pop ─► parse ─► copy write data ─► Block::submit(batch)
//!                  │        └── bad request ──┐              │ any thread
//!                  │                          ▼              ▼
//!                  └─ counted in flight     done ◄─ complete: copy read data, status byte
//!                                             │
//!                              flush: used ring, one signal, count down
//! ```
//!
//! A chain is *in flight* from the moment it is taken off the available ring until it is in the
//! used ring. Chains are counted under the ring's lock, so whoever marks the ring not ready and
//! then waits for the count to reach zero has drained the queue.
//!
//! Lock order: ring, then state. Neither is held while guest data is copied or `Block` is called.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use sheepdog_types::{Block, Completion, Done, Op, Request, Sink, Token};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use crate::request::{self, Kind, Parsed, Refusal, Segment, Segments};
use crate::ring::{Memory, Ring, lock, signal};

/// Data bytes that one queue may have in flight. Past it the worker leaves requests in the ring
/// until enough have completed. One request may overshoot it.
const MAX_BYTES_IN_FLIGHT: u64 = 64 << 20;

/// What all queues of a connection share.
pub(crate) struct Shared {
    /// Name of the device in log lines.
    pub(crate) name: String,
    pub(crate) block: Arc<dyn Block>,
    pub(crate) memory: Memory,
    /// Writes are answered when they are in the cache (true) or durable (false).
    pub(crate) writeback: AtomicBool,
    /// The connection has ended or is being ended: take nothing more off the rings.
    pub(crate) closing: AtomicBool,
}

/// One virtqueue of one connection.
pub(crate) struct Queue {
    index: usize,
    shared: Arc<Shared>,
    /// Signalled when a queue that had too many bytes in flight may go on.
    resume: File,
    state: Mutex<State>,
    drained: Condvar,
}

#[derive(Default)]
struct State {
    /// Set at the first kick.
    ring: Option<Ring>,
    slots: Vec<Slot>,
    /// Slots not in use.
    free: Vec<u32>,
    /// Answered chains that `flush` has yet to put into the used ring.
    done: Vec<Answered>,
    /// An empty vector with capacity, exchanged with `done`.
    spare: Vec<Answered>,
    in_flight: usize,
    bytes: u64,
    /// The worker left requests in the ring because of `bytes`.
    waiting: bool,
    /// The ring is not to be trusted; cleared when the guest sets it up again.
    broken: bool,
}

/// A request handed to the back end.
#[derive(Default)]
struct Slot {
    /// Keeps the guest's memory mapped; `None` while the slot is free.
    memory: Option<Arc<GuestMemoryMmap>>,
    head: u16,
    status: GuestAddress,
    /// Where a read's data goes; empty for all other requests.
    target: Vec<Segment>,
    /// Data bytes, for the limit and as the length a read must have.
    bytes: u32,
}

struct Answered {
    head: u16,
    /// Bytes written into the chain.
    written: u32,
    /// Bytes that are no longer in flight.
    released: u32,
}

/// The worker's buffers, kept between kicks.
#[derive(Default)]
pub(crate) struct Scratch {
    segments: Segments,
    batch: Vec<Request>,
}

/// Why a pass over the ring ended.
enum Pass {
    /// Nothing is left in the ring.
    Empty,
    /// The queue is stopped, or waits for completions: somebody else will start it again.
    Stopped,
}

/// The ring cannot be trusted any more, and why.
struct Broken(String);

impl Queue {
    pub(crate) fn new(index: usize, shared: Arc<Shared>, resume: File) -> Self {
        Self { index, shared, resume, state: Mutex::default(), drained: Condvar::new() }
    }

    /// Descriptor to watch: readable when [`Queue::serve`] should be called again.
    pub(crate) fn resume_fd(&self) -> i32 {
        self.resume.as_raw_fd()
    }

    /// Clears the event of [`Queue::resume_fd`].
    pub(crate) fn clear_resume(&self) {
        let mut counter = [0; 8];
        // Nothing to read is fine: the event was already cleared.
        let _ = io::Read::read(&mut &self.resume, &mut counter);
    }

    /// Serves all that is in the ring. Called on the queue's worker thread only.
    pub(crate) fn serve(self: &Arc<Self>, ring: &Ring, scratch: &mut Scratch) {
        {
            let mut state = lock(&self.state);
            if state.broken {
                return;
            }
            state.ring.get_or_insert_with(|| ring.clone());
        }
        if let Err(Broken(reason)) = self.serve_ring(ring, scratch) {
            lock(&self.state).broken = true;
            tracing::error!(
                device = %self.shared.name,
                queue = self.index,
                reason,
                "the guest broke a virtqueue: it stops until the guest sets it up again"
            );
        }
    }

    fn serve_ring(self: &Arc<Self>, ring: &Ring, scratch: &mut Scratch) -> Result<(), Broken> {
        let memory = self.shared.memory.memory().into_inner();
        {
            let state = ring.lock();
            if !state.get_queue().ready() {
                return Ok(());
            }
            if !state.get_queue().is_valid(&*memory) {
                return Err(Broken("its rings are not inside guest memory".into()));
            }
        }
        loop {
            notifications(ring, &memory, false)?;
            let pass = self.take_all(ring, &memory, scratch);
            // What was taken is submitted even if the ring broke meanwhile: nothing gets lost.
            if !scratch.batch.is_empty() {
                self.shared.block.submit(&mut scratch.batch);
                // A back end that leaves requests behind has failed them.
                scratch.batch.clear();
            }
            self.flush();
            match pass? {
                Pass::Stopped => return Ok(()),
                Pass::Empty if notifications(ring, &memory, true)? => {}
                Pass::Empty => return Ok(()),
            }
        }
    }

    /// Takes requests off the ring until it is empty, and prepares those for the back end.
    fn take_all(
        self: &Arc<Self>,
        ring: &Ring,
        memory: &Arc<GuestMemoryMmap>,
        scratch: &mut Scratch,
    ) -> Result<Pass, Broken> {
        let size = usize::from(ring.lock().get_queue().size());
        while scratch.batch.len() < size {
            if self.must_wait() {
                return Ok(Pass::Stopped);
            }
            let chain = match self.pop(ring, memory)? {
                Popped::Chain(chain) => chain,
                Popped::Empty => return Ok(Pass::Empty),
                Popped::Stopped => return Ok(Pass::Stopped),
            };
            let head = chain.head_index();
            match request::parse(memory, chain, &mut scratch.segments) {
                Ok(parsed) => self.accept(memory, head, parsed, scratch),
                Err(Refusal::Status { status, code }) => {
                    self.answer(head, put_status(memory, status, code), 0);
                }
                Err(Refusal::NoStatus) => self.answer(head, 0, 0),
                Err(Refusal::Broken(reason)) => {
                    self.forget();
                    return Err(Broken(reason.into()));
                }
            }
        }
        // As many as the ring holds: submit these, then look again.
        Ok(Pass::Empty)
    }

    /// Whether too many bytes are in flight; if so, `flush` will resume the queue.
    fn must_wait(&self) -> bool {
        let mut state = lock(&self.state);
        state.waiting = state.bytes >= MAX_BYTES_IN_FLIGHT;
        state.waiting
    }

    /// Takes one chain off the ring and counts it in flight.
    fn pop<'m>(&self, ring: &Ring, memory: &'m GuestMemoryMmap) -> Result<Popped<'m>, Broken> {
        let mut vring = ring.lock();
        let usable = vring.is_enabled() && vring.get_queue().ready();
        if !usable || self.shared.closing.load(Ordering::Acquire) {
            return Ok(Popped::Stopped);
        }
        let queue = vring.get_queue_mut();
        let size = queue.size();
        let chain = queue
            .iter(memory)
            .map_err(|error| Broken(format!("its available ring is bad: {error}")))?
            .next();
        let Some(chain) = chain else { return Ok(Popped::Empty) };
        let mut state = lock(&self.state);
        // Every chain in flight has a descriptor of its own, unless the guest gave one twice.
        if state.in_flight >= usize::from(size) {
            return Err(Broken("more requests are in flight than the ring has entries".into()));
        }
        state.in_flight += 1;
        Ok(Popped::Chain(chain))
    }

    /// Takes back the count of a chain that will never be answered.
    fn forget(&self) {
        let mut state = lock(&self.state);
        state.in_flight -= 1;
        self.drained.notify_all();
    }

    /// Turns a good request into one for the back end, or answers it here.
    fn accept(
        self: &Arc<Self>,
        memory: &Arc<GuestMemoryMmap>,
        head: u16,
        parsed: Parsed,
        scratch: &mut Scratch,
    ) {
        let Scratch { segments, batch } = scratch;
        let fua = !self.shared.writeback.load(Ordering::Relaxed);
        let (op, bytes) = match parsed.kind {
            Kind::Read { offset, len } => (Op::Read { offset, len }, len),
            Kind::Write { offset, len } => {
                let mut data = vec![0; len as usize];
                if !request::read_run(memory, &segments.readable, &mut data) {
                    let code = VIRTIO_BLK_S_IOERR as u8;
                    return self.answer(head, put_status(memory, parsed.status, code), 0);
                }
                (Op::Write { offset, data, fua }, len)
            }
            Kind::Flush => (Op::Flush, 0),
            Kind::Discard { offset, len } => (Op::Discard { offset, len }, 0),
            Kind::WriteZeroes { offset, len, may_unmap } => {
                (Op::WriteZeroes { offset, len, may_unmap, fua }, 0)
            }
            Kind::GetId => {
                let id = serial(&self.shared.block.info().serial);
                let written = request::write_run(memory, &segments.writable, &id);
                let code = if written.is_some() { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR };
                let written = written.unwrap_or(0);
                let written = written + put_status(memory, parsed.status, code as u8);
                return self.answer(head, written, 0);
            }
        };
        let tag = {
            let mut state = lock(&self.state);
            let (tag, slot) = state.claim();
            slot.memory = Some(memory.clone());
            slot.head = head;
            slot.status = parsed.status;
            slot.bytes = bytes;
            if matches!(op, Op::Read { .. }) {
                std::mem::swap(&mut slot.target, &mut segments.writable);
            }
            state.bytes += u64::from(bytes);
            tag
        };
        batch.push(Request { op, token: Token::new(tag, self.clone()) });
    }

    /// Notes that a chain is answered; `flush` tells the guest.
    fn answer(&self, head: u16, written: u32, released: u32) {
        lock(&self.state).done.push(Answered { head, written, released });
    }

    /// Waits until nothing is in flight. The ring must have been marked not ready, or the
    /// connection closing, before: else this may never end.
    pub(crate) fn drain(&self) {
        // A worker that looked at the ring before it was stopped has counted its chain by the time
        // it lets go of the ring's lock.
        let ring = lock(&self.state).ring.clone();
        drop(ring.as_ref().map(Ring::lock));
        let mut state = lock(&self.state);
        while state.in_flight > 0 {
            state = self.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // A guest that resets the device starts with a ring that is good until proved otherwise.
        state.broken = false;
    }

    /// Moves answered chains to the used ring; says whether the guest wants to be told.
    fn publish(&self, ring: &Ring, done: &[Answered]) -> Result<bool, virtio_queue::Error> {
        let memory = self.shared.memory.memory();
        let mut vring = ring.lock();
        let queue = vring.get_queue_mut();
        for answered in done {
            queue.add_used(&*memory, answered.head, answered.written)?;
        }
        if !queue.event_idx_enabled() {
            // The used index must be visible before the guest's wish is read.
            fence(Ordering::SeqCst);
            let flags: u16 = memory
                .load(GuestAddress(queue.avail_ring()), Ordering::SeqCst)
                .map_err(virtio_queue::Error::GuestMemory)?;
            if u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 != 0 {
                return Ok(false);
            }
        }
        queue.needs_notification(&*memory)
    }
}

impl Sink for Queue {
    fn complete(&self, tag: u64, completion: Completion) {
        let (memory, head, status, bytes, mut target) = {
            let mut state = lock(&self.state);
            let slot = state.slots.get_mut(tag as usize);
            let Some(slot) = slot.filter(|slot| slot.memory.is_some()) else {
                debug_assert!(false, "a token completed twice");
                return;
            };
            let memory = slot.memory.take();
            (memory, slot.head, slot.status, slot.bytes, std::mem::take(&mut slot.target))
        };
        let Some(memory) = memory else { return };
        let written = finish(&memory, completion, &target, bytes, status);
        target.clear();
        let mut state = lock(&self.state);
        if let Some(slot) = state.slots.get_mut(tag as usize) {
            slot.target = target;
        }
        state.free.push(tag as u32);
        state.done.push(Answered { head, written, released: bytes });
    }

    fn flush(&self) {
        let (mut done, ring) = {
            let mut state = lock(&self.state);
            if state.done.is_empty() {
                return;
            }
            let spare = std::mem::take(&mut state.spare);
            (std::mem::replace(&mut state.done, spare), state.ring.clone())
        };
        if let Some(ring) = ring {
            match self.publish(&ring, &done) {
                Ok(true) => ring.call().iter().for_each(|call| signal(call)),
                Ok(false) => {}
                Err(error) => self.used_ring_failed(&error),
            }
        }
        let released: u64 = done.iter().map(|a| u64::from(a.released)).sum();
        let mut state = lock(&self.state);
        state.in_flight -= done.len();
        state.bytes -= released;
        if state.in_flight == 0 {
            self.drained.notify_all();
        }
        if state.waiting && state.bytes < MAX_BYTES_IN_FLIGHT {
            state.waiting = false;
            // Cannot block and cannot overflow: the counter is read at every event.
            let _ = (&self.resume).write(&1u64.to_ne_bytes());
        }
        done.clear();
        state.spare = done;
    }
}

impl Queue {
    fn used_ring_failed(&self, error: &virtio_queue::Error) {
        if !std::mem::replace(&mut lock(&self.state).broken, true) {
            tracing::error!(
                device = %self.shared.name,
                queue = self.index,
                %error,
                "the used ring cannot be written: the queue stops until the guest sets it up again"
            );
        }
    }
}

impl State {
    /// A free slot, and the tag that finds it again.
    fn claim(&mut self) -> (u64, &mut Slot) {
        let tag = self.free.pop().map_or_else(
            || {
                self.slots.push(Slot::default());
                self.slots.len() - 1
            },
            |tag| tag as usize,
        );
        (tag as u64, &mut self.slots[tag])
    }
}

enum Popped<'m> {
    Chain(DescriptorChain<&'m GuestMemoryMmap>),
    Empty,
    Stopped,
}

/// Asks the guest to kick, or not to. When enabling, says whether requests came in meanwhile.
fn notifications(ring: &Ring, memory: &GuestMemoryMmap, enable: bool) -> Result<bool, Broken> {
    let mut vring = ring.lock();
    let queue = vring.get_queue_mut();
    let more = if enable {
        queue.enable_notification(memory)
    } else {
        queue.disable_notification(memory).map(|()| false)
    };
    more.map_err(|error| Broken(format!("its rings cannot be accessed: {error}")))
}

/// Writes the outcome of a request into its chain; gives the bytes written.
fn finish(
    memory: &GuestMemoryMmap,
    completion: Completion,
    target: &[Segment],
    bytes: u32,
    status: GuestAddress,
) -> u32 {
    let data = match completion {
        Ok(Done::Nothing) if target.is_empty() => Some(0),
        Ok(Done::Data(data)) if data.len() == bytes as usize && !target.is_empty() => {
            request::write_run(memory, target, &data)
        }
        // The wrong kind or amount of data is as bad as none.
        Ok(_) | Err(_) => None,
    };
    let code = if data.is_some() { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR };
    data.unwrap_or(0) + put_status(memory, status, code as u8)
}

/// Writes a status byte; gives the bytes written.
fn put_status(memory: &GuestMemoryMmap, status: GuestAddress, code: u8) -> u32 {
    u32::from(memory.write_obj(code, status).is_ok())
}

/// The serial as GET_ID gives it: 20 bytes, padded with zeroes.
fn serial(text: &str) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    let len = text.len().min(id.len());
    id[..len].copy_from_slice(&text.as_bytes()[..len]);
    id
}

#[cfg(test)]
mod tests;
