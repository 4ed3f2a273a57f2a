//! The disks of this node, and how calls to them are carried out.

use crate::cluster::{Cluster, lock};
use crate::peers::Peers;
use crate::pool::Pool;
use crate::recovery::Pacer;
use sheepdog_cluster::message::{Body, Call, Failure, Reject, Reply, Request};
use sheepdog_cluster::replica::admit;
use sheepdog_store::{BlocksRead, Payload, ReadError, Store, WriteError};
use sheepdog_types::{BLOCK_SIZE, DiskId, LayerKey, Version, WriterGen};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Instant;
use tokio::sync::Notify;

mod copies;
mod give;
mod recover;
#[cfg(test)]
mod tests;

use copies::Copies;
pub use recover::{Copy, Moved};

/// A disk of this node.
#[derive(Debug)]
pub struct Disk {
    /// Its id.
    pub id: DiskId,
    /// Its directory.
    pub path: PathBuf,
    /// Its store.
    pub store: Store,
    /// Notified when a change was refused for want of space.
    pub refused: Notify,
    /// Held shared by each write from before it is admitted until it is done. A write may wait in the store
    /// for the checkpoint, for seconds: a fence waits for those admitted before it (I4).
    writing: RwLock<()>,
}

impl Disk {
    /// A disk of this node.
    #[must_use]
    pub fn new(id: DiskId, path: PathBuf, store: Store) -> Self {
        Self { id, path, store, refused: Notify::new(), writing: RwLock::default() }
    }

    fn write_failure(&self, error: &WriteError) -> Failure {
        match error {
            WriteError::Behind { have } => Failure::Behind { have: *have },
            WriteError::Checksum { block } => Failure::Checksum { block: *block },
            WriteError::NoSpace => {
                self.refused.notify_one();
                Failure::NoSpace
            }
            WriteError::Failed(_)
            | WriteError::Invalid(_)
            | WriteError::Frozen { .. }
            | WriteError::Damaged { .. } => {
                tracing::error!(disk = %self.id, %error, "a write failed");
                Failure::Disk
            }
        }
    }
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

/// Takes the answer of a call that was not answered at once. Called on any thread.
pub type Later = Box<dyn FnOnce(Answer) + Send>;

/// The disks of this node. See the [module](self).
pub struct Replica {
    cluster: Arc<Cluster>,
    /// Replaced as a whole when a disk comes or goes.
    disks: RwLock<Arc<BTreeMap<DiskId, Arc<Disk>>>>,
    /// Copies from peers: these jobs wait for the network.
    copying: Pool,
    copies: Copies,
    /// Reads whole layers and listings for peers: these never wait for the network, so that two
    /// nodes that copy from each other cannot block each other.
    serving: Pool,
    /// Reads layers for the background recovery of peers: slower when this node's volumes feel it. One
    /// thread, so that it is a step at a time.
    giving: Pool,
    pacer: Pacer,
    peers: Mutex<Weak<Peers>>,
}

impl Replica {
    /// The disks of this node.
    ///
    /// # Errors
    /// If no threads can be made.
    pub fn new(cluster: Arc<Cluster>, disks: Vec<Disk>) -> std::io::Result<Arc<Self>> {
        let pacer = Pacer::new(Arc::clone(&cluster.clients));
        Ok(Arc::new(Self {
            cluster,
            disks: RwLock::new(Arc::new(
                disks.into_iter().map(|disk| (disk.id, Arc::new(disk))).collect(),
            )),
            copying: Pool::new("copy", 2, 256)?,
            copies: Copies::default(),
            serving: Pool::new("serve", 2, 1024)?,
            giving: Pool::new("give", 1, 1024)?,
            pacer,
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
        let disk = self.disk(call.disk);
        let is_write = matches!(call.request, Request::Write { .. });
        let _writing = disk.as_ref().filter(|_| is_write).map(|disk| shared(&disk.writing));
        let view = self.cluster.view();
        let may_serve = self.cluster.may_serve(&view);
        if let Err(reject) = admit(&view, self.cluster.node, may_serve, call) {
            return Some(reject.into());
        }
        let Some(disk) = &disk else {
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
                self.copies.give_up(call.disk, *key);
                let version = disk.store.stat(*key).map_or(Version::NONE, |s| s.version);
                Some(Reply::Version { version }.into())
            }
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
                let ticket = self.copies.ask(call.disk, *key);
                let answer = self.hand_over(&self.copying, call, ticket, later());
                if answer.is_some() {
                    self.copies.forget(call.disk, *key, ticket);
                }
                answer
            }
            Request::Fetch { .. } | Request::Sums { .. } | Request::FetchBlocks { .. }
                if call.writer == WriterGen(0) =>
            {
                self.give(call, later())
            }
            Request::Fetch { .. }
            | Request::Sums { .. }
            | Request::FetchBlocks { .. }
            | Request::Fence { .. }
            | Request::Digests { .. }
            | Request::List { .. } => self.hand_over(&self.serving, call, 0, later()),
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

    /// Nobody waits for the answer but a background recovery.
    fn give(self: &Arc<Self>, call: &Call, later: Later) -> Option<Answer> {
        let (replica, call, asked) = (Arc::clone(self), call.clone(), Instant::now());
        let job = Box::new(move || {
            replica.pacer.give(asked, || later(replica.execute_slowly(&call, 0)));
        });
        if self.giving.submit(job) { None } else { Some(Failure::Busy.into()) }
    }

    fn execute_slowly(&self, call: &Call, ticket: u64) -> Answer {
        let Some(disk) = &self.disk(call.disk) else { return Reject::NotMember.into() };
        match &call.request {
            Request::Recover { key, expect, from, target } => {
                let copy = Copy { key: *key, expect: *expect, from: *from, target: *target };
                let outcome = self.recover(disk, copy, call.epoch, Some((ticket, call.writer)));
                self.copies.forget(disk.id, *key, ticket);
                match outcome {
                    Ok(_) => Reply::Done.into(),
                    Err(failure) => failure.into(),
                }
            }
            Request::Fence { .. } => {
                // It was admitted, so the log knows this writer: no older one is admitted any more.
                drop(disk.writing.write().unwrap_or_else(PoisonError::into_inner));
                Reply::Done.into()
            }
            Request::Digests { policy, slots } => {
                give::digests(disk, &self.cluster.view(), *policy, slots)
            }
            Request::List { holder, from, to, after } => {
                let view = self.cluster.view();
                give::list(disk, &view, *holder, (*from, *to), *after)
            }
            request => give::layer(disk, request),
        }
    }
}

fn shared(lock: &RwLock<()>) -> RwLockReadGuard<'_, ()> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
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
        Body::Nothing => Payload::Nothing,
    };
    match disk.store.write(key, prev, version, first, payload) {
        Ok(_) => Reply::Done.into(),
        Err(error) => disk.write_failure(&error).into(),
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
