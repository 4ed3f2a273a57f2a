//! Flipped bits and foreign bytes in each file: found, named, never a panic, never wrong data.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Mutex;

use sheepdog_types::{BLOCK_SIZE, Layer, LayerKey};

use super::anatomy::{Anatomy, Expected, Kind, Structure, expected};
use super::sim::SimMedium;
use super::support::{
    Block, Model, ModelLayer, Op, Rng, check_equal, image_of, in_parallel, in_single_blocks, key,
    log_range, new_sim, open_sim, seed, setting, tag_of, versions,
};
use crate::checkpoint::{copy_offset, index_offset};
use crate::engine::Engine;
use crate::error::{OpenError, ReadError};

/// A store with checkpoints, flushed changes after the last, and no clean end.
struct Used {
    medium: SimMedium,
    model: Model,
}

fn change(engine: &Engine, model: &mut Model, op: &Op) {
    op.apply_to_store(engine, model).unwrap();
    op.apply_to_model(model);
}

fn write(model: &Model, key: LayerKey, first: u16, tags: &[u64]) -> Op {
    let next = super::support::version_in(model, key).seq + 1;
    Op::Write { key, version: super::support::version(9, next), first, tags: tags.to_vec() }
}

fn used_store(rng: &mut Rng) -> Used {
    let medium = SimMedium::default();
    let mut engine = new_sim(&medium);
    engine.direct_blocks = 3;
    let mut model = Model::new();
    let random = |model: &mut Model, count: u64, rng: &mut Rng| {
        for _ in 0..count {
            change(&engine, model, &Op::random(rng, model, 12));
        }
    };
    for _ in 0..3 {
        random(&mut model, 12, rng);
        engine.checkpoint().unwrap();
    }
    // In another volume, what is to be found in each store: a slab that is free, ...
    let [gone, lower, upper, replaced, written, patched] =
        [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0)].map(|(index, layer)| key(3, index, layer));
    for (key, tags) in
        [(gone, 71), (lower, 72), (upper, 74), (replaced, 76), (written, 78), (patched, 86)]
            .map(|(key, tag)| (key, [tag, tag + 1]))
    {
        let first = key.layer.0 as u16;
        let op = write(&model, key, first, &tags);
        change(&engine, &mut model, &op);
    }
    engine.checkpoint().unwrap();
    change(&engine, &mut model, &Op::Delete { key: gone });
    engine.checkpoint().unwrap();
    // ... and not applied, a write in the log over another in the slab, one straight to the slab,
    // a content for a new slab, a merge, a patch.
    let small = write(&model, written, 0, &[81]);
    change(&engine, &mut model, &small);
    let direct = write(&model, written, 5, &[82, 83, 84]);
    change(&engine, &mut model, &direct);
    let blocks = [(0, Block::Data(85)), (3, Block::Zero)].into();
    let layer = ModelLayer { version: super::support::version(9, 7), blocks };
    change(&engine, &mut model, &Op::Install { key: replaced, layer });
    change(&engine, &mut model, &Op::Merge { key: upper, lower: lower.layer });
    // Blocks 1 and 7 become others, block 0 stays in the slab.
    let mut layer = model[&patched].clone();
    layer.version = super::support::version(9, 8);
    layer.blocks.extend([(1, Block::Data(88)), (7, Block::Data(89)), (9, Block::Zero)]);
    change(&engine, &mut model, &Op::Patch { key: patched, layer, again: Vec::new() });
    // Few enough not to fill the log, which would make another checkpoint.
    random(&mut model, 5, rng);
    engine.sync_log().unwrap();
    Used { medium, model }
}

/// Reads each block of each layer alone: all must be right or an error that names them, and no
/// version may be forgotten. Gives the blocks that are errors.
fn right_or_reported(
    medium: &SimMedium,
    model: &Model,
    place: &str,
) -> Result<BTreeSet<(LayerKey, u16)>, OpenError> {
    let engine = open_sim(medium)?;
    let expected: Vec<_> = model.iter().map(|(key, layer)| (*key, layer.version)).collect();
    assert_eq!(versions(&engine).into_iter().collect::<Vec<_>>(), expected, "damage in {place}");
    let mut reported = BTreeSet::new();
    for (key, layer) in model {
        for (block, content) in &layer.blocks {
            let (mut buf, mut crc) = ([7; BLOCK_SIZE], [0]);
            match engine.read(key.object, &[key.layer], *block, &mut buf, &mut crc) {
                Ok(_) => {
                    let tag = if let Block::Data(tag) = content { *tag } else { 0 };
                    assert_eq!(tag_of(&buf), Some(tag), "{key}, block {block}: {place}");
                }
                Err(
                    ReadError::Checksum { key: named, block: at }
                    | ReadError::Io { key: named, block: at, .. },
                ) => {
                    assert_eq!((named, at), (*key, *block), "{place}");
                    reported.insert((named, at));
                }
                Err(error) => panic!("{place}: {error}"),
            }
        }
    }
    for key in model.keys() {
        // A whole layer is given only if it is whole.
        let damaged = reported.iter().any(|(named, _)| named == key);
        match engine.image(*key) {
            Ok(image) => {
                assert!(!damaged, "{place}");
                assert_eq!(image.map(in_single_blocks), Some(image_of(&model[key])), "{place}");
            }
            Err(_) => assert!(damaged, "{place}"),
        }
    }
    Ok(reported)
}

/// Flips one bit and compares what follows with the table.
fn flip(used: &Used, anatomy: &Anatomy, file: &str, offset: u64, bit: u64) -> Kind {
    let medium = used.medium.copy();
    let structure = anatomy.find(file, offset);
    let where_ = format!("{file} at {offset}, bit {bit}: {:?}", structure.kind);
    let flip = |medium: &SimMedium| medium.tamper(file, |flip, _| flip(offset, 1 << bit));
    flip(&medium);
    let found = right_or_reported(&medium, &used.model, &where_);
    match (expected(&structure), found) {
        (Expected::Unharmed, Ok(reported)) => assert!(reported.is_empty(), "{where_}"),
        (Expected::Reported(blocks), Ok(reported)) => {
            assert_eq!(reported, blocks, "{where_}");
            // The damage stays in its place also when the store goes on, and is applied.
            for what in ["opened again", "applied"] {
                let again = right_or_reported(&medium, &used.model, &where_).unwrap();
                assert_eq!(again, blocks, "{where_}, {what}");
                open_sim(&medium).unwrap().checkpoint().unwrap();
            }
            let again = right_or_reported(&medium, &used.model, &where_).unwrap();
            assert_eq!(again, blocks, "{where_}, after a checkpoint");
        }
        (Expected::Refused { file: named, place }, Err(OpenError::Corrupt { file, what })) => {
            assert_eq!(file, named, "{where_}");
            assert!(what.contains(&place), "{where_}: {what:?} does not tell {place:?}");
            // Nothing was changed by that: without the damage all is there.
            flip(&medium);
            check_equal(&open_sim(&medium).unwrap(), &used.model).unwrap();
        }
        (expected, found) => panic!("{where_}: {expected:?} expected, found {found:?}"),
    }
    structure.kind
}

/// Where to flip: in every sector that was written, more often where it matters more, and in every
/// small structure.
fn places(used: &Used, anatomy: &Anatomy, rng: &mut Rng) -> Vec<(String, u64)> {
    let mut places = Vec::new();
    for file in used.medium.names() {
        for sector in used.medium.written(&file) {
            let count = if file == "data" || file.starts_with("log/") { 1 } else { 6 };
            places.extend((0..count).map(|_| (file.clone(), sector + rng.below(512))));
        }
    }
    let small = |structure: &&Structure| structure.range.end - structure.range.start <= 512;
    for structure in anatomy.structures().filter(small) {
        let Range { start, end } = structure.range;
        if start < end {
            // The first bytes are magic, kind and lengths.
            let within = |at: u64| (structure.file.clone(), start + at);
            places
                .extend([within(rng.below((end - start).min(32))), within(rng.below(end - start))]);
        }
    }
    places.retain(|(file, offset)| *offset < used.medium.file_len(file));
    places
}

#[test]
fn i7_one_flipped_bit_anywhere_is_repaired_or_contained_or_refused_by_name() {
    let first = seed();
    // Each store with another mixture of structures; `STORES=1` replays one.
    let stores = setting("STORES", 4);
    let counts = Mutex::new(BTreeMap::new());
    let work = |number: u64| {
        let mut rng = Rng(first.wrapping_add(number));
        let used = used_store(&mut rng);
        let anatomy = Anatomy::of(&used.medium, &used.model);
        for (file, offset) in places(&used, &anatomy, &mut rng) {
            let kind = flip(&used, &anatomy, &file, offset, rng.below(8));
            *counts.lock().unwrap().entry(kind).or_insert(0) += 1;
        }
    };
    in_parallel(stores, work, |number| {
        println!("failed with SEED={} STORES=1", first.wrapping_add(number));
    });
    let counts = counts.into_inner().unwrap();
    println!("flipped bits: {counts:?}");
    for kind in Kind::ALL {
        assert!(counts.contains_key(&kind), "{kind:?} was not hit");
    }
}

#[test]
fn i7_a_flipped_bit_of_a_stored_block_is_reported_with_its_place() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let version = super::support::version(1, 1);
    let op = Op::Write { key: key(1, 0, 0), version, first: 7, tags: vec![1, 2, 3] };
    op.apply_to_store(&engine, &Model::new()).unwrap();
    engine.shut_down().unwrap();
    medium.tamper("data", |flip, _| flip(8 * 4096 + 99, 64));
    let (mut buf, mut crcs) = ([0; 3 * 4096], [0; 3]);
    for engine in [engine, open_sim(&medium).unwrap()] {
        let read = engine.read(key(1, 0, 0).object, &[Layer(0)], 7, &mut buf, &mut crcs);
        match read {
            Err(ReadError::Checksum { key: named, block: 8 }) => assert_eq!(named, key(1, 0, 0)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn each_copy_of_the_superblock_and_the_mark_is_spare() {
    let Used { medium: pristine, model, .. } = used_store(&mut Rng(5));
    for part in 0..4 {
        let medium = pristine.copy();
        medium.tamper("superblock", |flip, _| flip(part * 4096 + 20, 1));
        assert_eq!(right_or_reported(&medium, &model, "superblock").unwrap().len(), 0);
        // It was repaired, so the other copy may go.
        medium.tamper("superblock", |flip, _| flip((part ^ 1) * 4096 + 20, 1));
        assert_eq!(right_or_reported(&medium, &model, "superblock").unwrap().len(), 0);
    }
}

#[test]
fn a_damaged_flushed_record_is_not_a_torn_tail() {
    let medium = used_store(&mut Rng(7)).medium;
    let (medium, start) = {
        let engine = open_sim(&medium).unwrap();
        let (start, end) = log_range(&engine);
        assert!(end > start);
        (medium.copy(), start)
    };
    let (number, offset) = ((start / (64 << 10)) % 4, start % (64 << 10));
    let name = format!("log/{number:04}");
    medium.tamper(&name, |flip, _| flip(offset + 50, 4));
    match open_sim(&medium).map(|_| ()) {
        Err(OpenError::Corrupt { file, what }) => {
            assert_eq!(file, name);
            assert!(what.contains(&format!("offset {offset}")), "{what}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn lost_checksums_make_every_block_of_that_layer_an_error() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let mut model = Model::new();
    for (index, tags) in [(0, vec![1, 2]), (1, vec![3])] {
        let version = super::support::version(1, 1);
        let op = Op::Write { key: key(1, index, 0), version, first: 0, tags };
        op.apply_to_store(&engine, &model).unwrap();
        op.apply_to_model(&mut model);
    }
    engine.shut_down().unwrap();
    drop(engine);
    medium.tamper("sums", |flip, _| flip(4000, 1));
    assert!(!right_or_reported(&medium, &model, "sums").unwrap().is_empty());
    // A new write of the block heals it.
    let engine = open_sim(&medium).unwrap();
    let object = key(1, 0, 0).object;
    let bad = [0, 1].map(|index| engine.image(key(1, index, 0)).is_err());
    let index = u32::from(bad[1]);
    assert!(bad[0] != bad[1]);
    let op = Op::Write {
        key: key(1, index, 0),
        version: super::support::version(1, 2),
        first: 0,
        tags: if index == 0 { vec![8, 9] } else { vec![8] },
    };
    op.apply_to_store(&engine, &model).unwrap();
    op.apply_to_model(&mut model);
    engine.checkpoint().unwrap();
    check_equal(&engine, &model).unwrap();
    assert_eq!(engine.stat_object(object).len(), 1);
}

#[test]
fn random_bytes_as_any_file_give_an_error_or_right_data() {
    let mut rng = Rng(seed());
    let Used { medium: pristine, model, .. } = used_store(&mut rng);
    for name in pristine.names() {
        for _ in 0..3 {
            let medium = pristine.copy();
            medium.tamper(&name, |flip, len| {
                for offset in 0..len.min(70_000) {
                    flip(offset, rng.next() as u8);
                }
            });
            if name.starts_with("log/") {
                // If the proof is gone with the records, the log looks as if it ended before.
                match open_sim(&medium).map(|_| ()) {
                    Ok(()) | Err(OpenError::Corrupt { .. }) => continue,
                    Err(error) => panic!("{name}: {error}"),
                }
            }
            match right_or_reported(&medium, &model, &name) {
                Err(OpenError::Corrupt { file, .. }) => assert_eq!(file, name),
                Err(error) => panic!("{name}: {error}"),
                // The layers it hit may have been deleted since; the index has its copies.
                Ok(reported) if name == "index" => assert!(reported.is_empty()),
                Ok(_) => assert!(name == "data" || name == "sums", "{name}"),
            }
        }
    }
}

#[test]
fn a_newer_format_is_told_from_damage() {
    let medium = SimMedium::default();
    drop(new_sim(&medium));
    let mut sector = [0; 512];
    let file = crate::medium::Medium::open(&medium, "superblock", false).unwrap();
    file.read_at(&mut sector, 0).unwrap();
    sector[8] += 1;
    let crc = crc32c::crc32c(&sector[..508]);
    sector[508..].copy_from_slice(&crc.to_le_bytes());
    file.write_at(&[&sector], 0).unwrap();
    match open_sim(&medium).map(|_| ()) {
        Err(OpenError::OtherFormat { found: 4, supported: 3 }) => {}
        other => panic!("{other:?}"),
    }
}

/// One layer that is in slab 0.
fn one_layer(medium: &SimMedium) -> (Engine, Model) {
    let engine = new_sim(medium);
    let mut model = Model::new();
    let op = write(&model, key(1, 0, 0), 0, &[1, 2]);
    change(&engine, &mut model, &op);
    engine.checkpoint().unwrap();
    (engine, model)
}

#[test]
fn an_index_record_that_is_damaged_with_its_copy_is_refused_by_name() {
    let medium = SimMedium::default();
    let (engine, model) = one_layer(&medium);
    drop(engine);
    medium.tamper("index", |flip, _| flip(index_offset(0, 0) + 70, 4));
    let repaired = medium.copy();
    check_equal(&open_sim(&repaired).unwrap(), &model).unwrap();
    // It was written where it belongs.
    repaired.tamper("sums", |flip, _| flip(copy_offset(0, 0) + 70, 4));
    check_equal(&open_sim(&repaired).unwrap(), &model).unwrap();
    medium.tamper("sums", |flip, _| flip(copy_offset(0, 0) + 70, 4));
    match open_sim(&medium).map(|_| ()) {
        Err(OpenError::Corrupt { file, what }) => {
            assert!(file == "index" && what.contains("slab 0"), "{file}: {what}");
        }
        other => panic!("{other:?}"),
    }
}

/// Of an interrupted checkpoint an index record was lost, its copy was not, and the next one had no
/// use for that slab. The copy must not be taken for a record that counts when another is repaired.
#[test]
fn a_copy_that_a_crash_left_does_not_hinder_the_repair_of_another_record() {
    let mut done = false;
    for fuse in 0.. {
        let medium = SimMedium::default();
        let (engine, mut model) = one_layer(&medium);
        let op = write(&model, key(1, 1, 0), 0, &[3, 4]);
        change(&engine, &mut model, &op);
        engine.sync_log().unwrap();
        medium.set_fuse(fuse);
        done |= engine.checkpoint().is_ok();
        medium.lose(512, &mut |unit| usize::from(unit.name == "sums") * unit.numbers.len());
        let engine = open_sim(&medium).unwrap();
        change(&engine, &mut model, &Op::Delete { key: key(1, 1, 0) });
        engine.checkpoint().unwrap();
        drop(engine);
        medium.tamper("index", |flip, _| flip(index_offset(0, 0) + 70, 4));
        match open_sim(&medium) {
            Ok(engine) => check_equal(&engine, &model).unwrap(),
            Err(error) => panic!("after {fuse} changes: {error}"),
        }
        if done {
            return;
        }
    }
}

/// An opening makes what it replayed durable and notes its end in the mark: from then on, damage to
/// the last record is not a torn tail, though no record says that it was durable.
#[test]
fn what_an_opening_found_is_not_a_torn_tail_later() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let version = super::support::version(1, 1);
    let op = Op::Write { key: key(1, 0, 0), version, first: 0, tags: vec![1] };
    op.apply_to_store(&engine, &Model::new()).unwrap();
    let (start, _) = log_range(&engine);
    drop(engine);
    medium.kill();
    drop(open_sim(&medium).unwrap());
    medium.tamper("log/0000", |flip, _| flip(start + 50, 4));
    match open_sim(&medium).map(|_| ()) {
        Err(OpenError::Corrupt { file, what }) => {
            assert_eq!(file, "log/0000");
            assert!(what.contains("was durable"), "{what}");
        }
        other => panic!("{other:?}"),
    }
}
