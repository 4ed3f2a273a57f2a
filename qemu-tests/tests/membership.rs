//! Nodes that are drained, removed, replaced, lost and moved, while a client writes.

use sheepdog_qemu_tests::{Cluster, Lab, PATIENCE, Scribe, eventually, seed};

/// Blocks of the volumes here: 32 MiB.
const BLOCKS: usize = 8192;

fn voters(cluster: &Cluster, asked: usize) -> Vec<String> {
    let info = cluster.dog(asked, &["cluster", "info"]);
    let list = info["voters"].as_array().cloned().unwrap_or_default();
    list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

/// The daemon of a removed node ends by itself, and never starts again.
fn assert_expelled(cluster: &mut Cluster, index: usize) {
    let (status, log) = cluster.wait_end(index);
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("was removed from this cluster"), "{log}");
}

#[test]
fn a_node_is_drained_and_removed_under_load_and_refused_afterwards() {
    let lab = Lab::new("drain");
    let mut cluster = Cluster::start(&lab, 4);
    cluster.create("disk", "32M", 3);
    let mut client = cluster.export_nbd(0, "disk").connect();
    let mut scribe = Scribe::new(seed(), BLOCKS);
    (0..20).for_each(|_| scribe.write(&mut client, 32));
    let victim = cluster.address(3);
    scribe.write_during(&mut client, || {
        let refused = cluster.dog_refused(0, &["node", "remove", &victim]);
        assert!(refused.message.contains("drain it first"), "{}", refused.message);
        let drained = cluster.dog(1, &["node", "drain", &victim, "--wait"]);
        assert_eq!((&drained["state"], &drained["drained"]), (&"draining".into(), &true.into()));
        cluster.dog(0, &["node", "remove", &victim]);
        assert_expelled(&mut cluster, 3);
        cluster.wait_healthy();
    });
    assert!(cluster.member(0, 3).is_none());
    eventually("the log to do without it", PATIENCE, || {
        (!voters(&cluster, 0).contains(&victim)).then_some(())
    });
    cluster.relaunch(3);
    assert_expelled(&mut cluster, 3);
    // Three nodes, three copies: none can be spared.
    let spared = cluster.dog_refused(0, &["node", "drain", &cluster.address(2)]);
    assert!(spared.message.contains("add nodes first"), "{}", spared.message);
    assert!(scribe.verify(&mut client) > 500);
}

#[test]
fn a_node_that_stays_down_is_out_and_may_return() {
    let lab = Lab::new("out");
    let mut cluster = Cluster::start(&lab, 5);
    cluster.create("disk", "32M", 3);
    let mut client = cluster.export_nbd(0, "disk").connect();
    let mut scribe = Scribe::new(seed(), BLOCKS);
    (0..20).for_each(|_| scribe.write(&mut client, 32));
    cluster.dog(0, &["cluster", "set", "down-out-interval", "never"]);
    cluster.kill(3);
    eventually("the node to be missed", PATIENCE, || {
        let health = cluster.dog(1, &["cluster", "health"]);
        let text = health["reasons"].to_string();
        text.contains("down-out-interval is never").then_some(())
    });
    cluster.dog(0, &["cluster", "set", "down-out-interval", "1s"]);
    scribe.write_during(&mut client, || {
        eventually("the node to be out", PATIENCE, || {
            (cluster.member(1, 3)?["state"] == "out").then_some(())
        });
        cluster.wait_complete(1);
    });
    // Nobody needs it any more: the next one may die.
    cluster.kill(2);
    (0..5).for_each(|_| scribe.write(&mut client, 32));
    cluster.restart(2);
    cluster.restart(3);
    cluster.wait_healthy();
    assert_eq!(cluster.member(0, 3).unwrap()["state"], "up");
    assert!(scribe.verify(&mut client) > 500);
    // What came back holds the data as well.
    drop(client);
    cluster.unexport(0, "disk");
    cluster.kill(0);
    cluster.kill(1);
    cluster.restart(1);
    let mut client = cluster.export_nbd(3, "disk").connect();
    assert!(scribe.verify(&mut client) > 500);
}

#[test]
fn four_nodes_survive_one_death_after_another() {
    let lab = Lab::new("votes");
    let mut cluster = Cluster::start(&lab, 4);
    cluster.create("disk", "32M", 2);
    let mut client = cluster.export_nbd(0, "disk").connect();
    let mut scribe = Scribe::new(seed(), BLOCKS);
    (0..20).for_each(|_| scribe.write(&mut client, 32));
    cluster.dog(0, &["cluster", "set", "down-out-interval", "1s"]);
    let voting = |cluster: &Cluster, wanted: usize| {
        let what = format!("{wanted} voters");
        eventually(&what, PATIENCE, || (voters(cluster, 0).len() == wanted).then_some(()));
    };
    voting(&cluster, 4);
    cluster.kill(3);
    voting(&cluster, 3);
    cluster.wait_complete(0);
    // With the vote of the first there would be no majority any more.
    cluster.kill(2);
    eventually("the second to be down", PATIENCE, || {
        (cluster.member(0, 2)?["state"] == "down").then_some(())
    });
    (0..20).for_each(|_| scribe.write(&mut client, 32));
    cluster.restart(2);
    cluster.restart(3);
    cluster.wait_healthy();
    voting(&cluster, 4);
    assert!(scribe.verify(&mut client) > 100);
}

#[test]
fn a_lost_node_is_removed() {
    let lab = Lab::new("lost");
    let mut cluster = Cluster::start(&lab, 4);
    cluster.create("disk", "16M", 3);
    let victim = cluster.address(3);
    cluster.kill(3);
    eventually("it to be down", PATIENCE, || {
        (cluster.member(0, 3)?["state"] == "down").then_some(())
    });
    cluster.dog(0, &["node", "remove", &victim]);
    cluster.wait_healthy();
    assert!(cluster.member(1, 3).is_none());
    eventually("the log to do without it", PATIENCE, || {
        (!voters(&cluster, 1).contains(&victim)).then_some(())
    });
    cluster.relaunch(3);
    assert_expelled(&mut cluster, 3);
    let unknown = cluster.dog_refused(0, &["node", "remove", &victim]);
    assert!(unknown.message.contains("there is no node"), "{}", unknown.message);
}

#[test]
fn weights_and_zones_move_data() {
    let lab = Lab::new("weights");
    let cluster = Cluster::start(&lab, 4);
    cluster.create("disk", "32M", 2);
    let mut client = cluster.export_nbd(0, "disk").connect();
    let mut scribe = Scribe::new(seed(), BLOCKS);
    let used = |index: usize| cluster.member(0, index).unwrap()["disks"][0]["used"].as_u64();
    let shrunk = cluster.address(1);
    scribe.write_during(&mut client, || {
        cluster.dog(0, &["node", "set-weight", &shrunk, "0"]);
        cluster.wait_healthy();
        eventually("the disk to be empty", PATIENCE, || (used(1) == Some(0)).then_some(()));
        cluster.dog(0, &["node", "set-weight", &shrunk, "1000"]);
        cluster.wait_healthy();
        eventually("the disk to be in use", PATIENCE, || (used(1) > Some(0)).then_some(()));
        // Both copies go to the two zones: whatever is in rack1 is on node 1.
        for index in [0, 2, 3] {
            cluster.dog(0, &["node", "set-zone", &cluster.address(index), "rack0"]);
        }
        cluster.dog(0, &["node", "set-zone", &shrunk, "rack1"]);
        cluster.wait_healthy();
    });
    scribe.flush(&mut client);
    eventually("node 1 to have all of it", PATIENCE, || {
        let volume = cluster.dog(0, &["volume", "info", "disk"]);
        (used(1).is_some() && used(1) == volume["used"].as_u64()).then_some(())
    });
    let refused = cluster.dog_refused(0, &["node", "set-weight", "nobody", "1"]);
    assert!(refused.message.contains("no disk or node"), "{}", refused.message);
    assert!(scribe.verify(&mut client) > 500);
}

#[test]
fn every_node_is_replaced_under_load() {
    let lab = Lab::new("rolling");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "32M", 3);
    let mut scribe = Scribe::new(seed(), BLOCKS);
    for old in 0..3 {
        // The gateway is on the node that goes last.
        let gateway = if old < 2 { 2 } else { 3 };
        let mut client = cluster.export_nbd(gateway, "disk").connect();
        let leaving = cluster.address(old);
        scribe.write_during(&mut client, || {
            let new = cluster.add_node(&lab);
            cluster.wait_healthy();
            cluster.dog(new, &["node", "drain", &leaving, "--wait"]);
            cluster.dog(new, &["node", "remove", &leaving]);
            assert_expelled(&mut cluster, old);
            cluster.wait_healthy();
        });
        scribe.verify(&mut client);
        drop(client);
        cluster.unexport(gateway, "disk");
    }
    let mut client = cluster.export_nbd(5, "disk").connect();
    assert!(scribe.verify(&mut client) > 500);
    eventually("the log to do without the last", PATIENCE, || {
        (voters(&cluster, 4).len() == 3).then_some(())
    });
}

#[test]
fn many_nodes_join_at_once() {
    let lab = Lab::new("storm");
    let mut cluster = Cluster::start(&lab, 1);
    cluster.dog(0, &["volume", "create", "disk", "16M", "--copies", "3", "--min-copies", "1"]);
    let mut client = cluster.export_nbd(0, "disk").connect();
    let mut scribe = Scribe::new(seed(), 4096);
    scribe.write_during(&mut client, || {
        cluster.add_nodes(&lab, 6);
        cluster.wait_healthy();
    });
    assert_eq!(voters(&cluster, 6).len(), 5);
    assert!(scribe.verify(&mut client) > 100);
}
