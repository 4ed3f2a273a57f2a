//! Random bytes as any file of a store: a clear error or right data, no panic, bounded memory.
//!
//! A case is a short text: a store to begin with and edits of its files ([`Edit`]). The cases in
//! `tests/corpus` are replayed first, then `CASES` random ones (from `SEED`). One that fails is
//! printed; put that text into a file of the corpus to keep it. `CASE=path` runs one file alone.
//! A line `expect …` fixes what opening must answer: `opens`, or `corrupt FILE`.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use sheepdog_store::{OpenError, Options, Payload, ReadError, Store, StoreIds};
use sheepdog_types::{
    BLOCK_SIZE, BLOCKS_PER_OBJECT, ClusterId, DiskId, Layer, LayerKey, NodeId, ObjectId,
    ObjectIndex, Version, VolumeId, WriterGen,
};

/// Memory that opening and reading any store may take at once, beside [`PER_BYTE`].
const BASE_MEMORY: usize = 24 << 20;
/// Times the bytes of `index` and `sums`: a slab of 9 KiB there costs less than that in memory.
const PER_BYTE: usize = 1;
/// No edit makes a file longer than this.
const MAX_FILE: u64 = 64 << 20;
const SECTOR: usize = 512;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts what is allocated.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator with the same arguments; counting does not
// allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(USED.fetch_add(layout.size(), SeqCst) + layout.size(), SeqCst);
        // SAFETY: the caller keeps the contract of `alloc`, which is that of `System::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(USED.fetch_add(layout.size(), SeqCst) + layout.size(), SeqCst);
        // SAFETY: the caller keeps the contract, which is that of `System::alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), SeqCst);
        // SAFETY: `pointer` came from `System` with this layout, since all calls go there.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

/// A change of one file of a store, as a line of text.
#[derive(Clone, Debug, PartialEq)]
enum Edit {
    /// `set FILE OFFSET HEX`: these bytes.
    Set(String, u64, Vec<u8>),
    /// `flip FILE OFFSET BIT`.
    Flip(String, u64, u8),
    /// `fill FILE OFFSET LENGTH SEED`: random bytes.
    Fill(String, u64, u64, u64),
    /// `zero FILE OFFSET LENGTH`.
    Zero(String, u64, u64),
    /// `length FILE LENGTH`: shorter or, with zeroes, longer.
    Length(String, u64),
    /// `copy FILE FILE`: the second becomes as the first.
    Copy(String, String),
    /// `move FILE FROM TO LENGTH`: bytes to another place of the file.
    Move(String, u64, u64, u64),
    /// `remove FILE`.
    Remove(String),
    /// `seal FILE OFFSET`: the checksum of the sector there becomes right.
    Seal(String, u64),
    /// `record FILE OFFSET`: the checksum of the log record there becomes right.
    Record(String, u64),
}

impl fmt::Display for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(file, at, bytes) => {
                write!(f, "set {file} {at} ")?;
                bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
            Self::Flip(file, at, bit) => write!(f, "flip {file} {at} {bit}"),
            Self::Fill(file, at, len, seed) => write!(f, "fill {file} {at} {len} {seed}"),
            Self::Zero(file, at, len) => write!(f, "zero {file} {at} {len}"),
            Self::Length(file, len) => write!(f, "length {file} {len}"),
            Self::Copy(from, to) => write!(f, "copy {from} {to}"),
            Self::Move(file, from, to, len) => write!(f, "move {file} {from} {to} {len}"),
            Self::Remove(file) => write!(f, "remove {file}"),
            Self::Seal(file, at) => write!(f, "seal {file} {at}"),
            Self::Record(file, at) => write!(f, "record {file} {at}"),
        }
    }
}

impl Edit {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let what = words.next()?;
        let file = words.next()?.to_owned();
        let rest: Vec<&str> = words.collect();
        let number = |at: usize| rest.get(at)?.parse::<u64>().ok();
        let byte = |at: usize| u8::from_str_radix(rest.get(1)?.get(at..at + 2)?, 16).ok();
        Some(match what {
            "set" => {
                let len = rest.get(1)?.len();
                let bytes = (0..len).step_by(2).map(byte).collect::<Option<_>>()?;
                Self::Set(file, number(0)?, bytes)
            }
            "flip" => Self::Flip(file, number(0)?, number(1)? as u8),
            "fill" => Self::Fill(file, number(0)?, number(1)?, number(2)?),
            "zero" => Self::Zero(file, number(0)?, number(1)?),
            "length" => Self::Length(file, number(0)?),
            "copy" => Self::Copy(file, (*rest.first()?).to_owned()),
            "move" => Self::Move(file, number(0)?, number(1)?, number(2)?),
            "remove" => Self::Remove(file),
            "seal" => Self::Seal(file, number(0)?),
            "record" => Self::Record(file, number(0)?),
            _ => return None,
        })
    }
}

/// Files of a store. Of `data` the holes are kept as holes.
type Image = BTreeMap<String, Vec<u8>>;

fn bytes_at<'a>(image: &'a mut Image, file: &str, at: u64, len: u64) -> Option<&'a mut [u8]> {
    let bytes = image.get_mut(file)?;
    let from = (at as usize).min(bytes.len());
    let to = from.saturating_add(len as usize).min(bytes.len());
    Some(&mut bytes[from..to])
}

fn u32_of(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

/// Makes the checksum of a log record right, as `docs/on-disk.md` says.
fn seal_record(image: &mut Image, file: &str, at: u64) -> Option<()> {
    let ids = bytes_at(image, "superblock", 16, 24)?.to_vec();
    let record = bytes_at(image, file, at, u64::MAX >> 1)?;
    let count = u32_of(record, 28) as usize;
    let tables = match record.get(4)? {
        1 => count.checked_mul(4)?,
        3 => count.checked_mul(4)?.checked_add(256)?,
        _ => 0,
    };
    let crc = crc32c::crc32c_append(crc32c::crc32c(&ids), record.get(..92)?);
    let crc = crc32c::crc32c_append(crc, record.get(96..96 + tables)?);
    record[92..96].copy_from_slice(&crc.to_le_bytes());
    Some(())
}

/// Applies an edit; `None` if it makes no sense for this store.
fn apply(edit: &Edit, image: &mut Image) -> Option<()> {
    match edit {
        Edit::Set(file, at, bytes) => {
            let target = bytes_at(image, file, *at, bytes.len() as u64)?;
            let len = target.len();
            target.copy_from_slice(&bytes[..len]);
        }
        Edit::Flip(file, at, bit) => *bytes_at(image, file, *at, 1)?.first_mut()? ^= 1 << (bit % 8),
        Edit::Fill(file, at, len, seed) => {
            let mut rng = Rng(*seed);
            bytes_at(image, file, *at, *len)?.fill_with(|| rng.next() as u8);
        }
        Edit::Zero(file, at, len) => bytes_at(image, file, *at, *len)?.fill(0),
        Edit::Length(file, len) => image.get_mut(file)?.resize((*len).min(MAX_FILE) as usize, 0),
        Edit::Copy(from, to) => {
            let bytes = image.get(from)?.clone();
            image.insert(to.clone(), bytes);
        }
        Edit::Move(file, from, to, len) => {
            let bytes = bytes_at(image, file, *from, *len)?.to_vec();
            let target = bytes_at(image, file, *to, *len)?;
            let len = target.len().min(bytes.len());
            target[..len].copy_from_slice(&bytes[..len]);
        }
        Edit::Remove(file) => {
            image.remove(file)?;
        }
        Edit::Seal(file, at) => {
            let sector = bytes_at(image, file, *at, SECTOR as u64)?;
            let (content, crc) = sector.split_last_chunk_mut::<4>()?;
            *crc = crc32c::crc32c(content).to_le_bytes();
        }
        Edit::Record(file, at) => return seal_record(image, file, *at),
    }
    Some(())
}

/// A case: a text as in the corpus.
#[derive(Clone, Debug)]
struct Case {
    store: String,
    edits: Vec<Edit>,
    expect: Option<String>,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "store {}", self.store)?;
        self.edits.iter().try_for_each(|edit| writeln!(f, "{edit}"))?;
        self.expect.iter().try_for_each(|expect| writeln!(f, "expect {expect}"))
    }
}

impl Case {
    fn parse(text: &str) -> Self {
        let mut case = Self { store: "used".into(), edits: Vec::new(), expect: None };
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            if let Some(store) = line.strip_prefix("store ") {
                case.store = store.trim().into();
            } else if let Some(expect) = line.strip_prefix("expect ") {
                case.expect = Some(expect.trim().into());
            } else if !line.starts_with('#') {
                case.edits.push(Edit::parse(line).unwrap_or_else(|| panic!("what is {line:?}?")));
            }
        }
        case
    }

    fn random(rng: &mut Rng, stores: &BTreeMap<&str, Image>) -> Self {
        let store = *rng.pick(&["empty", "clean", "used", "used", "used"]);
        let image = &stores[store];
        let mut edits = Vec::new();
        for _ in 0..1 + rng.below(3) {
            random_edits(rng, image, &mut edits);
        }
        Self { store: store.into(), edits, expect: None }
    }
}

/// A sector of `bytes` that holds something, mostly.
fn some_sector(rng: &mut Rng, bytes: &[u8]) -> u64 {
    let sectors = (bytes.len() / SECTOR).max(1) as u64;
    for _ in 0..200 {
        let at = rng.below(sectors) as usize * SECTOR;
        if bytes[at..].iter().take(SECTOR).any(|byte| *byte != 0) {
            return at as u64;
        }
    }
    rng.below(sectors) * SECTOR as u64
}

/// An edit that is likely to get somewhere, with what makes its checksums right, perhaps.
fn random_edits(rng: &mut Rng, image: &Image, edits: &mut Vec<Edit>) {
    let files: Vec<_> = image.keys().cloned().collect();
    let file = rng.pick(&files).clone();
    let bytes = &image[&file];
    let len = bytes.len() as u64;
    let sector = some_sector(rng, bytes);
    match rng.below(16) {
        0..3 => edits.push(Edit::Flip(file, sector + rng.below(512), rng.below(8) as u8)),
        3..5 => edits.push(Edit::Fill(file, sector, 1 << rng.below(17), rng.next())),
        5 => edits.push(Edit::Zero(file, sector, 1 << rng.below(17))),
        6 => edits.push(Edit::Length(file, rng.below(len + 1))),
        7 => edits.push(Edit::Length(file, len + rng.below(1 << 20))),
        8 => edits.push(Edit::Copy(file, rng.pick(&files).clone())),
        9 => edits.push(Edit::Move(file, sector, rng.below(len / 512 + 1) * 512, 512)),
        10 if rng.below(4) == 0 => edits.push(Edit::Remove(file)),
        10..13 => {
            let file = (*rng.pick(&["superblock", "index"])).to_owned();
            let at = some_sector(rng, &image[&file]);
            let mut field = field_of(rng);
            for _ in 0..1 + rng.below(2) {
                edits.push(Edit::Set(file.clone(), at + field.0, std::mem::take(&mut field.1)));
                field = field_of(rng);
            }
            edits.push(Edit::Seal(file, at));
        }
        13..15 => {
            // The log of the small stores begins in the first segment, at its first byte.
            let at = *rng.pick(&record_offsets(&image["log/0000"]));
            let (field, value) = (rng.below(23) * 4, field_of(rng).1);
            edits.push(Edit::Set("log/0000".into(), at + field, value));
            edits.push(Edit::Record("log/0000".into(), at));
        }
        _ => {
            let (at, value) = field_of(rng);
            edits.push(Edit::Set(file, sector + at, value));
        }
    }
}

/// A field of a sector and a value: fields are aligned and mostly small or huge.
fn field_of(rng: &mut Rng) -> (u64, Vec<u8>) {
    let value = match rng.below(4) {
        0 => rng.below(16),
        1 => u64::MAX - rng.below(3),
        2 => 1 << rng.below(64),
        _ => rng.next(),
    };
    let width = *rng.pick(&[1, 2, 4, 8]);
    (rng.below(124) * 4, value.to_le_bytes()[..width].to_vec())
}

/// Where records begin, or look as if.
fn record_offsets(segment: &[u8]) -> Vec<u64> {
    let mut found: Vec<u64> = (0..segment.len() as u64)
        .step_by(32)
        .filter(|at| segment[*at as usize..].starts_with(b"SDLR"))
        .collect();
    found.push(0);
    found
}

fn options() -> Options {
    Options { log_bytes: 256 << 10, segment_bytes: 64 << 10, ..Options::default() }
}

fn key(index: u32, layer: u32) -> LayerKey {
    let object = ObjectId { volume: VolumeId(1), index: ObjectIndex(index) };
    LayerKey { object, layer: Layer(layer) }
}

/// Tags of all blocks that were ever written.
const TAGS: std::ops::Range<u64> = 1..200;

fn write(store: &Store, key: LayerKey, first: u16, tags: &[u64]) {
    let mut bytes = Vec::new();
    tags.iter().for_each(|tag| bytes.extend(tag.to_le_bytes().repeat(BLOCK_SIZE / 8)));
    let crcs: Vec<_> = bytes.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect();
    let prev = store.stat(key).map_or(Version::NONE, |stat| stat.version);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    store.write(key, prev, prev.next(WriterGen(1)), first, payload).unwrap();
}

fn read_image(dir: &Path) -> Image {
    let mut names: Vec<String> = ["superblock", "data", "index", "sums"].map(Into::into).into();
    names.extend((0..4).map(|number| format!("log/{number:04}")));
    names.into_iter().map(|name| (name.clone(), std::fs::read(dir.join(name)).unwrap())).collect()
}

/// The stores that cases begin with: without content; stopped in order; used and not stopped.
fn stores(scratch: &Path) -> BTreeMap<&'static str, Image> {
    let dir = scratch.join("made");
    let ids = StoreIds { cluster: ClusterId(1), node: NodeId(2), disk: DiskId(3) };
    let store = Store::create(&dir, ids, options()).unwrap();
    let mut stores = BTreeMap::from([("empty", read_image(&dir))]);
    write(&store, key(0, 0), 0, &[1, 2, 3]);
    write(&store, key(0, 1), 1, &[4]);
    write(&store, key(1, 0), 1022, &[5, 6]);
    write(&store, key(2, 0), 7, &[7]);
    store.delete(key(2, 0)).unwrap();
    store.close().unwrap();
    stores.insert("clean", read_image(&dir));
    let store = Store::open(&dir, options()).unwrap();
    write(&store, key(0, 1), 0, &[8, 9]);
    let image = store.image(key(0, 0)).unwrap().unwrap();
    assert!(store.install(key(3, 0), None, &image).unwrap());
    let zero = Payload::Zero { count: 2, absent: false, release: true };
    let prev = store.stat(key(0, 1)).unwrap().version;
    store.write(key(0, 1), prev, prev.next(WriterGen(2)), 1, zero).unwrap();
    store.flush_wait().unwrap();
    write(&store, key(3, 0), 5, &[10]);
    store.flush_wait().unwrap();
    stores.insert("used", read_image(&dir));
    stores
}

/// Writes an image as files; holes stay holes.
fn write_image(image: &Image, dir: &Path) {
    std::fs::create_dir_all(dir.join("log")).unwrap();
    for (name, bytes) in image {
        let file = std::fs::File::create(dir.join(name)).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (page, content) in bytes.chunks(4096).enumerate() {
            if content.iter().any(|byte| *byte != 0) {
                file.write_all_at(content, page as u64 * 4096).unwrap();
            }
        }
    }
}

/// Reads everything: each block is one that was written, or zeroes, or an error.
fn read_all(store: &Store) -> Result<usize, String> {
    let mut keys = Vec::new();
    store.list_all(|_, stats| keys.extend(stats.iter().map(|stat| stat.key)));
    let mut objects = BTreeSet::new();
    for key in &keys {
        objects.insert(key.object);
        let _ = store.sums(*key);
        match store.image(*key) {
            Ok(_) | Err(ReadError::Checksum { .. } | ReadError::Io { .. }) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    let mut errors = 0;
    for object in objects {
        let mut chain: Vec<_> =
            store.stat_object(object).iter().map(|stat| stat.key.layer).collect();
        chain.truncate(8);
        for block in 0..BLOCKS_PER_OBJECT as u16 {
            let (mut buf, mut crcs) = ([0; BLOCK_SIZE], [0]);
            match store.read(object, &chain, block, &mut buf, &mut crcs) {
                Ok(_) => {
                    let tag = u64::from_le_bytes(*buf.first_chunk().unwrap());
                    let whole = buf.chunks(8).all(|word| word == tag.to_le_bytes());
                    if !whole || tag != 0 && !TAGS.contains(&tag) {
                        return Err(format!("foreign data in block {block} of {object}"));
                    }
                }
                Err(ReadError::Checksum { .. } | ReadError::Io { .. }) => errors += 1,
                Err(error) => return Err(error.to_string()),
            }
        }
    }
    Ok(errors)
}

/// Opens, reads everything, changes something, stops, and the same again.
fn use_store(dir: &Path) -> Result<(), OpenError> {
    for round in 0..2 {
        let store = Store::open(dir, options())?;
        read_all(&store).unwrap();
        let _ = store.digest(key(0, 0).object.slot());
        let _ = store.usage();
        let have = store.stat(key(9, 0)).map_or(Version::NONE, |stat| stat.version);
        let zero = Payload::Zero { count: 1, absent: false, release: true };
        // What the disk answers is its own affair; that it answers is tested here.
        let _ = store.write(key(9, 0), have, have.next(WriterGen(1)), 0, zero);
        let _ = store.flush_wait();
        if round == 0 { drop(store) } else { drop(store.close()) }
    }
    Ok(())
}

fn check_expectation(expect: &str, result: &Result<(), OpenError>) {
    let fits = match (expect.split_once(' '), result) {
        (None, Ok(())) => expect == "opens",
        (Some(("corrupt", file)), Err(OpenError::Corrupt { file: named, .. })) => file == named,
        (None, Err(OpenError::OtherFormat { .. })) => expect == "newer",
        (None, Err(OpenError::NotAStore { .. })) => expect == "none",
        _ => false,
    };
    assert!(fits, "{expect:?} expected, found {result:?}");
}

/// Runs a case; panics if the store does what it must not.
fn run(case: &Case, stores: &BTreeMap<&str, Image>, scratch: &Path) {
    let mut image = stores[case.store.as_str()].clone();
    for edit in &case.edits {
        apply(edit, &mut image);
    }
    let dir = scratch.join("case");
    // The last case may have failed.
    let _ = std::fs::remove_dir_all(&dir);
    write_image(&image, &dir);
    let tables: usize =
        ["index", "sums"].map(|file| image.get(file).map_or(0, Vec::len)).iter().sum();
    let names: BTreeSet<_> = stores["empty"].keys().cloned().collect();
    drop(image);
    let before = USED.load(SeqCst);
    PEAK.store(before, SeqCst);
    let panics = PANICS.load(SeqCst);
    let result = use_store(&dir);
    let peak = PEAK.load(SeqCst).saturating_sub(before);
    let bound = BASE_MEMORY + PER_BYTE * tables;
    assert!(peak <= bound, "{peak} bytes of memory, more than {bound}");
    assert_eq!(PANICS.load(SeqCst), panics, "a thread of the store panicked");
    match &result {
        Ok(()) => {}
        Err(OpenError::Corrupt { file, what }) => {
            let segment = file.starts_with("log/");
            assert!((segment || names.contains(file)) && !what.is_empty(), "{file}: {what}");
        }
        Err(OpenError::NotAStore { .. } | OpenError::OtherFormat { .. }) => {}
        Err(error) => panic!("not a clear error: {error}"),
    }
    if let Some(expect) = &case.expect {
        check_expectation(expect, &result);
    }
}

fn run_or_print(name: &str, case: &Case, stores: &BTreeMap<&str, Image>, scratch: &Path) {
    let run = std::panic::AssertUnwindSafe(|| run(case, stores, scratch));
    if let Err(panic) = std::panic::catch_unwind(run) {
        println!("{name} failed; to keep it, put this into daemon/store/tests/corpus:\n{case}");
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn random_bytes_as_any_file_give_a_clear_error_or_right_data() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, SeqCst);
        usual(info);
    }));
    // Durability is of no interest here.
    let memory = Path::new("/dev/shm");
    let scratch = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    };
    let stores = stores(scratch.path());
    if let Some(path) = std::env::var_os("CASE") {
        let text = std::fs::read_to_string(path).unwrap();
        return run_or_print("the case", &Case::parse(&text), &stores, scratch.path());
    }
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut files: Vec<_> =
        std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 10, "the corpus is gone");
    for path in &files {
        let case = Case::parse(&std::fs::read_to_string(path).unwrap());
        run_or_print(&path.display().to_string(), &case, &stores, scratch.path());
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seed: u64 = number("SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    let cases = number("CASES").unwrap_or(1000);
    println!("SEED={seed}");
    for number in 0..cases {
        let seed = seed.wrapping_add(number);
        let case = Case::random(&mut Rng(seed), &stores);
        let name = format!("SEED={seed} CASES=1");
        assert_eq!(Case::parse(&case.to_string()).edits, case.edits, "cases survive as text");
        run_or_print(&name, &case, &stores, scratch.path());
    }
    println!("{} cases of the corpus, {cases} random ones", files.len());
}
