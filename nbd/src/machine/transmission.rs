//! The transmission phase: requests in, device operations or refusals out.
//!
//! ```text
//!            ┌─► WRITE ─► Payload ──(all bytes here)──► Event::Request
//!  Header ───┼─► refused WRITE ─► Skip ──(all bytes gone)──► Event::Answer
//!            ├─► DISC ─► Event::Disconnect          wrong magic ─► Event::Violation
//!            └─► others ─► Event::Request or Event::Answer
//! ```

use sheepdog_types::{MAX_REQUEST_BYTES, Op};

use super::input::Input;
use super::reply::{READ_ONLY, Refusal, SHUTDOWN, past_the_end, writes};
use super::wire::{Errno, REQUEST_HEADER, RequestHead, cmd, cmd_flag};

/// What came out of the input.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Receive more bytes, first into [`Transmission::payload_space`] if there is any.
    NeedInput,
    /// The caller did not admit the next request; its header was left in the input.
    Blocked,
    /// The device must do `op` for the request admitted as `ticket`.
    Request {
        /// What the caller gave when it admitted the request.
        ticket: u64,
        /// The operation.
        op: Op,
        /// An [`Op::Flush`] must follow before the reply: the request has FUA, but `op` cannot
        /// carry it.
        then_flush: bool,
    },
    /// The request admitted as `ticket` is to be answered at once.
    Answer {
        /// What the caller gave when it admitted the request.
        ticket: u64,
        /// Done without the device (an empty range), or refused.
        outcome: Result<(), Refusal>,
    },
    /// The client ends the session; finish what is in flight.
    Disconnect,
    /// The message boundary is lost: close the connection.
    Violation(&'static str),
}

#[derive(Debug)]
enum State {
    Header,
    /// Collecting the payload of a write; `data` has its final length.
    Payload {
        ticket: u64,
        head: RequestHead,
        data: Vec<u8>,
        filled: usize,
    },
    /// Dropping the payload of a refused write.
    Skip {
        ticket: u64,
        left: u64,
        refusal: Refusal,
    },
}

/// The server's side of the transmission phase of one connection.
#[derive(Debug)]
pub struct Transmission {
    state: State,
    structured: bool,
    read_only: bool,
    stopping: bool,
}

/// Bytes of device data that `request` holds on to until it is answered: 0 for what is refused
/// for its size anyway.
#[must_use]
pub fn cost(request: &RequestHead) -> u64 {
    match request.command {
        cmd::READ | cmd::WRITE if u64::from(request.len) <= MAX_REQUEST_BYTES => {
            u64::from(request.len)
        }
        _ => 0,
    }
}

impl Transmission {
    /// The phase begins.
    #[must_use]
    pub fn new(structured: bool, read_only: bool) -> Self {
        Self { state: State::Header, structured, read_only, stopping: false }
    }

    /// From now on new requests are refused with `ESHUTDOWN`.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Where the next received bytes must go, if a payload is being collected: received there,
    /// they need not be copied out of the input. Empty only if there is no payload. The bytes of
    /// `input` come before these, so call [`Transmission::poll`] until [`Event::NeedInput`] first.
    pub fn payload_space(&mut self) -> Option<&mut [u8]> {
        match &mut self.state {
            State::Payload { data, filled, .. } => Some(&mut data[*filled..]),
            _ => None,
        }
    }

    /// The first `n` bytes of [`Transmission::payload_space`] were received.
    ///
    /// # Panics
    /// If the space was smaller.
    pub fn payload_received(&mut self, n: usize) {
        if let State::Payload { data, filled, .. } = &mut self.state {
            assert!(n <= data.len() - *filled, "no more than the space can be received");
            *filled += n;
        }
    }

    /// The ticket of the admitted write whose payload has not all arrived, if there is one.
    #[must_use]
    pub fn incomplete(&self) -> Option<u64> {
        match self.state {
            State::Header => None,
            State::Payload { ticket, .. } | State::Skip { ticket, .. } => Some(ticket),
        }
    }

    /// The next event. `admit` is asked once for each request, before memory is allocated for it,
    /// and gives the ticket that the event will carry, or `None` to try again later.
    pub fn poll(
        &mut self,
        input: &mut Input,
        admit: impl FnOnce(&RequestHead) -> Option<u64>,
    ) -> Event {
        if let State::Header = self.state {
            let Some(header) = input.bytes().first_chunk::<REQUEST_HEADER>() else {
                return Event::NeedInput;
            };
            let Some(head) = RequestHead::decode(header) else {
                return Event::Violation("a request did not begin with its magic");
            };
            if head.command == cmd::DISC {
                input.consume(REQUEST_HEADER);
                return Event::Disconnect;
            }
            let Some(ticket) = admit(&head) else { return Event::Blocked };
            input.consume(REQUEST_HEADER);
            if let Some(event) = self.begin(head, ticket) {
                return event;
            }
        }
        self.payload(input)
    }

    /// Starts an admitted request; `None` if its payload must be taken first.
    fn begin(&mut self, head: RequestHead, ticket: u64) -> Option<Event> {
        let refusal = self.check(&head).err();
        if head.command == cmd::WRITE && head.len > 0 {
            self.state = match refusal {
                Some(refusal) => State::Skip { ticket, left: u64::from(head.len), refusal },
                None => {
                    let data = vec![0; head.len as usize];
                    State::Payload { ticket, head, data, filled: 0 }
                }
            };
            return None;
        }
        if let Some(refusal) = refusal {
            return Some(Event::Answer { ticket, outcome: Err(refusal) });
        }
        if head.len == 0 && head.command != cmd::FLUSH {
            return Some(Event::Answer { ticket, outcome: Ok(()) });
        }
        let (op, then_flush) = operation(&head, Vec::new());
        Some(Event::Request { ticket, op, then_flush })
    }

    fn payload(&mut self, input: &mut Input) -> Event {
        match &mut self.state {
            State::Header => return Event::NeedInput,
            State::Payload { data, filled, .. } => {
                let here = input.bytes().len().min(data.len() - *filled);
                data[*filled..*filled + here].copy_from_slice(&input.bytes()[..here]);
                input.consume(here);
                *filled += here;
                if *filled < data.len() {
                    return Event::NeedInput;
                }
            }
            State::Skip { left, .. } => {
                let here = (input.bytes().len() as u64).min(*left);
                input.consume(here as usize);
                *left -= here;
                if *left > 0 {
                    return Event::NeedInput;
                }
            }
        }
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header => Event::NeedInput,
            State::Payload { ticket, head, data, .. } => {
                let (op, then_flush) = operation(&head, data);
                Event::Request { ticket, op, then_flush }
            }
            State::Skip { ticket, refusal, .. } => Event::Answer { ticket, outcome: Err(refusal) },
        }
    }

    /// Everything that can be said of a request without the device, which checks ranges.
    fn check(&self, head: &RequestHead) -> Result<(), Refusal> {
        let invalid = |text| Err(Refusal { errno: Errno::Inval, text });
        let df = if self.structured { cmd_flag::DF } else { 0 };
        let allowed = cmd_flag::FUA
            | match head.command {
                cmd::READ => df,
                cmd::WRITE_ZEROES => cmd_flag::NO_HOLE,
                cmd::WRITE | cmd::FLUSH | cmd::TRIM => 0,
                _ => return invalid("unknown command"),
            };
        if self.stopping {
            return Err(SHUTDOWN);
        }
        if head.flags & !allowed != 0 {
            return invalid("unknown or inapplicable command flag");
        }
        if self.read_only && writes(head) {
            return Err(READ_ONLY);
        }
        let carries_data = matches!(head.command, cmd::READ | cmd::WRITE);
        if carries_data && u64::from(head.len) > MAX_REQUEST_BYTES {
            return invalid("more than 32 MiB of data in one request");
        }
        if head.command != cmd::FLUSH && head.offset.checked_add(head.len.into()).is_none() {
            return Err(past_the_end(head));
        }
        Ok(())
    }
}

/// The device operation of a checked request, and whether a flush must follow it.
fn operation(head: &RequestHead, data: Vec<u8>) -> (Op, bool) {
    let offset = head.offset;
    let len = u64::from(head.len);
    let fua = head.flags & cmd_flag::FUA != 0;
    match head.command {
        cmd::READ => (Op::Read { offset, len: head.len }, false),
        cmd::WRITE => (Op::Write { offset, data, fua }, false),
        cmd::TRIM => (Op::Discard { offset, len }, fua),
        cmd::WRITE_ZEROES => {
            let may_unmap = head.flags & cmd_flag::NO_HOLE == 0;
            (Op::WriteZeroes { offset, len, may_unmap, fua }, false)
        }
        _ => (Op::Flush, false),
    }
}
