"""tools/bench start: what a virtual machine costs before its guest runs, cowhand beside QEMU.

Prints one table, from one run:
  - milliseconds from exec to the first KVM_RUN: a guest of 512 MiB, one vCPU, Debian's kernel and its own initrd, a QCOW2
    overlay as disk. One outside observer for all, `strace -f --seccomp-bpf`, which stops a process only at the calls
    looked for; it slows ioctl and execve alike for everybody. Median of 20, the programs taking turns. The guest is killed at
    its first KVM_RUN, so any /dev/kvm will do;
  - the VMM's own memory with a guest that idles (one vCPU, 512 MiB, our tiny guest, no disk): resident anonymous and file
    pages by /proc/PID/smaps, less the guest's memory;
  - the size of the program, and of the libraries that it loads.

Installs what is missing (tools/lib/packages.sh). COWHAND_BIN=PATH measures that program instead of building one.
"""

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import REPO, shell

IDLE_SECONDS = 3
SPIN_SECONDS = 4
START_LIMIT_SECONDS = 30


def median_ms(times: list[float]) -> str:
    if not times:
        return "none"
    times = sorted(1000 * t for t in times)
    return f"{statistics.median(times):7.1f}  ({times[0]:.1f} – {times[-1]:.1f})"


class Vmm:
    """One program to compare: how it is told to run a guest."""

    def __init__(self, name: str, program: str):
        self.name = name
        self.program = shutil.which(program) or program
        self.starts: list[float] = []
        self.problem = ""

    def command(self, memory: int, kernel: Path, initrd: Path | None, cmdline: str, disk: Path | None) -> list[str]:
        raise NotImplementedError


class Cowhand(Vmm):
    def command(self, memory, kernel, initrd, cmdline, disk):
        words = [self.program, "run", "--kernel", str(kernel), "--memory", f"{memory}M", "--cpus", "1", "--serial", "null"]
        words += ["--cmdline", cmdline]
        if initrd:
            words += ["--initrd", str(initrd)]
        if disk:
            # Its backing file lies elsewhere, which has to be allowed.
            words += ["--disk", f"path={disk},format=qcow2", "--allow-dir", str(kernel.parent)]
        return words


class Qemu(Vmm):
    def __init__(self, name: str, machine: str, transport: str):
        super().__init__(name, "qemu-system-x86_64")
        self.machine = machine
        self.transport = transport

    def command(self, memory, kernel, initrd, cmdline, disk):
        words = [self.program, "-M", f"{self.machine},accel=kvm", "-cpu", "host", "-m", str(memory), "-smp", "1"]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-serial", "null", "-no-reboot"]
        words += ["-kernel", str(kernel), "-append", cmdline]
        if initrd:
            words += ["-initrd", str(initrd)]
        if disk:
            words += ["-drive", f"if=none,id=d,file={disk},format=qcow2", "-device", f"virtio-blk-{self.transport},drive=d"]
        return words


def until_first_run(command: list[str]) -> float:
    """Seconds from exec to the first KVM_RUN; raises RuntimeError when it never comes."""
    with tempfile.TemporaryDirectory() as directory:
        fifo = Path(directory, "strace")
        os.mkfifo(fifo)
        observer = ["strace", "-f", "--seccomp-bpf", "-ttt", "-e", "trace=execve,ioctl", "-e", "signal=none", "-o", str(fifo)]
        process = subprocess.Popen(
            observer + command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        begin = end = None
        # strace holds a line back until its call is over, and a guest may spin in the first KVM_RUN for long: the program is
        # killed after a while, so that strace says what it was in. The moment on the line is that of the call's begin.
        script = f"sleep {SPIN_SECONDS}; pkill -KILL -P {process.pid}; sleep {START_LIMIT_SECONDS}; kill -KILL -{process.pid}"
        guard = subprocess.Popen(["sh", "-c", script], start_new_session=True)
        try:
            with open(fifo, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    found = re.match(r"(?:\[pid +)?(\d+)\]? +(\d+\.\d+) (.*)", line)
                    if not found:
                        continue
                    moment, call = float(found[2]), found[3]
                    if begin is None and call.startswith("execve("):
                        begin = moment
                    if "KVM_RUN" in call and call.startswith("ioctl("):
                        end = moment
                        break
        finally:
            for group in (process.pid, guard.pid):
                try:
                    os.killpg(group, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            message = process.communicate()[1].decode(errors="replace").strip()
            guard.wait()
    if begin is None or end is None:
        raise RuntimeError(message.splitlines()[-1] if message else "no KVM_RUN seen")
    return end - begin


def own_memory(command: list[str], guest_mib: int) -> tuple[int, int]:
    """Resident KiB, anonymous and file, of a running VMM without its guest's memory."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        time.sleep(IDLE_SECONDS)
        if process.poll() is not None:
            message = process.stderr.read().decode(errors="replace").strip()
            raise RuntimeError(f"ended with {process.returncode}: {message.splitlines()[-1] if message else 'no message'}")
        anonymous = of_files = 0
        mapping: dict[str, int] = {}

        def count():
            nonlocal anonymous, of_files
            # The guest's memory is one mapping (or a few) of memory that is at least as large as a half of it.
            if mapping and mapping["Size"] < guest_mib * 1024 // 2:
                anonymous += mapping["Anonymous"]
                of_files += mapping["Rss"] - mapping["Anonymous"]

        for line in Path(f"/proc/{process.pid}/smaps").read_text(encoding="utf-8").splitlines():
            field = re.match(r"(\w+): +(\d+) kB", line)
            if field:
                mapping[field[1]] = int(field[2])
            elif re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                count()
                mapping = {}
        count()
        return anonymous, of_files
    finally:
        process.kill()
        process.communicate()


def libraries_size(program: str) -> int:
    """Bytes of the shared libraries that the program loads; none for a static one."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return sum(os.stat(path).st_size for path in re.findall(r"(/\S+) \(0x", said))


def start(arguments: argparse.Namespace) -> int:
    shell("need strace=strace pkill=procps; need_qemu")
    cowhand = shell("build_cowhand")
    guest = Path(shell("tools/guest"))
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        sys.exit("bench: /dev/kvm is missing or may not be opened: nothing to measure here")
    vmms = [Cowhand("cowhand", cowhand), Qemu("QEMU microvm", "microvm", "device"), Qemu("QEMU q35", "q35", "pci")]
    kernel, initrd = guest / "vmlinuz", guest / "initrd-stock"
    tiny = REPO / "resources/tiny-guest/x86_64.elf"

    with tempfile.TemporaryDirectory() as directory:
        disk = Path(directory, "disk.qcow2")
        for _ in range(arguments.runs):
            for vmm in vmms:
                disk.unlink(missing_ok=True)
                subprocess.run(
                    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", guest / "base.qcow2", "-F", "qcow2", disk], check=True
                )
                command = vmm.command(arguments.memory, kernel, initrd, "console=ttyS0 root=/dev/vda1", disk)
                try:
                    vmm.starts.append(until_first_run(command))
                except RuntimeError as error:
                    vmm.problem = str(error)

    bytes_read = kernel.stat().st_size + initrd.stat().st_size
    strace_version = subprocess.run(["strace", "-V"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    qemu_version = subprocess.run([vmms[1].program, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    print(f"host:     {os.uname().sysname} {os.uname().release}, {os.cpu_count()} processors; {strace_version}")
    print(f"versions: {subprocess.run([cowhand, '--version'], capture_output=True, text=True, check=False).stdout.strip()}; {qemu_version}")
    print(f"guest:    {arguments.memory} MiB, 1 vCPU, {bytes_read / 1e6:.1f} MB of kernel and initrd, a qcow2 overlay")
    print()
    print("                 exec to first KVM_RUN, ms      the VMM's own memory, MiB     program, MB")
    print(f"                 median of {arguments.runs} (least – most)   anon + file = all             (libraries)")
    failed = False
    for vmm in vmms:
        try:
            anonymous, of_files = own_memory(vmm.command(arguments.memory, tiny, None, arguments.idle_word, None), arguments.memory)
            memory = f"{anonymous / 1024:.1f} + {of_files / 1024:.1f} = {(anonymous + of_files) / 1024:.1f}"
        except RuntimeError as error:
            memory, vmm.problem = "none", vmm.problem or str(error)
        size = f"{os.stat(os.path.realpath(vmm.program)).st_size / 1e6:.1f} ({libraries_size(vmm.program) / 1e6:.1f})"
        print(f"{vmm.name:<16} {median_ms(vmm.starts):<30} {memory:<29} {size}")
        if vmm.problem or len(vmm.starts) < arguments.runs:
            failed = True
            print(f"                 {arguments.runs - len(vmm.starts)} of {arguments.runs} starts failed: {vmm.problem}")
    if vmms[0].starts and vmms[1].starts:
        ratio = statistics.median(vmms[0].starts) / statistics.median(vmms[1].starts)
        print(f"\ncowhand takes {ratio:.2f} of QEMU microvm's time")
    return 1 if failed else 0


def add_command(commands) -> None:
    one = commands.add_parser(
        "start",
        help="start-up time, memory and size beside QEMU",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("--runs", type=int, default=20, help="starts of each program (default 20)")
    one.add_argument("--memory", type=int, default=512, help="MiB of the guest (default 512)")
    one.add_argument("--idle-word", default="idle", help="what the tiny guest is told on its command line (default idle)")
    one.set_defaults(run=start)
