//! What every connection to a node begins with, and the frames of control connections.
//!
//! ```text
//!   hello   0 "SHEEPDOG"  8 u16 newest  10 u8 kind     11 u8 0  12 u16 oldest  14 u16 0  16 u64 cluster  24 u64 node
//!   answer  0 "SHEEPDOG"  8 u16 newest  10 u8 verdict  11 u8 0  12 u16 oldest  14 u16 0  16 u64 cluster  24 u64 node
//!   control frame: u32 length of what follows, u8 type or status, body
//! ```
//! All integers are little-endian. `cluster` and `node` are 0 where they are not known: a client
//! that administers, or a node that has not joined yet. `oldest` and `newest` are the protocol versions
//! that the sender speaks; both ends use the newest that both speak. These 32 bytes are the same in all
//! versions, so that ends which have none in common can say so.

use sheepdog_types::{ClusterId, NodeId};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use thiserror::Error;

/// The versions of everything that goes over a node's port that this release speaks. A release speaks
/// the newest version of the release before it, so that nodes can be upgraded one after the other.
pub const PROTOCOL: Versions = Versions { oldest: 1, newest: 1 };
/// Bytes of a [`Hello`].
pub const HELLO_LEN: usize = 32;
/// Largest administration request or answer, in bytes.
pub const MAX_ADMIN: usize = 64 << 20;
/// Time for a new connection to say hello.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

const MAGIC: &[u8; 8] = b"SHEEPDOG";

/// A range of protocol versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The oldest, at least 1.
    pub oldest: u16,
    /// The newest, not below the oldest.
    pub newest: u16,
}

impl Versions {
    /// The version that two ends speak with each other: the newest that both know.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { oldest, newest } if oldest == newest => write!(f, "protocol version {newest}"),
            Self { oldest, newest } => write!(f, "protocol versions {oldest} to {newest}"),
        }
    }
}

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
    /// No protocol version of the caller is spoken here.
    WrongVersion,
    /// This node belongs to another cluster.
    WrongCluster,
    /// Too many connections.
    Busy,
}

/// The first bytes of a connection, in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Protocol versions of the sender.
    pub versions: Versions,
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
        Self { versions: PROTOCOL, code, cluster, node }
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
        Self { versions: PROTOCOL, code, cluster, node }
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

    /// The version that is spoken on this connection, if the answer lets it go on.
    ///
    /// # Errors
    /// [`HelloError`], with what to do.
    pub fn check_answer(&self) -> Result<u16, HelloError> {
        let common = PROTOCOL.common(self.versions);
        let incompatible = HelloError::Versions { theirs: self.versions };
        match self.code {
            0 => common.ok_or(incompatible),
            1 => Err(incompatible),
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
        bytes[8..10].copy_from_slice(&self.versions.newest.to_le_bytes());
        bytes[10] = self.code;
        bytes[12..14].copy_from_slice(&self.versions.oldest.to_le_bytes());
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
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let versions = Versions { oldest: u16_at(12), newest: u16_at(8) };
        if versions.oldest == 0 || versions.oldest > versions.newest {
            return Err(HelloError::NotSheepdog);
        }
        Ok(Self {
            versions,
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
    /// No version in common.
    #[error("{}", incompatible(*.theirs))]
    Versions {
        /// Its versions.
        theirs: Versions,
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

/// Why two ends have no version in common, and which one to upgrade.
#[must_use]
pub fn incompatible(theirs: Versions) -> String {
    let what = if theirs.oldest > PROTOCOL.newest { "this end" } else { "the other end" };
    format!(
        "the other end speaks {theirs}, this release speaks {PROTOCOL}; upgrade {what} \
         (docs/upgrade.md)"
    )
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
        assert_eq!(answer(Verdict::Welcome).check_answer().unwrap(), PROTOCOL.newest);
        let says = |oldest, newest| {
            let mut other = answer(Verdict::Welcome);
            other.versions = Versions { oldest, newest };
            other.check_answer().map_err(|error| error.to_string())
        };
        let next = PROTOCOL.newest + 1;
        assert_eq!(says(1, next), Ok(PROTOCOL.newest), "a newer release that speaks this one's");
        let error = says(next, next + 1).unwrap_err();
        for part in [&format!("versions {next} to {}", next + 1), "upgrade this end"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_newest_common_version_is_spoken() {
        let common = |(a, b): (u16, u16), (c, d): (u16, u16)| {
            let (one, other) =
                (Versions { oldest: a, newest: b }, Versions { oldest: c, newest: d });
            assert_eq!(one.common(other), other.common(one), "both ends agree");
            one.common(other)
        };
        assert_eq!(common((1, 1), (1, 1)), Some(1));
        assert_eq!(common((1, 3), (2, 5)), Some(3));
        assert_eq!(common((1, 9), (4, 4)), Some(4));
        assert_eq!(common((1, 2), (3, 4)), None);
        assert_eq!(common((1, u16::MAX), (u16::MAX, u16::MAX)), Some(u16::MAX));
    }

    #[test]
    fn hostile_hellos_are_refused() {
        let mut bytes = Hello::new(Kind::Data, ClusterId(7), NodeId(9)).encode();
        for (oldest, newest) in [(0u16, 1u16), (0, 0), (2, 1), (u16::MAX, 0)] {
            bytes[8..10].copy_from_slice(&newest.to_le_bytes());
            bytes[12..14].copy_from_slice(&oldest.to_le_bytes());
            assert!(matches!(Hello::decode(&bytes), Err(HelloError::NotSheepdog)));
        }
        // Whatever the other bytes are, they are at most an unknown kind or verdict.
        for byte in 0..=u8::MAX {
            let mut bytes = [byte; HELLO_LEN];
            bytes[..8].copy_from_slice(MAGIC);
            if let Ok(hello) = Hello::decode(&bytes) {
                assert!(hello.check_answer().is_err());
            }
        }
    }
}
