//! The gateway of one attached volume: turns guest requests into calls to replicas.
//!
//! ```text
//!            all up disks fenced              a newer writer has the volume
//!   Fencing ─────────────────────► Serving ────────────────────────────────► Fenced
//!
//!   object:  closed ── Stat to all members ──► opening ── equal, or made equal ──► open
//!              ▲                                                                    │
//!              └── a member came back, was restarted, or is behind ─────────────────┘
//! ```
//!
//! *Opening* makes all up replicas of an object equal before it is first used in an epoch: the
//! newest version among the authorities counts (see [`View::slot`]), members at any other version
//! copy it. While an object is open, the gateway knows its version without asking; it numbers the
//! writes, sends each to all members in parallel, and acknowledges it when all have it (I2).
//!
//! The caller runs the effects in order. Calls to one node have to arrive in the order of the
//! effects while the node stays reachable; whatever is lost is sent again. A replica gives up what
//! it has received over a connection, and not begun, when the gateway connects again: otherwise an
//! old recovery could change a layer after the gateway asked for its version.

mod flush;
mod object;
mod open;
mod read;
mod reconcile;
mod request;
mod write;

use crate::command::Ack;
use crate::message::{Blocks, Call, Failure, Reject, Reply, Request as CallRequest};
use crate::slab::Slab;
use crate::view::{Disks, View};
use flush::FlushState;
use object::Object;
use read::ReadPiece;
use reconcile::Reconcile;
use request::GuestRequest;
use sheepdog_types::{
    Completion, DiskId, Epoch, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, Op, SlotId, Token,
    VolumeId, WriterGen,
};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

/// Most bytes of guest requests in progress; more wait in a queue (I10). The queue itself is
/// bounded by the front ends.
pub const MAX_ACTIVE_BYTES: u64 = 64 << 20;
/// Most guest requests in progress.
pub const MAX_ACTIVE_REQUESTS: usize = 1024;

/// What a gateway serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The node it runs on; its own disks are read first.
    pub node: NodeId,
    /// The volume.
    pub volume: VolumeId,
    /// Bytes.
    pub size: u64,
    /// Replicas of each object.
    pub copies: usize,
    /// Fewest replicas with which I/O goes on.
    pub min_copies: usize,
    /// The writable layer.
    pub layer: Layer,
    /// Writer generation of this attachment.
    pub writer: WriterGen,
    /// When writes are acknowledged.
    pub ack: Ack,
}

/// What the caller has to do, in order.
#[derive(Debug)]
pub enum Effect {
    /// Sends a call; its reply goes to [`Gateway::handle_reply`] with the same id.
    Call {
        /// Repeated by the reply.
        id: u64,
        /// Node of the disk; may be this node.
        node: NodeId,
        /// The call.
        call: Call,
        /// Its tail.
        blocks: Option<Arc<Blocks>>,
    },
    /// A guest request is done.
    Complete {
        /// Its token.
        token: Token,
        /// Its outcome.
        completion: Completion,
    },
    /// A newer writer has the volume: this request, which may have been carried out in part, is not done,
    /// and goes back to the caller.
    Return {
        /// The request.
        op: Op,
        /// Its token.
        token: Token,
    },
    /// Acknowledged writes of this object are gone from every replica: all of them restarted
    /// before a flush. The next flush fails; an operator should hear of it.
    LostWrites {
        /// The object.
        object: ObjectId,
    },
}

/// The blocks of a [`Reply::Data`], verified by whoever read them.
#[derive(Debug, Default)]
pub struct ReplyData {
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Where a gateway stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waits until every up disk promised not to serve older writers.
    Fencing,
    /// Serves I/O.
    Serving,
    /// A newer writer has the volume, or it was deleted: every request is returned.
    Fenced,
}

/// What a call was for.
#[derive(Debug)]
enum Purpose {
    Fence,
    Stat { object: ObjectIndex },
    Change { object: ObjectIndex },
    Write { object: ObjectIndex },
    Read(ReadPiece),
    Flush { request: u64 },
    Compare { slots: Vec<SlotId> },
}

#[derive(Debug)]
struct Pending {
    disk: DiskId,
    node: NodeId,
    purpose: Purpose,
}

/// Counters of what a gateway did, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Objects opened.
    pub opened: u64,
    /// Replicas made equal while opening.
    pub recovered: u64,
    /// Objects opened only because an earlier gateway may have left their replicas different.
    pub reconciled: u64,
    /// Calls sent again after a rejection or a lost connection.
    pub resent: u64,
    /// Replies to calls that were given up by then.
    pub stale_replies: u64,
    /// Blocks that a replica could not read for a wrong checksum.
    pub checksum_failures: u64,
}

/// The gateway of one attached volume. See the [module](self).
#[derive(Debug)]
pub struct Gateway {
    config: Config,
    view: Arc<View>,
    phase: Phase,
    fenced_disks: BTreeSet<DiskId>,
    objects: HashMap<ObjectIndex, Object>,
    /// Objects with work in progress.
    active: BTreeSet<ObjectIndex>,
    /// Objects to look at again at the next tick.
    retry: BTreeSet<ObjectIndex>,
    retry_reads: Vec<ReadPiece>,
    requests: Slab<GuestRequest>,
    rmws: Slab<write::ReadModifyWrite>,
    calls: Slab<Pending>,
    queue: VecDeque<(Op, Token)>,
    active_bytes: u64,
    unreachable: BTreeSet<NodeId>,
    flush: FlushState,
    /// What is left to look for after a takeover.
    reconcile: Option<Reconcile>,
    effects: VecDeque<Effect>,
    counters: Counters,
}

impl Gateway {
    /// A gateway that begins to fence older writers.
    #[must_use]
    pub fn new(config: Config, view: Arc<View>) -> Self {
        let epoch = view.epoch;
        let mut gateway = Self {
            config,
            view,
            phase: Phase::Fencing,
            fenced_disks: BTreeSet::new(),
            objects: HashMap::new(),
            active: BTreeSet::new(),
            retry: BTreeSet::new(),
            retry_reads: Vec::new(),
            requests: Slab::default(),
            rmws: Slab::default(),
            calls: Slab::default(),
            queue: VecDeque::new(),
            active_bytes: 0,
            unreachable: BTreeSet::new(),
            flush: FlushState::new(epoch),
            reconcile: None,
            effects: VecDeque::new(),
            counters: Counters::default(),
        };
        gateway.inherit_unflushed();
        gateway.inherit_unsettled();
        gateway.check_attachment();
        gateway.send_fences();
        gateway
    }

    /// Takes a request of the guest.
    pub fn handle_request(&mut self, op: Op, token: Token) {
        match self.phase {
            Phase::Fenced => self.effects.push_back(Effect::Return { op, token }),
            Phase::Fencing => self.queue.push_back((op, token)),
            Phase::Serving if self.is_full() => self.queue.push_back((op, token)),
            Phase::Serving => self.begin(op, token),
        }
    }

    /// Takes the reply to a call. `data` is the tail of a [`Reply::Data`].
    pub fn handle_reply(&mut self, id: u64, reply: Reply, data: ReplyData) {
        let Some(pending) = self.calls.remove(id) else {
            self.counters.stale_replies += 1;
            return;
        };
        if let Reply::Rejected(Reject::Fenced { newest }) = reply
            && newest > self.config.writer
        {
            self.fence_off();
            return;
        }
        let Pending { disk, purpose, .. } = pending;
        match purpose {
            Purpose::Fence => self.on_fence_reply(disk, &reply),
            Purpose::Stat { object } => self.on_stat_reply(object, disk, &reply),
            Purpose::Change { object } => self.on_change_reply(object, disk, &reply),
            Purpose::Write { object } => self.on_write_reply(object, disk, id, &reply),
            Purpose::Read(piece) => self.on_read_reply(piece, disk, &reply, data),
            Purpose::Flush { request } => self.on_flush_reply(request, disk, &reply),
            Purpose::Compare { slots } => self.on_digests(&slots, &reply),
        }
        self.drain_queue();
        self.reconcile();
    }

    /// Takes a new revision of the cluster.
    pub fn handle_view(&mut self, view: Arc<View>) {
        if view.revision <= self.view.revision {
            return;
        }
        self.view = view;
        self.check_attachment();
        if self.phase == Phase::Fenced {
            return;
        }
        let gone: Vec<NodeId> = self.unreachable.iter().copied().collect();
        for node in gone {
            if !self.view.nodes.get(&node).is_some_and(|n| n.up) {
                self.unreachable.remove(&node); // it announces itself when it is back
            }
        }
        self.resend_fences();
        self.review_flushes();
        for object in self.active.clone() {
            self.review_object(object);
        }
        self.resend_reads();
        self.drain_queue();
        self.review_reconcile();
        self.reconcile();
    }

    /// The connection to `node` was lost, or cannot be made: its calls have no reply.
    pub fn handle_unreachable(&mut self, node: NodeId) {
        self.unreachable.insert(node);
        let lost: Vec<u64> =
            self.calls.iter().filter(|(_, p)| p.node == node).map(|(id, _)| id).collect();
        for id in lost {
            let Some(pending) = self.calls.remove(id) else { continue };
            match pending.purpose {
                // Another replica may answer now.
                Purpose::Read(piece) => self.dispatch_read(piece),
                Purpose::Stat { object } | Purpose::Change { object } => {
                    self.abandon_opening(object);
                }
                Purpose::Compare { .. } => self.compare_later(),
                // Sent again when the node is reachable or out of the epoch.
                Purpose::Fence | Purpose::Write { .. } | Purpose::Flush { .. } => {}
            }
        }
        self.drain_queue(); // reads may have ended with an error
    }

    /// `node` can be reached again: what it did not answer is sent again, in order.
    pub fn handle_reachable(&mut self, node: NodeId) {
        if !self.unreachable.remove(&node) {
            return;
        }
        self.resend_fences();
        for object in self.active.clone() {
            self.resume_object(object);
        }
        self.resend_flushes();
        self.resend_reads();
        self.drain_queue();
    }

    /// Tries again what was rejected for a passing reason. Call it every few tens of
    /// milliseconds while [`Gateway::wants_tick`] says so.
    pub fn handle_tick(&mut self) {
        self.resend_fences();
        for object in std::mem::take(&mut self.retry) {
            self.resume_object(object);
        }
        self.resend_flushes();
        self.resend_reads();
        self.drain_queue();
        self.compare_again();
        self.reconcile();
    }

    /// Whether something waits for [`Gateway::handle_tick`].
    #[must_use]
    pub fn wants_tick(&self) -> bool {
        !self.retry.is_empty()
            || !self.retry_reads.is_empty()
            || self.flush.retry
            || self.reconcile.as_ref().is_some_and(Reconcile::wants_tick)
            || (self.phase == Phase::Fencing && self.calls.is_empty())
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Whether no guest request is in progress or queued.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.queue.is_empty()
    }

    /// Whether all replicas of all objects are equal, as far as they are up: nothing that earlier gateways
    /// may have left different is still to be looked at, and nothing is under way.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let busy = |index| self.objects.get(index).is_some_and(Object::is_busy);
        self.phase == Phase::Serving && self.reconcile.is_none() && !self.active.iter().any(busy)
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What it serves.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What it did so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Objects whose I/O waits for replicas, for people.
    #[must_use]
    pub fn blocked_objects(&self) -> usize {
        self.active.iter().filter(|o| self.slot_of(**o).is_none()).count()
    }

    /// Returns everything, in progress or queued, and everything from now on.
    pub fn fence_off(&mut self) {
        self.phase = Phase::Fenced;
        self.objects.clear();
        self.rmws = Slab::default();
        self.calls = Slab::default();
        let ids: Vec<u64> = self.requests.iter().map(|(id, _)| id).collect();
        let begun = ids.into_iter().filter_map(|id| self.requests.remove(id)?.take_back());
        let begun: Vec<(Op, Token)> = begun.collect();
        for (op, token) in begun.into_iter().chain(std::mem::take(&mut self.queue)) {
            self.effects.push_back(Effect::Return { op, token });
        }
        self.active.clear();
        self.retry.clear();
        self.retry_reads.clear();
        self.flush = FlushState::new(self.view.epoch);
        self.reconcile = None;
        self.active_bytes = 0;
        self.effects.retain(|effect| !matches!(effect, Effect::Call { .. }));
    }

    fn check_attachment(&mut self) {
        let current = self.view.volumes.get(&self.config.volume);
        if current.is_none_or(|v| v.writer > self.config.writer) {
            self.fence_off();
        }
    }

    fn send_fences(&mut self) {
        if self.phase != Phase::Fencing {
            return;
        }
        let waiting: Vec<DiskId> = self
            .view
            .disks
            .iter()
            .filter(|(id, d)| d.up && !self.fenced_disks.contains(id))
            .map(|(id, _)| *id)
            .collect();
        if waiting.is_empty() {
            self.phase = Phase::Serving;
            self.drain_queue();
        }
        let volume = self.config.volume;
        for disk in waiting {
            self.call(disk, CallRequest::Fence { volume }, None, Purpose::Fence);
        }
    }

    fn resend_fences(&mut self) {
        if self.phase == Phase::Fencing {
            self.forget_calls(|p| matches!(p, Purpose::Fence));
            self.send_fences();
        }
    }

    fn on_fence_reply(&mut self, disk: DiskId, reply: &Reply) {
        if *reply == Reply::Done {
            self.fenced_disks.insert(disk);
        }
        if self.calls.is_empty() && *reply == Reply::Done {
            self.send_fences();
        }
    }

    /// Emits a call, unless its node cannot be reached; gives its id.
    fn call(
        &mut self,
        disk: DiskId,
        request: CallRequest,
        blocks: Option<Arc<Blocks>>,
        purpose: Purpose,
    ) -> Option<u64> {
        let node = self.view.node_of(disk)?;
        if self.unreachable.contains(&node) {
            return None;
        }
        let call = Call { epoch: self.view.epoch, disk, writer: self.config.writer, request };
        let id = self.calls.insert(Pending { disk, node, purpose });
        self.effects.push_back(Effect::Call { id, node, call, blocks });
        Some(id)
    }

    /// Gives calls up: their replies will be ignored.
    fn forget_calls(&mut self, which: impl Fn(&Purpose) -> bool) {
        let ids: Vec<u64> =
            self.calls.iter().filter(|(_, p)| which(&p.purpose)).map(|(id, _)| id).collect();
        for id in ids {
            self.calls.remove(id);
        }
    }

    fn complete(&mut self, token: Token, completion: Completion) {
        self.effects.push_back(Effect::Complete { token, completion });
    }

    fn is_full(&self) -> bool {
        !self.queue.is_empty()
            || self.active_bytes >= MAX_ACTIVE_BYTES
            || self.requests.len() >= MAX_ACTIVE_REQUESTS
    }

    fn drain_queue(&mut self) {
        while self.phase == Phase::Serving
            && self.active_bytes < MAX_ACTIVE_BYTES
            && self.requests.len() < MAX_ACTIVE_REQUESTS
        {
            let Some((op, token)) = self.queue.pop_front() else { return };
            self.begin(op, token);
        }
    }

    fn object_id(&self, index: ObjectIndex) -> ObjectId {
        ObjectId { volume: self.config.volume, index }
    }

    fn key(&self, index: ObjectIndex) -> LayerKey {
        LayerKey { object: self.object_id(index), layer: self.config.layer }
    }

    /// The members of an object's slot, if it can be served in this epoch.
    fn slot_of(&self, index: ObjectIndex) -> Option<crate::view::SlotView> {
        let slot = self.object_id(index).slot();
        self.view.slot(slot, self.config.copies, self.config.min_copies).ok()
    }

    /// Whether the object is only on its way to a disk, which the cluster can do without: when that
    /// has no room, it says so, and the move waits.
    fn is_to_come(&self, index: ObjectIndex, disk: DiskId) -> bool {
        !self.view.home(self.object_id(index).slot(), self.config.copies).contains(disk)
    }

    /// The members of an object that is open in this epoch.
    fn open_members(&self, index: ObjectIndex) -> Option<Disks> {
        let object = self.objects.get(&index)?;
        let verified = object.verified?;
        if object.opening().is_some() {
            return None;
        }
        let slot = self.slot_of(index)?;
        (verified == self.view.epoch || self.view.unbroken_since(verified, &slot.members))
            .then_some(slot.members)
    }

    fn epoch(&self) -> Epoch {
        self.view.epoch
    }
}

/// Whether a reply only says "not now".
fn is_passing(reply: &Reply) -> bool {
    matches!(
        reply,
        Reply::Rejected(
            Reject::StaleEpoch { .. } | Reject::NotYet { .. } | Reject::NoLease | Reject::NotMember
        ) | Reply::Failed(Failure::Busy | Failure::Source)
    )
}
