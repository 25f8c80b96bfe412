"""The process of another engine beside benchmarks/bench_generate.py: why it ended is said."""

import sys
from pathlib import Path

import pytest

from benchmarks.vllm_contender import Vllm


def test_an_interpreter_without_vllm_is_named_by_its_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"status 1: .*No module named 'vllm'"):
        Vllm(Path(sys.executable), tmp_path, dtype="float32", longest=8)
