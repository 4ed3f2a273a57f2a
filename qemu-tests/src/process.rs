//! Child processes that cannot outlive the test, with their output in a log file.

use crate::eventually;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A running child. Dropping it kills it.
pub struct Process {
    child: Child,
    what: String,
    log: PathBuf,
}

impl Process {
    /// Starts `program`; its stderr goes to the end of `log`, and so does stdout unless `stdout` is given.
    pub fn start<I, S>(program: &Path, args: I, log: &Path, stdout: Option<Stdio>) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        Self::spawn(program, args, log, Stdio::null(), stdout)
    }

    /// Starts `program` with pipes to its stdin and stdout; its stderr goes to the end of `log`.
    pub fn start_piped<I, S>(program: &Path, args: I, log: &Path) -> (Self, ChildStdin, ChildStdout)
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut this = Self::spawn(program, args, log, Stdio::piped(), Some(Stdio::piped()));
        let pipes = (this.child.stdin.take(), this.child.stdout.take());
        let (Some(stdin), Some(stdout)) = pipes else { panic!("{} has no pipes", this.what) };
        (this, stdin, stdout)
    }

    fn spawn<I, S>(program: &Path, args: I, log: &Path, stdin: Stdio, stdout: Option<Stdio>) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let file = OpenOptions::new().create(true).append(true).open(log);
        let file = file.unwrap_or_else(|e| panic!("{}: {e}", log.display()));
        let what =
            program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let clone = file.try_clone().unwrap_or_else(|e| panic!("{}: {e}", log.display()));
        let child = guarded(program)
            .args(args)
            .stdin(stdin)
            .stdout(stdout.unwrap_or_else(|| clone.into()))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|e| panic!("{what} could not be started: {e}"));
        Self { child, what, log: log.to_owned() }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything in the log file so far.
    pub fn log_text(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let pid = pid.unwrap_or_else(|| panic!("{} has no process id", self.what));
        kill_process(pid, signal).unwrap_or_else(|e| panic!("signal to {}: {e}", self.what));
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap_or_else(|e| panic!("wait for {}: {e}", self.what))
    }

    /// Whether all its threads are stopped.
    pub fn is_stopped(&self) -> bool {
        let stopped = |stat: String| {
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
        };
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
        threads.is_ok_and(|mut threads| {
            threads.all(|thread| {
                let stat = thread.and_then(|t| std::fs::read_to_string(t.path().join("stat")));
                stat.is_ok_and(stopped)
            })
        })
    }

    /// Whether it has died; it stays a zombie until someone asks how.
    pub fn is_dead(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        stat.is_ok_and(|s| s.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("the end of {}", self.what);
        eventually(&what, limit, || self.ended())
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// CPU time used so far, user and system, of all threads.
    pub fn cpu_time(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.pid());
        let stat = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        // The command name may hold spaces; the fields count from the last parenthesis (proc(5): 14 and 15).
        let fields: Vec<_> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
        Duration::from_millis((ticks(11) + ticks(12)) * 10)
    }

    /// Resident memory in KiB.
    pub fn rss_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A command that the kernel kills when the test dies, however that happens.
fn guarded(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// A command that came to its end.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Everything it printed.
    pub stdout: String,
    /// Everything it complained about.
    pub stderr: String,
}

/// Runs a command to its end; panics (and kills it) after `limit`.
pub fn run<I, S>(program: impl AsRef<Path>, args: I, limit: Duration) -> Finished
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let program = program.as_ref();
    let args: Vec<OsString> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
    let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("no temporary directory: {e}"));
    let (out, err) = (dir.path().join("out"), dir.path().join("err"));
    let file = File::create(&out).unwrap_or_else(|e| panic!("{}: {e}", out.display()));
    let mut process = Process::start(program, &args, &err, Some(file.into()));
    process.what = format!("{} {}", program.display(), args.join(OsStr::new(" ")).display());
    let code = process.wait(limit).code();
    let text =
        |path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    Finished { code, stdout: text(out), stderr: text(err) }
}
