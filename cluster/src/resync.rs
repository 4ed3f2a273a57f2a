//! What a disk has to do to hold everything that it must hold.
//!
//! A disk that joined, came back, or got new slots compares itself with its peers, a window of
//! slots at a time, and copies what differs from an authority. Writes of the current epoch reach
//! it meanwhile; whatever they touch is made equal by their gateway first.
//!
//! Listings are taken one after the other while writes go on. A layer that is newer here than on
//! the authorities may be a write that has reached this disk first: taking it back would undo what
//! this disk has acknowledged. So a version of the volume's present writer is never taken back. Its
//! gateway makes the replicas equal when it next opens the object.
//!
//! The caller has to
//! - take all listings and run all actions in the epoch of `view`, and begin again when it ends;
//! - flush the disk before it proposes `Synced`: only then does it count as holding what others
//!   may have flushed long ago.

use crate::view::{Disks, View, Waiting};
use sheepdog_types::{DiskId, LayerKey, SlotId, Version};
use std::collections::{BTreeMap, BTreeSet};

/// Slots compared at once.
pub const WINDOW: u16 = 1024;

/// The layers of some disks in a window of slots.
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

/// The windows of slots, first and last slot each.
pub fn windows() -> impl Iterator<Item = (SlotId, SlotId)> {
    (0..=u16::MAX / WINDOW).map(|n| (SlotId(n * WINDOW), SlotId(n * WINDOW + (WINDOW - 1))))
}

/// The disks that `disk` has to ask for their listings.
#[must_use]
pub fn peers(view: &View, disk: DiskId) -> Vec<DiskId> {
    view.disks.iter().filter(|(id, d)| **id != disk && d.up).map(|(id, _)| *id).collect()
}

/// What `disk` has to do, given the listings of all slots of itself and of all its [`peers`]:
/// [`plan_window`] for all slots at once.
///
/// # Errors
/// [`Waiting`] when nobody who is up can tell what is newest in some slot.
pub fn plan(view: &View, disk: DiskId, listings: &Listings) -> Result<Vec<Action>, Waiting> {
    plan_window(view, disk, (SlotId(0), SlotId(u16::MAX)), listings)
}

/// What `disk` has to do in a window of slots, given the listings of these slots of itself and of
/// all its [`peers`].
///
/// # Errors
/// [`Waiting`] when nobody who is up can tell what is newest in some slot of the window, whether
/// anybody lists a layer there or not: those who are down may have layers that nobody else has.
pub fn plan_window(
    view: &View,
    disk: DiskId,
    window: (SlotId, SlotId),
    listings: &Listings,
) -> Result<Vec<Action>, Waiting> {
    check_slots(view, disk, window)?;
    let keys: BTreeSet<LayerKey> = listings.values().flat_map(|l| l.keys().copied()).collect();
    let mut actions = Vec::new();
    for key in keys {
        if let Some(action) = plan_layer(view, disk, listings, key, 0)? {
            actions.push(action);
        }
    }
    Ok(actions)
}

fn check_slots(view: &View, disk: DiskId, window: (SlotId, SlotId)) -> Result<(), Waiting> {
    let specs = view.volumes.values().map(|v| &v.spec);
    let policies: BTreeSet<(usize, usize)> =
        specs.map(|s| (usize::from(s.copies), usize::from(s.min_copies))).collect();
    for slot in (window.0.0..=window.1.0).map(SlotId) {
        for &(copies, min_copies) in &policies {
            if view.is_member(slot, copies, disk) {
                view.sources(slot, copies, min_copies)?;
            }
        }
    }
    Ok(())
}

/// Whether a disk has no business with a layer: its volume is gone, or it belongs elsewhere.
pub(crate) fn is_leftover(view: &View, disk: DiskId, key: LayerKey) -> bool {
    match view.volumes.get(&key.object.volume) {
        Some(volume) => !view.is_member(key.object.slot(), usize::from(volume.spec.copies), disk),
        // A volume younger than this view is no leftover.
        None => key.object.volume <= view.last_volume,
    }
}

/// What `disk` has to do about one layer, given the listings of the sources of its slot and its own.
/// Of several sources with the newest version, another one counts with each `attempt`: the copy of
/// one may be damaged.
pub(crate) fn plan_layer(
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
