//! Command line.

use std::time::Duration;

pub const USAGE: &str = "\
usage: vubench --socket PATH [options]
  --rw KIND         randread (default), randwrite, randrw, read, write
  --mix-read PCT    share of reads in randrw (default 70)
  --bs SIZE         block size, k/m suffixes (default 4k)
  --qd N            requests in flight per queue (default 1)
  --queues N        virtqueues, one thread each (default 1)
  --time SECONDS    measured time (default 5)
  --ramp SECONDS    time before measuring starts (default 1)
  --size SIZE       use only the first SIZE bytes (default: whole device)
  --flush-every N   a flush after every N writes (default 0: never)
  --poll            spin for completions instead of sleeping on the eventfd
  --no-event-idx    do not negotiate VIRTIO_F_EVENT_IDX
  --pids A,B,..     server processes whose CPU time and RSS are reported
  --seed N          for offsets and data (default 1)
  --json            print one line of JSON
  --info            print the device's capacity and features first
  --verify N        data check instead of a benchmark: N blocks, OVERWRITES the device";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rw {
    RandRead,
    RandWrite,
    Mixed,
    Read,
    Write,
}

impl Rw {
    fn parse(s: &str) -> Option<Self> {
        [Self::RandRead, Self::RandWrite, Self::Mixed, Self::Read, Self::Write]
            .into_iter()
            .find(|r| r.name() == s)
    }
    pub fn name(self) -> &'static str {
        match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::Mixed => "randrw",
            Self::Read => "read",
            Self::Write => "write",
        }
    }
    pub fn is_random(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }
}

pub struct Opts {
    pub socket: String,
    pub rw: Rw,
    pub mix_read: u64,
    pub bs: usize,
    pub qd: usize,
    pub queues: usize,
    pub time: Duration,
    pub ramp: Duration,
    pub size: u64,
    pub flush_every: u64,
    pub poll: bool,
    pub no_event_idx: bool,
    pub pids: Vec<u32>,
    pub seed: u64,
    pub json: bool,
    pub info: bool,
    pub verify: u64,
}

/// `4k`, `1M`, `2g` or plain bytes.
fn size(s: &str) -> Option<u64> {
    let (digits, shift) = match s.to_ascii_lowercase() {
        l if l.ends_with('k') => (s.len() - 1, 10),
        l if l.ends_with('m') => (s.len() - 1, 20),
        l if l.ends_with('g') => (s.len() - 1, 30),
        _ => (s.len(), 0),
    };
    s.get(..digits)?.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn seconds(s: &str) -> Option<Duration> {
    let v: f64 = s.parse().ok()?;
    (v.is_finite() && (0.0..=86400.0).contains(&v)).then(|| Duration::from_secs_f64(v))
}

impl Opts {
    pub fn from_args() -> Result<Self, String> {
        Self::parse(std::env::args().skip(1))
    }

    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut o = Opts {
            socket: String::new(),
            rw: Rw::RandRead,
            mix_read: 70,
            bs: 4096,
            qd: 1,
            queues: 1,
            time: Duration::from_secs(5),
            ramp: Duration::from_secs(1),
            size: 0,
            flush_every: 0,
            poll: false,
            no_event_idx: false,
            pids: Vec::new(),
            seed: 1,
            json: false,
            info: false,
            verify: 0,
        };
        while let Some(a) = args.next() {
            match a.as_str() {
                "--poll" => o.poll = true,
                "--no-event-idx" => o.no_event_idx = true,
                "--json" => o.json = true,
                "--info" => o.info = true,
                "-h" | "--help" => return Err(USAGE.into()),
                name => {
                    let v = args
                        .next()
                        .ok_or_else(|| format!("{name}: a value is missing\n{USAGE}"))?;
                    o.set(name, &v)
                        .ok_or_else(|| format!("{name} {v}: not understood\n{USAGE}"))?;
                }
            }
        }
        if o.socket.is_empty() {
            return Err(format!("--socket is needed\n{USAGE}"));
        }
        if o.bs == 0 || !o.bs.is_multiple_of(512) || o.qd == 0 || o.queues == 0 {
            return Err("--bs must be a multiple of 512, --qd and --queues at least 1".into());
        }
        Ok(o)
    }

    fn set(&mut self, name: &str, v: &str) -> Option<()> {
        match name {
            "--socket" => self.socket = v.into(),
            "--rw" => self.rw = Rw::parse(v)?,
            "--mix-read" => self.mix_read = v.parse().ok()?,
            "--bs" => self.bs = usize::try_from(size(v)?).ok()?,
            "--qd" => self.qd = v.parse().ok()?,
            "--queues" => self.queues = v.parse().ok()?,
            "--time" => self.time = seconds(v)?,
            "--ramp" => self.ramp = seconds(v)?,
            "--size" => self.size = size(v)?,
            "--flush-every" => self.flush_every = v.parse().ok()?,
            "--pids" => {
                self.pids = v.split(',').map(|p| p.trim().parse().ok()).collect::<Option<_>>()?
            }
            "--seed" => self.seed = v.parse().ok()?,
            "--verify" => self.verify = v.parse().ok()?,
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(s: &str) -> Result<Opts, String> {
        Opts::parse(s.split_whitespace().map(String::from))
    }

    #[test]
    fn understands_a_full_line() {
        let o = parse("--socket /s --rw randwrite --bs 1M --qd 8 --time 0.5 --pids 1,2").unwrap();
        assert_eq!((o.bs, o.qd, o.rw), (1 << 20, 8, Rw::RandWrite));
        assert_eq!(o.pids, [1, 2]);
        assert_eq!(o.time, Duration::from_millis(500));
    }

    #[test]
    fn refuses_nonsense() {
        for s in ["", "--socket", "--socket s --bs 100", "--socket s --what 1", "--socket s --qd 0"]
        {
            assert!(parse(s).is_err(), "{s}");
        }
    }
}
