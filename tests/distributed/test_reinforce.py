"""An iteration of GSPO, from prompts to its last update: the same on every layout, and what its definition says.

Prompts show pictures, sound or nothing; the reward is a function of a response's tokens, so that a model that knows
nothing has groups with spread. In fp32 the responses are the same token for token wherever they are computed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.prompts import Prompt, PromptLoader
from megatron_omni.data.responses import Group
from megatron_omni.data.sample import Sample
from megatron_omni.generation import sampling
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.rewards.rollouts import Rollout, iterations, read_rollouts
from megatron_omni.tasks import iteration, responding
from megatron_omni.training.loop import train
from tests.distributed import tiny_run
from tests.distributed.harness import Rank, RankFailure, run_ranks
from tests.distributed.tiny_run import EP, OVERLAP, PP, TP, make_corpus, prepare, records, run_tiny

REWARDS = """
def digits(completion_ids, **columns):
    return [sum(ids) % 5 / 4 for ids in completion_ids]


def short(completion_ids, **columns):
    return [None if len(ids) == 3 else 1.0 / len(ids) for ids in completion_ids]
"""
SETTINGS = {
    "task": "reinforce",
    "seed": 13,
    "train_iters": 4,
    "data__micro_batch_size": 2,
    "reinforce__group_size": 3,
    "reinforce__mini_batches": 2,
    "reinforce__max_new_tokens": 7,
    "reinforce__clip_low": 0.02,
    "reinforce__clip_high": 0.03,
    "freeze": ["gate", "vision", "audio"],
    "optim__lr_warmup_iters": 0,
    "optim__lr_decay_style": "constant",
    "optim__lr_decay_iters": None,
    "model__init_method_std": 0.1,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_corpus(tmp_path_factory.mktemp("corpus"))
    (directory / "mine.py").write_text(REWARDS)
    return directory


def recipe_of(corpus: Path, run_dir: Path, /, **overrides: Any) -> Recipe:
    rewards = [{"function": f"{corpus / 'mine.py'}:digits"}, {"function": f"{corpus / 'mine.py'}:short", "weight": 0.5}]
    return tiny_run.tiny_recipe(corpus, run_dir, **(SETTINGS | {"reinforce__rewards": rewards} | overrides))


def told(recipe: Recipe) -> list[list[tuple[Any, ...]]]:
    """Of every iteration the responses: prompt, g, ids, how they ended, reward."""
    return [
        [(r.prompt, r.g, tuple(r.token_ids), r.finish, r.total) for r in read_rollouts(recipe.run_dir, number)]
        for number in iterations(recipe.run_dir)
    ]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[dict[str, float]]]:
    """One rank."""
    recipe = recipe_of(corpus, tmp_path_factory.mktemp("alone"))
    return recipe, run_tiny(recipe, 1)


def same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Losses, gradients and figures of every step."""
    names = (
        "policy loss",
        "grad-norm",
        "clip/low",
        "clip/high",
        "ratio/max_dev",
        "reward/mean",
        "groups/kept",
        "entropy",
    )
    for record, other in zip(found, expected, strict=True):
        for name in names:
            assert record.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-5, abs=1e-6), (record["step"], name)


def test_the_first_step_of_an_iteration_has_a_ratio_of_one(alone: tuple[Recipe, list[dict[str, float]]]) -> None:
    recipe, found = alone
    assert [record["ratio/max_dev"] > 0 for record in found] == [False, True, False, True]
    assert found[0]["policy loss"] == pytest.approx(0, abs=1e-7) and found[1]["policy loss"] != 0
    assert found[1]["clip/low"] + found[1]["clip/high"] > 0
    assert all(record["grad-norm"] > 0 for record in found)
    assert max(record.get("rollout/mismatch_max", 0) for record in found) < 1e-4
    # An untrained model: of every column of the vocabulary 2e-5 are near an edge.
    assert all(0 <= record["rollout/near_edge"] < 5 * 2e-5 * recipe.model.vocab_size for record in found[::2])
    (first, second), ends = told(recipe), {0: set[str](), 1: set[str]()}
    assert len(first) == len(second) == 2 * 8 * 3
    for number, rows in enumerate((first, second)):
        for _, _, ids, finish, _ in rows:
            ends[number].add(finish)
            assert len(ids) == 7 or finish == "stop"
    assert {row[2] for row in first} != {row[2] for row in second}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {"data__micro_batch_size": 4}),
        (1, {"reinforce__max_running": 3, "parallel__recompute": "full"}),
        (2, {}),
        (2, TP),
        (2, PP),
        (2, EP),
        (4, TP | PP | OVERLAP),
    ],
    ids=["micro_batch", "recompute", "dp2", "tp2", "pp2", "ep2", "tp2_pp2"],
)
def test_layouts_agree(
    corpus: Path, tmp_path: Path, alone: tuple[Recipe, list[dict[str, float]]], ranks: int, layout: dict[str, Any]
) -> None:
    recipe = recipe_of(corpus, tmp_path, **layout)
    found = run_tiny(recipe, ranks)
    assert told(recipe)[0] == told(alone[0])[0]
    same(found[:2], alone[1][:2])
    same(found[2:], alone[1][2:])


# ------------------------------------------------------------------------------------------------ its definition


def first_step(rank: Rank, recipe: Recipe, change: Callable[[], None] | None) -> dict[str, float]:
    """What is told of one step, with something changed in this process."""
    if change is not None:
        change()
    train(prepare(rank, recipe))
    return records(recipe)[0]


def defined(rank: Rank, recipe: Recipe) -> tuple[float, list[float]]:
    """Gradient norm of the first step and what responses' old log-probabilities are, from the ids on disk and the model as
    it is drawn: a row for each response, a mean over its tokens, a mean over the responses that are kept."""
    run = prepare(rank, recipe)
    loader, model = run.loader, unwrap_model(run.model)
    assert isinstance(loader, PromptLoader)
    rows = read_rollouts(recipe.run_dir, 0)
    groups: dict[int, list[Rollout]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    numbers = {number for micro in loader.next_step().numbers for number in micro}
    weighted, log_probs = [], []
    for number in sorted(numbers):
        rewards = torch.tensor([row.total for row in groups[number] if row.total is not None], dtype=torch.float64)
        for row in groups[number]:
            tokens = log_prob_of(loader, model, loader.prompt(number), list(row.token_ids))
            log_probs.append(float(tokens.sum()))
            if row.total is not None and rewards.std(correction=0) > 1e-6:
                weighted.append((row.total - rewards.mean()) / rewards.std(correction=0) * tokens.double().mean())
    (-torch.stack(weighted).mean()).backward()
    squares = [p.main_grad.double().square().sum() for p in model.parameters() if p.requires_grad]
    sampled = [row.extra["log_prob"] for number in sorted(numbers) for row in groups[number]]
    assert log_probs == pytest.approx(sampled, abs=1e-4)
    return float(torch.stack(squares).sum().sqrt()), log_probs


def log_prob_of(loader: PromptLoader, model: torch.nn.Module, prompt: Prompt, ids: list[int]) -> torch.Tensor:
    """[n] of a response in a row of its own."""
    told, places = torch.tensor(ids), torch.arange(prompt.next_position, prompt.next_position + len(ids) - 1)
    sample = Sample(
        input_ids=torch.cat([prompt.input_ids, told[:-1]]),
        labels=torch.cat([torch.full((prompt.length - 1,), IGNORE_LABEL), told]),
        position_ids=torch.cat([prompt.position_ids, places.expand(3, -1)], dim=1),
        next_position=prompt.next_position + len(ids) - 1,
        modality=torch.cat([prompt.modality, torch.full((len(ids) - 1,), int(Modality.TEXT))]),
        tiles=prompt.tiles,
        chunks=prompt.chunks,
    )
    batch = collate([sample], pad_id=0, rule=loader.builder.rule)
    return -model(batch, step=0, stochastic=False)[0, prompt.length - 1 :]


def without_end_tokens() -> None:
    kept = responding._response

    def cut(result: Any) -> Any:
        response = kept(result)
        if response.finish == "stop" and len(response.ids) > 1:
            response.ids, response.log_probs = response.ids[:-1], response.log_probs[:-1]
        return response

    responding._response = cut


def labels_one_later() -> None:
    def shifted(*arguments: Any, **settings: Any) -> list[Group]:
        groups = grouped(*arguments, **settings)
        for group in groups:
            places = (group.sample.labels != IGNORE_LABEL).nonzero().squeeze(1)
            group.sample.labels[places] = group.sample.labels[places].roll(1)
        return groups

    grouped, iteration.group_samples = iteration.group_samples, shifted


def every_draw_near_an_edge() -> None:
    """A draw that is moved by so much is of the first or the last token."""
    sampling.EDGE = 2.0


def divided_locally() -> None:
    summed = iteration.sum_over_ranks
    iteration.sum_over_ranks = lambda values, **settings: (
        list(values) if len(values) == 2 else summed(values, **settings)
    )


ONE_STEP = {"train_iters": 1, "optim__clip_grad": 0.0, "optim__precision": "fp32"}


@pytest.mark.parametrize(
    ("ranks", "change", "equal"),
    [
        (1, None, True),
        (2, every_draw_near_an_edge, True),
        (1, without_end_tokens, False),
        (1, labels_one_later, False),
        (2, divided_locally, False),
    ],
    ids=["alone", "dp2", "without_end_tokens", "labels_one_later", "divided_locally"],
)
def test_the_gradient_is_that_of_the_definition(
    corpus: Path, tmp_path: Path, alone: Any, ranks: int, change: Callable[[], None] | None, equal: bool
) -> None:
    """And not that of an iteration with a fault in it."""
    recipe = recipe_of(corpus, tmp_path / "run", **ONE_STEP)
    ((expected, _),) = run_ranks(defined, 1, recipe_of(corpus, Path(alone[0].run_dir), **ONE_STEP))
    try:
        found = run_ranks(first_step, ranks, recipe, change)[0]
    except RankFailure as failure:  # it is noticed even before the update
        assert not equal and "responses have other log-probabilities in training" in str(failure), failure
    else:
        assert (found["grad-norm"] == pytest.approx(expected, rel=1e-5)) is equal, (found, expected)
        assert (found["rollout/near_edge"] == 1.0) is (change is every_draw_near_an_edge)


# ------------------------------------------------------------------------------------------------ what is sampled


def excess(rank: Rank, recipe: Recipe) -> float:
    """Of first tokens of 5,120 responses to one prompt, named as 80: chi-square against the model's probabilities at
    temperature 1, in standard deviations from what chance gives."""
    run = prepare(rank, recipe)
    assert isinstance(run.loader, PromptLoader)
    prompt = run.loader.prompt(0)
    named = [replace(prompt, number=number) for number in range(80)]
    found = responding.sample_responses(run, named, tokenizer=run.loader.builder.tokenizer, seed=3)
    first = torch.tensor([response.ids[0] for group in found.values() for response in group])
    batch = collate([prompt], pad_id=0, rule=run.loader.builder.rule)
    with torch.no_grad():
        logits = unwrap_model(run.model)(batch, step=0, stochastic=False, compute_loss=False)[0, prompt.length - 1]
    expected = torch.softmax(logits.double(), 0) * len(first)
    seen = torch.bincount(first, minlength=len(expected)).double()
    often = expected >= 5
    expected, seen = (torch.cat([counts[often], counts[~often].sum()[None]]) for counts in (expected, seen))
    chi_square, freedom = float(((seen - expected).square() / expected).sum()), len(seen) - 1
    return (chi_square - freedom) / (2 * freedom) ** 0.5


def test_first_tokens_are_drawn_by_the_models_own_probabilities(corpus: Path, tmp_path: Path) -> None:
    settings = {"reinforce__group_size": 64, "reinforce__max_new_tokens": 2, "reinforce__max_running": 64}
    settings["model__init_method_std"] = 0.4  # some tokens are much likelier than others
    assert abs(run_ranks(excess, 1, recipe_of(corpus, tmp_path, **settings))[0]) < 4
    warm = recipe_of(corpus, tmp_path, **settings, reinforce__temperature=1.2)
    assert run_ranks(excess, 1, warm)[0] > 8
