"""The two servers that tools/bench block and vhost compare, started alike: a process that opens an image, then listens."""

import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

from images import img

START_SECONDS = 120
STOP_SECONDS = 600

# Calls that move an image's bytes or make them durable, when a server does its I/O by system calls. A call that another thread's
# line interrupts ends on a line of its own, "<... pwritev resumed>", which has the result.
TRACED = ("pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "fdatasync", "fsync")
CALLS = re.compile(rf"(\d+\.\d+) (?:<\.\.\. )?({'|'.join(TRACED)})(?: resumed>|\().* = (\d+)(?: |$)")


def listening(socket: Path) -> bool:
    """Whether a process accepts connections on this socket. (To connect would be to take the one connection that there is.)"""
    if not socket.exists():
        return False
    # Columns: number, references, protocol, flags (__SO_ACCEPTCON is bit 16), type, state, inode, path.
    rows = (line.split() for line in Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()[1:])
    return any(len(row) == 8 and row[7] == str(socket) and int(row[3], 16) & 0x10000 for row in rows)


class Refused(Exception):
    """The server does not serve this image; says why."""


class Server:
    """A running server, with as many queues as it is told, or as it likes (0). `calls` serves with I/O that strace can see, and slowly: for counting, never for timing."""

    label = ""
    program = ""
    # For strace: what makes this server do its I/O by system calls.
    without_ring: tuple[str, ...] = ()

    def __init__(self, image: Path, queues: int = 1, calls: bool = False):
        self.directory = tempfile.TemporaryDirectory(prefix="cowhand-bench-")
        self.socket = Path(self.directory.name, "socket")
        self.trace = Path(self.directory.name, "calls") if calls else None
        command = self.command(image, queues, calls)
        if self.trace:
            # strace interferes only with what it traces.
            watch = ["-e", f"trace={','.join(TRACED)},io_uring_setup", *self.without_ring, "-e", "signal=none"]
            command = ["strace", "-f", "-ttt", *watch, "-s", "0", "-o", str(self.trace), *command]
        self.errors = tempfile.TemporaryFile("w+")
        began = time.monotonic()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors)
        try:
            self._await_socket(began + START_SECONDS)
        except BaseException:
            self.stop(clean=False)
            raise
        self.start_seconds = time.monotonic() - began

    def _await_socket(self, latest: float) -> None:
        # Not only there: a socket that nobody listens on yet refuses the client.
        while not listening(self.socket):
            if self.process.poll() is not None:
                raise Refused(self._last_words() or f"ended with {self.process.returncode}")
            if time.monotonic() > latest:
                raise RuntimeError(f"{self.label}: no socket after {START_SECONDS} s")
            time.sleep(0.0002)

    def command(self, image: Path, queues: int, calls: bool) -> list[str]:
        raise NotImplementedError

    def pid(self) -> int:
        """The server's own process: under strace, its child."""
        if not self.trace:
            return self.process.pid
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii").split()
        return int(children[0]) if children else self.process.pid

    def memory(self) -> dict[str, int]:
        """Resident bytes: the most there were (VmHWM), now (VmRSS), and of which kind (RssAnon, RssFile, RssShmem)."""
        status = Path(f"/proc/{self.pid()}/status").read_text(encoding="utf-8")
        return {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"(VmHWM|VmRSS|Rss\w+):\s+(\d+) kB", status)}

    def counted(self, begin: float, end: float) -> tuple[int, int]:
        """Bytes moved and flushes made between two moments (time.time), after `stop`."""
        moved = flushes = 0
        for line in self.lines:
            call = CALLS.search(line)
            if call and begin <= float(call[1]) <= end:
                if call[2] in ("fdatasync", "fsync"):
                    flushes += 1
                else:
                    moved += int(call[3])
        return moved, flushes

    def stop(self, clean: bool) -> None:
        """Ends it: cleanly, the image closed, or at once, when nobody needs the image any more."""
        if self.process.poll() is None:
            if clean:
                subprocess.run(["kill", "-TERM", str(self.pid())], check=False)
            else:
                self._kill()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()
            raise RuntimeError(f"{self.label} did not end in {STOP_SECONDS} s") from None
        self.lines = self.trace.read_text(encoding="utf-8", errors="replace").splitlines() if self.trace else []
        words = self._last_words()
        self.directory.cleanup()
        if clean and self.process.returncode != 0:
            raise RuntimeError(f"{self.label} ended with {self.process.returncode}: {words}")

    def _kill(self) -> None:
        if self.trace:
            # strace's end would not be the server's.
            subprocess.run(["kill", "-KILL", str(self.pid())], check=False)
        else:
            self.process.kill()

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1].removeprefix(f"{Path(self.program).name}: ") if lines else ""


class Cowhand(Server):
    label = "cowhand"
    # It goes on without a ring where there can be none.
    without_ring = ("-e", "inject=io_uring_setup:error=EPERM")

    def command(self, image, queues, calls):
        words = ["--socket-path", str(self.socket), "--image", disk(image)]
        return [self.program, "vhost-user-blk", *words, *(["--num-queues", str(queues)] if queues else [])]


class Qemu(Server):
    """QEMU at its best: io_uring, an iothread, and an L2 cache that covers the disk."""

    label = "QEMU"
    program = "qemu-storage-daemon"

    def command(self, image, queues, calls):
        blockdev = f"node-name=disk,driver={form(image)},file.driver=file,file.filename={image}"
        blockdev += f",file.aio={'threads' if calls else 'io_uring'}"
        if form(image) == "qcow2":
            # The layers below keep their default, 32 MiB each: more than any of them needs.
            blockdev += f",l2-cache-size={l2_bytes(image)}"
        export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues or 1},iothread=thread"
        export += f",addr.type=unix,addr.path={self.socket}"
        return [self.program, "--object", "iothread,id=thread", "--blockdev", blockdev, "--export", export]


def form(image: Path) -> str:
    return "raw" if image.suffix == ".raw" else "qcow2"


def disk(image: Path) -> str:
    """The image as cowhand's DISK."""
    return f"path={image},format={form(image)}"


def l2_bytes(image: Path) -> int:
    """The size of an L2 cache that covers the whole disk: whole tables of whole clusters."""
    info = json.loads(img("info", "-U", "--output=json", image))
    entry = 16 if info["format-specific"]["data"].get("extended-l2") else 8
    cluster = info["cluster-size"]
    tables = -(-info["virtual-size"] * entry // (cluster * cluster))
    return max(tables, 2) * cluster
