//! After a takeover: what an earlier gateway left different is made equal, also where no guest looks.
//!
//! A gateway that dies in the middle of writes leaves replicas that differ in these writes. No object is
//! used before it was opened, so no guest has to wait for what is done here; but an object that is never
//! used again would stay different, and whoever loses replicas later would have the worse one left.
//!
//! ```text
//!   digests of all slots of the volume, from their authorities ──► slots that differ ──► open each object there
//! ```
//!
//! Only authorities are asked: every other member synchronises itself with them. But while the old generation
//! was the volume's newest one, it left alone what it had of it and they had not. So once these members have
//! synchronised themselves, and are authorities, all is compared once more. Nothing is remembered for
//! the next gateway but that it has to look again (see `unsettled` in the agreed state). What was found
//! equal stays so, since all older writers are fenced by now. One object is opened at a time, because
//! guests come first.

use super::{Gateway, Phase, Purpose};
use crate::message::{Reply, Request};
use crate::recovery::{MAX_DIGESTS, used_slots};
use sheepdog_types::{DiskId, OBJECT_SIZE, ObjectIndex, SLOTS, SlotId};
use std::collections::{BTreeMap, BTreeSet};

/// Objects looked at before others get their turn.
const MAX_STEPS: usize = 65_536;

#[derive(Debug)]
pub(super) struct Reconcile {
    /// One bit for each slot that an object of the volume can be in.
    used: Vec<u64>,
    /// One bit for each slot whose authorities differ, or could not be asked.
    differs: Vec<u64>,
    /// First slot of the window that is being compared.
    first: usize,
    /// First slot after it.
    end: usize,
    /// The digest that the first authority of a slot has answered.
    digests: BTreeMap<SlotId, u64>,
    /// Questions without an answer.
    missing: usize,
    /// The window has to be asked for again at the next tick.
    again: bool,
    /// Members that were not asked, because they were no authorities.
    unasked: BTreeSet<DiskId>,
    /// Next object to look at.
    next: u64,
    opening: Option<ObjectIndex>,
    /// Some objects cannot be opened yet, and the last revision in which that was so: once more from the start
    /// with a later one.
    skipped: Option<u64>,
    resting: bool,
}

impl Reconcile {
    fn new(used: Vec<u64>) -> Self {
        Self {
            differs: vec![0; used.len()],
            used,
            first: 0,
            end: 0,
            digests: BTreeMap::new(),
            missing: 0,
            again: false,
            unasked: BTreeSet::new(),
            next: 0,
            opening: None,
            skipped: None,
            resting: false,
        }
    }

    pub fn wants_tick(&self) -> bool {
        let comparing = self.end < SLOTS || self.missing > 0;
        self.again || (!comparing && self.opening.is_none() && !self.resting)
    }

    fn note_different(&mut self, slot: SlotId) {
        self.differs[usize::from(slot.0) / 64] |= 1 << (slot.0 % 64);
    }
}

fn has(bits: &[u64], slot: SlotId) -> bool {
    bits[usize::from(slot.0) / 64] >> (slot.0 % 64) & 1 == 1
}

impl Gateway {
    /// Looks whether there is something to look for.
    pub(super) fn inherit_unsettled(&mut self) {
        let volume = self.view.volumes.get(&self.config.volume).filter(|v| v.unsettled);
        self.reconcile = volume.map(|v| Reconcile::new(used_slots(std::iter::once(&**v))));
    }

    /// Goes on, if it can.
    pub(super) fn reconcile(&mut self) {
        if self.phase != Phase::Serving {
            return;
        }
        let Some(mut state) = self.reconcile.take() else { return };
        while state.missing == 0 && state.end < SLOTS && !state.again {
            self.compare_window(&mut state);
        }
        let compared = state.missing == 0 && state.end == SLOTS && !state.again;
        if compared && state.opening.is_none() && !state.resting {
            self.open_next(&mut state);
        }
        let objects = self.config.size.div_ceil(OBJECT_SIZE);
        let done =
            compared && state.opening.is_none() && state.next >= objects && state.skipped.is_none();
        if !done {
            self.reconcile = Some(state);
        } else if !state.unasked.is_empty() {
            let is_asked = |disk| self.view.disks.get(disk).is_none_or(|d| !d.up || d.is_intact());
            let once_more = state.unasked.iter().all(is_asked);
            if once_more {
                state = Reconcile::new(state.used);
            }
            state.resting = !once_more;
            self.reconcile = Some(state);
            if once_more {
                self.reconcile();
            }
        }
    }

    /// Asks for the digests of the next slots.
    fn compare_window(&mut self, state: &mut Reconcile) {
        state.first = state.end;
        state.digests.clear();
        let (copies, min_copies) = (self.config.copies, self.config.min_copies);
        let mut questions: BTreeMap<DiskId, Vec<SlotId>> = BTreeMap::new();
        let mut count = 0;
        while state.end < SLOTS && count < MAX_DIGESTS {
            let slot = SlotId(state.end as u16);
            state.end += 1;
            if !has(&state.used, slot) {
                continue;
            }
            count += 1;
            match self.view.slot(slot, copies, min_copies) {
                Ok(view) => {
                    let home = self.view.home(slot, copies);
                    let others = home.iter().filter(|d| !view.authorities.contains(*d));
                    state.unasked.extend(others.filter(|d| self.view.is_up(*d)));
                    for disk in view.authorities.iter().filter(|_| view.authorities.len() > 1) {
                        questions.entry(disk).or_default().push(slot);
                    }
                }
                Err(_) => state.note_different(slot),
            }
        }
        let policy = (copies as u8, min_copies as u8);
        for (disk, slots) in questions {
            let request = Request::Digests { policy, slots: slots.clone() };
            state.missing += 1;
            state.again |= self.call(disk, request, None, Purpose::Compare { slots }).is_none();
        }
    }

    pub(super) fn on_digests(&mut self, slots: &[SlotId], reply: &Reply) {
        let Some(state) = &mut self.reconcile else { return };
        match reply {
            Reply::Digests { digests } if digests.len() == slots.len() => {
                for (slot, digest) in slots.iter().zip(digests) {
                    if *state.digests.entry(*slot).or_insert(*digest) != *digest {
                        state.note_different(*slot);
                    }
                }
                state.missing = state.missing.saturating_sub(1);
            }
            _ => self.compare_later(),
        }
    }

    /// The window is asked for again at the next tick.
    pub(super) fn compare_later(&mut self) {
        if let Some(state) = &mut self.reconcile {
            state.again = true;
        }
    }

    /// Time passed: asks again for the window, if that has to be.
    pub(super) fn compare_again(&mut self) {
        if let Some(state) = &mut self.reconcile
            && std::mem::take(&mut state.again)
        {
            (state.missing, state.end) = (0, state.first);
            self.forget_calls(|p| matches!(p, Purpose::Compare { .. }));
        }
    }

    /// A new view: answers to what was asked in an earlier one need not come, and what could not be opened
    /// may be possible.
    pub(super) fn review_reconcile(&mut self) {
        if let Some(state) = &mut self.reconcile {
            state.again |= state.missing > 0;
            state.resting = false;
            self.compare_again();
        }
    }

    /// Begins to open the next object that may differ.
    fn open_next(&mut self, state: &mut Reconcile) {
        let objects = self.config.size.div_ceil(OBJECT_SIZE);
        if state.next >= objects && state.skipped.take().is_some() {
            state.next = 0;
        }
        for _ in 0..MAX_STEPS {
            if state.next >= objects {
                state.resting = state.skipped == Some(self.view.revision);
                return;
            }
            let index = ObjectIndex(state.next as u32);
            state.next += 1;
            let opened = self.objects.get(&index).is_some_and(|o| o.verified.is_some());
            if opened || !has(&state.differs, self.object_id(index).slot()) {
                continue;
            }
            if self.slot_of(index).is_none() {
                state.skipped = Some(self.view.revision);
                continue;
            }
            state.opening = Some(index);
            self.open_if_possible(index);
            return;
        }
    }

    /// An object was opened, for whomever.
    pub(super) fn note_reconciled(&mut self, index: ObjectIndex) {
        if let Some(state) = &mut self.reconcile
            && state.opening == Some(index)
        {
            state.opening = None;
            self.counters.reconciled += 1;
        }
    }
}
