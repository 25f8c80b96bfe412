"""Runs of GSPO that are stopped, killed or have nothing to learn: they go on as if nothing had happened, or say why not."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_omni.checkpoint import commit
from megatron_omni.config.run import Recipe
from megatron_omni.parallel.sharing import StepData
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.rewards.rollouts import iterations, read_rollouts
from megatron_omni.tasks import iteration, reinforce
from megatron_omni.training import loop
from megatron_omni.training.setup import Run
from tests.distributed import test_reinforce
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.test_reinforce import told
from tests.distributed.tiny_run import EP, PP, TP, make_corpus, records, run_tiny, train_rank

MORE_REWARDS = """
def equal(completions, **columns):
    return [1.0 for _ in completions]


def of_some(completion_ids, prompts, **columns):
    return [None if "colour" in prompt else sum(ids) % 3 / 2 for ids, prompt in zip(completion_ids, prompts)]


def broken(completions, prompts, **columns):
    return [1.0 / (0 if "colour" in prompt else 1) for prompt in prompts]


def seldom(completion_ids, **columns):
    return [float(sum(ids) % 9 == 0) for ids in completion_ids]
"""
STEPS, MINI = 6, 3
TIMES = ("time/", "step time", "tokens/s", "TFLOP/s", "rollout/tokens_per_s")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_corpus(tmp_path_factory.mktemp("corpus"))
    (directory / "mine.py").write_text(test_reinforce.REWARDS + MORE_REWARDS)
    return directory


def recipe_of(corpus: Path, run_dir: Path, /, **overrides: Any) -> Recipe:
    settings = {
        "train_iters": STEPS,
        "reinforce__mini_batches": MINI,
        "data__global_batch_size": 4,
        "checkpoint__save_interval": 1,
        "load": "auto",
    }
    return test_reinforce.recipe_of(corpus, run_dir, **(settings | overrides))


def rewarded(corpus: Path, function: str, **settings: Any) -> dict[str, Any]:
    return {"reinforce__rewards": [{"function": f"{corpus / 'mine.py'}:{function}"}], **settings}


def exact(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if not name.startswith(TIMES)} for record in found]


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[dict[str, float]]]:
    """One rank, never stopped."""
    recipe = recipe_of(corpus, tmp_path_factory.mktemp("straight"))
    return recipe, run_tiny(recipe, 1)


# ------------------------------------------------------------------------------------------------ signals


def at_step(step: int, act: Callable[[], None], run: Run) -> None:
    """``act`` on rank 0 before the data of ``step`` is there."""
    make = run.task.batches

    def batches(*arguments: Any, **settings: Any) -> Any:
        if run.state.step + 1 == step and dist.get_rank() == 0:
            act()
        return make(*arguments, **settings)

    run.task.batches = batches  # type: ignore[method-assign]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_at(step: int) -> Callable[[Run], None]:
    return partial(at_step, step, interrupt)


def in_rollout(run: Run) -> None:
    """The last rank gets a signal while the responses of the second iteration are sampled."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return
    seen = reinforce.sample_responses

    def sample(*arguments: Any, **settings: Any) -> Any:
        if run.state.step == MINI:
            interrupt()
        return seen(*arguments, **settings)

    reinforce.sample_responses = sample


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_is_stopped_amid_an_iteration_goes_on_bit_for_bit(
    corpus: Path, tmp_path: Path, straight: tuple[Recipe, list[dict[str, float]]], stop: int
) -> None:
    recipe = recipe_of(corpus, tmp_path, checkpoint__save_interval=0)
    # A signal before an iteration's responses are there ends the run before them.
    saved = stop if stop % MINI != 1 else stop - 1
    assert run_ranks(train_rank, 1, recipe, stop_at(stop)) == [75]
    assert (commit.find(tmp_path) is not None) == (saved > 0)
    assert [record["step"] for record in records(recipe)] == [*range(1, saved + 1)] if saved else True
    assert exact(run_tiny(recipe, 1)) == exact(straight[1])
    assert told(recipe) == told(straight[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, {}), (1, {})), ((1, {}), (2, PP)), ((2, EP), (2, {"data__micro_batch_size": 1}))],
    ids=["dp2-to-1", "1-to-pp2", "ep2-to-dp2"],
)
def test_a_run_goes_on_amid_an_iteration_on_another_layout(
    corpus: Path,
    tmp_path: Path,
    straight: tuple[Recipe, list[dict[str, float]]],
    first: tuple[int, dict[str, Any]],
    second: tuple[int, dict[str, Any]],
) -> None:
    assert set(run_ranks(train_rank, first[0], recipe_of(corpus, tmp_path, **first[1]), stop_at(2))) == {75}
    recipe = recipe_of(corpus, tmp_path, **second[1])
    test_reinforce.same(run_tiny(recipe, second[0]), straight[1])
    assert told(recipe) == told(straight[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_while_responses_are_sampled_ends_the_run_before_them(
    corpus: Path, tmp_path: Path, straight: tuple[Recipe, list[dict[str, float]]], ranks: int
) -> None:
    recipe = recipe_of(corpus, tmp_path, checkpoint__save_interval=0)
    assert set(run_ranks(train_rank, ranks, recipe, in_rollout)) == {75}
    assert commit.steps(tmp_path / "checkpoints") == [MINI] and iterations(tmp_path) == [0]
    found = run_tiny(recipe, ranks)
    if ranks == 1:
        assert exact(found) == exact(straight[1])
    test_reinforce.same(found, straight[1])


# ------------------------------------------------------------------------------------------------ kills


def die() -> None:
    os._exit(9)


def after_rollout(run: Run) -> None:
    """Killed once the second iteration's responses have rewards."""
    prepared = iteration.Iteration.prepare

    def prepare(self: iteration.Iteration, *arguments: Any) -> None:
        if self.number == 1:
            die()
        prepared(self, *arguments)

    iteration.Iteration.prepare = prepare  # type: ignore[method-assign]


def in_a_save(run: Run) -> None:
    """Killed amid the checkpoint of step 5, which lies in the second iteration."""
    saved = loop.begin_save

    def begin(run: Run, *arguments: Any, **settings: Any) -> Any:
        pending = saved(run, *arguments, **settings)
        if run.state.step == 5:
            die()
        return pending

    loop.begin_save = begin


@pytest.mark.parametrize(
    "kill",
    [partial(at_step, 6, die), after_rollout, in_a_save],
    ids=["before_6", "after_rollout", "in_a_save"],
)
def test_a_run_that_is_killed_goes_on_bit_for_bit(
    corpus: Path, tmp_path: Path, straight: tuple[Recipe, list[dict[str, float]]], kill: Callable[[Run], None]
) -> None:
    recipe = recipe_of(corpus, tmp_path)
    with pytest.raises(RankFailure, match="exit code 9"):
        run_ranks(train_rank, 1, recipe, kill)
    assert exact(run_tiny(recipe, 1)) == exact(straight[1])
    assert told(recipe) == told(straight[0])


def test_an_iteration_that_has_begun_keeps_its_settings(corpus: Path, tmp_path: Path) -> None:
    assert run_ranks(train_rank, 1, recipe_of(corpus, tmp_path), stop_at(2)) == [75]
    with pytest.raises(
        RankFailure, match=r"reinforce.group_size=2: the checkpoint was saved amid an iteration .* with 3"
    ):
        run_tiny(recipe_of(corpus, tmp_path, reinforce__group_size=2), 1)


# ------------------------------------------------------------------------------------------------ nothing to learn


def test_rewards_without_spread_skip_steps_and_end_the_run_with_a_reason(corpus: Path, tmp_path: Path) -> None:
    small = {"reinforce__mini_batches": 10, "reinforce__max_new_tokens": 2, "data__micro_batch_size": 1}
    small["data__global_batch_size"] = 2
    recipe = recipe_of(corpus, tmp_path, train_iters=30, **small, **rewarded(corpus, "equal"))
    with pytest.raises(
        RankFailure, match=r"20 steps in a row had no prompt .* 100% were answered right every time and 0% wr"
    ):
        run_tiny(recipe, 2)
    found = records(recipe)
    assert found[-1]["skipped steps"] == found[-1]["step"] == 19 and not any("policy loss" in r for r in found)


def test_prompts_without_an_opinion_are_left_out(corpus: Path, tmp_path: Path) -> None:
    recipe = recipe_of(corpus, tmp_path, train_iters=3, **rewarded(corpus, "of_some"))
    found = run_tiny(recipe, 1)
    rows = read_rollouts(tmp_path, 0)
    unjudged = [row for row in rows if row.source == "image"]
    assert unjudged and all(row.total is None and row.advantage is None for row in unjudged)
    assert found[0]["reward/left_out"] == pytest.approx(len(unjudged) / len(rows))
    assert any(row.advantage for row in rows)


def test_a_reward_that_fails_names_function_record_and_value(corpus: Path, tmp_path: Path) -> None:
    recipe = recipe_of(corpus, tmp_path, **rewarded(corpus, "broken"))
    with pytest.raises(RankFailure, match=r"mine.py:broken: .*\.jsonl:\d+: raised ZeroDivisionError") as caught:
        run_tiny(recipe, 2)
    assert "RewardError" in str(caught.value)


def test_a_judge_that_does_not_answer_ends_the_run_with_75_three_times(corpus: Path, tmp_path: Path) -> None:
    """At a port where nobody listens."""
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m", "tries": 1, "backoff_seconds": 0.0}
    recipe = recipe_of(corpus, tmp_path, reinforce__rewards=[{"function": "judge", "settings": judge}])
    for _ in range(3):
        assert set(run_ranks(train_rank, 2, recipe)) == {75}
    with pytest.raises(RankFailure, match="gave no score to 100% of the responses, as at the 3 starts before"):
        run_ranks(train_rank, 2, recipe)


@pytest.mark.parametrize("ranks", [1, 2])
def test_prompts_without_spread_give_way_to_the_next_ones(corpus: Path, tmp_path: Path, ranks: int) -> None:
    """The same ones on any number of ranks, after those of the iteration."""
    settings = rewarded(corpus, "seldom", reinforce__resample=2, train_iters=4, seed=5)
    recipe = recipe_of(corpus, tmp_path / "run", **settings)
    found = run_tiny(recipe, ranks)
    asked: dict[int, list[float]] = {}
    for row in read_rollouts(recipe.run_dir, 0):
        asked.setdefault(row.prompt, []).append(row.total or 0.0)
    dull = [number for number, rewards in asked.items() if len(set(rewards)) == 1]
    first = [number for number in dull if number < 4 * MINI]
    assert sorted(asked) == [*range(len(asked))] and len(asked) >= 4 * MINI + len(first) > 4 * MINI
    second = {row.prompt for row in read_rollouts(recipe.run_dir, 1)}
    assert min(second) == len(asked)
    assert found[0]["groups/kept"] == pytest.approx(1 - len(dull) / len(asked))
    alone = recipe_of(corpus, tmp_path / "alone", **settings)
    if ranks > 1:
        test_reinforce.same(found, run_tiny(alone, 1))
        assert told(recipe) == told(alone)


def test_records_without_a_usable_solution_end_the_run_with_a_reason(corpus: Path, tmp_path: Path) -> None:
    small = {"reinforce__mini_batches": 20, "reinforce__max_new_tokens": 2, "data__micro_batch_size": 1}
    rewards = {"reinforce__rewards": [{"function": "number", "settings": {"thinking": False}}]}
    recipe = recipe_of(corpus, tmp_path, train_iters=30, data__global_batch_size=1, **small, **rewards)
    with pytest.raises(
        RankFailure, match=r"0% were answered right .* 100% of the responses got no reward: look at the rec"
    ):
        run_tiny(recipe, 1)


# ------------------------------------------------------------------------------------------------ what is kept


def test_a_divergence_from_the_start_is_nothing_at_first_and_survives_a_stop(corpus: Path, tmp_path: Path) -> None:
    start = recipe_of(corpus, tmp_path / "start", train_iters=1)
    run_tiny(start, 1)
    settings = {"reinforce__kl_coeff": 0.5, "init_from": start.run_dir, "optim__lr": 1e-2}
    straight = recipe_of(corpus, tmp_path / "straight", **settings)
    found = run_tiny(straight, 1)
    assert found[0]["kl"] == 0 and all(record["kl"] > 0 for record in found[1:])
    plain = run_tiny(recipe_of(corpus, tmp_path / "plain", **(settings | {"reinforce__kl_coeff": 0.0})), 1)
    assert [r["grad-norm"] == p["grad-norm"] for r, p in zip(found, plain)][:2] == [True, False]
    stopped = recipe_of(corpus, tmp_path / "stopped", **settings)
    assert run_ranks(train_rank, 1, stopped, stop_at(5)) == [75]
    assert exact(run_tiny(stopped, 1)) == exact(found)
    test_reinforce.same(run_tiny(recipe_of(corpus, tmp_path / "tp2", **settings, **TP), 2), found)
    other = settings | {"init_from": straight.run_dir, "train_iters": STEPS + 1}
    with pytest.raises(RankFailure, match="the divergence is from the weights that the run began with"):
        run_tiny(recipe_of(corpus, tmp_path / "stopped", **other), 1)


def count_encoders(counts: Path, run: Run) -> None:
    """Note the pictures and sounds that each rank's towers are shown in rollouts, and in training's own passes."""

    def seen(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        way = "rollout" if torch.is_inference_mode_enabled() else "training"
        with counts.open("a") as file:
            file.write(f"{dist.get_rank()} {name} {way} {len(inputs[0])}\n")

    model = unwrap_model(run.model)
    model.vision.tower.register_forward_pre_hook(partial(seen, "image"))
    model.audio.tower.conv1.register_forward_pre_hook(partial(seen, "audio"))


def counted(counts: Path) -> Counter[tuple[str, ...]]:
    """By rank, medium and pass."""
    found = Counter[tuple[str, ...]]()
    for line in counts.read_text().splitlines():
        *key, number = line.split()
        found[tuple(key)] += int(number)
    return found


def media(recipe: Recipe, first: int = 0) -> Counter[str]:
    """Pictures and sounds of the prompts from ``first`` on, by source."""
    prompts = {(row.source, row.prompt) for row in read_rollouts(recipe.run_dir, 0) if row.prompt >= first}
    return Counter(source for source, _ in prompts if source != "text")


def test_media_are_shown_to_frozen_towers_once_an_iteration(corpus: Path, tmp_path: Path) -> None:
    """Where projectors are trained, too; on each tensor-parallel rank, with the responses, losses and gradients of one rank
    that shows them in every pass: for the old log-probabilities and in the update."""
    settings = {"freeze": ["gate", "vision", "audio"], "train_iters": MINI}
    recipe, plain = (
        recipe_of(corpus, tmp_path / "tp2", **settings, **TP),
        recipe_of(corpus, tmp_path / "plain", **settings),
    )
    run_ranks(train_rank, 2, recipe, partial(count_encoders, tmp_path / "seen"))
    shown = media(recipe)
    assert counted(tmp_path / "seen") == {(rank, name, "rollout"): n for rank in "01" for name, n in shown.items()}
    run_ranks(train_rank, 1, plain, partial(count_without_keeping, tmp_path / "each"))
    times = {"rollout": 1, "training": 2}
    assert counted(tmp_path / "each") == {("0", k, way): t * n for way, t in times.items() for k, n in shown.items()}
    assert told(plain) == told(recipe)
    test_reinforce.same(records(recipe), records(plain))


def count_without_keeping(counts: Path, run: Run) -> None:
    StepData.keep_rows = lambda self, known: None  # type: ignore[method-assign]
    count_encoders(counts, run)


def test_rows_of_frozen_encoders_are_computed_once_and_once_more_after_a_stop(corpus: Path, tmp_path: Path) -> None:
    """Those of the rollout and those of the run that goes on have the same bits. Two responses at a time: the third computes
    its prompt again, but not its media."""
    settings = {"freeze": ["gate", "vision", "audio", "projectors"], "train_iters": MINI, "reinforce__max_running": 2}
    recipe, stopped = (recipe_of(corpus, tmp_path / name, **settings) for name in ("run", "stopped"))
    run_ranks(train_rank, 1, recipe, partial(count_encoders, tmp_path / "seen"))
    assert counted(tmp_path / "seen") == {("0", name, "rollout"): n for name, n in media(recipe).items()}
    assert run_ranks(train_rank, 1, stopped, stop_at(2)) == [75]
    done = len(records(stopped))
    run_ranks(train_rank, 1, stopped, partial(count_encoders, tmp_path / "again"))
    left = media(recipe, first=done * recipe.data.global_batch_size)
    assert counted(tmp_path / "again") == {("0", name, "training"): n for name, n in left.items()}
    assert exact(records(stopped)) == exact(records(recipe))
