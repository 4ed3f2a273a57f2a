//! A small NBD client that shares no code with the server: raw numbers from the specification.

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use sheepdog_nbd::Address;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;
pub const RESIZE: u16 = 8;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const ESHUTDOWN: u32 = 108;

pub const ACK: u32 = 1;
pub const ERR: u32 = 1 << 31;

pub trait Stream: Read + Write + Debug + Send {}
impl<T: Read + Write + Debug + Send> Stream for T {}

/// A test that waits longer than this for bytes has failed.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Client {
    pub stream: Box<dyn Stream>,
    pub structured: bool,
    pub size: u64,
    pub flags: u16,
    cookie: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub struct OptReply {
    pub option: u32,
    pub kind: u32,
    pub data: Vec<u8>,
}

/// A whole reply, simple or structured.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub cookie: u64,
    pub errno: u32,
    pub text: String,
    pub data: Vec<u8>,
    pub structured: bool,
}

impl Client {
    /// Connects and checks the greeting; client flags are not sent yet.
    pub fn connect(address: &Address) -> Self {
        let stream = raw(address);
        let mut client = Self { stream, structured: false, size: 0, flags: 0, cookie: 7000 };
        assert_eq!(client.take(16), b"NBDMAGICIHAVEOPT");
        assert_eq!(client.take(2), [0, 3], "FIXED_NEWSTYLE and NO_ZEROES, nothing else");
        client
    }

    /// Connects and sends the usual client flags.
    pub fn hello(address: &Address) -> Self {
        let mut client = Self::connect(address);
        client.put(&3u32.to_be_bytes());
        client
    }

    /// In transmission on `name`, by way of OPT_GO.
    pub fn go(address: &Address, name: &str, structured: bool) -> Self {
        let mut client = Self::hello(address);
        if structured {
            assert_eq!(client.option(8, b"").kind, ACK);
            client.structured = true;
        }
        client.option_go(name);
        client
    }

    pub fn option_go(&mut self, name: &str) {
        self.send_option(7, &info_data(name, &[]));
        loop {
            let reply = self.option_reply();
            assert_eq!(reply.option, 7);
            match reply.kind {
                ACK => return,
                3 if reply.data[..2] == [0, 0] => {
                    assert_eq!(reply.data.len(), 12);
                    self.size = u64::from_be_bytes(reply.data[2..10].try_into().unwrap());
                    self.flags = u16::from_be_bytes(reply.data[10..].try_into().unwrap());
                }
                _ => panic!("{reply:?}"),
            }
        }
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// The server closed the connection, with nothing more to read.
    pub fn assert_closed(&mut self) {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
            other => panic!("expected the end of the connection, got {other:?} {byte:?}"),
        }
    }

    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.put(&bytes);
    }

    pub fn option_reply(&mut self) -> OptReply {
        assert_eq!(self.take_u64(), 0x0003_e889_0455_65a9, "option reply magic");
        let (option, kind, len) = (self.take_u32(), self.take_u32(), self.take_u32());
        OptReply { option, kind, data: self.take(len as usize) }
    }

    /// Sends an option and gives its first reply.
    pub fn option(&mut self, option: u32, data: &[u8]) -> OptReply {
        self.send_option(option, data);
        let reply = self.option_reply();
        assert_eq!(reply.option, option);
        reply
    }

    /// Sends an option and gives all its replies.
    pub fn option_all(&mut self, option: u32, data: &[u8]) -> Vec<OptReply> {
        let mut replies = vec![self.option(option, data)];
        while replies[replies.len() - 1].kind != ACK && replies[replies.len() - 1].kind < ERR {
            replies.push(self.option_reply());
        }
        replies
    }

    /// Sends a request and gives its cookie. `payload` is sent for what it is.
    pub fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> u64 {
        self.cookie += 1;
        let mut bytes = request_bytes(command, flags, self.cookie, offset, len);
        bytes.extend(payload);
        self.put(&bytes);
        self.cookie
    }

    /// The next reply, for a request `command` of `len` bytes at `offset`.
    pub fn answer(&mut self, command: u16, offset: u64, len: u32) -> Answer {
        match self.take_u32() {
            0x6744_6698 => {
                let (errno, cookie) = (self.take_u32(), self.take_u64());
                assert!(!(self.structured && command == READ), "simple reply to a read");
                let data = if command == READ && errno == 0 { len } else { 0 };
                let data = self.take(data as usize);
                Answer { cookie, errno, text: String::new(), data, structured: false }
            }
            0x668e_33ef => self.chunks(offset, len),
            magic => panic!("reply magic {magic:#x}"),
        }
    }

    fn chunks(&mut self, offset: u64, len: u32) -> Answer {
        assert!(self.structured, "a structured reply that was not negotiated");
        let (flags, kind) = (self.take_u16(), self.take_u16());
        let (cookie, length) = (self.take_u64(), self.take_u32());
        assert_eq!(flags, 1, "one chunk only, marked as the last");
        let mut answer =
            Answer { cookie, errno: 0, text: String::new(), data: vec![], structured: true };
        match kind {
            0 => assert_eq!(length, 0),
            1 => {
                assert_eq!(length, len + 8);
                assert_eq!(self.take_u64(), offset);
                answer.data = self.take(len as usize);
            }
            0x8001 => {
                answer.errno = self.take_u32();
                assert_ne!(answer.errno, 0);
                let text = self.take_u16();
                assert_eq!(u32::from(text) + 6, length);
                answer.text = String::from_utf8(self.take(text.into())).unwrap();
            }
            _ => panic!("chunk type {kind}"),
        }
        answer
    }

    /// One request and its reply.
    pub fn call(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> Answer {
        let cookie = self.request(command, flags, offset, len, payload);
        let answer = self.answer(command, offset, len);
        assert_eq!(answer.cookie, cookie);
        answer
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let answer = self.call(READ, 0, offset, len, b"");
        assert_eq!(answer.errno, 0);
        answer.data
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(self.call(WRITE, 0, offset, data.len() as u32, data).errno, 0);
    }
}

/// A connection on which nothing was read yet.
pub fn raw(address: &Address) -> Box<dyn Stream> {
    match address {
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            Box::new(stream)
        }
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            Box::new(stream)
        }
    }
}

pub fn request_bytes(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// Data of OPT_INFO and OPT_GO.
pub fn info_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((infos.len() as u16).to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}
