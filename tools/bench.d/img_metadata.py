"""The rows of tools/bench img about metadata: an image with 1 TiB allocated in 64 KiB clusters, of which there is only the metadata.

The image is made by qemu-img with preallocation=metadata: all L2 tables and refcounts are full, the data is a hole, some 160 MB are
in the file. Both programs work on the same image, taking turns; a snapshot is taken in a copy of its own each time. What is shown is the median
time of one command, and of a check the most memory that it took (resident).
"""

import os
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

IMAGE = "tebibyte.qcow2"


@dataclass
class Row:
    """A command line, run by both."""

    name: str
    title: str
    words: list[str]
    # So many times as fast as QEMU.
    mark: float
    # At most so many times the memory of QEMU's.
    memory_mark: float | None = None
    # Runs between two looks at the clock: short commands are run often.
    times: int = 1
    # What is made, and removed before each run; or a copy of the image, where the row changes it.
    made: str | None = None
    changes: bool = False


ROWS = [
    Row("check", "check 1 TiB", ["check", "-f", "qcow2", IMAGE], 2.0, 0.25),
    Row("info", "info 1 TiB", ["info", "-f", "qcow2", IMAGE], 1.0, times=20),
    Row("create", "create 1 TiB", ["create", "-q", "-f", "qcow2", "new.qcow2", "1T"], 1.0, times=20, made="new.qcow2"),
    Row("snapshot", "snapshot -c 1 TiB", ["snapshot", "-c", "one", "copy.qcow2"], 1.0, made="copy.qcow2", changes=True),
]


def peak(pid: int) -> float:
    """The most memory that a process has had so far, in MiB. (What wait4 tells counts the process that it was forked from.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), default=0.0)


def once(program: str, row: Row, directory: Path) -> tuple[float, float]:
    """Seconds that one command took, and MiB."""
    seconds, memory = 0.0, 0.0
    for _ in range(row.times):
        if row.made:
            (directory / row.made).unlink(missing_ok=True)
        if row.changes:
            subprocess.run(["cp", "--sparse=always", IMAGE, row.made], check=True, cwd=directory)
            os.sync()
        began = time.monotonic()
        child = subprocess.Popen([program, *row.words], cwd=directory, stdout=subprocess.DEVNULL)
        while row.memory_mark and child.poll() is None:
            memory = max(memory, peak(child.pid))
            time.sleep(0.001)
        status = child.wait()
        seconds += time.monotonic() - began
        if status != 0:
            raise SystemExit(f"tools/bench img: {program} {' '.join(row.words)}: exit status {status}")
    return seconds / row.times, memory


def measure(cowhand: str, qemu: str, directory: Path, runs: int, chosen: list[str]) -> int:
    """Prints the rows, and gives how many missed their marks."""
    rows = [row for row in ROWS if not chosen or row.name in chosen]
    if not rows:
        return 0
    options = ["-o", "preallocation=metadata"]
    subprocess.run([qemu, "create", "-q", "-f", "qcow2", *options, IMAGE, "1T"], check=True, cwd=directory)
    print(f"\n{'ms':>43} {'QEMU':>8} {'':>18} {'MiB':>9} {'QEMU':>8}")
    missed = 0
    for row in rows:
        results: dict[str, list[tuple[float, float]]] = {cowhand: [], qemu: []}
        for turn in range(runs):
            order = list(results)
            for program in order if turn % 2 == 0 else reversed(order):
                results[program].append(once(program, row, directory))
        mine, other = (statistics.median(seconds for seconds, _ in results[p]) for p in (cowhand, qemu))
        memory, other_memory = (max(memory for _, memory in results[p]) for p in (cowhand, qemu))
        reached = other / mine >= row.mark and (not row.memory_mark or memory <= row.memory_mark * other_memory)
        line = f"{row.title:34} {mine * 1e3:8.1f} {other * 1e3:8.1f} {other / mine:6.2f}x (mark {row.mark:3.1f})"
        if row.memory_mark:
            line += f" {memory:8.1f} {other_memory:8.1f}  {memory / other_memory:6.3f} (mark {row.memory_mark:4.2f})"
        print(line + ("" if reached else "  MISSED"), flush=True)
        missed += not reached
    return missed
