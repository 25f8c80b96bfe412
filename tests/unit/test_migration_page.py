"""What docs/migration.md sends readers to is there: fields of recipes, options of the tools."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_omni.cli import convert, upcycle
from megatron_omni.config.run import Recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
VALUES = {"metrics.jsonl"}
"""Words that look like fields and are none."""


def fields(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of everything that a recipe may say."""
    for name, hint in typing.get_type_hints(kind).items():
        yield prefix + name
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from fields(part, f"{prefix}{name}.")  # type: ignore[arg-type]


FIELDS = set(fields(Recipe))
GROUPS = tuple(f"{name}." for name in ("model", "parallel", "data", "optim", "checkpoint", "log"))


def rows(section: str) -> list[str]:
    """Last cells of a table of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split(" | ")[-1] for line in text.splitlines() if line.startswith("| `")]
    assert cells
    return cells


@pytest.mark.parametrize("section", ["config.json", "Flags of the fine-tuning script"])
def test_every_field_that_is_named_exists(section: str) -> None:
    found = 0
    for cell in rows(section):
        for quoted in re.findall(r"`([^`]+)`", cell):
            word = re.split(r"[=:\s]", quoted)[0].removesuffix(".*")
            if f"{word}.".startswith(GROUPS):
                assert word in FIELDS, f"{cell}: there is no field {word}"
                found += 1
            elif re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", word) and word not in VALUES:
                assert any(name.split(".")[-1] == word for name in FIELDS), f"{cell}: no field ends in {word}"
                found += 1
    assert found >= 20


def test_every_option_of_the_tools_exists() -> None:
    known: set[str] = set()
    for tool in (convert, upcycle):
        top = tool.parser()
        commands = next((a.choices.values() for a in top._actions if isinstance(a.choices, dict)), [top])
        known |= {option for command in commands for action in command._actions for option in action.option_strings}
    ours = [cell for section in ("Files", "Flags of the fine-tuning script") for cell in rows(section)]
    options = re.findall(r"(--[a-z][a-z-]+)", " ".join(ours) + PAGE.split("\n## ")[0])
    assert len(options) >= 5 and set(options) <= known, set(options) - known


def test_every_page_that_is_linked_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((ROOT / "docs" / link).is_file() for link in links), links
