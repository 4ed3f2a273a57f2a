//! Linux guests under QEMU without KVM.
//!
//! The guest boots from `scripts/guest-image` with the test's script appended to its initramfs, has the disk
//! under test as /dev/vda, runs the script (busybox sh; e2fsprogs and `blkcheck` are there) and switches off.
//! What the script prints comes over the second serial port; the last line carries its exit code.

use crate::{Lab, PATIENCE, Process, Qmp, eventually, run};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const MARKER: &str = "GUEST-EXIT ";
/// No multiple of 256 KiB: QEMU before 9.0 loses writes of a guest without KVM during a migration if it looks at 64 dirty
/// bits at once (fixed by "physmem: Fix migration dirty bitmap coherency with TCG memory access").
const MEMORY: &str = "262152K";

/// How the guest reaches the volume.
#[derive(Clone, Debug)]
pub enum Disk {
    /// Socket of a vhost-user-blk server.
    VhostUser(PathBuf),
    /// Unix socket of an NBD server, and the export's name.
    Nbd(PathBuf, String),
    /// A raw file, without any of us: for comparisons.
    File(PathBuf),
    /// No disk, for comparisons.
    None,
    /// No disk, but a network card: from the guest, 10.0.2.2 is this machine's loopback address.
    Network,
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
            Self::Nbd(path, export) => on_block_device(&format!(
                "driver=nbd,server.type=unix,server.path={},export={export},reconnect-delay=120,discard=unmap",
                path.display()
            )),
            Self::File(path) => {
                on_block_device(&format!("driver=file,filename={}", path.display()))
            }
            Self::None => Vec::new(),
            Self::Network => ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"]
                .map(String::from)
                .to_vec(),
        }
    }
}

fn on_block_device(options: &str) -> Vec<String> {
    let node = format!("{options},node-name=disk");
    vec!["-blockdev".into(), node, "-device".into(), "virtio-blk-pci,drive=disk".into()]
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

/// What a guest has printed in one QEMU, and when.
#[derive(Default)]
struct Output {
    text: String,
    /// When it had said two lines: the first one may tell of what it has done elsewhere.
    first: Option<Instant>,
    last: Option<Instant>,
}

/// A process that runs a guest, or waits for one to come.
pub(crate) struct Qemu {
    pub(crate) process: Process,
    input: ChildStdin,
    output: Arc<Mutex<Output>>,
    reader: Option<std::thread::JoinHandle<()>>,
    monitor: PathBuf,
    qmp: Option<Qmp>,
}

impl Qemu {
    /// `name` names its log files.
    pub(crate) fn start(lab: &Lab, name: &str, machine: &[String], more: Vec<String>) -> Self {
        let console = format!("file:{}", lab.log(&format!("{name}-console")).display());
        let monitor = lab.path(&format!("{name}.qmp"));
        let qmp = format!("unix:{},server=on,wait=off", monitor.display());
        let mut arguments = machine.to_vec();
        arguments.extend(["-serial", &console, "-serial", "stdio", "-qmp", &qmp].map(String::from));
        arguments.extend(more);
        let program = Path::new("qemu-system-x86_64");
        let log = lab.log(&format!("{name}-qemu"));
        let (process, input, stdout) = Process::start_piped(program, arguments, &log);
        let output = Arc::default();
        let reader = Some(read_output(stdout, Arc::clone(&output), lab.log(name)));
        Self { process, input, output, reader, monitor, qmp: None }
    }

    pub(crate) fn qmp(&mut self) -> &mut Qmp {
        self.qmp.get_or_insert_with(|| Qmp::connect(&self.monitor))
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that the guest has printed here, now that the process has ended.
    pub(crate) fn read_to_end(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        self.output().text.clone()
    }
}

/// A running guest. Dropping it pulls the plug.
pub struct Guest {
    /// What each QEMU is given that is to run it, but for its disk.
    pub(crate) machine: Vec<String>,
    pub(crate) qemu: Qemu,
    /// What it printed where it was before, and when it did so last.
    past: String,
    left: Option<Instant>,
}

impl Guest {
    /// Boots with the disk and runs the script. `name` names its log files.
    pub fn boot(lab: &Lab, name: &str, disk: &Disk, script: &str) -> Self {
        let image = image();
        let initrd = lab.path(&format!("{name}.cpio"));
        append_script(lab, &image, &initrd, script);
        let memory = &format!("memory-backend-memfd,id=memory,size={MEMORY},share=on");
        let mut machine: Vec<String> = [
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
            MEMORY,
            "-object",
            memory,
            "-append",
            // Memory that the guest itself writes before a disk does would hide what a disk's server forgets to log
            // during a migration. Without KVM, on a busy machine, ticks come too late for the kernel's check of the
            // timer, which then panics.
            "console=ttyS0 panic=-1 oops=panic quiet init_on_alloc=0 no_timer_check",
        ]
        .map(|s: &str| s.to_owned())
        .to_vec();
        machine.extend(["-kernel".into(), image.join("vmlinuz").display().to_string()]);
        machine.extend(["-initrd".into(), initrd.display().to_string()]);
        let qemu = Qemu::start(lab, name, &machine, disk.arguments());
        Self { machine, qemu, past: String::new(), left: None }
    }

    /// Starts a QEMU that waits at `address` for this guest, with a disk of its own.
    pub(crate) fn start_incoming(&self, lab: &Lab, name: &str, disk: &Disk, address: &str) -> Qemu {
        let mut more = disk.arguments();
        more.extend(["-incoming".into(), address.to_owned()]);
        Qemu::start(lab, name, &self.machine, more)
    }

    /// Goes on in another QEMU, where it runs already; the old one is killed.
    pub(crate) fn leave_for(&mut self, qemu: Qemu) {
        let mut old = std::mem::replace(&mut self.qemu, qemu);
        old.process.kill();
        self.past.push_str(&old.read_to_end());
        self.left = old.output().last;
    }

    /// Sends a line to the script's standard input. None may be on its way when the guest migrates.
    pub fn say(&mut self, line: &str) {
        let input = &mut self.qemu.input;
        let sent = writeln!(input, "{line}").and_then(|()| input.flush());
        sent.unwrap_or_else(|e| panic!("the guest cannot be told {line:?}: {e}"));
    }

    /// What the script has printed so far.
    pub fn output(&self) -> String {
        format!("{}{}", self.past, self.qemu.output().text)
    }

    /// How long it said nothing when it last migrated, once it has done something since and said so.
    pub fn silence(&self) -> Option<Duration> {
        Some(self.qemu.output().first?.duration_since(self.left?))
    }

    /// Waits until the script has printed `text`; panics when the guest ends first.
    pub fn wait_for(&mut self, text: &str) {
        eventually(&format!("guest to print {text:?}"), 4 * PATIENCE, || {
            let ended = self.qemu.process.ended();
            if ended.is_some() {
                self.qemu.read_to_end(); // its last words may be on their way
            }
            let there = self.output().contains(text);
            assert!(
                there || ended.is_none(),
                "the guest ended without printing {text:?}:\n{}\n{}",
                self.output(),
                self.qemu.process.log_text()
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
        self.qemu.process.wait(limit);
        self.qemu.read_to_end();
        let output = self.output();
        let code = output.lines().rev().find_map(|l| l.strip_prefix(MARKER));
        GuestResult { code: code.and_then(|c| c.trim().parse().ok()), output }
    }

    /// Pulls the plug: SIGKILL to QEMU. Returns what the script had printed.
    pub fn kill(mut self) -> String {
        self.qemu.process.kill();
        self.qemu.read_to_end();
        self.output()
    }
}

fn read_output(
    mut stdout: ChildStdout,
    output: Arc<Mutex<Output>>,
    log: PathBuf,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut log = fs::File::create(log).ok();
        let mut bytes = [0; 4096];
        // Not line by line: a guest that migrates may end a line elsewhere.
        while let Ok(n @ 1..) = stdout.read(&mut bytes) {
            if let Some(log) = &mut log {
                let _ = log.write_all(&bytes[..n]);
            }
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.text.push_str(&String::from_utf8_lossy(&bytes[..n]));
            let now = Instant::now();
            if output.first.is_none() && output.text.matches('\n').count() >= 2 {
                output.first = Some(now);
            }
            output.last = Some(now);
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
