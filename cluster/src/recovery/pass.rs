//! One attempt to make a disk complete, in one epoch.

use super::plan::{Action, Listings, is_leftover, plan_layer};
use super::{Effect, Local, MAX_DIGESTS, Policy, Progress, Stage, policy_of, slot_digest};
use crate::command::Command;
use crate::message::{Call, Failure, Reply, Request};
use crate::state::Volume;
use crate::view::{Disks, View};
use sheepdog_types::{
    DiskId, Epoch, LayerKey, OBJECT_SIZE, ObjectId, ObjectIndex, SLOTS, SlotId, Version, WriterGen,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

/// Slots compared at once.
const WINDOW: u32 = MAX_DIGESTS as u32;
/// Slots whose layers are listed at once.
const BATCH: u16 = 64;
/// Most calls without an answer.
const MAX_ASKED: usize = 16;

/// What an attempt works with.
pub(super) struct Context<'a, L> {
    pub disk: DiskId,
    pub view: &'a Arc<View>,
    pub local: &'a L,
    pub next_id: &'a mut u64,
    pub effects: &'a mut VecDeque<Effect>,
    pub progress: &'a mut Progress,
}

impl<L> Context<'_, L> {
    fn id(&mut self) -> u64 {
        *self.next_id += 1;
        *self.next_id
    }
}

/// What came of an outcome.
pub(super) enum Done {
    GoOn,
    Finished,
    Failed,
}

/// Something to ask another disk.
#[derive(Clone, Debug)]
struct Question {
    peer: DiskId,
    request: Request,
}

/// A slot that is being compared.
#[derive(Debug)]
struct Tally {
    mine: u64,
    missing: usize,
    differs: bool,
}

/// Slots whose layers are being listed.
#[derive(Debug)]
struct Batch {
    slots: Vec<(SlotId, Policy)>,
    listings: Listings,
    missing: usize,
}

#[derive(Debug)]
pub(super) struct Pass {
    epoch: Epoch,
    check: bool,
    incarnation: u64,
    attempt: usize,
    /// One bit for each slot that an object of a volume can be in.
    used: Vec<u64>,
    policies: Vec<Policy>,
    stage: Stage,
    next_slot: u32,
    questions: VecDeque<Question>,
    asked: HashMap<u64, Question>,
    /// Asked in vain; asked again at the next tick.
    unanswered: Vec<Question>,
    tallies: BTreeMap<(SlotId, Policy), Tally>,
    different: BTreeSet<(SlotId, Policy)>,
    batch: Option<Batch>,
    /// Steps to take, each with the number of its batch.
    actions: VecDeque<(Action, u64)>,
    running: HashMap<u64, u64>,
    /// Steps not finished and slots of each batch.
    open_batches: BTreeMap<u64, (usize, u64)>,
    batches: u64,
    failed: bool,
    full: bool,
    /// The last step. Those of an earlier pass may end while it is under way.
    finish: Option<u64>,
}

impl Pass {
    pub fn new(view: &View, check: bool, incarnation: u64, attempt: usize) -> Self {
        let policies: BTreeSet<Policy> = view.volumes.values().map(|v| policy_of(v)).collect();
        Self {
            epoch: view.epoch,
            check,
            incarnation,
            attempt,
            used: used_slots(view.volumes.values().map(AsRef::as_ref)),
            policies: policies.into_iter().collect(),
            stage: Stage::Comparing,
            next_slot: 0,
            questions: VecDeque::new(),
            asked: HashMap::new(),
            unanswered: Vec::new(),
            tallies: BTreeMap::new(),
            different: BTreeSet::new(),
            batch: None,
            actions: VecDeque::new(),
            running: HashMap::new(),
            open_batches: BTreeMap::new(),
            batches: 0,
            failed: false,
            full: false,
            finish: None,
        }
    }

    pub fn has_unanswered(&self) -> bool {
        !self.unanswered.is_empty()
    }

    pub fn ask_again(&mut self) {
        self.questions.extend(self.unanswered.drain(..));
    }

    pub fn handle_reply(&mut self, id: u64, reply: Option<Reply>, view: &View) {
        let Some(question) = self.asked.remove(&id) else { return };
        match (&question.request, reply) {
            (Request::Digests { slots, policy }, Some(Reply::Digests { digests }))
                if slots.len() == digests.len() =>
            {
                for (slot, digest) in slots.iter().zip(digests) {
                    self.note_digest((*slot, *policy), digest);
                }
            }
            (Request::List { .. }, Some(Reply::Listing { layers, more })) => {
                self.note_listing(&question, layers, more);
            }
            // Not now, or never: then the peer leaves the epoch sooner or later.
            _ => self.unanswered.push(question),
        }
        debug_assert_eq!(self.epoch, view.epoch, "a pass ends with its epoch");
    }

    fn note_digest(&mut self, slot: (SlotId, Policy), digest: u64) {
        let Some(tally) = self.tallies.get_mut(&slot) else { return };
        tally.missing -= 1;
        tally.differs |= tally.mine != digest;
        if tally.missing == 0 {
            let differs = tally.differs;
            self.tallies.remove(&slot);
            if differs {
                self.different.insert(slot);
            }
        }
    }

    fn note_listing(&mut self, question: &Question, layers: Vec<(LayerKey, Version)>, more: bool) {
        let (Some(batch), Request::List { holder, to, .. }) = (&mut self.batch, &question.request)
        else {
            return;
        };
        let next = layers.last().map(|(last, _)| *last).filter(|_| more);
        batch.listings.entry(question.peer).or_default().extend(layers);
        match next {
            Some(last) => self.questions.push_back(Question {
                peer: question.peer,
                request: Request::List {
                    holder: *holder,
                    from: last.object.slot(),
                    to: *to,
                    after: Some(last),
                },
            }),
            None => batch.missing -= 1,
        }
    }

    pub fn handle_done(
        &mut self,
        id: u64,
        outcome: Result<(), Failure>,
        progress: &mut Progress,
    ) -> Done {
        if self.finish == Some(id) {
            return match outcome {
                Ok(()) => Done::Finished,
                Err(failure) => {
                    progress.problem = Some(failure);
                    Done::Failed
                }
            };
        }
        let Some(batch) = self.running.remove(&id) else { return Done::GoOn };
        progress.layers_left = progress.layers_left.saturating_sub(1);
        match outcome {
            Ok(()) | Err(Failure::Behind { .. }) => progress.layers_done += 1,
            Err(failure) => {
                progress.problem = Some(failure);
                self.failed = true;
                self.full |= failure == Failure::NoSpace;
            }
        }
        self.note_step(batch, progress);
        Done::GoOn
    }

    fn note_step(&mut self, batch: u64, progress: &mut Progress) {
        if let Some((steps, slots)) = self.open_batches.get_mut(&batch) {
            *steps -= 1;
            if *steps == 0 {
                progress.slots_done += *slots;
                self.open_batches.remove(&batch);
            }
        }
    }

    /// Does what can be done now. False when the attempt is over and was not enough.
    pub fn advance<L: Local>(&mut self, mut context: Context<'_, L>) -> bool {
        match self.stage {
            Stage::Comparing => self.compare(&mut context),
            Stage::Copying => self.copy(&mut context),
            Stage::Cleaning => self.clean(&mut context),
            Stage::Finishing | Stage::Idle | Stage::Waiting => {}
        }
        if self.stage == Stage::Cleaning && self.next_slot as usize == SLOTS && self.rests() {
            if self.failed || context.progress.blocked.is_some() {
                return false;
            }
            self.stage = Stage::Finishing;
            let command = Command::Synced {
                disk: context.disk,
                incarnation: self.incarnation,
                basis: self.epoch,
                at: 0,
            };
            let id = context.id();
            self.finish = Some(id);
            let command = (!self.check).then_some(command);
            context.effects.push_back(Effect::Finish { id, command });
        }
        context.progress.stage = self.stage;
        true
    }

    fn rests(&self) -> bool {
        self.questions.is_empty()
            && self.asked.is_empty()
            && self.unanswered.is_empty()
            && self.actions.is_empty()
            && self.running.is_empty()
    }

    fn compare<L: Local>(&mut self, context: &mut Context<'_, L>) {
        while (self.next_slot as usize) < SLOTS
            && self.questions.is_empty()
            && self.asked.len() + self.unanswered.len() < MAX_ASKED
        {
            self.compare_window(context);
            self.ask(context);
        }
        self.ask(context);
        if self.next_slot as usize == SLOTS && self.rests() {
            (self.stage, self.next_slot) = (Stage::Copying, 0);
            let different = self.different.len() as u64;
            let blocked = context.progress.blocked.as_ref().map_or(0, |(slots, _)| *slots);
            context.progress.slots_done = context.progress.slots_total - different - blocked;
            self.copy(context);
        }
    }

    fn compare_window<L: Local>(&mut self, context: &mut Context<'_, L>) {
        let window = self.next_slot..(self.next_slot + WINDOW).min(SLOTS as u32);
        self.next_slot = window.end;
        let mut questions: BTreeMap<(DiskId, Policy), Vec<SlotId>> = BTreeMap::new();
        let used = |slot: &SlotId| self.used[usize::from(slot.0) / 64] >> (slot.0 % 64) & 1 == 1;
        for slot in window.map(|slot| SlotId(slot as u16)).filter(used) {
            let mut layers = None;
            for &policy in &self.policies {
                let Some(sources) = self.sources(slot, policy, context) else { continue };
                if sources.is_empty() {
                    continue;
                }
                let layers = layers.get_or_insert_with(|| context.local.layers(slot));
                let mine = slot_digest(context.view, policy, layers);
                let tally = Tally { mine, missing: sources.len(), differs: false };
                self.tallies.insert((slot, policy), tally);
                for source in sources.iter() {
                    questions.entry((source, policy)).or_default().push(slot);
                }
            }
        }
        self.questions.extend(questions.into_iter().map(|((peer, policy), slots)| Question {
            peer,
            request: Request::Digests { policy, slots },
        }));
    }

    /// The other disks that know what is newest in a slot; `None` when it is not this disk's business,
    /// or nobody knows. Counts what it sees.
    fn sources<L>(
        &self,
        slot: SlotId,
        (copies, min_copies): Policy,
        context: &mut Context<'_, L>,
    ) -> Option<Disks> {
        if !context.view.is_member(slot, usize::from(copies), context.disk) {
            return None;
        }
        context.progress.slots_total += 1;
        match context.view.sources(slot, usize::from(copies), usize::from(min_copies)) {
            Ok(mut sources) => {
                sources.remove(context.disk);
                Some(sources)
            }
            Err(waiting) => {
                let blocked = context.progress.blocked.get_or_insert((0, waiting));
                blocked.0 += 1;
                None
            }
        }
    }

    fn ask<L>(&mut self, context: &mut Context<'_, L>) {
        while self.asked.len() < MAX_ASKED
            && let Some(question) = self.questions.pop_front()
        {
            let Some(node) = context.view.node_of(question.peer) else { continue };
            let id = context.id();
            let call = Call {
                epoch: self.epoch,
                disk: question.peer,
                writer: WriterGen(0),
                request: question.request.clone(),
            };
            self.asked.insert(id, question);
            context.effects.push_back(Effect::Call { id, node, call });
        }
    }

    fn copy<L: Local>(&mut self, context: &mut Context<'_, L>) {
        if self.full {
            // Whatever would be copied now would be thrown away again.
            self.different.clear();
            self.actions.clear();
            (self.batch, self.questions) = (None, VecDeque::new());
            self.unanswered.clear();
            self.asked.clear();
        }
        let limit = usize::from(context.view.settings.recovery_max_objects.max(1));
        let nothing_left =
            self.different.is_empty() && self.batch.is_none() && self.actions.is_empty();
        if context.view.settings.recovery_paused && !nothing_left {
            return;
        }
        loop {
            if self.batch.as_ref().is_some_and(|batch| batch.missing == 0) {
                self.plan_batch(context);
            }
            if self.batch.is_some() || self.different.is_empty() || self.actions.len() >= limit {
                break;
            }
            self.begin_batch(context);
        }
        self.ask(context);
        self.act(context, limit);
        if self.different.is_empty() && self.batch.is_none() && self.rests() {
            (self.stage, self.next_slot) = (Stage::Cleaning, 0);
            if self.check {
                self.next_slot = SLOTS as u32;
            }
            self.clean(context);
        }
    }

    fn begin_batch<L>(&mut self, context: &mut Context<'_, L>) {
        let Some(&(from, _)) = self.different.first() else { return };
        let end = SlotId(from.0.saturating_add(BATCH - 1));
        let slots: Vec<(SlotId, Policy)> =
            self.different.iter().take_while(|(slot, _)| *slot <= end).copied().collect();
        self.different.retain(|(slot, _)| *slot > end);
        let to = slots.last().map_or(from, |(slot, _)| *slot);
        let mut peers: BTreeSet<DiskId> = BTreeSet::new();
        for &(slot, (copies, min_copies)) in &slots {
            let sources = context.view.sources(slot, usize::from(copies), usize::from(min_copies));
            peers.extend(sources.iter().flat_map(Disks::iter).filter(|d| *d != context.disk));
        }
        let (holder, after) = (context.disk, None);
        self.questions.extend(peers.iter().map(|peer| Question {
            peer: *peer,
            request: Request::List { holder, from, to, after },
        }));
        self.batch = Some(Batch { slots, listings: Listings::new(), missing: peers.len() });
    }

    fn plan_batch<L: Local>(&mut self, context: &mut Context<'_, L>) {
        let Some(Batch { slots, mut listings, .. }) = self.batch.take() else { return };
        let different: BTreeSet<(SlotId, Policy)> = slots.iter().copied().collect();
        let mut mine = BTreeMap::new();
        for slot in slots.iter().map(|(slot, _)| *slot).collect::<BTreeSet<SlotId>>() {
            mine.extend(context.local.layers(slot));
        }
        listings.insert(context.disk, mine);
        let keys: BTreeSet<LayerKey> = listings.values().flat_map(|l| l.keys().copied()).collect();
        self.batches += 1;
        let mut steps = 0;
        for key in keys {
            let volume = context.view.volumes.get(&key.object.volume);
            if !volume.is_some_and(|v| different.contains(&(key.object.slot(), policy_of(v)))) {
                continue;
            }
            if let Ok(Some(action)) =
                plan_layer(context.view, context.disk, &listings, key, self.attempt)
            {
                self.actions.push_back((action, self.batches));
                steps += 1;
            }
        }
        context.progress.layers_left += steps as u64;
        if steps == 0 {
            context.progress.slots_done += slots.len() as u64;
        } else {
            self.open_batches.insert(self.batches, (steps, slots.len() as u64));
        }
    }

    fn act<L>(&mut self, context: &mut Context<'_, L>, limit: usize) {
        while self.running.len() < limit
            && let Some((action, batch)) = self.actions.pop_front()
        {
            let id = context.id();
            self.running.insert(id, batch);
            context.effects.push_back(Effect::Act { id, action });
        }
    }

    fn clean<L: Local>(&mut self, context: &mut Context<'_, L>) {
        let limit = usize::from(context.view.settings.recovery_max_objects.max(1));
        if (self.next_slot as usize) < SLOTS {
            self.next_slot = SLOTS as u32;
            let keys = context.local.keys().into_iter();
            let leftovers = keys.filter(|key| is_leftover(context.view, context.disk, *key));
            self.actions.extend(leftovers.map(|key| (Action::Delete { key }, 0)));
            context.progress.layers_left += self.actions.len() as u64;
        }
        self.act(context, limit);
    }
}

/// One bit for each slot that an object of these volumes can be in.
pub(crate) fn used_slots<'a>(volumes: impl Iterator<Item = &'a Volume> + Clone) -> Vec<u64> {
    let objects = |volume: &Volume| volume.spec.size.div_ceil(OBJECT_SIZE);
    let total: u64 = volumes.clone().map(objects).fold(0, u64::saturating_add);
    if total > SLOTS as u64 {
        return vec![u64::MAX; SLOTS / 64]; // most of them
    }
    let mut used = vec![0; SLOTS / 64];
    for volume in volumes {
        for index in (0..objects(volume) as u32).map(ObjectIndex) {
            let slot = ObjectId { volume: volume.id, index }.slot();
            used[usize::from(slot.0) / 64] |= 1 << (slot.0 % 64);
        }
    }
    used
}
