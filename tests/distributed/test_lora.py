"""Low-rank adapters: a fresh one changes nothing, nothing else is trained, every layout computes the same, and the merged
model is the model with adapters.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.checkpoint.export import open_ours
from megatron_omni.config.run import Recipe
from megatron_omni.models.parts import part_of
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training.hooks import evaluation_mode
from megatron_omni.training.loop import train
from megatron_omni.training.step_data import next_batches
from tests.distributed import tiny_run
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, prepare, records, run_ranks, run_tiny

LORA = {"model__lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0}}
LAYOUTS = {
    "tp2": {"parallel__tensor_model_parallel_size": 2},
    "ep2": {"parallel__expert_model_parallel_size": 2},
    "pp2": {"parallel__pipeline_model_parallel_size": 2},
}
tiny_recipe = partial(
    tiny_run.tiny_recipe, train_iters=4, data__micro_batch_size=4, optim__lr=2e-2, optim__lr_warmup_iters=0
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of four steps with adapters, on one rank."""
    recipe = tiny_recipe(corpus, tmp_path_factory.mktemp("lora"), **LORA)
    run_tiny(recipe, 1)
    return recipe


def losses(recipe: Recipe) -> list[float]:
    return [r["lm loss"] for r in records(recipe) if "lm loss" in r]


def logits(rank: Rank, recipe: Recipe) -> torch.Tensor:
    """Of the first batch, with the weights that the recipe starts from."""
    run = prepare(rank, recipe)
    model = unwrap_model(run.model)
    with evaluation_mode(model), torch.no_grad():
        batches, _ = next_batches(run, run.loader)
        return torch.cat(
            [
                model(b, step=0, stochastic=False, compute_loss=False).flatten(0, 1)[~b.padding_mask.flatten()]
                for b in batches
            ]
        )


def moved(rank: Rank, recipe: Recipe) -> tuple[set[str], int, int]:
    """Parts that changed in a step; trained parameters and all."""
    run = prepare(rank, recipe)
    model = unwrap_model(run.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())
    assert train(run) == 0
    return {part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}, *counted


def test_fresh_adapters_change_nothing_and_they_alone_are_trained(corpus: Path, tmp_path: Path) -> None:
    plain = run_ranks(logits, 1, tiny_recipe(corpus, tmp_path / "plain"))[0]
    fresh = run_ranks(logits, 1, tiny_recipe(corpus, tmp_path / "fresh", **LORA))[0]
    assert torch.allclose(fresh, plain, rtol=1e-5, atol=1e-6)  # the experts' products are not fused, so not bit for bit
    parts, num_trained, total = run_ranks(moved, 1, tiny_recipe(corpus, tmp_path / "run", **LORA))[0]
    assert parts == {"adapters"} and num_trained < total / 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(corpus: Path, tmp_path: Path, trained: Recipe, layout: str) -> None:
    recipe = tiny_recipe(corpus, tmp_path, **LORA, **LAYOUTS[layout])
    run_tiny(recipe, 2)
    ours, expected = losses(recipe), losses(trained)
    assert expected[-1] < expected[0] - 0.01, "the test needs adapters that learn"
    assert ours == pytest.approx(expected, rel=1e-4)
    norms = [[r["grad-norm"] for r in records(other) if "grad-norm" in r] for other in (recipe, trained)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_merged_model_is_the_model_with_adapters(corpus: Path, tmp_path: Path, trained: Recipe) -> None:
    """Merged by ``init_from`` in a model without adapters, on one rank and split, and by the reader that export uses."""
    source = {"init_from": trained.run_dir}
    with_adapters = run_ranks(logits, 1, tiny_recipe(corpus, tmp_path / "a", **source, **LORA))[0]
    untouched = run_ranks(logits, 1, tiny_recipe(corpus, tmp_path / "b"))[0]
    merged = run_ranks(logits, 1, tiny_recipe(corpus, tmp_path / "c", **source))[0]
    assert not torch.allclose(with_adapters, untouched, rtol=1e-3, atol=1e-3)
    assert torch.allclose(merged, with_adapters, rtol=1e-4, atol=1e-5)
    # Adapters of another kind: the old ones are merged, fresh ones change nothing.
    others = {"model__lora": {"rank": 2, "alpha": 800.0, "dropout": 0.0, "targets": ["attention"]}}
    anew = run_ranks(logits, 1, tiny_recipe(corpus, tmp_path / "anew", **source, **others))[0]
    assert torch.allclose(anew, with_adapters, rtol=1e-4, atol=1e-5)
    assert adapter_shapes(run_ranks(weights, 1, tiny_recipe(corpus, tmp_path / "anew", **source, **others))[0]) == {2}
    for layout in ("tp2", "ep2"):
        split = run_ranks(weights, 2, tiny_recipe(corpus, tmp_path / layout, **source, **LAYOUTS[layout]))
        whole = run_ranks(weights, 1, tiny_recipe(corpus, tmp_path / layout, **source))[0]
        check_shares(split, whole)
    reader = open_ours(Path(trained.run_dir)).reader
    assert not any("lora" in key for key in reader.tensors if not key.startswith("optimizer."))
    whole = run_ranks(weights, 1, tiny_recipe(corpus, tmp_path / "d", **source))[0]
    layer = "language.decoder.layers.{}."
    stored = {
        layer.format(2) + "self_attention.linear_qkv.weight": layer.format(2) + "self_attention.linear_qkv.weight",
        layer.format(0) + "self_attention.linear_proj.weight": layer.format(0) + "self_attention.linear_proj.weight",
        layer.format(1) + "mlp.experts.weight1": layer.format(1) + "mlp.experts.experts.linear_fc1.weight",
        layer.format(3) + "mlp.experts.weight2": layer.format(3) + "mlp.experts.experts.linear_fc2.weight",
    }
    for name, key in stored.items():
        assert torch.allclose(reader.read(key), whole[name], rtol=1e-6, atol=1e-7), name
        if "experts" in name:
            assert torch.allclose(reader.read(key, index=2), whole[name][2], rtol=1e-6, atol=1e-7), name


def weights(rank: Rank, recipe: Recipe) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in unwrap_model(prepare(rank, recipe).model).named_parameters()}


def adapter_shapes(found: dict[str, torch.Tensor]) -> set[int]:
    """Ranks of the adapters, all of which add nothing yet."""
    adapters = {name: value for name, value in found.items() if ".lora_" in name}
    assert all(not value.any() for name, value in adapters.items() if name.endswith(".b"))
    return {value.shape[0] for name, value in adapters.items() if name.endswith(".a")}


def check_shares(split: list[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]) -> None:
    for name, value in whole.items():
        shares = [rank[name] for rank in split]
        if shares[0].shape == value.shape:
            assert torch.allclose(shares[0], value, rtol=1e-6, atol=1e-7), name
            continue
        axis = next(i for i, (a, b) in enumerate(zip(shares[0].shape, value.shape)) if a != b)
        assert torch.allclose(torch.cat(shares, axis), value, rtol=1e-6, atol=1e-7), name


def test_dropout_survives_recomputation(corpus: Path, tmp_path: Path) -> None:
    """A layer that is computed twice draws the same mask: the losses are those of a run that keeps its activations."""
    settings: dict[str, Any] = {"model__lora": {"rank": 4, "dropout": 0.5}, "train_iters": 3}
    kept = tiny_recipe(corpus, tmp_path / "kept", **settings)
    replayed = tiny_recipe(corpus, tmp_path / "replayed", parallel__recompute="full", **settings)
    for recipe in (kept, replayed):
        run_tiny(recipe, 1)
    assert losses(replayed) == pytest.approx(losses(kept), rel=1e-6)
    norms = [[r["grad-norm"] for r in records(recipe) if "grad-norm" in r] for recipe in (kept, replayed)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    without = tiny_recipe(corpus, tmp_path / "without", **(settings | LORA))
    run_tiny(without, 1)
    assert losses(without)[1:] != pytest.approx(losses(kept)[1:], rel=1e-4)
