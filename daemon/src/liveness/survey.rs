//! The leader looks around: who reaches whom, and who has to leave or to stay out for it.

use crate::cluster::{LEASE, lock};
use crate::control::{MAX_COMPLAINTS, NodeReply, NodeRequest};
use crate::liveness::{PROBE, unreachable_of};
use crate::node::Node;
use sheepdog_cluster::liveness::{Candidate, Graph};
use sheepdog_cluster::view::View;
use sheepdog_log::ClusterLog;
use sheepdog_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long the answers of those that were asked to probe are waited for.
const SURVEY: Duration = PROBE.saturating_add(Duration::from_millis(300));
/// Pause between two surveys while there are complaints that led to nothing.
const AGAIN: Duration = Duration::from_millis(500);
/// How long a node that was not let in counts as one that wants to enter.
const WANTS: Duration = Duration::from_secs(5);
/// Nodes that a reason names.
const NAMED: usize = 5;

/// Pairs of which the first cannot reach the second.
type Broken = BTreeSet<(NodeId, NodeId)>;

/// A node that was not let in because not everybody could reach it.
#[derive(Clone, Debug)]
struct Applicant {
    address: String,
    storage: bool,
    /// The other ends of its broken links.
    ends: BTreeSet<NodeId>,
    at: Instant,
}

/// Nodes that want to enter and may not yet.
#[derive(Debug, Default)]
pub struct Applicants(BTreeMap<NodeId, Applicant>);

impl Applicants {
    /// Forgets a node: it enters.
    pub fn remove(&mut self, id: NodeId) {
        self.0.remove(&id);
    }

    /// Notes that a node was kept out for these broken links.
    fn keep_out(&mut self, entrant: Entrant<'_>, broken: &Broken) {
        let end = |(a, b): &(NodeId, NodeId)| {
            if *a == entrant.id { Some(*b) } else { (*b == entrant.id).then_some(*a) }
        };
        let applicant = Applicant {
            address: entrant.address.to_owned(),
            storage: entrant.storage,
            ends: broken.iter().filter_map(end).collect(),
            at: Instant::now(),
        };
        self.0.insert(entrant.id, applicant);
    }

    /// Those that asked a moment ago and are not up.
    fn recent(&mut self, view: &View) -> BTreeMap<NodeId, Applicant> {
        let is_up = |id: &NodeId| view.nodes.get(id).is_some_and(|n| n.up);
        self.0.retain(|id, applicant| applicant.at.elapsed() < WANTS && !is_up(id));
        self.0.clone()
    }
}

/// A node that asks to be let in.
#[derive(Clone, Copy, Debug)]
pub struct Entrant<'a> {
    /// Which.
    pub id: NodeId,
    /// Where.
    pub address: &'a str,
    /// It has disks.
    pub storage: bool,
}

/// Has `witnesses` try to reach `targets`, and tries it from here.
async fn survey(
    node: &Node,
    witnesses: &BTreeMap<NodeId, String>,
    targets: &BTreeMap<NodeId, String>,
) -> Broken {
    let me = node.cluster.node;
    let targets_of = |id: NodeId| -> Vec<(NodeId, String)> {
        targets.iter().filter(|(t, _)| **t != id).map(|(t, a)| (*t, a.clone())).collect()
    };
    let mut looks = JoinSet::new();
    for (id, address) in witnesses.iter().filter(|(id, _)| **id != me) {
        let request = NodeRequest::Probe { targets: targets_of(*id) };
        let (client, id, address) = (Arc::clone(&node.client), *id, address.clone());
        looks.spawn(async move {
            match timeout(SURVEY, client.ask(&address, &request)).await {
                Ok(Ok(NodeReply::Unreachable(lost))) => (id, lost),
                _ => (id, Vec::new()), // nobody knows; whoever cannot reach it says so
            }
        });
    }
    let client = Arc::clone(&node.client);
    let own = targets_of(me);
    looks.spawn(async move { (me, unreachable_of(&client, own).await) });
    let asked = |by: NodeId, of: NodeId| by != of && targets.contains_key(&of);
    let seen = looks.join_all().await.into_iter();
    seen.flat_map(|(by, lost)| lost.into_iter().map(move |of| (by, of)))
        .filter(|(by, of)| asked(*by, *of))
        .collect()
}

/// The up nodes, at most as many as one survey asks. In a larger cluster the others find broken
/// links when they use them.
fn witnesses(view: &View) -> BTreeMap<NodeId, String> {
    let up = view.nodes.iter().filter(|(_, n)| n.up);
    up.map(|(id, n)| (*id, n.address.clone())).take(MAX_COMPLAINTS).collect()
}

/// Who is excluded by these broken links, among the up nodes and those that want to enter.
fn excluded(node: &Node, broken: Broken, wanting: &BTreeMap<NodeId, bool>) -> BTreeSet<NodeId> {
    let me = node.cluster.node;
    let view = node.cluster.view();
    let status = node.log.status();
    let is_storage = |id| view.disks.values().any(|d| d.up && d.node == id);
    let gateways = view.volumes.values().filter_map(|v| v.attachment.as_ref()).map(|a| a.gateway);
    let mut volumes: BTreeMap<NodeId, usize> = BTreeMap::new();
    gateways.for_each(|gateway| *volumes.entry(gateway).or_default() += 1);
    let candidate = |id, up, storage| Candidate {
        id,
        up,
        voter: status.voters.contains(&id.0),
        storage,
        volumes: volumes.get(&id).copied().unwrap_or(0),
    };
    let up = view.nodes.iter().filter(|(id, n)| n.up && !wanting.contains_key(id));
    let up = up.filter(|(id, n)| !node.leader.is_condemned(**id, n.incarnation));
    let up: BTreeSet<NodeId> = up.map(|(id, _)| *id).collect();
    // The leader may be about to enter itself.
    let me_out = (!up.contains(&me) && !wanting.contains_key(&me)).then_some(me);
    let graph = Graph {
        me,
        nodes: up
            .iter()
            .map(|id| candidate(*id, true, is_storage(*id)))
            .chain(me_out.map(|id| candidate(id, false, false)))
            .chain(wanting.iter().map(|(id, storage)| candidate(*id, false, *storage)))
            .collect(),
        voters: status.voters.len(),
        min_storage: view
            .volumes
            .values()
            .map(|v| usize::from(v.spec.min_copies))
            .max()
            .unwrap_or(0),
        broken,
    };
    graph.excluded()
}

/// What is wrong with a node, for people.
fn describe(view: &View, id: NodeId, broken: &Broken) -> String {
    let names = |ids: Vec<NodeId>| {
        let name =
            |id: &NodeId| view.nodes.get(id).map_or_else(|| id.to_string(), |n| n.address.clone());
        let mut text = ids.iter().take(NAMED).map(name).collect::<Vec<_>>().join(", ");
        if ids.len() > NAMED {
            text += &format!(" and {} more", ids.len() - NAMED);
        }
        text
    };
    let by: Vec<NodeId> = broken.iter().filter(|(_, b)| *b == id).map(|(a, _)| *a).collect();
    let of: Vec<NodeId> = broken.iter().filter(|(a, _)| *a == id).map(|(_, b)| *b).collect();
    let mut text = Vec::new();
    if !by.is_empty() {
        text.push(format!("it cannot be reached by {}", names(by)));
    }
    if !of.is_empty() {
        text.push(format!("it cannot reach {}", names(of)));
    }
    text.join("; ")
}

/// Follows up on complaints while this node leads.
pub async fn judge(node: Arc<Node>) {
    loop {
        node.leader.complained.notified().await;
        loop {
            let targets = complained_of(&node);
            if targets.is_empty() {
                break;
            }
            let broken = survey(&node, &witnesses(&node.cluster.view()), &targets).await;
            let excluded = excluded(&node, broken.clone(), &BTreeMap::new());
            condemn_all(&node, &excluded, &broken);
            sleep(AGAIN).await;
        }
    }
}

/// Both ends of all links that are complained of.
fn complained_of(node: &Node) -> BTreeMap<NodeId, String> {
    if !node.log.is_confirmed_leader() {
        return BTreeMap::new();
    }
    let view = node.cluster.view();
    let counts = |id: &NodeId| {
        let peer = view.nodes.get(id).filter(|n| n.up);
        peer.is_some_and(|n| !node.leader.is_condemned(*id, n.incarnation))
    };
    let links = node.leader.complaints(node);
    let ends = links.into_iter().filter(|(a, b)| counts(a) && counts(b)).flat_map(|(a, b)| [a, b]);
    let address = |id: NodeId| Some((id, view.nodes.get(&id)?.address.clone()));
    ends.filter_map(address).take(MAX_COMPLAINTS).collect()
}

/// Whether a node may enter: it and all up nodes reach each other, or it is others who have to
/// leave for it, and have left. Otherwise says what is wrong.
///
/// Whoever was kept out a moment ago takes part: two who cannot reach the same up node are not
/// both at fault.
///
/// # Errors
/// What is wrong, for people.
pub async fn examine(
    node: &Node,
    entrant: Entrant<'_>,
    unreachable: Vec<NodeId>,
) -> Result<(), String> {
    let view = node.cluster.view();
    let applicants = lock(&node.leader.applicants).recent(&view);
    let up = |id: &NodeId| Some((*id, view.nodes.get(id).filter(|n| n.up)?.address.clone()));
    let complaints: Vec<NodeId> = unreachable.into_iter().take(MAX_COMPLAINTS).collect();
    let mut targets: BTreeMap<NodeId, String> = complaints.iter().filter_map(up).collect();
    let mut broken: Broken = targets.keys().map(|lost| (entrant.id, *lost)).collect();
    let mut witnesses = witnesses(&view);
    let mut wanting = BTreeMap::new();
    for (id, applicant) in &applicants {
        targets.extend(applicant.ends.iter().filter_map(up));
        targets.insert(*id, applicant.address.clone());
        witnesses.insert(*id, applicant.address.clone());
        wanting.insert(*id, applicant.storage);
    }
    targets.insert(entrant.id, entrant.address.to_owned());
    wanting.insert(entrant.id, entrant.storage);
    witnesses.remove(&entrant.id);
    broken.retain(|(a, b)| a != b);
    broken.extend(survey(node, &witnesses, &targets).await);
    let mut excluded = excluded(node, broken.clone(), &wanting);
    if excluded.contains(&entrant.id) {
        lock(&node.leader.applicants).keep_out(entrant, &broken);
        return Err(describe(&node.cluster.view(), entrant.id, &broken));
    }
    excluded.retain(|id| !wanting.contains_key(id));
    condemn_all(node, &excluded, &broken);
    // No epoch has them both: who takes writes with one that leaves has what the one that enters
    // lacks, and cannot hand it on.
    let leaving = |id: &NodeId| Some((*id, view.nodes.get(id)?.incarnation));
    let leaving: Vec<(NodeId, u64)> = excluded.iter().filter_map(leaving).collect();
    let have_left = node.wait_for(2 * LEASE, |state| {
        let is_up = |id, incarnation| {
            state.nodes.get(id).is_some_and(|n| n.up && n.incarnation == incarnation)
        };
        !leaving.iter().any(|(id, incarnation)| is_up(id, *incarnation))
    });
    let still_there = || "a node that has to leave for it is still there".to_owned();
    have_left.await.then_some(()).ok_or_else(still_there)
}

fn condemn_all(node: &Node, excluded: &BTreeSet<NodeId>, broken: &Broken) {
    let view = node.cluster.view();
    for id in excluded {
        if let Some(peer) = view.nodes.get(id).filter(|n| n.up) {
            node.leader.condemn(*id, peer.incarnation, describe(&view, *id, broken));
        }
    }
}
