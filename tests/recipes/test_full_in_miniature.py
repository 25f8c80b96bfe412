"""Every full recipe and layout lives a whole life in miniature (tests/recipes/miniature.py says how, docs/parallelism.md what
is replaced). ``make test`` takes two of them, ``make miniature`` all.
"""

import re

import pytest

from tests.recipes.miniature import RECIPES, REPLACED, ROOT, VARIANTS, Case, cases
from tests.recipes.rehearsal import Rehearsal

IN_EVERY_TEST_RUN = ("3_sft", "sft_64x80gb")
"""The recipe that job scripts start, and a layout that overlaps."""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    return Rehearsal(tmp_path_factory.mktemp("miniature"))


def marked(case: Case) -> object:
    marks = () if case.name in IN_EVERY_TEST_RUN else (pytest.mark.miniature,)
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [marked(case) for case in cases()])
def test_full_recipe(case: Case, rehearsal: Rehearsal) -> None:
    rehearsal.run(case)


def test_every_recipe_is_taken_and_overlaps_once() -> None:
    names = {case.name for case in cases()}
    assert {path.stem for path in RECIPES} <= names and len({path.stem for path in RECIPES}) == len(RECIPES)
    assert set(IN_EVERY_TEST_RUN) <= names and "3_sft-overlap" in names and "sft_64x80gb-overlap" not in names
    assert "sft_8x80gb-lean" in names


def test_the_table_of_the_docs_lists_what_is_replaced() -> None:
    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    table = text.split("## The full recipes in miniature")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([a-z0-9_.]+)`", row)}
    assert listed == REPLACED.union(*VARIANTS.values())
