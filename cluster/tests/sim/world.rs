//! The cluster, the loop that drives it, and what has to be true at the end.

use super::checker::Checker;
use super::guest::Guest;
use super::log::Log;
use super::migration::Migration;
use super::net::{Job, Net, Port, Straggler};
use super::node::{Disk, Node, PURGE_EVERY};
use super::rng::Rng;
use super::store::Store;
use super::topology::{FaultPlan, Topology, random_copies};
use super::trace::Trace;
use sheepdog_cluster::command::{Ack, Command, Outcome, VolumeSpec};
use sheepdog_cluster::gateway::Gateway;
use sheepdog_cluster::view::View;
use sheepdog_types::{
    ClusterId, Completion, DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Op, Sink,
    VolumeId, WriterGen,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// Steps of 10 ms.
pub type Time = u64;

/// Steps with faults, unless said otherwise.
pub const FAULT_STEPS: Time = 1500;
/// Steps within which a cluster without faults has to have settled.
pub const CALM_STEPS: Time = 12_000;

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
    /// Gateways take for settled what an earlier one had in flight: replicas that differ in that count as equal.
    WatermarkTooHigh,
    /// Nobody looks for what an earlier gateway left different in objects that are never used again.
    NoReconcile,
    /// A recovery answers that it is done, and did nothing.
    RecoverNothing,
    /// A disk says that it is synced, and copied nothing.
    SyncNothing,
    /// A replica answers reads without looking at checksums.
    ReadDamaged,
    /// Nodes serve without a lease.
    NoSelfFence,
    /// Gateways believe every replica that is up, whatever it missed.
    ServeIncomplete,
    /// Nodes keep what was deleted while they were away.
    ForgetDelete,
    /// A write counts when as few replicas as the volume can live with have it.
    AckAtMinCopies,
    /// A new placement counts before its disks have the data.
    PromoteEarly,
    /// A disk says that it is synced, and did not make durable what it copied.
    SyncedWithoutFlush,
    /// A new leader takes the leases that others granted for ended.
    ForgetLeases,
    /// A gateway that was fenced answers writes that it has not finished.
    FencedAnswers,
}

impl Mutant {
    pub const ALL: [Self; 18] = [
        Self::SkipEpoch,
        Self::SkipPrev,
        Self::AckBeforeApply,
        Self::FlushLies,
        Self::NotFenced,
        Self::WatermarkTooHigh,
        Self::NoReconcile,
        Self::RecoverNothing,
        Self::SyncNothing,
        Self::ReadDamaged,
        Self::NoSelfFence,
        Self::ServeIncomplete,
        Self::ForgetDelete,
        Self::AckAtMinCopies,
        Self::PromoteEarly,
        Self::SyncedWithoutFlush,
        Self::ForgetLeases,
        Self::FencedAnswers,
    ];
}

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub seed: u64,
    pub mutant: Mutant,
    /// Nodes to begin with; drawn from 5 to 12 if not said.
    pub nodes: Option<usize>,
    /// Steps with faults.
    pub steps: Time,
    /// Keeps a trace.
    pub trace: bool,
    /// Prints it while the run goes on.
    pub live: bool,
    /// What nobody reads has to become equal as well.
    pub untouched: bool,
}

impl Options {
    pub fn seed(seed: u64) -> Self {
        let (nodes, steps) = (None, FAULT_STEPS);
        let (trace, live, untouched) = (false, false, false);
        Self { seed, mutant: Mutant::None, nodes, steps, trace, live, untouched }
    }
}

/// How a run went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub steps: u64,
    pub requests: u64,
    pub epochs: u64,
    pub crashes: u64,
    pub takeovers: u64,
    /// Volumes that another node took over with what was in flight.
    pub handed_over: u64,
    /// Requests that were carried out again after that.
    pub returned: u64,
    pub recovered: u64,
    pub synced: u64,
}

impl Stats {
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.requests += other.requests;
        self.epochs += other.epochs;
        self.crashes += other.crashes;
        self.takeovers += other.takeovers;
        self.handed_over += other.handed_over;
        self.returned += other.returned;
        self.recovered += other.recovered;
        self.synced += other.synced;
    }
}

/// What went wrong in a run.
#[derive(Clone, Debug)]
pub struct Failure {
    pub problem: String,
    pub trace: Vec<String>,
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

/// A gateway that was made for an attachment; it may long be a zombie.
pub struct Instance {
    pub gateway: Gateway,
    /// Index of its volume.
    pub volume: usize,
    pub node: usize,
    pub ports: Vec<Port>,
    pub inbox: Arc<Inbox>,
    /// Its process is there.
    pub alive: bool,
    pub view_at: usize,
    /// It hears nothing of the log until then.
    pub deaf_until: Time,
    /// Requests that wait for the lease.
    pub held: Vec<(Op, u64)>,
    /// It has answered a request.
    pub useful: bool,
    /// It gave the volume back and has no guest any more: it knows some objects as never written, and would
    /// answer reads of them without asking anybody.
    pub detached: bool,
    /// Requests of a zombie's guest that began after another gateway served.
    pub forbidden: BTreeSet<u64>,
    /// The gateway that acknowledges too early: who had which write.
    pub spread: BTreeMap<(LayerKey, u64), usize>,
}

/// A volume and what its guest saw.
pub struct Volume {
    pub id: VolumeId,
    pub name: String,
    pub copies: u8,
    pub min_copies: u8,
    pub size: u64,
    pub guest: Guest,
    pub checker: Checker,
    /// The instance that serves it, or will.
    pub active: Option<usize>,
    /// Node, its incarnation, writer, and the view that has the attachment.
    pub attaching: Option<(usize, u64, WriterGen, usize)>,
    pub migration: Migration,
    /// No further attempt to attach before.
    pub retry_at: Time,
    /// Its guest is to stop, and it is to be deleted.
    pub doomed: bool,
    pub deleted: bool,
}

pub struct World {
    pub options: Options,
    pub rng: Rng,
    pub now: Time,
    pub mutant: Mutant,
    pub topology: Topology,
    pub plan: FaultPlan,
    pub trace: Trace,
    pub log: Log,
    pub net: Net,
    pub nodes: Vec<Node>,
    pub disks: Vec<Disk>,
    pub instances: Vec<Instance>,
    pub volumes: Vec<Volume>,
    pub jobs: Vec<Job>,
    pub stragglers: Vec<Straggler>,
    /// Guests make random requests, and volumes are attached by themselves.
    pub guests: bool,
    /// Dead nodes start again by themselves.
    pub restarts: bool,
    /// No more faults.
    pub calm: bool,
    /// A disk lost what was not flushed, and not all disks are complete again.
    pub tainted: bool,
    /// More than that went wrong meanwhile: acknowledged writes may be lost unless they were flushed.
    pub doubled: bool,
    /// When it was so the last time.
    pub doubled_at: Option<Time>,
    /// When a disk that holds an object refused a change of it for want of space the last time.
    pub full_at: Option<Time>,
    /// Since when disks have been down.
    pub down_since: std::collections::BTreeMap<DiskId, Time>,
    /// When the last block rotted.
    pub rotted: Time,
    pub trouble: Option<String>,
    pub stats: Stats,
    pub traffic: Traffic,
    pub count_traffic: bool,
    /// Disks do not synchronise themselves for now.
    pub syncs_held: bool,
    /// What a read of a script has to return.
    pub expected: Option<(usize, u64, Vec<u8>)>,
}

/// Bytes of messages that concern the cluster and not the guests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    pub commands: u64,
    pub sync: u64,
}

/// Runs one seed.
///
/// # Errors
/// What was violated, when, and the trace if one was wanted.
pub fn run(options: Options) -> Result<(Stats, Vec<String>), Failure> {
    let mut world = World::random(options);
    match world.go() {
        Ok(stats) => Ok((stats, world.trace.lines)),
        Err(e) => {
            let policies: Vec<_> = world.volumes.iter().map(|v| (v.copies, v.min_copies)).collect();
            let problem = format!(
                "{e}\n  at t={} of seed {} ({} nodes, {} disks, copies {policies:?}, {:?})",
                world.now,
                options.seed,
                world.nodes.len(),
                world.disks.len(),
                world.plan,
            );
            note!(world, "FAILED {e}");
            Err(Failure { problem, trace: world.trace.lines })
        }
    }
}

impl World {
    /// A founded cluster of nodes that are all in, without volumes or faults.
    pub fn new(options: Options, topology: Topology, plan: FaultPlan, rng: Rng) -> Self {
        let (on, live) = (options.trace || options.live, options.live);
        let mut world = Self {
            options,
            rng,
            now: 0,
            mutant: options.mutant,
            topology,
            plan,
            trace: Trace { on, live, lines: Vec::new() },
            log: Log::default(),
            net: Net::default(),
            nodes: Vec::new(),
            disks: Vec::new(),
            instances: Vec::new(),
            volumes: Vec::new(),
            jobs: Vec::new(),
            stragglers: Vec::new(),
            guests: false,
            restarts: false,
            calm: false,
            tainted: false,
            doubled: false,
            doubled_at: None,
            full_at: None,
            down_since: BTreeMap::new(),
            rotted: 0,
            trouble: None,
            stats: Stats::default(),
            traffic: Traffic::default(),
            count_traffic: false,
            syncs_held: false,
            expected: None,
        };
        world.found();
        world
    }

    fn random(options: Options) -> Self {
        let mut rng = Rng::new(options.seed);
        let topology = Topology::random(&mut rng, options.nodes);
        let plan = FaultPlan::random(&mut rng);
        let mut world = Self::new(options, topology, plan, rng);
        for _ in 0..world.rng.range(1, 3) {
            let (copies, min_copies) = random_copies(&mut world.rng);
            world.create_volume(copies, min_copies);
        }
        (world.guests, world.restarts) = (true, true);
        world
    }

    fn found(&mut self) {
        self.commit(Command::Found { cluster: ClusterId(1) }).unwrap();
        self.log.views.push(super::topology::build_view(&self.log.state, None, true));
        for at in 0..self.topology.nodes {
            let (zone, disks) = (self.topology.zone(at), self.topology.disks(at));
            self.add_node(zone, disks);
            // The members of the first epoch are agreed one by one; their ring is placed once.
            let command = self.enter_command(at);
            self.log.state.apply(command).unwrap();
        }
        self.log.views[0] = super::topology::build_view(&self.log.state, None, true);
        for at in 0..self.nodes.len() {
            self.nodes[at].lease_until = self.nodes[at].clock(self.now) + super::node::LEASE;
        }
        self.log.leader = Some(self.voters().start);
    }

    /// Creates a volume, with its guest.
    pub fn create_volume(&mut self, copies: u8, min_copies: u8) -> Option<usize> {
        let name = format!("v{}", self.volumes.len() + 1);
        let size = super::guest::SIZE;
        self.create_named(&name, size, copies, min_copies)
    }

    pub fn create_named(&mut self, name: &str, size: u64, copies: u8, min: u8) -> Option<usize> {
        let spec = VolumeSpec { name: name.into(), size, copies, min_copies: min, ack: Ack::Flush };
        let Ok(Outcome::Created { volume }) = self.commit(Command::CreateVolume { spec, at: 0 })
        else {
            return None;
        };
        let mut checker = Checker::default();
        let guest = Guest::new(&mut self.rng, &mut checker, size);
        self.volumes.push(Volume {
            id: volume,
            name: name.into(),
            copies,
            min_copies: min,
            size,
            guest,
            checker,
            active: None,
            attaching: None,
            migration: Migration::default(),
            retry_at: 0,
            doomed: false,
            deleted: false,
        });
        Some(self.volumes.len() - 1)
    }

    pub fn latest(&self) -> Arc<View> {
        Arc::clone(&self.log.views[self.log.views.len() - 1])
    }

    pub fn view_of(&self, node: usize) -> &Arc<View> {
        &self.log.views[self.nodes[node].applied]
    }

    pub fn node_index(&self, id: NodeId) -> usize {
        id.0 as usize - 1
    }

    pub fn disk_index(&self, disk: DiskId) -> usize {
        disk.0 as usize - 101
    }

    /// Authorities may have changed: what was lost may show now.
    pub fn after_change(&mut self) {
        if self.doubled {
            self.doubled_at = Some(self.now);
            for volume in &mut self.volumes {
                volume.checker.lose(self.now);
            }
        }
    }

    /// A disk loses what was not synced. Once is survived by everything acknowledged, if all other
    /// copies were there.
    pub fn taint(&mut self) {
        self.doubled |= self.tainted || !self.all_well();
        self.tainted = true;
        self.after_change();
    }

    /// Something else fails. On top of a loss it is too much.
    pub fn strain(&mut self) {
        self.doubled |= self.tainted;
        self.after_change();
    }

    fn go(&mut self) -> Result<Stats, String> {
        while self.now < self.options.steps {
            self.step()?;
        }
        self.finish()?;
        self.stats.steps = self.now;
        self.stats.epochs = self.log.state.epoch.0;
        self.stats.requests = self.volumes.iter().map(|v| v.guest.issued()).sum();
        self.stats.recovered = self.instances.iter().map(|i| i.gateway.counters().recovered).sum();
        Ok(self.stats)
    }

    /// Faults end. Everything has to come to rest, whole and equal, and to survive the loss of all
    /// power after a flush.
    pub fn finish(&mut self) -> Result<(), String> {
        note!(self, "faults end");
        self.heal_all();
        self.settle()?;
        // After a takeover nobody has to read anything for that. While the gateway lives, an unflushed write that
        // crashes left on one replica only is there until the object is used next: so not all seeds pass.
        if self.options.untouched {
            self.compare_versions()?;
        }
        self.final_reads()?;
        self.compare_replicas()?;
        // The first one may have to say that earlier writes are lost.
        for _ in 0..2 {
            self.flush_all();
            self.settle()?;
        }
        self.lose_all_power(true, false);
        self.settle()?;
        self.final_reads()?;
        self.compare_replicas()?;
        // A volume may have been deleted a moment ago.
        self.advance(PURGE_EVERY)?;
        self.check_deleted()
    }

    fn final_reads(&mut self) -> Result<(), String> {
        self.read_all();
        self.settle()
    }

    /// Goes on until nothing is left to do.
    pub fn settle(&mut self) -> Result<(), String> {
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

    fn volume_settled(&self, volume: &Volume) -> bool {
        let serving = volume.active.is_some_and(|at| {
            let instance = &self.instances[at];
            let gateway = &instance.gateway;
            gateway.is_settled() && gateway.is_idle() && instance.held.is_empty()
        });
        volume.deleted || (serving && volume.checker.idle())
    }

    fn is_settled(&self) -> bool {
        let last = self.log.views.len() - 1;
        self.complete()
            && self
                .nodes
                .iter()
                .enumerate()
                .all(|(at, n)| n.gone || self.serves(at) && n.applied == last)
            && self.volumes.iter().all(|v| self.volume_settled(v))
            && self.jobs.is_empty()
            && self.stragglers.is_empty()
            && self.log.proposals.is_empty()
    }

    /// All disks hold what they must, as far as the log knows.
    pub fn complete(&self) -> bool {
        self.log.state.next_ring.is_none()
            && self.log.state.nodes.values().all(|n| !n.draining)
            && self.log.state.disks.values().all(|d| !d.retiring)
            && self.disks.iter().all(|d| d.gone || self.log.state.disk_up(d.id))
            && self
                .log
                .state
                .disks
                .values()
                .all(|d| d.missed_since.is_none() && !d.restarted && d.sync_from.is_none())
    }

    /// Every node serves, and every disk is complete.
    pub fn all_well(&self) -> bool {
        self.complete()
            && self.disks.iter().all(|d| d.gone || d.used)
            && (0..self.nodes.len()).all(|at| self.nodes[at].gone || self.serves(at))
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += 1;
        if self.tainted && self.now.is_multiple_of(4) && self.all_well() {
            note!(self, "all disks are complete again");
            self.tainted = false;
            self.doubled = false;
        }
        if self.doubled {
            self.doubled_at = Some(self.now);
        }
        self.run_log();
        self.deliver_messages();
        self.run_jobs();
        if !self.calm {
            self.run_faults();
        }
        self.run_nodes();
        self.run_disks();
        self.run_syncs();
        self.manage_attachments();
        self.run_migrations();
        self.run_guests();
        for at in 0..self.instances.len() {
            self.run_instance(at);
        }
        self.trouble.take().map_or(Ok(()), Err)
    }

    /// Runs for some steps; for scenarios.
    pub fn advance(&mut self, steps: Time) -> Result<(), String> {
        (0..steps).try_for_each(|_| self.step())
    }

    /// After all disks came back and are synced: nothing is left of what was deleted.
    fn check_deleted(&self) -> Result<(), String> {
        for disk in &self.disks {
            for key in disk.store.listing().keys() {
                if !self.log.state.volumes.contains_key(&key.object.volume) {
                    return Err(format!("disk {} still has {key} of a deleted volume", disk.id.0));
                }
            }
        }
        Ok(())
    }

    /// After all is settled and read: every member of every object has the same.
    pub fn compare_replicas(&self) -> Result<(), String> {
        self.compare_members(|store, key| store.image(key))
    }

    /// After all is settled: every member of every object has the same version.
    fn compare_versions(&self) -> Result<(), String> {
        self.compare_members(Store::version)
    }

    fn compare_members<T: PartialEq>(
        &self,
        of: impl Fn(&Store, LayerKey) -> T,
    ) -> Result<(), String> {
        let view = self.latest();
        for volume in self.volumes.iter().filter(|v| !v.deleted) {
            for index in 0..volume.size.div_ceil(sheepdog_types::OBJECT_SIZE) {
                let object = ObjectId { volume: volume.id, index: ObjectIndex(index as u32) };
                let key = LayerKey { object, layer: Layer(0) };
                let slot = view
                    .slot(object.slot(), usize::from(volume.copies), usize::from(volume.min_copies))
                    .map_err(|w| format!("{object} waits after the end: {w:?}"))?;
                let stores =
                    || slot.members.iter().map(|d| (d, &self.disks[self.disk_index(d)].store));
                let found: Vec<T> = stores().map(|(_, store)| of(store, key)).collect();
                if found.iter().any(|other| *other != found[0]) {
                    let versions: Vec<_> = stores().map(|(d, s)| (d.0, s.version(key))).collect();
                    return Err(format!("replicas of {object} differ: {versions:?}"));
                }
            }
        }
        Ok(())
    }

    pub fn describe(&self) -> String {
        let mut text = format!(
            "leader {:?}, {} jobs, {} stragglers, {} proposals, next ring {}",
            self.log.leader,
            self.jobs.len(),
            self.stragglers.len(),
            self.log.proposals.len(),
            self.log.state.next_ring.is_some()
        );
        for (at, n) in self.nodes.iter().enumerate() {
            let disks: Vec<String> = n
                .disks
                .iter()
                .map(|d| {
                    let disk = &self.disks[*d];
                    format!(
                        "\n    disk {} {:?} sync {:?} failed {} [{}]",
                        disk.id.0,
                        self.log.state.disks.get(&disk.id),
                        disk.sync.as_ref().map(super::sync::Sync::describe),
                        disk.failed,
                        disk.store.describe()
                    )
                })
                .collect();
            text += &format!(
                "\n  n{} alive {} serves {} applied {}/{}{}",
                at + 1,
                n.alive,
                self.serves(at),
                n.applied,
                self.log.views.len() - 1,
                disks.concat()
            );
        }
        for v in &self.volumes {
            let gateway = v.active.map(|a| {
                let i = &self.instances[a];
                format!(
                    "n{} {:?} idle {} settled {} held {} tick {} blocked {}",
                    i.node + 1,
                    i.gateway.phase(),
                    i.gateway.is_idle(),
                    i.gateway.is_settled(),
                    i.held.len(),
                    i.gateway.wants_tick(),
                    i.gateway.blocked_objects()
                )
            });
            text += &format!(
                "\n  {} {}/{} deleted {} running {} gateway {gateway:?} attaching {:?}",
                v.name,
                v.copies,
                v.min_copies,
                v.deleted,
                v.checker.running(),
                v.attaching
            );
        }
        text
    }
}
