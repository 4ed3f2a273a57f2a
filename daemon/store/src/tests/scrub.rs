//! Scrubbing finds what is damaged wherever it is, names it, counts it once, and nothing else.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use sheepdog_types::{BLOCK_SIZE, LayerKey, Version};

use super::sim::SimMedium;
use super::support::{
    Model, Op, Rng, blocks_of, bytes_of, key, new_sim, open_sim, seed, setting, version,
};
use crate::Payload;
use crate::api::{BadBlock, DamageReport, ScrubbedLayer};
use crate::engine::Engine;

fn write(engine: &Engine, key: LayerKey, seq: u64, first: u16, tags: &[u64]) {
    let (bytes, crcs) = blocks_of(tags);
    let prev = if seq == 1 { Version::NONE } else { version(1, seq - 1) };
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    engine.write(key, prev, version(1, seq), first, payload).unwrap();
}

/// Flips a bit in the one block of `tag` in a file.
fn flip_in_block(medium: &SimMedium, file: &str, tag: u64) {
    let len = medium.file_len(file);
    let all = medium.bytes(file, 0, len as usize);
    let places: Vec<_> =
        all.chunks(BLOCK_SIZE).enumerate().filter(|(_, b)| *b == bytes_of(tag)).collect();
    let [(at, _)] = places[..] else { panic!("{} blocks of {tag} in {file}", places.len()) };
    medium.tamper(file, |flip, _| flip((at * BLOCK_SIZE) as u64 + 1234, 16));
}

/// Scrubs all layers; those with damage.
fn scrub(engine: &Engine) -> Vec<(LayerKey, ScrubbedLayer)> {
    let keys = std::iter::successors(engine.table.next_after(None), |key| {
        engine.table.next_after(Some(*key))
    });
    let scrubbed = keys.map(|key| (key, engine.scrub_layer(key)));
    scrubbed.filter(|(_, layer)| !layer.bad.is_empty()).collect()
}

fn report(found: u64, bad: &[(LayerKey, u16)]) -> DamageReport {
    let blocks = bad.iter().map(|(key, block)| BadBlock { key: *key, block: *block }).collect();
    DamageReport { found, blocks }
}

#[test]
fn i7_a_flipped_bit_in_a_slab_is_found_named_counted_once_and_healed_by_a_write() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let (good, bad) = (key(1, 0, 0), key(1, 1, 0));
    write(&engine, good, 1, 0, &[1, 2, 3]);
    write(&engine, bad, 1, 500, &[4, 5, 6, 7]);
    engine.checkpoint().unwrap();
    assert_eq!(engine.scrub_layer(bad), ScrubbedLayer { blocks: 4, bad: vec![] });
    assert_eq!(engine.damage_report(), report(0, &[]));
    flip_in_block(&medium, "data", 6);
    for _ in 0..2 {
        let found = ScrubbedLayer { blocks: 4, bad: vec![502] };
        assert_eq!(scrub(&engine), [(bad, found)]);
        assert_eq!(engine.damage_report(), report(1, &[(bad, 502)]));
    }
    // A reader that finds it too does not count it again.
    assert!(engine.image(bad).is_err());
    assert_eq!(engine.damage_report(), report(1, &[(bad, 502)]));
    write(&engine, bad, 2, 502, &[8]);
    assert_eq!(engine.damage_report(), report(1, &[]), "healed by the write itself");
    for _ in 0..2 {
        assert_eq!(scrub(&engine), []);
        engine.checkpoint().unwrap();
    }
    assert_eq!(engine.damage_report(), report(1, &[]));
}

#[test]
fn i7_a_damaged_checksum_table_is_found_although_memory_keeps_it() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let bad = key(1, 0, 0);
    write(&engine, bad, 1, 10, &[1, 2]);
    engine.checkpoint().unwrap();
    assert!(engine.image(bad).is_ok());
    let table = medium.bytes("sums", 0, medium.file_len("sums") as usize);
    let at = table.chunks(4).position(|crc| crc == blocks_of(&[1]).1[0].to_le_bytes()).unwrap();
    medium.tamper("sums", |flip, _| flip(at as u64 * 4 + 2, 1));
    assert!(engine.image(bad).is_ok(), "reads use the kept table");
    assert_eq!(scrub(&engine), [(bad, ScrubbedLayer { blocks: 2, bad: vec![10, 11] })]);
    assert_eq!(engine.damage_report(), report(2, &[(bad, 10), (bad, 11)]));
    // What is in the log does not need the table.
    write(&engine, bad, 2, 10, &[3]);
    assert_eq!(scrub(&engine), [(bad, ScrubbedLayer { blocks: 2, bad: vec![11] })]);
    write(&engine, bad, 3, 11, &[4]);
    assert_eq!(scrub(&engine), []);
    engine.checkpoint().unwrap();
    assert_eq!(scrub(&engine), []);
    assert_eq!(engine.damage_report().blocks, []);
}

#[test]
fn i7_a_flipped_bit_in_the_log_is_found_before_and_after_it_is_applied() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let bad = key(1, 0, 0);
    write(&engine, bad, 1, 0, &[1, 2, 3]);
    // Not at block boundaries of the segment: the bytes are searched.
    let log = medium.bytes("log/0000", 0, medium.file_len("log/0000") as usize);
    let block = bytes_of(2);
    let at = log.windows(BLOCK_SIZE).position(|bytes| bytes == block).unwrap();
    medium.tamper("log/0000", |flip, _| flip(at as u64 + 99, 2));
    let found = || vec![(bad, ScrubbedLayer { blocks: 3, bad: vec![1] })];
    assert_eq!(scrub(&engine), found());
    assert_eq!(engine.damage_report(), report(1, &[(bad, 1)]));
    engine.checkpoint().unwrap();
    assert_eq!(scrub(&engine), found(), "a checkpoint does not make it right");
    assert_eq!(engine.damage_report(), report(1, &[(bad, 1)]));
    // Nor does opening the store again, which counts anew.
    engine.shut_down().unwrap();
    let engine = open_sim(&medium).unwrap();
    assert_eq!(engine.damage_report(), report(0, &[]));
    assert_eq!(scrub(&engine), found());
    write(&engine, bad, 2, 1, &[4]);
    assert_eq!(scrub(&engine), []);
}

#[test]
fn damage_that_goes_away_by_itself_or_with_its_layer_is_forgotten() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let (upper, lower) = (key(1, 0, 2), key(1, 0, 1));
    write(&engine, lower, 1, 0, &[1, 2]);
    write(&engine, upper, 1, 1, &[3]);
    engine.checkpoint().unwrap();
    flip_in_block(&medium, "data", 3);
    assert_eq!(scrub(&engine).len(), 1);
    // The disk delivers the right bytes again.
    let mut flipped = bytes_of(3);
    flipped[1234] ^= 16;
    let data = medium.bytes("data", 0, medium.file_len("data") as usize);
    let at = data.chunks(BLOCK_SIZE).position(|bytes| bytes == flipped).unwrap();
    medium.tamper("data", |flip, _| flip((at * BLOCK_SIZE) as u64 + 1234, 16));
    assert_eq!(scrub(&engine), []);
    assert_eq!(engine.damage_report(), report(1, &[]));
    // A damaged block that a merge moves is named by the layer that holds it then.
    flip_in_block(&medium, "data", 1);
    assert_eq!(scrub(&engine).len(), 1);
    assert!(engine.merge(upper.object, upper.layer, lower.layer).unwrap());
    assert_eq!(engine.damage_report(), report(2, &[]));
    assert_eq!(scrub(&engine), [(upper, ScrubbedLayer { blocks: 2, bad: vec![0] })]);
    assert_eq!(engine.scrub_layer(lower), ScrubbedLayer::default());
    engine.delete(upper, None).unwrap();
    assert_eq!(engine.damage_report(), report(3, &[]));
}

fn volume_of(op: &Op) -> u64 {
    match op {
        Op::Write { key, .. } | Op::Clear { key, .. } | Op::Install { key, .. } => {
            key.object.volume.0
        }
        Op::Patch { key, .. } | Op::Delete { key } | Op::Merge { key, .. } => key.object.volume.0,
        Op::DeleteVolume { volume } => volume.0,
    }
}

/// Changes the layers of one volume at random, as fast as it goes.
fn keep_changing(engine: &Engine, volume: u64, mut rng: Rng, ops: u64) {
    let mut model = Model::new();
    for _ in 0..ops {
        let op = std::iter::repeat_with(|| Op::random(&mut rng, &model, 12));
        let op = op.take(1000).find(|op| volume_of(op) == volume).unwrap();
        op.apply_to_store(engine, &model).unwrap();
        op.apply_to_model(&mut model);
    }
}

#[test]
fn concurrent_changes_never_look_like_damage() {
    let rng = Rng(seed());
    let ops = setting("OPS", 5000);
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let running = AtomicBool::new(true);
    let (mut scrubbed, mut blocks) = (0_u64, 0_u64);
    std::thread::scope(|scope| {
        let writers: Vec<_> = [1, 2]
            .map(|volume| {
                let (engine, rng) = (&engine, Rng(rng.0.wrapping_add(volume)));
                scope.spawn(move || keep_changing(engine, volume, rng, ops))
            })
            .into();
        let (engine, running) = (&engine, &running);
        scope.spawn(move || {
            while running.load(SeqCst) {
                engine.checkpoint().unwrap();
            }
        });
        let watcher = scope.spawn(move || {
            let (mut layers, mut blocks) = (0, 0);
            let mut key = None;
            while running.load(SeqCst) || layers == 0 {
                key = engine.table.next_after(key);
                let Some(key) = key else { continue };
                let layer = engine.scrub_layer(key);
                if !layer.bad.is_empty() {
                    return Err(format!("false alarm: {key}: {layer:?}"));
                }
                layers += 1;
                blocks += u64::from(layer.blocks);
            }
            Ok((layers, blocks))
        });
        let results: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        running.store(false, SeqCst);
        (scrubbed, blocks) = watcher.join().unwrap().unwrap();
        results.into_iter().for_each(|result| result.unwrap());
    });
    println!("scrubbed {scrubbed} layers with {blocks} blocks meanwhile");
    assert!(blocks > 0);
    assert_eq!(engine.damage_report(), report(0, &[]));
}

#[test]
fn merges_beside_a_checkpoint_take_no_block_from_a_log_that_is_released() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let (lower, upper) = (key(1, 0, 0), key(1, 0, 1));
    let mut filled = 0;
    let mut fill = || {
        for _ in 0..3 {
            filled += 1;
            write(&engine, key(2, 0, 0), filled, 0, &[7; 12]);
        }
    };
    for round in 0..setting("ROUNDS", 100) {
        write(&engine, lower, 1, 0, &[2 * round + 1, 2 * round + 2]);
        write(&engine, upper, 1, 5, &[round + 1]);
        fill();
        std::thread::scope(|scope| {
            let checkpoint = scope.spawn(|| engine.checkpoint().unwrap());
            while engine.checkpointer.try_lock().is_ok() && !checkpoint.is_finished() {}
            assert!(engine.merge(upper.object, upper.layer, lower.layer).unwrap());
        });
        // Until what was released is overwritten.
        fill();
        let found = engine.scrub_layer(upper);
        assert_eq!(found, ScrubbedLayer { blocks: 3, bad: vec![] }, "round {round}");
        engine.delete(upper, None).unwrap();
    }
}
