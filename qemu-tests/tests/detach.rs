//! I4: who has a volume, since when, and how it is taken from him: cleanly, by force, and after his death.

use sheepdog_qemu_tests::{Client, Cluster, Command, Lab, PATIENCE, eventually};

const BLOCK: usize = 4096;

fn info(cluster: &Cluster, volume: &str) -> serde_json::Value {
    cluster.dog(0, &["volume", "info", volume])
}

/// The server closes what it still knows of its clients a moment after they have left.
fn wait_for_clients(cluster: &Cluster, volume: &str, clients: u64) {
    eventually(&format!("{clients} clients"), PATIENCE, || {
        (info(cluster, volume)["clients"] == clients).then_some(())
    });
}

#[test]
fn a_volume_is_given_back_unless_somebody_uses_it() {
    let lab = Lab::new("detach");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "16M", 3);
    let free = info(&cluster, "disk");
    assert!(free["attached_since"].is_null() && free["clients"].is_null(), "{free}");
    assert_eq!((&free["writer"], &free["settled"]), (&0.into(), &true.into()), "{free}");
    let refused = cluster.dog_refused(0, &["volume", "detach", "disk"]);
    assert!(refused.code == 1 && refused.message.contains("not attached"), "{refused:?}");
    let refused = cluster.dog_refused(0, &["volume", "detach", "nothing", "--force"]);
    assert!(refused.code == 1 && refused.message.contains("no volume"), "{refused:?}");

    let mut client = cluster.export_nbd(1, "disk").connect();
    client.write(0, &[0xAA; BLOCK]).unwrap();
    wait_for_clients(&cluster, "disk", 1);
    let held = info(&cluster, "disk");
    let holder = cluster.address(1);
    assert_eq!((&held["attached_to"], &held["writer"]), (&holder.clone().into(), &1.into()));
    let since = held["attached_since"].as_u64().unwrap();
    assert!(since >= held["created"].as_u64().unwrap(), "{held}");

    // From any node, the own one and another.
    for asked in [0, 1] {
        let refused = cluster.dog_refused(asked, &["volume", "detach", "disk"]);
        assert_eq!(refused.code, 1, "{}", refused.message);
        for part in [holder.as_str(), "generation 1", "1 client", "nothing was changed", "--force"]
        {
            assert!(refused.message.contains(part), "{part}: {}", refused.message);
        }
    }
    client.write(0, &[0xAB; BLOCK]).unwrap();
    drop(client);
    wait_for_clients(&cluster, "disk", 0);

    let done = cluster.dog(0, &["volume", "detach", "disk"]);
    let expected = serde_json::json!({
        "volume": "disk", "detached_from": holder, "attached_since": since, "writer": 1,
        "broken": false, "clients": 0,
    });
    assert_eq!(done, expected);
    let free = info(&cluster, "disk");
    assert!(free["attached_to"].is_null() && free["settled"] == true, "{free}");
    assert_eq!(cluster.dog(1, &["export", "list"]), serde_json::json!([]));
    // The node that had it does not take it back when it is started again.
    cluster.restart_after_stop(1);
    assert_eq!(cluster.attached_to(0, "disk"), None);

    let mut client = cluster.export_nbd(2, "disk").connect();
    assert!(client.read(0, BLOCK as u32).unwrap().iter().all(|byte| *byte == 0xAB));
    assert_eq!(info(&cluster, "disk")["settled"], true);
}

#[test]
fn a_lock_that_is_broken_fences_its_holder() {
    let lab = Lab::new("detach-force");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "16M", 3);
    let export = cluster.export_nbd(1, "disk");
    let mut stale = export.connect();
    stale.write(0, &[0xAA; BLOCK]).unwrap();
    stale.flush().unwrap();
    wait_for_clients(&cluster, "disk", 1);

    let done = cluster.dog(0, &["volume", "detach", "disk", "--force"]);
    assert_eq!((&done["broken"], &done["clients"]), (&true.into(), &1.into()), "{done}");
    assert_eq!(done["detached_from"], cluster.address(1));
    // Nobody else has it yet, and its old gateway serves it no more.
    let refused = eventually("the old gateway to hear of it", PATIENCE, || {
        stale.write(4096, &[0xBB; BLOCK]).err()
    });
    println!("a write of the old client: {refused:?}");
    if let Ok(mut again) = Client::connect(&export.socket, "disk") {
        assert!(again.read(0, BLOCK as u32).is_err(), "the fenced gateway serves reads");
    }
    let free = info(&cluster, "disk");
    assert!(free["attached_to"].is_null() && free["settled"] == false, "{free}");
    let list = cluster.dog(1, &["export", "list"]);
    assert!(list[0]["state"].as_str().unwrap().contains("fenced"), "{list}");

    // The next one looks for what may differ.
    let mut client = cluster.export_nbd(2, "disk").connect();
    assert!(client.read(0, BLOCK as u32).unwrap().iter().all(|byte| *byte == 0xAA));
    client.write(0, &[0xCC; BLOCK]).unwrap();
    eventually("the volume to be settled", PATIENCE, || {
        (info(&cluster, "disk")["settled"] == true).then_some(())
    });
    let held = info(&cluster, "disk");
    assert_eq!(held["attached_to"], cluster.address(2));
    assert!(held["writer"].as_u64() > Some(2), "{held}");
    // The fenced one can be tidied up, which changes nothing for the new one.
    cluster.unexport(1, "disk");
    assert_eq!(info(&cluster, "disk")["attached_to"], cluster.address(2));
    client.write(0, &[0xDD; BLOCK]).unwrap();
}

#[test]
fn the_lock_of_a_dead_holder_needs_no_force() {
    let lab = Lab::new("detach-dead");
    let mut cluster = Cluster::start(&lab, 4);
    cluster.create("disk", "16M", 3);
    let mut client = cluster.export_nbd(3, "disk").connect();
    client.write(0, &[0xAA; BLOCK]).unwrap();
    client.send(Command::Write, 4096, BLOCK as u32, &[0xBB; BLOCK]).unwrap();
    cluster.kill(3);
    eventually("the node to be down", PATIENCE, || {
        (cluster.member(0, 3)?["state"] == "down").then_some(())
    });
    let held = info(&cluster, "disk");
    assert!(held["attached_to"] == cluster.address(3) && held["clients"].is_null(), "{held}");
    let done = cluster.dog(0, &["volume", "detach", "disk"]);
    assert_eq!((&done["broken"], &done["clients"]), (&false.into(), &serde_json::Value::Null));
    assert_eq!(info(&cluster, "disk")["settled"], false);
    let mut client = cluster.export_nbd(0, "disk").connect();
    assert!(client.read(0, BLOCK as u32).unwrap().iter().all(|byte| *byte == 0xAA));
}
