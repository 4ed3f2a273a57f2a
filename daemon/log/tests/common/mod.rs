//! A cluster inside one process: nodes, and a network whose links can be cut.

#![allow(clippy::unwrap_used, reason = "test code, which clippy cannot tell by itself here")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use sheepdog_log::{
    BoxFuture, ClusterLog, LogStatus, OpenError, Options, ProposeError, RaftLog, StateMachine,
    Transport, TransportError,
};
use tempfile::TempDir;

/// Long enough for a busy machine; no test waits for it unless it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// The commands applied, with their indexes. Checks that none is applied twice or out of order. No
/// leader lets `forbidden` commands in; an old journal does not understand `future` ones.
#[derive(Default)]
pub struct Journal {
    pub is_old: AtomicBool,
    pub entries: Mutex<Vec<(u64, Vec<u8>)>>,
    pub restored: AtomicUsize,
}

impl StateMachine for Journal {
    fn apply(&self, index: u64, command: &[u8]) -> Result<Vec<u8>, String> {
        if self.is_old.load(Ordering::Relaxed) && command.starts_with(b"future") {
            return Err("not understood".into());
        }
        let mut entries = self.entries.lock().unwrap();
        if let Some((last, _)) = entries.last() {
            assert!(*last < index, "{index} applied after {last}");
        }
        entries.push((index, command.to_vec()));
        Ok([b"done ", command].concat())
    }

    fn check(&self, command: &[u8]) -> Result<(), String> {
        if command.starts_with(b"forbidden") { Err("forbidden here".into()) } else { Ok(()) }
    }

    fn snapshot(&self) -> Vec<u8> {
        postcard::to_stdvec(&*self.entries.lock().unwrap()).unwrap()
    }

    fn restore(&self, snapshot: &[u8]) -> Result<(), String> {
        let state = postcard::from_bytes(snapshot).map_err(|error| error.to_string())?;
        *self.entries.lock().unwrap() = state;
        self.restored.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// What happens to requests on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// They vanish, as when the peer's host lost power.
    Lost,
    /// They are handled, and the response vanishes.
    NoResponse,
    /// No connection can be made.
    Unreachable,
}

#[derive(Default)]
pub struct Net {
    listening: Mutex<BTreeMap<String, Weak<RaftLog>>>,
    faults: Mutex<BTreeMap<(u64, u64), Fault>>,
    /// How many calls each node has made.
    calls: Mutex<BTreeMap<u64, usize>>,
}

impl Net {
    pub fn listen(&self, addr: &str, log: &Arc<RaftLog>) {
        let mut listening = self.listening.lock().unwrap();
        listening.insert(addr.to_owned(), Arc::downgrade(log));
    }

    pub fn calls(&self, from: u64) -> usize {
        self.calls.lock().unwrap().get(&from).copied().unwrap_or(0)
    }

    pub fn silence(&self, addr: &str) {
        self.listening.lock().unwrap().remove(addr);
    }

    pub fn set_fault(&self, from: u64, to: u64, fault: Option<Fault>) {
        let mut faults = self.faults.lock().unwrap();
        match fault {
            Some(fault) => faults.insert((from, to), fault),
            None => faults.remove(&(from, to)),
        };
    }
}

/// The network as node `from` sees it.
struct Link {
    net: Arc<Net>,
    from: u64,
}

impl Transport for Link {
    fn call<'a>(
        &'a self,
        peer: u64,
        addr: &'a str,
        request: Vec<u8>,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>> {
        Box::pin(async move {
            *self.net.calls.lock().unwrap().entry(self.from).or_default() += 1;
            let fault = |from, to| self.net.faults.lock().unwrap().get(&(from, to)).copied();
            match fault(self.from, peer) {
                Some(Fault::Lost) => std::future::pending().await,
                Some(Fault::Unreachable) => {
                    return Err(TransportError::Unreachable("cut".into()));
                }
                Some(Fault::NoResponse) | None => {}
            }
            let target = self.net.listening.lock().unwrap().get(addr).cloned();
            let target = target.and_then(|weak| weak.upgrade());
            let target = target.ok_or(TransportError::Refused)?;
            // A task of its own: once sent, a request is handled whether or not one waits for it.
            let handled = tokio::spawn(async move { target.handle_rpc(&request).await });
            let response = handled.await.expect("handle_rpc must not panic");
            if fault(self.from, peer).is_some() || fault(peer, self.from) == Some(Fault::Lost) {
                return Err(TransportError::Closed("cut".into()));
            }
            response.map_err(|error| TransportError::Closed(error.to_string()))
        })
    }
}

/// One node, which can be stopped and started again.
pub struct Node {
    pub addr: String,
    dir: TempDir,
    pub journal: Arc<Journal>,
    log: Option<Arc<RaftLog>>,
}

impl Node {
    pub fn log(&self) -> &Arc<RaftLog> {
        self.log.as_ref().expect("the node is running")
    }

    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    pub fn status(&self) -> LogStatus {
        self.log().status()
    }

    pub fn commands(&self) -> Vec<String> {
        let entries = self.journal.entries.lock().unwrap();
        let text = |(_, command): &(u64, Vec<u8>)| String::from_utf8_lossy(command).into_owned();
        entries.iter().map(text).collect()
    }
}

/// A cluster of nodes 1, 2, 3…
pub struct Cluster {
    pub net: Arc<Net>,
    pub options: Options,
    pub nodes: BTreeMap<u64, Node>,
}

/// Many clusters run at once, on a machine that may be busy with other things: no leader is to be
/// deposed for that.
pub fn options() -> Options {
    Options {
        heartbeat: Duration::from_millis(100),
        election_timeout: (Duration::from_millis(1000), Duration::from_millis(2000)),
        propose_timeout: Duration::from_secs(20),
        ..Options::default()
    }
}

impl Cluster {
    /// A cluster of one node.
    pub async fn new(options: Options) -> Self {
        if let Ok(filter) = std::env::var("LOG") {
            let filter = tracing_subscriber::EnvFilter::new(filter);
            let _ = tracing_subscriber::fmt().with_ansi(false).with_env_filter(filter).try_init();
        }
        let mut cluster = Self { net: Arc::default(), options, nodes: BTreeMap::new() };
        cluster.create(1);
        cluster.start_as(1, true).await.unwrap();
        cluster.until(1, "leads", |status| status.is_leader).await;
        cluster
    }

    /// A cluster in which the nodes 1 to `count` are members and as many as may be vote.
    pub async fn of(count: u64, options: Options) -> Self {
        let mut cluster = Self::new(options).await;
        for id in 2..=count {
            cluster.join(id, 1).await;
        }
        let voters = cluster.options.max_voters.min(count as usize);
        for id in 1..=count {
            let enough = |status: &LogStatus| status.voters.len() == voters && !status.is_changing;
            cluster.until(id, "knows all voters", enough).await;
        }
        cluster
    }

    pub fn create(&mut self, id: u64) {
        let node = Node {
            addr: format!("node{id}"),
            dir: tempfile::tempdir().unwrap(),
            journal: Arc::default(),
            log: None,
        };
        self.nodes.insert(id, node);
    }

    /// Starts node `id` with a state machine that has forgotten everything.
    pub async fn start(&mut self, id: u64) {
        self.start_as(id, false).await.unwrap();
    }

    pub async fn start_as(&mut self, id: u64, first: bool) -> Result<(), OpenError> {
        let node = self.nodes.get_mut(&id).unwrap();
        node.journal = Arc::default();
        let link = Arc::new(Link { net: self.net.clone(), from: id });
        let (dir, options) = (node.dir(), self.options.clone());
        let journal = node.journal.clone();
        let log = if first {
            RaftLog::bootstrap(&dir, id, &node.addr, journal, link, options).await?
        } else {
            RaftLog::open(&dir, id, journal, link, options).await?
        };
        let log = Arc::new(log);
        self.net.listen(&node.addr, &log);
        node.log = Some(log);
        Ok(())
    }

    /// Creates and starts node `id` and has member `via` add it.
    pub async fn join(&mut self, id: u64, via: u64) {
        self.create(id);
        self.start(id).await;
        let addr = self.nodes[&id].addr.clone();
        let via = self.nodes[&via].log();
        via.add_member(id, addr).await.unwrap();
    }

    /// Removes a member; again while a leader that is deposed on the way, as it may be itself, says
    /// that it does not know what came of it.
    pub async fn remove(&self, id: u64, via: u64) {
        loop {
            match self.log(via).remove_member(id).await {
                Ok(()) => return,
                Err(ProposeError::Unknown(_) | ProposeError::NotCommitted(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Stops node `id`; its address then refuses connections.
    pub async fn stop(&mut self, id: u64) {
        let node = self.nodes.get_mut(&id).unwrap();
        self.net.silence(&node.addr);
        let log = node.log.take().unwrap();
        log.shutdown().await;
    }

    /// Cuts all links between `group` and the other nodes.
    pub fn isolate(&self, group: &[u64], fault: Option<Fault>) {
        let (inside, outside): (BTreeSet<u64>, BTreeSet<u64>) =
            self.nodes.keys().partition(|id| group.contains(id));
        for from in &inside {
            for to in &outside {
                self.net.set_fault(*from, *to, fault);
                self.net.set_fault(*to, *from, fault);
            }
        }
    }

    pub fn node(&self, id: u64) -> &Node {
        &self.nodes[&id]
    }

    pub fn log(&self, id: u64) -> &Arc<RaftLog> {
        self.nodes[&id].log()
    }

    pub async fn propose(&self, via: u64, command: &str) {
        let response = self.log(via).propose(command.into()).await.unwrap();
        assert_eq!(response, format!("done {command}").into_bytes());
    }

    /// Waits until the status of node `id` is as wanted.
    pub async fn until(
        &self,
        id: u64,
        what: &str,
        wanted: impl FnMut(&LogStatus) -> bool,
    ) -> LogStatus {
        let mut watch = self.log(id).watch();
        match tokio::time::timeout(PATIENCE, watch.wait_for(wanted)).await {
            Ok(Ok(status)) => status.clone(),
            _ => panic!("node {id} never {what}: {:?}", self.node(id).status()),
        }
    }

    /// Waits until node `id` has applied exactly these commands.
    pub async fn until_applied(&self, id: u64, commands: &[String]) {
        let node = self.node(id);
        let applied = |_: &LogStatus| node.commands().len() >= commands.len();
        self.until(id, "applied all", applied).await;
        assert_eq!(node.commands(), commands, "on node {id}");
    }

    /// Waits until some node of `among` leads, and returns it.
    pub async fn leader_among(&self, among: &[u64]) -> u64 {
        let leader = |status: &LogStatus| status.leader.is_some_and(|id| among.contains(&id));
        let status = self.until(among[0], "has a leader", leader).await;
        status.leader.unwrap()
    }
}

/// Waits for a condition that nothing announces.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let met = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let met = tokio::time::timeout(PATIENCE, met).await;
    assert!(met.is_ok(), "never: {what}");
}

pub fn commands(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|i| format!("command {i}")).collect()
}
