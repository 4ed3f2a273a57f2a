"""What `scripts/bench recovery` runs: how a cluster behaves when a node dies, comes back, and recovers.

All nodes are processes of this machine on 127.0.0.x. Clients use NBD.

cases:
  stall    the process of a follower, then of the leader of the cluster log, is killed (SIGKILL) while a client writes
           4 KiB blocks one after the other: the longest time that one of its writes took, beside the longest in
           as much time without a kill
  changed  a node is away while 1 % of the data is written, in 4 KiB blocks at random places, no block twice: what its
           recovery moves, by the bytes that were written. Two nodes hold two copies, a third one only votes
  latency  a node with a copy of everything comes back after all of a large volume was overwritten: the latency of
           4 KiB random writes to another volume while recovery runs, by the latency while it is paused, in turns.
           The client's node is one that only gives data, then the one that recovers. Also the speed of the recovery
           with and without clients, and under recovery.max-bandwidth
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

from bench import first_line, free_port, run_client, wait_for
from bench_store import report

MIB = 1 << 20
BLOCK = 4096
MARKERS = ("<!-- bench-recovery:begin -->", "<!-- bench-recovery:end -->")
DEPTHS = [1, 16]
# Nodes of the case latency: clients write at either.
GIVES, RECOVERS = 0, 2


def options():
    parser = argparse.ArgumentParser(
        prog="scripts/bench recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case (again: also that one)")
    parser.add_argument("--quick", action="store_true", help="small and once; no figures worth keeping")
    parser.add_argument("--rounds", type=int, help="rounds of stall and latency (default 3)")
    parser.add_argument("--seconds", type=float, help="length of one run of fio (default 2)")
    parser.add_argument("--changed-mib", type=int, help="data of the case changed, which takes twice that (default 10240)")
    parser.add_argument("--latency-mib", type=int, help="data of the case latency, which takes three times that (default 3072)")
    parser.add_argument("--changed-dir", type=pathlib.Path, help="where the case changed has its nodes (default: the build's target directory)")
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("/dev/shm"), help="where the others have theirs (default /dev/shm)")
    parser.add_argument("--seed", type=int, help="of the random places")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON; - for standard output instead of the table")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--root", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    o = parser.parse_args()
    defaults = [("rounds", 3, 1), ("seconds", 2, 1), ("changed_mib", 10240, 256), ("latency_mib", 3072, 1024)]
    for name, default, quick in defaults:
        given = getattr(o, name)
        if given is not None and given <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
        setattr(o, name, (quick if o.quick else default) if given is None else given)
    o.changed_dir = o.changed_dir or o.target
    o.seed = random.randrange(1 << 32) if o.seed is None else o.seed
    return o


class Cluster:
    """Nodes of one cluster. `witnesses` more of them have no disk."""

    def __init__(self, o, directory, nodes, witnesses=0):
        self.binaries, self.dir = o.binaries, directory
        self.nodes = [f"127.0.0.{i + 1}:{free_port()}" for i in range(nodes + witnesses)]
        self.diskless = set(range(nodes, nodes + witnesses))
        self.processes = {}
        for index in range(len(self.nodes)):
            self.start(index)
            wait_for(f"node {index}", lambda: self.up() == index + 1)
        self.wait_healthy()

    def start(self, index):
        command = [self.binaries / "sheep", "--dir", self.dir / f"node{index}", "--listen", self.nodes[index]]
        if not (self.dir / f"node{index}").exists():
            command += ["--join", self.nodes[0]] if index else []
            command += ["--no-disk"] if index in self.diskless else []
        with open(self.dir / f"node{index}.log", "ab") as log:
            # Its own session: with autogroup scheduling, a node must not share its time slices with the client.
            self.processes[index] = subprocess.Popen(
                [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, index):
        process = self.processes.pop(index)
        process.kill()
        process.wait()

    def stop(self):
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def dog(self, *arguments, at=0):
        """The answer; None when there is none."""
        for index, process in self.processes.items():
            if process.poll() is not None:
                raise SystemExit(f"error: node {index} ended with {process.returncode}; see {self.dir}/node{index}.log")
        command = [self.binaries / "dog", "--node", self.nodes[at], "--json", *arguments]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=90)
        self.complaint = done.stderr
        return json.loads(done.stdout or "{}") if done.returncode == 0 else None

    def must(self, *arguments, at=0):
        answer = self.dog(*arguments, at=at)
        if answer is None:
            raise SystemExit(f"error: dog {' '.join(arguments)}: {self.complaint}")
        return answer

    def up(self):
        return sum(n["state"] == "up" for n in self.dog("node", "list") or [])

    def state_of(self, index, at):
        return next((n["state"] for n in self.dog("node", "list", at=at) or [] if n["address"] == self.nodes[index]), None)

    def wait_healthy(self, at=0):
        wait_for("a healthy cluster", lambda: (self.dog("cluster", "health", at=at) or {}).get("status") == "ok", 600)

    def leader(self, at=0):
        return self.nodes.index(self.must("cluster", "info", at=at)["leader"])

    def volume(self, name, mib, copies, at):
        minimum = ["--min-copies", "1"] if copies == 2 else []
        self.must("volume", "create", name, f"{mib}M", "--copies", str(copies), *minimum, at=at)
        return self.export(name, at)

    def export(self, name, at):
        path = self.dir / f"{name}-{at}.sock"
        self.must("export", "add", name, "--nbd", str(path), at=at)
        wait_for(f"the export of {name}", path.exists)
        return name, path

    def recovery(self, index, at=0):
        """State of the disk of that node, and bytes moved."""
        answer = self.dog("node", "recovery", at=at)
        for node in (answer or {}).get("nodes", []):
            if node["address"] == self.nodes[index] and node["disks"]:
                return node["disks"][0]["state"], node["disks"][0]["bytes_moved"]
        return "unknown", 0


class Moved:
    """Bytes that the recovery of a node's disk has moved since this was made; its own count begins anew with each pass."""

    def __init__(self, cluster, index):
        self.cluster, self.index, self.bytes = cluster, index, 0
        self.state, self.last = cluster.recovery(index)

    def look(self):
        self.state, now = self.cluster.recovery(self.index)
        if self.state != "unknown":
            self.bytes += now - self.last if now >= self.last else now
            self.last = now
        return self.bytes


class Nbd:
    """A client for writes."""

    def __init__(self, export):
        name, path = export
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        self.socket.connect(str(path))
        self.receive(18)
        # Fixed newstyle without padding; NBD_OPT_EXPORT_NAME.
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name.encode())
        self.size = struct.unpack(">QH", self.receive(10))[0]

    def receive(self, count):
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise SystemExit("error: the server closed the NBD connection")
            data += more
        return data

    def request(self, kind, places, data):
        head = lambda place: struct.pack(">IHHQQI", 0x25609513, 0, kind, 0, place, len(data))
        self.socket.sendall(b"".join(head(place) + data for place in places))
        for _ in places:
            magic, error, _ = struct.unpack(">IIQ", self.receive(16))
            if magic != 0x67446698 or error != 0:
                raise SystemExit(f"error: an NBD request failed with {error}")

    def write(self, places, data):
        self.request(1, places, data)

    def flush(self):
        self.request(3, [0], b"")

    def close(self):
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0))
        self.socket.close()


class Writer(threading.Thread):
    """Writes a block after the other and remembers the longest time that one took."""

    def __init__(self, export, seed):
        super().__init__(daemon=True)
        self.nbd, self.random = Nbd(export), random.Random(seed)
        self.longest, self.count, self.stopped = 0.0, 0, False
        self.start()

    def run(self):
        while not self.stopped:
            place = self.random.randrange(self.nbd.size // BLOCK) * BLOCK
            begin = time.monotonic()
            self.nbd.write([place], self.random.randbytes(BLOCK))
            self.longest = max(self.longest, time.monotonic() - begin)
            self.count += 1
            # A client that is always busy would starve the cluster on a machine with few cores.
            time.sleep(0.001)
        self.nbd.flush()
        self.nbd.close()

    def wait_for_more(self, count):
        goal = self.count + count
        wait_for("writes", lambda: self.count >= goal or not self.is_alive())
        if not self.is_alive():
            raise SystemExit("error: the writer gave up")

    def take_longest(self):
        longest, self.longest = self.longest, 0.0
        return longest

    def stop(self):
        self.stopped = True
        self.join()


class Row:
    """A figure, in the case of a goal the one that counts."""

    def __init__(self, what, figures, goal=None, unit="", note=""):
        self.what, self.goal, self.unit, self.note = what, goal, unit, note
        self.figures = figures
        self.figure = statistics.median(figures)

    def number(self, value):
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
        return f"{value:.{digits}f}"

    def cells(self):
        spread = f" ({self.number(min(self.figures))}–{self.number(max(self.figures))})" if len(self.figures) > 1 else ""
        unit = f" {self.unit}" if self.unit else ""
        goal = "" if self.goal is None else f"≤ {self.goal:g}{unit}"
        verdict = "" if self.goal is None else "met" if self.figure <= self.goal else "**missed**"
        return [self.what, f"{self.number(self.figure)}{unit}{spread}", goal, verdict, self.note]

    def json(self):
        return {"what": self.what, "unit": self.unit, "figure": self.figure, "rounds": self.figures, "goal": self.goal,
                "note": self.note}


def fill(export, mib):
    """Writes all of the volume, every time other bytes: a recovery does not move blocks that are equal."""
    name, path = export
    run_client(
        ["fio", "--name=fill", "--ioengine=nbd", f"--uri=nbd+unix:///{name}?socket={path}", "--rw=write", "--bs=1m", "--iodepth=4",
         "--thread", f"--size={mib}M", "--end_fsync=1", "--refill_buffers", f"--randseed={random.randrange(1 << 31)}",
         "--output-format=json"],
        seconds=1800,
    )


def random_writes(export, mib, depth, seconds):
    """Mean and 99th percentile of the latency, in µs."""
    name, path = export
    result = run_client(
        ["fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///{name}?socket={path}", "--rw=randwrite", "--bs=4k",
         f"--iodepth={depth}", "--thread", f"--size={mib}M", f"--runtime={seconds}", "--time_based", "--lat_percentiles=1",
         "--randrepeat=0", "--output-format=json"]
    )
    latency = result["jobs"][0]["write"]["lat_ns"]
    return {"mean": latency["mean"] / 1000, "p99": latency["percentile"]["99.000000"] / 1000}


def stall(o, directory):
    """The longest write around the death of a process."""
    cluster = Cluster(o, directory, 4)
    longest = {"a follower": [], "the leader of the log": [], "nobody": []}
    try:
        for n in range(o.rounds):
            leader = cluster.leader()
            gateway = (leader + 1) % 4
            export = cluster.volume(f"stall{n}", 64, 3, gateway)
            fill(export, 64)
            writer = Writer(export, o.seed + n)
            for what, victim in [("a follower", (leader + 2) % 4), ("the leader of the log", leader)]:
                writer.wait_for_more(500)
                writer.take_longest()
                begin = time.monotonic()
                cluster.kill(victim)
                wait_for("the node to be down", lambda: cluster.state_of(victim, gateway) == "down")
                writer.wait_for_more(500)
                took = time.monotonic() - begin
                longest[what].append(writer.take_longest() * 1000)
                cluster.start(victim)
                cluster.wait_healthy(gateway)
                writer.wait_for_more(100)
                writer.take_longest()
                time.sleep(took)
                longest["nobody"].append(writer.take_longest() * 1000)
            writer.stop()
            cluster.must("export", "remove", export[0], at=gateway)
    finally:
        cluster.stop()
    goals = {"nobody": None}
    return [
        Row(f"longest 4 KiB write when the process of {who} is killed" if who != "nobody" else "the same, nobody killed",
            list_, goals.get(who, 300), "ms", "" if who == "nobody" else f"longest of all {max(list_):.0f} ms")
        for who, list_ in longest.items()
    ]


def changed(o, directory):
    """What the recovery of a node moves that was away for a moment."""
    cluster = Cluster(o, directory, 2, witnesses=1)
    try:
        export = cluster.volume("data", o.changed_mib, 2, 0)
        fill(export, o.changed_mib)
        blocks = o.changed_mib * MIB // BLOCK
        places = random.Random(o.seed).sample(range(blocks), blocks // 100)
        cluster.kill(1)
        wait_for("the node to be down", lambda: cluster.state_of(1, 0) == "down")
        client = Nbd(export)
        for first in range(0, len(places), 32):
            client.write([place * BLOCK for place in places[first : first + 32]], os.urandom(BLOCK))
        client.flush()
        client.close()
        cluster.start(1)
        begin = time.monotonic()
        wait_for("the node to be up", lambda: cluster.state_of(1, 0) == "up", 600)
        moved = Moved(cluster, 1)
        moved.bytes = moved.last
        healthy = lambda: (cluster.dog("cluster", "health") or {}).get("status") == "ok"
        wait_for("the recovery", lambda: (moved.look() or True) and healthy() and moved.state == "idle", 600)
        took = time.monotonic() - begin
        moved.look()
    finally:
        cluster.stop()
    return [
        Row("bytes moved by the recovery of a node that was away, by bytes changed meanwhile",
            [moved.bytes / (len(places) * BLOCK)], 1.2, "",
            f"{len(places)} blocks of 4 KiB of {o.changed_mib} MiB, {moved.bytes} bytes moved; {took:.1f} s from its start to its recovery"),
    ]


class Latencies:
    """The case latency: one cluster, one node of which is away now and then."""

    def __init__(self, o, directory):
        self.o = o
        self.ratios = {}
        self.speeds = {"with": [], "without": [], "limited": []}
        self.limit = 16
        self.cluster = Cluster(o, directory, 3)

    def measure(self):
        o, cluster = self.o, self.cluster
        self.data = cluster.volume("data", o.latency_mib, 3, GIVES)
        fill(self.data, o.latency_mib)
        small = 128
        volumes = {GIVES: "at a node that gives data", RECOVERS: "at the node that recovers"}
        exports = {at: cluster.volume(f"client{at}", small, 3, at) for at in volumes}
        for export in exports.values():
            fill(export, small)
        for _ in range(o.rounds):
            self.come_back()
            for at, where in volumes.items():
                for depth in DEPTHS:
                    for _ in range(3):
                        wait_for("the export", lambda: self.serves(at))
                        # Not part of the figures: the first use of each object after the change.
                        random_writes(exports[at], small, 16, 1)
                        if self.compare(exports[at], small, depth, where):
                            break
                        print("the recovery was over before it was measured: once more", file=sys.stderr)
                        self.come_back()
                    else:
                        raise SystemExit("error: each recovery is over before it is measured; give more --latency-mib or fewer --seconds")
            self.without_clients()
            self.cluster.wait_healthy()

    def serves(self, at):
        return any(e["state"] == "serving" for e in self.cluster.dog("export", "list", at=at) or [])

    def come_back(self):
        """The node is away while everything is overwritten, and begins to recover, paused."""
        cluster = self.cluster
        cluster.kill(RECOVERS)
        wait_for("the node to be down", lambda: cluster.state_of(RECOVERS, GIVES) == "down")
        fill(self.data, self.o.latency_mib)
        cluster.must("node", "recovery", "pause")
        cluster.start(RECOVERS)
        wait_for("the node to be up", lambda: cluster.state_of(RECOVERS, GIVES) == "up")

    def compare(self, export, mib, depth, where):
        """Paused, running, paused: a change of the machine's pace hits both. False if the recovery was over too soon."""
        seconds = self.o.seconds
        before = random_writes(export, mib, depth, seconds)
        self.cluster.must("node", "recovery", "resume")
        moved, begin = Moved(self.cluster, RECOVERS), time.monotonic()
        during = random_writes(export, mib, depth, seconds)
        speed = moved.look() / MIB / (time.monotonic() - begin)
        self.cluster.must("node", "recovery", "pause")
        if moved.state == "idle":
            return False
        after = random_writes(export, mib, depth, seconds)
        self.speeds["with"].append(speed)
        for kind in ("mean", "p99"):
            alone = (before[kind] + after[kind]) / 2
            figures = self.ratios.setdefault((where, depth, kind), [])
            figures.append((during[kind] / alone, alone, during[kind]))
        print(f"{where}, depth {depth}: before {before}, during {during}, after {after}, {speed:.1f} MiB/s", file=sys.stderr)
        return True

    def without_clients(self):
        cluster = self.cluster
        self.come_back()
        cluster.must("cluster", "set", "recovery.max-bandwidth", f"{self.limit}M")
        cluster.must("node", "recovery", "resume")
        self.speeds["limited"].append(self.speed_over(6))
        cluster.must("cluster", "set", "recovery.max-bandwidth", "unlimited")
        self.speeds["without"].append(self.speed_over(60))

    def speed_over(self, seconds):
        """MiB per second, until the recovery is over or for so long."""
        moved, begin = Moved(self.cluster, RECOVERS), time.monotonic()
        while time.monotonic() - begin < seconds and moved.state != "idle":
            time.sleep(0.1)
            moved.look()
        return moved.bytes / MIB / (time.monotonic() - begin)

    def rows(self):
        rows = []
        for (where, depth, kind), figures in self.ratios.items():
            alone, during = (statistics.median(f[i] for f in figures) for i in (1, 2))
            kind = {"mean": "mean", "p99": "99th percentile"}[kind]
            rows.append(Row(f"latency of a client {where}, depth {depth}, {kind}: recovery running, by paused", [f[0] for f in figures], 2,
                            "", f"{alone:.0f} µs paused, {during:.0f} µs running"))
        rows.append(Row("speed of the recovery beside these clients", self.speeds["with"], None, "MiB/s"))
        rows.append(Row("speed of the recovery without clients", self.speeds["without"], None, "MiB/s"))
        rows.append(Row(f"speed with recovery.max-bandwidth = {self.limit} MiB/s, by that", [s / self.limit for s in self.speeds["limited"]], 1.1))
        return rows


def latency(o, directory):
    """What clients feel of a recovery."""
    case = Latencies(o, directory)
    try:
        case.measure()
    finally:
        case.cluster.stop()
    return case.rows()


CASES = {"stall": stall, "changed": changed, "latency": latency}


def machine(o, names, load):
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    commit = first_line("git", "-C", str(o.root), "rev-parse", "--short", "HEAD")
    arguments = [a for a in sys.argv[1:] if a not in ("--root", "--target", str(o.root), str(o.target), "--write")]
    places = {c: o.changed_dir if c == "changed" else o.dir for c in names}
    systems = ", ".join(f"{c} on {first_line('stat', '-f', '-c', '%T', str(path))}" for c, path in places.items())
    busy = " (**other work was running**)" if load > 1 else ""
    return [
        f"{os.cpu_count()} CPUs ({model.group(1) if model else platform.machine()}), Linux {platform.release()}; {systems}; "
        f"{first_line('fio', '--version')}; commit {commit}, {datetime.date.today()}; load average before the run {load:.1f}{busy}.",
        "",
        f"Command: `{' '.join(['scripts/bench recovery', *arguments])}`. Clients and all nodes share the machine. Medians (in brackets "
        f"the extremes) of {o.rounds} round{'s' * (o.rounds > 1)}, of the case changed one; fio runs {o.seconds:g} s; seed {o.seed}.",
        "",
    ]


def table(rows):
    head = ["| measured | figure (spread) | goal | | |", "| --- | ---: | ---: | --- | --- |"]
    return head + [f"| {' | '.join(row.cells())} |" for row in rows]


def main():
    o = options()
    o.binaries = pathlib.Path(os.environ.get("SHEEPDOG_BIN_DIR") or o.target / "release")
    for name in ("sheep", "dog"):
        if not (o.binaries / name).exists():
            raise SystemExit(f"error: no {name} in {o.binaries}")
    names = [c for c in CASES if o.case is None or c in o.case]
    lines, rows = machine(o, names, os.getloadavg()[0]), []
    for case in names:
        parent = o.changed_dir if case == "changed" else o.dir
        directory = pathlib.Path(tempfile.mkdtemp(prefix="sd-bench-", dir=parent))
        try:
            for row in CASES[case](o, directory):
                rows.append(row)
                print("; ".join(cell for cell in row.cells() if cell), file=sys.stderr)
        except BaseException:
            for log in directory.glob("*.log"):
                print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-10:]), file=sys.stderr)
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    lines += table(rows)
    report(o, lines, rows, MARKERS, "Nodes that die, return and recover")


if __name__ == "__main__":
    # Ctrl-C and SIGTERM both run the clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
