"""benchmarks/bench_versions.py: this tree against itself, in two real processes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.bench_versions", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_a_tree_against_itself(tmp_path):
    target = tmp_path / "rows.json"
    done = bench(str(ROOT), "--rounds", "3", "--only", "tiny fp32", "--json", str(target))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(target.read_text())
    assert row["case"] == "mlp tiny fp32 f+b"
    assert row["ms"] > 0 and 0.2 < row["ratio"] < 5
    assert f"lowest ratio {row['ratio']:.2f}" in done.stdout


def test_a_tree_without_kernels_is_refused(tmp_path):
    done = bench(str(tmp_path))
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "setup.py build_ext --inplace" in done.stderr
