//! qemu-img and qemu-io on volumes: images go in and out whole, requests of any 512-byte alignment do what a
//! flat file does.

use sheepdog_qemu_tests::{Cluster, Lab, Rng, qemu_img, qemu_io, seed};
use std::fs;

const SIZE: usize = 24 << 20;

/// A sparse raw image: runs of noise, zeroes and repeated bytes of odd lengths, across object borders.
fn make_raw(rng: &mut Rng) -> Vec<u8> {
    let mut raw = vec![0; SIZE];
    let mut at = 0;
    while at < SIZE {
        let run = (512 * (1 + rng.below(3000)) as usize).min(SIZE - at);
        match rng.below(3) {
            0 => rng.fill(&mut raw[at..at + run]),
            1 => raw[at..at + run].fill(rng.next_u64() as u8),
            _ => {}
        }
        at += run;
    }
    raw
}

#[test]
fn qcow2_image_goes_in_and_comes_out() {
    let lab = Lab::new("images-convert");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "24M", 3);
    let uri = cluster.export_nbd(0, "disk").uri();
    let (raw, qcow2, back) = (lab.path("in.raw"), lab.path("in.qcow2"), lab.path("out.raw"));
    let data = make_raw(&mut Rng(seed()));
    fs::write(&raw, &data).unwrap();
    let [raw, qcow2, back] = [&raw, &qcow2, &back].map(|p| p.to_str().unwrap());

    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", raw, qcow2]);
    qemu_img(&["convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, &uri]);
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", qcow2, &uri]);
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &uri, back]);
    assert!(fs::read(back).unwrap() == data, "what came out is not what went in");
}

#[test]
fn unaligned_requests_do_what_a_flat_file_does() {
    let lab = Lab::new("images-qemu-io");
    let cluster = Cluster::start(&lab, 3);
    cluster.create("disk", "24M", 3);
    let export = cluster.export_nbd(1, "disk");
    let mut rng = Rng(seed());
    let mut model = vec![0u8; SIZE];
    let mut commands = Vec::new();
    for _ in 0..300 {
        let (offset, length) = place(&mut rng);
        let pattern = 1 + rng.below(255) as u8;
        let written = match rng.below(10) {
            0 => 0,
            1 => 0,
            _ => pattern,
        };
        // Write-zeroes must read back as zero; a discard may, and with this server does.
        commands.push(if written == 0 {
            format!("write -z {offset} {length}")
        } else {
            format!("write -P {pattern} {offset} {length}")
        });
        model[offset..offset + length].fill(written);
        if rng.below(20) == 0 {
            commands.push("flush".into());
        }
        // Read the same place, so that an error is found near its cause.
        commands.push(format!("read -P {written} {offset} {length}"));
    }
    qemu_io(&export.uri(), &commands);

    let mut client = export.connect();
    assert_eq!(client.size, SIZE as u64);
    for at in (0..SIZE).step_by(1 << 20) {
        let found = client.read(at as u64, 1 << 20).unwrap();
        let differs = found.iter().zip(&model[at..]).position(|(a, b)| a != b);
        assert_eq!(differs.map(|d| at + d), None, "first wrong byte");
    }
}

/// Offset and length in bytes, multiples of 512: small, block-sized, across an object border, large.
fn place(rng: &mut Rng) -> (usize, usize) {
    let sectors = SIZE as u64 / 512;
    let length = match rng.below(4) {
        0 => 1,
        1 => 1 + rng.below(16),
        2 => 8,
        _ => 1 + rng.below(4096),
    };
    let border = 8192 * (1 + rng.below(sectors / 8192 - 1));
    let start = match rng.below(3) {
        0 => border - rng.below(length + 1).min(border),
        _ => rng.below(sectors),
    };
    let start = start.min(sectors - length);
    ((start * 512) as usize, (length * 512) as usize)
}
