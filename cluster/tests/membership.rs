//! Nodes and disks that are drained, moved, taken out, given up and removed.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{attach, attached, create, disk, down, enter, founded, info, synced, view};
use sheepdog_cluster::command::{Answer, Command, DiskInfo, Outcome, Refusal};
use sheepdog_cluster::settings::Setting;
use sheepdog_cluster::state::ClusterState;
use sheepdog_cluster::view::Waiting;
use sheepdog_types::{DiskId, Epoch, NodeId, SlotId};

fn drain(state: &mut ClusterState, node: u64, on: bool, force: bool) -> Answer {
    state.apply(Command::Drain { node: NodeId(node), on, force, at: 0 })
}

fn remove(state: &mut ClusterState, node: u64, force: bool) -> Answer {
    state.apply(Command::RemoveNode { node: NodeId(node), force, at: 0 })
}

fn out(state: &mut ClusterState, nodes: &[u64]) -> Answer {
    let disks = nodes.iter().map(|n| disk(*n)).collect();
    state.apply(Command::Out { disks, at: 0 })
}

fn give_up(state: &mut ClusterState, nodes: &[u64]) -> Answer {
    let disks = nodes.iter().map(|n| disk(*n)).collect();
    state.apply(Command::GiveUp { disks, at: 0 })
}

fn ring(state: &ClusterState) -> Vec<u64> {
    state.ring.keys().map(|d| d.0 - 100).collect()
}

fn next(state: &ClusterState) -> Option<Vec<u64>> {
    state.next_ring.as_ref().map(|ring| ring.keys().map(|d| d.0 - 100).collect())
}

/// Every disk that is up says that it is synchronised, until nothing is left to do.
fn sync_all(state: &mut ClusterState) {
    while state.disks.iter().any(|(id, d)| state.disk_up(*id) && d.sync_from.is_some()) {
        let ids: Vec<DiskId> = state.disks.keys().copied().collect();
        for id in ids {
            let Some(disk) = state.disks.get(&id) else { continue }; // removed by now
            let incarnation = state.nodes[&disk.node].incarnation;
            let basis = state.epoch;
            state.apply(Command::Synced { disk: id, incarnation, basis, at: 0 }).unwrap();
        }
    }
}

/// `nodes` nodes and a volume of three copies, at least two, all synchronised.
fn cluster(nodes: u64) -> ClusterState {
    let mut state = founded(nodes);
    create(&mut state, "vm", 1 << 20, 3, 2).unwrap();
    state
}

#[test]
fn a_drained_node_keeps_its_data_until_the_others_have_them() {
    let mut state = cluster(4);
    drain(&mut state, 4, true, false).unwrap();
    let began = state.epoch;
    assert_eq!((ring(&state), next(&state)), (vec![1, 2, 3, 4], Some(vec![1, 2, 3])));
    for node in [1, 2] {
        synced(&mut state, node, 1, began).unwrap();
    }
    assert_eq!(ring(&state), [1, 2, 3, 4]);
    synced(&mut state, 3, 1, began).unwrap();
    assert_eq!((ring(&state), next(&state)), (vec![1, 2, 3], None));
    let leftover = &state.disks[&disk(4)];
    assert_eq!(
        leftover.sync_from,
        Some(state.epoch),
        "it deletes what it has no more business with"
    );
    drain(&mut state, 4, false, false).unwrap();
    assert_eq!(next(&state), Some(vec![1, 2, 3, 4]));
    sync_all(&mut state);
    assert_eq!((ring(&state), next(&state)), (vec![1, 2, 3, 4], None));
}

#[test]
fn a_drain_that_is_taken_back_moves_nothing() {
    let mut state = cluster(4);
    drain(&mut state, 4, true, false).unwrap();
    drain(&mut state, 4, false, false).unwrap();
    assert_eq!((ring(&state), next(&state)), (vec![1, 2, 3, 4], None));
    let epoch = state.epoch;
    drain(&mut state, 4, false, false).unwrap();
    assert_eq!(state.epoch, epoch, "nothing to do, no epoch");
}

#[test]
fn copies_are_not_given_up_without_force() {
    let mut state = cluster(3);
    let refused = Err(Refusal::TooFewLeft { left: 2, copies: 3 });
    assert_eq!(drain(&mut state, 2, true, false), refused);
    let weigh = |force| Command::SetWeight { disk: disk(2), weight: 0, force, at: 0 };
    assert_eq!(state.clone().apply(weigh(false)), refused);
    let retire = Command::RetireDisk { disk: disk(2), force: false, at: 0 };
    assert_eq!(state.clone().apply(retire), refused);
    state.apply(weigh(true)).unwrap();
    assert_eq!(next(&state), Some(vec![1, 3]));
    // Nowhere to go: data never move to an empty ring.
    let mut state = cluster(3);
    for node in 1..=3 {
        drain(&mut state, node, true, true).unwrap();
    }
    assert_eq!((ring(&state), next(&state)), (vec![1, 2, 3], None));
}

#[test]
fn what_was_down_for_long_is_out_and_comes_in_again_when_it_returns() {
    let mut state = cluster(4);
    assert_eq!(out(&mut state, &[4]), Ok(Outcome::Done));
    assert!(!state.disks[&disk(4)].out, "it is up");
    down(&mut state, 4, 1).unwrap();
    assert_eq!(next(&state), None, "a reboot moves nothing");
    out(&mut state, &[4]).unwrap();
    assert_eq!(state.history.last().unwrap().went_out, [disk(4)]);
    assert_eq!(next(&state), Some(vec![1, 2, 3]));
    enter(&mut state, 4, 2).unwrap();
    let record = state.history.last().unwrap();
    assert_eq!((&record.came_up[..], &record.came_in[..]), (&[disk(4)][..], &[disk(4)][..]));
    assert_eq!(next(&state), None, "back before the move was over: the ring fits again");
    assert_eq!(state.disks[&disk(4)].missed_since, Some(Epoch(5)));
}

#[test]
fn most_disks_never_go_out() {
    let mut state = cluster(5);
    for node in 2..=5 {
        down(&mut state, node, 1).unwrap();
    }
    out(&mut state, &[2, 3, 4, 5]).unwrap();
    assert_eq!(state.disks.values().filter(|d| d.out).count(), 2);
    assert_eq!(out(&mut state, &[4]), Err(Refusal::TooManyOut { left: 2, total: 5 }));
    let mut state = founded(2);
    down(&mut state, 2, 1).unwrap();
    assert!(matches!(out(&mut state, &[2]), Err(Refusal::TooManyOut { .. })));
}

#[test]
fn newcomers_make_up_for_disks_that_are_out_but_not_for_disks_that_are_down() {
    let mut state = cluster(7);
    let (copies, min) = (3, 2);
    let home: Vec<u64> = {
        let view = view(&state);
        view.home(SlotId(7), copies).iter().map(|d| d.0 - 100).collect()
    };
    let [survivor, b, c] = home[..] else { panic!("three replicas") };
    down(&mut state, b, 1).unwrap();
    down(&mut state, c, 1).unwrap();
    enter(&mut state, 8, 1).unwrap(); // a move is under way: the slot has members to come
    let waiting = view(&state).slot(SlotId(7), copies, min);
    assert!(matches!(waiting, Err(Waiting::TooFew { .. })), "{waiting:?}");
    out(&mut state, &[b, c]).unwrap();
    let now = view(&state).slot(SlotId(7), copies, min).unwrap();
    assert_eq!(now.authorities.as_slice(), [disk(survivor)]);
    assert!(now.members.len() >= min && now.members.contains(disk(survivor)));
    // The survivor goes, the others come back: only the survivor has what was written meanwhile.
    down(&mut state, survivor, 1).unwrap();
    enter(&mut state, b, 2).unwrap();
    enter(&mut state, c, 2).unwrap();
    let waiting = view(&state).slot(SlotId(7), copies, min);
    assert_eq!(waiting, Err(Waiting::For(vec![disk(survivor)])));
}

#[test]
fn a_removed_node_never_comes_back() {
    let mut state = cluster(4);
    assert_eq!(remove(&mut state, 4, false), Err(Refusal::NotDrained(NodeId(4))));
    attach(&mut state, "vm", 4, 1).unwrap();
    drain(&mut state, 4, true, false).unwrap();
    sync_all(&mut state);
    let refused = remove(&mut state, 4, false);
    assert_eq!(refused, Err(Refusal::Serves { node: NodeId(4), volume: "vm".into() }));
    remove(&mut state, 4, true).unwrap();
    assert!(!state.nodes.contains_key(&NodeId(4)) && !state.disks.contains_key(&disk(4)));
    assert_eq!(enter(&mut state, 4, 2), Err(Refusal::Removed(NodeId(4))));
    assert_eq!(remove(&mut state, 4, false), Ok(Outcome::Done));
    assert_eq!(remove(&mut state, 9, false), Err(Refusal::NotMember(NodeId(9))));
}

#[test]
fn a_dead_node_is_remembered_until_its_place_is_taken() {
    let mut state = cluster(4);
    down(&mut state, 4, 1).unwrap();
    remove(&mut state, 4, false).unwrap();
    assert_eq!(next(&state), Some(vec![1, 2, 3]));
    assert!(state.nodes[&NodeId(4)].removed);
    assert_eq!(enter(&mut state, 4, 2), Err(Refusal::Removed(NodeId(4))));
    sync_all(&mut state);
    assert!(!state.nodes.contains_key(&NodeId(4)) && !state.disks.contains_key(&disk(4)));
}

#[test]
fn what_only_lost_disks_had_is_waited_for_until_it_is_given_up() {
    let mut state = founded(3);
    create(&mut state, "vm", 512, 3, 1).unwrap();
    down(&mut state, 1, 1).unwrap();
    down(&mut state, 2, 1).unwrap(); // 3 may have written alone
    down(&mut state, 3, 1).unwrap();
    enter(&mut state, 1, 2).unwrap();
    enter(&mut state, 2, 2).unwrap();
    let slot = |state: &ClusterState| {
        view(state).slot(SlotId(7), 3, 1).map(|s| {
            let mut list: Vec<u64> = s.authorities.iter().map(|d| d.0 - 100).collect();
            list.sort_unstable();
            list
        })
    };
    assert_eq!(slot(&state), Err(Waiting::For(vec![disk(3)])));
    assert_eq!(give_up(&mut state, &[1]), Err(Refusal::DiskIsUp(disk(1))));
    give_up(&mut state, &[3]).unwrap();
    // It may have let 1 take writes, too, so that the newest of what is left counts.
    assert_eq!(slot(&state), Ok(vec![1, 2]));
    sync_all(&mut state);
    assert_eq!(ring(&state), [1, 2]);
    // It comes back as if it were new.
    enter(&mut state, 3, 2).unwrap();
    assert_eq!(state.disks[&disk(3)].missed_since, Some(Epoch(0)));
    assert_eq!(slot(&state), Ok(vec![1, 2]));
    // Until it has what the others have, it can be given up again.
    assert!(state.disks[&disk(3)].lost);
    sync_all(&mut state);
    assert!(!state.disks[&disk(3)].lost);
    assert_eq!(slot(&state), Ok(vec![1, 2, 3]));
}

#[test]
fn disks_come_and_go_while_their_node_stays() {
    let mut state = attached(2, 1 << 20);
    let second = DiskInfo { id: DiskId(900), weight: 5 };
    let up =
        |incarnation| Command::DiskUp { node: NodeId(2), incarnation, disk: second.clone(), at: 0 };
    assert_eq!(state.apply(up(9)), Err(Refusal::NotMember(NodeId(2))));
    state.apply(up(1)).unwrap();
    let since = state.epoch;
    assert_eq!(state.disks[&DiskId(900)].entered, since);
    assert_eq!(state.disks[&disk(2)].entered, Epoch(2), "the other one was there all along");
    assert!(state.next_ring.is_some());
    let before = state.epoch;
    state.apply(up(1)).unwrap();
    assert_eq!(state.epoch, before, "a repeated proposal");
    sync_all(&mut state);
    assert!(state.ring.contains_key(&DiskId(900)));
    let fail = |incarnation, entered| Command::DiskDown {
        entered,
        disk: DiskId(900),
        incarnation,
        reason: "it failed".into(),
        at: 0,
    };
    state.apply(fail(7, since)).unwrap();
    state.apply(fail(1, Epoch(1))).unwrap();
    assert!(state.disk_up(DiskId(900)), "the reports are of other lives");
    state.apply(fail(1, since)).unwrap();
    assert!(!state.disk_up(DiskId(900)) && state.disk_up(disk(2)));
    assert_eq!(state.disks[&DiskId(900)].missed_since, Some(state.epoch));
    state.apply(Command::RetireDisk { disk: DiskId(900), force: false, at: 0 }).unwrap();
    sync_all(&mut state);
    assert!(!state.disks.contains_key(&DiskId(900)));
    assert_eq!(state.apply(up(1)), Err(Refusal::DiskRemoved(DiskId(900))));
    let mut both = info(2, 5);
    both.disks.push(second);
    state.apply(Command::Enter { node: both, at: 0 }).unwrap();
    assert!(!state.disks.contains_key(&DiskId(900)) && state.disk_up(disk(2)));
}

#[test]
fn a_move_waits_for_a_full_disk_and_gives_it_nothing() {
    let mut state = cluster(3);
    let full = |node, full| Command::DiskFull { disk: disk(node), incarnation: 1, full, at: 0 };
    let before = state.epoch;
    state.apply(full(2, true)).unwrap();
    assert_eq!((state.epoch, state.disks[&disk(2)].full), (before, false), "nothing moves to it");
    enter(&mut state, 4, 1).unwrap();
    let slots = || (0..=u16::MAX).map(SlotId);
    let moving = view(&state);
    let given: Vec<SlotId> = slots().filter(|slot| moving.is_member(*slot, 3, disk(4))).collect();
    assert!(given.len() > 16_000, "{}", given.len());
    let equal = (state.epoch, moving.slot(given[0], 3, 2).unwrap().members);
    state.apply(full(4, true)).unwrap();
    let now = view(&state);
    let stays =
        |slot: &SlotId| !now.is_member(*slot, 3, disk(4)) && now.may_hold(*slot, 3, disk(4));
    assert!(given.iter().all(stays) && !now.unbroken_since(equal.0, &equal.1));
    let members = now.slot(given[0], 3, 2).unwrap().members;
    assert_eq!((members.len(), members.contains(disk(4))), (3, false));
    sync_all(&mut state);
    assert_eq!((ring(&state), next(&state)), (vec![1, 2, 3], Some(vec![1, 2, 3, 4])));
    // With room the move goes on.
    let epoch = state.epoch;
    state.apply(full(4, false)).unwrap();
    let now = view(&state);
    assert!(state.epoch > epoch && now.is_member(given[0], 3, disk(4)));
    assert!(!now.unbroken_since(equal.0, &equal.1), "it has missed writes");
    sync_all(&mut state);
    assert_eq!((ring(&state), next(&state)), (vec![1, 2, 3, 4], None));
}

#[test]
fn another_placement_gives_a_full_disk_another_chance() {
    let mut state = cluster(3);
    enter(&mut state, 4, 1).unwrap();
    let full = Command::DiskFull { disk: disk(4), incarnation: 1, full: true, at: 0 };
    state.apply(full.clone()).unwrap();
    enter(&mut state, 5, 1).unwrap();
    assert!(!state.disks[&disk(4)].full, "its share is smaller now");
    state.apply(full.clone()).unwrap();
    enter(&mut state, 4, 2).unwrap();
    assert!(!state.disks[&disk(4)].full, "a new life");
    state.apply(full).unwrap();
    assert!(!state.disks[&disk(4)].full, "that was said of an earlier life");
    sync_all(&mut state);
    assert_eq!((ring(&state), next(&state)), (vec![1, 2, 3, 4, 5], None));
}

#[test]
fn zones_and_weights_of_an_operator_outlast_restarts_until_the_node_says_otherwise() {
    let mut state = cluster(4);
    let zone = |zone: &str| Command::SetZone { node: NodeId(2), zone: zone.into(), at: 0 };
    state.apply(zone("rack9")).unwrap();
    state.apply(Command::SetWeight { disk: disk(2), weight: 7, force: false, at: 0 }).unwrap();
    assert_eq!(state.next_ring.as_ref().unwrap()[&disk(2)].zone, "rack9");
    assert_eq!(state.next_ring.as_ref().unwrap()[&disk(2)].weight, 7);
    enter(&mut state, 2, 2).unwrap();
    assert_eq!((&state.nodes[&NodeId(2)].zone[..], state.disks[&disk(2)].weight), ("rack9", 7));
    let mut moved = info(2, 3);
    (moved.zone, moved.disks[0].weight) = ("attic".into(), 3);
    state.apply(Command::Enter { node: moved, at: 0 }).unwrap();
    assert_eq!((&state.nodes[&NodeId(2)].zone[..], state.disks[&disk(2)].weight), ("attic", 3));
    assert!(matches!(state.apply(zone("")), Err(Refusal::BadZone(_))));
    let heavy = Command::SetWeight { disk: disk(2), weight: u64::MAX, force: false, at: 0 };
    assert!(matches!(state.apply(heavy), Err(Refusal::BadWeight(_))));
    let nobody = Command::SetWeight { disk: DiskId(5), weight: 1, force: false, at: 0 };
    assert_eq!(state.apply(nobody), Err(Refusal::NoSuchDisk(DiskId(5))));
}

#[test]
fn settings_are_agreed_and_checked() {
    let mut state = cluster(3);
    let revision = state.revision;
    state.apply(Command::Set { setting: Setting::RecoveryPaused(true) }).unwrap();
    assert!(view(&state).settings.recovery_paused && state.revision > revision);
    let before = state.clone();
    let bad = Command::Set { setting: Setting::RecoveryMaxObjects(0) };
    assert!(matches!(state.apply(bad), Err(Refusal::BadSetting(_))));
    assert_eq!(state, before);
    assert_eq!(ClusterState::decode(&state.encode()), Ok(state));
}
