//! The first write to an object after a snapshot, beside any other write.
//!
//! Volume 21 gets a new layer in each round, above full ones; volume 22 keeps its full layer 0.

use std::time::Instant;

use sheepdog_store::Store;
use sheepdog_types::{LayerKey, hash64};

use crate::Failure;
use crate::args::Args;
use crate::figures::{Figures, median, process_cpu};
use crate::load::{self, Blocks, Writer, key};

const SNAPSHOTTED: u32 = 21;
const PLAIN: u32 = 22;

/// The objects of a volume in an order that depends on the round, at `layer`.
fn keys(volume: u32, objects: u32, layer: u32, round: u32) -> Vec<LayerKey> {
    let mut order: Vec<_> = (0..objects).collect();
    order.sort_unstable_by_key(|index| hash64(u64::from(*index) << 32 | u64::from(round)));
    order.into_iter().map(|index| key(volume, index, layer)).collect()
}

fn block(at: usize, round: u32) -> u16 {
    (hash64((at as u64) << 32 | u64::from(round)) % 1024) as u16
}

/// The newest layer of the first object, after making both volumes full if they are new.
fn prepare(args: &Args, objects: u32) -> Result<u32, Failure> {
    let store = load::open(&args.dir)?;
    let newest = store.stat_object(key(SNAPSHOTTED, 0, 0).object);
    if newest.is_empty() {
        for volume in [SNAPSHOTTED, PLAIN] {
            let keys = (0..objects).map(|index| key(volume, index, 0));
            Writer::new(&store, keys, 0).fill(&Blocks::random())?;
        }
    }
    store.close()?;
    Ok(newest.first().map_or(0, |stat| stat.key.layer.0))
}

/// Times of single writes in µs, to the two kinds of layers in turns.
fn in_turns(
    store: &Store,
    first: &[LayerKey],
    other: &[LayerKey],
    round: u32,
) -> Result<[Vec<f64>; 2], Failure> {
    let blocks = Blocks::random();
    let mut writers = [first, other].map(|keys| Writer::new(store, keys.iter().copied(), 0));
    let mut times = [Vec::new(), Vec::new()];
    for at in 0..first.len() {
        for (writer, times) in writers.iter_mut().zip(&mut times) {
            let started = Instant::now();
            writer.write(at, block(at, round), blocks.small(at as u64))?;
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(times)
}

/// CPU time in µs of each write to `keys`, with what the store does in the background.
fn cpu_of(args: &Args, keys: &[LayerKey], round: u32) -> Result<f64, Failure> {
    let blocks = Blocks::random();
    let store = load::open(&args.dir)?;
    let mut writer = Writer::new(&store, keys.iter().copied(), 0);
    let cpu = process_cpu();
    for at in 0..keys.len() {
        writer.write(at, block(at, round), blocks.small(at as u64))?;
    }
    drop(writer);
    store.close()?;
    Ok((process_cpu() - cpu) / keys.len() as f64)
}

/// Medians over all rounds.
pub(crate) fn run(args: &Args) -> Result<Figures, Failure> {
    let objects = args.count("objects", 128);
    let mut layer = prepare(args, objects)?;
    let [mut first_us, mut other_us, mut first_cpu, mut other_cpu] = [const { Vec::new() }; 4];
    for round in 0..args.count("rounds", 8) {
        layer += 1;
        let store = load::open(&args.dir)?;
        let first = keys(SNAPSHOTTED, objects, layer, round);
        let other = keys(PLAIN, objects, 0, round);
        let [firsts, others] = in_turns(&store, &first, &other, round)?;
        store.close()?;
        first_us.push(median(firsts));
        other_us.push(median(others));
        layer += 1;
        let first = keys(SNAPSHOTTED, objects, layer, round);
        first_cpu.push(cpu_of(args, &first, round)?);
        other_cpu.push(cpu_of(args, &other, round)?);
    }
    let mut figures = Figures::default();
    figures.list("first_us", &first_us);
    figures.list("other_us", &other_us);
    figures.list("first_cpu_us", &first_cpu);
    figures.list("other_cpu_us", &other_cpu);
    Ok(figures)
}
