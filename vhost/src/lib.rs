//! A vhost-user-blk server: QEMU maps the guest's memory into this process, and requests travel
//! through virtqueues in that memory with one event descriptor in each direction.
//!
//! Any [`Block`](sheepdog_types::Block) can be served. Requests are taken off a queue in batches
//! by its worker thread; the guest's data is copied once; a request is answered on the thread that
//! completes it. Idle queues cost nothing.
//!
//! ```text
//! server      socket, one client after the other, start and stop
//! connection  threads of one client
//! device      the frontend's messages: features, memory, configuration, queue start and stop
//! queue       the data path: ring ─► Block ─► ring
//! ring        a virtqueue's configuration, and all that is written into its rings
//! inflight    shared memory in which a successor of this process finds what was in flight
//! dirty       shared memory in which a migration finds what was written
//! memory      the guest's memory table
//! mapping     shared files in our memory
//! chain       descriptor chain ─► descriptors
//! request     descriptors ─► checked request; pure
//! config      feature bits and configuration space
//! ```
//!
//! The guest and the frontend are not trusted: a bad request is answered with an error status, a
//! bad ring stops its queue with one line in the log until the guest sets it up again, a protocol
//! error ends the connection. One thing cannot be defended against: a frontend that truncates the
//! file behind its shared memory raises SIGBUS here, as in every vhost-user server.
//!
//! Sources: VIRTIO 1.2, sections 2.7 (split virtqueues) and 5.2 (block device); QEMU's
//! `docs/interop/vhost-user.rst`.

mod chain;
mod config;
mod connection;
mod device;
mod dirty;
mod inflight;
mod mapping;
mod memory;
mod queue;
mod request;
mod ring;
mod server;
#[cfg(test)]
mod testing;

pub use server::{Config, ServerHandle, StartError, VhostServer};
