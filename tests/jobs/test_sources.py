"""What a job reads: folders, globs and manifests, their ids, and what is refused before anything starts."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loguru import logger

from clipfleet.errors import ClipfleetError, JobError, SettingsError
from jobs.embed_images import run
from jobs.items import Item
from jobs.ledger import Ledger, State
from jobs.manifests import open_manifest
from jobs.options import EmbedOptions
from jobs.places import UNKNOWN, FileState
from jobs.sources import in_order, matches, open_files
from jobs.summary import exit_status
from jobs.tolerance import Tolerance
from tests.deployments.processes import until
from tests.deployments.service import ROOT
from tests.jobs.job import embed, embedding, errors, read, summary, vectors
from tests.jobs.planned import embedded, planned


def items(source: Path | str) -> list[Item]:
    return list(open_files(str(source)).items)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "c.txt", "sub/d.webp", "sub/deep/e.gif", ".hidden/f.png", ".g.png", "sub/h.avif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


class TestFiles:
    def test_a_folder_gives_its_images_in_order_with_relative_ids(self, tree: Path) -> None:
        found = items(tree)
        assert [item.id for item in found] == ["a.JPG", "b.png", "sub/d.webp", "sub/deep/e.gif", "sub/h.avif"]
        assert found[2].uri == str(tree / "sub" / "d.webp")

    @pytest.mark.parametrize(
        ("pattern", "ids"),
        [
            ("*.png", ["b.png"]),
            ("*", ["a.JPG", "b.png", "c.txt"]),
            ("sub/*.*", ["d.webp", "h.avif"]),
            ("*/*.webp", ["sub/d.webp"]),
            ("**/*.gif", ["sub/deep/e.gif"]),
            ("sub/**/*.*", ["d.webp", "deep/e.gif", "h.avif"]),
            ("[ab].*", ["a.JPG", "b.png"]),
            ("?.txt", ["c.txt"]),
            (".*.png", [".g.png"]),
        ],
    )
    def test_a_globs_ids_are_relative_to_the_folder_before_its_wildcard(
        self, tree: Path, pattern: str, ids: list[str]
    ) -> None:
        assert [item.id for item in items(f"{tree}/{pattern}")] == ids

    def test_globs_match_as_pathlib_does(self, tree: Path) -> None:
        for pattern in ("*", "*.png", "*/*", "**/*.gif", "sub/*", "**/d.*", "[!a]*", "s*/deep/*"):
            wanted = {
                str(path.relative_to(tree)) for path in tree.glob(pattern)
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(tree).parts)
            }  # fmt: skip
            names = [item.id for item in items(tree)] + ["c.txt"]
            assert {name for name in names if matches(name.split("/"), pattern.split("/"))} == wanted, pattern

    def test_more_names_than_fit_in_memory_are_sorted_on_disk(self) -> None:
        names = [(f"{number * 7919 % 1000:03d}", False, UNKNOWN) for number in range(1000)]
        assert list(in_order(iter(names), run=64)) == sorted(names)

    def test_links_to_folders_are_not_followed_and_a_warning_says_so(self, tree: Path, tmp_path_factory: Any) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (elsewhere / "z.png").touch()
        for name in ("b-link", "sub/link.png", ".hidden-link", ".hidden/link"):
            (tree / name).symlink_to(elsewhere)
        (tree / "file.png").symlink_to(elsewhere / "z.png")
        (tree / "loop.png").symlink_to(tree / "loop.png")
        said: list[str] = []
        sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
        try:
            found = [item.id for item in items(tree)]
            whole, said[:] = said[:], []
            assert [item.id for item in items(f"{tree}/*.png")] == ["b.png", "file.png", "loop.png"]
            assert said == [], "a glob that goes no deeper leaves out no file below them"
        finally:
            logger.remove(sink)
        good = ["a.JPG", "b.png", "file.png", "loop.png", "sub/d.webp", "sub/deep/e.gif", "sub/h.avif"]
        assert found == good
        (warning,) = whole
        assert f"there are 2, the first is {str(tree / 'b-link')!r}" in warning and "SOURCE" in warning

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="none"):
            items(tmp_path / "none")


def write_manifest(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as table:
            writer = csv.DictWriter(table, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file


def listed(file: Path, **options: Any) -> list[Item]:
    return list(open_manifest(EmbedOptions(source=str(file), dest="unused", **options)).items)


class TestManifests:
    @pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
    def test_paths_are_ids_unless_a_column_holds_them(self, tmp_path: Path, suffix: str) -> None:
        rows = [{"sku": "007", "path": "a/b.png"}, {"sku": 'ü,"x', "path": "/abs/c.png"}]
        file = write_manifest(tmp_path / f"list.{suffix}", rows)
        assert [item.id for item in listed(file)] == ["a/b.png", "/abs/c.png"]
        assert [item.uri for item in listed(file)] == [str(tmp_path / "a/b.png"), "/abs/c.png"]
        assert [item.id for item in listed(file, id_column="sku")] == ["007", 'ü,"x']

    def test_a_missing_column_names_those_there_are(self, tmp_path: Path) -> None:
        file = write_manifest(tmp_path / "list.csv", [{"sku": "1", "file": "a.png"}])
        with pytest.raises(SettingsError, match="no column 'path'; it has sku, file"):
            listed(file)
        with pytest.raises(SettingsError, match="no column 'id'"):
            listed(file, path_column="file", id_column="id")

    def test_a_null_id_stops_the_job(self, tmp_path: Path) -> None:
        file = write_manifest(tmp_path / "list.parquet", [{"id": "1", "path": "a"}, {"id": None, "path": "b"}])
        with pytest.raises(JobError, match="row 1"):
            listed(file, id_column="id")

    def test_what_is_no_manifest(self, tmp_path: Path) -> None:
        for name, content in (("bad.parquet", b"PAR1 no"), ("bad.jsonl", b"{"), ("bad.csv", b"")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ClipfleetError, match=name):
                listed(tmp_path / name)

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            (b'{"path": }', "line 3, column 10: Expecting value"),
            (b'{"path": "a"', "line 3, column 1[34]: Expecting"),
            (b'{"path": "\xff.png"}', "line 3, column 11: no UTF-8"),
            (b"[" * 100_000, "line 3 is nested too deeply"),
            (b"7", "line 3 is no JSON object"),
        ],
    )
    @pytest.mark.parametrize("rows", [1, 10_000], ids=["among the first", "later"])
    def test_a_broken_json_line_is_named(self, tmp_path: Path, line: bytes, words: str, rows: int) -> None:
        good = b'{"path": "a.png"}\n'
        manifest = tmp_path / "list.jsonl"
        manifest.write_bytes(good + b"\n" * rows + good * (rows - 1) + line + b"\n" + good)
        words = words.replace("line 3", f"line {2 * rows + 1}")
        with pytest.raises(ClipfleetError, match=rf"list\.jsonl': {words}"):
            listed(manifest)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"bytes_column": "image"}, "give the id column"),
            ({"bytes_column": "image", "path_column": "path"}, "one of the two"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"actors": -1}, "actors"),
            ({"precision": "int4"}, "int4"),
            ({"precision": "int8", "device": "cuda"}, "int8 runs on CPUs"),
            ({"device": "tpu"}, "tpu"),
            ({"format": "csv"}, "csv"),
            *[({"max_failures": text}, "max_failures") for text in ("", "many", "-1", "1.5", "101%", "1%%", "nan")],
        ],
    )
    def test_wrong_usage_is_named(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(SettingsError, match=words) as refused:
            EmbedOptions(source="a", dest="b", **options)
        assert exit_status(refused.value) == 2

    def test_how_many_rows_may_fail(self) -> None:
        cases = [
            ("0", 0, 9, False),
            ("0", 1, 9, True),
            ("2%", 2, 100, False),
            ("2%", 3, 100, True),
            ("0.5%", 1, 199, True),
        ]
        for text, failed, rows, exceeded in cases:
            assert Tolerance.parse(text).exceeded(failed, rows) is exceeded, text

    def test_a_column_needs_a_manifest(self, tree: Path, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="path_column is for manifests"):
            run(EmbedOptions(source=str(tree), dest=str(tmp_path / "out"), model="tiny", path_column="path"))

    def test_doubled_ids_are_an_error_before_work_starts(self, tmp_path: Path) -> None:
        file = write_manifest(tmp_path / "list.csv", [{"path": "a.png"}, {"path": "b.png"}, {"path": "a.png"}])
        with pytest.raises(JobError, match=r"'a\.png' stands in the source twice") as refused:
            run(EmbedOptions(source=str(file), dest=str(tmp_path / "out"), model="tiny"))
        assert exit_status(refused.value) == 1
        assert not list((tmp_path / "out").glob("part-*"))

    def test_a_source_without_images(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(SettingsError, match="holds no images"):
            run(EmbedOptions(source=str(tmp_path / "empty"), dest=str(tmp_path / "out"), model="tiny"))

    def test_files_in_dest_that_are_not_ours(self, tree: Path, tmp_path: Path) -> None:
        dest = tmp_path / "out"
        dest.mkdir()
        (dest / "part-1.parquet").write_bytes(b"half a file")
        with pytest.raises(JobError, match=r"part-1\.parquet"):
            run(EmbedOptions(source=str(tree), dest=str(dest), model="tiny"))
        pq.write_table(pa.table({"id": ["x"]}), dest / "part-1.parquet")
        with pytest.raises(JobError, match="not written by clipfleet"):
            run(EmbedOptions(source=str(tree), dest=str(dest), model="tiny"))


def test_the_ledger_knows_each_id(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ids.sqlite") as ledger:
        seen = FileState(7, 10**15)
        ledger.record("done", State.FINISHED, 3, seen)
        ledger.record("failed", State.FAILED, 4)
        ledger.record("other", State.FINISHED, 5)
        assert ledger.claim("done") == (State.FINISHED, seen)
        assert ledger.claim("failed") == (State.FAILED, UNKNOWN) and ledger.claim("new").state is State.NEW
        assert ledger.parts_to_change() == []
        ledger.mark("failed", State.REDO)
        ledger.mark_unnamed()
        assert ledger.parts_to_change() == [4, 5]
        assert [ledger.state(name) for name in ("done", "failed", "other")] == [State.FINISHED, State.REDO, State.LOST]
        with pytest.raises(JobError, match="'new'"):
            ledger.claim("new")
        assert ledger.record("done", State.FINISHED) == 3, "the file that has it"


def test_bytes_in_parquet_become_vectors(tmp_path: Path, files: list[bytes]) -> None:
    rows = [{"sku": number, "image": data} for number, data in enumerate(files)]
    rows += [{"sku": 100, "image": None}, {"sku": 101, "image": b""}, {"sku": 102, "image": b"no image"}]
    manifest = write_manifest(tmp_path / "products.parquet", rows)
    done = embed(manifest, tmp_path / "out", "--bytes-column", "image", "--id-column", "sku")
    assert done.status == 3, done.err
    table = read(tmp_path / "out")
    assert vectors(table).keys() == {str(number) for number in range(len(files))}
    assert errors(table) == {"100": "image_empty", "101": "image_empty", "102": "image_format_unsupported"}


_TAKEN = """
import sys
from pathlib import Path
from jobs.decoding import _from_manifest
from jobs.manifests import open_manifest
from jobs.options import EmbedOptions

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

before = status("VmRSS")
source = open_manifest(EmbedOptions(source=sys.argv[1], dest="", model="tiny", bytes_column="image", id_column="sku"))
assert len(list(source.items)) == 1500
print(status("VmHWM") - before)
assert sum(map(len, _from_manifest(source.manifest, [0, 700, 1499]))) == 300_000
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="what is measured is Linux'")
def test_a_manifest_of_one_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    images = pa.array([b"x" * 100_000] * 1500, pa.binary())
    table = pa.table({"sku": pa.array(range(1500)), "image": images})
    manifest = tmp_path / "m.parquet"
    pq.write_table(table, manifest, row_group_size=1500, compression="none", use_dictionary=False, write_batch_size=16)
    done = subprocess.run([sys.executable, "-c", _TAKEN, manifest], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ids, contents = map(int, done.stdout.split())
    assert ids < 40_000_000, "of the bytes nothing is read for the ids"
    assert contents < 75_000_000, "half of the file"


@pytest.mark.parametrize("in_place", [False, True], ids=["renamed over", "rewritten"])
def test_a_manifest_of_bytes_that_is_another_one_stops_the_job(
    tmp_path: Path, files: list[bytes], in_place: bool
) -> None:
    """Its rows are known by their numbers; the other file's have other ids."""
    rows = [{"sku": str(number), "image": data} for number, data in enumerate(files)]
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    other = write_manifest(tmp_path / "other.parquet", rows[::-1])
    options = {"bytes_column": "image", "id_column": "sku"}
    with planned(manifest, tmp_path / "out", rows_per_file=4, **options) as run:
        decoded = run.decoded()
        assert next(decoded)[0].column("id").to_pylist() == ["0", "1", "2", "3"]
        if in_place:
            manifest.write_bytes(other.read_bytes())
            assert len(list(decoded)) == 2, "read before"
        else:
            other.replace(manifest)
            assert len(list(decoded)) == 2, "of the file that is open"
        with pytest.raises(JobError, match=r"m\.parquet' was changed while the job ran; run the command again"):
            list(run.decoded())
    assert embedded(manifest, tmp_path / "out", **options) == [row["sku"] for row in rows[::-1]]


def test_a_job_whose_manifest_of_bytes_is_changed_ends_with_one_line(tmp_path: Path, files: list[bytes]) -> None:
    rows = [{"sku": str(number), "image": data} for number, data in enumerate(files)]
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    other = write_manifest(tmp_path / "other.parquet", rows[::-1])
    dest = tmp_path / "out"
    with embedding(manifest, dest, "--bytes-column", "image", "--id-column", "sku") as command:
        until(lambda: command.ended or any(dest.glob(".clipfleet/run-*/tasks/*")), 120, "a plan")
        other.replace(manifest)  # while its Ray starts
        assert command.wait(120) == 1
        assert command.err == (
            f"clipfleet: the manifest {str(manifest)!r} was changed while the job ran; run the command again. "
            "What is finished is kept\n"
        )


def test_a_manifest_of_paths(tmp_path: Path, picture_files: list[Path]) -> None:
    rows = [{"file": str(file), "sku": f"{number:03d}"} for number, file in enumerate(picture_files)]
    rows.append({"file": "gone.png", "sku": "gone"})
    manifest = write_manifest(tmp_path / "products.csv", rows)
    done = embed(manifest, tmp_path / "out", "--path-column", "file", "--id-column", "sku")
    assert done.status == 3, done.err
    assert errors(read(tmp_path / "out")) == {"gone": "file_not_found"}
    assert "007" in vectors(read(tmp_path / "out"))


def test_rows_of_file_systems_that_fail_are_rows_with_errors(tmp_path: Path, picture_files: list[Path]) -> None:
    """Each such system has exceptions of its own; none of them may stop the job."""
    names = tmp_path / "names"
    names.mkdir()
    for name in ("a b#1.png", "100%41.png", "ü.png"):
        (names / name).write_bytes(picture_files[0].read_bytes())
    manifest = tmp_path / "manifest.jsonl"
    rows: list[Any] = [str(picture_files[0]), "nosuch://there/a.png", None, "", (names / "a b#1.png").as_uri()]
    manifest.write_text("".join(json.dumps({"path": path}) + "\n" for path in rows))
    done = embed(manifest, tmp_path / "out")
    assert done.status == 3, done.err
    assert errors(read(tmp_path / "out")) == {
        "nosuch://there/a.png": "file_unreadable", "#2": "file_not_found", "#3": "file_not_found",
    }  # fmt: skip

    done = embed(names.as_uri(), tmp_path / "by-uri")
    assert (done.status, errors(read(tmp_path / "by-uri"))) == (0, {}), done.err
    done = embed(names.as_uri(), tmp_path / "by-uri", "--precision", "bfloat16")
    assert done.status == 0 and "nothing to do" in done.out
    assert summary(tmp_path / "by-uri")["precision"] == "float32", "what DEST holds, not what was asked for"


@pytest.mark.parametrize("dest", ["s3://bucket/out", "a-file"])
def test_a_dest_that_can_be_no_folder_is_wrong_usage(tmp_path: Path, picture_files: list[Path], dest: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(SettingsError, match="folder"):
        run(
            EmbedOptions(
                source=str(picture_files[0].parent), dest=dest if ":" in dest else str(tmp_path / dest), model="tiny"
            )
        )


def test_a_manifest_by_its_file_uri(tmp_path: Path, picture_files: list[Path]) -> None:
    manifest = write_manifest(tmp_path / "a list.csv", [{"path": str(file)} for file in picture_files])
    assert embedded(manifest.as_uri(), tmp_path / "out") == [str(file) for file in picture_files]


def test_columns_of_json_lines_may_come_late_and_a_mark_may_stand_first(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"path": "a"}\n{"path": "b", "sku": "7"}\n', encoding="utf-8-sig")
    options = EmbedOptions(source=str(manifest), dest=str(tmp_path), id_column="sku")
    with pytest.raises(JobError, match=r"row 0 .* has no id"):
        list(open_manifest(options).items)
    manifest.write_text('{"path": "b", "sku": "7"}\n' + "[" * 100_000)
    with pytest.raises((SettingsError, JobError), match="cannot read"):
        list(open_manifest(options).items)


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["path", "path"])
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(SettingsError, match="several columns 'path'"):
        open_manifest(EmbedOptions(source=str(tmp_path / "m.parquet"), dest="d"))
