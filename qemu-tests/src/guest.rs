//! Linux guests under QEMU without KVM.
//!
//! The guest boots from `scripts/guest-image` with the test's script appended to its initramfs, has the disk
//! under test as /dev/vda, runs the script (busybox sh; e2fsprogs and `blkcheck` are there) and switches off.
//! What the script prints comes over the second serial port; the last line carries its exit code.

use crate::{Lab, PATIENCE, Process, eventually, run};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const MARKER: &str = "GUEST-EXIT ";

/// How the guest reaches the volume.
#[derive(Clone, Debug)]
pub enum Disk {
    /// Socket of a vhost-user-blk server.
    VhostUser(PathBuf),
    /// Unix socket of an NBD server, and the export's name.
    Nbd(PathBuf, String),
}

impl Disk {
    fn arguments(&self) -> Vec<String> {
        match self {
            Self::VhostUser(path) => vec![
                "-chardev".into(),
                format!("socket,id=vhost,path={},reconnect=1", path.display()),
                "-device".into(),
                "vhost-user-blk-pci,chardev=vhost".into(),
            ],
            Self::Nbd(path, export) => vec![
                "-blockdev".into(),
                format!(
                    "driver=nbd,node-name=disk,server.type=unix,server.path={},export={export},reconnect-delay=30,discard=unmap",
                    path.display()
                ),
                "-device".into(),
                "virtio-blk-pci,drive=disk".into(),
            ],
        }
    }
}

/// What a guest left behind.
#[derive(Debug)]
pub struct GuestResult {
    /// Exit code of the script; `None` if the guest went down without one.
    pub code: Option<i32>,
    /// What the script printed.
    pub output: String,
}

impl GuestResult {
    /// The output of a script that ended with 0; panics with it otherwise.
    pub fn expect_success(self) -> String {
        assert_eq!(self.code, Some(0), "the guest's script failed:\n{}", self.output);
        self.output
    }
}

/// A running guest. Dropping it pulls the plug.
pub struct Guest {
    process: Process,
    output: Arc<Mutex<String>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Guest {
    /// Boots with the disk and runs the script. `name` names its log files.
    pub fn boot(lab: &Lab, name: &str, disk: &Disk, script: &str) -> Self {
        let image = image();
        let initrd = lab.path(&format!("{name}.cpio"));
        append_script(lab, &image, &initrd, script);
        let memory = "memory-backend-memfd,id=memory,size=256M,share=on";
        let console = format!("file:{}", lab.log(&format!("{name}-console")).display());
        let mut arguments: Vec<String> = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-accel",
            "tcg",
            "-machine",
            "q35,memory-backend=memory",
            "-m",
            "256M",
            "-object",
            memory,
            "-serial",
            &console,
            "-serial",
            "stdio",
            "-append",
            "console=ttyS0 panic=-1 quiet",
        ]
        .map(String::from)
        .to_vec();
        arguments.extend(["-kernel".into(), image.join("vmlinuz").display().to_string()]);
        arguments.extend(["-initrd".into(), initrd.display().to_string()]);
        arguments.extend(disk.arguments());
        let qemu = Path::new("qemu-system-x86_64");
        let qemu_log = lab.log(&format!("{name}-qemu"));
        let mut process = Process::start(qemu, arguments, &qemu_log, Some(Stdio::piped()));
        let output = Arc::new(Mutex::new(String::new()));
        let reader = read_output(&mut process, Arc::clone(&output), lab.log(name));
        Self { process, output, reader: Some(reader) }
    }

    /// What the script has printed so far.
    pub fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the script has printed `text`; panics when the guest ends first.
    pub fn wait_for(&mut self, text: &str) {
        eventually(&format!("guest to print {text:?}"), 4 * PATIENCE, || {
            let ended = self.process.ended();
            let there = self.output().contains(text);
            assert!(
                there || ended.is_none(),
                "the guest ended without printing {text:?}:\n{}\n{}",
                self.output(),
                self.process.log_text()
            );
            there.then_some(())
        });
    }

    /// Panics when the script has failed already.
    pub fn assert_well(&self) {
        let output = self.output();
        let code = output.lines().rev().find_map(|line| line.strip_prefix(MARKER));
        assert!(code.is_none_or(|code| code.trim() == "0"), "the guest's script failed:\n{output}");
    }

    /// Waits for the power-off.
    pub fn finish(mut self, limit: Duration) -> GuestResult {
        self.process.wait(limit);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let output = self.output();
        let code = output.lines().rev().find_map(|l| l.strip_prefix(MARKER));
        GuestResult { code: code.and_then(|c| c.trim().parse().ok()), output }
    }

    /// Pulls the plug: SIGKILL to QEMU.
    pub fn kill(mut self) {
        self.process.kill();
    }
}

fn read_output(
    process: &mut Process,
    output: Arc<Mutex<String>>,
    log: PathBuf,
) -> std::thread::JoinHandle<()> {
    let stdout = process.take_stdout().unwrap_or_else(|| panic!("QEMU's stdout was piped"));
    std::thread::spawn(move || {
        let mut log = fs::File::create(log).ok();
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if let Some(log) = &mut log {
                let _ = log.write_all(&line);
            }
            let text = String::from_utf8_lossy(&line);
            output.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            line.clear();
        }
    })
}

/// Directory with kernel and base image, built on first use.
fn image() -> PathBuf {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/guest-image");
    let made = run(script, [""; 0], 4 * PATIENCE);
    assert_eq!(made.code, Some(0), "{script} failed: {}", made.stderr);
    PathBuf::from(made.stdout.trim())
}

/// base.cpio.gz followed by an archive that holds only /test.
fn append_script(lab: &Lab, image: &Path, initrd: &Path, script: &str) {
    let dir = lab.path("script");
    let written: std::io::Result<()> = (|| {
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("test"), script)?;
        // The kernel takes concatenated archives if each begins at a multiple of four bytes.
        let mut bytes = fs::read(image.join("base.cpio.gz"))?;
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        fs::write(initrd, &bytes)
    })();
    written.unwrap_or_else(|e| panic!("{}: {e}", initrd.display()));
    let pack = "cd \"$1\" && echo test | cpio --quiet -o -H newc >>\"$2\"";
    let args: [&std::ffi::OsStr; 5] =
        ["-c".as_ref(), pack.as_ref(), "sh".as_ref(), dir.as_os_str(), initrd.as_os_str()];
    let packed = run("/bin/sh", args, PATIENCE);
    assert_eq!(packed.code, Some(0), "cpio failed: {}", packed.stderr);
}
