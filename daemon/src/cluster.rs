//! The agreed state on this node, and the picture of it that the data path works with.

use crate::recovery::Clients;
use sheepdog_cluster::command::{self, LOG_VERSION};
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
    /// Wakes whoever attaches volumes that clients of this node need.
    pub takeovers: Notify,
    /// What the guests of this node's volumes experience.
    pub clients: Arc<Clients>,
    state: Mutex<ClusterState>,
    view: RwLock<Arc<View>>,
    changes: watch::Sender<u64>,
    /// Why this release cannot follow the log any more.
    pub outdated: watch::Sender<Option<String>>,
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
        let (ticks, takeovers, clients) = (Notify::new(), Notify::new(), Arc::default());
        let outdated = watch::Sender::new(None);
        Self { node, incarnation, lease, ticks, takeovers, clients, state, view, changes, outdated }
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

    /// The leader heard of this node at or after `asked_at`. Whoever waits for the right to serve goes on.
    pub fn renew_lease(&self, asked_at: u64) {
        let was_held = self.lease.is_held();
        self.lease.renew(asked_at);
        if !was_held {
            self.nudge();
        }
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
    fn apply(&self, _index: u64, entry: &[u8]) -> Result<Vec<u8>, String> {
        let version = command::version_of(entry);
        if version > LOG_VERSION {
            // Whoever guessed, or left it out, would go on with another state than the others.
            let why = format!(
                "it is of cluster version {version}, this release understands versions up to \
                 {LOG_VERSION}: upgrade sheep on this node (docs/upgrade.md)"
            );
            self.outdated.send_replace(Some(why.clone()));
            return Err(why);
        }
        let mut state = self.state();
        let answer = match command::decode_command(entry) {
            Ok(command) => {
                tracing::debug!(?command, "applying");
                state.apply(command)
            }
            Err(refusal) => Err(refusal), // as on every other node
        };
        if state.revision != self.view().revision || state.epoch != self.view().epoch {
            self.publish(&state);
        } else {
            self.changes.send_modify(|count| *count += 1);
        }
        Ok(command::encode_answer(version, &answer))
    }

    fn check(&self, entry: &[u8]) -> Result<(), String> {
        let checked = command::decode_command(entry);
        let checked = checked.and_then(|_| self.state().check_version(command::version_of(entry)));
        checked.map_err(|refusal| refusal.to_string())
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

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_cluster::command::{Command, encode_command};
    use sheepdog_types::ClusterId;

    #[test]
    fn an_entry_from_the_future_stops_this_release_and_changes_nothing() {
        let cluster = Cluster::new(NodeId(1), 1);
        let found = encode_command(&Command::Found { cluster: ClusterId(1) });
        assert_eq!(cluster.check(&found), Ok(()));
        cluster.apply(1, &found).unwrap();
        let (before, outdated) = (cluster.snapshot(), cluster.outdated.subscribe());
        let mut later = encode_command(&Command::DeleteVolume { name: "v".into() });
        later[0] = LOG_VERSION + 1;
        assert!(cluster.check(&later).unwrap_err().contains("upgrade"));
        let why = cluster.apply(2, &later).unwrap_err();
        assert!(why.contains(&format!("version {}", LOG_VERSION + 1)), "{why}");
        assert_eq!(outdated.borrow().as_deref(), Some(why.as_str()));
        assert_eq!(cluster.snapshot(), before);
    }

    #[test]
    fn an_entry_that_makes_no_sense_is_refused_as_everywhere() {
        let cluster = Cluster::new(NodeId(1), 1);
        for entry in [&[][..], &[LOG_VERSION], &[LOG_VERSION, 255, 255], &[0, 1, 2]] {
            assert!(cluster.check(entry).is_err());
            let answer = cluster.apply(1, entry).unwrap();
            let unknown = command::decode_answer(&answer).unwrap_err();
            assert!(matches!(unknown, command::Refusal::Unknown(_)), "{unknown}");
        }
        assert!(cluster.outdated.borrow().is_none());
    }
}
