//! The clients that people use, against a server in this process.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::process::{Command, Output};
use std::sync::Arc;

use common::memory::{Deferred, Fixed, Memory};
use common::{Dir, Random, limits, serve};
use sheepdog_nbd::ServerHandle;
use sheepdog_types::Block;

const SIZE: usize = 32 << 20;

/// Runs `tool`, which comes with the Debian packages `package`.
fn run(tool: &str, package: &str, args: &[&str]) -> Output {
    // A tool that hangs must not hang the tests; `timeout` is part of coreutils.
    let output = Command::new("timeout").arg("120").arg(tool).args(args).output().unwrap();
    assert_ne!(
        output.status.code(),
        Some(127),
        "{tool} is missing: install the Debian package(s) {package}"
    );
    output
}

/// Runs a tool that must succeed, and gives its standard output.
fn ok(tool: &str, package: &str, args: &[&str]) -> String {
    let output = run(tool, package, args);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

const LIBNBD: &str = "libnbd-bin";
const QEMU: &str = "qemu-utils and qemu-block-extra";

fn served(device: Arc<dyn Block>) -> (ServerHandle, Dir, String) {
    let (server, dir) = serve(Fixed::one("vm", device), limits());
    let uri = format!("nbd+unix:///vm?socket={}", dir.socket().display());
    (server, dir, uri)
}

fn path(dir: &Dir, name: &str) -> String {
    dir.0.join(name).display().to_string()
}

/// A file whose every 4 KiB block is unlike its neighbours, some of them zero.
fn sample(file: &str) -> Vec<u8> {
    let mut random = Random::new();
    let mut data = vec![0; SIZE];
    for block in data.chunks_mut(4096) {
        if random.below(3) > 0 {
            let word = random.next().to_le_bytes();
            block.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&word));
        }
    }
    std::fs::write(file, &data).unwrap();
    data
}

#[test]
fn nbdinfo_sees_the_export_as_it_is() {
    let (_server, dir, uri) = served(Memory::new(SIZE));
    let text = ok("nbdinfo", LIBNBD, &[&uri]);
    for line in [
        "newstyle-fixed without TLS, using structured packets",
        "export=\"vm\"",
        "export-size: 33554432",
        "is_read_only: false",
        "can_cache: false",
        "can_df: true",
        "can_fast_zero: false",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
        "description: Sheepdog volume, serial mem-1",
    ] {
        assert!(text.contains(line), "{line:?} is not in:\n{text}");
    }
    let list = format!("nbd+unix:///?socket={}", dir.socket().display());
    assert!(ok("nbdinfo", LIBNBD, &["--list", &list]).contains("export=\"vm\""));
    let unknown = format!("nbd+unix:///nope?socket={}", dir.socket().display());
    assert!(!run("nbdinfo", LIBNBD, &[&unknown]).status.success());
}

#[test]
fn nbdcopy_moves_data_both_ways() {
    for threaded in [false, true] {
        let memory = Memory::new(SIZE);
        let device: Arc<dyn Block> =
            if threaded { Deferred::new(memory.clone()) } else { memory.clone() };
        let (_server, dir, uri) = served(device);
        let (from, to) = (path(&dir, "from"), path(&dir, "to"));
        let data = sample(&from);
        ok("nbdcopy", LIBNBD, &["--flush", &from, &uri]);
        assert!(*memory.bytes() == data);
        assert!(memory.flushes() > 0);
        ok("nbdcopy", LIBNBD, &[&uri, &to]);
        assert!(std::fs::read(&to).unwrap() == data);
    }
}

#[test]
fn qemu_io_patterns_at_odd_offsets() {
    let memory = Memory::new(SIZE);
    let (_server, _dir, uri) = served(memory.clone());
    let commands = [
        "write -P 0x11 0 64k",
        "write -P 0x22 511 1027",
        "write -f -P 0x33 65535 3",
        "aio_write -P 0x44 1000001 99999",
        "aio_write -P 0x55 2000001 3000000",
        "aio_flush",
        "write -z 700 100",
        "write -z -u 2000003 1000",
        "discard 1000003 5",
        "flush",
        "read -P 0x11 0 511",
        "read -P 0x22 511 189",
        "read -P 0 700 100",
        "read -P 0x22 800 738",
        "read -P 0x11 1538 63997",
        "read -P 0x33 65535 3",
        "read -P 0x44 1000008 99992",
        "read -P 0 2000003 1000",
        "read -P 0x55 2001003 2998998",
    ];
    let mut args = vec!["-f", "raw"];
    for command in &commands {
        args.extend(["-c", command]);
    }
    args.push(&uri);
    let text = ok("qemu-io", QEMU, &args);
    assert!(!text.contains("fail") && !text.contains("rror"), "{text}");
    let bytes = memory.bytes();
    assert_eq!(bytes[65534..65539], [0x11, 0x33, 0x33, 0x33, 0]);
    assert_eq!(bytes[1_000_000..1_000_003], [0, 0x44, 0x44]);
}

#[test]
fn qemu_io_is_refused_on_a_read_only_export() {
    let (_server, _dir, uri) = served(Memory::with(SIZE, true));
    ok("qemu-io", QEMU, &["-r", "-f", "raw", "-c", "read -P 0 0 4k", &uri]);
    assert!(!run("qemu-io", QEMU, &["-f", "raw", "-c", "write 0 4k", &uri]).status.success());
}

#[test]
fn qemu_img_converts_and_compares() {
    let memory = Memory::new(SIZE);
    let (_server, dir, uri) = served(memory.clone());
    let (raw, qcow2) = (path(&dir, "raw"), path(&dir, "qcow2"));
    let data = sample(&raw);
    ok("qemu-img", QEMU, &["convert", "-n", "-W", "-f", "raw", "-O", "raw", &raw, &uri]);
    assert!(*memory.bytes() == data);
    let compare = ["compare", "-f", "raw", "-F", "raw", &raw, &uri];
    assert!(ok("qemu-img", QEMU, &compare).contains("identical"));
    ok("qemu-img", QEMU, &["convert", "-f", "raw", "-O", "qcow2", &uri, &qcow2]);
    ok("qemu-img", QEMU, &["compare", "-f", "raw", "-F", "qcow2", &raw, &qcow2]);
    memory.bytes()[12_345] ^= 1;
    assert_eq!(run("qemu-img", QEMU, &compare).status.code(), Some(1), "it does compare");
}

#[test]
fn fio_verifies_what_it_wrote() {
    for (threaded, jobs) in [(false, "1"), (true, "2")] {
        let memory = Memory::new(SIZE);
        let device: Arc<dyn Block> =
            if threaded { Deferred::new(memory.clone()) } else { memory.clone() };
        let (_server, dir, uri) = served(device);
        let share = SIZE / 2;
        let text = ok(
            "fio",
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &format!("--uri={uri}"),
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--bs_unaligned=0",
                "--iodepth=32",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--do_verify=1",
                "--fsync=64",
                &format!("--numjobs={jobs}"),
                &format!("--size={share}"),
                &format!("--offset_increment={share}"),
                &format!("--aux-path={}", dir.0.display()),
            ],
        );
        assert!(text.contains("err= 0"), "{text}");
        assert!(memory.flushes() > 0);
        assert!(memory.bytes()[..share].iter().any(|&byte| byte != 0), "something was written");
    }
}
