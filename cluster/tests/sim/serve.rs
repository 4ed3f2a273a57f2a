//! What replicas do with the calls that reach them.

use super::net::Origin;
use super::node::Disk;
use super::store::Write;
use super::world::{Mutant, World};
use sheepdog_cluster::message::{Blocks, Call, Failure, Reject, Reply, Request};
use sheepdog_cluster::recovery::{Local, slot_digest};
use sheepdog_cluster::replica;
use sheepdog_types::{LayerKey, SlotId, VolumeId, WriterGen};

fn volume_of(request: &Request) -> Option<VolumeId> {
    match request {
        Request::Write { key, .. } | Request::Stat { key } | Request::Recover { key, .. } => {
            Some(key.object.volume)
        }
        Request::Read { object, .. } => Some(object.volume),
        Request::Fence { volume } => Some(*volume),
        _ => None,
    }
}

impl World {
    pub fn admit(&self, node: usize, call: &Call) -> Result<(), Reject> {
        let view = self.view_of(node);
        let (id, mut lease) = (self.nodes[node].id, self.serves(node));
        if !matches!(self.mutant, Mutant::SkipEpoch | Mutant::NotFenced) {
            return replica::admit(view, id, lease, call);
        }
        let mut call = call.clone();
        if self.mutant == Mutant::SkipEpoch {
            (call.epoch, lease) = (view.epoch, true);
        }
        if self.mutant == Mutant::NotFenced
            && call.writer != WriterGen(0)
            && let Some(volume) = volume_of(&call.request).and_then(|v| view.volumes.get(&v))
        {
            if let Request::Write { version, .. } = &mut call.request {
                version.writer = volume.writer;
            }
            call.writer = volume.writer;
        }
        replica::admit(view, id, lease, &call)
    }

    /// A change of a layer found no space. That is a reason to refuse a write, unless data are only on
    /// their way to this disk.
    pub fn note_refusal(&mut self, at: usize, key: LayerKey) {
        let Disk { id, node, ref mut store, .. } = self.disks[at];
        store.refused = true;
        let view = self.view_of(node);
        let Some(volume) = view.volumes.get(&key.object.volume) else { return };
        if view.home(key.object.slot(), usize::from(volume.spec.copies)).contains(id) {
            self.full_at = Some(self.now);
        }
    }

    /// What a replica answers to a call that it admitted; nothing while it copies.
    pub fn serve(
        &mut self,
        call: &Call,
        blocks: Option<&Blocks>,
        origin: Option<Origin>,
    ) -> Option<(Reply, Vec<u8>)> {
        let at = self.disk_index(call.disk);
        if !self.disks[at].used && !matches!(call.request, Request::Fence { .. }) {
            return Some((Reply::Failed(Failure::Disk), Vec::new()));
        }
        let mutant = self.mutant;
        let store = &mut self.disks[at].store;
        let mut data = Vec::new();
        let reply = match &call.request {
            Request::Write { key, prev, version, first, body } => {
                if mutant == Mutant::AckBeforeApply && self.rng.chance(30) {
                    return Some((Reply::Done, data));
                }
                let (key, prev, version) = (*key, *prev, *version);
                let write = Write { key, prev, version, first: *first, body: *body, blocks };
                let reply = store.write(&write, mutant == Mutant::SkipPrev, &mut self.rng);
                if reply == Reply::Failed(Failure::NoSpace) {
                    self.note_refusal(at, key);
                }
                reply
            }
            Request::Read { object, layer, first, count } => {
                let key = LayerKey { object: *object, layer: *layer };
                match store.read(key, *first, *count) {
                    Ok(bytes) => {
                        data = bytes;
                        Reply::Data { count: *count }
                    }
                    Err(_) if mutant == Mutant::ReadDamaged => {
                        data = vec![0xDB; usize::from(*count) * 4096];
                        Reply::Data { count: *count }
                    }
                    Err(block) => Reply::Failed(Failure::Checksum { block }),
                }
            }
            Request::Stat { key } => {
                let mut version = store.version(*key);
                if mutant == Mutant::WatermarkTooHigh && version.writer < call.writer {
                    let all = self.disks.iter().map(|disk| disk.store.version(*key));
                    version = all.max().unwrap_or(version);
                }
                self.cancel_copies(at, *key);
                Reply::Version { version }
            }
            Request::Flush => {
                if mutant != Mutant::FlushLies {
                    store.flush();
                }
                Reply::Done
            }
            Request::Recover { .. } if mutant == Mutant::RecoverNothing => Reply::Done,
            Request::Recover { key, expect, from, target } => {
                let have = store.version(*key);
                if have == *expect {
                    let origin = origin.unwrap_or(Origin::Nobody);
                    let versions = (*expect, *target);
                    self.start_copy(at, *key, versions, *from, Some(call.clone()), origin);
                    return None;
                }
                Reply::Failed(Failure::Behind { have })
            }
            Request::Fence { .. } => Reply::Done,
            Request::Digests { slots, .. } if mutant == Mutant::NoReconcile => {
                Reply::Digests { digests: vec![0; slots.len()] }
            }
            Request::Digests { policy, slots } => {
                let view = self.view_of(self.disks[at].node);
                let digest = |s: &SlotId| slot_digest(view, *policy, &self.disks[at].layers(*s));
                Reply::Digests { digests: slots.iter().map(digest).collect() }
            }
            other => panic!("a gateway never asks {other:?}"),
        };
        Some((reply, data))
    }
}
