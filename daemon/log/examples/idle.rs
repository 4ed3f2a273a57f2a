//! Measures what three idle members cost: `cargo run --release -p sheepdog-log --example idle`.

#[path = "../tests/common/mod.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod common;

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use sheepdog_log::Options;

fn cpu_seconds() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    const SECONDS: u64 = 10;
    let nodes = std::env::args().nth(1).map_or(3, |nodes| nodes.parse().expect("a number"));
    let cluster = common::Cluster::of(nodes, Options::default()).await;
    cluster.propose(nodes, "hello").await;
    let before = cpu_seconds();
    tokio::time::sleep(Duration::from_secs(SECONDS)).await;
    let used = cpu_seconds() - before;
    let percent = 100.0 * used / SECONDS as f64 / nodes as f64;
    println!("{nodes} idle nodes: {percent:.2} % of a CPU each, on average");
}
