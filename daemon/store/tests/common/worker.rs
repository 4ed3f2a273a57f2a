//! A process that changes a store until it is killed. It is this test program, started once more
//! for its test `worker`; it tells what it does over a socket in place of its standard input.

use std::io::{BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rustix::process::{Pid, Signal, kill_process};
use sheepdog_store::{OpenError, Store};

use super::actor::{Actor, Stopped};
use super::history::{Bounds, Event, History, RECORD_BYTES, Record};
use super::{Rng, WRITERS, opening_options};

const DIR: &str = "SHEEPDOG_STORE_WORKER_DIR";
const SEED: &str = "SHEEPDOG_STORE_WORKER_SEED";
const ROUND: &str = "SHEEPDOG_STORE_WORKER_ROUND";
const IDLE: &str = "SHEEPDOG_STORE_WORKER_IDLE";
const PING: u8 = b'p';
const QUIT: u8 = b'q';

/// To be called by a test named `worker`; does nothing unless this process is a worker.
pub fn run_if_asked() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let number = |name| {
        let text: String = std::env::var(name).expect("set with the directory");
        text.parse::<u64>().expect("a number")
    };
    let worked = catch_unwind(|| work(Path::new(&dir), number(SEED), number(ROUND)));
    std::process::exit(if worked.is_ok() { 0 } else { 3 });
}

fn work(dir: &Path, seed: u64, round: u64) {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().expect("a second descriptor");
    let mut commands = UnixStream::from(stdin);
    let reports = Mutex::new(commands.try_clone().expect("a second descriptor"));
    let report = |record: Record| {
        let mut out = reports.lock().expect("no writer panics here");
        // Without anybody who reads there is nothing left to do.
        out.write_all(&record.encode()).unwrap_or_else(|_| std::process::exit(4));
    };
    let first = AtomicBool::new(true);
    let stopped = |Stopped(error): Stopped| {
        if first.swap(false, SeqCst) {
            eprintln!("worker, round {round}: {error}");
        }
        report(Record { writer: 0, event: Event::Stopped });
    };
    let store = match Store::open(dir, opening_options(&mut Rng::new(seed, round))) {
        Ok(store) => store,
        Err(error @ OpenError::Io { .. }) => return stopped(Stopped(error.to_string())),
        Err(error) => panic!("{error}"),
    };
    report(Record { writer: 0, event: Event::Ready });
    let stop = AtomicBool::new(false);
    let guarded =
        |work: &dyn Fn() -> Result<(), Stopped>| match catch_unwind(AssertUnwindSafe(work)) {
            Ok(result) => result.unwrap_or_else(stopped),
            Err(_) => std::process::exit(3),
        };
    std::thread::scope(|scope| {
        if std::env::var(IDLE).is_err() {
            for writer in 0..WRITERS {
                let (guarded, store, stop, report) = (&guarded, &store, &stop, &report);
                scope.spawn(move || {
                    guarded(&|| write_on(Actor::new(store, seed, writer, round, report)?, stop));
                });
            }
        }
        serve(&mut commands, &report);
        stop.store(true, SeqCst);
    });
    if let Err(error) = store.close() {
        stopped(Stopped(error.to_string()));
    }
}

/// Answers pings until told to quit.
fn serve(commands: &mut UnixStream, report: &dyn Fn(Record)) {
    let mut command = [0];
    for number in 1.. {
        if commands.read_exact(&mut command).is_err() || command[0] == QUIT {
            return;
        }
        report(Record { writer: 0, event: Event::Pong(number) });
    }
}

fn write_on<R: FnMut(Record)>(mut actor: Actor<'_, R>, stop: &AtomicBool) -> Result<(), Stopped> {
    while !stop.load(SeqCst) {
        if let Some(error) = actor.step()? {
            panic!("there is room: {error}");
        }
    }
    Ok(())
}

/// What the parent knows of a worker.
struct Known {
    history: History,
    records: u64,
    ready: bool,
    stopped: bool,
    pongs: u64,
    ended: bool,
}

type Shared = Arc<(Mutex<Known>, Condvar)>;

/// A running worker. Dropping it kills it.
pub struct Worker {
    child: Child,
    commands: UnixStream,
    shared: Shared,
    reader: Option<JoinHandle<()>>,
    pings: u64,
}

/// What a worker is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Change the store until killed or told to quit.
    Write,
    /// Open the store only.
    Open,
}

impl Worker {
    /// Starts a worker on the store in `dir`; what it tells is added to `history`.
    pub fn start(history: History, dir: &Path, seed: u64, round: u64, task: Task) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "worker", "--nocapture"]);
        command.env(DIR, dir).env(SEED, seed.to_string()).env(ROUND, round.to_string());
        if task == Task::Open {
            command.env(IDLE, "1");
        }
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        let child = command.spawn().expect("a second process");
        // It holds the other end of the socket.
        drop(command);
        let known =
            Known { history, records: 0, ready: false, stopped: false, pongs: 0, ended: false };
        let shared = Shared::new((Mutex::new(known), Condvar::new()));
        let source = ours.try_clone().expect("a second descriptor");
        let reader = std::thread::spawn({
            let shared = shared.clone();
            move || listen(source, &shared)
        });
        Self { child, commands: ours, shared, reader: Some(reader), pings: 0 }
    }

    fn wait(&self, until: impl Fn(&Known) -> bool) -> MutexGuard<'_, Known> {
        let known = self.shared.0.lock().expect("the listener is well");
        let waiting = |known: &mut Known| !known.ended && !until(known);
        self.shared.1.wait_while(known, waiting).expect("the listener is well")
    }

    /// Waits until it has told `count` things, or can tell nothing more.
    pub fn wait_for(&self, count: u64) {
        drop(self.wait(|known| known.records >= count || known.stopped));
    }

    /// Waits until it has opened the store, or could not.
    pub fn wait_until_ready(&self) {
        drop(self.wait(|known| known.ready || known.stopped));
    }

    /// Waits until everything that it told before this call is in the history.
    pub fn ping(&mut self) {
        self.commands.write_all(&[PING]).expect("the worker lives");
        self.pings += 1;
        let known = self.wait(|known| known.pongs >= self.pings);
        assert!(known.pongs >= self.pings, "the worker died; see above");
    }

    /// What must and may be found after a power cut at this moment.
    pub fn flushed(&self) -> Bounds {
        self.shared.0.lock().expect("the listener is well").history.flushed()
    }

    /// Stops it where it is, until [`Worker::resume`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a child");
    }

    /// So many things it has told.
    pub fn told(&self) -> u64 {
        self.shared.0.lock().expect("the listener is well").records
    }

    /// What it has told.
    pub fn history(&self) -> History {
        self.shared.0.lock().expect("the listener is well").history.clone()
    }

    /// Kills it with SIGKILL; gives what it told, and whether the store had failed it.
    pub fn kill(mut self) -> (History, bool) {
        // It may have ended by itself, which the status tells.
        let _ = self.child.kill();
        let status = self.child.wait().expect("a child");
        let (history, stopped) = self.end();
        let by_itself = stopped && status.success();
        assert!(status.signal() == Some(9) || by_itself, "the worker failed ({status}); see above");
        (history, stopped)
    }

    /// Lets it close the store and end.
    pub fn quit(mut self) -> History {
        self.commands.write_all(&[QUIT]).expect("the worker lives");
        let status = self.child.wait().expect("a child");
        assert!(status.success(), "the worker failed ({status}); see above");
        let (history, stopped) = self.end();
        assert!(!stopped, "the store failed the worker; see above");
        history
    }

    fn end(&mut self) -> (History, bool) {
        let reader = self.reader.take().expect("ended once");
        reader.join().expect("the listener is well");
        let known = self.shared.0.lock().expect("the listener is well");
        (known.history.clone(), known.stopped)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Only after a failed check is it still there.
        if self.reader.is_some() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Takes records until the worker is gone. All that it sent before arrives.
fn listen(source: UnixStream, shared: &Shared) {
    let mut source = BufReader::new(source);
    let mut bytes = [0; RECORD_BYTES];
    while source.read_exact(&mut bytes).is_ok() {
        let record = Record::decode(&bytes);
        let mut known = shared.0.lock().expect("nobody panics with it");
        known.history.take(record);
        known.records += 1;
        match record.event {
            Event::Ready => known.ready = true,
            Event::Stopped => known.stopped = true,
            Event::Pong(number) => known.pongs = number,
            _ => {}
        }
        shared.1.notify_all();
    }
    shared.0.lock().expect("nobody panics with it").ended = true;
    shared.1.notify_all();
}
