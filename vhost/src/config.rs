//! What the device tells the guest about itself: feature bits and configuration space.

use sheepdog_types::{BLOCK_SIZE, BlockInfo};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::request::SECTOR;

/// Largest discard, in sectors: 1 GiB, so that one request cannot occupy the back end for long.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Largest write-zeroes, in sectors.
pub(crate) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 21;
/// Data segments of one request. QEMU's default ring has 128 entries, header and status take two.
const SEG_MAX: u32 = 126;
/// Offset of `writeback` in `struct virtio_blk_config`, the only field a guest may write.
pub(crate) const WRITEBACK_OFFSET: u32 = 32;
/// Bytes in the part of `struct virtio_blk_config` up to and including write-zeroes.
const CONFIG_BYTES: usize = 60;

/// Feature bits offered. SIZE_MAX is not among them: with a value of 0 guests would cut segments
/// to 4096 bytes.
pub(crate) fn features(info: &BlockInfo) -> u64 {
    let transport = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
    let mut bits = transport.bits();
    for bit in [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ] {
        bits |= 1 << bit;
    }
    if info.read_only {
        bits |= 1 << VIRTIO_BLK_F_RO;
    }
    bits
}

/// Protocol features offered.
pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
}

/// The part of the configuration space that was asked for: exactly `size` bytes, zero where the
/// device defines nothing.
pub(crate) fn window(config: &[u8], offset: u32, size: u32) -> Vec<u8> {
    let (offset, size) = (offset as usize, size as usize);
    let known = config.get(offset..).unwrap_or_default();
    let mut out = known[..known.len().min(size)].to_vec();
    out.resize(size, 0);
    out
}

/// The configuration space (`struct virtio_blk_config`, VIRTIO 1.2, section 5.2.4).
pub(crate) fn space(info: &BlockInfo, queues: u16, writeback: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(CONFIG_BYTES);
    let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
    put(&(info.size / SECTOR).to_le_bytes()); // capacity
    put(&0u32.to_le_bytes()); // size_max: not offered
    put(&SEG_MAX.to_le_bytes());
    put(&[0; 4]); // geometry: not offered
    put(&(SECTOR as u32).to_le_bytes()); // blk_size
    // Topology: any sector may be written, but whole 4 KiB blocks avoid a read-modify-write.
    let blocks_log2 = (BLOCK_SIZE as u64 / SECTOR).ilog2() as u8;
    put(&[blocks_log2, 0]); // physical_block_exp, alignment_offset
    put(&((BLOCK_SIZE as u64 / SECTOR) as u16).to_le_bytes()); // min_io_size, in blk_size
    put(&0u32.to_le_bytes()); // opt_io_size: no preference
    put(&[u8::from(writeback), 0]);
    put(&queues.to_le_bytes());
    put(&MAX_DISCARD_SECTORS.to_le_bytes());
    put(&1u32.to_le_bytes()); // max_discard_seg
    put(&((BLOCK_SIZE as u64 / SECTOR) as u32).to_le_bytes()); // discard_sector_alignment
    put(&MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
    put(&1u32.to_le_bytes()); // max_write_zeroes_seg
    put(&[1, 0, 0, 0]); // write_zeroes_may_unmap
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(read_only: bool) -> BlockInfo {
        BlockInfo { size: 10 << 20, read_only, serial: String::new() }
    }

    #[test]
    fn the_space_has_the_layout_of_the_specification() {
        let space = space(&info(false), 4, true);
        assert_eq!(space.len(), CONFIG_BYTES);
        assert_eq!(space[0..8], (20480u64).to_le_bytes());
        assert_eq!(space[20..24], 512u32.to_le_bytes());
        assert_eq!(space[24], 3);
        assert_eq!(space[WRITEBACK_OFFSET as usize], 1);
        assert_eq!(space[34..36], 4u16.to_le_bytes());
        assert_eq!(space[36..40], MAX_DISCARD_SECTORS.to_le_bytes());
        assert_eq!(space[56], 1);
    }

    #[test]
    fn a_window_has_exactly_the_size_asked_for() {
        let space = space(&info(false), 4, true);
        for (offset, size) in [(0, 60), (0, 8), (34, 2), (0, 256), (59, 2), (60, 4), (u32::MAX, 3)]
        {
            assert_eq!(window(&space, offset, size).len(), size as usize, "{offset}+{size}");
        }
        assert_eq!(window(&space, 34, 2), [4, 0]);
        assert_eq!(window(&space, 56, 6), [1, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn only_a_read_only_device_says_so() {
        assert_eq!(features(&info(false)) & 1 << VIRTIO_BLK_F_RO, 0);
        assert_ne!(features(&info(true)) & 1 << VIRTIO_BLK_F_RO, 0);
    }
}
