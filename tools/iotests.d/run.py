"""Runs tests of QEMU's suite side by side and tells what came of them. tools/iotests calls it."""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Far longer than any test takes with QEMU's tools; a test that waits for ever is stopped.
TIME_LIMIT = 400
MODES = {
    "img": "cowhand as qemu-img, QEMU's qemu-io",
    "both": "cowhand as qemu-img and qemu-io",
    "qemu": "QEMU's own tools",
}


@dataclasses.dataclass
class Test:
    """A line of the list: `NAME WORD... : REASON`."""

    name: str
    # img, both: known to pass so. slow: left out by --known. tmpfs: needs a file system for huge sparse files.
    words: frozenset
    # Why it is out of reach; "" when it is not. `img:` or `both:` before it limits it to that mode.
    reason: str

    def out_of_reach(self, mode: str) -> str:
        limited = re.match(r"(img|both|qemu): *(.*)", self.reason)
        if limited:
            return limited[2] if limited[1] == mode else ""
        return self.reason


@dataclasses.dataclass
class Result:
    test: Test
    outcome: str  # passed, failed, not run
    seconds: float
    why: str = ""  # of what was not run
    diff: tuple = ()


def read_list(path: Path) -> list:
    tests = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        head, _, reason = line.partition(" : ")
        name, *words = head.split()
        if unknown := set(words) - {"img", "both", "slow", "tmpfs"}:
            sys.exit(f"iotests: {path}:{number}: {' '.join(sorted(unknown))}: no such word")
        tests.append(Test(name, frozenset(words), reason.strip()))
    return tests


def record(path: Path, mode: str, results: list) -> None:
    """Writes into the list which of the tests that ran pass in a mode."""
    passes = {result.test.name: result.outcome == "passed" for result in results if result.outcome != "not run"}
    lines = []
    for line in path.read_text().splitlines():
        head, colon, reason = line.partition(" : ")
        words = head.split()
        if words and words[0] in passes:
            name, *words = [word for word in words if word != mode]
            words = sorted(words + [mode] * passes[name], key=["img", "both", "slow", "tmpfs"].index)
            line = " ".join([name, *words]) + colon + reason
        lines.append(line)
    path.write_text("\n".join(lines) + "\n")


def chosen(tests: list, names: list) -> list:
    known = {test.name: test for test in tests}
    return [known.get(name.removeprefix("tests/")) or Test(name, frozenset(), "") for name in names] or tests


class Runner:
    def __init__(self, arguments, mode: str):
        self.suite = arguments.suite
        self.mode = mode
        self.programs = self.make_programs(arguments)
        scratch = arguments.made / "scratch" / mode
        # Some tests put the path into places where only these characters mean themselves.
        if not re.fullmatch(r"[-_a-zA-Z0-9/]+", str(scratch)):
            scratch = Path(tempfile.gettempdir()) / f"cowhand-iotests-{os.getuid()}" / mode
        self.scratch = scratch
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)

    def make_programs(self, arguments) -> dict:
        """Names the programs for the suite; cowhand is what it is called."""
        programs = {
            "QEMU_PROG": shutil.which("qemu-system-x86_64"),
            "QEMU_NBD_PROG": shutil.which("qemu-nbd"),
            "QSD_PROG": shutil.which("qemu-storage-daemon"),
            "QEMU_IMG_PROG": shutil.which("qemu-img"),
            "QEMU_IO_PROG": shutil.which("qemu-io"),
        }
        here = arguments.made / "bin" / self.mode
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        replaced = {"img": ["qemu-img"], "both": ["qemu-img", "qemu-io"], "qemu": []}[self.mode]
        for name in replaced:
            (here / name).symlink_to(arguments.cowhand)
            programs[name.upper().replace("-", "_") + "_PROG"] = str(here / name)
        if missing := [name for name, path in programs.items() if not path]:
            sys.exit(f"iotests: not installed: {' '.join(missing)}")
        return programs

    def environment(self, test: Test, sockets: str) -> dict:
        place = self.scratch
        if "tmpfs" in test.words:
            place = Path("/dev/shm") / f"cowhand-iotests-{os.getuid()}" / self.mode
            place.mkdir(parents=True, exist_ok=True)
        return os.environ | self.programs | {"TEST_DIR": str(place), "SOCK_DIR": sockets}

    def run(self, test: Test) -> Result:
        began = time.monotonic()
        # The path of a socket is limited to 107 bytes.
        with tempfile.TemporaryDirectory(prefix="iotests-") as sockets:
            process = subprocess.Popen(
                ["./check", "-qcow2", test.name],
                cwd=self.suite,
                env=self.environment(test, sockets),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=TIME_LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                output += f"\n+no end after {TIME_LIMIT} s\n"
        seconds = time.monotonic() - began
        # What a test printed may have carriage returns; the last state of its line counts.
        state = re.findall(rf"^{re.escape(test.name)} +(pass|fail|not run)\b(.*)$", output.replace("\r", "\n"), re.M)
        if process.returncode == 0 and state and state[-1][0] == "pass":
            return Result(test, "passed", seconds)
        if process.returncode == 0 and state and state[-1][0] == "not run":
            return Result(test, "not run", seconds, why=re.sub(r"^.*\.\.\.\s*", "", state[-1][1]))
        lines = output.split("\n")
        start = next((n for n, line in enumerate(lines) if line.startswith("--- ")), None)
        return Result(test, "failed", seconds, diff=tuple(lines[start:-3] if start is not None else lines))


def first_difference(result: Result) -> str:
    """The first line that should have been otherwise: tests that fail for one reason have it in common."""
    changed = [line for line in result.diff if re.match(r"[-+](?!--|\+\+)", line)]
    wanted = next((line for line in changed if line.startswith("-")), None)
    got = next((line for line in changed if line.startswith("+")), None)
    return f"{wanted or '(nothing more)'}\n    {got or '(nothing)'}"


def report(mode: str, results: list, show_diff: bool) -> int:
    """Prints what came of a mode's tests, and returns how many failed unexpectedly."""
    print(f"== {mode}: {MODES[mode]}")
    groups = collections.defaultdict(list)
    unexpected = 0
    for result in results:
        reason = result.test.out_of_reach(mode)
        if result.outcome == "not run":
            groups[f"not run: {result.why}"].append(result)
        elif result.outcome == "failed":
            unexpected += not reason
            groups[f"out of reach: {reason}" if reason else f"failed:\n    {first_difference(result)}"].append(result)
            if show_diff:
                print("\n".join(result.diff))
        elif reason:
            print(f"passes though the list calls it out of reach: {result.test.name}")
    for group, members in sorted(groups.items(), key=lambda item: (item[0].split(":")[0], -len(item[1]))):
        print(f"{' '.join(result.test.name for result in members)}: {group}")
    passed = [result.test.name for result in results if result.outcome == "passed"]
    print(f"passed: {' '.join(passed)}")
    slowest = sorted(results, key=lambda result: -result.seconds)[:12]
    print(f"slowest: {', '.join(f'{result.test.name} {result.seconds:.0f} s' for result in slowest)}")
    counts = collections.Counter(result.outcome for result in results)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['not run']} not run")
    return unexpected


def tap(mode: str, results: list) -> None:
    for result in results:
        name = f"{result.test.name} with {MODES[mode]}"
        if result.outcome == "passed":
            print(f"ok {name}")
        elif result.outcome == "not run":
            print(f"ok {name} # SKIP {result.why}")
        else:
            print(f"not ok {name}")
            print("\n".join(f"# {line}" for line in result.diff[:60]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--list", type=Path, required=True)
    parser.add_argument("--made", type=Path, required=True)
    parser.add_argument("--cowhand", type=Path)
    parser.add_argument("--mode", choices=MODES, action="append", required=True)
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--diff", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("tests", nargs="*")
    arguments = parser.parse_args()

    listed = read_list(arguments.list)
    unexpected = 0
    for mode in arguments.mode:
        tests = chosen(listed, arguments.tests)
        if arguments.known:
            tests = [test for test in tests if mode in test.words and "slow" not in test.words]
        runner = Runner(arguments, mode)
        # The slow ones first, so that no processor waits for the last of them.
        order = sorted(tests, key=lambda test: "slow" not in test.words)
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            done = {result.test.name: result for result in pool.map(runner.run, order)}
        results = [done[test.name] for test in tests]
        if arguments.known:
            tap(mode, results)
            unexpected += sum(result.outcome == "failed" for result in results)
        else:
            unexpected += report(mode, results, arguments.diff)
            if arguments.record and mode != "qemu":
                record(arguments.list, mode, results)
        sys.stdout.flush()
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
