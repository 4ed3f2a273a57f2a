//! A volume is handed over between two nodes, as live migration needs it, without ever having two writers (I4).

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use sheepdog_qemu_tests::{Client, Cluster, Command, Export, Lab, NbdError, PATIENCE, eventually};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const BLOCK: usize = 4096;
const SOURCE: usize = 0;
const TARGET: usize = 1;

fn info(cluster: &Cluster) -> serde_json::Value {
    cluster.dog(2, &["volume", "info", "disk"])
}

fn holder(cluster: &Cluster) -> String {
    info(cluster)["attached_to"].as_str().unwrap_or("nobody").to_owned()
}

fn state(cluster: &Cluster, node: usize) -> String {
    cluster.dog(node, &["export", "list"])[0]["state"].as_str().unwrap().to_owned()
}

fn incoming(cluster: &Cluster, node: usize) -> Export {
    let socket = cluster.socket(node, "disk", "nbd");
    let path = socket.display().to_string();
    let added = cluster.dog(node, &["export", "add", "disk", "--nbd", &path, "--incoming"]);
    assert!(added["state"].as_str().unwrap().starts_with("incoming"), "{added}");
    Export { volume: "disk".into(), socket }
}

fn wait_closed(cluster: &Cluster) {
    eventually("the hand-over to be closed", PATIENCE, || {
        info(cluster)["handover"].is_null().then_some(())
    });
}

fn block(byte: u8) -> [u8; BLOCK] {
    [byte; BLOCK]
}

fn assert_block(client: &mut Client, at: u64, byte: u8) {
    let data = client.read(at * BLOCK as u64, BLOCK as u32).unwrap();
    assert!(data.iter().all(|found| *found == byte), "block {at}: {} for {byte}", data[0]);
}

/// Three nodes and a volume that the first one serves to a client.
fn start(lab: &Lab) -> (Cluster, Client) {
    let cluster = Cluster::start(lab, 3);
    cluster.create("disk", "16M", 3);
    let mut source = cluster.export_nbd(SOURCE, "disk").connect();
    source.write(0, &block(1)).unwrap();
    (cluster, source)
}

#[test]
fn i4_a_volume_moves_with_the_first_request_and_stays_when_the_source_has_left() {
    let lab = Lab::new("handover");
    let (cluster, mut source) = start(&lab);
    let (from, to) = (cluster.address(SOURCE), cluster.address(TARGET));

    let export = incoming(&cluster, TARGET);
    let open = info(&cluster);
    assert_eq!((&open["handover"]["from"], &open["handover"]["to"]), (&from.into(), &to.into()));
    // The target is connected, knows all of the disk, and takes nothing.
    let mut target = export.connect();
    assert_eq!(target.size, 16 << 20);
    source.write(BLOCK as u64, &block(2)).unwrap();
    assert_eq!(holder(&cluster), cluster.address(SOURCE));
    // Nobody else gets it, nor without being asked to.
    let third = cluster.socket(2, "disk", "nbd").display().to_string();
    for more in [&[][..], &["--incoming"]] {
        let args = [&["export", "add", "disk", "--nbd", &third], more].concat();
        let refused = cluster.dog_refused(2, &args);
        let who = if more.is_empty() { SOURCE } else { TARGET };
        assert!(refused.message.contains(&cluster.address(who)), "{}", refused.message);
    }

    target.write(2 * BLOCK as u64, &block(3)).unwrap();
    assert_eq!(holder(&cluster), cluster.address(TARGET));
    assert!(state(&cluster, SOURCE).starts_with("handed over"), "{}", state(&cluster, SOURCE));
    assert_eq!(state(&cluster, TARGET), "serving");
    for (at, byte) in [(0, 1), (1, 2), (2, 3)] {
        assert_block(&mut target, at, byte);
    }

    // The migration is done when the source goes: it cannot take the volume back any more.
    source.disconnect();
    wait_closed(&cluster);
    let late = Client::connect(&cluster.socket(SOURCE, "disk", "nbd"), "disk");
    assert!(late.is_err(), "a new client of the source was served");
    target.write(0, &block(4)).unwrap();
    assert_eq!(holder(&cluster), cluster.address(TARGET));

    // And back, while the old export is still there.
    let back = incoming(&cluster, SOURCE);
    let mut home = back.connect();
    assert_block(&mut home, 0, 4);
    assert_eq!(holder(&cluster), cluster.address(SOURCE));
    drop(target);
    wait_closed(&cluster);
    home.write(0, &block(5)).unwrap();
}

#[test]
fn a_cancelled_migration_leaves_the_volume_at_its_source() {
    let lab = Lab::new("handover-cancel");
    let (mut cluster, mut source) = start(&lab);
    let export = incoming(&cluster, TARGET);

    // The target looks at the disk, as QEMU does, and dies. The guest of the source goes on.
    let mut target = export.connect();
    assert_block(&mut target, 0, 1);
    assert_eq!(holder(&cluster), cluster.address(TARGET));
    drop(target);
    source.write(0, &block(2)).unwrap();
    assert_eq!(holder(&cluster), cluster.address(SOURCE));

    // It may try again, also after either daemon was started again.
    for node in [TARGET, SOURCE] {
        cluster.restart_after_stop(node);
        assert!(!info(&cluster)["handover"].is_null());
        if node == SOURCE {
            source = cluster_export(&cluster, SOURCE).connect();
        }
        let begins = if node == SOURCE { "serving" } else { "incoming" };
        eventually("the export to be back", PATIENCE, || {
            state(&cluster, node).starts_with(begins).then_some(())
        });
        let mut target = export.connect();
        assert_block(&mut target, 0, 2);
        assert_eq!(holder(&cluster), cluster.address(TARGET));
        source.write(BLOCK as u64, &block(3)).unwrap();
        assert_block(&mut target, 1, 3);
        source.write(BLOCK as u64, &block(3)).unwrap();
    }

    // The node of the target dies while it has the volume.
    let mut target = export.connect();
    assert_block(&mut target, 1, 3);
    cluster.kill(TARGET);
    source.write(0, &block(4)).unwrap();
    cluster.restart(TARGET);
    cluster.wait_healthy();
    assert_eq!(holder(&cluster), cluster.address(SOURCE));

    // Given up for good: the export is removed, and no client of it can come any more.
    cluster.unexport(TARGET, "disk");
    wait_closed(&cluster);
    assert_block(&mut source, 0, 4);
    source.flush().unwrap();
}

fn cluster_export(cluster: &Cluster, node: usize) -> Export {
    Export { volume: "disk".into(), socket: cluster.socket(node, "disk", "nbd") }
}

/// Both sides use it at once, which a migration does not but for single reads: whatever is in flight at a hand-over is
/// carried out by the next gateway of its client, without an error, and nothing acknowledged is lost.
#[test]
fn i4_requests_in_flight_survive_hand_overs() {
    let lab = Lab::new("handover-flight");
    let (cluster, mut source) = start(&lab);
    let mut target = incoming(&cluster, TARGET).connect();
    let first = info(&cluster)["writer"].as_u64().unwrap();
    let (enough, begun, ended) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _end = SetOnDrop(&enough); // whatever happens, the other side ends
            while !enough.load(Ordering::SeqCst) {
                // Always some in flight, of several objects, and parts of blocks.
                let round = begun.fetch_add(1, Ordering::SeqCst) + 1;
                for at in 0..8u64 {
                    let offset = (at % 4) * (4 << 20) + (at / 4) * 1536;
                    source
                        .send(Command::Write, offset, 1536, &round.to_le_bytes().repeat(192))
                        .unwrap();
                }
                for _ in 0..8 {
                    let (_, answer) = source.reply().unwrap();
                    answer.unwrap_or_else(|error| panic!("round {round}: error {error}"));
                }
                ended.store(round, Ordering::SeqCst);
            }
        });
        let _end = SetOnDrop(&enough);
        while !enough.load(Ordering::SeqCst) {
            let before = ended.load(Ordering::SeqCst);
            let data = target.read(0, 1536).unwrap();
            let after = begun.load(Ordering::SeqCst);
            for number in data.as_chunks::<8>().0 {
                let round = u64::from_le_bytes(*number);
                assert!(
                    before == 0 || (before..=after).contains(&round),
                    "{before} {round} {after}"
                );
            }
            if info(&cluster)["writer"].as_u64().unwrap() >= first + 12 {
                break;
            }
        }
    });
    let last = begun.load(Ordering::SeqCst).to_le_bytes().repeat(384);
    for at in 0..4u64 {
        assert!(target.read(at * (4 << 20), 3072).unwrap() == last, "object {at}");
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The source dies with a write in flight, and somebody else uses the volume: it must not be written later.
#[test]
fn i4_what_a_dead_client_left_is_not_written_after_a_hand_over() {
    let lab = Lab::new("handover-dead");
    let (cluster, mut source) = start(&lab);
    let mut target = incoming(&cluster, TARGET).connect();
    let before = info(&cluster)["writer"].as_u64().unwrap();
    // A replica that does not answer keeps the write in flight.
    cluster.freeze(2);
    source.send(Command::Write, 0, BLOCK as u32, &block(9)).unwrap();
    source.patience(Duration::from_millis(100));
    assert!(matches!(source.reply(), Err(NbdError::Lost(_))), "answered without all replicas");
    drop(source);
    target.send(Command::Write, 0, BLOCK as u32, &block(7)).unwrap();
    eventually("the hand-over", PATIENCE, || {
        let info = cluster.dog(TARGET, &["volume", "info", "disk"]);
        (info["attached_to"] == cluster.address(TARGET)).then_some(())
    });
    cluster.thaw(2);
    target.reply().unwrap().1.unwrap();
    wait_closed(&cluster);
    assert_block(&mut target, 0, 7);
    assert_eq!(info(&cluster)["writer"].as_u64(), Some(before + 1), "the source took it back");
    assert_eq!(holder(&cluster), cluster.address(TARGET));
}

#[test]
fn an_operator_ends_a_hand_over() {
    let lab = Lab::new("handover-end");
    let (cluster, mut source) = start(&lab);
    let refused = cluster.dog_refused(2, &["volume", "end-handover", "disk"]);
    assert!(refused.message.contains("not being handed over"), "{}", refused.message);
    let export = incoming(&cluster, TARGET);
    let ended = cluster.dog(2, &["volume", "end-handover", "disk"]);
    assert!(ended["handover"].is_null(), "{ended}");
    eventually("the target to hear of it", PATIENCE, || {
        state(&cluster, TARGET).starts_with("handed over").then_some(())
    });
    assert!(Client::connect(&export.socket, "disk").is_err());
    // The same command again makes another try.
    let mut target = incoming(&cluster, TARGET).connect();
    assert_block(&mut target, 0, 1);
    // Who loses the volume for good while it has requests gets errors, not another node's data.
    cluster.dog(2, &["volume", "end-handover", "disk"]);
    let refused = eventually("an error", PATIENCE, || source.write(0, &block(2)).err());
    assert!(matches!(refused, NbdError::Refused(_)), "{refused:?}");
    target.write(0, &block(3)).unwrap();
    assert_block(&mut target, 0, 3);
    // Nothing is handed over that nobody has.
    cluster.unexport(TARGET, "disk");
    cluster.unexport(SOURCE, "disk");
    let path = export.socket.display().to_string();
    let refused =
        cluster.dog_refused(TARGET, &["export", "add", "disk", "--nbd", &path, "--incoming"]);
    assert!(refused.message.contains("without --incoming"), "{}", refused.message);
}
