"""The offline job under `kill -9`, on a full disk, without its DEST, and with a source that changes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

from faults.embedding import PLACE, Images, Job, embedding, images, parts, problems, until_parts
from faults.report import Row

KILLS = ("driver",) * 3 + ("worker",) * 3 + ("all",) * 2 + ("node",) * 2
ROWS_PER_FILE = 222  # at 224 px
BATCH = 32
_SMALL = 900  # images of the short faults
_FAST = "--reduced-jpeg"
NOT_REFUSED = "second jobs not refused"


def measure(count: int) -> list[Row]:
    """Every kind of fault; the first with `count` images."""
    try:
        return [killed(count), *full_disk(), vanished_dest(), changing_source()]
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


def killed(count: int) -> Row:
    """Ten random kills, some while a file is written; after those of the driver the same command is started again."""
    source, dest = images(PLACE / "source", count), PLACE / "dest"
    shutil.rmtree(dest, ignore_errors=True)
    files = -(-count // ROWS_PER_FILE)
    seen: Counter[str] = Counter()
    left: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "encoded")
        log.touch()  # injected/sitecustomize.py notes there what is encoded
        job = Job(source.folder, dest, _FAST, faults=Path(folder))
        try:
            for number, what in enumerate(random.sample(KILLS, len(KILLS))):
                job = _running(job, source, dest, Path(folder), seen, random.randrange(files * 9 // 10), left)
                if number == 0:
                    seen["second jobs refused" if _is_refused(source, dest) else NOT_REFUSED] += 1
                while_writing = number % 3 == 0 and _until_writing(job, dest)
                time.sleep(0 if while_writing else random.uniform(0, 2))
                if job.kill(what):
                    if what == "node" and "its Ray has died" not in job.last_line:
                        seen["ends without a word"] += 1
                    seen[f"{what}{' while a file was written' if while_writing else ''}"] += 1
                    _say(
                        f"kill -9 {what}{' while a file was written' if while_writing else ''}; {len(parts(dest))} files"
                    )
            job = _running(job, source, dest, Path(folder), seen, files + 1, left)
            status = job.wait()
        finally:
            if job.status is None:
                job.kill("all")
            left += job.close()
        encoded = sum(map(int, log.read_text().split()))
    wrong = problems(dest, source)
    if silent := seen["ends without a word"]:
        wrong.append(f"{silent} ends without a word after a node was killed")
    if status != 3:
        wrong.append(f"status {status} instead of 3")
    if left:
        wrong.append(f"{len(left)} processes left")
    needed = count - len(source.broken)
    kills = sum(times for what, times in seen.items() if what.startswith(KILLS))
    if not 0 <= encoded - needed <= kills * (ROWS_PER_FILE + BATCH):  # what docs/reliability.md says
        wrong.append(
            f"{encoded - needed} rows encoded twice, which is more than a file and a batch a kill, or none noted"
        )
    if seen[NOT_REFUSED] or not seen["second jobs refused"]:
        wrong.append("a second job was not refused")
    listed = ", ".join(f"{times} x {what}" for what, times in sorted(seen.items()))
    outcome = f"{'; '.join(wrong) or 'each id once, none missing'}; {encoded - needed} of {needed} rows encoded twice; {listed}"
    return Row(
        "`kill -9` of the job's processes, tiny", f"{count} images", kills, outcome, not wrong and kills == len(KILLS)
    )


def _running(job: Job, source: Images, dest: Path, faults: Path, seen: Counter[str], at: int, left: list[int]) -> Job:
    """The job, started again where it was killed or refused, once DEST has `at` files and it has workers; or ended."""
    while True:
        if job.status is None:
            if len(parts(dest)) >= at and job.workers():
                return job
            time.sleep(0.05)
            continue
        if job.status in (0, 3):
            return job
        if job.status > 0:
            refused = "another job" in job.last_line
            seen["start refused beside what was left" if refused else "stopped by itself"] += 1
            _say(job.last_line)
            time.sleep(0.5)
        ended, job = (
            job,
            Job(source.folder, dest, _FAST, faults=faults),
        )  # at once, while workers of the first may live on
        left += ended.close()


def _is_refused(source: Images, dest: Path) -> bool:
    with embedding(source.folder, dest, _FAST) as second:
        return second.wait() == 1 and "another job" in second.last_line


def _until_writing(job: Job, dest: Path, seconds: float = 30) -> bool:
    """Wait for an output file that is being written; whether there was one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and job.status is None:
        if next((dest / ".clipfleet").glob("run-*/part-*"), None):
            return True
        time.sleep(0.0005)
    return False


@contextmanager
def _tmpfs(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disk() -> list[Row]:
    """DEST on a file system of 1.5 MB, which then gets larger."""
    if os.geteuid() != 0:
        _say("a full disk needs root, who may mount a small one: left out")
        return []
    source, dest = images(PLACE / "source", _SMALL), PLACE / "small"
    with _tmpfs(dest, "1536k"):
        with embedding(source.folder, dest, _FAST) as job:
            status, line = job.wait(), job.last_line
            stopped = status == 1 and "No space left on device" in line and job.said.count("clipfleet: ") == 1
        _say(line)
        rows = sum(pq.ParquetFile(path).metadata.num_rows for path in parts(dest))  # none is cut
        subprocess.run(["mount", "-o", "remount,size=64m", dest], check=True)
        wrong = _again(source, dest, 3)
    outcome = (
        f"{'one line' if stopped else line}, {rows} rows kept whole; afterwards {'; '.join(wrong) or 'each id once'}"
    )
    return [Row("DEST on a full disk", f"{_SMALL} images", 1, outcome, stopped and not wrong)]


def vanished_dest() -> Row:
    """DEST is renamed away while the job runs."""
    source, dest = images(PLACE / "source", _SMALL), PLACE / "vanishing"
    away = dest.with_name("away")
    for folder in (dest, away):
        shutil.rmtree(folder, ignore_errors=True)
    with embedding(source.folder, dest, _FAST) as job:
        met = until_parts(job, dest, 1)
        dest.rename(away)
        status, line = job.wait(), job.last_line
        stopped = status == 1 and "has vanished" in line and job.said.count("clipfleet: ") == 1
    _say(line)
    rows = sum(pq.ParquetFile(path).metadata.num_rows for path in parts(away))
    shutil.rmtree(dest, ignore_errors=True)
    away.rename(dest)
    wrong = _again(source, dest, 3)
    outcome = f"{'one line' if stopped else line}, {rows} rows kept; back again: {'; '.join(wrong) or 'each id once'}"
    return Row("DEST vanishes while the job runs", f"{_SMALL} images", int(met), outcome, met and stopped and not wrong)


def changing_source() -> Row:
    """Files that are deleted or cut while the job runs: rows with errors, which --changed then brings up to date."""
    source, dest = images(PLACE / "source", _SMALL), PLACE / "changing"
    shutil.rmtree(dest, ignore_errors=True)
    last = sorted(source.photographs.keys() - source.broken)[-20:]
    with embedding(source.folder, dest, _FAST) as job:
        met = until_parts(job, dest, 1)
        for name in last:
            (source.folder / name).unlink()
        for name in last[10:]:
            (source.folder / name).write_bytes(b"\xff\xd8\xff cut")
        status = job.wait()
    changed = Images(source.folder, {name: None if name in last else n for name, n in source.photographs.items()})
    wrong = problems(dest, changed)
    _say("; ".join(wrong) or "each id once, 20 more rows with errors")
    for name in last:
        (source.folder / name).unlink(missing_ok=True)
        os.link(source.folder / "000" / "000000.jpg", source.folder / name)
    mended = Images(source.folder, {name: 0 if name in last else n for name, n in source.photographs.items()})
    after = _again(mended, dest, 3, "--changed")
    outcome = f"{'; '.join(wrong) or '20 rows with errors, each id once'}; mended, --changed: {'; '.join(after) or 'all done'}"
    kept = met and status == 3 and not wrong and not after
    return Row("20 files deleted or cut while the job runs", f"{_SMALL} images", int(met), outcome, kept)


def _again(source: Images, dest: Path, status: int, *options: str) -> list[str]:
    """Start the same command again; returns what is wrong in the end."""
    with embedding(source.folder, dest, _FAST, *options) as job:
        found = job.wait()
        wrong = problems(dest, source)
        if found != status:
            wrong.append(f"status {found}: {job.last_line}")
    return wrong


def _say(line: str) -> None:
    print(f"{time.strftime('%T')} {line}", flush=True)
