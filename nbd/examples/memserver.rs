//! Serves memory over NBD, to try clients and to measure: `memserver SOCKET [MEBIBYTES]`.
//!
//! The export is called `mem`. Ends when its standard input is closed.

#[path = "../tests/common/memory.rs"]
#[allow(dead_code, missing_docs, clippy::unwrap_used)]
mod memory;

use std::io::Read;

use sheepdog_nbd::{Limits, Server};

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let Some(path) = args.next() else {
        eprintln!("usage: memserver SOCKET [MEBIBYTES]");
        std::process::exit(2);
    };
    let mebibytes = args.next().and_then(|text| text.parse().ok()).unwrap_or(64usize);
    let memory = memory::Memory::new(mebibytes << 20);
    let listener = Server::bind_unix(&path, 0o600)?;
    let server = Server::start(listener, memory::Fixed::one("mem", memory), Limits::default())?;
    eprintln!("serving {mebibytes} MiB on nbd+unix:///mem?socket={path}");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    Ok(())
}
