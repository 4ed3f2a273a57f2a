//! Option data in, option replies out.

use sheepdog_types::{BlockInfo, MAX_REQUEST_BYTES};

use super::wire::{Fields, MAX_STRING, OPTION_REPLY_MAGIC, export_flag, info, rep};

/// What `OPT_INFO` and `OPT_GO` ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// Name of the export; empty means the default export.
    pub export: String,
    /// The client asked for [`info::NAME`].
    pub name: bool,
    /// The client asked for [`info::DESCRIPTION`].
    pub description: bool,
    /// The client asked for [`info::BLOCK_SIZE`].
    pub block_size: bool,
}

impl InfoRequest {
    /// Decodes option data; the error is a text for the client. Unknown kinds of information are
    /// ignored, as the protocol demands.
    pub fn decode(data: &[u8]) -> Result<Self, &'static str> {
        const SHORT: &str = "the option's data is shorter than its fields say";
        let mut fields = Fields(data);
        let name_len = fields.u32().ok_or(SHORT)? as usize;
        let export = export_name(fields.bytes(name_len).ok_or(SHORT)?)?;
        let mut request = Self { export, name: false, description: false, block_size: false };
        for _ in 0..fields.u16().ok_or(SHORT)? {
            match fields.u16().ok_or(SHORT)? {
                info::NAME => request.name = true,
                info::DESCRIPTION => request.description = true,
                info::BLOCK_SIZE => request.block_size = true,
                _ => {}
            }
        }
        if fields.is_empty() {
            Ok(request)
        } else {
            Err("the option's data is longer than its fields say")
        }
    }
}

/// Checks an export name; the error is a text for the client.
pub fn export_name(bytes: &[u8]) -> Result<String, &'static str> {
    if bytes.len() > MAX_STRING {
        return Err("the export name is longer than 4096 bytes");
    }
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        _ => Err("the export name is not UTF-8 without NUL"),
    }
}

/// Whether `name` may be sent to a client.
#[must_use]
pub fn sendable(name: &str) -> bool {
    name.len() <= MAX_STRING && !name.contains('\0')
}

/// Transmission flags of a device.
#[must_use]
pub fn export_flags(device: &BlockInfo, structured: bool) -> u16 {
    use export_flag::{
        CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_DF, SEND_FLUSH, SEND_FUA, SEND_TRIM,
        SEND_WRITE_ZEROES,
    };
    // One gateway serves a volume, so a flush on any connection covers them all.
    let common = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
    let df = if structured { SEND_DF } else { 0 };
    let access = if device.read_only { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES };
    common | df | access
}

/// Appends option replies to one option to a byte buffer.
pub struct OptionReplies<'a> {
    option: u32,
    out: &'a mut Vec<u8>,
}

impl<'a> OptionReplies<'a> {
    /// Replies to `option`, appended to `out`.
    pub fn new(option: u32, out: &'a mut Vec<u8>) -> Self {
        Self { option, out }
    }

    fn reply(&mut self, kind: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(len).expect("option replies hold a few bounded strings");
        self.out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&self.option.to_be_bytes());
        self.out.extend_from_slice(&kind.to_be_bytes());
        self.out.extend_from_slice(&len.to_be_bytes());
        for part in parts {
            self.out.extend_from_slice(part);
        }
    }

    /// The option is done.
    pub fn ack(&mut self) {
        self.reply(rep::ACK, &[]);
    }

    /// The option failed with `kind` (one of the errors of [`rep`]), explained by `text`.
    pub fn error(&mut self, kind: u32, text: &str) {
        let end = text.floor_char_boundary(MAX_STRING);
        self.reply(kind, &[&text.as_bytes()[..end]]);
    }

    /// One export of a list.
    pub fn server(&mut self, name: &str) {
        let len = (name.len() as u32).to_be_bytes();
        self.reply(rep::SERVER, &[&len, name.as_bytes()]);
    }

    /// Everything `request` asked for about the export `name`; [`info::EXPORT`] always.
    pub fn infos(
        &mut self,
        request: &InfoRequest,
        name: &str,
        device: &BlockInfo,
        structured: bool,
    ) {
        let size = device.size.to_be_bytes();
        let flags = export_flags(device, structured).to_be_bytes();
        self.info(info::EXPORT, &[&size, &flags]);
        if request.name && sendable(name) {
            self.info(info::NAME, &[name.as_bytes()]);
        }
        if request.description && !device.serial.is_empty() {
            let text = format!("Sheepdog volume, serial {}", device.serial);
            if sendable(&text) {
                self.info(info::DESCRIPTION, &[text.as_bytes()]);
            }
        }
        if request.block_size {
            let (min, preferred, max) = (1u32, 4096u32, MAX_REQUEST_BYTES as u32);
            let sizes = [min.to_be_bytes(), preferred.to_be_bytes(), max.to_be_bytes()];
            self.info(info::BLOCK_SIZE, &[sizes.as_flattened()]);
        }
    }

    fn info(&mut self, kind: u16, parts: &[&[u8]]) {
        let kind = kind.to_be_bytes();
        let mut all: Vec<&[u8]> = vec![&kind];
        all.extend_from_slice(parts);
        self.reply(rep::INFO, &all);
    }
}
