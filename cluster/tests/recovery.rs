//! How a disk becomes complete: against disks in memory that answer at once, or not.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{create, disk, down, enter, founded, key, view};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::message::{Call, Failure, MAX_LISTING, Reject, Reply, Request};
use sheepdog_cluster::recovery::{Action, Effect, Local, Recovery, Stage, slot_digest};
use sheepdog_cluster::settings::Setting;
use sheepdog_cluster::state::ClusterState;
use sheepdog_cluster::view::{View, Waiting};
use sheepdog_types::{
    DiskId, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, SlotId, Version, VolumeId, WriterGen,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// In the order of their slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Layers(BTreeMap<(SlotId, LayerKey), Version>);

impl Layers {
    fn insert(&mut self, key: LayerKey, version: Version) {
        self.0.insert((key.object.slot(), key), version);
    }

    fn remove(&mut self, key: LayerKey) {
        self.0.remove(&(key.object.slot(), key));
    }

    fn get(&self, key: LayerKey) -> Version {
        self.0.get(&(key.object.slot(), key)).copied().unwrap_or(Version::NONE)
    }
}

impl Local for Layers {
    fn layers(&self, slot: SlotId) -> Vec<(LayerKey, Version)> {
        let rest = self.0.range((slot, LayerKey { object: FIRST, layer: Layer(0) })..);
        rest.take_while(|((s, _), _)| *s == slot).map(|((_, k), v)| (*k, *v)).collect()
    }

    fn keys(&self) -> Vec<LayerKey> {
        self.0.keys().map(|(_, key)| *key).collect()
    }
}

const FIRST: ObjectId = ObjectId { volume: VolumeId(0), index: ObjectIndex(0) };

/// Layers of `count` objects, all at `seq`.
fn layers(count: u32, seq: u64) -> Layers {
    let mut layers = Layers::default();
    (0..count).for_each(|index| layers.insert(key(index), version(seq)));
    layers
}

fn version(seq: u64) -> Version {
    Version { writer: WriterGen(1), seq }
}

/// The disk of a node that recovers, and the others.
struct World {
    state: ClusterState,
    disks: BTreeMap<DiskId, Layers>,
    recovery: Recovery,
    view: Arc<View>,
    node: u64,
    digests: usize,
    listings: usize,
    steps: usize,
    /// Every step of the disk fails so.
    fails: Option<Failure>,
    /// Calls to this disk have no answer.
    mute: Option<DiskId>,
}

impl World {
    fn new(state: ClusterState, node: u64, disks: &[(u64, Layers)]) -> Self {
        let view = view(&state);
        let recovery = Recovery::new(NodeId(node), disk(node), Arc::clone(&view));
        let disks = disks.iter().map(|(n, layers)| (disk(*n), layers.clone())).collect();
        let (digests, listings, steps) = (0, 0, 0);
        let (fails, mute) = (None, None);
        Self { state, disks, recovery, view, node, digests, listings, steps, fails, mute }
    }

    fn apply(&mut self, command: Command) {
        self.state.apply(command).unwrap();
        if self.state.revision != self.view.revision {
            self.view = Arc::new(View::build(&self.state, Some(&self.view)));
        }
        self.recovery.handle_view(Arc::clone(&self.view));
    }

    fn here(&self) -> &Layers {
        &self.disks[&disk(self.node)]
    }

    /// Runs effects until there are none; gives how many there were.
    fn run(&mut self) -> usize {
        let mut count = 0;
        let here = disk(self.node);
        loop {
            let local = &self.disks[&here];
            let Some(effect) = self.recovery.poll_effect(local) else { return count };
            count += 1;
            match effect {
                Effect::Call { id, call, .. } => {
                    let reply = (self.mute != Some(call.disk)).then(|| self.answer(&call));
                    self.recovery.handle_reply(id, reply);
                }
                Effect::Act { id, action } => {
                    self.steps += 1;
                    let outcome = self.fails.map_or(Ok(()), Err);
                    if outcome.is_ok() {
                        self.act(action);
                    }
                    self.recovery.handle_done(id, outcome);
                }
                Effect::Finish { id, command } => {
                    self.recovery.handle_done(id, Ok(()));
                    command.into_iter().for_each(|command| self.apply(command));
                }
            }
        }
    }

    fn answer(&mut self, call: &Call) -> Reply {
        let view = &self.view;
        if call.epoch != view.epoch {
            return Reply::Rejected(Reject::StaleEpoch { now: view.epoch });
        }
        let there = &self.disks[&call.disk];
        match &call.request {
            Request::Digests { policy, slots } => {
                self.digests += 1;
                let digest = |s: &SlotId| slot_digest(view, *policy, &there.layers(*s));
                Reply::Digests { digests: slots.iter().map(digest).collect() }
            }
            Request::List { from, to, after, .. } => {
                self.listings += 1;
                let mut all: Vec<(LayerKey, Version)> = (from.0..=to.0)
                    .flat_map(|s| there.layers(SlotId(s)))
                    .filter(|(k, _)| {
                        after.is_none_or(|a| (k.object.slot(), *k) > (a.object.slot(), a))
                    })
                    .collect();
                let more = all.len() > MAX_LISTING;
                all.truncate(MAX_LISTING);
                Reply::Listing { layers: all, more }
            }
            other => panic!("{other:?}"),
        }
    }

    fn act(&mut self, action: Action) {
        let here = disk(self.node);
        match action {
            Action::Copy { key, expect, from, target } => {
                assert_eq!(self.disks[&here].get(key), expect);
                assert_eq!(self.disks[&from].get(key), target);
                let layers = self.disks.get_mut(&here).unwrap();
                if target == Version::NONE {
                    layers.remove(key);
                } else {
                    layers.insert(key, target);
                }
            }
            Action::Delete { key } => self.disks.get_mut(&here).unwrap().remove(key),
        }
    }
}

/// `nodes` nodes, and the volume `vm` with 4096 objects.
fn cluster(nodes: u64) -> ClusterState {
    let mut state = founded(nodes);
    create(&mut state, "vm", 16 << 30, 3, 2).unwrap();
    state
}

#[test]
fn a_disk_that_was_away_gets_what_changed_and_lists_nothing_else() {
    let mut state = cluster(3);
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 3, 2).unwrap();
    let mut now = layers(4096, 5);
    for index in 7..17 {
        now.insert(key(index), version(6));
    }
    let mut old = layers(4096, 5);
    old.remove(key(9));
    old.insert(key(4095), version(4));
    let mut world = World::new(state, 3, &[(1, now.clone()), (2, now.clone()), (3, old)]);
    world.run();
    assert_eq!(*world.here(), now);
    assert_eq!(world.steps, 11);
    assert_eq!(world.digests, 128, "64 windows, two sources");
    assert!(world.listings <= 22, "{} listings", world.listings);
    let three = &world.state.disks[&disk(3)];
    assert_eq!((three.missed_since, three.restarted, three.sync_from), (None, false, None));
    assert_eq!(world.recovery.progress().stage, Stage::Idle);
    let progress = world.recovery.progress();
    assert_eq!(progress.slots_done, progress.slots_total);
    assert_eq!(world.run(), 0, "nothing is left to do");
}

#[test]
fn a_new_disk_gets_its_share_and_the_others_delete_theirs_once_it_has_it() {
    let mut state = cluster(4);
    enter(&mut state, 5, 1).unwrap();
    let members = view(&state);
    let belongs = |node: u64, view: &View| {
        let mut own = layers(4096, 1);
        own.0.retain(|(_, k), _| view.is_member(k.object.slot(), 3, disk(node)));
        own
    };
    let before: Vec<(u64, Layers)> = (1..=4)
        .map(|node| {
            let mut own = layers(4096, 1);
            own.0.retain(|(_, k), _| members.home(k.object.slot(), 3).contains(disk(node)));
            (node, own)
        })
        .collect();
    let mut disks = before;
    disks.push((5, Layers::default()));
    let mut world = World::new(state, 5, &disks);
    let (state, disks) = (0..3).fold((world.state.clone(), world.disks.clone()), |all, _| {
        // Every node in turn, until none has anything to do.
        (1..=5).fold(all, |(state, disks), node| {
            world = World::new(state, node, &[]);
            world.disks = disks;
            world.run();
            (world.state.clone(), world.disks.clone())
        })
    });
    assert_eq!((state.ring.len(), &state.next_ring), (5, &None));
    let view = view(&state);
    for node in 1..=5 {
        assert_eq!(disks[&disk(node)], belongs(node, &view), "node {node}");
    }
}

#[test]
fn what_was_deleted_stays_deleted() {
    let mut state = cluster(3);
    create(&mut state, "other", 1 << 20, 3, 2).unwrap();
    down(&mut state, 3, 1).unwrap();
    state.apply(Command::DeleteVolume { name: "vm".into() }).unwrap();
    enter(&mut state, 3, 2).unwrap();
    let disks = [(1, layers(0, 1)), (2, layers(0, 1)), (3, layers(300, 1))];
    let mut world = World::new(state, 3, &disks);
    world.run();
    assert_eq!(*world.here(), Layers::default());
    assert_eq!(world.steps, 300);
}

#[test]
fn a_slot_without_an_authority_waits_alone() {
    let mut state = founded(6);
    create(&mut state, "vm", 16 << 30, 2, 1).unwrap();
    let before = view(&state);
    down(&mut state, 1, 1).unwrap();
    down(&mut state, 2, 1).unwrap();
    enter(&mut state, 1, 2).unwrap();
    let own = |node: u64, seq| {
        let mut own = layers(4096, seq);
        own.0.retain(|(_, k), _| before.home(k.object.slot(), 2).contains(disk(node)));
        (node, own)
    };
    let disks: Vec<(u64, Layers)> = (1..=6).map(|n| own(n, if n == 1 { 1 } else { 2 })).collect();
    let mut world = World::new(state, 1, &disks);
    world.run();
    let progress = world.recovery.progress().clone();
    assert_eq!(progress.stage, Stage::Waiting);
    let (slots, why) = progress.blocked.unwrap();
    assert_eq!(why, Waiting::For(vec![disk(2)]));
    assert_eq!(progress.slots_done + slots, progress.slots_total);
    let stale = world.here().0.iter().filter(|(_, v)| v.seq == 1).count();
    let shared = |(_, k): &(SlotId, LayerKey)| before.home(k.object.slot(), 2).contains(disk(2));
    let expected = world.here().0.keys().filter(|k| shared(k)).count();
    assert!(expected > 0 && stale == expected, "{stale} of {expected}");
    assert!(world.recovery.wants_tick());
    // The other one comes back.
    world.apply(Command::Enter { node: common::info(2, 2), at: 0 });
    world.run();
    assert!(world.here().0.values().all(|v| v.seq == 2));
    assert_eq!(world.state.disks[&disk(1)].missed_since, None);
}

#[test]
fn a_full_disk_stops_copying_and_tries_again_later() {
    let mut state = cluster(3);
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 3, 2).unwrap();
    let all = layers(1000, 1);
    let mut world =
        World::new(state, 3, &[(1, all.clone()), (2, all.clone()), (3, Layers::default())]);
    world.fails = Some(Failure::NoSpace);
    world.run();
    assert!(world.steps <= 8, "{} copies were tried", world.steps);
    assert_eq!(world.recovery.progress().problem, Some(Failure::NoSpace));
    assert_eq!(world.recovery.progress().stage, Stage::Waiting);
    world.fails = None;
    world.run();
    assert_ne!(*world.here(), all, "not before a tick");
    world.recovery.handle_tick();
    world.run();
    assert_eq!(*world.here(), all);
    assert_eq!(world.state.disks[&disk(3)].missed_since, None);
    assert_eq!(world.recovery.progress().problem, None, "it would be taken out of service for it");
}

#[test]
fn a_mute_peer_is_asked_again_and_a_new_epoch_begins_anew() {
    let mut state = cluster(3);
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 3, 2).unwrap();
    let all = layers(100, 1);
    let mut world =
        World::new(state, 3, &[(1, all.clone()), (2, all.clone()), (3, Layers::default())]);
    world.mute = Some(disk(2));
    world.run();
    assert!(world.recovery.wants_tick() && world.steps == 0);
    world.recovery.handle_tick();
    assert!(world.run() > 0, "it asks again");
    let down = Command::Down { node: NodeId(2), incarnation: 1, reason: "mute".into(), at: 0 };
    world.apply(down);
    world.run();
    assert_eq!(*world.here(), all, "the other one suffices");
    assert_eq!(world.state.disks[&disk(3)].missed_since, None);
}

/// A copy of the epoch before ends when all that is left is to tell the cluster: it says nothing of that.
#[test]
fn a_step_of_an_earlier_pass_does_not_end_this_one() {
    let mut state = cluster(3);
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 3, 2).unwrap();
    let all = layers(1, 1);
    let mut world =
        World::new(state, 3, &[(1, all.clone()), (2, all.clone()), (3, Layers::default())]);
    let next = |world: &mut World| loop {
        let here = world.here().clone();
        let effect = world.recovery.poll_effect(&here).unwrap();
        let Effect::Call { id, call, .. } = effect else { return effect };
        let reply = world.answer(&call);
        world.recovery.handle_reply(id, Some(reply));
    };
    let Effect::Act { id: old, action } = next(&mut world) else { panic!("nothing is copied") };
    world.act(action);
    let down = Command::Down { node: NodeId(2), incarnation: 1, reason: "gone".into(), at: 0 };
    world.apply(down);
    let Effect::Finish { id, .. } = next(&mut world) else { panic!("it is copied again") };
    for outcome in [Err(Failure::NoSpace), Ok(())] {
        world.recovery.handle_done(old, outcome);
        let progress = world.recovery.progress();
        assert_eq!((progress.stage, progress.problem), (Stage::Finishing, None));
    }
    world.recovery.handle_done(id, Ok(()));
    assert_eq!(world.recovery.progress().stage, Stage::Idle);
}

#[test]
fn a_paused_recovery_compares_and_copies_nothing() {
    let mut state = cluster(3);
    state.apply(Command::Set { setting: Setting::RecoveryPaused(true) }).unwrap();
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 3, 2).unwrap();
    let all = layers(100, 1);
    let mut world =
        World::new(state, 3, &[(1, all.clone()), (2, all.clone()), (3, Layers::default())]);
    world.run();
    let progress = world.recovery.progress();
    assert!(progress.paused && world.steps == 0);
    assert!(progress.slots_done < progress.slots_total);
    world.apply(Command::Set { setting: Setting::RecoveryPaused(false) });
    world.run();
    assert_eq!(*world.here(), all);
}

#[test]
fn a_check_finds_and_mends_a_replica_that_fell_behind_unnoticed() {
    let state = cluster(3);
    let all = layers(100, 7);
    let mut old = all.clone();
    old.insert(key(3), version(6));
    old.remove(key(4));
    let mut world = World::new(state, 2, &[(1, all.clone()), (2, old), (3, all.clone())]);
    assert_eq!(world.run(), 0, "nothing says that it differs");
    world.recovery.check();
    let epoch = world.state.epoch;
    world.run();
    assert_eq!((world.here(), world.steps), (&all, 2));
    assert_eq!(world.state.epoch, epoch);
    assert_eq!(world.recovery.progress().layers_done, 2);
    assert!(!world.recovery.progress().check);
}
