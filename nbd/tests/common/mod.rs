//! What the tests of this crate share.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

pub mod client;
pub mod memory;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sheepdog_nbd::{Exports, Limits, Server, ServerHandle};

/// A directory that is removed at the end of a test.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("nbd-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn socket(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Limits longer than the patience of tests, so that nothing passes by timing out; but a test that
/// failed ends all the same.
pub fn limits() -> Limits {
    let long = Duration::from_secs(60);
    Limits { handshake: long, linger: long, ..Limits::default() }
}

/// Waits for `condition`; a test that waits for more than a minute has failed.
pub fn until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain");
        std::thread::yield_now();
    }
}

/// Serves `exports` on a Unix socket in a fresh directory.
pub fn serve(exports: Arc<dyn Exports>, limits: Limits) -> (ServerHandle, Dir) {
    let dir = Dir::new();
    let listener = Server::bind_unix(dir.socket(), 0o600).unwrap();
    (Server::start(listener, exports, limits).unwrap(), dir)
}

/// SplitMix64; the seed is printed and can be given in the environment variable SEED.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let given = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.unwrap().as_nanos() as u64
        };
        let seed = given.unwrap_or_else(clock);
        println!("SEED={seed}");
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}
