//! The database file of a node: votes, log entries and the snapshot, in redb.
//!
//! One thread does all the writing, so that no task ever waits in an fsync, writes keep the
//! order in which they were asked for, and what queues up behind one fsync shares the next.
//!
//! ```text
//! table meta      "format" → FORMAT, "node" → node id, "vote", "committed", "purged"
//! table log       index → entry
//! table snapshot  "meta" → what it covers, "data" → the state machine's bytes
//! ```
//!
//! Every value is preceded by its CRC-32C (4 bytes, little endian); the rest is postcard, but for
//! the snapshot's data, which is stored as it is.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, mpsc};
use std::thread::JoinHandle;

use openraft::entry::RaftEntry;
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, TableError, TableHandle,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use super::OpenError;
use super::types::{Entry, LogId, SnapshotMeta, Vote};

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
const SNAPSHOT: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshot");

/// Name and version of the layout above.
pub const FORMAT: &str = "sheepdog cluster log 1";
/// The file's name in the node's directory.
const FILE: &str = "log.redb";
/// redb's page cache. The live part of the log is far smaller than the default of 1 GiB.
const CACHE_BYTES: usize = 8 << 20;
/// How many queued writes share one transaction.
const MAX_BATCH: usize = 256;

/// A write to be done by the writer thread.
#[derive(Debug)]
pub enum Write {
    /// Log entries, encoded; consecutive, in order.
    Append(Vec<(u64, Vec<u8>)>),
    /// The vote.
    Vote(Vote),
    /// The committed position. It is only a hint for the next start and not synced by itself.
    Committed(Option<LogId>),
    /// Removes the entries from this index on.
    Truncate(u64),
    /// Removes the entries up to this one, inclusive.
    Purge(LogId),
    /// Replaces the snapshot.
    Snapshot(SnapshotMeta, Vec<u8>),
}

/// Told the outcome of a write, also when the writer dies before it gets there.
pub struct Done(Option<Box<dyn FnOnce(io::Result<()>) + Send>>);

impl Done {
    pub fn new(done: impl FnOnce(io::Result<()>) + Send + 'static) -> Self {
        Self(Some(Box::new(done)))
    }

    fn complete(mut self, result: io::Result<()>) {
        if let Some(done) = self.0.take() {
            done(result);
        }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(Err(closed()));
        }
    }
}

/// What readers see beside the file.
#[derive(Debug, Default)]
struct Cached {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    /// Entries that were appended and are not yet in the file.
    pending: BTreeMap<u64, Entry>,
}

/// The writer thread, and the way to it.
type Writer = (mpsc::Sender<(Write, Done)>, JoinHandle<()>);

/// The open database. Cheap to share; closed by [`Db::close`] or with its last owner.
pub struct Db {
    path: PathBuf,
    /// `None` once closed.
    file: Arc<RwLock<Option<Database>>>,
    cached: Arc<Mutex<Cached>>,
    /// `None` once closed.
    writer: Mutex<Option<Writer>>,
}

impl Db {
    /// Opens the database of `node` in `dir`, or creates an empty one there.
    pub fn open(dir: &Path, node: u64) -> Result<Self, OpenError> {
        let path = dir.join(FILE);
        // redb checks what it reads from a corrupt file in most places, not in all.
        let opened = catch_unwind(AssertUnwindSafe(|| open_file(&path, node)));
        let (file, cached) = opened.unwrap_or_else(|_| {
            Err(OpenError::Corrupt {
                path: path.clone(),
                why: "the database's structure is damaged".into(),
            })
        })?;
        let file = Arc::new(RwLock::new(Some(file)));
        let cached = Arc::new(Mutex::new(cached));
        let (sender, receiver) = mpsc::channel();
        let writer = {
            let (file, cached) = (file.clone(), cached.clone());
            std::thread::Builder::new()
                .name("log-writer".into())
                .spawn(move || run_writer(&receiver, &file, &cached))
        };
        let writer = writer.map_err(|source| OpenError::Io { path: path.clone(), source })?;
        Ok(Self { path, file, cached, writer: Mutex::new(Some((sender, writer))) })
    }

    /// Queues a write behind all earlier ones; `done` is told when it is in the file.
    pub fn submit(&self, write: Write, done: Done) {
        let writer = lock(&self.writer);
        if let Some((sender, _)) = writer.as_ref() {
            // A writer that is gone drops `done`, which reports it.
            let _ = sender.send((write, done));
        }
    }

    /// Writes and waits until it is in the file.
    pub async fn write(&self, write: Write) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        self.submit(
            write,
            Done::new(move |result| {
                let _ = sender.send(result);
            }),
        );
        receiver.await.unwrap_or_else(|_| Err(closed()))
    }

    /// Makes entries readable at once and queues their write.
    pub fn append(&self, entries: Vec<Entry>, done: Done) -> io::Result<()> {
        let mut encoded = Vec::with_capacity(entries.len());
        for entry in &entries {
            encoded.push((entry.index(), seal(entry)?));
        }
        lock(&self.cached).pending.extend(entries.into_iter().map(|entry| (entry.index(), entry)));
        self.submit(Write::Append(encoded), done);
        Ok(())
    }

    /// The entries of `range`, in order; after the first, no more than `max_bytes` of them.
    pub fn entries(&self, range: Range<u64>, max_bytes: usize) -> io::Result<Vec<Entry>> {
        if range.start >= range.end {
            return Ok(Vec::new());
        }
        let file = self.file.read().map_err(|_| closed())?;
        let file = file.as_ref().ok_or_else(closed)?;
        // The transaction begins under the lock: an entry leaves `pending` only after it is in
        // the file, so it is seen in one of the two.
        let (read, pending) = {
            let cached = lock(&self.cached);
            let pending: Vec<Entry> =
                cached.pending.range(range.clone()).map(|(_, entry)| entry.clone()).collect();
            (file.begin_read().map_err(failed)?, pending)
        };
        let stored_end = pending.first().map_or(range.end, RaftEntry::index);
        let mut entries: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        let table = read.open_table(LOG).map_err(failed)?;
        for item in table.range(range.start..stored_end).map_err(failed)? {
            let (index, value) = item.map_err(failed)?;
            bytes += value.value().len();
            if bytes > max_bytes && !entries.is_empty() {
                return Ok(entries);
            }
            let entry: Entry = unseal(value.value())?;
            if entry.index() != index.value() {
                return Err(damaged("an entry stands at another's index"));
            }
            entries.push(entry);
        }
        for entry in pending {
            bytes += approximate_size(&entry);
            if bytes > max_bytes && !entries.is_empty() {
                break;
            }
            entries.push(entry);
        }
        check_consecutive(&entries)?;
        Ok(entries)
    }

    /// The last stored entry's position, or else that of the last purged one.
    pub fn last_log_id(&self) -> io::Result<Option<LogId>> {
        let file = self.file.read().map_err(|_| closed())?;
        let file = file.as_ref().ok_or_else(closed)?;
        let cached = lock(&self.cached);
        if let Some(entry) = cached.pending.values().next_back() {
            return Ok(Some(entry.log_id()));
        }
        let read = file.begin_read().map_err(failed)?;
        let table = read.open_table(LOG).map_err(failed)?;
        match table.last().map_err(failed)? {
            Some((_, value)) => Ok(Some(unseal::<Entry>(value.value())?.log_id())),
            None => Ok(cached.purged),
        }
    }

    /// The vote in the file.
    pub fn vote(&self) -> Option<Vote> {
        lock(&self.cached).vote
    }

    /// The committed position, as last given to [`Write::Committed`].
    pub fn committed(&self) -> Option<LogId> {
        lock(&self.cached).committed
    }

    /// Remembers the committed position; it reaches the disk with the next synced write.
    pub fn set_committed(&self, committed: Option<LogId>) {
        lock(&self.cached).committed = committed;
        self.submit(Write::Committed(committed), Done(None));
    }

    /// The last purged position.
    pub fn purged(&self) -> Option<LogId> {
        lock(&self.cached).purged
    }

    /// The snapshot, if there is one.
    pub fn snapshot(&self) -> io::Result<Option<(SnapshotMeta, Vec<u8>)>> {
        let file = self.file.read().map_err(|_| closed())?;
        let file = file.as_ref().ok_or_else(closed)?;
        let read = file.begin_read().map_err(failed)?;
        let table = read.open_table(SNAPSHOT).map_err(failed)?;
        let Some(meta) = table.get("meta").map_err(failed)? else {
            return Ok(None);
        };
        let Some(data) = table.get("data").map_err(failed)? else {
            return Err(damaged("the snapshot has no data"));
        };
        Ok(Some((unseal(meta.value())?, check_crc(data.value())?.to_vec())))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Finishes all queued writes and closes the file, so that it can be opened again. Blocks.
    pub fn close(&self) {
        let writer = lock(&self.writer).take();
        if let Some((sender, thread)) = writer {
            drop(sender);
            // A writer that panicked has reported its writes as failed.
            let _ = thread.join();
        }
        if let Ok(mut file) = self.file.write() {
            file.take();
        }
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        self.close();
    }
}

/// A poisoned lock guards plain values that are valid at every step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn open_file(path: &Path, node: u64) -> Result<(Database, Cached), OpenError> {
    let corrupt = |why: String| OpenError::Corrupt { path: path.to_owned(), why };
    let file = Database::builder()
        .set_cache_size(CACHE_BYTES)
        .set_check_integrity_on_open(true)
        .create(path)
        .map_err(|error| open_error(path, error))?;
    let write = file.begin_write().map_err(|error| corrupt(error.to_string()))?;
    let cached = prepare(&write, path, node)?;
    write
        .commit()
        .map_err(|error| OpenError::Io { path: path.to_owned(), source: failed(error) })?;
    Ok((file, cached))
}

/// Creates what is missing in a new file, and checks that a used one is this node's.
fn prepare(write: &redb::WriteTransaction, path: &Path, node: u64) -> Result<Cached, OpenError> {
    let corrupt =
        |error: io::Error| OpenError::Corrupt { path: path.to_owned(), why: error.to_string() };
    let tables = write.list_tables().map_err(|error| corrupt(failed(error)))?;
    let tables: Vec<String> = tables.map(|table| table.name().to_owned()).collect();
    let mut meta = write.open_table(META).map_err(|e| table_error(path, &e))?;
    if tables.is_empty() {
        put(&mut meta, "format", &FORMAT).map_err(corrupt)?;
        put(&mut meta, "node", &node).map_err(corrupt)?;
    }
    let format: Option<String> = get(&meta, "format").map_err(corrupt)?;
    if format.as_deref() != Some(FORMAT) {
        return Err(OpenError::Foreign {
            path: path.to_owned(),
            found: format.unwrap_or_else(|| tables.join(", ")),
        });
    }
    let found = get(&meta, "node").map_err(corrupt)?.unwrap_or(0);
    if found != node {
        return Err(OpenError::WrongNode { path: path.to_owned(), found, expected: node });
    }
    write.open_table(LOG).map_err(|e| table_error(path, &e))?;
    let snapshot = write.open_table(SNAPSHOT);
    snapshot.map_err(|e| table_error(path, &e))?;
    Ok(Cached {
        vote: get(&meta, "vote").map_err(corrupt)?,
        committed: get(&meta, "committed").map_err(corrupt)?.flatten(),
        purged: get(&meta, "purged").map_err(corrupt)?,
        pending: BTreeMap::new(),
    })
}

fn open_error(path: &Path, error: redb::DatabaseError) -> OpenError {
    use redb::{DatabaseError, StorageError};
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen => OpenError::Locked { path },
        DatabaseError::Storage(StorageError::Io(source))
            if source.kind() == io::ErrorKind::InvalidData =>
        {
            OpenError::Corrupt { path, why: source.to_string() }
        }
        DatabaseError::Storage(StorageError::Io(source)) => OpenError::Io { path, source },
        other => OpenError::Corrupt { path, why: other.to_string() },
    }
}

fn table_error(path: &Path, error: &TableError) -> OpenError {
    match error {
        TableError::Storage(error) => {
            OpenError::Corrupt { path: path.to_owned(), why: error.to_string() }
        }
        other => OpenError::Foreign { path: path.to_owned(), found: other.to_string() },
    }
}

fn run_writer(
    queue: &mpsc::Receiver<(Write, Done)>,
    file: &RwLock<Option<Database>>,
    cached: &Mutex<Cached>,
) {
    while let Ok(first) = queue.recv() {
        let batch: Vec<_> =
            std::iter::once(first).chain(queue.try_iter().take(MAX_BATCH - 1)).collect();
        let (writes, dones): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        let result = match file.read().as_deref() {
            Ok(Some(file)) => commit(file, &writes),
            _ => Err(closed()),
        };
        if let Err(error) = &result {
            tracing::error!(%error, "the cluster log cannot be written; this node stops taking part in it");
        } else {
            publish(&writes, &mut lock(cached));
        }
        for done in dones {
            // `io::Error` cannot be cloned.
            done.complete(match &result {
                Ok(()) => Ok(()),
                Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
            });
        }
    }
}

/// Does the writes in order, in one transaction.
fn commit(file: &Database, writes: &[Write]) -> io::Result<()> {
    let mut transaction = file.begin_write().map_err(failed)?;
    let only_hints = writes.iter().all(|write| matches!(write, Write::Committed(_)));
    if only_hints {
        transaction.set_durability(Durability::None).map_err(failed)?;
    }
    {
        let mut meta = transaction.open_table(META).map_err(failed)?;
        let mut log = transaction.open_table(LOG).map_err(failed)?;
        for write in writes {
            match write {
                Write::Append(entries) => {
                    for (index, entry) in entries {
                        log.insert(index, entry.as_slice()).map_err(failed)?;
                    }
                }
                Write::Vote(vote) => put(&mut meta, "vote", vote)?,
                Write::Committed(committed) => put(&mut meta, "committed", committed)?,
                Write::Truncate(from) => log.retain_in(*from.., |_, _| false).map_err(failed)?,
                Write::Purge(upto) => {
                    log.retain_in(..=upto.index, |_, _| false).map_err(failed)?;
                    put(&mut meta, "purged", upto)?;
                }
                Write::Snapshot(covers, data) => {
                    let mut table = transaction.open_table(SNAPSHOT).map_err(failed)?;
                    put(&mut table, "meta", covers)?;
                    table.insert("data", with_crc(data.clone()).as_slice()).map_err(failed)?;
                }
            }
        }
    }
    transaction.commit().map_err(failed)
}

/// Makes visible what is now in the file.
fn publish(writes: &[Write], cached: &mut Cached) {
    for write in writes {
        match write {
            Write::Append(entries) => {
                for (index, _) in entries {
                    cached.pending.remove(index);
                }
            }
            Write::Vote(vote) => cached.vote = Some(*vote),
            Write::Purge(upto) => cached.purged = cached.purged.max(Some(*upto)),
            Write::Committed(_) | Write::Truncate(_) | Write::Snapshot(..) => {}
        }
    }
}

fn put<T: Serialize>(
    table: &mut redb::Table<'_, &'static str, &'static [u8]>,
    key: &str,
    value: &T,
) -> io::Result<()> {
    table.insert(key, seal(value)?.as_slice()).map_err(failed)?;
    Ok(())
}

fn get<T: DeserializeOwned>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &str,
) -> io::Result<Option<T>> {
    match table.get(key).map_err(failed)? {
        Some(value) => Ok(Some(unseal(value.value())?)),
        None => Ok(None),
    }
}

fn seal<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_stdvec(value).map_err(io::Error::other)?;
    Ok(with_crc(bytes))
}

fn unseal<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    postcard::from_bytes(check_crc(bytes)?).map_err(|error| damaged(&error.to_string()))
}

fn with_crc(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&bytes).to_le_bytes();
    bytes.splice(0..0, crc);
    bytes
}

fn check_crc(bytes: &[u8]) -> io::Result<&[u8]> {
    match bytes.split_first_chunk::<4>() {
        Some((crc, body)) if u32::from_le_bytes(*crc) == crc32c::crc32c(body) => Ok(body),
        _ => Err(damaged("wrong checksum")),
    }
}

fn check_consecutive(entries: &[Entry]) -> io::Result<()> {
    let gap = entries.windows(2).find(|pair| pair[1].index() != pair[0].index() + 1);
    match gap {
        None => Ok(()),
        Some(pair) => Err(damaged(&format!(
            "entries {} to {} are missing",
            pair[0].index() + 1,
            pair[1].index() - 1
        ))),
    }
}

fn approximate_size(entry: &Entry) -> usize {
    const OVERHEAD: usize = 64;
    match &entry.payload {
        openraft::EntryPayload::Normal(command) => command.0.len() + OVERHEAD,
        _ => OVERHEAD,
    }
}

fn failed(error: impl Into<redb::Error>) -> io::Error {
    match error.into() {
        redb::Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

fn damaged(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the cluster log's database is damaged: {why}"),
    )
}

fn closed() -> io::Error {
    io::Error::other("the cluster log's database is closed")
}
