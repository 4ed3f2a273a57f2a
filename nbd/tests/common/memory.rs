//! Devices made of memory, for tests and measurements.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use sheepdog_nbd::{Exports, OpenError};
use sheepdog_types::{Block, BlockError, BlockInfo, Burst, Completion, Done, Op, Request};

/// Completes everything inside `submit`.
pub struct Memory {
    bytes: Mutex<Vec<u8>>,
    info: BlockInfo,
    flushes: Mutex<usize>,
}

impl Memory {
    pub fn new(size: usize) -> Arc<Self> {
        Self::with(size, false)
    }

    pub fn with(size: usize, read_only: bool) -> Arc<Self> {
        let info = BlockInfo { size: size as u64, read_only, serial: "mem-1".into() };
        Arc::new(Self { bytes: Mutex::new(vec![0; size]), info, flushes: Mutex::new(0) })
    }

    pub fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    pub fn flushes(&self) -> usize {
        *self.flushes.lock().unwrap()
    }

    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, BlockError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.info.size => Ok(offset as usize..end as usize),
            _ => Err(BlockError::OutOfRange),
        }
    }

    pub fn run(&self, op: Op) -> Completion {
        match op {
            Op::Read { offset, len } => {
                let range = self.range(offset, len.into())?;
                return Ok(Done::Data(self.bytes()[range].to_vec()));
            }
            Op::Flush => *self.flushes.lock().unwrap() += 1,
            _ if self.info.read_only => return Err(BlockError::ReadOnly),
            Op::Write { offset, data, .. } => {
                let range = self.range(offset, data.len() as u64)?;
                self.bytes()[range].copy_from_slice(&data);
            }
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
                let range = self.range(offset, len)?;
                self.bytes()[range].fill(0);
            }
        }
        Ok(Done::Nothing)
    }
}

impl Block for Memory {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn submit(&self, batch: &mut Vec<Request>) {
        let mut burst = Burst::new();
        for Request { op, token } in batch.drain(..) {
            token.complete(self.run(op), &mut burst);
        }
    }
}

/// Completes on another thread, each batch in reverse order, and only while the gate is open.
pub struct Deferred {
    memory: Arc<Memory>,
    queue: Sender<Request>,
    state: Arc<(Mutex<Gate>, Condvar)>,
}

#[derive(Default)]
struct Gate {
    closed: bool,
    submitted: usize,
}

impl Deferred {
    pub fn new(memory: Arc<Memory>) -> Arc<Self> {
        let (queue, requests) = channel();
        let state = Arc::<(Mutex<Gate>, Condvar)>::default();
        thread::spawn({
            let (memory, state) = (memory.clone(), state.clone());
            move || complete_reversed(&memory, &requests, &state)
        });
        Arc::new(Self { memory, queue, state })
    }

    /// Holds completions back, or lets them go.
    pub fn set_closed(&self, closed: bool) {
        self.state.0.lock().unwrap().closed = closed;
        self.state.1.notify_all();
    }

    /// Waits until `n` requests were submitted in all.
    pub fn wait_submitted(&self, n: usize) {
        let gate = self.state.0.lock().unwrap();
        drop(self.state.1.wait_while(gate, |gate| gate.submitted < n).unwrap());
    }

    pub fn submitted(&self) -> usize {
        self.state.0.lock().unwrap().submitted
    }
}

fn complete_reversed(
    memory: &Memory,
    requests: &Receiver<Request>,
    state: &(Mutex<Gate>, Condvar),
) {
    while let Ok(first) = requests.recv() {
        let gate = state.0.lock().unwrap();
        drop(state.1.wait_while(gate, |gate| gate.closed).unwrap());
        let mut waiting = vec![first];
        waiting.extend(requests.try_iter());
        let mut burst = Burst::new();
        for Request { op, token } in waiting.into_iter().rev() {
            token.complete(memory.run(op), &mut burst);
        }
    }
}

impl Block for Deferred {
    fn info(&self) -> BlockInfo {
        self.memory.info()
    }

    fn submit(&self, batch: &mut Vec<Request>) {
        // Counted first: a completion must not be seen before its request was counted. And none is completed before
        // all of the batch are there, to be reversed.
        let mut gate = self.state.0.lock().unwrap();
        gate.submitted += batch.len();
        for request in batch.drain(..) {
            self.queue.send(request).unwrap();
        }
        drop(gate);
        self.state.1.notify_all();
    }
}

/// A fixed list of exports. Names that begin with `private` are refused, `broken` not available.
pub struct Fixed(pub Vec<(String, Arc<dyn Block>)>);

impl Fixed {
    pub fn one(name: &str, block: Arc<dyn Block>) -> Arc<Self> {
        Arc::new(Self(vec![(name.into(), block)]))
    }
}

impl Exports for Fixed {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Block>, OpenError> {
        if name.starts_with("private") {
            return Err(OpenError::Refused("not for you".into()));
        }
        if name == "broken" {
            return Err(OpenError::Unavailable("no quorum".into()));
        }
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map(|(_, block)| block.clone()).ok_or(OpenError::Unknown)
    }
}
