//! A writer that remembers what was acknowledged and what was flushed, and can say later whether a volume
//! still holds it.

use crate::{Client, Command, Rng};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

const BLOCK: usize = 4096;

#[derive(Clone, Copy, Default)]
struct Page {
    /// Newest operation that a finished flush covers; 0: none.
    flushed: u64,
    /// Newest operation that was answered.
    answered: u64,
    /// Newest operation that was sent.
    sent: u64,
}

/// Writes blocks of 4 KiB at random places below `blocks`.
pub struct Scribe {
    rng: Rng,
    seed: u64,
    pages: Vec<Page>,
    operation: u64,
}

impl Scribe {
    /// Knows nothing about the volume yet.
    pub fn new(seed: u64, blocks: usize) -> Self {
        Self { rng: Rng(seed), seed, pages: vec![Page::default(); blocks], operation: 0 }
    }

    fn data(&self, block: usize, operation: u64) -> Vec<u8> {
        let mut data = vec![0; BLOCK];
        data[..8].copy_from_slice(&operation.to_le_bytes());
        let key = self.seed ^ ((block as u64) << 40) ^ operation;
        Rng(key).fill(&mut data[8..]);
        data
    }

    /// Sends `count` writes to different blocks without waiting for an answer: handle → block.
    pub fn send(&mut self, client: &mut Client, count: usize) -> HashMap<u64, usize> {
        let mut blocks = Vec::new();
        while blocks.len() < count {
            let block = self.rng.below(self.pages.len() as u64) as usize;
            if !blocks.contains(&block) {
                blocks.push(block);
            }
        }
        let mut in_flight = HashMap::new();
        for block in blocks {
            self.operation += 1;
            self.pages[block].sent = self.operation;
            let data = self.data(block, self.operation);
            let offset = (block * BLOCK) as u64;
            let handle = client.send(Command::Write, offset, BLOCK as u32, &data);
            in_flight.insert(handle.unwrap_or_else(|e| panic!("write was not sent: {e:?}")), block);
        }
        in_flight
    }

    /// `count` writes side by side; all must succeed.
    pub fn write(&mut self, client: &mut Client, count: usize) {
        let mut in_flight = self.send(client, count);
        while !in_flight.is_empty() {
            let (handle, result) = client.reply().unwrap_or_else(|e| panic!("no answer: {e:?}"));
            assert!(result.is_ok(), "a write failed: {result:?}");
            let block = in_flight.remove(&handle);
            let block = block.unwrap_or_else(|| panic!("a reply to no write: {handle}"));
            self.pages[block].answered = self.pages[block].sent;
        }
    }

    /// Writes and flushes on a connection of its own until `work` is done; gives what that gave.
    pub fn write_during<T>(&mut self, client: &mut Client, work: impl FnOnce() -> T) -> T {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut rounds = 0_u64;
                while !done.load(Ordering::Acquire) {
                    self.write(client, 16);
                    rounds += 1;
                    if rounds.is_multiple_of(8) {
                        self.flush(client);
                    }
                }
                rounds
            });
            // The writer has to end whether the work does or panics.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            done.store(true, Ordering::Release);
            let rounds = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let value = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert!(rounds > 0, "nothing was written meanwhile");
            value
        })
    }

    /// A flush; everything answered so far must be there from now on.
    pub fn flush(&mut self, client: &mut Client) {
        client.flush().unwrap_or_else(|e| panic!("flush failed: {e:?}"));
        for page in &mut self.pages {
            page.flushed = page.answered;
        }
    }

    /// Every block holds, whole, its newest flushed write or one sent after it; panics otherwise. After
    /// this, what was found is what is expected. Returns the number of blocks looked at.
    pub fn verify(&mut self, client: &mut Client) -> usize {
        let mut looked_at = 0;
        let mut wrong = Vec::new();
        for block in 0..self.pages.len() {
            let page = self.pages[block];
            if page.sent == 0 {
                continue;
            }
            let found = client.read((block * BLOCK) as u64, BLOCK as u32);
            let found = found.unwrap_or_else(|e| panic!("block {block} cannot be read: {e:?}"));
            looked_at += 1;
            match self.recognise(block, &found) {
                Some(op) if (page.flushed..=page.sent).contains(&op) => {
                    self.pages[block] = Page { flushed: op, answered: op, sent: op };
                }
                other => wrong.push((block, page.flushed, page.sent, other)),
            }
        }
        assert!(
            wrong.is_empty(),
            "{} of {looked_at} blocks are wrong (block, flushed, sent, found): {:?}",
            wrong.len(),
            &wrong[..wrong.len().min(10)]
        );
        looked_at
    }

    /// Which operation wrote this; 0 for a block never written.
    fn recognise(&self, block: usize, found: &[u8]) -> Option<u64> {
        if found.iter().all(|b| *b == 0) {
            return Some(0);
        }
        let head = found.get(..8)?.try_into().ok()?;
        let operation = u64::from_le_bytes(head);
        (found == self.data(block, operation)).then_some(operation)
    }
}
