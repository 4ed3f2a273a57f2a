use super::*;
use sheepdog_cluster::command::{Ack, DiskInfo, LOG_VERSION, NodeInfo, VolumeSpec};
use sheepdog_types::{ClusterId, NodeId};

/// Three nodes with a disk each (101…), and a volume of 64 objects with two copies.
fn cluster() -> ClusterState {
    let mut state = ClusterState::default();
    state.apply(Command::Found { cluster: ClusterId(1) }).unwrap();
    for id in 1..=3 {
        enter(&mut state, id, 1);
    }
    let spec = VolumeSpec {
        name: "vm".into(),
        size: 64 * OBJECT_SIZE,
        copies: 2,
        min_copies: 1,
        ack: Ack::Flush,
    };
    state.apply(Command::CreateVolume { spec, at: 0 }).unwrap();
    state
}

fn enter(state: &mut ClusterState, id: u64, incarnation: u64) {
    let node = NodeInfo {
        id: NodeId(id),
        incarnation,
        address: format!("127.0.0.1:{id}"),
        zone: id.to_string(),
        disks: vec![DiskInfo { id: DiskId(100 + id), weight: 1 }],
        version: LOG_VERSION,
    };
    state.apply(Command::Enter { node, at: id }).unwrap();
}

fn down(state: &mut ClusterState, id: u64, incarnation: u64, at: u64) {
    let reason = String::new();
    state.apply(Command::Down { node: NodeId(id), incarnation, reason, at }).unwrap();
}

fn planned(state: &ClusterState, disks: Option<&[u64]>) -> RecoverPlan {
    let view = View::build(state, None);
    let disks = match disks {
        Some(disks) => disks.iter().map(|id| DiskId(*id)).collect(),
        None => waited_for(state, &view),
    };
    foresee(state, &view, &disks).unwrap()
}

/// Objects whose home is exactly these two disks.
fn shared(state: &ClusterState, a: u64, b: u64) -> u64 {
    let view = View::build(state, None);
    let volume = *state.volumes.keys().next().unwrap();
    let both = |index: &u32| {
        let slot = ObjectId { volume, index: ObjectIndex(*index) }.slot();
        let home = view.home(slot, 2);
        home.contains(DiskId(a)) && home.contains(DiskId(b))
    };
    (0..64).filter(both).count() as u64
}

#[test]
fn nothing_waits_and_nothing_is_lost_while_a_copy_is_left() {
    let mut state = cluster();
    assert!(planned(&state, None).disks.is_empty());
    down(&mut state, 3, 1, 77);
    let plan = planned(&state, None);
    assert!(plan.disks.is_empty() && plan.waiting.is_empty());
    let plan = planned(&state, Some(&[103]));
    assert_eq!((plan.volumes, plan.still_waiting), (Vec::new(), 0));
    assert_eq!(plan.disks[0].down_since, Some(77));
}

#[test]
fn what_had_both_copies_on_lost_disks_is_gone() {
    let mut state = cluster();
    let expected = shared(&state, 102, 103);
    assert!(expected > 0);
    down(&mut state, 2, 1, 5);
    down(&mut state, 3, 1, 6);
    let plan = planned(&state, None);
    let disks: Vec<&str> = plan.disks.iter().map(|d| d.disk.as_str()).collect();
    assert_eq!(disks, [DiskId(102).to_string(), DiskId(103).to_string()]);
    assert_eq!(plan.still_waiting, 0);
    let [VolumeLoss { volume, objects: 64, gone, older: 0, .. }] = &plan.volumes[..] else {
        panic!("{plan:?}")
    };
    assert_eq!((volume.as_str(), *gone), ("vm", expected));
    // Of the two only one: the other may still come back.
    let plan = planned(&state, Some(&[103]));
    assert!(plan.still_waiting > 0 && plan.volumes.is_empty(), "{plan:?}");
}

#[test]
fn what_a_returned_disk_missed_is_counted_from_when_it_went() {
    let mut state = cluster();
    let expected = shared(&state, 102, 103);
    down(&mut state, 2, 1, 1234);
    let since = state.epoch;
    down(&mut state, 3, 1, 2000);
    enter(&mut state, 2, 2);
    let plan = planned(&state, None);
    let [loss] = &plan.volumes[..] else { panic!("{plan:?}") };
    assert_eq!((loss.gone, loss.older), (0, expected));
    assert_eq!((loss.older_since_epoch, loss.older_since), (Some(since.0), Some(1234)));
}
