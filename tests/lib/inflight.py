#!/usr/bin/env python3
"""The in-flight records that a QEMU keeps for its vhost-user back-ends: inflight.py show QEMU | kill QEMU BACKEND

QEMU and BACKEND are process ids. `show` prints how many requests the records call in flight: requests that a back-end has taken
from a ring and not given back. `kill` ends the back-end with SIGKILL at a moment when there is at least one: it watches the records,
stops the process as soon as it sees one (or several, at random), and kills it if there still is one then. Prints how many there are when it is dead, how many
changes of the mapping lie in cowhand's journal, which follows the records (crates/block/src/journal.rs), and how often it was stopped.
The layout of the records is that of QEMU's docs/interop/vhost-user.rst, "Inflight I/O tracking", for split rings.
"""

import mmap
import os
import random
import signal
import struct
import sys
import time

HEADER = struct.Struct("<QHHHH")  # features, version, number of descriptors, head of the last batch, used index
DESCRIPTOR = 16  # whether it is in flight (1 byte), padding, next (2 bytes), counter (8 bytes)
JOURNAL = struct.Struct("<QQQII")  # magic, capacity, state, where the ring of changes begins and where it ends
JOURNAL_MAGIC = int.from_bytes(b"cowhnd\0\1", "big")
JOURNAL_ALIGN = 65536
LARGEST_RING = 32768
MOST_QUEUES = 1024


def regions(qemu: int) -> list[mmap.mmap]:
    """The files in memory that this process has and that are not the guest's memory, mapped."""
    found = {}
    folder = f"/proc/{qemu}/fd"
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        try:
            target = os.readlink(path)
            if target.startswith("/memfd:") and "memory-backend" not in target:
                fd = os.open(path, os.O_RDONLY)
                status = os.fstat(fd)
                if status.st_ino not in found:
                    found[status.st_ino] = mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
                os.close(fd)
        except OSError:
            continue
    return [found[inode] for inode in sorted(found)]


def in_flight(region: mmap.mmap) -> int:
    """How many descriptors of the queues in this region are in flight. What lies behind the records ends the walk."""
    at = count = 0
    for _ in range(MOST_QUEUES):
        if at + HEADER.size > len(region):
            break
        _, version, descriptors, _, _ = HEADER.unpack_from(region, at)
        if version != 1 or not 0 < descriptors <= LARGEST_RING:
            break
        first, last = at + HEADER.size, at + HEADER.size + descriptors * DESCRIPTOR
        count += region[first:last:DESCRIPTOR].count(1)
        at += (last - at + 63) & ~63
    return count


def changes(region: mmap.mmap) -> int:
    """How many changes of the mapping the journal in this region has; 0 if there is none."""
    for at in range(0, len(region) - JOURNAL.size, JOURNAL_ALIGN):
        magic, capacity, live, begin, end = JOURNAL.unpack_from(region, at)
        if magic == JOURNAL_MAGIC and live and capacity:
            return (end - begin) % capacity
    return 0


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0]


def kill(qemu: int, backend: int) -> int:
    shared = regions(qemu)
    stops = 0
    began = time.monotonic()
    # Most often there is one; for some seconds more are waited for.
    wanted = random.choice((1, 2, 4, 8))
    while time.monotonic() < began + 60:
        if time.monotonic() > began + 3:
            wanted = 1
        if sum(map(in_flight, shared)) < wanted:
            time.sleep(0.0002)
            continue
        stops += 1
        os.kill(backend, signal.SIGSTOP)
        while state(backend) not in "TZ":
            pass
        if sum(map(in_flight, shared)) > 0:
            os.kill(backend, signal.SIGKILL)
            while os.path.exists(f"/proc/{backend}") and state(backend) != "Z":
                time.sleep(0.001)
            # The records tell nothing new now: who wrote them is dead.
            print(sum(map(in_flight, shared)), sum(map(changes, shared)), stops)
            return 0
        os.kill(backend, signal.SIGCONT)
    print(f"nothing was in flight, {len(shared)} regions, stopped {stops} times", file=sys.stderr)
    return 1


def main(words: list[str]) -> int:
    if len(words) == 2 and words[0] == "show":
        print(sum(map(in_flight, regions(int(words[1])))))
        return 0
    if len(words) == 3 and words[0] == "kill":
        return kill(int(words[1]), int(words[2]))
    print(__doc__.strip())
    return 0 if words and words[0] in ("--help", "-h") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
