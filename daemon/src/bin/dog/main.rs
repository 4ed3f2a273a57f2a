//! `dog` administers a Sheepdog cluster: it sends one request to one node, which speaks for the
//! whole cluster, and prints the answer. `docs/dog.md` is its reference.

#![forbid(unsafe_code)]

mod address;
mod cli;
mod failure;
mod hint;
mod render;
mod table;
mod time;

use clap::Parser;
use cli::Cli;
use failure::Failure;
use sheepdog::api::Response;
use sheepdog::wire::AdminClient;
use std::io::Write;
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
    let node = cli.node;
    let request = cli.command.request();
    let changes = failure::changes(&request);
    let mut client = AdminClient::connect(node, CONNECT_TIMEOUT)
        .map_err(|error| Failure::Connect { node, error })?;
    let response = client.ask(&request, ANSWER_TIMEOUT).map_err(|error| Failure::Lost {
        node,
        changes,
        error,
    })?;
    match response {
        Response::Error(text) => Err(Failure::Refused(render::printable(&text))),
        Response::Ok(value) if cli.json => print(&render::json(&value), changes),
        Response::Ok(value) => {
            let text = render::human(&request, value).map_err(|error| Failure::Meaningless {
                node,
                changes,
                error,
            })?;
            print(&text, changes)
        }
    }
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
