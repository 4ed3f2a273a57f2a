//! Control connections between nodes: the cluster log's frames, leases, joining, statistics.
//!
//! A connection carries one request and its answer at a time; a caller takes an idle connection
//! or makes a new one. Large log frames therefore never hold back small ones.

use crate::api::RecoveryInfo;
use crate::cluster::lock;
use crate::incompatible::Incompatible;
use crate::wire::{ControlType, HELLO_LEN, HELLO_TIMEOUT, Hello, HelloError, Kind, MAX_ADMIN};
use serde::{Deserialize, Serialize};
use sheepdog_cluster::command::NodeInfo;
use sheepdog_log::{BoxFuture, Transport, TransportError};
use sheepdog_types::{ClusterId, DiskId, NodeId, VolumeId, WriterGen};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Time for a connection to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Idle connections kept for each address.
const MAX_IDLE: usize = 8;
/// Largest frame: one of the cluster log, with its type.
const MAX_CONTROL: usize =
    if sheepdog_log::MAX_FRAME > MAX_ADMIN { sheepdog_log::MAX_FRAME + 1 } else { MAX_ADMIN + 1 };
/// Status byte of an answer: the body is what was asked for.
pub const STATUS_OK: u8 = 0;
/// Status byte of an answer: the body is a text that says what is wrong.
pub const STATUS_ERROR: u8 = 1;

/// Most nodes that one message complains of or asks about.
pub const MAX_COMPLAINTS: usize = 128;

/// What one node asks another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeRequest {
    /// Which cluster is this, and how is it doing?
    WhoAreYou,
    /// Takes a node into the log's members, so that it can enter.
    Join {
        /// The new member.
        node: NodeId,
        /// `IP:PORT`.
        address: String,
        /// Newest cluster version that it understands.
        version: u8,
    },
    /// Renews the lease of a node; only the leader of the log can.
    Renew {
        /// Who asks.
        node: NodeId,
        /// Its incarnation.
        incarnation: u64,
        /// Up nodes that it cannot reach, at most [`MAX_COMPLAINTS`].
        unreachable: Vec<NodeId>,
    },
    /// A node's port refuses connections: its process is gone. For the leader of the log, or about
    /// the leader.
    Refused {
        /// Which.
        node: NodeId,
    },
    /// Space on the disks, and used by volumes.
    Stats,
    /// How well are the disks?
    Disks,
    /// An incarnation of a node does not serve any more, and will not again.
    Left {
        /// The node.
        node: NodeId,
        /// The incarnation.
        incarnation: u64,
    },
    /// Lets a node in, if it and all up nodes reach each other; only the leader of the log can.
    Enter {
        /// The node.
        node: NodeInfo,
        /// Up nodes that it cannot reach, at most [`MAX_COMPLAINTS`].
        unreachable: Vec<NodeId>,
    },
    /// Tries to reach nodes, now.
    Probe {
        /// Which and where, at most [`MAX_COMPLAINTS`].
        targets: Vec<(NodeId, String)>,
    },
    /// When was the last sign of a leader of the log from before this term?
    HeardBefore {
        /// The term of the leader that asks.
        term: u64,
    },
    /// Is this node no member any more?
    Removed {
        /// Which.
        node: NodeId,
    },
    /// How far is the background recovery?
    Recovery,
    /// Stops serving a volume and gives it back, unless it has clients.
    Release {
        /// The volume.
        volume: VolumeId,
        /// The generation with which this node has it.
        writer: WriterGen,
    },
}

/// The answer of one node to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeReply {
    /// Done.
    Done,
    /// Answers [`NodeRequest::WhoAreYou`].
    IAm {
        /// The cluster.
        cluster: ClusterId,
        /// The node.
        node: NodeId,
        /// Its release.
        release: String,
        /// What all members understand.
        version: u8,
    },
    /// The lease is renewed, as of so many milliseconds before.
    Granted(u64),
    /// The log says that this incarnation is not up: it has to enter again.
    EnterAgain,
    /// Somebody else leads the log, or nobody that a quorum agrees with.
    NotLeader,
    /// Answers [`NodeRequest::Stats`].
    Stats(NodeStats),
    /// Answers [`NodeRequest::Disks`].
    Disks(Vec<DiskHealth>),
    /// No lease for this incarnation any more, for this reason: it stops serving and enters again.
    Yield(String),
    /// Answers [`NodeRequest::Enter`]: it is agreed.
    Entered,
    /// Answers [`NodeRequest::Enter`]: not now.
    StayOut {
        /// For people.
        reason: String,
        /// Milliseconds to wait before asking again; 0 where nobody knows.
        wait: u64,
    },
    /// Answers [`NodeRequest::Enter`]: the cluster is not founded yet.
    NotFounded,
    /// Answers [`NodeRequest::Probe`]: the nodes that cannot be reached.
    Unreachable(Vec<NodeId>),
    /// Answers [`NodeRequest::HeardBefore`]: so many milliseconds ago; `None` if there may be more.
    Heard(Option<u64>),
    /// Answers [`NodeRequest::Removed`].
    Removed {
        /// The node was removed from the cluster.
        removed: bool,
        /// The cluster log still counts on it.
        in_log: bool,
    },
    /// Answers [`NodeRequest::Recovery`].
    Recovery(Vec<RecoveryInfo>),
    /// Answers [`NodeRequest::Release`]: it was given back, or has so many clients.
    Released {
        /// Clients; the volume was given back if there are none.
        clients: u32,
    },
}

/// What a node tells of its disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStats {
    /// Its disks.
    pub disks: Vec<DiskStats>,
    /// Bytes of data blocks of each volume, of objects for which this node has the first up disk.
    pub volumes: Vec<(u64, u64)>,
    /// Clients of each volume that is attached to this node.
    pub clients: Vec<(VolumeId, u32)>,
}

/// What a node tells of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStats {
    /// Its id.
    pub id: DiskId,
    /// Where it is.
    pub path: String,
    /// Bytes that it can hold.
    pub capacity: u64,
    /// Bytes of data blocks.
    pub used: u64,
}

/// How well a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskHealth {
    /// Its id.
    pub id: DiskId,
    /// Blocks known to be damaged.
    pub damaged: u64,
    /// Why it takes no more changes.
    pub failure: Option<String>,
}

/// Why a control request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The connection was not made. Nothing was sent.
    #[error("cannot connect: {0}")]
    NotSent(#[source] HelloError),
    /// The connection failed afterwards. The request may have been carried out.
    #[error("connection lost: {0}")]
    Lost(#[source] io::Error),
    /// The other end refused.
    #[error("{0}")]
    Refused(String),
}

impl ControlError {
    /// Whether the port refused the connection: no process listens there.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::NotSent(HelloError::Io(e)) if e.kind() == io::ErrorKind::ConnectionRefused)
    }

    /// Whether nobody answered in time: the request was not sent.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::NotSent(HelloError::Io(e)) if e.kind() == io::ErrorKind::TimedOut)
    }
}

/// Reads one control frame: its type or status, and its body.
///
/// # Errors
/// The connection failed or the length is impossible.
pub async fn read_frame(stream: &mut TcpStream, limit: usize) -> io::Result<(u8, Vec<u8>)> {
    let len = stream.read_u32_le().await? as usize;
    if len == 0 || len > limit {
        let text = format!("impossible frame length {len}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let kind = stream.read_u8().await?;
    // Grows with what arrives: a length alone makes nobody allocate.
    let mut body = Vec::new();
    stream.take(len as u64 - 1).read_to_end(&mut body).await?;
    if body.len() != len - 1 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((kind, body))
}

/// Writes one control frame.
///
/// # Errors
/// The connection failed.
pub async fn write_frame(stream: &mut TcpStream, kind: u8, body: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(5 + body.len());
    frame.extend_from_slice(&(body.len() as u32 + 1).to_le_bytes());
    frame.push(kind);
    frame.extend_from_slice(body);
    stream.write_all(&frame).await
}

/// Makes control requests to other nodes.
#[derive(Debug)]
pub struct ControlClient {
    cluster: ClusterId,
    node: NodeId,
    idle: Mutex<HashMap<String, Vec<TcpStream>>>,
    incompatible: Arc<Incompatible>,
}

impl ControlClient {
    /// A client of this node; cluster 0 while it has not joined.
    #[must_use]
    pub fn new(cluster: ClusterId, node: NodeId) -> Self {
        Self { cluster, node, idle: Mutex::default(), incompatible: Arc::default() }
    }

    /// Tells of nodes that speak no protocol version of this one.
    #[must_use]
    pub fn telling(self, incompatible: &Arc<Incompatible>) -> Self {
        Self { incompatible: Arc::clone(incompatible), ..self }
    }

    /// Asks the node at `address`.
    ///
    /// # Errors
    /// [`ControlError`]; drop the future when it has taken long enough.
    pub async fn ask(
        &self,
        address: &str,
        request: &NodeRequest,
    ) -> Result<NodeReply, ControlError> {
        let body = postcard::to_allocvec(request)
            .map_err(|e| ControlError::Refused(format!("cannot encode: {e}")))?;
        let answer = self.call_raw(address, ControlType::Node, &body).await?;
        postcard::from_bytes(&answer)
            .map_err(|e| ControlError::Refused(format!("an answer that is not understood: {e}")))
    }

    /// One request and its answer, as bytes.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn call_raw(
        &self,
        address: &str,
        kind: ControlType,
        body: &[u8],
    ) -> Result<Vec<u8>, ControlError> {
        // An idle connection may have been closed by the other end, which shows only when it is
        // used; a new one is certain.
        let idle = lock(&self.idle).get_mut(address).and_then(Vec::pop);
        let (mut stream, fresh) = match idle {
            Some(stream) if is_quiet(&stream) => (stream, false),
            _ => (self.connect(address).await.map_err(ControlError::NotSent)?.0, true),
        };
        let mut outcome = exchange(&mut stream, kind, body).await;
        if outcome.is_err() && !fresh && kind == ControlType::Log {
            // The log's frames may be repeated: its protocol is made for that.
            stream = self.connect(address).await.map_err(ControlError::NotSent)?.0;
            outcome = exchange(&mut stream, kind, body).await;
        }
        let (status, answer) = outcome.map_err(ControlError::Lost)?;
        let mut idle = lock(&self.idle);
        let kept = idle.entry(address.to_owned()).or_default();
        if kept.len() < MAX_IDLE {
            kept.push(stream);
        }
        drop(idle);
        match status {
            STATUS_OK => Ok(answer),
            _ => Err(ControlError::Refused(String::from_utf8_lossy(&answer).into_owned())),
        }
    }

    /// Exchanges hellos over a new connection; gives who listens there.
    ///
    /// # Errors
    /// [`HelloError`].
    pub async fn greet(&self, address: &str) -> Result<NodeId, HelloError> {
        Ok(self.connect(address).await?.1)
    }

    async fn connect(&self, address: &str) -> Result<(TcpStream, NodeId), HelloError> {
        let outcome = self.try_connect(address).await;
        self.incompatible.observe(address, &outcome);
        outcome
    }

    async fn try_connect(&self, address: &str) -> Result<(TcpStream, NodeId), HelloError> {
        let timed_out = |_| HelloError::Io(io::ErrorKind::TimedOut.into());
        let mut stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
            .await
            .map_err(timed_out)??;
        stream.set_nodelay(true)?;
        let hello = Hello::new(Kind::Control, self.cluster, self.node).encode();
        let greet = async {
            stream.write_all(&hello).await?;
            let mut answer = [0; HELLO_LEN];
            stream.read_exact(&mut answer).await?;
            let answer = Hello::decode(&answer)?;
            answer.check_answer()?;
            Ok::<_, HelloError>(answer.node)
        };
        let node = tokio::time::timeout(HELLO_TIMEOUT, greet).await.map_err(timed_out)??;
        Ok((stream, node))
    }
}

/// Whether an idle connection still is one: nothing to read, not closed.
fn is_quiet(stream: &TcpStream) -> bool {
    matches!(stream.try_read(&mut [0; 1]), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
}

async fn exchange(
    stream: &mut TcpStream,
    kind: ControlType,
    body: &[u8],
) -> io::Result<(u8, Vec<u8>)> {
    write_frame(stream, kind as u8, body).await?;
    read_frame(stream, MAX_CONTROL).await
}

/// How the cluster log's driver reaches other nodes.
pub struct LogTransport {
    client: ControlClient,
    on_refused: Box<dyn Fn(NodeId) + Send + Sync>,
}

impl LogTransport {
    /// A transport; `on_refused` hears of nodes whose port refuses connections.
    #[must_use]
    pub fn new(client: ControlClient, on_refused: Box<dyn Fn(NodeId) + Send + Sync>) -> Self {
        Self { client, on_refused }
    }
}

impl Transport for LogTransport {
    fn call<'a>(
        &'a self,
        peer: u64,
        addr: &'a str,
        request: Vec<u8>,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>> {
        Box::pin(async move {
            let outcome = self.client.call_raw(addr, ControlType::Log, &request).await;
            outcome.map_err(|error| match error {
                error if error.is_refused() => {
                    (self.on_refused)(NodeId(peer));
                    TransportError::Refused
                }
                ControlError::NotSent(error) => TransportError::Unreachable(error.to_string()),
                ControlError::Lost(error) => TransportError::Closed(error.to_string()),
                ControlError::Refused(text) => TransportError::Closed(text),
            })
        })
    }
}
