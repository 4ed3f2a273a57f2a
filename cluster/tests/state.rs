//! The replicated state machine: who is a member, what a disk may lack, who has a volume.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{attach, attached, create, disk, down, enter, founded, info, synced};
use sheepdog_cluster::command::{Command, DiskInfo, Outcome, Refusal};
use sheepdog_cluster::history::MAX_HISTORY;
use sheepdog_cluster::state::ClusterState;
use sheepdog_types::{ClusterId, Epoch, NodeId, VolumeId, WriterGen};

#[test]
fn nothing_happens_before_the_cluster_is_founded_once() {
    let mut state = ClusterState::default();
    assert_eq!(enter(&mut state, 1, 1), Err(Refusal::NotFounded));
    assert_eq!(state, ClusterState::default());
    let found = Command::Found { cluster: ClusterId(1) };
    assert_eq!(state.apply(found.clone()), Ok(Outcome::Done));
    assert_eq!(state.apply(found), Err(Refusal::AlreadyFounded));
}

#[test]
fn a_repeated_entry_changes_nothing() {
    let mut state = founded(3);
    let before = state.clone();
    assert_eq!(enter(&mut state, 2, 1), Ok(Outcome::Entered { epoch: Epoch(2) }));
    assert_eq!(state, before);
}

#[test]
fn disks_of_an_empty_cluster_are_complete_at_once() {
    let mut state = founded(2);
    down(&mut state, 2, 1).unwrap();
    enter(&mut state, 2, 2).unwrap();
    let d = &state.disks[&disk(2)];
    assert_eq!((d.missed_since, d.restarted, d.sync_from), (None, false, None));
}

#[test]
fn a_restart_that_nobody_noticed_leaves_the_disk_to_be_compared() {
    let mut state = attached(2, 1 << 20);
    let answer = enter(&mut state, 2, 2);
    assert_eq!(answer, Ok(Outcome::Entered { epoch: Epoch(4) }));
    let d = &state.disks[&disk(2)];
    assert_eq!((d.missed_since, d.restarted, d.sync_from), (None, true, Some(Epoch(4))));
    assert!(state.history.last().unwrap().came_up.is_empty(), "it was up all along");
}

#[test]
fn a_disk_that_was_down_lacks_what_came_since() {
    let mut state = attached(2, 1 << 20);
    down(&mut state, 2, 1).unwrap();
    assert_eq!(state.disks[&disk(2)].missed_since, Some(Epoch(4)));
    enter(&mut state, 2, 2).unwrap();
    down(&mut state, 2, 2).unwrap();
    assert_eq!(state.disks[&disk(2)].missed_since, Some(Epoch(4)), "the first epoch counts");
    assert_eq!(state.disks[&disk(2)].sync_from, None);
}

#[test]
fn a_late_report_of_an_older_incarnation_is_ignored() {
    let mut state = attached(2, 1 << 20);
    enter(&mut state, 2, 2).unwrap();
    let before = state.clone();
    assert_eq!(down(&mut state, 2, 1), Ok(Outcome::Done));
    assert_eq!(state, before);
    assert_eq!(down(&mut state, 9, 1), Err(Refusal::NotMember(NodeId(9))));
}

#[test]
fn synced_counts_only_for_this_incarnation_and_a_basis_that_is_new_enough() {
    let mut state = attached(2, 1 << 20);
    enter(&mut state, 2, 2).unwrap();
    let before = state.clone();
    synced(&mut state, 2, 1, Epoch(4)).unwrap();
    synced(&mut state, 2, 2, Epoch(3)).unwrap();
    assert_eq!(state, before, "stale reports say nothing");
    synced(&mut state, 2, 2, Epoch(4)).unwrap();
    assert!(!state.disks[&disk(2)].restarted);
    assert!(state.revision > before.revision);
}

#[test]
fn a_disk_that_its_node_no_longer_announces_is_down() {
    let mut state = attached(2, 1 << 20);
    let mut two = info(2, 2);
    two.disks = vec![DiskInfo { id: sheepdog_types::DiskId(900), weight: 1 }];
    state.apply(Command::Enter { node: two, at: 0 }).unwrap();
    assert!(!state.disk_up(disk(2)) && state.disk_up(sheepdog_types::DiskId(900)));
    let record = state.history.last().unwrap();
    assert_eq!(record.came_up, [sheepdog_types::DiskId(900)]);
    assert_eq!(record.went_down, [disk(2)]);
    assert_eq!(state.disks[&disk(2)].missed_since, Some(record.epoch));
    enter(&mut state, 2, 3).unwrap();
    assert!(state.disk_up(disk(2)));
    assert_eq!(state.history.last().unwrap().came_up, [disk(2)]);
}

#[test]
fn a_new_node_gets_its_place_when_all_disks_are_synced() {
    let mut state = attached(2, 1 << 20);
    enter(&mut state, 4, 1).unwrap();
    let basis = state.epoch;
    assert_eq!(state.ring.len(), 3);
    assert_eq!(state.next_ring.as_ref().map(|r| r.len()), Some(4));
    assert_eq!(state.placement_since, basis);
    for node in [1, 2, 3] {
        synced(&mut state, node, 1, basis).unwrap();
    }
    assert!(state.next_ring.is_some(), "the new disk has nothing yet");
    synced(&mut state, 4, 1, basis).unwrap();
    assert_eq!((state.ring.len(), state.next_ring.clone()), (4, None));
    assert_eq!(state.epoch, basis.next());
    assert_eq!(state.placement_since, state.epoch);
}

#[test]
fn a_disk_that_is_down_holds_a_move_up() {
    let mut state = attached(2, 1 << 20);
    enter(&mut state, 4, 1).unwrap();
    down(&mut state, 3, 1).unwrap();
    let basis = state.epoch;
    for node in [1, 2, 4] {
        synced(&mut state, node, 1, basis).unwrap();
    }
    assert!(state.next_ring.is_some());
    enter(&mut state, 3, 2).unwrap();
    let basis = state.epoch;
    synced(&mut state, 3, 2, basis).unwrap();
    assert!(state.next_ring.is_none());
}

#[test]
fn a_volume_moves_only_from_a_gateway_that_is_down() {
    let mut state = attached(2, 1 << 20);
    let refused = attach(&mut state, "vm", 2, 1);
    let holder = "1:1".to_string();
    assert_eq!(refused, Err(Refusal::AttachedElsewhere { name: "vm".into(), holder }));
    assert!(matches!(attach(&mut state, "vm", 2, 7), Err(Refusal::NotMember(_))));
    down(&mut state, 1, 1).unwrap();
    let answer = attach(&mut state, "vm", 2, 1);
    assert_eq!(answer, Ok(Outcome::Attached { volume: VolumeId(1), writer: WriterGen(2) }));
    // The old gateway gives back what it no longer has.
    state.apply(Command::Detach { volume: VolumeId(1), writer: WriterGen(1) }).unwrap();
    assert!(state.volumes[&VolumeId(1)].attachment.is_some());
    let refused = state.apply(Command::DeleteVolume { name: "vm".into() });
    assert!(matches!(refused, Err(Refusal::AttachedElsewhere { .. })));
    state.apply(Command::Detach { volume: VolumeId(1), writer: WriterGen(2) }).unwrap();
    state.apply(Command::DeleteVolume { name: "vm".into() }).unwrap();
    create(&mut state, "vm", 1 << 20, 3, 2).unwrap();
    assert_eq!(state.last_volume, VolumeId(2), "ids are never used twice");
}

#[test]
fn names_sizes_and_copies_are_checked() {
    let mut state = founded(3);
    let long = "a".repeat(129);
    for name in ["", "-a", "a b", "a/b", "ä", long.as_str()] {
        assert!(matches!(create(&mut state, name, 512, 1, 1), Err(Refusal::BadName(_))), "{name}");
    }
    for size in [0, 511, 513, u64::MAX] {
        assert_eq!(create(&mut state, "a", size, 1, 1), Err(Refusal::BadSize(size)));
    }
    for (copies, min) in [(0, 0), (3, 0), (2, 3), (9, 1)] {
        let answer = create(&mut state, "a", 512, copies, min);
        assert_eq!(answer, Err(Refusal::BadCopies { copies, min_copies: min }));
    }
    let answer = create(&mut state, "a", 512, 5, 4);
    assert_eq!(answer, Err(Refusal::TooFewNodes { needed: 4, up: 3 }));
    create(&mut state, "a", 512, 3, 2).unwrap();
    assert_eq!(create(&mut state, "a", 512, 3, 2), Err(Refusal::Exists("a".into())));
}

#[test]
fn strangers_cannot_take_an_address_or_a_disk() {
    let mut state = attached(2, 1 << 20);
    let before = state.clone();
    let mut thief = info(9, 1);
    thief.address = "2:1".into();
    let refused = state.apply(Command::Enter { node: thief, at: 0 });
    assert!(matches!(refused, Err(Refusal::AddressInUse { node: NodeId(2), .. })));
    let mut thief = info(9, 1);
    thief.disks[0].id = disk(2);
    let refused = state.apply(Command::Enter { node: thief, at: 0 });
    assert_eq!(refused, Err(Refusal::DiskElsewhere { disk: disk(2), node: NodeId(2) }));
    assert_eq!(state, before, "a refused command changes nothing");
}

#[test]
fn the_history_is_bounded_and_the_state_round_trips() {
    let mut state = attached(2, 1 << 20);
    for incarnation in 2..1200 {
        enter(&mut state, 2, incarnation).unwrap();
    }
    assert_eq!(state.history.len(), MAX_HISTORY);
    let bytes = state.encode();
    assert_eq!(ClusterState::decode(&bytes).as_ref(), Ok(&state));
    assert!(ClusterState::decode(&bytes[..bytes.len() - 1]).is_err());
    assert!(ClusterState::decode(&[9]).is_err() && ClusterState::decode(&[]).is_err());
}
