//! A running node: everything it consists of, and its start and stop.

use crate::cluster::{Cluster, boot_time, lock};
use crate::control::{ControlClient, LogTransport, NodeReply, NodeRequest};
use crate::dir::{DirError, DiskEntry, FORMAT, Identity, NodeDir};
use crate::exports::ExportTable;
use crate::incompatible::Incompatible;
use crate::leader::Leader;
use crate::listener;
use crate::peers::Peers;
use crate::recovery::Recoveries;
use crate::replica::{Disk, Replica};
use crate::scrub::Scrubber;
use crate::serve::Served;
use sheepdog_cluster::command::{
    Answer, Command, DiskInfo, LOG_VERSION, NodeInfo, decode_answer, encode_command,
};
use sheepdog_log::{ClusterLog, Options as LogOptions, ProposeError, RaftLog};
pub use sheepdog_store::{Cache, IoBackend};
use sheepdog_store::{Options as StoreOptions, Store, StoreIds};
use sheepdog_types::{ClusterId, DiskId, NodeId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

/// How often the leader of the log shows itself: each beat costs every node some 50 µs.
const HEARTBEAT: Duration = Duration::from_millis(100);
/// Reports of refused connections that wait; more say nothing new.
const REFUSALS: usize = 1024;
/// How long a clean stop tries to tell the cluster.
const FAREWELL: Duration = Duration::from_secs(3);
/// How long a node is asked for its cluster that listens but says nothing: it may have been started a moment ago.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);
/// Pause between tries to enter the cluster.
const RETRY: Duration = Duration::from_millis(200);
/// How long a proposal is tried again before its caller hears of it.
const PROPOSE_PATIENCE: Duration = Duration::from_secs(15);

/// What a node is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its directory.
    pub dir: PathBuf,
    /// Where it listens; by default where it did last time, or 127.0.0.1:7000.
    pub listen: Option<SocketAddr>,
    /// Members to join through; not needed again once it has joined.
    pub join: Vec<SocketAddr>,
    /// Failure zone; by default the host's name and its node id.
    pub zone: Option<String>,
    /// Directories of disks and their weights; by default `disk` in the node's directory.
    pub disks: Vec<(PathBuf, Option<u64>)>,
    /// It has no disks: a gateway and a voter of the cluster log.
    pub no_disk: bool,
    /// Allow addresses outside loopback although nothing is encrypted yet.
    pub insecure: bool,
    /// How disks are read and written.
    pub cache: Cache,
    /// What carries out disk I/O that has to wait.
    pub io: IoBackend,
}

impl Config {
    fn store_options(&self) -> StoreOptions {
        StoreOptions { cache: self.cache, io: self.io, ..StoreOptions::default() }
    }
}

/// A failed start: a text that says what happened and what to do.
pub type StartError = Box<dyn std::error::Error + Send + Sync>;

/// A running node.
pub struct Node {
    /// Its directory.
    pub dir: Arc<NodeDir>,
    /// Who it is, as `node.json` says.
    identity: Mutex<Identity>,
    /// How its disks are opened.
    pub store_options: StoreOptions,
    /// The agreed state.
    pub cluster: Arc<Cluster>,
    /// The cluster log.
    pub log: Arc<RaftLog>,
    /// Its disks.
    pub replica: Arc<Replica>,
    /// Connections to other nodes' disks.
    pub peers: Arc<Peers>,
    /// Connections from other nodes to its disks.
    pub served: Served,
    /// Who speaks no protocol version of this node.
    pub incompatible: Arc<Incompatible>,
    /// Requests to other nodes.
    pub client: Arc<ControlClient>,
    /// What it serves.
    pub exports: Arc<ExportTable>,
    /// What it does while it leads the log.
    pub leader: Leader,
    /// Recoveries of its disks.
    pub recoveries: Recoveries,
    /// Scrubs of its disks.
    scrubbers: Mutex<BTreeMap<DiskId, Arc<Scrubber>>>,
    /// Disks of it that could not be opened, and why.
    pub unopened: Mutex<BTreeMap<DiskId, String>>,
    /// Held while a disk is added or removed.
    pub disk_changes: tokio::sync::Mutex<()>,
    /// Why it has to stop: it is no member any more, or its release is too old.
    pub expelled: watch::Sender<Option<String>>,
    /// Why it has not entered yet.
    pub(crate) obstacle: Mutex<String>,
    /// Set when it stops.
    pub stopping: watch::Sender<bool>,
    /// Set when the cluster has been told that it stops: it accepts connections until then, since whoever takes
    /// the cluster log over has to be heard.
    pub left: watch::Sender<bool>,
}

/// Seconds since 1970.
#[must_use]
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A random number that is not 0.
///
/// # Errors
/// If the system has no randomness.
pub fn random_id() -> Result<u64, getrandom::Error> {
    loop {
        let id = getrandom::u64()?;
        if id != 0 {
            return Ok(id);
        }
    }
}

/// Starts a node: returns when it listens and its log runs. It enters the cluster in the
/// background, as soon as a quorum of the log can be reached.
///
/// # Errors
/// [`StartError`].
pub async fn start(config: Config) -> Result<Arc<Node>, StartError> {
    let dir = Arc::new(NodeDir::lock(&config.dir)?);
    let known = dir.identity()?;
    let last = known.as_ref().map(|identity| identity.address.parse()).transpose()?;
    let address = config.listen.or(last).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 7000)));
    check_address(address, config.insecure)?;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|e| format!("cannot listen on {address}: {e}; choose another --listen"))?;
    let is_new = known.is_none();
    let identity = match known {
        Some(identity) => revisit(&dir, identity, address, &config).await?,
        None => introduce(&dir, address, &config).await?,
    };
    let cluster_id: ClusterId = identity.cluster.parse()?;
    let id: NodeId = identity.node.parse()?;
    let cluster = Arc::new(Cluster::new(id, random_id()?));
    let (refused, refusals) = mpsc::channel(REFUSALS);
    let on_refused = |sender: mpsc::Sender<NodeId>| {
        Box::new(move |node| _ = sender.try_send(node)) as Box<dyn Fn(NodeId) + Send + Sync>
    };
    let store_options = config.store_options();
    let (disks, unopened) = open_disks(&identity, cluster_id, id, &store_options)?;
    let replica = Replica::new(Arc::clone(&cluster), disks)?;
    let incompatible: Arc<Incompatible> = Arc::default();
    let peers = Peers::new(
        Arc::clone(&cluster),
        cluster_id,
        on_refused(refused.clone()),
        Arc::clone(&incompatible),
    );
    replica.set_peers(&peers);
    let client = || ControlClient::new(cluster_id, id).telling(&incompatible);
    let transport = Arc::new(LogTransport::new(client(), on_refused(refused)));
    let log = open_log(&dir, &identity, id, &cluster, transport, is_new).await?;
    // Last: a start that failed before it leaves a directory that counts as empty.
    dir.save_identity(&identity)?;
    let exports = Arc::new(ExportTable::load(
        Arc::clone(&dir),
        Arc::clone(&cluster),
        Arc::clone(&replica),
        Arc::clone(&peers),
        config.insecure,
    )?);
    let client = Arc::new(client());
    let leader = Leader::default();
    let recoveries = Recoveries::new(Arc::clone(&cluster.clients));
    let scrubber = |disk: Arc<Disk>| (disk.id, Arc::new(Scrubber::new(disk)));
    let scrubbers = replica.disks().into_iter().map(scrubber).collect();
    let node = Arc::new(Node {
        dir,
        identity: Mutex::new(identity),
        store_options,
        cluster,
        log,
        replica,
        peers,
        served: Served::default(),
        incompatible,
        client,
        exports,
        leader,
        recoveries,
        scrubbers: Mutex::new(scrubbers),
        unopened: Mutex::new(unopened),
        disk_changes: tokio::sync::Mutex::default(),
        expelled: watch::Sender::new(None),
        obstacle: Mutex::default(),
        stopping: watch::Sender::new(false),
        left: watch::Sender::new(false),
    });
    tokio::spawn(listener::run(Arc::clone(&node), listener));
    crate::tasks::spawn_all(&node, refusals)?;
    tracing::info!(node = %id, cluster = %cluster_id, %address, "listening");
    Ok(node)
}

/// A directory that was used before: checks that it fits what was asked for.
async fn revisit(
    dir: &NodeDir,
    mut identity: Identity,
    address: SocketAddr,
    config: &Config,
) -> Result<Identity, StartError> {
    identity.address = address.to_string();
    if let Some(zone) = &config.zone {
        identity.zone.clone_from(zone);
    }
    let ours: ClusterId = identity.cluster.parse()?;
    let client = ControlClient::new(ClusterId(0), NodeId(0));
    for target in &config.join {
        let target = target.to_string();
        if let Ok(NodeReply::IAm { cluster, .. }) =
            client.ask(&target, &NodeRequest::WhoAreYou).await
            && cluster != ours
        {
            return Err(format!(
                "{} belongs to cluster {ours}, but {target} is in cluster {cluster}; \
                 use another --dir, or leave --join out",
                dir.path().display()
            )
            .into());
        }
    }
    if !identity.join.is_empty() && !config.join.is_empty() {
        identity.join = config.join.iter().map(ToString::to_string).collect();
    }
    if config.no_disk && !identity.disks.is_empty() {
        let disks = identity.disks.iter().map(|d| d.path.display().to_string());
        let disks = disks.collect::<Vec<_>>().join(", ");
        let text = format!(
            "--no-disk: this node was created with {disks}; start it without --no-disk. Nothing \
             was changed"
        );
        return Err(text.into());
    }
    for (path, _) in &config.disks {
        let path = std::path::absolute(path)?;
        if !identity.disks.iter().any(|d| d.path == path) {
            return Err(format!(
                "disk {} is not part of this node, which has {}; `dog node disk add` adds a disk while it \
                 runs. Nothing was changed",
                path.display(),
                identity
                    .disks
                    .iter()
                    .map(|d| d.path.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            )
            .into());
        }
    }
    Ok(identity)
}

/// An empty directory: founds a cluster, or learns which one to join.
async fn introduce(
    dir: &NodeDir,
    address: SocketAddr,
    config: &Config,
) -> Result<Identity, StartError> {
    clear_leftovers(dir)?;
    let id = NodeId(random_id()?);
    let cluster = if config.join.is_empty() {
        ClusterId(random_id()?)
    } else {
        ask_for_cluster(&config.join).await?
    };
    let default = dir.path().join("disk");
    let wanted = match &config.disks[..] {
        [] if config.no_disk => Vec::new(),
        [] => vec![(default, None)],
        given => given.to_vec(),
    };
    let mut disks = Vec::new();
    for (path, weight) in wanted {
        let path = std::path::absolute(path)?;
        let disk = DiskId(random_id()?);
        std::fs::create_dir_all(&path)
            .map_err(|e| format!("cannot create {}: {e}", path.display()))?;
        let ids = StoreIds { cluster, node: id, disk };
        let store = match Store::create(&path, ids, config.store_options()) {
            Err(sheepdog_store::OpenError::Exists(path)) => {
                return Err(format!(
                    "{} holds the disk of another node; use another path",
                    path.display()
                )
                .into());
            }
            outcome => outcome?,
        };
        let weight = weight.unwrap_or((store.usage().capacity >> 30).max(1));
        disks.push(DiskEntry { id: disk.to_string(), path, weight });
    }
    let identity = Identity {
        format: FORMAT,
        cluster: cluster.to_string(),
        node: id.to_string(),
        address: address.to_string(),
        zone: config.zone.clone().unwrap_or_else(|| id.to_string()),
        disks,
        join: config.join.iter().map(ToString::to_string).collect(),
    };
    Ok(identity)
}

/// Removes what a start that failed half-way left behind: no node had its id. A store with data is
/// not that, but a node whose `node.json` was lost, and stays as it is.
fn clear_leftovers(dir: &NodeDir) -> Result<(), StartError> {
    let disk = dir.path().join("disk");
    match Store::open(&disk, StoreOptions::default()) {
        Ok(store) if store.usage().objects > 0 => {
            return Err(format!(
                "{} holds data, but node.json beside it is missing: restore that file, or move the \
                 directory away; nothing was changed",
                disk.display()
            )
            .into());
        }
        Ok(_) | Err(sheepdog_store::OpenError::NotAStore { .. }) => {}
        Err(error) => {
            return Err(format!("{}: {error}; nothing was changed", disk.display()).into());
        }
    }
    Store::remove(&disk)?;
    let log = dir.path().join("cluster");
    if log.exists() {
        std::fs::remove_dir_all(&log)?;
    }
    Ok(())
}

fn check_address(address: SocketAddr, insecure: bool) -> Result<(), StartError> {
    if address.ip().is_unspecified() {
        let text = format!("--listen {address}: give the address that the other nodes use");
        return Err(text.into());
    }
    if !address.ip().is_loopback() {
        if !insecure {
            return Err(format!(
                "--listen {address}: connections are not encrypted yet, so only loopback \
                 addresses are allowed; add --insecure if the network is private"
            )
            .into());
        }
        tracing::warn!(%address, "listening without encryption: keep this network private");
    }
    Ok(())
}

async fn ask_for_cluster(join: &[SocketAddr]) -> Result<ClusterId, StartError> {
    let client = ControlClient::new(ClusterId(0), NodeId(0));
    let begin = Instant::now();
    loop {
        let (mut problems, mut slow) = (Vec::new(), false);
        for target in join {
            match client.ask(&target.to_string(), &NodeRequest::WhoAreYou).await {
                Ok(NodeReply::IAm { version, .. }) if version > LOG_VERSION => {
                    problems.push(format!(
                        "{target}: the cluster is at version {version}, this release understands \
                         versions up to {LOG_VERSION}: use a newer one (docs/upgrade.md)"
                    ));
                }
                Ok(NodeReply::IAm { cluster, .. }) => return Ok(cluster),
                Ok(_) => problems.push(format!("{target}: an answer that makes no sense")),
                Err(error) => {
                    slow |= error.is_timeout();
                    problems.push(format!("{target}: {error}"));
                }
            }
        }
        let problems = problems.join("; ");
        if !slow || begin.elapsed() > JOIN_PATIENCE {
            return Err(format!(
                "cannot join the cluster; nothing was created. {problems}. Check --join and that sheep runs there"
            )
            .into());
        }
        tracing::info!(problems, "no answer yet, asking again");
    }
}

fn open_disks(
    identity: &Identity,
    cluster: ClusterId,
    node: NodeId,
    options: &StoreOptions,
) -> Result<(Vec<Disk>, BTreeMap<DiskId, String>), StartError> {
    let (mut disks, mut failed) = (Vec::new(), BTreeMap::new());
    for entry in &identity.disks {
        let id: DiskId = entry.id.parse()?;
        match open_store(entry, StoreIds { cluster, node, disk: id }, options) {
            Ok(store) => disks.push(Disk::new(id, entry.path.clone(), store)),
            Err(error) => _ = failed.insert(id, error.to_string()),
        }
    }
    // One bad disk is no reason to stay away with the others; without any, it looks like a mistake.
    if disks.is_empty()
        && let Some(error) = failed.first_entry()
    {
        return Err(error.get().clone().into());
    }
    for (disk, error) in &failed {
        tracing::error!(%disk, error, "a disk cannot be opened; starting without it");
    }
    Ok((disks, failed))
}

fn open_store(
    entry: &DiskEntry,
    expected: StoreIds,
    options: &StoreOptions,
) -> Result<Store, StartError> {
    let store = Store::open(&entry.path, options.clone())
        .map_err(|error| format!("disk {}: {error}", entry.path.display()))?;
    if store.ids() != expected {
        return Err(format!(
            "the store in {} belongs to {:?}, this node expects {expected:?}",
            entry.path.display(),
            store.ids()
        )
        .into());
    }
    Ok(store)
}

async fn open_log(
    dir: &NodeDir,
    identity: &Identity,
    id: NodeId,
    cluster: &Arc<Cluster>,
    transport: Arc<LogTransport>,
    is_new: bool,
) -> Result<Arc<RaftLog>, StartError> {
    let path = dir.path().join("cluster");
    if is_new {
        std::fs::create_dir_all(&path)?;
    }
    let address = identity.address.as_str();
    let options = LogOptions { heartbeat: HEARTBEAT, ..LogOptions::default() };
    let machine: Arc<dyn sheepdog_log::StateMachine> = Arc::clone(cluster) as _;
    let log = if is_new && identity.join.is_empty() {
        RaftLog::bootstrap(&path, id.0, address, machine, transport, options).await
    } else {
        RaftLog::open(&path, id.0, machine, transport, options).await
    };
    Ok(Arc::new(log.map_err(|e| format!("the cluster log in {}: {e}", path.display()))?))
}

impl Node {
    /// Proposes a command, again while nothing was committed, and waits until this node has
    /// applied what came of it.
    ///
    /// # Errors
    /// A text for people that says whether the command may have been carried out.
    pub async fn propose(&self, command: &Command) -> Result<Answer, String> {
        let entry = encode_command(command);
        let deadline = tokio::time::Instant::now() + PROPOSE_PATIENCE;
        loop {
            match self.log.propose(entry.clone()).await {
                Ok(answer) => return Ok(decode_answer(&answer)),
                Err(ProposeError::NotCommitted(_) | ProposeError::Unavailable(_))
                    if tokio::time::Instant::now() < deadline =>
                {
                    tokio::time::sleep(RETRY).await;
                }
                Err(ProposeError::Unavailable(why)) => {
                    return Err(format!(
                        "a majority of the cluster's voters cannot be reached ({why}); nothing \
                         was changed. `dog cluster info` shows the voters"
                    ));
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// Waits until `reached` holds for the agreed state on this node.
    pub async fn wait_for(
        &self,
        timeout: Duration,
        reached: impl Fn(&sheepdog_cluster::state::ClusterState) -> bool,
    ) -> bool {
        let mut changes = self.cluster.changes();
        let wait = async {
            loop {
                changes.borrow_and_update();
                if reached(&self.cluster.state()) {
                    return true;
                }
                if changes.changed().await.is_err() {
                    return false;
                }
            }
        };
        tokio::time::timeout(timeout, wait).await.unwrap_or(false)
    }

    /// How this node announces itself: without disks that are out of service.
    #[must_use]
    pub fn info(&self) -> NodeInfo {
        let works = |disk: &DiskInfo| {
            self.replica.disk(disk.id).is_some_and(|disk| disk.store.failure().is_none())
        };
        let identity = self.identity();
        let disks = identity
            .disks
            .iter()
            .filter_map(|d| Some(DiskInfo { id: d.id.parse().ok()?, weight: d.weight }))
            .filter(works);
        NodeInfo {
            id: self.cluster.node,
            incarnation: self.cluster.incarnation(),
            address: identity.address.clone(),
            zone: identity.zone.clone(),
            disks: disks.collect(),
            version: LOG_VERSION,
        }
    }

    /// Who it is. Do not hold it across an await.
    pub fn identity(&self) -> MutexGuard<'_, Identity> {
        lock(&self.identity)
    }

    /// Changes what `node.json` says, durably.
    ///
    /// # Errors
    /// It could not be written; nothing was changed.
    pub fn change_identity(&self, change: impl FnOnce(&mut Identity)) -> Result<(), DirError> {
        let mut identity = self.identity();
        let mut changed = identity.clone();
        change(&mut changed);
        self.dir.save_identity(&changed)?;
        *identity = changed;
        Ok(())
    }

    /// The scrubs of its disks.
    #[must_use]
    pub fn scrubbers(&self) -> Vec<Arc<Scrubber>> {
        lock(&self.scrubbers).values().cloned().collect()
    }

    /// Takes a disk into service here; the cluster has to be told.
    pub fn open_disk(&self, disk: Disk) {
        let disk = Arc::new(disk);
        lock(&self.scrubbers).insert(disk.id, Arc::new(Scrubber::new(Arc::clone(&disk))));
        self.replica.insert(disk);
    }

    /// Takes a disk out of service here, waiting for a layer that is being scrubbed.
    pub fn close_disk(&self, id: DiskId) -> Option<Arc<Disk>> {
        let scrubber = lock(&self.scrubbers).remove(&id);
        if let Some(scrubber) = scrubber {
            scrubber.stop();
        }
        self.replica.remove(id)
    }

    /// Stops cleanly: finishes what is in progress, gives attachments back, tells the cluster, and hands
    /// its log over if this node leads it.
    pub async fn stop(self: &Arc<Self>) {
        tracing::info!("stopping");
        self.stopping.send_replace(true);
        let node = Arc::clone(self);
        let stop_all = move || {
            node.scrubbers().iter().for_each(|scrubber| scrubber.stop());
            node.exports.stop_all()
        };
        let attached = tokio::task::spawn_blocking(stop_all).await.unwrap_or_default();
        let farewell = async {
            for attachment in attached {
                // The lease covers a miss.
                let _ = self.log.propose(encode_command(&attachment.command())).await;
            }
            let down = Command::Down {
                node: self.cluster.node,
                incarnation: self.cluster.incarnation(),
                reason: "stopped by its operator".into(),
                at: now(),
            };
            let _ = self.log.propose(encode_command(&down)).await;
            self.log.hand_over().await;
        };
        let is_member = self.expelled.borrow().is_none();
        if is_member && tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            tracing::warn!("the cluster could not be told; it will notice by itself");
        }
        self.left.send_replace(true);
        self.cluster.lease.drop_now();
        self.peers.stop();
        self.log.shutdown().await;
        let node = Arc::clone(self);
        let close_all = move || {
            let disks: Vec<DiskId> = node.replica.disks().iter().map(|disk| disk.id).collect();
            disks.into_iter().for_each(|disk| crate::membership::close(&node, disk));
        };
        if let Err(error) = tokio::task::spawn_blocking(close_all).await {
            tracing::error!(%error, "the disks were not closed");
        }
        tracing::info!("stopped");
    }

    /// Renews this node's own lease, asking the leader of the log.
    pub async fn renew_lease(&self) -> Result<NodeReply, String> {
        let asked_at = boot_time();
        let (id, incarnation) = (self.cluster.node, self.cluster.incarnation());
        let unreachable = self.peers.reach.lost();
        let status = self.log.status();
        let reply = if status.is_leader {
            self.leader.renew(self, id, incarnation, unreachable)
        } else {
            let request = NodeRequest::Renew { node: id, incarnation, unreachable };
            let leader = status.leader.ok_or("no leader is known")?;
            let address = status.addresses.get(&leader).ok_or("the leader has no address")?;
            let ask = self.client.ask(address, &request);
            let reply = tokio::time::timeout(crate::cluster::LEASE / 3, ask).await;
            reply.map_err(|_| "the leader does not answer")?.map_err(|error| {
                if error.is_refused() {
                    self.peers.note_refused(NodeId(leader));
                }
                error.to_string()
            })?
        };
        if let NodeReply::Granted(age) = reply {
            self.cluster.renew_lease(asked_at.saturating_sub(age.saturating_mul(1_000_000)));
        }
        Ok(reply)
    }
}
