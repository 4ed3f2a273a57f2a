//! I3: all nodes die at once; whatever a finished flush covered is there, in whichever order they come back.

use sheepdog_qemu_tests::{Cluster, Lab, Scribe, seed};

#[test]
fn flushed_data_survives_the_death_of_all_nodes() {
    let lab = Lab::new("power-loss");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "64M", 3);
    let export = cluster.export_nbd(0, "disk");
    let mut scribe = Scribe::new(seed(), 4096);
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]] {
        let mut client = export.connect();
        for round in 0..12 {
            scribe.write(&mut client, 32);
            if round % 4 == 1 {
                scribe.flush(&mut client);
            }
        }
        // These are on their way when everything goes down.
        scribe.send(&mut client, 32);
        cluster.kill_all();
        drop(client);
        for node in order {
            cluster.restart(node);
        }
        cluster.wait_healthy();
        let looked_at = scribe.verify(&mut export.connect());
        println!("restart order {order:?}: {looked_at} blocks are right");
    }
}

#[test]
fn clean_stop_of_all_nodes_loses_nothing() {
    let lab = Lab::new("power-clean-stop");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "16M", 3);
    let export = cluster.export_nbd(0, "disk");
    let mut scribe = Scribe::new(seed(), 1024);
    let mut client = export.connect();
    for _ in 0..20 {
        scribe.write(&mut client, 32);
    }
    scribe.flush(&mut client);
    client.disconnect();
    for node in 0..3 {
        assert!(cluster.terminate(node).success(), "node {node}");
    }
    for node in [1, 2, 0] {
        cluster.restart(node);
    }
    cluster.wait_healthy();
    scribe.verify(&mut export.connect());
}
