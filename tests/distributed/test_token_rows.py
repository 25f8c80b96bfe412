"""Rows of new tokens in frozen vocabulary matrices, as a parameter of their own, against the definition: the whole matrix is
trained and its gradient masked to these rows. Earlier versions did it so: the definition's checkpoints are theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_omni.checkpoint.commit import iteration_dir
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.parts import frozen_matrices
from megatron_omni.config.run import Recipe
from megatron_omni.models.omni import OmniModel
from megatron_omni.models.parts import apply_freeze, part_of
from megatron_omni.parallel import groups
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training import optimizer, setup
from megatron_omni.training.loop import train
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, prepare, records, run_ranks, tiny_recipe

EMBEDDING, OUTPUT = "language.embedding.word_embeddings.weight", "language.output_layer.weight"
TP, PP = {"parallel__tensor_model_parallel_size": 2}, {"parallel__pipeline_model_parallel_size": 2}
TIED = {"model__untie_embeddings_and_output_weights": False}
BF16 = {"optim__precision": "bf16"}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fp32": (1, {}, {}),
    "tied-bf16-plain-adam": (1, TIED | BF16 | {"optim__use_distributed_optimizer": False}, {}),
    "tp2-bf16": (2, BF16, TP),
    "tied-pp2": (2, TIED, PP),
}
"""Ranks, settings, layout. Two ranks resume on two data-parallel ones as well."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def train_masked(model: OmniModel, recipe: Recipe) -> None:
    """The definition, in place of ``setup.freeze``."""
    matrices = frozen_matrices(recipe)
    apply_freeze(model, set(recipe.freeze) - matrices)
    for name, weight in model.named_parameters():
        if part_of(name) in matrices:
            first = dist.get_rank() * len(weight) if recipe.parallel.tensor_model_parallel_size > 1 else 0
            local = [row - first for row in setup.new_token_ids(recipe) if 0 <= row - first < len(weight)]
            mask = torch.zeros(len(weight), 1)
            mask[local] = 1
            weight.register_hook(lambda grad, mask=mask: grad * mask.to(grad.dtype))
            weight.masked = True  # type: ignore[attr-defined]


@contextmanager
def masked(wanted: bool) -> Iterator[None]:
    """Inside the block the definition is in force, if it is wanted: masked matrices, without weight decay."""
    ours = setup.freeze, optimizer._undecayed
    if wanted:
        setup.freeze = train_masked
        optimizer._undecayed = lambda param, name: hasattr(param, "masked") or ours[1](param, name)
    try:
        yield
    finally:
        setup.freeze, optimizer._undecayed = ours


def run_all(rank: Rank, recipes: dict[str, Recipe]) -> dict[str, dict[str, Any]]:
    """Train each; weights and shapes of what is trained by run. A name that starts with ``masked`` is the definition."""
    results = {}
    for name, recipe in recipes.items():
        with masked(name.startswith("masked")):
            try:
                run = prepare(replace(rank, store=dist.PrefixStore(name, rank.store)), recipe)
            except ValueError as error:
                results[name] = {"refused": str(error)}
                groups.destroy()
                continue
            assert train(run) == 0
        named = dict(unwrap_model(run.model).named_parameters())
        results[name] = {
            "weights": {key: p.detach().float().clone() for key, p in named.items()},
            "trained": {key: tuple(p.shape) for key, p in named.items() if p.requires_grad},
        }
        groups.destroy()
    return results


@pytest.mark.parametrize("case", CASES)
def test_one_parameter_for_the_rows_is_the_masked_matrix(corpus: Path, tmp_path: Path, case: str) -> None:
    world_size, changes, layout = CASES[case]

    def recipe(name: str, layout: dict[str, Any] = layout, **more: Any) -> Recipe:
        return tiny_recipe(
            corpus,
            tmp_path / name,
            train_iters=3,
            freeze=["embeddings", "output"],
            checkpoint__save_interval=2,
            checkpoint__keep=0,
            optim__weight_decay=0.5,
            optim__clip_grad=0.0,  # the norm is a sum in another order
            **changes,
            **layout,
            **more,
        )

    def saved(name: str, step: int) -> Path:
        return iteration_dir(tmp_path / name / "checkpoints", step)

    recipes = {
        "masked": recipe("masked"),
        "rows": recipe("rows"),
        "resumed": recipe("resumed", load=str(saved("rows", 2))),
        "of_masked": recipe("of_masked", init_from=str(saved("masked", 2))),
        "of_rows": recipe("of_rows", init_from=str(saved("rows", 2))),
        "refused": recipe("refused", load=str(saved("masked", 2))),
        "elsewhere": recipe("elsewhere", {}, load=str(saved("rows", 2))),
    }
    ranks = run_ranks(run_all, world_size, recipes)
    logged = {name: {int(r["step"]): r for r in records(recipes[name])} for name in recipes if name != "refused"}
    assert all("start a new run with init_from" in rank["refused"]["refused"] for rank in ranks)
    bf16 = "bf16" in case
    ids = setup.new_token_ids(recipes["rows"])
    tied = not recipes["rows"].model.untie_embeddings_and_output_weights

    # The forward of the first step, and all gradients below it, are bit for bit the definition's.
    assert logged["rows"][1]["lm loss"] == logged["masked"][1]["lm loss"]
    for step in (1, 2, 3):
        for metric in ("lm loss", "grad-norm"):
            expected = pytest.approx(logged["masked"][step][metric], rel=1e-3 if bf16 else 1e-6)
            assert logged["rows"][step][metric] == expected, (step, metric)
    # A resume goes on bit for bit, on another layout to rounding.
    for metric in ("lm loss", "grad-norm"):
        assert logged["resumed"][3][metric] == logged["rows"][3][metric]
        close = {"rel": 1e-3 if bf16 else 1e-5}
        assert logged["elsewhere"][3][metric] == pytest.approx(logged["masked"][3][metric], **close), metric
        assert logged["of_masked"][1][metric] == pytest.approx(logged["of_rows"][1][metric], **close), metric
    for rank in ranks:
        for name, weight in rank["rows"]["weights"].items():
            assert torch.equal(weight, rank["resumed"]["weights"][name]), name
        # What is trained of the matrices is [R, H].
        new = rank["rows"]["trained"].keys() - rank["masked"]["trained"].keys()
        assert {rank["rows"]["trained"][name] for name in new} == {(len(ids), 32)}, new
        assert not rank["rows"]["trained"].keys() & {EMBEDDING, OUTPUT}

    theirs, ours = (TorchDistReader(saved(name, 3)) for name in ("masked", "rows"))
    start = TorchDistReader(saved("rows", 2))
    weights = {key for key in theirs.tensors if not key.startswith("optimizer.")}
    assert weights == {key for key in ours.tensors if not key.startswith("optimizer.")}, "checkpoints differ in form"
    for key in {EMBEDDING, OUTPUT} & weights:
        frozen = torch.ones(ours.tensors[key].shape[0], dtype=torch.bool)
        frozen[ids] = False
        assert torch.equal(ours.read(key)[frozen], theirs.read(key)[frozen])
        assert (ours.read(key)[ids] != start.read(key)[ids]).any(), "the last update is not in the matrix"
        torch.testing.assert_close(ours.read(key)[ids], theirs.read(key)[ids], atol=2e-3 if bf16 else 1e-5, rtol=0)
        holder = "embedding" if key == EMBEDDING else "output_layer"
        states = [name.split(".")[2] for name in theirs.tensors if name.endswith(key) and name.startswith("optimizer.")]
        assert {"exp_avg", "exp_avg_sq"} < set(states)
        for state in states:
            rows = ours.read(f"optimizer.state.{state}.language.{holder}.new_token_rows.weight")
            whole = theirs.read(f"optimizer.state.{state}.{key}")
            assert rows.shape == (len(ids), 32)
            scale = whole[ids].abs().max().item()
            torch.testing.assert_close(rows, whole[ids], atol=(2e-2 if bf16 else 1e-4) * scale, rtol=0)
            if not state.startswith("exp"):
                assert torch.equal(rows.to(ours.read(key).dtype), ours.read(key)[ids])
            else:
                assert not whole[frozen].any()
    assert (OUTPUT in weights) == (not tied)
