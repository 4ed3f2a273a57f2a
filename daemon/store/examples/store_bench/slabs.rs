//! Many slabs: the time to open a store, and its memory.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::Instant;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use sheepdog_types::{BLOCK_SIZE, Layer};

use crate::Failure;
use crate::args::Args;
use crate::figures::{Figures, process_cpu, resident};
use crate::load::{self, Blocks, Writer, key};

/// Full slabs between two calls that take their space away.
const PUNCH_EVERY: u32 = 32;

/// As many objects as asked for, of one block each.
pub(crate) fn one_block_each(args: &Args) -> Result<Figures, Failure> {
    let (volume, from, to) =
        (args.count("volume", 1), args.count("from", 0), args.count("slabs", 100_000));
    if from >= to {
        return Err("--from must be below --slabs".into());
    }
    let store = load::open(&args.dir)?;
    let blocks = Blocks::random();
    let (cpu, started) = (process_cpu(), Instant::now());
    let mut writer = Writer::new(&store, (from..to).map(|index| key(volume, index, 0)), 0);
    for at in 0..to - from {
        writer.write(at as usize, (at % 1024) as u16, blocks.small(at.into()))?;
    }
    drop(writer);
    store.close()?;
    let mut figures = Figures::default();
    figures.set("seconds", started.elapsed().as_secs_f64());
    figures.set("cpu_us", (process_cpu() - cpu) / f64::from(to - from));
    Ok(figures)
}

/// Full objects that take no space: the content is zeroes, so that a hole in `data` is as good as
/// what was written there.
pub(crate) fn full(args: &Args) -> Result<Figures, Failure> {
    let (volume, from, to) =
        (args.count("volume", 1), args.count("from", 0), args.count("objects", 256));
    let store = load::open(&args.dir)?;
    let (blocks, empty) = (Blocks::zeroes(), resident());
    let data = OpenOptions::new().write(true).open(args.dir.join("data"))?;
    let started = Instant::now();
    for index in from..to {
        Writer::new(&store, [key(volume, index, 0)].into_iter(), 0).fill(&blocks)?;
        if index % PUNCH_EVERY == 0 {
            make_holes(&data)?;
        }
    }
    store.flush_wait()?;
    let mut figures = Figures::default();
    figures.set("slabs", f64::from(to - from));
    figures.set("seconds", started.elapsed().as_secs_f64());
    figures.set("growth_bytes", resident() - empty);
    store.close()?;
    make_holes(&data)?;
    Ok(figures)
}

fn make_holes(file: &File) -> Result<(), Failure> {
    let len = file.metadata()?.len();
    if len > 0 {
        fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, len)?;
    }
    Ok(())
}

fn forget(dir: &Path) -> Result<(), Failure> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            forget(&entry.path())?;
        } else {
            let file = File::open(entry.path())?;
            file.sync_all()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// The time to open a store that was closed in good order.
pub(crate) fn open(args: &Args) -> Result<Figures, Failure> {
    if args.count("cold", 0) == 1 {
        forget(&args.dir)?;
    }
    let before = resident();
    let (cpu, started) = (process_cpu(), Instant::now());
    let store = load::open(&args.dir)?;
    let mut figures = Figures::default();
    figures.set("seconds", started.elapsed().as_secs_f64());
    figures.set("cpu_seconds", (process_cpu() - cpu) / 1e6);
    figures.set("opened_bytes", resident() - before);
    let (mut buf, mut crc) = (vec![0; BLOCK_SIZE], [0]);
    for index in 0..args.count("touch", 0) {
        let object = key(args.count("volume", 1), index, 0).object;
        let outcome = store.read(object, &[Layer(0)], 7, &mut buf, &mut crc)?;
        if outcome.absent > 0 {
            return Err(format!("object {index} is not there: run the case `full` before").into());
        }
    }
    figures.set("touched_bytes", resident() - before);
    figures.set("slabs", store.usage().objects as f64);
    store.close()?;
    Ok(figures)
}
