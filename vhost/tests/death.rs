//! A server process that is killed again and again, under a guest that notices nothing.
#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::{env, thread};

use sheepdog_types::{Block, BlockInfo, Burst, Done, Op, Request};
use sheepdog_vhost::{Config, VhostServer};
use support::driver::{AVAIL, DATA, DESC, Driver, INDIRECT, NEXT, Rng, USED, WRITE};
use support::guest::{Guest, PATIENCE_MS, QUEUES, SIZE};
use vhost::VhostBackend;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EpollEvent;

const DISK_BYTES: u64 = 1 << 20;
const KILLS: u64 = 80;

/// A file, whose requests are carried out by two threads in random order.
struct Shuffled {
    file: File,
    waiting: Mutex<Vec<Request>>,
    arrived: Condvar,
}

impl Shuffled {
    fn work(&self, mut rng: Rng) {
        loop {
            let mut waiting = self.waiting.lock().unwrap();
            while waiting.is_empty() {
                waiting = self.arrived.wait(waiting).unwrap();
            }
            let chosen = rng.below(waiting.len() as u64) as usize;
            let Request { op, token } = waiting.swap_remove(chosen);
            drop(waiting);
            let done = match op {
                Op::Read { offset, len } => {
                    let mut data = vec![0; len as usize];
                    self.file.read_exact_at(&mut data, offset).unwrap();
                    Done::Data(data)
                }
                Op::Write { offset, data, .. } => {
                    self.file.write_all_at(&data, offset).unwrap();
                    Done::Nothing
                }
                _ => Done::Nothing,
            };
            token.complete(Ok(done), &mut Burst::new());
        }
    }
}

impl Block for Shuffled {
    fn info(&self) -> BlockInfo {
        BlockInfo { size: DISK_BYTES, read_only: false, serial: "shuffled".into() }
    }

    fn submit(&self, batch: &mut Vec<Request>) {
        self.waiting.lock().unwrap().append(batch);
        self.arrived.notify_all();
    }
}

/// Not a test of its own: the process that the test below kills.
#[test]
#[ignore = "started by the other test here"]
fn server_process() {
    let Ok(dir) = env::var("VHOST_TEST_DIR") else { return };
    let dir = Path::new(&dir);
    let file = File::options().read(true).write(true).open(dir.join("disk")).unwrap();
    let block = Arc::new(Shuffled { file, waiting: Mutex::default(), arrived: Condvar::new() });
    for thread in 0..2 {
        let (block, rng) = (block.clone(), Rng(thread + u64::from(std::process::id())));
        thread::spawn(move || block.work(rng));
    }
    let config = Config { queues: QUEUES as u16, queue_size: SIZE, mode: 0o600 };
    let _server = VhostServer::start(dir.join("socket"), block, config).unwrap();
    println!("ready");
    // Until the test has ended.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

fn spawn(dir: &Path) -> Child {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "server_process", "--ignored", "--nocapture"])
        .env("VHOST_TEST_DIR", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.ends_with("ready")));
    child
}

/// A guest program: each head has a sector of its own, and knows what it must contain.
struct Program {
    mem: GuestMemoryMmap,
    rng: Rng,
    avail: u16,
    seen: u16,
    /// What each sector contains; writes that are not answered yet.
    contents: [u32; SIZE as usize],
    /// Requests not answered, by head: the value written, or nothing for a read.
    offered: BTreeMap<u16, Option<u32>>,
    answered: u32,
}

impl Program {
    fn places(head: u16) -> (u64, u64, u64) {
        let h = u64::from(head);
        (DATA + h * 16, DATA + 0x1000 + h * 512, DATA + 0x800 + h)
    }

    /// Keeps all heads busy.
    fn offer(&mut self) {
        for head in 0..SIZE {
            if self.offered.contains_key(&head) {
                continue;
            }
            let value = (self.rng.below(2) == 0).then(|| self.rng.next() as u32);
            let (header, data, status) = Self::places(head);
            let driver = Driver::new(&self.mem, SIZE);
            driver.header(header, u32::from(value.is_some()), u64::from(head));
            (0..128).for_each(|word| driver.put(data + word * 4, value.unwrap_or(0xEEEE_EEEE)));
            driver.put(status, 0xEEu8);
            let table = DATA + 0x8000 + u64::from(head) * 64;
            driver.desc(table, 0, header, 16, NEXT, 1);
            driver.desc(table, 1, data, 512, if value.is_some() { NEXT } else { NEXT | WRITE }, 2);
            driver.desc(table, 2, status, 1, WRITE, 0);
            driver.desc(DESC, head, table, 48, INDIRECT, 0);
            driver.put(AVAIL + 4 + u64::from(self.avail % SIZE) * 2, head);
            self.avail = self.avail.wrapping_add(1);
            self.offered.insert(head, value);
            self.mem
                .store(self.avail, GuestAddress(AVAIL + 2), std::sync::atomic::Ordering::SeqCst)
                .unwrap();
        }
    }

    /// Takes what is answered and checks it.
    fn collect(&mut self) {
        let used = GuestAddress(USED + 2);
        let used: u16 = self.mem.load(used, std::sync::atomic::Ordering::SeqCst).unwrap();
        let driver = Driver::new(&self.mem, SIZE);
        while self.seen != used {
            let head = driver.get::<u32>(USED + 4 + u64::from(self.seen % SIZE) * 8) as u16;
            self.seen = self.seen.wrapping_add(1);
            self.answered += 1;
            let value = self.offered.remove(&head).expect("answered twice, or never asked");
            let (_, data, status) = Self::places(head);
            assert_eq!(driver.get::<u8>(status), 0);
            match value {
                Some(value) => self.contents[usize::from(head)] = value,
                None => {
                    let found: [u32; 8] = std::array::from_fn(|w| driver.get(data + w as u64 * 4));
                    assert_eq!(found, [self.contents[usize::from(head)]; 8]);
                }
            }
        }
    }

    /// Works until `count` more requests are answered.
    fn run(&mut self, guest: &Guest, count: u32) {
        let goal = self.answered + count;
        while self.answered < goal {
            self.offer();
            guest.kick();
            self.wait(guest);
        }
    }

    fn wait(&mut self, guest: &Guest) {
        let woken = guest.wait.wait(PATIENCE_MS, &mut [EpollEvent::default()]).unwrap();
        assert_eq!(woken, 1, "no signal came; waiting for {:?}", self.offered.keys());
        let _ = guest.call.read();
        self.collect();
    }
}

#[test]
fn a_server_killed_again_and_again_answers_every_request_once() {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("disk")).unwrap().set_len(DISK_BYTES).unwrap();
    let socket = dir.path().join("socket");
    let mut rng = Rng::from_env();
    let mut server = spawn(dir.path());
    let mut guest = Guest::connect(&socket, 1);
    // The indices wrap around on the way.
    let start = u16::MAX - 300;
    guest.track_from(start);
    let mut program = Program {
        mem: guest.mem.clone(),
        rng: Rng(rng.next()),
        avail: start,
        seen: start,
        contents: [0; SIZE as usize],
        offered: BTreeMap::new(),
        answered: 0,
    };
    for _ in 0..KILLS {
        program.run(&guest, rng.below(30) as u32);
        program.offer();
        guest.kick();
        server.kill().unwrap();
        server.wait().unwrap();
        server = spawn(dir.path());
        guest.reconnect(&socket);
    }
    while !program.offered.is_empty() {
        program.wait(&guest);
    }
    assert_eq!(guest.frontend.get_vring_base(1).unwrap(), u32::from(program.avail));
    server.kill().unwrap();
    server.wait().unwrap();
}
