//! Requests: to this node from others, and from this node to the leader.

use std::time::Duration;

use openraft::ServerState;
use openraft::errors::{ClientWriteError, ForwardReason, ForwardToLeader, RaftError};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Shared;
use super::types::{Bytes, Metrics, Snapshot, Types};
use super::wire::{self, Envelope, Operation, Outcome, Request, Response, RpcError};
use crate::api::{LogStatus, ProposeError, TransportError};

/// How long to wait for news of a leader before asking again.
const RETRY: Duration = Duration::from_millis(50);

/// Where an operation goes next.
#[derive(Debug, Clone)]
enum Route {
    Here,
    Member(u64, String),
    Nowhere,
}

impl Shared {
    /// See [`RaftLog::handle_rpc`](super::RaftLog::handle_rpc).
    pub async fn handle_rpc(&self, frame: &[u8]) -> Result<Vec<u8>, RpcError> {
        let envelope: Envelope = wire::decode(frame)?;
        if envelope.to != self.id {
            return Ok(wire::encode(&Response::WrongNode(self.id)));
        }
        let response = self.respond(envelope.request).await?;
        Ok(wire::encode(&response))
    }

    async fn respond(&self, request: Request) -> Result<Response, RpcError> {
        match &request {
            Request::Append(append) => self.note_heard(&append.vote),
            Request::Vote(vote) => self.note_heard(&vote.vote),
            Request::Snapshot(vote, ..) => self.note_heard(vote),
            Request::PreVote(_) | Request::TransferLeader(_) | Request::Operate(_) => {}
        }
        let response = match request {
            Request::Append(append) => {
                wire::check_append(&append)?;
                let appended = self.raft.append_entries(append).await;
                appended.map_or_else(failed, Response::Append)
            }
            Request::Vote(vote) | Request::PreVote(vote)
                if self.is_quiet() && !vote.leadership_transfer =>
            {
                Response::Failed("restarted a moment ago, does not vote yet".into())
            }
            Request::Vote(vote) => self.raft.vote(vote).await.map_or_else(failed, Response::Vote),
            Request::PreVote(vote) => {
                let voted = self.raft.pre_vote(vote).await;
                voted.map_or_else(failed, Response::Vote)
            }
            Request::Snapshot(vote, meta, data) => {
                let snapshot = Snapshot { meta, snapshot: data.0 };
                let installed = self.raft.install_full_snapshot(vote, snapshot).await;
                installed.map_or_else(failed, Response::Snapshot)
            }
            Request::TransferLeader(transfer) => {
                let handled = self.raft.handle_transfer_leader(transfer).await;
                handled.map_or_else(failed, Response::TransferLeader)
            }
            Request::Operate(operation) => Response::Operate(self.operate_here(operation).await),
        };
        Ok(response)
    }

    fn is_quiet(&self) -> bool {
        Instant::now() < self.quiet_until
    }

    /// An operation forwarded by another member; never forwarded again.
    async fn operate_here(&self, operation: Operation) -> Outcome {
        let deadline = Instant::now() + self.options.propose_timeout;
        match timeout_at(deadline, self.inflight.acquire()).await {
            Ok(Ok(_permit)) => self.execute(&operation, deadline).await,
            // Overloaded or shutting down: not done, and nobody better is known.
            Ok(Err(_)) | Err(_) => Outcome::NotLeader(None),
        }
    }

    /// Has the leader, wherever it is, do `operation`.
    pub async fn operate(&self, operation: Operation) -> Result<Bytes, ProposeError> {
        operation.check().map_err(ProposeError::Rejected)?;
        let deadline = Instant::now() + self.options.propose_timeout;
        let _permit = match timeout_at(deadline, self.inflight.acquire()).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(ProposeError::NotCommitted("shutting down".into())),
            Err(_) => {
                return Err(ProposeError::NotCommitted("too many proposals are in flight".into()));
            }
        };
        let mut attempt = 0;
        let mut hint = None;
        loop {
            if let Some(why) = self.failure() {
                return Err(ProposeError::NotCommitted(why));
            }
            let route = hint.take().unwrap_or_else(|| self.route(attempt));
            attempt += 1;
            let why = match self.try_route(&route, &operation, deadline).await {
                Ok(Outcome::Done(response)) => return Ok(response),
                Ok(Outcome::Rejected(why)) => return Err(ProposeError::Rejected(why)),
                Ok(Outcome::Unknown(why)) => return Err(ProposeError::Unknown(why)),
                Ok(Outcome::NotLeader(Some((id, addr)))) if is_news(&route, id) => {
                    hint = Some(if id == self.id { Route::Here } else { Route::Member(id, addr) });
                    format!("node {id} is said to lead")
                }
                Ok(Outcome::NotLeader(_)) => "no leader is known".into(),
                Err(error) if error.is_not_sent() => error.to_string(),
                Err(error) => return Err(ProposeError::Unknown(error.to_string())),
            };
            // Members that name each other as leader must not make this a busy loop.
            if hint.is_none() || attempt > 2 {
                self.wait_for_news(deadline).await;
            }
            if Instant::now() >= deadline {
                return Err(ProposeError::Unavailable(why));
            }
        }
    }

    fn failure(&self) -> Option<String> {
        let stopped = self.metrics().running_state.err()?;
        Some(format!("the cluster log has stopped on this node: {stopped}"))
    }

    /// To the leader, if one is known; else to each other member in turn, which may know.
    fn route(&self, attempt: usize) -> Route {
        let metrics = self.metrics();
        if metrics.state == ServerState::Leader {
            return Route::Here;
        }
        let membership = metrics.membership_config.membership();
        let known = metrics.current_leader.filter(|leader| *leader != self.id);
        // Every other try goes elsewhere: the leader known here may be gone.
        if let Some(leader) = known.filter(|_| attempt.is_multiple_of(2))
            && let Some(node) = membership.get_node(&leader)
        {
            return Route::Member(leader, node.addr.clone());
        }
        let others: Vec<_> = membership.nodes().filter(|(id, _)| **id != self.id).collect();
        match others.get(attempt % others.len().max(1)) {
            Some((id, node)) => Route::Member(**id, node.addr.clone()),
            None => Route::Nowhere,
        }
    }

    async fn try_route(
        &self,
        route: &Route,
        operation: &Operation,
        deadline: Instant,
    ) -> Result<Outcome, TransportError> {
        match route {
            Route::Nowhere => Ok(Outcome::NotLeader(None)),
            Route::Here => Ok(self.execute(operation, deadline).await),
            Route::Member(id, addr) => {
                let addr = self.network.address(*id).unwrap_or_else(|| addr.clone());
                let left = deadline.saturating_duration_since(Instant::now());
                let request = Request::Operate(operation.clone());
                let mut status = self.status.subscribe();
                let other_leads = |now: &LogStatus| now.leader.is_some_and(|now| now != *id);
                let response = tokio::select! {
                    response = self.network.call(*id, &addr, request, left) => response?,
                    // The one asked is cut off or dead: it need not be waited for.
                    _ = status.wait_for(other_leads), if self.leads(*id) => {
                        return Ok(Outcome::Unknown("the leader was deposed meanwhile".into()));
                    }
                };
                match response {
                    Response::Operate(outcome) => Ok(outcome),
                    other => Ok(Outcome::Unknown(format!("node {id} answered {other:?}"))),
                }
            }
        }
    }

    fn leads(&self, node: u64) -> bool {
        self.metrics().current_leader == Some(node)
    }

    /// Until the leader changes, but no longer than [`RETRY`].
    async fn wait_for_news(&self, deadline: Instant) {
        let mut status = self.status.subscribe();
        let before = status.borrow_and_update().leader;
        let until = (Instant::now() + RETRY).min(deadline);
        tokio::select! {
            _ = status.wait_for(|now| now.leader != before && now.leader.is_some()) => {}
            () = sleep_until(until) => {}
        }
    }

    /// Does `operation` on this node, if it is the leader.
    async fn execute(&self, operation: &Operation, deadline: Instant) -> Outcome {
        if let Err(why) = operation.check() {
            return Outcome::Rejected(why);
        }
        let Operation::Propose(command) = operation else {
            return self.change_members(operation, deadline).await;
        };
        if self.metrics().state == ServerState::Leader
            && let Err(why) = self.state.check(&command.0)
        {
            return Outcome::Rejected(why);
        }
        match timeout_at(deadline, self.raft.client_write(command.clone())).await {
            Ok(Ok(written)) => Outcome::Done(written.data),
            Ok(Err(error)) => outcome_of(error),
            Err(_) => Outcome::Unknown("no quorum acknowledged it in time".into()),
        }
    }

    /// Who leads, for a member that asked this one.
    pub fn not_leader(metrics: &Metrics) -> Outcome {
        let leader = metrics.current_leader.and_then(|leader| {
            let node = metrics.membership_config.get_node(&leader)?;
            Some((leader, node.addr.clone()))
        });
        Outcome::NotLeader(leader)
    }
}

/// What an error of a write says about whether it took place.
pub fn outcome_of(error: RaftError<Types, ClientWriteError<Types>>) -> Outcome {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => {
            Outcome::NotLeader(leader_of(to))
        }
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => {
            Outcome::Unknown("the leader was deposed before it was acknowledged".into())
        }
        RaftError::APIError(error @ ClientWriteError::ChangeMembershipError(_)) => {
            Outcome::Rejected(error.to_string())
        }
        other => Outcome::Unknown(other.to_string()),
    }
}

fn leader_of(forward: ForwardToLeader<Types>) -> Option<(u64, String)> {
    match forward.reason {
        // The named node is only about to stand for election.
        ForwardReason::LeadershipTransfer | ForwardReason::LeaseExpired => None,
        ForwardReason::NotLeader => Some((forward.leader_id?, forward.leader_node?.addr)),
    }
}

/// Whether being sent to `id` leads anywhere else than where one was.
fn is_news(route: &Route, id: u64) -> bool {
    !matches!(route, Route::Member(asked, _) if *asked == id)
}

fn failed(error: impl std::fmt::Display) -> Response {
    Response::Failed(error.to_string())
}
