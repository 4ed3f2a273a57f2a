//! Stopping and starting: SIGTERM is a clean stop, exports come back, an idle node costs next to nothing.

use rustix::process::Signal;
use sheepdog_qemu_tests::{Cluster, Lab, PATIENCE, Scribe, eventually, seed};
use std::time::{Duration, Instant};

#[test]
fn exports_come_back_after_a_restart() {
    let lab = Lab::new("restart-exports");
    let mut cluster = Cluster::start(&lab, 1);
    cluster.create("one", "16M", 1);
    cluster.create("two", "16M", 1);
    let nbd = cluster.export_nbd(0, "one");
    let vhost = cluster.export_vhost(0, "two");
    let mut scribe = Scribe::new(seed(), 1024);
    let mut client = nbd.connect();
    scribe.write(&mut client, 64);
    scribe.flush(&mut client);
    drop(client);

    let mut writer = 1;
    for how in ["TERM", "KILL"] {
        match how {
            "TERM" => assert!(cluster.terminate(0).success(), "SIGTERM is not a clean stop"),
            _ => cluster.kill(0),
        }
        cluster.restart(0);
        cluster.wait_healthy();
        let list = cluster.dog(0, &["export", "list"]);
        for (volume, protocol) in [("one", "nbd"), ("two", "vhost-user")] {
            let there = list.as_array().is_some_and(|l| {
                l.iter().any(|e| e["volume"] == volume && e["protocol"] == protocol)
            });
            assert!(there, "after SIG{how} the export of {volume} is gone: {list}");
        }
        scribe.verify(&mut nbd.connect());
        // It is the same holder, with a new generation that has looked at what the last one left.
        let info = eventually("the volume to be settled", PATIENCE, || {
            let info = cluster.dog(0, &["volume", "info", "one"]);
            (info["settled"] == true).then_some(info)
        });
        assert_eq!(info["attached_to"], cluster.address(0), "{info}");
        assert!(info["attached_since"].as_u64() >= info["created"].as_u64(), "{info}");
        assert!(info["writer"].as_u64() > Some(writer), "{info}");
        writer = info["writer"].as_u64().unwrap();
        eventually("the vhost-user socket", PATIENCE, || {
            std::os::unix::net::UnixStream::connect(&vhost.socket).ok()
        });
    }
    cluster.unexport(0, "one");
    cluster.restart_after_stop(0);
    let list = cluster.dog(0, &["export", "list"]);
    let volumes: Vec<_> = list.as_array().unwrap().iter().map(|e| e["volume"].clone()).collect();
    assert_eq!(volumes, ["two"], "a removed export came back: {list}");
}

#[test]
fn terminated_with_a_client_connected_is_still_clean() {
    let lab = Lab::new("restart-busy");
    let mut cluster = Cluster::start(&lab, 1);
    cluster.create("disk", "16M", 1);
    let export = cluster.export_nbd(0, "disk");
    let mut client = export.connect();
    let mut scribe = Scribe::new(seed(), 1024);
    scribe.write(&mut client, 64);
    scribe.flush(&mut client);
    scribe.send(&mut client, 64);
    let begin = Instant::now();
    let status = cluster.terminate(0);
    println!("stopped in {:?}", begin.elapsed());
    assert!(status.success(), "{status}");
    cluster.restart(0);
    cluster.wait_healthy();
    scribe.verify(&mut export.connect());
}

#[test]
fn a_second_signal_is_not_needed_while_frozen_peers_are_around() {
    let lab = Lab::new("restart-frozen-peers");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "16M", 3);
    cluster.freeze(1);
    cluster.freeze(2);
    // Without a quorum nothing can be agreed, but stopping needs no agreement.
    assert!(cluster.terminate(0).success());
    cluster.thaw(1);
    cluster.thaw(2);
    cluster.restart(0);
    cluster.wait_healthy();
    cluster.process(2).signal(Signal::TERM);
}

#[test]
fn idle_cost_is_printed() {
    const WINDOW: Duration = Duration::from_secs(5);
    let lab = Lab::new("restart-idle");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "16M", 3);
    cluster.export_nbd(0, "disk");
    let before: Vec<_> = (0..3).map(|i| cluster.process(i).cpu_time()).collect();
    std::thread::sleep(WINDOW);
    for (i, before) in before.into_iter().enumerate() {
        let process = cluster.process(i);
        let share = (process.cpu_time() - before).as_secs_f64() / WINDOW.as_secs_f64() * 100.0;
        println!("idle node{i}: {share:.1} % of a CPU, {} KiB resident", process.rss_kib());
        // Far above what is wanted, far below a busy loop, which is a bug on any machine.
        assert!(share < 50.0, "node{i} is busy while idle: {share:.1} %");
        assert!(process.rss_kib() < 512 << 10, "node{i}: {} KiB", process.rss_kib());
    }
}
