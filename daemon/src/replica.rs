//! The disks of this node, and how calls to them are carried out.

use crate::cluster::{Cluster, lock};
use crate::peers::Peers;
use crate::pool::Pool;
use sheepdog_cluster::message::{Body, Call, Failure, MAX_LISTING, Reject, Reply, Request, Run};
use sheepdog_cluster::replica::admit;
use sheepdog_cluster::view::View;
use sheepdog_store::{
    BlockRange, BlockRun, BlockState, BlocksRead, LayerImage, LayerSums, Payload, ReadError, Store,
    WriteError,
};
use sheepdog_types::{BLOCK_SIZE, DiskId, Epoch, LayerKey, SlotId, Version};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

/// Tries of a recovery while the views of the two nodes differ.
const FETCH_TRIES: usize = 50;
const FETCH_PAUSE: Duration = Duration::from_millis(20);

/// A disk of this node.
#[derive(Debug)]
pub struct Disk {
    /// Its id.
    pub id: DiskId,
    /// Its directory.
    pub path: PathBuf,
    /// Its store.
    pub store: Store,
}

/// The answer to a call, with the blocks it carries.
#[derive(Debug)]
pub struct Answer {
    /// The head.
    pub reply: Reply,
    /// Checksums of the blocks.
    pub crcs: Vec<u32>,
    /// The blocks.
    pub data: Vec<u8>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self { reply, crcs: Vec::new(), data: Vec::new() }
    }
}

impl From<Failure> for Answer {
    fn from(failure: Failure) -> Self {
        Reply::Failed(failure).into()
    }
}

impl From<Reject> for Answer {
    fn from(reject: Reject) -> Self {
        Reply::Rejected(reject).into()
    }
}

/// What to copy from where.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// The layer.
    pub key: LayerKey,
    /// Its version here.
    pub expect: Version,
    /// The disk to copy from.
    pub from: DiskId,
    /// The version there; none means that the layer has to go here.
    pub target: Version,
}

/// Takes the answer of a call that was not answered at once. Called on any thread.
pub type Later = Box<dyn FnOnce(Answer) + Send>;

/// The disks of this node. See the [module](self).
pub struct Replica {
    cluster: Arc<Cluster>,
    /// Replaced as a whole when a disk comes or goes.
    disks: RwLock<Arc<BTreeMap<DiskId, Arc<Disk>>>>,
    /// Copies from peers: these jobs wait for the network.
    copying: Pool,
    /// Copies that were asked for and not given up, by disk and layer.
    copies: Mutex<HashMap<(DiskId, LayerKey), u64>>,
    copy_count: AtomicU64,
    /// Reads whole layers and listings for peers: these never wait for the network, so that two
    /// nodes that copy from each other cannot block each other.
    serving: Pool,
    peers: Mutex<Weak<Peers>>,
}

impl Replica {
    /// The disks of this node.
    ///
    /// # Errors
    /// If no threads can be made.
    pub fn new(cluster: Arc<Cluster>, disks: Vec<Disk>) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            cluster,
            disks: RwLock::new(Arc::new(
                disks.into_iter().map(|disk| (disk.id, Arc::new(disk))).collect(),
            )),
            copying: Pool::new("copy", 2, 256)?,
            copies: Mutex::default(),
            copy_count: AtomicU64::new(0),
            serving: Pool::new("serve", 2, 1024)?,
            peers: Mutex::new(Weak::new()),
        }))
    }

    /// Sets whom recoveries copy from.
    pub fn set_peers(&self, peers: &Arc<Peers>) {
        *lock(&self.peers) = Arc::downgrade(peers);
    }

    /// The disks there are now.
    #[must_use]
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        let disks = self.disks.read().unwrap_or_else(PoisonError::into_inner);
        disks.values().cloned().collect()
    }

    /// The disk with this id.
    #[must_use]
    pub fn disk(&self, id: DiskId) -> Option<Arc<Disk>> {
        self.disks.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Takes a disk into service: calls to it are carried out from now on.
    pub fn insert(&self, disk: Arc<Disk>) {
        let mut disks = self.disks.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut disks).insert(disk.id, disk);
    }

    /// Takes a disk out of service: calls to it are rejected from now on. Calls under way go on.
    pub fn remove(&self, id: DiskId) -> Option<Arc<Disk>> {
        let mut disks = self.disks.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut disks).remove(&id)
    }

    /// Carries out a call: gives the answer at once, or calls what `later` makes when it is done.
    /// `crcs` and `data` are the blocks that the call carries.
    pub fn execute(
        self: &Arc<Self>,
        call: &Call,
        crcs: &[u32],
        data: &[u8],
        later: impl FnOnce() -> Later,
    ) -> Option<Answer> {
        let view = self.cluster.view();
        let may_serve = self.cluster.may_serve(&view);
        if let Err(reject) = admit(&view, self.cluster.node, may_serve, call) {
            return Some(reject.into());
        }
        let Some(disk) = &self.disk(call.disk) else {
            return Some(Reject::NotMember.into());
        };
        match &call.request {
            Request::Write { key, prev, version, first, body } => {
                Some(write(disk, *key, *prev, *version, *first, *body, crcs, data))
            }
            Request::Read { object, layer, first, count } => {
                let key = LayerKey { object: *object, layer: *layer };
                read(disk, key, *first, *count, later)
            }
            Request::Stat { key } => {
                // A gateway that asks is about to decide anew what this layer has to be.
                lock(&self.copies).remove(&(call.disk, *key));
                let version = disk.store.stat(*key).map_or(Version::NONE, |s| s.version);
                Some(Reply::Version { version }.into())
            }
            Request::Fence { .. } => Some(Reply::Done.into()), // admitted: the log knows this writer
            Request::Flush => {
                let later = later();
                disk.store.flush(Box::new(move |result| match result {
                    Ok(()) => later(Reply::Done.into()),
                    Err(error) => {
                        tracing::error!(%error, "flush failed");
                        later(Failure::Disk.into());
                    }
                }));
                None
            }
            Request::Recover { key, .. } => {
                let ticket = self.copy_count.fetch_add(1, Ordering::Relaxed);
                lock(&self.copies).insert((call.disk, *key), ticket);
                self.hand_over(&self.copying, call, ticket, later())
            }
            Request::Fetch { .. } | Request::List { .. } => {
                self.hand_over(&self.serving, call, 0, later())
            }
        }
    }

    fn hand_over(
        self: &Arc<Self>,
        pool: &Pool,
        call: &Call,
        ticket: u64,
        later: Later,
    ) -> Option<Answer> {
        let (replica, call) = (Arc::clone(self), call.clone());
        let job = Box::new(move || {
            let answer = replica.execute_slowly(&call, ticket);
            later(answer);
        });
        if pool.submit(job) { None } else { Some(Failure::Busy.into()) }
    }

    fn execute_slowly(&self, call: &Call, ticket: u64) -> Answer {
        let Some(disk) = &self.disk(call.disk) else { return Reject::NotMember.into() };
        match &call.request {
            Request::Recover { key, expect, from, target } => {
                let copy = Copy { key: *key, expect: *expect, from: *from, target: *target };
                let outcome = self.recover(disk, copy, call.epoch, Some(ticket));
                let mut copies = lock(&self.copies);
                if copies.get(&(disk.id, *key)) == Some(&ticket) {
                    copies.remove(&(disk.id, *key));
                }
                match outcome {
                    Ok(_) => Reply::Done.into(),
                    Err(failure) => failure.into(),
                }
            }
            Request::Fetch { key } => fetch(disk, *key),
            Request::List { holder, from, to, after } => {
                let view = self.cluster.view();
                list(disk, &view, *holder, (*from, *to), *after)
            }
            _ => Reject::Malformed.into(),
        }
    }

    /// Makes a layer equal to another disk's, if it still is at the expected version here and the
    /// epoch has not ended. A gateway's call has a `ticket` that a later call makes void, and wants
    /// exactly the target version; without one, a newer version is as good. False when the layer
    /// moved on meanwhile.
    ///
    /// # Errors
    /// [`Failure`]; the layer is as it was.
    pub fn recover(
        &self,
        disk: &Disk,
        copy: Copy,
        epoch: Epoch,
        ticket: Option<u64>,
    ) -> Result<bool, Failure> {
        let exact = ticket.is_some();
        let Copy { key, expect, from, target } = copy;
        if from == disk.id {
            return Err(Failure::Source);
        }
        let image = self.fetch_image(key, from, epoch)?;
        let version = image.sums.version;
        // Held while the copy is put in place: whoever gives it up waits for that.
        let copies = lock(&self.copies);
        let void = ticket.is_some() && copies.get(&(disk.id, key)).copied() != ticket;
        if void
            || version < target
            || (exact && version != target)
            || !self.cluster.may_serve(&self.cluster.view())
            || self.cluster.view().epoch != epoch
        {
            return Err(Failure::Source);
        }
        let expected = (expect != Version::NONE).then_some(expect);
        let outcome = match expected {
            Some(expected) if version == Version::NONE => disk.store.delete_at(key, expected),
            None if version == Version::NONE => Ok(true),
            expected => disk.store.install(key, expected, &image),
        };
        match outcome {
            Ok(true) => Ok(true),
            Ok(false) if exact => {
                let have = disk.store.stat(key).map_or(Version::NONE, |s| s.version);
                // A repeated call finds its work done.
                if have == target { Ok(true) } else { Err(Failure::Behind { have }) }
            }
            Ok(false) => Ok(false),
            Err(error) => Err(write_failure(&error)),
        }
    }

    fn fetch_image(
        &self,
        key: LayerKey,
        from: DiskId,
        epoch: Epoch,
    ) -> Result<LayerImage, Failure> {
        for _ in 0..FETCH_TRIES {
            let view = self.cluster.view();
            if view.epoch != epoch {
                return Err(Failure::Source);
            }
            let node = view.node_of(from).ok_or(Failure::Source)?;
            let answer = if node == self.cluster.node {
                let source = self.disk(from).ok_or(Failure::Source)?;
                fetch(&source, key)
            } else {
                let peers = lock(&self.peers).upgrade().ok_or(Failure::Source)?;
                let request = Request::Fetch { key };
                peers.ask(&view, from, request).map_err(|_| Failure::Source)?
            };
            match answer.reply {
                Reply::Image { version, runs } => {
                    return image(version, &runs, answer.crcs, answer.data).ok_or(Failure::Source);
                }
                Reply::Rejected(_) | Reply::Failed(Failure::Busy) => {
                    self.wait_for_view(view.revision);
                }
                reply => {
                    tracing::warn!(%key, disk = %from, ?reply, "cannot copy from this replica");
                    return Err(Failure::Source);
                }
            }
        }
        Err(Failure::Source)
    }

    /// The two ends are in different epochs: one of them is about to hear of the newer.
    fn wait_for_view(&self, revision: u64) {
        if self.cluster.view().revision == revision {
            std::thread::sleep(FETCH_PAUSE);
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "the fields of one call, on the hot path")]
fn write(
    disk: &Disk,
    key: LayerKey,
    prev: Version,
    version: Version,
    first: u16,
    body: Body,
    crcs: &[u32],
    data: &[u8],
) -> Answer {
    let payload = match body {
        Body::Data { .. } => Payload::Data { bytes: data, crcs },
        // The base layer of a volume without a parent: nothing older to hide.
        Body::Zero { count, release } => Payload::Zero { count, absent: release, release },
    };
    match disk.store.write(key, prev, version, first, payload) {
        Ok(_) => Reply::Done.into(),
        Err(error) => write_failure(&error).into(),
    }
}

fn write_failure(error: &WriteError) -> Failure {
    match error {
        WriteError::Behind { have } => Failure::Behind { have: *have },
        WriteError::Checksum { block } => Failure::Checksum { block: *block },
        WriteError::NoSpace => Failure::NoSpace,
        WriteError::Failed(_)
        | WriteError::Invalid(_)
        | WriteError::Frozen { .. }
        | WriteError::Damaged { .. } => {
            tracing::error!(%error, "a write failed");
            Failure::Disk
        }
    }
}

/// Answers at once from the page cache, else when the disk has.
fn read(
    disk: &Arc<Disk>,
    key: LayerKey,
    first: u16,
    count: u16,
    later: impl FnOnce() -> Later,
) -> Option<Answer> {
    let mut data = vec![0; usize::from(count) * BLOCK_SIZE];
    let mut crcs = vec![0; usize::from(count)];
    let layers = [key.layer];
    match disk.store.try_read(key.object, &layers, first, &mut data, &mut crcs) {
        Ok(Some(_)) => Some(Answer { reply: Reply::Data { count }, crcs, data }),
        Err(error) => Some(read_failure(disk.id, key, &error).into()),
        Ok(None) => {
            let (later, id) = (later(), disk.id);
            let done = Box::new(move |read: Result<BlocksRead, ReadError>| {
                later(match read {
                    Ok(BlocksRead { data, crcs, .. }) => {
                        Answer { reply: Reply::Data { count }, crcs, data }
                    }
                    Err(error) => read_failure(id, key, &error).into(),
                });
            });
            disk.store.read_later(key.object, &layers, first, count, done);
            None
        }
    }
}

fn read_failure(disk: DiskId, key: LayerKey, error: &ReadError) -> Failure {
    tracing::error!(%key, %disk, %error, "a read failed");
    match error {
        ReadError::Checksum { block, .. } => Failure::Checksum { block: *block },
        ReadError::Io { .. } | ReadError::Invalid(_) => Failure::Disk,
    }
}

fn fetch(disk: &Disk, key: LayerKey) -> Answer {
    match disk.store.image(key) {
        Ok(Some(image)) => {
            let runs = image.sums.runs.iter().map(|run| Run {
                first: run.range.first(),
                count: run.range.count(),
                zero: run.state == BlockState::Zero,
            });
            let reply = Reply::Image { version: image.sums.version, runs: runs.collect() };
            Answer { reply, crcs: image.sums.crcs, data: image.data }
        }
        Ok(None) => Reply::Image { version: Version::NONE, runs: Vec::new() }.into(),
        Err(error) => read_failure(disk.id, key, &error).into(),
    }
}

fn image(version: Version, runs: &[Run], crcs: Vec<u32>, data: Vec<u8>) -> Option<LayerImage> {
    let run = |r: &Run| {
        let range = BlockRange::new(r.first, usize::from(r.count))?;
        let state = if r.zero { BlockState::Zero } else { BlockState::Data };
        Some(BlockRun { range, state })
    };
    let runs = runs.iter().map(run).collect::<Option<Vec<_>>>()?;
    Some(LayerImage { sums: LayerSums { version, runs, crcs }, data })
}

/// The layers of `disk` in a window of slots that `holder` has to have too.
fn list(
    disk: &Disk,
    view: &View,
    holder: DiskId,
    (from, to): (SlotId, SlotId),
    after: Option<LayerKey>,
) -> Answer {
    let mut layers = Vec::new();
    for slot in from.0..=to.0 {
        let mut stats = disk.store.list(SlotId(slot));
        stats.sort_unstable_by_key(|s| s.key);
        for stat in stats {
            let is_new = slot != from.0 || after.is_none_or(|key| stat.key > key);
            let wanted = view
                .volumes
                .get(&stat.key.object.volume)
                .is_some_and(|v| view.is_member(SlotId(slot), usize::from(v.spec.copies), holder));
            if is_new && wanted {
                if layers.len() == MAX_LISTING {
                    return Reply::Listing { layers, more: true }.into();
                }
                layers.push((stat.key, stat.version));
            }
        }
    }
    Reply::Listing { layers, more: false }.into()
}
