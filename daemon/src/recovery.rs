//! Runs the recovery of this node's disks ([`Recovery`]), repairs what scrubs and reads found
//! damaged, and compares complete disks with their peers now and then.

mod pacer;

use crate::cluster::lock;
use crate::node::{Node, now};
use crate::replica::{Copy, Disk, Later, Moved};
pub use pacer::{Clients, Pacer};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::message::{Call, Failure, Reply};
use sheepdog_cluster::recovery::{Action, Effect, Local, Progress, Recovery, Stage};
use sheepdog_cluster::view::View;
use sheepdog_types::{BLOCK_SIZE, DiskId, Epoch, LayerKey, OBJECT_SIZE, SlotId, Version};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::time::{sleep, sleep_until, timeout};

/// How often a recovery that waits for something passing is looked at again.
const TICK: Duration = Duration::from_millis(200);
/// How often damaged blocks are looked for, and a full disk for space.
const TEND: Duration = Duration::from_secs(5);
/// How often a complete disk is compared with its peers.
const CHECK: Duration = Duration::from_secs(3600);
/// Rates are measured over this time.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// How often a step that waits for bandwidth looks whether there is more by now.
const LIMIT_AGAIN: Duration = Duration::from_millis(500);
/// A disk that was full takes part again when this share of it is free, and this many bytes: for want
/// of one object's worth it left.
const ROOM: u64 = 20;
const LEAST_ROOM: u64 = 64 << 20;
/// Why a full disk is out of service.
const FULL: &str = "it is full and lacks data; free space, or add disks";
/// How long the agreed state may take to say what was just proposed.
const APPLY: Duration = Duration::from_secs(5);

/// The recovery of all disks of this node.
pub struct Recoveries {
    pacer: Pacer,
    disks: Mutex<BTreeMap<DiskId, Arc<Entry>>>,
}

/// How far the recovery of a disk is.
#[derive(Clone, Debug)]
pub struct DiskProgress {
    /// The disk.
    pub disk: DiskId,
    /// What the recovery says of itself.
    pub progress: Progress,
    /// What this pass has moved.
    pub moved: Moved,
    /// Bytes moved per second, lately.
    pub bytes_per_second: u64,
    /// Seconds until it is done, as far as that can be told.
    pub eta_seconds: Option<u64>,
    /// The disk has no room for what it should hold, so it was taken out of service.
    pub full: bool,
}

struct Entry {
    disk: Arc<Disk>,
    machine: Mutex<Recovery>,
    /// An effect is done.
    wake: Notify,
    meter: Mutex<Meter>,
}

/// What moved, and when.
#[derive(Debug)]
struct Meter {
    moved: Moved,
    recent: VecDeque<(Instant, u64)>,
    /// When copying began, and the slots that were done then.
    copying: Option<(Instant, u64)>,
    /// Bytes that moved faster than the operator's bandwidth allows, as of a moment.
    ahead: (f64, Instant),
    full: bool,
}

impl Meter {
    fn new() -> Self {
        Self {
            moved: Moved::default(),
            recent: VecDeque::new(),
            copying: None,
            ahead: (0.0, Instant::now()),
            full: false,
        }
    }

    /// Begins a step, unless it has to wait so long; [`Meter::end`] has to follow. What it may move counts from now
    /// on, so that steps side by side do not all begin on what is left for one.
    fn begin(&mut self, bandwidth: u64, now: Instant) -> Option<Duration> {
        let wait = self.wait(bandwidth, now);
        if wait.is_zero() {
            self.ahead.0 += OBJECT_SIZE as f64;
        }
        (!wait.is_zero()).then_some(wait)
    }

    fn end(&mut self, moved: Moved, now: Instant) {
        self.moved += moved;
        self.recent.push_back((now, moved.bytes));
        self.forget_old(now);
        self.ahead.0 = (self.ahead.0 + moved.bytes as f64 - OBJECT_SIZE as f64).max(0.0);
    }

    /// How long the next step has to wait at `bandwidth` bytes per second, 0 for any. An operator may change that
    /// at any time, so ask again now and then.
    fn wait(&mut self, bandwidth: u64, now: Instant) -> Duration {
        let (ahead, at) = self.ahead;
        let paid = now.saturating_duration_since(at).as_secs_f64() * bandwidth as f64;
        let ahead = if bandwidth == 0 { 0.0 } else { (ahead - paid).max(0.0) };
        self.ahead = (ahead, now);
        Duration::try_from_secs_f64(ahead / bandwidth.max(1) as f64).unwrap_or(Duration::MAX)
    }

    fn forget_old(&mut self, now: Instant) {
        while self.recent.front().is_some_and(|(at, _)| now - *at > RATE_WINDOW) {
            self.recent.pop_front();
        }
    }

    fn rate(&mut self) -> u64 {
        self.forget_old(Instant::now());
        let bytes: u64 = self.recent.iter().map(|(_, bytes)| bytes).sum();
        let since = self.recent.front().map_or(RATE_WINDOW, |(at, _)| at.elapsed());
        (bytes as f64 / since.as_secs_f64().max(0.5)) as u64
    }

    /// Notes where the recovery is; gives the seconds that are left.
    fn estimate(&mut self, progress: &Progress) -> Option<u64> {
        if progress.stage != Stage::Copying {
            self.copying = None;
            return None;
        }
        let (began, before) =
            *self.copying.get_or_insert_with(|| (Instant::now(), progress.slots_done));
        let done = progress.slots_done.saturating_sub(before);
        let left = progress.slots_total.saturating_sub(progress.slots_done);
        (done > 0).then(|| (began.elapsed().as_secs_f64() * left as f64 / done as f64) as u64)
    }
}

struct LocalDisk<'a>(&'a Disk);

impl Local for LocalDisk<'_> {
    fn layers(&self, slot: SlotId) -> Vec<(LayerKey, Version)> {
        self.0.store.list(slot).into_iter().map(|stat| (stat.key, stat.version)).collect()
    }

    fn keys(&self) -> Vec<LayerKey> {
        let mut keys = Vec::new();
        self.0.store.list_all(|_, layers| keys.extend(layers.iter().map(|stat| stat.key)));
        keys
    }
}

impl Recoveries {
    /// Recoveries that let these clients go first.
    #[must_use]
    pub fn new(clients: Arc<Clients>) -> Self {
        Self { pacer: Pacer::new(clients), disks: Mutex::default() }
    }

    /// How far each disk is.
    #[must_use]
    pub fn progress(&self) -> Vec<DiskProgress> {
        let entries: Vec<Arc<Entry>> = lock(&self.disks).values().cloned().collect();
        let describe = |entry: Arc<Entry>| {
            let progress = lock(&entry.machine).progress().clone();
            let mut meter = lock(&entry.meter);
            DiskProgress {
                disk: entry.disk.id,
                moved: meter.moved,
                bytes_per_second: meter.rate(),
                eta_seconds: meter.estimate(&progress),
                full: meter.full,
                progress,
            }
        };
        entries.into_iter().map(describe).collect()
    }

    /// Lets go of a disk.
    pub fn forget(&self, disk: DiskId) {
        lock(&self.disks).remove(&disk);
    }

    /// Why a disk was taken out of service although it works, if it was.
    #[must_use]
    pub fn out_of_service(&self, disk: DiskId) -> Option<String> {
        let entry = lock(&self.disks).get(&disk).cloned()?;
        let full = lock(&entry.meter).full;
        full.then(|| FULL.to_owned())
    }
}

/// Recovers the disks of this node whenever the agreed state says that they need it.
pub async fn run(node: Arc<Node>) {
    let mut changes = node.cluster.changes(); // a disk that comes or goes is agreed
    loop {
        changes.borrow_and_update();
        let disks: Vec<Arc<Disk>> = node.replica.disks();
        {
            let mut known = lock(&node.recoveries.disks);
            known.retain(|_, entry| disks.iter().any(|disk| Arc::ptr_eq(disk, &entry.disk)));
            for disk in disks {
                known.entry(disk.id).or_insert_with(|| {
                    let machine = Recovery::new(node.cluster.node, disk.id, node.cluster.view());
                    let entry = Arc::new(Entry {
                        disk,
                        machine: Mutex::new(machine),
                        wake: Notify::new(),
                        meter: Mutex::new(Meter::new()),
                    });
                    crate::tasks::until_stop(&node, |node| drive(node, Arc::clone(&entry)));
                    entry
                });
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Runs the recovery of one disk until the node has it no more.
async fn drive(node: Arc<Node>, entry: Arc<Entry>) {
    let mut changes = node.cluster.changes();
    let mut tend_at = tokio::time::Instant::now() + TEND;
    // Not all disks at once.
    let spread = CHECK.mul_f64((entry.disk.id.0 % 1000) as f64 / 1000.0);
    let mut check_at = tokio::time::Instant::now() + spread;
    while node.replica.disk(entry.disk.id).is_some_and(|disk| Arc::ptr_eq(&disk, &entry.disk)) {
        changes.borrow_and_update();
        let may_act = work(&node, &entry);
        let wants_tick = !may_act || lock(&entry.machine).wants_tick();
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = entry.wake.notified() => {}
            () = sleep(TICK), if wants_tick => lock(&entry.machine).handle_tick(),
            () = sleep_until(tend_at) => {
                tend(&node, &entry).await;
                tend_at = tokio::time::Instant::now() + TEND;
            }
            () = entry.disk.refused.notified() => mind_space(&node, &entry, true).await,
            () = sleep_until(check_at) => {
                lock(&entry.machine).check();
                check_at = tokio::time::Instant::now() + CHECK;
            }
        }
    }
}

/// Begins all that can be done now. False while this node may not act at all.
fn work(node: &Arc<Node>, entry: &Arc<Entry>) -> bool {
    let view = node.cluster.view();
    if !node.cluster.may_serve(&view) {
        return false;
    }
    // Digests of all slots take some milliseconds.
    let effects = tokio::task::block_in_place(|| {
        let mut machine = lock(&entry.machine);
        let was = machine.progress().stage;
        machine.handle_view(view);
        let local = LocalDisk(&entry.disk);
        let effects: Vec<Effect> = std::iter::from_fn(|| machine.poll_effect(&local)).collect();
        if was == Stage::Idle && machine.progress().stage != Stage::Idle {
            let full = lock(&entry.meter).full;
            *lock(&entry.meter) = Meter { full, ..Meter::new() };
        }
        let view = Arc::clone(machine.view());
        effects.into_iter().map(|effect| (effect, Arc::clone(&view))).collect::<Vec<_>>()
    });
    for (effect, view) in effects {
        let (node, entry) = (Arc::clone(node), Arc::clone(entry));
        tokio::spawn(async move {
            let mut stopping = node.stopping.subscribe();
            tokio::select! {
                () = carry_out(&node, &entry, effect, &view) => entry.wake.notify_one(),
                _ = stopping.wait_for(|stop| *stop) => {}
            }
        });
    }
    true
}

async fn carry_out(node: &Arc<Node>, entry: &Arc<Entry>, effect: Effect, view: &Arc<View>) {
    match effect {
        Effect::Call { id, call, .. } => {
            let (asker, view) = (Arc::clone(node), Arc::clone(view));
            let reply = tokio::task::spawn_blocking(move || ask(&asker, &view, call)).await;
            lock(&entry.machine).handle_reply(id, reply.ok().flatten());
        }
        Effect::Act { id, action } => {
            let outcome = step(node, entry, action, view).await;
            lock(&entry.machine).handle_done(id, outcome);
        }
        Effect::Finish { id, command } => {
            let outcome = finish(node, entry, command).await;
            lock(&entry.machine).handle_done(id, outcome);
        }
    }
}

fn ask(node: &Node, view: &View, call: Call) -> Option<Reply> {
    if view.node_of(call.disk) == Some(node.cluster.node) {
        let (sender, receiver) = mpsc::sync_channel(1);
        let later = || -> Later { Box::new(move |answer| _ = sender.try_send(answer)) };
        let answer = node.replica.execute(&call, &[], &[], later);
        return answer.or_else(|| receiver.recv().ok()).map(|answer| answer.reply);
    }
    match node.peers.ask(view, call.disk, call.request) {
        Ok(answer) => Some(answer.reply),
        Err(error) => {
            tracing::debug!(disk = %call.disk, %error, "no answer to a question of the recovery");
            None
        }
    }
}

/// One step on the disk, when clients and operator allow it.
async fn step(
    node: &Arc<Node>,
    entry: &Arc<Entry>,
    action: Action,
    view: &View,
) -> Result<(), Failure> {
    loop {
        let bandwidth = node.cluster.view().settings.recovery_max_bandwidth;
        let limit = lock(&entry.meter).begin(bandwidth, Instant::now());
        let Some(limit) = limit else { break };
        sleep(limit.min(LIMIT_AGAIN)).await;
    }
    while let Some(pause) = node.recoveries.pacer.begin(Instant::now()) {
        sleep(pause).await;
    }
    let (worker, disk, epoch) = (Arc::clone(node), Arc::clone(&entry.disk), view.epoch);
    let began = Instant::now();
    let outcome = tokio::task::spawn_blocking(move || act(&worker, &disk, epoch, action)).await;
    let ended = Instant::now();
    node.recoveries.pacer.end(ended, ended - began);
    let outcome = outcome.unwrap_or(Err(Failure::Disk));
    lock(&entry.meter).end(outcome.unwrap_or_default(), ended);
    outcome.map(drop)
}

fn act(node: &Node, disk: &Disk, epoch: Epoch, action: Action) -> Result<Moved, Failure> {
    match action {
        Action::Copy { key, expect, from, target } => {
            node.replica.recover(disk, Copy { key, expect, from, target }, epoch, None)
        }
        Action::Delete { key } => {
            let view = node.cluster.view();
            if view.epoch != epoch || !node.cluster.may_serve(&view) {
                return Err(Failure::Source);
            }
            let deleted = disk.store.delete(key);
            deleted.map(|_| Moved::default()).map_err(|error| {
                tracing::error!(%key, disk = %disk.id, %error, "cannot delete a layer");
                Failure::Disk
            })
        }
    }
}

async fn finish(
    node: &Arc<Node>,
    entry: &Arc<Entry>,
    command: Option<Command>,
) -> Result<(), Failure> {
    let disk = Arc::clone(&entry.disk);
    let flushed = tokio::task::spawn_blocking(move || disk.store.flush_wait()).await;
    if !matches!(flushed, Ok(Ok(()))) {
        return Err(Failure::Disk);
    }
    let (id, layers) = (entry.disk.id, lock(&entry.machine).progress().layers_done);
    let Some(Command::Synced { disk, incarnation, basis, .. }) = command else {
        if layers > 0 {
            tracing::warn!(disk = %id, layers, "differed from the other replicas and was made equal");
        }
        return Ok(());
    };
    let command = Command::Synced { disk, incarnation, basis, at: now() };
    let answer = node.propose(&command).await;
    if !matches!(answer, Ok(Ok(_))) {
        tracing::info!(disk = %id, ?answer, "cannot tell the cluster that the disk is complete");
        return Err(Failure::Source);
    }
    node.wait_for(APPLY, |state| {
        state.disks.get(&id).is_none_or(|d| d.sync_from.is_none_or(|from| from > basis))
    })
    .await;
    let Moved { blocks, .. } = lock(&entry.meter).moved;
    tracing::info!(disk = %id, layers, blocks, epoch = %basis, "the disk is synchronised");
    Ok(())
}

/// What needs a look now and then.
async fn tend(node: &Arc<Node>, entry: &Arc<Entry>) {
    mind_space(node, entry, false).await;
    let view = node.cluster.view();
    if !node.cluster.may_serve(&view) || entry.disk.store.failure().is_some() {
        return;
    }
    if view.is_up(entry.disk.id) && !entry.disk.store.damage().blocks.is_empty() {
        let (worker, disk) = (Arc::clone(node), Arc::clone(&entry.disk));
        let repair = tokio::task::spawn_blocking(move || repair(&worker, &disk, &view));
        let _ = timeout(CHECK, repair).await; // each step of it is bounded by itself
    }
}

/// A disk without room for what moves to it says so, and the move waits. One that lacks even what it
/// has to hold now would keep its objects waiting for ever: it leaves service. Both end when there is
/// room. `refused` says that a change just found none: guests may wait for what follows.
async fn mind_space(node: &Arc<Node>, entry: &Arc<Entry>, refused: bool) {
    let view = node.cluster.view();
    if !node.cluster.may_serve(&view) || entry.disk.store.failure().is_some() {
        return;
    }
    let id = entry.disk.id;
    let incarnation = node.cluster.incarnation();
    let lacks = {
        let machine = lock(&entry.machine);
        let current = machine.view().epoch == view.epoch; // or it tells of another placement
        current && machine.progress().problem == Some(Failure::NoSpace)
    };
    let usage = entry.disk.store.usage();
    let free = usage.capacity.saturating_sub(usage.used);
    let has_room = free >= LEAST_ROOM.max(usage.capacity / ROOM);
    let to_come = view.is_to_come(id);
    let full = |full| Command::DiskFull { disk: id, incarnation, full, at: now() };
    let command = match view.disks.get(&id) {
        Some(disk) if !disk.up => {
            if has_room && std::mem::take(&mut lock(&entry.meter).full) {
                tracing::info!(disk = %id, "the disk has room again and goes back into service");
            }
            return; // `membership` brings back what is down without a reason
        }
        Some(disk) if disk.full && has_room => full(false),
        Some(disk) if (lacks || refused) && !disk.full && to_come => {
            tracing::error!(disk = %id, "the disk has no room for what moves to it");
            full(true)
        }
        Some(disk) if lacks => {
            let (reason, entered) = (FULL.to_owned(), disk.entered);
            tracing::error!(disk = %id, reason, "the disk leaves service");
            lock(&entry.meter).full = true;
            Command::DiskDown { disk: id, incarnation, entered, reason, at: now() }
        }
        _ => {
            lock(&entry.meter).full = false;
            return;
        }
    };
    let answer = node.propose(&command).await;
    if let Err(problem) = answer.and_then(|answer| answer.map_err(|refusal| refusal.to_string())) {
        tracing::info!(disk = %id, problem, "cannot tell the cluster of a full disk");
    }
}

/// Repairs what is known to be damaged on a disk from replicas that lack nothing. Objects in use are
/// repaired by their gateways as well.
fn repair(node: &Node, disk: &Disk, view: &View) {
    let layers: BTreeSet<LayerKey> = disk.store.damage().blocks.iter().map(|b| b.key).collect();
    for key in layers {
        let Some(volume) = view.volumes.get(&key.object.volume) else { continue };
        let Some(version) = disk.store.stat(key).map(|stat| stat.version) else { continue };
        let home = view.home(key.object.slot(), usize::from(volume.spec.copies));
        let good = |d: &DiskId| {
            *d != disk.id
                && view.disks.get(d).is_some_and(|d| {
                    d.up && d.missed_since.is_none() && !d.restarted && d.sync_from.is_none()
                })
        };
        let repaired = home.iter().filter(good).any(|from| {
            match node.replica.repair(disk, key, from, version, view.epoch) {
                Ok(moved) => {
                    let bytes = moved.blocks * BLOCK_SIZE as u64;
                    tracing::warn!(%key, disk = %disk.id, %from, bytes, "repaired damaged blocks");
                    true
                }
                Err(failure) => {
                    tracing::debug!(%key, %from, %failure, "not repaired from this replica");
                    false
                }
            }
        });
        if !repaired {
            tracing::warn!(%key, disk = %disk.id, "no whole replica at the same version to repair from");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_bandwidth_counts_at_once() {
        let mut meter = Meter::new();
        let begin = meter.ahead.1;
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(meter.wait(1000, at(0)), Duration::ZERO);
        assert_eq!(meter.begin(1000, at(0)), None);
        meter.end(Moved { bytes: 100_000, ..Moved::default() }, at(0));
        assert_eq!(meter.wait(1000, at(0)), Duration::from_secs(100));
        assert_eq!(meter.wait(1000, at(40)), Duration::from_secs(60));
        assert_eq!(meter.wait(10_000, at(40)), Duration::from_secs(6));
        assert_eq!(meter.wait(10_000, at(43)), Duration::from_secs(3));
        assert_eq!(meter.wait(0, at(43)), Duration::ZERO);
        // Time without steps is not saved up.
        assert_eq!(meter.wait(1000, at(500)), Duration::ZERO);
        assert_eq!(meter.begin(1000, at(500)), None);
        meter.end(Moved { bytes: 1000, ..Moved::default() }, at(500));
        assert_eq!(meter.wait(1000, at(500)), Duration::from_secs(1));
    }

    #[test]
    fn steps_side_by_side_share_the_bandwidth() {
        const MOST: u64 = OBJECT_SIZE;
        let mut meter = Meter::new();
        let begin = meter.ahead.1;
        let at = |millis| begin + Duration::from_millis(millis);
        assert_eq!(meter.begin(MOST, at(0)), None);
        assert_eq!(meter.begin(MOST, at(0)), Some(Duration::from_secs(1)));
        // The first moved less than it might have.
        meter.end(Moved { bytes: MOST / 4, ..Moved::default() }, at(0));
        assert_eq!(meter.begin(MOST, at(0)), Some(Duration::from_millis(250)));
        assert_eq!(meter.begin(MOST, at(250)), None);
        // The second failed.
        assert_eq!(meter.begin(MOST, at(250)), Some(Duration::from_secs(1)));
        meter.end(Moved::default(), at(250));
        assert_eq!(meter.begin(MOST, at(250)), None);
        // Without a limit they do not wait for each other.
        assert_eq!((meter.begin(0, at(250)), meter.begin(0, at(250))), (None, None));
    }
}
