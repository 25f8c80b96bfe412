"""Where the weights of what draws come from: with the language model or without it, of one checkpoint or of two."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.means import MeansReader
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.generation.load import open_checkpoint
from megatron_omni.parallel import groups
from megatron_omni.parallel.wrap import unwrap_model
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_drawing import drawing_corpus, drawing_recipe
from tests.distributed.tiny_run import prepare, run_tiny

LOSSES = {"lm": 0.0, "align_task": 0.0, "align_caption": 0.0, "align_visual": 0.0}
TAUGHT = {"generative__conditions": "teachers", "generative__losses": LOSSES, "freeze": []}
ONCE = {"train_iters": 1, "log__eval_interval": 0, "optim__lr_warmup_iters": 0}
PROJECTORS = ["image.caption.*", "image.task.*", "image.visual.*"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawing_corpus(tmp_path_factory.mktemp("drawing"))


@pytest.fixture(scope="module")
def taught(corpus: Path) -> Path:
    """A run on teachers: a generator without projectors, and its running means. What is said of projectors counts nothing."""
    others = {"model__image__image_token_repeat": 2, "model__image__projectors__num_layers": 2}
    recipe = drawing_recipe(corpus, corpus / "taught", file="pictures.jsonl", seed=3, **TAUGHT, **ONCE, **others)
    run_tiny(recipe, 1)
    return Path(recipe.run_dir)


@pytest.fixture(scope="module")
def spoken(corpus: Path) -> Path:
    """A language model that does not draw."""
    plain = {"task": "supervised", "generative": {}, "model__image": None, "freeze": []}
    recipe = drawing_recipe(corpus, corpus / "spoken", seed=4, **plain, **ONCE)
    run_tiny(recipe, 1)
    return Path(recipe.run_dir)


def stored(run_dir: Path, kind: type[TorchDistReader] = TorchDistReader) -> dict[str, Tensor]:
    reader = kind(commit.iteration_dir(run_dir / commit.CHECKPOINTS, 1))
    return {key: reader.read(key) for key in reader.tensors if not key.startswith("optimizer.")}


def started(rank: Rank, recipe: Recipe) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in unwrap_model(prepare(rank, recipe).model).named_parameters()}


def start(corpus: Path, name: str, world_size: int = 1, **changes: Any) -> list[dict[str, Tensor]]:
    return run_ranks(started, world_size, drawing_recipe(corpus, corpus / name, **changes))


@pytest.fixture(scope="module")
def whole(corpus: Path) -> dict[str, Tensor]:
    """Initial values of the whole model."""
    return start(corpus, "whole")[0]


def test_without_a_language_model_the_generator_begins_as_it_does_with_one(
    corpus: Path, spoken: Path, whole: dict[str, Tensor]
) -> None:
    """From nothing and, the language model left out, from a checkpoint that does not draw."""
    for name, changes in (("alone", {}), ("from", {"init_from": str(spoken), "init_allow_missing": ["image.*"]})):
        (alone,) = start(corpus, name, file="pictures.jsonl", **TAUGHT, **changes)
        assert {key.split(".")[0] for key in alone} == {"image"}
        assert whole.keys() - alone.keys() >= {"image.caption.in_fc.weight", "image.visual.model.weight"}
        assert all(torch.equal(value, whole[key]) for key, value in alone.items())


def test_two_runs_join_on_two_stages_and_the_means_are_what_is_taken(
    corpus: Path, taught: Path, spoken: Path, whole: dict[str, Tensor]
) -> None:
    ranks = start(
        corpus, "joined", 2, init_from=str(spoken), model__image__weights=str(taught), init_allow_missing=PROJECTORS,
        parallel__pipeline_model_parallel_size=2, parallel__pipeline_layout=[2, 1],
    )  # fmt: skip
    language, drawing, raw = stored(spoken), stored(taught, MeansReader), stored(taught)
    last = "image.dit.final_layer.linear.weight"
    assert not torch.equal(drawing[last], raw[last]), "no mean to take"
    seen = set()
    for made in ranks:
        for name, value in made.items():
            if name.startswith("language.") and re.search(r"\.layers\.|new_token_rows", name):
                continue  # layers are numbered by stage
            expected = drawing if name in drawing else whole if name.startswith("image.") else language
            assert torch.equal(value, expected[name]), name
            seen.add(name)
    assert seen >= set(drawing) and seen >= {name for name in language if name.startswith("vision.")}


def refused(rank: Rank, recipes: list[Recipe], checkpoint: Path) -> list[str]:
    """What each start says, and what opening the checkpoint does."""
    told = []
    for number, recipe in enumerate(recipes):
        own = replace(rank, store=torch.distributed.PrefixStore(str(number), rank.store))
        with pytest.raises((ValueError, commit.CheckpointError)) as caught:
            prepare(own, recipe)
        told.append(str(caught.value))
        groups.destroy()
    with pytest.raises(ValueError, match="") as caught:
        open_checkpoint(checkpoint, pg=rank.initialize(ParallelConfig()))
    return [*told, str(caught.value)]


def test_what_does_not_fit_is_one_error(corpus: Path, taught: Path, spoken: Path) -> None:
    both: dict[str, Any] = {"init_from": str(spoken), "model__image__weights": str(taught)}
    cases = (
        (both, r"lacks \d+ tensors, image\.caption\.\S+ the first; name them in init_allow_missing"),
        ({**both, "model__image__weights": str(spoken)}, "model.image.weights=.* nothing there draws"),
        (
            {**both, "model__image__dit__rope_base": 50.0},
            "model.image.dit.rope_base=50.0: the weights of .* made with 1",
        ),
    )
    recipes = [drawing_recipe(corpus, corpus / "refused", **changes) for changes, _ in cases]
    told = run_ranks(refused, 1, recipes, taught)[0]
    alone = r"draws? without a language model \(generative.conditions=teachers\)"
    for text, problem in zip(told, [*(problem for _, problem in cases), alone], strict=True):
        assert re.search(problem, text), text
