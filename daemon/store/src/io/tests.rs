//! Both engines through the same tests; where the system refuses `io_uring`, only the pool.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::queue::Step;
use super::uring::Ring;
use super::{Buffer, Choice, Done, IoEngine, LIMITS, Limits, Op};

const SMALL: Limits =
    Limits { in_flight: 4, waiting_ops: 16, waiting_bytes: 64 << 10, piece: 1000 };

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let start = self.below(256);
        (0..len).map(|n| (start + n as u64 * 7 + (n as u64 >> 8)) as u8).collect()
    }
}

fn seed() -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    println!("SEED={seed}");
    seed
}

/// A ring whose system call is interrupted, and refused for want of memory, now and then.
fn disturbed(limits: Limits) -> io::Result<Ring> {
    let Ring { ring, mut enter } = Ring::open(limits)?;
    let mut calls = 0;
    let disturbing = move |ring: &_| {
        calls += 1;
        match calls % 5 {
            1 => Err(Errno::INTR.into()),
            3 if calls % 7 == 0 => Err(Errno::AGAIN.into()),
            _ => enter(ring),
        }
    };
    Ok(Ring { ring, enter: Box::new(disturbing) })
}

fn start(name: &str, choice: Choice, limits: Limits) -> Option<IoEngine> {
    match IoEngine::start_with(name, choice, limits, Ring::open) {
        Ok(engine) => Some(engine),
        Err(error) => {
            assert_eq!(choice, Choice::Uring, "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// Calls `test` with each engine.
fn with_each(limits: Limits, test: impl Fn(IoEngine)) {
    for choice in [Choice::Uring, Choice::Threads] {
        if let Some(engine) = start("test", choice, limits) {
            test(engine);
        }
    }
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("file")
    }

    fn file(&self, len: u64) -> Arc<File> {
        let file = create(&self.path(), OFlags::empty()).unwrap();
        file.set_len(len).unwrap();
        Arc::new(file)
    }
}

fn create(path: &Path, flags: OFlags) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    options.custom_flags(flags.bits() as i32).open(path)
}

fn read(file: &Arc<File>, offset: u64, len: usize) -> Op {
    Op::Read { file: Arc::clone(file), offset, buf: Buffer::new(len) }
}

fn write(file: &Arc<File>, offset: u64, bytes: &[u8]) -> Op {
    Op::Write { file: Arc::clone(file), offset, buf: Buffer::from(bytes) }
}

/// Submits; what the callback got can be received.
fn submit(engine: &IoEngine, ops: Vec<Op>) -> Receiver<Vec<Done>> {
    let (sender, receiver) = mpsc::channel();
    engine.submit(ops, Box::new(move |done| sender.send(done).unwrap()));
    receiver
}

/// Waits for what must come; a hang is a failure.
fn wait<T>(receiver: &Receiver<T>) -> T {
    receiver.recv_timeout(Duration::from_secs(120)).expect("a wake-up or an answer was lost")
}

fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

/// What a batch is to give: for each operation the bytes that were there, or `None` for a write.
type Expected = Vec<Option<io::Result<Vec<u8>>>>;

/// A batch of operations on disjoint parts of `model`, which lies at `base` of a file that ends
/// with it if `last`. Applies the writes to `model`.
fn random_batch(
    random: &mut Random,
    file: &Arc<File>,
    model: &mut [u8],
    base: usize,
    last: bool,
) -> (Vec<Op>, Expected) {
    let (mut ops, mut expected, mut from) = (Vec::new(), Vec::new(), 0);
    let long = random.below(10) == 0;
    let longest = 1 + random.below(if long { 20_000 } else { 3_000 });
    while from < model.len() && ops.len() < 40 {
        from += random.below(5_000) as usize;
        let len = random.below(longest) as usize;
        let to = from + len;
        if to > model.len() {
            if last && len > 0 {
                ops.push(read(file, (base + from) as u64, len));
                expected.push(Some(Err(ErrorKind::UnexpectedEof.into())));
            }
            break;
        }
        if random.below(2) == 0 {
            ops.push(read(file, (base + from) as u64, len));
            expected.push(Some(Ok(model[from..to].to_vec())));
        } else {
            model[from..to].copy_from_slice(&random.bytes(len));
            ops.push(write(file, (base + from) as u64, &model[from..to]));
            expected.push(None);
        }
        from = to;
    }
    if random.below(8) == 0 {
        ops.push(Op::Sync { file: Arc::clone(file) });
        expected.push(None);
    }
    (ops, expected)
}

fn check(done: Vec<Done>, expected: Expected) {
    assert_eq!(done.len(), expected.len());
    for (done, expected) in done.into_iter().zip(expected) {
        match expected {
            None => done.result.unwrap(),
            Some(Ok(bytes)) => {
                done.result.unwrap();
                assert!(*done.op.into_buffer() == *bytes, "other bytes than the model's");
            }
            Some(Err(error)) => assert_eq!(done.result.unwrap_err().kind(), error.kind()),
        }
    }
}

fn agrees_with_a_model(engine: &IoEngine, seed: u64, rounds: usize) {
    let dir = Dir::new();
    let mut model = vec![0; 100_000];
    let file = dir.file(model.len() as u64);
    let mut random = Random(seed);
    for _ in 0..rounds {
        let (ops, expected) = random_batch(&mut random, &file, &mut model, 0, true);
        check(engine.run(ops), expected);
    }
    assert!(std::fs::read(dir.path()).unwrap() == model);
}

#[test]
fn random_batches_agree_with_a_model() {
    let seed = seed();
    with_each(LIMITS, |engine| agrees_with_a_model(&engine, seed, 300));
}

#[test]
fn transfers_in_pieces_agree_with_a_model() {
    let seed = seed();
    with_each(SMALL, |engine| agrees_with_a_model(&engine, seed, 150));
}

#[test]
fn interrupted_and_refused_system_calls_are_repeated() {
    let seed = seed();
    match IoEngine::start_with("test", Choice::Uring, SMALL, disturbed) {
        Ok(engine) => agrees_with_a_model(&engine, seed, 100),
        Err(error) => println!("skipped: {error}"),
    }
}

#[test]
fn many_threads_submit() {
    const PART: usize = 30_000;
    let seed = seed();
    for limits in [LIMITS, SMALL] {
        with_each(limits, |engine| {
            let dir = Dir::new();
            let file = dir.file(8 * PART as u64);
            std::thread::scope(|scope| {
                for n in 0..8 {
                    let (engine, file) = (&engine, &file);
                    scope.spawn(move || {
                        let mut random = Random(seed ^ n as u64);
                        let mut model = vec![0; PART];
                        for _ in 0..60 {
                            let (ops, expected) =
                                random_batch(&mut random, file, &mut model, n * PART, n == 7);
                            check(wait(&submit(engine, ops)), expected);
                        }
                    });
                }
            });
        });
    }
}

#[test]
fn a_batch_may_be_larger_than_all_bounds() {
    with_each(SMALL, |engine| {
        let dir = Dir::new();
        let file = dir.file(0);
        let blocks: Vec<_> = (0..300u64).map(|n| vec![n as u8; 1500]).collect();
        let at = |n: usize| n as u64 * 1500;
        let ops = blocks.iter().enumerate().map(|(n, block)| write(&file, at(n), block)).collect();
        check(engine.run(ops), (0..300).map(|_| None).collect());
        let ops = (0..300).map(|n| read(&file, at(n), 1500)).collect();
        check(engine.run(ops), blocks.into_iter().map(|block| Some(Ok(block))).collect());
    });
}

#[test]
fn a_short_file_is_an_error_and_nothing_is_not() {
    with_each(LIMITS, |engine| {
        let dir = Dir::new();
        let file = dir.file(5000);
        let done = engine.run(vec![
            read(&file, 4000, 1000),
            read(&file, 4000, 1001),
            read(&file, 5000, 1),
            read(&file, 1 << 40, 4096),
            read(&file, 1 << 40, 0),
            write(&file, 1 << 40, &[]),
        ]);
        let kinds: Vec<_> =
            done.iter().map(|done| done.result.as_ref().map_err(io::Error::kind)).collect();
        let eof = Err(ErrorKind::UnexpectedEof);
        assert_eq!(kinds, [Ok(&()), eof, eof, eof, Ok(&()), Ok(&())]);
        assert_eq!(file.metadata().unwrap().len(), 5000);
        assert!(engine.run(Vec::new()).is_empty());
    });
}

#[test]
fn what_needs_no_system_call_holds_nothing_up() {
    with_each(SMALL, |engine| {
        let dir = Dir::new();
        let file = dir.file(100);
        for count in 1..20 {
            let mut ops: Vec<_> = (0..count).map(|_| read(&file, 0, 0)).collect();
            ops.push(read(&file, 0, 100));
            assert_eq!(errors(&wait(&submit(&engine, ops))), vec![0; count + 1]);
        }
    });
}

#[test]
fn impossible_offsets_are_refused() {
    with_each(LIMITS, |engine| {
        let dir = Dir::new();
        let file = dir.file(0);
        (&*file).write_all(&[1; 100]).unwrap();
        for offset in [u64::MAX, u64::MAX - 3, i64::MAX as u64 - 3] {
            for done in engine.run(vec![write(&file, offset, &[2; 4]), read(&file, offset, 4)]) {
                assert_eq!(done.result.unwrap_err().kind(), ErrorKind::InvalidInput);
            }
        }
        assert_eq!(std::fs::read(dir.path()).unwrap(), [1; 100]);
    });
}

/// Error numbers of a batch; 0 for success.
fn errors(done: &[Done]) -> Vec<i32> {
    let number = |error: &io::Error| error.raw_os_error().unwrap_or(-1);
    done.iter().map(|done| done.result.as_ref().err().map_or(0, number)).collect()
}

#[test]
fn an_error_fails_its_own_operation() {
    with_each(LIMITS, |engine| {
        let dir = Dir::new();
        let file = dir.file(4096);
        let only_read = Arc::new(File::open(dir.path()).unwrap());
        let only_write = Arc::new(OpenOptions::new().write(true).open(dir.path()).unwrap());
        let directory = Arc::new(File::open(dir.0.path()).unwrap());
        let full = Arc::new(OpenOptions::new().write(true).open("/dev/full").unwrap());
        let (pipe, _other_end) = io::pipe().unwrap();
        let done = engine.run(vec![
            write(&file, 0, &[1; 100]),
            write(&only_read, 0, &[2; 100]),
            write(&only_write, 200, &[3; 100]),
            read(&only_write, 0, 100),
            read(&directory, 0, 100),
            write(&full, 0, &[4; 100]),
            Op::Sync { file: Arc::new(File::from(OwnedFd::from(pipe))) },
            Op::Sync { file: Arc::clone(&file) },
        ]);
        let [bad, dir_error, space, invalid] =
            [Errno::BADF, Errno::ISDIR, Errno::NOSPC, Errno::INVAL].map(Errno::raw_os_error);
        assert_eq!(errors(&done), [0, bad, 0, bad, dir_error, space, invalid, 0]);
        // The buffers come back, also with an error.
        assert_eq!(done.into_iter().nth(1).unwrap().op.into_buffer()[..], [2; 100]);
        let bytes = std::fs::read(dir.path()).unwrap();
        assert_eq!((&bytes[..100], &bytes[200..300]), (&[1; 100][..], &[3; 100][..]));
        assert_eq!(bytes[100..200], [0; 100]);
    });
}

#[test]
fn what_cannot_be_done_now_is_tried_a_bounded_number_of_times() {
    let queue = super::queue::Queue::new(LIMITS, None);
    let dir = Dir::new();
    let (sender, receiver) = mpsc::channel();
    let ops = vec![read(&dir.file(100), 0, 100)];
    queue.submit(ops, Box::new(move |done| sender.send(done).unwrap()));
    let mut task = queue.take_one(&mut Vec::new()).unwrap();
    for _ in 0..1000 {
        assert!(matches!(task.advance(Err(Errno::INTR.into())), Step::Again));
    }
    let mut tries = 0;
    let error = loop {
        match task.advance(Err(Errno::AGAIN.into())) {
            Step::Again => tries += 1,
            Step::Ended(result) => break result.unwrap_err(),
        }
    };
    assert_eq!((tries, error.kind()), (100, ErrorKind::WouldBlock));
    assert!(matches!(task.advance(Ok(99)), Step::Again));
    assert!(matches!(task.advance(Ok(1)), Step::Ended(Ok(()))));
    task.finish(Ok(()));
    assert_eq!(wait(&receiver).len(), 1);
}

#[test]
fn dropping_waits_for_everything() {
    with_each(SMALL, |engine| {
        let dir = Dir::new();
        let file = dir.file(0);
        let ended = Arc::new(AtomicUsize::new(0));
        // Each batch is followed by one that its callback submits, perhaps while the engine is
        // being dropped.
        for n in 0..100u64 {
            let queue = Arc::clone(&engine.queue);
            let (ended, file) = (Arc::clone(&ended), Arc::clone(&file));
            let ops = vec![write(&file, n * 4000, &[1; 2000])];
            let next = move |_| {
                ended.fetch_add(1, SeqCst);
                let ops = vec![write(&file, n * 4000 + 2000, &[2; 2000])];
                queue.submit(ops, Box::new(move |_| _ = ended.fetch_add(1, SeqCst)));
            };
            engine.submit(ops, Box::new(next));
        }
        let event = engine.queue.event();
        drop(engine);
        assert_eq!(ended.load(SeqCst), 200);
        // Nor is anything left behind.
        assert!(event.is_none_or(|event| Arc::strong_count(&event) == 1));
        let expected: Vec<u8> = (0..100).flat_map(|_| [[1; 2000], [2; 2000]]).flatten().collect();
        assert!(std::fs::read(dir.path()).unwrap() == expected);
    });
}

#[test]
fn a_callback_may_drop_the_engine() {
    with_each(LIMITS, |engine| {
        let dir = Dir::new();
        let ops = vec![read(&dir.file(10), 0, 10)];
        let engine = Arc::new(engine);
        let (own, barrier) = (Arc::clone(&engine), Arc::new(Barrier::new(2)));
        let (gate, (sender, receiver)) = (Arc::clone(&barrier), mpsc::channel());
        let done = move |_| {
            gate.wait();
            drop(own);
            sender.send(()).unwrap();
        };
        engine.submit(ops, Box::new(done));
        drop(engine);
        barrier.wait();
        wait(&receiver);
    });
}

#[test]
fn a_panic_in_a_callback_is_contained() {
    with_each(LIMITS, |engine| {
        let dir = Dir::new();
        let file = dir.file(10);
        for _ in 0..8 {
            engine.submit(vec![read(&file, 0, 10)], Box::new(|_| panic!("meant to panic")));
        }
        let engine = Arc::new(engine);
        let (own, again) = (Arc::clone(&engine), Arc::clone(&file));
        let (sender, receiver) = mpsc::channel();
        let waits_for_itself = move |_| {
            // Dropped by the panic; so nothing is received.
            let _sender = sender;
            own.run(vec![read(&again, 0, 10)]);
            _sender.send(()).unwrap();
        };
        engine.submit(vec![read(&file, 0, 10)], Box::new(waits_for_itself));
        assert_eq!(receiver.recv(), Err(mpsc::RecvError));
        assert_eq!(errors(&engine.run(vec![read(&file, 0, 10)])), [0]);
    });
}

#[test]
fn no_wake_up_is_lost() {
    let seed = seed();
    with_each(LIMITS, |engine| {
        let dir = Dir::new();
        let file = dir.file(100);
        let mut random = Random(seed);
        let mut asleep = 0;
        for _ in 0..3000 {
            // Submit to a thread that sleeps, or about then, or at once.
            match random.below(3) {
                0 if engine.kind() == "io_uring" => until(|| engine.queue.is_sleeping()),
                1 => (0..random.below(3000)).for_each(|_| std::hint::spin_loop()),
                _ => {}
            }
            asleep += usize::from(engine.queue.is_sleeping());
            assert_eq!(errors(&wait(&submit(&engine, vec![read(&file, 0, 100)]))), [0]);
        }
        assert!(asleep >= 500 || engine.kind() == "threads", "{asleep}");
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        wait(&submit(&engine, vec![read(&file, 0, 100)]));
                    }
                });
            }
        });
    });
}

/// State of each thread of the engine `name`, and how often it went to sleep.
fn threads(name: &str) -> Vec<(String, u64)> {
    let field = |status: &str, key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut found = Vec::new();
    for task in tasks {
        // Threads of other tests end at any time.
        let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else {
            continue;
        };
        let thread = field(&status, "Name");
        if thread.starts_with("io") && thread.split_once('-').is_some_and(|(_, end)| end == name) {
            let sleeps = field(&status, "voluntary_ctxt_switches").parse().unwrap();
            found.push((field(&status, "State"), sleeps));
        }
    }
    found
}

#[test]
fn an_idle_engine_sleeps() {
    for (choice, name, count) in [(Choice::Uring, "idle-1", 1), (Choice::Threads, "idle-2", 4)] {
        let Some(engine) = start(name, choice, LIMITS) else { continue };
        let dir = Dir::new();
        let file = dir.file(100);
        engine.run((0..100).map(|_| read(&file, 0, 100)).collect());
        // Declared, and then done.
        until(|| engine.queue.is_sleeping() || engine.queue.parked() == count);
        until(|| {
            let all = threads(name);
            all.len() == count && all.iter().all(|(state, _)| state.starts_with('S'))
        });
        let before = threads(name);
        // Time passes: another engine works.
        let other = start("busy", choice, LIMITS).unwrap();
        for _ in 0..500 {
            other.run(vec![read(&file, 0, 100)]);
        }
        assert_eq!(threads(name), before);
    }
}

#[test]
fn submitters_are_held_up_and_callbacks_are_not() {
    with_each(SMALL, |engine| {
        let dir = Dir::new();
        let file = dir.file(100_000);
        let gate = Arc::new(Mutex::new(()));
        let closed = gate.lock().unwrap();
        let (sender, receiver) = mpsc::channel();
        let most = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..200 {
                    let queue = Arc::clone(&engine.queue);
                    let (gate, sender, file) =
                        (Arc::clone(&gate), sender.clone(), Arc::clone(&file));
                    let ops = vec![read(&file, 0, 100)];
                    let next = move |_| {
                        drop(gate.lock().unwrap());
                        let sent = Box::new(move |_| sender.send(()).unwrap());
                        queue.submit(vec![read(&file, 0, 100)], sent);
                    };
                    engine.submit(ops, Box::new(next));
                    most.fetch_max(engine.queue.load().0, SeqCst);
                }
            });
            until(
                || matches!(engine.queue.load(), (waiting, _, 1) if waiting == SMALL.waiting_ops),
            );
            drop(closed);
        });
        // Callbacks of the operations in flight and done may add one each.
        assert!(most.load(SeqCst) <= SMALL.waiting_ops + 2 * usize::from(SMALL.in_flight) + 1);
        (0..200).for_each(|_| wait(&receiver));
        assert_eq!(engine.queue.load(), (0, 0, 0));
    });
}

#[test]
fn waiting_bytes_are_bounded() {
    with_each(SMALL, |engine| {
        let dir = Dir::new();
        let file = dir.file(100_000);
        let gate = Arc::new(Mutex::new(()));
        let closed = gate.lock().unwrap();
        let (sender, receiver) = mpsc::channel();
        let most = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..50 {
                    let (gate, sender) = (Arc::clone(&gate), sender.clone());
                    let done = move |_| {
                        drop(gate.lock().unwrap());
                        sender.send(()).unwrap();
                    };
                    engine.submit(vec![read(&file, 0, 20_000)], Box::new(done));
                    most.fetch_max(engine.queue.load().1, SeqCst);
                }
            });
            // The last one that is let in comes below 64 KiB.
            until(|| matches!(engine.queue.load(), (_, 80_000, 1)));
            drop(closed);
        });
        assert!(most.load(SeqCst) <= 80_000);
        (0..50).for_each(|_| wait(&receiver));
        assert_eq!(engine.queue.load(), (0, 0, 0));
    });
}

/// Keeps the events of the thread as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<String>>);

impl tracing::field::Visit for Log {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0.lock().unwrap().push_str(&format!("{field}={value:?} "));
    }
}

impl tracing::Subscriber for Log {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        self.0.lock().unwrap().push_str(&format!("{}: ", event.metadata().level()));
        event.record(&mut self.clone());
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn the_ring_is_preferred() {
    let engine = IoEngine::start("test", Choice::Auto).unwrap();
    let granted = Ring::open(LIMITS).is_ok();
    assert_eq!(engine.kind(), if granted { "io_uring" } else { "threads" });
    assert_eq!(IoEngine::start("test", Choice::Threads).unwrap().kind(), "threads");
}

#[test]
fn a_refused_ring_is_replaced_by_threads() {
    let refused: [(Errno, &str); 3] = [
        (Errno::PERM, "io_uring_disabled"),
        (Errno::NOSYS, "built without it"),
        (Errno::NOMEM, "ulimit -l"),
    ];
    for (error, hint) in refused {
        let log = Log::default();
        let start = |choice| IoEngine::start_with("d1", choice, LIMITS, move |_| Err(error.into()));
        let engine =
            tracing::subscriber::with_default(log.clone(), || start(Choice::Auto)).unwrap();
        assert_eq!(engine.kind(), "threads");
        let dir = Dir::new();
        assert_eq!(errors(&engine.run(vec![read(&dir.file(10), 0, 10)])), [0]);
        let log = log.0.lock().unwrap();
        assert!(log.starts_with("WARN: ") && log.contains("d1") && log.contains(hint), "{log}");
        let error = start(Choice::Uring).err().unwrap().to_string();
        assert!(error.contains(hint), "{error}");
    }
    // Granted, but not to be used: what a filter of io_uring_enter does.
    let unusable = |limits| {
        let Ring { ring, .. } = Ring::open(limits)?;
        Ok(Ring { ring, enter: Box::new(|_| Err(Errno::PERM.into())) })
    };
    let engine = IoEngine::start_with("d1", Choice::Auto, LIMITS, unusable).unwrap();
    assert_eq!(engine.kind(), "threads");
    let panics = |_| panic!("meant to panic");
    assert_eq!(IoEngine::start_with("d1", Choice::Auto, LIMITS, panics).unwrap().kind(), "threads");
}

/// A ring breaks as `broken` says, with operations in flight that will never be answered.
fn breaks(broken: fn() -> io::Result<usize>) {
    let broken_now = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&broken_now);
    let open = move |limits| {
        let Ring { ring, mut enter } = Ring::open(limits)?;
        let enter = move |ring: &_| if switch.load(SeqCst) { broken() } else { enter(ring) };
        Ok(Ring { ring, enter: Box::new(enter) })
    };
    let engine = match IoEngine::start_with("test", Choice::Uring, SMALL, open) {
        Ok(engine) => engine,
        Err(error) => return println!("skipped: {error}"),
    };
    let dir = Dir::new();
    let file = dir.file(100);
    let (pipe, other_end) = io::pipe().unwrap();
    let pipe = Arc::new(File::from(OwnedFd::from(pipe)));
    // Nobody writes to the pipe: the read stays with the kernel.
    let in_flight = submit(&engine, vec![read(&pipe, 0, 8)]);
    assert_eq!(errors(&engine.run(vec![read(&file, 0, 100)])), [0]);
    assert!(in_flight.try_recv().is_err());

    broken_now.store(true, SeqCst);
    std::thread::scope(|scope| {
        // More than may wait: none of the submitters stays blocked.
        for _ in 0..100 {
            scope.spawn(|| {
                let done = wait(&submit(&engine, vec![read(&file, 0, 100)]));
                assert!(done[0].result.as_ref().unwrap_err().to_string().contains("failed"));
            });
        }
    });
    let lost = wait(&in_flight).remove(0);
    let text = lost.result.unwrap_err().to_string();
    assert!(text.contains("may have been done"), "{text}");
    // The kernel still holds the memory: it is neither given back nor freed, nor is the pipe.
    assert!(lost.op.into_buffer().is_empty());
    assert_eq!(Arc::strong_count(&pipe), 2);

    let done = engine.run(vec![write(&file, 0, &[9; 50])]);
    let text = done[0].result.as_ref().unwrap_err().to_string();
    assert!(text.contains("nothing was done"), "{text}");
    assert_eq!(std::fs::read(dir.path()).unwrap(), [0; 100]);
    drop(other_end);
}

#[test]
fn a_broken_ring_frees_nothing_that_the_kernel_may_use() {
    breaks(|| Err(Errno::BADF.into()));
}

#[test]
fn a_panic_of_the_thread_frees_nothing_that_the_kernel_may_use() {
    breaks(|| panic!("meant to panic"));
}

#[test]
fn direct_io_works_where_the_file_system_has_it() {
    with_each(Limits { piece: 64 << 10, ..LIMITS }, |engine| {
        let dir = Dir::new();
        let file = match create(&dir.path(), OFlags::DIRECT) {
            Ok(file) => Arc::new(file),
            Err(error) => {
                return println!("skipped: no O_DIRECT in {}: {error}", dir.path().display());
            }
        };
        let bytes = Random(1).bytes(256 << 10);
        let ops = bytes.chunks(128 << 10).enumerate();
        let ops = ops.map(|(n, part)| write(&file, n as u64 * (128 << 10), part));
        check(engine.run(ops.collect()), vec![None, None]);
        assert_eq!(errors(&engine.run(vec![Op::Sync { file: Arc::clone(&file) }])), [0]);
        let ops = bytes.chunks(4096).enumerate().map(|(n, _)| read(&file, n as u64 * 4096, 4096));
        let expected = bytes.chunks(4096).map(|part| Some(Ok(part.to_vec())));
        check(engine.run(ops.collect()), expected.collect());
        assert!(std::fs::read(dir.path()).unwrap() == bytes);
        // A file that ends in the middle of a sector.
        file.set_len(5000).unwrap();
        let done = engine.run(vec![read(&file, 0, 8192), read(&file, 8192, 4096)]);
        for done in done {
            assert_eq!(done.result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
    });
}

#[test]
fn buffers_are_aligned() {
    for len in [0, 1, 511, 4096, 4097, 1 << 20] {
        let buffer = Buffer::new(len);
        assert_eq!(buffer.len(), len);
        assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(4096));
        let address = buffer.as_ptr();
        let moved = Box::new(buffer);
        assert_eq!(moved.as_ptr(), address);
        assert!(moved.iter().all(|byte| *byte == 0));
    }
    assert_eq!(Buffer::from(&b"bytes"[..])[..], *b"bytes");
}
