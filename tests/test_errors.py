"""The tree of errors: codes, pickling, and the drawing in its docstring."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter

import pytest

from clipfleet import errors
from clipfleet.errors import ClipfleetError, ImageCorrupt, ImageNotFound, ImageUnreadable

KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}


@pytest.mark.parametrize("name", KINDS)
def test_every_error_survives_pickling_with_its_data(name: str) -> None:
    error = KINDS[name]("what went wrong", index=3, width=7, nested={"a": [1, None]})
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is KINDS[name] and str(other) == "what went wrong" == other.message
        assert (other.code, other.index, other.data) == (error.code, 3, {"width": 7, "nested": {"a": [1, None]}})


@pytest.mark.parametrize("name", KINDS)
def test_every_error_can_be_given_an_index(name: str) -> None:
    error = KINDS[name]("what went wrong", width=7)
    assert error.index is None
    placed = error.at(5)
    assert (type(placed), placed.index, placed.message, placed.data) == (KINDS[name], 5, error.message, error.data)
    assert error.index is None, "the original stays"


def test_codes_are_words_and_unique_but_for_the_parents_that_share_one() -> None:
    codes = Counter(kind.code for kind in KINDS.values())
    assert all(re.fullmatch("[a-z][a-z0-9_]+", code) for code in codes)
    shared = {"invalid_request": 2, "image_corrupt": 2, "unavailable": 2}  # a base class and its plainest leaf
    assert {code: count for code, count in codes.items() if count > 1} == shared


def test_codes_of_the_wire_are_the_designs() -> None:
    wire = (
        "invalid_request invalid_base64 empty_input unsupported_dimensions unsupported_scheme image_urls_disabled "
        "invalid_api_key model_not_found route_not_found body_too_large too_many_items image_too_many_bytes "
        "image_too_many_pixels image_format_unsupported image_empty image_corrupt image_crashed_decoder overloaded "
        "unavailable deadline_exceeded file_not_found file_unreadable"
    )
    assert set(wire.split()) <= {kind.code for kind in KINDS.values()}


def test_a_code_of_the_wire_gives_its_class_back() -> None:
    assert all(errors.by_code(kind.code).code == kind.code for kind in KINDS.values())  # type: ignore[union-attr]
    assert errors.by_code("image_corrupt") is ImageCorrupt and errors.by_code("unavailable") is errors.Unavailable
    assert errors.by_code("nothing") is None


def test_the_drawing_shows_every_class_below_its_parent() -> None:
    drawn: dict[str, str | None] = {}
    above: list[str] = []
    for indent, name in re.findall(r"^    ((?:[│├└─ ]{4})*)([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE):
        above[len(indent) // 4 :] = [name]
        drawn[name] = above[-2] if len(above) > 1 else None
    assert drawn == {
        name: kind.__bases__[0].__name__ if kind is not ClipfleetError else None for name, kind in KINDS.items()
    }


def test_each_class_says_when_it_is_raised() -> None:
    assert all(kind.__doc__ for kind in KINDS.values())


def test_file_errors_are_the_builtin_ones_too() -> None:
    assert issubclass(ImageNotFound, FileNotFoundError) and issubclass(ImageUnreadable, OSError)
    assert not issubclass(ImageCorrupt, OSError)
    assert str(ImageNotFound("no image file at 'x'", path="x")) == "no image file at 'x'"
