//! A medium in memory that keeps un-synced sectors apart and loses some of them at a power cut.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::support::Rng;
use crate::medium::{Medium, VFile};

const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

#[derive(Default)]
struct FileState {
    len: u64,
    durable_len: u64,
    current: HashMap<u64, Sector>,
    durable: HashMap<u64, Sector>,
    /// What each un-synced sector was since the last sync, in order.
    pending: BTreeMap<u64, Vec<Sector>>,
}

impl FileState {
    fn write(&mut self, mut bytes: &[u8], mut offset: u64) {
        self.len = self.len.max(offset + bytes.len() as u64);
        while !bytes.is_empty() {
            let (sector, at) = (offset / SECTOR as u64, (offset % SECTOR as u64) as usize);
            let count = bytes.len().min(SECTOR - at);
            let content = self.current.entry(sector).or_insert([0; SECTOR]);
            content[at..at + count].copy_from_slice(&bytes[..count]);
            self.pending.entry(sector).or_default().push(*content);
            (bytes, offset) = (&bytes[count..], offset + count as u64);
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + buf.len() as u64 > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < buf.len() {
            let position = offset + done as u64;
            let at = (position % SECTOR as u64) as usize;
            let count = (buf.len() - done).min(SECTOR - at);
            match self.current.get(&(position / SECTOR as u64)) {
                Some(sector) => buf[done..done + count].copy_from_slice(&sector[at..at + count]),
                None => buf[done..done + count].fill(0),
            }
            done += count;
        }
        Ok(())
    }

    fn sync(&mut self) {
        for (sector, mut versions) in std::mem::take(&mut self.pending) {
            self.durable.extend(versions.pop().map(|last| (sector, last)));
        }
        self.durable_len = self.len;
    }

    fn lose_power(&mut self, rng: &mut Rng, keep: u64) {
        for (sector, versions) in std::mem::take(&mut self.pending) {
            if rng.below(100) < keep {
                let chosen = versions[rng.below(versions.len() as u64) as usize];
                self.durable.insert(sector, chosen);
                self.durable_len =
                    self.durable_len.max(((sector + 1) * SECTOR as u64).min(self.len));
            }
        }
        self.current = self.durable.clone();
        self.len = self.durable_len;
    }
}

#[derive(Default)]
struct Sim {
    files: BTreeMap<String, FileState>,
    /// Changes until the power goes.
    fuse: Option<u64>,
    /// Files whose name starts so fail to be changed with this error.
    fault: Option<(&'static str, Errno)>,
    syncs: u64,
}

/// The medium; clones share it, as the disk outlives the process.
#[derive(Clone, Default)]
pub(super) struct SimMedium(Arc<Mutex<Sim>>);

impl SimMedium {
    /// The power goes after `changes` more writes, syncs and the like.
    pub(super) fn set_fuse(&self, changes: u64) {
        self.0.lock().unwrap().fuse = Some(changes);
    }

    pub(super) fn set_fault(&self, fault: Option<(&'static str, Errno)>) {
        self.0.lock().unwrap().fault = fault;
    }

    pub(super) fn has_power(&self) -> bool {
        self.0.lock().unwrap().fuse != Some(0)
    }

    pub(super) fn syncs(&self) -> u64 {
        self.0.lock().unwrap().syncs
    }

    /// Each un-synced sector keeps one of its contents since the last sync with a probability of
    /// `keep` percent, otherwise it is as of that sync. Then the power is back.
    pub(super) fn lose_power(&self, rng: &mut Rng, keep: u64) {
        let mut sim = self.0.lock().unwrap();
        sim.fuse = None;
        for file in sim.files.values_mut() {
            file.lose_power(rng, keep);
        }
    }

    /// The process died; what it wrote is in the page cache, as un-synced as before.
    pub(super) fn kill(&self) {
        self.0.lock().unwrap().fuse = None;
    }

    /// Changes the bytes of a file behind the store's back, durably.
    pub(super) fn tamper(&self, name: &str, change: impl FnOnce(&mut dyn FnMut(u64, u8), u64)) {
        let mut sim = self.0.lock().unwrap();
        let file = sim.files.get_mut(name).unwrap();
        let len = file.len;
        change(
            &mut |offset, mask| {
                let mut byte = [0];
                file.read(&mut byte, offset).unwrap();
                file.write(&[byte[0] ^ mask], offset);
            },
            len,
        );
        file.sync();
    }

    /// Offsets of sectors that were ever written.
    pub(super) fn written(&self, name: &str) -> Vec<u64> {
        let sim = self.0.lock().unwrap();
        let mut offsets: Vec<_> =
            sim.files[name].current.keys().map(|sector| sector * SECTOR as u64).collect();
        offsets.sort_unstable();
        offsets
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().files.keys().cloned().collect()
    }

    /// A copy of the disk as it is.
    pub(super) fn copy(&self) -> Self {
        let sim = self.0.lock().unwrap();
        let files = sim.files.iter().map(|(name, file)| {
            let file = FileState {
                len: file.len,
                durable_len: file.len,
                current: file.current.clone(),
                durable: file.current.clone(),
                pending: BTreeMap::new(),
            };
            (name.clone(), file)
        });
        Self(Arc::new(Mutex::new(Sim { files: files.collect(), ..Sim::default() })))
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut FileState)) -> io::Result<()> {
        let mut sim = self.0.lock().unwrap();
        if let Some((prefix, errno)) = sim.fault
            && name.starts_with(prefix)
        {
            return Err(errno.into());
        }
        match &mut sim.fuse {
            Some(0) => return Err(Errno::IO.into()),
            Some(left) => *left -= 1,
            None => {}
        }
        change(sim.files.get_mut(name).unwrap());
        Ok(())
    }
}

impl Medium for SimMedium {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn VFile>> {
        let mut sim = self.0.lock().unwrap();
        if create {
            sim.files.insert(name.into(), FileState::default());
        } else if !sim.files.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Arc::new(SimFile { medium: self.clone(), name: name.into() }))
    }

    fn sync_names(&self) -> io::Result<()> {
        Ok(())
    }

    fn space(&self) -> io::Result<(u64, u64)> {
        Ok((1 << 40, 1 << 40))
    }
}

struct SimFile {
    medium: SimMedium,
    name: String,
}

impl VFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.medium.0.lock().unwrap().files[&self.name].read(buf, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.medium.change(&self.name, |file| file.write(&parts.concat(), offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.medium.0.lock().unwrap().syncs += 1;
        self.medium.change(&self.name, FileState::sync)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.medium.0.lock().unwrap().files[&self.name].len)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.medium.change(&self.name, |file| file.len = file.len.max(len))
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.medium.change(&self.name, |file| {
            let first = offset / SECTOR as u64;
            let end = (offset + len).div_ceil(SECTOR as u64);
            let held: Vec<_> =
                file.current.keys().copied().filter(|s| (first..end).contains(s)).collect();
            for sector in held {
                file.write(&[0; SECTOR], sector * SECTOR as u64);
            }
        })
    }
}
