//! The engine on `io_uring`: one thread, which the kernel answers in batches.
//!
//! The thread makes one system call per turn: it hands over all that was queued, and waits until
//! something has ended or somebody queues more. The latter is a read of a counter (`eventfd`),
//! which is always in flight beside the operations.
//!
//! Files are not registered with the ring. It would spare the kernel one look-up and one reference
//! of the file per operation; against that stands a table of the recently used files to keep in
//! step with the ring's. See the figures at [`entry`].
//!
//! This is the only file of the crate with unsafe code: an address given to the kernel outlives
//! every borrow that the compiler could check.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::queue::{self, Queue, Step, Task};
use super::{Buffer, Limits, Op};

/// Pause before the kernel is asked again that was short of memory.
const BREATH: Duration = Duration::from_millis(1);

/// Submits what is in the ring and waits for at least one answer. Replaced by tests.
type Enter = Box<dyn FnMut(&IoUring) -> io::Result<usize> + Send>;

/// A ring that the kernel has granted.
pub(super) struct Ring {
    pub(super) ring: IoUring,
    pub(super) enter: Enter,
}

impl Ring {
    /// Makes a ring for the calling thread, and asks whether it can do what is needed.
    ///
    /// # Errors
    /// The kernel's refusal; [`explain`] makes a sentence of it.
    pub(super) fn open(limits: Limits) -> io::Result<Self> {
        // One entry for each operation and one for the event: neither queue ever overflows.
        let entries = (u32::from(limits.in_flight) + 1).next_power_of_two();
        // Answers are worked out when this thread asks for them rather than by interrupting it.
        let ring =
            match IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries) {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                    // Linux before 6.1.
                    IoUring::builder().build(entries)?
                }
                other => other?,
            };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE];
        if !ring.params().is_feature_nodrop() || !needed.iter().all(|op| probe.is_supported(*op)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring, enter: Box::new(|ring| ring.submit_and_wait(1)) })
    }
}

/// Why `io_uring` was refused, with what can be done.
pub(super) fn explain(error: &io::Error) -> String {
    let hint = match Errno::from_io_error(error) {
        Some(Errno::PERM | Errno::ACCESS) => {
            "seccomp, a security module or the sysctl kernel.io_uring_disabled forbids it"
        }
        Some(Errno::NOSYS) => "the kernel was built without it, or seccomp hides it",
        Some(Errno::NOMEM) => "too little memory may be locked (ulimit -l)",
        Some(Errno::MFILE | Errno::NFILE) => "too many files are open (ulimit -n)",
        _ if error.kind() == io::ErrorKind::Unsupported => "the kernel's is too old (before 5.6)",
        _ => return error.to_string(),
    };
    format!("{error}: {hint}")
}

/// Starts the engine's thread, with the ring that `open` makes.
///
/// # Errors
/// Those of `open`, and whatever keeps the ring from passing a first wake-up on.
pub(super) fn start(
    name: &str,
    limits: Limits,
    open: impl FnOnce(Limits) -> io::Result<Ring> + Send + 'static,
) -> io::Result<(Arc<Queue>, JoinHandle<()>)> {
    let event = Arc::new(File::from(eventfd(0, EventfdFlags::CLOEXEC)?));
    let queue = Arc::new(Queue::new(limits, Some(Arc::clone(&event))));
    let (ready, started) = mpsc::sync_channel(1);
    let (queue_of_thread, name_of_thread) = (Arc::clone(&queue), name.to_owned());
    let thread = std::thread::Builder::new().name(format!("io-{name}")).spawn(move || {
        queue::enter_engine_thread();
        let queue = Arc::clone(&queue_of_thread);
        // Owns `ready`, so that a panic drops it.
        let open = move || {
            let opened = open(limits).and_then(|ring| Driver::new(ring, queue, event));
            let (driver, answer) = match opened {
                Ok(driver) => (Some(driver), Ok(())),
                Err(error) => (None, Err(error)),
            };
            // The receiver waits below.
            let _ = ready.send(answer);
            driver
        };
        serve(&name_of_thread, &queue_of_thread, open);
    })?;
    let answer = started.recv().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")));
    match answer {
        Ok(()) => Ok((queue, thread)),
        Err(error) => {
            queue.stop();
            // If it panicked, that was reported.
            let _ = thread.join();
            Err(error)
        }
    }
}

/// Runs the driver; if it fails or panics, answers everything after that with an error.
fn serve(name: &str, queue: &Queue, open: impl FnOnce() -> Option<Driver>) {
    let run = || open().map_or(Ok(()), |mut driver| driver.run());
    let reason = match std::panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => format!("io_uring: {error}"),
        Err(_) => "its thread panicked".to_owned(),
    };
    tracing::error!(engine = name, reason, "the I/O engine failed; restart to use the disk again");
    queue.refuse_all(&reason);
}

/// What is known to the kernel under an index.
enum Slot {
    Free,
    Task(Task),
    /// The read that ends when the event is rung.
    Wake(Op),
}

/// Everything that the kernel may use: it stays here until the kernel has answered.
struct Table {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

impl Table {
    /// Index of the wake-up's slot; those above are for tasks.
    const WAKE: usize = 0;

    fn new(tasks: usize, event: Arc<File>) -> Self {
        let wake = Op::Read { file: event, offset: 0, buf: Buffer::new(mem::size_of::<u64>()) };
        let mut slots = vec![Slot::Wake(wake)];
        slots.resize_with(tasks + 1, || Slot::Free);
        Self { slots, free: (1..=tasks).rev().collect() }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - 1 - self.free.len()
    }

    fn insert(&mut self, task: Task) -> usize {
        let index = self.free.pop().expect("no more tasks are taken than slots are free");
        self.slots[index] = Slot::Task(task);
        index
    }

    /// The task at `index`, whose slot becomes free.
    fn remove(&mut self, index: usize) -> Option<Task> {
        match mem::replace(&mut self.slots[index], Slot::Free) {
            Slot::Task(task) => {
                self.free.push(index);
                Some(task)
            }
            other => {
                self.slots[index] = other;
                None
            }
        }
    }
}

impl Drop for Table {
    /// Leaks what the kernel has not answered. There is nothing after an orderly end, where
    /// [`Driver::run`] has taken the wake-up out too.
    fn drop(&mut self) {
        let mut leaked = 0;
        for slot in self.slots.drain(..) {
            match slot {
                Slot::Free => {}
                Slot::Wake(op) => mem::forget(op),
                Slot::Task(task) => {
                    leaked += task.op.len();
                    task.abandon("the ring broke off");
                }
            }
        }
        if leaked > 0 {
            tracing::error!(bytes = leaked, "memory left to the kernel for good");
        }
    }
}

/// The thread's side of the ring.
struct Driver {
    ring: Ring,
    table: Table,
    queue: Arc<Queue>,
    /// Answers of the kernel that are being worked on: index and result.
    answers: Vec<(u64, i32)>,
    /// Wake-ups seen.
    woken: u64,
    /// The engine ends: a wake-up is the last.
    closing: bool,
}

impl Driver {
    /// Puts the ring to work, and sees one wake-up pass through it: the kernel may grant a ring
    /// and yet refuse to use it.
    fn new(ring: Ring, queue: Arc<Queue>, event: Arc<File>) -> io::Result<Self> {
        let table = Table::new(usize::from(queue.limits().in_flight), event);
        let mut driver = Self { ring, table, queue, answers: Vec::new(), woken: 0, closing: false };
        driver.issue(Table::WAKE)?;
        driver.queue.ring_event();
        while driver.woken == 0 {
            driver.enter()?;
            driver.reap()?;
        }
        Ok(driver)
    }

    /// Works until the engine is dropped and nothing is left to do.
    ///
    /// # Errors
    /// The ring cannot be used any more.
    fn run(&mut self) -> io::Result<()> {
        let mut tasks = Vec::new();
        loop {
            let taken = self.queue.take(self.table.free.len(), &mut tasks);
            let count = tasks.len();
            for task in tasks.drain(..) {
                self.begin(task)?;
            }
            if !taken.asleep && !self.table.free.is_empty() {
                // Some ended without the kernel: there may be more that wait.
                continue;
            }
            if !taken.stopping || self.table.in_flight() > 0 {
                self.enter()?;
                self.reap()?;
            } else if count == 0 {
                return self.close();
            }
        }
    }

    fn begin(&mut self, task: Task) -> io::Result<()> {
        match task.first_step() {
            Step::Again => {
                let index = self.table.insert(task);
                self.issue(index)
            }
            Step::Ended(result) => {
                task.finish(result);
                Ok(())
            }
        }
    }

    /// Queues what is left to do of the operation at `index` for the next [`Driver::enter`].
    fn issue(&mut self, index: usize) -> io::Result<()> {
        let piece = self.queue.limits().piece;
        let entry = match &mut self.table.slots[index] {
            Slot::Free => return Err(io::Error::other("nothing to submit")),
            Slot::Wake(op) => entry(op, 0, piece),
            Slot::Task(task) => entry(&mut task.op, task.done, piece),
        };
        let entry = entry.user_data(index as u64);
        // SAFETY: The kernel uses the descriptor and the memory that `entry` names until it has
        // answered `index`. Both belong to the operation in that slot of the table. The memory is
        // on the heap in a vector that is never grown, so its address does not depend on where
        // the operation is moved. The slot is left alone until the answer is there: `reap` is the
        // only one that looks at a slot in use or empties it, for the index of an answer, of which
        // there is one per entry. If no answer comes (an error of the ring, a panic), `Drop for
        // Table` leaks the operation. The bytes are initialised, and `entry` had them as `&mut`
        // if the kernel writes to them.
        let pushed = unsafe { self.ring.ring.submission().push(&entry) };
        // There are as many entries as slots, and each slot has at most one.
        pushed.map_err(|_| io::Error::other("the ring's queue is full"))
    }

    /// Hands over all that was issued, and waits for an answer. What the kernel did not take
    /// stays for the next turn, and so does the waiting when a signal ends it.
    fn enter(&mut self) -> io::Result<()> {
        match (self.ring.enter)(&self.ring.ring) {
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => Ok(()),
                // EAGAIN, EBUSY: no memory for requests or answers. There is nothing to wait for.
                io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(BREATH);
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }

    /// Works off the answers that are there.
    fn reap(&mut self) -> io::Result<()> {
        let mut answers = mem::take(&mut self.answers);
        let arrived = self.ring.ring.completion();
        answers.extend(arrived.map(|answer| (answer.user_data(), answer.result())));
        for (index, result) in answers.drain(..) {
            let result = match u32::try_from(result) {
                Ok(count) => Ok(count as usize),
                Err(_) => Err(io::Error::from_raw_os_error(result.saturating_neg())),
            };
            self.answered(usize::try_from(index).unwrap_or(usize::MAX), result)?;
        }
        self.answers = answers;
        Ok(())
    }

    fn answered(&mut self, index: usize, result: io::Result<usize>) -> io::Result<()> {
        let step = match self.table.slots.get_mut(index) {
            None | Some(Slot::Free) => {
                return Err(io::Error::other("an answer to something that was not asked"));
            }
            Some(Slot::Wake(_)) => return self.woken(result),
            Some(Slot::Task(task)) => task.advance(result),
        };
        match step {
            Step::Again => self.issue(index),
            Step::Ended(result) => {
                if let Some(task) = self.table.remove(index) {
                    task.finish(result);
                }
                Ok(())
            }
        }
    }

    /// The read of the event has ended: another one waits for the next.
    fn woken(&mut self, result: io::Result<usize>) -> io::Result<()> {
        match result {
            Ok(_) => self.woken += 1,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if self.closing {
            self.table.slots[Table::WAKE] = Slot::Free;
            return Ok(());
        }
        self.issue(Table::WAKE)
    }

    /// Ends the read of the event, the last thing in flight.
    fn close(&mut self) -> io::Result<()> {
        self.closing = true;
        self.queue.ring_event();
        while matches!(self.table.slots[Table::WAKE], Slot::Wake(_)) {
            self.enter()?;
            self.reap()?;
        }
        Ok(())
    }
}

/// The ring's entry for what is left of `op` after `done` bytes, at most `piece` of it.
fn entry(op: &mut Op, done: usize, piece: usize) -> squeue::Entry {
    let fd = types::Fd(op.file().as_raw_fd());
    let length = |rest: usize| u32::try_from(rest.min(piece)).unwrap_or(1 << 30);
    match op {
        Op::Read { offset, buf, .. } => {
            let rest = &mut buf[done..];
            opcode::Read::new(fd, rest.as_mut_ptr(), length(rest.len()))
                .offset(*offset + done as u64)
                .build()
        }
        Op::Write { offset, buf, .. } => {
            let rest = &buf[done..];
            opcode::Write::new(fd, rest.as_ptr(), length(rest.len()))
                .offset(*offset + done as u64)
                .build()
        }
        Op::Sync { .. } => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
    }
}
