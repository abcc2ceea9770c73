"""What tools/bench block and vhost share: a load on two sides that take turns, and a table of what came of it.

The client is cowhand-bench's, on the crate virtio-driver; it sleeps until it is interrupted, as a guest's driver does. Files lie in the
page cache. CPU is the server's processor time, user and system, for each request (not that of the kernel's own threads,
which write dirty pages back). What a side refuses to open is said in its place.

QEMU is used at its best: io_uring, an iothread, an L2 cache that covers the disk.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import REPO, shell
from images import CLUSTER, MIB, Images, img
from servers import Cowhand, Qemu, Refused, Server, disk, form

CLIENT_SECONDS = 300
# A few hundred megabytes of copies: what is dirty stays below the limit at which the kernel begins to write.
COPIES = 16384
# Each L2 entry is looked at once before anything is measured.
READS = ["--touch", str(CLUSTER)]
SCATTER = ["--pattern", "scatter", "--write"]


@dataclass
class Side:
    """One of the two that a row compares."""

    label: str
    image: str
    load: list[str] = field(default_factory=list)
    server: type[Server] | None = None  # None: in-process
    queues: int = 1


@dataclass
class Step:
    """A line of the table, or some: what measures and tells it says whether all that was to be reached was."""

    name: str
    images: set[str]
    tell: Callable[[], bool]


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


class Client:
    """The program that loads servers, and the engine without one."""

    program = ""


def said(command: list[str]) -> dict:
    """The JSON that one of cowhand-bench's loads prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise Refused(lines[-1].removeprefix("cowhand-bench: ") if lines else f"ended with {done.returncode}")
    return json.loads(done.stdout)


def client(server: Server, words: list[str], wait: str = "interrupt") -> dict:
    return said([Client.program, "client", "--socket", str(server.socket), "--server", str(server.pid()), "--wait", wait, *words])


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
                if fresh and clean and form(image) == "qcow2":
                    img("check", "-q", "-f", "qcow2", image)
            else:
                numbers = said([Client.program, "in-process", "--disk", disk(image), *words])
        except Refused as refusal:
            result.refused = str(refusal)
            return
        if numbers["requests"] == 0:
            raise RuntimeError(f"{side.label}: no request completed in {self.arguments.seconds} s")
        result.rates.append(numbers["requests"] / numbers["seconds"])
        result.costs.append(1e6 * numbers["cpu_seconds"] / numbers["requests"])


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


# --- the command line ---------------------------------------------------------------------------------------------------


def add_arguments(one: argparse.ArgumentParser, steps: Callable[[Bench | None], list[Step]], runs: int, seconds: float) -> None:
    """The options that both commands have, and what they do."""
    one.add_argument("--only", action="append", metavar="NAME", help="only these rows (* and ? as in a shell); may be given again")
    one.add_argument("--list", action="store_true", help="list the rows' names, and end")
    one.add_argument("--runs", type=int, default=runs, help=f"runs of each side (default {runs})")
    one.add_argument("--seconds", type=float, default=seconds, help=f"how long each run measures (default {seconds:g})")
    one.add_argument("--seed", type=int, default=1, help="of the images and of all random choices (default 1)")
    one.add_argument("--dir", help="where the images are made (default target/bench)")
    one.add_argument("--wait", choices=["interrupt", "poll"], default="interrupt",
                     help="how the client waits for completions (default interrupt)")
    one.set_defaults(run=lambda arguments: run(arguments, steps))


def run(arguments: argparse.Namespace, steps: Callable[[Bench | None], list[Step]]) -> int:
    if arguments.list:
        print(*(step.name for step in steps(None)), sep="\n")
        return 0
    shell("need strace=strace qemu-storage-daemon=qemu-system-common; need_qemu")
    Client.program = shell("build_bench")
    Cowhand.program = shell("build_cowhand")
    directory = Path(arguments.dir or shell('echo "$CACHE"') + "/bench").resolve()
    directory.mkdir(parents=True, exist_ok=True)
    images = Images(directory, arguments.seed)
    wanted = chosen(steps(Bench(arguments, images)), arguments.only)
    # A run that was killed may have left half an image.
    images.keep(set())
    # Ends by way of every `finally`: servers are stopped, images removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: told to end"))
    heading(arguments, directory)
    line(*HEAD)
    fine = True
    try:
        for position, step in enumerate(wanted):
            images.keep(set().union(*(later.images for later in wanted[position:])))
            try:
                fine &= step.tell()
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                fine = False
                print(f"[{step.name}] failed: {error}", flush=True)
    finally:
        images.keep(set())
        with contextlib.suppress(OSError):
            directory.rmdir()
    return 0 if fine else 1


def chosen(steps: list[Step], only: list[str] | None) -> list[Step]:
    if not only:
        return steps
    unknown = [pattern for pattern in only if not any(fnmatch.fnmatchcase(step.name, pattern) for step in steps)]
    if unknown:
        sys.exit(f"bench: no row is called {', '.join(unknown)} (see --list)")
    return [step for step in steps if any(fnmatch.fnmatchcase(step.name, pattern) for pattern in only)]
