"""A `clipfleet embed` of this checkout as a process that may be killed, and what its DEST holds."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import data
from benchmarks.processes import below
from clipfleet.encoder import Encoder
from clipfleet.image_files import ImageLimits
from clipfleet.images import decode
from faults.served import ROOT

BROKEN_EVERY = 100
SAMPLE = 32  # photographs whose vectors are compared with the library's
PLACE = ROOT / "build" / "faults" / "job"
_WORKERS = ("MapBatches", "MapWorker", "_MapWorker")


@dataclass(frozen=True)
class Images:
    """A source: which of the distinct photographs each id is; those that are broken have none."""

    folder: Path
    photographs: dict[str, int | None]

    @property
    def broken(self) -> set[str]:
        return {name for name, photograph in self.photographs.items() if photograph is None}


def images(folder: Path, count: int) -> Images:
    """Hard links of the benchmarks' photographs, a thousand in a folder; every hundredth is cut."""
    distinct = data.files(data.photographs(data.LIBRARY_FILES))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cut = folder.parent / "cut.jpg"
    cut.write_bytes(distinct[0].read_bytes()[:5000])
    photographs: dict[str, int | None] = {}
    for number in range(count):
        name = f"{number // 1000:03d}/{number:06d}.jpg"
        broken = number % BROKEN_EVERY == BROKEN_EVERY // 2
        (folder / name).parent.mkdir(exist_ok=True)
        os.link(cut if broken else distinct[number % len(distinct)], folder / name)
        photographs[name] = None if broken else number % len(distinct)
    return Images(folder, photographs)


class Job:
    """A running job. `folder` is its TMPDIR, by which its processes are found when their parents are gone."""

    def __init__(self, source: Path, dest: Path, *options: str, faults: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
        self._log = (self.folder.parent / f"{self.folder.name}.log").open("w+")
        path = os.pathsep.join([str(ROOT), str(ROOT / "faults" / "injected")])
        command = [sys.executable, "-m", "clipfleet.cli", "embed", source, dest, "--model", "tiny", *options]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self.folder), "PYTHONPATH": path, "FAULTS": str(faults or self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.poll()

    @property
    def said(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    @property
    def last_line(self) -> str:
        return (self.said.strip().splitlines() or [""])[-1]

    def workers(self) -> list[int]:
        return [pid for pid, name in below(self.process.pid).items() if name.startswith(_WORKERS)]

    def raylets(self) -> list[int]:
        return [pid for pid, name in below(self.process.pid).items() if name == "raylet"]

    def kill(self, what: str) -> bool:
        """`kill -9` the driver, a random worker, the node's raylet, or all processes. Returns whether there was one."""
        if self.status is not None:
            return False
        kinds = {
            "driver": lambda: [self.process.pid],
            "worker": self.workers,
            "node": self.raylets,
            "all": self.members,
        }
        victims = kinds[what]()
        if what == "worker":
            victims = random.sample(victims, min(1, len(victims)))
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if what == "all":  # one of them may just have started another
            while more := self.members():
                for pid in more:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
        if what != "worker":  # a driver ends with its node
            self.process.wait(120)
        return bool(victims)

    def members(self) -> list[int]:
        """All processes of this job, also those whose parents have died; by their environment, or by files that they
        have open, because Ray's write their titles over the former."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid() and self._is_member(Path("/proc", entry)):
                found.append(int(entry))
        return found

    def _is_member(self, home: Path) -> bool:
        with suppress(OSError):
            if (home / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
            if str(self.folder).encode() in (home / "environ").read_bytes():
                return True
            for link in (home / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(link).startswith(f"{self.folder}/"):
                        return True
        return False

    def wait(self, seconds: float = 1800) -> int:
        return self.process.wait(seconds)

    def close(self, seconds: float = 40) -> list[int]:
        """Wait for its other processes to end by themselves; ends and returns those that do not."""
        end = time.monotonic() + seconds
        while (left := self.members()) and time.monotonic() < end:
            time.sleep(0.2)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._log.close()
        Path(self._log.name).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


@contextmanager
def embedding(source: Path, dest: Path, *options: str, faults: Path | None = None) -> Iterator[Job]:
    """A job that is ended with the block."""
    job = Job(source, dest, *options, faults=faults)
    try:
        yield job
    finally:
        if job.status is None:
            job.kill("all")
        job.close()


def parts(dest: Path) -> list[Path]:
    return sorted(dest.glob("part-*.parquet"))


def until_parts(job: Job, dest: Path, count: int) -> bool:
    """Wait until DEST has so many files; False if the job ended before."""
    while len(parts(dest)) < count:
        if job.status is not None:
            return False
        time.sleep(0.05)
    return True


def problems(dest: Path, source: Images) -> list[str]:
    """What is wrong with a finished DEST: ids, error rows, and vectors of equal photographs that differ."""
    errors: dict[str, str] = {}
    ids: list[str] = []
    of_photograph: dict[int, list[np.ndarray]] = defaultdict(list)
    for path in parts(dest):
        for row in pq.read_table(path, columns=["id", "embedding", "error"]).to_pylist():
            ids.append(row["id"])
            photograph = source.photographs.get(row["id"])
            if row["error"] is not None:
                errors[row["id"]] = row["error"]
            elif photograph is not None:
                of_photograph[photograph].append(np.array(row["embedding"], np.float32))
    found = []
    if missing := len(source.photographs.keys() - set(ids)):
        found.append(f"{missing} ids missing")
    if doubled := len(ids) - len(set(ids)):
        found.append(f"{doubled} ids doubled")
    if others := len(set(ids) - source.photographs.keys()):
        found.append(f"{others} ids that the source does not have")
    if errors.keys() != source.broken:
        found.append(f"{len(errors)} error rows instead of {len(source.broken)}")
    apart = max((float(np.ptp(np.stack(each), axis=0).max()) for each in of_photograph.values()), default=0.0)
    if apart > 1e-4:
        found.append(f"vectors of the same photograph differ by {apart:.1g}")
    found += _unlike_the_library(of_photograph)
    if not (dest / "_clipfleet.json").exists():
        found.append("no summary")
    return found


def _unlike_the_library(of_photograph: dict[int, list[np.ndarray]]) -> list[str]:
    """What is wrong with a sample of vectors, beside those of the library's encoder for the same files."""
    sample = random.sample(sorted(of_photograph), min(SAMPLE, len(of_photograph)))
    if len(sample) < 2:
        return ["no vectors to compare with the library's"]
    files, encoder = data.files(data.photographs(data.LIBRARY_FILES)), Encoder("tiny", "cpu", towers=("image",))
    limits = ImageLimits(reduced_jpeg=True)  # as the jobs here have it
    pixels = [decode(files[number].read_bytes(), encoder.checkpoint.pixels, limits)[0] for number in sample]
    expected = encoder.encode_pixels(np.stack(pixels))  # (n, d)
    apart = max(float(np.abs(np.stack(of_photograph[n]) - e).max()) for n, e in zip(sample, expected, strict=True))
    found = [f"vectors differ from the library's by {apart:.1g}"] if apart > 1e-5 else []
    if float(np.ptp(np.stack([of_photograph[number][0] for number in sample]), axis=0).max()) < 1e-3:
        found.append("vectors of different photographs are alike")
    return found
