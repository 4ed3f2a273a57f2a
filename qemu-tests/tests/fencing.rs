//! I4, I8: a gateway that slept past its lease can neither write nor read once another one holds the volume.

use sheepdog_qemu_tests::{Client, Cluster, Command, Lab, PATIENCE, eventually};
use std::time::Duration;

const BLOCK: usize = 4096;

/// What the stale gateway is given to come up with an answer it must not give.
const TEMPTATION: Duration = Duration::from_secs(10);

fn at(block: usize) -> u64 {
    (block * BLOCK) as u64
}

/// Takes every answer that comes: none may be a success.
fn expect_no_success(stale: &mut Client) {
    stale.patience(TEMPTATION);
    while let Ok((handle, result)) = stale.reply() {
        assert!(result.is_err(), "the fenced gateway answered request {handle} with success");
    }
}

#[test]
fn frozen_gateway_is_fenced() {
    let lab = Lab::new("fencing");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "16M", 3);
    let (old, new) = (0, 1);
    let old_export = cluster.export_nbd(old, "disk");
    let mut stale = old_export.connect();
    for block in 0..8 {
        stale.write(at(block), &[0xAA; BLOCK]).unwrap();
    }
    stale.flush().unwrap();

    // While the holder lives, the volume stays with it, and the refusal names it.
    let socket = cluster.socket(new, "disk", "nbd");
    let path = socket.display().to_string();
    let add = ["export", "add", "disk", "--nbd", &path];
    let refused = cluster.dog_refused(new, &add);
    let holder = cluster.address(old);
    assert_eq!(refused.code, 1, "{}", refused.message);
    assert!(refused.message.contains(&holder), "{holder} is not named: {}", refused.message);
    assert_eq!(cluster.attached_to(new, "disk"), Some(holder));

    // The holder falls asleep with requests in its socket; its lease runs out; another node takes over.
    cluster.freeze(old);
    stale.send(Command::Write, at(0), BLOCK as u32, &[0xBB; BLOCK]).unwrap();
    stale.send(Command::Read, at(1), BLOCK as u32, &[]).unwrap();
    eventually("the volume to be free", PATIENCE, || cluster.try_dog(new, &add).ok());
    assert_eq!(cluster.attached_to(new, "disk"), Some(cluster.address(new)));
    let mut fresh = Client::connect(&socket, "disk").unwrap();
    for block in 0..4 {
        fresh.write(at(block), &[0xCC; BLOCK]).unwrap();
    }
    fresh.flush().unwrap();

    // It wakes up, and must not notice too late.
    cluster.thaw(old);
    expect_no_success(&mut stale);
    if let Ok(mut again) = Client::connect(&old_export.socket, "disk") {
        again.patience(TEMPTATION);
        assert!(again.read(at(0), BLOCK as u32).is_err(), "the fenced gateway serves reads");
        if let Ok(mut again) = Client::connect(&old_export.socket, "disk") {
            again.patience(TEMPTATION);
            assert!(again.write(at(0), &[0xDD; BLOCK]).is_err(), "the fenced gateway writes");
        }
    }

    for block in 0..8 {
        let expected = if block < 4 { 0xCC } else { 0xAA };
        let found = fresh.read(at(block), BLOCK as u32).unwrap();
        assert!(found.iter().all(|b| *b == expected), "block {block}: {:02x?}", &found[..8]);
    }
    // The sleeper is a member again, and the volume stays where it is.
    cluster.wait_healthy();
    assert_eq!(cluster.attached_to(old, "disk"), Some(cluster.address(new)));
    fresh.write(at(0), &[0xEE; BLOCK]).unwrap();
    assert!(fresh.read(at(0), BLOCK as u32).unwrap().iter().all(|b| *b == 0xEE));
}

#[test]
fn volume_of_a_dead_gateway_is_taken_over() {
    let lab = Lab::new("fencing-dead");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "16M", 3);
    let mut client = cluster.export_nbd(0, "disk").connect();
    for block in 0..64 {
        client.write(at(block), &[0x11; BLOCK]).unwrap();
    }
    client.flush().unwrap();
    cluster.kill(0);

    let path = cluster.socket(2, "disk", "nbd").display().to_string();
    let add = ["export", "add", "disk", "--nbd", &path];
    eventually("the volume to be free", PATIENCE, || cluster.try_dog(2, &add).ok());
    let mut client = Client::connect(&cluster.socket(2, "disk", "nbd"), "disk").unwrap();
    for block in 0..64 {
        let found = client.read(at(block), BLOCK as u32).unwrap();
        assert!(found.iter().all(|b| *b == 0x11), "block {block}: {:02x?}", &found[..8]);
    }

    // The old gateway comes back with an export that is no longer its own.
    cluster.restart(0);
    cluster.wait_healthy();
    assert_eq!(cluster.attached_to(0, "disk"), Some(cluster.address(2)));
    client.write(at(0), &[0x22; BLOCK]).unwrap();
    client.flush().unwrap();
}
