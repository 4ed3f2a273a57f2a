//! The replicated state machine: who is a member, what a disk may lack, who has a volume.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{attach, attached, create, disk, down, enter, founded, info, synced};
use sheepdog_cluster::command::{
    Answer, Command, DiskInfo, LOG_VERSION, NodeInfo, OLDEST_LOG_VERSION, Outcome, Refusal,
    decode_command, encode_command, version_of,
};
use sheepdog_cluster::history::MAX_HISTORY;
use sheepdog_cluster::state::{ClusterState, Handover, Volume};
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

fn detach(writer: u64, settled: bool) -> Command {
    Command::Detach { volume: VolumeId(1), writer: WriterGen(writer), settled }
}

fn volume(state: &ClusterState) -> Volume {
    Volume::clone(&state.volumes[&VolumeId(1)])
}

#[test]
fn who_takes_over_learns_whether_all_was_settled() {
    let mut state = attached(2, 1 << 20);
    assert!(!volume(&state).unsettled, "a new volume has nothing that differs");
    // Its gateway died, or was started again: in the middle of writes, for all anybody knows.
    attach(&mut state, "vm", 1, 1).unwrap();
    assert!(volume(&state).unsettled);
    // Only who has it can say that it has looked.
    for (writer, unsettled) in [(1, true), (3, true), (2, false)] {
        let (volume_id, writer) = (VolumeId(1), WriterGen(writer));
        state.apply(Command::Settled { volume: volume_id, writer }).unwrap();
        assert_eq!(volume(&state).unsettled, unsettled, "{writer}");
    }
    state.apply(detach(2, true)).unwrap();
    attach(&mut state, "vm", 2, 1).unwrap();
    assert!(!volume(&state).unsettled, "it was given back in order");

    // A lock that is broken ends the generation: its gateway is fenced although nobody came after it.
    state.apply(detach(3, false)).unwrap();
    let Volume { attachment, unsettled, writer, .. } = volume(&state);
    assert_eq!((attachment, unsettled, writer), (None, true, WriterGen(4)));
    attach(&mut state, "vm", 1, 1).unwrap();
    assert_eq!((volume(&state).unsettled, volume(&state).writer), (true, WriterGen(5)));
    // Given back before all was looked at.
    state.apply(detach(5, false)).unwrap();
    assert!(volume(&state).unsettled);
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
    state.apply(detach(1, true)).unwrap();
    assert!(state.volumes[&VolumeId(1)].attachment.is_some());
    let refused = state.apply(Command::DeleteVolume { name: "vm".into() });
    assert!(matches!(refused, Err(Refusal::AttachedElsewhere { .. })));
    state.apply(detach(2, true)).unwrap();
    state.apply(Command::DeleteVolume { name: "vm".into() }).unwrap();
    create(&mut state, "vm", 1 << 20, 3, 2).unwrap();
    assert_eq!(state.last_volume, VolumeId(2), "ids are never used twice");
}

fn open(state: &mut ClusterState, to: u64) -> Answer {
    let (to, incarnation) = (NodeId(to), 1);
    state.apply(Command::OpenHandover { name: "vm".into(), to, incarnation, at: 7 })
}

fn take(state: &mut ClusterState, gateway: u64, seen: u64) -> Answer {
    let (gateway, incarnation, seen) = (NodeId(gateway), 1, WriterGen(seen));
    state.apply(Command::TakeOver { volume: VolumeId(1), gateway, incarnation, seen, at: 8 })
}

fn close(state: &mut ClusterState, writer: Option<u64>) {
    let writer = writer.map(WriterGen);
    state.apply(Command::CloseHandover { volume: VolumeId(1), writer }).unwrap();
}

fn given(writer: u64) -> Answer {
    Ok(Outcome::Attached { volume: VolumeId(1), writer: WriterGen(writer) })
}

/// I4: each hand-over is a new generation, and nobody but the two nodes of it gets the volume.
#[test]
fn i4_a_hand_over_goes_back_and_forth_until_it_is_closed() {
    let mut state = attached(2, 1 << 20);
    let elsewhere =
        |holder: &str| Err(Refusal::AttachedElsewhere { name: "vm".into(), holder: holder.into() });
    assert_eq!(take(&mut state, 2, 1), elsewhere("1:1"), "before it was opened");
    assert_eq!(open(&mut state, 1), Err(Refusal::HasItItself("vm".into())));
    open(&mut state, 2).unwrap();
    let handover = Handover { from: NodeId(1), to: NodeId(2), since: 7 };
    assert_eq!(volume(&state).handover, Some(handover));
    let revision = state.revision;
    open(&mut state, 2).unwrap();
    assert_eq!(state.revision, revision, "it is open already");
    open(&mut state, 1).unwrap();
    assert_eq!(state.revision, revision, "the guest comes back before it needed anything there");
    let refused = Err(Refusal::HandoverElsewhere { name: "vm".into(), to: "2:1".into() });
    assert_eq!(open(&mut state, 3), refused);

    // Only a guest that runs takes it; that an export is added, or a node started, is not enough.
    assert_eq!(attach(&mut state, "vm", 2, 1), elsewhere("1:1"));
    assert_eq!(take(&mut state, 3, 1), elsewhere("1:1"), "a third node");
    assert_eq!(take(&mut state, 2, 1), given(2));
    assert_eq!(volume(&state).attachment.unwrap().gateway, NodeId(2));
    assert!(volume(&state).unsettled);
    // What the old holder wanted before it had lost the volume does not count any more.
    assert_eq!(take(&mut state, 1, 1), Err(Refusal::AttachedMeanwhile("vm".into())));
    assert_eq!(attach(&mut state, "vm", 1, 1), elsewhere("2:1"));
    assert_eq!(take(&mut state, 1, 2), given(3));
    assert_eq!(take(&mut state, 2, 3), given(4));

    // Migrated back before it was closed.
    open(&mut state, 1).unwrap();
    let back = Handover { from: NodeId(2), to: NodeId(1), since: 7 };
    assert_eq!(volume(&state).handover, Some(back));
    close(&mut state, Some(4));
    assert_eq!(volume(&state).handover, Some(back), "that was about the way there");
    assert_eq!(take(&mut state, 1, 4), given(5));

    close(&mut state, Some(4));
    assert!(volume(&state).handover.is_some(), "that was about an older generation");
    close(&mut state, Some(5));
    assert_eq!(volume(&state).handover, None);
    assert_eq!(take(&mut state, 2, 5), elsewhere("1:1"));
}

#[test]
fn a_hand_over_survives_a_stop_of_its_nodes_and_ends_when_one_is_gone_for_good() {
    let mut state = attached(2, 1 << 20);
    open(&mut state, 2).unwrap();
    // The source stops and is started again: the target may have it meanwhile.
    state.apply(detach(1, true)).unwrap();
    assert_eq!(open(&mut state, 3), Err(Refusal::NothingToTakeOver("vm".into())));
    down(&mut state, 1, 1).unwrap();
    assert_eq!(take(&mut state, 2, 1), given(2));
    enter(&mut state, 1, 1).unwrap();
    assert_eq!(take(&mut state, 1, 2), given(3));
    // The target dies as the holder.
    assert_eq!(take(&mut state, 2, 3), given(4));
    down(&mut state, 2, 1).unwrap();
    assert_eq!(take(&mut state, 1, 4), given(5));
    assert!(volume(&state).handover.is_some());
    let remove = Command::RemoveNode { node: NodeId(2), force: true, at: 0 };
    state.apply(remove).unwrap();
    assert_eq!(volume(&state).handover, None);

    // A third node that gets the volume because its holder is down ends it too.
    let mut state = attached(2, 1 << 20);
    open(&mut state, 2).unwrap();
    down(&mut state, 1, 1).unwrap();
    attach(&mut state, "vm", 3, 1).unwrap();
    assert_eq!(volume(&state).handover, None);
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

/// Node `node` enters with a release that understands `version`.
fn enter_with(state: &mut ClusterState, node: u64, version: u8, incarnation: u64) -> Answer {
    let node = NodeInfo { version, ..info(node, incarnation) };
    state.apply(Command::Enter { node, at: 0 })
}

#[test]
fn the_cluster_version_is_what_all_members_understand_and_never_falls() {
    let next = LOG_VERSION + 1;
    let mut state = founded(3);
    assert_eq!(state.version, LOG_VERSION);
    for node in [1, 2] {
        enter_with(&mut state, node, next, 2).unwrap();
        assert_eq!(state.version, LOG_VERSION, "node 3 does not understand more");
    }
    let refused = state.check_version(next).unwrap_err();
    assert_eq!(
        refused,
        Refusal::TooNew { needed: next, agreed: LOG_VERSION, behind: "3:1".into() }
    );
    assert_eq!(state.check_version(LOG_VERSION), Ok(()));
    // That it is down changes nothing: it may come back as it was.
    down(&mut state, 3, 1).unwrap();
    assert_eq!(state.version, LOG_VERSION);
    enter_with(&mut state, 3, next, 2).unwrap();
    assert_eq!(state.version, next);
    assert_eq!(state.check_version(next), Ok(()));
    let cause = &state.history.last().unwrap().cause;
    assert!(cause.ends_with(&format!("the cluster is at version {next} now")), "{cause}");
    // Nobody older comes in any more.
    let too_old = Refusal::TooOld { node: NodeId(2), version: LOG_VERSION, agreed: next };
    let before = state.clone();
    assert_eq!(enter_with(&mut state, 2, LOG_VERSION, 3), Err(too_old));
    assert_eq!(state, before);
    enter_with(&mut state, 4, next + 1, 1).unwrap();
    assert_eq!(state.version, next);
}

#[test]
fn a_removed_node_holds_no_version_back() {
    let next = LOG_VERSION + 1;
    let mut state = founded(2);
    enter_with(&mut state, 1, next, 2).unwrap();
    assert_eq!(state.version, LOG_VERSION);
    state.apply(Command::RemoveNode { node: NodeId(2), force: true, at: 0 }).unwrap();
    assert_eq!(state.version, next);
}

#[test]
fn what_is_encoded_for_a_later_version_is_not_misread() {
    let mut bytes = encode_command(&Command::DeleteVolume { name: "v".into() });
    assert_eq!(version_of(&bytes), OLDEST_LOG_VERSION);
    for (version, known) in
        [(OLDEST_LOG_VERSION - 1, false), (LOG_VERSION, true), (LOG_VERSION + 1, false)]
    {
        bytes[0] = version;
        assert_eq!(decode_command(&bytes).is_ok(), known, "version {version}");
    }
}
