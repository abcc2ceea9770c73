"""The images that tools/bench block and vhost measure on: made by qemu-img alone, from a seed, each when a row first asks for it.

Of no image anything is compressible or equal to zeros that should not be; where a layer holds data, it does so in whole
clusters of 64 KiB.
"""

import os
import random
import subprocess
from pathlib import Path

CLUSTER = 65536
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40

FULL_BYTES = 4 * GIB
SMALL_BYTES = 512 * MIB
EMPTY_BYTES = 64 * GIB
# Sixteen times a cache of decompressed clusters of 64 MiB; QEMU keeps one cluster, cowhand some MiB.
COMPRESSED_BYTES = GIB
CHAIN_DEPTH, CHAIN_BYTES = 100, TIB
IDLE_BYTES = 100 * GIB
# Overlays of the chains that are loaded.
LAYERS = (1, 8, 32)


def img(*words) -> str:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"qemu-img {' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


class Images:
    """A directory of images. `get` makes what is missing; `keep` removes what no later row names."""

    def __init__(self, directory: Path, seed: int):
        self.directory = directory
        self.seed = seed
        # Some megabytes of noise, from which clusters are cut: no two in one image begin at the same place in it.
        self.noise = random.Random(seed).randbytes(16 * MIB)
        self.makers = {
            "full.raw": lambda path: self._noise_file(path, FULL_BYTES, range(FULL_BYTES // CLUSTER)),
            "full.qcow2": lambda path: self._converted(path, "full.raw"),
            "small.raw": lambda path: self._noise_file(path, SMALL_BYTES, range(SMALL_BYTES // CLUSTER)),
            "small.qcow2": lambda path: self._converted(path, "small.raw"),
            "text.raw": self._text,
            "zlib.qcow2": lambda path: self._converted(path, "text.raw", "-c", "-o", "compression_type=zlib"),
            "zstd.qcow2": lambda path: self._converted(path, "text.raw", "-c", "-o", "compression_type=zstd"),
            "deep.qcow2": self._deep,
            "idle.qcow2": lambda path: img("create", "-q", "-f", "qcow2", path, IDLE_BYTES),
            "idle-full.qcow2": lambda path: img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, IDLE_BYTES),
        }
        self.needs = {
            "full.qcow2": ["full.raw"], "small.qcow2": ["small.raw"], "zlib.qcow2": ["text.raw"], "zstd.qcow2": ["text.raw"],
        }
        # Made anew before each run, from nothing or over another image.
        self.fresh = {
            "fresh-empty.raw": lambda path: img("create", "-q", "-f", "raw", path, EMPTY_BYTES),
            "fresh-empty.qcow2": lambda path: img("create", "-q", "-f", "qcow2", path, EMPTY_BYTES),
            "fresh-overlay.qcow2": lambda path: self._overlay(path, "full.qcow2"),
            "fresh-extended.qcow2": lambda path: self._overlay(path, "full.qcow2", "-o", "extended_l2=on"),
        }
        # What an image refers to.
        self.stands_on = {"fresh-overlay.qcow2": "full.qcow2", "fresh-extended.qcow2": "full.qcow2"}
        for overlays in LAYERS:
            chain = f"layers-{overlays}.qcow2"
            self.makers[chain] = lambda path, overlays=overlays: self._layers(path, overlays)
            # One layer more: with nothing in it, or with all that is written to it later.
            self.fresh[f"fresh-on-{overlays}.qcow2"] = lambda path, chain=chain: self._overlay(path, chain)
            self.makers[f"written-on-{overlays}.qcow2"] = lambda path, chain=chain: self._written(path, chain)
            self.stands_on |= {f"fresh-on-{overlays}.qcow2": chain, f"written-on-{overlays}.qcow2": chain}

    def get(self, name: str) -> Path:
        """The image, in the page cache; a fresh one is made anew each time."""
        path = self.directory / name
        if name in self.stands_on:
            self.get(self.stands_on[name])
        if name in self.fresh:
            path.unlink(missing_ok=True)
            self.fresh[name](path)
            return path
        if not path.exists():
            self.makers[name](path)
        for file in [] if name.startswith("idle") else self._files_of(name):
            with open(file, "rb", buffering=0) as data:
                while data.read(4 * MIB):
                    pass
        return path

    def keep(self, names: set[str]) -> None:
        """Removes all images but these, and what they stand on."""
        wanted = set(names)
        wanted.update(self.stands_on[name] for name in names if name in self.stands_on)
        for name in list(wanted):
            # A source that exists is worth keeping only while something is still to be made of it.
            if not (self.directory / name).exists():
                wanted.update(self.needs.get(name, []))
        for name in [*self.makers, *self.fresh]:
            if name not in wanted:
                for file in self._files_of(name):
                    file.unlink(missing_ok=True)

    def _files_of(self, name: str) -> list[Path]:
        stem = name.removesuffix(".qcow2")
        return [path for path in (self.directory / name, *self.directory.glob(f"{stem}-below-*")) if path.exists()]

    def _noise_file(self, path: Path, size: int, clusters) -> None:
        """A raw file with noise in the named clusters, and holes elsewhere."""
        pick = random.Random(f"{self.seed} {path.name}")
        with open(path, "wb", buffering=0) as file:
            file.truncate(size)
            for cluster in clusters:
                start = pick.randrange(len(self.noise) - CLUSTER)
                os.pwrite(file.fileno(), self.noise[start : start + CLUSTER], cluster * CLUSTER)

    def _text(self, path: Path) -> None:
        """What compresses as text does: words of which some are frequent."""
        pick = random.Random(f"{self.seed} words")
        words = ["".join(pick.choices("abcdefghijklmnopqrstuvwxyz_.", k=pick.randrange(2, 11))) for _ in range(6000)]
        common = [words[min(int(pick.expovariate(1 / 500)), len(words) - 1)] for _ in range(1500000)]
        text = " ".join(common).encode()
        with open(path, "wb", buffering=0) as file:
            for _ in range(COMPRESSED_BYTES // CLUSTER):
                start = pick.randrange(len(text) - CLUSTER)
                file.write(text[start : start + CLUSTER])

    def _converted(self, path: Path, source: str, *options) -> None:
        source_path = self.directory / source
        if not source_path.exists():
            self.makers[source](source_path)
        img("convert", "-q", "-f", "raw", "-O", "qcow2", *options, source_path, path)

    def _overlay(self, path: Path, below: str, *options) -> None:
        img("create", "-q", "-f", "qcow2", "-b", self.directory / below, "-F", "qcow2", *options, path)

    def _written(self, path: Path, below: str) -> None:
        """An overlay that has the first SMALL_BYTES of the disk."""
        source = path.with_suffix(".source")
        self._noise_file(source, SMALL_BYTES, range(SMALL_BYTES // CLUSTER))
        img("convert", "-q", "-f", "raw", "-O", "qcow2", source, path)
        source.unlink()
        img("resize", "-q", "-f", "qcow2", path, FULL_BYTES)
        img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", self.directory / below, path)

    def _layers(self, path: Path, overlays: int) -> None:
        """A base and so many overlays; each holds an equal share of all clusters, chosen at random."""
        order = list(range(FULL_BYTES // CLUSTER))
        random.Random(f"{self.seed} layers").shuffle(order)
        below = None
        for layer in range(overlays + 1):
            name = path if layer == overlays else path.with_name(f"{path.stem}-below-{layer}.qcow2")
            source = path.with_suffix(".source")
            self._noise_file(source, FULL_BYTES, order[layer :: overlays + 1])
            img("convert", "-q", "-f", "raw", "-O", "qcow2", source, name)
            source.unlink()
            if below:
                img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, name)
            below = name

    def _deep(self, path: Path) -> None:
        """A chain of images of 1 TiB, each with a little data at places of its own."""
        below = None
        for layer in range(CHAIN_DEPTH):
            name = path if layer == CHAIN_DEPTH - 1 else path.with_name(f"{path.stem}-below-{layer}.qcow2")
            img("create", "-q", "-f", "qcow2", name, CHAIN_BYTES)
            writes = [f"write -q -P {layer + 1} {(part * CHAIN_DEPTH + layer) * GIB} 64k" for part in range(8)]
            commands = [word for write in writes for word in ("-c", write)]
            subprocess.run(["qemu-io", "-f", "qcow2", *commands, name], check=True, stdout=subprocess.DEVNULL)
            if below:
                img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, name)
            below = name
