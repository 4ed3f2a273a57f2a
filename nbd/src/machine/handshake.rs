//! The handshake phase: greeting, client flags, options.
//!
//! ```text
//!  start() ──► ClientFlags ──► Options ⟲ ──(EXPORT_NAME, GO)──► Step::Transmission
//!                  │              │ oversized data ──► Skip ──► Options
//!                  └──────────────┴── ABORT, violation ──► Step::Close
//! ```

use std::fmt;
use std::sync::Arc;

use sheepdog_types::Block;

use super::input::Input;
use super::options::{InfoRequest, OptionReplies, export_flags, export_name, sendable};
use super::wire::{
    Fields, INIT_MAGIC, MAX_STRING, OPTION_HEADER, OPTION_MAGIC, OptionHead, handshake_flag, opt,
    rep,
};
use crate::exports::{Exports, OpenError, resolve};

/// Largest option data that is looked at, in bytes; longer data is skipped without being stored.
/// A name takes up to 4096 bytes, the rest is for information requests.
pub const MAX_OPTION_DATA: usize = 8192;

const SERVER_FLAGS: u16 = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;

/// Whether the server is willing to serve a new client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// It is.
    Open,
    /// It is shutting down: options fail with `ERR_SHUTDOWN`.
    Stopping,
    /// It has too many clients: options fail with `ERR_POLICY`.
    Full,
}

/// What was agreed when transmission begins.
#[derive(Clone)]
pub struct Agreed {
    /// The export's own name (never the empty alias).
    pub name: String,
    /// Its device.
    pub block: Arc<dyn Block>,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// The export was described as read-only.
    pub read_only: bool,
}

impl fmt::Debug for Agreed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agreed")
            .field("name", &self.name)
            .field("structured", &self.structured)
            .finish_non_exhaustive()
    }
}

/// What to do after [`Handshake::handle`]. Bytes it appended are to be sent first, in each case.
#[derive(Debug)]
pub enum Step {
    /// Receive more bytes and call again.
    NeedInput,
    /// One option was answered. Send the answer before calling again, so that a client that
    /// reads nothing cannot pile up answers.
    Answered,
    /// Enter transmission.
    Transmission(Agreed),
    /// Close the connection; the text is for the log.
    Close(&'static str),
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Options,
    /// Option data that is too long to be looked at.
    Skip {
        option: u32,
        left: u64,
    },
}

/// The server's side of the handshake of one connection.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
}

impl Handshake {
    /// A new handshake; its greeting is appended to `out`.
    #[must_use]
    pub fn start(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&SERVER_FLAGS.to_be_bytes());
        Self { state: State::ClientFlags, fixed: false, no_zeroes: false, structured: false }
    }

    /// Parses at most one message from `input` and appends the answer to `out`.
    ///
    /// `input` must have room for [`MAX_OPTION_DATA`] plus 16 bytes.
    pub fn handle(
        &mut self,
        input: &mut Input,
        exports: &dyn Exports,
        gate: Gate,
        out: &mut Vec<u8>,
    ) -> Step {
        match self.state {
            State::ClientFlags => self.client_flags(input),
            State::Options => self.option(input, exports, gate, out),
            State::Skip { option, left } => self.skip(input, option, left, out),
        }
    }

    fn client_flags(&mut self, input: &mut Input) -> Step {
        let Some(flags) = Fields(input.bytes()).u32() else { return Step::NeedInput };
        input.consume(4);
        if flags & !u32::from(SERVER_FLAGS) != 0 {
            return Step::Close("the client sent unknown handshake flags");
        }
        self.fixed = flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Options;
        Step::Answered
    }

    fn option(
        &mut self,
        input: &mut Input,
        exports: &dyn Exports,
        gate: Gate,
        out: &mut Vec<u8>,
    ) -> Step {
        let Some(header) = input.bytes().first_chunk::<OPTION_HEADER>() else {
            return Step::NeedInput;
        };
        let Some(OptionHead { option, len }) = OptionHead::decode(header) else {
            return Step::Close("an option did not begin with its magic");
        };
        if option != opt::EXPORT_NAME && !self.fixed {
            return Step::Close("an option other than EXPORT_NAME without fixed newstyle");
        }
        let len = len as usize;
        if len > MAX_OPTION_DATA {
            if option == opt::EXPORT_NAME {
                return Step::Close("an export name is longer than 4096 bytes");
            }
            input.consume(OPTION_HEADER);
            self.state = State::Skip { option, left: len as u64 };
            return Step::Answered;
        }
        if input.bytes().len() < OPTION_HEADER + len {
            return Step::NeedInput;
        }
        let data = input.bytes()[OPTION_HEADER..OPTION_HEADER + len].to_vec();
        input.consume(OPTION_HEADER + len);
        self.dispatch(option, &data, exports, gate, out)
    }

    fn skip(&mut self, input: &mut Input, option: u32, left: u64, out: &mut Vec<u8>) -> Step {
        let here = left.min(input.bytes().len() as u64);
        input.consume(here as usize);
        if here < left {
            self.state = State::Skip { option, left: left - here };
            return Step::NeedInput;
        }
        self.state = State::Options;
        let mut replies = OptionReplies::new(option, out);
        match option {
            opt::ABORT => {
                replies.ack();
                return Step::Close("the client aborted the handshake");
            }
            opt::INFO | opt::GO => {
                replies.error(rep::ERR_TOO_BIG, "more than 8192 bytes of option data");
            }
            opt::LIST | opt::STRUCTURED_REPLY => {
                replies.error(rep::ERR_INVALID, "this option takes no data");
            }
            _ => replies.error(rep::ERR_UNSUP, "unknown option"),
        }
        Step::Answered
    }

    fn dispatch(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        gate: Gate,
        out: &mut Vec<u8>,
    ) -> Step {
        let mut replies = OptionReplies::new(option, out);
        match (option, gate) {
            (opt::ABORT, _) => {
                replies.ack();
                return Step::Close("the client aborted the handshake");
            }
            (opt::EXPORT_NAME, Gate::Open) => return self.export_name(data, exports, out),
            (opt::EXPORT_NAME, _) => return Step::Close("no more clients are served"),
            (_, Gate::Stopping) => replies.error(rep::ERR_SHUTDOWN, "the server is shutting down"),
            (_, Gate::Full) => {
                replies.error(rep::ERR_POLICY, "the server has as many clients as it may have");
            }
            (opt::INFO | opt::GO, Gate::Open) => return self.info(option, data, exports, out),
            (opt::LIST | opt::STRUCTURED_REPLY, _) if !data.is_empty() => {
                replies.error(rep::ERR_INVALID, "this option takes no data");
            }
            (opt::LIST, Gate::Open) => {
                exports.list().iter().filter(|name| sendable(name)).for_each(|n| replies.server(n));
                replies.ack();
            }
            (opt::STRUCTURED_REPLY, Gate::Open) => {
                self.structured = true;
                replies.ack();
            }
            _ => replies.error(rep::ERR_UNSUP, "unknown option"),
        }
        Step::Answered
    }

    fn export_name(&self, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        if data.len() > MAX_STRING {
            return Step::Close("an export name is longer than 4096 bytes");
        }
        let Ok(wanted) = export_name(data) else {
            return Step::Close("an export name is not UTF-8 without NUL");
        };
        let Ok((name, block)) = resolve(exports, &wanted) else {
            return Step::Close("the export is unknown or not available");
        };
        let device = block.info();
        out.extend_from_slice(&device.size.to_be_bytes());
        out.extend_from_slice(&export_flags(&device, self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        self.transmission(name, block, device.read_only)
    }

    fn info(&self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        let mut replies = OptionReplies::new(option, out);
        let request = match InfoRequest::decode(data) {
            Ok(request) => request,
            Err(text) => {
                replies.error(rep::ERR_INVALID, text);
                return Step::Answered;
            }
        };
        match resolve(exports, &request.export) {
            Ok((name, block)) => {
                let device = block.info();
                replies.infos(&request, &name, &device, self.structured);
                replies.ack();
                if option == opt::GO {
                    return self.transmission(name, block, device.read_only);
                }
            }
            Err(error) => {
                let kind = match error {
                    OpenError::Unknown | OpenError::Unavailable(_) => rep::ERR_UNKNOWN,
                    OpenError::Refused(_) => rep::ERR_POLICY,
                    OpenError::Shutdown => rep::ERR_SHUTDOWN,
                };
                replies.error(kind, &error.to_string());
            }
        }
        Step::Answered
    }

    fn transmission(&self, name: String, block: Arc<dyn Block>, read_only: bool) -> Step {
        Step::Transmission(Agreed { name, block, structured: self.structured, read_only })
    }
}
