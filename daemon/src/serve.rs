//! Data connections from other nodes: their calls, carried out on this node's disks.

use crate::cluster::lock;
use crate::duplex::{Duplex, Ended};
use crate::replica::{Answer, Later, Replica};
use sheepdog_cluster::message::{self, Call, FrameError, Reply};
use sheepdog_types::NodeId;
use std::collections::HashMap;
use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// The data connections that are served, one for each node that calls.
///
/// A node that connects again has given its old connection up: what is left on it must not be
/// carried out after calls on the new one. So the old one is ended first.
#[derive(Default)]
pub struct Served {
    connections: Mutex<HashMap<NodeId, Connection>>,
}

struct Connection {
    duplex: Arc<Duplex>,
    thread: JoinHandle<()>,
}

impl Served {
    /// Serves a data connection on a thread of its own; `on_end` runs when it is over.
    ///
    /// # Errors
    /// If the socket or the thread cannot be set up.
    pub fn serve(
        &self,
        stream: TcpStream,
        peer: NodeId,
        replica: Arc<Replica>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let duplex = Arc::new(Duplex::new(stream)?);
        let connection = Arc::clone(&duplex);
        let mut connections = lock(&self.connections);
        let former = connections.remove(&peer);
        if let Some(former) = &former {
            former.duplex.stop();
        }
        let name = format!("peer-{:04x}", peer.0 >> 48);
        let thread = thread::Builder::new().name(name).spawn(move || {
            if former.is_some_and(|former| former.thread.join().is_err()) {
                tracing::error!(%peer, "the thread of the former connection panicked");
            }
            run(&connection, peer, &replica);
            on_end();
        })?;
        connections.insert(peer, Connection { duplex, thread });
        Ok(())
    }
}

fn run(connection: &Arc<Duplex>, peer: NodeId, replica: &Arc<Replica>) {
    match connection.run(|bytes| handle(bytes, connection, replica)) {
        Ended::Frame(error) => {
            tracing::warn!(%peer, %error, "closed a connection that made no sense");
        }
        ended => tracing::info!(%peer, reason = %ended, "a peer disconnected"),
    }
}

/// Carries out all complete calls in `bytes`; gives how many bytes they took.
fn handle(
    bytes: &[u8],
    connection: &Arc<Duplex>,
    replica: &Arc<Replica>,
) -> Result<usize, FrameError> {
    let mut used = 0;
    let mut crcs = Vec::new();
    while let Some(frame) = message::decode::<Call>(&bytes[used..])? {
        used += frame.consumed;
        crcs.clear();
        crcs.extend(frame.tail.crcs());
        let id = frame.id;
        let later = || -> Later {
            let connection = Arc::clone(connection);
            Box::new(move |answer| {
                queue_answer(&connection, id, &answer);
                connection.flush();
            })
        };
        if let Some(answer) = replica.execute(&frame.head, &crcs, frame.tail.data(), later) {
            queue_answer(connection, id, &answer);
        }
    }
    connection.flush();
    Ok(used)
}

fn queue_answer(connection: &Duplex, id: u64, answer: &Answer) {
    let Answer { reply, crcs, data } = answer;
    let reply: &Reply = reply;
    connection.queue(|out| message::encode(out, id, reply, crcs, data));
}
