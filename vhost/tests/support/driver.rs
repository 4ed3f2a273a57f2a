//! A guest driver reduced to writing bytes into rings, so that it can also write wrong ones.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where the parts of the one queue are. Data may be anywhere from [`DATA`].
pub const DESC: u64 = 0;
pub const AVAIL: u64 = 0x1000;
pub const USED: u64 = 0x2000;
pub const DATA: u64 = 0x10000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// One buffer of a chain: address, length, device-writable.
pub type Part = (u64, u32, bool);

pub struct Driver<'m> {
    pub mem: &'m GuestMemoryMmap,
    size: u16,
    free: u16,
    avail: u16,
    seen: u16,
}

impl<'m> Driver<'m> {
    pub fn new(mem: &'m GuestMemoryMmap, size: u16) -> Self {
        Self { mem, size, free: 0, avail: 0, seen: 0 }
    }

    pub fn put<T: vm_memory::ByteValued>(&self, addr: u64, value: T) {
        self.mem.write_obj(value, GuestAddress(addr)).unwrap();
    }

    pub fn get<T: vm_memory::ByteValued>(&self, addr: u64) -> T {
        self.mem.read_obj(GuestAddress(addr)).unwrap()
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + u64::from(index) * 16;
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    fn table(&self, table: u64, first: u16, modulus: u16, parts: &[Part]) {
        for (i, &(addr, len, writable)) in parts.iter().enumerate() {
            let i = i as u16;
            let more = usize::from(i) + 1 < parts.len();
            let flags = if more { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            let next = (first + i + 1) % modulus;
            self.desc(table, (first + i) % modulus, addr, len, flags, next);
        }
    }

    /// Writes a chain into the descriptor table; gives its head. Descriptors are reused in turn.
    pub fn chain(&mut self, parts: &[Part]) -> u16 {
        let head = self.free;
        self.table(DESC, head, self.size, parts);
        self.free = (head + parts.len() as u16) % self.size;
        head
    }

    /// Writes a chain into an indirect table at `table`; gives its head.
    pub fn indirect(&mut self, table: u64, parts: &[Part]) -> u16 {
        self.table(table, 0, u16::MAX, parts);
        let head = self.free;
        self.desc(DESC, head, table, parts.len() as u32 * 16, INDIRECT, 0);
        self.free = (head + 1) % self.size;
        head
    }

    /// Makes a chain available.
    pub fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + u64::from(self.avail % self.size) * 2, head);
        self.avail = self.avail.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.put(AVAIL + 2, self.avail);
    }

    /// The next used chain: head and bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.get::<u16>(USED + 2) == self.seen {
            return None;
        }
        fence(Ordering::SeqCst);
        let at = USED + 4 + u64::from(self.seen % self.size) * 8;
        self.seen = self.seen.wrapping_add(1);
        Some((self.get::<u32>(at) as u16, self.get(at + 4)))
    }

    /// Writes a request header at `addr`.
    pub fn header(&self, addr: u64, kind: u32, sector: u64) {
        self.put(addr, kind);
        self.put(addr + 4, 0u32);
        self.put(addr + 8, sector);
    }
}

/// SplitMix64: enough for choosing test data.
pub struct Rng(pub u64);

impl Rng {
    /// Seeded from the environment's SEED, else from the clock; prints the seed.
    pub fn from_env() -> Self {
        let clock = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.unwrap().as_nanos() as u64
        };
        let seed = std::env::var("SEED").map_or_else(|_| clock(), |seed| seed.parse().unwrap());
        println!("SEED={seed}");
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
