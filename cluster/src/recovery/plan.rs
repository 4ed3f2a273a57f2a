//! What a disk has to do about one layer.
//!
//! Listings are taken one after the other while writes go on. A layer that is newer here than on
//! the sources may be a write that has reached this disk first: taking it back would undo what
//! this disk has acknowledged. So a version of the volume's present writer is never taken back. Its
//! gateway makes the replicas equal when it next opens the object.

use crate::view::{Disks, View, Waiting};
use sheepdog_types::{DiskId, LayerKey, Version};
use std::collections::BTreeMap;

/// The layers of some disks in some slots.
pub type Listings = BTreeMap<DiskId, BTreeMap<LayerKey, Version>>;

/// One step of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Copy the layer from `from`, unless it is no longer at `expect` here: then its gateway
    /// took care of it. A source that has no such layer (`target` is [`Version::NONE`]) means
    /// that it has to go here too (I9).
    Copy {
        /// Which.
        key: LayerKey,
        /// Version listed here.
        expect: Version,
        /// An authority that has the newest version.
        from: DiskId,
        /// That version.
        target: Version,
    },
    /// Delete the layer: its volume is gone, or it belongs elsewhere by now (I9).
    Delete {
        /// Which.
        key: LayerKey,
    },
}

/// Whether a disk has no business with a layer: its volume is gone, or it belongs elsewhere.
pub(super) fn is_leftover(view: &View, disk: DiskId, key: LayerKey) -> bool {
    match view.volumes.get(&key.object.volume) {
        Some(volume) => !view.may_hold(key.object.slot(), usize::from(volume.spec.copies), disk),
        // A volume younger than this view is no leftover.
        None => key.object.volume <= view.last_volume,
    }
}

/// What `disk` has to do about one layer, given the listings of the sources of its slot and its own.
/// Of several sources with the newest version, another one counts with each `attempt`: the copy of
/// one may be damaged.
///
/// # Errors
/// [`Waiting`] when nobody who is up can tell what is newest: those who are down may have layers that
/// nobody else has.
pub fn plan_layer(
    view: &View,
    disk: DiskId,
    listings: &Listings,
    key: LayerKey,
    attempt: usize,
) -> Result<Option<Action>, Waiting> {
    let version_on = |d: DiskId| listings.get(&d).and_then(|l| l.get(&key)).copied();
    let mine = version_on(disk);
    let volume = view.volumes.get(&key.object.volume);
    let Some(volume) = volume.filter(|_| !is_leftover(view, disk, key)) else {
        let leftover = mine.is_some() && is_leftover(view, disk, key);
        return Ok(leftover.then_some(Action::Delete { key }));
    };
    let (copies, slot) = (usize::from(volume.spec.copies), key.object.slot());
    let sources = view.sources(slot, copies, usize::from(volume.spec.min_copies))?;
    let versions = || sources.iter().map(|d| (version_on(d).unwrap_or(Version::NONE), d));
    let Some(target) = versions().map(|(version, _)| version).max() else { return Ok(None) };
    let newest: Disks =
        versions().filter(|(version, _)| *version == target).map(|(_, d)| d).collect();
    let from = newest.as_slice()[attempt % newest.len()];
    let expect = mine.unwrap_or(Version::NONE);
    let may_be_under_way = expect > target && expect.writer >= volume.writer;
    let equal = target == expect || may_be_under_way;
    Ok((!equal).then_some(Action::Copy { key, expect, from, target }))
}
