"""docs/evaluation.md has a row for each of the 85 benchmarks of the paper, by table: counted from the paper; its metrics exist."""

import re
from pathlib import Path

from megatron_omni.evaluation.picture_metrics import PICTURE_METRICS
from megatron_omni.scoring import METRICS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
COUNTS = {"3": 19, "3 and 4": 8, "5": 4, "6": 14, "7": 13, "8": 7, "9": 4, "10": 3, "11": 4, "12": 5, "13": 4}
"""Columns of the paper's tables; table 4 repeats five of table 3 and adds three."""


def test_all_benchmarks_of_the_paper_have_a_row() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## The paper's benchmarks")[2]
    found: dict[str, int] = {}
    numbers = []
    metrics = METRICS.keys() | PICTURE_METRICS.keys() | {"none"}
    for group in section.split("\n### ")[1:]:
        (table,) = re.findall(r"\(Tables? ([\d and]*\d)", group.partition("\n")[0])
        rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", group, re.MULTILINE)
        assert all(cell.strip() for row in rows for cell in row)
        assert {metric for row in rows for metric in row[3].split(", ")} <= metrics
        numbers += [int(row[0]) for row in rows]
        found[table] = found.get(table, 0) + len(rows)
    assert found == COUNTS and numbers == list(range(1, 86))
