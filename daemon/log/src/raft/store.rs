//! openraft's view of the database: the log store and its readers.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use futures_util::Stream;
use futures_util::stream::try_unfold;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{LogIdOptionExt, OptionalSend};

use super::db::{Db, Done, Write};
use super::types::{Entry, LogId, Types, Vote};

/// How many bytes of entries are read, and sent, at a time (but always at least one entry).
pub const MAX_READ_BYTES: usize = 4 << 20;

/// The log store; also its own reader.
#[derive(Clone)]
pub struct LogStore(pub Arc<Db>);

fn half_open(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

impl RaftLogReader<Types> for LogStore {
    /// In pieces: the entries to apply after a restart may be many.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let db = self.0.clone();
        let start = (half_open(&range), Vec::new().into_iter());
        Box::pin(try_unfold(start, move |(mut rest, mut read)| {
            let db = db.clone();
            async move {
                if read.as_slice().is_empty() {
                    let entries: Vec<Entry> = db.entries(rest.clone(), MAX_READ_BYTES)?;
                    rest.start = entries.last().map_or(rest.end, |e| e.log_id.index + 1);
                    read = entries.into_iter();
                }
                Ok(read.next().map(|entry| (entry, (rest, read))))
            }
        }))
    }

    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        self.0.entries(half_open(&range), usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.0.entries(start..end, MAX_READ_BYTES)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.0.vote())
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        Ok(LogState { last_purged_log_id: self.0.purged(), last_log_id: self.0.last_log_id()? })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.0.write(Write::Vote(*vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.0.set_committed(committed);
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.0.committed())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter().collect();
        let done = Done::new(move |result| callback.io_completed(result));
        self.0.append(entries, done)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        self.0.write(Write::Truncate(last.next_index())).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.0.write(Write::Purge(upto)).await
    }
}
