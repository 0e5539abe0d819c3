"""Types in the words of docs/settings.md and docs/routes.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter

from scripts.schema_tables import table, words


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Annotated[int, Field(ge=1)], "whole number from 1"),
        (Annotated[float, Field(gt=0, le=0.5)], "number above 0 to 0.5"),
        (Annotated[str, Field(min_length=1)] | None, "non-empty string or null"),
        (Literal["a", "b", 3], "`a`, `b` or `3`"),
        (bool, "`true` or `false`"),
        (tuple[Annotated[int, Field(ge=1, le=65535)], ...], "list of whole numbers from 1 to 65,535"),
        (Annotated[list[str | int], Field(min_length=1, max_length=16)], "list of 1 to 16 (strings or whole numbers)"),
        (dict[str, float], "object of numbers"),
        (dict[str, Any], "object"),
        (Any, "any value"),
    ],
)
def test_types_in_words(kind: Any, said: str) -> None:
    assert words(TypeAdapter(kind).json_schema(), str) == said


def test_a_type_that_has_a_name_is_a_link() -> None:
    assert words({"type": "array", "items": {"$ref": "#/a/Item"}}, "[{}](#item)".format) == "list of [Item](#item)"


def test_pipes_stay_in_their_cell() -> None:
    assert table(("a",), [("x | y",)]).splitlines() == ["| a |", "| --- |", r"| x \| y |"]
