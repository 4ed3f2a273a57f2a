//! Making a layer equal to another disk's: what differs is found by checksums, and only that is
//! moved and written.

use super::copies::Right;
use super::{Answer, Disk, Replica, give};
use crate::cluster::lock;
use sheepdog_cluster::message::{Failure, Reply, Request, Run, Span, frame_bytes};
use sheepdog_store::{
    BlockRange, BlockRun, BlockState, LayerImage, LayerPatch, LayerSums, WriteError,
};
use sheepdog_types::{DiskId, Epoch, LayerKey, Version, WriterGen};
use std::ops::AddAssign;
use std::time::Duration;

/// Tries of a request while the views of the two nodes differ.
const ASK_TRIES: usize = 50;
const ASK_PAUSE: Duration = Duration::from_millis(20);
/// Tries of a recovery while the layer changes between its steps, here or there.
const TRIES: usize = 5;
/// If more blocks differ, the whole layer is copied: an install writes each block once, a patch
/// twice.
const MOST_PATCHED: usize = 512;

/// What to copy from where.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// The layer.
    pub key: LayerKey,
    /// Its version here.
    pub expect: Version,
    /// The disk to copy from.
    pub from: DiskId,
    /// The version there; none means that the layer has to go here.
    pub target: Version,
}

/// What recoveries moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Layers that were changed or deleted.
    pub layers: u64,
    /// Blocks that came from another disk.
    pub blocks: u64,
    /// Bytes that came from another disk: the blocks, checksums, and what the messages add.
    pub bytes: u64,
}

impl AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        self.layers += other.layers;
        self.blocks += other.blocks;
        self.bytes += other.bytes;
    }
}

/// On what condition a copy is put in place.
#[derive(Clone, Copy)]
struct Terms {
    epoch: Epoch,
    right: Right,
    /// Who waits for it; 0 when nobody does.
    writer: WriterGen,
    /// Nothing but the target version will do.
    exact: bool,
}

/// How a layer becomes what it is at the source.
enum Change {
    Delete,
    Install(LayerImage),
    Patch(LayerPatch),
}

impl Change {
    /// The version at the source.
    fn version(&self) -> Version {
        match self {
            Self::Delete => Version::NONE,
            Self::Install(image) => image.sums.version,
            Self::Patch(patch) => patch.sums.version,
        }
    }
}

/// What became of a change.
enum Placed {
    Done,
    /// The layer is at another version.
    MovedOn,
    /// The layer is not what its sums said.
    Unlike,
}

impl Replica {
    /// Makes a layer equal to another disk's, if it still is at the expected version here and the
    /// epoch has not ended. A gateway's call has a ticket that a later call makes void, its writer, and wants
    /// exactly the target version; without one, a newer version is as good. No layer is counted as
    /// moved when it went on meanwhile.
    ///
    /// # Errors
    /// [`Failure`]; the layer is as it was.
    pub fn recover(
        &self,
        disk: &Disk,
        copy: Copy,
        epoch: Epoch,
        gateway: Option<(u64, WriterGen)>,
    ) -> Result<Moved, Failure> {
        if let Some((ticket, writer)) = gateway {
            let right = Right::Ticket(ticket);
            return self.bring(disk, copy, Terms { epoch, right, writer, exact: true });
        }
        let own = self.copies.begin(disk.id, copy.key);
        let (right, writer) = (own.right(), WriterGen(0));
        self.bring(disk, copy, Terms { epoch, right, writer, exact: false })
    }

    /// Replaces what is damaged of a layer by what disk `from` holds at the same `version`. All that
    /// is stored of the layer is read and verified for that.
    ///
    /// # Errors
    /// [`Failure::Behind`] if the layer is at another version here, [`Failure::Source`] if it is at
    /// another there or damaged in the same blocks; the layer is as it was.
    pub fn repair(
        &self,
        disk: &Disk,
        key: LayerKey,
        from: DiskId,
        version: Version,
        epoch: Epoch,
    ) -> Result<Moved, Failure> {
        let copy = Copy { key, expect: version, from, target: version };
        let own = self.copies.begin(disk.id, key);
        let (right, writer) = (own.right(), WriterGen(0));
        self.bring(disk, copy, Terms { epoch, right, writer, exact: true })
    }

    fn bring(&self, disk: &Disk, copy: Copy, terms: Terms) -> Result<Moved, Failure> {
        if copy.from == disk.id {
            return Err(Failure::Source);
        }
        let mut moved = Moved::default();
        let mut may_patch = copy.expect != Version::NONE;
        for _ in 0..TRIES {
            if version_of(disk, copy.key) != copy.expect {
                return self.settle(disk, &copy, terms).map(|()| moved);
            }
            let change = if may_patch {
                self.obtain_difference(disk, &copy, terms, &mut moved)?
            } else {
                Some(self.obtain_whole(&copy, terms, &mut moved)?)
            };
            // The source went on between two answers, or the layer here.
            let Some(change) = change else { continue };
            match self.put_in_place(disk, &copy, terms, &change)? {
                Placed::Done => {
                    moved.layers += 1;
                    return Ok(moved);
                }
                Placed::MovedOn => return self.settle(disk, &copy, terms).map(|()| moved),
                Placed::Unlike => may_patch = false,
            }
        }
        Err(Failure::Source)
    }

    /// The layer is not at the expected version: says what that means.
    fn settle(&self, disk: &Disk, copy: &Copy, terms: Terms) -> Result<(), Failure> {
        let wanted = self.copies.place(disk.id, copy.key, terms.right).is_some();
        if !wanted || !self.is_current(terms.epoch) {
            return Err(Failure::Source);
        }
        let have = version_of(disk, copy.key);
        // A repeated call finds its work done.
        if terms.exact && have != copy.target { Err(Failure::Behind { have }) } else { Ok(()) }
    }

    fn is_current(&self, epoch: Epoch) -> bool {
        let view = self.cluster.view();
        self.cluster.may_serve(&view) && view.epoch == epoch
    }

    fn put_in_place(
        &self,
        disk: &Disk,
        copy: &Copy,
        terms: Terms,
        change: &Change,
    ) -> Result<Placed, Failure> {
        let Copy { key, expect, .. } = *copy;
        // Held while the copy is put in place: whoever gives it up waits for that.
        let placing = self.copies.place(disk.id, key, terms.right);
        if placing.is_none()
            || !fits(copy, terms, change.version())
            || !self.is_current(terms.epoch)
        {
            return Err(Failure::Source);
        }
        let expected = (expect != Version::NONE).then_some(expect);
        let outcome = match (change, expected) {
            (Change::Delete, Some(expected)) => disk.store.delete_at(key, expected),
            (Change::Delete, None) => Ok(true),
            (Change::Install(image), expected) => disk.store.install(key, expected, image),
            (Change::Patch(patch), _) => match disk.store.patch(key, expect, patch) {
                Ok(false) if version_of(disk, key) == expect => return Ok(Placed::Unlike),
                Err(WriteError::Damaged { .. } | WriteError::Invalid(_)) => {
                    return Ok(Placed::Unlike);
                }
                outcome => outcome,
            },
        };
        match outcome {
            Ok(true) => Ok(Placed::Done),
            Ok(false) => Ok(Placed::MovedOn),
            Err(error) => Err(disk.write_failure(&error)),
        }
    }

    /// Finds out what differs and gets that; `None` if the layer changes meanwhile.
    fn obtain_difference(
        &self,
        disk: &Disk,
        copy: &Copy,
        terms: Terms,
        moved: &mut Moved,
    ) -> Result<Option<Change>, Failure> {
        let Copy { key, expect, from, .. } = *copy;
        let answer = self.ask(from, terms, &Request::Sums { key }, moved)?;
        let Reply::Sums { version, runs, crcs } = answer.reply else {
            return Err(no_source(copy, &answer.reply));
        };
        if !fits(copy, terms, version) {
            return Err(Failure::Source);
        }
        if version == Version::NONE {
            return Ok(Some(Change::Delete));
        }
        let sums = sums_of(version, &runs, crcs).ok_or(Failure::Source)?;
        let difference = match disk.store.compare(key, &sums) {
            Ok(Some(difference)) if difference.version == expect => difference,
            Ok(_) => return Ok(None),
            Err(error) => {
                tracing::info!(%key, disk = %disk.id, %error, "copying the whole layer");
                return self.obtain_whole(copy, terms, moved).map(Some);
            }
        };
        let blocks = difference.blocks;
        if blocks.iter().map(|range| usize::from(range.count())).sum::<usize>() > MOST_PATCHED {
            return self.obtain_whole(copy, terms, moved).map(Some);
        }
        if blocks.is_empty() {
            return Ok(Some(Change::Patch(LayerPatch { sums, blocks, data: Vec::new() })));
        }
        let span = |range: &BlockRange| Span { first: range.first(), count: range.count() };
        let spans = blocks.iter().map(span).collect();
        let request = Request::FetchBlocks { key, version, spans };
        let answer = self.ask(from, terms, &request, moved)?;
        match answer.reply {
            Reply::Data { .. } => {
                Ok(Some(Change::Patch(LayerPatch { sums, blocks, data: answer.data })))
            }
            Reply::Failed(Failure::Behind { .. }) => Ok(None),
            reply => Err(no_source(copy, &reply)),
        }
    }

    fn obtain_whole(
        &self,
        copy: &Copy,
        terms: Terms,
        moved: &mut Moved,
    ) -> Result<Change, Failure> {
        let answer = self.ask(copy.from, terms, &Request::Fetch { key: copy.key }, moved)?;
        let Reply::Image { version, runs } = answer.reply else {
            return Err(no_source(copy, &answer.reply));
        };
        if version == Version::NONE {
            return Ok(Change::Delete);
        }
        let sums = sums_of(version, &runs, answer.crcs).ok_or(Failure::Source)?;
        Ok(Change::Install(LayerImage { sums, data: answer.data }))
    }

    /// Asks the source, again while the two ends are in different epochs or it is busy.
    fn ask(
        &self,
        from: DiskId,
        terms: Terms,
        request: &Request,
        moved: &mut Moved,
    ) -> Result<Answer, Failure> {
        for _ in 0..ASK_TRIES {
            let view = self.cluster.view();
            if view.epoch != terms.epoch {
                return Err(Failure::Source);
            }
            let node = view.node_of(from).ok_or(Failure::Source)?;
            let answer = if node == self.cluster.node {
                give::layer(&*self.disk(from).ok_or(Failure::Source)?, request)
            } else {
                let peers = lock(&self.peers).upgrade().ok_or(Failure::Source)?;
                let answer = peers.ask_for(terms.writer, &view, from, request.clone());
                answer.map_err(|_| Failure::Source)?
            };
            moved.blocks += answer.crcs.len() as u64;
            moved.bytes += frame_bytes(&answer.reply) as u64;
            match answer.reply {
                Reply::Rejected(_) | Reply::Failed(Failure::Busy) => {
                    // One of the two is about to hear of the newer view.
                    if self.cluster.view().revision == view.revision {
                        std::thread::sleep(ASK_PAUSE);
                    }
                }
                _ => return Ok(answer),
            }
        }
        Err(Failure::Source)
    }
}

fn version_of(disk: &Disk, key: LayerKey) -> Version {
    disk.store.stat(key).map_or(Version::NONE, |stat| stat.version)
}

/// Whether the source's version is one that was asked for.
fn fits(copy: &Copy, terms: Terms, version: Version) -> bool {
    version >= copy.target && (!terms.exact || version == copy.target)
}

fn no_source(copy: &Copy, reply: &Reply) -> Failure {
    let Copy { key, from, .. } = copy;
    tracing::warn!(%key, disk = %from, ?reply, "cannot copy from this replica");
    Failure::Source
}

fn sums_of(version: Version, runs: &[Run], crcs: Vec<u32>) -> Option<LayerSums> {
    let run = |r: &Run| {
        let range = BlockRange::new(r.first, usize::from(r.count))?;
        let state = if r.zero { BlockState::Zero } else { BlockState::Data };
        Some(BlockRun { range, state })
    };
    let runs = runs.iter().map(run).collect::<Option<Vec<_>>>()?;
    Some(LayerSums { version, runs, crcs })
}
