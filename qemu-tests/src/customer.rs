//! A client that goes on whatever happens: it writes and reads back over NBD, waits as long as it takes,
//! and connects again when the daemon that served it was killed, as QEMU does. Whatever is not excused
//! beforehand is a failure.

use crate::{Client, Command, Export, NbdError, PATIENCE, Rng, eventually};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// Writes side by side.
const DEPTH: usize = 8;
/// Rounds of writes before a flush.
const FLUSH_EVERY: u64 = 16;
/// Rounds of writes before all that was ever written is read.
const VERIFY_EVERY: u64 = 500;
/// The server is stopping, in NBD's numbers.
const ESHUTDOWN: u32 = 108;
/// Nothing may take longer: a node that comes and goes all the time may have to wait for a minute or two.
const LIMIT: Duration = PATIENCE.saturating_mul(8);
/// The error number of a full disk.
const ENOSPC: u32 = 28;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    rounds: AtomicU64,
    longest: AtomicU64,
    /// How often its gateway was killed.
    excused: AtomicU64,
    /// Some disk is full on purpose.
    full: AtomicBool,
}

/// What a client saw.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// Rounds of writes.
    pub rounds: u64,
    /// Blocks read and found right.
    pub verified: u64,
    /// The longest that one step took, and when that was, from the client's start.
    pub longest: (Duration, Duration),
    /// Connections that broke with the gateway.
    pub reconnects: u64,
    /// Writes refused for want of space.
    pub refused: u64,
}

/// A running client; dropping it leaves its thread alone.
pub struct Customer {
    name: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Account>>,
}

impl Customer {
    /// Begins to use the first `blocks` blocks of an export.
    pub fn start(export: &Export, seed: u64, blocks: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let (export, inside, name) = (export.clone(), Arc::clone(&shared), export.volume.clone());
        let work = move || Work::new(export, seed, blocks, inside).go();
        let customer = Self { name, shared, thread: Some(std::thread::spawn(work)) };
        customer.wait_for_more(10);
        customer
    }

    /// Its gateway is about to be killed: one lost connection is no failure.
    pub fn excuse(&self) {
        self.shared.excused.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether writes may be refused for want of space from now on.
    pub fn excuse_no_space(&self, full: bool) {
        self.shared.full.store(full, Ordering::Release);
    }

    /// Rounds of writes that were answered.
    pub fn rounds(&self) -> u64 {
        self.shared.rounds.load(Ordering::Acquire)
    }

    /// The longest step since this was asked last; one under way counts when it has ended.
    pub fn take_longest(&self) -> Duration {
        Duration::from_micros(self.shared.longest.swap(0, Ordering::AcqRel))
    }

    /// Panics when it has given up.
    pub fn assert_alive(&self) {
        let alive = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        assert!(alive, "client of {} gave up: see above", self.name);
    }

    /// Waits until some more rounds were answered.
    pub fn wait_for_more(&self, rounds: u64) {
        let goal = self.rounds() + rounds;
        eventually(&format!("{rounds} more rounds of {}", self.name), LIMIT, || {
            self.assert_alive();
            (self.rounds() >= goal).then_some(())
        });
    }

    /// Stops it, flushes, and reads everything back.
    pub fn finish(mut self) -> Account {
        self.shared.stop.store(true, Ordering::Release);
        let thread = self.thread.take().unwrap_or_else(|| panic!("{} has ended", self.name));
        let account = thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
        println!("client of {}: {account:?}", self.name);
        account
    }
}

impl Drop for Customer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
    }
}

/// What a block may hold: the newest write that was answered, and one that was refused after it.
#[derive(Clone, Copy, Default)]
struct Page {
    answered: u64,
    refused: u64,
}

struct Work {
    export: Export,
    client: Client,
    shared: Arc<Shared>,
    rng: Rng,
    seed: u64,
    pages: Vec<Page>,
    operation: u64,
    begin: Instant,
    account: Account,
}

/// A request, to be sent again on another connection if need be.
#[derive(Clone, Copy)]
enum Request {
    Read(usize),
    Write(usize, u64),
    Flush,
}

impl Work {
    fn new(export: Export, seed: u64, blocks: usize, shared: Arc<Shared>) -> Self {
        let client = export.connect();
        client.patience(LIMIT);
        Self {
            export,
            client,
            shared,
            rng: Rng(seed),
            seed,
            pages: vec![Page::default(); blocks],
            operation: 0,
            begin: Instant::now(),
            account: Account::default(),
        }
    }

    fn go(mut self) -> Account {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.write();
            self.account.rounds = self.shared.rounds.fetch_add(1, Ordering::AcqRel) + 1;
            if self.account.rounds.is_multiple_of(FLUSH_EVERY) {
                self.carry_out(&[Request::Flush]);
                self.read_some();
            }
            if self.account.rounds.is_multiple_of(VERIFY_EVERY) {
                self.verify();
            }
            // A client that is always busy would starve the cluster on a machine with few cores.
            std::thread::sleep(Duration::from_millis(5));
        }
        self.carry_out(&[Request::Flush]);
        self.verify();
        self.account
    }

    fn some_blocks(&mut self) -> Vec<usize> {
        let mut blocks = Vec::new();
        while blocks.len() < DEPTH {
            let block = self.rng.below(self.pages.len() as u64) as usize;
            if !blocks.contains(&block) {
                blocks.push(block);
            }
        }
        blocks
    }

    fn write(&mut self) {
        let mut requests = Vec::new();
        for block in self.some_blocks() {
            self.operation += 1;
            requests.push(Request::Write(block, self.operation));
        }
        self.carry_out(&requests);
    }

    fn read_some(&mut self) {
        let requests: Vec<_> = self.some_blocks().into_iter().map(Request::Read).collect();
        self.carry_out(&requests);
    }

    fn verify(&mut self) {
        for first in (0..self.pages.len()).step_by(DEPTH) {
            let last = (first + DEPTH).min(self.pages.len());
            let requests: Vec<_> = (first..last).map(Request::Read).collect();
            self.carry_out(&requests);
        }
    }

    /// Sends the requests side by side, again on each new connection, until all have an answer.
    fn carry_out(&mut self, requests: &[Request]) {
        let begin = Instant::now();
        let mut left = requests.to_vec();
        while !left.is_empty() {
            if let Err(error) = self.attempt(&mut left) {
                self.connect_again(&error);
            }
        }
        let took = begin.elapsed();
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.shared.longest.fetch_max(micros, Ordering::AcqRel);
        if took > self.account.longest.0 {
            self.account.longest = (took, begin - self.begin);
        }
    }

    fn attempt(&mut self, left: &mut Vec<Request>) -> Result<(), NbdError> {
        let mut in_flight = Vec::new();
        for request in left.iter() {
            let handle = match *request {
                Request::Read(block) => {
                    self.client.send(Command::Read, place(block), BLOCK as u32, &[])
                }
                Request::Write(block, operation) => {
                    let data = self.data(block, operation);
                    self.client.send(Command::Write, place(block), BLOCK as u32, &data)
                }
                Request::Flush => self.client.send(Command::Flush, 0, 0, &[]),
            };
            in_flight.push(handle?);
        }
        while !left.is_empty() {
            let (handle, result) = self.client.reply()?;
            let index = in_flight.iter().position(|h| *h == handle);
            let index = index.unwrap_or_else(|| panic!("a reply to no request: {handle}"));
            in_flight.swap_remove(index);
            if result == Err(ESHUTDOWN) {
                return Err(NbdError::Refused(ESHUTDOWN)); // not carried out: asked again elsewhere
            }
            self.judge(left.swap_remove(index), result);
        }
        Ok(())
    }

    fn judge(&mut self, request: Request, result: Result<Vec<u8>, u32>) {
        let volume = &self.export.volume;
        match (request, result) {
            (Request::Write(block, operation), Ok(_)) => {
                self.pages[block] = Page { answered: operation, refused: 0 };
            }
            (Request::Write(block, operation), Err(ENOSPC)) => {
                let excused = self.shared.full.load(Ordering::Acquire);
                assert!(excused, "{volume}: no space for a write of block {block}");
                self.account.refused += 1;
                self.pages[block].refused = operation;
            }
            (Request::Write(block, _), Err(error)) => {
                panic!("{volume}: a write of block {block} failed: {error}")
            }
            (Request::Flush, result) => assert!(result.is_ok(), "{volume}: flush: {result:?}"),
            (Request::Read(block), Ok(found)) => self.look(block, &found),
            (Request::Read(block), Err(error)) => {
                panic!("{volume}: block {block} cannot be read: {error}")
            }
        }
    }

    /// No power fails: what was answered is there, flushed or not.
    fn look(&mut self, block: usize, found: &[u8]) {
        let page = self.pages[block];
        let held = if found.iter().all(|byte| *byte == 0) {
            Some(0)
        } else {
            let operation = u64::from_le_bytes(found[..8].try_into().unwrap_or([0; 8]));
            (found == self.data(block, operation)).then_some(operation)
        };
        let right = held == Some(page.answered) || (page.refused > 0 && held == Some(page.refused));
        assert!(
            right,
            "{}: block {block} holds {held:?} instead of write {}{}",
            self.export.volume,
            page.answered,
            if page.refused > 0 { " or a refused one" } else { "" }
        );
        // Whatever it is, it stays.
        self.pages[block] = Page { answered: held.unwrap_or(0), refused: 0 };
        self.account.verified += 1;
    }

    fn data(&self, block: usize, operation: u64) -> Vec<u8> {
        let mut data = vec![0; BLOCK];
        data[..8].copy_from_slice(&operation.to_le_bytes());
        Rng(self.seed ^ ((block as u64) << 40) ^ operation).fill(&mut data[8..]);
        data
    }

    fn connect_again(&mut self, error: &NbdError) {
        let volume = &self.export.volume;
        self.account.reconnects += 1;
        let excused = self.shared.excused.load(Ordering::Acquire);
        assert!(
            self.account.reconnects <= excused,
            "{volume}: the connection broke although nobody killed its gateway: {error:?}"
        );
        let client = eventually(&format!("a new connection to {volume}"), LIMIT, || {
            Client::connect(&self.export.socket, volume).ok()
        });
        client.patience(LIMIT);
        self.client = client;
    }
}

fn place(block: usize) -> u64 {
    (block * BLOCK) as u64
}
