"""Routes in an iteration of reinforcement: fixed by the old-log-probability pass or by the rollout, on every layout and over
a resume amid the iteration; and what becomes of responses that sampler and training disagree about.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.batch import NO_RECORD
from megatron_omni.config.run import Recipe
from megatron_omni.tasks import monitor, reinforce, responding
from megatron_omni.tasks.figures import Figures
from megatron_omni.training.loop import train
from megatron_omni.training.setup import Run
from tests.distributed import tiny_run
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_routes import watch
from tests.distributed.tiny_run import CP, EP, PP, TP, make_corpus, prepare, records

REWARDS = """
def digits(completion_ids, **columns):
    return [sum(ids) % 5 / 4 for ids in completion_ids]
"""
STEPS = 4
SETTINGS = {
    "task": "reinforce",
    "seed": 12,  # no draw at an edge: ids are the same on every layout
    "train_iters": STEPS,
    "data__micro_batch_size": 2,
    "data__global_batch_size": 4,
    "reinforce__group_size": 3,
    "reinforce__mini_batches": 2,
    "reinforce__max_new_tokens": 6,
    "reinforce__clip_low": 0.9,
    "reinforce__clip_high": 0.9,
    "freeze": ["vision", "audio"],
    "optim__lr": 2e-2,
    "optim__lr_warmup_iters": 0,
    "optim__lr_decay_style": "constant",
    "optim__lr_decay_iters": None,
    "model__init_method_std": 0.1,
    "model__moe__moe_aux_loss_coeff": 0.0,
}
TIMES = ("time/", "step time", "tokens/s", "TFLOP/s", "rollout/tokens_per_s")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_corpus(tmp_path_factory.mktemp("corpus"))
    (directory / "mine.py").write_text(REWARDS)
    return directory


def recipe_of(corpus: Path, run_dir: Path, /, **overrides: Any) -> Recipe:
    rewards = [{"function": f"{corpus / 'mine.py'}:digits"}]
    return tiny_run.tiny_recipe(corpus, run_dir, **(SETTINGS | {"reinforce__rewards": rewards} | overrides))


def trained(rank: Rank, recipe: Recipe, change: Callable[[Run], None] | None) -> dict[str, Any]:
    """A run: its status or error, what was warned of, and what routers did in its updates."""
    run = prepare(rank, recipe)
    if change is not None:
        change(run)
    warnings: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "cut at" not in record.getMessage():  # as tiny answers are
                warnings.append(record.getMessage())

    logging.getLogger("megatron_omni.tasks").addHandler(Heard(logging.WARNING))
    said = watch(run.model)
    try:
        status: Any = train(run)
    except RuntimeError as error:
        status = str(error)
    return {"status": status, "warnings": warnings, "said": said}


def run_of(recipe: Recipe, ranks: int = 1, change: Callable[[Run], None] | None = None) -> list[dict[str, Any]]:
    return run_ranks(trained, ranks, recipe, change)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict[str, float]], Any]]:
    """One rank, by ``routes``: records and what its routers did."""
    found = {}
    for routes in ("live", "old", "rollout"):
        recipe = recipe_of(corpus, tmp_path_factory.mktemp(routes), reinforce__routes=routes)
        (result,) = run_of(recipe)
        assert result["status"] == 0
        found[routes] = records(recipe), result["said"]
    return found


@pytest.mark.parametrize("routes", ["old", "rollout"])
def test_updates_replay_and_the_first_has_a_ratio_of_one(alone: dict[str, Any], routes: str) -> None:
    found, said = alone[routes]
    assert [record["ratio/max_dev"] > 0 for record in found] == [False, True, False, True]
    assert said and all(same for _, same in said), "what was given is what was taken"
    assert sum(flips for flips, _ in said) > 10, "the gate moved, and would have chosen otherwise"
    assert all(record["grad-norm"] > 0 for record in found)
    live = alone["live"]
    assert live[1] == [] and found[1]["ratio/max_dev"] != live[0][1]["ratio/max_dev"]
    assert found[0]["grad-norm"] == pytest.approx(live[0][0]["grad-norm"], rel=1e-4), "at the weights of the rollout"


def test_in_fp32_sampler_and_training_agree(alone: dict[str, Any]) -> None:
    for found, _ in alone.values():
        for record in (found[0], found[2]):
            assert record["rollout/route_flips"] < 2e-3 and record["rollout/dropped"] == 0
            assert record["rollout/mismatch"] > 0 and record["rollout/mismatch_max"] < 1e-4


@pytest.mark.parametrize(
    ("routes", "ranks", "layout"),
    [("old", 2, TP), ("rollout", 2, PP | {"parallel__recompute": "full"}), ("old", 2, EP), ("rollout", 4, TP | PP),
     ("rollout", 2, CP), ("rollout", 1, {"reinforce__share_prompt": False})],
    ids=["old-tp2", "rollout-pp2", "old-ep2", "rollout-tp2_pp2", "rollout-cp2", "rollout-separate"],
)  # fmt: skip
def test_layouts_agree(
    corpus: Path, tmp_path: Path, alone: dict[str, Any], routes: str, ranks: int, layout: dict[str, Any]
) -> None:
    recipe = recipe_of(corpus, tmp_path, reinforce__routes=routes, train_iters=2, **layout)
    for result in run_of(recipe, ranks):
        assert result["status"] == 0 and result["said"] and all(same for _, same in result["said"])
    for record, expected in zip(records(recipe), alone[routes][0]):
        for name in ("policy loss", "grad-norm", "ratio/max_dev", "reward/mean"):
            assert record.get(name, 0) == pytest.approx(expected.get(name, 0), rel=1e-4, abs=1e-6), (
                record["step"],
                name,
            )


@pytest.mark.parametrize("routes", ["old", "rollout"])
def test_a_resume_amid_an_iteration_replays_the_same_routes(
    corpus: Path, tmp_path: Path, alone: dict[str, Any], routes: str
) -> None:
    run_of(recipe_of(corpus, tmp_path, reinforce__routes=routes, train_iters=3))
    recipe = recipe_of(corpus, tmp_path, reinforce__routes=routes, load="auto")
    (result,) = run_of(recipe)
    assert result["said"] and all(same for _, same in result["said"])
    last, expected = records(recipe)[-1], alone[routes][0][-1]
    assert last["step"] == STEPS
    for name, value in expected.items():
        if not name.startswith(TIMES):
            assert last[name] == value, name


def test_a_resume_on_another_layout_replays_them_too(corpus: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    run_of(recipe_of(corpus, tmp_path, reinforce__routes="old", train_iters=3))
    recipe = recipe_of(corpus, tmp_path, reinforce__routes="old", load="auto", data__micro_batch_size=1, **PP)
    for result in run_of(recipe, 2):
        assert result["said"] and all(same for _, same in result["said"])
    last, expected = records(recipe)[-1], alone["old"][0][-1]
    for name in ("policy loss", "grad-norm", "ratio/max_dev"):
        assert last[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


# --------------------------------------------------------------------------------------------------------- the monitor


def off_by(amount: float, *, every: int) -> Callable[[Run], None]:
    """The sampler says other log-probabilities, of one response in so many."""

    def change(run: Run) -> None:
        told, count = responding._response, [0]

        def other(result: Any) -> Any:
            response = told(result)
            count[0] += 1
            if count[0] % every == 0:
                response.log_probs = [value + amount for value in response.log_probs]
            return response

        responding._response = other

    return change


def test_responses_that_differ_are_named_and_left_out(corpus: Path, tmp_path: Path) -> None:
    recipe = recipe_of(corpus, tmp_path, train_iters=1)
    (result,) = run_of(recipe, 1, off_by(0.06, every=12))
    (record,) = records(recipe)
    assert result["status"] == 0 and record["rollout/dropped"] == 2 / 24
    assert record["rollout/mismatch_max"] == pytest.approx(0.06, rel=1e-2)
    (warning,) = result["warnings"]
    assert "2 of 24 responses" in warning and ".jsonl:" in warning and "left out of the loss" in warning
    below = recipe_of(corpus, tmp_path / "below", train_iters=1)
    (result,) = run_of(below, 1, off_by(0.04, every=12))
    assert result["warnings"] == [] and records(below)[0]["rollout/dropped"] == 0


@pytest.mark.parametrize("amount", [0.06, float("nan")])
def test_where_too_many_differ_the_run_ends_on_every_rank(corpus: Path, tmp_path: Path, amount: float) -> None:
    for result in run_of(recipe_of(corpus, tmp_path, **PP), 2, off_by(amount, every=6)):
        assert "4 of 24 responses" in result["status"] and "more than 10%" in result["status"]


def flip_a_bit(run: Run) -> None:
    """Of one response's routes, in its last token's last layer."""
    told, done = responding._response, []

    def other(result: Any) -> Any:
        response = told(result)
        if not done:
            response.routes[-1, -1] ^= 1
            done.append(response)
        return response

    responding._response = other


def test_a_flipped_bit_is_counted(corpus: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    recipe = recipe_of(corpus, tmp_path, train_iters=1)
    run_of(recipe, 1, flip_a_bit)
    (record,), before = records(recipe), alone["live"][0][0]
    places = record["rollout/length"] * 24 * recipe.model.num_layers
    assert (record["rollout/route_flips"] - before["rollout/route_flips"]) * places == pytest.approx(1, abs=1e-6)


def test_many_flips_are_told_with_the_remedy() -> None:
    figures = Figures()
    figures.add("rollout/route_flips", 5, 1000)
    assert "0.50%" in (said := monitor.advise(figures, routes="live") or "") and "reinforce.routes=rollout" in said
    assert monitor.advise(figures, routes="rollout") is None
    figures.add("rollout/route_flips", 0, 9000)
    assert monitor.advise(figures, routes="live") is None


def test_every_token_of_a_rollout_has_a_record(corpus: Path, tmp_path: Path) -> None:
    def change(run: Run) -> None:
        fixed = reinforce.ReinforceTask._fix_routes

        def looked(self: Any, data: Any, micro_batches: Any, old: Any, **settings: Any) -> None:
            for batch, chosen in zip(data.without_media, old):
                real = ~batch.padding_mask
                assert bool((batch.routes[real] < NO_RECORD).all()) and bool((batch.routes[~real] == NO_RECORD).all())
                assert chosen.shape == batch.routes.shape
            fixed(self, data, micro_batches, old, **settings)

        reinforce.ReinforceTask._fix_routes = looked  # type: ignore[method-assign]

    (result,) = run_of(recipe_of(corpus, tmp_path, train_iters=1), 1, change)
    assert result["status"] == 0
