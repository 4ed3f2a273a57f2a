//! What can go wrong, and what it means for the data.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use sheepdog_types::{Layer, LayerKey, Version};

/// Why a store could not be created or opened. Nothing that was stored is changed by a failed open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory holds no store.
    #[error("{} is not a store: {reason}", .dir.display())]
    NotAStore {
        /// The directory.
        dir: PathBuf,
        /// What is missing.
        reason: &'static str,
    },
    /// [`crate::Store::create`] found a store in the directory; it was left as it is.
    #[error("{} already holds a store; it was left as it is", .0.display())]
    Exists(PathBuf),
    /// The store was written by a newer release, or by one from before the first release.
    #[error("the store has format version {found}, this release reads version {supported} only{}", if found > supported { ": upgrade sheep on this node (docs/upgrade.md)" } else { "" })]
    OtherFormat {
        /// Version on the disk.
        found: u32,
        /// The version this release knows.
        supported: u32,
    },
    /// Another process (or another [`crate::Store`] of this process) has the store open.
    #[error("{} is in use by {}", .dir.display(), .pid.map_or("another process".into(), |p| format!("process {p}")))]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// The process that holds it, if it left its number.
        pid: Option<u32>,
    },
    /// Bytes that must be right are not. The disk must be replaced and refilled from its peers.
    #[error("the store is damaged: {file}: {what}")]
    Corrupt {
        /// The file, relative to the store's directory.
        file: String,
        /// What is wrong and where.
        what: String,
    },
    /// The options make no sense.
    #[error("invalid store options: {0}")]
    InvalidOptions(&'static str),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl OpenError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn corrupt(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Corrupt { file: file.into(), what: what.into() }
    }
}

/// Why a change was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The layer is not at the version that the write follows. Not written.
    #[error("this replica is at version {have}, not at the one before this write (not written)")]
    Behind {
        /// The layer's version here.
        have: Version,
    },
    /// The object has a newer layer: older ones no longer change. Not written.
    #[error("the layer is frozen by layer {newer} of the object (not written)")]
    Frozen {
        /// The object's newest layer.
        newer: Layer,
    },
    /// What is stored and would have been moved is damaged. Not done.
    #[error("{key} is damaged: {reason} (not done; repair it from a replica)")]
    Damaged {
        /// The layer.
        key: LayerKey,
        /// What was found.
        reason: Arc<str>,
    },
    /// The bytes do not match their checksum: they were damaged on the way here. Not written.
    #[error("checksum mismatch in block {block} of the request (not written; send it again)")]
    Checksum {
        /// Block of the object.
        block: u16,
    },
    /// The disk is full. Not written. Reads, deletes and discards still work.
    #[error("the disk is full (not written; free space or add disks)")]
    NoSpace,
    /// The disk takes no more changes until it is opened again. This one may have been written.
    #[error("the disk is out of service: {0} (may have been written; reads still work)")]
    Failed(Arc<str>),
    /// The request contradicts itself. Not written.
    #[error("invalid request: {0} (not written)")]
    Invalid(&'static str),
}

/// Why a read gave no data. The contents of the caller's buffer are then unspecified.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A stored block does not match its checksum: repair it from another replica.
    #[error("block {block} of {key} does not match its checksum (repair it from a replica)")]
    Checksum {
        /// The layer that holds the block.
        key: LayerKey,
        /// Block of the object.
        block: u16,
    },
    /// The disk could not deliver a block.
    #[error("cannot read block {block} of {key}: {source}")]
    Io {
        /// The layer that holds the block.
        key: LayerKey,
        /// First block of the piece that failed.
        block: u16,
        /// The system's answer.
        source: io::Error,
    },
    /// The request contradicts itself.
    #[error("invalid request: {0}")]
    Invalid(&'static str),
}

/// Why writes could not be made durable. They may be lost at a power failure; the store takes no
/// more writes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not durable: {0} (writes since the last flush may be lost)")]
pub struct FlushError(pub Arc<str>);
