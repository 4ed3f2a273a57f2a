//! How a node enters the cluster, and why it does not yet.

use crate::cluster::{LEASE, lock};
use crate::control::{MAX_COMPLAINTS, NodeReply, NodeRequest};
use crate::dir::Identity;
use crate::liveness::unreachable_of;
use crate::node::{Node, random_id};
use sheepdog_cluster::command::{Command, LOG_VERSION, encode_command};
use sheepdog_log::ClusterLog;
use sheepdog_types::NodeId;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Pause before the second try; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause between tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long the leader is given to look around and to agree.
const ADMISSION: Duration = Duration::from_secs(8);
/// How long an agreed entry may take to reach this node.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a node is not in yet.
struct Obstacle {
    problem: String,
    /// How long to wait at least; zero where nobody knows.
    wait: Duration,
}

impl<T: Into<String>> From<T> for Obstacle {
    fn from(problem: T) -> Self {
        Self { problem: problem.into(), wait: Duration::ZERO }
    }
}

impl Node {
    /// Makes this node a member with a new incarnation, trying until it is or stops.
    pub async fn enter(&self) {
        let mut stopping = self.stopping.subscribe();
        tokio::select! {
            () = self.keep_entering() => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
    }

    /// Stops serving and tells the leader so, which goes on without this node at once.
    pub async fn leave(&self) {
        let (node, incarnation) = (self.cluster.node, self.cluster.incarnation());
        if let Ok(next) = random_id() {
            self.cluster.set_incarnation(next);
        }
        let status = self.log.status();
        let leader = status.leader.filter(|leader| *leader != node.0);
        if let Some(address) = leader.and_then(|leader| status.addresses.get(&leader)) {
            let left = NodeRequest::Left { node, incarnation };
            let tell = self.client.ask(address, &left);
            let _ = timeout(LEASE, tell).await; // the end of the lease covers a lost message
        }
    }

    /// Why this node has not entered yet; empty when it has or when it has not tried.
    #[must_use]
    pub fn obstacle(&self) -> String {
        lock(&self.obstacle).clone()
    }

    async fn keep_entering(&self) {
        if let Ok(incarnation) = random_id() {
            self.cluster.set_incarnation(incarnation);
        }
        let mut status = self.log.watch();
        let mut pause = FIRST_PAUSE;
        loop {
            let leader = self.log.status().leader;
            let Err(obstacle) = self.try_enter().await else { break };
            if *lock(&self.obstacle) != obstacle.problem {
                tracing::info!(problem = obstacle.problem, "not in the cluster yet; trying on");
                lock(&self.obstacle).clone_from(&obstacle.problem);
            }
            if obstacle.wait.is_zero() {
                // A new leader is the likeliest end of the trouble.
                let another = status.wait_for(|s| s.leader.is_some() && s.leader != leader);
                let is_new = timeout(pause, another).await.is_ok();
                pause = if is_new { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            } else {
                sleep(obstacle.wait.min(LONGEST_PAUSE)).await;
            }
        }
        lock(&self.obstacle).clear();
    }

    async fn try_enter(&self) -> Result<(), Obstacle> {
        if !self.log.status().is_member(self.cluster.node.0) {
            self.join().await?;
        }
        match self.ask_for_admission().await? {
            NodeReply::Entered => {}
            NodeReply::NotFounded => return Err(self.found().await?.into()),
            NodeReply::StayOut { reason, wait } => {
                return Err(Obstacle { problem: reason, wait: Duration::from_millis(wait) });
            }
            NodeReply::NotLeader => return Err("waiting for a leader of the cluster log".into()),
            _ => return Err("the leader gave an answer that makes no sense".into()),
        }
        let id = self.cluster.node;
        let incarnation = self.cluster.incarnation();
        let entered = self
            .wait_for(APPLY_TIMEOUT, |state| {
                state.nodes.get(&id).is_some_and(|n| n.incarnation == incarnation)
            })
            .await;
        if !entered {
            return Err("the entry is agreed, but this node does not hear of it".into());
        }
        let status = self.log.status();
        let address = self.identity().address.clone();
        if status.addresses.get(&id.0).is_some_and(|a| *a != address) {
            let update = self.log.update_address(id.0, address).await;
            update.map_err(|e| e.to_string())?;
        }
        tracing::info!(epoch = %self.cluster.view().epoch, "entered the cluster");
        Ok(())
    }

    /// Looks whom this node can reach, and asks the leader to let it in.
    async fn ask_for_admission(&self) -> Result<NodeReply, Obstacle> {
        let status = self.log.status();
        let leader = status.leader.ok_or("no leader of the cluster log is known")?;
        let view = self.cluster.view();
        let others = view.nodes.iter().filter(|(id, n)| n.up && **id != self.cluster.node);
        let others: Vec<(NodeId, String)> =
            others.map(|(id, n)| (*id, n.address.clone())).take(MAX_COMPLAINTS).collect();
        let unreachable = unreachable_of(&self.client, others).await;
        if status.is_leader {
            return Ok(self.leader.admit(self, self.info(), unreachable).await);
        }
        let address = status.addresses.get(&leader).ok_or("the leader has no address")?;
        let request = NodeRequest::Enter { node: self.info(), unreachable };
        let asked = timeout(ADMISSION, self.client.ask(address, &request)).await;
        let cut =
            |why: String| format!("waiting for the leader of the cluster log, {address}: {why}");
        let answer = asked.map_err(|_| cut("no answer".into()))?;
        Ok(answer.map_err(|error| cut(error.to_string()))?)
    }

    /// Begins the log of a new cluster; the entry is tried again afterwards.
    async fn found(&self) -> Result<&'static str, String> {
        let cluster = self.identity().cluster.parse();
        let cluster = cluster.map_err(|_| "the cluster id is damaged")?;
        let answer = self.log.propose(encode_command(&Command::Found { cluster })).await;
        answer.map_err(|e| e.to_string())?;
        Ok("the cluster is founded, entering it")
    }

    /// Asks a member to take this node into the log.
    async fn join(&self) -> Result<(), String> {
        let mut problems = Vec::new();
        let Identity { join, address, .. } = self.identity().clone();
        for target in join {
            let (node, address) = (self.cluster.node, address.clone());
            let request = NodeRequest::Join { node, address, version: LOG_VERSION };
            match self.client.ask(&target, &request).await {
                Ok(NodeReply::Done) => {
                    let id = node.0;
                    let mut status = self.log.watch();
                    let joined = status.wait_for(|s| s.is_member(id));
                    let joined = tokio::time::timeout(Duration::from_secs(10), joined).await;
                    if !matches!(joined, Ok(Ok(_))) {
                        return Err("joined, but the log's leader does not reach this node".into());
                    }
                    let joined = self.change_identity(|identity| identity.join.clear());
                    return joined.map_err(|e| e.to_string());
                }
                Ok(_) => problems.push(format!("{target}: an answer that makes no sense")),
                Err(error) => problems.push(format!("{target}: {error}")),
            }
        }
        if problems.is_empty() {
            return Err("waiting for the leader of the cluster log".into());
        }
        Err(format!("cannot join: {}", problems.join("; ")))
    }
}
