//! What every connection to a node begins with, and the frames of control connections.
//!
//! ```text
//!   hello   0 "SHEEPDOG"  8 u16 version  10 u8 kind     11 u8×5 0  16 u64 cluster  24 u64 node
//!   answer  0 "SHEEPDOG"  8 u16 version  10 u8 verdict  11 u8×5 0  16 u64 cluster  24 u64 node
//!   control frame: u32 length of what follows, u8 type or status, body
//! ```
//! All integers are little-endian. `cluster` and `node` are 0 where they are not known: a client
//! that administers, or a node that has not joined yet.

use sheepdog_types::{ClusterId, NodeId};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use thiserror::Error;

/// Version of everything that goes over a node's port.
pub const PROTOCOL_VERSION: u16 = 1;
/// Bytes of a [`Hello`].
pub const HELLO_LEN: usize = 32;
/// Largest administration request or answer, in bytes.
pub const MAX_ADMIN: usize = 64 << 20;
/// Time for a new connection to say hello.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

const MAGIC: &[u8; 8] = b"SHEEPDOG";

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Calls to replicas ([`sheepdog_cluster::message`]).
    Data,
    /// Cluster log, leases, administration: one request and its answer at a time.
    Control,
}

/// The answer to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Welcome,
    /// Another protocol version is spoken here.
    WrongVersion,
    /// This node belongs to another cluster.
    WrongCluster,
    /// Too many connections.
    Busy,
}

/// The first bytes of a connection, in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Protocol version of the sender.
    pub version: u16,
    /// [`Kind`] of a hello, [`Verdict`] of an answer.
    pub code: u8,
    /// Cluster of the sender.
    pub cluster: ClusterId,
    /// The sender.
    pub node: NodeId,
}

impl Hello {
    /// A hello of this release.
    #[must_use]
    pub fn new(kind: Kind, cluster: ClusterId, node: NodeId) -> Self {
        let code = match kind {
            Kind::Data => 1,
            Kind::Control => 2,
        };
        Self { version: PROTOCOL_VERSION, code, cluster, node }
    }

    /// The answer of this release.
    #[must_use]
    pub fn answer(verdict: Verdict, cluster: ClusterId, node: NodeId) -> Self {
        let code = match verdict {
            Verdict::Welcome => 0,
            Verdict::WrongVersion => 1,
            Verdict::WrongCluster => 2,
            Verdict::Busy => 3,
        };
        Self { version: PROTOCOL_VERSION, code, cluster, node }
    }

    /// What the connection is for.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        match self.code {
            1 => Some(Kind::Data),
            2 => Some(Kind::Control),
            _ => None,
        }
    }

    /// Whether an answer lets the connection go on.
    ///
    /// # Errors
    /// [`HelloError`], with what to do.
    pub fn check_answer(&self) -> Result<(), HelloError> {
        match self.code {
            0 if self.version == PROTOCOL_VERSION => Ok(()),
            0 | 1 => Err(HelloError::Version { theirs: self.version }),
            2 => Err(HelloError::Cluster { theirs: self.cluster }),
            3 => Err(HelloError::Busy),
            _ => Err(HelloError::NotSheepdog),
        }
    }

    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10] = self.code;
        bytes[16..24].copy_from_slice(&self.cluster.0.to_le_bytes());
        bytes[24..].copy_from_slice(&self.node.0.to_le_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`HelloError::NotSheepdog`].
    pub fn decode(bytes: &[u8; HELLO_LEN]) -> Result<Self, HelloError> {
        if &bytes[..8] != MAGIC {
            return Err(HelloError::NotSheepdog);
        }
        let u64_at = |at: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(field)
        };
        Ok(Self {
            version: u16::from_le_bytes([bytes[8], bytes[9]]),
            code: bytes[10],
            cluster: ClusterId(u64_at(16)),
            node: NodeId(u64_at(24)),
        })
    }
}

/// Why two ends do not go on together.
#[derive(Debug, Error)]
pub enum HelloError {
    /// The other end speaks something else.
    #[error("the other end does not speak Sheepdog's protocol")]
    NotSheepdog,
    /// Another version.
    #[error(
        "the other end speaks protocol version {theirs}, this release speaks {PROTOCOL_VERSION}; \
         use the same release on both"
    )]
    Version {
        /// Its version.
        theirs: u16,
    },
    /// Another cluster.
    #[error("the other end belongs to cluster {theirs}")]
    Cluster {
        /// Its cluster.
        theirs: ClusterId,
    },
    /// Too many connections.
    #[error("the other end has too many connections; try again later")]
    Busy,
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Types of control requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ControlType {
    /// A frame of the cluster log's driver.
    Log = 1,
    /// [`crate::api::Request`] as JSON; answered with [`crate::api::Response`].
    Admin = 2,
    /// A request between nodes (postcard).
    Node = 3,
}

impl ControlType {
    /// From its number.
    #[must_use]
    pub fn from_u8(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Log),
            2 => Some(Self::Admin),
            3 => Some(Self::Node),
            _ => None,
        }
    }
}

/// A blocking control connection, for `dog`.
#[derive(Debug)]
pub struct AdminClient {
    stream: std::net::TcpStream,
}

impl AdminClient {
    /// Connects to the node at `address`.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn connect(address: SocketAddr, timeout: Duration) -> Result<Self, HelloError> {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect_timeout(&address, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.write_all(&Hello::new(Kind::Control, ClusterId(0), NodeId(0)).encode())?;
        let mut answer = [0; HELLO_LEN];
        stream.read_exact(&mut answer)?;
        Hello::decode(&answer)?.check_answer()?;
        Ok(Self { stream })
    }

    /// Asks, and waits up to `timeout` for the answer.
    ///
    /// # Errors
    /// The connection failed or the answer makes no sense: the request may have been carried out.
    pub fn ask(
        &mut self,
        request: &crate::api::Request,
        timeout: Duration,
    ) -> io::Result<crate::api::Response> {
        use std::io::{Read, Write};
        let body = serde_json::to_vec(request)?;
        let mut frame = Vec::with_capacity(body.len() + 5);
        frame.extend_from_slice(&(body.len() as u32 + 1).to_le_bytes());
        frame.push(ControlType::Admin as u8);
        frame.extend_from_slice(&body);
        self.stream.set_read_timeout(Some(timeout))?;
        self.stream.write_all(&frame)?;
        let mut len = [0; 4];
        self.stream.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if !(1..=MAX_ADMIN).contains(&len) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "impossible answer length"));
        }
        let mut answer = vec![0; len];
        self.stream.read_exact(&mut answer)?;
        Ok(serde_json::from_slice(&answer[1..])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hellos_round_trip() {
        let hello = Hello::new(Kind::Control, ClusterId(7), NodeId(9));
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
        assert_eq!(hello.kind(), Some(Kind::Control));
        assert!(matches!(Hello::decode(&[b'x'; 32]), Err(HelloError::NotSheepdog)));
    }

    #[test]
    fn answers_say_what_is_wrong() {
        let answer = |verdict| Hello::answer(verdict, ClusterId(7), NodeId(9));
        assert!(answer(Verdict::Welcome).check_answer().is_ok());
        for verdict in [Verdict::WrongVersion, Verdict::WrongCluster, Verdict::Busy] {
            assert!(answer(verdict).check_answer().is_err());
        }
        let mut newer = answer(Verdict::Welcome);
        newer.version = 2;
        assert!(newer.check_answer().unwrap_err().to_string().contains("version 2"));
    }
}
