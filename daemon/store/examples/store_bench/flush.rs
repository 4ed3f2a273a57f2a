//! Durable writes: the store and a bare file take turns on the same file system, so that a slow
//! minute of the disk hits both.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use sheepdog_store::Store;
use sheepdog_types::BLOCK_SIZE;

use crate::Failure;
use crate::args::Args;
use crate::figures::{Figures, median};
use crate::load::{self, Blocks, End, Writer};

const RAW_BYTES: u64 = 64 << 20;
const MANY: u32 = 16;

/// A file whose blocks have all been written, so that an `fdatasync` has no metadata to write.
fn raw_file(path: &Path) -> Result<File, Failure> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    let chunk = vec![0x5A; 1 << 20];
    for offset in (0..RAW_BYTES).step_by(chunk.len()) {
        file.write_all_at(&chunk, offset)?;
    }
    file.sync_all()?;
    Ok(file)
}

/// Microseconds of each operation, one after the other.
fn times(
    end: End,
    mut operation: impl FnMut(u64) -> Result<(), Failure>,
) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::new();
    end.repeat(|n| {
        let started = Instant::now();
        operation(n)?;
        times.push(started.elapsed().as_secs_f64() * 1e6);
        Ok::<_, Failure>(())
    })?;
    Ok(times)
}

fn write_and_flush(store: &Store, writer: &mut Writer<'_>, blocks: &Blocks) -> Result<(), Failure> {
    writer.write_anywhere(blocks)?;
    Ok(store.flush_wait()?)
}

/// Write + flush operations each second of many writers, each on a thread of its own.
fn rate_of_many(
    store: &Store,
    writers: &mut [Writer<'_>],
    blocks: &Blocks,
    end: End,
) -> Result<f64, Failure> {
    let started = Instant::now();
    let counts: Vec<_> = std::thread::scope(|scope| {
        let run = |writer: &mut Writer<'_>| end.repeat(|_| write_and_flush(store, writer, blocks));
        let handles: Vec<_> =
            writers.iter_mut().map(|writer| scope.spawn(move || run(writer))).collect();
        handles.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let mut sum = 0;
    for count in counts {
        sum += count?;
    }
    Ok(sum as f64 / started.elapsed().as_secs_f64())
}

/// Lists of mean times (µs) and rates (per second), one for each round.
pub(crate) fn run(args: &Args) -> Result<Figures, Failure> {
    let end = End::After(Duration::from_secs_f64(args.seconds(0.3)));
    let raw = raw_file(&args.dir.with_extension("raw"))?;
    let blocks = Blocks::random();
    let store = load::open(&args.dir)?;
    let (volume, objects) = (args.count("volume", 1), args.count("objects", 256));
    let mut one = load::writers(&store, volume, objects, 1, 1);
    let [mut alone, mut bare, mut many] = [const { Vec::new() }; 3];
    let (mut alone_each, mut bare_each) = (Vec::new(), Vec::new());
    let mean = |times: &[f64]| times.iter().sum::<f64>() / times.len() as f64;
    for _ in 0..args.count("rounds", 2) {
        let times_alone = times(end, |_| write_and_flush(&store, &mut one[0], &blocks))?;
        let times_bare = times(end, |n| {
            raw.write_all_at(blocks.bytes(), n * BLOCK_SIZE as u64 % RAW_BYTES)?;
            Ok(raw.sync_data()?)
        })?;
        alone.push(mean(&times_alone));
        bare.push(mean(&times_bare));
        alone_each.extend(times_alone);
        bare_each.extend(times_bare);
        // Made anew, because the one writer changed the versions.
        let mut writers = load::writers(&store, volume, objects, MANY, 2);
        many.push(rate_of_many(&store, &mut writers, &blocks, end)?);
        one = load::writers(&store, volume, objects, 1, 1);
    }
    drop(one);
    store.close()?;
    let mut figures = Figures::default();
    figures.list("one_us", &alone);
    figures.list("raw_us", &bare);
    figures.list("many_per_second", &many);
    figures.set("one_p50_us", median(alone_each));
    figures.set("raw_p50_us", median(bare_each));
    Ok(figures)
}
