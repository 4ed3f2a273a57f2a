//! The threads of one connection: one that reads the frontend's messages, and one for each queue.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use sheepdog_types::Block;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::device::Device;
use crate::memory::Table;
use crate::queue::{Queue, Shared};
use crate::server::Config;

/// A client being served. Dropping it completes what was submitted and ends the workers.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    queues: Vec<Arc<Queue>>,
    messages: BackendReqHandler<Mutex<Device>>,
    /// Tells the workers to end.
    exit: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

impl Connection {
    pub(crate) fn new(
        name: String,
        block: Arc<dyn Block>,
        config: &Config,
        socket: UnixStream,
    ) -> io::Result<Self> {
        let table = Table::new();
        let shared = Arc::new(Shared {
            name,
            block,
            memory: table.memory(),
            writeback: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            frontend: Some(socket.try_clone()?),
        });
        let queue = |index| Queue::new(index, shared.clone(), config.queue_size).map(Arc::new);
        let queues: Vec<_> =
            (0..usize::from(config.queues)).map(queue).collect::<io::Result<_>>()?;
        let device = Device::new(shared.clone(), queues.clone(), config.queue_size, table);
        let alarm = socket.try_clone()?;
        let mut connection = Self {
            shared,
            queues,
            messages: BackendReqHandler::from_stream(socket, Arc::new(Mutex::new(device))),
            exit: Arc::default(),
            workers: Vec::new(),
        };
        connection.spawn_workers(&alarm)?;
        Ok(connection)
    }

    fn spawn_workers(&mut self, alarm: &UnixStream) -> io::Result<()> {
        for (index, queue) in self.queues.iter().enumerate() {
            let (queue, exit) = (queue.clone(), self.exit.clone());
            let (name, alarm) = (self.shared.name.clone(), alarm.try_clone()?);
            let work = move || {
                let end = panic::catch_unwind(AssertUnwindSafe(|| queue.work(&exit)));
                if !matches!(end, Ok(Ok(()))) {
                    // Not silently: the guest would hang. It may connect again.
                    tracing::error!(device = %name, queue = index, ?end, "a queue's worker failed");
                    let _ = alarm.shutdown(Shutdown::Both);
                }
            };
            self.workers.push(thread::Builder::new().name("vhost-queue".into()).spawn(work)?);
        }
        Ok(())
    }

    /// Carries out the frontend's messages until there are no more; says why.
    pub(crate) fn run(&mut self) -> ProtocolError {
        loop {
            if let Err(error) = self.messages.handle_request() {
                return error;
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.block.client_gone();
        self.queues.iter().for_each(|queue| queue.close());
        self.exit.store(true, Ordering::Release);
        self.queues.iter().for_each(|queue| queue.wake());
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!(device = %self.shared.name, "a queue's worker had panicked");
            }
        }
    }
}
