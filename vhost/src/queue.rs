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
//! used ring, and what a predecessor of this process had in flight is so from the moment the ring
//! begins to run. Chains are counted under the ring's lock, so whoever stops the ring and then
//! waits for the count to reach zero has drained the queue.
//!
//! Lock order: ring, then state. Neither is held while guest data is copied or `Block` is called.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use sheepdog_types::{Block, Completion, Done, Op, Request, Sink, Token};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::dirty::DirtyLog;
use crate::memory::Memory;
use crate::request::{self, Kind, Parsed, Refusal, Segment, Segments};
use crate::ring::{Answered, Broken, Ring, Taken, clear_kick, lock, signal};

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
    /// The connection to the frontend, to see whether that is still there.
    pub(crate) frontend: Option<UnixStream>,
}

impl Shared {
    /// Whether the frontend waits for what it has requested. Messages that it sent before it died may still
    /// be unread then, which a look at them would not tell.
    fn is_wanted(&self) -> bool {
        !self.closing.load(Ordering::Acquire)
            && self.frontend.as_ref().is_none_or(|socket| !hung_up(socket).unwrap_or(true))
    }
}

fn hung_up(socket: &UnixStream) -> io::Result<bool> {
    let (epoll, fd) = (Epoll::new()?, socket.as_raw_fd());
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::READ_HANG_UP, 0))?;
    let found = epoll.wait(0, &mut [EpollEvent::default(); 1])?;
    Ok(found > 0)
}

/// One virtqueue of one connection.
pub(crate) struct Queue {
    index: usize,
    shared: Arc<Shared>,
    wake: Wake,
    ring: Mutex<Ring>,
    state: Mutex<State>,
    drained: Condvar,
}

#[derive(Default)]
struct State {
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
    /// Where writes into requests are noted while they are.
    log: Option<Arc<DirtyLog>>,
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
    /// There may be more.
    Full,
    /// The queue is stopped, or waits for completions: somebody else will start it again.
    Stopped,
}

/// What wakes a queue's worker: the guest's kicks, and we ourselves.
struct Wake {
    epoll: Epoll,
    resume: EventFd,
}

impl Wake {
    fn new() -> io::Result<Self> {
        let resume = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, resume.as_raw_fd(), event)?;
        Ok(Self { epoll, resume })
    }

    /// Edges only: whatever a frontend gives us as its kick cannot keep the worker busy.
    fn watch(&self, kick: &File) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        self.epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event)
    }

    fn unwatch(&self, kick: &File) {
        let gone = EpollEvent::default();
        if let Err(error) = self.epoll.ctl(ControlOperation::Delete, kick.as_raw_fd(), gone) {
            tracing::debug!(%error, "a kick descriptor was not watched");
        }
    }

    /// Cannot block and cannot overflow: the counter is read at every event.
    fn poke(&self) {
        let _ = self.resume.write(1);
    }

    fn wait(&self) -> io::Result<()> {
        loop {
            match self.epoll.wait(-1, &mut [EpollEvent::default(); 2]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.map(drop),
            }
        }
    }
}

/// What the frontend does with a queue.
impl Queue {
    pub(crate) fn new(index: usize, shared: Arc<Shared>, max_size: u16) -> io::Result<Self> {
        let ring = Mutex::new(Ring::new(max_size).map_err(io::Error::other)?);
        let (wake, state) = (Wake::new()?, Mutex::default());
        Ok(Self { index, shared, wake, ring, state, drained: Condvar::new() })
    }

    /// The ring's configuration. What starts, stops and logs a ring has functions here.
    pub(crate) fn ring(&self) -> MutexGuard<'_, Ring> {
        lock(&self.ring)
    }

    /// Sets the descriptor that the guest kicks, which starts the ring.
    pub(crate) fn set_kick(&self, kick: File) -> io::Result<()> {
        let mut ring = self.ring();
        self.wake.watch(&kick)?;
        if let Some(old) = ring.set_kick(Arc::new(kick)) {
            self.wake.unwatch(&old);
        }
        self.begin(ring);
        Ok(())
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        let mut ring = self.ring();
        ring.set_enabled(enabled);
        self.begin(ring);
    }

    /// Begins to run if that is due, and has the worker look at the ring.
    fn begin(&self, mut ring: MutexGuard<'_, Ring>) {
        if ring.can_begin() {
            match ring.begin(&self.shared.memory.memory()) {
                Ok(again) => lock(&self.state).in_flight += again,
                Err(broken) => self.break_off(ring, &broken),
            }
        }
        self.wake.poke();
    }

    /// Stops the ring, completes all that is in flight, and gives the next place in the available
    /// ring. Nothing is written into guest memory afterwards.
    pub(crate) fn stop(&self) -> u16 {
        self.ring().stop();
        self.wake.poke();
        self.drain();
        // A guest that resets the device starts with a ring that is good until proved otherwise.
        lock(&self.state).broken = false;
        let mut ring = self.ring();
        if let Some(kick) = ring.end() {
            self.wake.unwatch(&kick);
        }
        ring.next_avail()
    }

    /// Completes what was submitted, and takes nothing more. The connection must be closing.
    pub(crate) fn close(&self) {
        let mut ring = self.ring();
        self.give_up(&mut ring);
        drop(ring);
        self.drain();
    }

    /// Waits until nothing is in flight. The ring must have been stopped, or the connection be
    /// closing: else this may never end.
    fn drain(&self) {
        let mut state = lock(&self.state);
        while state.in_flight > 0 {
            state = self.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// From now on all writes into guest memory are noted in `log`, or none any more.
    pub(crate) fn set_log(&self, log: Option<&Arc<DirtyLog>>) {
        let mut ring = self.ring();
        ring.set_log(log.cloned());
        lock(&self.state).log = log.cloned();
    }

    /// Requests of a predecessor that were not submitted again are no longer in flight here.
    fn give_up(&self, ring: &mut Ring) {
        let given_up = ring.give_up();
        let mut state = lock(&self.state);
        state.in_flight -= given_up;
        self.drained.notify_all();
    }

    fn break_off(&self, mut ring: MutexGuard<'_, Ring>, broken: &Broken) {
        let news = !std::mem::replace(&mut lock(&self.state).broken, true);
        self.give_up(&mut ring);
        let err = ring.err();
        drop(ring);
        if news {
            tracing::error!(
                device = %self.shared.name,
                queue = self.index,
                reason = broken.0,
                "the guest broke a virtqueue: it stops until the guest sets it up again"
            );
            err.iter().for_each(|err| signal(err));
        }
    }
}

/// What the queue's worker does.
impl Queue {
    /// Serves the queue whenever it is woken, until `exit` is set and [`Queue::wake`] called.
    pub(crate) fn work(self: &Arc<Self>, exit: &AtomicBool) -> io::Result<()> {
        let mut scratch = Scratch::default();
        loop {
            self.wake.wait()?;
            // Before the ring is looked at, else an event might be lost.
            let _ = self.wake.resume.read();
            let kick = self.ring().kick();
            kick.iter().for_each(|kick| clear_kick(kick));
            if exit.load(Ordering::Acquire) {
                return Ok(());
            }
            self.serve(&mut scratch);
        }
    }

    pub(crate) fn wake(&self) {
        self.wake.poke();
    }

    /// Serves all that is in the ring. Called by one thread at a time.
    fn serve(self: &Arc<Self>, scratch: &mut Scratch) {
        if lock(&self.state).broken {
            return;
        }
        if let Err(broken) = self.serve_ring(scratch) {
            self.break_off(self.ring(), &broken);
        }
    }

    fn serve_ring(self: &Arc<Self>, scratch: &mut Scratch) -> Result<(), Broken> {
        let memory = self.shared.memory.memory().into_inner();
        if !self.ring().has_work() {
            return Ok(());
        }
        loop {
            self.ring().notifications(&memory, false)?;
            let pass = self.take_all(&memory, scratch);
            // What was taken is submitted even if the ring broke meanwhile: nothing gets lost.
            if !scratch.batch.is_empty() {
                self.shared.block.submit(&mut scratch.batch);
                // A back end that leaves requests behind has failed them.
                scratch.batch.clear();
            }
            self.flush();
            match pass? {
                Pass::Stopped => return Ok(()),
                Pass::Empty if self.ring().notifications(&memory, true)? => {}
                Pass::Empty => return Ok(()),
                Pass::Full => {}
            }
        }
    }

    /// Takes requests off the ring until it is empty, and prepares those for the back end.
    fn take_all(
        self: &Arc<Self>,
        memory: &Arc<GuestMemoryMmap>,
        scratch: &mut Scratch,
    ) -> Result<Pass, Broken> {
        let size = usize::from(self.ring().size());
        while scratch.batch.len() < size {
            if self.must_wait() {
                return Ok(Pass::Stopped);
            }
            let (head, chain) = match self.take(memory)? {
                Taken::New(head, chain) | Taken::Again(head, chain) => (head, chain),
                Taken::Empty => return Ok(Pass::Empty),
                Taken::Stopped => return Ok(Pass::Stopped),
            };
            match request::parse(memory, chain, &mut scratch.segments) {
                Ok(parsed) => self.accept(memory, head, parsed, scratch),
                Err(Refusal::Status { status, code }) => {
                    self.answer_status(memory, head, status, code);
                }
                Err(Refusal::NoStatus) => self.answer(head, 0, &[], None),
                Err(Refusal::Broken(reason)) => {
                    self.forget();
                    return Err(reason.into());
                }
            }
        }
        // As many as the ring holds: submit these, then look again.
        Ok(Pass::Full)
    }

    /// Whether too many bytes are in flight; if so, `flush` will resume the queue.
    fn must_wait(&self) -> bool {
        let mut state = lock(&self.state);
        state.waiting = state.bytes >= MAX_BYTES_IN_FLIGHT;
        state.waiting
    }

    /// Takes one chain off the ring and counts it in flight.
    fn take<'m>(&self, memory: &'m GuestMemoryMmap) -> Result<Taken<'m>, Broken> {
        let mut ring = self.ring();
        if self.shared.closing.load(Ordering::Acquire) {
            return Ok(Taken::Stopped);
        }
        let taken = ring.take(memory)?;
        if let Taken::New(..) = taken {
            lock(&self.state).in_flight += 1;
        }
        Ok(taken)
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
                    return self.answer_status(memory, head, parsed.status, code);
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
                let status = put_status(memory, parsed.status, code as u8);
                let target = &segments.writable;
                return self.answer(head, written + status, target, Some(parsed.status));
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

    fn answer_status(&self, memory: &GuestMemoryMmap, head: u16, status: GuestAddress, code: u8) {
        self.answer(head, put_status(memory, status, code), &[], Some(status));
    }

    /// Notes that a chain is answered, by `written` bytes at `target` and `status`; `flush` tells
    /// the guest.
    fn answer(&self, head: u16, written: u32, target: &[Segment], status: Option<GuestAddress>) {
        let mut state = lock(&self.state);
        state.log_writes(target, status);
        state.done.push(Answered { head, written, released: 0, failed: false });
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
        let failed = completion.is_err();
        let written = finish(&memory, completion, &target, bytes, status);
        let mut state = lock(&self.state);
        state.log_writes(&target, Some(status));
        target.clear();
        if let Some(slot) = state.slots.get_mut(tag as usize) {
            slot.target = target;
        }
        state.free.push(tag as u32);
        state.done.push(Answered { head, written, released: bytes, failed });
    }

    fn flush(&self) {
        let mut done = {
            let mut state = lock(&self.state);
            if state.done.is_empty() {
                return;
            }
            let spare = std::mem::take(&mut state.spare);
            std::mem::replace(&mut state.done, spare)
        };
        let mut ring = self.ring();
        let closing = self.shared.closing.load(Ordering::Acquire);
        match ring.publish(&self.shared.memory.memory(), &done, closing) {
            Ok(wanted) => {
                let call = ring.call().filter(|_| wanted);
                drop(ring);
                call.iter().for_each(|call| signal(call));
            }
            Err(broken) => self.break_off(ring, &broken),
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
            self.wake.poke();
        }
        done.clear();
        state.spare = done;
    }

    fn is_wanted(&self) -> bool {
        self.shared.is_wanted()
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

    /// Notes, after they were made, writes of data and of a status byte.
    fn log_writes(&self, target: &[Segment], status: Option<GuestAddress>) {
        if let Some(log) = &self.log {
            target.iter().for_each(|segment| log.mark(segment.addr.0, segment.len.into()));
            status.iter().for_each(|status| log.mark(status.0, 1));
        }
    }
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
