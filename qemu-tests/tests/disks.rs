//! Disks that come, go and fail while their node serves.

use sheepdog_qemu_tests::{Cluster, FileSystem, Lab, PATIENCE, Scribe, eventually, inside, seed};

fn disks(cluster: &Cluster, node: usize) -> Vec<serde_json::Value> {
    let list = cluster.dog(node, &["node", "disk", "list"]);
    list.as_array().cloned().unwrap_or_default()
}

#[test]
fn disks_come_and_go_under_load() {
    let lab = Lab::new("hot-disks");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "32M", 3);
    let export = cluster.export_nbd(1, "disk");
    let mut client = export.connect();
    let mut scribe = Scribe::new(seed(), 8192);
    (0..20).for_each(|_| scribe.write(&mut client, 32));
    let extra = lab.path("extra").display().to_string();
    let first = cluster.dir(1).join("disk").display().to_string();
    scribe.write_during(&mut client, || {
        let added = cluster.dog(1, &["node", "disk", "add", &extra]);
        let id = added[0]["id"].as_str().unwrap().to_owned();
        cluster.wait_healthy();
        eventually("the new disk to be used", PATIENCE, || {
            let list = disks(&cluster, 1);
            let found = list.iter().find(|d| d["id"] == id.as_str())?;
            (found["used"].as_u64()? > 0).then_some(())
        });
        let again = cluster.dog_refused(1, &["node", "disk", "add", &extra]);
        assert!(again.message.contains("already"), "{}", again.message);
        let left = cluster.dog(1, &["node", "disk", "remove", &first, "--wait"]);
        assert_eq!(left.as_array().map(Vec::len), Some(0));
        cluster.wait_healthy();
    });
    let left = disks(&cluster, 1);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["path"], extra.as_str());
    // What the removed disk had is set aside, once it is closed, and is in the way of a new one.
    eventually("the files to be set aside", PATIENCE, || {
        let names: Vec<_> =
            std::fs::read_dir(&first).unwrap().map(|e| e.unwrap().file_name()).collect();
        (names.len() == 1 && names[0].to_string_lossy().starts_with("removed-")).then_some(())
    });
    let full = cluster.dog_refused(1, &["node", "disk", "add", &first]);
    assert!(full.message.contains("not empty"), "{}", full.message);
    let only = cluster.dog_refused(1, &["node", "disk", "remove", &extra]);
    assert!(only.message.contains("add nodes first"), "{}", only.message);
    assert!(scribe.verify(&mut client) > 500);
    drop(client);
    cluster.restart_after_stop(1);
    let kept = disks(&cluster, 1);
    assert_eq!((kept.len(), &kept[0]["id"]), (1, &left[0]["id"]));
    let mut client = export.connect();
    assert!(scribe.verify(&mut client) > 500);
}

#[test]
fn one_of_two_disks_fails_and_is_replaced() {
    if !inside("one_of_two_disks_fails_and_is_replaced") {
        return;
    }
    let lab = Lab::new("two-disks");
    let disk = FileSystem::new(&lab);
    let mut cluster = Cluster::start(&lab, 2);
    let (bad, good) = (disk.path("store"), lab.path("good").display().to_string());
    // As much to the one as to the other, although the bad one is small.
    let weighted = [&bad, &good].map(|path| format!("{path},10"));
    let victim = cluster.add_node_with(&lab, &["--disk", &weighted[0], "--disk", &weighted[1]]);
    cluster.wait_healthy();
    cluster.create("disk", "32M", 3);
    let mut client = cluster.export_nbd(victim, "disk").connect();
    let mut scribe = Scribe::new(seed(), 8192);
    (0..20).for_each(|_| scribe.write(&mut client, 32));
    scribe.flush(&mut client);
    let state = |path: &str| {
        let list = disks(&cluster, victim);
        let found = list.into_iter().find(|d| d["path"] == path).unwrap();
        found["state"].as_str().unwrap().to_owned()
    };
    scribe.write_during(&mut client, || {
        disk.fail();
        eventually("the disk to be missed", PATIENCE, || (state(&bad) == "failed").then_some(()));
        cluster.wait_status("degraded");
    });
    assert_eq!(state(&good), "up");
    // Its node never left: the other disk was there all along.
    let info = cluster.dog(0, &["cluster", "info"]);
    let back = format!("{} came back", cluster.address(victim));
    assert!(!info["epochs"].to_string().contains(&back), "{info}");
    let health = cluster.dog(0, &["cluster", "health"]);
    assert!(health["reasons"].to_string().contains("others take its place"), "{health}");
    // A new disk in the old one's place.
    disk.replace();
    std::fs::create_dir(&bad).unwrap();
    std::fs::write(format!("{bad}/letters"), "mine").unwrap();
    let full = cluster.dog_refused(victim, &["node", "disk", "add", &bad]);
    assert!(full.message.contains("letters"), "{}", full.message);
    std::fs::remove_file(format!("{bad}/letters")).unwrap();
    scribe.write_during(&mut client, || {
        cluster.dog(victim, &["node", "disk", "add", &bad, "--weight", "10"]);
        cluster.wait_healthy();
    });
    assert_eq!((state(&bad).as_str(), disks(&cluster, victim).len()), ("up", 2));
    assert_eq!(cluster.member(0, victim).unwrap()["disks"].as_array().map(Vec::len), Some(2));
    assert!(scribe.verify(&mut client) > 500);
}

#[test]
fn a_node_starts_without_a_disk_that_cannot_be_opened() {
    let lab = Lab::new("unopened");
    let mut cluster = Cluster::start(&lab, 2);
    let paths = ["a", "b"].map(|name| lab.path(name).display().to_string());
    let node = cluster.add_node_with(&lab, &["--disk", &paths[0], "--disk", &paths[1]]);
    cluster.wait_healthy();
    cluster.create("disk", "16M", 3);
    let mut client = cluster.export_nbd(0, "disk").connect();
    let mut scribe = Scribe::new(seed(), 4096);
    (0..20).for_each(|_| scribe.write(&mut client, 32));
    let _ = cluster.terminate(node);
    let superblock = format!("{}/superblock", paths[1]);
    let away = format!("{}/elsewhere", paths[1]);
    std::fs::rename(&superblock, &away).unwrap();
    cluster.restart(node);
    cluster.wait_status("degraded");
    let list = disks(&cluster, node);
    assert_eq!((&list[0]["state"], &list[1]["state"]), (&"up".into(), &"failed".into()));
    assert!(list[1]["failure"].as_str().unwrap().contains("superblock"), "{list:?}");
    // It says so itself, and may be slow to answer.
    eventually("the reason", PATIENCE, || {
        let health = cluster.dog(1, &["cluster", "health"]);
        health["reasons"].to_string().contains("is not a store").then_some(())
    });
    (0..5).for_each(|_| scribe.write(&mut client, 32));
    let _ = cluster.terminate(node);
    std::fs::rename(&away, &superblock).unwrap();
    cluster.restart(node);
    cluster.wait_healthy();
    assert!(scribe.verify(&mut client) > 500);
}
