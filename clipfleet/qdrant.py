"""A Qdrant collection: the job fills it with the vectors of its good rows, the service searches it.

A point's id is the UUIDv5 of the row's id in the namespace of URLs, so a row that is uploaded twice is one point. The job
uploads rows before their output file gets its name, and deletes those that are gone before they leave DEST: a finished
file means that the collection has its rows.
"""

from __future__ import annotations

import json
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from clipfleet.errors import FingerprintMismatch, InvalidRequest, JobError, SettingsError, Unavailable

if TYPE_CHECKING:
    import pyarrow as pa
    from qdrant_client import QdrantClient, models

THUMBNAIL = "thumbnail"  # in a point's payload: a small JPEG as base64
_FINGERPRINT = "clipfleet.fingerprint"  # in the collection's metadata
_TRIES, _PAUSE_S, _TIMEOUT_S, _ONCE_S = 4, 2.0, 30, 5
_LOCKED_S = 40.0  # how long the processes of a killed run may hold a folder
_POINTS = 128  # of one request, some 600 kB at 512 dimensions

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Collection:
    """A collection of a server (a URL), or of Qdrant's local mode (a folder, which one process at a time opens)."""

    place: str
    name: str
    api_key: str | None = field(default=None, repr=False)

    @property
    def is_folder(self) -> bool:
        return "://" not in self.place

    @contextmanager
    def opened(self) -> Iterator[Points]:
        """Connect for as long as the block runs. Raises Unavailable if nobody answers."""
        points = Points(self)
        try:
            yield points
        finally:
            points.close()


def index_folder(folder: Path) -> Path:
    """Where `clipfleet index` keeps Qdrant's files."""
    return folder / "qdrant"


def shown(place: str) -> str:
    """A place for messages: a URL without the name and password that may stand in it."""
    return re.sub("://.*@", "://", place)


def place_of(index: str) -> str:
    """The Qdrant of an index: a URL, a folder of `clipfleet index`, or a folder of Qdrant's own. Raises SettingsError."""
    if "://" in index:
        return index
    folder = Path(index).expanduser()
    for candidate in (index_folder(folder), folder):
        if (candidate / "meta.json").is_file():  # of Qdrant's local mode
            return str(candidate.absolute())
    raise SettingsError(
        f"{index!r} is no index: neither it nor its folder qdrant/ has Qdrant's files. "
        "`clipfleet index SOURCE --folder FOLDER` makes one"
    )


@dataclass(frozen=True)
class Found:
    """A point that a search found: its own id, its cosine to the query, and what it holds."""

    point: str
    score: float
    payload: dict[str, Any]


def point_id(row: str) -> str:
    """The id of a row's point."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, row))


class Points:
    """A connection to a collection. Every method raises Unavailable where Qdrant fails.

    `patience_s` is how long a folder may be another process's before that is an error, `tries` how often a server is asked,
    and `timeout_s` how long it has to answer.
    """

    def __init__(
        self,
        collection: Collection,
        *,
        patience_s: float | None = None,
        tries: int = _TRIES,
        timeout_s: int = _TIMEOUT_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._name, self._place, self._is_folder = collection.name, shown(collection.place), collection.is_folder
        self._tries = tries
        self._client = self._connect(collection, _LOCKED_S if patience_s is None else patience_s)

    def exists(self) -> bool:
        """Whether the collection is there."""
        return self._ask(lambda: self._client.collection_exists(self._name))

    def prepare(self, dimension: int, fingerprint: str) -> None:
        """Make the collection if it is not there, and check it."""
        from qdrant_client import models

        if not self.exists():
            vectors = models.VectorParams(size=dimension, distance=models.Distance.COSINE)
            try:
                self._ask(
                    lambda: self._client.create_collection(
                        self._name, vectors_config=vectors, metadata={_FINGERPRINT: fingerprint}
                    )
                )
            except Unavailable:
                if not self.exists():  # otherwise another encoder was faster
                    raise
        self.check(fingerprint, dimension)

    def check(self, fingerprint: str, dimension: int | None = None) -> None:
        """Raises FingerprintMismatch or JobError if the collection cannot take such vectors."""
        from qdrant_client import models

        config = self._ask(lambda: self._client.get_collection(self._name)).config
        vectors = config.params.vectors
        if not isinstance(vectors, models.VectorParams):
            raise self._unfit("has named vectors, and one without a name is needed")
        if vectors.distance != models.Distance.COSINE or dimension not in (None, vectors.size):
            wanted = f"{dimension or vectors.size} and Cosine are needed"
            raise self._unfit(f"is for {vectors.size} dimensions and distance {vectors.distance.value}; {wanted}")
        _compare(self._named, (config.metadata or {}).get(_FINGERPRINT), fingerprint)

    @property
    def _named(self) -> str:
        return f"the Qdrant collection {self._name!r} at {self._place!r}"

    def _unfit(self, why: str) -> JobError:
        return JobError(f"{self._named} {why}. Choose another name")

    def upload(self, rows: pa.Table, vectors: np.ndarray, thumbnails: Sequence[str] = ()) -> None:
        """Upload the rows (id, uri, width, height, error) without error, whose vectors (k, d) are given in their order,
        perhaps with their thumbnails, and delete the others' points."""
        from qdrant_client import models

        good = rows.column("error").is_null().to_numpy()
        listed = rows.select(["id", "uri", "width", "height"]).to_pylist()
        payloads = [row for row, is_good in zip(listed, good, strict=True) if is_good]
        for row, thumbnail in zip(payloads, thumbnails, strict=False):
            row[THUMBNAIL] = thumbnail
        for start in range(0, len(payloads), _POINTS):
            part = payloads[start : start + _POINTS]
            batch = models.Batch(
                ids=[point_id(row["id"]) for row in part],
                vectors=vectors[start : start + _POINTS].tolist(),
                payloads=part,
            )
            self._ask(lambda batch=batch: self._client.upsert(self._name, points=batch, wait=True))
        self.delete([row["id"] for row, is_good in zip(listed, good, strict=True) if not is_good])

    def delete(self, rows: Sequence[str]) -> None:
        """Delete the points of these rows, where there are any."""
        if rows:
            ids: list[Any] = [point_id(row) for row in rows]
            self._ask(lambda: self._client.delete(self._name, points_selector=ids, wait=True))

    def search(
        self, vector: np.ndarray, *, limit: int, offset: int, where: models.Filter | None, thumbnails: bool
    ) -> list[Found]:
        """The points nearest to a unit vector (d,), best first, from the `offset`th on."""
        from qdrant_client import models

        try:
            answer = self._ask(
                lambda: self._client.query_points(
                    self._name,
                    query=vector.tolist(),
                    limit=limit,
                    offset=offset,
                    query_filter=where,
                    with_payload=True if thumbnails else models.PayloadSelectorExclude(exclude=[THUMBNAIL]),
                )
            )
        except Unavailable as error:
            # Of a server that does not take the filter; the local mode raises whatever its code runs into.
            refused = getattr(error.__cause__, "status_code", None) in (400, 422) or self._is_folder
            refused = refused and "is closed" not in str(error.__cause__)
            if where is not None and refused:
                raise InvalidRequest(
                    f"Qdrant cannot use this filter: {_said(error.__cause__)}", param="filter"
                ) from error
            raise
        return [Found(str(point.id), point.score, point.payload or {}) for point in answer.points]

    def vector_of(self, row: str) -> np.ndarray | None:
        """The vector (d,) of a row's point; None where there is no such point."""
        found = self._ask(lambda: self._client.retrieve(self._name, ids=[point_id(row)], with_vectors=True))
        vector: Any = found[0].vector if found else None
        if isinstance(vector, dict):  # beside others, which have names
            vector = vector.get("")
        return None if vector is None else np.asarray(vector, np.float32)

    def close(self) -> None:
        with suppress(Exception):  # nothing is lost by it
            self._client.close()

    def _connect(self, collection: Collection, patience_s: float) -> QdrantClient:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                if collection.is_folder:
                    _check_lock(Path(collection.place))
                return _client(collection, self._timeout_s)
            except RuntimeError as error:  # the folder is another process's
                if time.monotonic() > deadline:
                    raise self._failed(error) from error
                time.sleep(0.5)
            except ModuleNotFoundError:
                raise JobError("Qdrant needs its client: pip install 'clipfleet[qdrant]'") from None
            except Exception as error:
                raise self._failed(error) from error

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        """Qdrant's answer. Requests are repeated where nobody answers or the server is at fault: each may come twice."""
        for attempt in range(1, self._tries + 1):
            try:
                return request()
            except Exception as error:
                status = getattr(error, "status_code", None)  # of an answer; without one nobody answered
                if attempt == self._tries or (status is not None and status < 500) or self._is_folder:
                    raise self._failed(error) from error
                time.sleep(_PAUSE_S)
        raise AssertionError

    def _failed(self, error: Exception) -> Unavailable:
        return Unavailable(f"Qdrant at {self._place!r} failed: {_said(error)}", retry_after=2)


def _compare(collection: str, found: str | None, fingerprint: str) -> None:
    if not found:
        raise JobError(f"{collection} was not made by clipfleet: it names no fingerprint. Choose another name")
    if found != fingerprint:
        raise FingerprintMismatch(
            f"{collection} holds vectors with fingerprint {found}, and these have {fingerprint}: they cannot be compared. "
            "Choose another collection",
            found=found,
            expected=fingerprint,
        )


def check_collection(collection: Collection, fingerprint: str) -> None:
    """Look whether vectors of that checkpoint can be searched for in the collection.

    A folder's list of collections is read, also while another process has it open; a server is asked once. Raises SettingsError
    where the collection is not there, FingerprintMismatch or JobError where it is of other vectors, Unavailable.
    """
    if not collection.is_folder:
        points = Points(collection, tries=1, timeout_s=_ONCE_S)
        try:
            if not points.exists():
                raise SettingsError(f"there is no collection {collection.name!r} at {shown(collection.place)!r}")
            points.check(fingerprint)
        finally:
            points.close()
        return
    try:
        known = json.loads((Path(collection.place) / "meta.json").read_text(encoding="utf-8"))["collections"]
    except (OSError, ValueError, LookupError) as error:
        raise Unavailable(f"the index {collection.place!r} cannot be read: {_said(error)}") from error
    if collection.name not in known:
        there = ", ".join(map(repr, sorted(known))) or "none"
        raise SettingsError(f"there is no collection {collection.name!r} at {collection.place!r}; there are {there}")
    found = (known[collection.name].get("metadata") or {}).get(_FINGERPRINT)
    _compare(f"the Qdrant collection {collection.name!r} at {collection.place!r}", found, fingerprint)


def _check_lock(folder: Path) -> None:
    """Raise RuntimeError while another process has the folder: Qdrant's client reads all of it before it asks."""
    import fcntl  # only where services and jobs run

    lock = folder / ".lock"
    if lock.is_file():
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # closing the file lets go
            except OSError:
                raise RuntimeError("another process has opened this folder: a service, or a job") from None


def _said(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _client(collection: Collection, timeout_s: int) -> QdrantClient:
    from qdrant_client import QdrantClient

    # Such as that a key goes over plain HTTP, also on loopback, or that a folder is for small collections. Once and for all:
    # catch_warnings is not for threads.
    warnings.filterwarnings("ignore", category=UserWarning, module="qdrant_client")
    warnings.filterwarnings(
        "ignore", "Api key is used with an insecure connection", UserWarning
    )  # said of our own line
    if collection.is_folder:
        path = str(Path(collection.place).expanduser().absolute())
        return QdrantClient(path=path, force_disable_check_same_thread=True)  # an actor's threads take turns
    return QdrantClient(url=collection.place, api_key=collection.api_key, timeout=timeout_s, check_compatibility=False)
