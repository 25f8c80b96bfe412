"""The benchmark of shared rows compares the same update, and its sharing shows."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.bench_shared_prompt import batches_of, main, prompt_of
from megatron_omni.config.load import load_recipe
from megatron_omni.data.responses import responses_of


def test_contenders_learn_the_same_responses() -> None:
    model = load_recipe(Path(__file__).parents[2] / "recipes" / "tiny" / "quickstart.yaml").model
    generator = torch.Generator().manual_seed(0)
    groups = [(prompt_of(model, generator), [[3, 4, 5], [6], [7, 8]]) for _ in range(3)]
    assert groups[0][0].length == 60 and int((groups[0][0].modality > 0).sum()) == 32
    shared, separate = ([responses_of(b).of(b.labels) for b in batches_of(groups, share=s)] for s in (True, False))
    assert [x.tolist() for x in shared] == [x.tolist() for x in separate]


def test_it_measures_what_a_shared_prompt_saves(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(tmp_path / "rows.json"), "--prompts", "2", "--repeats", "3"]) == 0
    separate, shared = json.loads((tmp_path / "rows.json").read_text())
    assert (separate["rows"], shared["rows"], separate["share"]) == ("separate", "shared", 1.0)
    assert shared["tokens"] < 0.35 * separate["tokens"] and shared["share"] < 0.7
    assert len(capsys.readouterr().out.splitlines()) == 2
