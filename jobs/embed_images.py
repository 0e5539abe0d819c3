"""The offline job: `clipfleet embed SOURCE DEST`, or `python -m jobs.embed_images SOURCE DEST`.

    list ─▶ what is not finished yet, as numbered task files ─▶ decode (tasks) ─▶ encode and write (a pool of actors)

Everything before Ray streams through this process without being held; Ray Data carries pixels from the decode
tasks to the actors, and back here come only counts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, cast

from clipfleet.checkpoint import EMBEDDED, Checkpoint, find_checkpoint
from clipfleet.errors import ClipfleetError, JobError, SettingsError, Unavailable
from clipfleet.fingerprint import fingerprint
from clipfleet.image_files import ImageLimits
from jobs import manifests, output, parts
from jobs.decoding import DecodePlan, decode_tasks
from jobs.destination import GO_ON, Claim, claim
from jobs.encoding import EncodeActor, EncodePlan
from jobs.items import Source
from jobs.local_ray import DECODE_CPUS, Resources, connected, place, quiet_data
from jobs.options import EmbedOptions
from jobs.parts import Origin
from jobs.places import is_uri, local_path, split_query, without_secrets
from jobs.planning import PIXEL_BYTES, Work, plan
from jobs.progress import Progress
from jobs.sources import COMPRESSED, TAR, open_files
from jobs.stopping import Stop
from jobs.summary import Summary

_TASKS_AT_MOST = 10_000  # more work than that goes to tasks in groups


def run(options: EmbedOptions, *, progress: bool = True) -> Summary:
    """Embed what is not finished yet, and write the summary.

    Raises SettingsError for what the command line got wrong, and CheckpointError, FingerprintMismatch or JobError
    for all else that stops it; then the same call goes on from where it stopped. Call it in the main thread, so that
    Ctrl-C and SIGTERM stop it that way. A Ray of its own that dies, dies with the whole process, after a line on stderr.
    """
    started = time.time()
    checkpoint = find_checkpoint(options.model)
    origin = Origin(
        fingerprint(checkpoint),
        checkpoint.served_name,
        checkpoint.revision,
        options.precision,
        options.engine_on(gpu=options.device.startswith("cuda")),
        "reduced" if options.reduced_jpeg else "whole",
        options.collection,
    )
    stop = Stop()
    try:
        with stop.heard(), claim(options.dest) as claimed:
            source = _open_source(options)
            work = _plan(options, source, checkpoint, origin, claimed)
            if work.pending:
                with suppress(OSError):  # of a DEST that cannot be written, the encoders tell more
                    (claimed.folder / output.SUMMARY).unlink(missing_ok=True)
                origin, ready = _execute(options, work, checkpoint, origin, claimed, stop, progress)
            else:
                ready = time.time()
            return _finish(options, work, origin, claimed, started, ready)
    except KeyboardInterrupt:
        raise JobError(f"stopped. {GO_ON}") from None
    except Unavailable as error:  # of Qdrant
        raise JobError(f"{error.message}. {GO_ON}") from error


def _open_source(options: EmbedOptions) -> Source:
    path = local_path(options.source)
    if not is_uri(path) and os.path.isfile(os.path.expanduser(path)):
        if path.lower().endswith(manifests.SUFFIXES):
            return manifests.open_manifest(options)
        if not path.lower().endswith((TAR, *COMPRESSED)):
            known = ", ".join((TAR, *manifests.SUFFIXES))
            raise SettingsError(f"{path!r} is no manifest; give a folder, a glob, or {known}")
    remote = is_uri(path) and split_query(path)[0].lower().endswith(manifests.SUFFIXES)
    for name in ("path_column", "bytes_column", "id_column"):
        if getattr(options, name):
            what = "a manifest must be a local file, and" if remote else f"{name} is for manifests, and"
            raise SettingsError(f"{what} {without_secrets(path)!r} is none")
    try:
        return open_files(path)
    except SettingsError as error:
        if remote:
            raise SettingsError(f"{error.message}; a manifest must be a local file") from error
        raise


def _plan(options: EmbedOptions, source: Source, checkpoint: Checkpoint, origin: Origin, claimed: Claim) -> Work:
    with options.points.opened() if options.points else nullcontext() as points:
        if points is None:
            return plan(options, source, checkpoint.pixels, origin, claimed, lambda _: None)
        if points.exists():
            points.check(origin.fingerprint)
        elif parts.parts(claimed.folder):
            raise JobError(
                f"{str(claimed.folder)!r} has rows, and the Qdrant collection {options.collection!r} at {options.qdrant!r}, "
                "which should have them too, is not there. Bring it back, or choose another DEST"
            )
        return plan(options, source, checkpoint.pixels, origin, claimed, points.delete)


def _execute(
    options: EmbedOptions,
    work: Work,
    checkpoint: Checkpoint,
    origin: Origin,
    claimed: Claim,
    stop: Stop,
    progress: bool,
) -> tuple[Origin, float]:
    """Do the work. Returns the origin with the engine that the resources gave, and when the first encoder was ready."""
    ready = float("inf")
    with connected(options.address) as own, _explained(claimed):
        resources = place(options.encoders, options.cpus_per_actor, options.gpus_per_actor, options.settled_device, own)
        origin = replace(origin, engine=options.engine_on(gpu=resources.gpus > 0))
        flag = claimed.scratch / "stop"
        decode = DecodePlan(
            work.tasks,
            flag,
            checkpoint.pixels,
            ImageLimits(reduced_jpeg=options.reduced_jpeg),
            work.rows_per_file,
            work.source.manifest,
        )
        encode = EncodePlan(
            claimed, origin, options.format, options.points, _everywhere(checkpoint), options.device,
            options.batch_size, resources.threads, options.thumbnails,
        )  # fmt: skip
        with Progress(work.pending, progress) as shown, _counted_stop(shown, work):
            with stop.draining(flag):
                for batch in _stream(work.task_count, decode, encode, resources):
                    shown.advance(int(batch["rows"].sum()))
                    ready = min(ready, float(batch["ready"].min()))
            if stop.asked and shown.done < work.pending:
                raise KeyboardInterrupt
    return origin, min(ready, time.time())  # another node's clock may be ahead


@contextmanager
def _counted_stop(shown: Progress, work: Work) -> Iterator[None]:
    """Say how far the job is when it is stopped."""
    try:
        yield
    except KeyboardInterrupt:
        done, total = work.skipped + shown.done, work.skipped + work.pending
        raise JobError(f"stopped: {done} of {total} images are done. {GO_ON}") from None


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
            memory=PIXEL_BYTES,
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


def _finish(options: EmbedOptions, work: Work, origin: Origin, claimed: Claim, started: float, ready: float) -> Summary:
    parts.remove_unnamed(claimed)
    held = output.count(claimed.folder)
    if held.rows != work.before + work.pending:
        raise JobError(
            f"DEST holds {held.rows} rows instead of {work.before + work.pending}: "
            f"files were changed while the job ran. {GO_ON}"
        )
    seconds, startup = time.time() - started, max(0.0, ready - started)
    made_by = {name: ", ".join(sorted(values)) or getattr(origin, name) for name, values in held.made_by.items()}
    tolerance = options.tolerance
    summary = Summary(
        rows=held.rows,
        embedded=held.rows - held.failed - held.gone,
        failed=held.failed,
        gone=held.gone,
        skipped=work.skipped,
        errors=held.errors,
        images_per_second=round(work.pending / max(seconds - startup, 1e-3), 2),
        seconds=round(seconds, 2),
        startup_seconds=round(startup, 2),
        fingerprint=origin.fingerprint,
        model=origin.model,
        verdict=tolerance.verdict(held.failed, held.rows) if tolerance else None,
        **made_by,
    )
    output.write_summary(claimed, summary.as_json())
    return summary


@contextmanager
def _explained(claimed: Claim) -> Iterator[None]:
    """Turn what Ray raises into the error that caused it."""
    try:
        yield
    except Exception as error:
        if not claimed.folder.is_dir():  # whichever process noticed it first
            raise parts.cannot_write(claimed.folder, error) from error
        causes = list(_causes(error))
        # The innermost one: what Ray raises for one of our errors is one too, and reads as a traceback.
        for ours in (cause for cause in reversed(causes) if isinstance(cause, ClipfleetError)):
            raise type(ours)(ours.message, index=ours.index, **ours.data) from None  # without Ray Data's advice
        root = causes[-1]
        said = str(root).partition("\nFailed to ")[0]  # Ray Data appends its advice
        line = (said.strip().splitlines() or [""])[-1]
        raise JobError(f"the job stopped: {type(root).__name__}: {line}. {GO_ON}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def main() -> None:
    from clipfleet.cli import run

    run(["embed", *sys.argv[1:]])


if __name__ == "__main__":
    main()
