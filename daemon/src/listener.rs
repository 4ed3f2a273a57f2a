//! The one port of a node: says hello, and hands each connection to where it belongs.

use crate::control::{NodeReply, NodeRequest, STATUS_ERROR, STATUS_OK, read_frame, write_frame};
use crate::incompatible::End;
use crate::liveness::unreachable_of;
use crate::node::Node;
use crate::tasks::look_at_refusing;
use crate::wire::{
    ControlType, HELLO_LEN, HELLO_TIMEOUT, Hello, Kind, MAX_ADMIN, PROTOCOL, Verdict,
};
use crate::{admin, membership};
use sheepdog_cluster::command::Refusal;
use sheepdog_log::ClusterLog;
use sheepdog_types::{ClusterId, NodeId};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Most connections served at once (I10).
const MAX_CONNECTIONS: usize = 8192;
/// A control connection that asks nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(120);
/// Largest request of the administration; log frames may be larger.
const MAX_REQUEST: usize = 1 << 20;

/// Counts a connection while it lives.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Accepts connections until the node has left the cluster.
pub async fn run(node: Arc<Node>, listener: TcpListener) {
    let count = Arc::new(AtomicUsize::new(0));
    let mut left = node.left.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = left.wait_for(|left| *left) => return,
        };
        let (stream, from) = match accepted {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let crowded = count.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS;
        let place = Place(Arc::clone(&count));
        let node = Arc::clone(&node);
        tokio::spawn(async move {
            if let Err(error) = greet(&node, stream, crowded, place).await {
                tracing::debug!(%from, %error, "a connection ended");
            }
        });
    }
}

async fn greet(
    node: &Arc<Node>,
    mut stream: TcpStream,
    crowded: bool,
    place: Place,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = [0; HELLO_LEN];
    tokio::time::timeout(HELLO_TIMEOUT, stream.read_exact(&mut bytes)).await??;
    let hello = Hello::decode(&bytes).map_err(io::Error::other)?;
    let ours: ClusterId = node.identity().cluster.parse().map_err(io::Error::other)?;
    let verdict = if PROTOCOL.common(hello.versions).is_none() {
        let is_member = node.cluster.view().nodes.contains_key(&hello.node);
        let end = match stream.peer_addr() {
            Ok(from) if !is_member => End::Address(from.ip().to_string()),
            _ => End::Node(hello.node),
        };
        node.incompatible.note(end, hello.versions);
        Verdict::WrongVersion
    } else if hello.cluster != ClusterId(0) && hello.cluster != ours {
        Verdict::WrongCluster
    } else if crowded {
        Verdict::Busy
    } else {
        Verdict::Welcome
    };
    stream.write_all(&Hello::answer(verdict, ours, node.cluster.node).encode()).await?;
    if verdict != Verdict::Welcome {
        return Ok(());
    }
    node.incompatible.forget(hello.node);
    match hello.kind() {
        Some(Kind::Control) => serve_control(node, stream).await,
        // A member that this node has not heard of yet tries again.
        Some(Kind::Data)
            if hello.cluster == ours && node.cluster.view().nodes.contains_key(&hello.node) =>
        {
            let stream = stream.into_std()?;
            let replica = Arc::clone(&node.replica);
            node.served.serve(stream, hello.node, replica, move || drop(place))
        }
        _ => Err(io::Error::other("a hello of no known kind")),
    }
}

async fn serve_control(node: &Arc<Node>, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let frame = read_frame(&mut stream, sheepdog_log::MAX_FRAME + 1);
        let Ok(frame) = tokio::time::timeout(IDLE, frame).await else { return Ok(()) };
        let (kind, body) = frame?;
        let kind = ControlType::from_u8(kind)
            .ok_or_else(|| io::Error::other(format!("unknown request type {kind}")))?;
        if kind != ControlType::Log && body.len() > MAX_REQUEST {
            return Err(io::Error::other("a request is too large"));
        }
        let (status, answer) = match kind {
            ControlType::Log => match node.log.handle_rpc(&body).await {
                Ok(answer) => (STATUS_OK, answer),
                Err(error) => (STATUS_ERROR, error.to_string().into_bytes()),
            },
            ControlType::Node => answer_node(node, &body).await,
            ControlType::Admin => (STATUS_OK, admin::answer(node, &body).await),
        };
        debug_assert!(kind == ControlType::Log || answer.len() < MAX_ADMIN);
        write_frame(&mut stream, status, &answer).await?;
    }
}

async fn answer_node(node: &Arc<Node>, body: &[u8]) -> (u8, Vec<u8>) {
    let reply = match postcard::from_bytes::<NodeRequest>(body) {
        Ok(request) => handle_node(node, request).await,
        Err(error) => Err(format!("a request that is not understood: {error}")),
    };
    let encoded = reply.and_then(|r| postcard::to_allocvec(&r).map_err(|e| e.to_string()));
    match encoded {
        Ok(bytes) => (STATUS_OK, bytes),
        Err(text) => (STATUS_ERROR, text.into_bytes()),
    }
}

async fn handle_node(node: &Arc<Node>, request: NodeRequest) -> Result<NodeReply, String> {
    match request {
        NodeRequest::WhoAreYou => {
            let cluster = node.identity().cluster.parse().map_err(|_| "damaged cluster id")?;
            let release = env!("CARGO_PKG_VERSION").to_owned();
            let version = node.cluster.state().version;
            Ok(NodeReply::IAm { cluster, node: node.cluster.node, release, version })
        }
        NodeRequest::Join { node: id, address, version } => join(node, id, address, version).await,
        NodeRequest::Renew { node: id, incarnation, unreachable } => {
            Ok(node.leader.renew(node, id, incarnation, unreachable))
        }
        NodeRequest::Enter { node: info, unreachable } => {
            Ok(node.leader.admit(node, info, unreachable).await)
        }
        NodeRequest::Probe { targets } => {
            Ok(NodeReply::Unreachable(unreachable_of(&node.client, targets).await))
        }
        NodeRequest::Refused { node: id } => {
            look_at_refusing(node, id).await;
            Ok(NodeReply::Done)
        }
        NodeRequest::HeardBefore { term } => {
            let ago = node.log.heard_before(term).map(|ago| ago.as_millis());
            Ok(NodeReply::Heard(ago.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX))))
        }
        NodeRequest::Left { node: id, incarnation } => {
            node.leader.left(node, id, incarnation).await;
            Ok(NodeReply::Done)
        }
        NodeRequest::Stats => {
            let node = Arc::clone(node);
            let stats = tokio::task::spawn_blocking(move || admin::local_stats(&node)).await;
            stats.map(NodeReply::Stats).map_err(|e| e.to_string())
        }
        NodeRequest::Disks => Ok(NodeReply::Disks(admin::local_disks(node))),
        NodeRequest::Removed { node: id } => Ok(membership::is_removed(node, id)),
        NodeRequest::Recovery => Ok(NodeReply::Recovery(admin::local_recovery(node))),
        NodeRequest::Release { volume, writer } => {
            let clients = admin::release(node, volume, writer).await?;
            Ok(NodeReply::Released { clients })
        }
    }
}

async fn join(
    node: &Arc<Node>,
    id: NodeId,
    address: String,
    version: u8,
) -> Result<NodeReply, String> {
    if id == NodeId(0) || address.parse::<std::net::SocketAddr>().is_err() {
        return Err("a join without a node id and an address".into());
    }
    // Before it gets entries that it does not understand.
    let agreed = node.cluster.state().version;
    if version < agreed {
        return Err(Refusal::TooOld { node: id, version, agreed }.to_string());
    }
    node.log.add_member(id.0, address).await.map_err(|e| e.to_string())?;
    Ok(NodeReply::Done)
}
