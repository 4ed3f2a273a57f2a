//! The frames that members exchange: a version byte, then postcard.
//!
//! A frame names its sender and its addressee. A node that got an address which belonged to
//! another before must not answer in that one's name: it would be counted as that voter.

use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::store::MAX_READ_BYTES;
use super::types::{Bytes, Entry, SnapshotMeta, Types, Vote};

/// The version of the frames. Members of different versions do not understand each other.
const VERSION: u8 = 1;
/// The largest command that can be proposed, in bytes.
pub const MAX_COMMAND: usize = 1 << 20;
/// The largest snapshot that can be taken and sent, in bytes.
pub const MAX_SNAPSHOT: usize = 64 << 20;
/// The largest frame: a snapshot with what describes it. A transport must carry this much.
pub const MAX_FRAME: usize = MAX_SNAPSHOT + (1 << 20);
/// The longest address of a member, in bytes.
pub const MAX_ADDRESS: usize = 256;

const _: () = assert!(MAX_READ_BYTES + MAX_COMMAND < MAX_FRAME);

/// Why an incoming frame was not handled. Nothing was changed; the connection that brought it
/// should be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed cluster log frame: {0}")]
pub struct RpcError(pub(super) String);

/// A request with its envelope.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope {
    pub from: u64,
    pub to: u64,
    pub request: Request,
}

/// What one member asks of another.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    Append(AppendEntriesRequest<Types>),
    Vote(VoteRequest<Types>),
    PreVote(VoteRequest<Types>),
    Snapshot(Vote, SnapshotMeta, Bytes),
    TransferLeader(TransferLeaderRequest<Types>),
    Operate(Operation),
}

/// What only the leader can do, and other members forward to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    Propose(Bytes),
    AddMember(u64, String),
    RemoveMember(u64),
    UpdateAddress(u64, String),
}

/// The answer to a [`Request`].
#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    Append(AppendEntriesResponse<Types>),
    Vote(VoteResponse<Types>),
    Snapshot(SnapshotResponse<Types>),
    TransferLeader(TransferLeaderResponse<Types>),
    Operate(Outcome),
    /// Not handled: the request is for another node than this one.
    WrongNode(u64),
    /// Not handled.
    Failed(String),
}

/// How an [`Operation`] ended on the member that was asked to do it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Committed, with this response.
    Done(Bytes),
    /// Not done: that member is not the leader; this one is, if known.
    NotLeader(Option<(u64, String)>),
    /// Not done, and never possible.
    Rejected(String),
    /// Possibly done.
    Unknown(String),
}

impl Operation {
    /// Whether a leader may do this; bounds what is appended to the log.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Propose(command) if command.0.len() > MAX_COMMAND => {
                Err(format!("a command of {} bytes is larger than {MAX_COMMAND}", command.0.len()))
            }
            Self::AddMember(_, addr) | Self::UpdateAddress(_, addr) if addr.len() > MAX_ADDRESS => {
                Err(format!("an address is longer than {MAX_ADDRESS} bytes"))
            }
            _ => Ok(()),
        }
    }
}

/// Encodes a frame.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_extend(value, vec![VERSION])
        .expect("frames are plain data, which postcard can always write to memory")
}

/// Decodes a frame; never allocates more than a small multiple of its length.
pub fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, RpcError> {
    if frame.len() > MAX_FRAME {
        return Err(RpcError(format!("{} bytes are too many", frame.len())));
    }
    match frame.split_first() {
        Some((&VERSION, body)) => {
            let (value, rest) =
                postcard::take_from_bytes(body).map_err(|error| RpcError(error.to_string()))?;
            if rest.is_empty() {
                Ok(value)
            } else {
                Err(RpcError(format!("{} bytes are left over", rest.len())))
            }
        }
        Some((version, _)) => Err(RpcError(format!("version {version} is unknown"))),
        None => Err(RpcError("it is empty".into())),
    }
}

/// Checks what Raft takes for granted of the entries that a leader sends.
pub fn check_append(request: &AppendEntriesRequest<Types>) -> Result<(), RpcError> {
    let mut next = match &request.prev_log_id {
        Some(prev) => prev.index.checked_add(1),
        None => Some(0),
    };
    for entry in &request.entries {
        if next != Some(entry.index()) {
            return Err(RpcError("entries are not consecutive".into()));
        }
        next = entry.index().checked_add(1);
        check_entry(entry)?;
    }
    Ok(())
}

fn check_entry(entry: &Entry) -> Result<(), RpcError> {
    match &entry.payload {
        EntryPayload::Normal(command) if command.0.len() > MAX_COMMAND => {
            Err(RpcError("a command is too large".into()))
        }
        EntryPayload::Membership(membership) if membership.get_joint_config().is_empty() => {
            Err(RpcError("a membership has no voters".into()))
        }
        _ => Ok(()),
    }
}
