//! I2, I8: SIGKILL of a node that is not the gateway, under I/O: no error, no wrong byte; the stall is measured.

use sheepdog_qemu_tests::{Cluster, Fio, Lab, PATIENCE};

/// Runs fio through `gateway` while `victim` dies; leaves the cluster healthy again.
fn kill_under_load(lab: &Lab, cluster: &mut Cluster, uri: &str, victim: usize, what: &str) {
    let epoch = cluster.epoch(victim);
    let mut fio = Fio::start(lab, &format!("fio-{what}"), uri, 32, 1500);
    fio.wait_for_percent(15.0);
    cluster.kill(victim);
    let result = fio.finish(4 * PATIENCE);
    assert_eq!(result.writes, 8192);
    println!(
        "{what}: longest write {:?}, longest read {:?}, of {} writes",
        result.longest.0, result.longest.1, result.writes
    );
    cluster.restart(victim);
    cluster.wait_healthy();
    assert!(cluster.epoch(victim) >= epoch + 2, "death and return each make an epoch");
}

#[test]
fn killed_nodes_cost_no_error_and_no_byte() {
    let lab = Lab::new("node-loss");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "64M", 3);
    // The gateway is a follower, so that the leader of the cluster log can be among the dead.
    let leader = cluster.leader();
    let gateway = (leader + 1) % 3;
    let uri = cluster.export_nbd(gateway, "disk").uri();
    kill_under_load(&lab, &mut cluster, &uri, leader, "leader-killed");
    for victim in (0..3).filter(|n| *n != gateway) {
        kill_under_load(&lab, &mut cluster, &uri, victim, &format!("node{victim}-killed"));
    }
}
