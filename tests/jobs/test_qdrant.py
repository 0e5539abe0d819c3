"""--qdrant: a collection that has DEST's good rows, in Qdrant's local mode, which its client brings."""

from __future__ import annotations

import base64
import io
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from qdrant_client import QdrantClient, models

from clipfleet.errors import FingerprintMismatch, JobError, SettingsError, Unavailable
from clipfleet.qdrant import THUMBNAIL, Collection, point_id
from jobs.embed_images import run
from jobs.options import EmbedOptions
from tests.deployments.processes import private_folder
from tests.deployments.service import BIN, running
from tests.jobs.job import embed, errors, read, vectors


def points(folder: Path, name: str = "images") -> dict[str, Any]:
    """What the collection holds, by the rows' ids."""
    client = QdrantClient(path=str(folder))
    try:
        found, _ = client.scroll(name, limit=10_000, with_vectors=True)
    finally:
        client.close()
    return {point.payload["id"]: point for point in found if point.payload}


def test_a_job_fills_a_collection_and_changes_it(tmp_path: Path, files: list[bytes]) -> None:
    """By `clipfleet embed`, and then by `clipfleet index`, which says the same in fewer words."""
    source, dest, folder = tmp_path / "pictures", tmp_path / "index" / "vectors", tmp_path / "index" / "qdrant"
    source.mkdir()
    for number, data in enumerate(files):
        (source / f"{number:02d}.png").write_bytes(data)
    (source / "bad.png").write_bytes(b"no image")
    done = embed(source, dest, "--qdrant", folder, "--collection", "images")
    assert done.status == 3, done.err
    found, expected = points(folder), vectors(read(dest))
    assert found.keys() == expected.keys() and len(found) == 12
    assert all(np.abs(np.array(found[name].vector) - vector).max() < 1e-6 for name, vector in expected.items())
    point = found["03.png"]
    assert point.id == point_id("03.png") == str(uuid.uuid5(uuid.NAMESPACE_URL, "03.png"))
    row = next(row for row in read(dest).to_pylist() if row["id"] == "03.png")
    assert point.payload == {name: row[name] for name in ("id", "uri", "width", "height")}

    (source / "00.png").write_bytes(b"no image any more")
    (source / "01.png").unlink()
    (source / "bad.png").write_bytes(files[0])
    with private_folder() as own:
        options = ("--folder", tmp_path / "index", "--model", "tiny", "--json")
        with running(BIN / "clipfleet", "index", source, *options, folder=own) as command:
            assert command.wait(300) == 3, command.err
            assert json.loads(command.out)["gone"] == 1 and json.loads(command.out)["failed"] == 1
        with running(BIN / "clipfleet", "index", source, *options[:-1], folder=own) as command:
            assert command.wait(300) == 3 and "--retry-errors does those again" in command.out, command.err
        (advised,) = (word for word in command.out.split() if word.startswith("--"))
        with running(BIN / "clipfleet", "index", source, *options, advised, folder=own) as command:
            assert command.wait(300) == 3, command.err
            assert json.loads(command.out)["skipped"] == 11, "all but the row that failed"
    assert points(folder).keys() == vectors(read(dest)).keys() == {*expected, "bad.png"} - {"00.png", "01.png"}
    assert errors(read(dest)) == {"00.png": "image_format_unsupported", "01.png": "gone"}
    with_thumbnail = points(folder)["bad.png"].payload
    assert set(with_thumbnail) == {"id", "uri", "width", "height", THUMBNAIL}
    assert Image.open(io.BytesIO(base64.b64decode(with_thumbnail[THUMBNAIL]))).size == (160, 160)

    settings = {"source": str(source), "dest": str(dest), "model": "tiny"}
    with pytest.raises(JobError, match="'images' too"):  # DEST would have rows that the collection has not
        run(EmbedOptions(**settings))
    with pytest.raises(JobError, match="is not there"):
        run(EmbedOptions(**settings, qdrant=str(tmp_path / "empty"), collection="images"))


def test_a_qdrant_that_is_away(tmp_path: Path, picture_files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipfleet.qdrant._PAUSE_S", 0.01)
    away = {"qdrant": "http://127.0.0.1:9", "collection": "pictures"}
    with pytest.raises(
        JobError, match=r"Qdrant at 'http://127\.0\.0\.1:9' failed: .*the same command goes on"
    ) as refused:
        run(EmbedOptions(source=str(picture_files[0].parent), dest=str(tmp_path), model="tiny", **away))
    assert "\n" not in str(refused.value)


def rows(ids: list[str], failed: tuple[str, ...] = ()) -> pa.Table:
    return pa.table(
        {
            "id": ids,
            "uri": ids,
            "width": pa.array([1] * len(ids), pa.int32()),
            "height": pa.array([2] * len(ids), pa.int32()),
            "error": pa.array(["image_corrupt" if name in failed else None for name in ids], pa.string()),
        }
    )


class TestCollection:
    def test_uploads_are_idempotent_and_failed_rows_have_no_point(self, tmp_path: Path) -> None:
        ids = [f"{number}.png" for number in range(300)]
        some = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
        with Collection(str(tmp_path), "pictures").opened() as opened:
            opened.prepare(4, "f1")
            opened.upload(rows(ids), some)
            opened.upload(rows(ids), some)
            opened.upload(rows(ids[:10], failed=("3.png",)), some[:9])
            opened.delete(["4.png", "never there"])
        assert points(tmp_path, "pictures").keys() == {*ids} - {"3.png", "4.png"}

    def test_a_collection_that_does_not_fit(self, tmp_path: Path) -> None:
        client = QdrantClient(path=str(tmp_path))
        cosine = models.VectorParams(size=4, distance=models.Distance.COSINE)
        client.create_collection("foreign", vectors_config=cosine)
        client.create_collection("named", vectors_config={"image": cosine})
        client.create_collection("dot", vectors_config=models.VectorParams(size=4, distance=models.Distance.DOT))
        client.close()
        for name, words in (("foreign", "no fingerprint"), ("named", "named vectors"), ("dot", "distance Dot")):
            with Collection(str(tmp_path), name).opened() as opened, pytest.raises(JobError, match=words):
                opened.prepare(4, "f1")
        with Collection(str(tmp_path), "ours").opened() as opened:
            opened.prepare(4, "f1")
            with pytest.raises(FingerprintMismatch, match="f2"):
                opened.prepare(4, "f2")
            with pytest.raises(JobError, match="4 dimensions"):
                opened.prepare(8, "f1")
        with Collection(str(tmp_path), "ours").opened() as opened:  # and remembers it
            opened.check("f1")

    # A client that is refused leaves its lock file open.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_folder_that_another_process_holds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("clipfleet.qdrant._LOCKED_S", 0.0)
        with (
            Collection(str(tmp_path), "pictures").opened(),
            pytest.raises(Unavailable, match="another process has opened"),
            Collection(str(tmp_path), "pictures").opened(),
        ):
            pass

    def test_what_the_command_line_may_say(self) -> None:
        for options in (
            {"qdrant": "http://127.0.0.1:6333"},
            {"collection": "pictures"},
            {"qdrant": "folder", "collection": "pictures", "actors": 2},
        ):
            with pytest.raises(SettingsError):
                EmbedOptions(source="a", dest="b", **options)
        options = EmbedOptions(source="a", dest="b", qdrant="folder", collection="c", qdrant_api_key="secret")
        assert options.encoders == 1 and "secret" not in repr(options) and "secret" not in repr(options.points)
