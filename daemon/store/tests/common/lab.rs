//! File systems on loop devices, in a mount namespace that ends with the test.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Set in the process that has the namespace, to the name of its test.
const INSIDE: &str = "SHEEPDOG_STORE_LAB";
const DIR: &str = "SHEEPDOG_STORE_LAB_DIR";
/// File that a test leaves when it has succeeded.
const DONE: &str = "done";
/// Much longer than any test takes, also on a slow machine (a minute on a fast one); then it hangs.
const TIMEOUT_SECONDS: &str = "1200";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fs {
    Ext4,
    Xfs,
    /// Without an image; it ends with its mount.
    Tmpfs,
}

impl Fs {
    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Tmpfs => "tmpfs",
        }
    }
}

/// Runs `test` in a process of its own that has its own mounts and an empty directory on a real
/// disk. `name` is the name of the calling `#[test]`.
///
/// Without the right or the tools to do so the test is skipped, and says why; where `CI` or
/// `SHEEPDOG_REQUIRE` is set it fails instead.
pub fn run(name: &str, needs: &[Fs], test: impl FnOnce(&Path)) {
    if std::env::var(INSIDE).is_ok_and(|inside| inside == name) {
        let dir = PathBuf::from(std::env::var_os(DIR).expect("set with the name"));
        test(&dir);
        File::create(dir.join(DONE)).expect("an empty file");
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory in target/");
    let turn = super::no_store_at_a_start();
    if let Some(reason) = missing(needs, dir.path()) {
        return skip(name, &reason);
    }
    let inside = std::env::current_exe().expect("this program");
    let child = unshared(&[&"timeout", &"-k", &"5", &TIMEOUT_SECONDS, &inside, &"--exact", &name])
        .args(["--nocapture", "--include-ignored"])
        .env(INSIDE, name)
        .env(DIR, dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("unshare was tried just now");
    drop(turn);
    let output = child.wait_with_output().expect("a child");
    // Marked, so that nobody takes its summary for that of this process.
    for text in [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)) {
        text.lines().for_each(|line| println!("| {line}"));
    }
    match output.status.code() {
        // A name that is not that of a test would succeed, too.
        Some(0) => assert!(dir.path().join(DONE).exists(), "there is no test {name}"),
        Some(124 | 137) => panic!("{name} hangs: no end within {TIMEOUT_SECONDS} s; see above"),
        _ => panic!("{name} failed ({}); see above", output.status),
    }
}

fn skip(name: &str, reason: &str) {
    let required = ["CI", "SHEEPDOG_REQUIRE"].iter().any(|name| std::env::var_os(name).is_some());
    assert!(
        !required,
        "{name} cannot run here, but must (CI or SHEEPDOG_REQUIRE is set): {reason}"
    );
    println!("{name}: SKIPPED: {reason}");
}

/// Why file systems cannot be made here.
fn missing(needs: &[Fs], dir: &Path) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root may mount file systems".into());
    }
    let mut tools = vec!["unshare", "timeout", "mount", "umount"];
    if needs.iter().any(|fs| *fs != Fs::Tmpfs) {
        tools.push("losetup");
    }
    if needs.contains(&Fs::Ext4) {
        tools.push("mkfs.ext4");
    }
    if needs.contains(&Fs::Xfs) {
        tools.extend(["mkfs.xfs", "xfs_io"]);
    }
    for tool in tools {
        if command(tool).arg("--version").output().is_err() {
            return Some(format!("{tool} is not installed (see scripts/lib.sh for packages)"));
        }
    }
    needs.iter().find_map(|fs| try_mount(*fs, dir))
}

/// Why a file system of a kind cannot be mounted in a namespace of its own.
fn try_mount(fs: Fs, dir: &Path) -> Option<String> {
    let mut mount = format!("mount -t {} ", fs.name());
    if fs == Fs::Tmpfs {
        mount += "none \"$0\"";
    } else {
        let image = dir.join("probe");
        make_image(fs, &image, 320);
        mount += "-o loop \"$0/probe\" \"$0\"";
    }
    let output = unshared(&[&"sh", &"-c", &mount, &dir]).output();
    // There is none for tmpfs.
    let _ = std::fs::remove_file(dir.join("probe"));
    let text = match output {
        Ok(output) if output.status.success() => return None,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    Some(format!("{} cannot be mounted: {}", fs.name(), text.trim()))
}

/// Debian keeps the tools where users do not look for them.
fn command(program: impl AsRef<OsStr>) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// A command in a mount namespace of its own.
fn unshared(line: &[&dyn AsRef<OsStr>]) -> Command {
    let mut unshare = command("unshare");
    unshare.args(["--mount", "--propagation", "private", "--"]);
    unshare.args(line.iter().map(AsRef::as_ref));
    unshare
}

fn output(line: &[&dyn AsRef<OsStr>]) -> Output {
    let (program, arguments) = line.split_first().expect("a program");
    let arguments = arguments.iter().map(AsRef::as_ref);
    command(program.as_ref()).args(arguments).output().expect("it was there before")
}

/// Runs a tool, which must succeed.
pub fn tool(line: &[&dyn AsRef<OsStr>]) {
    let output = output(line);
    let words: Vec<_> = line.iter().map(|word| word.as_ref().to_string_lossy()).collect();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {}: {text}", words.join(" "), output.status);
}

fn make_image(fs: Fs, image: &Path, mebibytes: u64) {
    // Whatever was there is of no use.
    let _ = std::fs::remove_file(image);
    let made = File::create(image).and_then(|file| file.set_len(mebibytes << 20));
    made.expect("an image in target/");
    match fs {
        // Root could use reserved blocks without `df` telling of them.
        Fs::Ext4 => tool(&[&"mkfs.ext4", &"-q", &"-m", &"0", &"-E", &"nodiscard", &image]),
        Fs::Xfs => tool(&[&"mkfs.xfs", &"-q", &"-K", &"-m", &"reflink=1", &image]),
        Fs::Tmpfs => {}
    }
}

/// A file system that is mounted at a directory, only for this process and its children.
pub struct Disk {
    fs: Fs,
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    /// Makes one of `mebibytes` and mounts it. Its image is `dir`/`name`.image, its directory
    /// `dir`/`name`. xfs needs at least 300 MiB.
    pub fn make(fs: Fs, dir: &Path, name: &str, mebibytes: u64) -> Self {
        let (image, at) = (dir.join(format!("{name}.image")), dir.join(name));
        std::fs::create_dir_all(&at).expect("a directory to mount at");
        make_image(fs, &image, mebibytes);
        let disk = Self { fs, image, at };
        if fs == Fs::Tmpfs {
            let size = format!("size={mebibytes}m");
            tool(&[&"mount", &"-t", &"tmpfs", &"-o", &size, &"none", &disk.at]);
        } else {
            disk.mount();
        }
        disk
    }

    /// Where it is mounted.
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// The file with its bytes.
    pub fn image(&self) -> &Path {
        &self.image
    }

    fn mount(&self) {
        // A copy of a file system has the identity of its original, which xfs would refuse.
        let options = if self.fs == Fs::Xfs { "loop,nouuid" } else { "loop" };
        tool(&[&"mount", &"-t", &self.fs.name(), &"-o", &options, &self.image, &self.at]);
    }

    /// No process may have files of it open. The kernel closes those of an I/O ring only some
    /// time after the process that had it has ended.
    fn unmount(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let output = output(&[&"umount", &self.at]);
            if output.status.success() {
                return;
            }
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(text.contains("busy"), "umount: {text}");
            std::thread::sleep(Duration::from_millis(5));
        }
        tool(&[&"umount", &self.at]);
    }

    /// From now on nothing reaches the image any more: what was not synced is lost.
    pub fn cut_power(&self) {
        tool(&[&"xfs_io", &"-x", &"-c", &"shutdown", &self.at]);
    }

    /// Mounts it again after a power cut; no process may have files of it open.
    pub fn restore_power(&self) {
        self.unmount();
        self.mount();
    }

    /// Mounts a copy of its image as it is at one moment while it is in use. The image must be on
    /// an xfs. The copy ends with [`Disk::discard`].
    ///
    /// A copy that takes time mixes moments, which no crash does. This one takes none: a reflink
    /// locks the file against writes (`xfs_reflink_remap_prep`), writes back what is dirty, shares
    /// all extents and unlocks. So the copy has each write of the loop device wholly or not at
    /// all, all that were answered before, and none from after: what a disk without a volatile
    /// cache holds at a power cut. (What was not answered or not even sent to the disk is missing;
    /// a cache that loses writes is what [`Disk::cut_power`] is for.)
    pub fn snapshot(&self, at: &Path) -> Self {
        let image = self.image.with_extension("copy");
        tool(&[&"cp", &"--reflink=always", &self.image, &image]);
        std::fs::create_dir_all(at).expect("a directory to mount at");
        Self { fs: self.fs, image, at: at.into() }
    }

    /// Mounts what [`Disk::snapshot`] copied, as after a power cut.
    pub fn power_on(&self) {
        self.mount();
    }

    /// Unmounts and removes it.
    pub fn discard(self) {
        self.unmount();
        std::fs::remove_file(&self.image).expect("its image");
    }
}

/// A file of somebody else that takes space.
pub struct Hog(Option<File>);

impl Hog {
    pub fn new(disk: &Disk) -> Self {
        Self(Some(File::create(disk.at().join("hog")).expect("an empty file")))
    }

    /// Lets go of the file, so that the disk can be unmounted, until [`Hog::reopen`].
    pub fn close(&mut self) {
        self.0 = None;
    }

    /// After the disk was mounted again.
    pub fn reopen(&mut self, disk: &Disk) {
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        self.0 = Some(options.open(disk.at().join("hog")).expect("a healthy file system"));
    }

    fn file(&self) -> &File {
        self.0.as_ref().expect("open while the disk is mounted")
    }

    /// Takes what there is, except `spare` MiB.
    pub fn take_all_but(&self, spare: u64) {
        let stat = rustix::fs::fstatvfs(self.file()).expect("it is mounted");
        let free = stat.f_bavail * stat.f_frsize;
        let held = self.file().metadata().expect("it is open").len();
        // Space that others have got but not yet used may be counted as free.
        let _ = self.extend(held, free.saturating_sub(spare << 20));
    }

    /// Takes all space, to the last block.
    pub fn take_all(&self) {
        // What was freed is there when the journal has been written.
        for _ in 0..2 {
            self.file().sync_all().expect("a healthy file system");
            rustix::fs::syncfs(self.file()).expect("a healthy file system");
            let mut len = self.file().metadata().expect("it is open").len();
            let mut more = 64 << 20;
            while more >= 4096 {
                match self.extend(len, more) {
                    Ok(()) => len += more,
                    Err(Errno::NOSPC) => more /= 2,
                    Err(error) => panic!("{error}"),
                }
            }
        }
        let stat = rustix::fs::fstatvfs(self.file()).expect("it is mounted");
        assert!(stat.f_bavail * stat.f_frsize < 1 << 20, "{} blocks left", stat.f_bavail);
    }

    fn extend(&self, from: u64, more: u64) -> rustix::io::Result<()> {
        rustix::fs::fallocate(self.file(), FallocateFlags::empty(), from, more.max(1))
    }

    /// Gives all back.
    pub fn release(&self) {
        self.file()
            .set_len(0)
            .and_then(|()| self.file().sync_all())
            .expect("truncation needs no space");
    }
}
