//! Merging a layer into the one above it: no block moves before the next checkpoint.

use std::sync::Arc;

use sheepdog_types::{Layer, LayerKey, ObjectId, Version};

use crate::api::{BlockRange, BlockState};
use crate::engine::{Engine, Need, lock};
use crate::error::WriteError;
use crate::format::{Header, Kind};
use crate::layer::{Entry, LayerState, Located, Place, SlabRef};
use crate::log::LogState;
use crate::table::Sums;

impl Engine {
    /// See [`crate::Store::merge`].
    pub(crate) fn merge(
        &self,
        object: ObjectId,
        upper: Layer,
        lower: Layer,
    ) -> Result<bool, WriteError> {
        if lower >= upper {
            return Err(WriteError::Invalid("a layer can only be merged into a newer one"));
        }
        let (key, lower_key) =
            (LayerKey { object, layer: upper }, LayerKey { object, layer: lower });
        let mut header = Header { key, lower, ..Header::control(Kind::Merge) };
        let (mut log, sums) = loop {
            // Read without a lock; whether it still is the right one shows under the lock.
            let (slab, sums) = self.committed_sums(lower_key)?;
            let need = Need::of(&header, u32::from(BlockRange::ALL.count()));
            let log = self.lock_with_room(need, || {
                let shard = self.table.shard_of(object);
                let both = [key, lower_key].map(|key| shard.version(key) != Version::NONE);
                Ok((both == [true; 2]).then_some(()))
            })?;
            let Some(log) = log else { return Ok(false) };
            let shard = self.table.shard_of(object);
            let source = shard.get(lower_key);
            if source.is_some_and(|layer| layer.has_changes_before(log.generation)) {
                // A checkpoint is moving its blocks out of the log. Wait for that.
                drop((shard, log));
                drop(lock(&self.checkpointer));
                continue;
            }
            if source.and_then(LayerState::visible_base).map(|base| base.slab) == slab {
                (header.prev, header.version) = (shard.version(key), shard.version(lower_key));
                header.slab = shard.get(key).and_then(LayerState::slab).map_or(0, |s| s.slab);
                drop(shard);
                break (log, sums);
            }
        };
        let moved = self.merge_entries(key, lower_key, sums.as_deref());
        let data = moved.iter().filter(|entry| entry.state == BlockState::Data).count();
        self.check_space(data as u64)?;
        self.append(&mut log, &mut header, &[], &[])?;
        self.apply_merge(&mut log, key, lower_key, &moved);
        self.finish(log);
        Ok(true)
    }

    /// The committed slab and checksums of a layer, read without a lock; whoever has locked it then
    /// compares the slab.
    pub(crate) fn committed_sums(
        &self,
        key: LayerKey,
    ) -> Result<(Option<SlabRef>, Option<Arc<Sums>>), WriteError> {
        let wanted = self.table.shard_of(key.object).get(key).and_then(|layer| layer.wanted(key));
        let Some(wanted) = wanted else { return Ok((None, None)) };
        match self.load_sums(&wanted) {
            Ok(sums) => Ok((Some(wanted.slab), Some(sums))),
            // It may have been replaced meanwhile: then the comparison of slabs tells.
            Err(error) if self.base_is(&wanted) => {
                Err(WriteError::Damaged { key, reason: error.to_string().into() })
            }
            Err(_) => Ok((Some(SlabRef::unused(u32::MAX)), None)),
        }
    }

    /// What absent blocks of `key` become when `lower` is merged into it; also used by replay.
    pub(crate) fn merge_entries(
        &self,
        key: LayerKey,
        lower: LayerKey,
        sums: Option<&Sums>,
    ) -> Vec<Entry> {
        let shard = self.table.shard_of(key.object);
        let (Some(upper), Some(lower)) = (shard.get(key), shard.get(lower)) else {
            return Vec::new();
        };
        let absent = |block: &u16| upper.locate(*block) == Located::Absent;
        let moved = (0..BlockRange::ALL.end()).filter(absent).filter_map(|block| {
            let located = lower.locate(block);
            let mut entry = Entry {
                block,
                state: located.state(),
                release: false,
                crc: 0,
                place: Place::Log(0).into(),
            };
            match located {
                Located::Absent => return None,
                Located::Zero => {}
                Located::Data { crc, place } => (entry.crc, entry.place) = (crc, place.into()),
                Located::Base { offset } => {
                    entry.crc = sums.map_or(0, |sums| sums[usize::from(block)]);
                    entry.place = Place::Slab(offset).into();
                }
            }
            Some(entry)
        });
        moved.collect()
    }

    /// Publishes a merge; also used by replay.
    pub(crate) fn apply_merge(
        &self,
        log: &mut LogState,
        key: LayerKey,
        lower: LayerKey,
        moved: &[Entry],
    ) {
        let mut shard = self.table.shard_of(key.object);
        let layer = shard.get_or_insert(key);
        let old = (layer.version, layer.data_blocks);
        if layer.absorb(log.generation, moved) {
            log.dirty.push(key);
        }
        log.waiting += moved.len() as u64;
        self.table.count(key, old, (layer.version, layer.data_blocks));
        drop(shard);
        self.apply_replace(log, lower, (Version::NONE, None), true, Vec::new());
    }
}
