//! The guest: random operations on a few blocks around object borders, so that they collide.

use super::checker::{Checker, Kind, Value, pattern};
use super::world::{Instance, Mode, World};
use sheepdog_cluster::gateway::{Effect, Phase};
use sheepdog_types::{BlockError, Burst, Done, OBJECT_SIZE, Op, Token};
use std::ops::Range;
use std::sync::Arc;

pub const OBJECTS: u32 = 3;
const BLOCK: u64 = 4096;
/// Ends inside a block of the third object.
pub const SIZE: u64 = 2 * OBJECT_SIZE + 3 * BLOCK + 1536;
const ZOMBIE: u64 = 1 << 40;

#[derive(Default)]
pub struct Guest {
    regions: Vec<Vec<u64>>,
    next_tag: u64,
    next_value: Value,
}

impl Guest {
    pub fn issued(&self) -> u64 {
        self.next_tag
    }

    fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    pub fn flush(
        &mut self,
        checker: &mut Checker,
        instances: &mut [Instance],
        active: Option<usize>,
        now: u64,
    ) {
        let Some(at) = active else { return };
        let tag = self.tag();
        checker.begin(tag, Kind::Flush, 0..0, now);
        submit(&mut instances[at], Op::Flush, tag);
    }

    pub fn read_all(
        &mut self,
        checker: &mut Checker,
        instances: &mut [Instance],
        active: Option<usize>,
        now: u64,
    ) {
        let Some(at) = active else { return };
        for region in self.regions.clone() {
            let range = region[0]..region[region.len() - 1];
            let tag = self.tag();
            checker.begin(tag, Kind::Read, range.clone(), now);
            let len = (range.end - range.start) as u32;
            submit(&mut instances[at], Op::Read { offset: range.start, len }, tag);
        }
    }
}

fn submit(instance: &mut Instance, op: Op, tag: u64) {
    let sink = Arc::clone(&instance.inbox);
    instance.gateway.handle_request(op, Token::new(tag, sink));
}

impl World {
    pub fn make_regions(&mut self) {
        for (start, end) in
            [(OBJECT_SIZE - 2 * BLOCK, OBJECT_SIZE + 2 * BLOCK), (2 * OBJECT_SIZE - BLOCK, SIZE)]
        {
            let mut cuts: Vec<u64> = (start..end).step_by(BLOCK as usize).chain([end]).collect();
            for _ in 0..8 {
                cuts.push(self.rng.range(start + 1, end - 1));
            }
            cuts.sort_unstable();
            cuts.dedup();
            self.checker.add_region(&cuts);
            self.guest.regions.push(cuts);
        }
    }

    fn random_range(&mut self) -> Range<u64> {
        let region = &self.guest.regions[self.rng.below(2) as usize];
        let last = region.len() as u64 - 1;
        let from = self.rng.below(last);
        let to = self.rng.range(from + 1, last.min(from + 9));
        let mut range = region[from as usize]..region[to as usize];
        if self.rng.chance(400) {
            let start = range.start / BLOCK * BLOCK;
            range =
                start.max(region[0])..range.end.next_multiple_of(BLOCK).min(region[last as usize]);
        }
        range
    }

    fn random_op(&mut self) -> (Op, Kind, Range<u64>) {
        let range = self.random_range();
        let (offset, len) = (range.start, range.end - range.start);
        let fua = self.rng.chance(60);
        let zero = Kind::Write { value: 0, fua };
        match self.rng.below(100) {
            0..=39 => (Op::Read { offset, len: len as u32 }, Kind::Read, range),
            40..=79 => {
                self.guest.next_value += 1;
                let value = self.guest.next_value;
                let data = pattern(value, range.clone());
                (Op::Write { offset, data, fua }, Kind::Write { value, fua }, range)
            }
            80..=85 => (Op::WriteZeroes { offset, len, may_unmap: fua, fua }, zero, range),
            86..=90 => {
                let whole = offset.next_multiple_of(BLOCK);
                let end = if range.end == SIZE { SIZE } else { range.end / BLOCK * BLOCK };
                let kind = Kind::Write { value: 0, fua: false };
                (Op::Discard { offset, len }, kind, whole..end.max(whole))
            }
            91 => {
                let kind = Kind::Write { value: 0, fua: false };
                (Op::Discard { offset: 0, len: SIZE }, kind, 0..SIZE)
            }
            _ => (Op::Flush, Kind::Flush, 0..0),
        }
    }

    pub fn run_guest(&mut self) {
        if self.calm {
            return;
        }
        self.run_zombies();
        let Some(at) = self.active else { return };
        if self.checker.running() >= 6 || !self.rng.chance(250) {
            return;
        }
        let (op, kind, range) = self.random_op();
        let tag = self.guest.tag();
        if self.trace {
            eprintln!("{} begin {tag} {kind:?} {range:?}", self.now);
        }
        self.checker.begin(tag, kind, range, self.now);
        submit(&mut self.instances[at], op, tag);
    }

    /// The guests of old gateways go on too; nothing they ask may succeed.
    fn run_zombies(&mut self) {
        let Some(active) = self.active else { return };
        if self.instances[active].gateway.phase() != Phase::Serving || !self.rng.chance(250) {
            return;
        }
        let at = self.rng.below(self.instances.len() as u64) as usize;
        if at == active || !self.instances[at].alive {
            return;
        }
        let range = self.random_range();
        let tag = ZOMBIE + self.guest.tag();
        let (offset, len) = (range.start, range.end - range.start);
        let op = if self.rng.chance(500) {
            Op::Read { offset, len: len as u32 }
        } else {
            Op::Write { offset, data: vec![0xFE; len as usize], fua: false }
        };
        self.instances[at].forbidden.insert(tag);
        submit(&mut self.instances[at], op, tag);
    }

    /// Runs the effects of a gateway and takes completions.
    pub fn collect(&mut self, at: usize) {
        let mut burst = Burst::new();
        while let Some(effect) = self.instances[at].gateway.poll_effect() {
            match effect {
                Effect::Call { id, node, call, blocks } => {
                    let to = self.node_index(node);
                    self.send(at, to, id, call, blocks);
                }
                Effect::Complete { token, completion } => token.complete(completion, &mut burst),
                Effect::LostWrites { object } => {
                    if self.mode != Mode::Wild && self.trouble.is_none() && self.active == Some(at)
                    {
                        self.trouble = Some(format!("acknowledged writes of {object} are gone"));
                    }
                    self.checker.lose(self.now);
                }
            }
        }
        drop(burst);
        let done = std::mem::take(&mut *self.instances[at].inbox.0.lock().unwrap());
        for (tag, completion) in done {
            if self.trace {
                let what = completion.as_ref().map(|_| ()).map_err(|e| *e);
                eprintln!("{} end {tag} {what:?}", self.now);
            }
            self.judge(at, tag, completion);
        }
    }

    fn judge(&mut self, at: usize, tag: u64, completion: Result<Done, BlockError>) {
        let problem = if self.active != Some(at) {
            let forbidden = self.instances[at].forbidden.contains(&tag);
            // An object that it never saw written is zeroes to it without asking anybody: only
            // the lease of its node keeps it from answering.
            let leaked = match completion {
                Ok(Done::Data(data)) => data.iter().any(|b| *b != 0),
                Ok(Done::Nothing) => true,
                Err(_) => false,
            };
            (forbidden && leaked).then(|| format!("an old gateway served request {tag}"))
        } else {
            match completion {
                Ok(Done::Data(data)) => self.checker.done(tag, &data, self.now).err(),
                Ok(Done::Nothing) => self.checker.done(tag, &[], self.now).err(),
                Err(BlockError::NoSpace) if self.mode == Mode::Full => {
                    self.checker.abandon(tag, self.now);
                    None
                }
                // A flush after acknowledged writes were lost.
                Err(BlockError::Io) if self.mode == Mode::Wild => {
                    self.checker.abandon(tag, self.now);
                    None
                }
                Err(error) => Some(format!("request {tag} failed: {error}")),
            }
        };
        if self.trouble.is_none() {
            self.trouble = problem;
        }
    }
}
