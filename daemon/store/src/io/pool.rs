//! The engine without `io_uring`: threads that block in the system's calls.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::queue::{self, Queue, Step, Task};
use super::{Limits, Op};

/// Threads of one engine. A disk is kept busy by a few; more only take turns.
const THREADS: usize = 4;

/// Starts the threads.
pub(super) fn start(name: &str, limits: Limits) -> io::Result<(Arc<Queue>, Vec<JoinHandle<()>>)> {
    let queue = Arc::new(Queue::new(limits, None));
    let mut threads = Vec::with_capacity(THREADS);
    for n in 0..THREADS {
        let queue_of_thread = Arc::clone(&queue);
        let spawned = std::thread::Builder::new()
            .name(format!("io{n}-{name}"))
            .spawn(move || work(&queue_of_thread));
        match spawned {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                queue.stop();
                return Err(error);
            }
        }
    }
    Ok((queue, threads))
}

fn work(queue: &Queue) {
    queue::enter_engine_thread();
    let mut scratch = Vec::with_capacity(1);
    while let Some(mut task) = queue.take_one(&mut scratch) {
        let mut step = task.first_step();
        loop {
            match step {
                Step::Again => {
                    let result = once(&mut task, queue.limits().piece);
                    step = task.advance(result);
                }
                Step::Ended(result) => break task.finish(result),
            }
        }
    }
}

/// One system call; the bytes it transferred.
fn once(task: &mut Task, piece: usize) -> io::Result<usize> {
    let from = task.done;
    match &mut task.op {
        Op::Read { file, offset, buf } => {
            let to = buf.len().min(from.saturating_add(piece));
            file.read_at(&mut buf[from..to], *offset + from as u64)
        }
        Op::Write { file, offset, buf } => {
            let to = buf.len().min(from.saturating_add(piece));
            file.write_at(&buf[from..to], *offset + from as u64)
        }
        Op::Sync { file } => file.sync_data().map(|()| 0),
    }
}
