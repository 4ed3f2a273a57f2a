//! The lab for black-box tests: clusters of real `sheep` processes, real QEMU guests, NBD clients.
//!
//! Everything here panics with an explanation when the lab itself does not work (a tool is missing, a
//! process does not come up): the caller is always a test, and a panic is its failure. What a test wants
//! to look at (exit codes, replies, output) is returned.
//!
//! A test begins with [`Lab::new`], which also keeps the tests of one binary from running side by side:
//! they would fight for two cores, and their stalls would say nothing.

mod cluster;
mod customer;
mod filesystem;
mod forgetful;
mod guest;
mod lab;
mod migration;
mod nbd;
mod netns;
mod process;
mod pulse;
mod qmp;
mod scribe;
mod stores;
mod tools;

pub use cluster::{Cluster, Export, Failure, check_message, free_ports, sheep_refused};
pub use customer::{Account, Customer};
pub use filesystem::{FileSystem, inside};
pub use forgetful::lose_log;
pub use guest::{Disk, Guest, GuestResult};
pub use lab::Lab;
pub use migration::{Pace, Target};
pub use nbd::{Client, Command, NbdError};
pub use netns::Net;
pub use process::{Finished, Process, run};
pub use pulse::Pulse;
pub use qmp::Qmp;
pub use scribe::Scribe;
pub use stores::{Equal, Store, check, compare};
pub use tools::{Fio, FioResult, StorageDaemon, qemu_img, qemu_io, try_qemu_io};

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long the lab waits for something that takes a second on a healthy machine. Many slow ones run tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls `condition` until it gives a value; panics with `what` after `limit`.
pub fn eventually<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begin.elapsed() < limit, "waited {limit:?} in vain for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The seed of a randomised test: from the environment (`SEED`), or a new one. Prints it.
pub fn seed() -> u64 {
    seed_or(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        u64::from(now.map(|t| t.subsec_nanos()).unwrap_or(1)) + 1
    })
}

/// The same with another seed than a new one. Prints it.
pub fn seed_or(usual: impl FnOnce() -> u64) -> u64 {
    let seed = setting("SEED").unwrap_or_else(usual);
    println!("SEED={seed}");
    seed
}

/// A number from the environment.
pub fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// splitmix64: a small generator for offsets and data; not for secrets.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n` (which is not 0).
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n
    }

    /// Fills the buffer.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Where cargo builds: `CARGO_TARGET_DIR`, or `target` of this workspace.
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")),
    }
}

/// A binary of this project: from `SHEEPDOG_BIN_DIR`, else the newer one of the debug and the release build.
pub fn binary(name: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os("SHEEPDOG_BIN_DIR") {
        let path = PathBuf::from(dir).join(name);
        assert!(path.exists(), "SHEEPDOG_BIN_DIR has no {name}: {}", path.display());
        return path;
    }
    let built = |profile: &str| {
        let path = target_dir().join(profile).join(name);
        let when = path.metadata().and_then(|m| m.modified()).ok()?;
        Some((when, path))
    };
    let newest = [built("debug"), built("release")].into_iter().flatten().max();
    match newest {
        Some((_, path)) => path,
        None => panic!(
            "no built {name} in {}: cargo build -p sheepdog, or set SHEEPDOG_BIN_DIR",
            target_dir().display()
        ),
    }
}
