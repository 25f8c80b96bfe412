"""Rewards in a run of GSPO: who asks a judge, what becomes of its silence, and a function that fails on one rank."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.config.run import Recipe
from megatron_omni.rewards.rollouts import read_rollouts
from megatron_omni.tasks.choice import task_of
from megatron_omni.training.loop import train
from megatron_omni.training.setup import setup
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_reinforce import make_task, reinforce
from tests.distributed.tiny_run import PP, TP, chat, records
from tests.unit.judge_server import Handler, Reply, Server, completion, started, status

TEMPLATE = "{completion}"
"""The judge reads the response alone."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_task(tmp_path_factory.mktemp("task"))
    with (directory / "mine.py").open("a") as file:
        file.write(
            "\n\ndef fails_on_a_record(completions, solution, **columns):\n    if any(ODD(gold) for gold in solution):\n"
        )
        file.write("        raise KeyError('odd')\n    return [0.0 for _ in completions]\n")
        file.write(
            "\n\ndef digits(completion_ids, **columns):\n    return [sum(ids) % 5 / 4 for ids in completion_ids]\n"
        )
        file.write("\n\ndef ODD(gold):\n    return int(gold.rpartition('end')[2]) % 2\n")
    return directory


@pytest.fixture
def server() -> Iterator[Server]:
    with started() as found:
        yield found


def graded(handler: Handler, body: dict[str, Any]) -> None:
    """The score is a function of the response: the share of digits among its letters."""
    said = body["messages"][0]["content"]
    handler.send(completion(f"SCORE: {sum(letter.isdigit() for letter in said) / max(len(said), 1):.3f}"))


def mostly(every: int, fault: Reply) -> Reply:
    """``fault`` for a response in ``every``, told by its text, so that the same ones fail again."""

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        (fault if len(body["messages"][0]["content"]) % every == 0 else graded)(handler, body)

    return reply


def judged(task: Path, run_dir: Path, server: Server, **overrides: Any) -> Recipe:
    settings = {"url": server.url, "model": "m", "template": TEMPLATE, "thinking": False, "tries": 1}
    rewards = [{"function": "judge", "settings": settings}]
    return reinforce(task, run_dir, reinforce__rewards=rewards, **({"train_iters": 2} | overrides))


def outcome(rank: Rank, recipe: Recipe) -> int | str:
    """The exit status, or what was raised."""
    try:
        pg = rank.initialize(recipe.parallel)
        return train(setup(recipe, task_of(recipe), pg=pg))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def scored(recipe: Recipe) -> dict[tuple[int, int], float | None]:
    return {(row.prompt, row.g): row.total for row in read_rollouts(recipe.run_dir, 0)}


def test_one_rank_of_a_replica_asks_and_all_learn_from_the_same_rewards(
    task: Path, tmp_path: Path, server: Server
) -> None:
    server.script = [graded]
    found = {}
    for name, layout in {"tp2": TP, "pp2": PP, "dp2": {}}.items():
        server.asked.clear()
        recipe = judged(task, tmp_path / name, server, **layout)
        assert run_ranks(outcome, 2, recipe) == [0, 0]
        kept = [json.loads(line) for path in sorted((tmp_path / name).glob("judge*.jsonl")) for line in path.open()]
        texts = [row.text for row in read_rollouts(recipe.run_dir, 0)]
        assert len(texts) == 2 * 8 * 4 and len(server.asked) == len(kept)
        assert {body["messages"][0]["content"] for body in server.asked} == set(texts)
        if name != "dp2":
            assert len(server.asked) == len(set(texts))  # each response once
        found[name] = scored(recipe), records(recipe)
    assert len(list((tmp_path / "dp2").glob("judge*.jsonl"))) == 2  # a file each
    for name in ("tp2", "pp2"):
        assert found[name][0] == found["dp2"][0] and None not in found[name][0].values()
        for one, other in zip(found[name][1], found["dp2"][1], strict=True):
            assert one["grad-norm"] == pytest.approx(other["grad-norm"], rel=1e-5)
    first = found["dp2"][1][0]
    assert first["reward/judge"] == pytest.approx(sum(found["dp2"][0].values()) / 64)
    assert first["reward/judge/unanswered"] == 0


def test_a_judge_that_is_silent_ends_the_run_with_75_and_not_for_ever(
    task: Path, tmp_path: Path, server: Server
) -> None:
    server.script = [mostly(2, status(503))]
    recipe = judged(task, tmp_path / "run", server, load="auto")
    for _ in range(3):
        assert run_ranks(outcome, 2, recipe) == [75, 75]
    assert not (tmp_path / "run" / "rollouts").exists()  # nothing was learned from
    answered, asked = len(list((tmp_path / "run" / "judge.jsonl").open())), len(server.asked)
    (said, other) = run_ranks(outcome, 2, recipe)
    assert said == other and isinstance(said, str)
    assert said.startswith("RuntimeError: iteration 0: a reward's service gave no score to")
    assert "as at the 3 starts before" in said
    assert answered > 0 and len(server.asked) - asked < asked / 2  # what it has said is not asked again
    server.script = [graded]
    assert run_ranks(outcome, 2, recipe) == [0, 0]
    assert None not in scored(recipe).values()
    server.script = [status(503)]  # the count begins anew
    again = judged(task, tmp_path / "run", server, load="auto", train_iters=4)
    assert run_ranks(outcome, 2, again) == [75, 75]


def test_a_few_silences_leave_their_responses_out(task: Path, tmp_path: Path, server: Server) -> None:
    def silent_to_the_first(handler: Handler, body: dict[str, Any]) -> None:
        (status(400) if body["messages"] == server.asked[0]["messages"] else graded)(handler, body)

    server.script = [silent_to_the_first]
    recipe = judged(task, tmp_path / "run", server, train_iters=1)
    assert run_ranks(outcome, 1, recipe) == [0]
    rows = read_rollouts(recipe.run_dir, 0)
    silent = [row for row in rows if row.total is None]
    assert 1 <= len(silent) <= 3 and all(row.advantage is None for row in silent)
    assert len({row.text for row in silent}) == 1
    (record,) = records(recipe)
    assert record["reward/judge/unanswered"] == len(silent)
    assert record["reward/left_out"] == pytest.approx(len(silent) / len(rows))


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify is not installed: pip install 'megatron-omni[rl]'",
)
def test_a_solution_that_hangs_the_comparison_is_counted_and_costs_no_step(task: Path, tmp_path: Path) -> None:
    rows = [chat(f"{n}?", "3") | {"solution": "$9^{9^{9^9}}$" if n == 3 else "3"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"timeout_seconds": 0.5, "processes": 2, "thinking": False}
    digits = {"function": f"{task / 'mine.py'}:digits", "weight": 0.5}
    recipe = reinforce(
        task, tmp_path / "run", train_iters=1, reinforce__mini_batches=1,
        data__sources=[{"name": "rows", "path": str(tmp_path / "rows.jsonl")}],
        reinforce__rewards=[{"function": "accuracy", "settings": settings}, digits],
    )  # fmt: skip
    assert run_ranks(outcome, 1, recipe) == [0]
    hung = [row for row in read_rollouts(recipe.run_dir, 0) if row.record == 3]
    assert len(hung) == 4 and all(row.rewards["accuracy"] == 0.0 for row in hung)
    (record,) = records(recipe)
    assert 1 <= record["reward/accuracy/hung"] <= 4 and record["grad-norm"] > 0  # those that say a number


def test_a_function_that_raises_on_one_rank_ends_all_of_them(task: Path, tmp_path: Path) -> None:
    rewards = [{"function": f"{task / 'mine.py'}:fails_on_a_record"}]
    recipe = reinforce(task, tmp_path / "run", reinforce__rewards=rewards, data__global_batch_size=4)
    said = run_ranks(outcome, 2, recipe)
    assert all(isinstance(one, str) for one in said)
    assert any("RewardError: reward" in one and "train.jsonl:" in one and "KeyError: 'odd'" in one for one in said)
