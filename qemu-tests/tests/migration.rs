//! A VM moves from one QEMU to another while it runs, and its disk with it.
//!
//! `MIGRATIONS` says how often it goes there and back under load; `SEED` repeats the moments.

use serde_json::Value;
use sheepdog_qemu_tests::{
    Cluster, Disk, Export, Guest, GuestResult, Lab, Net, PATIENCE, Pace, Rng, Target, eventually,
    lose_log, qemu_img, run, seed, setting, target_dir,
};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Writers side by side, each in a region of its own.
const WRITERS: usize = 3;
/// Operations of each writer between two lines of its report.
const REPORT: u64 = 20;
const REGION: usize = 8 << 20;
/// Where there is something to read that nobody writes, and how it was written.
const KNOWN: [&str; 2] = [
    "/dev/vda --offset 33554432 --size 8388608 --bs 65536 --seed 77",
    "/dev/vda --offset 50331648 --size 8388608 --bs 65536 --seed 78",
];
/// A process that writes to more memory than a slow migration can send, so that it does not end by itself.
const DIRTY_MEMORY: &str =
    "blkcheck write /tmp/memory --size 16777216 --seed 88 --count 1000000000 --until /tmp/stop";

fn region(n: usize) -> String {
    let (offset, bs, seed) = (n * REGION, if n == 0 { 65536 } else { 4096 }, n + 1);
    format!("/dev/vda --direct --offset {offset} --size {REGION} --bs {bs} --seed {seed}")
}

/// Writes what is known and defines `verify_known` 0 and 1.
fn prepare_known() -> String {
    let [first, second] = KNOWN;
    format!(
        "# The last one to close a device empties its page cache.
exec 3</dev/vda
blkcheck write {first} --count 300 --direct || exit 1
blkcheck write {second} --count 300 --direct || exit 1
verify_known() {{
    case $1 in
        0) blkcheck verify {first} --flushed 300 ;;
        1) blkcheck verify {second} --flushed 300 ;;
    esac
}}"
    )
}

/// Writes and reads until told to stop, then checks all of it. What is read is looked at again in the page cache, so that
/// some of it has moved there; then something else is read, into the same memory.
fn load() -> String {
    let write = |n| {
        let every = 5 + 7 * n;
        let count = format!("--count 1000000000 --fsync-every {every}");
        let report = format!("--report {REPORT} --until /tmp/stop");
        format!("blkcheck write {} {count} {report} | tee /tmp/out.{n} &\n", region(n))
    };
    let check = |n| {
        format!(
            "count=$(sed -n 's/blkcheck: wrote \\([0-9]*\\) .*/\\1/p' /tmp/out.{n})\n\
             blkcheck verify {} --flushed $count\n",
            region(n)
        )
    };
    let write: String = (0..WRITERS).map(write).collect();
    let check: String = (0..WRITERS).map(check).collect();
    format!(
        "{known}
{DIRTY_MEMORY} &
{write}
(
    round=0
    while [ ! -e /tmp/stop ]; do
        [ $((round % 3)) = 0 ] && echo 1 >/proc/sys/vm/drop_caches
        verify_known $((round / 3 % 2)) >/tmp/read || {{ cat /tmp/read; echo READ-WRONG; exit; }}
        round=$((round + 1))
        echo \"blkcheck: {reader} at $((round * {REPORT} / 2))\"
    done
) &
read -r line
touch /tmp/stop
wait
set -e
{check}dmesg | grep -i 'error' && exit 1
exit 0
",
        known = prepare_known(),
        reader = WRITERS + 1,
    )
}

/// How far each writer has come, and the reader.
fn progress(output: &str) -> [u64; WRITERS + 1] {
    assert!(!output.contains("READ-WRONG"), "what the guest reads is wrong:\n{output}");
    let mut progress = [0; WRITERS + 1];
    for line in output.lines() {
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

/// Waits until every writer and the reader have come further.
fn wait_for_progress(guest: &Guest, what: &str) {
    let before = progress(&guest.output());
    eventually(&format!("everybody in the guest to go on {what}"), 2 * PATIENCE, || {
        guest.assert_well();
        let now = progress(&guest.output());
        // The first line may tell of operations from before.
        before.iter().zip(now).all(|(before, now)| now >= before + 2 * REPORT).then_some(())
    });
}

/// How a QEMU reaches the volume: of the two between which the guest moves, the first or the second one, which is to get
/// the guest from the other one or not. Called before each start of a QEMU.
type Way = fn(&Lab, &Cluster, usize, bool) -> Disk;

/// Exports the volume, unless it is still exported.
fn export(
    cluster: &Cluster,
    node: usize,
    protocol: &str,
    socket: PathBuf,
    incoming: bool,
) -> PathBuf {
    let (protocol, path) = (format!("--{protocol}"), socket.display().to_string());
    let mut add = vec!["export", "add", "vm", &protocol, &path];
    add.extend(incoming.then_some("--incoming"));
    if incoming || !socket.exists() {
        cluster.dog(node, &add);
    }
    socket
}

/// Two nodes, each on the host of a QEMU. The hosts are network namespaces, in which only the nodes are: the
/// QEMUs have nothing but sockets of their node, and a pipe for the guest's memory.
fn vhost(_: &Lab, cluster: &Cluster, side: usize, incoming: bool) -> Disk {
    let socket = cluster.socket(side, "vm", "vhost-user");
    Disk::VhostUser(export(cluster, side, "vhost-user", socket, incoming))
}

/// Two nodes, each on the host of a QEMU.
fn nbd(_: &Lab, cluster: &Cluster, side: usize, incoming: bool) -> Disk {
    let socket = cluster.socket(side, "vm", "nbd");
    Disk::Nbd(export(cluster, side, "nbd", socket, incoming), "vm".into())
}

/// Two sockets of one node, for a VM that moves between two QEMUs of one host.
fn vhost_one_node(lab: &Lab, cluster: &Cluster, side: usize, _: bool) -> Disk {
    let socket = lab.path(&format!("{side}.vhost"));
    Disk::VhostUser(export(cluster, 0, "vhost-user", socket, false))
}

/// As [`vhost_one_node`], but on the first one the log of a migration gets lost.
fn forgetful(lab: &Lab, cluster: &Cluster, side: usize, incoming: bool) -> Disk {
    let disk = vhost_one_node(lab, cluster, side, incoming);
    match disk {
        Disk::VhostUser(server) if side == 0 => {
            let socket = lab.path("forgetful.vhost");
            lose_log(&socket, &server);
            Disk::VhostUser(socket)
        }
        _ => disk,
    }
}

fn no_disk(_: &Lab, _: &Cluster, _: usize, _: bool) -> Disk {
    Disk::None
}

fn raw_file(lab: &Lab, _: &Cluster, _: usize, _: bool) -> Disk {
    let path = lab.path("raw");
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    let made = file.and_then(|file| file.set_len(64 << 20));
    made.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Disk::File(path)
}

/// A guest on a volume that it can take along.
struct Scene {
    guest: Guest,
    way: Way,
    /// Where the guest is.
    side: usize,
    /// How many QEMUs there were.
    qemus: usize,
    cluster: Cluster,
    net: Arc<Net>,
    // The last to be dropped.
    lab: Lab,
}

impl Scene {
    fn set(name: &str, nodes: u32, way: Way, script: &str) -> Self {
        let lab = Lab::new(name);
        let net = Arc::new(Net::new(nodes as usize));
        let cluster = Cluster::start_on(&lab, &net);
        cluster.create("vm", "64M", nodes);
        let disk = way(&lab, &cluster, 0, false);
        let guest = Guest::boot(&lab, "qemu0", &disk, script);
        Self { guest, way, side: 0, qemus: 1, cluster, net, lab }
    }

    /// With a load that goes on already.
    fn under_load(name: &str, nodes: u32, way: Way) -> Self {
        let scene = Self::set(name, nodes, way, &load());
        wait_for_progress(&scene.guest, "at first");
        scene
    }

    /// A QEMU to which the guest can move.
    fn target(&mut self) -> Target {
        let name = format!("qemu{}", self.qemus);
        self.qemus += 1;
        let disk = (self.way)(&self.lab, &self.cluster, 1 - self.side, true);
        self.guest.target(&self.lab, &name, &disk)
    }

    /// Begins to send the guest, until all of its memory was sent once.
    fn begin_move(&mut self) -> Target {
        let target = self.target();
        self.guest.begin_move(&target, Pace::FIRST);
        self.guest.wait_sent_once();
        target
    }

    fn finish_move(&mut self, target: Target) -> Value {
        self.guest.set_pace(Pace::END);
        self.side = 1 - self.side;
        self.guest.finish_move(target)
    }

    /// A whole move under load.
    fn move_under_load(&mut self, rng: &mut Rng) {
        let target = self.begin_move();
        wait_for_progress(&self.guest, "while its memory is sent");
        // Any moment will do.
        std::thread::sleep(Duration::from_millis(rng.below(300)));
        self.finish_move(target);
        wait_for_progress(&self.guest, "after it moved");
    }

    /// Ends the load; all data has to be right, as the guest sees it and from outside.
    fn finish(mut self) {
        self.guest.say("stop");
        let output = self.guest.finish(4 * PATIENCE).expect_success();
        check_from_outside(&self.lab, &self.cluster, &output);
    }
}

/// Takes the volume from all that had it and looks whether it holds what the guest was told that it holds.
fn check_from_outside(lab: &Lab, cluster: &Cluster, output: &str) {
    for node in 0..cluster.len() {
        let exports = cluster.dog(node, &["export", "list"]);
        if exports.as_array().is_some_and(|exports| !exports.is_empty()) {
            cluster.unexport(node, "vm");
        }
    }
    assert_eq!(cluster.attached_to(0, "vm"), None);
    let last = cluster.len() - 1;
    let socket = export(cluster, last, "nbd", lab.path("outside"), false);
    let uri = Export { volume: "vm".into(), socket }.uri();
    let image = lab.path("image").display().to_string();
    qemu_img(&["convert", "-O", "raw", &uri, &image]);
    let blkcheck = target_dir().join("qemu/blkcheck");
    for (n, done) in progress(output)[..WRITERS].iter().enumerate() {
        assert!(*done > 0, "writer {n} has written nothing");
        let arguments = format!("verify {} --flushed {done} --written 1000000000", region(n));
        let arguments = arguments.replace("/dev/vda", &image).replace("--direct", "");
        let checked = run(&blkcheck, arguments.split_whitespace(), PATIENCE);
        assert_eq!(checked.code, Some(0), "region of writer {n}: {}", checked.stdout);
    }
}

fn there_and_back(name: &str, nodes: u32, way: Way, moves: u64) {
    let mut rng = Rng(seed());
    let mut scene = Scene::under_load(name, nodes, way);
    for _ in 0..setting("MIGRATIONS").unwrap_or(moves) {
        scene.move_under_load(&mut rng);
        if nodes > 1 {
            let there = scene.cluster.address(scene.side);
            assert_eq!(scene.cluster.attached_to(2, "vm"), Some(there), "after a move");
        }
    }
    scene.finish();
}

#[test]
fn a_guest_moves_between_two_hosts() {
    there_and_back("migration-hosts", 3, vhost, 4);
}

#[test]
fn a_guest_moves_on_one_host() {
    there_and_back("migration-host", 1, vhost_one_node, 2);
}

#[test]
fn a_guest_on_nbd_moves_between_two_hosts() {
    there_and_back("migration-nbd", 3, nbd, 2);
}

#[test]
fn a_cancelled_migration_is_repeated() {
    let mut rng = Rng(seed());
    let mut scene = Scene::under_load("migration-cancelled", 3, vhost);
    let target = scene.begin_move();
    scene.guest.cancel_move();
    wait_for_progress(&scene.guest, "where it is");
    drop(target);
    scene.move_under_load(&mut rng);
    scene.finish();
}

#[test]
fn the_target_dies_and_the_guest_stays() {
    let mut rng = Rng(seed());
    let mut scene = Scene::under_load("migration-target-dies", 3, vhost);
    let target = scene.begin_move();
    target.kill();
    scene.guest.wait_move_failed();
    wait_for_progress(&scene.guest, "where it is");
    scene.move_under_load(&mut rng);
    scene.finish();
}

#[test]
fn the_source_dies_and_the_guest_is_gone() {
    let mut scene = Scene::under_load("migration-source-dies", 3, vhost);
    let target = scene.begin_move();
    let output = scene.guest.kill();
    let (status, said) = target.wait_end();
    assert!(!status.success(), "a QEMU that got half a guest ended well");
    assert_eq!(said, "", "half a guest has run");
    check_from_outside(&scene.lab, &scene.cluster, &output);
}

/// The gateway of the source is killed while memory is sent, and comes back.
fn gateway_dies_while_moving(name: &str, way: Way) {
    let mut rng = Rng(seed());
    let mut scene = Scene::under_load(name, 3, way);
    let target = scene.begin_move();
    scene.cluster.kill(scene.side);
    scene.cluster.relaunch(scene.side);
    wait_for_progress(&scene.guest, "after the death");
    scene.finish_move(target);
    wait_for_progress(&scene.guest, "after it moved");
    scene.move_under_load(&mut rng);
    scene.finish();
}

#[test]
fn the_gateway_of_the_source_dies_while_the_guest_moves() {
    gateway_dies_while_moving("migration-source-gateway", vhost);
}

#[test]
fn the_gateway_of_the_source_dies_while_a_guest_on_nbd_moves() {
    gateway_dies_while_moving("migration-source-gateway-nbd", nbd);
}

/// QEMU 7.2 does not connect again to a device that has not been started: it has to be started anew.
#[test]
fn the_gateway_of_the_target_dies_while_the_guest_moves() {
    let mut rng = Rng(seed());
    let mut scene = Scene::under_load("migration-target-gateway", 3, vhost);
    let target = scene.begin_move();
    let dying = 1 - scene.side;
    scene.cluster.kill(dying);
    scene.cluster.relaunch(dying);
    wait_for_progress(&scene.guest, "where it is");
    scene.guest.cancel_move();
    drop(target);
    scene.move_under_load(&mut rng);
    scene.finish();
}

/// The host to which the guest is to move is cut off, then the one that it has left.
#[test]
fn the_other_host_vanishes() {
    let mut rng = Rng(seed());
    let mut scene = Scene::under_load("migration-host-vanishes", 3, vhost);
    let target = scene.begin_move();
    scene.net.unplug(1 - scene.side);
    wait_for_progress(&scene.guest, "where it is");
    scene.guest.cancel_move();
    drop(target);
    scene.net.heal();
    scene.cluster.wait_healthy();
    scene.move_under_load(&mut rng);
    scene.net.unplug(1 - scene.side);
    wait_for_progress(&scene.guest, "where it is now");
    scene.net.heal();
    scene.cluster.wait_healthy();
    scene.finish();
}

/// A guest reads a part of its disk after its memory was sent, and again, from its page cache, when it has moved: so the
/// cache has to be right, which the disk's server has filled behind the back of both QEMUs.
fn read_while_moving(name: &str, way: Way) -> GuestResult {
    let known = prepare_known();
    let script = format!(
        "
reads() {{ awk '{{ print $1 }}' /sys/block/vda/stat; }}
{known}
set -e
{DIRTY_MEMORY} &
echo READY
read -r line
verify_known 0
before=$(reads)
echo IN-MEMORY
read -r line
touch /tmp/stop
wait
verify_known 0 || {{ echo MEMORY-WRONG; exit 1; }}
[ $(reads) = $before ] || {{ echo 'the page cache was lost'; exit 2; }}
"
    );
    let mut scene = Scene::set(name, 1, way, &script);
    scene.guest.wait_for("READY");
    let target = scene.begin_move();
    scene.guest.say("read");
    scene.guest.wait_for("IN-MEMORY");
    scene.finish_move(target);
    scene.guest.say("check");
    scene.guest.finish(4 * PATIENCE)
}

/// Fails when `DirtyLog::mark` in vhost/src/dirty.rs marks nothing: all that was read is wrong then.
#[test]
fn what_the_disk_writes_into_memory_that_was_sent_arrives() {
    println!("{}", read_while_moving("migration-read", vhost_one_node).expect_success());
}

/// That the test before can fail, and does so for the log alone.
#[test]
fn a_log_that_gets_lost_is_noticed() {
    let result = read_while_moving("migration-log-lost", forgetful);
    assert_eq!(result.code, Some(1), "{}", result.output);
    assert!(result.output.contains("MEMORY-WRONG"), "{}", result.output);
}

/// Prints for how long a guest stands still when it moves: what QEMU says (from the stop to the end of the
/// migration), and for how long nobody hears of a guest that tells of each of its writes.
#[test]
fn downtime_is_printed() {
    let kinds: [(&str, u32, Way); 5] = [
        ("no disk", 1, no_disk),
        ("raw file", 1, raw_file),
        ("vhost-user, one node", 1, vhost_one_node),
        ("vhost-user, to another node", 3, vhost),
        ("NBD, to another node", 3, nbd),
    ];
    for (kind, nodes, way) in kinds {
        let (file, report) = match kind {
            "no disk" => ("/tmp/memory", 50),
            _ => ("/dev/vda --direct", 1),
        };
        let script = format!(
            "blkcheck write {file} --size 1048576 --count 1000000000 --report {report} --until /tmp/stop &
            read -r line; touch /tmp/stop; wait"
        );
        let mut scene = Scene::set("migration-downtime", nodes, way, &script);
        scene.guest.wait_for(" at ");
        let mut stops = Vec::new();
        let mut silences = Vec::new();
        for _ in 0..setting("MIGRATIONS").unwrap_or(1) {
            let target = scene.target();
            scene.guest.begin_move(&target, Pace::USUAL);
            let migration = scene.guest.finish_move(target);
            scene.side = 1 - scene.side;
            stops.push(migration["downtime"].as_u64().unwrap_or_else(|| panic!("{migration}")));
            let silence =
                eventually("the guest to say something", PATIENCE, || scene.guest.silence());
            silences.push(silence.as_millis());
        }
        scene.guest.say("stop");
        scene.guest.finish(PATIENCE).expect_success();
        stops.sort_unstable();
        silences.sort_unstable();
        let middle = stops.len() / 2;
        println!(
            "{kind}: stands still for {} ms, is silent for {} ms (of {stops:?}, {silences:?})",
            stops[middle], silences[middle],
        );
    }
}
