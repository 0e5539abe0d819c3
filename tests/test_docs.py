"""The pages: what they link to is there, and the options and settings that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from clipfleet.cli import app
from scripts.reference import SECTIONS, outdated

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_their_options(page: Path) -> None:
    """Each `clipfleet COMMAND --option` that a page shows."""
    commands = getattr(get_command(app), "commands")  # noqa: B009  # of typer's own copy of click, which has no annotation
    wrong = []
    for line in re.findall(r"(?:^|`|\s)clipfleet ([a-z]+(?: [^`\n|]*)?)", page.read_text(encoding="utf-8")):
        command, *words = line.split()
        if command not in commands:
            continue  # prose
        known = commands[command]
        for word in words:
            if word in getattr(known, "commands", {}):
                known = known.commands[word]
        options = {name for option in known.params for name in (*option.opts, *option.secondary_opts)}
        wrong += [
            f"{command} {word}"
            for word in words
            if word.startswith("--") and word.partition("=")[0].rstrip(",.;:)") not in options
        ]
    assert wrong == []


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [page for value in entry.values() for page in pages(value)]
        return [page for value in entry for page in pages(value)] if isinstance(entry, list) else [str(entry)]

    listed = pages(site["nav"])
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert site["theme"]["font"] is False


def test_pages_made_of_the_code_are_as_it_has_them() -> None:
    assert outdated() == []


def test_every_setting_is_described() -> None:
    fields = [field for kind in SECTIONS.values() for field in kind.model_fields.items()]
    assert [name for name, field in fields if not field.description] == []
