"""What `scripts/bench store` runs: the disk store beside fio, on the same file system, in turns.

Every round runs fio and the store one after the other, so that a slow minute of the machine hits both; medians over
the rounds are compared, and the smallest and the largest figure of a round are shown as the spread. The store's side
of each case is the example store_bench of the crate sheepdog-store (its --help describes the loads).

cases:
  write       4 KiB random writes, no flush: the store with 32 writers on one and on two threads (calls are synchronous,
              so that depth 32 means 32 independent writers), fio with 32 buffered writes in flight; the best of each
  read        cached 4 KiB random reads on one thread
  flush       4 KiB write + flush: the store and pwrite + fdatasync in turns inside one process, fio between these
              processes; then 16 writers
  sequential  1 MiB writes one after the other, first to a new file or volume, then over it
  snapshot    the first write to an object's new layer beside any other write
  open        opening a store of many slabs, its files in the page cache and not
  memory      resident memory of full slabs (zeroes stored as data; their space is punched away while the store runs)

CPU figures hold all threads of the store's process and everything until it is closed, thus with the log applied.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from bench import first_line

MIB = 1 << 20
MARKERS = ("<!-- bench-store:begin -->", "<!-- bench-store:end -->")
BUSY = " (**other work was running**: rates and times, and ratios of them, say little; CPU and memory figures hold)"
# Options::sums_cache_bytes as it is by default.
SUMS_CACHE = 32 << 20
SLABS_PER_TB = 10**12 / (4 * MIB)
FIO_ENGINES = ["libaio", "io_uring"]

# What --profile runs, after `prepare`; a second list runs before it, unprofiled.
PROFILES = {
    "write": (["write", "--seconds", 4], []),
    "read": (["read", "--seconds", 4], []),
    "first-write": (["fill", "--volume", 2], []),
    "overwrite": (["fill"], []),
    "flush": (["flush", "--seconds", 1], []),
    "snapshot": (["snapshot", "--rounds", 16], ["snapshot", "--rounds", 1]),
    "open": (["open"], ["slabs", "--volume", 3, "--slabs", 50_000]),
    "new-slabs": (["slabs", "--volume", 4, "--slabs", 50_000], []),
}


def options():
    parser = argparse.ArgumentParser(
        prog="scripts/bench store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=pathlib.Path, action="append",
                        help="measure everything in this directory (again: also in that one); default: flushes in the "
                             "build's target directory, CPU and memory on /dev/shm, the rest on both")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case (again: also that one)")
    parser.add_argument("--quick", action="store_true", help="one short round of everything; no figures worth keeping")
    parser.add_argument("--rounds", type=int, help="rounds of each case (default 3)")
    parser.add_argument("--seconds", type=float, help="length of one timed run (default 1)")
    parser.add_argument("--mib", type=int, help="size of the volume and of fio's file (default 1024)")
    parser.add_argument("--slabs", type=int, help="slabs of the case open (default 100000, and a fifth of that on the disk unless --dir is given; 1000000 need 14 GB)")
    parser.add_argument("--full-slabs", type=int, help="full slabs of the case memory (default 1000)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON; - for standard output instead of the table")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--profile", choices=list(PROFILES), metavar="LOAD",
                        help=f"measure nothing; show where the time of one load goes (perf, else callgrind): {', '.join(PROFILES)}")
    parser.add_argument("--root", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    o = parser.parse_args()
    for name, default, quick in [("rounds", 3, 1), ("seconds", 1, 0.3), ("mib", 1024, 256), ("slabs", 100_000, 5_000), ("full_slabs", 1000, 100)]:
        given = getattr(o, name)
        if given is not None and given <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
        setattr(o, name, (quick if o.quick else default) if given is None else given)
    # Whole 4 MiB objects, and enough of them for 32 writers.
    o.mib = max(128, o.mib // 4 * 4)
    o.objects = o.mib // 4
    # Both are built in two halves.
    o.full_slabs = max(2, o.full_slabs // 2 * 2)
    o.slabs = max(64, o.slabs // 2 * 2)
    return o


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout[done.stdout.index("{") :])


class Place:
    """A directory on the file system to measure: a store and fio's file in it, both written in full when first used."""

    def __init__(self, o, name, parent):
        self.o, self.name, self.binary = o, name, o.binary
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="sd-bench-store-", dir=parent))
        self.file = self.dir / "fio"
        self.prepared = False

    def store(self, case, *arguments, at="store"):
        return run([self.binary, case, "--dir", self.dir / at, *arguments])

    def prepare(self):
        if self.prepared:
            return
        self.prepared = True
        self.load("fill")
        # Once round the log, so that its segments are no longer fresh on the file system.
        self.load("write", "--ops", 50_000)
        self.fio("write", "1m", "psync", "--end_fsync=1")

    def load(self, case, *arguments):
        return self.store(case, "--objects", self.o.objects, *arguments)

    def fio(self, rw, bs, engine, *arguments, depth=1, name=None, mib=None):
        """One run of fio; then what it wrote goes to the disk, which is timed as settle_seconds."""
        path = self.dir / (name or "fio")
        result = run(
            ["fio", "--name=bench", f"--filename={path}", f"--size={mib or self.o.mib}M", f"--rw={rw}", f"--bs={bs}"]
            + [f"--ioengine={engine}", f"--iodepth={depth}", "--norandommap", "--randrepeat=0", "--gtod_reduce=1"]
            + ["--invalidate=0", "--fallocate=none", "--output-format=json", *arguments]
        )
        started = time.monotonic()
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        settle = time.monotonic() - started
        job = result["jobs"][0]
        side = job["read" if "read" in rw else "write"]
        runtime_us = side["runtime"] * 1000
        return {
            "iops": side["iops"],
            "mib_per_second": side["bw_bytes"] / MIB,
            "cpu_us": (job["usr_cpu"] + job["sys_cpu"]) / 100 * runtime_us / max(side["total_ios"], 1),
            "flushed_seconds": runtime_us / 1e6 + settle,
        }

    def timed(self):
        return ["--time_based", f"--runtime={max(1, round(self.o.seconds))}"]

    def warm_memory(self, mib):
        """Leaves pages free that the machine's host has given to it: in a virtual machine that returns free memory, a
        page is many times as slow at its first use, and whoever runs right after a deletion would be spared that."""
        path, chunk = self.dir / "ballast", bytes(MIB)
        with open(path, "wb", buffering=0) as f:
            for _ in range(mib + 256):
                f.write(chunk)
        path.unlink()

    def remove(self):
        shutil.rmtree(self.dir, ignore_errors=True)


class Row:
    """One line of the table: samples of the store, of what it is compared with, and the goal."""

    def __init__(self, what, place, unit, store, base=None, base_name="fio", goal=None, note=""):
        self.what, self.place, self.unit, self.note = what, place.name, unit, note
        self.store, self.base, self.base_name, self.goal = store, base, base_name, goal

    def figures(self):
        """The figure that counts and its spread: a ratio if there is something to compare with."""
        if self.base is None:
            return statistics.median(self.store), min(self.store), max(self.store)
        ratios = [s / b for s, b in zip(self.store, self.base)]
        return statistics.median(self.store) / statistics.median(self.base), min(ratios), max(ratios)

    def verdict(self):
        if self.goal is None:
            return ""
        sign, limit = self.goal
        value = self.figures()[0]
        return "met" if (value >= limit if sign == ">=" else value <= limit) else "missed"

    def json(self):
        value, low, high = self.figures()
        return {
            "what": self.what, "on": self.place, "unit": self.unit, "store": self.store, "base": self.base,
            "base_name": self.base_name if self.base else None, "figure": value, "lowest": low, "highest": high,
            "goal": f"{self.goal[0]} {self.goal[1]:g}" if self.goal else None, "verdict": self.verdict() or None,
            "note": self.note,
        }

    def cells(self):
        value, low, high = self.figures()
        goal = f"{'≥' if self.goal[0] == '>=' else '≤'} {self.goal[1]:g}" if self.goal else ""
        base = f"{number(statistics.median(self.base))} ({self.base_name})" if self.base else ""
        verdict = {"missed": "**missed**"}.get(self.verdict(), self.verdict())
        unit = f"{number(statistics.median(self.store))} {self.unit}"
        return [self.what, self.place, unit, base, f"{number(value)} ({number(low)}–{number(high)})", goal, verdict, self.note]


def number(x):
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def column(runs, key):
    return [r[key] for r in runs]


def best(candidates, key):
    """Name and runs of the candidate whose median is the highest."""
    return max(candidates.items(), key=lambda item: statistics.median(column(item[1], key)))


def case_write(o, place, cpu_goals):
    place.prepare()
    fio, store = {}, {"1 thread": [], "2 threads": []}
    for _ in range(o.rounds):
        for engine in FIO_ENGINES:
            fio.setdefault(engine, []).append(place.fio("randwrite", "4k", engine, *place.timed(), depth=32))
        for n, runs in enumerate(store.values(), 1):
            runs.append(place.load("write", "--threads", n, "--seconds", o.seconds))
    engine, base = best(fio, "iops")
    threads, runs = best(store, "iops")
    yield Row("4 KiB random write, depth 32, no flush", place, "IOPS", column(runs, "iops"), column(base, "iops"),
              f"fio {engine}", (">=", 0.8), f"store: {threads}")
    yield Row("CPU of a 4 KiB write", place, "µs", column(store["1 thread"], "cpu_us"),
              goal=("<=", 15) if cpu_goals else None, note=f"caller alone {number(statistics.median(column(store['1 thread'], 'callers_cpu_us')))} µs")


def case_read(o, place, cpu_goals):
    place.prepare()
    place.load("read", "--seconds", o.seconds)
    fio, store = [], []
    for _ in range(o.rounds):
        fio.append(place.fio("randread", "4k", "psync", *place.timed()))
        store.append(place.load("read", "--seconds", o.seconds))
    yield Row("4 KiB random read, cached", place, "IOPS", column(store, "iops"), column(fio, "iops"), "fio psync", (">=", 0.9))
    yield Row("CPU of a cached 4 KiB read", place, "µs", column(store, "cpu_us"), goal=("<=", 6) if cpu_goals else None,
              note=f"fio {number(statistics.median(column(fio, 'cpu_us')))} µs")


def case_flush(o, place, _):
    place.prepare()
    place.fio("write", "1m", "psync", "--end_fsync=1", name="fio-flush", mib=64)
    fio, store = [], []
    for _ in range(o.rounds):
        fio.append(place.fio("write", "4k", "psync", "--fdatasync=1", *place.timed(), name="fio-flush", mib=64))
        store.append(place.load("flush", "--seconds", max(0.1, o.seconds / 3)))
    one, raw, many = ([x for r in store for x in r[key]] for key in ("one_us", "raw_us", "many_per_second"))
    yield Row("4 KiB write + flush, one writer", place, "µs", one, raw, "pwrite + fdatasync", ("<=", 1.2))
    yield Row("the same beside fio", place, "µs", [statistics.median(r["one_us"]) for r in store],
              [1e6 / r["iops"] for r in fio], "fio fdatasync=1", ("<=", 1.2))
    yield Row("4 KiB write + flush, 16 writers", place, "per s", many, [1e6 / us for us in one], "one writer", (">=", 6))


def case_sequential(o, place, _):
    place.prepare()
    kinds = {"first write": [], "overwrite": []}
    mib = o.mib // 8 * 4
    for n in range(o.rounds):
        (place.dir / "fio-first").unlink(missing_ok=True)
        # Deletes the volume of the round before, writes nothing.
        place.store("fill", "--objects", 0, "--delete", 9 + n)
        for kind, pairs in kinds.items():
            place.warm_memory(mib)
            fio = place.fio("write", "1m", "psync", name="fio-first", mib=mib)
            place.warm_memory(mib)
            pairs.append((fio, place.store("fill", "--objects", mib // 4, "--volume", 10 + n)))
    for (kind, pairs), goal in zip(kinds.items(), (0.85, 0.45)):
        fio, store = zip(*pairs)
        cpu = [number(statistics.median(column(runs, "cpu_us"))) for runs in (store, fio)]
        yield Row(f"1 MiB sequential {kind}", place, "MiB/s", column(store, "mib_per_second"), column(fio, "mib_per_second"),
                  "fio psync", (">=", goal), f"CPU {cpu[0]} µs per MiB, fio {cpu[1]}")
        flushed = lambda runs: [mib / s for s in column(runs, "flushed_seconds")]
        yield Row(f"1 MiB sequential {kind}, flushed at the end", place, "MiB/s", flushed(store), flushed(fio), "fio + fsync")


def case_snapshot(o, place, _):
    r = place.store("snapshot", "--rounds", 2 if o.quick else 4 * o.rounds, at="snapshot")
    shutil.rmtree(place.dir / "snapshot")
    yield Row("first write after a snapshot: time", place, "µs", r["first_us"], r["other_us"], "other write", ("<=", 1.1))
    yield Row("first write after a snapshot: CPU, applied", place, "µs", r["first_cpu_us"], r["other_cpu_us"], "other write", ("<=", 1.1))


def case_open(o, place, _):
    on_disk = file_system(place.dir) != "tmpfs"
    # A disk takes long to make many sparse slabs. Two sizes, so that what does not grow with them (the log) is not
    # multiplied.
    slabs_here = max(64, o.slabs // 10 * 2) if on_disk and not o.dir else o.slabs
    half = slabs_here // 2
    kinds = {"cached": [], "not cached": []}
    for slabs in (half, slabs_here):
        place.store("slabs", "--from", slabs - half, "--slabs", slabs, at="many")
        for kind, sizes in kinds.items():
            if kind == "cached" or on_disk:
                sizes.append([place.store("open", "--cold", int(kind == "not cached"), at="many") for _ in range(o.rounds)])
    spread_write = place.store("write", "--objects", slabs_here, "--seconds", 3 * o.seconds, at="many")
    shutil.rmtree(place.dir / "many")
    if not on_disk:
        del kinds["not cached"]
    for kind, (smaller, larger) in kinds.items():
        seconds = column(larger, "seconds")
        note = ""
        if slabs_here != 1_000_000:
            note = f"extrapolated from {number(statistics.median(seconds))} s for {slabs_here} slabs and {number(statistics.median(column(smaller, 'seconds')))} s for {half}"
            grown = [max(0, b - a) / half for a, b in zip(column(smaller, "seconds"), seconds)]
            seconds = [s + g * (1_000_000 - slabs_here) for s, g in zip(seconds, grown)]
        yield Row(f"opening 1,000,000 slabs, files {kind}", place, "s", seconds, goal=("<=", 2), note=note)
    yield Row("memory of a slab with one block", place, "bytes", [r["opened_bytes"] / slabs_here for r in kinds["cached"][1]])
    yield Row(f"CPU of a 4 KiB write, spread over {slabs_here} slabs", place, "µs", [spread_write["cpu_us"]])


def case_memory(o, place, _):
    sizes = []
    half = o.full_slabs // 2
    for slabs in (half, o.full_slabs):
        place.store("full", "--from", slabs - half, "--objects", slabs, at="full")
        opened = [place.store("open", "--touch", slabs, at="full") for _ in range(o.rounds)]
        sizes.append(column(opened, "opened_bytes"))
    shutil.rmtree(place.dir / "full")
    # What does not grow with the slabs counts once, what does for each of them.
    per_slab = [max(0, b - a) / half for a, b in zip(*sizes)]
    # Nothing was read yet: the cache of checksum tables comes on top, in full.
    per_tb = [(max(0, a - s * half) + s * SLABS_PER_TB + SUMS_CACHE) / 1e6 for a, s in zip(sizes[0], per_slab)]
    yield Row("memory for 1 TB stored", place, "MB", per_tb, goal=("<=", 120),
              note=f"{number(statistics.median(per_slab))} bytes for each slab, from {half} and {o.full_slabs} full slabs, and 34 MB for the cache of checksum tables")


# The function and whether the case runs on the disk and on /dev/shm by default.
CASES = {
    "write": (case_write, True, True),
    "read": (case_read, True, True),
    "flush": (case_flush, True, False),
    "sequential": (case_sequential, True, True),
    "snapshot": (case_snapshot, False, True),
    "open": (case_open, True, True),
    "memory": (case_memory, False, True),
}


def file_system(path):
    return first_line("stat", "-f", "-c", "%T", str(path))


def available(name):
    """Bytes of memory by its name in /proc/meminfo."""
    return int(re.search(rf"{name}:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text()).group(1)) << 10


def check_space(o, name, parent, cases):
    """Refuses a run that would fill the file system or the memory."""
    need = {"write": 0, "read": 0, "flush": 0, "sequential": 2 * o.mib * MIB, "snapshot": 1600 * MIB}
    need |= {"open": o.slabs * 14_500, "memory": 700 * MIB + o.full_slabs * 16_384}
    wanted = 2 * o.mib * MIB + 256 * MIB + max(need[c] for c in cases)
    free = shutil.disk_usage(parent).free
    if file_system(parent) == "tmpfs":
        free = min(free, available("MemAvailable") - 512 * MIB - (o.slabs * 6_000 if "open" in cases else 0))
    if free < wanted:
        raise SystemExit(f"error: {parent} ({name}) has room for {free // MIB} MiB, but {wanted // MIB} MiB are needed; "
                         "use --dir, or smaller --mib, --slabs, --full-slabs")


def table(rows):
    out = ["| measured | on | store | beside | figure that counts (spread) | goal | | |", "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |"]
    return out + ["| " + " | ".join(row.cells()) + " |" for row in rows]


def machine(o, parents, load):
    model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    systems = ", ".join(f"{name}: {file_system(parent)}" for name, parent in parents.items())
    commit = first_line("git", "-C", str(o.root), "rev-parse", "--short", "HEAD")
    hidden = ("--root", "--target", "--write", str(o.root), str(o.target))
    command = "scripts/bench store" + "".join(f" {a}" for a in sys.argv[1:] if a not in hidden)
    return [
        f"{os.cpu_count()} CPUs ({model.group(1) if model else platform.machine()}), {available('MemTotal') >> 30} GiB of memory, "
        f"Linux {platform.release()}; {systems}; {first_line('fio', '--version')}; commit {commit}, {datetime.date.today()}; "
        f"load average before the run {load:.1f}{BUSY if load > 1 else ''}.",
        "",
        f"Command: `{command}`. Medians of {o.rounds} round{'s' * (o.rounds > 1)} of fio and store in turns; rates over {o.seconds:g} s with {o.mib} MiB, "
        "written before. With something beside it, the figure that counts is the ratio, store to the other.",
        "",
    ]


def report(o, lines, rows, markers, title):
    """Prints the results, and writes them where the options say so; lines is the table with its head."""
    if o.json:
        text = json.dumps({"machine": lines[0], "command": lines[2], "rows": [row.json() for row in rows]}, indent=1)
        if o.json == "-":
            print(text)
        else:
            pathlib.Path(o.json).write_text(text + "\n")
    if o.json != "-":
        print("\n".join(lines))
    if o.write:
        write_document(o.root / "docs/performance.md", lines, markers, title)


def write_document(path, lines, markers, title):
    """Puts the lines between the markers, which are added under the title if they are not there."""
    begin, end = markers
    text = path.read_text() if path.exists() else "# Performance\n"
    if begin not in text or end not in text:
        text += f"\n## {title}\n\n{begin}\n{end}\n"
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    path.write_text(f"{head}{begin}\n" + "\n".join(lines) + f"\n{end}{tail}")


def profile(o, place):
    """Shows where the time of one load goes, by thread and function."""
    load, before = PROFILES[o.profile]
    place.prepare()
    at = "snapshot" if load[0] == "snapshot" else "store"
    sized = lambda words: words if words[0] in ("snapshot", "open", "slabs") else [*words, "--objects", o.objects]
    if before:
        place.store(*before, at=at)
    case, *arguments = sized(load)
    command = [place.binary, case, "--dir", place.dir / at, *arguments]
    record = place.dir / "perf.data"
    if shutil.which("perf"):
        done = subprocess.run(
            ["perf", "record", "-q", "-e", "cpu-clock", "-F", "2999", "-g", "-o", record, "--", *map(str, command)],
            capture_output=True, text=True,
        )
        print(done.stdout, end="")
        if done.returncode == 0:
            show = ["perf", "report", "-i", record, "--stdio", "-q", "-g", "none", "--percent-limit", "0.7"]
            for title, more in (("by thread", ["--no-children", "--sort", "comm"]),
                                ("by function", ["--no-children", "--sort", "comm,sym"]),
                                ("with what they call", ["--children", "--sort", "comm,sym", "--percent-limit", "4"])):
                print(f"\n{o.profile}, {title}:")
                subprocess.run([*map(str, show), *more], stderr=subprocess.DEVNULL, check=True)
            return
        print(f"perf does not work here: {done.stderr.strip()}", file=sys.stderr)
    if not shutil.which("valgrind"):
        raise SystemExit("error: --profile needs perf (Debian: linux-perf) or valgrind")
    out = place.dir / "callgrind.out"
    if case in ("write", "read"):
        command += ["--ops", 20_000]
    subprocess.run(["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}", *map(str, command)], check=True)
    subprocess.run(["callgrind_annotate", out], check=True)


def measure(o, parents):
    """Runs the cases everywhere they belong; gives the rows in the order of the cases."""
    names = [c for c in CASES if o.case is None or c in o.case]
    rows = {c: [] for c in names}
    for name, parent in parents.items():
        column_of = {"disk": 1, "/dev/shm": 2}
        cases = [c for c in names if o.dir or CASES[c][column_of[name]]]
        if not cases:
            continue
        check_space(o, name, parent, cases)
        place = Place(o, name, parent)
        try:
            for case in cases:
                started = time.monotonic()
                for row in CASES[case][0](o, place, bool(o.dir) or name == "/dev/shm"):
                    rows[case].append(row)
                    print("; ".join(cell for cell in row.cells() if cell), file=sys.stderr)
                print(f"({case} on {name}: {time.monotonic() - started:.0f} s)", file=sys.stderr)
        finally:
            place.remove()
    return [row for case in names for row in rows[case]]


def main():
    o = options()
    o.binary = pathlib.Path(os.environ.get("SHEEPDOG_BIN_DIR") or o.target / "release/examples") / "store_bench"
    if not o.binary.exists():
        raise SystemExit(f"error: no {o.binary}; build it: cargo build --release -p sheepdog-store --example store_bench")
    parents = {str(d): d for d in o.dir} if o.dir else {"disk": o.target, "/dev/shm": pathlib.Path("/dev/shm")}
    for parent in parents.values():
        if not parent.is_dir():
            raise SystemExit(f"error: {parent} is not a directory")
    if o.profile:
        place = Place(o, *(list(parents.items())[-1]))
        try:
            profile(o, place)
        finally:
            place.remove()
        return
    load = os.getloadavg()[0]
    if load > 1:
        print(f"warning: the load average is {load:.1f}: other work is running, ratios of rates will say little", file=sys.stderr)
    rows = measure(o, parents)
    lines = machine(o, parents, load) + table(rows)
    report(o, lines, rows, MARKERS, "The disk store")


if __name__ == "__main__":
    # Ctrl-C and SIGTERM both run the clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
