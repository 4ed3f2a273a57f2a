//! Commands that take their time: they poll the node and show the progress of the recovery.

use crate::cli::{Cli, Goal};
use crate::failure::Failure;
use crate::render::progress;
use crate::{ask, print, render, show};
use serde::de::DeserializeOwned;
use serde_json::{Value, from_value, json};
use sheepdog::api::{
    DiskInfo, Health, NodeInfo, NodeState, Recovery, RecoveryState, Request, Status,
};
use std::io::{IsTerminal, Write};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Pause between two looks.
const EVERY: Duration = Duration::from_millis(500);
/// How long a node may be silent before waiting for it ends: it may just be restarted.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends a request and waits until it has come true.
pub fn wait(cli: &Cli, request: &Request, goal: Goal) -> Result<(), Failure> {
    let first = ask(cli.node, request)?;
    let line = Line::new();
    let done = match goal {
        Goal::Drained => {
            let info: NodeInfo = typed(cli, first)?;
            drained(cli, &info.id, &line)?
        }
        Goal::DiskGone => {
            let disks: Vec<DiskInfo> = typed(cli, first)?;
            for disk in &disks {
                disk_gone(cli, &disk.id, &line)?;
            }
            json!([])
        }
    };
    line.clear();
    show(cli, request, done)
}

fn drained(cli: &Cli, id: &str, line: &Line) -> Result<Value, Failure> {
    loop {
        let answer = patiently(cli, &Request::NodeList)?;
        let nodes: Vec<NodeInfo> = typed(cli, answer.clone())?;
        let found = nodes.iter().position(|node| node.id == id);
        let Some(at) = found else {
            return Err(Failure::Refused("the node was removed meanwhile".into()));
        };
        match &nodes[at] {
            node if node.drained => return Ok(answer[at].clone()),
            node if matches!(node.state, NodeState::Up | NodeState::Removed) => {
                return Err(Failure::Refused(
                    "somebody let the node take data again, or removed it".into(),
                ));
            }
            _ => show_progress(cli, line)?,
        }
    }
}

fn disk_gone(cli: &Cli, id: &str, line: &Line) -> Result<(), Failure> {
    loop {
        let disks: Vec<DiskInfo> = typed(cli, patiently(cli, &Request::NodeDiskList)?)?;
        if disks.iter().all(|disk| disk.id != id) {
            return Ok(());
        }
        show_progress(cli, line)?;
    }
}

fn show_progress(cli: &Cli, line: &Line) -> Result<(), Failure> {
    let recovery: Recovery = typed(cli, patiently(cli, &Request::NodeRecovery)?)?;
    line.show(&progress(&recovery));
    sleep(EVERY);
    Ok(())
}

/// Shows the health until all is well: redrawn on a terminal, elsewhere a line for each change.
pub fn health(cli: &Cli) -> Result<(), Failure> {
    let terminal = std::io::stdout().is_terminal() && !cli.json;
    let (mut drawn, mut last) = (0, String::new());
    loop {
        let answer = patiently(cli, &Request::ClusterHealth)?;
        let recovering = patiently(cli, &Request::NodeRecovery)?;
        let health: Health = typed(cli, answer.clone())?;
        let recovery: Recovery = typed(cli, recovering.clone())?;
        let text = if cli.json {
            format!("{}\n", json!({"health": answer, "recovery": recovering}))
        } else if terminal {
            let text = render::human(&Request::ClusterHealth, answer)
                .map_err(|error| Failure::Meaningless { node: cli.node, changes: false, error })?;
            format!("{text}\n{}\n", progress(&recovery))
        } else {
            format!("{}; {}\n", render::health_line(&health), progress(&recovery))
        };
        if text != last {
            // Up to where the last picture began, and everything below away.
            let back =
                if terminal && drawn > 0 { format!("\x1b[{drawn}A\x1b[J") } else { String::new() };
            print(&format!("{back}{text}"), false)?;
            drawn = text.lines().count();
            last = text;
        }
        let all = recovery.nodes.iter().filter_map(|node| node.disks.as_ref()).flatten();
        let idle = all.into_iter().all(|disk| disk.state == RecoveryState::Idle);
        if health.status == Status::Ok && idle {
            return Ok(());
        }
        sleep(EVERY);
    }
}

/// Asks again for a while when the node cannot be reached.
fn patiently(cli: &Cli, request: &Request) -> Result<Value, Failure> {
    let begin = Instant::now();
    loop {
        match ask(cli.node, request) {
            Err(Failure::Connect { .. } | Failure::Lost { .. }) if begin.elapsed() < PATIENCE => {
                sleep(EVERY);
            }
            outcome => return outcome,
        }
    }
}

fn typed<T: DeserializeOwned>(cli: &Cli, answer: Value) -> Result<T, Failure> {
    from_value(answer).map_err(|error| Failure::Meaningless {
        node: cli.node,
        changes: false,
        error,
    })
}

/// One line on standard error that changes in place; on no terminal, a line for each change.
struct Line {
    terminal: bool,
    last: std::cell::RefCell<String>,
}

impl Line {
    fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), last: std::cell::RefCell::default() }
    }

    fn show(&self, text: &str) {
        if *self.last.borrow() != text {
            let line = if self.terminal { format!("\r\x1b[K{text}") } else { format!("{text}\n") };
            self.write(&line);
            text.clone_into(&mut self.last.borrow_mut());
        }
    }

    fn clear(&self) {
        if self.terminal && !self.last.borrow().is_empty() {
            self.write("\r\x1b[K");
        }
    }

    fn write(&self, text: &str) {
        let mut out = std::io::stderr();
        // Progress that nobody can see is no reason to end.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}
