"""Runs of task ``generative``: what stays as it was, running means by their definition, resuming to the bit and elsewhere, and the
same losses from hidden states on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.means import MEANS, MeansReader
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.run import Recipe
from megatron_omni.data.picture_arrays import hidden_facts
from megatron_omni.data.row_files import write_rows
from megatron_omni.parallel.wrap import unwrap_model
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_drawing import STEPS, TRUNK, drawing_corpus, drawing_recipe, write_jsonl
from tests.distributed.tiny_run import prepare, records, run_tiny

WATCHED = (
    "loss", "lm loss", "flow loss", "flow loss/task/edit", "align/task", "cosine/visual", "eval/loss/held",
    "eval/flow loss/held", "grad-norm",
)  # fmt: skip
DECAY = 0.8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawing_corpus(tmp_path_factory.mktemp("drawing"))


@pytest.fixture(scope="module")
def straight(corpus: Path) -> Recipe:
    """A run from its first step to its last, every step of it saved."""
    recipe = drawing_recipe(corpus, corpus / "straight")
    run_tiny(recipe, 1)
    return recipe


def stored(
    recipe: Recipe, step: int, kind: type[TorchDistReader] = TorchDistReader, *, state: bool = False
) -> dict[str, Tensor]:
    """Weights and means of a checkpoint; with the optimizer's ``state``."""
    reader = kind(commit.iteration_dir(Path(recipe.run_dir) / commit.CHECKPOINTS, step))
    return {key: reader.read(key) for key in reader.tensors if state or not key.startswith("optimizer.state.")}


def watched(recipe: Recipe) -> list[dict[str, float]]:
    return [{name: line[name] for name in (*WATCHED, "step") if name in line} for line in records(recipe)]


def test_every_figure_is_there_and_what_is_frozen_stays(straight: Recipe) -> None:
    lines = records(straight)
    assert {name for line in lines for name in line} >= set(WATCHED)
    first, last = stored(straight, 1), stored(straight, STEPS)
    moved = {name for name in first if not name.startswith("optimizer.") and not torch.equal(first[name], last[name])}
    vocabulary = {"language.embedding.word_embeddings.weight", "language.output_layer.weight"}  # rows of the block
    assert moved and {name for name in moved if not name.startswith("image.")} <= vocabulary
    behind = ("in_conv", "out_conv", "y_pool_proj")  # what only gates let through, which begin as zeros
    still = {name for name in first if name.startswith("image.") and name not in moved}
    assert all(
        any(part in name for part in (*behind, "pad_token", "_bias", "_ii.", "_y", "embed")) for name in still
    ), still


def test_means_are_the_running_means_of_the_weights(straight: Recipe) -> None:
    """d = min(decay, (1 + n) / (10 + n)), from the weights before the first update on; and they are what is read."""
    names = [name for name in stored(straight, 1) if name.startswith(f"{MEANS}image.")]
    weights = [name.removeprefix(MEANS) for name in names]
    assert "image.dit.x_embedder.weight" in weights and "image.dit.pad_token" not in weights
    mean: dict[str, Tensor] = {}
    for step in range(1, STEPS + 1):
        found = stored(straight, step)
        decay = min(DECAY, step / (9 + step))
        for name in weights:
            if step == 1:  # the weights before it: w1 - (m1 - d w0) / (1 - d) is 0
                mean[name] = found[MEANS + name].double()
            else:
                mean[name] = decay * mean[name] + (1 - decay) * found[name].double()
            torch.testing.assert_close(found[MEANS + name].double(), mean[name], rtol=1e-5, atol=1e-7)
    read, raw = stored(straight, STEPS, MeansReader), stored(straight, STEPS)
    assert all(torch.equal(read[name], raw[MEANS + name]) for name in weights)
    assert not torch.equal(read["image.dit.x_embedder.weight"], raw["image.dit.x_embedder.weight"])
    assert torch.equal(read["language.output_layer.weight"], raw["language.output_layer.weight"])


def begun_again(corpus: Path, straight: Recipe, name: str, **changes: Any) -> Recipe:
    """The run as it was after step 2, elsewhere."""
    recipe = drawing_recipe(corpus, corpus / name, load="auto", **changes)
    checkpoints = Path(recipe.run_dir) / commit.CHECKPOINTS
    checkpoints.mkdir(parents=True)
    iteration = commit.iteration_dir(checkpoints, 2)
    shutil.copytree(commit.iteration_dir(Path(straight.run_dir) / commit.CHECKPOINTS, 2), iteration)
    commit.write_text(checkpoints / commit.TRACKER, "2\n")
    return recipe


def test_a_resumed_run_is_the_one_that_went_on(corpus: Path, straight: Recipe) -> None:
    recipe = begun_again(corpus, straight, "resumed")
    run_tiny(recipe, 1)
    assert watched(recipe) == [line for line in watched(straight) if line["step"] > 2]
    theirs, ours = stored(straight, STEPS, state=True), stored(recipe, STEPS, state=True)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("pp2", {"parallel__pipeline_model_parallel_size": 2, "parallel__pipeline_layout": [2, 1]}),
        (
            "dp2",
            {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True, "data__packing": False},
        ),
    ],
)
def test_a_run_goes_on_elsewhere(corpus: Path, straight: Recipe, layout: str, changes: dict[str, Any]) -> None:
    """Noise, times and what is dropped are of the samples: losses and means are the same to rounding."""
    recipe = begun_again(corpus, straight, layout, **changes)
    run_tiny(recipe, 2)
    expected = [line for line in watched(straight) if line["step"] > 2]
    for ours, theirs in zip(watched(recipe), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    theirs, ours = stored(straight, STEPS), stored(recipe, STEPS)
    assert theirs.keys() == ours.keys()
    for name in theirs:
        if name.startswith(MEANS):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- cached rows


def hidden_of(rank: Rank, recipe: Recipe) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Hidden rows and the source's rows of every picture of the first step, by its row in the file."""
    run = prepare(rank, recipe)
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    model = unwrap_model(run.model)
    assert run.loader is not None
    for batch in run.loader.next_step():
        with torch.no_grad():
            _, hidden, vision = model(batch, step=1, stochastic=False, drawn=True)
        drawn = batch.drawn
        for g in range(len(drawn) if drawn is not None else 0):
            assert drawn is not None
            row = run.loader.mixture.sample_at(int(drawn.sample_ids[g])).row
            found[row] = (hidden[g], vision[g])
    return found


def test_hidden_states_on_disk_give_the_same_losses(corpus: Path, straight: Recipe) -> None:
    """Without language model or encoder in the run."""
    rows = [json.loads(line) for line in (corpus / "pictures.jsonl").read_text().splitlines()][:8]
    write_jsonl(corpus / "eight.jsonl", rows)
    changes: dict[str, Any] = {
        "file": "eight.jsonl", "train_iters": 1, "generative__ema": 0.0, "generative__losses__lm": 0.0,
        "freeze": [*TRUNK, "new_token_rows"], "init_from": straight.run_dir,
    }  # fmt: skip
    full = drawing_recipe(corpus, corpus / "full", **changes)
    (found,) = run_ranks(hidden_of, 1, full)
    assert found.keys() == set(range(len(rows)))
    name, arrays = "hidden.safetensors", list[Tensor]()
    for number, (hidden, vision) in found.items():
        kept = {"rows": hidden} | ({} if vision is None else {"vision": vision})
        rows[number]["hidden"] = {key: f"{name}#{len(arrays) + i}" for i, key in enumerate(kept)}
        arrays += kept.values()
    write_rows(corpus / name, arrays, kind="hidden", fingerprint="language", about=hidden_facts(full))
    write_jsonl(corpus / "cached.jsonl", rows)
    changes["file"] = "cached.jsonl"
    cached = drawing_recipe(corpus, corpus / "cached", generative__conditions="cached", **changes)
    for recipe in (full, cached):
        run_tiny(recipe, 1)
    assert {name.split(".")[0] for name in stored(cached, 1)} == {"image"}
    ours, theirs = watched(cached)[0], watched(full)[0]
    assert "lm loss" not in ours
    for name in ("flow loss", "align/task", "cosine/visual", "grad-norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
