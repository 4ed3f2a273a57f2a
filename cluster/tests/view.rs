//! Who serves a slot, and what a disk that compares itself has to do.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{attached, create, disk, down, enter, founded, key, synced, view};
use sheepdog_cluster::recovery::{Action, Listings, plan_layer};
use sheepdog_cluster::state::ClusterState;
use sheepdog_cluster::view::{View, Waiting};
use sheepdog_types::{DiskId, LayerKey, SlotId, Version, VolumeId, WriterGen};
use std::collections::{BTreeMap, BTreeSet};

fn slot(state: &ClusterState, min: usize) -> Result<(Vec<DiskId>, Vec<DiskId>), Waiting> {
    let slot = view(state).slot(SlotId(7), 3, min)?;
    let sorted = |disks: sheepdog_cluster::view::Disks| {
        let mut list = disks.as_slice().to_vec();
        list.sort_unstable();
        list
    };
    Ok((sorted(slot.members), sorted(slot.authorities)))
}

/// What a disk has to do about all layers that anybody lists.
fn plan(view: &View, disk: DiskId, listings: &Listings) -> Result<Vec<Action>, Waiting> {
    let keys: BTreeSet<LayerKey> = listings.values().flat_map(|l| l.keys().copied()).collect();
    let steps = keys.iter().map(|key| plan_layer(view, disk, listings, *key, 0));
    steps.filter_map(Result::transpose).collect()
}

fn disks(nodes: &[u64]) -> Vec<DiskId> {
    nodes.iter().map(|n| disk(*n)).collect()
}

#[test]
fn all_serve_while_all_are_well() {
    let all = disks(&[1, 2, 3]);
    assert_eq!(slot(&attached(2, 512), 2), Ok((all.clone(), all)));
}

#[test]
fn a_disk_that_came_back_is_written_to_but_not_asked() {
    let mut state = attached(2, 512);
    down(&mut state, 3, 1).unwrap();
    assert_eq!(slot(&state, 2), Ok((disks(&[1, 2]), disks(&[1, 2]))));
    enter(&mut state, 3, 2).unwrap();
    assert_eq!(slot(&state, 2), Ok((disks(&[1, 2, 3]), disks(&[1, 2]))));
    let basis = state.epoch;
    synced(&mut state, 3, 2, basis).unwrap();
    assert_eq!(slot(&state, 2), Ok((disks(&[1, 2, 3]), disks(&[1, 2, 3]))));
}

#[test]
fn too_few_disks_wait_and_say_for_whom() {
    let mut state = attached(2, 512);
    down(&mut state, 2, 1).unwrap();
    down(&mut state, 3, 1).unwrap();
    let Err(Waiting::TooFew { up: 1, mut down }) = slot(&state, 2) else { panic!() };
    down.sort_unstable();
    assert_eq!(down, disks(&[2, 3]));
    assert_eq!(slot(&state, 1), Ok((disks(&[1]), disks(&[1]))));
}

#[test]
fn after_a_power_loss_of_all_everybody_who_was_there_last_is_asked() {
    let mut state = attached(2, 512);
    for node in 1..=3 {
        enter(&mut state, node, 2).unwrap();
    }
    let all = disks(&[1, 2, 3]);
    assert_eq!(slot(&state, 2), Ok((all.clone(), all)));
}

#[test]
fn a_disk_that_missed_writes_waits_for_one_that_has_them() {
    let mut state = founded(3);
    create(&mut state, "vm", 512, 3, 1).unwrap();
    down(&mut state, 1, 1).unwrap();
    down(&mut state, 2, 1).unwrap(); // 3 may have written alone
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 1, 2).unwrap();
    enter(&mut state, 2, 2).unwrap();
    assert_eq!(slot(&state, 1), Err(Waiting::For(disks(&[3]))));
    enter(&mut state, 3, 2).unwrap();
    assert_eq!(slot(&state, 1), Ok((disks(&[1, 2, 3]), disks(&[3]))));
}

#[test]
fn with_two_needed_a_lonely_survivor_took_no_writes() {
    let mut state = attached(2, 512);
    down(&mut state, 1, 1).unwrap();
    down(&mut state, 2, 1).unwrap();
    down(&mut state, 3, 1).unwrap(); // 3 was alone: nothing was written
    enter(&mut state, 2, 2).unwrap();
    enter(&mut state, 1, 2).unwrap();
    // 2 and 3 had the last writes; 1 missed them.
    assert_eq!(slot(&state, 2), Ok((disks(&[1, 2]), disks(&[2]))));
}

#[test]
fn objects_stay_open_unless_a_member_was_away() {
    let mut state = attached(2, 512);
    let opened = state.epoch;
    let members = view(&state).slot(SlotId(7), 3, 2).unwrap().members;
    down(&mut state, 3, 1).unwrap();
    let left = view(&state).slot(SlotId(7), 3, 2).unwrap().members;
    assert!(view(&state).unbroken_since(opened, &left));
    enter(&mut state, 3, 2).unwrap();
    assert!(!view(&state).unbroken_since(opened, &members));
    assert!(view(&state).unbroken_since(opened, &left));
}

fn version(writer: u64, seq: u64) -> Version {
    Version { writer: WriterGen(writer), seq }
}

fn listings(all: &[(u64, Option<Version>)], key: LayerKey) -> Listings {
    let list = |v: &Option<Version>| v.iter().map(|v| (key, *v)).collect::<BTreeMap<_, _>>();
    all.iter().map(|(node, v)| (disk(*node), list(v))).collect()
}

/// Node 3 is back and compares itself; 1 and 2 are intact. The writer is 1.
fn comparing() -> View {
    let mut state = attached(2, 512);
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 3, 2).unwrap();
    View::build(&state, None)
}

#[test]
fn what_is_older_is_copied_and_what_is_equal_is_left() {
    let view = comparing();
    let all = [(1, Some(version(1, 4))), (2, Some(version(1, 4))), (3, Some(version(1, 2)))];
    let actions = plan(&view, disk(3), &listings(&all, key(0))).unwrap();
    let [Action::Copy { expect, from, target, .. }] = actions[..] else { panic!("{actions:?}") };
    assert_eq!((expect, target), (version(1, 2), version(1, 4)));
    assert_ne!(from, disk(3));
    let all = [(1, Some(version(1, 4))), (2, Some(version(1, 4))), (3, Some(version(1, 4)))];
    assert_eq!(plan(&view, disk(3), &listings(&all, key(0))), Ok(vec![]));
}

#[test]
fn a_write_that_may_be_under_way_is_never_taken_back() {
    let view = comparing();
    for others in [Some(version(1, 4)), None] {
        let all = [(1, others), (2, others), (3, Some(version(1, 5)))];
        assert_eq!(plan(&view, disk(3), &listings(&all, key(0))), Ok(vec![]), "{others:?}");
    }
    // Left over from a writer that is gone.
    let all = [(1, Some(version(0, 4))), (2, Some(version(0, 4))), (3, Some(version(0, 5)))];
    assert_eq!(plan(&view, disk(3), &listings(&all, key(0))).map(|a| a.len()), Ok(1));
}

#[test]
fn i9_layers_of_deleted_volumes_go_and_those_of_newer_ones_stay() {
    let view = comparing();
    let mut gone = key(0);
    gone.object.volume = VolumeId(0);
    let mut newer = key(0);
    newer.object.volume = VolumeId(2); // not in this view yet
    let v = Some(version(1, 1));
    let actions = plan(&view, disk(3), &listings(&[(1, None), (2, None), (3, v)], gone));
    assert_eq!(actions, Ok(vec![Action::Delete { key: gone }]));
    let actions = plan(&view, disk(3), &listings(&[(1, None), (2, None), (3, v)], newer));
    assert_eq!(actions, Ok(vec![]));
}

#[test]
fn nobody_is_synced_while_the_only_holder_is_away() {
    let mut state = founded(3);
    create(&mut state, "vm", 512, 3, 1).unwrap();
    down(&mut state, 1, 1).unwrap();
    down(&mut state, 2, 1).unwrap();
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 1, 2).unwrap();
    assert_eq!(view(&state).sources(SlotId(7), 3, 1), Err(Waiting::For(disks(&[3]))));
    let told = listings(&[(1, Some(version(1, 1)))], key(0));
    assert_eq!(plan(&view(&state), disk(1), &told), Err(Waiting::For(disks(&[3]))));
}
