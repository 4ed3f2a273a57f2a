//! A VM outlives its gateway: `sheep` is killed under a running guest again and again, and the guest notices
//! nothing but pauses.
//!
//! `GATEWAY_DEATHS` says how often; `SEED` repeats the moments.

use sheepdog_qemu_tests::{
    Cluster, Disk, Guest, Lab, PATIENCE, Rng, Scribe, eventually, free_ports, seed, setting,
};
use std::time::{Duration, Instant};

/// Writers side by side, so that several requests are in flight.
const WRITERS: usize = 6;
/// Operations of each writer between two lines of its report.
const REPORT: u64 = 20;
const REGION: usize = 8 << 20;

/// Writes until told to stop, then checks all of it. Each writer syncs at times of its own.
fn script() -> String {
    let writer = |n: usize| {
        let (offset, bs, seed) = (n * REGION, if n == 0 { 65536 } else { 4096 }, n + 1);
        format!("/dev/vda --direct --offset {offset} --size {REGION} --bs {bs} --seed {seed}")
    };
    let begin = |n| {
        let every = 5 + 7 * n;
        let count = format!("--count 1000000000 --fsync-every {every}");
        let report = format!("--report {REPORT} --until /tmp/stop");
        format!("blkcheck write {} {count} {report} | tee /tmp/out.{n} &\n", writer(n))
    };
    let check = |n| {
        format!(
            "count=$(sed -n 's/blkcheck: wrote \\([0-9]*\\) .*/\\1/p' /tmp/out.{n})\n\
             blkcheck verify {} --flushed $count\n",
            writer(n)
        )
    };
    let begin: String = (0..WRITERS).map(begin).collect();
    let check: String = (0..WRITERS).map(check).collect();
    format!(
        "{begin}read -r line\ntouch /tmp/stop\nwait\nset -e\n{check}dmesg | grep -i 'error' && exit 1\nexit 0\n"
    )
}

/// How far each writer has come.
fn progress(guest: &Guest) -> [u64; WRITERS] {
    let mut progress = [0; WRITERS];
    for line in guest.output().lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["blkcheck:", seed, "at", count] = words[..]
            && let (Ok(seed), Ok(count)) = (seed.parse::<usize>(), count.parse())
            && let Some(known) = seed.checked_sub(1).and_then(|n| progress.get_mut(n))
        {
            *known = count;
        }
    }
    progress
}

/// Waits until every writer has come further.
fn wait_for_progress(guest: &Guest, what: &str) {
    let before = progress(guest);
    eventually(&format!("every writer to go on {what}"), 2 * PATIENCE, || {
        guest.assert_well();
        let now = progress(guest);
        // The first line may tell of operations from before.
        before.iter().zip(now).all(|(before, now)| now >= before + 2 * REPORT).then_some(())
    });
}

fn deaths(usual: u64) -> u64 {
    setting("GATEWAY_DEATHS").unwrap_or(usual)
}

/// A guest on a volume with a copy on each of `nodes`, the first of which is killed `rounds` times.
fn kill_again_and_again(name: &str, nodes: u32, export: fn(&Cluster) -> Disk, rounds: u64) {
    let lab = Lab::new(name);
    let mut cluster = Cluster::start(&lab, nodes as usize);
    cluster.create("vm", "64M", nodes);
    let disk = export(&cluster);
    let mut rng = Rng(seed());
    let mut guest = Guest::boot(&lab, "guest", &disk, &script());
    wait_for_progress(&guest, "at first");
    for round in 0..rounds {
        // Any moment will do, also amid the first requests after the last death.
        let moment = Duration::from_micros(rng.below(30_000));
        std::thread::sleep(moment);
        cluster.kill(0);
        if rng.below(8) == 0 {
            cluster.relaunch(0);
            std::thread::sleep(Duration::from_millis(rng.below(300)));
            cluster.kill(0);
        }
        cluster.relaunch(0);
        wait_for_progress(&guest, &format!("after death {}", round + 1));
    }
    guest.say("stop");
    println!("{}", guest.finish(4 * PATIENCE).expect_success());
}

fn on_vhost(cluster: &Cluster) -> Disk {
    cluster.export_vhost(0, "vm").vhost_disk()
}

fn on_nbd(cluster: &Cluster) -> Disk {
    cluster.export_nbd(0, "vm").nbd_disk()
}

#[test]
fn the_only_node_is_killed_under_a_guest() {
    kill_again_and_again("gateway-death-alone", 1, on_vhost, deaths(25));
}

#[test]
fn a_gateway_with_replicas_elsewhere_is_killed_under_a_guest() {
    // A node that dies more often is made to wait before it may enter again.
    kill_again_and_again("gateway-death-three", 3, on_vhost, deaths(4).min(4));
}

#[test]
fn a_gateway_is_killed_under_a_guest_on_nbd() {
    kill_again_and_again("gateway-death-nbd", 1, on_nbd, deaths(10));
}

/// The guest's kernel is the client. What was in flight fails, and nbd-client 3.24 does not connect again with its
/// `-persist` when the kernel is 6.1: the guest does so itself. What it was told to be flushed is there.
#[test]
fn a_gateway_is_killed_under_nbd_client() {
    let lab = Lab::new("gateway-death-nbd-client");
    let mut cluster = Cluster::start(&lab, 1);
    cluster.create("vm", "64M", 1);
    let [port] = free_ports();
    cluster.dog(0, &["export", "add", "vm", "--nbd", &format!("127.0.0.1:{port}")]);
    let script = format!(
        "ifconfig eth0 10.0.2.15 up
connect() {{
    nbd-client -c /dev/nbd0 || nbd-client 10.0.2.2 {port} /dev/nbd0 -name vm -nonetlink
}}
connect || exit 1
round=0
while [ ! -e /tmp/stop ]; do
    round=$((round + 1))
    region=\"/dev/nbd0 --direct --offset 0 --size 33554432 --seed $round\"
    until blkcheck write $region --count 40 --fsync-every 8 >/tmp/out 2>&1; do
        echo \"again: $(tail -n 1 /tmp/out)\"
        sleep 0.1
        connect >/dev/null 2>&1
    done
    until blkcheck verify $region --flushed 40 >/tmp/out 2>&1; do
        echo \"again: $(tail -n 1 /tmp/out)\"
        grep 'blkcheck: wrong' /tmp/out && exit
        sleep 0.1
        connect >/dev/null 2>&1
    done
    echo \"round $round\"
done &
read -r line
touch /tmp/stop
wait
nbd-client -d /dev/nbd0
"
    );
    let mut guest = Guest::boot(&lab, "guest", &Disk::Network, &script);
    let wait_for_rounds = |guest: &Guest, when: &str| {
        let rounds = || guest.output().matches("\nround ").count();
        let before = rounds();
        eventually(&format!("the guest to go on {when}"), 2 * PATIENCE, || {
            guest.assert_well();
            (rounds() >= before + 3).then_some(())
        });
    };
    wait_for_rounds(&guest, "at first");
    for death in 1..=deaths(5) {
        cluster.kill(0);
        cluster.relaunch(0);
        wait_for_rounds(&guest, &format!("after death {death}"));
    }
    guest.say("stop");
    let output = guest.finish(4 * PATIENCE).expect_success();
    assert!(!output.contains("blkcheck: wrong"), "{output}");
    assert!(output.contains("again: "), "no request was in flight:\n{output}");
}

/// Prints how long a client waits that connects again at once, as QEMU's own pauses are another matter.
#[test]
fn gap_of_a_restart_is_printed() {
    let lab = Lab::new("gateway-death-gap");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("vm", "64M", 3);
    let mut last = None;
    for what in ["the leader of the log", "a follower"] {
        let leader = cluster.leader();
        let mut followers = (0..3).filter(|node| *node != leader && Some(*node) != last);
        let gateway = if last.is_none() { Some(leader) } else { followers.next() };
        let gateway = gateway.expect("three nodes");
        last = Some(gateway);
        let export = cluster.export_nbd(gateway, "vm");
        let mut scribe = Scribe::new(seed(), 1024);
        let mut client = export.connect();
        scribe.write(&mut client, 64);
        scribe.flush(&mut client);
        let mut gaps = Vec::new();
        // A node that comes back more often is made to wait before it may enter again.
        for how in ["killed", "killed", "stopped"] {
            drop(client);
            let begin = Instant::now();
            match how {
                "killed" => cluster.kill(gateway),
                _ => assert!(cluster.terminate(gateway).success()),
            }
            cluster.relaunch(gateway);
            client = export.connect();
            scribe.write(&mut client, 1);
            gaps.push(begin.elapsed());
            scribe.verify(&mut client);
            cluster.wait_healthy();
        }
        // Who takes the log over cannot have a connection to a node that was killed a moment ago.
        let log = cluster.log_text(gateway);
        assert!(!log.contains("nobody took the cluster log over"), "{log}");
        println!("gateway on {what}: killed {:?}, stopped {:?}", &gaps[..2], &gaps[2..]);
        cluster.unexport(gateway, "vm");
    }
}
