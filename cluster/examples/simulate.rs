//! The simulator of the tests as a command; see `scripts/simulate --help`.

#![allow(clippy::unwrap_used)] // part of the tests

#[path = "../tests/sim/mod.rs"]
mod sim;

fn main() -> std::process::ExitCode {
    sim::cli::main(std::env::args().skip(1))
}
