//! A server to test, and a VM of one queue that talks to it through `vhost`'s frontend.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sheepdog_vhost::{Config, ServerHandle, VhostServer};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;
use super::driver::{AVAIL, DATA, DESC, Driver, USED};

pub const QUEUES: u64 = 2;
pub const SIZE: u16 = 16;
const MEM: usize = 1 << 20;
/// Only ever waited for by a test that fails.
pub const PATIENCE_MS: i32 = 30_000;

pub struct Setup {
    pub dir: tempfile::TempDir,
    pub disk: Arc<Disk>,
}

impl Setup {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), disk: Arc::new(Disk::new(1 << 20)) }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("volume.sock")
    }

    pub fn start(&self) -> ServerHandle {
        let config = Config { queues: QUEUES as u16, queue_size: SIZE, mode: 0o600 };
        VhostServer::start(self.path(), self.disk.clone(), config).unwrap()
    }
}

/// A VM with one queue at index `index`, and memory of its own.
pub struct Guest {
    pub frontend: Frontend,
    pub mem: GuestMemoryMmap,
    pub index: usize,
    pub kick: EventFd,
    pub call: EventFd,
    pub wait: Epoll,
    pub features: u64,
    /// What the server wants its successor to have.
    pub inflight: Option<(VhostUserInflight, File)>,
}

pub fn event_fd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
}

impl Guest {
    pub fn connect(path: &Path, index: usize) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEM as u64).unwrap();
        let backing = Some(FileOffset::new(file, 0));
        let ranges = [(GuestAddress(0), MEM, backing)];
        let mem = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let (call, wait) = (event_fd(), Epoll::new().unwrap());
        let event = EpollEvent::new(EventSet::IN, 0);
        wait.ctl(ControlOperation::Add, call.as_raw_fd(), event).unwrap();
        let frontend = Frontend::connect(path, QUEUES).unwrap();
        let (kick, inflight) = (event_fd(), None);
        let mut guest = Self { frontend, mem, index, kick, call, wait, features: 0, inflight };
        guest.negotiate();
        guest.start_queue(0);
        guest
    }

    /// Stops the queue, asks for memory to track requests in, and starts the queue at `index`.
    pub fn track_from(&mut self, index: u16) {
        self.frontend.get_vring_base(self.index).unwrap();
        self.mem.write_obj(index, GuestAddress(AVAIL + 2)).unwrap();
        self.mem.write_obj(index, GuestAddress(USED + 2)).unwrap();
        let wanted = VhostUserInflight::new(0, 0, QUEUES as u16, SIZE);
        self.inflight = Some(self.frontend.get_inflight_fd(&wanted).unwrap());
        self.give_inflight();
        self.start_queue(index);
    }

    /// Connects to another server and goes on where the one before was, as QEMU does.
    pub fn reconnect(&mut self, path: &Path) {
        self.frontend = Frontend::connect(path, QUEUES).unwrap();
        self.negotiate();
        self.give_inflight();
        self.start_queue(self.mem.read_obj(GuestAddress(USED + 2)).unwrap());
    }

    fn give_inflight(&mut self) {
        let (region, file) = self.inflight.as_ref().unwrap();
        self.frontend.set_inflight_fd(region, file.as_raw_fd()).unwrap();
    }

    pub fn negotiate(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let mut features = frontend.get_features().unwrap();
        features &= !(1 << 29); // without event index: the driver here does not know it
        features &= !(1 << 26); // nor is there a migration yet
        self.features = features;
        let protocol = frontend.get_protocol_features().unwrap();
        for needed in [
            VhostUserProtocolFeatures::MQ,
            VhostUserProtocolFeatures::CONFIG,
            VhostUserProtocolFeatures::REPLY_ACK,
            VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            VhostUserProtocolFeatures::LOG_SHMFD,
        ] {
            assert!(protocol.contains(needed), "{needed:?}");
        }
        frontend.set_protocol_features(protocol).unwrap();
        // Wait for an answer to every message: no message is on its way when a test goes on.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num().unwrap(), QUEUES);
        frontend.set_features(features).unwrap();
        let region = self.mem.iter().next().unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[region]).unwrap();
    }

    /// Tells where the rings are, and at which guest address the used ring is to be logged.
    pub fn set_addresses(&mut self, log_addr: Option<u64>) {
        let region = self.mem.iter().next().unwrap();
        let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap() as u64;
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: u32::from(log_addr.is_some()),
            desc_table_addr: host + DESC,
            used_ring_addr: host + USED,
            avail_ring_addr: host + AVAIL,
            log_addr,
        };
        self.frontend.set_vring_addr(self.index, &config).unwrap();
    }

    pub fn start_queue(&mut self, base: u16) {
        self.frontend.set_vring_num(self.index, SIZE).unwrap();
        self.set_addresses(None);
        let (index, frontend) = (self.index, &mut self.frontend);
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_call(index, &self.call).unwrap();
        frontend.set_vring_kick(index, &self.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits for the next used chain.
    pub fn used(&self, driver: &mut Driver) -> (u16, u32) {
        loop {
            if let Some(used) = driver.used() {
                return used;
            }
            let woken = self.wait.wait(PATIENCE_MS, &mut [EpollEvent::default()]).unwrap();
            assert_eq!(woken, 1, "no signal came");
            let _ = self.call.read();
        }
    }

    /// Offers one request, by an indirect table if `indirect`; gives its head.
    pub fn offer(
        &self,
        driver: &mut Driver,
        kind: u32,
        sector: u64,
        write: bool,
        indirect: bool,
    ) -> u16 {
        driver.header(DATA, kind, sector);
        let parts = [(DATA, 16, false), (DATA + 0x1000, 512, !write), (DATA + 0x100, 1, true)];
        let head =
            if indirect { driver.indirect(DATA + 0x8000, &parts) } else { driver.chain(&parts) };
        driver.offer(head);
        head
    }

    pub fn write(&self, driver: &mut Driver, sector: u64, fill: u8, indirect: bool) {
        self.mem.write_slice(&[fill; 512], GuestAddress(DATA + 0x1000)).unwrap();
        let head = self.offer(driver, 1, sector, true, indirect);
        self.kick();
        assert_eq!(self.used(driver), (head, 1));
        assert_eq!(driver.get::<u8>(DATA + 0x100), 0);
    }

    pub fn read(&self, driver: &mut Driver, sector: u64, indirect: bool) -> u8 {
        let head = self.offer(driver, 0, sector, false, indirect);
        self.kick();
        assert_eq!(self.used(driver), (head, 513));
        let data: [u8; 32] = driver.get(DATA + 0x1000);
        assert!(data.iter().all(|&b| b == data[0]));
        data[0]
    }
}

pub fn driver(guest: &Guest) -> Driver<'_> {
    Driver::new(&guest.mem, SIZE)
}
