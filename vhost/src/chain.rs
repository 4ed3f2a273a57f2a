//! The descriptors of one chain (VIRTIO 1.2, section 2.7.5).
//!
//! `virtio-queue` walks only chains that it has taken off the available ring itself. Those that a
//! predecessor of this process left in flight are known by their head alone.

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

const DESCRIPTOR_BYTES: u32 = 16;

/// Iterates over a chain's descriptors, those of an indirect table in place of the one that refers
/// to it. It ends early, with a descriptor that announces another one, where the chain loops,
/// leaves its table or guest memory, or is too long.
pub(crate) struct Chain<'m> {
    memory: &'m GuestMemoryMmap,
    table: GuestAddress,
    entries: u32,
    indirect: bool,
    next: Option<u32>,
    /// A chain of more descriptors than its table has is a loop.
    left: u32,
    /// Bytes so far: a chain is not longer than 4 GiB (2.7.5.2).
    bytes: u32,
}

impl<'m> Chain<'m> {
    /// The chain that begins with entry `head` of the table at `table`, which has `entries`.
    pub(crate) fn new(
        memory: &'m GuestMemoryMmap,
        table: GuestAddress,
        entries: u16,
        head: u16,
    ) -> Self {
        let entries = u32::from(entries);
        let next = Some(head.into());
        Self { memory, table, entries, indirect: false, next, left: entries, bytes: 0 }
    }

    fn read(&mut self, index: u32) -> Option<Descriptor> {
        self.left = self.left.checked_sub(1)?;
        if index >= self.entries {
            return None;
        }
        let at = self.table.checked_add(u64::from(index * DESCRIPTOR_BYTES))?;
        self.memory.read_obj::<RawDescriptor>(at).ok().map(Descriptor::from)
    }

    /// Goes on in the table that `desc` refers to. There is one at most.
    fn enter(&mut self, desc: Descriptor) -> Option<()> {
        let entries = desc.len() / DESCRIPTOR_BYTES;
        let whole = desc.len().is_multiple_of(DESCRIPTOR_BYTES);
        if self.indirect || !whole || entries > u32::from(u16::MAX) {
            return None;
        }
        (self.table, self.entries, self.left) = (desc.addr(), entries, entries);
        (self.indirect, self.next) = (true, Some(0));
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        loop {
            let index = self.next.take()?;
            let desc = self.read(index)?;
            if !desc.refers_to_indirect_table() {
                self.bytes = self.bytes.checked_add(desc.len())?;
                self.next = desc.has_next().then(|| desc.next().into());
                return Some(desc);
            }
            self.enter(desc)?;
        }
    }
}
