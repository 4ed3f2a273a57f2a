//! I1: a node that was away catches up before its word counts: after it is back, another node may die.

use sheepdog_qemu_tests::{Cluster, Customer, Equal, Lab, Scribe, compare, seed};

#[test]
fn data_stays_right_while_nodes_go_and_come() {
    let lab = Lab::new("rejoin");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.dog(0, &["volume", "create", "disk", "32M", "--copies", "3", "--min-copies", "2"]);
    let export = cluster.export_nbd(0, "disk");
    let mut client = export.connect();
    let mut scribe = Scribe::new(seed(), 2048);
    for _ in 0..20 {
        scribe.write(&mut client, 32);
    }
    for victim in [1, 2, 1] {
        cluster.kill(victim);
        // What the victim misses: old blocks again, and new ones.
        for _ in 0..20 {
            scribe.write(&mut client, 32);
        }
        scribe.flush(&mut client);
        cluster.restart(victim);
        cluster.wait_healthy();
    }
    // Whoever is left beside the gateway must have everything, also when the gateway's own copy is gone.
    drop(client);
    cluster.unexport(0, "disk");
    cluster.kill(0);
    let mut client = cluster.export_nbd(1, "disk").connect();
    let looked_at = scribe.verify(&mut client);
    assert!(looked_at > 1000, "{looked_at}");
}

#[test]
fn below_min_copies_writes_wait_and_then_go_on() {
    let lab = Lab::new("rejoin-min-copies");
    let mut cluster = Cluster::start(&lab, 4);
    cluster.dog(0, &["volume", "create", "disk", "8M", "--copies", "3", "--min-copies", "3"]);
    let export = cluster.export_nbd(0, "disk");
    let mut client = export.connect();
    let mut scribe = Scribe::new(seed(), 1024);
    scribe.write(&mut client, 64);
    // One of four nodes down: some slots have only two of their three replicas.
    cluster.kill(3);
    let in_flight = scribe.send(&mut client, 64);
    cluster.restart(3);
    cluster.wait_healthy();
    for _ in 0..in_flight.len() {
        let (_, result) = client.reply().unwrap();
        assert!(result.is_ok(), "a waiting write failed: {result:?}");
    }
    scribe.write(&mut client, 64);
    scribe.flush(&mut client);
    scribe.verify(&mut client);
}

#[test]
fn nobody_waits_for_the_one_that_catches_up() {
    let lab = Lab::new("rejoin-under-load");
    let mut cluster = Cluster::start(&lab, 4);
    cluster.create("disk", "32M", 3);
    let customer = Customer::start(&cluster.export_nbd(0, "disk"), seed(), 8192);
    for victim in [1, 2, 3, 1] {
        cluster.kill(victim);
        // Most of its objects are overwritten while it is away.
        customer.wait_for_more(300);
        let away = customer.take_longest();
        cluster.restart(victim);
        cluster.wait_healthy();
        customer.wait_for_more(20);
        let back = customer.take_longest();
        println!("node {victim}: longest stall {away:?} when it died, {back:?} when it came back");
    }
    assert!(customer.finish().verified > 8192);
    let equal = cluster.stop_and_compare(3);
    println!("all replicas are equal: {equal:?}");
    assert_eq!((equal.layers, equal.replicas), (8, 24));
}

#[test]
fn replicas_that_differ_are_told_apart() {
    let lab = Lab::new("rejoin-differ");
    let mut cluster = Cluster::start(&lab, 2);
    let witness = cluster.add_node_with(&lab, &["--no-disk"]);
    cluster.wait_healthy();
    cluster.create("disk", "8M", 2);
    let mut client = cluster.export_nbd(0, "disk").connect();
    client.write(0, &[1; 8192]).unwrap();
    client.write(4 << 20, &[2; 4096]).unwrap();
    cluster.kill(1);
    client.write(4096, &[3; 4096]).unwrap();
    drop(client);
    cluster.terminate_all();
    let stores = [0, 1].map(|node| {
        let dir = cluster.stores(node).remove(0);
        cluster.read_store(node, &dir)
    });
    let told = std::panic::catch_unwind(|| compare(&stores, 2)).unwrap_err();
    let told = told.downcast_ref::<String>().unwrap();
    assert!(told.contains("1 differences") && told.contains("1 blocks differ: [(1, "), "{told}");
    [0, 1, witness].into_iter().for_each(|node| cluster.relaunch(node));
    cluster.wait_healthy();
    assert_eq!(cluster.stop_and_compare(2), Equal { layers: 2, replicas: 4, blocks: 6 });
}
