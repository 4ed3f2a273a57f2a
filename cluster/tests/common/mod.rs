//! Small clusters for scenario tests: node `n` has the address `n:1`, the zone `zn` and the disk `100 + n`.

#![allow(dead_code)] // each test binary uses a part

use sheepdog_cluster::command::{
    Ack, Answer, Command, DiskInfo, LOG_VERSION, NodeInfo, Outcome, VolumeSpec,
};
use sheepdog_cluster::state::ClusterState;
use sheepdog_cluster::view::View;
use sheepdog_types::{
    ClusterId, DiskId, Epoch, Layer, LayerKey, NodeId, ObjectId, ObjectIndex, VolumeId, WriterGen,
};
use std::sync::Arc;

pub fn info(node: u64, incarnation: u64) -> NodeInfo {
    NodeInfo {
        id: NodeId(node),
        incarnation,
        address: format!("{node}:1"),
        zone: format!("z{node}"),
        disks: vec![DiskInfo { id: disk(node), weight: 1 }],
        version: LOG_VERSION,
    }
}

pub fn disk(node: u64) -> DiskId {
    DiskId(100 + node)
}

pub fn enter(state: &mut ClusterState, node: u64, incarnation: u64) -> Answer {
    state.apply(Command::Enter { node: info(node, incarnation), at: 0 })
}

pub fn down(state: &mut ClusterState, node: u64, incarnation: u64) -> Answer {
    let reason = "test".into();
    state.apply(Command::Down { node: NodeId(node), incarnation, reason, at: 0 })
}

pub fn synced(state: &mut ClusterState, node: u64, incarnation: u64, basis: Epoch) -> Answer {
    state.apply(Command::Synced { disk: disk(node), incarnation, basis, at: 0 })
}

pub fn create(state: &mut ClusterState, name: &str, size: u64, copies: u8, min: u8) -> Answer {
    let spec = VolumeSpec { name: name.into(), size, copies, min_copies: min, ack: Ack::Flush };
    state.apply(Command::CreateVolume { spec, at: 0 })
}

pub fn attach(state: &mut ClusterState, name: &str, node: u64, incarnation: u64) -> Answer {
    let gateway = NodeId(node);
    state.apply(Command::Attach { name: name.into(), gateway, incarnation, at: 0 })
}

/// `nodes` nodes of incarnation 1 that are up, no volume.
pub fn founded(nodes: u64) -> ClusterState {
    let mut state = ClusterState::default();
    state.apply(Command::Found { cluster: ClusterId(1) }).unwrap();
    for node in 1..=nodes {
        enter(&mut state, node, 1).unwrap();
    }
    state
}

/// Three nodes and the volume `vm` (id 1), three copies, at least `min`, attached to node 1.
pub fn attached(min: u8, size: u64) -> ClusterState {
    let mut state = founded(3);
    create(&mut state, "vm", size, 3, min).unwrap();
    let answer = attach(&mut state, "vm", 1, 1);
    assert_eq!(answer, Ok(Outcome::Attached { volume: VolumeId(1), writer: WriterGen(1) }));
    state
}

pub fn view(state: &ClusterState) -> Arc<View> {
    Arc::new(View::build(state, None))
}

pub fn key(index: u32) -> LayerKey {
    let object = ObjectId { volume: VolumeId(1), index: ObjectIndex(index) };
    LayerKey { object, layer: Layer(0) }
}
