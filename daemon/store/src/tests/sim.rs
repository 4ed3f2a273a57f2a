//! A medium in memory that keeps un-synced changes apart, and at a power cut loses, reorders and
//! tears them.
//!
//! What it allows is what `docs/on-disk.md` says that the store must bear: each *unit* (a sector
//! of 512 bytes, or 4 KiB) that was changed since the last sync of its file is afterwards as it was
//! at that sync or after any of the changes since; the units, the file's length and its name decide
//! independently of each other. A sync says nothing of other files. A sync that failed leaves what
//! it should have written in the page cache, where later syncs do not see it.
//!
//! All content is in copy-on-write pages, so that a copy of a disk costs a few microseconds.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::oracle::Rng;
use crate::medium::{Medium, VFile};

pub(super) const SECTOR: usize = 512;
pub(super) const PAGE: usize = 4096;

type Page = [u8; PAGE];
/// Pages by number; one that is missing is zeroes.
type Pages = BTreeMap<u64, Arc<Page>>;

/// One change of a file that is not durable.
struct Change {
    /// Counts all changes of the medium.
    number: u64,
    range: Range<u64>,
    /// `None`: zeroes.
    bytes: Option<Vec<u8>>,
}

impl Change {
    /// Applies what falls into `part` of page `page`.
    fn apply(&self, page: u64, part: Range<usize>, content: &mut Page) {
        let start = page * PAGE as u64;
        let from = self.range.start.max(start + part.start as u64);
        let to = self.range.end.min(start + part.end as u64);
        if from >= to {
            return;
        }
        let target = &mut content[(from - start) as usize..(to - start) as usize];
        match &self.bytes {
            Some(bytes) => target.copy_from_slice(
                &bytes[(from - self.range.start) as usize..(to - self.range.start) as usize],
            ),
            None => target.fill(0),
        }
    }

    fn touches(&self, page: u64, part: &Range<usize>) -> bool {
        let start = page * PAGE as u64;
        self.range.start < start + part.end as u64 && start + (part.start as u64) < self.range.end
    }
}

/// A change of a page; dead if a sync that should have written it failed.
#[derive(Clone)]
struct Pending {
    change: Arc<Change>,
    dead: bool,
}

#[derive(Clone, Default)]
struct FileState {
    len: u64,
    durable_len: u64,
    /// The number of the change that made the name, while that is not durable.
    name_pending: Option<u64>,
    current: Pages,
    durable: Pages,
    pending: BTreeMap<u64, Vec<Pending>>,
    /// Changes that made the file longer, with the length after each; ascending.
    lens: Vec<(u64, u64)>,
}

fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE as u64..range.end.div_ceil(PAGE as u64)
}

impl FileState {
    fn extend(&mut self, number: u64, len: u64) {
        if len > self.len {
            self.len = len;
            self.lens.push((number, len));
        }
    }

    /// A write that makes the file longer may have done so by half.
    fn extend_by_write(&mut self, number: u64, len: u64) {
        self.extend(number, (len - 1) / SECTOR as u64 * SECTOR as u64);
        self.extend(number, len);
    }

    fn write(&mut self, number: u64, bytes: Vec<u8>, offset: u64) {
        let range = offset..offset + bytes.len() as u64;
        self.extend_by_write(number, range.end);
        let change = Arc::new(Change { number, range, bytes: Some(bytes) });
        for page in pages_of(&change.range) {
            let content = self.current.entry(page).or_insert_with(|| Arc::new([0; PAGE]));
            change.apply(page, 0..PAGE, Arc::make_mut(content));
            let pending = Pending { change: change.clone(), dead: false };
            self.pending.entry(page).or_default().push(pending);
        }
    }

    fn punch(&mut self, number: u64, offset: u64, len: u64) {
        let change = Arc::new(Change { number, range: offset..offset + len, bytes: None });
        let held: Vec<u64> =
            self.current.range(pages_of(&change.range)).map(|(page, _)| *page).collect();
        for page in held {
            let content = self.current.get_mut(&page).expect("a page that was just found");
            change.apply(page, 0..PAGE, Arc::make_mut(content));
            if **content == [0; PAGE] {
                self.current.remove(&page);
            }
            let pending = Pending { change: change.clone(), dead: false };
            self.pending.entry(page).or_default().push(pending);
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + buf.len() as u64 > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < buf.len() {
            let position = offset + done as u64;
            let at = (position % PAGE as u64) as usize;
            let count = (buf.len() - done).min(PAGE - at);
            let out = &mut buf[done..done + count];
            match self.current.get(&(position / PAGE as u64)) {
                Some(page) => out.copy_from_slice(&page[at..at + count]),
                None => out.fill(0),
            }
            done += count;
        }
        Ok(())
    }

    fn make_page_durable(&mut self, page: u64) {
        match self.current.get(&page) {
            Some(content) => self.durable.insert(page, content.clone()),
            None => self.durable.remove(&page),
        };
    }

    fn sync(&mut self) {
        for (page, pending) in std::mem::take(&mut self.pending) {
            if pending.iter().all(|pending| pending.dead) {
                self.pending.insert(page, pending);
            } else {
                self.make_page_durable(page);
            }
        }
        self.lens.clear();
        self.durable_len = self.len;
    }

    /// A sync that failed: the pages count as written from now on, though they are not.
    fn fail_sync(&mut self) {
        for pending in self.pending.values_mut().flatten() {
            pending.dead = true;
        }
    }

    fn lose(&mut self, name: &str, unit: usize, fate: &mut dyn FnMut(&Unit<'_>) -> usize) {
        let mut numbers = Vec::new();
        for (page, pending) in std::mem::take(&mut self.pending) {
            let old = self.durable.get(&page).cloned();
            let mut content = old.as_deref().copied().unwrap_or([0; PAGE]);
            for at in (0..PAGE).step_by(unit) {
                let part = at..at + unit;
                let touching = pending.iter().filter(|p| p.change.touches(page, &part));
                let touching: Vec<_> = touching.map(|pending| &*pending.change).collect();
                if touching.is_empty() {
                    continue;
                }
                numbers.clear();
                numbers.extend(touching.iter().map(|change| change.number));
                let first = touching[0].range.start / unit as u64;
                let offset = page * PAGE as u64 + at as u64;
                let index = offset / unit as u64 - first;
                let last = (touching[0].range.end - 1) / unit as u64 - first;
                let kept =
                    fate(&Unit { name, part: Part::Bytes { index, last }, numbers: &numbers });
                for change in &touching[..kept] {
                    change.apply(page, part.clone(), &mut content);
                }
            }
            if content == [0; PAGE] {
                self.durable.remove(&page);
            } else {
                self.durable.insert(page, Arc::new(content));
            }
        }
        let lens = std::mem::take(&mut self.lens);
        if !lens.is_empty() {
            numbers.clear();
            numbers.extend(lens.iter().map(|(number, _)| *number));
            match fate(&Unit { name, part: Part::Length, numbers: &numbers }) {
                0 => {}
                kept => self.durable_len = lens[kept - 1].1,
            }
        }
        self.len = self.durable_len;
        self.forget_after(self.len);
        self.current = self.durable.clone();
    }

    /// What lay past the end is not there when the file grows again.
    fn forget_after(&mut self, len: u64) {
        let (page, at) = (len / PAGE as u64, (len % PAGE as u64) as usize);
        self.durable.split_off(&len.div_ceil(PAGE as u64));
        let last = self.durable.get_mut(&page);
        if let Some(last) = last.filter(|last| last[at..].iter().any(|byte| *byte != 0)) {
            Arc::make_mut(last)[at..].fill(0);
        }
    }
}

/// A part of a file whose fate at a power cut is its own.
pub(super) struct Unit<'a> {
    /// The file.
    pub(super) name: &'a str,
    pub(super) part: Part,
    /// The changes that touched it since the last sync, ascending. The fate is how many of them,
    /// from the first on, reached the medium.
    pub(super) numbers: &'a [u64],
}

/// What a [`Unit`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// A sector: the `index`th of those that the first change touched, of which `last` is the last.
    Bytes {
        index: u64,
        last: u64,
    },
    Length,
    Name,
}

/// All files, with what is durable of them and what is not.
#[derive(Clone, Default)]
pub(super) struct Disk {
    files: BTreeMap<Arc<str>, FileState>,
}

/// A change that is not durable, to choose fates from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unsynced {
    pub(super) number: u64,
    /// Sectors of 512 bytes.
    pub(super) sectors: u64,
}

impl Disk {
    /// The changes that are not durable, in their order.
    pub(super) fn unsynced(&self) -> Vec<Unsynced> {
        let mut found = BTreeMap::new();
        for file in self.files.values() {
            found.extend(file.name_pending.map(|number| (number, 1)));
            found.extend(file.lens.iter().map(|(number, _)| (*number, 1)));
        }
        for change in self.files.values().flat_map(|f| f.pending.values().flatten()) {
            let range = &change.change.range;
            let sectors = range.end.div_ceil(SECTOR as u64) - range.start / SECTOR as u64;
            found.insert(change.change.number, sectors);
        }
        found.into_iter().map(|(number, sectors)| Unsynced { number, sectors }).collect()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(|name| &**name)
    }

    /// The power goes: `fate` decides for every unit of `unit` bytes.
    pub(super) fn lose(&mut self, unit: usize, fate: &mut dyn FnMut(&Unit<'_>) -> usize) {
        let mut lost = Vec::new();
        for (name, file) in &mut self.files {
            let whole = Unit {
                name,
                part: Part::Name,
                numbers: &file.name_pending.map_or([0], |number| [number]),
            };
            if file.name_pending.take().is_some() && fate(&whole) == 0 {
                lost.push(name.clone());
                continue;
            }
            file.lose(name, unit, fate);
        }
        for name in lost {
            self.files.remove(&name);
        }
    }
}

/// Changes that fail.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// Of files whose name starts so.
    pub(super) prefix: &'static str,
    pub(super) errno: Errno,
    /// So many changes of these files go well before.
    pub(super) after: u64,
    /// Then so many fail.
    pub(super) count: u64,
}

/// Called before a change, with the name of the file.
type Hook = Arc<dyn Fn(&str) + Send + Sync>;

#[derive(Default)]
struct Sim {
    disk: Disk,
    /// Changes so far.
    changes: u64,
    /// Changes until the power goes.
    fuse: Option<u64>,
    fault: Option<Fault>,
    syncs: u64,
    /// The disk after each change.
    recording: Option<Vec<Disk>>,
    /// Bytes that `data` may hold; without one it is never full, as far as `space` tells.
    offered: Option<u64>,
    hook: Option<Hook>,
}

impl Sim {
    /// Counts a change, unless the power is gone.
    fn begin(&mut self) -> io::Result<u64> {
        if self.fuse == Some(0) {
            return Err(Errno::IO.into());
        }
        self.fuse = self.fuse.map(|left| left - 1);
        self.changes += 1;
        Ok(self.changes)
    }

    fn keep_record(&mut self) {
        if let Some(recording) = &mut self.recording {
            recording.push(self.disk.clone());
        }
    }

    fn fails(&mut self, name: &str) -> Option<Errno> {
        let fault = self.fault.as_mut().filter(|fault| name.starts_with(fault.prefix))?;
        if fault.after > 0 {
            fault.after -= 1;
            return None;
        }
        fault.count = fault.count.checked_sub(1)?;
        Some(fault.errno)
    }
}

/// The medium; clones share it, as the disk outlives the process.
#[derive(Clone, Default)]
pub(super) struct SimMedium(Arc<Mutex<Sim>>);

impl SimMedium {
    pub(super) fn from_disk(disk: Disk) -> Self {
        Self(Arc::new(Mutex::new(Sim { disk, ..Sim::default() })))
    }

    /// The disk as it is, with what is not durable.
    pub(super) fn disk(&self) -> Disk {
        self.0.lock().unwrap().disk.clone()
    }

    /// The power goes after `changes` more writes, syncs and the like.
    pub(super) fn set_fuse(&self, changes: u64) {
        self.0.lock().unwrap().fuse = Some(changes);
    }

    /// From now on all changes of files whose name starts so fail.
    pub(super) fn set_fault(&self, fault: Option<(&'static str, Errno)>) {
        let all = |(prefix, errno)| Fault { prefix, errno, after: 0, count: u64::MAX };
        self.set_faults(fault.map(all));
    }

    pub(super) fn set_faults(&self, fault: Option<Fault>) {
        self.0.lock().unwrap().fault = fault;
    }

    /// From now on there is so much space for `data`, and `space` says what is left of it.
    pub(super) fn offer(&self, bytes: u64) {
        self.0.lock().unwrap().offered = Some(bytes);
    }

    /// Calls `hook` before each change, also from within it.
    pub(super) fn set_hook(&self, hook: Option<Hook>) {
        // The old one may hold the last reference to who knows what: dropped without the lock.
        let _old = std::mem::replace(&mut self.0.lock().unwrap().hook, hook);
    }

    /// Keeps the disk after each change from now on.
    pub(super) fn record(&self) {
        self.0.lock().unwrap().recording = Some(Vec::new());
    }

    /// Ends [`SimMedium::record`].
    pub(super) fn recorded(&self) -> Vec<Disk> {
        self.0.lock().unwrap().recording.take().unwrap_or_default()
    }

    pub(super) fn has_power(&self) -> bool {
        self.0.lock().unwrap().fuse != Some(0)
    }

    pub(super) fn syncs(&self) -> u64 {
        self.0.lock().unwrap().syncs
    }

    /// A power cut; `fate` as in [`Disk::lose`]. Then the power is back.
    pub(super) fn lose(&self, unit: usize, fate: &mut dyn FnMut(&Unit<'_>) -> usize) {
        let mut sim = self.0.lock().unwrap();
        (sim.fuse, sim.fault) = (None, None);
        sim.disk.lose(unit, fate);
    }

    /// Whether a sync of such a file failed, so that the page cache holds what no later sync makes
    /// durable. A process that starts again cannot know.
    pub(super) fn has_dead_pages(&self, prefix: &str) -> bool {
        let sim = self.0.lock().unwrap();
        let mut files = sim.disk.files.iter().filter(|(name, _)| name.starts_with(prefix));
        files.any(|(_, file)| file.pending.values().flatten().any(|pending| pending.dead))
    }

    /// The process died; what it wrote is in the page cache, as un-synced as before.
    pub(super) fn kill(&self) {
        let mut sim = self.0.lock().unwrap();
        (sim.fuse, sim.fault) = (None, None);
    }

    /// Changes the bytes of a file behind the store's back, durably.
    pub(super) fn tamper(&self, name: &str, change: impl FnOnce(&mut dyn FnMut(u64, u8), u64)) {
        let mut sim = self.0.lock().unwrap();
        let file = sim.disk.files.get_mut(name).unwrap();
        let len = file.len;
        change(
            &mut |offset, mask| {
                let mut byte = [0];
                file.read(&mut byte, offset).unwrap();
                file.write(0, vec![byte[0] ^ mask], offset);
            },
            len,
        );
        file.sync();
    }

    /// Makes files shorter behind the store's back, durably.
    pub(super) fn tamper_lens(&self, lens: &[(&str, u64)]) {
        let mut sim = self.0.lock().unwrap();
        for (name, len) in lens {
            let file = sim.disk.files.get_mut(*name).unwrap();
            file.sync();
            (file.len, file.durable_len) = (*len, *len);
            file.forget_after(*len);
            file.current.clone_from(&file.durable);
        }
    }

    /// Offsets of sectors that hold anything.
    pub(super) fn written(&self, name: &str) -> Vec<u64> {
        let sim = self.0.lock().unwrap();
        let mut offsets = Vec::new();
        for (page, content) in &sim.disk.files[name].current {
            let sectors = (0..).step_by(SECTOR).zip(content.chunks(SECTOR));
            let used = sectors.filter(|(_, sector)| sector.iter().any(|byte| *byte != 0));
            offsets.extend(used.map(|(at, _): (u64, _)| page * PAGE as u64 + at));
        }
        offsets
    }

    /// The bytes of a range of a file; past its end zeroes.
    pub(super) fn bytes(&self, name: &str, offset: u64, len: usize) -> Vec<u8> {
        let sim = self.0.lock().unwrap();
        let file = &sim.disk.files[name];
        let mut buf = vec![0; len];
        let held = file.len.saturating_sub(offset).min(len as u64) as usize;
        if held > 0 {
            file.read(&mut buf[..held], offset).unwrap();
        }
        buf
    }

    pub(super) fn file_len(&self, name: &str) -> u64 {
        self.0.lock().unwrap().disk.files[name].len
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().disk.files.keys().map(ToString::to_string).collect()
    }

    /// A copy of the disk as it is, everything durable.
    pub(super) fn copy(&self) -> Self {
        let mut disk = self.disk();
        for file in disk.files.values_mut() {
            file.durable.clone_from(&file.current);
            (file.durable_len, file.name_pending) = (file.len, None);
            file.pending.clear();
            file.lens.clear();
        }
        Self::from_disk(disk)
    }

    /// Makes a change of a file, unless it fails; `torn` does what a failing one does by half.
    fn change(
        &self,
        name: &str,
        what: impl Fn() -> String,
        change: impl FnOnce(&mut FileState, u64),
        torn: impl FnOnce(&mut FileState, u64),
    ) -> io::Result<()> {
        let hook = self.0.lock().unwrap().hook.clone();
        if let Some(hook) = hook {
            hook(name);
        }
        let mut sim = self.0.lock().unwrap();
        let number = sim.begin()?;
        let fault = sim.fails(name);
        let file = sim.disk.files.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
        if trace() {
            println!("change {number} of {name}: {} {fault:?}", what());
        }
        match fault {
            Some(_) => torn(file, number),
            None => change(file, number),
        }
        sim.keep_record();
        fault.map_or(Ok(()), |errno| Err(errno.into()))
    }
}

/// Whether to print all changes, to see what a failing seed does: if `TRACE` is set.
pub(super) fn trace() -> bool {
    static TRACE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *TRACE.get_or_init(|| std::env::var_os("TRACE").is_some())
}

/// Fates for [`SimMedium::lose`]: each unit keeps some of its changes with `keep` percent; but with
/// some luck a file keeps all, or nothing, since files are written back one after the other.
pub(super) fn random_fate(rng: &mut Rng, keep: u64) -> impl FnMut(&Unit<'_>) -> usize + '_ {
    let by_file = rng.chance(40);
    let mut file = (String::new(), keep);
    move |unit| {
        if by_file && file.0 != unit.name {
            file = (unit.name.into(), [0, keep, 100][rng.below(3) as usize]);
        }
        if rng.below(100) >= file.1 {
            return 0;
        }
        // Mostly all: it is the order between units that hurts.
        match rng.chance(70) {
            true => unit.numbers.len(),
            false => 1 + rng.below(unit.numbers.len() as u64) as usize,
        }
    }
}

impl Medium for SimMedium {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn VFile>> {
        let mut sim = self.0.lock().unwrap();
        if create {
            let number = sim.begin()?;
            // A name that was durable stays, with an empty file: a truncation is as good as synced.
            let known = sim.disk.files.get(name).is_some_and(|file| file.name_pending.is_none());
            let name_pending = (!known).then_some(number);
            sim.disk.files.insert(name.into(), FileState { name_pending, ..FileState::default() });
            sim.keep_record();
        } else if !sim.disk.files.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Arc::new(SimFile { medium: self.clone(), name: name.into() }))
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut sim = self.0.lock().unwrap();
        sim.begin()?;
        sim.disk.files.values_mut().for_each(|file| file.name_pending = None);
        sim.keep_record();
        Ok(())
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        let sim = self.0.lock().unwrap();
        let total = sim.offered.unwrap_or(1 << 40);
        let held = sim.disk.files.get("data").map_or(0, |data| data.current.len() * PAGE);
        Ok((total, if sim.offered.is_some() { total - held as u64 } else { total }))
    }
}

struct SimFile {
    medium: SimMedium,
    name: Arc<str>,
}

impl VFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let sim = self.medium.0.lock().unwrap();
        sim.disk.files.get(&self.name).ok_or(io::ErrorKind::NotFound)?.read(buf, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let bytes = parts.concat();
        if bytes.is_empty() {
            return Ok(());
        }
        let part = bytes.clone();
        self.medium.change(
            &self.name,
            || format!("write {} at {offset}", part.len()),
            |file, number| file.write(number, bytes, offset),
            |file, number| {
                // Any number of sectors may have been taken.
                let taken = Rng(number).below(1 + (part.len() / SECTOR) as u64) as usize * SECTOR;
                if taken > 0 {
                    file.write(number, part[..taken].to_vec(), offset);
                }
            },
        )
    }

    fn sync(&self) -> io::Result<()> {
        self.medium.0.lock().unwrap().syncs += 1;
        let what = || "sync".into();
        self.medium.change(&self.name, what, |file, _| file.sync(), |file, _| file.fail_sync())
    }

    fn len(&self) -> io::Result<u64> {
        let sim = self.medium.0.lock().unwrap();
        Ok(sim.disk.files.get(&self.name).ok_or(io::ErrorKind::NotFound)?.len)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let what = || format!("allocate {len}");
        self.medium.change(&self.name, what, |file, number| file.extend(number, len), |_, _| {})
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let what = || format!("punch {len} at {offset}");
        let punch = |file: &mut FileState, number| file.punch(number, offset, len);
        self.medium.change(&self.name, what, punch, |_, _| {})
    }
}
