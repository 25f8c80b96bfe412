"""Held-out evaluations that give no number: a set without labels is an error, a loss that is none is never the best."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL, OmniBatch, label_places
from megatron_omni.checkpoint import commit
from megatron_omni.config.data import EvalSourceConfig
from megatron_omni.config.run import Recipe
from megatron_omni.training.loop import evaluate
from megatron_omni.training.setup import Run
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, prepare, records, run_ranks, run_tiny, tiny_recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def held_out(corpus: Path, **settings: Any) -> EvalSourceConfig:
    return EvalSourceConfig(name="held_out", path=str(corpus / "held_out.jsonl"), **settings)


def unlabelled(batch: OmniBatch) -> OmniBatch:
    labels = torch.full_like(batch.labels, IGNORE_LABEL)
    return replace(batch, labels=labels, label_places=label_places(labels))


def refusal(rank: Rank, recipe: Recipe) -> str:
    run = prepare(rank, recipe)
    loader = run.eval_loaders["held_out"]
    assert loader is not None
    read = loader.next_step
    loader.next_step = lambda: [unlabelled(batch) for batch in read()]  # type: ignore[method-assign]
    with pytest.raises(ValueError) as caught:
        evaluate(run)
    return str(caught.value)


def test_a_held_out_set_without_a_label_is_an_error_on_every_rank(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(corpus, tmp_path)
    recipe.data.eval_sources = [held_out(corpus, epochs=1)]
    said = "data.eval_sources[held_out]: no token of it carries a label; give it records with answers"
    assert run_ranks(refusal, 2, recipe) == [said, said]


def spoil_evaluation(run: Run) -> None:
    """The held-out loss after step 3 is no number, though the weights are finite."""
    inner = run.task.forward_step

    def forward_step(batch: Any, model: Any, *, info: Any) -> Any:
        output, loss_function = inner(batch, model, info=info)

        def spoiled(token_loss: torch.Tensor) -> Any:
            loss, report = loss_function(token_loss)
            return loss, report * math.nan if info.step == 3 and not info.training else report

        return output, spoiled

    run.task.forward_step = forward_step  # type: ignore[method-assign]


def test_a_loss_that_is_no_number_is_never_the_best(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        corpus,
        tmp_path,
        train_iters=3,
        checkpoint={"save_interval": 1, "keep": 1, "keep_best": "eval/loss"},
        log__eval_interval=1,
        log__eval_iters=1,
    )
    recipe.data.eval_sources = [held_out(corpus)]
    run_tiny(recipe, 1, spoil_evaluation)
    losses = {r["step"]: r["eval/loss"] for r in records(recipe) if "eval/loss" in r}
    assert losses.keys() == {1, 2}
    best = min(losses, key=losses.__getitem__)
    assert json.loads((tmp_path / "checkpoints" / commit.BEST).read_text()) == {
        "step": best, "metric": "eval/loss", "value": losses[best],
    }  # fmt: skip
    assert sorted(commit.steps(tmp_path / "checkpoints")) == sorted({best, 3})
