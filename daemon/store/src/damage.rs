//! Blocks that were found damaged, until something heals them.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use sheepdog_types::LayerKey;

use crate::engine::lock;

/// Damaged blocks that are remembered by place; further ones are only counted (I10).
const MAX_KNOWN: usize = 4096;

/// See the [module](self).
#[derive(Default)]
pub(crate) struct Damage {
    found: AtomicU64,
    any: AtomicBool,
    known: Mutex<BTreeSet<(LayerKey, u16)>>,
}

impl Damage {
    /// Remembers a damaged block.
    pub(crate) fn report(&self, key: LayerKey, block: u16) {
        let mut known = lock(&self.known);
        if known.contains(&(key, block)) {
            return;
        }
        self.found.fetch_add(1, Relaxed);
        if known.len() < MAX_KNOWN {
            known.insert((key, block));
            self.any.store(true, Relaxed);
        }
    }

    /// The blocks `first..end` of a layer are new, or were read and are right.
    pub(crate) fn heal(&self, key: LayerKey, first: u16, end: u16) {
        if !self.any.load(Relaxed) {
            return;
        }
        let mut known = lock(&self.known);
        let healed: Vec<_> = known.range((key, first)..(key, end)).copied().collect();
        for block in healed {
            known.remove(&block);
        }
        self.any.store(!known.is_empty(), Relaxed);
    }

    /// Known damaged blocks of a layer, ascending.
    pub(crate) fn of(&self, key: LayerKey) -> Vec<u16> {
        if !self.any.load(Relaxed) {
            return Vec::new();
        }
        let known = lock(&self.known);
        known.range((key, 0)..=(key, u16::MAX)).map(|(_, block)| *block).collect()
    }

    /// Blocks found damaged since the store was opened.
    pub(crate) fn found(&self) -> u64 {
        self.found.load(Relaxed)
    }

    /// Those that nothing healed yet.
    pub(crate) fn known(&self) -> Vec<(LayerKey, u16)> {
        lock(&self.known).iter().copied().collect()
    }
}
