//! A device in memory that completes at once or when the test says so, then in reverse order.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use sheepdog_types::{
    Block, BlockError, BlockInfo, Burst, Completion, Done, MAX_REQUEST_BYTES, Op, Request,
};

/// Long enough for any machine; only ever waited for by a test that fails.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct State {
    data: Vec<u8>,
    holding: bool,
    letting_go: bool,
    held: Vec<Request>,
    ops: Vec<String>,
}

pub struct Disk {
    state: Mutex<State>,
    arrived: Condvar,
    pub read_only: bool,
}

impl Disk {
    pub fn new(size: usize) -> Self {
        let state = State { data: vec![0; size], ..State::default() };
        Self { state: Mutex::new(state), arrived: Condvar::new(), read_only: false }
    }

    /// From now on requests are kept until [`Disk::release`].
    pub fn hold(&self) {
        self.state.lock().unwrap().holding = true;
    }

    /// Waits until `count` requests are held.
    pub fn wait_held(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let wait = self.arrived.wait_timeout_while(state, PATIENCE, |s| s.held.len() < count);
        let (state, timeout) = wait.unwrap();
        assert!(!timeout.timed_out(), "only {} of {count} requests came", state.held.len());
    }

    /// Completes what is held, last come first, and holds no more.
    pub fn release(&self) {
        let mut state = self.state.lock().unwrap();
        state.holding = false;
        let held = std::mem::take(&mut state.held);
        drop(state);
        let mut burst = Burst::new();
        for Request { op, token } in held.into_iter().rev() {
            token.complete(self.execute(op), &mut burst);
        }
    }

    /// Completes one of what is held, by its place in the order of arrival; the others stay.
    pub fn release_one(&self, place: usize) {
        let Request { op, token } = self.state.lock().unwrap().held.remove(place);
        token.complete(self.execute(op), &mut Burst::new());
    }

    /// How many of the requests that are held are still wanted.
    pub fn wanted(&self) -> usize {
        self.state.lock().unwrap().held.iter().filter(|request| request.token.is_wanted()).count()
    }

    /// From now on requests that are held end with an error when their client is gone.
    pub fn let_go(&self) {
        self.state.lock().unwrap().letting_go = true;
    }

    /// How many requests are held.
    pub fn held(&self) -> usize {
        self.state.lock().unwrap().held.len()
    }

    /// What was executed, in order, and forgets it.
    pub fn ops(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().ops)
    }

    fn execute(&self, op: Op) -> Completion {
        let mut state = self.state.lock().unwrap();
        state.ops.push(match &op {
            Op::Read { offset, len } => format!("read {offset}+{len}"),
            Op::Write { offset, data, fua } => format!("write {offset}+{} fua={fua}", data.len()),
            Op::Flush => "flush".into(),
            Op::Discard { offset, len } => format!("discard {offset}+{len}"),
            Op::WriteZeroes { offset, len, may_unmap, fua } => {
                format!("zero {offset}+{len} unmap={may_unmap} fua={fua}")
            }
        });
        match op {
            Op::Read { offset, len } => {
                assert!(u64::from(len) <= MAX_REQUEST_BYTES);
                return Ok(Done::Data(range(&mut state.data, offset, u64::from(len))?.to_vec()));
            }
            Op::Write { .. } if self.read_only => return Err(BlockError::ReadOnly),
            Op::Write { offset, data, .. } => {
                assert!(data.len() as u64 <= MAX_REQUEST_BYTES);
                range(&mut state.data, offset, data.len() as u64)?.copy_from_slice(&data);
            }
            Op::Flush => {}
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
                range(&mut state.data, offset, len)?.fill(0);
            }
        }
        Ok(Done::Nothing)
    }
}

fn range(data: &mut [u8], offset: u64, len: u64) -> Result<&mut [u8], BlockError> {
    let end = offset.checked_add(len).ok_or(BlockError::OutOfRange)?;
    data.get_mut(offset as usize..end as usize).ok_or(BlockError::OutOfRange)
}

impl Block for Disk {
    fn info(&self) -> BlockInfo {
        let size = self.state.lock().unwrap().data.len() as u64;
        BlockInfo { size, read_only: self.read_only, serial: "test-disk".into() }
    }

    fn submit(&self, batch: &mut Vec<Request>) {
        let mut state = self.state.lock().unwrap();
        if state.holding {
            state.held.append(batch);
            self.arrived.notify_all();
            return;
        }
        drop(state);
        let mut burst = Burst::new();
        for Request { op, token } in batch.drain(..) {
            token.complete(self.execute(op), &mut burst);
        }
    }

    fn client_gone(&self) {
        let mut state = self.state.lock().unwrap();
        if state.letting_go {
            let gone: Vec<_> = state.held.extract_if(.., |r| !r.token.is_wanted()).collect();
            drop(state);
            drop(gone);
        }
    }
}
