//! Why `dog` ends with exit code 1: what happened, whether something was changed, what to do.

use sheepdog::api::Request;
use sheepdog::wire::HelloError;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;

/// Whether the request changes something when it is carried out.
pub fn changes(request: &Request) -> bool {
    match request {
        Request::ClusterInfo
        | Request::ClusterHealth
        | Request::ClusterSettings { .. }
        | Request::ClusterRecoverPlan { .. }
        | Request::NodeList
        | Request::NodeDiskList
        | Request::NodeRecovery
        | Request::NodeScrubStatus
        | Request::VolumeList
        | Request::VolumeInfo { .. }
        | Request::ExportList => false,
        Request::ClusterSet { .. }
        | Request::ClusterRecover { .. }
        | Request::NodeDrain { .. }
        | Request::NodeUndrain { .. }
        | Request::NodeRemove { .. }
        | Request::NodeSetZone { .. }
        | Request::NodeSetWeight { .. }
        | Request::NodeDiskAdd { .. }
        | Request::NodeDiskRemove { .. }
        | Request::NodeScrubStart { .. }
        | Request::NodeScrubPause
        | Request::VolumeCreate { .. }
        | Request::VolumeDelete { .. }
        | Request::VolumeDetach { .. }
        | Request::VolumeEndHandover { .. }
        | Request::ExportAdd { .. }
        | Request::ExportRemove { .. } => true,
    }
}

/// What went wrong. `changes` says whether the request was one that changes something.
#[derive(Debug)]
pub enum Failure {
    /// No connection, so the request was not sent.
    Connect { node: SocketAddr, error: HelloError },
    /// The connection failed after the request was sent, at least in part.
    Lost { node: SocketAddr, changes: bool, error: io::Error },
    /// The node's own words, or why `dog` did not go on.
    Refused(String),
    /// The request was carried out, and its answer has another shape than this release knows.
    Meaningless { node: SocketAddr, changes: bool, error: serde_json::Error },
    /// The request was carried out, and its answer could not be written.
    Output { changes: bool, error: io::Error },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { node, error } => connect(f, *node, error),
            Self::Lost { node, changes, error } => {
                write!(f, "lost the node at {node} before its answer came: {}; ", reason(error))?;
                f.write_str(if *changes {
                    "the request may have been carried out, look with `dog volume list`, \
                     `dog export list` or `dog node list` before you repeat it"
                } else {
                    "it was a question, nothing was changed; ask again, or another node with \
                     --node IP:PORT or SHEEPDOG_NODE"
                })
            }
            Self::Refused(text) => f.write_str(text),
            Self::Meaningless { node, changes, error } => write!(
                f,
                "cannot read the answer of the node at {node}: {error}; {}; use the dog of the \
                 node's release{}",
                outcome(*changes),
                if *changes { "" } else { ", or --json for the answer as it is" },
            ),
            Self::Output { changes, error } => {
                write!(f, "cannot write the answer to standard output: {error}; ")?;
                f.write_str(outcome(*changes))
            }
        }
    }
}

fn connect(f: &mut fmt::Formatter<'_>, node: SocketAddr, error: &HelloError) -> fmt::Result {
    write!(f, "cannot talk to the node at {node}: ")?;
    match error {
        HelloError::Io(error) => f.write_str(&reason(error))?,
        other => write!(f, "{other}")?,
    }
    f.write_str("; nothing was changed. ")?;
    f.write_str(match error {
        HelloError::Io(_) => {
            "Check that sheep runs there, or choose another node with --node IP:PORT or \
             SHEEPDOG_NODE"
        }
        _ => "Another node can be chosen with --node IP:PORT or SHEEPDOG_NODE",
    })
}

/// What became of a request that was answered.
fn outcome(changes: bool) -> &'static str {
    if changes { "the request was carried out" } else { "nothing was changed" }
}

/// An I/O error in the terms of a connection; the system's text where it fits.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => "connection refused".into(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "the connection was reset".into(),
        ErrorKind::UnexpectedEof => "it closed the connection".into(),
        // A read timeout of a socket: EAGAIN on Unix.
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "it did not answer in time".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 5], 7000))
    }

    #[test]
    fn connection_errors_name_the_node_and_the_way_out() {
        let error = HelloError::Io(ErrorKind::ConnectionRefused.into());
        let text = Failure::Connect { node: node(), error }.to_string();
        for part in ["10.0.0.5:7000", "refused", "nothing was changed", "--node", "SHEEPDOG_NODE"] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        let text = Failure::Connect { node: node(), error: HelloError::Busy }.to_string();
        assert!(text.contains("too many connections") && text.contains("nothing was changed"));
    }

    #[test]
    fn timeouts_do_not_show_the_errno_of_a_socket() {
        for kind in [ErrorKind::WouldBlock, ErrorKind::TimedOut] {
            let failure = Failure::Lost { node: node(), changes: true, error: kind.into() };
            assert!(failure.to_string().contains("did not answer in time"));
        }
    }

    #[test]
    fn only_orders_may_have_been_carried_out() {
        let lost = |changes| {
            let error = ErrorKind::ConnectionReset.into();
            Failure::Lost { node: node(), changes, error }.to_string()
        };
        assert!(lost(true).contains("may have been carried out"));
        assert!(lost(false).contains("nothing was changed"));
        let failed =
            |changes| Failure::Output { changes, error: ErrorKind::StorageFull.into() }.to_string();
        assert!(failed(true).contains("was carried out"));
        assert!(failed(false).contains("nothing was changed"));
    }
}
