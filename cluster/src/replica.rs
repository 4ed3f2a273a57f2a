//! What a replica checks before it touches its disk.

use crate::message::{Body, Call, Reject, Request, Span};
use crate::recovery::MAX_DIGESTS;
use crate::state::Volume;
use crate::view::View;
use sheepdog_types::{
    BLOCKS_PER_OBJECT, DiskId, Layer, NodeId, OBJECT_SIZE, ObjectId, VolumeId, WriterGen,
};

/// Decides whether `node` may serve `call` in this view.
///
/// A replica that cannot prove that it is part of the caller's epoch neither reads nor writes
/// (I1, I8), and never serves a writer older than the newest it knows (I4).
///
/// # Errors
/// [`Reject`]; nothing was done.
pub fn admit(view: &View, node: NodeId, has_lease: bool, call: &Call) -> Result<(), Reject> {
    if !has_lease {
        return Err(Reject::NoLease);
    }
    if call.epoch < view.epoch {
        return Err(Reject::StaleEpoch { now: view.epoch });
    }
    if call.epoch > view.epoch {
        return Err(Reject::NotYet { now: view.epoch });
    }
    if !view.disks.get(&call.disk).is_some_and(|d| d.node == node && d.up) {
        return Err(Reject::NotMember);
    }
    match &call.request {
        Request::Write { key, prev, version, first, body } => {
            if *body != Body::Nothing {
                check_blocks(*first, body.count())?;
            }
            if version.writer != call.writer || version.seq <= prev.seq {
                return Err(Reject::Malformed);
            }
            check_layer(view, call, key.object, key.layer)
        }
        Request::Read { object, layer, first, count } => {
            check_blocks(*first, *count)?;
            check_layer(view, call, *object, *layer)
        }
        Request::Stat { key } | Request::Recover { key, .. } => {
            check_layer(view, call, key.object, key.layer)
        }
        Request::Fence { volume } => check_writer(find(view, *volume)?, call.writer),
        Request::Fetch { key } | Request::Sums { key } => {
            check_place(view, call.disk, key.object).map(|_| ())
        }
        Request::FetchBlocks { key, spans, .. } => {
            check_spans(spans)?;
            check_place(view, call.disk, key.object).map(|_| ())
        }
        Request::List { from, to, .. } if from > to => Err(Reject::Malformed),
        Request::Digests { slots, .. } if slots.len() > MAX_DIGESTS => Err(Reject::Malformed),
        Request::Flush | Request::List { .. } | Request::Digests { .. } => Ok(()),
    }
}

fn check_blocks(first: u16, count: u16) -> Result<(), Reject> {
    let end = usize::from(first) + usize::from(count);
    if count == 0 || end > BLOCKS_PER_OBJECT { Err(Reject::Malformed) } else { Ok(()) }
}

/// Some blocks, each once, in order: so they are never more than an object.
fn check_spans(spans: &[Span]) -> Result<(), Reject> {
    let ends_before = |pair: &[Span]| {
        u32::from(pair[0].first) + u32::from(pair[0].count) <= u32::from(pair[1].first)
    };
    if spans.is_empty() || !spans.windows(2).all(ends_before) {
        return Err(Reject::Malformed);
    }
    spans.iter().try_for_each(|span| check_blocks(span.first, span.count))
}

fn check_layer(view: &View, call: &Call, object: ObjectId, layer: Layer) -> Result<(), Reject> {
    let volume = check_place(view, call.disk, object)?;
    check_writer(volume, call.writer)?;
    if layer == volume.layer { Ok(()) } else { Err(Reject::Malformed) }
}

fn check_place(view: &View, disk: DiskId, object: ObjectId) -> Result<&Volume, Reject> {
    let volume = find(view, object.volume)?;
    if u64::from(object.index.0) * OBJECT_SIZE >= volume.spec.size {
        return Err(Reject::Malformed);
    }
    if view.is_member(object.slot(), usize::from(volume.spec.copies), disk) {
        Ok(volume)
    } else {
        Err(Reject::NotMember)
    }
}

fn check_writer(volume: &Volume, writer: WriterGen) -> Result<(), Reject> {
    match writer.cmp(&volume.writer) {
        std::cmp::Ordering::Less => Err(Reject::Fenced { newest: volume.writer }),
        std::cmp::Ordering::Equal => Ok(()),
        // The attach was agreed, this node has just not heard of it.
        std::cmp::Ordering::Greater => Err(Reject::NoVolume),
    }
}

fn find(view: &View, volume: VolumeId) -> Result<&Volume, Reject> {
    view.volumes.get(&volume).map(AsRef::as_ref).ok_or(Reject::NoVolume)
}
