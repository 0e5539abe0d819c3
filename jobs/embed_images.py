"""The offline job: `clipfleet embed SOURCE DEST`, or `python -m jobs.embed_images SOURCE DEST`.

    list ─▶ what is not finished yet, as numbered task files ─▶ decode (tasks) ─▶ encode and write (a pool of actors)

Everything before Ray streams through this process without being held; Ray Data carries pixels from the decode
tasks to the actors, and back here come only counts.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from clipfleet.checkpoint import EMBEDDED, Checkpoint, find_checkpoint
from clipfleet.errors import ClipfleetError, JobError, SettingsError
from clipfleet.fingerprint import fingerprint
from clipfleet.images import ImageLimits
from jobs import manifests, output
from jobs.decoding import DecodePlan, decode_tasks
from jobs.destination import Claim, claim
from jobs.encoding import EncodeActor, EncodePlan
from jobs.ledger import Ledger, State, write_tasks
from jobs.local_ray import DECODE_CPUS, Resources, connected, place, quiet_data
from jobs.options import EmbedOptions
from jobs.output import Origin
from jobs.progress import Progress
from jobs.sources import Item, Source, is_uri, open_files

FINISHED, STOPPED, WRONG_USAGE, FINISHED_WITH_FAILURES = 0, 1, 2, 3
_PIXEL_BYTES = 32 * 2**20  # of one output file's images; a block of Ray Data holds one file's
_TASKS_AT_MOST = 10_000  # more work than that goes to tasks in groups
_FILES_PER_BYTES_TASK = 16  # a task reads a manifest's row group from its start, so it should use much of it


@dataclass(frozen=True)
class Summary:
    """`rows`, `embedded`, `failed` and `errors` describe the finished DEST; `skipped` (inputs that were finished
    before), `seconds`, `startup_seconds` (until an encoder was ready) and `images_per_second` (from then on) describe
    this run."""

    rows: int
    embedded: int
    failed: int
    skipped: int
    errors: dict[str, int]
    images_per_second: float
    seconds: float
    startup_seconds: float
    fingerprint: str
    model: str
    precision: str
    engine: str
    jpegs: str

    @property
    def exit_status(self) -> int:
        return FINISHED_WITH_FAILURES if self.failed else FINISHED

    def __str__(self) -> str:
        lines = [f"{self.rows} rows: {self.embedded} embedded, {self.failed} failed"]
        lines += [f"  {number} {code}" for code, number in self.errors.items()]
        if self.images_per_second:
            lines.append(
                f"{self.images_per_second:.1f} images/s over {self.seconds:.1f} s, {self.startup_seconds:.1f} s of it to start"
            )
        else:
            lines.append("nothing to do: every input was finished before")
        if "," in self.precision + self.engine + self.jpegs:
            settings = f"precision {self.precision}; engine {self.engine}; JPEGs {self.jpegs}"
            lines.append(f"made in part by different settings: {settings}")
        if self.skipped and self.images_per_second:
            lines.append(f"{self.skipped} inputs were finished before and skipped")
        return "\n".join(lines)


def exit_status(error: ClipfleetError) -> int:
    """The status to end with when run() raised `error`."""
    return WRONG_USAGE if isinstance(error, SettingsError) else STOPPED


def run(options: EmbedOptions, *, progress: bool = True) -> Summary:
    """Embed what is not finished yet, and write the summary.

    Raises SettingsError for what the command line got wrong, and CheckpointError, FingerprintMismatch or JobError
    for all else that stops it; then the same call goes on from where it stopped. Call it in the main thread, so that
    Ctrl-C and SIGTERM stop it that way.
    """
    started = time.time()
    source = _open_source(options)
    checkpoint = find_checkpoint(options.model)
    engine = options.engine_on(gpu=options.device.startswith("cuda"))
    origin = Origin(
        fingerprint(checkpoint),
        checkpoint.served_name,
        checkpoint.revision,
        options.precision,
        engine,
        "reduced" if options.reduced_jpeg else "whole",
    )
    try:
        with _stoppable(), claim(options.dest) as claimed:
            work = _plan(options, source, checkpoint, origin, claimed)
            if work.pending:
                (claimed.folder / output.SUMMARY).unlink(missing_ok=True)
                origin, ready = _execute(options, work, checkpoint, origin, claimed, progress)
            else:
                ready = time.time()
            return _finish(work, origin, claimed, started, ready)
    except KeyboardInterrupt:
        raise JobError(f"stopped. {_GO_ON}") from None


_GO_ON = "What is finished is kept; the same command goes on from there"


@dataclass(frozen=True)
class _Work:
    """What a run has to do."""

    source: Source
    tasks: Path
    task_count: int
    rows_per_file: int
    pending: int
    skipped: int
    before: int  # rows that DEST holds and keeps


def _open_source(options: EmbedOptions) -> Source:
    path = options.source
    if not is_uri(path) and os.path.isfile(os.path.expanduser(path)):
        if path.lower().endswith(manifests.SUFFIXES):
            return manifests.open_manifest(options)
        raise SettingsError(f"{path!r} is no manifest; give a folder, a glob, or {', '.join(manifests.SUFFIXES)}")
    for name in ("path_column", "bytes_column", "id_column"):
        if getattr(options, name):
            raise SettingsError(f"{name} is for manifests, and {path!r} is none")
    return open_files(path)


def _plan(options: EmbedOptions, source: Source, checkpoint: Checkpoint, origin: Origin, claimed: Claim) -> _Work:
    height, width = checkpoint.pixels.size
    rows_per_file = max(1, min(options.rows_per_file, _PIXEL_BYTES // (height * width * 3)))
    rows_per_task = rows_per_file * (_FILES_PER_BYTES_TASK if source.manifest else 1)
    skipped = 0
    with Ledger(claimed.scratch / "ids.sqlite") as ledger:
        before, failed_in = _record_finished(ledger, claimed, origin)

        def pending() -> Iterator[Item]:
            nonlocal skipped
            for item in source.items:
                state = ledger.claim(item.id)
                if state is State.NEW or (state is State.FAILED and options.retry_errors):
                    yield item
                else:
                    skipped += 1

        tasks = claimed.scratch / "tasks"
        task_count, rows = write_tasks(pending(), tasks, rows_per_task)
        if rows + skipped == 0:
            raise SettingsError(f"{options.source!r} holds no images")
        if options.retry_errors:
            before -= sum(output.drop_rows(claimed, name, ledger.is_named) for name in sorted(failed_in))
    return _Work(source, tasks, task_count, rows_per_file, rows, skipped, before)


def _record_finished(ledger: Ledger, claimed: Claim, origin: Origin) -> tuple[int, set[str]]:
    """Enter DEST's rows; returns how many there are, and the files that hold failed ones."""
    rows = 0
    failed_in: set[str] = set()
    for file, name, error in output.finished(claimed.folder, origin):
        rows += 1
        ledger.record(name, State.FAILED if error else State.FINISHED)
        if error:
            failed_in.add(file)
    return rows, failed_in


def _execute(
    options: EmbedOptions, work: _Work, checkpoint: Checkpoint, origin: Origin, claimed: Claim, progress: bool
) -> tuple[Origin, float]:
    """Do the work. Returns the origin with the engine that the resources gave, and when the first encoder was ready."""
    ready = float("inf")
    with connected(options.address) as own, _explained():
        resources = place(options.actors, options.cpus_per_actor, options.gpus_per_actor, options.settled_device, own)
        origin = replace(origin, engine=options.engine_on(gpu=resources.gpus > 0))
        decode = DecodePlan(
            work.tasks,
            checkpoint.pixels,
            ImageLimits(reduced_jpeg=options.reduced_jpeg),
            work.rows_per_file,
            work.source.manifest,
            work.source.bytes_column,
        )
        encode = EncodePlan(
            claimed, origin, _everywhere(checkpoint), options.device, options.batch_size, resources.threads
        )
        with Progress(work.pending, progress) as shown:
            for batch in _stream(work.task_count, decode, encode, resources):
                shown.advance(int(batch["rows"].sum()))
                ready = min(ready, float(batch["ready"].min()))
    return origin, min(ready, time.time())  # another node's clock may be ahead


def _everywhere(checkpoint: Checkpoint) -> str:
    """The checkpoint's name as another process or node finds the same one."""
    if checkpoint.revision:
        return f"{checkpoint.name.partition('@')[0]}@{checkpoint.revision}"
    return checkpoint.name if checkpoint.name in EMBEDDED else str(checkpoint.folder.resolve())


def _stream(task_count: int, decode: DecodePlan, encode: EncodePlan, resources: Resources) -> Iterator[dict[str, Any]]:
    import ray.data

    with quiet_data():
        dataset = ray.data.from_items(list(range(task_count)), override_num_blocks=min(task_count, _TASKS_AT_MOST))
        dataset = dataset.map_batches(
            cast(Any, decode_tasks),  # Ray's annotation has no generators
            fn_args=(decode,),
            num_cpus=DECODE_CPUS,
            # What its pixels take. The encoders reserve no memory, and between stages whose resources are equal Ray
            # Data sees one stage: it would decode in the actors.
            memory=_PIXEL_BYTES,
        )
        dataset = dataset.map_batches(
            EncodeActor,
            fn_constructor_args=(encode,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=resources.actors),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
        )
    yield from cast(Iterator[dict[str, Any]], dataset.iter_batches(batch_size=None, prefetch_batches=0))


def _finish(work: _Work, origin: Origin, claimed: Claim, started: float, ready: float) -> Summary:
    held = output.count(claimed.folder)
    if held.rows != work.before + work.pending:
        raise JobError(
            f"DEST holds {held.rows} rows instead of {work.before + work.pending}: "
            f"files were changed while the job ran. {_GO_ON}"
        )
    seconds, startup = time.time() - started, max(0.0, ready - started)
    summary = Summary(
        rows=held.rows,
        embedded=held.rows - held.failed,
        failed=held.failed,
        skipped=work.skipped,
        errors=held.errors,
        images_per_second=round(work.pending / max(seconds - startup, 1e-3), 2),
        seconds=round(seconds, 2),
        startup_seconds=round(startup, 2),
        fingerprint=origin.fingerprint,
        model=origin.model,
        precision=", ".join(held.precisions) or origin.precision,
        engine=", ".join(held.engines) or origin.engine,
        jpegs=", ".join(held.jpegs) or origin.jpegs,
    )
    output.write_summary(claimed, vars(summary))
    return summary


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what Ray raises into the error that caused it."""
    try:
        yield
    except ClipfleetError:
        raise
    except Exception as error:
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, ClipfleetError):
                raise cause from None
        root = causes[-1]
        line = (str(root).strip().splitlines() or [""])[-1]
        raise JobError(f"the job stopped: {type(root).__name__}: {line}. {_GO_ON}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "cause", None) or error.__cause__


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM stop the job as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    from clipfleet.cli import run

    run(["embed", *sys.argv[1:]])


if __name__ == "__main__":
    main()
