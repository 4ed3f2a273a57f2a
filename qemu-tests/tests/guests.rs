//! Linux guests on volumes: a file system with files survives power-off, on both front ends, from another node.

use sheepdog_qemu_tests::{Cluster, Disk, Guest, Lab, PATIENCE};

/// Makes a file system with forty files of odd sizes, their checksums and a checked writer's file.
const MAKE: &str = "
set -e
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
mkdir /mnt/files
i=0
while [ $i -lt 40 ]; do
    dd if=/dev/urandom of=/mnt/files/$i bs=1237 count=$((i * 3 + 1)) 2>/dev/null
    i=$((i + 1))
done
(cd /mnt/files && md5sum *) >/mnt/sums
blkcheck write /mnt/check --size 16777216 --count 2000 --fsync-every 100
umount /mnt
";

/// Checks all of that, then changes some of it for the next boot.
const CHECK_AND_CHANGE: &str = "
set -e
e2fsck -fn /dev/vda
mount -t ext4 /dev/vda /mnt
(cd /mnt/files && md5sum -c -s ../sums)
blkcheck verify /mnt/check --flushed 2000
rm -f /mnt/files/7
dd if=/dev/urandom of=/mnt/files/new bs=4099 count=50 2>/dev/null
(cd /mnt/files && md5sum *) >/mnt/sums
umount /mnt
";

fn boot(lab: &Lab, name: &str, disk: &Disk, script: &str) -> String {
    Guest::boot(lab, name, disk, script).finish(4 * PATIENCE).expect_success()
}

#[test]
fn file_system_over_vhost_user_then_nbd_of_another_node() {
    let lab = Lab::new("guests-vhost-user-first");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("vm", "256M", 3);
    let disk = cluster.export_vhost(0, "vm").vhost_disk();
    boot(&lab, "make", &disk, MAKE);
    boot(&lab, "again", &disk, CHECK_AND_CHANGE);
    cluster.unexport(0, "vm");
    let disk = cluster.export_nbd(2, "vm").nbd_disk();
    boot(&lab, "over-nbd", &disk, CHECK_AND_CHANGE);
}

#[test]
fn file_system_over_nbd_then_vhost_user_of_another_node() {
    let lab = Lab::new("guests-nbd-first");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("vm", "256M", 2);
    let disk = cluster.export_nbd(1, "vm").nbd_disk();
    boot(&lab, "make", &disk, MAKE);
    boot(&lab, "again", &disk, CHECK_AND_CHANGE);
    cluster.unexport(1, "vm");
    let disk = cluster.export_vhost(2, "vm").vhost_disk();
    boot(&lab, "over-vhost-user", &disk, CHECK_AND_CHANGE);
}

#[test]
fn guest_goes_on_while_another_node_dies() {
    let lab = Lab::new("guests-node-dies");
    let mut cluster = Cluster::start(&lab, 3);
    cluster.create("vm", "64M", 3);
    let disk = cluster.export_vhost(0, "vm").vhost_disk();
    let script = "blkcheck write /dev/vda --count 6000 --fsync-every 16 --direct --progress &&
        blkcheck verify /dev/vda --flushed 6000 --direct";
    let mut guest = Guest::boot(&lab, "guest", &disk, script);
    guest.wait_for("blkcheck: writing");
    cluster.kill(1);
    let output = guest.finish(4 * PATIENCE).expect_success();
    println!("{output}");
    cluster.restart(1);
    cluster.wait_healthy();
}

#[test]
fn what_the_guest_synced_survives_its_power_cut() {
    let lab = Lab::new("guests-power-cut");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("vm", "64M", 3);
    let disk = cluster.export_vhost(0, "vm").vhost_disk();
    // The first 500 operations are synced when the marker comes; of the rest anything may be there.
    let script = "blkcheck write /dev/vda --count 500 --direct && echo SYNCED &&
        blkcheck write /dev/vda --start 500 --count 100000 --fsync-every 100000 --direct";
    let mut guest = Guest::boot(&lab, "cut", &disk, script);
    guest.wait_for("SYNCED");
    guest.kill();
    let script = "blkcheck verify /dev/vda --flushed 500 --written 100500 --direct";
    boot(&lab, "verify", &disk, script);
}

#[test]
fn guest_discards_and_reads_zeroes() {
    let lab = Lab::new("guests-discard");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("vm", "64M", 3);
    let disk = cluster.export_vhost(0, "vm").vhost_disk();
    let script = "
        set -e
        dd if=/dev/urandom of=/dev/vda bs=1M count=16 2>/dev/null
        blkdiscard -o 4194304 -l 8388608 /dev/vda
        echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/vda bs=1M skip=4 count=8 2>/dev/null | tr -d '\\0' | wc -c | grep -x 0
        dd if=/dev/vda bs=1M skip=12 count=4 2>/dev/null | tr -d '\\0' | head -c 1 | wc -c | grep -x 1
        dd if=/dev/vda bs=1M count=4 2>/dev/null | tr -d '\\0' | head -c 1 | wc -c | grep -x 1";
    boot(&lab, "guest", &disk, script);
}
