"""JSON schemas as Markdown: their types in words, their fields as tables. For scripts/reference.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]
Link = Callable[[str], str]  # from a type's name to a link to its description


def fields(schema: Schema, link: Link, title: str) -> str:
    """A table of an object's fields; `title` heads the first column."""
    required = schema.get("required", ())
    found = schema.get("properties", {}).items()
    return table(
        (title, "type", "default", "meaning"),
        [(f"`{name}`", *described(name, field, name in required, link)) for name, field in found],
    )


def described(name: str, schema: Schema, required: bool, link: Link) -> tuple[str, str, str]:
    """Type, default and meaning of a field."""
    default = schema.get("default")
    shown = "–" if required else value(default) if "default" in schema else "none"
    if name.endswith("_bytes") and default and default % 2**20 == 0:
        shown += f" ({default // 2**20} MiB)"
    return words(schema, link), shown, prose(schema.get("description"))


def words(schema: Schema, link: Link, *, many: bool = False) -> str:
    """The type that a schema says, with its bounds; in the plural where `many`."""
    if named := type_name(schema):
        return link(named)
    if "anyOf" in schema:
        return either([words(each, link, many=many) for each in schema["anyOf"]])
    if "const" in schema:
        return value(schema["const"])
    if "enum" in schema:
        return either([value(each) for each in schema["enum"]])
    if schema.get("format") == "binary":
        return "bytes"
    kind: str = schema.get("type", "any value")
    name = _NAMES.get(kind, kind) + ("s" if many and kind in _COUNTED else "")
    filled = "non-empty " if schema.get("minLength") else ""
    return filled + name + _bounds(schema) + _inner(schema, link)


_NAMES = {"integer": "whole number", "boolean": "`true` or `false`", "array": "list"}
_COUNTED = ("string", "integer", "number", "array", "object")
_BOUNDS = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))


def _bounds(schema: Schema) -> str:
    return "".join(f" {word} {_whole(schema[name]):,}" for name, word in _BOUNDS if name in schema)


def _inner(schema: Schema, link: Link) -> str:
    """What is in a list, and how often, or in an object whose names are anything."""
    inner = schema.get("items") or schema.get("additionalProperties")
    if not isinstance(inner, dict):
        return ""
    found = words(inner, link, many=True)
    count = f"{schema.get('minItems', 0)} to {schema['maxItems']} " if "maxItems" in schema else ""
    return f" of {count}{f'({found})' if 'anyOf' in inner else found}"


def _whole(number: Any) -> Any:
    return int(number) if isinstance(number, float) and number.is_integer() else number


def value(given: Any) -> str:
    """A value as code; an object, which has defaults of its own, as an empty one."""
    if isinstance(given, dict):
        return "`{}`"
    return f"`{given if isinstance(given, str) else json.dumps(_whole(given))}`"


def type_name(schema: Schema) -> str | None:
    """Of the type that a schema refers to, if it does."""
    return schema["$ref"].rpartition("/")[2] if "$ref" in schema else None


def either(choices: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def prose(text: str | None) -> str:
    """Of a docstring, in one line."""
    return " ".join((text or "").split())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
