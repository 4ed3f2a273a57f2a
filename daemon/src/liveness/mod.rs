//! Which nodes can be reached from here, and who may be a member when not all reach each other.
//!
//! A node that cannot reach an up node says so to the leader of the log whenever it renews its
//! lease ([`Reach`]). The leader has everybody look ([`survey`]) and decides who leaves
//! ([`sheepdog_cluster::liveness`]). Who left, or was away for another reason, is let in again
//! when it and all up nodes reach each other ([`entry`]).

pub mod entry;
pub mod survey;

use crate::cluster::lock;
use crate::control::{ControlClient, MAX_COMPLAINTS};
use crate::node::Node;
use crate::peers::Link;
use crate::wire::HelloError;
use sheepdog_types::NodeId;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long a node is given to say hello before it counts as not reachable.
pub const PROBE: Duration = Duration::from_millis(500);
/// When a second connection is tried beside the first: a lost packet is no cut link.
const SECOND_TRY: Duration = Duration::from_millis(200);
/// How long a connection with unanswered calls may be silent before its node is probed.
const SILENCE: Duration = Duration::from_millis(500);
/// How often such connections are looked at; there are none on an idle node.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Up nodes that this node cannot reach, as its data connections find out.
#[derive(Debug, Default)]
pub struct Reach {
    lost: Mutex<BTreeSet<NodeId>>,
    changed: Notify,
    /// Somebody looks after connections with unanswered calls.
    awaiting: AtomicBool,
    awaited: Notify,
}

impl Reach {
    /// A node cannot be reached.
    pub fn lose(&self, node: NodeId) {
        if lock(&self.lost).insert(node) {
            tracing::warn!(%node, "cannot be reached; telling the leader of the cluster log");
            self.changed.notify_one();
        }
    }

    /// It can, or need not be any more.
    pub fn find(&self, node: NodeId) {
        if lock(&self.lost).remove(&node) {
            tracing::info!(%node, "is not missed any more");
            self.changed.notify_one();
        }
    }

    /// The nodes that cannot be reached, as many as one message names.
    #[must_use]
    pub fn lost(&self) -> Vec<NodeId> {
        lock(&self.lost).iter().take(MAX_COMPLAINTS).copied().collect()
    }

    /// Waits for a change of [`Reach::lost`]; for one task.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// A call was made: its connection is looked after until all calls are answered. On the data
    /// path, so it costs a load when that is so already.
    pub fn await_answers(&self) {
        if !self.awaiting.load(Ordering::Relaxed) && !self.awaiting.swap(true, Ordering::AcqRel) {
            self.awaited.notify_one();
        }
    }
}

/// What is known of a connection with unanswered calls.
struct Silence {
    heard: u64,
    since: Instant,
}

/// Probes the nodes of connections that are silent although calls wait on them.
pub async fn watch_links(node: Arc<Node>) {
    let reach = Arc::clone(&node.peers.reach);
    loop {
        reach.awaited.notified().await;
        let mut silences: HashMap<NodeId, Silence> = HashMap::new();
        loop {
            sleep(LOOK_EVERY).await;
            let awaiting = node.peers.awaiting();
            if awaiting.is_empty() {
                reach.awaiting.store(false, Ordering::Release);
                // A call that came before this was seen would go unnoticed.
                if node.peers.awaiting().is_empty() {
                    break;
                }
                reach.awaiting.store(true, Ordering::Release);
                continue;
            }
            silences.retain(|id, _| awaiting.iter().any(|link| link.node() == *id));
            for link in awaiting {
                look_at(&node, &link, &mut silences);
            }
        }
    }
}

fn look_at(node: &Arc<Node>, link: &Arc<Link>, silences: &mut HashMap<NodeId, Silence>) {
    let (id, heard) = (link.node(), link.heard());
    let silence = silences.entry(id).or_insert_with(|| Silence { heard, since: Instant::now() });
    if silence.heard != heard {
        *silence = Silence { heard, since: Instant::now() };
    } else if silence.since.elapsed() >= SILENCE {
        // Not again before this one can have ended.
        silence.since = Instant::now() + PROBE;
        let (node, link) = (Arc::clone(node), Arc::clone(link));
        tokio::spawn(async move { doubt(&node, &link).await });
    }
}

/// Finds out whether a silent node is only slow; gives its connection up if not.
async fn doubt(node: &Node, link: &Link) {
    let view = node.cluster.view();
    let Some(peer) = view.nodes.get(&link.node()).filter(|n| n.up) else { return };
    if !answers(&node.client, link.node(), &peer.address).await {
        node.peers.reach.lose(link.node());
        link.give_up();
    }
}

/// Whether a node can be reached at an address. One that is known to be dead counts as reached:
/// the network is not to blame.
async fn answers(client: &ControlClient, node: NodeId, address: &str) -> bool {
    let second = async {
        sleep(SECOND_TRY).await;
        client.greet(address).await
    };
    let first_answer = async {
        tokio::select! {
            answer = client.greet(address) => answer,
            answer = second => answer,
        }
    };
    match timeout(PROBE, first_answer).await {
        Ok(Ok(found)) => found == node,
        Ok(Err(HelloError::Io(error))) => error.kind() == io::ErrorKind::ConnectionRefused,
        Ok(Err(_)) => true, // busy, or of another release: it is there
        Err(_) => false,
    }
}

/// Those of some nodes that cannot be reached from here; takes no longer than [`PROBE`].
pub async fn unreachable_of(
    client: &Arc<ControlClient>,
    targets: Vec<(NodeId, String)>,
) -> Vec<NodeId> {
    let mut probes = JoinSet::new();
    for (node, address) in targets.into_iter().take(MAX_COMPLAINTS) {
        let client = Arc::clone(client);
        probes.spawn(async move { (!answers(&client, node, &address).await).then_some(node) });
    }
    probes.join_all().await.into_iter().flatten().collect()
}
