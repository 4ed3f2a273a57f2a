//! The embedded driver: Raft, by openraft, over one small database per node.

mod db;
mod forward;
mod heard;
mod machine;
mod members;
mod network;
mod options;
mod store;
#[cfg(test)]
mod tests;
mod types;
mod wire;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{InitializeError, RaftError};
use openraft::{BasicNode, Instant as _, LogIdOptionExt, ServerState};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::db::Db;
use self::heard::Heard;
use self::machine::Machine;
use self::members::Said;
use self::network::Network;
use self::store::LogStore;
use self::types::{Bytes, LogId, Metrics, Raft, Vote};
use self::wire::Operation;
use crate::api::{BoxFuture, ClusterLog, LogStatus, ProposeError, StateMachine, Transport};

pub use self::options::{OpenError, Options, OptionsError};
pub use self::wire::{MAX_COMMAND, MAX_FRAME, MAX_SNAPSHOT, RpcError};

/// The embedded driver of the cluster log: Raft inside this process.
///
/// It needs a tokio runtime with timers for as long as it lives, and `handle_rpc` to be called
/// with every frame that another member's [`Transport`] delivers to this node.
pub struct RaftLog {
    shared: Arc<Shared>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

/// What the calls and the background tasks share.
struct Shared {
    id: u64,
    raft: Raft,
    state: Arc<dyn StateMachine>,
    db: Arc<Db>,
    network: Network,
    options: Arc<Options>,
    status: watch::Sender<LogStatus>,
    /// What was last said of the nodes; `None` before the first time.
    said: watch::Sender<Option<Said>>,
    inflight: Semaphore,
    /// Held while this node, as leader, changes the members.
    changing: tokio::sync::Mutex<()>,
    /// Until then this node keeps promises that it may have made before it was restarted.
    quiet_until: Instant,
    heard: Mutex<Heard>,
}

impl RaftLog {
    /// Opens the log of node `id` in the directory `dir`.
    ///
    /// A used directory makes the node continue where it was: it needs nothing else. With a new
    /// one it waits until some member is told to [`add_member`](ClusterLog::add_member) it. A
    /// node that lost its directory must come back under a new id: what it had acknowledged
    /// under the old one is gone.
    ///
    /// # Errors
    /// See [`OpenError`]; nothing was changed then.
    pub async fn open(
        dir: &Path,
        id: u64,
        state: Arc<dyn StateMachine>,
        transport: Arc<dyn Transport>,
        options: Options,
    ) -> Result<Self, OpenError> {
        let mut config = options.to_config()?;
        let db = Arc::new(Db::open(dir, id)?);
        let machine =
            Machine::open(state.clone(), db.clone()).map_err(|error| start_error(&db, error))?;
        let was_used = db.vote().is_some();
        let last = db.vote().filter(|vote| vote.committed && vote.leader_id.voted_for == id);
        let led = last.map(|vote| vote.leader_id.term);
        let quiet = if was_used { options.election_timeout.1 } else { Duration::ZERO };
        config.enable_elect = !was_used;
        let options = Arc::new(options);
        let network = Network {
            me: id,
            led,
            transport,
            options: options.clone(),
            addresses: Arc::new(RwLock::new(BTreeMap::new())),
        };
        let store = LogStore(db.clone());
        let raft = Raft::new(id, Arc::new(config), network.clone(), store, machine)
            .await
            .map_err(|error| start_error(&db, error))?;
        let log = Self::start(Shared {
            id,
            raft,
            state,
            db,
            network,
            status: watch::Sender::new(LogStatus::default()),
            said: watch::Sender::new(None),
            inflight: Semaphore::new(options.max_inflight),
            changing: tokio::sync::Mutex::new(()),
            quiet_until: Instant::now() + quiet,
            heard: Mutex::new(Heard::new(std::time::Instant::now())),
            options,
        });
        log.stand_at_once().await;
        Ok(log)
    }

    /// Opens the log as [`RaftLog::open`] does and makes this node the first member, reachable at
    /// `addr`, of a new cluster. In a directory that already belongs to a cluster it only opens.
    ///
    /// # Errors
    /// See [`OpenError`]. It may be repeated.
    pub async fn bootstrap(
        dir: &Path,
        id: u64,
        addr: &str,
        state: Arc<dyn StateMachine>,
        transport: Arc<dyn Transport>,
        options: Options,
    ) -> Result<Self, OpenError> {
        let log = Self::open(dir, id, state, transport, options).await?;
        let members = BTreeMap::from([(id, BasicNode::new(addr))]);
        match log.shared.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(log),
            Err(error) => {
                let error = start_error(&log.shared.db, error);
                log.shutdown().await;
                Err(error)
            }
        }
    }

    fn start(shared: Shared) -> Self {
        let shared = Arc::new(shared);
        shared.publish(&shared.metrics());
        let tasks = vec![
            tokio::spawn(shared.clone().watch_metrics()),
            tokio::spawn(shared.clone().keep_members()),
            tokio::spawn(shared.clone().end_quiet()),
        ];
        Self { shared, tasks: Mutex::new(tasks) }
    }

    /// The only voter has made no promises to others and need not wait for anyone. Nor need a leader that
    /// was killed: it is the one that all others wait for, and it has acknowledged no later one.
    async fn stand_at_once(&self) {
        let metrics = self.shared.metrics();
        let mut voters = metrics.membership_config.voter_ids();
        let is_alone = voters.next() == Some(self.shared.id) && voters.next().is_none();
        if is_alone || self.shared.network.led.is_some() {
            // It fails only if Raft has stopped, which the status tells.
            let _ = self.shared.raft.trigger().elect(false).await;
        }
    }

    /// Whether this node has ever been part of a cluster.
    pub fn is_initialized(&self) -> bool {
        self.shared.metrics().last_log_index.is_some()
            || self.shared.metrics().membership_config.log_id().is_some()
    }

    /// Handles a request that another member's [`Transport::call`] brought here, and returns the
    /// response to send back.
    ///
    /// # Errors
    /// The frame makes no sense: it comes from no member of this version.
    pub async fn handle_rpc(&self, frame: &[u8]) -> Result<Vec<u8>, RpcError> {
        self.shared.handle_rpc(frame).await
    }

    async fn operate(&self, operation: Operation) -> Result<Vec<u8>, ProposeError> {
        self.shared.operate(operation).await.map(|bytes| bytes.0)
    }
}

impl ClusterLog for RaftLog {
    fn propose(&self, command: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, ProposeError>> {
        Box::pin(self.operate(Operation::Propose(Bytes(command))))
    }

    fn status(&self) -> LogStatus {
        self.shared.status_from(&self.shared.metrics())
    }

    fn watch(&self) -> watch::Receiver<LogStatus> {
        self.shared.status.subscribe()
    }

    fn is_confirmed_leader(&self) -> bool {
        self.shared.is_confirmed_leader()
    }

    fn heard_before(&self, term: u64) -> Option<std::time::Duration> {
        // Whoever is in that term, or a later one, acknowledges no earlier leader any more.
        let is_there = self.shared.metrics().current_term >= term;
        let now = std::time::Instant::now();
        is_there.then(|| now.saturating_duration_since(self.shared.heard().before(term, now)))
    }

    fn add_member(&self, id: u64, addr: String) -> BoxFuture<'_, Result<(), ProposeError>> {
        Box::pin(async move {
            self.operate(Operation::AddMember(id, addr)).await?;
            Ok(())
        })
    }

    fn remove_member(&self, id: u64) -> BoxFuture<'_, Result<(), ProposeError>> {
        Box::pin(async move {
            self.operate(Operation::RemoveMember(id)).await?;
            Ok(())
        })
    }

    fn update_address(&self, id: u64, addr: String) -> BoxFuture<'_, Result<(), ProposeError>> {
        Box::pin(async move {
            self.operate(Operation::UpdateAddress(id, addr)).await?;
            Ok(())
        })
    }

    fn reconcile_members(&self, up: &[u64], gone: &[u64]) {
        let said = Said { up: up.to_vec(), gone: gone.to_vec() };
        self.shared.said.send_if_modified(|known| {
            let changed = known.as_ref() != Some(&said);
            if changed {
                *known = Some(said);
            }
            changed
        });
    }

    fn leader_died(&self, leader: u64) -> BoxFuture<'_, ()> {
        Box::pin(self.shared.take_over(leader))
    }

    fn hand_over(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let limit = self.shared.options.election_timeout.0;
            if tokio::time::timeout(limit, self.shared.hand_over()).await.is_err() {
                tracing::info!(
                    "nobody took the cluster log over in time; there will be an election"
                );
            }
        })
    }

    fn shutdown(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.abort_tasks();
            self.shared.inflight.close();
            // The core task may have panicked or stopped before: then there is nothing to stop.
            let _ = self.shared.raft.shutdown().await;
            let db = self.shared.db.clone();
            let _ = tokio::task::spawn_blocking(move || db.close()).await;
        })
    }
}

impl RaftLog {
    fn abort_tasks(&self) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        for task in tasks.drain(..) {
            task.abort();
        }
    }
}

impl Drop for RaftLog {
    fn drop(&mut self) {
        // They hold `Shared`, which would otherwise never be dropped.
        self.abort_tasks();
    }
}

impl Shared {
    fn metrics(&self) -> Metrics {
        self.raft.metrics().borrow_watched().clone()
    }

    fn status_from(&self, metrics: &Metrics) -> LogStatus {
        let membership = metrics.membership_config.membership();
        LogStatus {
            id: self.id,
            leader: metrics.current_leader,
            is_leader: metrics.state == ServerState::Leader,
            term: metrics.current_term,
            last_applied: metrics.last_applied.index().unwrap_or(0),
            last_log: metrics.last_log_index.unwrap_or(0),
            snapshot: metrics.snapshot.index().unwrap_or(0),
            voters: membership.voter_ids().collect(),
            learners: membership.learner_ids().collect(),
            is_changing: !members::is_settled(metrics),
            addresses: membership.nodes().map(|(id, node)| (*id, node.addr.clone())).collect(),
            quorum_acked: metrics
                .last_quorum_acked
                .and_then(|at| std::time::Instant::now().checked_sub(at.elapsed())),
            failure: metrics.running_state.as_ref().err().map(ToString::to_string),
        }
    }

    /// Three things make a leader that may decide: it still votes (one that was removed hands
    /// over before its time is up), it has applied all that earlier leaders committed, and a
    /// quorum has promised, recently enough, to elect nobody else for now.
    fn is_confirmed_leader(&self) -> bool {
        let metrics = self.metrics();
        let applied_term = metrics.last_applied.map(|at: LogId| at.leader_id.term);
        let acked = metrics.last_quorum_acked.map(|at| at.elapsed());
        let votes = metrics.membership_config.voter_ids().any(|voter| voter == self.id);
        // A sole voter sends no heartbeats that could be acknowledged: it is its own quorum.
        let is_alone = metrics.membership_config.voter_ids().all(|voter| voter == self.id);
        metrics.state == ServerState::Leader
            && votes
            && applied_term == Some(metrics.current_term)
            && (is_alone || acked.is_some_and(|age| age < self.options.election_timeout.0))
    }

    /// Keeps the watched status and the address book current.
    async fn watch_metrics(self: Arc<Self>) {
        let mut receiver = self.raft.metrics();
        loop {
            let metrics = receiver.borrow_watched().clone();
            self.publish(&metrics);
            // openraft's receiver marks as seen only what `changed` returned for.
            if receiver.changed().await.is_err() {
                return;
            }
        }
    }

    /// Notes a request of a leader or candidate, before it is handled.
    fn note_heard(&self, vote: &Vote) {
        self.heard().note(vote.leader_id.term, std::time::Instant::now());
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, metrics: &Metrics) {
        let leads = metrics.state == ServerState::Leader;
        self.heard().note_leading(metrics.current_term, leads, std::time::Instant::now());
        let status = self.status_from(metrics);
        if let Some(failure) = &status.failure
            && self.status.borrow().failure.is_none()
        {
            tracing::error!(%failure, "the cluster log has stopped on this node; restart it when the cause is gone");
        }
        if self.status.borrow().addresses != status.addresses
            && let Ok(mut addresses) = self.network.addresses.write()
        {
            addresses.clone_from(&status.addresses);
        }
        self.status.send_if_modified(|known| {
            let changed = !known.same_but_for_time(&status);
            if known.leader != status.leader {
                tracing::info!(leader = ?status.leader, term = status.term, "cluster log leader");
            }
            *known = status;
            changed
        });
    }

    /// Lets this node stand for election once its promises from before the restart have ended.
    async fn end_quiet(self: Arc<Self>) {
        tokio::time::sleep_until(self.quiet_until).await;
        self.raft.runtime_config().elect(true);
    }
}

fn start_error(db: &Db, error: impl std::fmt::Display) -> OpenError {
    OpenError::Start { path: PathBuf::from(db.path()), why: error.to_string() }
}
