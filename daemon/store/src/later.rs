//! Reads for callers that must not wait: each step is handed to the medium's I/O engine, and its
//! answer takes the next one.

use std::sync::Arc;

use sheepdog_types::{BLOCK_SIZE, Layer, LayerKey, ObjectId};

use crate::api::{BlockRange, BlocksRead, ReadOutcome};
use crate::checkpoint::SUMS_BYTES;
use crate::engine::Engine;
use crate::error::ReadError;
use crate::io::{Buffer, Done, IoEngine, Op};
use crate::read::{Loaded, Plan, Wanted, plan_read};

/// Told when a read is done.
type Answer = Box<dyn FnOnce(Result<BlocksRead, ReadError>) + Send>;

/// Times that what was planned may have moved before it was read; then a thread waits for it.
const TRIES: u32 = 3;

struct LaterRead {
    engine: Arc<Engine>,
    object: ObjectId,
    chain: Vec<Layer>,
    first: u16,
    count: u16,
    loaded: Loaded,
    tries: u32,
    answer: Answer,
}

/// See [`crate::Store::read_later`].
pub(crate) fn read(
    engine: &Arc<Engine>,
    object: ObjectId,
    chain: &[Layer],
    (first, count): (u16, u16),
    answer: Answer,
) {
    let read = LaterRead {
        engine: Arc::clone(engine),
        object,
        chain: chain.to_vec(),
        first,
        count,
        loaded: Loaded::new(),
        tries: 0,
        answer,
    };
    match engine.medium.io() {
        Some(_) => read.step(),
        None => read.wait(),
    }
}

impl LaterRead {
    fn step(self) {
        let range = BlockRange::new(self.first, usize::from(self.count));
        let (Some(range), Some(newest)) = (range, self.chain.first()) else {
            return (self.answer)(Err(ReadError::Invalid("no blocks or no layers to read")));
        };
        let newest = LayerKey { object: self.object, layer: *newest };
        let engine = Arc::clone(&self.engine);
        let Some(io) = engine.medium.io().filter(|_| self.tries < TRIES) else {
            return self.wait_elsewhere();
        };
        let planned = {
            let shard = engine.table.shard_of(self.object);
            plan_read(&shard, &self.loaded, newest, &self.chain, range)
        };
        match planned {
            Ok((plan, outcome)) => self.fetch(io, plan, outcome),
            Err(wanted) => self.load(io, wanted),
        }
    }

    /// Reads a checksum table.
    fn load(mut self, io: &IoEngine, wanted: Wanted) {
        let Some(file) = self.engine.files.sums.handle().cloned() else {
            return self.wait_elsewhere();
        };
        let op = Op::Read { file, offset: wanted.offset(), buf: Buffer::new(SUMS_BYTES) };
        let done = Box::new(move |mut done: Vec<Done>| {
            let read = done.pop().filter(|done| done.result.is_ok());
            let sums = read.and_then(|done| wanted.decode(&done.op.into_buffer()).ok());
            self.tries += u32::from(sums.is_none());
            if let Some(sums) = sums {
                self.engine.keep_sums(&wanted, &sums);
                self.loaded.push((wanted.slab, sums));
            }
            self.step();
        });
        io.submit(vec![op], done);
    }

    /// Reads the blocks.
    fn fetch(mut self, io: &IoEngine, plan: Plan, outcome: ReadOutcome) {
        let Some((places, ops)) = self.engine.read_ops(&plan) else {
            return self.wait_elsewhere();
        };
        let done = Box::new(move |done: Vec<Done>| {
            let mut data = vec![0; plan.crcs().len() * BLOCK_SIZE];
            let mut whole = true;
            for (at, Done { op, result }) in places.into_iter().zip(done) {
                let bytes = op.into_buffer();
                whole &= result.is_ok() && plan.matches(at, &bytes);
                if let Some(out) = data[at * BLOCK_SIZE..].get_mut(..bytes.len()) {
                    out.copy_from_slice(&bytes);
                }
            }
            if whole {
                let crcs = plan.crcs().to_vec();
                return (self.answer)(Ok(BlocksRead { outcome, data, crcs }));
            }
            self.tries += 1;
            self.step();
        });
        io.submit(ops, done);
    }

    /// What moves or is damaged is read once more under a lock, by a thread that may wait.
    fn wait_elsewhere(self) {
        let disk = self.engine.ids.disk;
        let spawned =
            std::thread::Builder::new().name("store-read".into()).spawn(move || self.wait());
        if let Err(error) = spawned {
            // Its caller is told by the answer that was dropped.
            tracing::error!(%disk, %error, "cannot start a thread");
        }
    }

    fn wait(self) {
        let count = usize::from(self.count);
        let (mut data, mut crcs) = (vec![0; count * BLOCK_SIZE], vec![0; count]);
        let read = self.engine.read(self.object, &self.chain, self.first, &mut data, &mut crcs);
        (self.answer)(read.map(|outcome| BlocksRead { outcome, data, crcs }));
    }
}
