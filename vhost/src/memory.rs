//! The guest's memory: the frontend's table of regions, mapped here.
//!
//! A table is replaced as a whole; requests in flight keep the one they were taken under mapped.

use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError};

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

use crate::mapping::{check_len, invalid};

/// Regions that a table may have, as many as the kernel's vhost takes.
pub(crate) const MAX_REGIONS: usize = 509;

/// Guest memory as the queues see it.
pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The table, and where its regions are in the frontend's own address space.
pub(crate) struct Table {
    memory: Memory,
    /// The first addresses of a region, the frontend's and the guest's, and its bytes.
    places: Vec<(u64, GuestAddress, u64)>,
}

impl Table {
    /// An empty table, as it is before the frontend sends one.
    pub(crate) fn new() -> Self {
        Self { memory: Memory::new(GuestMemoryMmap::new()), places: Vec::new() }
    }

    /// What the queues look at.
    pub(crate) fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Replaces all regions.
    pub(crate) fn set(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> io::Result<()> {
        let mut mapped = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            mapped.push(Arc::new(map(region, file)?));
        }
        let memory = GuestMemoryMmap::from_arc_regions(mapped).map_err(io::Error::other)?;
        self.replace(memory);
        self.places = regions.iter().map(place).collect();
        Ok(())
    }

    pub(crate) fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> io::Result<()> {
        if self.places.len() >= MAX_REGIONS {
            return Err(invalid("too many memory regions"));
        }
        let mapped = Arc::new(map(region, file)?);
        let memory = self.memory.memory().insert_region(mapped).map_err(io::Error::other)?;
        self.replace(memory);
        self.places.push(place(region));
        Ok(())
    }

    pub(crate) fn remove(&mut self, region: &VhostUserMemoryRegion) -> io::Result<()> {
        let (start, len) = (GuestAddress(region.guest_phys_addr), region.memory_size);
        let memory = self.memory.memory().remove_region(start, len);
        let (memory, _) = memory.map_err(io::Error::other)?;
        self.replace(memory);
        self.places.retain(|&(_, guest, _)| guest != start);
        Ok(())
    }

    fn replace(&self, memory: GuestMemoryMmap) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(memory);
    }

    /// The guest's address of what the frontend has at `user`.
    pub(crate) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.places.iter().find_map(|&(first, guest, len)| {
            let offset = user.checked_sub(first).filter(|&offset| offset < len)?;
            Some(GuestAddress(guest.0 + offset))
        })
    }

    /// The guest's last address, if it has memory.
    pub(crate) fn last_address(&self) -> Option<GuestAddress> {
        self.memory.memory().iter().map(GuestMemoryRegion::last_addr).max()
    }
}

fn place(region: &VhostUserMemoryRegion) -> (u64, GuestAddress, u64) {
    (region.user_addr, GuestAddress(region.guest_phys_addr), region.memory_size)
}

fn map(region: &VhostUserMemoryRegion, file: File) -> io::Result<GuestRegionMmap> {
    check_len(&file, region.mmap_offset, region.memory_size)?;
    let (user, len) = (region.user_addr, region.memory_size);
    user.checked_add(len).ok_or_else(|| invalid("a memory region is out of range"))?;
    let mapped = region.mmap_region(file).map_err(io::Error::other)?;
    // None if the guest's addresses would overflow.
    GuestRegionMmap::new(mapped, GuestAddress(region.guest_phys_addr))
        .ok_or_else(|| invalid("a memory region is out of range"))
}
