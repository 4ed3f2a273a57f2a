//! A vring whose file descriptors cannot hurt us.
//!
//! `vhost-user-backend` reads the kick descriptor while it holds the ring's lock, and ends the
//! worker thread when that read fails. A descriptor replaced between the wake-up and the read
//! would thus block or end the worker. The call descriptor is written by whatever thread completes
//! a request; it must never block that thread. So both are made non-blocking here, a kick that
//! turns out to be gone is no error, and the guest is signalled without holding the ring's lock.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error as QueueError;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory, replaced as a whole when the frontend changes its table.
pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// One virtqueue as the frontend configures it.
#[derive(Clone)]
pub(crate) struct Ring {
    vring: VringMutex<Memory>,
    call: Arc<Mutex<Option<Arc<File>>>>,
}

impl Ring {
    /// The guest's notification, to be signalled after the ring's lock is released.
    pub(crate) fn call(&self) -> Option<Arc<File>> {
        lock(&self.call).clone()
    }

    /// Locks the ring's state.
    pub(crate) fn lock(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.vring.get_mut()
    }
}

/// Writes one event. A full counter means that the guest has an event pending anyway; a closed
/// descriptor means that nobody listens: neither is our problem.
pub(crate) fn signal(call: &File) {
    let mut call = call;
    if let Err(error) = call.write(&1u64.to_ne_bytes()) {
        tracing::debug!(%error, "the guest's notification could not be written");
    }
}

/// Locks a mutex whose content is valid even if a holder panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_nonblocking(file: &File) {
    let fd = file.as_raw_fd();
    // SAFETY: F_GETFL and F_SETFL on a descriptor that `file` owns touch no memory.
    let failed = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0
    };
    if failed {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "a ring's event descriptor could not be made non-blocking");
    }
}

impl<'a> VringStateGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Ring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Ring {
    fn new(mem: Memory, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Self { vring: VringMutex::new(mem, max_queue_size)?, call: Arc::default() })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.vring.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.vring.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.vring.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        if let Some(call) = self.call() {
            signal(&call);
        }
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.vring.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.vring.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.vring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.vring.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        self.vring.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.vring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.vring.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.vring.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.vring.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.vring.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.vring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.vring.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        if let Some(file) = &file {
            set_nonblocking(file);
        }
        self.vring.set_kick(file);
    }

    fn read_kick(&self) -> io::Result<bool> {
        match self.vring.read_kick() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => {
                tracing::error!(%error, "a queue's kick descriptor is broken: the queue stops until the client reconnects");
                Err(error)
            }
            enabled => enabled,
        }
    }

    fn set_call(&self, file: Option<File>) {
        if let Some(file) = &file {
            set_nonblocking(file);
        }
        *lock(&self.call) = file.map(Arc::new);
    }

    fn set_err(&self, file: Option<File>) {
        self.vring.set_err(file);
    }
}
