//! Measures a store: one case in each run, one line of JSON with the figures.
//!
//! `scripts/bench store` runs this in turns with fio and compares; by hand:
//! `cargo run --release -p sheepdog-store --example store_bench -- write --dir /dev/shm/s`.
//! The store in `--dir` is made if missing and stays, so that cases can follow each other.

mod args;
mod cases;
mod figures;
mod flush;
mod load;
mod slabs;
mod snapshot;

use std::process::ExitCode;

use args::Args;
use figures::Figures;

/// What went wrong, for people.
type Failure = Box<dyn std::error::Error + Send + Sync>;

const USAGE: &str = "usage: store_bench CASE --dir DIR [--OPTION NUMBER]...

DIR holds the store; it is made if missing. Numbers in brackets are the defaults.
  fill        1 MiB writes, one after the other, over --objects [256] of --volume [1];
              --delete V deletes that volume first
  write       4 KiB random writes in --objects by 32 writers on --threads [1], for --seconds [1]
              or --ops
  read        4 KiB random reads in --objects, on --threads [1], for --seconds [1] or --ops
  flush       4 KiB write + flush by one writer, by 16, and pwrite + fdatasync of a file, in turns
              of --seconds [0.3], --rounds [2]
  slabs       objects of one block each in --volume, from --from [0] up to --slabs [100000]
  full        full objects from --from [0] up to --objects [256]: zeroes stored as data, whose
              space is taken away again behind the store's back (they stay zeroes)
  open        the time to open, and the memory afterwards; --cold 1 drops the page cache of the
              store's files before, --touch N reads one block of N objects
  snapshot    the first write to a new layer above a full one beside any other write, over
              --objects [128], --rounds [8]";

fn run(args: &Args) -> Result<Figures, Failure> {
    match args.case.as_str() {
        "fill" => cases::fill(args),
        "write" => cases::write(args),
        "read" => cases::read(args),
        "flush" => flush::run(args),
        "slabs" => slabs::one_block_each(args),
        "full" => slabs::full(args),
        "open" => slabs::open(args),
        "snapshot" => snapshot::run(args),
        other => Err(format!("no such case: {other}\n{USAGE}").into()),
    }
}

fn main() -> ExitCode {
    if std::env::args().any(|arg| arg == "--help" || arg == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match Args::parse(std::env::args().skip(1)).and_then(|args| run(&args)) {
        Ok(figures) => {
            println!("{figures}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("store_bench: {failure}");
            ExitCode::FAILURE
        }
    }
}
