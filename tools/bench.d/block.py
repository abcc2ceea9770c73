"""tools/bench block: the block engine, where tools/bench vhost does not look: what it copies, packs, flushes and opens.

Each row compares two sides on the same files with the same client. The sides take turns; what is shown is the median of all runs, and
between them the ratio of the medians. Most rows go through the socket of cowhand vhost-user-blk, and of qemu-storage-daemon;
"in-process" drives the engine's queues without one.

4 KiB requests, depth 32 and one queue unless a row says otherwise. A flush comes after all that was written has completed, and
is waited for, as after an application's fsync. The images (up to some 10 GiB) are made with qemu-img below target/bench, which must be
on ext4 for the row with flushes to mean what it says, and are removed afterwards. Numbers mean something on a quiet machine only;
the load average is printed.

Rows that count instead of timing run the servers once more, on I/O by system calls, under strace.

COWHAND_BIN=PATH and COWHAND_BENCH=PATH measure that cowhand with that cowhand-bench instead of building them.
"""

import argparse
import contextlib
import statistics
import time

from compare import COPIES, READS, SCATTER, Bench, Result, Row, Side, Step, add_arguments, both, client, line, refusals, tell, verdict
from images import MIB
from servers import Cowhand, Qemu, Refused


def own(image: str, *load: str, beside: str, label: str) -> tuple[Side, Side]:
    return Side("cowhand", image, list(load), Cowhand), Side(label, beside, list(load), Cowhand)


def rows() -> list[Row]:
    big = ["--pattern", "sequential", "--block", str(MIB)]
    in_process = (Side("2 queues", "full.qcow2", READS, None, 2), Side("1 queue", "full.qcow2", READS, None, 1))
    over_socket = (Side("2 queues", "full.qcow2", READS, Cowhand, 2), Side("1 queue", "full.qcow2", READS, Cowhand, 1))
    copies = [*SCATTER, "--requests", str(COPIES)]
    return [
        Row("read-raw", "random read, fully allocated, beside own raw",
            own("full.qcow2", *READS, beside="full.raw", label="own raw"), 0.95),
        Row("queues-in-process", "random read, 2 queues beside 1, in-process", in_process, 1.7),
        Row("queues-loss", "  over the socket", over_socket, 1.0),
        Row("layers-own", "random read, 32 overlays beside 1",
            own("layers-32.qcow2", *READS, beside="layers-1.qcow2", label="1 overlay"), 0.9),
        Row("cow", "random write, copying from a full backing file", both("fresh-overlay.qcow2", *copies), 1.1),
        Row("cow-extended", "  extended L2", both("fresh-extended.qcow2", *copies), 1.3),
        Row("flush", "allocating random write, a flush every 64",
            both("fresh-empty.qcow2", *SCATTER, "--requests", "100000", "--flush-every", "64"), 1.1),
        Row("sequential-read", "sequential read, 1 MiB", both("full.qcow2", *big), 1.0, MIB),
        Row("sequential-write", "sequential write, 1 MiB, fully allocated", both("small.qcow2", *big, "--write"), 1.0, MIB),
        Row("zlib", "random read, compressed, zlib", both("zlib.qcow2"), 1.5),
        Row("zstd", "random read, compressed, zstd", both("zstd.qcow2"), 1.0),
    ]


def opening(bench: Bench) -> list[Result]:
    """Seconds from exec until a first read has completed, in `rates`; peak resident bytes, in `costs`."""
    results = [Result(), Result()]
    image = bench.images.get("deep.qcow2")
    for run in range(bench.arguments.runs):
        for result, kind in list(zip(results, (Cowhand, Qemu)))[:: 1 if run % 2 == 0 else -1]:
            if result.refused:
                continue
            try:
                began = time.monotonic()
                server = kind(image)
                try:
                    client(server, ["--requests", "1", "--warm-up", "0"])
                    result.rates.append(time.monotonic() - began)
                    result.costs.append(server.memory()["VmHWM"])
                finally:
                    with contextlib.suppress(RuntimeError):
                        server.stop(clean=False)
            except Refused as refusal:
                result.refused = str(refusal)
    return results


def count(bench: Bench, image: str, words: list[str], again: bool = False) -> list[tuple[float, float] | str]:
    """For each server: bytes moved for each write, and flushes of the file for each flush asked for. With `again`, those of
    a second round of the same writes."""
    counts = []
    for kind in (Cowhand, Qemu):
        path = bench.images.get(image)
        try:
            for last in [False, True] if again else [True]:
                server = kind(path, calls=last)
                begin = time.time()
                numbers = client(server, [*words, "--seed", str(bench.arguments.seed), "--seconds", "60"])
                end = time.time()
                server.stop(clean=True)
            moved, flushes = server.counted(begin, end)
            if moved < numbers["requests"] * 4096:
                raise RuntimeError(f"{kind.label} writes by other calls than those that were watched")
            counts.append((moved / numbers["requests"], flushes / numbers["flushes"] if numbers["flushes"] else 0.0))
        except Refused as refusal:
            counts.append(str(refusal))
    return counts


def tell_opening(results: list[Result]) -> bool:
    mine, other = results
    fine = True
    for name, limit, unit, scale, values in [
        ("[open] 100 images of 1 TiB each, from exec to the first read", 50, "ms", 1e-3, lambda result: result.rates),
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


def steps(bench: Bench | None) -> list[Step]:
    """All rows in order."""
    flushing = [*SCATTER, "--requests", "6400", "--flush-every", "64"]
    copying = [*SCATTER, "--requests", "2000"]
    # After which row, name, title, image, load, whether it is the second round that counts; bytes (0) or flushes (1), and the most.
    counting = [
        ("cow", "cow-bytes", "  bytes read and written for each write", "fresh-overlay.qcow2", copying, False, 0, None),
        ("cow-extended", "cow-extended-bytes", "  bytes for each write", "fresh-extended.qcow2", copying, False, 0, None),
        ("flush", "flush-count", "  fdatasync for each flush", "fresh-empty.qcow2", flushing, False, 1, 2),
        ("flush", "flush-count-mapped", "  when nothing is allocated", "fresh-empty.qcow2", flushing, True, 1, 1),
    ]
    result = []
    for row in rows():
        result.append(Step(row.name, {side.image for side in row.sides}, lambda row=row: tell(row, bench.measure(row))))
        for after, name, title, image, words, again, pick, most in counting:
            if after == row.name:
                measured = lambda image=image, words=words, again=again: count(bench, image, words, again)  # noqa: E731
                result.append(Step(name, {image}, lambda title=f"{title} [{name}]", measured=measured, pick=pick, most=most: (
                    tell_count(title, measured(), pick, most))))
    result.append(Step("open", {"deep.qcow2"}, lambda: tell_opening(opening(bench))))
    return result


def add_command(commands) -> None:
    one = commands.add_parser(
        "block", help="what the block engine copies, packs, flushes and opens", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(one, steps, runs=5, seconds=3.0)
