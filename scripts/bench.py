"""What scripts/bench runs: see there.

The same load goes to three servers in turn: one node with one copy, three nodes with three copies (both sheep), and
qemu-storage-daemon with a raw file. All run at once, each round visits every server, and medians over the rounds
are reported, so that a slow minute of the machine hits all of them. CPU is the servers' alone, from /proc.

`scripts/bench store` measures the disk store alone, beside fio; `scripts/bench recovery` what happens when nodes
die and recover. Each has a --help of its own.
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
import socket
import statistics
import subprocess
import sys
import tempfile
import time

TICK = os.sysconf("SC_CLK_TCK")
MIB = 1 << 20
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

# name, direction and pattern as fio and vubench call it, block size, queue depth
LOADS = [
    ("4 KiB random read", "randread", "4k", 1),
    ("4 KiB random read", "randread", "4k", 32),
    ("4 KiB random write", "randwrite", "4k", 1),
    ("4 KiB random write", "randwrite", "4k", 32),
    ("1 MiB sequential read", "read", "1m", 4),
    ("1 MiB sequential write", "write", "1m", 4),
]
PROTOCOLS = ["nbd", "vhost-user"]


def options():
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of one second; docs/performance.md stays as it is")
    parser.add_argument("--shm-only", action="store_true", help="only on /dev/shm, not on the disk")
    parser.add_argument("--seconds", type=float, help="length of one run (default 2)")
    parser.add_argument("--rounds", type=int, help="runs of each kind (default 3)")
    parser.add_argument("--root", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    o = parser.parse_args()
    o.seconds = o.seconds or (1 if o.quick else 2)
    o.rounds = o.rounds or (1 if o.quick else 3)
    o.volume_mib = 256 if o.quick else 512
    return o


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def wait_for(what, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: waited in vain for {what}")
        time.sleep(0.05)


class Server:
    """Some processes that serve two exports: self.sockets maps the protocol to its socket."""

    def __init__(self, name, directory):
        self.name = name
        self.dir = directory
        self.dir.mkdir(parents=True)
        self.processes = []
        self.sockets = {p: self.dir / f"{p}.sock" for p in PROTOCOLS}
        self.exports = {}

    def spawn(self, *command):
        log = open(self.dir / f"{len(self.processes)}.log", "wb")
        # Its own session: with autogroup scheduling, a server must not share its time slices with the client.
        process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        self.processes.append(process)

    def cpu_seconds(self):
        return sum(process_cpu(p.pid) for p in self.processes)

    def check_alive(self):
        for i, p in enumerate(self.processes):
            if p.poll() is not None:
                raise SystemExit(f"error: a server of {self.name} ended with {p.returncode}; see {self.dir}/{i}.log")

    def stop(self):
        for p in self.processes:
            p.send_signal(signal.SIGTERM)
        for p in self.processes:
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                print(f"warning: a server of {self.name} did not stop on SIGTERM within 10 s", file=sys.stderr)
                p.kill()
                p.wait()


class StorageDaemon(Server):
    def __init__(self, directory, mib):
        super().__init__("qemu-storage-daemon", directory)
        command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={self.sockets['nbd']}"]
        for protocol in PROTOCOLS:
            raw = self.dir / f"{protocol}.raw"
            with open(raw, "wb") as f:
                f.truncate(mib * MIB)
            command += ["--blockdev", f"driver=file,node-name={protocol},filename={raw}"]
            address = "" if protocol == "nbd" else f",addr.type=unix,addr.path={self.sockets[protocol]}"
            kind = "nbd,name=nbd" if protocol == "nbd" else "vhost-user-blk"
            command += ["--export", f"type={kind},id=e-{protocol},node-name={protocol},writable=on{address}"]
            self.exports[protocol] = protocol
        self.spawn(*command)
        wait_for("qemu-storage-daemon", lambda: all(s.exists() for s in self.sockets.values()))


class Sheep(Server):
    def __init__(self, binaries, directory, nodes, mib):
        super().__init__(f"sheep, {nodes} {'copy' if nodes == 1 else 'copies'}", directory)
        self.dog_binary = binaries / "dog"
        ports = [free_port() for _ in range(nodes)]
        self.node = f"127.0.0.1:{ports[0]}"
        for i, port in enumerate(ports):
            join = ["--join", self.node] if i else []
            self.spawn(binaries / "sheep", "--dir", self.dir / f"node{i}", "--listen", f"127.0.0.1:{port}", *join)
            wait_for(f"node {i}", lambda: self.up() == i + 1)
        wait_for("a healthy cluster", lambda: (self.dog("cluster", "health") or {}).get("status") == "ok")
        for protocol in PROTOCOLS:
            self.must("volume", "create", protocol, f"{mib}M", "--copies", str(nodes))
            self.must("export", "add", protocol, f"--{protocol}", str(self.sockets[protocol]))
            self.exports[protocol] = protocol
        wait_for("the exports", lambda: all(s.exists() for s in self.sockets.values()))

    def dog(self, *arguments):
        self.check_alive()
        done = subprocess.run(
            [self.dog_binary, "--node", self.node, "--json", *arguments], capture_output=True, text=True, timeout=60
        )
        self.complaint = done.stderr
        if done.returncode != 0:
            return None
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def must(self, *arguments):
        if self.dog(*arguments) is None:
            raise SystemExit(f"error: dog {' '.join(arguments)}: {self.complaint}")

    def up(self):
        return sum(n["state"] == "up" for n in self.dog("node", "list") or [])


def process_cpu(pid):
    """User and system seconds of all threads (proc(5), fields 14 and 15)."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def rss_mib(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) / 1024


def run_client(command, seconds=300):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=seconds)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def fio(server, rw, bs, depth, limits):
    result = run_client(
        ["fio", "--name=bench", "--ioengine=nbd", f"--uri=nbd+unix:///{server.exports['nbd']}?socket={server.sockets['nbd']}"]
        + [f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", "--thread", "--lat_percentiles=1", "--randrepeat=0"]
        + ["--output-format=json", *limits]
    )
    job = result["jobs"][0]["read" if "read" in rw else "write"]
    # Without --lat_percentiles the key would be clat_ns.
    percentile = job["lat_ns"].get("percentile", {})
    us = lambda q: percentile.get(q, 0) / 1000
    return {"ios": job["total_ios"], "iops": job["iops"], "p50": us("50.000000"), "p99": us("99.000000")}


def vubench(binaries, server, rw, bs, depth, seconds):
    result = run_client(
        [binaries / "vubench", "--socket", server.sockets["vhost-user"], "--rw", rw, "--bs", bs, "--qd", depth]
        + ["--time", seconds, "--ramp", 0, "--json"]
    )
    latency = result["lat_us"]
    return {"ios": result["ios"], "iops": result["iops"], "p50": latency["p50"], "p99": latency["p99"]}


def measure(o, binaries, server, protocol, load):
    _, rw, bs, depth = load
    before = server.cpu_seconds()
    if protocol == "nbd":
        r = fio(server, rw, bs, depth, [f"--runtime={o.seconds}", "--time_based", f"--size={o.volume_mib}M"])
    else:
        r = vubench(binaries, server, rw, bs, depth, o.seconds)
    server.check_alive()
    r["cpu_us"] = (server.cpu_seconds() - before) * 1e6 / max(r["ios"], 1)
    return r


def fill(o, binaries, server):
    """Every block is written once, so that reads read something."""
    fio(server, "write", "1m", 4, [f"--size={o.volume_mib}M"])
    # vubench goes round by time only: long enough for any server worth measuring, and what is left unwritten is
    # the same for all kinds of reads.
    seconds = max(2, o.volume_mib / 128)
    vubench(binaries, server, "write", "1m", 4, seconds)


def idle(server, seconds=5):
    """Mean CPU share in percent and largest RSS in MiB of the server's processes, nobody doing anything."""
    before = server.cpu_seconds()
    time.sleep(seconds)
    share = (server.cpu_seconds() - before) / seconds / len(server.processes) * 100
    return share, max(rss_mib(p.pid) for p in server.processes)


def bench_medium(o, binaries, medium, directory):
    """Rows of the table for one medium, and the idle figures of the servers."""
    servers = []
    try:
        servers.append(StorageDaemon(directory / "qsd", o.volume_mib))
        for nodes in (1, 3):
            servers.append(Sheep(binaries, directory / f"sheep{nodes}", nodes, o.volume_mib))
        idle_figures = {s.name: idle(s) for s in servers}
        for server in servers:
            print(f"{medium}: filling {server.name}", file=sys.stderr)
            fill(o, binaries, server)
        rows = []
        for protocol in PROTOCOLS:
            for load in LOADS:
                samples = {s.name: [] for s in servers}
                for _ in range(o.rounds):
                    for server in servers:
                        samples[server.name].append(measure(o, binaries, server, protocol, load))
                rows.append((protocol, load, {name: medians(runs) for name, runs in samples.items()}))
                print_row(medium, rows[-1])
        return rows, idle_figures
    finally:
        for server in servers:
            server.stop()


def medians(runs):
    return {key: statistics.median(r[key] for r in runs) for key in runs[0]}


def print_row(medium, row):
    protocol, load, results = row
    cells = "; ".join(
        f"{name}: {r['iops']:.0f} IOPS, p50 {r['p50']:.0f} p99 {r['p99']:.0f} us, {r['cpu_us']:.1f} us CPU"
        for name, r in results.items()
    )
    print(f"{medium} {protocol} {load[0]} qd {load[3]}: {cells}", file=sys.stderr)


def table(medium, rows, idle_figures):
    out = [f"### {medium}", ""]
    out.append("| front end | load | depth | server | IOPS | p50 µs | p99 µs | CPU µs per I/O | IOPS, times qsd | CPU, times qsd |")
    out.append("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for protocol, (name, _, _, depth), results in rows:
        base = results["qemu-storage-daemon"]
        for server, r in results.items():
            ratio = lambda key: f"{r[key] / base[key]:.2f}" if base[key] else "–"
            out.append(
                f"| {protocol} | {name} | {depth} | {server} | {r['iops']:.0f} | {r['p50']:.0f} | {r['p99']:.0f} "
                f"| {r['cpu_us']:.1f} | {ratio('iops')} | {ratio('cpu_us')} |"
            )
    out += ["", "Idle, with two exports and no client:", ""]
    for server, (share, rss) in idle_figures.items():
        out.append(f"- {server}: {share:.2f} % of one CPU per process, {rss:.0f} MiB resident")
    return out + [""]


def first_line(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (OSError, IndexError):
        return "unknown"


def machine(o, media):
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    memory = int(re.search(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text()).group(1)) >> 20
    command = "scripts/bench" + "".join(f" {a}" for a in sys.argv[1:] if a not in ("--root", "--target", str(o.root), str(o.target)))
    commit = first_line("git", "-C", str(o.root), "rev-parse", "--short", "HEAD")
    file_systems = ", ".join(f"{name}: {first_line('stat', '-f', '-c', '%T', str(path))}" for name, path in media)
    return [
        f"{os.cpu_count()} CPUs ({model.group(1) if model else platform.machine()}), {memory} GiB of memory, "
        f"Linux {platform.release()}; {file_systems}; {first_line('qemu-storage-daemon', '--version')}; "
        f"{first_line('fio', '--version')}; commit {commit}, {datetime.date.today()}.",
        "",
        f"Command: `{command}`. Client, all nodes and qemu-storage-daemon share the machine. Medians of {o.rounds} runs of "
        f"{o.seconds:g} s each, volumes of {o.volume_mib} MiB, written in full before; no flushes. qemu-storage-daemon has one raw "
        "file and the host's page cache, no checksums and no copies. CPU is the sum over all processes of the server "
        "(all nodes), user and system, divided by the I/Os.",
        "",
    ]


def write_document(path, lines):
    text = path.read_text() if path.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        text += f"\n{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    path.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"{END}{tail}")


def main():
    o = options()
    binaries = pathlib.Path(os.environ.get("SHEEPDOG_BIN_DIR", o.target / "release"))
    for name in ("sheep", "dog", "vubench"):
        if not (binaries / name).exists():
            raise SystemExit(f"error: no {name} in {binaries}")
    media = [("/dev/shm", pathlib.Path("/dev/shm"))]
    if not o.shm_only:
        media.append(("disk", o.target))
    lines = machine(o, media)
    for name, parent in media:
        directory = pathlib.Path(tempfile.mkdtemp(prefix="sd-bench-", dir=parent))
        kept = False
        try:
            lines += table(name, *bench_medium(o, binaries, name, directory))
        except BaseException:
            kept = True
            print(f"the servers' logs and data: {directory}", file=sys.stderr)
            raise
        finally:
            if not kept:
                shutil.rmtree(directory, ignore_errors=True)
    print("\n".join(lines))
    if not o.quick:
        write_document(o.root / "docs/performance.md", lines)


if __name__ == "__main__":
    # Ctrl-C and SIGTERM both run the clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
