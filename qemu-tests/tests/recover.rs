//! Nodes that are lost for good: what is lost with them is said before it is given up.

use serde_json::Value;
use sheepdog_qemu_tests::{Cluster, Lab, PATIENCE, eventually};

const OBJECT: u64 = 4 << 20;

/// What `dog cluster recover ARGS` says would be lost; it exits with 1 if anything would be.
fn plan(cluster: &Cluster, asked: usize, args: &[&str]) -> (Option<i32>, Value) {
    let address = cluster.address(asked);
    let mut all = vec!["--node", &address, "--json", "cluster", "recover"];
    all.extend(args);
    let done = sheepdog_qemu_tests::run(sheepdog_qemu_tests::binary("dog"), all, PATIENCE);
    let plan = serde_json::from_str(&done.stdout);
    (done.code, plan.unwrap_or_else(|e| panic!("{e}: {}{}", done.stdout, done.stderr)))
}

fn waiting(cluster: &Cluster, asked: usize) -> Option<u64> {
    cluster.try_dog(asked, &["cluster", "health"]).ok()?["slots"]["waiting"].as_u64()
}

#[test]
fn lost_nodes_are_given_up_with_what_only_they_had() {
    let lab = Lab::new("recover-gone");
    let mut cluster = Cluster::start(&lab, 5);
    cluster.create("disk", "256M", 2);
    let mut client = cluster.export_nbd(0, "disk").connect();
    let content = |object: u64| (0xD15C_0000 + object).to_le_bytes().repeat(512);
    for object in 0..64 {
        client.write(object * OBJECT, &content(object)).unwrap();
    }
    client.flush().unwrap();
    assert_eq!(plan(&cluster, 0, &[]).0, Some(0), "nothing waits yet");
    cluster.dog(0, &["cluster", "set", "down-out-interval", "never"]);
    let lost = [cluster.address(3), cluster.address(4)];
    cluster.kill(3);
    cluster.kill(4);
    eventually("slots to wait", PATIENCE, || (waiting(&cluster, 1)? > 0).then_some(()));
    eventually("both to be down", PATIENCE, || {
        let down = |node| Some(cluster.member(1, node)?["state"] == "down");
        (down(3)? && down(4)?).then_some(())
    });
    let (code, plan1) = plan(&cluster, 1, &[]);
    assert_eq!(code, Some(1), "{plan1}");
    let mut named: Vec<_> =
        plan1["disks"].as_array().unwrap().iter().map(|d| d["address"].clone()).collect();
    named.sort_by_key(ToString::to_string);
    let mut expected = lost.clone().map(Value::from);
    expected.sort_by_key(ToString::to_string);
    assert_eq!(named, expected);
    let gone = plan1["volumes"][0]["gone"].as_u64().unwrap();
    assert!(gone > 0 && plan1["volumes"][0]["older"] == 0, "{plan1}");
    // Not without a word typed, and nothing happens.
    let epoch = cluster.epoch(1);
    assert_eq!(plan(&cluster, 1, &["--force"]).0, Some(1));
    assert_eq!(cluster.epoch(1), epoch);
    assert_eq!(plan(&cluster, 1, &["--force", "--yes"]).0, Some(0));
    eventually("nothing to wait", PATIENCE, || (waiting(&cluster, 1)? == 0).then_some(()));
    let mut missing = 0;
    for object in 0..64 {
        let found = client.read(object * OBJECT, 4096).unwrap();
        if found.iter().all(|byte| *byte == 0) {
            missing += 1;
        } else {
            assert!(found == content(object), "object {object} is wrong");
        }
    }
    assert_eq!(missing, gone, "exactly what was said is lost");
    for address in &lost {
        cluster.dog(1, &["node", "remove", address]);
    }
    cluster.wait_healthy();
}

#[test]
fn an_older_copy_is_used_only_when_the_newest_is_given_up() {
    let lab = Lab::new("recover-older");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "128M", 2);
    let mut client = cluster.export_nbd(0, "disk").connect();
    let content = |round: u64| round.to_le_bytes().repeat(512);
    let mut write = |round: u64| {
        for object in 0..32 {
            client.write(object * OBJECT, &content(round)).unwrap();
        }
        client.flush().unwrap();
    };
    write(1);
    cluster.kill(1);
    write(2);
    let epoch_of_loss = cluster.epoch(0);
    // What 1 and 2 share, 2 has written alone. It never comes back.
    cluster.kill(2);
    cluster.restart(1);
    eventually("slots to wait", PATIENCE, || {
        let health = cluster.try_dog(0, &["cluster", "health"]).ok()?;
        health["reasons"].to_string().contains("newest data").then_some(())
    });
    let (code, plan1) = plan(&cluster, 0, &[&cluster.address(2)]);
    assert_eq!(code, Some(1), "{plan1}");
    let loss = &plan1["volumes"][0];
    assert!(loss["gone"] == 0 && loss["older"].as_u64() > Some(0), "{plan1}");
    assert_eq!(loss["older_since_epoch"].as_u64(), Some(epoch_of_loss), "{plan1}");
    assert!(loss["older_since"].as_u64() > Some(1_500_000_000), "{plan1}");
    let refused = cluster.dog_refused(0, &["node", "remove", &cluster.address(2)]);
    assert!(refused.message.contains("slots wait for nobody but"), "{}", refused.message);
    let up = cluster.dog_refused(0, &["cluster", "recover", &cluster.address(1)]);
    assert!(up.message.contains("is up"), "{}", up.message);
    assert_eq!(plan(&cluster, 0, &[&cluster.address(2), "--force", "--yes"]).0, Some(0));
    let mut old = 0;
    for object in 0..32 {
        let found = client.read(object * OBJECT, 4096).unwrap();
        assert!(found == content(1) || found == content(2), "object {object} is wrong");
        old += u64::from(found == content(1));
    }
    assert_eq!(Some(old), loss["older"].as_u64(), "exactly what was said is older");
}
