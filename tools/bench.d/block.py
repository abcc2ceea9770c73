"""tools/bench block: the block engine beside qemu-storage-daemon, on the loads that cowhand has set itself marks for.

Each row compares two sides on the same files with the same client (cowhand-bench client, on the crate virtio-driver, which sleeps
until it is interrupted, as a guest's driver does). The sides take turns; what is shown is the median of all runs, and
between them the ratio of the medians. Most rows go through a vhost-user-blk socket; "in-process" drives the engine's queues
without one. Files lie in the page cache. CPU is the server's processor time, user and system, for each request (not
that of the kernel's own threads, which write dirty pages back).

QEMU is used at its best: io_uring, an iothread, an L2 cache that covers the disk.

4 KiB requests, depth 32 and one queue unless a row says otherwise. A flush comes after all that was written has completed, and
is waited for, as after an application's fsync. What a side refuses to open is said in its place. The images
(up to some 10 GiB) are made with qemu-img below target/bench, which must be on ext4 for the row with flushes to mean what
it says, and are removed afterwards. Numbers mean something on a quiet machine only; the load average is printed.

Rows that count instead of timing run the servers once more, on I/O by system calls, under strace.

COWHAND_BENCH=PATH measures with that cowhand-bench instead of building one.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from block_images import CLUSTER, MIB, Images, img
from block_servers import Cowhand, Qemu, Refused, Server, disk
from common import REPO, shell

CLIENT_SECONDS = 300
# A few hundred megabytes of copies: what is dirty stays below the limit at which the kernel begins to write.
COPIES = 16384
READS = ["--touch", str(CLUSTER)]


@dataclass
class Side:
    """One of the two that a row compares."""

    label: str
    image: str
    load: list[str] = field(default_factory=list)
    server: type[Server] | None = None  # None: in-process
    queues: int = 1


@dataclass
class Row:
    """A load on two sides, the second of which the first is held against."""

    name: str
    title: str
    sides: tuple[Side, Side]
    target: float | None = None
    block: int = 4096
    less_cpu: bool = False  # also to be reached: less processor time for each request


def both(image: str, *load: str, queues: int = 1) -> tuple[Side, Side]:
    return tuple(Side(kind.label, image, list(load), kind, queues) for kind in (Cowhand, Qemu))


def own(image: str, *load: str, beside: str, label: str) -> tuple[Side, Side]:
    return Side("cowhand", image, list(load), Cowhand), Side(label, beside, list(load), Cowhand)


def rows() -> list[Row]:
    scatter = ["--pattern", "scatter", "--write"]
    big = ["--pattern", "sequential", "--block", str(MIB)]
    in_process = (Side("2 queues", "full.qcow2", READS, None, 2), Side("1 queue", "full.qcow2", READS, None, 1))
    over_socket = (Side("2 queues", "full.qcow2", READS, Cowhand, 2), Side("1 queue", "full.qcow2", READS, Cowhand, 1))
    return [
        Row("raw", "random read, raw", both("full.raw", *READS)),
        Row("read", "random read, qcow2 fully allocated", both("full.qcow2", *READS), 1.5),
        Row("read-raw", "  beside own raw", own("full.qcow2", *READS, beside="full.raw", label="own raw"), 0.95),
        Row("read-1", "random read, depth 1", both("full.qcow2", *READS, "--depth", "1"), 1.3),
        Row("queues-in-process", "random read, 2 queues beside 1, in-process", in_process, 1.7),
        Row("queues-loss", "  over the socket", over_socket, 1.0),
        Row("queues", "  over the socket, beside QEMU", both("full.qcow2", *READS, queues=2), None, less_cpu=True),
        Row("layers-own", "random read, 32 overlays beside 1",
            own("layers-32.qcow2", *READS, beside="layers-1.qcow2", label="1 overlay"), 0.9),
        Row("layers", "random read, 32 overlays", both("layers-32.qcow2", *READS), 6.0),
        Row("write", "random write, fully allocated", both("small.qcow2", "--write")),
        Row("write-1", "random write, fully allocated, depth 1", both("small.qcow2", "--write", "--depth", "1")),
        Row("allocate", "allocating random write, empty image",
            both("fresh-empty.qcow2", *scatter, "--requests", "100000"), 2.5),
        Row("cow", "random write, copying from a full backing file",
            both("fresh-overlay.qcow2", *scatter, "--requests", str(COPIES)), 1.1),
        Row("cow-extended", "  extended L2", both("fresh-extended.qcow2", *scatter, "--requests", str(COPIES)), 1.3),
        Row("flush", "allocating random write, a flush every 64",
            both("fresh-empty.qcow2", *scatter, "--requests", "100000", "--flush-every", "64"), 1.1),
        Row("sequential-read", "sequential read, 1 MiB", both("full.qcow2", *big), 1.0, MIB),
        Row("sequential-write", "sequential write, 1 MiB, fully allocated", both("small.qcow2", *big, "--write"), 1.0, MIB),
        Row("zlib", "random read, compressed, zlib", both("zlib.qcow2"), 1.5),
        Row("zstd", "random read, compressed, zstd", both("zstd.qcow2"), 1.0),
    ]


# --- measuring ----------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """The runs of one side, or why there are none."""

    rates: list[float] = field(default_factory=list)  # requests in a second
    costs: list[float] = field(default_factory=list)  # microseconds of processor time for a request
    refused: str = ""

    def rate(self) -> float | None:
        return statistics.median(self.rates) if self.rates else None

    def cost(self) -> float | None:
        return statistics.median(self.costs) if self.costs else None


def said(command: list[str]) -> dict:
    """The JSON that one of cowhand-bench's loads prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise Refused(lines[-1].removeprefix("cowhand-bench: ") if lines else f"ended with {done.returncode}")
    return json.loads(done.stdout)


def client(server: Server, words: list[str], wait: str = "interrupt") -> dict:
    return said([Cowhand.program, "client", "--socket", str(server.socket), "--server", str(server.pid()), "--wait", wait, *words])


class Bench:
    def __init__(self, arguments: argparse.Namespace, images: Images):
        self.arguments = arguments
        self.images = images

    def measure(self, row: Row) -> list[Result]:
        results = [Result(), Result()]
        for run in range(self.arguments.runs):
            order = [0, 1] if run % 2 == 0 else [1, 0]
            for index in order:
                if not results[index].refused:
                    self._run(row.sides[index], run, results[index])
            if all(result.refused for result in results):
                break
        return results

    def _run(self, side: Side, run: int, result: Result) -> None:
        image = self.images.get(side.image)
        os.sync()
        words = [*side.load, "--seed", str(self.arguments.seed + run), "--seconds", str(self.arguments.seconds)]
        words += ["--queues", str(side.queues)]
        try:
            if side.server:
                server = side.server(image, side.queues)
                fresh = side.image in self.images.fresh
                # An image that is made anew each time is looked at once, and not waited for again.
                clean = not fresh or run == 0
                try:
                    numbers = client(server, words, self.arguments.wait)
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        server.stop(clean=False)
                    raise
                server.stop(clean)
                if fresh and clean:
                    img("check", "-q", "-f", "qcow2", image)
            else:
                numbers = said([Cowhand.program, "in-process", "--disk", disk(image), *words])
        except Refused as refusal:
            result.refused = str(refusal)
            return
        if numbers["requests"] == 0:
            raise RuntimeError(f"{side.label}: no request completed in {self.arguments.seconds} s")
        result.rates.append(numbers["requests"] / numbers["seconds"])
        result.costs.append(1e6 * numbers["cpu_seconds"] / numbers["requests"])

    def opening(self) -> list[Result]:
        """Seconds from exec until the socket is there, in `rates`; peak resident bytes, in `costs`."""
        results = [Result(), Result()]
        image = self.images.get("deep.qcow2")
        for run in range(self.arguments.runs):
            for result, kind in list(zip(results, (Cowhand, Qemu)))[:: 1 if run % 2 == 0 else -1]:
                if result.refused:
                    continue
                try:
                    server = kind(image)
                except Refused as refusal:
                    result.refused = str(refusal)
                    continue
                result.rates.append(server.start_seconds)
                result.costs.append(server.peak_memory())
                server.stop(clean=False)
        return results

    def count(self, image: str, words: list[str], again: bool = False) -> list[tuple[float, float] | str]:
        """For each server: bytes moved for each write, and flushes of the file for each flush asked for. With `again`, those of
        a second round of the same writes."""
        counts = []
        for kind in (Cowhand, Qemu):
            path = self.images.get(image)
            try:
                for last in [False, True] if again else [True]:
                    server = kind(path, calls=last)
                    begin = time.time()
                    numbers = client(server, [*words, "--seed", str(self.arguments.seed), "--seconds", "60"])
                    end = time.time()
                    server.stop(clean=True)
                moved, flushes = server.counted(begin, end)
                counts.append((moved / numbers["requests"], flushes / numbers["flushes"] if numbers["flushes"] else 0.0))
            except Refused as refusal:
                counts.append(str(refusal))
        return counts


# --- telling ------------------------------------------------------------------------------------------------------------

WIDTHS = (68, 11, 19, 6, 10, 8, 8, 8)
HEAD = ("load", "cowhand", "beside", "ratio", "to reach", "", "CPU µs", "beside")


def line(*cells: str) -> None:
    text = f"{cells[0]:<{WIDTHS[0]}}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells[1:], WIDTHS[1:]))
    print(text.rstrip(), flush=True)


def verdict(reached: bool | None) -> str:
    return "" if reached is None else "reached" if reached else "MISSED"


def refusals(results: list, labels: list[str]) -> list[str]:
    return [f"    {label} refused: {result.refused}" for result, label in zip(results, labels) if result.refused]


def tell(row: Row, results: list[Result]) -> bool:
    """One row of the table; whether everything in it was measured and reached."""
    mine, other = results

    def shown(result: Result) -> str:
        if result.refused:
            return "refused"
        rate = result.rate()
        return f"{rate * row.block / 1e6:.0f} MB/s" if row.block >= MIB else f"{rate / 1000:.1f} k/s"

    def cost(result: Result) -> str:
        return f"{result.cost():.2f}" if result.costs else ""

    ratio = mine.rate() / other.rate() if mine.rates and other.rates else None
    reached = None
    if row.target is not None:
        reached = ratio is not None and ratio >= row.target
    if row.less_cpu:
        reached = reached is not False and bool(mine.costs and other.costs) and mine.cost() < other.cost()
    target = "less CPU" if row.less_cpu else f"{row.target:.2f}" if row.target is not None else "-"
    beside = f"{row.sides[1].label} {shown(other)}"
    title = f"{row.title} [{row.name}]"
    line(title, shown(mine), beside, f"{ratio:.2f}" if ratio else "-", target, verdict(reached), cost(mine), cost(other))
    for refusal in refusals(results, [side.label for side in row.sides]):
        print(refusal)
    return reached is not False and not mine.refused


def tell_opening(results: list[Result]) -> bool:
    mine, other = results
    fine = True
    for name, limit, unit, scale, values in [
        ("[open] opening 100 images of 1 TiB each", 50, "ms", 1e-3, lambda result: result.rates),
        ("  most memory meanwhile", 32, "MiB", MIB, lambda result: result.costs),
    ]:
        amounts = [statistics.median(values(result)) / scale if values(result) else None for result in results]
        cells = ["refused" if amount is None else f"{amount:.1f} {unit}" for amount in amounts]
        reached = amounts[0] is not None and amounts[0] <= limit
        fine &= reached
        ratio = f"{amounts[0] / amounts[1]:.2f}" if None not in amounts else "-"
        line(name, cells[0], f"QEMU {cells[1]}", ratio, f"<= {limit} {unit}", verdict(reached))
    for refusal in refusals(results, ["cowhand", "QEMU"]):
        print(refusal)
    return fine


def tell_count(title: str, counts: list, pick: int, most: float | None) -> bool:
    """A row of counts, where less is better: at most `most`, or at most QEMU's."""
    values = [None if isinstance(count, str) else count[pick] for count in counts]
    cells = ["refused" if value is None else f"{value:.0f} B" if pick == 0 else f"{value:.2f}" for value in values]
    limit = most if most is not None else values[1]
    # A few calls at the beginning and the end belong to no request.
    reached = values[0] is not None and limit is not None and values[0] <= limit * 1.02
    ratio = f"{values[0] / values[1]:.2f}" if None not in values and values[1] else "-"
    line(title, cells[0], f"QEMU {cells[1]}", ratio, f"<= {most:g}" if most is not None else "<= QEMU's", verdict(reached))
    for label, count in zip(("cowhand", "QEMU"), counts):
        if isinstance(count, str):
            print(f"    {label} refused: {count}")
    return reached


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def heading(arguments: argparse.Namespace, directory: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, check=True).stdout.strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    commit = subprocess.run(["git", "-C", REPO, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    print(f"host:     {os.uname().sysname} {os.uname().release}, {os.cpu_count()} processors, {memory:.0f} GiB; load average {os.getloadavg()[0]:.2f}")
    print(f"versions: cowhand {commit.stdout.strip() or 'unknown'}; {first_line('qemu-storage-daemon', '--version')}")
    print(f"files:    {directory} ({kind})")
    print(f"runs:     {arguments.runs} of {arguments.seconds:g} s on each side, taking turns; medians; seed {arguments.seed}; the client waits by {arguments.wait}")
    if kind != "ext2/ext3":
        print("          this is not ext4: the row with flushes says nothing about it")
    if os.getloadavg()[0] > 0.5:
        print("          this machine is not quiet: take no number for more than a hint")
    print()


def steps(bench: Bench) -> list[tuple[str, set[str], object]]:
    """All rows in order: name, images, and what measures and tells it."""
    scatter = ["--pattern", "scatter", "--write"]
    flushing = [*scatter, "--requests", "6400", "--flush-every", "64"]
    copying = [*scatter, "--requests", "2000"]
    all_steps = [
        (row.name, {side.image for side in row.sides}, lambda row=row: tell(row, bench.measure(row))) for row in rows()
    ]
    counting = {
        "cow": [("cow-bytes", "fresh-overlay.qcow2", lambda: tell_count(
            "  bytes read and written for each write [cow-bytes]", bench.count("fresh-overlay.qcow2", copying), 0, None))],
        "cow-extended": [("cow-extended-bytes", "fresh-extended.qcow2", lambda: tell_count(
            "  bytes for each write [cow-extended-bytes]", bench.count("fresh-extended.qcow2", copying), 0, None))],
        "flush": [
            ("flush-count", "fresh-empty.qcow2", lambda: tell_count(
                "  fdatasync for each flush [flush-count]", bench.count("fresh-empty.qcow2", flushing), 1, 2)),
            ("flush-count-mapped", "fresh-empty.qcow2", lambda: tell_count(
                "  when nothing is allocated [flush-count-mapped]", bench.count("fresh-empty.qcow2", flushing, again=True), 1, 1)),
        ],
    }
    result = []
    for name, images, step in all_steps:
        result.append((name, images, step))
        result += [(count_name, {image}, count) for count_name, image, count in counting.get(name, [])]
    result.append(("open", {"deep.qcow2"}, lambda: tell_opening(bench.opening())))
    return result


def run(arguments: argparse.Namespace) -> int:
    shell("need strace=strace qemu-storage-daemon=qemu-system-common; need_qemu")
    Cowhand.program = shell("build_bench")
    directory = Path(arguments.dir or shell('echo "$CACHE"') + "/bench").resolve()
    directory.mkdir(parents=True, exist_ok=True)
    images = Images(directory, arguments.seed)
    wanted = steps(Bench(arguments, images))
    if arguments.only:
        unknown = set(arguments.only) - {name for name, _, _ in wanted}
        if unknown:
            sys.exit(f"bench: no row is called {', '.join(sorted(unknown))} (see --list)")
        wanted = [step for step in wanted if step[0] in arguments.only]
    # A run that was killed may have left half an image.
    images.keep(set())
    # Ends by way of every `finally`: servers are stopped, images removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: told to end"))
    heading(arguments, directory)
    line(*HEAD)
    fine = True
    try:
        for position, (name, _, step) in enumerate(wanted):
            images.keep(set().union(*(needed for _, needed, _ in wanted[position:])))
            try:
                fine &= step()
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                fine = False
                print(f"[{name}] failed: {error}", flush=True)
    finally:
        images.keep(set())
        with contextlib.suppress(OSError):
            directory.rmdir()
    return 0 if fine else 1


def show_rows(_: argparse.Namespace) -> int:
    for name, _, _ in steps(None):
        print(name)
    return 0


def add_command(commands) -> None:
    one = commands.add_parser(
        "block", help="the block engine beside QEMU's", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one.add_argument("--only", action="append", metavar="NAME", help="only this row; may be given again")
    one.add_argument("--list", action="store_const", const=show_rows, dest="run", help="list the rows' names, and end")
    one.add_argument("--runs", type=int, default=5, help="runs of each side (default 5)")
    one.add_argument("--seconds", type=float, default=3.0, help="how long each run measures (default 3)")
    one.add_argument("--seed", type=int, default=1, help="of the images and of all random choices (default 1)")
    one.add_argument("--dir", help="where the images are made (default target/bench)")
    one.add_argument("--wait", choices=["interrupt", "poll"], default="interrupt",
                     help="how the client waits for completions (default interrupt)")
    one.set_defaults(run=run)
