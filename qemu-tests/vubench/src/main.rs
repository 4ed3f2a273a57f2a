//! vubench - load generator for vhost-user-blk servers.
//!
//! It plays the role of the VM: connects to the server's Unix socket as a vhost-user *frontend*,
//! shares a memfd with it, sets up one or more virtqueues and keeps `--qd` requests in flight on
//! each of them for `--time` seconds. It prints IOPS, MB/s, latency percentiles, its own CPU time
//! and the CPU time that the server processes given with `--pids` spent on the run.
//!
//! The transport (crate `virtio-driver`, the one libblkio uses) insists that the server offers the
//! vhost-user protocol features REPLY_ACK, CONFIG and CONFIGURE_MEM_SLOTS.

mod hist;
mod opts;
mod procstat;

use hist::Hist;
use opts::{Opts, Rw};
use std::io::{Error, ErrorKind};
use std::os::unix::io::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

type Result<T> = std::result::Result<T, Error>;

fn bad(msg: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, msg.into())
}

/// Memory shared with the server: one page-aligned buffer per request slot.
struct SharedMem {
    fd: OwnedFd,
    ptr: *mut u8,
    len: usize,
}

impl SharedMem {
    fn new(len: usize) -> Result<Self> {
        // SAFETY: plain libc calls; every result is checked before use.
        unsafe {
            let raw = libc::memfd_create(c"vubench-ram".as_ptr(), libc::MFD_CLOEXEC);
            if raw < 0 {
                return Err(Error::last_os_error());
            }
            let fd = OwnedFd::from_raw_fd(raw);
            if libc::ftruncate(raw, len as libc::off_t) != 0 {
                return Err(Error::last_os_error());
            }
            let ptr = libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                raw,
                0,
            );
            if ptr == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            Ok(Self { fd, ptr: ptr.cast(), len })
        }
    }
}

impl Drop for SharedMem {
    fn drop(&mut self) {
        // SAFETY: `ptr` and `len` came from a successful mmap.
        unsafe { libc::munmap(self.ptr.cast(), self.len) };
    }
}

/// xorshift64*: cheap, good enough for choosing offsets and data.
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn below(&mut self, n: u64) -> u64 {
        ((self.next() as u128 * n as u128) >> 64) as u64
    }
    fn fill(&mut self, buf: &mut [u8]) {
        for c in buf.chunks_mut(8) {
            let b = self.next().to_le_bytes();
            c.copy_from_slice(&b[..c.len()]);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    Read,
    Write,
    Flush,
}

/// What travels with a request through the ring.
#[derive(Clone, Copy)]
struct Tag {
    slot: usize,
    op: Op,
    start: Instant,
}

/// Sleeps until the eventfd fires and clears it. The server may have made the file description
/// non-blocking (it shares it with us), so a plain read is not enough.
fn wait_readable(event: &EventFd) -> Result<()> {
    let mut p = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&mut p, 1, 10_000) } == 0 {
        return Err(Error::new(ErrorKind::TimedOut, "no completion for 10 s"));
    }
    match event.read() {
        Ok(_) => Ok(()),
        Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => Ok(()),
        Err(e) => Err(e),
    }
}

/// One virtqueue plus everything its thread needs.
struct Worker<'q> {
    idx: usize,
    queue: VirtioBlkQueue<'q, Tag>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    mem: *mut u8,
}

// SAFETY: `mem` points to this worker's own part of the shared mapping, which outlives the threads.
unsafe impl Send for Worker<'_> {}

#[derive(Default)]
struct Outcome {
    hist: Hist,
    reads: u64,
    writes: u64,
    flushes: u64,
    errors: u64,
    first_error: i32,
    wakeups: u64,
    kicks: u64,
}

impl Worker<'_> {
    fn buf(&self, slot: usize, bs: usize) -> *mut u8 {
        // SAFETY: callers pass slot < qd, and the mapping holds qd buffers of bs bytes.
        unsafe { self.mem.add(slot * bs) }
    }

    fn submit(&mut self, op: Op, slot: usize, offset: u64, bs: usize) -> Result<()> {
        let tag = Tag { slot, op, start: Instant::now() };
        let buf = self.buf(slot, bs);
        // SAFETY: the buffer stays mapped and is not reused until the completion arrives.
        unsafe {
            match op {
                Op::Read => self.queue.read_raw(offset, buf, bs, tag),
                Op::Write => self.queue.write_raw(offset, buf, bs, tag),
                Op::Flush => self.queue.flush(tag),
            }
        }
    }

    fn kick(&mut self, out: &mut Outcome) -> Result<()> {
        if self.queue.avail_notif_needed() {
            out.kicks += 1;
            self.kick.notify()?;
        }
        Ok(())
    }

    /// Waits until at least one completion is there and moves all of them to `done`.
    fn reap(&mut self, poll: bool, done: &mut Vec<(Tag, i32)>, out: &mut Outcome) -> Result<()> {
        loop {
            done.extend(self.queue.completions().map(|c| (c.context, c.ret)));
            if !done.is_empty() {
                return Ok(());
            }
            if poll {
                std::hint::spin_loop();
                continue;
            }
            // Ask for an interrupt, look once more (it may have been completed before the server
            // could see the request for one), then sleep.
            self.queue.set_used_notif_enabled(true);
            if !self.queue.completions().has_next() {
                out.wakeups += 1;
                wait_readable(&self.call)?;
            }
            self.queue.set_used_notif_enabled(false);
        }
    }

    fn run(mut self, o: &Opts, size: u64, begin: Instant) -> Result<Outcome> {
        let bs = o.bs;
        let blocks = size / bs as u64;
        let mut rng = Rng::new(o.seed + 1 + self.idx as u64);
        let mut seq = blocks / o.queues as u64 * self.idx as u64;
        let measure_from = begin + o.ramp;
        let stop_at = measure_from + o.time;
        let mut out = Outcome::default();
        let mut since_flush = 0u64;

        // Random data in every buffer, so that a server cannot profit from zeroes.
        // SAFETY: this worker owns qd * bs bytes from `mem`.
        rng.fill(unsafe { std::slice::from_raw_parts_mut(self.mem, o.qd * bs) });

        let mut pick = |rng: &mut Rng| -> (Op, u64) {
            if o.flush_every > 0 && since_flush >= o.flush_every {
                since_flush = 0;
                return (Op::Flush, 0);
            }
            let block = if o.rw.is_random() {
                rng.below(blocks)
            } else {
                seq = (seq + 1) % blocks;
                seq
            };
            let op = match o.rw {
                Rw::RandRead | Rw::Read => Op::Read,
                Rw::RandWrite | Rw::Write => Op::Write,
                Rw::Mixed if rng.below(100) < o.mix_read => Op::Read,
                Rw::Mixed => Op::Write,
            };
            if op == Op::Write {
                since_flush += 1;
            }
            (op, block * bs as u64)
        };

        if o.poll {
            self.queue.set_used_notif_enabled(false);
        }
        for slot in 0..o.qd {
            let (op, off) = pick(&mut rng);
            self.submit(op, slot, off, bs)?;
        }
        self.kick(&mut out)?;

        let mut in_flight = o.qd;
        let mut done = Vec::with_capacity(o.qd);
        while in_flight > 0 {
            done.clear();
            self.reap(o.poll, &mut done, &mut out)?;
            let now = Instant::now();
            for &(tag, ret) in &done {
                in_flight -= 1;
                if ret != 0 {
                    out.errors += 1;
                    out.first_error = if out.first_error == 0 { ret } else { out.first_error };
                    if out.errors > 1000 {
                        return Err(Error::from_raw_os_error(-ret));
                    }
                } else if now >= measure_from && now < stop_at {
                    match tag.op {
                        Op::Read => out.reads += 1,
                        Op::Write => out.writes += 1,
                        Op::Flush => out.flushes += 1,
                    }
                    if tag.op != Op::Flush {
                        out.hist.add((now - tag.start).as_nanos() as u64);
                    }
                }
                if now < stop_at {
                    let (op, off) = pick(&mut rng);
                    self.submit(op, tag.slot, off, bs)?;
                    in_flight += 1;
                }
            }
            self.kick(&mut out)?;
        }
        Ok(out)
    }

    /// One request, start to end.
    fn one(&mut self, op: Op, offset: u64, bs: usize) -> Result<()> {
        let (mut done, mut out) = (Vec::new(), Outcome::default());
        self.submit(op, 0, offset, bs)?;
        self.kick(&mut out)?;
        self.reap(false, &mut done, &mut out)?;
        match done[0].1 {
            0 => Ok(()),
            e => Err(Error::from_raw_os_error(-e)),
        }
    }

    /// Data check: writes a different pattern to `count` places, then reads all of them back.
    fn verify(&mut self, o: &Opts, size: u64, count: u64) -> Result<()> {
        let blocks = size / o.bs as u64;
        let mut rng = Rng::new(o.seed);
        let mut places: Vec<u64> = (0..count).map(|_| rng.below(blocks)).collect();
        places.sort_unstable();
        places.dedup();
        for &b in &places {
            // SAFETY: slot 0 is idle between `one` calls.
            let buf = unsafe { std::slice::from_raw_parts_mut(self.mem, o.bs) };
            Rng::new(o.seed ^ b).fill(buf);
            self.one(Op::Write, b * o.bs as u64, o.bs)?;
        }
        self.one(Op::Flush, 0, o.bs)?;
        let mut expect = vec![0u8; o.bs];
        for &b in &places {
            // SAFETY: as above.
            unsafe { std::slice::from_raw_parts_mut(self.mem, o.bs) }.fill(0xAA);
            self.one(Op::Read, b * o.bs as u64, o.bs)?;
            Rng::new(o.seed ^ b).fill(&mut expect);
            // SAFETY: as above.
            let got = unsafe { std::slice::from_raw_parts(self.mem, o.bs) };
            if let Some(at) = got.iter().zip(&expect).position(|(a, b)| a != b) {
                return Err(Error::new(
                    ErrorKind::InvalidData,
                    format!("wrong data at byte {}", b * o.bs as u64 + at as u64),
                ));
            }
        }
        println!(
            "verify: {} blocks of {} bytes written, flushed, read back: ok",
            places.len(),
            o.bs
        );
        Ok(())
    }
}

fn real_main() -> Result<()> {
    let o = Opts::from_args().map_err(bad)?;

    let wanted = VirtioFeatureFlags::VERSION_1.bits()
        | if o.no_event_idx { 0 } else { VirtioFeatureFlags::RING_EVENT_IDX.bits() }
        | (VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::RO
            | VirtioBlkFeatureFlags::BLK_SIZE
            | VirtioBlkFeatureFlags::MQ)
            .bits();
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(&o.socket, wanted)?);
    let features = transport.get_features();
    let config = transport.get_config()?;
    let capacity = u64::from(config.capacity) * 512;
    if o.info {
        println!(
            "capacity {capacity} bytes, block size {}, queues {} (transport: {:?}), memory slots {}, features {features:#x}",
            u32::from(config.blk_size),
            u16::from(config.num_queues),
            transport.max_queues(),
            transport.max_mem_regions()
        );
    }
    if (o.rw.writes() || o.verify > 0) && features & VirtioBlkFeatureFlags::RO.bits() != 0 {
        return Err(bad("the device is read-only"));
    }
    let size = if o.size == 0 { capacity } else { o.size.min(capacity) };
    if size < o.bs as u64 {
        return Err(bad("the device is smaller than one block"));
    }

    // Three descriptors a request (header, data, status).
    let ring = (o.qd * 3).next_power_of_two().max(16);
    let ring = u16::try_from(ring).map_err(|_| bad("--qd is too large"))?;
    let queues = VirtioBlkQueue::<Tag>::setup_queues(transport.as_mut(), o.queues, ring)?;
    let per_queue = o.qd * o.bs;
    let mem = SharedMem::new((per_queue * o.queues).next_multiple_of(4096))?;
    transport.map_mem_region(mem.ptr as usize, mem.len, mem.fd.as_raw_fd(), 0)?;

    let mut workers: Vec<Worker> = queues
        .into_iter()
        .enumerate()
        .map(|(idx, queue)| Worker {
            idx,
            queue,
            kick: transport.get_submission_notifier(idx),
            call: transport.get_completion_fd(idx),
            // SAFETY: inside the mapping by construction.
            mem: unsafe { mem.ptr.add(idx * per_queue) },
        })
        .collect();

    if o.verify > 0 {
        return workers[0].verify(&o, size, o.verify);
    }

    let begin = Instant::now();
    let (outcomes, server_s, client_s, server_rss) = std::thread::scope(|s| {
        let o = &o;
        let handles: Vec<_> =
            workers.into_iter().map(|w| s.spawn(move || w.run(o, size, begin))).collect();
        std::thread::sleep((begin + o.ramp).saturating_duration_since(Instant::now()));
        let (s0, c0) = (procstat::cpu_seconds(&o.pids), procstat::own_cpu_seconds());
        std::thread::sleep((begin + o.ramp + o.time).saturating_duration_since(Instant::now()));
        let (s1, c1) = (procstat::cpu_seconds(&o.pids), procstat::own_cpu_seconds());
        let rss = procstat::rss_kib(&o.pids);
        let outcomes: Vec<_> = handles
            .into_iter()
            .map(|h| h.join().unwrap_or_else(|_| Err(Error::other("a worker panicked"))))
            .collect();
        (outcomes, s1 - s0, c1 - c0, rss)
    });

    let mut total = Outcome::default();
    for r in outcomes {
        let r = r?;
        total.hist.merge(&r.hist);
        total.reads += r.reads;
        total.writes += r.writes;
        total.flushes += r.flushes;
        total.errors += r.errors;
        total.wakeups += r.wakeups;
        total.kicks += r.kicks;
        total.first_error = if total.first_error == 0 { r.first_error } else { total.first_error };
    }
    report(&o, &total, server_s, client_s, server_rss);
    drop(transport);
    drop(mem);
    if total.errors > 0 {
        return Err(Error::other(format!(
            "{} requests failed, the first with {}",
            total.errors,
            Error::from_raw_os_error(-total.first_error)
        )));
    }
    Ok(())
}

fn report(o: &Opts, t: &Outcome, server_s: f64, client_s: f64, rss_kib: u64) {
    let secs = o.time.as_secs_f64();
    let n = t.reads + t.writes;
    let iops = n as f64 / secs;
    let mbs = iops * o.bs as f64 / 1e6;
    let us = |q: f64| t.hist.quantile(q) as f64 / 1e3;
    let per_100k = |s: f64| if n == 0 { 0.0 } else { s * 1e5 / n as f64 };
    if o.json {
        println!(
            "{{\"rw\":\"{}\",\"bs\":{},\"qd\":{},\"queues\":{},\"seconds\":{secs},\"ios\":{n},\"reads\":{},\"writes\":{},\"flushes\":{},\"iops\":{iops:.1},\"mb_s\":{mbs:.2},\"lat_us\":{{\"mean\":{:.2},\"p50\":{:.2},\"p90\":{:.2},\"p99\":{:.2},\"p999\":{:.2},\"max\":{:.2}}},\"client_cpu_s\":{client_s:.3},\"server_cpu_s\":{server_s:.3},\"server_cpu_s_per_100k\":{:.3},\"client_cpu_s_per_100k\":{:.3},\"server_rss_kib\":{rss_kib},\"kicks\":{},\"wakeups\":{},\"errors\":{}}}",
            o.rw.name(),
            o.bs,
            o.qd,
            o.queues,
            t.reads,
            t.writes,
            t.flushes,
            t.hist.mean() / 1e3,
            us(0.5),
            us(0.9),
            us(0.99),
            us(0.999),
            us(1.0),
            per_100k(server_s),
            per_100k(client_s),
            t.kicks,
            t.wakeups,
            t.errors,
        );
        return;
    }
    println!(
        "{} bs={} qd={} queues={}: {iops:.0} IOPS, {mbs:.1} MB/s; latency us: mean {:.1} p50 {:.1} p90 {:.1} p99 {:.1} p99.9 {:.1} max {:.1}",
        o.rw.name(),
        o.bs,
        o.qd,
        o.queues,
        t.hist.mean() / 1e3,
        us(0.5),
        us(0.9),
        us(0.99),
        us(0.999),
        us(1.0),
    );
    println!(
        "  {n} I/Os ({} flushes) in {secs} s; CPU-s per 100k I/Os: server {:.2} ({server_s:.2} s in all), client {:.2}; server RSS {:.1} MiB; kicks {}, wakeups {}",
        t.flushes,
        per_100k(server_s),
        per_100k(client_s),
        rss_kib as f64 / 1024.0,
        t.kicks,
        t.wakeups,
    );
}

fn main() {
    if let Err(e) = real_main() {
        eprintln!("vubench: {e}");
        std::process::exit(1);
    }
}
