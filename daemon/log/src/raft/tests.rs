//! The store against openraft's own suite, damaged files, and the frames.

use std::sync::Mutex;

use openraft::entry::RaftEntry;
use openraft::raft::{AppendEntriesRequest, VoteRequest, VoteResponse};
use openraft::storage::RaftStateMachine;
use openraft::testing::common::{blank_ent, log_id};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{EntryPayload, StorageError};
use tempfile::TempDir;

use super::db::{Done, Write};
use super::types::{Entry, SnapshotMeta, Types, Vote};
use super::wire::{Envelope, Request, Response, decode, encode};
use super::*;
use crate::api::TransportError;

/// Remembers every command it was given, in order.
#[derive(Default)]
struct Journal(Mutex<Vec<Vec<u8>>>);

impl StateMachine for Journal {
    fn apply(&self, _index: u64, command: &[u8]) -> Result<Vec<u8>, String> {
        self.0.lock().unwrap().push(command.to_vec());
        Ok(Vec::new())
    }
    fn snapshot(&self) -> Vec<u8> {
        postcard::to_stdvec(&*self.0.lock().unwrap()).unwrap()
    }
    fn restore(&self, snapshot: &[u8]) -> Result<(), String> {
        let state = postcard::from_bytes(snapshot).map_err(|error| error.to_string())?;
        *self.0.lock().unwrap() = state;
        Ok(())
    }
}

struct Stores;

impl StoreBuilder<Types, LogStore, Machine, TempDir> for Stores {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine), StorageError<Types>> {
        let dir = tempfile::tempdir().unwrap();
        let db = Arc::new(Db::open(dir.path(), 1).unwrap());
        let machine = Machine::open(Arc::new(Journal::default()), db.clone()).unwrap();
        Ok((dir, LogStore(db), machine))
    }
}

#[tokio::test]
async fn the_store_passes_openrafts_suite() {
    Suite::test_all(Stores).await.unwrap();
}

fn command(index: u64, bytes: &[u8]) -> Entry {
    let payload = EntryPayload::Normal(Bytes(bytes.to_vec()));
    Entry::new(log_id::<Types>(1, 1, index), payload)
}

async fn append(db: &Db, entries: Vec<Entry>) {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let done = Done::new(move |result| sender.send(result).unwrap());
    db.append(entries, done).unwrap();
    receiver.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_was_written_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(dir.path(), 1).unwrap();
    let entries: Vec<_> = (0..10).map(|i| command(i, &[i as u8; 100])).collect();
    append(&db, entries.clone()).await;
    let vote = Vote::new_committed(7, 1);
    db.write(Write::Vote(vote)).await.unwrap();
    db.set_committed(Some(log_id::<Types>(1, 1, 6)));
    db.write(Write::Purge(log_id::<Types>(1, 1, 2))).await.unwrap();
    let meta =
        SnapshotMeta { last_log_id: Some(log_id::<Types>(1, 1, 4)), ..SnapshotMeta::default() };
    db.write(Write::Snapshot(meta.clone(), b"state".to_vec())).await.unwrap();
    db.close();
    let db = Db::open(dir.path(), 1).unwrap();
    assert_eq!(db.vote(), Some(vote));
    assert_eq!(db.committed(), Some(log_id::<Types>(1, 1, 6)));
    assert_eq!(db.purged(), Some(log_id::<Types>(1, 1, 2)));
    assert_eq!(db.entries(0..100, usize::MAX).unwrap(), entries[3..]);
    assert_eq!(db.last_log_id().unwrap(), Some(log_id::<Types>(1, 1, 9)));
    assert_eq!(db.snapshot().unwrap(), Some((meta, b"state".to_vec())));
}

#[tokio::test]
async fn entries_are_read_in_pieces_of_bounded_size_and_at_least_one() {
    let (_dir, store, _) = Stores.build().await.unwrap();
    let entries: Vec<_> = (0..10).map(|i| command(i, &[0; 1000])).collect();
    append(&store.0, entries).await;
    let count = |bytes| store.0.entries(2..9, bytes).unwrap().len();
    assert_eq!(count(1), 1);
    assert_eq!(count(3300), 3);
    assert_eq!(count(usize::MAX), 7);
}

#[tokio::test]
async fn entries_are_readable_before_they_are_in_the_file() {
    let (_dir, store, _) = Stores.build().await.unwrap();
    // A large write ahead of it keeps the writer busy while the entry is read.
    let busy = Write::Snapshot(SnapshotMeta::default(), vec![0; 16 << 20]);
    store.0.submit(busy, Done::new(|_| ()));
    let entry = command(0, b"x");
    store.0.append(vec![entry.clone()], Done::new(|_| ())).unwrap();
    assert_eq!(store.0.entries(0..1, usize::MAX).unwrap(), [entry]);
    assert_eq!(store.0.last_log_id().unwrap().index(), Some(0));
}

#[tokio::test]
async fn a_missing_entry_is_reported_as_damage() {
    let (_dir, store, _) = Stores.build().await.unwrap();
    append(&store.0, vec![command(0, b"a"), command(2, b"c")]).await;
    let error = store.0.entries(0..3, usize::MAX).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
}

#[tokio::test]
async fn a_closed_database_refuses_instead_of_hanging() {
    let (_dir, store, _) = Stores.build().await.unwrap();
    store.0.close();
    store.0.entries(0..1, usize::MAX).unwrap_err();
    let vote = Write::Vote(Vote::new(1, 1));
    store.0.write(vote).await.unwrap_err();
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_read_does_not_replace_the_stored_one() {
    let (_dir, store, mut machine) = Stores.build().await.unwrap();
    let good = postcard::to_stdvec(&vec![vec![1u8]]).unwrap();
    let meta =
        SnapshotMeta { last_log_id: Some(log_id::<Types>(1, 1, 4)), ..SnapshotMeta::default() };
    machine.install_snapshot(&meta, good.clone()).await.unwrap();
    let next = SnapshotMeta::default();
    machine.install_snapshot(&next, vec![0xff; 9]).await.unwrap_err();
    assert_eq!(store.0.snapshot().unwrap(), Some((meta, good)));
}

#[test]
fn an_open_database_is_reported_as_locked() {
    let dir = tempfile::tempdir().unwrap();
    let _db = Db::open(dir.path(), 1).unwrap();
    let error = Db::open(dir.path(), 1).err().unwrap();
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
}

#[test]
fn another_nodes_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Db::open(dir.path(), 1).unwrap());
    let error = Db::open(dir.path(), 2).err().unwrap();
    assert!(matches!(error, OpenError::WrongNode { found: 1, expected: 2, .. }), "{error}");
    // Refusing it has not claimed it.
    drop(Db::open(dir.path(), 1).unwrap());
}

#[test]
fn a_missing_directory_is_an_io_error() {
    let error = Db::open(Path::new("/nonexistent/dir"), 1).err().unwrap();
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
}

#[test]
fn a_file_of_something_else_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.redb");
    for length in [1, 100, 5000, 100_000] {
        let text = vec![b'x'; length];
        std::fs::write(&path, &text).unwrap();
        let error = Db::open(dir.path(), 1).err().unwrap();
        assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), text);
    }
}

#[test]
fn a_database_of_another_program_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let db = redb::Database::create(dir.path().join("log.redb")).unwrap();
    let write = db.begin_write().unwrap();
    let table = redb::TableDefinition::<u64, u64>::new("theirs");
    write.open_table(table).unwrap().insert(1, 1).unwrap();
    write.commit().unwrap();
    drop(db);
    let error = Db::open(dir.path(), 1).err().unwrap();
    assert!(matches!(error, OpenError::Foreign { .. }), "{error}");
    assert!(error.to_string().contains("theirs"), "{error}");
}

/// xorshift64*, good enough to pick bytes to damage.
struct Random(u64);

impl Random {
    fn from_env() -> Self {
        let seed = std::env::var("SEED").map_or(0x5eed, |seed| seed.parse().unwrap());
        println!("SEED={seed}");
        Self(seed | 1)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }
}

#[tokio::test]
async fn a_damaged_database_never_panics_and_never_shows_other_data() {
    let mut random = Random::from_env();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.redb");
    let db = Db::open(dir.path(), 1).unwrap();
    let entries: Vec<_> = (0..50).map(|i| command(i, &[i as u8; 300])).collect();
    append(&db, entries.clone()).await;
    db.close();
    let sound = std::fs::read(&path).unwrap();
    let used = sound.iter().rposition(|byte| *byte != 0).unwrap();
    let mut refused = 0;
    for round in 0..40 {
        let mut damaged = sound.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(used);
            damaged[at] ^= 1 << random.below(8);
        }
        if round % 8 == 0 {
            damaged.truncate(random.below(used));
        }
        std::fs::write(&path, &damaged).unwrap();
        match Db::open(dir.path(), 1) {
            Err(_) => refused += 1,
            Ok(db) => match db.entries(0..50, usize::MAX) {
                Err(_) => refused += 1,
                Ok(read) => assert!(read == entries || read.is_empty(), "round {round}"),
            },
        }
    }
    assert!(refused > 0, "no damage was noticed in any round");
}

fn append_request(entries: Vec<Entry>) -> AppendEntriesRequest<Types> {
    AppendEntriesRequest {
        vote: Vote::new_committed(3, 2),
        prev_log_id: Some(log_id::<Types>(2, 1, 4)),
        entries,
        leader_commit: Some(log_id::<Types>(2, 1, 3)),
    }
}

#[test]
fn frames_survive_the_round_trip() {
    let sent = append_request(vec![command(5, b"five"), blank_ent::<Types>(3, 2, 6)]);
    let frame = encode(&Envelope { from: 1, to: 2, request: Request::Append(sent.clone()) });
    let received: Envelope = decode(&frame).unwrap();
    assert_eq!((received.from, received.to), (1, 2));
    let Request::Append(received) = received.request else {
        panic!("another kind of request");
    };
    assert_eq!(format!("{received:?}"), format!("{sent:?}"));
    assert_eq!(received.entries, sent.entries);
}

#[test]
fn truncated_extended_and_foreign_frames_are_refused() {
    let frame = encode(&Envelope {
        from: 1,
        to: 2,
        request: Request::Append(append_request(vec![command(5, b"five")])),
    });
    for length in 0..frame.len() {
        decode::<Envelope>(&frame[..length]).unwrap_err();
    }
    let longer = [frame.as_slice(), &[0]].concat();
    decode::<Envelope>(&longer).unwrap_err();
    let mut other_version = frame.clone();
    other_version[0] += 1;
    decode::<Envelope>(&other_version).unwrap_err();
    decode::<Response>(&[1, 0xff, 0xff]).unwrap_err();
}

#[test]
fn entries_that_raft_could_not_bear_are_refused() {
    let check = |entries| wire::check_append(&append_request(entries));
    check(vec![command(5, b"a"), command(6, b"b")]).unwrap();
    check(vec![command(6, b"b")]).unwrap_err();
    check(vec![command(5, b"a"), command(7, b"b")]).unwrap_err();
    check(vec![command(5, &vec![0; MAX_COMMAND + 1])]).unwrap_err();
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    Options::default().to_config().unwrap();
    let second = Duration::from_secs(1);
    let broken = [
        Options { election_timeout: (second, second), ..Options::default() },
        Options { heartbeat: second, ..Options::default() },
        Options { max_voters: 0, ..Options::default() },
    ];
    for options in broken {
        options.to_config().unwrap_err();
    }
}

/// Nobody is there.
struct Void;

impl Transport for Void {
    fn call<'a>(
        &'a self,
        _peer: u64,
        _addr: &'a str,
        _request: Vec<u8>,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>> {
        Box::pin(async { Err(TransportError::Refused) })
    }
}

async fn ask_for_vote(log: &RaftLog, transfer: bool) -> Response {
    let mut vote = VoteRequest::new(Vote::new(1000, 2), Some(log_id::<Types>(999, 2, 1000)));
    vote.leadership_transfer = transfer;
    let request = Request::Vote(vote);
    let frame = encode(&Envelope { from: 2, to: 1, request });
    decode(&log.handle_rpc(&frame).await.unwrap()).unwrap()
}

#[tokio::test]
async fn a_restarted_node_keeps_the_promises_it_may_have_made_to_a_leader() {
    let dir = tempfile::tempdir().unwrap();
    // The end of the quiet time is not waited for.
    let options = Options {
        election_timeout: (Duration::from_secs(500), Duration::from_secs(1000)),
        ..Options::default()
    };
    let state = Arc::new(Journal::default());
    let open = || RaftLog::open(dir.path(), 1, state.clone(), Arc::new(Void), options.clone());
    let log = open().await.unwrap();
    let fresh = ask_for_vote(&log, false).await;
    assert!(matches!(fresh, Response::Vote(VoteResponse { vote_granted: true, .. })), "{fresh:?}");
    log.shutdown().await;
    let log = open().await.unwrap();
    let refused = ask_for_vote(&log, false).await;
    assert!(matches!(refused, Response::Failed(_)), "{refused:?}");
    // The leader itself lets go of the promise.
    let transferred = ask_for_vote(&log, true).await;
    assert!(matches!(transferred, Response::Vote(_)), "{transferred:?}");
}

#[tokio::test]
async fn a_request_for_another_node_is_not_handled() {
    let dir = tempfile::tempdir().unwrap();
    let state = Arc::new(Journal::default());
    let log = RaftLog::open(dir.path(), 3, state, Arc::new(Void), Options::default());
    let response = ask_for_vote(&log.await.unwrap(), false).await;
    assert!(matches!(response, Response::WrongNode(3)), "{response:?}");
}
