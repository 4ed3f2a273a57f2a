//! How a disk gets everything that it must hold: after it joined, came back or got new slots, and
//! now and then to make sure.
//!
//! ```text
//!   idle ── the agreed state wants it ──► comparing ──► copying ──► cleaning ──► flush, Synced ──► idle
//!              ▲                              │ digests    │ listings, layers        │
//!              └────────── a new epoch ───────┴────────────┴── something failed ─────┘ (again later)
//! ```
//!
//! *Comparing*: for each slot the disk asks the slot's sources ([`View::sources`]) for a digest of
//! their layers. What equals all of them is done: a source had every write that counts when it
//! answered, and writes of this epoch reach this disk by themselves. *Copying*: of the slots that differ,
//! it gets the sources' listings and copies the layers whose versions differ ([`plan_layer`]).
//! *Cleaning*: it deletes what it has no more business with. Then it flushes, because from now on it
//! counts as holding what others may have flushed long ago, and proposes
//! [`Synced`](Command::Synced).
//!
//! A slot for which nobody knows what is newest keeps only itself waiting: all others are done
//! meanwhile. A slot is compared in a time that depends on its digest, not on its data, so to begin
//! again with each epoch, or after a restart, costs next to nothing.
//!
//! The gateways need not wait for any of this. They make each object equal when they open it.
//!
//! The caller runs the effects in any order, and answers each exactly once.

mod pass;
mod plan;

use crate::command::Command;
use crate::message::{Call, Failure, Reply};
use crate::state::Volume;
use crate::view::{View, Waiting};
use pass::Pass;
pub(crate) use pass::used_slots;
pub use plan::{Action, Listings, plan_layer};
use sheepdog_types::{DiskId, LayerKey, NodeId, SlotId, Version, hash64};
use std::collections::VecDeque;
use std::sync::Arc;

/// Most slots that one [`Request::Digests`](crate::message::Request::Digests) names.
pub const MAX_DIGESTS: usize = 1024;

/// Number of copies and fewest copies of some volumes: these share their replicas in each slot.
pub type Policy = (u8, u8);

/// What the machine asks of its own disk at once.
pub trait Local {
    /// All layers in `slot`.
    fn layers(&self, slot: SlotId) -> Vec<(LayerKey, Version)>;

    /// All layers, in any order.
    fn keys(&self) -> Vec<LayerKey>;
}

/// What the caller has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Ask another disk; the answer goes to [`Recovery::handle_reply`].
    Call {
        /// Repeated by the answer.
        id: u64,
        /// Node of the disk; may be this node.
        node: NodeId,
        /// The call.
        call: Call,
    },
    /// Carry out one step on this disk, in the epoch of the pass; the outcome goes to
    /// [`Recovery::handle_done`].
    Act {
        /// Repeated by the outcome.
        id: u64,
        /// The step.
        action: Action,
    },
    /// Make the disk durable, then propose the command; the outcome goes to [`Recovery::handle_done`].
    Finish {
        /// Repeated by the outcome.
        id: u64,
        /// What to propose; nothing after a check.
        command: Option<Command>,
    },
}

/// Where a recovery stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// The disk lacks nothing.
    #[default]
    Idle,
    /// Digests are being compared.
    Comparing,
    /// Layers are being copied.
    Copying,
    /// What does not belong here is being deleted.
    Cleaning,
    /// The disk is being flushed, and the others told.
    Finishing,
    /// All that can be done is done; the rest is tried again later.
    Waiting,
}

/// How far a recovery is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Where it stands.
    pub stage: Stage,
    /// The operator stopped it.
    pub paused: bool,
    /// It is only a check: the disk counts as complete.
    pub check: bool,
    /// Slots that the disk has to hold.
    pub slots_total: u64,
    /// Slots of these that were found equal or made equal.
    pub slots_done: u64,
    /// Layers copied or deleted.
    pub layers_done: u64,
    /// Layers that are known to differ still.
    pub layers_left: u64,
    /// Slots that nobody can tell the newest content of, and an example why.
    pub blocked: Option<(u64, Waiting)>,
    /// Why the last attempt was not the last one.
    pub problem: Option<Failure>,
}

/// The recovery of one disk. See the [module](self).
#[derive(Debug)]
pub struct Recovery {
    disk: DiskId,
    node: NodeId,
    view: Arc<View>,
    pass: Option<Pass>,
    /// Ticks until a pass that did not succeed is tried again, and how many it was last time.
    wait: u32,
    patience: u32,
    /// Attempts in this epoch: another one asks other sources for the layers.
    attempts: usize,
    progress: Progress,
    effects: VecDeque<Effect>,
    next_id: u64,
}

/// Longest wait between attempts, in ticks.
const MAX_PATIENCE: u32 = 64;

impl Recovery {
    /// The recovery of `disk`, which is part of `node`.
    #[must_use]
    pub fn new(node: NodeId, disk: DiskId, view: Arc<View>) -> Self {
        Self {
            disk,
            node,
            view,
            pass: None,
            wait: 0,
            patience: 1,
            attempts: 0,
            progress: Progress::default(),
            effects: VecDeque::new(),
            next_id: 0,
        }
    }

    /// Takes a new revision of the cluster. Answers to what was asked in an earlier epoch are ignored
    /// from then on.
    pub fn handle_view(&mut self, view: Arc<View>) {
        let epoch_ended = view.epoch != self.view.epoch;
        self.view = view;
        if epoch_ended || !self.is_wanted() && !self.progress.check {
            self.stop();
            // What was in the way then need not be any more.
            self.progress.problem = None;
            (self.wait, self.patience, self.attempts) = (0, 1, 0);
        }
        self.progress.paused = self.view.settings.recovery_paused;
    }

    /// Compares the disk with its peers although nothing says that it differs. Does nothing while
    /// it has to do so anyway.
    pub fn check(&mut self) {
        let complete = self.view.disks.get(&self.disk).is_some_and(|d| d.up) && !self.is_wanted();
        if self.pass.is_none() && complete {
            self.begin(true);
        }
    }

    /// Time passes: call it every few hundred milliseconds while [`Recovery::wants_tick`] says so.
    pub fn handle_tick(&mut self) {
        if let Some(pass) = &mut self.pass {
            pass.ask_again();
        }
        self.wait = self.wait.saturating_sub(1);
    }

    /// Whether something waits for [`Recovery::handle_tick`].
    #[must_use]
    pub fn wants_tick(&self) -> bool {
        self.wait > 0 || self.pass.as_ref().is_some_and(Pass::has_unanswered)
    }

    /// Takes the answer to a call; `None` when there will be none.
    pub fn handle_reply(&mut self, id: u64, reply: Option<Reply>) {
        if let Some(pass) = &mut self.pass {
            pass.handle_reply(id, reply, &self.view);
        }
    }

    /// Takes the outcome of an [`Effect::Act`] or [`Effect::Finish`]. That a layer moved on meanwhile
    /// is a success: its gateway took care of it.
    pub fn handle_done(&mut self, id: u64, outcome: Result<(), Failure>) {
        let Some(pass) = &mut self.pass else { return };
        match pass.handle_done(id, outcome, &mut self.progress) {
            pass::Done::GoOn => {}
            pass::Done::Finished => {
                self.stop();
                self.progress.problem = None;
                self.patience = 1;
            }
            pass::Done::Failed => self.fail(),
        }
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self, local: &impl Local) -> Option<Effect> {
        if self.pass.is_none() && self.is_wanted() && self.wait == 0 {
            self.begin(false);
        }
        if self.effects.is_empty()
            && let Some(pass) = &mut self.pass
        {
            let context = pass::Context {
                disk: self.disk,
                view: &self.view,
                local,
                next_id: &mut self.next_id,
                effects: &mut self.effects,
                progress: &mut self.progress,
            };
            if !pass.advance(context) {
                self.fail();
            }
        }
        self.effects.pop_front()
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The epoch of the pass under way.
    #[must_use]
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    fn is_wanted(&self) -> bool {
        self.view.disks.get(&self.disk).is_some_and(|d| d.up && d.sync_from.is_some())
    }

    fn begin(&mut self, check: bool) {
        let incarnation = self.view.nodes.get(&self.node).map_or(0, |n| n.incarnation);
        let pass = Pass::new(&self.view, check, incarnation, self.attempts);
        self.attempts += 1;
        let paused = self.view.settings.recovery_paused;
        let problem = self.progress.problem.take();
        self.progress = Progress { check, paused, problem, ..Progress::default() };
        self.pass = Some(pass);
    }

    fn stop(&mut self) {
        self.pass = None;
        self.effects.clear();
        self.progress.stage = Stage::Idle;
        self.progress.check = false;
    }

    /// Gives this attempt up: what failed may work later.
    fn fail(&mut self) {
        let check = self.progress.check;
        self.stop();
        if !check {
            self.progress.stage = Stage::Waiting;
            self.wait = self.patience;
            self.patience = (2 * self.patience).min(MAX_PATIENCE);
        }
    }
}

/// A digest of the layers of one slot that belong to volumes of `policy`: equal for disks that hold the
/// same layers at the same versions, and else, but for one chance in 2^64, different.
#[must_use]
pub fn slot_digest(view: &View, policy: Policy, layers: &[(LayerKey, Version)]) -> u64 {
    let belongs = |key: &LayerKey| {
        view.volumes.get(&key.object.volume).is_some_and(|v| policy_of(v) == policy)
    };
    let hash = |(key, version): &(LayerKey, Version)| {
        let words = [
            key.object.volume.0,
            u64::from(key.object.index.0),
            u64::from(key.layer.0),
            version.writer.0,
            version.seq,
        ];
        words.into_iter().fold(0x5EED, |hash, word| hash64(hash ^ word))
    };
    layers.iter().filter(|(key, _)| belongs(key)).map(hash).fold(0, u64::wrapping_add)
}

/// The policy of a volume.
#[must_use]
pub fn policy_of(volume: &Volume) -> Policy {
    (volume.spec.copies, volume.spec.min_copies)
}
