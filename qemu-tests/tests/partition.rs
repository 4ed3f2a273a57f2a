//! I1, I4, I8: a cluster that is split. The majority goes on; the minority neither serves old data nor changes
//! anything, and goes on by itself when the split is healed.

use sheepdog_qemu_tests::{Client, Cluster, Lab, NbdError, Net, PATIENCE, Pulse, eventually, seed};
use std::sync::Arc;
use std::time::Duration;

const BLOCK: usize = 4096;
/// What the minority is given to come up with an answer it must not give.
const TEMPTATION: Duration = Duration::from_secs(3);

fn five_nodes(lab: &Lab) -> (Arc<Net>, Cluster) {
    let net = Arc::new(Net::new(5));
    let cluster = Cluster::start_on(lab, &net);
    (net, cluster)
}

/// Four copies: whichever two nodes are cut off, the others hold at least two.
fn create(cluster: &Cluster, name: &str) {
    cluster.dog(0, &["volume", "create", name, "16M", "--copies", "4", "--min-copies", "2"]);
}

fn wait_down(cluster: &Cluster, asked: usize, gone: &[usize]) {
    eventually("the minority to be down", PATIENCE, || {
        let list = cluster.try_dog(asked, &["node", "list"]).ok()?;
        let is_down = |index: &usize| {
            let address = cluster.address(*index);
            let node = list.as_array()?.iter().find(|n| n["address"] == *address)?;
            (node["state"] == "down").then_some(())
        };
        gone.iter().all(|index| is_down(index).is_some()).then_some(())
    });
}

/// Splits `minority` off while both sides write; its first node is a gateway.
fn split(what: &str, net: &Net, cluster: &Cluster, minority: [usize; 2]) {
    let majority: Vec<_> = (0..5).filter(|n| !minority.contains(n)).collect();
    create(cluster, &format!("major-{what}"));
    create(cluster, &format!("minor-{what}"));
    let export = cluster.export_nbd(minority[0], &format!("minor-{what}"));
    let minor = Pulse::start(&export, seed());
    let major = Pulse::start(&cluster.export_nbd(majority[0], &format!("major-{what}")), seed());
    major.take_longest();
    let epoch = cluster.epoch(majority[0]);

    net.split(&minority);
    wait_down(cluster, majority[1], &minority);
    major.wait_for_more(50);
    println!("{what} in the minority: longest stall of the majority {:?}", major.take_longest());

    // No lease, no service: nothing is answered from now on, neither written nor read.
    let answered = minor.rounds();
    let mut reader = export.connect();
    reader.patience(TEMPTATION);
    assert!(matches!(reader.read(0, BLOCK as u32), Err(NbdError::Lost(_))), "the minority reads");
    let forbidden = format!("forbidden-{what}");
    for node in minority {
        // What it proposed to a leader beyond the cut may arrive there later; it says so then.
        let refused = cluster.dog_refused(node, &["volume", "create", &forbidden, "1M"]);
        let is_told = |what: &str| refused.message.contains(what);
        assert!(is_told("majority") || is_told("may or may not"), "{}", refused.message);
        let list = cluster.dog(node, &["volume", "list"]).to_string();
        assert!(list.contains("minor") && !list.contains(&forbidden), "{list}");
        assert_eq!(cluster.epoch(node), epoch, "a minority makes no epoch");
    }
    assert_eq!(minor.rounds(), answered, "the minority writes");
    major.wait_for_more(50);

    net.heal();
    cluster.wait_healthy();
    minor.wait_for_more(50);
    major.wait_for_more(50);
    let longest = major.take_longest();
    println!("{what} in the minority: longest stall of the majority at the healing {longest:?}");
    assert!(minor.verify() > 50);
    assert!(major.verify() > 50);
}

#[test]
fn minority_waits_and_goes_on() {
    let lab = Lab::new("partition");
    let (net, cluster) = five_nodes(&lab);
    let leader = cluster.leader();
    split("followers", &net, &cluster, [(leader + 1) % 5, (leader + 2) % 5]);
    let leader = cluster.leader();
    split("leader", &net, &cluster, [leader, (leader + 1) % 5]);
    let leader = cluster.leader();
    split("leader-beside", &net, &cluster, [(leader + 1) % 5, leader]);
}

#[test]
fn volume_that_moved_to_the_majority_stays_there() {
    let lab = Lab::new("partition-takeover");
    let (net, cluster) = five_nodes(&lab);
    create(&cluster, "disk");
    let leader = cluster.leader();
    let minority = [leader, (leader + 1) % 5];
    let [old, new] = [minority[1], (leader + 2) % 5];
    let mut stale = cluster.export_nbd(old, "disk").connect();
    stale.write(0, &[0xAA; BLOCK]).unwrap();
    stale.flush().unwrap();

    net.split(&minority);
    let path = cluster.socket(new, "disk", "nbd").display().to_string();
    let add = ["export", "add", "disk", "--nbd", &path];
    eventually("the volume to be free", PATIENCE, || cluster.try_dog(new, &add).ok());
    let mut fresh = Client::connect(&cluster.socket(new, "disk", "nbd"), "disk").unwrap();
    fresh.write(0, &[0xCC; BLOCK]).unwrap();
    fresh.flush().unwrap();

    // Asked during the split, answered, if at all, after it.
    let read = stale.send(sheepdog_qemu_tests::Command::Read, 0, BLOCK as u32, &[]).unwrap();
    stale.patience(TEMPTATION);
    assert!(stale.reply().is_err(), "the minority serves old data");
    net.heal();
    cluster.wait_healthy();
    let mut again = cluster.dog(old, &["export", "list"]).to_string();
    again.truncate(400);
    println!("request {read} of the old gateway was not answered; its exports: {again}");
    if let Ok(mut late) = Client::connect(&cluster.socket(old, "disk", "nbd"), "disk") {
        late.patience(TEMPTATION);
        assert!(late.read(0, BLOCK as u32).is_err(), "the old gateway serves reads");
    }
    assert_eq!(cluster.attached_to(old, "disk"), Some(cluster.address(new)));
    assert!(fresh.read(0, BLOCK as u32).unwrap().iter().all(|b| *b == 0xCC));
}
