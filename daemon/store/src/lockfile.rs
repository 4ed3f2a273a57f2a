//! One process at a time: an advisory lock on a file that names its holder.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::OpenError;

/// How long the lock of a process that has ended is waited for, and how often it is tried.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);

/// Holds a store's directory; released when dropped, or when the process dies.
#[derive(Debug)]
pub(crate) struct LockFile {
    _file: File,
}

impl LockFile {
    /// Takes the lock or tells who has it.
    pub(crate) fn take(dir: &Path) -> Result<Self, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join("lock"))
            .map_err(OpenError::io("cannot use the lock file"))?;
        lock(&file, FlockOperation::NonBlockingLockExclusive, dir)?;
        // In place and of one length, so that a store on a full disk can be opened. The number is
        // a help for people; without it the lock holds too.
        let _ = file.write_all_at(format!("{:<10}\n", std::process::id()).as_bytes(), 0);
        Ok(Self { _file: file })
    }
}

/// Locks the file, exclusively or shared, or tells who has it.
pub(crate) fn lock(file: &File, how: FlockOperation, dir: &Path) -> Result<(), OpenError> {
    let begin = Instant::now();
    loop {
        match flock(file, how) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) => {
                let pid = holder(file);
                // The kernel closes the files of a process that had an I/O ring some time after its end.
                if begin.elapsed() > PATIENCE || pid.is_none_or(is_there) {
                    return Err(OpenError::Locked { dir: dir.into(), pid });
                }
                thread::sleep(PAUSE);
            }
            Err(error) => return Err(OpenError::io("cannot use the lock file")(error.into())),
        }
    }
}

/// The process that took the lock last. A help for people: without it the lock holds too.
fn holder(file: &File) -> Option<u32> {
    let mut bytes = [0; 16];
    let len = file.read_at(&mut bytes, 0).ok()?;
    std::str::from_utf8(&bytes[..len]).ok()?.trim().parse().ok()
}

/// Whether there is such a process that has not ended.
fn is_there(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    let state = |text: String| text.rsplit(')').next().and_then(|rest| rest.trim().chars().next());
    match stat {
        Ok(text) => state(text) != Some('Z'),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}
