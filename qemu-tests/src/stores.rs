//! What is on the disks of stopped nodes, and whether all replicas are the same, to the byte.
//!
//! `sheep check` says that every block matches its checksum, `sheep dump` where each layer lies. States and
//! bytes are read from the files as `docs/on-disk.md` describes them, without code of the store.

use crate::{Cluster, PATIENCE, binary, eventually, run};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const BLOCK: usize = 4096;
const BLOCKS: usize = 1024;
/// In an index record: 2 bits for each block.
const STATES: std::ops::Range<usize> = 64..320;
/// Reading all of a disk.
const LIMIT: std::time::Duration = PATIENCE.saturating_mul(4);

/// One block of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Absent,
    Zero,
    /// A hash of its bytes.
    Data(u64),
}

/// A layer of an object as one disk has it.
#[derive(Debug, PartialEq, Eq)]
struct Replica {
    version: String,
    blocks: Vec<Block>,
}

/// What one disk holds: layer (as `sheep dump` names it) → replica.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    layers: BTreeMap<String, Replica>,
}

/// What all disks hold, all replicas being equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Equal {
    /// Different layers.
    pub layers: usize,
    /// Their replicas.
    pub replicas: usize,
    /// Blocks with data, of all replicas.
    pub blocks: usize,
}

impl Store {
    /// Reads the disk in `dir`, whose daemon does not run; panics if anything there is damaged. Nothing if
    /// its log holds blocks that are not in their place yet.
    pub fn read(dir: &Path) -> Option<Self> {
        check(dir);
        let dump = sheep("dump", dir);
        let items: Vec<Value> = dump
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect();
        let of_kind = |kind: &'static str| items.iter().filter(move |item| item["kind"] == kind);
        // As it is with the log, and as it is in its place.
        let state = |item: &Value| (text(&item["layer"]), text(&item["version"]));
        let [with_log, placed] =
            ["layer", "slab"].map(|kind| of_kind(kind).map(state).collect::<BTreeSet<_>>());
        if with_log != placed || of_kind("layer").any(|layer| layer["changed_blocks"] != 0) {
            return None;
        }
        let layers: BTreeMap<_, _> =
            of_kind("slab").map(|slab| (text(&slab["layer"]), read_layer(dir, slab))).collect();
        Some(Self { dir: dir.to_owned(), layers })
    }

    /// How many layers it holds.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }
}

/// Reads everything on a disk whose daemon does not run; it must be clean. Gives what was found.
pub fn check(dir: &Path) -> Value {
    let report = sheep("check", dir);
    serde_json::from_str(&report).unwrap_or_else(|e| panic!("{e}: {report}"))
}

fn sheep(command: &str, dir: &Path) -> String {
    let args = [command, "--json", dir.to_str().unwrap_or_else(|| panic!("{}", dir.display()))];
    let done = run(binary("sheep"), args, LIMIT);
    assert_eq!(done.code, Some(0), "sheep {command}: {}{}", done.stdout, done.stderr);
    done.stdout
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}

fn read_layer(dir: &Path, slab: &Value) -> Replica {
    let number = |name: &str| slab[name].as_u64().unwrap_or_else(|| panic!("no {name} in {slab}"));
    let read = |file: &str, bytes: &mut [u8], at: u64| {
        let path = dir.join(file);
        let done = File::open(&path).and_then(|file| file.read_exact_at(bytes, at));
        done.unwrap_or_else(|e| panic!("{} at {at}: {e}", path.display()));
    };
    let mut record = [0; 512];
    read("index", &mut record, number("offset"));
    let states = &record[STATES];
    let mut bytes = vec![0; BLOCK];
    let block = |index: usize| match (states[index / 4] >> (2 * (index % 4))) & 3 {
        0 => Block::Absent,
        1 => {
            read("data", &mut bytes, number("data_offset") + (index * BLOCK) as u64);
            let mut hasher = DefaultHasher::new();
            bytes.hash(&mut hasher);
            Block::Data(hasher.finish())
        }
        2 => Block::Zero,
        state => panic!("{}: block {index} of {slab} has state {state}", dir.display()),
    };
    let blocks: Vec<_> = (0..BLOCKS).map(block).collect();
    let data = blocks.iter().filter(|block| matches!(block, Block::Data(_))).count();
    assert_eq!(data as u64, number("data_blocks"), "{}: {slab}", dir.display());
    Replica { version: text(&slab["version"]), blocks }
}

/// Each layer is on just `copies` of the disks, at the same version, with the same bytes; panics with what
/// differs otherwise.
pub fn compare(stores: &[Store], copies: usize) -> Equal {
    let mut layers: BTreeMap<&str, Vec<(&Path, &Replica)>> = BTreeMap::new();
    for store in stores {
        for (layer, replica) in &store.layers {
            layers.entry(layer).or_default().push((&store.dir, replica));
        }
    }
    let mut wrong = Vec::new();
    let mut equal = Equal { layers: layers.len(), ..Equal::default() };
    for (layer, replicas) in &layers {
        equal.replicas += replicas.len();
        let data = |r: &Replica| r.blocks.iter().filter(|b| matches!(b, Block::Data(_))).count();
        equal.blocks += replicas.iter().map(|(_, replica)| data(replica)).sum::<usize>();
        if replicas.len() != copies {
            let dirs: Vec<_> = replicas.iter().map(|(dir, r)| (dir, &r.version)).collect();
            wrong.push(format!(
                "layer {layer}: {} instead of {copies} replicas: {dirs:?}",
                dirs.len()
            ));
        }
        for other in &replicas[1..] {
            wrong.extend(difference(layer, replicas[0], *other));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differences:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
    equal
}

fn difference(layer: &str, one: (&Path, &Replica), other: (&Path, &Replica)) -> Option<String> {
    if one.1 == other.1 {
        return None;
    }
    let blocks: Vec<_> = (0..BLOCKS)
        .filter(|block| one.1.blocks[*block] != other.1.blocks[*block])
        .map(|block| (block, one.1.blocks[block], other.1.blocks[block]))
        .collect();
    Some(format!(
        "layer {layer}: version {} in {}, {} in {}; {} blocks differ: {:?}",
        one.1.version,
        one.0.display(),
        other.1.version,
        other.0.display(),
        blocks.len(),
        &blocks[..blocks.len().min(4)]
    ))
}

impl Cluster {
    /// Stops all running nodes in order and compares the replicas on their disks.
    pub fn stop_and_compare(&mut self, copies: usize) -> Equal {
        let nodes: Vec<_> = (0..self.len()).filter(|index| self.runs(*index)).collect();
        self.terminate_all();
        let mut stores = Vec::new();
        for node in nodes {
            for dir in self.stores(node) {
                stores.push(self.read_store(node, &dir));
            }
        }
        compare(&stores, copies)
    }

    /// Reads a disk of a node that does not run.
    ///
    /// A daemon that stops syncs its log, but may leave it to the next one to apply it. Alone, without the
    /// others, a node changes nothing else.
    pub fn read_store(&mut self, node: usize, dir: &Path) -> Store {
        eventually(&format!("{} to be in order", dir.display()), LIMIT, || {
            let store = Store::read(dir);
            if store.is_none() {
                self.restart(node);
                self.terminate(node);
            }
            store
        })
    }
}
