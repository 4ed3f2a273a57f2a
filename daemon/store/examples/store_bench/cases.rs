//! Plain loads: fill, random writes, random reads.

use std::time::{Duration, Instant};

use sheepdog_store::Store;
use sheepdog_types::{BLOCK_SIZE, BLOCKS_PER_OBJECT, Layer, OBJECT_SIZE, VolumeId, hash64};

use crate::Failure;
use crate::args::Args;
use crate::figures::{Figures, process_cpu, thread_cpu};
use crate::load::{self, Blocks, End, Writer, key};

fn end(args: &Args) -> End {
    match args.given("ops") {
        Some(count) => End::Operations(count as u64),
        None => End::After(Duration::from_secs_f64(args.seconds(1.0))),
    }
}

fn seed(args: &Args) -> u64 {
    args.given("seed").map_or(1, |seed| seed as u64)
}

/// 1 MiB writes one after the other; `flushed_seconds` is with a flush at the end.
pub(crate) fn fill(args: &Args) -> Result<Figures, Failure> {
    let (volume, objects) = (args.count("volume", 1), args.count("objects", 256));
    let store = load::open(&args.dir)?;
    if let Some(old) = args.given("delete") {
        store.delete_volume(VolumeId(old as u64))?;
        store.close()?;
        return fill_open(load::open(&args.dir)?, volume, objects);
    }
    fill_open(store, volume, objects)
}

fn fill_open(store: Store, volume: u32, objects: u32) -> Result<Figures, Failure> {
    let blocks = Blocks::random();
    let mut writer = Writer::new(&store, (0..objects).map(|index| key(volume, index, 0)), 0);
    let (cpu, started) = (process_cpu(), Instant::now());
    writer.fill(&blocks)?;
    let seconds = started.elapsed().as_secs_f64();
    store.flush_wait()?;
    let flushed = started.elapsed().as_secs_f64();
    drop(writer);
    store.close()?;
    let mib = f64::from(objects) * OBJECT_SIZE as f64 / f64::from(1 << 20);
    let mut figures = Figures::default();
    figures.set("mib", mib);
    figures.set("seconds", seconds);
    figures.set("flushed_seconds", flushed);
    figures.set("closed_seconds", started.elapsed().as_secs_f64());
    figures.set("mib_per_second", mib / seconds);
    figures.set("cpu_us", (process_cpu() - cpu) / mib);
    Ok(figures)
}

/// Runs `run` on each of `parts` with a thread of its own; gives operations and CPU time in µs of
/// these threads.
fn on_threads<T: Send>(
    parts: Vec<T>,
    run: impl Fn(T) -> Result<u64, Failure> + Sync,
) -> Result<(f64, f64), Failure> {
    let timed = |part| -> Result<(u64, f64), Failure> {
        let cpu = thread_cpu();
        Ok((run(part)?, thread_cpu() - cpu))
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> = parts.into_iter().map(|part| scope.spawn(|| timed(part))).collect();
        handles.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let mut sum = (0.0, 0.0);
    for result in results {
        let (operations, cpu) = result?;
        sum = (sum.0 + operations as f64, sum.1 + cpu);
    }
    Ok(sum)
}

/// Rates and CPU time of a load on a store that is closed afterwards: what was left to do in the
/// background counts as CPU time, not as duration.
fn report(
    store: Store,
    load: impl FnOnce(&Store) -> Result<(f64, f64), Failure>,
) -> Result<Figures, Failure> {
    let (cpu, started) = (process_cpu(), Instant::now());
    let (operations, callers) = load(&store)?;
    let seconds = started.elapsed().as_secs_f64();
    store.close()?;
    let mut figures = Figures::default();
    figures.set("ops", operations);
    figures.set("seconds", seconds);
    figures.set("closed_seconds", started.elapsed().as_secs_f64());
    figures.set("iops", operations / seconds);
    figures.set("cpu_us", (process_cpu() - cpu) / operations);
    figures.set("callers_cpu_us", callers / operations);
    Ok(figures)
}

/// 4 KiB random writes.
pub(crate) fn write(args: &Args) -> Result<Figures, Failure> {
    let (threads, end) = (args.count("threads", 1).max(1) as usize, end(args));
    let store = load::open(&args.dir)?;
    let blocks = Blocks::random();
    report(store, |store| {
        let volume = args.count("volume", 1);
        let mut writers = load::writers(store, volume, args.count("objects", 256), 32, seed(args));
        let mut parts: Vec<Vec<Writer<'_>>> = Vec::new();
        parts.resize_with(threads.min(writers.len()), Vec::new);
        let count = parts.len();
        for (n, writer) in writers.drain(..).enumerate() {
            parts[n % count].push(writer);
        }
        on_threads(parts, |mut writers| {
            let count = writers.len() as u64;
            let operations =
                end.repeat(|n| writers[(n % count) as usize].write_anywhere(&blocks))?;
            Ok(operations)
        })
    })
}

/// 4 KiB random reads.
pub(crate) fn read(args: &Args) -> Result<Figures, Failure> {
    let (volume, objects) = (args.count("volume", 1), args.count("objects", 256));
    let (threads, end, seed) = (args.count("threads", 1).max(1), end(args), seed(args));
    let store = load::open(&args.dir)?;
    report(store, |store| {
        on_threads((0..threads).collect(), |thread| {
            let (mut buf, mut crc) = (vec![0; BLOCK_SIZE], [0]);
            let mut random = hash64(seed ^ u64::from(thread) << 32);
            let operations = end.repeat(|_| {
                random = hash64(random);
                let object = key(volume, (random >> 32) as u32 % objects, 0).object;
                let block = (random as usize % BLOCKS_PER_OBJECT) as u16;
                let outcome = store.read(object, &[Layer(0)], block, &mut buf, &mut crc)?;
                if outcome.absent > 0 {
                    return Err("a block is not there: run the case `fill` before".into());
                }
                Ok::<_, Failure>(())
            })?;
            Ok(operations)
        })
    })
}
