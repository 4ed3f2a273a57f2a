//! The lab itself: guests, the NBD client and fio against qemu-storage-daemon. When these fail, the failures
//! of the other files say nothing about `sheep`.

use sheepdog_qemu_tests::{
    Client, FileSystem, Fio, Guest, Lab, PATIENCE, Scribe, StorageDaemon, inside, seed,
};

const WRITE: &str = "
set -e
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/random bs=1k count=777 2>/dev/null
md5sum /mnt/random >/mnt/sums
blkcheck write /mnt/check --size 8388608 --count 1000 --progress
umount /mnt
";

const CHECK: &str = "
set -e
e2fsck -fn /dev/vda
mount -t ext4 /dev/vda /mnt
md5sum -c /mnt/sums
blkcheck verify /mnt/check --flushed 1000
umount /mnt
";

#[test]
fn guest_writes_over_vhost_user_and_another_reads_over_nbd() {
    let lab = Lab::new("lab-guest");
    let file = lab.path("disk.raw");
    let server = StorageDaemon::start(&lab, &file, true);
    let mut guest = Guest::boot(&lab, "writer", &server.disk(), WRITE);
    guest.wait_for("blkcheck: writing");
    guest.finish(4 * PATIENCE).expect_success();
    drop(server);
    let server = StorageDaemon::start(&lab, &file, false);
    let output = Guest::boot(&lab, "reader", &server.disk(), CHECK).finish(4 * PATIENCE);
    assert!(output.expect_success().contains("0 wrong"));
}

#[test]
fn guest_failure_is_seen() {
    let lab = Lab::new("lab-guest-failure");
    let server = StorageDaemon::start(&lab, &lab.path("disk.raw"), true);
    let script =
        "blkcheck write /dev/vda --count 50 --direct && blkcheck verify /dev/vda --flushed 51";
    let result = Guest::boot(&lab, "guest", &server.disk(), script).finish(4 * PATIENCE);
    assert_eq!(result.code, Some(1), "{}", result.output);
    assert!(result.output.contains("1 wrong"), "{}", result.output);
}

#[test]
fn scribe_finds_a_lost_write() {
    let lab = Lab::new("lab-scribe");
    let file = lab.path("disk.raw");
    let server = StorageDaemon::start(&lab, &file, false);
    let mut client = Client::connect(server.socket(), "disk").unwrap();
    assert_eq!(client.size, 64 << 20);
    let mut scribe = Scribe::new(seed(), 256);
    for _ in 0..8 {
        scribe.write(&mut client, 32);
    }
    scribe.flush(&mut client);
    assert!(scribe.verify(&mut client) > 100);

    // One more write that is flushed, and then undone behind the scribe's back.
    let before = std::fs::read(&file).unwrap();
    scribe.write(&mut client, 1);
    scribe.flush(&mut client);
    std::fs::write(&file, &before).unwrap();
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        scribe.verify(&mut client);
    }));
    assert!(found.is_err(), "a lost write went unnoticed");
}

#[test]
fn fio_verifies_and_shows_progress() {
    let lab = Lab::new("lab-fio");
    let server = StorageDaemon::start(&lab, &lab.path("disk.raw"), false);
    let uri = format!("nbd+unix:///disk?socket={}", server.socket().display());
    let mut fio = Fio::start(&lab, "fio", &uri, 32, 2000);
    fio.wait_for_percent(20.0);
    let result = fio.finish(PATIENCE);
    assert_eq!(result.writes, 8192);
    assert!(!result.longest.0.is_zero() && !result.longest.1.is_zero(), "{result:?}");
}

#[test]
fn space_that_was_given_back_stays_free_when_the_disk_fails() {
    if !inside("space_that_was_given_back_stays_free_when_the_disk_fails") {
        return;
    }
    let lab = Lab::new("lab-space");
    let disk = FileSystem::new(&lab);
    let occupied = disk.path("somebody-elses");
    disk.occupy(Some(4));
    std::fs::File::open(&occupied).unwrap().sync_all().unwrap();
    disk.vacate();
    disk.fail();
    disk.come_back();
    assert!(!std::path::Path::new(&occupied).exists());
}
