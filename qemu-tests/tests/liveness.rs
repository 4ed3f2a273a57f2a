//! I8: nodes that cannot reach each other although both reach the leader end up in one stable state, and
//! come back by themselves; nodes that come and go all the time are made to wait.

use serde_json::Value;
use sheepdog_qemu_tests::{Cluster, Lab, Net, PATIENCE, Pulse, eventually, seed};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PORT: u16 = 7000;

fn nodes_on(lab: &Lab, hosts: usize) -> (Arc<Net>, Cluster) {
    let net = Arc::new(Net::new(hosts));
    let cluster = Cluster::start_on(lab, &net);
    (net, cluster)
}

fn state_of(cluster: &Cluster, asked: usize, index: usize) -> Option<String> {
    let list = cluster.try_dog(asked, &["node", "list"]).ok()?;
    let address = cluster.address(index);
    let node = list.as_array()?.iter().find(|n| n["address"] == address.as_str())?;
    node["state"].as_str().map(str::to_owned)
}

fn wait_state(cluster: &Cluster, asked: usize, index: usize, state: &str) {
    eventually(&format!("node {index} to be {state}"), 2 * PATIENCE, || {
        (state_of(cluster, asked, index)? == state).then_some(())
    });
}

/// Why the epochs after `epoch` began.
fn causes_since(cluster: &Cluster, asked: usize, epoch: u64) -> Vec<String> {
    let info = cluster.dog(asked, &["cluster", "info"]);
    let epochs = info["epochs"].as_array().cloned().unwrap_or_default();
    let since = epochs.iter().filter(|e| e["epoch"].as_u64() > Some(epoch));
    since.filter_map(|e| e["cause"].as_str().map(str::to_owned)).collect()
}

/// What a node says about its own health.
fn reasons(cluster: &Cluster, index: usize) -> Vec<String> {
    let health = cluster.try_dog(index, &["cluster", "health"]).unwrap_or(Value::Null);
    let reasons = health["reasons"].as_array().cloned().unwrap_or_default();
    reasons.iter().filter_map(|r| r.as_str().map(str::to_owned)).collect()
}

/// `cut` breaks the way between the gateway and another node, both of which still reach the leader. One of
/// them has to leave, once, and to come back when the cut is healed.
fn one_of_two_leaves(name: &str, cut: impl Fn(&Net, usize, usize)) {
    let lab = Lab::new(name);
    let (net, cluster) = nodes_on(&lab, 3);
    cluster.create("disk", "16M", 3);
    let leader = cluster.leader();
    let (gateway, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let pulse = Pulse::start(&cluster.export_nbd(gateway, "disk"), seed());
    pulse.take_longest();
    let epoch = cluster.epoch(leader);
    cut(&net, gateway, other);
    wait_state(&cluster, leader, other, "down");
    pulse.wait_for_more(100);
    println!("{name}: longest stall {:?}", pulse.take_longest());

    // It says for which link it waits, and so does the log.
    let link = cluster.address(gateway);
    eventually("the reason", PATIENCE, || {
        let found = |r: &String| r.contains("has not entered") && r.contains(&link);
        reasons(&cluster, other).iter().any(found).then_some(())
    });
    let causes = causes_since(&cluster, leader, epoch);
    let named = |cause: &String| cause.contains(&link) && cause.contains("reach");
    assert!(causes.iter().any(named), "{causes:?}");
    // It knocks again and again, and nothing changes: no epoch but that one. A busy machine may lose a lease.
    pulse.wait_for_more(1500);
    let causes = causes_since(&cluster, leader, epoch);
    assert_eq!(causes.iter().filter(|cause| cause.contains("reach")).count(), 1, "{causes:?}");

    net.heal();
    cluster.wait_healthy();
    pulse.wait_for_more(100);
    let causes = causes_since(&cluster, leader, epoch);
    assert_eq!(causes.iter().filter(|cause| cause.contains("reach")).count(), 1, "{causes:?}");
    assert!(pulse.verify() > 500);
}

#[test]
fn cut_both_ways() {
    one_of_two_leaves("liveness-both-ways", |net, a, b| net.cut(a, b));
}

#[test]
fn cut_one_way() {
    one_of_two_leaves("liveness-one-way", |net, a, b| net.cut_one_way(a, b));
}

#[test]
fn cut_for_calls_of_one_side_only() {
    one_of_two_leaves("liveness-calls", |net, a, b| net.cut_calls(a, b, PORT));
}

#[test]
fn one_bad_node_keeps_no_others_out() {
    let lab = Lab::new("liveness-one-bad");
    let (net, mut cluster) = nodes_on(&lab, 5);
    cluster.create("disk", "16M", 3);
    let leader = cluster.leader();
    let [bad, gateway, first, second] = [1, 2, 3, 4].map(|n| (leader + n) % 5);
    let pulse = Pulse::start(&cluster.export_nbd(gateway, "disk"), seed());
    // Nodes that are restarted cannot reach the bad one, which everybody else goes on with.
    net.cut(bad, first);
    net.cut(bad, second);
    for index in [first, second] {
        cluster.kill(index);
        cluster.restart(index);
    }
    for index in [first, second] {
        wait_state(&cluster, leader, index, "up");
    }
    wait_state(&cluster, leader, bad, "down");
    pulse.wait_for_more(100);
    net.heal();
    cluster.wait_healthy();
    assert!(pulse.verify() > 100);
}

#[test]
fn silent_host_and_dead_process_stall_io_for_a_moment() {
    let lab = Lab::new("liveness-stalls");
    let (net, mut cluster) = nodes_on(&lab, 5);
    // Whichever two are gone, two replicas are left.
    cluster.dog(0, &["volume", "create", "disk", "16M", "--copies", "4", "--min-copies", "2"]);
    let leader = cluster.leader();
    let gateway = (leader + 1) % 5;
    let pulse = Pulse::start(&cluster.export_nbd(gateway, "disk"), seed());
    // Whoever leads by then, unless it is the gateway.
    let victims = |cluster: &Cluster| {
        let leader = cluster.leader();
        let follower = (0..5).find(|n| ![leader, gateway].contains(n));
        let leader = (leader != gateway).then_some(leader);
        [(follower, "a follower"), (leader, "the leader")]
    };
    for (victim, what) in victims(&cluster) {
        let Some(victim) = victim else { continue };
        pulse.take_longest();
        cluster.kill(victim);
        wait_state(&cluster, gateway, victim, "down");
        pulse.wait_for_more(50);
        println!("process of {what} killed: longest stall {:?}", pulse.take_longest());
        cluster.restart(victim);
        cluster.wait_healthy();
    }
    for (victim, what) in victims(&cluster) {
        let Some(victim) = victim else { continue };
        pulse.take_longest();
        net.unplug(victim);
        wait_state(&cluster, gateway, victim, "down");
        pulse.wait_for_more(50);
        println!("host of {what} unplugged: longest stall {:?}", pulse.take_longest());
        net.heal();
        cluster.wait_healthy();
    }
    assert!(pulse.verify() > 500);
}

#[test]
fn witness_without_disks_lets_either_of_two_go_on() {
    let lab = Lab::new("liveness-witness");
    let mut cluster = Cluster::start(&lab, 2);
    let witness = cluster.add_node_with(&lab, &["--no-disk"]);
    cluster.wait_healthy();
    let disks = |cluster: &Cluster, index: usize| {
        let list = cluster.dog(0, &["node", "list"]);
        let address = cluster.address(index);
        let node = list.as_array().and_then(|l| l.iter().find(|n| n["address"] == *address));
        node.and_then(|n| n["disks"].as_array()).map(Vec::len)
    };
    assert_eq!([0, 1, witness].map(|index| disks(&cluster, index)), [Some(1), Some(1), Some(0)]);
    cluster.dog(0, &["volume", "create", "disk", "16M", "--copies", "2", "--min-copies", "1"]);
    cluster.dog(0, &["volume", "create", "far", "16M", "--copies", "2", "--min-copies", "1"]);
    let pulse = Pulse::start(&cluster.export_nbd(0, "disk"), seed());
    let far = Pulse::start(&cluster.export_nbd(witness, "far"), seed());
    for victim in [1, witness] {
        if victim == witness {
            assert!(far.verify() > 50);
            cluster.unexport(witness, "far");
            break;
        }
        cluster.kill(victim);
        wait_state(&cluster, 0, victim, "down");
        pulse.wait_for_more(50);
        far.wait_for_more(50);
        cluster.restart(victim);
        cluster.wait_healthy();
    }
    cluster.kill(witness);
    wait_state(&cluster, 0, witness, "down");
    pulse.wait_for_more(50);
    cluster.restart(witness);
    cluster.wait_healthy();
    // Now the other one of the two, through a gateway that stays.
    assert!(pulse.verify() > 50);
    cluster.unexport(0, "disk");
    let pulse = Pulse::start(&cluster.export_nbd(witness, "disk"), seed());
    cluster.kill(0);
    wait_state(&cluster, witness, 0, "down");
    pulse.wait_for_more(50);
    cluster.restart(0);
    cluster.wait_healthy();
    assert!(pulse.verify() > 50);

    let dir = cluster.dir(0).display().to_string();
    assert!(cluster.terminate(0).success());
    let refused = sheepdog_qemu_tests::sheep_refused(&["--dir", &dir, "--no-disk"]);
    assert!(refused.message.contains("--no-disk"), "{}", refused.message);
}

#[test]
fn two_nodes_come_back_in_either_order() {
    let lab = Lab::new("liveness-two");
    let mut cluster = Cluster::start(&lab, 2);
    cluster.create("disk", "16M", 2);
    let export = cluster.export_nbd(0, "disk");
    for order in [[0, 1], [1, 0]] {
        let pulse = Pulse::start(&export, seed());
        assert!(pulse.verify() > 50);
        cluster.kill_all();
        for index in order {
            cluster.restart(index);
        }
        cluster.wait_healthy();
    }
    assert!(Pulse::start(&export, seed()).verify() > 50);
}

#[test]
fn everything_restarts_although_a_host_is_gone() {
    let lab = Lab::new("liveness-restart");
    let (net, mut cluster) = nodes_on(&lab, 3);
    cluster.create("disk", "16M", 3);
    let export = cluster.export_nbd(0, "disk");
    assert!(Pulse::start(&export, seed()).verify() > 50);
    cluster.kill_all();
    // By the agreed state it is up, and it does not even refuse connections.
    net.unplug(2);
    let begin = Instant::now();
    for index in [0, 1] {
        cluster.restart(index);
    }
    let pulse = Pulse::start(&export, seed());
    println!("I/O after {:?}", begin.elapsed());
    wait_state(&cluster, 0, 2, "down");
    pulse.wait_for_more(50);
    net.heal();
    cluster.restart(2);
    cluster.wait_healthy();
    assert!(pulse.verify() > 50);
}

#[test]
fn node_that_comes_and_goes_waits_longer_each_time() {
    let lab = Lab::new("liveness-flapping");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "16M", 3);
    let pulse = Pulse::start(&cluster.export_nbd(0, "disk"), seed());
    let held = |cluster: &Cluster| cluster.log_text(2).matches("wait longer each time").count();
    let mut waits: Vec<(Duration, usize)> = Vec::new();
    // A machine may be so slow that the first waits are over when the node knocks; later ones are longer.
    while waits.last().is_none_or(|(_, held)| *held < 2) {
        assert!(waits.len() < 9, "entered again after, held so often: {waits:?}");
        cluster.kill(2);
        wait_state(&cluster, 0, 2, "down");
        let begin = Instant::now();
        cluster.restart(2);
        wait_state(&cluster, 0, 2, "up");
        waits.push((begin.elapsed(), held(&cluster)));
    }
    println!("entered again after, held so often: {waits:?}");
    let held: Vec<_> = waits.iter().map(|(_, held)| *held).collect();
    assert_eq!(held[..3], [0, 0, 0], "the first ones are free");
    // Whoever leads next goes on with it.
    let leader = cluster.leader();
    cluster.wait_healthy();
    if leader == 1 {
        cluster.kill(1);
        wait_state(&cluster, 0, 1, "down");
    }
    pulse.wait_for_more(50);
    assert!(pulse.verify() > 50);
}
