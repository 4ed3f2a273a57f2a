//! I10: bytes that make no sense, to every socket: the daemon drops the connection and goes on serving.

use sheepdog_qemu_tests::{Cluster, Guest, Lab, PATIENCE, Rng, eventually, seed};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// What is thrown at each socket: noise, huge lengths, the beginnings of real protocols.
fn missiles(rng: &mut Rng) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = vec![
        vec![],
        vec![0; 1],
        vec![0; 100_000],
        vec![0xFF; 100_000],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        // NBD: client flags, then an option that claims 4 GiB.
        [&3u32.to_be_bytes()[..], b"IHAVEOPT", &[0, 0, 0, 7], &[0xFF; 4]].concat(),
        // NBD: an option of 64 KiB that stops in the middle.
        [&3u32.to_be_bytes()[..], b"IHAVEOPT", &[0, 0, 0, 7], &[0, 1, 0, 0], &[9; 1000]].concat(),
        // vhost-user: SET_MEM_TABLE that claims 4 GiB, SET_VRING_NUM of queue 2^32-1, an unknown request.
        [5u32.to_le_bytes(), 1u32.to_le_bytes(), [0xFF; 4]].concat(),
        [8u32.to_le_bytes(), 1u32.to_le_bytes(), 8u32.to_le_bytes(), [0xFF; 4], [0xFF; 4]].concat(),
        [9999u32.to_le_bytes(), 1u32.to_le_bytes(), 0u32.to_le_bytes()].concat(),
    ];
    for _ in 0..20 {
        let mut noise = vec![0; 1 + rng.below(5000) as usize];
        rng.fill(&mut noise);
        all.push(noise);
    }
    // Plausible lengths at the front of noise, in both byte orders and widths.
    for length in [16u32, 1 << 16, 1 << 28, u32::MAX] {
        let mut noise = vec![0; 600];
        rng.fill(&mut noise);
        noise[..4].copy_from_slice(&length.to_le_bytes());
        all.push(noise.clone());
        noise[..4].copy_from_slice(&length.to_be_bytes());
        all.push(noise);
    }
    all
}

/// Sends, closes the writing side, and reads what comes until the other side closes or says nothing more.
fn throw(mut stream: impl Read + Write, close: impl Fn(), bytes: &[u8]) {
    // The daemon may close at any moment: errors are what is wanted here.
    let _ = stream.write_all(bytes);
    close();
    let mut sink = [0; 4096];
    let mut budget = 1 << 20;
    while let Ok(n) = stream.read(&mut sink) {
        if n == 0 || budget == 0 {
            return;
        }
        budget -= n.min(budget);
    }
}

fn throw_tcp(address: &str, bytes: &[u8]) {
    let stream = TcpStream::connect(address).expect("the node port is still open");
    stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout can be set");
    throw(&stream, || drop(stream.shutdown(Shutdown::Write)), bytes);
}

fn throw_unix(path: &Path, bytes: &[u8]) {
    // A vhost-user server has one client at a time and may be busy with the end of the one before.
    let stream =
        eventually("the socket to be open again", PATIENCE, || UnixStream::connect(path).ok());
    stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout can be set");
    throw(&stream, || drop(stream.shutdown(Shutdown::Write)), bytes);
}

#[test]
fn garbage_to_every_socket_is_survived() {
    let lab = Lab::new("garbage");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("one", "16M", 3);
    cluster.create("two", "16M", 3);
    let nbd = cluster.export_nbd(0, "one");
    let vhost = cluster.export_vhost(0, "two");
    let mut client = nbd.connect();
    client.write(8192, &[0x5A; 4096]).unwrap();
    let pids: Vec<_> = (0..3).map(|i| cluster.process(i).pid()).collect();

    let mut rng = Rng(seed());
    // Connections that say nothing, or only half a thing, must not block the others.
    let idle: Vec<_> = (0..20).map(|_| TcpStream::connect(cluster.address(0)).unwrap()).collect();
    let idle_nbd: Vec<_> = (0..5).map(|_| UnixStream::connect(&nbd.socket).unwrap()).collect();
    for missile in missiles(&mut rng) {
        throw_tcp(&cluster.address(0), &missile);
        throw_unix(&nbd.socket, &missile);
        throw_unix(&vhost.socket, &missile);
        assert_eq!(client.read(8192, 4096).unwrap(), [0x5A; 4096]);
    }
    cluster.wait_healthy();
    drop((idle, idle_nbd));

    let mut fresh = nbd.connect();
    assert_eq!(fresh.read(8192, 4096).unwrap(), [0x5A; 4096]);
    let script = "blkcheck write /dev/vda --count 50 && blkcheck verify /dev/vda --flushed 50";
    let guest = Guest::boot(&lab, "guest", &vhost.vhost_disk(), script);
    guest.finish(4 * PATIENCE).expect_success();
    for (i, pid) in pids.into_iter().enumerate() {
        assert_eq!(cluster.process(i).pid(), pid);
        let rss = cluster.process(i).rss_kib();
        assert!(rss < 512 << 10, "node{i} grew to {rss} KiB");
    }
}
