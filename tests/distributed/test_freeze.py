"""What is frozen does not move, what is scaled moves at its own rate, and only the rows of new tokens of a frozen
embedding.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.config.parts import CODEC_PARTS, PARTS, SPEECH
from megatron_omni.config.pictures import IMAGE_PARTS
from megatron_omni.config.run import Recipe
from megatron_omni.models.parts import part_of
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training.loop import train
from megatron_omni.training.setup import new_token_ids
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, prepare, run_ranks, tiny_recipe

TRAINABLE = [part for part in PARTS if part not in {"ffn", "new_token_rows"} | SPEECH | CODEC_PARTS | IMAGE_PARTS]
PP = {"parallel__pipeline_model_parallel_size": 2}
TP = {"parallel__tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def moved(rank: Rank, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Largest change of each row (of the whole parameter for vectors) after two steps."""
    run = prepare(rank, recipe)
    model = unwrap_model(run.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert train(run) == 0
    return {name: (p.detach() - before[name]).abs().float() for name, p in model.named_parameters()}


def parts_that_moved(changes: list[dict[str, torch.Tensor]]) -> set[str]:
    return {part_of(name) for rank in changes for name, change in rank.items() if change.max() > 0}


@pytest.mark.parametrize(
    ("world_size", "layout", "trained"),
    [
        pytest.param(1, {}, ["projectors"], id="projectors"),
        pytest.param(2, PP, ["projectors"], id="projectors-pp2: nothing to train on the last stage"),
        pytest.param(2, PP | {"optim__use_distributed_optimizer": False}, ["projectors"], id="projectors-pp2-plain"),
        pytest.param(1, {}, ["projectors", "experts", "gate", "shared_experts"], id="omni-sft"),
    ],
)
def test_only_what_is_not_frozen_moves(
    corpus: Path, tmp_path: Path, world_size: int, layout: dict[str, Any], trained: list[str]
) -> None:
    frozen = [part for part in [*TRAINABLE, "new_token_rows"] if part not in trained]
    recipe = tiny_recipe(corpus, tmp_path, train_iters=2, freeze=frozen, **layout)
    assert parts_that_moved(run_ranks(moved, world_size, recipe)) == set(trained)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [{}, TP], ids=["tp1", "tp2"])
def test_new_token_rows_of_frozen_matrices(
    corpus: Path, tmp_path: Path, layout: dict[str, Any], precision: str
) -> None:
    recipe = tiny_recipe(
        corpus,
        tmp_path,
        train_iters=2,
        freeze=["embeddings", "output"],
        optim__weight_decay=0.5,
        optim__precision=precision,
        **layout,
    )
    ranks = run_ranks(moved, 2 if layout else 1, recipe)
    new = set(new_token_ids(recipe))
    assert new
    for suffix in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = torch.cat([next(v for n, v in rank.items() if n.endswith(suffix)) for rank in ranks]).amax(dim=1)
        changed = set(rows.nonzero().flatten().tolist())
        # Every new row of the output takes part in every softmax; the embedding has the audio tokens of the prompts.
        assert changed and changed <= new
        assert suffix.startswith("embedding") or changed == new


def test_lr_scale_is_a_factor_on_the_step_of_its_part(corpus: Path, tmp_path: Path) -> None:
    """Adam's first step is lr x sign(gradient), so the largest change of a part is its learning rate."""
    recipe = tiny_recipe(
        corpus,
        tmp_path,
        train_iters=1,
        optim__lr_warmup_iters=0,
        optim__weight_decay=0.0,
        optim__lr_decay_style="constant",
        optim__lr_scale={"vision": 0.25, "gate": 3.0},
    )
    changes = run_ranks(moved, 1, recipe)[0]
    largest = {part: max(c.max().item() for n, c in changes.items() if part_of(n) == part) for part in TRAINABLE}
    scales = {"vision": 0.25, "gate": 3.0}
    for part, value in largest.items():
        assert value == pytest.approx(recipe.optim.lr * scales.get(part, 1.0), rel=0.02), part
