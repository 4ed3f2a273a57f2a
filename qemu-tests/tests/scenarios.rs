//! What users of other clusters have met with: restarts of everything, disks that come back with deleted
//! data or have no room, recoveries that are in the way or never end.

use serde_json::Value;
use sheepdog_qemu_tests::{
    Cluster, Customer, FileSystem, Guest, Lab, PATIENCE, Scribe, eventually, inside, seed,
};

/// Adds something up over the recoveries of all disks.
fn recovery(cluster: &Cluster, asked: usize, field: &str) -> u64 {
    let nodes = eventually("all nodes to tell of their recoveries", PATIENCE, || {
        let recovery = cluster.dog(asked, &["node", "recovery"]);
        let nodes = recovery["nodes"].as_array().cloned().unwrap_or_default();
        nodes.iter().all(|node| node["disks"].is_array()).then_some(nodes)
    });
    let disks = nodes.iter().filter_map(|node| node["disks"].as_array()).flatten();
    disks.map(|disk| disk[field].as_u64().unwrap_or_else(|| panic!("no {field}: {disk}"))).sum()
}

fn start_all_at_once(cluster: &mut Cluster) {
    for index in 0..cluster.len() {
        cluster.relaunch(index);
    }
    for index in 0..cluster.len() {
        cluster.wait_listening(index);
    }
}

/// Nothing if the node is too slow to answer.
fn used(cluster: &Cluster, index: usize) -> Option<u64> {
    cluster.member(0, index)?["disks"][0]["used"].as_u64()
}

fn used_by_all(cluster: &Cluster) -> Vec<u64> {
    let used = |node| eventually("the use of a disk", PATIENCE, || used(cluster, node));
    (0..cluster.len()).map(used).collect()
}

#[test]
fn three_unclean_restarts_of_everything_in_a_row() {
    let lab = Lab::new("unclean-restarts");
    let mut cluster = Cluster::start(&lab, 4);
    cluster.create("disk", "32M", 3);
    let customer = Customer::start(&cluster.export_nbd(0, "disk"), seed(), 8192);
    for _ in 0..3 {
        customer.wait_for_more(50);
        customer.excuse();
        cluster.kill_all();
        // Nobody waits for the recovery from the time before.
        start_all_at_once(&mut cluster);
    }
    customer.wait_for_more(50);
    cluster.wait_healthy();
    assert!(customer.finish().verified > 8192);
    let equal = cluster.stop_and_compare(3);
    assert_eq!((equal.layers, equal.replicas), (8, 24));
}

#[test]
fn everything_stops_and_starts_at_once() {
    let lab = Lab::new("at-once");
    let mut cluster = Cluster::start(&lab, 5);
    cluster.create("disk", "32M", 3);
    let export = cluster.export_nbd(0, "disk");
    let mut scribe = Scribe::new(seed(), 8192);
    let mut client = export.connect();
    (0..20).for_each(|_| scribe.write(&mut client, 32));
    drop(client);
    let epoch = cluster.epoch(0);
    for _ in 0..2 {
        cluster.terminate_all();
        start_all_at_once(&mut cluster);
        cluster.wait_healthy();
    }
    println!("{} epochs for two restarts of five nodes", cluster.epoch(0) - epoch);
    let mut client = export.connect();
    assert!(scribe.verify(&mut client) > 500);
    drop(client);
    let equal = cluster.stop_and_compare(3);
    assert_eq!((equal.layers, equal.replicas), (8, 24));
}

#[test]
fn fewer_zones_than_copies() {
    let lab = Lab::new("few-zones");
    let mut cluster = Cluster::empty(&lab, None);
    for zone in ["left", "left", "right"] {
        cluster.add_node_with(&lab, &["--zone", zone]);
    }
    cluster.wait_healthy();
    cluster.create("disk", "32M", 3);
    let customer = Customer::start(&cluster.export_nbd(2, "disk"), seed(), 8192);
    for victim in [0, 1] {
        cluster.kill(victim);
        customer.wait_for_more(100);
        cluster.restart(victim);
        cluster.wait_healthy();
    }
    // With one more, no zone has to hold two copies of anything before it holds one of all.
    cluster.add_node_with(&lab, &["--zone", "right"]);
    cluster.wait_healthy();
    assert!(customer.finish().verified > 8192);
    let equal = cluster.stop_and_compare(3);
    assert_eq!((equal.layers, equal.replicas), (8, 24));
}

#[test]
fn fewer_nodes_than_copies_until_one_comes() {
    let lab = Lab::new("few-nodes");
    let mut cluster = Cluster::start(&lab, 2);
    cluster.dog(0, &["volume", "create", "disk", "16M", "--copies", "3", "--min-copies", "2"]);
    cluster.wait_status("degraded");
    let customer = Customer::start(&cluster.export_nbd(0, "disk"), seed(), 4096);
    let health = cluster.dog(0, &["cluster", "health"]);
    assert!(health["reasons"].to_string().contains("fewer than the copies"), "{health}");
    customer.wait_for_more(100);
    cluster.add_node(&lab);
    cluster.wait_healthy();
    customer.wait_for_more(20);
    assert!(customer.finish().verified > 4096);
    let equal = cluster.stop_and_compare(3);
    assert_eq!((equal.layers, equal.replicas), (4, 12));
}

#[test]
fn deleted_volumes_do_not_come_back_with_a_node() {
    let lab = Lab::new("deleted");
    let mut cluster = Cluster::start(&lab, 3);
    for name in ["kept", "gone"] {
        cluster.create(name, "16M", 3);
        let mut client = cluster.export_nbd(0, name).connect();
        let mut scribe = Scribe::new(seed(), 4096);
        (0..20).for_each(|_| scribe.write(&mut client, 32));
        scribe.flush(&mut client);
        drop(client);
        cluster.unexport(0, name);
    }
    let both = used_by_all(&cluster)[2];
    cluster.kill(2);
    cluster.dog(0, &["volume", "delete", "gone"]);
    cluster.create("gone", "16M", 3);
    cluster.restart(2);
    cluster.wait_healthy();
    eventually("the space of the deleted volume", 2 * PATIENCE, || {
        let [one, other, third] = [0, 1, 2].map(|node| used(&cluster, node));
        (one? < both && one == other && one == third).then_some(())
    });
    let mut client = cluster.export_nbd(2, "gone").connect();
    for offset in (0..16).map(|mebibyte| mebibyte << 20) {
        assert!(client.read(offset, 1 << 20).unwrap().iter().all(|byte| *byte == 0));
    }
    drop(client);
    let equal = cluster.stop_and_compare(3);
    assert_eq!((equal.layers, equal.replicas), (4, 12), "only what is kept");
}

#[test]
fn a_short_absence_moves_only_what_changed() {
    const MEBIBYTES: u64 = 96;
    const OBJECT: u64 = 4 << 20;
    let lab = Lab::new("short-absence");
    let mut cluster = Cluster::start(&lab, 5);
    cluster.create("disk", "96M", 3);
    let export = cluster.export_nbd(0, "disk");
    let mut client = export.connect();
    for offset in (0..MEBIBYTES).map(|mebibyte| mebibyte << 20) {
        client.write(offset, &vec![0xA5; 1 << 20]).unwrap();
    }
    client.flush().unwrap();
    let placed = used_by_all(&cluster);
    let objects = placed[3] / OBJECT;
    for changed in [0_u64, 32] {
        cluster.kill(3);
        eventually("it to be down", PATIENCE, || {
            (cluster.member(0, 3)?["state"] == "down").then_some(())
        });
        for object in (0..MEBIBYTES << 20).step_by(OBJECT as usize) {
            for block in 0..changed {
                client.write(object + block * 31 * 4096, &[block as u8; 4096]).unwrap();
            }
        }
        cluster.restart(3);
        cluster.wait_healthy();
        let moved = recovery(&cluster, 0, "bytes_moved");
        println!("{changed} blocks of {objects} objects changed: {moved} bytes were copied");
        let missed = objects * changed * 4096;
        assert!((missed..=missed * 6 / 5).contains(&moved), "{moved}");
    }
    assert_eq!(placed, used_by_all(&cluster));
    drop(client);
    let equal = cluster.stop_and_compare(3);
    assert_eq!(equal.replicas, 24 * 3);
}

#[test]
fn a_guest_boots_while_a_recovery_runs() {
    let lab = Lab::new("boot-during-recovery");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("big", "64M", 3);
    cluster.create("vm", "64M", 3);
    let disk = cluster.export_vhost(0, "vm").vhost_disk();
    let make = "mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt && \
        blkcheck write /mnt/file --size 8388608 --count 1000 --fsync-every 50 && umount /mnt";
    Guest::boot(&lab, "make", &disk, make).finish(4 * PATIENCE).expect_success();
    // All of it has to be copied, at a pace that no boot waits for: eight minutes.
    cluster.dog(0, &["cluster", "set", "recovery.max-bandwidth", "128K"]);
    cluster.kill(2);
    let mut client = cluster.export_nbd(0, "big").connect();
    for offset in (0..64).map(|mebibyte| mebibyte << 20) {
        client.write(offset, &vec![0x5A; 1 << 20]).unwrap();
    }
    client.flush().unwrap();
    cluster.restart(2);
    eventually("the recovery to run", PATIENCE, || {
        (recovery(&cluster, 0, "objects_planned") > recovery(&cluster, 0, "objects_copied"))
            .then_some(())
    });
    let check = "e2fsck -fn /dev/vda && mount -t ext4 /dev/vda /mnt && \
        blkcheck verify /mnt/file --flushed 1000 && \
        blkcheck write /mnt/file --start 1000 --size 8388608 --count 500 --fsync-every 50 && umount /mnt";
    let guest = Guest::boot(&lab, "boot", &disk, check);
    println!("{}", guest.finish(4 * PATIENCE).expect_success());
    let health = cluster.dog(0, &["cluster", "health"]);
    assert_eq!(health["status"], "degraded", "the recovery was over too early: {health}");
    cluster.dog(0, &["cluster", "set", "recovery.max-bandwidth", "unlimited"]);
    cluster.wait_healthy();
    drop(client);
    let equal = cluster.stop_and_compare(3);
    assert!(equal.layers > 16, "{equal:?}");
}

#[test]
fn a_disk_without_room_does_not_keep_the_cluster_busy() {
    if !inside("a_disk_without_room_does_not_keep_the_cluster_busy") {
        return;
    }
    let lab = Lab::new("no-room");
    let disk = FileSystem::new(&lab);
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("big", "256M", 2);
    cluster.create("busy", "16M", 3);
    let mut client = cluster.export_nbd(0, "big").connect();
    for offset in (0..256).map(|mebibyte| mebibyte << 20) {
        client.write(offset, &vec![0x77; 1 << 20]).unwrap();
    }
    client.flush().unwrap();
    drop(client);
    cluster.unexport(0, "big");
    let customer = Customer::start(&cluster.export_nbd(0, "busy"), seed(), 4096);
    // Its log needs 128 MiB; what it is to hold needs more than is left.
    disk.occupy(Some(280));
    let store = disk.path("store");
    let small = cluster.add_node_with(&lab, &["--disk", &format!("{store},60")]);
    let address = cluster.address(small);
    let names_it = |health: &Value| {
        let reasons = health["reasons"].as_array().cloned().unwrap_or_default();
        let full = |text: &str| text.contains(&address) && text.contains("full");
        reasons.iter().any(|reason| reason.as_str().is_some_and(full))
    };
    eventually("the disk to be full", 4 * PATIENCE, || {
        customer.assert_alive();
        let health = cluster.try_dog(0, &["cluster", "health"]).ok()?;
        names_it(&health).then(|| println!("{}", health["reasons"]))
    });
    customer.wait_for_more(50);
    // It stays in service, and nothing is missing: the data are where they were.
    let health = cluster.dog(0, &["cluster", "health"]);
    assert_eq!(health["slots"]["complete"], health["slots"]["total"], "{health}");
    let disk_of = |member: Value| member["disks"][0].clone();
    let full = disk_of(cluster.member(0, small).unwrap());
    assert_eq!((&full["state"], &full["complete"]), (&"up".into(), &false.into()), "{full}");
    // What was on its way may arrive or not.
    let state = || (cluster.epoch(0), recovery(&cluster, 0, "bytes_moved"));
    let before = eventually("the move to stand still", PATIENCE, || {
        let before = state();
        customer.wait_for_more(100);
        (state() == before).then_some(before)
    });
    // From now on nothing moves, and no epoch begins: none that the disk is the cause of, if a busy machine makes
    // another.
    customer.take_longest();
    customer.wait_for_more(800);
    let after = state();
    assert!(after.0 <= before.0 + 2, "{before:?}, then {after:?}");
    assert!(after.0 > before.0 || after == before, "{before:?}, then {after:?}");
    println!("longest stall with a full disk: {:?}", customer.take_longest());
    assert!(before.1 < 512 << 20, "{before:?}");
    // With room, the move goes on by itself.
    disk.vacate();
    cluster.wait_healthy();
    customer.wait_for_more(50);
    // Nobody was refused anything all the time.
    assert!(customer.finish().verified > 4096);
    cluster.unexport(0, "busy");
    cluster.wait_healthy();
    cluster.dog(0, &["volume", "delete", "busy"]);
    // Each node frees its space when it has heard of it.
    eventually("nothing to be left of it", PATIENCE, || {
        let used: Option<u64> = (0..cluster.len()).map(|node| used(&cluster, node)).sum();
        (used? == 2 * (256 << 20)).then_some(())
    });
    let equal = cluster.stop_and_compare(2);
    assert_eq!((equal.layers, equal.replicas), (64, 128));
}
