//! `scripts/rolling-restart`: all nodes are restarted one after the other, and the guests notice nothing but
//! pauses; where something is wrong it stops, or does not even begin.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use sheepdog_qemu_tests::{
    Cluster, Export, Finished, Guest, Lab, PATIENCE, Process, binary, eventually, run,
};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/rolling-restart");
/// Writers of each guest.
const WRITERS: usize = 3;
/// Operations of each writer between two lines of its report.
const REPORT: u64 = 10;
const REGION: usize = 4 << 20;

/// What a guest does: writes until told to stop, then checks all of it.
fn guest_script() -> String {
    let writer = |n: usize| {
        let (offset, bs, seed) = (n * REGION, if n == 0 { 65536 } else { 4096 }, n + 1);
        format!("/dev/vda --direct --offset {offset} --size {REGION} --bs {bs} --seed {seed}")
    };
    let begin = |n: usize| {
        let report = format!("--fsync-every {} --report {REPORT} --until /tmp/stop", 5 + 7 * n);
        format!("blkcheck write {} --count 1000000000 {report} | tee /tmp/out.{n} &\n", writer(n))
    };
    let check = |n: usize| {
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

/// A guest under load, and how long it has stood still.
struct Load {
    guest: Guest,
    seen: BTreeMap<String, u64>,
    since: Instant,
    longest: Duration,
}

impl Load {
    fn boot(lab: &Lab, name: &str, export: &Export, vhost: bool) -> Self {
        let disk = if vhost { export.vhost_disk() } else { export.nbd_disk() };
        let guest = Guest::boot(lab, name, &disk, &guest_script());
        let (seen, since) = (BTreeMap::new(), Instant::now());
        let mut load = Self { guest, seen, since, longest: Duration::ZERO };
        load.wait_for_more();
        load
    }

    /// How far each writer has come.
    fn progress(&self) -> BTreeMap<String, u64> {
        let output = self.guest.output();
        let report = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["blkcheck:", seed, "at", count] => Some((seed.to_owned(), count.parse().ok()?)),
            _ => None,
        };
        output.lines().filter_map(report).collect()
    }

    /// Notes a pause that ended.
    fn look(&mut self) {
        self.guest.assert_well();
        let now = self.progress();
        if now != self.seen {
            self.longest = self.longest.max(self.since.elapsed());
            (self.seen, self.since) = (now, Instant::now());
        }
    }

    /// Pauses count from now on.
    fn begin(&mut self) {
        self.wait_for_more();
        self.longest = Duration::ZERO;
    }

    fn wait_for_more(&mut self) {
        let before = self.progress();
        eventually("every writer to go on", 4 * PATIENCE, || {
            self.look();
            let more = |(seed, count): (&String, &u64)| {
                before.get(seed).is_none_or(|before| *count >= before + 2 * REPORT)
            };
            (self.seen.len() == WRITERS && self.seen.iter().all(more)).then_some(())
        });
    }
}

/// A command that asks the test for a restart, and waits until it is done.
struct Restarts {
    asked: PathBuf,
    done: PathBuf,
}

impl Restarts {
    fn new(lab: &Lab) -> Self {
        Self { asked: lab.path("asked"), done: lab.path("done") }
    }

    fn command(&self) -> String {
        let (asked, done) = (self.asked.display(), self.done.display());
        format!(
            "echo {{node}} >{asked}.new; mv {asked}.new {asked}; \
             until [ -e {done} ]; do sleep 0.02; done; rm {done}"
        )
    }

    /// Does what was asked for, if anything was.
    fn serve(&self, cluster: &mut Cluster) -> Option<usize> {
        let address = std::fs::read_to_string(&self.asked).ok()?;
        std::fs::remove_file(&self.asked).unwrap();
        let health = cluster.dog(0, &["cluster", "health"]);
        assert_eq!(health["status"], "ok", "no time for a restart: {health}");
        let index = (0..cluster.len()).find(|i| cluster.address(*i) == address.trim());
        let index = index.unwrap_or_else(|| panic!("no node {address}"));
        assert!(cluster.terminate(index).success(), "node {index} did not stop cleanly");
        cluster.relaunch(index);
        std::fs::write(&self.done, "").unwrap();
        Some(index)
    }
}

fn arguments(cluster: &Cluster, command: &str, more: &[&str]) -> Vec<String> {
    let dog = binary("dog").display().to_string();
    let via = cluster.address(0);
    let all = ["--dog", &dog, "--command", command, "--via", &via].into_iter();
    all.chain(more.iter().copied()).map(str::to_owned).collect()
}

fn rolling_restart(cluster: &Cluster, command: &str, more: &[&str]) -> Finished {
    run(SCRIPT, arguments(cluster, command, more), 4 * PATIENCE)
}

#[test]
fn all_nodes_are_restarted_under_guests_that_notice_nothing() {
    let lab = Lab::new("rolling-restart");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("one", "16M", 3);
    cluster.create("two", "16M", 3);
    let (one, two) = (cluster.export_vhost(0, "one"), cluster.export_nbd(1, "two"));
    let mut loads = [Load::boot(&lab, "vhost", &one, true), Load::boot(&lab, "nbd", &two, false)];
    loads.iter_mut().for_each(Load::begin);
    let entered = |cluster: &Cluster, index| {
        let node = cluster.member((index + 1) % 3, index).unwrap_or_default();
        node["entered"].as_u64().unwrap_or_else(|| panic!("no epoch of entry: {node}"))
    };
    let before: Vec<u64> = (0..3).map(|index| entered(&cluster, index)).collect();

    let restarts = Restarts::new(&lab);
    let arguments = arguments(&cluster, &restarts.command(), &["--all"]);
    let log = lab.log("script");
    let mut script = Process::start(SCRIPT.as_ref(), arguments, &log, None);
    let mut order = Vec::new();
    let status = eventually("the script to end", 20 * PATIENCE, || {
        order.extend(restarts.serve(&mut cluster));
        loads.iter_mut().for_each(Load::look);
        script.ended()
    });
    println!("{}", script.log_text());
    let leader = cluster.log_text(order[2]);
    assert!(leader.contains("handing the cluster log over"), "the leader goes last: {leader}");
    assert!(!leader.contains("nobody took the cluster log over"), "{leader}");
    assert!(status.success(), "{}", script.log_text());
    let mut restarted = order.clone();
    restarted.sort_unstable();
    assert_eq!(restarted, [0, 1, 2], "each once");
    for (index, before) in before.into_iter().enumerate() {
        assert!(entered(&cluster, index) > before, "node {index} is as it was");
    }
    cluster.wait_healthy();
    for (mut load, what) in loads.into_iter().zip(["vhost-user", "NBD"]) {
        load.wait_for_more();
        load.guest.say("stop");
        load.guest.finish(4 * PATIENCE).expect_success();
        println!("longest pause of the guest on {what}: {:?}", load.longest);
    }
    let equal = cluster.stop_and_compare(3);
    assert_eq!((equal.layers, equal.replicas), (6, 18), "three objects of each volume");
}

#[test]
fn it_stops_where_something_is_wrong() {
    let lab = Lab::new("rolling-restart-refusals");
    let mut cluster = Cluster::start(&lab, 2);
    let says = |done: &Finished, code: i32, parts: &[&str]| {
        assert_eq!(done.code, Some(code), "{}{}", done.stdout, done.stderr);
        for part in parts {
            assert!(done.stderr.contains(part), "{part:?} is not in {}", done.stderr);
        }
    };
    let never = lab.path("ran").display().to_string();
    let mark = format!("touch {never}");
    let has_run = || PathBuf::from(&never).exists();
    // Two voters: without one of them there is no majority.
    let done = rolling_restart(&cluster, &mark, &["--all"]);
    says(&done, 3, &["no majority", "--allow-pause", "Nothing was restarted"]);
    let dry = rolling_restart(&cluster, &mark, &["--all", "--allow-pause", "--dry-run"]);
    says(&dry, 0, &[]);
    assert_eq!(dry.stdout.matches("touch").count(), 2, "{}", dry.stdout);
    cluster.add_node(&lab);
    cluster.wait_healthy();
    // A volume that cannot do without any of its replicas.
    cluster.dog(0, &["volume", "create", "v", "8M", "--copies", "3", "--min-copies", "3"]);
    let done = rolling_restart(&cluster, &mark, &["--all"]);
    says(&done, 3, &["volume v has 3 copies, of which 3 must be up"]);
    cluster.dog(0, &["volume", "delete", "v"]);
    let done = rolling_restart(&cluster, &mark, &["10.9.9.9:1"]);
    says(&done, 3, &["there is no node 10.9.9.9:1", &cluster.address(1)]);
    let leader = cluster.leader();
    let nodes = (0..3).map(|index| cluster.address(index)).collect::<Vec<_>>();
    let follower = (leader + 1) % 3;
    // A command that fails, and one that does not restart anything.
    let order = [nodes[follower].as_str(), nodes[leader].as_str()];
    let done = rolling_restart(&cluster, "exit 7", &order);
    let left = format!("not touched: {}", nodes[leader]);
    says(&done, 1, &["code 7", "Restarted before it: none", &left, &nodes[follower]]);
    let done = rolling_restart(&cluster, "true", &["--timeout", "1", &nodes[follower]]);
    says(&done, 1, &["has not entered the cluster again", "waited 1 s in vain"]);
    assert!(!has_run());
    // A node is down.
    let victim = if leader == 2 { 1 } else { 2 };
    assert!(cluster.terminate(victim).success());
    let done = rolling_restart(&cluster, &mark, &[&nodes[0]]);
    says(&done, 3, &["not healthy", &format!("node {} is down", nodes[victim])]);
    assert!(!has_run());
    // Usage.
    let usage = run(SCRIPT, ["--all"], PATIENCE);
    assert_eq!(usage.code, Some(2), "{}", usage.stderr);
    let help = run(SCRIPT, ["--help"], PATIENCE);
    assert_eq!(help.code, Some(0));
    assert!(help.stdout.contains("--allow-pause") && help.stdout.contains("Exit codes"));
}
