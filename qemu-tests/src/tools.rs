//! fio, qemu-img, qemu-io, and qemu-storage-daemon as a known good server.

use crate::{Disk, Finished, Lab, PATIENCE, Process, eventually, run};
use serde_json::Value;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Runs `qemu-img` with the arguments; it must succeed. Returns what it printed.
pub fn qemu_img(args: &[&str]) -> String {
    let done = run("qemu-img", args, 4 * PATIENCE);
    assert_eq!(done.code, Some(0), "qemu-img {args:?}: {}{}", done.stdout, done.stderr);
    done.stdout
}

/// Runs `qemu-io` with one `-c` for each command on a raw image or URI; whatever it says is returned.
pub fn try_qemu_io(uri: &str, commands: &[String]) -> Finished {
    let mut args = vec!["-f".to_owned(), "raw".to_owned(), "-d".into(), "unmap".into()];
    for command in commands {
        args.extend(["-c".to_owned(), command.clone()]);
    }
    args.push(uri.to_owned());
    run("qemu-io", args, 4 * PATIENCE)
}

/// As [`try_qemu_io`], but every command must succeed and every pattern must be found.
pub fn qemu_io(uri: &str, commands: &[String]) -> String {
    let done = try_qemu_io(uri, commands);
    let text = format!("{}{}", done.stdout, done.stderr);
    let complaint = text.lines().find(|l| {
        l.contains("Pattern verification failed") || l.contains("failed:") || l.contains("rror:")
    });
    assert!(done.code == Some(0) && complaint.is_none(), "qemu-io {uri}: {text}");
    done.stdout
}

/// A fio job on an NBD export that is checked as it goes.
pub struct Fio {
    process: Process,
    json: PathBuf,
}

/// What fio measured.
#[derive(Debug)]
pub struct FioResult {
    /// Longest time of one write, and of one read.
    pub longest: (Duration, Duration),
    /// Writes done.
    pub writes: u64,
}

impl Fio {
    /// Random 4 KiB writes, 16 in flight, every block read back and checked while the writing goes on, and
    /// all of them once more at the end. `mib` MiB are written at no more than `iops` writes a second.
    pub fn start(lab: &Lab, name: &str, uri: &str, mib: u64, iops: u64) -> Self {
        let json = lab.path(&format!("{name}.json"));
        let args = [
            "--name=verify".to_owned(),
            "--ioengine=nbd".into(),
            format!("--uri={uri}"),
            "--rw=randwrite".into(),
            "--bs=4k".into(),
            "--iodepth=16".into(),
            format!("--size={mib}M"),
            format!("--rate_iops={iops},{iops}"),
            "--verify=crc32c".into(),
            "--verify_backlog=512".into(),
            "--verify_fatal=1".into(),
            "--verify_state_save=0".into(),
            "--randseed=7".into(),
            "--thread".into(),
            "--eta=always".into(),
            "--eta-newline=500ms".into(),
            "--output-format=json".into(),
            format!("--output={}", json.display()),
        ];
        let process = Process::start(Path::new("fio"), args, &lab.log(name), None);
        Self { process, json }
    }

    /// Waits until this much of the job is done.
    pub fn wait_for_percent(&mut self, percent: f64) {
        eventually("fio to make progress", PATIENCE, || {
            assert!(self.process.ended().is_none(), "fio ended early: {}", self.process.log_text());
            let log = self.process.log_text();
            (progress(&log)? >= percent).then_some(())
        });
    }

    /// Waits for its end; it must have found no error.
    pub fn finish(mut self, limit: Duration) -> FioResult {
        let status = self.process.wait(limit);
        let text = std::fs::read_to_string(&self.json).unwrap_or_default();
        assert!(status.success(), "fio failed: {status}\n{}\n{text}", self.process.log_text());
        let json: Value = text
            .find('{')
            .and_then(|at| serde_json::from_str(&text[at..]).ok())
            .unwrap_or_else(|| panic!("fio printed no JSON: {text}"));
        let job = &json["jobs"][0];
        assert_eq!(job["error"], 0, "fio: {text}");
        let longest =
            |kind: &str| Duration::from_nanos(job[kind]["lat_ns"]["max"].as_u64().unwrap_or(0));
        FioResult {
            longest: (longest("write"), longest("read")),
            writes: job["write"]["total_ios"].as_u64().unwrap_or(0),
        }
    }
}

/// `[12.3%]` of the last progress line.
fn progress(log: &str) -> Option<f64> {
    let end = log.rfind("%]")?;
    let begin = log[..end].rfind('[')?;
    log[begin + 1..end].parse().ok()
}

/// qemu-storage-daemon with a raw file, on both protocols in turn: shows that lab and guests work, whatever
/// `sheep` does.
pub struct StorageDaemon {
    _process: Process,
    socket: PathBuf,
    vhost: bool,
}

impl StorageDaemon {
    /// Serves `file` (made if it is not there, 64 MiB) over vhost-user-blk or NBD (export name `disk`).
    pub fn start(lab: &Lab, file: &Path, vhost: bool) -> Self {
        if !file.exists() {
            let made = std::fs::File::create(file).and_then(|f| f.set_len(64 << 20));
            made.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
        let socket = lab.path(if vhost { "stand-in.vhost" } else { "stand-in.nbd" });
        let mut args = vec![
            "--blockdev".to_owned(),
            format!("driver=file,node-name=file,filename={},discard=unmap", file.display()),
        ];
        let path = socket.display();
        if vhost {
            args.push("--export".into());
            args.push(format!(
                "type=vhost-user-blk,id=e,node-name=file,writable=on,addr.type=unix,addr.path={path}"
            ));
        } else {
            args.extend(["--nbd-server".into(), format!("addr.type=unix,addr.path={path}")]);
            args.push("--export".into());
            args.push("type=nbd,id=e,node-name=file,name=disk,writable=on".into());
        }
        let daemon = Path::new("qemu-storage-daemon");
        let process = Process::start(daemon, args, &lab.log("qemu-storage-daemon"), None);
        // There is a moment between its name and its readiness; a vhost-user server takes one client only.
        eventually("qemu-storage-daemon's socket", PATIENCE, || {
            let ready = if vhost { socket.exists() } else { UnixStream::connect(&socket).is_ok() };
            ready.then_some(())
        });
        Self { _process: process, socket, vhost }
    }

    /// For a guest.
    pub fn disk(&self) -> Disk {
        if self.vhost {
            Disk::VhostUser(self.socket.clone())
        } else {
            Disk::Nbd(self.socket.clone(), "disk".into())
        }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
