"""tools/bench vhost: cowhand vhost-user-blk beside qemu-storage-daemon.

Both serve the same files to the same client, turn and turn about; what is shown is the median of all runs, and between them the ratio
of the medians. The client sends what real front-ends do: memory for requests in flight to a server that offers that (cowhand; QEMU's
does not), event index, and it sleeps until it is interrupted.

4 KiB requests at random places, so many in flight on each queue. A chain is a base with that many overlays, in which each layer has an
equal share of all clusters. What is overwritten is allocated in the topmost image; what is allocated is the first write to a cluster: of
an empty image, or of a new overlay on the chain, which has to copy the rest of the cluster from below. "bare" is without
memory for requests in flight: then what is acknowledged has to be in the image itself.

The rows at the end are of one export of 100 GiB that has nothing to do: resident memory from its start, while a client is connected
that has read a little, and when it has gone; and the processor time of five seconds with the client. "full" has all metadata
allocated, "read" was also read everywhere first: what is cached of its metadata then is no mark's business.

The images (some 15 GiB at a time) are made with qemu-img below target/bench and removed afterwards. Numbers mean something on a quiet
machine only; the load average is printed.

COWHAND_BIN=PATH and COWHAND_BENCH=PATH measure that cowhand with that cowhand-bench instead of building them.
"""

import argparse
import contextlib
import json
import subprocess
import time

from compare import COPIES, READS, SCATTER, Bench, Client, Row, Step, add_arguments, both, line, tell, verdict
from images import LAYERS, MIB, SMALL_BYTES
from servers import Cowhand, Qemu, Server

# The marks. Where there is none, the row only tells.
READ, READ_ALONE, READ_DEEP, ALLOCATE, COPY = 1.5, 1.3, 6.0, 2.5, 1.1
DEEPEST = max(LAYERS)
ALLOCATIONS = 100000
MOST_IDLE = 8 * MIB
# What a disk without anything to do may cost: less than a millisecond of processor time in a second.
MOST_IDLE_SHARE = 0.001
HELD_SECONDS = 5
LITTLE, EVERYWHERE = 64, 20000


def rows() -> list[Row]:
    """Image by image, so that few are there at once."""
    result = []
    for title, name, full, small, fresh, writes in [
        ("raw", "raw", "full.raw", "small.raw", "fresh-empty.raw", ALLOCATIONS),
        ("qcow2", "qcow2", "full.qcow2", "small.qcow2", "fresh-empty.qcow2", ALLOCATIONS),
        *((f"chain of {n}", f"{n}", f"layers-{n}.qcow2", f"written-on-{n}.qcow2", f"fresh-on-{n}.qcow2", COPIES) for n in LAYERS),
    ]:
        for load in ("read", "overwrite", "allocate"):
            for queues in (1, 2):
                for depth in (32, 1):
                    image, words = {
                        "read": (full, READS),
                        "overwrite": (small, [*READS, "--write", "--span", str(SMALL_BYTES)]),
                        "allocate": (fresh, [*SCATTER, "--requests", str(writes // queues)]),
                    }[load]
                    shown = f"{load}, {title}, {queues} {'queue' if queues == 1 else 'queues'}, depth {depth}"
                    sides = both(image, *words, "--depth", str(depth), queues=queues)
                    less_cpu = (load, name, queues, depth) == ("read", "qcow2", 2, 32)
                    result.append(
                        Row(f"{load}-{name}-{queues}x{depth}", shown, sides, mark(load, name, queues, depth), less_cpu=less_cpu)
                    )
                    if load == "allocate" and name == "qcow2" and queues == 1:
                        bare = both(image, *words, "--depth", str(depth), "--no-inflight", queues=queues)
                        result.append(Row(f"{load}-{name}-{queues}x{depth}-bare", "  bare", bare))
    return result


def mark(load: str, name: str, queues: int, depth: int) -> float | None:
    """What is to be reached, by the ratio of the rates."""
    if queues != 1 or name == "raw":
        return None
    if load == "read" and name == "qcow2":
        return READ if depth > 1 else READ_ALONE
    if load == "read" and name == str(DEEPEST) and depth > 1:
        return READ_DEEP
    if load == "allocate" and depth > 1:
        return ALLOCATE if name == "qcow2" else COPY
    return None


# --- one that has nothing to do -----------------------------------------------------------------------------------------


def idle(bench: Bench, kind: type[Server], image: str, reads: int) -> tuple[list[tuple[str, dict[str, int]]], float]:
    """The memory of an export at each moment, and the share of a processor that it takes with a client that is idle."""
    server = kind(bench.images.get(image), queues=0)
    moments = []

    def look(moment: str) -> None:
        time.sleep(0.5)
        moments.append((moment, server.memory()))

    try:
        look("from its start")
        words = ["--socket", str(server.socket), "--server", str(server.pid()), "--requests", str(reads), "--warm-up", "0"]
        words += ["--seconds", "60"]
        with subprocess.Popen([Client.program, "client", "--hold", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as load:
            # It ends when its standard input does, which is when this block is left, whatever for.
            if not load.stdout.readline():
                raise RuntimeError(f"{kind.label}: the client did not read")
            time.sleep(HELD_SECONDS)
            look("with an idle client")
            load.stdin.close()
            held = json.loads(load.stdout.readline())
        look("when it has gone")
    finally:
        with contextlib.suppress(RuntimeError):
            server.stop(clean=False)
    return moments, held["held_cpu_seconds"] / held["held_seconds"]


def tell_idle(bench: Bench, image: str, title: str, reads: int) -> bool:
    (mine, my_share), (other, other_share) = (idle(bench, kind, image, reads) for kind in (Cowhand, Qemu))
    fine = True
    for (moment, memory), (_, beside) in zip(mine, other):
        reached = memory["VmRSS"] < MOST_IDLE if reads == LITTLE else None
        fine &= reached is not False
        amounts = [value["VmRSS"] / MIB for value in (memory, beside)]
        line(f"{title}, {moment}", f"{amounts[0]:.2f} MiB", f"QEMU {amounts[1]:.2f} MiB", f"{amounts[0] / amounts[1]:.2f}",
             f"< {MOST_IDLE // MIB} MiB" if reached is not None else "-", verdict(reached))
        kinds = ", ".join(f"{name} {memory[name] / MIB:.2f}" for name in ("RssAnon", "RssFile", "RssShmem"))
        line(f"    {kinds} MiB")
    reached = my_share < MOST_IDLE_SHARE
    line("  processor time meanwhile", f"{100 * my_share:.3f} %", f"QEMU {100 * other_share:.3f} %", "-",
         f"< {100 * MOST_IDLE_SHARE:g} %", verdict(reached))
    return fine and reached


def steps(bench: Bench | None) -> list[Step]:
    """All rows in order."""
    result = [
        Step(row.name, {side.image for side in row.sides}, lambda row=row: tell(row, bench.measure(row))) for row in rows()
    ]
    for name, image, title, reads in [
        ("idle", "idle.qcow2", "idle export of 100 GiB", LITTLE),
        ("idle-full", "idle-full.qcow2", "idle export, full", LITTLE),
        ("idle-read", "idle-full.qcow2", "idle export, full, read", EVERYWHERE),
    ]:
        told = lambda image=image, title=f"{title} [{name}]", reads=reads: tell_idle(bench, image, title, reads)  # noqa: E731
        result.append(Step(name, {image}, told))
    return result


def add_command(commands) -> None:
    one = commands.add_parser(
        "vhost", help="cowhand vhost-user-blk beside qemu-storage-daemon", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(one, steps, runs=5, seconds=2.0)
