//! The directory of a node: its identity, its lock and its exports.
//!
//! ```text
//!   DIR/lock          locked by the running daemon, holds its process id
//!   DIR/node.json     who this node is
//!   DIR/exports.json  what it serves
//!   DIR/cluster/      the cluster log
//!   DIR/disk/         the store, unless --disk says otherwise
//! ```

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Newest format of `node.json`, and of the other JSON files, that is understood.
pub const FORMAT: u32 = 1;

/// What another file than `node.json` consists of.
#[derive(Serialize, Deserialize)]
struct Content<T> {
    format: u32,
    content: T,
}

/// Why a directory cannot be used. It was not changed.
#[derive(Debug, Error)]
pub enum DirError {
    /// Another daemon has it.
    #[error("{} is in use by process {pid}; stop that daemon or choose another --dir", .dir.display())]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// Who has it.
        pid: String,
    },
    /// It holds something else.
    #[error("{} is not empty and not the directory of a node; choose another --dir", .0.display())]
    NotOurs(PathBuf),
    /// It was written by a newer release.
    #[error("{} has format {found}, this release understands up to {FORMAT}; upgrade this node", .file.display())]
    NewerFormat {
        /// The file.
        file: PathBuf,
        /// Its format.
        found: u32,
    },
    /// A file does not make sense.
    #[error("{} is damaged: {what}", .file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// What was accessed.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Who a node is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Format of the file.
    pub format: u32,
    /// The cluster, in hexadecimal.
    pub cluster: String,
    /// The node, in hexadecimal.
    pub node: String,
    /// `IP:PORT` it listens on.
    pub address: String,
    /// Failure zone.
    pub zone: String,
    /// Its disks.
    pub disks: Vec<DiskEntry>,
    /// Members through which it joins; empty once it has.
    pub join: Vec<String>,
}

/// A disk of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskEntry {
    /// Its id, in hexadecimal.
    pub id: String,
    /// Directory of its store.
    pub path: PathBuf,
    /// Share of the ring.
    pub weight: u64,
}

/// A locked directory.
#[derive(Debug)]
pub struct NodeDir {
    path: PathBuf,
    _lock: File,
}

impl NodeDir {
    /// Locks `path`, creating it if needed.
    ///
    /// # Errors
    /// [`DirError`].
    pub fn lock(path: &Path) -> Result<Self, DirError> {
        let io = |source| DirError::Io { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(io)?;
        let path = path.canonicalize().map_err(io)?;
        let known = ["lock", "node.json", "node.json.new", "exports.json", "cluster", "disk"];
        let has_identity = path.join("node.json").exists();
        if !has_identity {
            for entry in fs::read_dir(&path).map_err(io)? {
                let name = entry.map_err(io)?.file_name();
                if !known.iter().any(|k| name == *k) && name != "lost+found" {
                    return Err(DirError::NotOurs(path));
                }
            }
        }
        let lock_path = path.join("lock");
        let io = |source| DirError::Io { path: lock_path.clone(), source };
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(io)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut pid = String::new();
            let _ = lock.read_to_string(&mut pid); // only for the message
            let pid = if pid.trim().is_empty() { "?".into() } else { pid.trim().into() };
            return Err(DirError::Locked { dir: path, pid });
        }
        lock.set_len(0).map_err(io)?;
        lock.rewind().map_err(io)?;
        writeln!(lock, "{}", std::process::id()).map_err(io)?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who the node is; `None` for a new one.
    ///
    /// # Errors
    /// [`DirError`].
    pub fn identity(&self) -> Result<Option<Identity>, DirError> {
        read_known(&self.path.join("node.json"))
    }

    /// Remembers who the node is.
    ///
    /// # Errors
    /// [`DirError::Io`].
    pub fn save_identity(&self, identity: &Identity) -> Result<(), DirError> {
        write_json(&self.path.join("node.json"), identity)
    }

    /// Reads another file of the directory; `None` when there is none.
    ///
    /// # Errors
    /// [`DirError`].
    pub fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, DirError> {
        let read = read_known::<Content<T>>(&self.path.join(name))?;
        Ok(read.map(|read| read.content))
    }

    /// Writes another file of the directory, atomically and durably.
    ///
    /// # Errors
    /// [`DirError::Io`].
    pub fn save<T: Serialize>(&self, name: &str, value: &T) -> Result<(), DirError> {
        write_json(&self.path.join(name), &Content { format: FORMAT, content: value })
    }
}

/// Reads a file that says its format, if that is understood.
fn read_known<T: DeserializeOwned>(file: &Path) -> Result<Option<T>, DirError> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Some(Format { format }) = read_json(file)? else { return Ok(None) };
    if format > FORMAT {
        return Err(DirError::NewerFormat { file: file.into(), found: format });
    }
    read_json(file)
}

fn read_json<T: DeserializeOwned>(file: &Path) -> Result<Option<T>, DirError> {
    match fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| DirError::Damaged { file: file.into(), what: e.to_string() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DirError::Io { path: file.into(), source }),
    }
}

fn write_json<T: Serialize>(file: &Path, value: &T) -> Result<(), DirError> {
    let write = || -> io::Result<()> {
        let fresh = file.with_extension("json.new");
        let mut out = File::create(&fresh)?;
        serde_json::to_writer_pretty(&mut out, value)?;
        out.write_all(b"\n")?;
        out.sync_all()?;
        fs::rename(&fresh, file)?;
        if let Some(parent) = file.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|source| DirError::Io { path: file.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            format: FORMAT,
            cluster: "1".into(),
            node: "2".into(),
            address: "127.0.0.1:7000".into(),
            zone: "a".into(),
            disks: Vec::new(),
            join: Vec::new(),
        }
    }

    #[test]
    fn an_identity_is_kept_and_the_directory_locked() {
        let dir = tempfile::tempdir().unwrap();
        let node = NodeDir::lock(dir.path()).unwrap();
        assert!(node.identity().unwrap().is_none());
        node.save_identity(&identity()).unwrap();
        assert_eq!(node.identity().unwrap(), Some(identity()));
        let error = NodeDir::lock(dir.path()).unwrap_err();
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(node);
        NodeDir::lock(dir.path()).unwrap();
    }

    #[test]
    fn foreign_and_newer_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.txt"), "precious").unwrap();
        assert!(matches!(NodeDir::lock(dir.path()), Err(DirError::NotOurs(_))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was added");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("node.json"), r#"{"format": 2, "shape": "new"}"#).unwrap();
        let node = NodeDir::lock(dir.path()).unwrap();
        assert!(matches!(node.identity(), Err(DirError::NewerFormat { found: 2, .. })));
        fs::write(dir.path().join("node.json"), "{").unwrap();
        assert!(matches!(node.identity(), Err(DirError::Damaged { .. })));
    }

    #[test]
    fn other_files_say_their_format_too() {
        let dir = tempfile::tempdir().unwrap();
        let node = NodeDir::lock(dir.path()).unwrap();
        assert_eq!(node.load::<Vec<u32>>("exports.json").unwrap(), None);
        node.save("exports.json", &[1, 2]).unwrap();
        assert_eq!(node.load::<Vec<u32>>("exports.json").unwrap(), Some(vec![1, 2]));
        let file = dir.path().join("exports.json");
        fs::write(&file, r#"{"format": 2, "content": {"other": "shape"}}"#).unwrap();
        let newer = node.load::<Vec<u32>>("exports.json");
        assert!(matches!(newer, Err(DirError::NewerFormat { found: 2, .. })));
    }
}
