"""A layout that the machine cannot hold is refused before anything is built, with the plan's figures."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_omni.config.load import load_recipe, recipe_to_yaml
from megatron_omni.config.run import Recipe
from megatron_omni.estimate.hardware import GPUS
from megatron_omni.estimate.plan import make_plan
from megatron_omni.platform.device import memory_bytes
from megatron_omni.training.memory import check_memory
from tests.distributed.tiny_run import make_corpus, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(ROOT / "recipes" / "layout" / "sft_64x80gb.yaml")


def test_what_is_held_between_steps_decides_and_the_peak_warns(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(recipe, world_size=64, gpu=next(iter(GPUS.values())))
    held = max(stage.held.total for stage in plan.stages)
    assert 10 * GIB < held < plan.peak_bytes
    with pytest.raises(ValueError, match=re.escape(f"{held / GIB:.1f} GiB between steps")) as refused:
        check_memory(recipe, world_size=64, available=held - 1)
    assert "megatron-omni plan RECIPE --gpus 64" in str(refused.value)
    with caplog.at_level(logging.WARNING):
        check_memory(recipe, world_size=64, available=held)
    assert f"{plan.peak_bytes / GIB:.1f} GiB (estimated)" in caplog.text
    caplog.clear()
    check_memory(recipe, world_size=64, available=plan.peak_bytes)
    assert not caplog.text


def test_ranks_of_a_node_share_its_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = memory_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_bytes() == alone / 4 and alone > GIB


def test_a_start_is_refused_before_the_first_step(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(tiny_recipe(make_corpus(tmp_path / "corpus"), tmp_path / "run")))
    huge = ["model.moe.moe_ffn_hidden_size=1000000", "model.num_layers=1000"]  # 6 TiB
    command = [sys.executable, "-m", "megatron_omni.cli.train", str(file), *huge]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "GiB between steps, and has" in done.stderr and "this layout cannot run here" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
