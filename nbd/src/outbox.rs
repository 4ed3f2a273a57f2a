//! Requests in flight of one connection and the replies on their way to its socket.
//!
//! Completions arrive on any thread. Whoever flushes first writes, with one `sendmsg` for as many
//! replies as there are, outside the lock; the others leave their replies to it. If the socket is
//! full, the connection thread waits for it to drain.
//!
//! ```text
//!  admit ──► slot ──(device)──► complete ──► queue ──(flush)──► socket
//!    │                                                            │
//!    └── counted in `ops` and `bytes` until its reply is sent ◄───┘
//! ```

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use sheepdog_types::{Completion, Sink};

use crate::machine::reply::{Refusal, Reply, outcome};
use crate::machine::transmission::cost;
use crate::machine::wire::RequestHead;
use crate::server::Link;

/// Slices given to one `sendmsg`; the kernel takes up to 1024.
const MAX_SLICES: usize = 128;

/// Bounds on what one connection may have in flight, replies not yet sent included.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub ops: usize,
    pub bytes: u64,
}

/// A request between admission and its reply.
#[derive(Clone, Copy)]
struct Slot {
    head: RequestHead,
    cost: u64,
    then_flush: bool,
}

struct Queued {
    reply: Reply,
    /// Bytes to take off [`State::bytes`] when sent.
    cost: u64,
}

/// What the connection thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    /// Poll the socket for input.
    pub readable: bool,
    /// Poll the socket for room for output.
    pub writable: bool,
    /// Be woken when no more than so many requests are in flight and no reply is queued.
    idle_at: Option<usize>,
}

#[derive(Default)]
struct State {
    slots: Vec<Slot>,
    free: Vec<u64>,
    queue: VecDeque<Queued>,
    /// Bytes of the first queued reply that were sent already.
    sent: usize,
    /// A thread is writing; `queue` holds what came since it took its share.
    writing: bool,
    /// The socket is full: only [`Outbox::writable`] may try again.
    full: bool,
    /// The client is gone: replies are dropped.
    lost: bool,
    /// The client has said good-bye or closed its end: it does not insist on what has not begun.
    leaving: bool,
    ops: usize,
    bytes: u64,
    /// Admitted requests that have no reply yet.
    pending: usize,
    /// Cost of the request that was not admitted, if that was the last thing `admit` said.
    refused: Option<u64>,
    /// Requests whose operation ended and that need an `Op::Flush` before their reply.
    then_flush: Vec<u64>,
    /// Set while the connection thread waits, or is about to.
    parked: Option<Wait>,
}

impl State {
    fn admits(&self, window: Window, cost: u64) -> bool {
        // A request larger than the whole window must pass when it is alone.
        self.ops < window.ops && (self.bytes == 0 || self.bytes + cost <= window.bytes)
    }

    fn idle(&self, pending: usize) -> bool {
        self.pending <= pending && self.queue.is_empty() && !self.writing
    }

    /// Whether the connection thread, waiting for `wait`, has something to do.
    fn wakes(&self, window: Window, wait: Wait) -> bool {
        !self.then_flush.is_empty()
            || self.refused.is_some_and(|cost| self.admits(window, cost))
            || (self.full && !wait.writable)
            || wait.idle_at.is_some_and(|pending| self.idle(pending))
    }

    fn release(&mut self, ops: usize, bytes: u64) {
        self.ops -= ops;
        self.bytes -= bytes;
    }

    /// The request of `ticket` is answered by `reply`.
    fn finish(&mut self, ticket: u64, reply: Reply) {
        let cost = self.slots[ticket as usize].cost;
        self.free.push(ticket);
        self.pending -= 1;
        if self.lost {
            self.release(1, cost);
            return;
        }
        let kept = cost.min(reply.body().len() as u64);
        self.release(0, cost - kept);
        self.queue.push_back(Queued { reply, cost: kept });
    }

    fn lose(&mut self) {
        self.lost = true;
        self.full = false;
        self.sent = 0;
        for queued in std::mem::take(&mut self.queue) {
            self.release(1, queued.cost);
        }
    }
}

/// A share of the queue taken out by the thread that writes.
struct Share {
    queue: VecDeque<Queued>,
    sent: usize,
    ops: usize,
    bytes: u64,
}

/// See the module's documentation.
pub(crate) struct Outbox {
    link: Arc<Link>,
    structured: bool,
    window: Window,
    state: Mutex<State>,
}

impl Outbox {
    pub fn new(link: Arc<Link>, structured: bool, window: Window) -> Self {
        Self { link, structured, window, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a slot for `head` and gives its ticket; `None` while the window is full.
    pub fn admit(&self, head: &RequestHead) -> Option<u64> {
        let cost = cost(head);
        let mut state = self.lock();
        if !state.admits(self.window, cost) {
            state.refused = Some(cost);
            return None;
        }
        state.refused = None;
        state.ops += 1;
        state.bytes += cost;
        state.pending += 1;
        let slot = Slot { head: *head, cost, then_flush: false };
        match state.free.pop() {
            Some(ticket) => {
                state.slots[ticket as usize] = slot;
                Some(ticket)
            }
            None => {
                state.slots.push(slot);
                Some(state.slots.len() as u64 - 1)
            }
        }
    }

    /// The operation of `ticket`, when it succeeds, must be followed by a flush.
    pub fn set_then_flush(&self, ticket: u64) {
        self.lock().slots[ticket as usize].then_flush = true;
    }

    /// Tickets whose flush is due now.
    pub fn take_flushes(&self) -> Vec<u64> {
        std::mem::take(&mut self.lock().then_flush)
    }

    /// Answers `ticket` without the device.
    pub fn answer(&self, ticket: u64, outcome: Result<(), Refusal>) {
        let mut state = self.lock();
        let head = state.slots[ticket as usize].head;
        let outcome = outcome.map(|()| sheepdog_types::Done::Nothing);
        state.finish(ticket, Reply::new(&head, self.structured, outcome));
    }

    /// Forgets `ticket`, whose request will never be complete.
    pub fn abandon(&self, ticket: u64) {
        let mut state = self.lock();
        let cost = state.slots[ticket as usize].cost;
        state.free.push(ticket);
        state.pending -= 1;
        state.release(1, cost);
    }

    /// Prepares to wait for input (if `reading`), for room for output, for due flushes, and (if
    /// `idle_at` is given) until [`Outbox::idle`]: `None` if there is something to do instead.
    pub fn park(&self, reading: bool, idle_at: Option<usize>) -> Option<Wait> {
        let mut state = self.lock();
        if !reading {
            state.refused = None;
        }
        let wait =
            Wait { readable: reading && state.refused.is_none(), writable: state.full, idle_at };
        if state.wakes(self.window, wait) {
            return None;
        }
        state.parked = Some(wait);
        Some(wait)
    }

    /// The wait is over.
    pub fn unpark(&self) {
        self.lock().parked = None;
    }

    /// Whether at most `pending` requests have no reply and no reply waits to be sent.
    pub fn idle(&self, pending: usize) -> bool {
        self.lock().idle(pending)
    }

    /// Requests that the device has not completed.
    pub fn pending(&self) -> usize {
        self.lock().pending
    }

    /// The socket has room again.
    pub fn writable(&self) {
        self.lock().full = false;
        self.flush();
    }

    /// The client leaves: see [`Sink::is_wanted`].
    pub fn leave(&self) {
        self.lock().leaving = true;
    }

    /// The client is gone: what is queued or still completes is dropped.
    pub fn close(&self) {
        self.lock().lose();
    }

    /// Takes all that is queued, unless another thread writes or the socket is full.
    fn take_share(&self, state: &mut State) -> Option<Share> {
        if state.writing || state.full || state.queue.is_empty() {
            return None;
        }
        state.writing = true;
        let queue = std::mem::take(&mut state.queue);
        Some(Share { queue, sent: std::mem::take(&mut state.sent), ops: 0, bytes: 0 })
    }

    /// Puts back what was not sent and takes what was queued meanwhile.
    fn return_share(
        &self,
        state: &mut State,
        mut share: Share,
        result: Result<(), Errno>,
    ) -> Option<Share> {
        state.writing = false;
        state.release(share.ops, share.bytes);
        share.queue.append(&mut state.queue);
        state.queue = share.queue;
        state.sent = share.sent;
        match result {
            Ok(()) => {}
            Err(Errno::AGAIN) => state.full = true,
            Err(_) => state.lose(),
        }
        if state.lost {
            state.lose();
        }
        self.take_share(state)
    }

    /// Wakes the connection thread if it waits and has something to do. Consumes the lock.
    fn wake(&self, mut state: MutexGuard<'_, State>) {
        if state.parked.is_some_and(|wait| state.wakes(self.window, wait)) {
            state.parked = None;
            drop(state);
            self.link.kick();
        }
    }

    /// Writes the replies of `share` until all are sent or the socket takes no more.
    fn send(&self, share: &mut Share) -> Result<(), Errno> {
        while !share.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = fill(&mut slices, &share.queue, share.sent);
            let mut control = SendAncillaryBuffer::default();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(self.link.socket(), &slices[..count], &mut control, flags) {
                Ok(sent) => share.advance(sent),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Points `slices` at the unsent bytes of the first replies; how many slices that took.
fn fill<'a>(slices: &mut [IoSlice<'a>], queue: &'a VecDeque<Queued>, sent: usize) -> usize {
    let mut count = 0;
    let mut skip = sent;
    for queued in queue {
        if count + 2 > slices.len() {
            break;
        }
        for part in [queued.reply.head(), queued.reply.body()] {
            let skipped = skip.min(part.len());
            skip -= skipped;
            if skipped < part.len() {
                slices[count] = IoSlice::new(&part[skipped..]);
                count += 1;
            }
        }
    }
    count
}

impl Share {
    /// `n` more bytes were sent: drops the replies that are complete.
    fn advance(&mut self, n: usize) {
        self.sent += n;
        while let Some(first) = self.queue.front() {
            if self.sent < first.reply.len() {
                break;
            }
            self.sent -= first.reply.len();
            self.ops += 1;
            self.bytes += first.cost;
            self.queue.pop_front();
        }
    }
}

impl Sink for Outbox {
    fn complete(&self, tag: u64, completion: Completion) {
        let mut state = self.lock();
        let slot = &mut state.slots[tag as usize];
        if std::mem::take(&mut slot.then_flush) && completion.is_ok() {
            state.then_flush.push(tag);
            return;
        }
        let head = slot.head;
        let reply = Reply::new(&head, self.structured, outcome(&head, completion));
        state.finish(tag, reply);
    }

    fn flush(&self) {
        let mut state = self.lock();
        let mut share = self.take_share(&mut state);
        while let Some(mut taken) = share {
            drop(state);
            let result = self.send(&mut taken);
            state = self.lock();
            share = self.return_share(&mut state, taken, result);
        }
        self.wake(state);
    }

    fn is_wanted(&self) -> bool {
        let state = self.lock();
        !state.lost && !state.leaving && !self.link.hung_up()
    }
}
