//! The cluster: nodes, the agreed log, and the loop that drives all of it.

use super::checker::Checker;
use super::guest::Guest;
use super::net::{Job, Port, Straggler};
use super::rng::Rng;
use super::store::Store;
use super::sync::Sync;
use sheepdog_cluster::command::{Ack, Answer, Command, DiskInfo, NodeInfo, Outcome, VolumeSpec};
use sheepdog_cluster::gateway::{Config, Gateway, Phase};
use sheepdog_cluster::state::ClusterState;
use sheepdog_cluster::view::View;
use sheepdog_types::{
    ClusterId, Completion, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Sink, VolumeId,
    WriterGen,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// A lie that a test of the tester tells on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// Replicas serve calls of any epoch, lease or not.
    SkipEpoch,
    /// Replicas apply writes whatever version the layer is at.
    SkipPrev,
    /// Replicas acknowledge some writes that they never apply.
    AckBeforeApply,
    /// Disks answer a flush without doing it.
    FlushLies,
    /// Replicas serve old writers.
    NotFenced,
    /// A recovery answers that it is done, and did nothing.
    RecoverNothing,
    /// A disk says that it is synced, and copied nothing.
    SyncNothing,
    /// The gateway's node answers reads from a layer without looking at its checksums.
    ReadDamaged,
}

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub seed: u64,
    pub mutant: Mutant,
}

/// How a run went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub steps: u64,
    pub requests: u64,
    pub epochs: u64,
    pub crashes: u64,
    pub takeovers: u64,
    pub recovered: u64,
}

/// What may go wrong in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Processes die at any time and keep what they wrote; power is lost by one complete node at
    /// a time. Nothing acknowledged may ever be lost.
    Careful,
    /// Power is lost anywhere, by all nodes at once too. Only flushed writes have to stay.
    Wild,
    /// Blocks rot, one replica of one block at a time, with no crash meanwhile.
    Rot,
    /// A disk is full for a while.
    Full,
}

pub struct Node {
    pub id: NodeId,
    pub disk: DiskId,
    pub incarnation: u64,
    pub alive: bool,
    /// Entered, and not given up by the others.
    pub lease: bool,
    /// Entries of the log that it knows.
    pub applied: usize,
    /// The log reaches it no more.
    pub frozen: bool,
    /// The log has to be known up to here before it serves.
    pub enters_at: Option<usize>,
    pub store: Store,
    pub sync: Option<Sync>,
}

/// Collects completions.
#[derive(Default)]
pub struct Inbox(pub Mutex<Vec<(u64, Completion)>>);

impl Sink for Inbox {
    fn complete(&self, tag: u64, completion: Completion) {
        self.0.lock().unwrap().push((tag, completion));
    }
    fn flush(&self) {}
}

pub struct Instance {
    pub gateway: Gateway,
    pub node: usize,
    pub ports: Vec<Port>,
    pub inbox: Arc<Inbox>,
    pub alive: bool,
    /// It hears nothing of the log any more.
    pub frozen: bool,
    /// It hears nothing from the attachment on that replaces it.
    pub held: bool,
    /// It hears of the log up to here.
    pub limit: usize,
    pub view_at: usize,
    /// Requests of a zombie's guest that began after another gateway served.
    pub forbidden: BTreeSet<u64>,
}

pub struct World {
    pub rng: Rng,
    pub now: u64,
    pub mode: Mode,
    pub mutant: Mutant,
    pub copies: u8,
    pub min_copies: u8,
    pub state: ClusterState,
    pub views: Vec<Arc<View>>,
    pub nodes: Vec<Node>,
    pub instances: Vec<Instance>,
    pub active: Option<usize>,
    /// Node, writer, and the entry that attached it.
    pub attaching: Option<(usize, WriterGen, usize)>,
    pub jobs: Vec<Job>,
    pub stragglers: Vec<Straggler>,
    pub checker: Checker,
    pub guest: Guest,
    pub volume: VolumeId,
    pub junk: Option<VolumeId>,
    pub calm: bool,
    /// A power loss took unflushed data, and not all disks are complete again.
    pub tainted: bool,
    pub trouble: Option<String>,
    pub stats: Stats,
    /// When the last block rotted.
    pub rotted: u64,
    pub trace: bool,
}

thread_local! {
    /// Views of earlier runs: placing a ring costs more than a run.
    static RINGS: RefCell<BTreeMap<String, Arc<View>>> = const { RefCell::new(BTreeMap::new()) };
}

fn build_view(state: &ClusterState) -> Arc<View> {
    RINGS.with(|rings| {
        let ids = |m: &sheepdog_cluster::state::RingMembers| m.keys().copied().collect::<Vec<_>>();
        let key = format!("{:?} {:?}", ids(&state.ring), state.next_ring.as_ref().map(ids));
        let mut rings = rings.borrow_mut();
        let view = Arc::new(View::build(state, rings.get(&key).map(AsRef::as_ref)));
        rings.entry(key).or_insert_with(|| Arc::clone(&view));
        view
    })
}

pub const FAULT_STEPS: u64 = 1500;
const CALM_STEPS: u64 = 30_000;

/// Runs one seed.
///
/// # Errors
/// What was violated, and when.
pub fn run(options: Options) -> Result<Stats, String> {
    let mut world = World::new(options);
    world.go().map_err(|e| {
        format!(
            "{e}\n  at step {} of seed {} ({:?}, copies {}/{}); replay with SEED={}",
            world.now, options.seed, world.mode, world.copies, world.min_copies, options.seed
        )
    })
}

impl World {
    fn new(options: Options) -> Self {
        let mut rng = Rng::new(options.seed);
        let mode = match rng.below(10) {
            0..=3 => Mode::Careful,
            4..=7 => Mode::Wild,
            8 => Mode::Rot,
            _ => Mode::Full,
        };
        let (copies, min_copies) = [(3, 2), (3, 2), (3, 1), (2, 1)][rng.below(4) as usize];
        let mut world = Self {
            rng,
            now: 0,
            mode,
            mutant: options.mutant,
            copies,
            min_copies,
            state: ClusterState::default(),
            views: Vec::new(),
            nodes: Vec::new(),
            instances: Vec::new(),
            active: None,
            attaching: None,
            jobs: Vec::new(),
            stragglers: Vec::new(),
            checker: Checker::default(),
            guest: Guest::default(),
            volume: VolumeId(0),
            junk: None,
            calm: false,
            tainted: false,
            trouble: None,
            stats: Stats::default(),
            rotted: 0,
            trace: std::env::var("TRACE").is_ok(),
        };
        world.found();
        world
    }

    fn found(&mut self) {
        self.propose(Command::Found { cluster: ClusterId(1) }).unwrap();
        self.views.push(build_view(&self.state));
        for _ in 0..self.rng.range(3, 4) {
            self.add_node();
        }
        let junk = self.create("junk", 2, 1);
        self.junk = Some(junk);
        let (copies, min_copies) = (self.copies, self.min_copies);
        self.volume = self.create("vm", copies, min_copies);
        self.plant_junk(junk);
        for at in 0..self.nodes.len() {
            self.nodes[at].applied = self.views.len() - 1;
            self.nodes[at].lease = true;
            self.nodes[at].enters_at = None;
        }
        self.make_regions();
    }

    fn create(&mut self, name: &str, copies: u8, min_copies: u8) -> VolumeId {
        let spec = VolumeSpec {
            name: name.into(),
            size: super::guest::SIZE,
            copies,
            min_copies,
            ack: Ack::Flush,
        };
        match self.propose(Command::CreateVolume { spec, at: 0 }) {
            Ok(Outcome::Created { volume }) => volume,
            other => panic!("{other:?}"),
        }
    }

    fn plant_junk(&mut self, junk: VolumeId) {
        let view = self.latest();
        for index in 0..2 {
            let object = ObjectId { volume: junk, index: ObjectIndex(index) };
            for node in &mut self.nodes {
                if view.is_member(object.slot(), 2, node.disk) {
                    let version = sheepdog_types::Version { writer: WriterGen(1), seq: 3 };
                    node.store.plant(LayerKey { object, layer: Layer(0) }, version);
                }
            }
        }
    }

    /// Commits a command.
    pub fn propose(&mut self, command: Command) -> Answer {
        let before = (self.state.revision, self.state.epoch);
        if self.trace {
            eprintln!("{} log {command:?}", self.now);
        }
        let answer = self.state.apply(command);
        if before != (self.state.revision, self.state.epoch) {
            self.views.push(build_view(&self.state));
        }
        self.stats.epochs = self.state.epoch.0;
        answer
    }

    pub fn latest(&self) -> Arc<View> {
        Arc::clone(&self.views[self.views.len() - 1])
    }

    pub fn view_of(&self, node: usize) -> Arc<View> {
        Arc::clone(&self.views[self.nodes[node].applied])
    }

    pub fn node_index(&self, id: NodeId) -> usize {
        id.0 as usize - 1
    }

    pub fn disk_index(&self, disk: DiskId) -> usize {
        disk.0 as usize - 101
    }

    /// A new node, empty, which enters.
    pub fn add_node(&mut self) {
        let n = self.nodes.len() as u64;
        self.nodes.push(Node {
            id: NodeId(n + 1),
            disk: DiskId(n + 101),
            incarnation: 0,
            alive: false,
            lease: false,
            applied: 0,
            frozen: false,
            enters_at: None,
            store: Store::default(),
            sync: None,
        });
        for instance in &mut self.instances {
            instance.ports.push(Port::default());
        }
        self.start_node(n as usize);
    }

    /// Starts the process of a node, which enters with a new incarnation.
    pub fn start_node(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.incarnation += 1;
        (node.alive, node.frozen, node.lease, node.sync) = (true, false, false, None);
        let info = NodeInfo {
            id: node.id,
            incarnation: node.incarnation,
            address: format!("10.0.0.{}:7000", node.id.0),
            zone: format!("z{}", node.id.0),
            disks: vec![DiskInfo { id: node.disk, weight: 1 }],
        };
        self.propose(Command::Enter { node: info, at: self.now }).expect("it may enter");
        self.nodes[at].enters_at = Some(self.views.len() - 1);
        self.after_change();
    }

    /// Authorities may have changed: what was lost with the power may show now.
    pub fn after_change(&mut self) {
        if self.tainted && self.mode == Mode::Wild {
            self.checker.lose(self.now);
        }
    }

    fn go(&mut self) -> Result<Stats, String> {
        while self.now < FAULT_STEPS {
            self.step()?;
        }
        self.calm = true;
        self.heal();
        self.settle()?;
        self.final_reads()?;
        self.compare_replicas()?;
        if self.mode != Mode::Rot {
            // The first one may have to say that earlier writes are lost.
            for _ in 0..2 {
                self.guest.flush(&mut self.checker, &mut self.instances, self.active, self.now);
                self.settle()?;
            }
            self.lose_all_power(true, false);
            self.settle()?;
            self.final_reads()?;
            self.compare_replicas()?;
            self.check_deleted()?;
        }
        self.stats.steps = self.now;
        self.stats.requests = self.guest.issued();
        self.stats.recovered = self.instances.iter().map(|i| i.gateway.counters().recovered).sum();
        Ok(self.stats)
    }

    fn final_reads(&mut self) -> Result<(), String> {
        self.guest.read_all(&mut self.checker, &mut self.instances, self.active, self.now);
        self.settle()
    }

    /// Goes on until nothing is left to do.
    fn settle(&mut self) -> Result<(), String> {
        let limit = self.now + CALM_STEPS;
        loop {
            self.step()?;
            if self.is_settled() {
                return Ok(());
            }
            if self.now > limit {
                return Err(format!("stuck: {}", self.describe()));
            }
        }
    }

    fn serving(&self) -> Option<&Instance> {
        let instance = &self.instances[self.active?];
        (instance.gateway.phase() == Phase::Serving).then_some(instance)
    }

    fn is_settled(&self) -> bool {
        self.serving().is_some_and(|i| i.gateway.is_idle())
            && self.checker.idle()
            && self.complete()
            && self.nodes.iter().all(|n| n.lease && n.applied == self.views.len() - 1)
            && self.jobs.is_empty()
            && self.stragglers.is_empty()
    }

    /// All disks hold what they must, as far as the log knows.
    pub fn complete(&self) -> bool {
        self.state.next_ring.is_none()
            && self.nodes.iter().all(|n| self.state.disk_up(n.disk))
            && self
                .state
                .disks
                .values()
                .all(|d| d.missed_since.is_none() && !d.restarted && d.sync_from.is_none())
    }

    fn describe(&self) -> String {
        let nodes: Vec<String> = self
            .nodes
            .iter()
            .map(|n| {
                let listing: Vec<String> =
                    n.store.listing().iter().map(|(k, v)| format!("{k}:{v}")).collect();
                format!(
                    "{} alive {} lease {} applied {}/{} sync {} [{}]",
                    n.id.0,
                    n.alive,
                    n.lease,
                    n.applied,
                    self.views.len() - 1,
                    n.sync.is_some(),
                    listing.join(" ")
                )
            })
            .collect();
        let gateway = self.active.map(|a| {
            let g = &self.instances[a].gateway;
            let ports: Vec<String> = self.instances[a].ports.iter().map(Port::describe).collect();
            format!(
                "writer {} {:?} idle {} tick {} blocked {} {:?} on {} ports {ports:?}",
                g.config().writer,
                g.phase(),
                g.is_idle(),
                g.wants_tick(),
                g.blocked_objects(),
                g.counters(),
                self.instances[a].node
            )
        });
        format!(
            "{} requests open, gateway {gateway:?}, {} jobs, disks {:?}, next ring {}\n  {}",
            self.checker.running(),
            self.jobs.len(),
            self.state.disks,
            self.state.next_ring.is_some(),
            nodes.join("\n  ")
        )
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += 1;
        let all_well = self.nodes.iter().all(|n| n.alive && n.lease);
        if self.tainted && all_well && self.complete() {
            self.tainted = false;
        }
        self.deliver_log();
        self.deliver_messages();
        self.run_jobs();
        self.manage_attachment();
        self.run_guest();
        if !self.calm {
            self.run_faults();
        }
        self.run_nodes();
        for at in 0..self.nodes.len() {
            self.run_sync(at);
        }
        for at in 0..self.instances.len() {
            if self.now.is_multiple_of(8) && self.instances[at].gateway.wants_tick() {
                self.instances[at].gateway.handle_tick();
            }
            self.collect(at);
        }
        self.trouble.take().map_or(Ok(()), Err)
    }

    fn deliver_log(&mut self) {
        let pace = if self.calm { 400 } else { 150 };
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            if !node.alive || node.frozen || node.applied + 1 >= self.views.len() {
                continue;
            }
            if self.rng.chance(pace) {
                self.nodes[at].applied += 1;
                self.check_lease(at);
            }
        }
        for at in 0..self.instances.len() {
            let instance = &self.instances[at];
            let known = self.nodes[instance.node].applied.min(instance.limit);
            if instance.alive && !instance.frozen && instance.view_at < known {
                let view = Arc::clone(&self.views[known]);
                let newer = view.epoch > self.views[instance.view_at].epoch;
                self.instances[at].view_at = known;
                self.instances[at].gateway.handle_view(view);
                if newer && self.active == Some(at) {
                    self.after_change();
                }
            }
        }
    }

    fn check_lease(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        if node.enters_at.is_some_and(|entry| node.applied >= entry) {
            node.enters_at = None;
            let known = &self.state.nodes[&node.id];
            node.lease = known.up && known.incarnation == node.incarnation;
        }
    }

    /// Attaches the volume when nobody has it.
    fn manage_attachment(&mut self) {
        if let Some((at, writer, entry)) = self.attaching {
            let node = &self.nodes[at];
            if !node.alive || !node.lease {
                self.attaching = None;
            } else if node.applied >= entry {
                self.attaching = None;
                let config = Config {
                    node: node.id,
                    volume: self.volume,
                    size: super::guest::SIZE,
                    copies: usize::from(self.copies),
                    min_copies: usize::from(self.min_copies),
                    layer: Layer(0),
                    writer,
                    ack: Ack::Flush,
                };
                let view = self.view_of(at);
                let view_at = self.nodes[at].applied;
                self.instances.push(Instance {
                    gateway: Gateway::new(config, view),
                    node: at,
                    ports: self.nodes.iter().map(|_| Port::default()).collect(),
                    inbox: Arc::default(),
                    alive: true,
                    frozen: false,
                    held: false,
                    limit: usize::MAX,
                    view_at,
                    forbidden: BTreeSet::new(),
                });
                self.active = Some(self.instances.len() - 1);
                self.after_change();
            }
        } else if self.active.is_none() && self.rng.chance(100) {
            let at = self.rng.below(self.nodes.len() as u64) as usize;
            let node = &self.nodes[at];
            let (gateway, incarnation) = (node.id, node.incarnation);
            if !node.alive || !node.lease {
                return;
            }
            let command = Command::Attach { name: "vm".into(), gateway, incarnation, at: self.now };
            if let Ok(Outcome::Attached { writer, .. }) = self.propose(command) {
                let entry = self.views.len() - 1;
                self.attaching = Some((at, writer, entry));
                for old in self.instances.iter_mut().filter(|i| i.held) {
                    old.limit = old.limit.min(entry - 1);
                }
                self.stats.takeovers += 1;
            }
        }
    }

    /// After all disks came back and are synced: nothing is left of what was deleted.
    fn check_deleted(&self) -> Result<(), String> {
        for node in &self.nodes {
            for key in node.store.listing().keys() {
                if self.state.volumes.get(&key.object.volume).is_none() {
                    return Err(format!("node {} still has {key} of a deleted volume", node.id));
                }
            }
        }
        Ok(())
    }

    /// After all is settled and read: every member of every object has the same.
    fn compare_replicas(&self) -> Result<(), String> {
        let view = self.latest();
        for index in 0..super::guest::OBJECTS {
            let object = ObjectId { volume: self.volume, index: ObjectIndex(index) };
            let key = LayerKey { object, layer: Layer(0) };
            let slot = view
                .slot(object.slot(), usize::from(self.copies), usize::from(self.min_copies))
                .map_err(|w| format!("{object} waits after the end: {w:?}"))?;
            let images: Vec<_> = slot
                .members
                .iter()
                .map(|d| self.nodes[self.disk_index(d)].store.image(key))
                .collect();
            if let Some(other) = images.iter().find(|i| **i != images[0]) {
                return Err(format!(
                    "replicas of {object} differ: {} and {}",
                    images[0].version, other.version
                ));
            }
        }
        Ok(())
    }
}
