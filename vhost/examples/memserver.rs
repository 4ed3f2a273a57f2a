//! Serves a piece of memory over vhost-user-blk until its standard input ends or it is killed.
//!
//! ```text
//! memserver SOCKET [SIZE] [QUEUES]
//! ```

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use sheepdog_types::{
    Block, BlockError, BlockInfo, Burst, Completion, Done, Op, Request, parse_size,
};
use sheepdog_vhost::{Config, VhostServer};

/// A device in memory; requests complete before `submit` returns.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn execute(&self, op: Op) -> Completion {
        let mut memory = self.lock();
        match op {
            Op::Read { offset, len } => {
                return Ok(Done::Data(range(&mut memory, offset, u64::from(len))?.to_vec()));
            }
            Op::Write { offset, data, .. } => {
                range(&mut memory, offset, data.len() as u64)?.copy_from_slice(&data);
            }
            Op::Flush => {}
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
                range(&mut memory, offset, len)?.fill(0);
            }
        }
        Ok(Done::Nothing)
    }
}

fn range(memory: &mut [u8], offset: u64, len: u64) -> Result<&mut [u8], BlockError> {
    let end = offset.checked_add(len).ok_or(BlockError::OutOfRange)?;
    memory.get_mut(offset as usize..end as usize).ok_or(BlockError::OutOfRange)
}

impl Block for Memory {
    fn info(&self) -> BlockInfo {
        let size = self.lock().len() as u64;
        BlockInfo { size, read_only: false, serial: "memory".into() }
    }

    fn submit(&self, batch: &mut Vec<Request>) {
        let mut burst = Burst::new();
        for Request { op, token } in batch.drain(..) {
            token.complete(self.execute(op), &mut burst);
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or("usage: memserver SOCKET [SIZE] [QUEUES]")?;
    let size = parse_size(args.get(1).map_or("64M", String::as_str))?;
    let queues = args.get(2).map_or(Ok(4), |text| text.parse())?;
    let block = Arc::new(Memory(Mutex::new(vec![0; usize::try_from(size)?])));
    let server = VhostServer::start(path, block, Config { queues, ..Config::default() })?;
    println!("serving {size} bytes at {path}; end of input stops");
    io::copy(&mut io::stdin().by_ref(), &mut io::sink())?;
    server.stop();
    Ok(())
}
