//! Copies that gateways ask for, and what is being put in place.
//!
//! A gateway that asks for a layer's version ([`Copies::give_up`]) decides by the answer: no copy
//! may change the layer after it. So one that is being put in place is waited for, and none that
//! was asked for before begins to be. Copies of other layers go on.

use crate::cluster::lock;
use sheepdog_types::{DiskId, LayerKey};
use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

type Place = (DiskId, LayerKey);

#[derive(Default)]
struct State {
    /// The latest copy that a gateway asked for and did not give up.
    asked: HashMap<Place, u64>,
    /// Where one is being put in place.
    placing: HashSet<Place>,
    tickets: u64,
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

    /// Makes all copies of a layer void that gateways asked for; one that is being put in place,
    /// whoever asked for it, is there when this returns.
    pub(super) fn give_up(&self, disk: DiskId, key: LayerKey) {
        let mut state = self.wait(lock(&self.state), (disk, key));
        state.asked.remove(&(disk, key));
    }

    /// The copy with this ticket has ended.
    pub(super) fn forget(&self, disk: DiskId, key: LayerKey, ticket: u64) {
        let mut state = lock(&self.state);
        if state.asked.get(&(disk, key)) == Some(&ticket) {
            state.asked.remove(&(disk, key));
        }
    }

    /// The right to put a copy in place, one at a time, until it is dropped; `None` if it was given
    /// up. Nobody gives up a copy without a ticket.
    pub(super) fn place(
        &self,
        disk: DiskId,
        key: LayerKey,
        ticket: Option<u64>,
    ) -> Option<Placing<'_>> {
        let place = (disk, key);
        let mut state = self.wait(lock(&self.state), place);
        if ticket.is_some() && state.asked.get(&place).copied() != ticket {
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
