//! openraft's view of the state machine: applying, and snapshots kept in the database.
//!
//! The applied state itself lives in memory. After a restart it is the stored snapshot plus the
//! committed entries behind it, which are in the log: only what a stored snapshot covers is
//! ever purged.

use std::io;
use std::sync::Arc;

use futures_util::{Stream, TryStreamExt};
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};

use super::MAX_SNAPSHOT;
use super::db::{Db, Write};
use super::types::{Bytes, LogId, Snapshot, SnapshotMeta, StoredMembership, Types};
use crate::api::StateMachine;

/// The state machine with the position up to which it is applied.
pub struct Machine {
    state: Arc<dyn StateMachine>,
    db: Arc<Db>,
    applied: Option<LogId>,
    membership: StoredMembership,
}

impl Machine {
    /// Restores the stored snapshot, if there is one.
    pub fn open(state: Arc<dyn StateMachine>, db: Arc<Db>) -> io::Result<Self> {
        let mut machine =
            Self { state, db, applied: None, membership: StoredMembership::default() };
        if let Some((meta, data)) = machine.db.snapshot()? {
            machine.restore(&meta, &data)?;
        }
        Ok(machine)
    }

    fn restore(&mut self, meta: &SnapshotMeta, data: &[u8]) -> io::Result<()> {
        self.state.restore(data).map_err(|why| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the state machine cannot read the snapshot: {why}"),
            )
        })?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        Ok(())
    }
}

/// A snapshot taken but not yet stored.
pub struct Builder {
    db: Arc<Db>,
    meta: SnapshotMeta,
    data: Vec<u8>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let write = Write::Snapshot(self.meta.clone(), self.data.clone());
        self.db.write(write).await?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot: std::mem::take(&mut self.data) })
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let log_id = entry.log_id();
            let response = match entry.payload {
                EntryPayload::Blank => Vec::new(),
                EntryPayload::Normal(command) => {
                    self.state.apply(log_id.index, &command.0).map_err(|why| {
                        let why = format!("entry {} cannot be applied: {why}", log_id.index);
                        io::Error::new(io::ErrorKind::InvalidData, why)
                    })?
                }
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(log_id), membership);
                    Vec::new()
                }
            };
            self.applied = Some(log_id);
            if let Some(responder) = responder {
                responder.send(Bytes(response));
            }
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
        let builder = self.get_snapshot_builder().await;
        if builder.data.len() > MAX_SNAPSHOT && !force {
            // Keeping the whole log is the lesser evil: a snapshot that cannot be sent, with a
            // purged log, would shut out every node that fell behind.
            tracing::warn!(
                bytes = builder.data.len(),
                limit = MAX_SNAPSHOT,
                "the cluster state is too large for a snapshot; the log is kept and grows"
            );
            return None;
        }
        Some(builder)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            db: self.db.clone(),
            meta: SnapshotMeta {
                last_log_id: self.applied,
                last_membership: self.membership.clone(),
            },
            data: self.state.snapshot(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        data: Vec<u8>,
    ) -> Result<(), io::Error> {
        // Restored first: a snapshot that cannot be read must not replace one that can.
        self.restore(meta, &data)?;
        self.db.write(Write::Snapshot(meta.clone(), data)).await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let snapshot = self.db.snapshot()?;
        Ok(snapshot.map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}
