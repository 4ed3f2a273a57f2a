//! The thread of one connection: it receives, parses, submits, and waits.

use std::io::IoSliceMut;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use sheepdog_types::{Block, Op, Request, Sink, Token};

use crate::machine::handshake::{Agreed, Gate, Handshake, MAX_OPTION_DATA, Step};
use crate::machine::input::Input;
use crate::machine::transmission::{Event, Transmission};
use crate::outbox::{Outbox, Wait, Window};
use crate::server::{Link, Shared};

/// Bytes of the receive buffer: 31 writes of 4 KiB, and more than a socket holds by default.
const INPUT_BYTES: usize = 128 << 10;
const _: () = assert!(INPUT_BYTES > 2 * (MAX_OPTION_DATA + 16));

/// Serves one connection until it ends.
pub(crate) fn run(link: &Arc<Link>, shared: &Shared, gate: Gate) {
    let mut input = Input::new(INPUT_BYTES);
    let deadline = Instant::now() + shared.limits.handshake;
    let greeter = Greeter { link, deadline, gate };
    if let Some(agreed) = greeter.handshake(shared, &mut input) {
        Session::new(link, shared, agreed, input).run();
    }
}

/// Waits until `socket` is ready for `events`, a kick, or `deadline`; the socket is left out if
/// `events` is empty. False when the deadline has passed.
fn wait(link: &Link, events: PollFlags, deadline: Option<Instant>) -> Result<PollFlags, TimedOut> {
    let timeout = match deadline {
        None => None,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TimedOut);
            }
            Timespec::try_from(left).ok()
        }
    };
    let kicked = link.kicked();
    let mut fds = [PollFd::new(&kicked, PollFlags::IN), PollFd::new(link.socket(), events)];
    let used = if events.is_empty() { 1 } else { 2 };
    // A failed poll (EINTR) is a wake-up for nothing.
    let _ = poll(&mut fds[..used], timeout.as_ref());
    let (kick, ready) = (fds[0].revents(), fds[1].revents());
    if !kick.is_empty() {
        link.clear_kick();
    }
    Ok(ready)
}

struct TimedOut;

/// The handshake of a connection.
struct Greeter<'a> {
    link: &'a Link,
    deadline: Instant,
    gate: Gate,
}

impl Greeter<'_> {
    /// `None` if the connection must be closed.
    fn handshake(&self, shared: &Shared, input: &mut Input) -> Option<Agreed> {
        let mut out = Vec::new();
        let mut machine = Handshake::start(&mut out);
        loop {
            let gate = if self.link.stopping() { Gate::Stopping } else { self.gate };
            let step = machine.handle(input, &*shared.exports, gate, &mut out);
            if let Step::Transmission(agreed) = &step {
                // Before the client knows, so that it is counted from then on.
                self.link.entered(&agreed.name);
            }
            self.send(&mut out)?;
            match step {
                Step::NeedInput => self.receive(input)?,
                Step::Answered => {}
                Step::Transmission(agreed) => return Some(agreed),
                Step::Close(reason) => {
                    tracing::debug!(reason, "NBD handshake ended");
                    return None;
                }
            }
        }
    }

    fn send(&self, out: &mut Vec<u8>) -> Option<()> {
        let mut rest = &out[..];
        while !rest.is_empty() {
            match send(self.link.socket(), rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.pause(PollFlags::OUT)?,
                Err(_) => return None,
            }
        }
        out.clear();
        Some(())
    }

    fn receive(&self, input: &mut Input) -> Option<()> {
        loop {
            match recv(self.link.socket(), input.space(), RecvFlags::DONTWAIT) {
                Ok((0, _)) => return None,
                Ok((n, _)) => {
                    input.received(n);
                    return Some(());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.pause(PollFlags::IN)?,
                Err(_) => return None,
            }
        }
    }

    /// Waits for the socket; `None` if time is up or the server stops.
    fn pause(&self, events: PollFlags) -> Option<()> {
        if self.link.stopping() {
            return None;
        }
        match wait(self.link, events, Some(self.deadline)) {
            Ok(_) => Some(()),
            Err(TimedOut) => {
                tracing::debug!("a client did not finish the NBD handshake in time");
                None
            }
        }
    }
}

/// How far a connection is in ending.
///
/// ```text
///  Serving ──stop──► Stopping ──idle, nothing to read──► closed
///     └──EOF, DISC, violation──► Draining ──idle──► closed
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Requests are read and refused.
    Stopping,
    /// Nothing more is read.
    Draining,
}

/// The transmission phase of a connection.
struct Session<'a> {
    link: &'a Link,
    shared: &'a Shared,
    block: Arc<dyn Block>,
    export: String,
    machine: Transmission,
    input: Input,
    outbox: Arc<Outbox>,
    /// The outbox as completions see it.
    sink: Arc<dyn Sink>,
    batch: Vec<Request>,
    phase: Phase,
    /// The socket gave all it had at the last attempt.
    exhausted: bool,
    deadline: Option<Instant>,
}

impl<'a> Session<'a> {
    fn new(link: &'a Arc<Link>, shared: &'a Shared, agreed: Agreed, input: Input) -> Self {
        let limits = &shared.limits;
        let window = Window { ops: limits.max_requests.max(1), bytes: limits.max_bytes };
        let outbox = Arc::new(Outbox::new(link.clone(), agreed.structured, window));
        Self {
            link,
            shared,
            block: agreed.block,
            export: agreed.name,
            machine: Transmission::new(agreed.structured, agreed.read_only),
            input,
            sink: outbox.clone(),
            outbox,
            batch: Vec::new(),
            phase: Phase::Serving,
            exhausted: false,
            deadline: None,
        }
    }

    fn run(mut self) {
        tracing::debug!(export = self.export, "NBD client connected");
        loop {
            self.parse();
            self.submit();
            if self.phase == Phase::Serving && self.link.stopping() {
                self.end(Phase::Stopping);
            }
            let ending = self.phase != Phase::Serving;
            let reading = self.phase != Phase::Draining;
            // A write that is still being received is not waited for.
            let incomplete = usize::from(reading && self.machine.incomplete().is_some());
            let idle_at = (ending && (!reading || self.exhausted)).then_some(incomplete);
            if idle_at.is_some_and(|pending| self.outbox.idle(pending)) {
                break;
            }
            let Some(wanted) = self.outbox.park(reading, idle_at) else { continue };
            let drain = ending && wanted.readable && !wanted.writable && !self.exhausted;
            let ready = if drain {
                self.at_once()
            } else {
                wait(self.link, poll_flags(wanted), self.deadline)
            };
            self.outbox.unpark();
            match ready {
                Ok(ready) => self.serve(wanted, ready),
                Err(TimedOut) => {
                    let pending = self.outbox.pending();
                    let export = &self.export;
                    tracing::warn!(
                        export,
                        pending,
                        "an NBD connection was closed before its requests were done or its \
                         replies were read"
                    );
                    break;
                }
            }
        }
        self.outbox.close();
        self.block.client_gone();
        tracing::debug!(export = self.export, "NBD client disconnected");
    }

    /// What [`wait`] would say of a socket that is readable: an ending connection must find out
    /// that there is nothing more to read, which a poll would wait for.
    fn at_once(&self) -> Result<PollFlags, TimedOut> {
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(TimedOut);
        }
        Ok(PollFlags::IN)
    }

    /// Acts on what the socket is ready for.
    fn serve(&mut self, wanted: Wait, ready: PollFlags) {
        let broken = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
        if wanted.writable && ready.intersects(PollFlags::OUT | broken) {
            self.outbox.writable();
        }
        if wanted.readable && ready.intersects(PollFlags::IN | broken) {
            self.receive();
        }
    }

    /// Begins to end the connection.
    fn end(&mut self, phase: Phase) {
        self.machine.stop();
        if phase == Phase::Draining
            && let Some(ticket) = self.machine.incomplete()
        {
            self.outbox.abandon(ticket);
        }
        self.phase = phase;
        self.exhausted = false;
        if phase == Phase::Draining {
            self.outbox.leave();
            self.block.client_gone();
        }
        self.deadline.get_or_insert(Instant::now() + self.shared.limits.linger);
    }

    /// Turns received bytes into requests, as many as the window admits.
    fn parse(&mut self) {
        while self.phase != Phase::Draining {
            let outbox = &self.outbox;
            match self.machine.poll(&mut self.input, |head| outbox.admit(head)) {
                Event::NeedInput | Event::Blocked => return,
                Event::Request { ticket, op, then_flush } => {
                    if then_flush {
                        outbox.set_then_flush(ticket);
                    }
                    self.push(ticket, op);
                }
                Event::Answer { ticket, outcome } => outbox.answer(ticket, outcome),
                Event::Disconnect => self.end(Phase::Draining),
                Event::Violation(reason) => {
                    tracing::warn!(export = self.export, reason, "closing an NBD connection");
                    self.end(Phase::Draining);
                }
            }
        }
    }

    fn push(&mut self, ticket: u64, op: Op) {
        self.batch.push(Request { op, token: Token::new(ticket, self.sink.clone()) });
    }

    /// Gives the device what was parsed, and the client what was answered without the device.
    fn submit(&mut self) {
        for ticket in self.outbox.take_flushes() {
            self.push(ticket, Op::Flush);
        }
        if !self.batch.is_empty() {
            self.block.submit(&mut self.batch);
            // A device that left requests behind has them failed, not submitted twice.
            self.batch.clear();
        }
        self.outbox.flush();
    }

    /// Receives once, straight into the payload of a write if one is being collected.
    fn receive(&mut self) {
        let received = match self.machine.payload_space() {
            None => recv(self.link.socket(), self.input.space(), RecvFlags::DONTWAIT).map(|r| r.0),
            Some(payload) => {
                let mut slices = [IoSliceMut::new(payload), IoSliceMut::new(self.input.space())];
                rustix::io::readv(self.link.socket(), &mut slices)
            }
        };
        match received {
            Ok(0) => self.end(Phase::Draining),
            Ok(n) => {
                self.exhausted = false;
                let payload = self.machine.payload_space().map_or(0, |space| space.len()).min(n);
                self.machine.payload_received(payload);
                self.input.received(n - payload);
            }
            Err(Errno::AGAIN) => self.exhausted = true,
            Err(Errno::INTR) => {}
            Err(error) => {
                tracing::debug!(export = self.export, %error, "an NBD client is gone");
                self.end(Phase::Draining);
            }
        }
    }
}

fn poll_flags(wanted: Wait) -> PollFlags {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, wanted.readable);
    flags.set(PollFlags::OUT, wanted.writable);
    flags
}
