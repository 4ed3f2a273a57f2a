//! The virtio-blk device of one connection, as `vhost-user-backend` drives it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use sheepdog_types::Block;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::EventFd;

use crate::config;
use crate::queue::{Queue, Scratch, Shared};
use crate::ring::{Memory, Ring, lock};

/// One connection's device. Each queue has a worker thread of its own.
pub(crate) struct Device {
    shared: Arc<Shared>,
    queues: Vec<Arc<Queue>>,
    /// One for each worker; the lock is only ever taken by that worker.
    scratch: Vec<Mutex<Scratch>>,
    queue_size: u16,
    /// What the guest set in the configuration space.
    writeback_wanted: AtomicBool,
    /// Whether the guest knows how to flush; without that, every write must be durable.
    can_flush: AtomicBool,
    /// Exit events given to `vhost-user-backend`, which never closes them.
    exits: Mutex<Vec<RawFd>>,
}

impl Device {
    /// A device with `queues` queues of at most `queue_size` entries.
    pub(crate) fn new(
        name: String,
        block: Arc<dyn Block>,
        memory: Memory,
        queues: u16,
        queue_size: u16,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            name,
            block,
            memory,
            writeback: AtomicBool::new(true),
            closing: AtomicBool::new(false),
        });
        let queue = |index| {
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            // SAFETY: `into_raw_fd` gives up the ownership that `File` takes over.
            let resume = unsafe { File::from_raw_fd(event.into_raw_fd()) };
            Ok(Arc::new(Queue::new(index, shared.clone(), resume)))
        };
        let queues: Vec<_> = (0..usize::from(queues)).map(queue).collect::<io::Result<_>>()?;
        Ok(Self {
            scratch: queues.iter().map(|_| Mutex::default()).collect(),
            shared,
            queues,
            queue_size,
            writeback_wanted: AtomicBool::new(true),
            can_flush: AtomicBool::new(true),
            exits: Mutex::default(),
        })
    }

    /// Has each worker watch its queue's resume event.
    pub(crate) fn watch_resume(
        &self,
        workers: &[Arc<VringEpollHandler<Arc<Self>>>],
    ) -> io::Result<()> {
        for (queue, worker) in self.queues.iter().zip(workers) {
            worker.register_listener(queue.resume_fd(), EventSet::IN, self.resume_event())?;
        }
        Ok(())
    }

    /// Event number of resumption: the first one free for us.
    fn resume_event(&self) -> u64 {
        self.queues.len() as u64 + 1
    }

    /// Takes nothing more off the rings and waits until nothing is in flight.
    pub(crate) fn close(&self) {
        self.shared.closing.store(true, Ordering::Release);
        for queue in &self.queues {
            queue.drain();
        }
    }

    /// Closes the descriptors that `vhost-user-backend` leaves open. Its workers must be gone.
    pub(crate) fn close_exit_events(&self) {
        for fd in lock(&self.exits).drain(..) {
            // SAFETY: the worker's `EventConsumer` gave up ownership with `into_raw_fd` and only
            // added the descriptor to an epoll set, which is closed with the worker. Nobody else
            // closes it, and it is taken off the list here, so it is closed once.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }

    fn update_writeback(&self) {
        let writeback =
            self.writeback_wanted.load(Ordering::Relaxed) && self.can_flush.load(Ordering::Relaxed);
        self.shared.writeback.store(writeback, Ordering::Relaxed);
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.queue_size)
    }

    fn features(&self) -> u64 {
        config::features(&self.shared.block.info())
    }

    fn acked_features(&self, features: u64) {
        self.can_flush.store(features & 1 << VIRTIO_BLK_F_FLUSH != 0, Ordering::Relaxed);
        self.update_writeback();
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features()
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let writeback = self.writeback_wanted.load(Ordering::Relaxed);
        let queues = self.queues.len() as u16;
        let space = config::space(&self.shared.block.info(), queues, writeback);
        config::window(&space, offset, size)
    }

    /// Never fails: an error would end the connection for a guest's mistake.
    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        if offset == config::WRITEBACK_OFFSET
            && let &[wanted] = buf
        {
            self.writeback_wanted.store(wanted != 0, Ordering::Relaxed);
            self.update_writeback();
        } else {
            tracing::debug!(device = %self.shared.name, offset, "a write to read-only configuration");
        }
        Ok(())
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(()) // The queues look at the same `Memory`.
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|index| 1 << index).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        match new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC) {
            Ok((consumer, notifier)) => {
                lock(&self.exits).push(consumer.as_raw_fd());
                Some((consumer, notifier))
            }
            Err(error) => {
                tracing::error!(%error, "no exit event for a worker: stopping will hang");
                None
            }
        }
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        if let Some(queue) = self.queues.get(queue_index as usize) {
            queue.drain();
        }
        Ok(())
    }

    /// Never fails: an error would silently end the worker.
    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[Ring],
        thread_id: usize,
    ) -> io::Result<()> {
        let parts = (self.queues.get(thread_id), vrings.first(), self.scratch.get(thread_id));
        if let (Some(queue), Some(ring), Some(scratch)) = parts {
            if u64::from(device_event) == self.resume_event() {
                queue.clear_resume();
            }
            queue.serve(ring, &mut lock(scratch));
        }
        Ok(())
    }
}

/// Empty guest memory, as it is before the frontend sends its table.
pub(crate) fn no_memory() -> Memory {
    Memory::new(GuestMemoryMmap::new())
}
