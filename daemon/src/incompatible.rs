//! Other ends that speak no protocol version of this release: said once, and shown while they try.

use crate::cluster::lock;
use crate::wire::{HelloError, Versions, incompatible};
use sheepdog_types::NodeId;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Whoever has not tried for this long is forgotten; nodes try every few seconds at least.
const MEMORY: Duration = Duration::from_secs(60);
/// Most that are remembered (I10). Of more, some are said again each time they try.
const MAX: usize = 1024;

/// The other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// A member that connected to this node.
    Node(NodeId),
    /// Where this node connected to, or a host from which somebody else came.
    Address(String),
}

/// Who was met with no protocol version in common.
#[derive(Debug, Default)]
pub struct Incompatible(Mutex<HashMap<End, (Versions, Instant)>>);

impl Incompatible {
    /// Remembers it, and logs it unless it is known.
    pub fn note(&self, end: End, theirs: Versions) {
        let now = Instant::now();
        let mut known = lock(&self.0);
        known.retain(|_, (_, at)| now.saturating_duration_since(*at) < MEMORY);
        let is_new = known.get(&end).is_none_or(|(versions, _)| *versions != theirs);
        if is_new {
            let who = match &end {
                End::Node(node) => format!("node {node}"),
                End::Address(address) => address.clone(),
            };
            let problem = incompatible(theirs);
            tracing::warn!(who, problem, "no connection: no protocol version in common");
        }
        if known.len() < MAX || known.contains_key(&end) {
            known.insert(end, (theirs, now));
        }
    }

    /// What came of a connection to `address`.
    pub fn observe<T>(&self, address: &str, outcome: &Result<T, HelloError>) {
        match outcome {
            Ok(_) => _ = lock(&self.0).remove(&End::Address(address.to_owned())),
            Err(HelloError::Versions { theirs }) => {
                self.note(End::Address(address.to_owned()), *theirs);
            }
            Err(_) => {}
        }
    }

    /// A member connected with a version in common.
    pub fn forget(&self, node: NodeId) {
        lock(&self.0).remove(&End::Node(node));
    }

    /// The versions of a member that was met lately, if none of them is spoken here.
    #[must_use]
    pub fn of(&self, node: NodeId, address: &str) -> Option<Versions> {
        let known = lock(&self.0);
        let (versions, at) =
            known.get(&End::Node(node)).or_else(|| known.get(&End::Address(address.to_owned())))?;
        (at.elapsed() < MEMORY).then_some(*versions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_known_by_id_or_address_and_memory_is_bounded() {
        let table = Incompatible::default();
        let future = Versions { oldest: 8, newest: 9 };
        table.note(End::Node(NodeId(7)), future);
        table.observe::<()>("10.0.0.2:7000", &Err(HelloError::Versions { theirs: future }));
        assert_eq!(table.of(NodeId(7), "10.0.0.1:7000"), Some(future));
        assert_eq!(table.of(NodeId(8), "10.0.0.2:7000"), Some(future));
        assert_eq!(table.of(NodeId(8), "10.0.0.3:7000"), None);
        table.observe("10.0.0.2:7000", &Ok(()));
        table.forget(NodeId(7));
        for node in [7, 8] {
            assert_eq!(table.of(NodeId(node), "10.0.0.2:7000"), None, "it was upgraded");
        }
        for n in 0..2 * MAX {
            table.note(End::Address(n.to_string()), future);
        }
        assert_eq!(lock(&table.0).len(), MAX);
    }
}
