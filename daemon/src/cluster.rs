//! The agreed state on this node, and the picture of it that the data path works with.

use crate::recovery::Clients;
use sheepdog_cluster::command::{self, Refusal};
use sheepdog_cluster::state::ClusterState;
use sheepdog_cluster::view::View;
use sheepdog_log::StateMachine;
use sheepdog_types::NodeId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// How long a node may serve after the leader last heard of it.
pub const LEASE: Duration = Duration::from_millis(1500);
/// How much longer the leader waits before it goes on without a node: covers clocks that run at
/// different speeds.
pub const LEASE_MARGIN: Duration = Duration::from_millis(500);

/// Takes a mutex whose holder may have panicked: what it guards is kept consistent at each step.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nanoseconds of a clock that counts while the machine sleeps (CLOCK_BOOTTIME).
#[must_use]
pub fn boot_time() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}

/// The right to serve (I8): without it, others may have gone on without this node.
#[derive(Debug, Default)]
pub struct Lease {
    /// End of the lease on [`boot_time`]; 0 before the first.
    until: AtomicU64,
}

impl Lease {
    /// The leader heard of this node at or after `asked_at`.
    pub fn renew(&self, asked_at: u64) {
        self.until.fetch_max(asked_at + LEASE.as_nanos() as u64, Ordering::AcqRel);
    }

    /// The right to serve is gone until the next renewal.
    pub fn drop_now(&self) {
        self.until.store(0, Ordering::Release);
    }

    /// Whether this node may serve now.
    #[must_use]
    pub fn is_held(&self) -> bool {
        boot_time() < self.until.load(Ordering::Acquire)
    }
}

/// The agreed state on this node.
#[derive(Debug)]
pub struct Cluster {
    /// This node.
    pub node: NodeId,
    /// Drawn at random at each entry.
    incarnation: AtomicU64,
    /// The right to serve.
    pub lease: Lease,
    /// Wakes whoever ticks the volumes: one of them waits for something passing.
    pub ticks: Notify,
    /// What the guests of this node's volumes experience.
    pub clients: Arc<Clients>,
    state: Mutex<ClusterState>,
    view: RwLock<Arc<View>>,
    changes: watch::Sender<u64>,
}

impl Cluster {
    /// An empty state; the log fills it.
    #[must_use]
    pub fn new(node: NodeId, incarnation: u64) -> Self {
        let state = ClusterState::default();
        let view = RwLock::new(Arc::new(View::build(&state, None)));
        let (changes, _) = watch::channel(0);
        let (lease, state) = (Lease::default(), Mutex::new(state));
        let incarnation = AtomicU64::new(incarnation);
        let (ticks, clients) = (Notify::new(), Arc::default());
        Self { node, incarnation, lease, ticks, clients, state, view, changes }
    }

    /// Of the latest entry, or the one being tried.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Acquire)
    }

    /// Stops serving until this incarnation has entered.
    pub fn set_incarnation(&self, incarnation: u64) {
        self.lease.drop_now();
        self.incarnation.store(incarnation, Ordering::Release);
    }

    /// The newest picture.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The whole state, to look at. Do not hold it across an await.
    pub fn state(&self) -> MutexGuard<'_, ClusterState> {
        lock(&self.state)
    }

    /// Wakes whoever follows changes: something of this node has changed.
    pub fn nudge(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Wakes after each change of the state; the value counts revisions.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether this node, in this incarnation, is an up member that may serve.
    #[must_use]
    pub fn may_serve(&self, view: &View) -> bool {
        self.lease.is_held() && self.has_entered(view)
    }

    /// Whether this incarnation is an up member.
    #[must_use]
    pub fn has_entered(&self, view: &View) -> bool {
        view.nodes.get(&self.node).is_some_and(|n| n.up && n.incarnation == self.incarnation())
    }

    fn publish(&self, state: &ClusterState) {
        let previous = self.view();
        let view = Arc::new(View::build(state, Some(&previous)));
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = view;
        self.changes.send_modify(|count| *count += 1);
    }
}

impl StateMachine for Cluster {
    fn apply(&self, _index: u64, entry: &[u8]) -> Vec<u8> {
        let mut state = self.state();
        let answer = match command::decode_command(entry) {
            Ok(command) => {
                tracing::debug!(?command, "applying");
                state.apply(command)
            }
            Err(refusal) => Err(refusal),
        };
        if let Err(Refusal::Unknown(what)) = &answer {
            tracing::error!(what, "a log entry is not understood; upgrade this node");
        }
        if state.revision != self.view().revision || state.epoch != self.view().epoch {
            self.publish(&state);
        } else {
            self.changes.send_modify(|count| *count += 1);
        }
        command::encode_answer(&answer)
    }

    fn snapshot(&self) -> Vec<u8> {
        self.state().encode()
    }

    fn restore(&self, snapshot: &[u8]) -> Result<(), String> {
        let restored = ClusterState::decode(snapshot)?;
        let mut state = self.state();
        *state = restored;
        self.publish(&state);
        Ok(())
    }
}
