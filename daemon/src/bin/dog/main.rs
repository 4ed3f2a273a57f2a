//! `dog` administers a Sheepdog cluster: it sends requests to one node, which speaks for the
//! whole cluster, and prints the answer. `docs/dog.md` is its reference.

#![forbid(unsafe_code)]

mod address;
mod cli;
mod failure;
mod hint;
mod recover;
mod render;
mod table;
mod time;
mod watch;

use clap::Parser;
use cli::{Action, Cli};
use failure::Failure;
use serde_json::Value;
use sheepdog::api::{Request, Response};
use sheepdog::wire::AdminClient;
use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

/// A node on the same network accepts within a round trip; more means that nobody is there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than a node takes to give up on the rest of the cluster, so that its own words arrive.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    // Usage errors end here with exit code 2, `--help` and `--version` with 0.
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // With nowhere to complain to, the exit code still tells.
            let _ = writeln!(std::io::stderr(), "dog: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    match cli.command.action() {
        Action::Ask(request) => {
            let answer = ask(cli.node, &request)?;
            show(cli, &request, answer)
        }
        Action::Wait(request, goal) => watch::wait(cli, &request, goal),
        Action::Watch => watch::health(cli),
        Action::Recover { targets, force, yes } => recover::recover(cli, targets, force, yes),
    }
}

/// One request on a connection of its own.
fn ask(node: SocketAddr, request: &Request) -> Result<Value, Failure> {
    let changes = failure::changes(request);
    let mut client = AdminClient::connect(node, CONNECT_TIMEOUT)
        .map_err(|error| Failure::Connect { node, error })?;
    let response = client.ask(request, ANSWER_TIMEOUT);
    match response.map_err(|error| Failure::Lost { node, changes, error })? {
        Response::Error(text) => Err(Failure::Refused(render::printable(&text))),
        Response::Ok(value) => Ok(value),
    }
}

/// Prints an answer as it was asked for.
fn show(cli: &Cli, request: &Request, answer: Value) -> Result<(), Failure> {
    let changes = failure::changes(request);
    if cli.json {
        return print(&render::json(&answer), changes);
    }
    let meaningless = |error| Failure::Meaningless { node: cli.node, changes, error };
    print(&render::human(request, answer).map_err(meaningless)?, changes)
}

/// Writes the answer. A reader that has left (`dog volume list | head -1`) has read enough.
fn print(text: &str, changes: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::Output { changes, error })
        }
        _ => Ok(()),
    }
}
