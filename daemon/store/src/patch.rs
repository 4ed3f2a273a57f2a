//! Patching: a layer becomes another one by taking the bytes of the blocks that differ, in one
//! record, so that after a crash it is the old one or the new one.
//!
//! Whoever patches says what *all* blocks are afterwards. What stays is compared under the lock that
//! orders changes, so a patch never makes a layer that its version does not stand for (I5), whatever
//! the caller believed of it.

use std::collections::BTreeMap;

use sheepdog_types::{BLOCKS_PER_OBJECT, LayerKey, Version};

use crate::api::{BlockRange, BlockState, LayerDifference, LayerPatch, LayerSums};
use crate::check::{self, Picture};
use crate::engine::{Engine, Need};
use crate::error::{ReadError, WriteError};
use crate::format::{Header, Kind, crcs_to_bytes};
use crate::layer::{Entry, LayerState, Located, Place};
use crate::log::LogState;
use crate::states::Changes;
use crate::table::Sums;

impl Engine {
    /// See [`crate::Store::patch`].
    pub(crate) fn patch(
        &self,
        key: LayerKey,
        expect: Version,
        patch: &LayerPatch,
    ) -> Result<bool, WriteError> {
        if expect == Version::NONE {
            return Err(WriteError::Invalid("a patch of a layer that does not exist"));
        }
        let (picture, given) = check::patch(patch)?;
        let mut header = Header {
            count: given.len() as u32,
            key,
            prev: expect,
            version: patch.sums.version,
            ..Header::control(Kind::Patch)
        };
        let (mut log, changes) = loop {
            // Read without a lock; whether they still are the right ones shows under the lock.
            let (slab, sums) = self.committed_sums(key)?;
            let need = Need::of(&header, u32::from(BlockRange::ALL.count()));
            let log = self.lock_with_room(need, || {
                let version = self.table.shard_of(key.object).version(key);
                Ok((version == expect).then_some(()))
            })?;
            let Some(log) = log else { return Ok(false) };
            let shard = self.table.shard_of(key.object);
            let Some(layer) = shard.get(key) else { return Ok(false) };
            if layer.visible_base().map(|base| base.slab) != slab {
                continue;
            }
            let Some(changes) = changes(layer, sums.as_deref(), &picture, &given) else {
                return Ok(false);
            };
            let Some(slab) = layer.slab() else { return Ok(false) };
            header.slab = slab.slab;
            let held = layer.data_blocks;
            drop(shard);
            self.check_space(u64::from(picture.states.data_blocks().saturating_sub(held)))?;
            break (log, changes);
        };
        let stays = |block: &u16| changes.get(*block).is_none();
        if self.damage.of(key).iter().any(stays) {
            return Ok(false);
        }
        if header.version == expect && changes.iter().next().is_none() {
            return Ok(true);
        }
        let mut crcs = Vec::new();
        crcs_to_bytes(&given.values().copied().collect::<Vec<_>>(), &mut crcs);
        self.append(&mut log, &mut header, &[changes.bytes(), &crcs], &patch.data)?;
        self.apply_patch(&mut log, &header, &changes, given.into_values());
        self.finish(log);
        for range in BlockRange::of_blocks(changes.iter().map(|(block, _)| block)) {
            self.damage.heal(key, range.first(), range.end());
        }
        self.space_freed();
        Ok(true)
    }

    /// Publishes a patch of a layer that exists; also used by replay.
    pub(crate) fn apply_patch(
        &self,
        log: &mut LogState,
        header: &Header,
        changes: &Changes,
        mut crcs: impl Iterator<Item = u32>,
    ) {
        let mut lsn = header.data_lsn();
        let entry = |(block, state)| {
            let (mut crc, place) = (0, Place::Log(lsn).into());
            if state == BlockState::Data {
                crc = crcs.next().unwrap_or(0);
                lsn += sheepdog_types::BLOCK_SIZE as u64;
            }
            Entry { block, state, release: true, crc, place }
        };
        let entries: Vec<_> = changes.iter().map(entry).collect();
        let mut shard = self.table.shard_of(header.key.object);
        let layer = shard.get_or_insert(header.key);
        let old = (layer.version, layer.data_blocks);
        if layer.patch(log.generation, header.version, &entries) {
            log.dirty.push(header.key);
        }
        log.waiting += entries.len() as u64;
        self.table.count(header.key, old, (layer.version, layer.data_blocks));
    }

    /// See [`crate::Store::compare`].
    pub(crate) fn compare(
        &self,
        key: LayerKey,
        other: &LayerSums,
    ) -> Result<Option<LayerDifference>, ReadError> {
        let picture = Picture::of(other)
            .map_err(|_| ReadError::Invalid("sums that contradict themselves"))?;
        let Some(own) = self.sums(key)? else { return Ok(None) };
        let own_picture = Picture::of(&own)
            .map_err(|_| ReadError::Invalid("stored sums that contradict themselves"))?;
        let mut held = [None; BLOCKS_PER_OBJECT];
        for (block, crc) in own_picture.blocks {
            held[usize::from(block)] = Some(crc);
        }
        // At one version all bytes are the same (I5), but for damage, which must not be overlooked.
        let damaged = if own.version == other.version {
            self.scrub_layer(key).bad
        } else {
            self.damage.of(key)
        };
        damaged.iter().for_each(|block| held[usize::from(*block)] = None);
        let missing =
            picture.blocks.iter().filter(|(block, crc)| held[usize::from(*block)] != Some(*crc));
        let blocks = BlockRange::of_blocks(missing.map(|(block, _)| *block));
        Ok(Some(LayerDifference { version: own.version, blocks }))
    }
}

/// What has to change in `layer`, whose committed checksums are `sums`; `None` if it holds a block
/// that is neither given nor what it should be.
fn changes(
    layer: &LayerState,
    sums: Option<&Sums>,
    picture: &Picture,
    given: &BTreeMap<u16, u32>,
) -> Option<Changes> {
    let mut changes = Changes::default();
    let mut blocks = picture.blocks.iter();
    for block in 0..BlockRange::ALL.end() {
        let located = layer.locate(block);
        let state = picture.states.get(block);
        if state != BlockState::Data {
            if located.state() != state {
                changes.set(block, state);
            }
            continue;
        }
        let (_, crc) = blocks.next()?;
        if given.contains_key(&block) {
            changes.set(block, state);
            continue;
        }
        let stored = match located {
            Located::Data { crc, .. } => crc,
            Located::Base { .. } => sums?[usize::from(block)],
            Located::Absent | Located::Zero => return None,
        };
        if stored != *crc {
            return None;
        }
    }
    Some(changes)
}
