//! Flipped bits and foreign bytes in each file: found, named, never a panic, never wrong data.

use sheepdog_types::Layer;

use super::sim::SimMedium;
use super::support::{Model, Op, Rng, check_equal, image_of, in_single_blocks, new_sim, open_sim};
use super::support::{key, seed, versions};
use crate::error::{OpenError, ReadError};

/// A store with a checkpoint, flushed changes after it, and no clean end.
fn used_store(rng: &mut Rng) -> (SimMedium, Model) {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    let mut model = Model::new();
    let mut change = |count: u64| {
        for _ in 0..count {
            let op = Op::random(rng, &model, 12);
            op.apply_to_store(&engine, &model).unwrap();
            op.apply_to_model(&mut model);
        }
    };
    change(40);
    engine.checkpoint().unwrap();
    change(8);
    engine.sync_log().unwrap();
    (medium, model)
}

/// What a reader sees of each layer must be right or an error, and no version may be forgotten.
fn right_or_reported(medium: &SimMedium, model: &Model, file: &str) -> Result<usize, OpenError> {
    let engine = open_sim(medium)?;
    let expected: Vec<_> = model.iter().map(|(key, layer)| (*key, layer.version)).collect();
    assert_eq!(versions(&engine).into_iter().collect::<Vec<_>>(), expected, "damage in {file}");
    let mut reported = 0;
    for (key, layer) in model {
        match engine.image(*key) {
            Ok(image) => assert_eq!(image.map(in_single_blocks), Some(image_of(layer)), "{file}"),
            Err(ReadError::Checksum { key: named, .. } | ReadError::Io { key: named, .. }) => {
                assert_eq!(named, *key);
                reported += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    Ok(reported)
}

#[test]
fn i7_flipped_bits_are_reported_never_returned() {
    let mut rng = Rng(seed());
    let (pristine, model) = used_store(&mut rng);
    let mut refused = 0;
    for name in pristine.names() {
        let sectors = pristine.written(&name);
        for _ in 0..15.min(sectors.len() * 8) {
            let medium = pristine.copy();
            let sector = sectors[rng.below(sectors.len() as u64) as usize];
            let offset = sector + rng.below(512);
            medium.tamper(&name, |flip, len| flip(offset.min(len - 1), 1 << rng.below(8)));
            match right_or_reported(&medium, &model, &format!("{name} at {offset}")) {
                Ok(_) => {}
                Err(OpenError::Corrupt { file, what }) => {
                    assert_eq!(file, name, "{what}");
                    refused += 1;
                }
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
    assert!(refused > 0);
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
    let (pristine, model) = used_store(&mut Rng(5));
    for part in 0..4 {
        let medium = pristine.copy();
        medium.tamper("superblock", |flip, _| flip(part * 4096 + 20, 1));
        assert_eq!(right_or_reported(&medium, &model, "superblock").unwrap(), 0);
        // It was repaired, so the other copy may go.
        medium.tamper("superblock", |flip, _| flip((part ^ 1) * 4096 + 20, 1));
        assert_eq!(right_or_reported(&medium, &model, "superblock").unwrap(), 0);
    }
}

#[test]
fn a_damaged_flushed_record_is_not_a_torn_tail() {
    let (medium, _) = used_store(&mut Rng(7));
    let (medium, start) = {
        let engine = open_sim(&medium).unwrap();
        let log = engine.log.lock().unwrap();
        assert!(log.end > log.start);
        (medium.copy(), log.start)
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
    assert_eq!(right_or_reported(&medium, &model, "sums").unwrap(), 1);
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
    let (pristine, model) = used_store(&mut rng);
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
                // The layers it hit may have been deleted since.
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
    sector[8] = 3;
    let crc = crc32c::crc32c(&sector[..508]);
    sector[508..].copy_from_slice(&crc.to_le_bytes());
    file.write_at(&[&sector], 0).unwrap();
    match open_sim(&medium).map(|_| ()) {
        Err(OpenError::OtherFormat { found: 3, supported: 2 }) => {}
        other => panic!("{other:?}"),
    }
}
