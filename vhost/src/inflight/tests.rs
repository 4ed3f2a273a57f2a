use super::*;

/// A region of two queues of `entries`, and its first queue.
fn region(entries: u16) -> (File, QueueRegion) {
    let file = create(2, entries).unwrap();
    let queue = first(&file, entries);
    (file, queue)
}

fn first(file: &File, entries: u16) -> QueueRegion {
    let len = region_bytes(2, entries);
    map(file.try_clone().unwrap(), 0, len, 2, entries).unwrap().remove(0)
}

fn bytes(file: &File, at: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, at).unwrap();
    bytes
}

fn put(file: &File, at: usize, bytes: &[u8]) {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at as u64).unwrap();
}

#[test]
fn the_layout_is_that_of_the_document() {
    assert_eq!(region_bytes(1, 128), 2112);
    assert_eq!(region_bytes(3, 1024), 3 * 16448);
    let (file, mut queue) = region(8);
    assert_eq!(queue.recover(8, 0x1234), Ok(Found::Fresh));
    queue.taken(2);
    queue.taken(5);
    queue.completing(2);
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 2, 0, 0x34, 0x12];
    assert_eq!(bytes(&file, 0, 16), header);
    assert_eq!(bytes(&file, 16 + 5 * 16, 16), [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    queue.completed(2, 0x1235);
    queue.completing(5);
    assert_eq!(bytes(&file, 16 + 5 * 16, 8), [1, 0, 0, 0, 0, 0, 2, 0]);
    queue.completed(5, 0x1236);
    assert_eq!(bytes(&file, 12, 4), [5, 0, 0x36, 0x12]);
    assert!(bytes(&file, region_bytes(1, 8), 144).iter().all(|&b| b == 0), "the other queue");
}

#[test]
fn requests_are_found_in_the_order_they_were_taken() {
    let (file, mut queue) = region(8);
    queue.recover(8, 65535).unwrap();
    [7, 0, 3, 1].iter().for_each(|&head| queue.taken(head));
    queue.completing(0);
    queue.completed(0, 0);
    assert_eq!(first(&file, 8).recover(8, 0), Ok(Found::InFlight(vec![7, 3, 1])));
    // A death before the used index was noted here: the batch of two in the used ring is over.
    queue.completing(7);
    queue.completing(1);
    let mut successor = first(&file, 8);
    assert_eq!(successor.recover(8, 2), Ok(Found::InFlight(vec![3])));
    // New ones come after the old ones.
    successor.taken(0);
    assert_eq!(first(&file, 8).recover(8, 2), Ok(Found::InFlight(vec![3, 0])));
}

#[test]
fn what_cannot_be_continued_is_refused() {
    let whole = |change: &dyn Fn(&File)| {
        let (file, mut queue) = region(8);
        queue.recover(8, 0).unwrap();
        queue.taken(1);
        change(&file);
        queue.recover(4, 0)
    };
    assert_eq!(whole(&|_| {}), Ok(Found::InFlight(vec![1])));
    assert!(whole(&|file| put(file, 0, &[1])).is_err(), "features");
    assert!(whole(&|file| put(file, 8, &[2])).is_err(), "version");
    assert!(whole(&|file| put(file, 10, &[9])).is_err(), "entries");
    assert!(whole(&|file| put(file, 14, &[5])).is_err(), "used index");
    assert!(whole(&|file| put(file, 12, &[8, 0, 255, 255])).is_err(), "last batch");
    assert!(whole(&|file| put(file, 16 + 4 * 16, &[1])).is_err(), "a head outside of the ring");
    assert!(region(8).1.recover(16, 0).is_err(), "a ring larger than the region");
    // A batch that is a loop ends.
    let looped = whole(&|file| {
        put(file, 12, &[1, 0, 252, 255]);
        put(file, 16 + 16 + NEXT_IN_ENTRY, &[1]);
    });
    assert_eq!(looped, Ok(Found::InFlight(vec![])));
}

#[test]
fn a_file_that_is_too_short_is_not_mapped() {
    let len = region_bytes(1, 8);
    let file = create(1, 8).unwrap();
    let file = || file.try_clone().unwrap();
    assert!(map(file(), 0, len, 1, 8).is_ok());
    assert!(map(file(), 0, len, 2, 8).is_err());
    assert!(map(file(), 0, len + 1, 1, 8).is_err());
    assert!(map(file(), 4096, len, 1, 8).is_err());
    assert!(map(file(), 64, len, 1, 8).is_err());
    assert!(map(file(), u64::MAX, len, 1, 8).is_err());
    assert!(file().set_len(0).is_err(), "nobody can cut it off");
    let (pipe, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let socket = File::from(std::os::fd::OwnedFd::from(pipe));
    assert!(map(socket, 0, len, 1, 8).is_err());
}
