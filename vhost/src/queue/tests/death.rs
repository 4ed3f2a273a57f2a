//! The process dies after each of its stores, and a successor finds the memory as it was then.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::*;
use crate::inflight;
use crate::testing::death;

const MEM: usize = 0x15000;
const ENTRIES: u16 = SIZE;
/// Guest memory that is not used otherwise: an indirect table for each head.
const TABLES: u64 = DATA + 0x4000;
const ROUNDS: u64 = 12;
/// One in so many successors is watched for deaths of its own.
const WATCH_ONE_IN: u64 = 25;

/// What the guest knows: it outlives all servers.
#[derive(Clone)]
struct Guest {
    /// Its place in the available ring, and in the used ring.
    avail: u16,
    seen: u16,
    /// Requests in the ring, by head: their numbers, in the order they were offered.
    offered: BTreeMap<u16, u64>,
    next: u64,
}

impl Guest {
    fn starting_at(index: u16) -> Self {
        Self { avail: index, seen: index, offered: BTreeMap::new(), next: 0 }
    }

    /// Offers a write of one sector, whose place is its number, if a head is free.
    fn offer(&mut self, mem: &GuestMemoryMmap) {
        let Some(head) = (0..SIZE).find(|head| !self.offered.contains_key(head)) else { return };
        let (number, h) = (self.next, u64::from(head));
        let (header, data, status) = (HEADER + h * 16, BUFFER + h * 512, STATUS + h);
        let table = TABLES + h * 64;
        let driver = Driver::new(mem, SIZE);
        driver.header(header, 1, number);
        driver.put(status, UNTOUCHED);
        driver.desc(table, 0, header, 16, NEXT, 1);
        driver.desc(table, 1, data, 512, NEXT, 2);
        driver.desc(table, 2, status, 1, 2, 0);
        driver.desc(DESC, head, table, 48, 4, 0);
        driver.put(AVAIL + 4 + u64::from(self.avail % SIZE) * 2, head);
        self.avail = self.avail.wrapping_add(1);
        driver.put(AVAIL + 2, self.avail);
        self.offered.insert(head, number);
        self.next += 1;
    }

    /// Takes all answers out of the used ring; gives the numbers of the requests. None may be
    /// answered that is not offered, or twice.
    fn collect(&mut self, mem: &GuestMemoryMmap) -> Vec<u64> {
        let driver = Driver::new(mem, SIZE);
        let used: u16 = driver.get(USED + 2);
        let mut answered = Vec::new();
        while self.seen != used {
            let at = USED + 4 + u64::from(self.seen % SIZE) * 8;
            let head = driver.get::<u32>(at) as u16;
            let number = self.offered.remove(&head);
            answered.push(number.unwrap_or_else(|| panic!("{head} is answered twice")));
            assert_eq!(driver.get::<u8>(STATUS + u64::from(head)), 0, "the status of {head}");
            self.seen = self.seen.wrapping_add(1);
        }
        answered
    }
}

/// Memory at the moment of a death.
struct Moment {
    mem: Vec<u8>,
    region: Vec<u8>,
    guest: Guest,
}

fn copy_of(mem: &GuestMemoryMmap) -> Vec<u8> {
    let mut copy = vec![0; MEM];
    mem.read_slice(&mut copy, GuestAddress(0)).unwrap();
    copy
}

fn copy_of_file(file: &File) -> Vec<u8> {
    let mut copy = vec![0; inflight::region_bytes(1, ENTRIES) as usize];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut copy, 0).unwrap();
    copy
}

fn region_of(bytes: &[u8]) -> File {
    let file = inflight::create(1, ENTRIES).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
    file
}

/// A server that begins on memory as it finds it, with the base that QEMU would give it.
fn serve_on(mem: &[u8], region: &File) -> Bench {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEM)]).unwrap();
    memory.write_slice(mem, GuestAddress(0)).unwrap();
    let bench = Bench::stopped(Disk::new(1 << 17), memory);
    let len = inflight::region_bytes(1, ENTRIES);
    let mut regions = inflight::map(region.try_clone().unwrap(), 0, len, 1, ENTRIES).unwrap();
    bench.queue.ring().set_inflight(regions.pop());
    let used: u16 = bench.mem().read_obj(GuestAddress(USED + 2)).unwrap();
    bench.queue.ring().set_base(used);
    bench
}

/// Runs `act` and gives the moments after each store.
fn deaths_during(
    bench: &mut Bench,
    region: &File,
    guest: &Rc<RefCell<Guest>>,
    act: impl FnOnce(&mut Bench),
) -> Vec<Moment> {
    let moments = Rc::new(RefCell::new(Vec::new()));
    let (mem, region, guest) = (bench.mem(), region.try_clone().unwrap(), guest.clone());
    let noted = moments.clone();
    death::watch(Some(Box::new(move || {
        let guest = guest.borrow().clone();
        noted.borrow_mut().push(Moment {
            mem: copy_of(&mem),
            region: copy_of_file(&region),
            guest,
        });
    })));
    act(bench);
    death::watch(None);
    moments.take()
}

/// A server that takes and answers in random order; gives the moments of its possible deaths.
fn predecessor(rng: &mut Rng, start: u16) -> Vec<Moment> {
    let region = inflight::create(1, ENTRIES).unwrap();
    let mut mem = vec![0; MEM];
    for ring in [AVAIL, USED] {
        mem[ring as usize + 2..][..2].copy_from_slice(&start.to_le_bytes());
    }
    let mut bench = serve_on(&mem, &region);
    let mem = bench.mem();
    let guest = Rc::new(RefCell::new(Guest::starting_at(start)));
    let known = guest.clone();
    bench.disk.hold();
    deaths_during(&mut bench, &region, &guest, |bench| {
        bench.start();
        for _ in 0..25 {
            for _ in 0..rng.below(5) {
                known.borrow_mut().offer(&mem);
            }
            bench.serve();
            for _ in 0..rng.below(5).min(bench.disk.held() as u64) {
                bench.disk.release_one(rng.below(bench.disk.held() as u64) as usize);
            }
            if rng.below(2) == 0 {
                known.borrow_mut().collect(&mem);
            }
        }
    })
}

/// What a successor must do, wherever its predecessor died. Gives the moments of its own possible
/// deaths if it is `watched`.
fn successor(moment: &Moment, watched: bool) -> Vec<Moment> {
    let region = region_of(&moment.region);
    let mut bench = serve_on(&moment.mem, &region);
    let mem = bench.mem();
    // What the used ring has already must not be done again; all else must be.
    let mut guest = moment.guest.clone();
    guest.collect(&mem);
    let mut owed: Vec<u64> = guest.offered.values().copied().collect();
    owed.sort_unstable();

    let act = |bench: &mut Bench| {
        bench.start();
        assert!(!bench.broken());
        bench.serve();
    };
    let deaths = if watched {
        let known = Rc::new(RefCell::new(moment.guest.clone()));
        deaths_during(&mut bench, &region, &known, act)
    } else {
        act(&mut bench);
        Vec::new()
    };
    let done: Vec<String> =
        owed.iter().map(|n| format!("write {}+512 fua=false", n * 512)).collect();
    assert_eq!(bench.disk.ops(), done, "in the order they were offered, each once");
    let mut answered = guest.collect(&mem);
    answered.sort_unstable();
    assert_eq!(answered, owed);
    assert!(guest.offered.is_empty(), "never answered: {:?}", guest.offered);
    assert!(bench.signals() > 0, "the predecessor's signal may have been lost");
    // Life goes on, and ends in order.
    (0..SIZE).for_each(|_| guest.offer(&mem));
    bench.serve();
    assert_eq!(guest.collect(&mem).len(), usize::from(SIZE));
    assert_eq!(bench.queue.stop(), guest.avail);
    deaths
}

#[test]
fn wherever_a_server_dies_its_successor_answers_every_request_once() {
    let mut rng = Rng::from_env();
    let mut deaths = 0;
    for round in 0..ROUNDS {
        let start = match round % 4 {
            0 => 0,
            1 => u16::MAX - rng.below(20) as u16,
            2 => u16::MAX,
            _ => rng.next() as u16,
        };
        for moment in predecessor(&mut rng, start) {
            let again = successor(&moment, rng.below(WATCH_ONE_IN) == 0);
            again.iter().for_each(|moment| drop(successor(moment, false)));
            deaths += 1 + again.len();
        }
    }
    assert!(deaths > 5000, "only {deaths} deaths");
}

/// A server with three requests of a predecessor in flight, and one that is new.
fn with_a_past() -> (Bench, Guest) {
    let region = inflight::create(1, ENTRIES).unwrap();
    let mut before = serve_on(&vec![0; MEM], &region);
    let mut guest = Guest::starting_at(0);
    before.start();
    before.disk.hold();
    (0..3).for_each(|_| guest.offer(&before.mem()));
    before.serve();
    guest.offer(&before.mem());
    let after = serve_on(&copy_of(&before.mem()), &region_of(&copy_of_file(&region)));
    (after, guest)
}

#[test]
fn stopping_a_queue_completes_what_a_predecessor_had_in_flight() {
    let (mut bench, mut guest) = with_a_past();
    bench.start();
    bench.queue.set_enabled(false); // as QEMU does before it stops a queue
    let queue = bench.queue.clone();
    let stop = thread::spawn(move || queue.stop());
    while lock(&bench.queue.ring).started() {
        thread::yield_now();
    }
    bench.serve();
    assert_eq!(stop.join().unwrap(), 3);
    assert_eq!(guest.collect(&bench.mem()), [0, 1, 2]);
    assert_eq!(guest.offered.len(), 1, "what was new is left in the ring");
}

#[test]
fn a_connection_that_ends_leaves_what_it_did_not_submit_to_the_next() {
    let (bench, mut guest) = with_a_past();
    bench.start();
    assert_eq!(bench.in_flight(), 3);
    bench.queue.shared.closing.store(true, Ordering::Release);
    bench.queue.close();
    assert_eq!((bench.in_flight(), guest.collect(&bench.mem()).len()), (0, 0));
}

#[test]
fn a_server_that_goes_away_leaves_what_its_back_end_failed_to_its_successor() {
    for closing in [false, true] {
        let region = inflight::create(1, ENTRIES).unwrap();
        let mut bench = serve_on(&vec![0; MEM], &region);
        let mut guest = Guest::starting_at(0);
        guest.next = 1 << 20; // far beyond the end of the disk
        bench.start();
        bench.disk.hold();
        guest.offer(&bench.mem());
        guest.next = 0;
        guest.offer(&bench.mem());
        bench.serve();
        bench.queue.shared.closing.store(closing, Ordering::Release);
        bench.disk.release();
        bench.queue.close();
        let used: u16 = bench.mem().read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, if closing { 1 } else { 2 });
        let mem = copy_of(&bench.mem());
        let after = serve_on(&mem, &region_of(&copy_of_file(&region)));
        after.start();
        assert_eq!(after.in_flight(), usize::from(closing));
    }
}

#[test]
fn a_queue_that_broke_forgets_what_a_predecessor_had_in_flight() {
    let (mut bench, guest) = with_a_past();
    let first = guest.offered.iter().min_by_key(|&(_, number)| number).unwrap();
    // The oldest chain leaves its table.
    Driver::new(&bench.mem(), SIZE).desc(DESC, *first.0, HEADER, 16, NEXT, SIZE);
    bench.start();
    bench.serve();
    assert!(bench.broken());
    assert_eq!((bench.in_flight(), bench.queue.stop()), (0, 3));
}

/// Whatever is in the region: the queue breaks or serves, and never panics or hangs.
#[test]
fn random_regions() {
    let mut rng = Rng::from_env();
    let (mut broken, mut served) = (0, 0);
    for _ in 0..3000 {
        let (bench, _) = with_a_past();
        let region = inflight::create(1, ENTRIES).unwrap();
        let mut bytes = vec![0; inflight::region_bytes(1, ENTRIES) as usize];
        bytes[8] = 1;
        bytes[10] = ENTRIES as u8;
        for _ in 0..rng.below(40) {
            let at = 16 + 16 * rng.below(ENTRIES.into()) as usize;
            let field = [at, at, at + 6, at + 8, 12, 14, 14][rng.below(7) as usize];
            bytes[field] = rng.below(20) as u8;
        }
        if rng.below(8) == 0 {
            bytes[rng.below(16) as usize] = rng.next() as u8;
        }
        std::os::unix::fs::FileExt::write_all_at(&region, &bytes, 0).unwrap();
        let mut bench = serve_on(&copy_of(&bench.mem()), &region);
        bench.start();
        bench.serve();
        *if bench.broken() { &mut broken } else { &mut served } += 1;
        bench.queue.stop();
        assert_eq!((bench.in_flight(), lock(&bench.queue.state).bytes), (0, 0));
    }
    assert!(broken > 100 && served > 100, "{broken} {served}");
}
