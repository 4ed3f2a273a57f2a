//! One test's place: a directory for everything it makes, kept when it fails.

use crate::target_dir;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tempfile::TempDir;

static TURN: Mutex<()> = Mutex::new(());

/// A test's directory and its turn. Declare it first: it must outlive the processes that write into it.
pub struct Lab {
    name: String,
    dir: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Lab {
    /// Waits for the other tests of this binary, then makes an empty directory.
    ///
    /// `name` is where the logs will be if the test fails: `target/qemu/failed/NAME`.
    pub fn new(name: &str) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // A short path: Unix socket addresses have 108 bytes.
        let dir = tempfile::Builder::new().prefix("sheeplab-").tempdir();
        let dir = dir.unwrap_or_else(|e| panic!("no temporary directory: {e}"));
        let lab = Self { name: name.to_owned(), dir, _turn: turn };
        fs::create_dir(lab.path("logs")).unwrap_or_else(|e| panic!("no log directory: {e}"));
        lab
    }

    /// A path in the test's directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// The log file of a process or guest of this name.
    pub fn log(&self, name: &str) -> PathBuf {
        self.path("logs").join(format!("{name}.log"))
    }

    fn keep_logs(&self) {
        let kept = target_dir().join("qemu/failed").join(&self.name);
        let _ = fs::remove_dir_all(&kept);
        if let Err(e) = fs::create_dir_all(&kept) {
            eprintln!("logs could not be kept in {}: {e}", kept.display());
            return;
        }
        let Ok(entries) = fs::read_dir(self.path("logs")) else { return };
        let mut logs: Vec<_> = entries.flatten().map(|e| e.path()).collect();
        logs.sort();
        for log in logs {
            show_tail(&log);
            if let Some(name) = log.file_name() {
                let _ = fs::copy(&log, kept.join(name));
            }
        }
        eprintln!("--- whole logs: {}", kept.display());
    }
}

fn show_tail(log: &Path) {
    const LINES: usize = 25;
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    eprintln!("--- {} (last {LINES} of {} lines)", log.display(), lines.len());
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        // A daemon may have logged what it was sent.
        eprintln!("{}", line.chars().take(400).collect::<String>());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep_logs();
        }
    }
}
