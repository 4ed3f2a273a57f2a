//! Patches: what differs is found, only that is taken, and nothing that is not what it should be
//! stays.

use sheepdog_types::{BLOCK_SIZE, Version};

use super::sim::SimMedium;
use super::support::{
    Block, ModelLayer, Op, blocks_of, bytes_of, check_equal, key, log_range, new_sim, open_sim,
    patch_of, version,
};
use crate::api::{BadBlock, BlockRange, LayerPart};
use crate::engine::Engine;
use crate::error::{ReadError, WriteError};
use crate::{LayerPatch, Options, Payload, Store};

/// Blocks 0 to 5 with data, 6 zero.
fn old_layer() -> ModelLayer {
    let blocks = (0..6).map(|block| (block, Block::Data(100 + u64::from(block))));
    ModelLayer { version: version(1, 1), blocks: blocks.chain([(6, Block::Zero)]).collect() }
}

/// Of the same, 1 is gone, 2 is zero, 4 and 6 have new data.
fn new_layer() -> ModelLayer {
    let mut layer = old_layer();
    layer.version = version(1, 9);
    layer.blocks.remove(&1);
    layer.blocks.extend([(2, Block::Zero), (4, Block::Data(7)), (6, Block::Data(8))]);
    layer
}

/// A store with the old layer, in its slab.
fn with_old(medium: &SimMedium) -> Engine {
    let engine = new_sim(medium);
    let install = Op::Install { key: key(1, 0, 0), layer: old_layer() };
    install.apply_to_store(&engine, &super::support::Model::new()).unwrap();
    engine.checkpoint().unwrap();
    engine
}

fn flip_in_slab(medium: &SimMedium, tag: u64) {
    let data = medium.bytes("data", 0, medium.file_len("data") as usize);
    let at = data.chunks(BLOCK_SIZE).position(|bytes| bytes == bytes_of(tag)).unwrap();
    medium.tamper("data", |flip, _| flip((at * BLOCK_SIZE) as u64 + 77, 4));
}

fn blocks(ranges: &[BlockRange]) -> Vec<u16> {
    ranges.iter().flat_map(|range| range.blocks()).collect()
}

#[test]
fn only_the_blocks_that_differ_are_taken_and_written() {
    let medium = SimMedium::default();
    let engine = with_old(&medium);
    let (key, layer) = (key(1, 0, 0), new_layer());
    let patch = patch_of(&layer, &[4, 6]);
    let difference = engine.compare(key, &patch.sums).unwrap().unwrap();
    assert_eq!((difference.version, blocks(&difference.blocks)), (version(1, 1), vec![4, 6]));
    let before = log_range(&engine).1;
    assert_eq!(engine.patch(key, version(1, 1), &patch), Ok(true));
    let record = log_range(&engine).1 - before;
    assert!(record < 2 * BLOCK_SIZE as u64 + 500, "{record} bytes for two blocks");
    let model = [(key, layer)].into();
    check_equal(&engine, &model).unwrap();
    engine.checkpoint().unwrap();
    check_equal(&engine, &model).unwrap();
    let hole = medium.bytes("data", BLOCK_SIZE as u64, 2 * BLOCK_SIZE);
    assert!(hole.iter().all(|byte| *byte == 0), "the space of freed blocks is given back");
    drop(engine);
    check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
}

#[test]
fn i5_a_patch_that_does_not_fit_changes_nothing() {
    let medium = SimMedium::default();
    let engine = with_old(&medium);
    let (key, layer) = (key(1, 0, 0), new_layer());
    let good = patch_of(&layer, &[4, 6]);
    let refused = |expect, patch: &LayerPatch| engine.patch(key, expect, patch);
    assert_eq!(refused(version(1, 2), &good), Ok(false), "another version");
    assert_eq!(refused(version(1, 1), &patch_of(&layer, &[4])), Ok(false), "6 is not there");
    let mut other = good.clone();
    other.sums.crcs[0] ^= 1;
    assert_eq!(refused(version(1, 1), &other), Ok(false), "0 is not what is supposed");
    let mut damaged = good.clone();
    damaged.data[BLOCK_SIZE] ^= 1;
    let checksum = Err(WriteError::Checksum { block: 6 });
    assert_eq!(refused(version(1, 1), &damaged), checksum);
    let invalid = |expect, change: &dyn Fn(&mut LayerPatch)| {
        let mut patch = good.clone();
        change(&mut patch);
        let refused = refused(expect, &patch);
        assert!(matches!(refused, Err(WriteError::Invalid(_))), "{refused:?}");
    };
    invalid(Version::NONE, &|_| {});
    invalid(version(1, 1), &|patch| patch.sums.version = Version::NONE);
    invalid(version(1, 1), &|patch| patch.sums.crcs.truncate(1));
    invalid(version(1, 1), &|patch| patch.sums.runs.swap(0, 1));
    invalid(version(1, 1), &|patch| patch.blocks.reverse());
    invalid(version(1, 1), &|patch| patch.blocks[0] = BlockRange::new(2, 1).unwrap());
    invalid(version(1, 1), &|patch| patch.blocks.truncate(1));
    invalid(version(1, 1), &|patch| patch.data.truncate(BLOCK_SIZE + 1));
    check_equal(&engine, &[(key, old_layer())].into()).unwrap();
}

#[test]
fn i7_damage_differs_and_is_repaired_at_the_same_version() {
    let medium = SimMedium::default();
    let engine = with_old(&medium);
    let (key, layer) = (key(1, 0, 0), old_layer());
    let sums = patch_of(&layer, &[]).sums;
    assert_eq!(engine.compare(key, &sums).unwrap().unwrap().blocks, []);
    flip_in_slab(&medium, 103);
    // Nobody has read it yet; at the same version everything is.
    assert_eq!(blocks(&engine.compare(key, &sums).unwrap().unwrap().blocks), [3]);
    assert_eq!(engine.damage_report().blocks, [BadBlock { key, block: 3 }]);
    let newer = new_layer();
    let difference = engine.compare(key, &patch_of(&newer, &[]).sums).unwrap().unwrap();
    assert_eq!(blocks(&difference.blocks), [3, 4, 6], "known damage is no equal block");
    let without = patch_of(&newer, &[4, 6]);
    assert_eq!(engine.patch(key, version(1, 1), &without), Ok(false), "3 must not stay");
    assert_eq!(engine.patch(key, version(1, 1), &patch_of(&layer, &[3])), Ok(true));
    assert_eq!(engine.damage_report().blocks, []);
    let model = [(key, layer.clone())].into();
    check_equal(&engine, &model).unwrap();
    let end = log_range(&engine).1;
    assert_eq!(engine.patch(key, version(1, 1), &patch_of(&layer, &[])), Ok(true));
    assert_eq!(log_range(&engine).1, end, "nothing to do");
    engine.checkpoint().unwrap();
    check_equal(&engine, &model).unwrap();
}

#[test]
fn i7_a_layer_whose_checksums_are_damaged_is_not_patched() {
    let medium = SimMedium::default();
    let engine = with_old(&medium);
    engine.shut_down().unwrap();
    drop(engine);
    let engine = open_sim(&medium).unwrap();
    let crc = blocks_of(&[100]).1[0].to_le_bytes();
    let tables = medium.bytes("sums", 0, medium.file_len("sums") as usize);
    let at = tables.chunks(4).position(|bytes| bytes == crc).unwrap();
    medium.tamper("sums", |flip, _| flip(at as u64 * 4, 1));
    let (key, patch) = (key(1, 0, 0), patch_of(&new_layer(), &[4, 6]));
    assert!(matches!(engine.compare(key, &patch.sums), Err(ReadError::Checksum { .. })));
    let refused = engine.patch(key, version(1, 1), &patch);
    assert!(matches!(refused, Err(WriteError::Damaged { .. })), "{refused:?}");
}

#[test]
fn i11_a_full_disk_takes_patches_that_need_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let capacity = Some(6 * BLOCK_SIZE as u64);
    let store =
        Store::create(dir.path(), super::support::IDS, Options { capacity, ..Options::default() });
    let (store, key) = (store.unwrap(), key(1, 0, 0));
    let (bytes, crcs) = blocks_of(&[100, 101, 102, 103, 104, 105]);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    store.write(key, Version::NONE, version(1, 1), 0, payload).unwrap();
    let mut larger = old_layer();
    larger.version = version(1, 2);
    larger.blocks.insert(6, Block::Data(8));
    assert_eq!(store.patch(key, version(1, 1), &patch_of(&larger, &[6])), Err(WriteError::NoSpace));
    assert_eq!(store.patch(key, version(1, 1), &patch_of(&new_layer(), &[4, 6])), Ok(true));
    assert_eq!(store.usage().used, 5 * BLOCK_SIZE as u64);
}

#[test]
fn a_part_is_given_at_its_version_only() {
    let medium = SimMedium::default();
    let engine = with_old(&medium);
    let key = key(1, 0, 0);
    let range = |first, count| BlockRange::new(first, count).unwrap();
    let part = |version, ranges: &[BlockRange]| engine.part(key, version, ranges);
    let (data, crcs) = blocks_of(&[101, 103, 104]);
    let found = part(version(1, 1), &[range(1, 1), range(3, 2)]).unwrap();
    assert_eq!(found, Some(LayerPart { crcs, data }));
    assert_eq!(part(version(1, 2), &[range(1, 1)]).unwrap(), None);
    for wrong in [&[range(6, 1)][..], &[range(5, 3)], &[range(3, 1), range(1, 1)]] {
        assert!(matches!(part(version(1, 1), wrong), Err(ReadError::Invalid(_))));
    }
    flip_in_slab(&medium, 103);
    let damaged = part(version(1, 1), &[range(3, 2)]);
    assert!(matches!(damaged, Err(ReadError::Checksum { block: 3, .. })));
}
