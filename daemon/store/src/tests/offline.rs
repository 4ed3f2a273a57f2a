//! The offline reader against the store: what the store wrote is found right and the same, also
//! after power cuts, and one flipped bit in each kind of structure is named with its place.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sheepdog_types::{BLOCK_SIZE, LayerKey, OBJECT_SIZE, SLOTS, SlotId, Version};

use super::sim::{SECTOR, SimMedium, random_fate};
use super::support::{
    Block, Model, ModelLayer, Op, Rng, blocks_of, create_sim, in_parallel, key, log_range, new_sim,
    open_sim, patch_of, seed, setting, small, version, versions,
};
use crate::checkpoint::{copy_offset, index_offset, sums_offset};
use crate::engine::Engine;
use crate::format::HEADER;
use crate::offline::examine;
use crate::{Finding, OpenError, Options, Payload, Report, Severity, Store, check, dump};

/// Writes what is on a medium to a directory.
fn export(medium: &SimMedium) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("log")).unwrap();
    for name in medium.names() {
        let file = File::create(dir.path().join(&name)).unwrap();
        let len = medium.file_len(&name);
        file.set_len(len).unwrap();
        for offset in medium.written(&name) {
            let count = SECTOR.min((len - offset) as usize);
            file.write_all_at(&medium.bytes(&name, offset, count), offset).unwrap();
        }
    }
    dir
}

fn checked(dir: &Path) -> Report {
    check(dir, &mut |_| {}).unwrap()
}

fn findings(report: &Report, severity: Severity) -> Vec<&Finding> {
    report.findings.iter().filter(|finding| finding.severity == severity).collect()
}

/// What is on the medium is right, and the store that opens it finds the same.
fn agrees(medium: &SimMedium, place: &str) {
    let dir = export(medium);
    let (report, model) = examine(dir.path(), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{place}: {:#?}", report.findings);
    let engine = open_sim(&medium.copy()).unwrap();
    assert_eq!(model.versions(), versions(&engine), "{place}");
    let totals = report.totals;
    let usage = engine.usage();
    assert_eq!(totals.layers, usage.objects, "{place}");
    assert_eq!(totals.data_blocks * BLOCK_SIZE as u64, usage.used, "{place}");
    assert_eq!(totals.verified_blocks, totals.data_blocks, "{place}");
    let stats = (0..SLOTS).flat_map(|slot| engine.stats(SlotId(slot as u16)));
    let zero: u64 = stats.map(|stat| u64::from(stat.zero_blocks)).sum();
    assert_eq!(totals.zero_blocks, zero, "{place}");
    let digests = (0..SLOTS).map(|slot| engine.table.digest(SlotId(slot as u16)));
    assert_eq!(totals.digest, digests.fold(0, u64::wrapping_add), "{place}");
    let (start, end) = log_range(&engine);
    assert_eq!((totals.log_start, totals.log_bytes), (start, end - start), "{place}");
    let free = engine.log.lock().unwrap().slabs.free().count();
    assert_eq!(totals.free_slabs, free as u64, "{place}");
}

/// With room in the log for writes that are large enough to go straight to a slab.
fn roomy() -> Options {
    Options { log_bytes: 4 << 20, segment_bytes: 1 << 20, ..Options::default() }
}

/// A change, sometimes one whose bytes go straight to the slab.
fn random_op(rng: &mut Rng, now: &Model, large: bool) -> Op {
    match Op::random(rng, now, 12) {
        Op::Write { key, version, first, .. } if large && rng.chance(30) => {
            let count = 64 + rng.below(30) as u16;
            let tags = (0..count).map(|_| 1 + rng.next() / 2).collect();
            Op::Write { key, version, first: first * 4, tags }
        }
        other => other,
    }
}

/// A life of a store that ends by an orderly stop, by a kill, or when the fuse blows.
fn live(medium: &SimMedium, rng: &mut Rng, large: bool) {
    let Ok(engine) = open_sim(medium) else { return };
    for _ in 0..rng.below(40) {
        let mut now = Model::new();
        for (key, version) in versions(&engine) {
            now.insert(key, ModelLayer { version, blocks: BTreeMap::new() });
        }
        let op = random_op(rng, &now, large);
        match rng.below(12) {
            // Fails when the power is gone.
            0 => drop(engine.checkpoint()),
            1 | 2 => drop(engine.sync_log()),
            _ => drop(op.apply_to_store(&engine, &now)),
        }
        if !medium.has_power() {
            return;
        }
    }
    if rng.chance(20) {
        // Fails when the power goes meanwhile.
        drop(engine.shut_down());
    }
}

#[test]
fn a_store_is_found_right_and_the_same_after_any_history() {
    let first = seed();
    let work = |number: u64| {
        let mut rng = Rng(first.wrapping_add(number));
        let medium = SimMedium::default();
        let is_large = rng.chance(40);
        create_sim(&medium, &if is_large { roomy() } else { small() }).unwrap();
        for life in 0..1 + rng.below(4) {
            if rng.chance(70) {
                medium.set_fuse(rng.below(120));
            }
            live(&medium, &mut rng, is_large);
            if !medium.has_power() || rng.chance(50) {
                let keep = [0, 20, 50, 80, 95, 100][rng.below(6) as usize];
                let unit = if rng.chance(50) { SECTOR } else { BLOCK_SIZE };
                medium.lose(unit, &mut random_fate(&mut rng, keep));
            } else {
                medium.kill();
            }
            agrees(&medium, &format!("SEED={} life {life}", first.wrapping_add(number)));
        }
    };
    in_parallel(setting("HISTORIES", 60), work, |number| {
        println!("failed with SEED={} HISTORIES=1", first.wrapping_add(number));
    });
}

/// A store with one of each kind of structure:
///
/// | slab | layer | holds |
/// | --- | --- | --- |
/// | 0 | 1/0@0 | blocks 0–9 committed, of which the log replaced 0 |
/// | 1 | 1/1@0 | blocks 0–99, written directly and still in the log |
/// | 2 | was 1/2@0 | free |
struct Sample {
    medium: SimMedium,
    /// LSNs of the records of the write of block 0 (twice), and of the direct one.
    replaced: u64,
    last: u64,
    direct: u64,
    /// Where the log is no longer proven.
    tail: u64,
}

fn write(engine: &Engine, key: LayerKey, seq: u64, first: u16, tags: &[u64]) -> u64 {
    let (bytes, crcs) = blocks_of(tags);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    let prev = if seq == 1 { Version::NONE } else { version(1, seq - 1) };
    engine.write(key, prev, version(1, seq), first, payload).unwrap();
    let record = HEADER as u64 + 4 * tags.len() as u64;
    let held = if tags.len() < 64 { bytes.len() as u64 } else { 0 };
    log_range(engine).1 - (record + held).next_multiple_of(32)
}

fn sample() -> Sample {
    let medium = SimMedium::default();
    create_sim(&medium, &roomy()).unwrap();
    let engine = open_sim(&medium).unwrap();
    write(&engine, key(1, 0, 0), 1, 0, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    write(&engine, key(1, 1, 0), 1, 0, &[11]);
    write(&engine, key(1, 2, 0), 1, 0, &[12]);
    engine.checkpoint().unwrap();
    engine.delete(key(1, 1, 0), None).unwrap();
    engine.delete(key(1, 2, 0), None).unwrap();
    engine.checkpoint().unwrap();
    let replaced = write(&engine, key(1, 0, 0), 2, 0, &[20]);
    let last = write(&engine, key(1, 0, 0), 3, 0, &[21]);
    let tags: Vec<u64> = (100..200).collect();
    let direct = write(&engine, key(1, 1, 0), 1, 0, &tags);
    engine.sync_log().unwrap();
    let tail = write(&engine, key(1, 0, 0), 4, 9, &[22]);
    Sample { medium, replaced, last, direct, tail }
}

impl Sample {
    /// Flips a bit of each place and checks.
    fn flip(&self, places: &[(&str, u64)]) -> Report {
        let dir = export(&self.medium);
        for (file, offset) in places {
            let file = File::options().read(true).write(true).open(dir.path().join(file)).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, *offset).unwrap();
            file.write_all_at(&[byte[0] ^ 4], *offset).unwrap();
        }
        checked(dir.path())
    }

    /// The one finding that flipped bits lead to; notes do not count besides others.
    fn flip_for_one(&self, places: &[(&str, u64)]) -> Finding {
        let report = self.flip(places);
        let worst = report.findings.iter().map(|finding| finding.severity).min();
        let worst = findings(&report, worst.unwrap_or_else(|| panic!("{places:?}: nothing found")));
        assert_eq!(worst.len(), 1, "{places:?}: {worst:#?}");
        assert_eq!(report.is_clean(), worst[0].severity == Severity::Note);
        worst[0].clone()
    }
}

/// Severity and place.
fn place(finding: &Finding) -> (Severity, &str, Option<u64>) {
    (finding.severity, &finding.file, finding.offset)
}

#[test]
fn the_sample_is_right() {
    let sample = sample();
    agrees(&sample.medium, "sample");
    let report = sample.flip(&[]);
    assert_eq!(report.findings, []);
    let totals = report.totals;
    assert_eq!((totals.layers, totals.data_blocks, totals.free_slabs), (2, 110, 1));
    assert!(totals.slabs == 2 && totals.log_records >= 4 && !totals.clean);
}

#[test]
fn a_flipped_bit_of_one_of_two_copies_is_repairable() {
    use Severity::Repairable;
    let sample = sample();
    for part in 0..4 {
        let found = sample.flip_for_one(&[("superblock", part * 4096 + 20)]);
        assert_eq!(place(&found), (Repairable, "superblock", Some(part * 4096)));
    }
    for (slab, layer) in [(0, Some(key(1, 0, 0))), (2, None)] {
        let (slot, at) = committed_slot(&sample, slab);
        let found = sample.flip_for_one(&[("index", at + 100)]);
        assert_eq!(place(&found), (Repairable, "index", Some(at)));
        assert_eq!((found.slab, found.layer), (Some(slab), layer));
        let copy = copy_offset(slab, slot);
        let found = sample.flip_for_one(&[("sums", copy + 100)]);
        assert_eq!(place(&found), (Repairable, "sums", Some(copy)));
        assert_eq!(found.slab, Some(slab));
    }
}

/// The slot of the record of `slab` that counts, and its offset.
fn committed_slot(sample: &Sample, slab: u32) -> (u8, u64) {
    let number = |slot| {
        let bytes = sample.medium.bytes("index", index_offset(slab, slot), SECTOR);
        u64::from_le_bytes(*bytes[8..].first_chunk().unwrap())
    };
    let slot = u8::from(number(1) > number(0));
    (slot, index_offset(slab, slot))
}

#[test]
fn flipped_bits_of_both_copies_are_damage() {
    let sample = sample();
    for first in [0, 8192] {
        let report = sample.flip(&[("superblock", first + 9), ("superblock", first + 4096 + 30)]);
        let damage = findings(&report, Severity::Damage);
        let places: Vec<_> = damage.iter().map(|finding| finding.offset.unwrap()).collect();
        assert_eq!(places, [first, first + 4096]);
        assert!(report.incomplete.is_some() && !report.is_clean());
    }
    let (slot, at) = committed_slot(&sample, 0);
    let report = sample.flip(&[("index", at + 70), ("sums", copy_offset(0, slot) + 9)]);
    // Without that layer the log makes no sense: named, too, but not first.
    let found = findings(&report, Severity::Damage)[0];
    assert_eq!(place(found), (Severity::Damage, "index", Some(at)));
    assert_eq!(found.slab, Some(0));
    assert!(report.incomplete.is_some());
}

#[test]
fn a_flipped_bit_of_what_has_no_copy_is_damage_with_layer_and_block() {
    use Severity::Damage;
    let sample = sample();
    let (slot, _) = committed_slot(&sample, 0);
    let found = sample.flip_for_one(&[("sums", sums_offset(0, slot) + 77)]);
    assert_eq!(place(&found), (Damage, "sums", Some(sums_offset(0, slot))));
    assert_eq!((found.layer, found.block, found.blocks), (Some(key(1, 0, 0)), Some(1), 8));
    // Committed blocks of a slab, adjacent ones together; and one written directly.
    let block = BLOCK_SIZE as u64;
    let found = sample.flip_for_one(&[("data", 3 * block + 5), ("data", 4 * block)]);
    assert_eq!(place(&found), (Damage, "data", Some(3 * block)));
    assert_eq!((found.layer, found.block, found.blocks), (Some(key(1, 0, 0)), Some(3), 2));
    let found = sample.flip_for_one(&[("data", OBJECT_SIZE + 99 * block)]);
    assert_eq!(place(&found), (Damage, "data", Some(OBJECT_SIZE + 99 * block)));
    assert_eq!((found.layer, found.block, found.slab), (Some(key(1, 1, 0)), Some(99), Some(1)));
    // A block in the log.
    let bytes = sample.last + HEADER as u64 + 4;
    let found = sample.flip_for_one(&[("log/0000", bytes + 4095)]);
    assert_eq!(place(&found), (Damage, "log/0000", Some(bytes)));
    assert_eq!((found.layer, found.block, found.blocks), (Some(key(1, 0, 0)), Some(0), 1));
    // Headers and tables of the log.
    for lsn in [sample.replaced, sample.direct] {
        for at in [1, 10, 60, 97] {
            let report = sample.flip(&[("log/0000", lsn + at)]);
            let found = findings(&report, Damage);
            assert_eq!(place(found[0]), (Damage, "log/0000", Some(lsn)));
            assert!(found[0].what.contains("was durable") && report.incomplete.is_some());
        }
    }
}

#[test]
fn what_does_not_count_is_no_damage() {
    let sample = sample();
    let block = BLOCK_SIZE as u64;
    // A slab's block that the log replaced, a free slab, the rest of a sector's page.
    for place in [("data", 9), ("data", 20 * block), ("superblock", 600)] {
        assert_eq!(sample.flip(&[place]).findings, [], "{place:?}");
    }
    // A record that nothing proves to have been durable is where the log ends.
    for at in [3, 98, HEADER as u64 + 9] {
        let report = sample.flip(&[("log/0000", sample.tail + at)]);
        assert_eq!(report.findings, []);
        assert_eq!(report.totals.log_start + report.totals.log_bytes, sample.tail);
    }
    // A block of the log that a later record replaced.
    let bytes = sample.replaced + HEADER as u64 + 4;
    let found = sample.flip_for_one(&[("log/0000", bytes)]);
    assert_eq!(place(&found), (Severity::Note, "log/0000", Some(bytes)));
}

#[test]
fn what_the_mark_proves_is_not_a_torn_end() {
    let sample = sample();
    // Opening makes the log durable and says so in the mark.
    drop(open_sim(&sample.medium).unwrap());
    let found = sample.flip(&[("log/0000", sample.tail + 3)]);
    assert_eq!(place(findings(&found, Severity::Damage)[0]).2, Some(sample.tail));
}

#[test]
fn a_direct_write_that_was_not_durable_is_the_torn_end_of_the_log() {
    let medium = SimMedium::default();
    create_sim(&medium, &roomy()).unwrap();
    let engine = open_sim(&medium).unwrap();
    write(&engine, key(1, 0, 0), 1, 0, &[1]);
    let tags: Vec<u64> = (100..200).collect();
    let direct = write(&engine, key(1, 1, 0), 1, 0, &tags);
    let sample = Sample { medium, replaced: 0, last: 0, direct, tail: direct };
    let report = sample.flip(&[("data", OBJECT_SIZE + 5 * BLOCK_SIZE as u64)]);
    assert_eq!((report.findings.len(), report.totals.layers), (0, 1));
    assert_eq!(report.totals.log_bytes, direct);
}

#[test]
fn lost_and_short_files_are_named() {
    let sample = sample();
    for name in ["data", "index", "sums", "log/0001"] {
        let dir = export(&sample.medium);
        std::fs::remove_file(dir.path().join(name)).unwrap();
        let report = checked(dir.path());
        assert_eq!(place(&report.findings[0]), (Severity::Damage, name, None), "{name}");
    }
    let dir = export(&sample.medium);
    File::options().write(true).open(dir.path().join("log/0002")).unwrap().set_len(100).unwrap();
    let report = checked(dir.path());
    assert_eq!(place(&report.findings[0]), (Severity::Damage, "log/0002", Some(100)));
}

#[test]
fn any_bytes_end_in_a_report() {
    let first = seed();
    let sample = sample();
    in_parallel(
        setting("STORES", 40),
        |number| {
            let mut rng = Rng(first.wrapping_add(number));
            let dir = export(&sample.medium);
            let names = sample.medium.names();
            for _ in 0..1 + rng.below(3) {
                let name = &names[rng.below(names.len() as u64) as usize];
                let file = File::options().write(true).open(dir.path().join(name)).unwrap();
                let len = file.metadata().unwrap().len().max(1);
                let bytes: Vec<u8> = (0..1 + rng.below(9000)).map(|_| rng.next() as u8).collect();
                file.write_all_at(&bytes, rng.below(len.min(20_000))).unwrap();
            }
            match check(dir.path(), &mut |_| {}) {
                Ok(_) | Err(OpenError::OtherFormat { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            let _ = dump(dir.path(), &mut |_| true);
        },
        |number| println!("failed with SEED={} STORES=1", first.wrapping_add(number)),
    );
}

#[test]
fn findings_are_bounded_and_damage_comes_before_notes() {
    let mut report = Report::default();
    let finding = sample().flip_for_one(&[("superblock", 20)]);
    for number in 0..1500 {
        let severity = if number < 900 { Severity::Note } else { Severity::Damage };
        report.add(Finding { severity, ..finding.clone() });
    }
    assert_eq!((report.findings.len(), report.not_kept()), (1000, 500));
    assert_eq!((report.count(Severity::Note), report.count(Severity::Damage)), (900, 600));
    assert_eq!(findings(&report, Severity::Damage).len(), 600);
}

#[test]
fn the_lock_of_a_process_that_has_ended_is_waited_for() {
    use rustix::fs::{FlockOperation, flock};
    let dir = tempfile::tempdir().unwrap();
    Store::create(dir.path(), super::support::IDS, small()).unwrap().close().unwrap();
    // More than any process has.
    std::fs::write(dir.path().join("lock"), "999999999 \n").unwrap();
    let held = File::open(dir.path().join("lock")).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let (checked, outcome) = std::sync::mpsc::channel();
    let path = dir.path().to_owned();
    let checking = std::thread::spawn(move || checked.send(check(&path, &mut |_| {})).unwrap());
    // How long something that must not happen is given to happen.
    let too_early = outcome.recv_timeout(std::time::Duration::from_millis(100));
    drop(held);
    assert!(too_early.is_err(), "{too_early:?}");
    assert!(outcome.recv().unwrap().unwrap().totals.clean);
    checking.join().unwrap();
}

#[test]
fn a_store_in_use_is_refused_and_nothing_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { log_bytes: 256 << 10, segment_bytes: 64 << 10, ..Options::default() };
    match check(dir.path(), &mut |_| {}) {
        Err(OpenError::NotAStore { .. }) => {}
        other => panic!("{other:?}"),
    }
    let store = Store::create(dir.path(), super::support::IDS, options.clone()).unwrap();
    let (bytes, crcs) = blocks_of(&[1, 2]);
    let payload = Payload::Data { bytes: &bytes, crcs: &crcs };
    store.write(key(1, 0, 0), Version::NONE, version(1, 1), 3, payload).unwrap();
    match check(dir.path(), &mut |_| {}) {
        Err(OpenError::Locked { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other:?}"),
    }
    store.close().unwrap();
    let files = ["lock", "superblock", "data", "index", "sums", "log/0000"];
    let state = || files.map(|name| std::fs::read(dir.path().join(name)).unwrap());
    let before = state();
    let report = checked(dir.path());
    assert_eq!((report.findings.len(), report.totals.data_blocks), (0, 2));
    assert!(report.totals.clean && report.ids == Some(super::support::IDS));
    let mut kinds = Vec::new();
    dump(dir.path(), &mut |item| {
        kinds.push(item.kind);
        true
    })
    .unwrap();
    assert_eq!(kinds, ["superblock", "superblock", "mark", "mark", "slab", "log end", "layer"]);
    assert!(state() == before, "a file was changed");
    // The lock is free again.
    drop(Store::open(dir.path(), options).unwrap());
}

#[test]
fn another_format_is_told_from_damage() {
    let medium = SimMedium::default();
    drop(new_sim(&medium));
    let dir = export(&medium);
    let mut sector = medium.bytes("superblock", 0, SECTOR);
    sector[8] = 9;
    let crc = crc32c::crc32c(&sector[..508]);
    sector[508..].copy_from_slice(&crc.to_le_bytes());
    let file = File::options().write(true).open(dir.path().join("superblock")).unwrap();
    file.write_all_at(&sector, 0).unwrap();
    match check(dir.path(), &mut |_| {}) {
        Err(OpenError::OtherFormat { found: 9, .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// Blocks 0–9 of a layer are committed; of these a patch in the log makes 1 absent and 2 zero, and
/// gives 4 and 7 new data. `last` and `tail` are its LSN.
fn patched(durable: bool) -> Sample {
    let medium = SimMedium::default();
    create_sim(&medium, &roomy()).unwrap();
    let engine = open_sim(&medium).unwrap();
    let tags: Vec<u64> = (1..11).collect();
    write(&engine, key(1, 0, 0), 1, 0, &tags);
    engine.checkpoint().unwrap();
    let blocks = (0..).zip(&tags).map(|(block, tag)| (block, Block::Data(*tag)));
    let mut layer = ModelLayer { version: version(1, 2), blocks: blocks.collect() };
    layer.blocks.remove(&1);
    layer.blocks.extend([(2, Block::Zero), (4, Block::Data(40)), (7, Block::Data(70))]);
    let lsn = log_range(&engine).1;
    assert!(engine.patch(key(1, 0, 0), version(1, 1), &patch_of(&layer, &[4, 7])).unwrap());
    if durable {
        engine.sync_log().unwrap();
    }
    Sample { medium, replaced: 0, last: lsn, direct: 0, tail: lsn }
}

#[test]
fn a_flipped_bit_of_a_patch_is_named() {
    use Severity::Damage;
    let sample = patched(true);
    agrees(&sample.medium, "patched");
    let tables = HEADER as u64 + 256 + 2 * 4;
    // Header, changes of blocks 0 to 3, a checksum.
    for at in [4, 28, 60, HEADER as u64, HEADER as u64 + 257] {
        let report = sample.flip(&[("log/0000", sample.last + at)]);
        let found = findings(&report, Damage);
        assert_eq!(place(found[0]), (Damage, "log/0000", Some(sample.last)), "{at}");
        assert!(found[0].what.contains("was durable") && report.incomplete.is_some(), "{at}");
    }
    // The bytes that it carries are those of blocks 4 and 7.
    for (block, bytes) in [(4, sample.last + tables), (7, sample.last + tables + 4096)] {
        let found = sample.flip_for_one(&[("log/0000", bytes + 99)]);
        assert_eq!(place(&found), (Damage, "log/0000", Some(bytes)));
        assert_eq!((found.layer, found.block, found.blocks), (Some(key(1, 0, 0)), Some(block), 1));
    }
    // What stays is in the slab; what was there of the blocks that it changes does not count.
    let found = sample.flip_for_one(&[("data", 5 * BLOCK_SIZE as u64)]);
    assert_eq!((found.layer, found.block), (Some(key(1, 0, 0)), Some(5)));
    for block in [1, 2, 4, 7] {
        assert_eq!(sample.flip(&[("data", block * BLOCK_SIZE as u64)]).findings, [], "{block}");
    }
}

#[test]
fn a_patch_that_was_not_durable_is_the_torn_end_of_the_log() {
    let sample = patched(false);
    let report = sample.flip(&[]);
    assert_eq!((report.findings, report.totals.data_blocks), (vec![], 8));
    for at in [4, HEADER as u64, HEADER as u64 + 256 + 8 + 4096] {
        let report = sample.flip(&[("log/0000", sample.tail + at)]);
        assert_eq!(report.findings, [], "{at}");
        assert_eq!(report.totals.data_blocks, 10, "{at}");
        assert_eq!(report.totals.log_start + report.totals.log_bytes, sample.tail, "{at}");
    }
}

#[test]
fn a_merged_layer_is_read_where_it_was() {
    let medium = SimMedium::default();
    let engine = new_sim(&medium);
    write(&engine, key(1, 0, 0), 1, 0, &[1, 2, 3]);
    engine.checkpoint().unwrap();
    write(&engine, key(1, 0, 1), 1, 1, &[4]);
    assert!(engine.merge(key(1, 0, 1).object, key(1, 0, 1).layer, key(1, 0, 0).layer).unwrap());
    engine.sync_log().unwrap();
    agrees(&medium, "merged");
    let sample = Sample { medium, replaced: 0, last: 0, direct: 0, tail: 0 };
    let found = sample.flip_for_one(&[("data", 2 * BLOCK_SIZE as u64)]);
    assert_eq!((found.layer, found.block), (Some(key(1, 0, 1)), Some(2)));
    assert_eq!(sample.flip(&[("data", BLOCK_SIZE as u64)]).findings, []);
    // The lower layer's table is gone: its blocks are, not the one of the upper.
    let (slot, _) = committed_slot(&sample, 0);
    let report = sample.flip(&[("sums", sums_offset(0, slot))]);
    assert_eq!(report.totals.damaged_blocks, 2);
    assert!(findings(&report, Severity::Damage).iter().all(|f| f.layer == Some(key(1, 0, 1))));
}
