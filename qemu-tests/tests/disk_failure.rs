//! I2: a disk that fails leaves service by itself; the daemon lives on and so does all I/O.
//! I7: what a scrub has found damaged is repaired from another replica.

use sheepdog_qemu_tests::{Cluster, FileSystem, Lab, PATIENCE, Scribe, eventually, inside, seed};

#[test]
fn a_failed_disk_leaves_service_and_everything_goes_on() {
    if !inside("a_failed_disk_leaves_service_and_everything_goes_on") {
        return;
    }
    let lab = Lab::new("disk-failure");
    let disk = FileSystem::new(&lab);
    let mut cluster = Cluster::start(&lab, 2);
    let victim = cluster.add_node_with(&lab, &["--disk", &disk.path("store")]);
    cluster.wait_healthy();
    // One volume is served by another node, one by the node that is to lose its disk.
    let volumes = [("far", 0), ("near", victim)];
    let mut guests = volumes.map(|(name, gateway)| {
        cluster.create(name, "16M", 3);
        (cluster.export_nbd(gateway, name).connect(), Scribe::new(seed(), 2048))
    });
    let mut work = |rounds: usize| {
        for (client, scribe) in &mut guests {
            (0..rounds).for_each(|_| scribe.write(client, 32));
            scribe.flush(client);
        }
    };
    work(10);
    disk.fail();
    work(20);
    let address = cluster.address(victim);
    for node in 0..cluster.len() {
        eventually("the disk to be missed", PATIENCE, || {
            let health = cluster.try_dog(node, &["cluster", "health"]).ok()?;
            let reasons = health["reasons"].as_array()?;
            let named = |text: &str| text.contains(&address) && text.contains("out of service: ");
            let missed = reasons.iter().any(|r| r.as_str().is_some_and(named));
            (missed && health["status"] == "degraded").then_some(())
        });
    }
    assert!(!cluster.process(victim).is_dead());
    cluster.wait_status("degraded");
    work(5);
    for (client, scribe) in &mut guests {
        assert!(scribe.verify(client) > 500);
    }
    drop(guests);
    // The disk was only unplugged: once it is back, a restart of its node brings it back.
    let status = cluster.terminate(victim);
    assert!(status.success(), "{status}");
    disk.come_back();
    cluster.restart(victim);
    cluster.wait_healthy();
}

#[test]
fn what_a_scrub_finds_is_repaired_by_itself() {
    const BLOCK: u64 = 4096;
    let lab = Lab::new("scrub");
    let mut cluster = Cluster::start(&lab, 2);
    cluster.create("disk", "16M", 2);
    let content = |block: u64| (0x5EED_0000_0000 + block).to_le_bytes().repeat(BLOCK as usize / 8);
    let mut client = cluster.export_nbd(0, "disk").connect();
    for block in 0..16 {
        client.write(block * BLOCK, &content(block)).unwrap();
    }
    client.flush().unwrap();
    drop(client);
    cluster.unexport(0, "disk");
    // A clean stop puts everything into the data file.
    assert!(cluster.terminate(0).success());
    let path = cluster.dir(0).join("disk/data");
    let mut data = std::fs::read(&path).unwrap();
    let place = data.chunks(BLOCK as usize).position(|bytes| bytes == content(5)).unwrap();
    data[place * BLOCK as usize + 77] ^= 8;
    std::fs::write(&path, data).unwrap();
    cluster.restart(0);
    cluster.wait_healthy();

    let scrub = || {
        cluster.dog(0, &["node", "scrub", "start", "--rate", "1G"]);
        eventually("the scrub to end", PATIENCE, || {
            let scrubs = cluster.dog(0, &["node", "scrub", "status"]);
            (scrubs[0]["state"] == "idle").then(|| scrubs[0].clone())
        })
    };
    let found = scrub();
    assert_eq!(found["last"]["found"], 1, "{found}");
    // Nobody reads it: the volume has no export.
    cluster.wait_healthy();
    let again = scrub();
    assert_eq!((&again["last"]["found"], &again["damaged_blocks"]), (&0.into(), &0.into()));
    let mut client = cluster.export_nbd(0, "disk").connect();
    assert!(client.read(5 * BLOCK, BLOCK as u32).unwrap() == content(5));
}
