//! The virtio-blk device of one connection: what the frontend's messages do.
//!
//! An error ends the connection. A message about something that is not offered is an error, and
//! so is one that a correct frontend cannot send; what a guest can cause is not.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddress;

use crate::config;
use crate::dirty::DirtyLog;
use crate::inflight;
use crate::memory::{MAX_REGIONS, Table};
use crate::queue::{Queue, Shared};

/// One connection's device.
pub(crate) struct Device {
    shared: Arc<Shared>,
    queues: Vec<Arc<Queue>>,
    queue_size: u16,
    table: Table,
    owned: bool,
    /// Feature bits that the frontend has accepted.
    features: u64,
    /// What the frontend gave us to note our writes in, whether we do so or not.
    log: Option<Arc<DirtyLog>>,
    /// What the guest set in the configuration space.
    writeback_wanted: bool,
}

impl Device {
    /// A device with `queues` of at most `queue_size` entries, whose guest memory is that of
    /// `table`.
    pub(crate) fn new(
        shared: Arc<Shared>,
        queues: Vec<Arc<Queue>>,
        queue_size: u16,
        table: Table,
    ) -> Self {
        Self {
            shared,
            queues,
            queue_size,
            table,
            owned: false,
            // Until the frontend tells, a guest is taken to know how to flush.
            features: 1 << VIRTIO_BLK_F_FLUSH,
            log: None,
            writeback_wanted: true,
        }
    }

    fn queue(&self, index: impl TryInto<usize>) -> Result<&Arc<Queue>> {
        let index = index.try_into().map_err(|_| Error::InvalidParam)?;
        self.queues.get(index).ok_or(Error::InvalidParam)
    }

    /// A queue that may be configured because it is not started.
    fn idle_queue(&self, index: u32) -> Result<&Arc<Queue>> {
        let queue = self.queue(index)?;
        if queue.ring().begun() {
            return Err(Error::InvalidOperation("the ring is running"));
        }
        Ok(queue)
    }

    fn guest_address(&self, user: u64) -> Result<GuestAddress> {
        let unknown = Error::InvalidOperation("a ring is not inside the memory table");
        self.table.guest_address(user).ok_or(unknown)
    }

    /// Without a way to flush, or with the write cache turned off, each write must be durable.
    fn update_writeback(&self) {
        let can_flush = self.features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        self.shared.writeback.store(self.writeback_wanted && can_flush, Ordering::Relaxed);
    }

    fn update_log(&self) {
        let wanted = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        let log = self.log.as_ref().filter(|_| wanted);
        self.queues.iter().for_each(|queue| queue.set_log(log));
    }

    fn unsupported<T>(&self) -> Result<T> {
        Err(Error::InvalidOperation("not offered"))
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(Error::InvalidOperation("already claimed"));
        }
        Ok(())
    }

    /// Deprecated; QEMU's document recommends to disable all rings, and nothing more.
    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.queues.iter().for_each(|queue| queue.set_enabled(false));
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.unsupported()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(&self.shared.block.info()))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config::features(&self.shared.block.info()) != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.features = features;
        self.update_writeback();
        self.update_log();
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let rings_start_enabled = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        for queue in &self.queues {
            queue.ring().set_event_idx(event_idx);
            if rings_start_enabled {
                queue.set_enabled(true);
            }
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !config::protocol_features().bits() != 0 {
            return Err(Error::FeatureMismatch);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.table.set(regions, files).map_err(Error::ReqHandlerError)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.table.add(region, file).map_err(Error::ReqHandlerError)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.table.remove(region).map_err(Error::ReqHandlerError)
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.len() as u64)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        self.idle_queue(index)?.ring().set_size(size).map_err(|_| Error::InvalidParam)
    }

    /// Also while the ring runs: a migration turns the logging of its used ring on and off so.
    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let queue = self.queue(index)?;
        let descriptor = self.guest_address(descriptor)?;
        let (available, used) = (self.guest_address(available)?, self.guest_address(used)?);
        let mut ring = queue.ring();
        ring.set_addresses(descriptor, available, used).map_err(|_| Error::InvalidParam)?;
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        ring.set_log_address(logged.then_some(log));
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.idle_queue(index)?.ring().set_base(base);
        Ok(())
    }

    /// Answered only after all requests of the queue.
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let next = self.queue(index)?.stop();
        Ok(VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = file.ok_or(Error::InvalidOperation("polled queues are not supported"))?;
        self.queue(index)?.set_kick(file).map_err(Error::ReqHandlerError)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(index)?.ring().set_call(file);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(index)?.ring().set_err(file);
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.queue(index)?.set_enabled(enable);
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let queues = self.queues.len() as u16;
        let space = config::space(&self.shared.block.info(), queues, self.writeback_wanted);
        Ok(config::window(&space, offset, size))
    }

    /// Never fails: an error would end the connection for a guest's mistake.
    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        if offset == config::WRITEBACK_OFFSET
            && let &[wanted] = buf
        {
            self.writeback_wanted = wanted != 0;
            self.update_writeback();
        } else {
            tracing::debug!(device = %self.shared.name, offset, "a write to read-only configuration");
        }
        Ok(())
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        self.check_inflight(queues, size)?;
        let file = inflight::create(queues, size).map_err(Error::ReqHandlerError)?;
        let bytes = inflight::region_bytes(queues, size);
        Ok((VhostUserInflight::new(bytes, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (given.num_queues, given.queue_size);
        self.check_inflight(queues, size)?;
        if self.queues.iter().any(|queue| queue.ring().begun()) {
            return Err(Error::InvalidOperation("a ring is running"));
        }
        let regions = inflight::map(file, given.mmap_offset, given.mmap_size, queues, size);
        let mut regions = regions.map_err(Error::ReqHandlerError)?.into_iter();
        self.queues.iter().for_each(|queue| queue.ring().set_inflight(regions.next()));
        Ok(())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::new(file, log.mmap_offset, log.mmap_size);
        let log = log.map_err(Error::ReqHandlerError)?;
        if self.table.last_address().is_some_and(|last| !log.covers(last.0)) {
            tracing::warn!(
                device = %self.shared.name,
                "the log of a migration is smaller than the guest's memory: what it does not \
                 cover is not marked"
            );
        }
        self.log = Some(Arc::new(log));
        self.update_log();
        Ok(())
    }

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<()> {
        self.unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        self.unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        self.unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        self.unsupported()
    }
}

impl Device {
    fn check_inflight(&self, queues: u16, size: u16) -> Result<()> {
        let fits = usize::from(queues) <= self.queues.len() && size <= self.queue_size;
        if queues == 0 || size == 0 || !fits {
            let text = "an in-flight region for other queues than those offered";
            return Err(Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        Ok(())
    }
}
