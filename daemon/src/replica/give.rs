//! What a disk gives to others that compare themselves with it or copy from it.

use super::{Answer, Disk, read_failure};
use sheepdog_cluster::message::{Failure, MAX_LISTING, Reject, Reply, Request, Run, Span};
use sheepdog_cluster::recovery::{Policy, slot_digest};
use sheepdog_cluster::view::View;
use sheepdog_store::{BlockRange, BlockRun, BlockState, ReadError};
use sheepdog_types::{DiskId, LayerKey, SlotId, Version};

/// Answers a request for a layer, its checksums, or some of its blocks.
pub(super) fn layer(disk: &Disk, request: &Request) -> Answer {
    match request {
        Request::Fetch { key } => whole(disk, *key),
        Request::Sums { key } => sums(disk, *key),
        Request::FetchBlocks { key, version, spans } => blocks(disk, *key, *version, spans),
        _ => Reject::Malformed.into(),
    }
}

fn whole(disk: &Disk, key: LayerKey) -> Answer {
    match disk.store.image(key) {
        Ok(Some(image)) => {
            let runs = image.sums.runs.iter().map(run_of).collect();
            let reply = Reply::Image { version: image.sums.version, runs };
            Answer { reply, crcs: image.sums.crcs, data: image.data }
        }
        Ok(None) => Reply::Image { version: Version::NONE, runs: Vec::new() }.into(),
        Err(error) => read_failure(disk.id, key, &error).into(),
    }
}

fn sums(disk: &Disk, key: LayerKey) -> Answer {
    match disk.store.sums(key) {
        Ok(Some(sums)) => {
            let runs = sums.runs.iter().map(run_of).collect();
            Reply::Sums { version: sums.version, runs, crcs: sums.crcs }.into()
        }
        Ok(None) => {
            Reply::Sums { version: Version::NONE, runs: Vec::new(), crcs: Vec::new() }.into()
        }
        Err(error) => read_failure(disk.id, key, &error).into(),
    }
}

fn run_of(run: &BlockRun) -> Run {
    let (first, count) = (run.range.first(), run.range.count());
    Run { first, count, zero: run.state == BlockState::Zero }
}

fn blocks(disk: &Disk, key: LayerKey, version: Version, spans: &[Span]) -> Answer {
    let ranges = spans.iter().map(|span| BlockRange::new(span.first, usize::from(span.count)));
    let Some(ranges) = ranges.collect::<Option<Vec<_>>>() else { return Reject::Malformed.into() };
    match disk.store.part(key, version, &ranges) {
        Ok(Some(part)) => {
            let reply = Reply::Data { count: part.crcs.len() as u16 };
            Answer { reply, crcs: part.crcs, data: part.data }
        }
        Ok(None) => {
            let have = disk.store.stat(key).map_or(Version::NONE, |stat| stat.version);
            Failure::Behind { have }.into()
        }
        Err(ReadError::Invalid(_)) => Reject::Malformed.into(),
        Err(error) => read_failure(disk.id, key, &error).into(),
    }
}

/// The digests of some slots of `disk`.
pub(super) fn digests(disk: &Disk, view: &View, policy: Policy, slots: &[SlotId]) -> Answer {
    let digest = |slot: &SlotId| {
        let stats = disk.store.list(*slot);
        let layers: Vec<(LayerKey, Version)> = stats.iter().map(|s| (s.key, s.version)).collect();
        slot_digest(view, policy, &layers)
    };
    Reply::Digests { digests: slots.iter().map(digest).collect() }.into()
}

/// The layers of `disk` in a window of slots that `holder` has to have too.
pub(super) fn list(
    disk: &Disk,
    view: &View,
    holder: DiskId,
    (from, to): (SlotId, SlotId),
    after: Option<LayerKey>,
) -> Answer {
    let mut layers = Vec::new();
    for slot in from.0..=to.0 {
        let mut stats = disk.store.list(SlotId(slot));
        stats.sort_unstable_by_key(|s| s.key);
        for stat in stats {
            let is_new = slot != from.0 || after.is_none_or(|key| stat.key > key);
            let wanted = view
                .volumes
                .get(&stat.key.object.volume)
                .is_some_and(|v| view.is_member(SlotId(slot), usize::from(v.spec.copies), holder));
            if is_new && wanted {
                if layers.len() == MAX_LISTING {
                    return Reply::Listing { layers, more: true }.into();
                }
                layers.push((stat.key, stat.version));
            }
        }
    }
    Reply::Listing { layers, more: false }.into()
}
