"""tools/bench img: cowhand img beside qemu-img, on the work that cowhand has set itself marks for.

Each row runs the same command line by both, on the same files, taking turns; what is shown is the median of all runs in
seconds, the ratio of the medians (QEMU's time by cowhand's), and the processor time, user and system, of each. Files lie in the page
cache; the programs start anew each time. Where a file is made, its size is shown beside QEMU's.

The image is the Debian guest that cowhand's own tests boot (tools/guest): a whole Debian 12 with kernel and systemd on a GPT disk of
2 GiB, of which some 430 MB are data; with --fill the clusters that have none are filled with an archive of this system's /usr, so that
most of the 2 GiB are data. Its copies (some 3 GiB) are made with qemu-img below target/bench, and removed afterwards.

Numbers mean something on a quiet machine only; the load average is printed.

Installs what is missing (tools/lib/packages.sh). COWHAND_BIN=PATH measures that program instead of building one.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import img_metadata
from common import REPO, shell


@dataclass
class Run:
    """One command, ended."""

    seconds: float
    cpu: float
    size: int | None


@dataclass
class Row:
    """A command line, run by both."""

    name: str
    title: str
    words: Callable[["Images"], list[str]]
    mark: float
    # The file that is made: removed before each run, and its size told after.
    made: str | None = None
    # At most so many times the size of QEMU's.
    size_mark: float | None = None
    # What is put back before each run.
    prepare: Callable[["Images"], None] = field(default=lambda images: None)


class Images:
    """The files that the rows work on."""

    def __init__(self, directory: Path, qemu: str):
        self.directory = directory
        self.qemu = qemu

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def make(self, fill: bool) -> None:
        guest = Path(shell("tools/guest").splitlines()[-1])
        shutil.copyfile(guest / "disk.raw", self.path("debian.raw"))
        if fill:
            self.fill(self.path("debian.raw"))
        for name, words in [("plain", []), ("zlib", ["-c"]), ("zstd", ["-c", "-o", "compression_type=zstd"])]:
            self.img("convert", "-f", "raw", "-O", "qcow2", *words, self.path("debian.raw"), self.path(f"{name}.qcow2"))

    @staticmethod
    def fill(disk: str) -> None:
        """Writes an archive of /usr over the clusters of a disk that are zero, as far as it goes."""
        cluster = 64 << 10
        archive = subprocess.Popen(["tar", "-cf", "-", "/usr"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert archive.stdout
        with open(disk, "r+b") as file:
            for offset in range(0, os.path.getsize(disk), cluster):
                file.seek(offset)
                if any(file.read(cluster)):
                    continue
                data = archive.stdout.read(cluster)
                file.seek(offset)
                file.write(data)
                if len(data) < cluster:
                    break
        archive.kill()
        archive.wait()

    def img(self, *words: str) -> None:
        subprocess.run([self.qemu, *words], check=True, stdout=subprocess.DEVNULL)


def convert(source: str, format: str, target: str, *words: str) -> Callable[[Images], list[str]]:
    origin = "raw" if source.endswith("raw") else "qcow2"
    return lambda images: ["convert", *words, "-f", origin, "-O", format, images.path(source), images.path(target)]


def rows() -> list[Row]:
    zstd = ["-c", "-o", "compression_type=zstd"]
    return [
        Row("raw-qcow2", "convert raw to qcow2", convert("debian.raw", "qcow2", "out"), 1.0, "out", 1.0),
        Row("qcow2-raw", "convert qcow2 to raw", convert("plain.qcow2", "raw", "out"), 1.0, "out"),
        Row("zlib-raw", "convert zlib to raw", convert("zlib.qcow2", "raw", "out"), 2.0, "out"),
        Row("zstd-raw", "convert zstd to raw", convert("zstd.qcow2", "raw", "out"), 1.0, "out"),
        Row("raw-zlib", "convert raw to zlib", convert("debian.raw", "qcow2", "out", "-c"), 2.0, "out", 1.03),
        Row("raw-zstd", "convert raw to zstd", convert("debian.raw", "qcow2", "out", *zstd), 1.3, "out", 1.03),
        Row("compare", "compare raw and qcow2",
            lambda images: ["compare", "-f", "raw", "-F", "qcow2", images.path("debian.raw"), images.path("plain.qcow2")], 1.0),
        Row("map", "map qcow2, JSON",
            lambda images: ["map", "-f", "qcow2", "--output=json", images.path("plain.qcow2")], 1.0),
        Row("measure", "measure raw for qcow2",
            lambda images: ["measure", "-f", "raw", "-O", "qcow2", images.path("debian.raw")], 1.0),
    ]


def run(program: str, row: Row, images: Images) -> Run:
    row.prepare(images)
    made = Path(images.path(row.made)) if row.made else None
    if made:
        made.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    # The name decides what cowhand is: its own is a link called qemu-img.
    subprocess.run([program, *row.words(images)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu, made.stat().st_size if made else None)


def shown(row: Row, ours: list[Run], theirs: list[Run]) -> tuple[str, bool]:
    """A line of the table, and whether its marks are reached."""
    mine, other = (statistics.median(r.seconds for r in runs) for runs in (ours, theirs))
    cpu, other_cpu = (statistics.median(r.cpu for r in runs) for runs in (ours, theirs))
    reached = other / mine >= row.mark
    line = f"{row.title:34} {mine:8.3f} {other:8.3f} {other / mine:6.2f}x (mark {row.mark:3.1f}) {cpu:8.3f} {other_cpu:8.3f}"
    if ours[0].size and theirs[0].size:
        larger = max(r.size or 0 for r in ours) / theirs[0].size
        line += f"  {larger:6.3f}"
        if row.size_mark:
            # A cluster or two of tables is no matter of compression.
            reached = reached and larger <= row.size_mark + 0.001
            line += f" (mark {row.size_mark:4.2f})"
    return line + ("" if reached else "  MISSED"), reached


def main(arguments: argparse.Namespace) -> int:
    qemu = shutil.which("qemu-img")
    if not qemu:
        raise SystemExit("tools/bench img: qemu-img is missing (package qemu-utils)")
    directory = REPO / "target" / "bench" / "img"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    cowhand = shell("build_cowhand")
    link = directory / "qemu-img"
    link.symlink_to(Path(cowhand).resolve())
    images = Images(directory, qemu)
    chosen = [row for row in rows() if not arguments.rows or row.name in arguments.rows]
    try:
        if chosen:
            images.make(arguments.fill)
        print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} processors, {arguments.runs} runs, {qemu}")
        print(f"{'seconds':>43} {'QEMU':>8} {'':>18} {'CPU s':>9} {'QEMU':>8}  size")
        missed = 0
        for row in chosen:
            results: dict[str, list[Run]] = {str(link): [], qemu: []}
            for turn in range(arguments.runs):
                order = list(results)
                for program in order if turn % 2 == 0 else reversed(order):
                    results[program].append(run(program, row, images))
            line, reached = shown(row, results[str(link)], results[qemu])
            print(line, flush=True)
            missed += not reached
        missed += img_metadata.measure(str(link), qemu, directory, arguments.runs, arguments.rows)
        return 1 if missed else 0
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("img", help="cowhand img beside qemu-img", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--fill", action="store_true", help="an image that is full of data")
    parser.add_argument("rows", nargs="*", metavar="ROW",
                        help="only these rows: " + ", ".join(row.name for row in [*rows(), *img_metadata.ROWS]))
    parser.set_defaults(run=main)
