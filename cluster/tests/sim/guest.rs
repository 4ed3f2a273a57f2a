//! Guests: random operations on a few blocks around object borders, so that they collide.

use super::checker::{Checker, Kind, Value, pattern};
use super::rng::Rng;
use super::world::World;
use sheepdog_types::{OBJECT_SIZE, Op};
use std::ops::Range;

pub const BLOCK: u64 = 4096;
/// Ends inside a block of the third object.
pub const SIZE: u64 = 2 * OBJECT_SIZE + 3 * BLOCK + 1536;
const ZOMBIE: u64 = 1 << 40;

/// What the guest of a volume does.
pub struct Guest {
    size: u64,
    regions: Vec<Vec<u64>>,
    next_tag: u64,
    next_value: Value,
}

impl Guest {
    pub fn new(rng: &mut Rng, checker: &mut Checker, size: u64) -> Self {
        let mut guest = Self { size, regions: Vec::new(), next_tag: 0, next_value: 0 };
        if size == SIZE {
            let ends = [(OBJECT_SIZE - 2 * BLOCK, OBJECT_SIZE + 2 * BLOCK)];
            for (start, end) in ends.into_iter().chain([(2 * OBJECT_SIZE - BLOCK, SIZE)]) {
                let whole = (start..end).step_by(BLOCK as usize).chain([end]);
                let some = (0..8).map(|_| rng.range(start + 1, end - 1));
                guest.add_region(checker, whole.chain(some).collect());
            }
        }
        guest
    }

    /// A part of the volume, cut into cells.
    pub fn add_region(&mut self, checker: &mut Checker, mut cuts: Vec<u64>) {
        cuts.sort_unstable();
        cuts.dedup();
        checker.add_region(&cuts);
        self.regions.push(cuts);
    }

    pub fn issued(&self) -> u64 {
        self.next_tag
    }

    pub fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    pub fn value(&mut self) -> Value {
        self.next_value += 1;
        self.next_value
    }

    pub fn whole_regions(&self) -> Vec<Range<u64>> {
        self.regions.iter().map(|cuts| cuts[0]..cuts[cuts.len() - 1]).collect()
    }

    fn random_range(&self, rng: &mut Rng) -> Range<u64> {
        let region = &self.regions[rng.below(self.regions.len() as u64) as usize];
        let last = region.len() as u64 - 1;
        let from = rng.below(last);
        let to = rng.range(from + 1, last.min(from + 9));
        let mut range = region[from as usize]..region[to as usize];
        if rng.chance(400) {
            let start = range.start / BLOCK * BLOCK;
            let end = range.end.next_multiple_of(BLOCK);
            range = start.max(region[0])..end.min(region[last as usize]);
        }
        range
    }

    fn random_op(&mut self, rng: &mut Rng) -> (Op, Kind, Range<u64>) {
        let range = self.random_range(rng);
        let (offset, len) = (range.start, range.end - range.start);
        let fua = rng.chance(60);
        let zero = Kind::Write { value: 0, fua };
        match rng.below(100) {
            0..=39 => (Op::Read { offset, len: len as u32 }, Kind::Read, range),
            40..=79 => {
                let value = self.value();
                let data = pattern(value, range.clone());
                (Op::Write { offset, data, fua }, Kind::Write { value, fua }, range)
            }
            80..=85 => (Op::WriteZeroes { offset, len, may_unmap: fua, fua }, zero, range),
            86..=90 => {
                let whole = offset.next_multiple_of(BLOCK);
                let end =
                    if range.end == self.size { self.size } else { range.end / BLOCK * BLOCK };
                let kind = Kind::Write { value: 0, fua: false };
                (Op::Discard { offset, len }, kind, whole..end.max(whole))
            }
            91 => {
                let kind = Kind::Write { value: 0, fua: false };
                (Op::Discard { offset: 0, len: self.size }, kind, 0..self.size)
            }
            _ => (Op::Flush, Kind::Flush, 0..0),
        }
    }
}

impl World {
    pub fn run_guests(&mut self) {
        if self.calm || !self.guests {
            return;
        }
        for at in 0..self.volumes.len() {
            self.run_zombies(at);
            let Some(node) = self.side(at) else { continue };
            let volume = &mut self.volumes[at];
            if volume.doomed || volume.checker.running() >= 6 || !self.rng.chance(100) {
                continue;
            }
            if !self.nodes[node].runs(self.now) {
                continue;
            }
            let (op, kind, range) = volume.guest.random_op(&mut self.rng);
            self.request(at, op, kind, range);
        }
    }

    /// A request of a volume's guest that the checker follows. The volume has to be attached.
    pub fn request(&mut self, at: usize, op: Op, kind: Kind, range: Range<u64>) -> Option<u64> {
        self.volumes[at].active?;
        let volume = &mut self.volumes[at];
        let tag = volume.guest.tag();
        note!(self, "{} request {tag}: {}", volume.name, describe(&kind, &range));
        volume.checker.begin(tag, kind, range, self.now);
        self.submit_where_it_is(at, op, tag);
        Some(tag)
    }

    /// The guests of old gateways go on too; nothing they ask may succeed.
    fn run_zombies(&mut self, volume: usize) {
        if !self.rng.chance(40) || !self.serving(volume) {
            return;
        }
        let active = self.volumes[volume].active;
        let zombies: Vec<usize> = (0..self.instances.len())
            .filter(|i| Some(*i) != active && self.instances[*i].volume == volume)
            .filter(|i| self.instances[*i].alive)
            .filter(|i| self.nodes[self.instances[*i].node].runs(self.now))
            .collect();
        let Some(at) = self.rng.pick(&zombies) else { return };
        let range = self.volumes[volume].guest.random_range(&mut self.rng);
        let tag = ZOMBIE + self.volumes[volume].guest.tag();
        let (offset, len) = (range.start, range.end - range.start);
        let reads = self.rng.chance(500);
        let op = if reads && !self.instances[at].detached {
            Op::Read { offset, len: len as u32 }
        } else {
            Op::Write { offset, data: vec![0xFE; len as usize], fua: false }
        };
        self.instances[at].forbidden.insert(tag);
        self.submit(at, op, tag);
    }
}

fn describe(kind: &Kind, range: &Range<u64>) -> String {
    let verb = match kind {
        Kind::Read => "read".to_string(),
        Kind::Write { value: 0, .. } => "write zeroes".to_string(),
        Kind::Write { value, fua } => {
            format!("write value {value}{}", if *fua { " (fua)" } else { "" })
        }
        Kind::Flush => return "flush".into(),
    };
    let object = range.start / OBJECT_SIZE;
    let base = object * OBJECT_SIZE;
    format!("{verb} obj {object} bytes {}..{}", range.start - base, range.end - base)
}
