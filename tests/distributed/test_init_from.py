"""``init_from``: weights of another stage and another shape, nothing missing or extra unless the recipe names it; and
which checkpoints a run keeps.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.upcycle import GATE_STD
from megatron_omni.config.data import EvalSourceConfig
from megatron_omni.config.run import Recipe
from megatron_omni.models.language import RMSNorm
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.platform.seeds import named_generator
from megatron_omni.training.initial_weights import UPCYCLED
from tests.distributed import tiny_run
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, prepare, records, run_ranks, run_tiny

tiny_recipe = partial(tiny_run.tiny_recipe, data__micro_batch_size=4)
DENSE = {"model__moe": None, "model__ffn_hidden_size": 48}
MOE = {"model__moe": {"moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 6}}
FFN = "language.decoder.layers.{}.mlp."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def dense_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of two steps."""
    run_dir = tmp_path_factory.mktemp("dense")
    run_tiny(tiny_recipe(corpus, run_dir, train_iters=2, **DENSE), 1)
    return run_dir


def state_of(rank: Rank, recipe: Recipe) -> dict[str, torch.Tensor]:
    run = prepare(rank, recipe)
    assert run.state.step == 0
    return {name: p.detach().clone() for name, p in unwrap_model(run.model).named_parameters()}


def start(recipe: Recipe, world_size: int = 1) -> list[dict[str, torch.Tensor]]:
    return run_ranks(state_of, world_size, recipe)


def test_dense_weights_start_a_mixture_by_upcycling(corpus: Path, tmp_path: Path, dense_run: Path) -> None:
    dense = start(tiny_recipe(corpus, tmp_path / "same", init_from=str(dense_run), **DENSE))[0]
    recipe = tiny_recipe(corpus, tmp_path / "run", init_from=str(dense_run), **MOE)
    made = start(recipe)[0]
    for name, value in dense.items():
        if ".mlp.linear_fc" not in name:
            rows = recipe.model.vocab_size if value.shape[0] > recipe.model.vocab_size else len(value)
            assert torch.equal(made[name][:rows], value[:rows]), name  # rows that only pad the vocabulary become zero
    for layer in (1, 3):
        up, down = dense[FFN.format(layer) + "linear_fc1.weight"], dense[FFN.format(layer) + "linear_fc2.weight"]
        for expert in range(4):
            assert torch.equal(made[FFN.format(layer) + "experts.weight1"][expert], up.t())
            assert torch.equal(made[FFN.format(layer) + "experts.weight2"][expert], down.t())
        shared = made[FFN.format(layer) + "shared_experts.weight2"]
        assert torch.equal(shared, down.t()[:12])  # two disjoint slices of six
        gate = made[FFN.format(layer) + "router.weight"]
        assert 0.8 * GATE_STD < float(gate.std()) < 1.2 * GATE_STD
        generator = named_generator(recipe.seed, "upcycle", f"model.layers.{layer // 2}.mlp.gate.weight")
        assert torch.equal(gate, torch.empty(gate.shape).normal_(std=GATE_STD, generator=generator)), "another seed"
    assert not (tmp_path / "run" / UPCYCLED).exists()
    # The same on two ranks, each with its half of the experts.
    recipe = tiny_recipe(
        corpus, tmp_path / "ep", init_from=str(dense_run), parallel__expert_model_parallel_size=2, **MOE
    )
    for index, rank in enumerate(start(recipe, 2)):
        for name, value in made.items():
            expected = value[2 * index : 2 * index + 2] if ".mlp.experts." in name else value
            assert torch.equal(rank[name], expected), name


def resumed_step(rank: Rank, recipe: Recipe) -> int:
    return prepare(rank, recipe).state.step


def test_modules_with_an_extra_state_take_checkpoints_without(
    corpus: Path, tmp_path: Path, dense_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformer Engine's norms have an ``_extra_state`` even where there is nothing in it; checkpoints made without
    Transformer Engine lack it, and still load. One that is there is given to the module.
    """
    plain = start(tiny_recipe(corpus, tmp_path / "plain", init_from=str(dense_run), **DENSE))[0]
    given: list[Any] = []
    monkeypatch.setattr(RMSNorm, "get_extra_state", lambda self: torch.empty(0, dtype=torch.uint8), raising=False)
    monkeypatch.setattr(RMSNorm, "set_extra_state", lambda self, state: given.append(state), raising=False)
    with_state = start(tiny_recipe(corpus, tmp_path / "te", init_from=str(dense_run), **DENSE))[0]
    assert plain.keys() == with_state.keys() and all(torch.equal(plain[name], with_state[name]) for name in plain)
    recipe = tiny_recipe(corpus, dense_run, train_iters=3, load="auto", **DENSE)
    assert run_ranks(resumed_step, 1, recipe) == [2]
    run_tiny(recipe, 1)

    def states_given(rank: Rank) -> list[Any]:
        prepare(rank, tiny_recipe(corpus, dense_run, train_iters=4, load="auto", **DENSE))
        return given

    assert len(run_ranks(states_given, 1)[0]) == 5  # two norms a block and the final one


def test_a_mixture_of_another_width_is_refused(corpus: Path, tmp_path: Path, dense_run: Path) -> None:
    recipe = tiny_recipe(corpus, tmp_path, init_from=str(dense_run))  # experts 32 wide
    with pytest.raises(AssertionError, match="moe_ffn_hidden_size=32"):
        start(recipe)


@pytest.mark.parametrize("kind", ["missing", "extra"])
def test_missing_and_extra_tensors_must_be_named(corpus: Path, tmp_path: Path, dense_run: Path, kind: str) -> None:
    without: dict[str, Any] = {"model__audio": None, "data__sources": []}
    if kind == "missing":
        run_tiny(tiny_recipe(corpus, tmp_path / "source", train_iters=1, **DENSE | without | text_only(corpus)), 1)
        settings, source = {}, tmp_path / "source"
    else:
        settings, source = without | text_only(corpus), dense_run
    recipe = partial(tiny_recipe, corpus, tmp_path / "run", init_from=str(source), **DENSE, **settings)
    with pytest.raises(AssertionError, match=rf"audio\..*init_allow_{kind}"):
        start(recipe())
    with pytest.raises(AssertionError, match=rf"audio\..*init_allow_{kind}"):
        start(recipe(**{f"init_allow_{kind}": ["vision.*", "audio.tower.nothing"]}))
    loaded = start(recipe(**{f"init_allow_{kind}": ["audio.*"]}))[0]
    fresh = start(tiny_recipe(corpus, tmp_path / "fresh", **DENSE, **settings))[0]
    taken = {name for name, value in loaded.items() if not torch.equal(value, fresh[name])}
    assert "language.embedding.word_embeddings.weight" in taken
    assert not any(name.startswith("audio.") for name in taken)


def text_only(corpus: Path) -> dict[str, Any]:
    return {"data__sources": [{"name": "text", "path": str(corpus / "text.jsonl")}]}


def test_best_and_last_checkpoints_stay(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        corpus,
        tmp_path,
        train_iters=5,
        optim__lr=0.3,  # so high that the loss gets worse
        optim__clip_grad=0.0,
        checkpoint={"save_interval": 1, "keep": 1, "keep_best": "eval/loss"},
        log__eval_interval=1,
        log__eval_iters=1,
    )
    recipe.data.eval_sources = [EvalSourceConfig(name="held_out", path=str(corpus / "held_out.jsonl"))]
    run_tiny(recipe, 1)
    losses = {r["step"]: r["eval/loss"] for r in records(recipe) if "eval/loss" in r}
    assert losses[4] == [r["eval/loss/held_out"] for r in records(recipe) if "eval/loss/held_out" in r][3]
    best = min(losses, key=losses.__getitem__)
    assert best not in (4, 5), "the test needs a run that gets worse"
    assert sorted(commit.steps(tmp_path / "checkpoints")) == [best, 5]
    assert json.loads((tmp_path / "checkpoints" / commit.BEST).read_text()) == {
        "step": best, "metric": "eval/loss", "value": losses[best],
    }  # fmt: skip
