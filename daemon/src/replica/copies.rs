//! Copies under way, and what is being put in place.
//!
//! A gateway that asks for a layer's version ([`Copies::give_up`]) decides by the answer: no copy
//! that began before may change the layer after it, be it asked for by a gateway or part of this
//! disk's own recovery. So one that is being put in place is waited for, and the others are void.
//! Copies of other layers go on.

use crate::cluster::lock;
use sheepdog_types::{DiskId, LayerKey};
use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

type Place = (DiskId, LayerKey);

#[derive(Default)]
struct State {
    /// The latest copy that a gateway asked for and did not give up.
    asked: HashMap<Place, u64>,
    /// Copies of the disk's own recovery: how many are under way, and how often a gateway has asked
    /// for the version since the first of them began.
    own: HashMap<Place, (usize, u64)>,
    /// Where one is being put in place.
    placing: HashSet<Place>,
    tickets: u64,
}

/// What entitles a copy to be put in place.
#[derive(Clone, Copy)]
pub(super) enum Right {
    /// It is the latest that a gateway asked for.
    Ticket(u64),
    /// No gateway has asked for the version since the copy began.
    Since(u64),
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct Copies {
    state: Mutex<State>,
    placed: Condvar,
}

impl Copies {
    /// Notes a copy that a gateway asks for, which makes earlier ones void; gives its ticket.
    pub(super) fn ask(&self, disk: DiskId, key: LayerKey) -> u64 {
        let mut state = lock(&self.state);
        state.tickets += 1;
        let ticket = state.tickets;
        state.asked.insert((disk, key), ticket);
        ticket
    }

    /// Notes a copy of the disk's own recovery, until what this gives is dropped.
    pub(super) fn begin(&self, disk: DiskId, key: LayerKey) -> Own<'_> {
        let place = (disk, key);
        let mut state = lock(&self.state);
        let (count, asked) = state.own.entry(place).or_insert((0, 0));
        *count += 1;
        Own { copies: self, place, asked: *asked }
    }

    /// Makes all copies of a layer void; one that is being put in place is there when this returns.
    pub(super) fn give_up(&self, disk: DiskId, key: LayerKey) {
        let mut state = self.wait(lock(&self.state), (disk, key));
        state.asked.remove(&(disk, key));
        if let Some((_, asked)) = state.own.get_mut(&(disk, key)) {
            *asked += 1;
        }
    }

    /// The copy with this ticket has ended.
    pub(super) fn forget(&self, disk: DiskId, key: LayerKey, ticket: u64) {
        let mut state = lock(&self.state);
        if state.asked.get(&(disk, key)) == Some(&ticket) {
            state.asked.remove(&(disk, key));
        }
    }

    /// The right to put a copy in place, one at a time, until it is dropped; `None` if it is void.
    pub(super) fn place(&self, disk: DiskId, key: LayerKey, right: Right) -> Option<Placing<'_>> {
        let place = (disk, key);
        let mut state = self.wait(lock(&self.state), place);
        let valid = match right {
            Right::Ticket(ticket) => state.asked.get(&place) == Some(&ticket),
            Right::Since(asked) => state.own.get(&place).is_some_and(|own| own.1 == asked),
        };
        if !valid {
            return None;
        }
        state.placing.insert(place);
        Some(Placing { copies: self, place })
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, place: Place) -> MutexGuard<'a, State> {
        let busy = |state: &mut State| state.placing.contains(&place);
        self.placed.wait_while(state, busy).unwrap_or_else(PoisonError::into_inner)
    }
}

/// A copy of a disk's own recovery is under way.
pub(super) struct Own<'a> {
    copies: &'a Copies,
    place: Place,
    asked: u64,
}

impl Own<'_> {
    /// What entitles it to be put in place.
    pub(super) fn right(&self) -> Right {
        Right::Since(self.asked)
    }
}

impl Drop for Own<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.copies.state);
        if let Some((count, _)) = state.own.get_mut(&self.place) {
            *count -= 1;
            if *count == 0 {
                state.own.remove(&self.place);
            }
        }
    }
}

/// A copy is being put in place.
pub(super) struct Placing<'a> {
    copies: &'a Copies,
    place: Place,
}

impl Drop for Placing<'_> {
    fn drop(&mut self) {
        lock(&self.copies.state).placing.remove(&self.place);
        self.copies.placed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_types::{Layer, ObjectId, ObjectIndex, VolumeId};

    const DISK: DiskId = DiskId(1);

    fn key(index: u32) -> LayerKey {
        let object = ObjectId { volume: VolumeId(1), index: ObjectIndex(index) };
        LayerKey { object, layer: Layer(0) }
    }

    #[test]
    fn a_question_for_the_version_makes_every_copy_void_that_began_before() {
        let copies = Copies::default();
        let ticket = Right::Ticket(copies.ask(DISK, key(0)));
        let (own, other) = (copies.begin(DISK, key(0)), copies.begin(DISK, key(1)));
        assert!(copies.place(DISK, key(0), own.right()).is_some());
        assert!(copies.place(DISK, key(0), ticket).is_some());
        copies.give_up(DISK, key(0));
        assert!(copies.place(DISK, key(0), own.right()).is_none());
        assert!(copies.place(DISK, key(0), ticket).is_none());
        assert!(copies.place(DISK, key(1), other.right()).is_some());
        let later = copies.begin(DISK, key(0));
        drop(own);
        assert!(copies.place(DISK, key(0), later.right()).is_some());
        drop(later);
        assert!(lock(&copies.state).own.len() == 1);
    }
}
