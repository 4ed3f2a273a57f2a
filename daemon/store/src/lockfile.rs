//! One process at a time: an advisory lock on a file that names its holder.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::OpenError;

/// Holds a store's directory; released when dropped, or when the process dies.
#[derive(Debug)]
pub(crate) struct LockFile {
    _file: File,
}

impl LockFile {
    /// Takes the lock or tells who has it.
    pub(crate) fn take(dir: &Path) -> Result<Self, OpenError> {
        let io = || OpenError::io("cannot use the lock file");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join("lock"))
            .map_err(io())?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // The number is a help for people; without it the answer is still right.
                let _ = (&file).take(16).read_to_string(&mut holder);
                return Err(OpenError::Locked { dir: dir.into(), pid: holder.trim().parse().ok() });
            }
            Err(error) => return Err(io()(error.into())),
        }
        // In place and of one length, so that a store on a full disk can be opened. The number is
        // a help for people; without it the lock holds too.
        let _ = file.write_all_at(format!("{:<10}\n", std::process::id()).as_bytes(), 0);
        Ok(Self { _file: file })
    }
}
