//! openraft's view of the transport.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, OptionalSend, RaftNetworkFactory, RaftNetworkV2};

use super::types::{Bytes, Snapshot, Types, Vote};
use super::wire::{self, Envelope, Request, Response};
use super::{MAX_SNAPSHOT, Options};
use crate::api::{Transport, TransportError};

/// Sends requests to members by their newest known address.
#[derive(Clone)]
pub struct Network {
    pub me: u64,
    /// The term that this node led when it was last stopped without handing over.
    pub led: Option<u64>,
    pub transport: Arc<dyn Transport>,
    pub options: Arc<Options>,
    /// Kept current from the membership: openraft keeps a stream to a node whose address changed.
    pub addresses: Arc<RwLock<BTreeMap<u64, String>>>,
}

impl Network {
    /// The newest known address of `node`.
    pub fn address(&self, node: u64) -> Option<String> {
        self.addresses.read().ok()?.get(&node).cloned()
    }

    /// One request, one response.
    pub async fn call(
        &self,
        to: u64,
        addr: &str,
        request: Request,
        timeout: Duration,
    ) -> Result<Response, TransportError> {
        let frame = wire::encode(&Envelope { from: self.me, to, request });
        let call = self.transport.call(to, addr, frame);
        let frame =
            tokio::time::timeout(timeout, call).await.unwrap_or(Err(TransportError::Timeout))?;
        match wire::decode(&frame) {
            // As good as nobody there: the request was not handled.
            Ok(Response::WrongNode(other)) => {
                Err(TransportError::Unreachable(format!("{addr} is node {other}, not {to}")))
            }
            Ok(response) => Ok(response),
            Err(error) => Err(TransportError::Closed(error.to_string())),
        }
    }
}

/// The network as seen from one stream of requests to one member.
pub struct Client {
    network: Network,
    target: u64,
    node: BasicNode,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Client {
        Client { network: self.clone(), target, node: node.clone() }
    }
}

impl Client {
    async fn call(&self, request: Request, timeout: Duration) -> Result<Response, RPCError<Types>> {
        let addr = self.network.address(self.target);
        let addr = addr.as_deref().unwrap_or(&self.node.addr);
        let called = self.network.call(self.target, addr, request, timeout);
        called.await.map_err(|error| match error {
            TransportError::Timeout => RPCError::Network(NetworkError::new(&error)),
            _ => RPCError::Unreachable(Unreachable::new(&error)),
        })
    }

    /// A response of another kind than asked for; backing off is all one can do.
    fn unexpected(&self, response: &Response) -> RPCError<Types> {
        let why = match response {
            Response::Failed(why) => why.clone(),
            other => format!("unexpected response {other:?}"),
        };
        RPCError::Unreachable(Unreachable::from_string(format!("node {}: {why}", self.target)))
    }
}

impl RaftNetworkV2<Types> for Client {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        // A heartbeat must be quick. Entries wait for the peer's disk, which may be slow.
        let timeout = if rpc.entries.is_empty() {
            option.soft_ttl()
        } else {
            self.network.options.election_timeout.1
        };
        match self.call(Request::Append(rpc), timeout).await? {
            Response::Append(response) => Ok(response),
            other => Err(self.unexpected(&other)),
        }
    }

    async fn vote(
        &mut self,
        mut rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        // The others keep their promise to a leader that is gone. It was this node, whose process is
        // certainly dead: as if it had handed over to itself with its last breath.
        let led = self.network.led;
        rpc.leadership_transfer |= led.is_some_and(|led| rpc.vote.leader_id.term == led + 1);
        match self.call(Request::Vote(rpc), option.soft_ttl()).await? {
            Response::Vote(response) => Ok(response),
            other => Err(self.unexpected(&other)),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        match self.call(Request::PreVote(rpc), option.soft_ttl()).await? {
            Response::Vote(response) => Ok(response),
            other => Err(self.unexpected(&other)),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let bytes = snapshot.snapshot.len();
        if bytes > MAX_SNAPSHOT {
            let why = format!("a snapshot of {bytes} bytes is larger than {MAX_SNAPSHOT}");
            tracing::warn!(node = self.target, "{why}; the node cannot catch up");
            return Err(Unreachable::from_string(why).into());
        }
        let request = Request::Snapshot(vote, snapshot.meta, Bytes(snapshot.snapshot));
        let response = tokio::select! {
            response = self.call(request, option.hard_ttl()) => response?,
            closed = cancel => return Err(closed.into()),
        };
        match response {
            Response::Snapshot(response) => Ok(response),
            other => Err(self.unexpected(&other).into()),
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let request = Request::TransferLeader(req);
        match self.call(request, option.soft_ttl()).await? {
            Response::TransferLeader(response) => Ok(response),
            other => Err(self.unexpected(&other)),
        }
    }
}
