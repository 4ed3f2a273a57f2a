//! I1, I2, I4, I5: a gateway is killed in the middle of writes, and another node takes its volume over, again
//! and again. What was acknowledged is there, what was not is there or not, but never changes its mind; in
//! the end all replicas are equal, also of what nobody has read since.
//!
//! `TAKEOVER_ROUNDS` says how many rounds; without it, 12. `SEED` repeats what is written and who is killed.

use sheepdog_qemu_tests::{
    Client, Cluster, Command, Export, Lab, PATIENCE, Rng, eventually, seed, setting,
};
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::time::{Duration, Instant};

const VOLUME: &str = "disk";
const BLOCK: usize = 4096;
const BLOCKS: usize = 8 * 1024;
/// A large write or read.
const LARGE: usize = 256;
/// Requests side by side.
const DEPTH: usize = 24;
const NODES: usize = 6;
const COPIES: usize = 3;
/// Rounds with the same nodes: a node that comes back often is kept waiting.
const SAME_NODES: u64 = 12;

/// What a block may hold.
#[derive(Clone, Copy, Default)]
struct Page {
    /// Its newest write that a flush covers.
    flushed: u64,
    /// Its newest write that was answered.
    answered: u64,
    /// Its newest write. Those in between died with their gateways, and may or may not be there.
    sent: u64,
}

/// What the client of the volume knows.
struct Model {
    rng: Rng,
    seed: u64,
    pages: Vec<Page>,
    operation: u64,
    in_flight: HashMap<u64, Range<usize>>,
}

impl Model {
    fn data(&self, block: usize, operation: u64) -> Vec<u8> {
        let mut data = vec![0; BLOCK];
        data[..8].copy_from_slice(&operation.to_le_bytes());
        Rng(self.seed ^ ((block as u64) << 40) ^ operation).fill(&mut data[8..]);
        data
    }

    /// Which write a block holds; 0 for none.
    fn recognise(&self, block: usize, found: &[u8]) -> Option<u64> {
        if found.iter().all(|byte| *byte == 0) {
            return Some(0);
        }
        let operation = u64::from_le_bytes(found.get(..8)?.try_into().ok()?);
        (found == self.data(block, operation)).then_some(operation)
    }

    /// Sends a write, small or large, of blocks that no other one in flight touches.
    fn send(&mut self, client: &mut Client) {
        let count = if self.rng.below(4) == 0 { LARGE } else { 1 };
        let range = loop {
            let first = self.rng.below((BLOCKS - count) as u64 + 1) as usize;
            let range = first..first + count;
            let free = |other: &Range<usize>| other.end <= range.start || range.end <= other.start;
            if self.in_flight.values().all(free) {
                break range;
            }
        };
        self.operation += 1;
        let data: Vec<u8> = range.clone().flat_map(|b| self.data(b, self.operation)).collect();
        let sent = client.send(Command::Write, at(range.start), data.len() as u32, &data);
        let handle = sent.unwrap_or_else(|e| panic!("write was not sent: {e:?}"));
        self.pages[range.clone()].iter_mut().for_each(|page| page.sent = self.operation);
        self.in_flight.insert(handle, range);
    }

    /// Writes until so many were answered; leaves others in flight.
    fn write(&mut self, client: &mut Client, answers: u64) {
        for _ in 0..answers {
            while self.in_flight.len() < DEPTH {
                self.send(client);
            }
            self.take_answer(client);
            if self.rng.below(64) == 0 {
                self.flush(client);
            }
        }
    }

    fn take_answer(&mut self, client: &mut Client) {
        let (handle, result) = client.reply().unwrap_or_else(|e| panic!("no answer: {e:?}"));
        assert!(result.is_ok(), "a write failed: {result:?}");
        let range = self.in_flight.remove(&handle);
        let range = range.unwrap_or_else(|| panic!("a reply to no write: {handle}"));
        self.pages[range].iter_mut().for_each(|page| page.answered = page.sent);
    }

    fn flush(&mut self, client: &mut Client) {
        while !self.in_flight.is_empty() {
            self.take_answer(client);
        }
        client.flush().unwrap_or_else(|e| panic!("flush failed: {e:?}"));
        self.pages.iter_mut().for_each(|page| page.flushed = page.answered);
    }

    /// Reads these blocks twice; each holds what it may, and keeps that.
    fn verify(&mut self, client: &mut Client, blocks: &[Range<usize>]) {
        self.in_flight.clear();
        for _ in 0..2 {
            for range in blocks {
                let length = (range.len() * BLOCK) as u32;
                let found = client.read(at(range.start), length);
                let found = found.unwrap_or_else(|e| panic!("{range:?} cannot be read: {e:?}"));
                for (block, found) in range.clone().zip(found.chunks(BLOCK)) {
                    self.look(block, found);
                }
            }
        }
    }

    fn look(&mut self, block: usize, found: &[u8]) {
        let Page { flushed, answered, sent } = self.pages[block];
        let held = self.recognise(block, found);
        let right = held.filter(|held| (answered..=sent).contains(held));
        let Some(held) = right else {
            panic!("block {block}: {held:?} (flushed {flushed}, answered {answered}, sent {sent})")
        };
        // Whatever it is, it stays.
        self.pages[block] = Page { flushed, answered: held, sent: held };
    }
}

fn at(block: usize) -> u64 {
    (block * BLOCK) as u64
}

fn all_blocks() -> Vec<Range<usize>> {
    (0..BLOCKS).step_by(LARGE).map(|first| first..first + LARGE).collect()
}

/// A cluster, and who has the volume.
struct Stage<'a> {
    cluster: Cluster,
    model: &'a mut Model,
    holder: usize,
    export: Export,
    /// Nodes that were killed as holders and have not been told to forget it.
    stale: BTreeSet<usize>,
}

impl<'a> Stage<'a> {
    fn set(lab: &Lab, model: &'a mut Model) -> Self {
        let cluster = Cluster::start(lab, NODES);
        cluster.create(VOLUME, "32M", COPIES as u32);
        let export = cluster.export_nbd(0, VOLUME);
        model.pages = vec![Page::default(); BLOCKS];
        model.in_flight.clear();
        Self { cluster, model, holder: 0, export, stale: BTreeSet::new() }
    }

    fn client(&self) -> Client {
        let client = self.export.connect();
        client.patience(2 * PATIENCE);
        client
    }

    /// SIGKILL to the gateway.
    fn kill_holder(&mut self) {
        self.cluster.kill(self.holder);
        self.stale.insert(self.holder);
    }

    /// Attaches the volume to another node that runs.
    fn take_over(&mut self) {
        let others: Vec<usize> =
            (0..NODES).filter(|n| *n != self.holder && self.cluster.runs(*n)).collect();
        let next = others[self.model.rng.below(others.len() as u64) as usize];
        let socket = self.cluster.socket(next, VOLUME, "nbd");
        let path = socket.display().to_string();
        let add = ["export", "add", VOLUME, "--nbd", &path];
        eventually("the volume to be free", PATIENCE, || self.cluster.try_dog(next, &add).ok());
        (self.holder, self.export) = (next, Export { volume: VOLUME.into(), socket });
    }

    /// Starts those who were killed, which goes on while the caller does.
    fn bring_back(&mut self) {
        for node in std::mem::take(&mut self.stale) {
            self.cluster.relaunch(node);
            // It remembers an export that it would serve again if the volume were free for a moment.
            eventually("an old export to be removed", PATIENCE, || {
                self.cluster.try_dog(node, &["export", "remove", VOLUME]).ok()
            });
        }
    }

    fn round(&mut self, round: u64) {
        let answers = 10 + self.model.rng.below(90);
        let mut client = self.client();
        self.model.write(&mut client, answers);
        self.kill_holder();
        drop(client);
        let killed = self.holder;
        self.take_over();
        // Some is read at once, and some only by the gateway after this one, or by none at all.
        let mut blocks = all_blocks();
        blocks.retain(|_| self.model.rng.below(4) != 0);
        println!(
            "round {round}: node {killed} died after {answers} answers, now at {}",
            self.holder
        );
        if self.model.rng.below(2) == 0 {
            self.bring_back();
        }
        let mut client = self.client();
        self.model.verify(&mut client, &blocks);
        drop(client);
        self.bring_back();
        if self.model.rng.below(2) == 0 {
            self.kill_holder();
        } else {
            self.cluster.unexport(self.holder, VOLUME);
        }
        self.take_over();
        self.bring_back();
        let mut client = self.client();
        self.model.verify(&mut client, &blocks);
    }

    /// One more takeover, after which nothing is read; all replicas become equal by themselves.
    fn curtain(mut self) {
        let mut client = self.client();
        self.model.write(&mut client, 50);
        self.kill_holder();
        self.take_over();
        self.bring_back();
        self.cluster.wait_healthy();
        eventually("the volume to be settled", PATIENCE, || {
            let info = self.cluster.try_dog(self.holder, &["volume", "info", VOLUME]).ok()?;
            (info["settled"] == true).then_some(())
        });
        let equal = self.cluster.stop_and_compare(COPIES);
        println!("all replicas are equal: {equal:?}");
        assert_eq!(equal.replicas, COPIES * BLOCKS / 1024);
    }
}

#[test]
fn volumes_of_killed_gateways_are_whole() {
    let rounds = setting("TAKEOVER_ROUNDS").unwrap_or(12);
    let seed = seed();
    let mut model =
        Model { rng: Rng(seed), seed, pages: Vec::new(), operation: 0, in_flight: HashMap::new() };
    let mut round = 0;
    while round < rounds {
        let lab = Lab::new("takeover");
        let mut stage = Stage::set(&lab, &mut model);
        for _ in 0..SAME_NODES.min(rounds - round) {
            round += 1;
            stage.round(round);
        }
        stage.curtain();
    }
}

/// Sends one block to each of so many objects, spread over the clients.
fn send_to_each(clients: &mut [Client], objects: usize, block: usize) {
    for object in 0..objects {
        let client = &mut clients[object % CLIENTS];
        let data = vec![block as u8; BLOCK];
        let sent = client.send(Command::Write, at(1024 * object + block), BLOCK as u32, &data);
        sent.unwrap_or_else(|e| panic!("write was not sent: {e:?}"));
    }
}

/// A server takes 256 requests of a client at a time.
const CLIENTS: usize = 4;

/// A gateway dies while each of so many objects has a write on it that one of two replicas has not heard
/// of. Gives the time until the next gateway answers a read of one of them, and until all are equal.
fn take_over_with(objects: usize) -> Option<(Duration, Duration)> {
    let lab = Lab::new("takeover-time");
    let mut cluster = Cluster::start(&lab, COPIES);
    cluster.create(VOLUME, "4G", COPIES as u32);
    let export = cluster.export_nbd(0, VOLUME);
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| export.connect()).collect();
    send_to_each(&mut clients, objects, 1);
    for object in 0..objects {
        let reply = clients[object % CLIENTS].reply();
        assert!(matches!(reply, Ok((_, Ok(_)))), "{reply:?}");
    }
    let epoch = cluster.epoch(1);
    cluster.freeze(2);
    send_to_each(&mut clients, objects, 2);
    eventually("node 1 to have all writes", PATIENCE, || {
        let status = cluster.try_dog(1, &["node", "scrub", "status"]).ok()?;
        (status[0]["bytes_total"].as_u64()? >= (2 * objects * BLOCK) as u64).then_some(())
    });
    // Without the frozen node, which a slow machine may have missed by now, nothing would differ.
    if cluster.epoch(1) != epoch {
        return None;
    }
    let begin = Instant::now();
    cluster.kill(0);
    cluster.thaw(2);
    let socket = cluster.socket(1, VOLUME, "nbd");
    let add = ["export", "add", VOLUME, "--nbd", &socket.display().to_string()];
    eventually("the volume to be free", PATIENCE, || cluster.try_dog(1, &add).ok());
    let mut client = Export { volume: VOLUME.into(), socket }.connect();
    let mut holds = |object: usize, value: u8| {
        let found = client.read(at(1024 * object + 2), BLOCK as u32);
        assert_eq!(found.ok(), Some(vec![value; BLOCK]), "object {object}");
    };
    holds(0, if objects == 0 { 0 } else { 2 });
    let first = begin.elapsed();
    eventually("the volume to be settled", PATIENCE, || {
        let info = cluster.try_dog(1, &["volume", "info", VOLUME]).ok()?;
        (info["settled"] == true).then_some(())
    });
    let settled = begin.elapsed();
    // What any of them had is there.
    (0..objects).for_each(|object| holds(object, 2));
    Some((first, settled))
}

#[test]
fn time_of_a_takeover_is_printed() {
    let most = setting("TAKEOVER_OBJECTS").unwrap_or(128) as usize;
    for objects in [0, 16, 128, 1024].into_iter().filter(|n| *n <= most) {
        match take_over_with(objects) {
            Some((first, settled)) => {
                println!("{objects} objects differ: {first:?} to a read, {settled:?} to the last");
            }
            None => println!("{objects} objects: this machine was too slow to say"),
        }
    }
}
