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
_FULL = "DEST on a full disk"
_SMALL = 900  # images of the short faults
_FAST = "--reduced-jpeg"
NOT_REFUSED = "second jobs not refused"
STOPPED = "stopped by itself"
LATE = "no job at work within ten minutes"
_WHILE_WRITING = " while a file was written"
_LATE_S = 600


def measure(count: int) -> list[Row]:
    """Every kind of fault; the first with `count` images."""
    try:
        return [killed(count), full_disk(), vanished_dest(), changing_source()]
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


def killed(count: int) -> Row:
    """Ten random kills, one at least while a file is written; after those of the driver the same command is started again."""
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
            last = ""
            for number, what in enumerate(random.sample(KILLS, len(KILLS))):
                at = random.randrange(files * 9 // 10)
                job = _running(job, source, dest, Path(folder), seen, at, left, last)
                if seen[LATE]:
                    break
                if number == 0:
                    seen["second jobs refused" if _is_refused(source, dest) else NOT_REFUSED] += 1
                while_writing = number % 3 == 0 and _until_writing(job, dest)
                time.sleep(0 if while_writing else random.uniform(0, 2))
                if job.kill(what):
                    if what == "node" and "its Ray has died" not in job.last_line:
                        seen["ends without a word"] += 1
                    when = _WHILE_WRITING if while_writing else ""
                    seen[f"{what}{when}"] += 1
                    _say(f"kill -9 {what}{when}; {len(parts(dest))} files")
                last = what
            if not seen[LATE]:
                job = _running(job, source, dest, Path(folder), seen, files + 1, left, last)
            status = job.status
        finally:
            if job.status is None:
                job.kill("all")
            left += job.close()
        encoded = sum(map(int, log.read_text().split()))
    wrong = problems(dest, source)
    wrong += _unlike_what_is_claimed(seen)
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
    listed = ", ".join(f"{times} x {what}" for what, times in sorted(seen.items()))
    outcome = f"{'; '.join(wrong) or 'each id once, none missing'}; {encoded - needed} of {needed} rows encoded twice; {listed}"
    return Row(
        "`kill -9` of the job's processes, tiny", f"{count} images", kills, outcome, not wrong and kills == len(KILLS)
    )


def _unlike_what_is_claimed(seen: Counter[str]) -> list[str]:
    """What the kills and their job should have met and did not, or the other way round."""
    wrong = []
    if silent := seen["ends without a word"]:
        wrong.append(f"{silent} ends without a word after a node was killed")
    if seen[NOT_REFUSED] or not seen["second jobs refused"]:
        wrong.append("a second job was not refused")
    wrong += [f"{times} x {what}" for what in (STOPPED, LATE) if (times := seen[what])]
    if not any(what.endswith(_WHILE_WRITING) for what in seen):
        wrong.append(f"no kill{_WHILE_WRITING}")
    return wrong


def _running(
    job: Job, source: Images, dest: Path, faults: Path, seen: Counter[str], at: int, left: list[int], last: str
) -> Job:
    """The job, started again where it was killed or refused, once DEST has `at` files and it has workers; or ended.

    `last` is what was killed last: a job without its node ends by itself, once. What takes ten minutes is noted.
    """
    end = time.monotonic() + _LATE_S
    while time.monotonic() < end:
        if job.status is None:
            if len(parts(dest)) >= at and job.workers():
                return job
            time.sleep(0.05)
            continue
        if job.status in (0, 3):
            return job
        if job.status > 0:
            if "another job" in job.last_line:
                seen["start refused beside what was left"] += 1
            elif last not in ("node", "all"):
                seen[STOPPED] += 1
            _say(job.last_line)
            time.sleep(0.5)
        last = ""
        ended, job = (
            job,
            Job(source.folder, dest, _FAST, faults=faults),
        )  # at once, while workers of the first may live on
        left += ended.close()
    seen[LATE] += 1
    return job


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


def full_disk() -> Row:
    """DEST on a file system of 1.5 MB, which then gets larger."""
    if os.geteuid() != 0:
        outcome = "not run: it needs root, who may mount a small disk"
        _say(outcome)
        return Row(_FULL, f"{_SMALL} images", 0, outcome, False)
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
    return Row(_FULL, f"{_SMALL} images", 1, outcome, stopped and not wrong)


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
