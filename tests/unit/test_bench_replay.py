"""The benchmark of replay computes what it says, and a byte of routes a token and layer is what it finds."""

import pytest

from benchmarks.bench_replay import RECIPE, measure
from megatron_omni.config.load import load_recipe


def test_three_kinds_of_steps_are_measured() -> None:
    recipe = load_recipe(RECIPE, [])
    recipe.model.vision = recipe.model.audio = None
    found = measure(recipe, rows=2, length=16, steps=3)
    assert found["bytes a token"] == recipe.model.num_layers
    assert min(found[kind] for kind in ("live", "recorded", "replayed")) > 0
    assert found["replayed / live"] == pytest.approx(1, abs=0.9)
