//! Every crash point of all small workloads, with many ways for the un-synced changes to end.
//!
//! A workload is a sequence of up to three operations ([`Act`]; four of a smaller alphabet), in an
//! empty store and in used ones. The power goes after each change of the medium that its last
//! operation makes; the changes of those before are covered by the shorter workloads. Of what was
//! not synced then ([`outcomes`]): nothing is kept; all is; each change alone is lost or kept;
//! each that spans several sectors is torn at its ends and in between, at 512 and at 4096 bytes; and
//! a few random mixtures. Every such image is opened and compared with the states that the model
//! allows; the power goes once more and it is opened again.
//!
//! All of it is deterministic. A failure names the workload, the crash point and the outcome;
//! `WORKLOAD="used WCF"` replays one workload alone.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::sim::{Disk, PAGE, Part, SECTOR, SimMedium, Unit, random_fate};
use super::support::{
    Block, History, Model, ModelLayer, Op, Rng, check_equal, create_sim, differences, in_parallel,
    key, observe, open_sim, small, version_in,
};
use crate::engine::{DIRECT_BLOCKS, Engine};

/// What a workload is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Blocks 0 and 1 of the object.
    Write,
    /// Blocks 1 and 2 of it.
    Overlap,
    /// The first block of the object's next layer.
    Snapshot,
    /// Block 1 becomes absent, its space is given back.
    Discard,
    /// Blocks 0 and 1 become zeroes.
    Zeroes,
    DeleteLayer,
    DeleteVolume,
    /// Another content for the object's layer.
    Install,
    /// Of the object's layer, block 1 becomes absent, 4 and 5 new data; the others stay.
    Patch,
    /// The object's first layer goes into its second.
    Merge,
    Flush,
    Checkpoint,
    /// An orderly stop and a start.
    Restart,
}

use Act::*;

const ALL: [(char, Act); 13] = [
    ('W', Write),
    ('O', Overlap),
    ('S', Snapshot),
    ('D', Discard),
    ('Z', Zeroes),
    ('X', DeleteLayer),
    ('V', DeleteVolume),
    ('I', Install),
    ('P', Patch),
    ('M', Merge),
    ('F', Flush),
    ('C', Checkpoint),
    ('R', Restart),
];
/// For workloads of three operations where bytes go straight to slabs, and with a merge.
const DIRECT: [char; 10] = ['W', 'O', 'S', 'D', 'X', 'I', 'P', 'M', 'F', 'C'];
const MERGING: [char; 7] = ['M', 'W', 'D', 'X', 'I', 'F', 'C'];
/// For workloads of four operations, and of three where the start matters less.
const FEW: [char; 5] = ['W', 'D', 'X', 'F', 'C'];

impl Act {
    fn of(letter: char) -> Self {
        ALL.into_iter().find(|(known, _)| *known == letter).expect("a letter of the alphabet").1
    }

    /// The change that it is in the state `now`; `step` makes the bytes its own.
    fn op(self, now: &Model, step: u64) -> Option<Op> {
        let object = super::oracle::newest_from(now, key(1, 0, 0));
        let next = |key| {
            let old = version_in(now, key);
            super::support::version(1, old.seq + 1)
        };
        let tag = |n: u64| (step + 1) * 10_000 + n;
        let write = |key, first, count: u64| Op::Write {
            key,
            version: next(key),
            first,
            tags: (0..count).map(tag).collect(),
        };
        let clear = |first, count, absent, release| Op::Clear {
            key: object,
            version: next(object),
            first,
            count,
            absent,
            release,
        };
        Some(match self {
            Write => write(object, 0, 2),
            Overlap => write(object, 1, 2),
            Snapshot => write(key(1, 0, 1), 0, 1),
            Discard => clear(1, 1, true, true),
            Zeroes => clear(0, 2, false, false),
            DeleteLayer => Op::Delete { key: object },
            DeleteVolume => Op::DeleteVolume { volume: object.object.volume },
            Install => {
                let blocks = [(0, Block::Zero), (2, Block::Data(tag(0))), (5, Block::Data(tag(1)))];
                let layer = ModelLayer { version: next(object), blocks: blocks.into() };
                Op::Install { key: object, layer }
            }
            Patch if now.contains_key(&object) => {
                let mut layer = ModelLayer { version: next(object), ..now[&object].clone() };
                layer.blocks.remove(&1);
                layer.blocks.extend([(4, Block::Data(tag(0))), (5, Block::Data(tag(1)))]);
                Op::Patch { key: object, layer, again: Vec::new() }
            }
            Patch => return Write.op(now, step),
            Merge => Op::Merge { key: key(1, 0, 1), lower: sheepdog_types::Layer(0) },
            Flush | Checkpoint | Restart => return None,
        })
    }
}

/// A store to begin with.
struct Start {
    name: &'static str,
    disk: Disk,
    model: Model,
    direct_blocks: usize,
    /// Of workloads of two and of three operations.
    alphabets: [Vec<char>; 2],
}

impl Start {
    /// `acts` in a new store; then the process dies, or stops in order.
    fn new(name: &'static str, direct_blocks: usize, acts: &str, three: &[char]) -> Self {
        let medium = SimMedium::default();
        create_sim(&medium, &small()).unwrap();
        let mut run = Run::new(medium.clone(), Model::new(), direct_blocks);
        for (step, letter) in (100..).zip(acts.chars()) {
            run.act(Act::of(letter), step);
        }
        let model = run.history.now().clone();
        drop(run);
        let disk = medium.copy().disk();
        let alphabets = [ALL.map(|(letter, _)| letter).into(), three.into()];
        Self { name, disk, model, direct_blocks, alphabets }
    }

    /// All that workloads begin with.
    fn all() -> Vec<Self> {
        let all = ALL.map(|(letter, _)| letter);
        // Writes of two blocks go to the log, or straight to the slab if they are the first there.
        let (by_log, direct) = (DIRECT_BLOCKS, 2);
        vec![
            Self::new("empty", by_log, "", &FEW),
            Self::new("direct", direct, "", &DIRECT),
            // Slabs in use, one free, layers, a log to replay.
            Self::new("used", by_log, "WSCIXCWZSCOF", &all),
            Self::new("used-direct", direct, "WSCIXCWZSCOF", &DIRECT),
            // Two layers to merge, the lower one in its slab; above it, a part is in the log.
            Self::new("layers", direct, "WCSCF", &MERGING),
            // The same stopped in order, and near the end of a log segment: the seven writes leave
            // too little for an eighth.
            Self::new("brim", by_log, "RWSCDRWOWOWOWR", &FEW),
            // A log that went round: what lies behind its end are old records.
            Self::new("round", by_log, "WSCWOWOWOWOCWOWOWOWOCWOWOWOWOCWOWOWOWOCWOF", &FEW),
        ]
    }
}

/// A store under a workload.
struct Run {
    medium: SimMedium,
    engine: Option<Engine>,
    history: History,
    direct_blocks: usize,
}

impl Run {
    fn new(medium: SimMedium, model: Model, direct_blocks: usize) -> Self {
        let history = History::of(model);
        let mut this = Self { medium, engine: None, history, direct_blocks };
        this.open();
        this
    }

    fn open(&mut self) {
        // The old one ends first.
        self.engine = None;
        let mut engine = open_sim(&self.medium).unwrap();
        engine.direct_blocks = self.direct_blocks;
        self.engine = Some(engine);
    }

    fn act(&mut self, act: Act, step: u64) {
        let engine = self.engine.as_ref().expect("open between acts");
        match act {
            Flush => engine.sync_log().unwrap(),
            Checkpoint => engine.checkpoint().unwrap(),
            Restart => {
                engine.shut_down().unwrap();
                self.open();
            }
            change => {
                let op = change.op(self.history.now(), step).expect("a change");
                op.apply_to_store(engine, self.history.now()).unwrap();
                self.history.push(op);
                return;
            }
        }
        self.history.all_durable();
    }
}

/// What may be found after a crash.
struct Allowed {
    states: Vec<Model>,
    /// What must be found if only the process died: one of the last so many.
    last: usize,
}

/// A point at which the power goes.
struct CrashPoint {
    disk: Disk,
    allowed: Allowed,
}

/// Runs a workload; gives the points in its last operation.
fn crash_points(start: &Start, acts: &[Act]) -> Vec<CrashPoint> {
    let medium = SimMedium::from_disk(start.disk.clone());
    let mut run = Run::new(medium, start.model.clone(), start.direct_blocks);
    let (last, before) = acts.split_last().expect("a workload is not empty");
    for (step, act) in (0..).zip(before) {
        run.act(*act, step);
    }
    let old = run.history.states();
    let is_change = last.op(run.history.now(), 0).is_some();
    run.medium.record();
    run.act(*last, acts.len() as u64);
    let mut disks = run.medium.recorded();
    let new = run.history.states();
    let done = disks.pop();
    let within = |disk| {
        let mut states = old.clone();
        states.extend(is_change.then(|| run.history.now().clone()));
        // The operation was not answered: it may be there or not.
        CrashPoint { disk, allowed: Allowed { states, last: 1 + usize::from(is_change) } }
    };
    let mut points: Vec<_> = disks.into_iter().map(within).collect();
    points.extend(done.map(|disk| CrashPoint { disk, allowed: Allowed { states: new, last: 1 } }));
    points
}

/// What becomes of the un-synced changes.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    Nothing,
    Everything,
    /// All but this change.
    Without(u64),
    /// This change alone.
    Only(u64),
    /// Of this change some units of so many bytes are lost, all else is kept.
    Torn(u64, usize, Tear),
    /// Of this change some units are kept, all else is lost.
    TornOnly(u64, usize, Tear),
    /// All of this file's changes are lost, all else is kept; or the other way round.
    File(usize, bool),
    Random(u64),
}

/// Which units of a change are cut off.
#[derive(Clone, Copy, Debug)]
enum Tear {
    First,
    Last,
    AllButFirst,
    Odd,
}

impl Tear {
    fn hits(self, part: Part) -> bool {
        let Part::Bytes { index, last } = part else { return false };
        match self {
            Self::First => index == 0,
            Self::Last => index == last,
            Self::AllButFirst => index > 0,
            Self::Odd => index % 2 == 1,
        }
    }
}

/// The outcomes to try; how many depends on the un-synced changes.
fn outcomes(disk: &Disk) -> Vec<Outcome> {
    let mut outcomes = vec![Outcome::Nothing, Outcome::Everything];
    let unsynced = disk.unsynced();
    for change in &unsynced {
        outcomes.extend([Outcome::Without(change.number), Outcome::Only(change.number)]);
        let tears: &[_] = match change.sectors {
            0..=1 => &[],
            2 => &[Tear::First, Tear::Last],
            _ => &[Tear::First, Tear::Last, Tear::AllButFirst, Tear::Odd],
        };
        for tear in tears {
            outcomes.push(Outcome::Torn(change.number, SECTOR, *tear));
            outcomes.push(Outcome::TornOnly(change.number, SECTOR, *tear));
            if change.sectors > (PAGE / SECTOR) as u64 {
                outcomes.push(Outcome::Torn(change.number, PAGE, *tear));
                outcomes.push(Outcome::TornOnly(change.number, PAGE, *tear));
            }
        }
    }
    let files = disk.names().count();
    outcomes.extend((0..files).flat_map(|n| [Outcome::File(n, false), Outcome::File(n, true)]));
    if unsynced.len() > 1 || unsynced.iter().any(|change| change.sectors > 2) {
        outcomes.extend((0..6).map(Outcome::Random));
    }
    outcomes
}

impl Outcome {
    /// The disk after a power cut that ends so. `fates` receives what was decided.
    fn apply(self, mut disk: Disk, fates: &mut Vec<usize>) -> Disk {
        let unit = match self {
            Self::Torn(_, unit, _) | Self::TornOnly(_, unit, _) => unit,
            Self::Random(seed) if seed % 2 == 0 => PAGE,
            _ => SECTOR,
        };
        fates.push(unit);
        let names: Vec<String> = disk.names().map(Into::into).collect();
        let mut rng = Rng(0);
        let mut random: Box<dyn FnMut(&Unit<'_>) -> usize> = match self {
            Self::Random(seed) => {
                rng.0 = seed;
                Box::new(random_fate(&mut rng, [50, 50, 10, 10, 90, 90][seed as usize % 6]))
            }
            _ => Box::new(|_| 0),
        };
        disk.lose(unit, &mut |unit| {
            // How many changes of the unit came before `number`, and how many up to it.
            let before = |number| unit.numbers.partition_point(|n| *n < number);
            let through = |number| unit.numbers.partition_point(|n| *n <= number);
            let all = unit.numbers.len();
            let fate = match self {
                Self::Nothing => 0,
                Self::Everything => all,
                Self::Without(number) if unit.numbers.contains(&number) => before(number),
                Self::Torn(number, _, tear)
                    if unit.numbers.contains(&number) && tear.hits(unit.part) =>
                {
                    before(number)
                }
                Self::Without(_) | Self::Torn(..) => all,
                Self::Only(number) if unit.numbers.contains(&number) => through(number),
                Self::TornOnly(number, _, tear)
                    if unit.numbers.contains(&number) && !tear.hits(unit.part) =>
                {
                    through(number)
                }
                Self::Only(_) | Self::TornOnly(..) => 0,
                Self::File(number, keep) => all * usize::from((names[number] == unit.name) == keep),
                Self::Random(_) => random(unit),
            };
            fates.push(fate);
            fate
        });
        disk
    }
}

#[derive(Default)]
struct Counts {
    workloads: AtomicU64,
    points: AtomicU64,
    images: AtomicU64,
    nested: AtomicU64,
}

/// One workload with all its crash points.
fn check_workload(start: &Start, letters: &str, counts: &Counts) {
    let acts: Vec<_> = letters.chars().map(Act::of).collect();
    counts.workloads.fetch_add(1, Relaxed);
    for (number, point) in crash_points(start, &acts).into_iter().enumerate() {
        counts.points.fetch_add(1, Relaxed);
        let place = format!("WORKLOAD=\"{} {letters}\" crash point {number}", start.name);
        check_kill(&point, &place);
        let mut seen = HashSet::new();
        for outcome in outcomes(&point.disk) {
            let mut fates = Vec::new();
            let image = outcome.apply(point.disk.clone(), &mut fates);
            // Outcomes that decide the same for every unit are the same.
            let special = matches!(outcome, Outcome::Nothing | Outcome::Everything);
            if !seen.insert(fates) && !special {
                continue;
            }
            counts.images.fetch_add(1, Relaxed);
            let place = format!("{place}, {outcome:?}");
            let found = check_image(&image, &point.allowed, &place);
            if special || matches!(outcome, Outcome::Random(0)) {
                // What the others differ in does not matter to opening.
                if acts.len() <= 2 && !["empty", "used-direct", "brim"].contains(&start.name) {
                    check_crash_in_open(&image, &found, &place, counts);
                }
                check_use(image, found, start.direct_blocks, &place);
            }
        }
    }
}

/// The power comes back: the store must open in an allowed state, and again in the same.
fn check_image(image: &Disk, allowed: &Allowed, place: &str) -> Model {
    let medium = SimMedium::from_disk(image.clone());
    let engine = open_sim(&medium).unwrap_or_else(|error| panic!("{place}: {error}"));
    let found = observe(&engine).unwrap_or_else(|what| panic!("{place}: {what}"));
    drop(engine);
    if !allowed.states.contains(&found) {
        let states: Vec<_> =
            allowed.states.iter().map(|state| differences(state, &found)).collect();
        panic!("{place}: none of the allowed states: {states:#?}");
    }
    medium.lose(SECTOR, &mut |_| 0);
    check_same(&medium, &found, &format!("{place}, opened again"));
    found
}

fn check_same(medium: &SimMedium, expected: &Model, place: &str) {
    let engine = open_sim(medium).unwrap_or_else(|error| panic!("{place}: {error}"));
    check_equal(&engine, expected).unwrap_or_else(|what| panic!("{place}: {what}"));
}

/// The process dies and the page cache stays: nothing is lost, also not by a power cut after the
/// next opening.
fn check_kill(point: &CrashPoint, place: &str) {
    let medium = SimMedium::from_disk(point.disk.clone());
    let place = format!("{place}, killed");
    let engine = open_sim(&medium).unwrap_or_else(|error| panic!("{place}: {error}"));
    let found = observe(&engine).unwrap_or_else(|what| panic!("{place}: {what}"));
    drop(engine);
    let states = &point.allowed.states;
    let last = &states[states.len() - point.allowed.last..];
    assert!(last.contains(&found), "{place}: {}", differences(&last[0], &found));
    medium.lose(SECTOR, &mut |_| 0);
    check_same(&medium, &found, &format!("{place}, then a power cut"));
}

/// The power goes while the store is opened after a power cut: that changes nothing.
fn check_crash_in_open(image: &Disk, found: &Model, place: &str, counts: &Counts) {
    let medium = SimMedium::from_disk(image.clone());
    medium.record();
    drop(open_sim(&medium));
    for (number, disk) in medium.recorded().into_iter().enumerate() {
        let mut seen = HashSet::new();
        for outcome in outcomes(&disk) {
            let mut fates = Vec::new();
            let cut = outcome.apply(disk.clone(), &mut fates);
            if !seen.insert(fates) {
                continue;
            }
            let place = format!("{place}, in opening at {number}, {outcome:?}");
            counts.nested.fetch_add(1, Relaxed);
            check_same(&SimMedium::from_disk(cut), found, &place);
        }
    }
}

/// The store goes on to work: what the crash left behind is in nobody's way.
fn check_use(image: Disk, found: Model, direct_blocks: usize, place: &str) {
    let medium = SimMedium::from_disk(image);
    let mut run = Run::new(medium.clone(), found, direct_blocks);
    for (step, act) in (200..).zip([Write, Snapshot, Checkpoint, DeleteLayer, Overlap, Flush]) {
        run.act(act, step);
    }
    run.engine = None;
    medium.lose(SECTOR, &mut |_| 0);
    check_same(&medium, run.history.now(), &format!("{place}, used again"));
}

/// All sequences of exactly `len` letters.
fn sequences(alphabet: &[char], len: usize) -> Vec<String> {
    (0..len).fold(vec![String::new()], |shorter, _| {
        let longer = |start: String| alphabet.iter().map(move |letter| format!("{start}{letter}"));
        shorter.into_iter().flat_map(longer).collect()
    })
}

/// All workloads: number of the start, letters.
fn workloads(starts: &[Start]) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    for (number, start) in starts.iter().enumerate() {
        let [two, three] = &start.alphabets;
        let mut some: Vec<String> = (1..=2).flat_map(|len| sequences(two, len)).collect();
        some.extend(sequences(three, 3));
        if start.name == "used" {
            some.extend(sequences(&FEW, 4));
        }
        all.extend(some.into_iter().map(|letters| (number, letters)));
    }
    all
}

#[test]
fn i3_i5_i6_i9_every_crash_point_of_every_small_workload() {
    let starts = Start::all();
    let mut workloads = workloads(&starts);
    if let Ok(one) = std::env::var("WORKLOAD") {
        let (name, letters) = one.split_once(' ').unwrap_or((&one, ""));
        workloads.retain(|(number, _)| starts[*number].name == name);
        if !letters.is_empty() {
            workloads.truncate(1);
            workloads.iter_mut().for_each(|workload| workload.1 = letters.into());
        }
    }
    let counts = Counts::default();
    let failed = Mutex::new(());
    let check = |number: u64| {
        let (start, letters) = &workloads[number as usize];
        check_workload(&starts[*start], letters, &counts);
    };
    in_parallel(workloads.len() as u64, check, |number| {
        let _one = failed.lock();
        let (start, letters) = &workloads[number as usize];
        println!("failed with WORKLOAD=\"{} {letters}\"", starts[*start].name);
    });
    println!(
        "{} workloads, {} crash points, {} images, {} of crashes while opening",
        counts.workloads.into_inner(),
        counts.points.into_inner(),
        counts.images.into_inner(),
        counts.nested.into_inner()
    );
}

#[test]
fn the_power_may_go_at_any_moment_of_creation() {
    let medium = SimMedium::default();
    medium.record();
    create_sim(&medium, &small()).unwrap();
    let disks = medium.recorded();
    let last = disks.len() - 1;
    let mut opened = 0;
    for (number, disk) in disks.into_iter().enumerate() {
        for outcome in outcomes(&disk) {
            let image = SimMedium::from_disk(outcome.apply(disk.clone(), &mut Vec::new()));
            match open_sim(&image) {
                Ok(engine) => {
                    check_equal(&engine, &Model::new()).unwrap();
                    opened += 1;
                }
                // There is no store yet; it can be made again.
                Err(_) => {
                    assert!(number < last, "{outcome:?}");
                    create_sim(&image, &small()).unwrap();
                    check_equal(&open_sim(&image).unwrap(), &Model::new()).unwrap();
                }
            }
        }
    }
    assert!(opened > 0);
}
