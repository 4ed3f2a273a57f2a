//! A small file system whose disk can fail, in a mount namespace of the test's own.

use crate::{Lab, PATIENCE, eventually};
use std::fs::File;
use std::io::Write;
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
pub fn inside(name: &str) -> bool {
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
    again.args(mounts).arg(this);
    again.args(["--exact", name, "--nocapture", "--include-ignored"]).env(INSIDE, name);
    let status = again.status().unwrap_or_else(|e| panic!("unshare: {e}"));
    assert!(status.success(), "{name} failed: see above");
    false
}

/// A small file system whose disk can fail.
pub struct FileSystem {
    image: PathBuf,
    mount: PathBuf,
}

impl FileSystem {
    /// A new one with a mount of its own, which ends with the process.
    pub fn new(lab: &Lab) -> Self {
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
    pub fn fail(&self) {
        do_it("xfs_io", &["-x", "-c", "shutdown", text(&self.mount)]);
    }

    /// Somebody else takes so many MiB, or all that is left.
    pub fn occupy(&self, mebibytes: Option<usize>) {
        let path = self.hog();
        let mut hog = File::create(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let chunk = vec![0xFF; 1 << 20];
        for _ in 0..mebibytes.unwrap_or(usize::MAX) {
            if let Err(error) = hog.write_all(&chunk) {
                assert!(mebibytes.is_none(), "{}: {error}", path.display());
                break;
            }
        }
        while mebibytes.is_none() && hog.write_all(&chunk[..4096]).is_ok() {}
    }

    /// And gives it back, for good: else a failure soon after would undo that.
    pub fn vacate(&self) {
        let path = self.hog();
        let removed =
            std::fs::remove_file(&path).and_then(|()| File::open(&self.mount)?.sync_all());
        removed.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    fn hog(&self) -> PathBuf {
        self.mount.join("somebody-elses")
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> String {
        text(&self.mount.join(name)).to_owned()
    }

    /// A new disk in the place of the failed one, which may still be in use.
    pub fn replace(&self) {
        do_it("umount", &["-l", text(&self.mount)]);
        let made = std::fs::remove_file(&self.image).and_then(|()| File::create(&self.image));
        made.and_then(|file| file.set_len(512 << 20)).unwrap_or_else(|e| panic!("{e}"));
        do_it("mkfs.ext4", &["-q", "-F", text(&self.image)]);
        self.mount();
    }

    /// The disk was only unplugged; nobody may use it now. The kernel closes the files of an I/O ring only some time
    /// after the process that had it has ended.
    pub fn come_back(&self) {
        eventually("the file system to be in nobody's use", PATIENCE, || {
            let output = command("umount").arg(&self.mount).output();
            let output = output.unwrap_or_else(|e| panic!("umount: {e}"));
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() || text.contains("busy"), "umount: {text}");
            output.status.success().then_some(())
        });
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
