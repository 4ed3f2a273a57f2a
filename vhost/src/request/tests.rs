use super::*;
use crate::chain::Chain;
use crate::testing::driver::{DATA, DESC, Driver, INDIRECT, NEXT, Part, WRITE};

const MEM: usize = 1 << 20;
const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEM)]).unwrap()
}

/// Parses the chain at `head`.
fn parse_at(driver: &mut Driver, head: u16) -> (Result<Parsed, Refusal>, Segments) {
    let chain = Chain::new(driver.mem, GuestAddress(DESC), 16, head);
    let mut segments = Segments::default();
    (parse(driver.mem, chain, &mut segments), segments)
}

/// Parses a chain of `parts` with a header of `kind` and `sector`.
fn parse_parts(kind: u32, sector: u64, parts: &[Part]) -> (Result<Parsed, Refusal>, Segments) {
    let mem = memory();
    let mut driver = Driver::new(&mem, 16);
    driver.header(HEADER, kind, sector);
    let head = driver.chain(parts);
    parse_at(&mut driver, head)
}

fn io_error(status: u64) -> Refusal {
    Refusal::Status { status: GuestAddress(status), code: 1 }
}

fn unsupported(status: u64) -> Refusal {
    Refusal::Status { status: GuestAddress(status), code: 2 }
}

fn segment(addr: u64, len: u32) -> Segment {
    Segment { addr: GuestAddress(addr), len }
}

#[test]
fn the_usual_requests() {
    let read = [(HEADER, 16, false), (BUFFER, 4096, true), (STATUS, 1, true)];
    let (parsed, segments) = parse_parts(0, 8, &read);
    let status = GuestAddress(STATUS);
    assert_eq!(parsed, Ok(Parsed { kind: Kind::Read { offset: 4096, len: 4096 }, status }));
    assert_eq!(segments.writable, [segment(BUFFER, 4096)]);

    let write = [(HEADER, 16, false), (BUFFER, 512, false), (STATUS, 1, true)];
    let (parsed, segments) = parse_parts(1, 1, &write);
    assert_eq!(parsed, Ok(Parsed { kind: Kind::Write { offset: 512, len: 512 }, status }));
    assert_eq!(segments.readable, [segment(BUFFER, 512)]);

    let flush = [(HEADER, 16, false), (STATUS, 1, true)];
    assert_eq!(parse_parts(4, 0, &flush).0, Ok(Parsed { kind: Kind::Flush, status }));
    let id = [(HEADER, 16, false), (BUFFER, 20, true), (STATUS, 1, true)];
    assert_eq!(parse_parts(8, 0, &id).0, Ok(Parsed { kind: Kind::GetId, status }));
}

#[test]
fn a_header_and_a_status_may_be_cut_anywhere() {
    // Header in three pieces, the last one sharing its descriptor with data; the status byte is
    // the last one of a read's data descriptor.
    let parts = [(HEADER, 4, false), (HEADER + 4, 7, false), (HEADER + 11, 5 + 512, false)];
    let (parsed, segments) = parse_parts(1, 3, &[&parts[..], &[(STATUS, 1, true)]].concat());
    assert_eq!(parsed.unwrap().kind, Kind::Write { offset: 1536, len: 512 });
    assert_eq!(segments.readable, [segment(HEADER + 16, 512)]);

    let parts = [(HEADER, 16, false), (BUFFER, 100, true), (BUFFER + 100, 413, true)];
    let (parsed, segments) = parse_parts(0, 0, &parts);
    let parsed = parsed.unwrap();
    assert_eq!(parsed.kind, Kind::Read { offset: 0, len: 512 });
    assert_eq!(parsed.status, GuestAddress(BUFFER + 512));
    assert_eq!(segments.writable, [segment(BUFFER, 100), segment(BUFFER + 100, 412)]);
}

#[test]
fn empty_descriptors_are_skipped() {
    let parts = [
        (0, 0, false),
        (HEADER, 16, false),
        (BUFFER, 512, true),
        (u64::MAX, 0, true),
        (STATUS, 1, true),
    ];
    assert_eq!(parse_parts(0, 0, &parts).0.unwrap().kind, Kind::Read { offset: 0, len: 512 });
}

#[test]
fn an_indirect_table_is_as_good_as_a_chain() {
    let mem = memory();
    let mut driver = Driver::new(&mem, 16);
    driver.header(HEADER, 0, 2);
    let mut parts = vec![(HEADER, 16, false)];
    parts.extend((0..40).map(|i| (BUFFER + i * 512, 512, true)));
    parts.push((STATUS, 1, true));
    let head = driver.indirect(DATA + 0x20000, &parts);
    let (parsed, segments) = parse_at(&mut driver, head);
    assert_eq!(parsed.unwrap().kind, Kind::Read { offset: 1024, len: 40 * 512 });
    assert_eq!(segments.writable.len(), 40);
}

#[test]
fn bad_requests_with_a_status_byte_get_an_error() {
    let header = (HEADER, 16, false);
    let status = (STATUS, 1, true);
    let huge = (BUFFER, 512 * 1024, true);
    for (why, kind, sector, parts) in [
        ("short header", 0, 0, vec![(HEADER, 15, false), status]),
        ("no header", 0, 0, vec![status]),
        ("read without room", 0, 0, vec![header, status]),
        ("write without data", 1, 0, vec![header, status]),
        ("read of half a sector", 0, 0, vec![header, (BUFFER, 256, true), status]),
        ("write of half a sector", 1, 0, vec![header, (BUFFER, 256, false), status]),
        ("sector overflow", 0, u64::MAX, vec![header, (BUFFER, 512, true), status]),
        ("end overflow", 0, u64::MAX / 512, vec![header, (BUFFER, 512, true), status]),
        (
            "readable after writable",
            1,
            0,
            vec![header, (BUFFER, 512, true), (BUFFER, 512, false), status],
        ),
        ("data outside memory", 0, 0, vec![header, (MEM as u64 - 1, 512, true), status]),
        (
            "data at the end of the address space",
            1,
            0,
            vec![header, (u64::MAX - 5, 512, false), status],
        ),
        ("header outside memory", 0, 0, vec![(1 << 40, 16, false), (BUFFER, 512, true), status]),
        ("data of 1 GiB", 0, 0, vec![header, (0, 1 << 30, true), status]),
        ("range missing", 11, 0, vec![header, status]),
        ("range too short", 11, 0, vec![header, (BUFFER, 15, false), status]),
        ("two ranges", 13, 0, vec![header, (BUFFER, 32, false), status]),
        ("empty range", 11, 0, vec![header, (BUFFER, 16, false), status]),
    ] {
        assert_eq!(parse_parts(kind, sector, &parts).0, Err(io_error(STATUS)), "{why}");
    }
    // The same memory 65 times is more than a request may be.
    let mem = memory();
    let mut driver = Driver::new(&mem, 16);
    driver.header(HEADER, 0, 0);
    let mut parts = vec![header];
    parts.extend(std::iter::repeat_n(huge, 65));
    parts.push(status);
    let head = driver.indirect(DATA + 0x20000, &parts);
    assert_eq!(parse_at(&mut driver, head).0, Err(io_error(STATUS)));
    parts.remove(1);
    let head = driver.indirect(DATA + 0x20000, &parts);
    let (parsed, _) = parse_at(&mut Driver::new(&mem, 16), head);
    assert_eq!(parsed.unwrap().kind, Kind::Read { offset: 0, len: MAX_REQUEST_BYTES as u32 });
}

#[test]
fn unknown_requests_are_unsupported() {
    for kind in [2, 3, 14, 0x8000_0000, u32::MAX] {
        let parts = [(HEADER, 16, false), (STATUS, 1, true)];
        assert_eq!(parse_parts(kind, 0, &parts).0, Err(unsupported(STATUS)), "{kind}");
    }
}

#[test]
fn without_a_status_byte_there_is_no_answer() {
    for (why, parts) in [
        ("nothing writable", vec![(HEADER, 16, false), (BUFFER, 512, false)]),
        ("empty status", vec![(HEADER, 16, false), (STATUS, 0, true)]),
        ("status outside memory", vec![(HEADER, 16, false), (MEM as u64, 1, true)]),
        ("status wraps around", vec![(HEADER, 16, false), (u64::MAX, 2, true)]),
        ("nothing at all", vec![(HEADER, 0, false)]),
    ] {
        assert_eq!(parse_parts(0, 0, &parts).0, Err(Refusal::NoStatus), "{why}");
    }
}

#[test]
fn discard_and_write_zeroes_take_one_range() {
    let parse_range = |kind, sector: u64, sectors: u32, flags: u32| {
        let mem = memory();
        let mut driver = Driver::new(&mem, 16);
        driver.header(HEADER, kind, 0);
        driver.header(BUFFER, 0, 0);
        driver.put(BUFFER, sector);
        driver.put(BUFFER + 8, sectors);
        driver.put(BUFFER + 12, flags);
        let head = driver.chain(&[(HEADER, 16, false), (BUFFER, 16, false), (STATUS, 1, true)]);
        parse_at(&mut driver, head).0.map(|parsed| parsed.kind)
    };
    assert_eq!(parse_range(11, 8, 16, 0), Ok(Kind::Discard { offset: 4096, len: 8192 }));
    let zeroes = |may_unmap| Ok(Kind::WriteZeroes { offset: 512, len: 512, may_unmap });
    assert_eq!(parse_range(13, 1, 1, 0), zeroes(false));
    assert_eq!(parse_range(13, 1, 1, 1), zeroes(true));
    assert_eq!(parse_range(11, 1, 1, 1), Err(unsupported(STATUS)));
    assert_eq!(parse_range(13, 1, 1, 2), Err(unsupported(STATUS)));
    assert_eq!(parse_range(11, 1, MAX_DISCARD_SECTORS + 1, 0), Err(io_error(STATUS)));
    assert_eq!(parse_range(13, u64::MAX / 512, 1, 0), Err(io_error(STATUS)));
    assert_eq!(parse_range(13, u64::MAX, 1, 0), Err(io_error(STATUS)));
}

#[test]
fn broken_chains_are_told_from_bad_requests() {
    let broken = |make: &dyn Fn(&mut Driver) -> u16| {
        let mem = memory();
        let mut driver = Driver::new(&mem, 16);
        driver.header(HEADER, 0, 0);
        let head = make(&mut driver);
        let result = parse_at(&mut driver, head).0;
        assert!(matches!(result, Err(Refusal::Broken(_))), "{result:?}");
    };
    // A descriptor that follows itself; two that follow each other.
    broken(&|d| {
        d.desc(DESC, 0, HEADER, 16, NEXT, 0);
        0
    });
    broken(&|d| {
        d.desc(DESC, 0, HEADER, 16, NEXT, 1);
        d.desc(DESC, 1, STATUS, 1, NEXT | WRITE, 0);
        0
    });
    // Indices outside the table.
    broken(&|_| 16);
    broken(&|d| {
        d.desc(DESC, 0, HEADER, 16, NEXT, 16);
        0
    });
    // Indirect tables: inside an indirect table, of a crooked length, empty, outside memory.
    broken(&|d| {
        d.desc(DESC, 0, BUFFER, 16, INDIRECT, 0);
        d.desc(BUFFER, 0, BUFFER, 16, INDIRECT, 0);
        0
    });
    for (addr, len) in [(BUFFER, 17), (BUFFER, 0), (1 << 40, 32), (u64::MAX - 8, 32)] {
        broken(&|d| {
            d.desc(DESC, 0, addr, len, INDIRECT, 0);
            0
        });
    }
    // Longer than any guest needs, in bytes and in descriptors.
    broken(&|d| d.chain(&[(HEADER, 16, false), (0, u32::MAX, true), (STATUS, 1, true)]));
    broken(&|d| {
        let parts: Vec<Part> = vec![(BUFFER, 1, true); MAX_DESCRIPTORS + 1];
        d.indirect(DATA + 0x20000, &parts)
    });
}
