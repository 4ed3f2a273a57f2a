//! A few threads with a bounded queue, for work that may take long.

use crate::cluster::lock;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
    limit: usize,
}

/// Threads that run jobs. Dropping it lets the jobs that run finish and forgets the others.
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// Starts `threads` threads; at most `limit` jobs wait.
    ///
    /// # Errors
    /// If a thread cannot be made.
    pub fn new(name: &str, threads: usize, limit: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), ready: Condvar::new(), limit });
        for n in 0..threads {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name(format!("{name}-{n}")).spawn(move || shared.run())?;
        }
        Ok(Self { shared })
    }

    /// Queues a job; false, and the job is dropped, when too many wait.
    pub fn submit(&self, job: Job) -> bool {
        let mut queue = lock(&self.shared.queue);
        if queue.closed || queue.jobs.len() >= self.shared.limit {
            return false;
        }
        queue.jobs.push_back(job);
        self.shared.ready.notify_one();
        true
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut queue = lock(&self.shared.queue);
        queue.closed = true;
        queue.jobs.clear();
        self.shared.ready.notify_all();
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let job = loop {
                if queue.closed {
                    return;
                }
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            job();
        }
    }
}
