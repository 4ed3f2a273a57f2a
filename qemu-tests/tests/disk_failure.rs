//! I2: a disk that fails leaves service by itself; the daemon lives on and so does all I/O.
//! I7: what a scrub has found damaged is repaired from another replica.

use sheepdog_qemu_tests::{Cluster, Lab, PATIENCE, Scribe, eventually, seed};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Set in the process that has mounts of its own.
const INSIDE: &str = "SHEEPDOG_DISK_FAILURE";

/// Debian keeps the tools where users do not look for them.
fn command(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn do_it(program: &str, args: &[&str]) {
    let output = command(program).args(args).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

/// Runs the test `name` again in a process with its own mounts, which end with it; true in there.
/// Without the right or the tools it is skipped, or fails where `CI` or `SHEEPDOG_REQUIRE` is set.
fn inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mounts = ["--mount", "--propagation", "private", "--"];
    let root = command("unshare").args(mounts).arg("true").output();
    let missing = ["mkfs.ext4", "xfs_io", "mount", "umount"]
        .into_iter()
        .find(|tool| command(tool).arg("-V").output().is_err());
    if missing.is_some() || !root.is_ok_and(|output| output.status.success()) {
        let required = ["CI", "SHEEPDOG_REQUIRE"].iter().any(|n| std::env::var_os(n).is_some());
        let reason = missing.unwrap_or("the right to mount file systems");
        assert!(!required, "{name} cannot run here, but must: {reason} is missing");
        println!("{name}: SKIPPED: {reason} is missing");
        return false;
    }
    let this = std::env::current_exe().unwrap_or_else(|e| panic!("no name of this program: {e}"));
    let mut again = command("unshare");
    again.args(mounts).arg(this).args(["--exact", name, "--nocapture"]).env(INSIDE, name);
    let status = again.status().unwrap_or_else(|e| panic!("unshare: {e}"));
    assert!(status.success(), "{name} failed: see above");
    false
}

/// A small file system whose disk can fail.
struct FileSystem {
    image: PathBuf,
    mount: PathBuf,
}

impl FileSystem {
    fn new(lab: &Lab) -> Self {
        let this = Self { image: lab.path("image"), mount: lab.path("mount") };
        let made = File::create(&this.image).and_then(|file| file.set_len(512 << 20));
        made.and_then(|()| std::fs::create_dir(&this.mount)).unwrap_or_else(|e| panic!("{e}"));
        do_it("mkfs.ext4", &["-q", "-F", text(&this.image)]);
        this.mount();
        this
    }

    fn mount(&self) {
        do_it("mount", &["-o", "loop", text(&self.image), text(&self.mount)]);
    }

    /// From now on everything fails with EIO, and what was not synced is lost.
    fn fail(&self) {
        do_it("xfs_io", &["-x", "-c", "shutdown", text(&self.mount)]);
    }

    fn come_back(&self) {
        do_it("umount", &[text(&self.mount)]);
        self.mount();
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        // The namespace ends with the process; this only frees the directory before.
        let _ = command("umount").args(["-l", text(&self.mount)]).status();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_else(|| panic!("a strange path: {}", path.display()))
}

#[test]
fn a_failed_disk_leaves_service_and_everything_goes_on() {
    if !inside("a_failed_disk_leaves_service_and_everything_goes_on") {
        return;
    }
    let lab = Lab::new("disk-failure");
    let disk = FileSystem::new(&lab);
    let mut cluster = Cluster::start(&lab, 2);
    let victim = cluster.add_node_with(&lab, &["--disk", text(&disk.mount.join("store"))]);
    cluster.wait_healthy();
    // One volume is served by another node, one by the node that is to lose its disk.
    let volumes = [("far", 0), ("near", victim)];
    let mut guests = volumes.map(|(name, gateway)| {
        cluster.create(name, "16M", 3);
        (cluster.export_nbd(gateway, name).connect(), Scribe::new(seed(), 2048))
    });
    let mut work = |rounds: usize| {
        for (client, scribe) in &mut guests {
            (0..rounds).for_each(|_| scribe.write(client, 32));
            scribe.flush(client);
        }
    };
    work(10);
    disk.fail();
    work(20);
    let address = cluster.address(victim);
    for node in 0..cluster.len() {
        let health = eventually("the disk to be missed", PATIENCE, || {
            let health = cluster.try_dog(node, &["cluster", "health"]).ok()?;
            let reasons = health["reasons"].as_array()?;
            let named = |text: &str| text.contains(&address) && text.contains("out of service: ");
            reasons.iter().any(|r| r.as_str().is_some_and(named)).then(|| health.clone())
        });
        assert_eq!(health["status"], "degraded", "{health}");
    }
    assert!(!cluster.process(victim).is_dead());
    cluster.wait_status("degraded");
    work(5);
    for (client, scribe) in &mut guests {
        assert!(scribe.verify(client) > 500);
    }
    drop(guests);
    // The disk was only unplugged: once it is back, a restart of its node brings it back.
    let status = cluster.terminate(victim);
    assert!(status.success(), "{status}");
    disk.come_back();
    cluster.restart(victim);
    cluster.wait_healthy();
}

#[test]
fn what_a_scrub_finds_is_repaired_by_itself() {
    const BLOCK: u64 = 4096;
    let lab = Lab::new("scrub");
    let mut cluster = Cluster::start(&lab, 2);
    cluster.create("disk", "16M", 2);
    let content = |block: u64| (0x5EED_0000_0000 + block).to_le_bytes().repeat(BLOCK as usize / 8);
    let mut client = cluster.export_nbd(0, "disk").connect();
    for block in 0..16 {
        client.write(block * BLOCK, &content(block)).unwrap();
    }
    client.flush().unwrap();
    drop(client);
    cluster.unexport(0, "disk");
    // A clean stop puts everything into the data file.
    assert!(cluster.terminate(0).success());
    let path = cluster.dir(0).join("disk/data");
    let mut data = std::fs::read(&path).unwrap();
    let place = data.chunks(BLOCK as usize).position(|bytes| bytes == content(5)).unwrap();
    data[place * BLOCK as usize + 77] ^= 8;
    std::fs::write(&path, data).unwrap();
    cluster.restart(0);
    cluster.wait_healthy();

    let scrub = || {
        cluster.dog(0, &["node", "scrub", "start", "--rate", "1G"]);
        eventually("the scrub to end", PATIENCE, || {
            let scrubs = cluster.dog(0, &["node", "scrub", "status"]);
            (scrubs[0]["state"] == "idle").then(|| scrubs[0].clone())
        })
    };
    let found = scrub();
    assert_eq!(found["last"]["found"], 1, "{found}");
    // Nobody reads it: the volume has no export.
    cluster.wait_healthy();
    let again = scrub();
    assert_eq!((&again["last"]["found"], &again["damaged_blocks"]), (&0.into(), &0.into()));
    let mut client = cluster.export_nbd(0, "disk").connect();
    assert!(client.read(5 * BLOCK, BLOCK as u32).unwrap() == content(5));
}
