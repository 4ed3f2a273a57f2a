//! Numbers and layouts of the NBD protocol (`doc/proto.md` of the NBD project), big-endian.

/// First eight bytes the server sends.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
/// Magic of the newstyle greeting and of every option request.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
/// Magic of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a transmission request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest string of the protocol (names, descriptions, error texts), in bytes.
pub const MAX_STRING: usize = 4096;
/// Bytes of an option request before its data.
pub const OPTION_HEADER: usize = 16;
/// Bytes of a transmission request before its payload.
pub const REQUEST_HEADER: usize = 28;

/// Handshake flags, sent by the server (and, with the same bits, echoed by the client).
pub mod handshake_flag {
    /// The server answers unknown options instead of closing.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zero bytes after the answer to `OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Option numbers.
pub mod opt {
    /// Enter transmission; no error reply is possible.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Names of all exports.
    pub const LIST: u32 = 3;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and enter transmission.
    pub const GO: u32 = 7;
    /// Agree on structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
}

/// Types of option replies.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    /// Refused by configuration.
    pub const ERR_POLICY: u32 = 0x8000_0002;
    /// The option's data is malformed.
    pub const ERR_INVALID: u32 = 0x8000_0003;
    /// No such export, or it is not available.
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    /// The server is shutting down.
    pub const ERR_SHUTDOWN: u32 = 0x8000_0007;
    /// The option's data is longer than the server takes.
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

/// Types of information in answers to `OPT_INFO` and `OPT_GO`.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `CMD_FLUSH` is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `CMD_FLAG_FUA` is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `CMD_TRIM` is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `CMD_WRITE_ZEROES` is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `CMD_FLAG_DF` is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// FLUSH and FUA on one connection cover all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Command numbers.
pub mod cmd {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; its payload follows the header.
    pub const WRITE: u16 = 1;
    /// End the session.
    pub const DISC: u16 = 2;
    /// Make completed writes durable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Zero a range.
    pub const WRITE_ZEROES: u16 = 6;
}

/// Command flags.
pub mod cmd_flag {
    /// Answer when durable.
    pub const FUA: u16 = 1;
    /// Zeroes must stay provisioned.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The answer to a read must be one chunk.
    pub const DF: u16 = 1 << 2;
}

/// Structured reply chunks.
pub mod chunk {
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1;
    /// No content.
    pub const NONE: u16 = 0;
    /// Offset and bytes.
    pub const OFFSET_DATA: u16 = 1;
    /// Error code and text.
    pub const ERROR: u16 = 0x8001;
}

/// Error numbers of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: the export is read-only.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Invalid argument.
    Inval = 22,
    /// No space, or a write past the end.
    NoSpc = 28,
    /// The server is shutting down.
    Shutdown = 108,
}

/// Header of an option request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHead {
    /// One of [`opt`], or an unknown number.
    pub option: u32,
    /// Bytes of data that follow.
    pub len: u32,
}

impl OptionHead {
    /// Decodes a header; `None` if the magic is wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; OPTION_HEADER]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u64()? != OPTION_MAGIC {
            return None;
        }
        Some(Self { option: fields.u32()?, len: fields.u32()? })
    }
}

/// Header of a transmission request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// Bits of [`cmd_flag`].
    pub flags: u16,
    /// One of [`cmd`], or an unknown number.
    pub command: u16,
    /// The client's name for the request; the reply carries it, unread.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes of the range, and of the payload of a write.
    pub len: u32,
}

impl RequestHead {
    /// Decodes a header; `None` if the magic is wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST_HEADER]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u32()?,
        })
    }
}

/// Takes big-endian fields off the front of untrusted bytes; `None` when they run out.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    /// The next 16-bit field.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32-bit field.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64-bit field.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// Whether all was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
