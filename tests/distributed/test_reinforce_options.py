"""Options of a GSPO run: what is masked leaves sum and mean, another temperature, the token form, data that ends."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from megatron_omni.rewards.rollouts import Rollout, iterations, read_rollouts
from tests.distributed import test_reinforce
from tests.distributed.harness import run_ranks
from tests.distributed.test_reinforce import recipe_of
from tests.distributed.tiny_run import chat, make_corpus, records, run_tiny, train_rank

REWARDS = """
def digits(completion_ids, **columns):
    return [sum(ids) % 5 / 4 for ids in completion_ids]


def seldom(completion_ids, **columns):
    return [float(sum(ids) % 9 == 0) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_corpus(tmp_path_factory.mktemp("corpus"))
    (directory / "mine.py").write_text(test_reinforce.REWARDS + REWARDS)
    return directory


def groups_of(run_dir: str) -> dict[int, list[Rollout]]:
    groups: dict[int, list[Rollout]] = defaultdict(list)
    for row in read_rollouts(run_dir, 0):
        groups[row.prompt].append(row)
    return groups


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_masked_response_leaves_sum_and_mean_but_not_its_group(corpus: Path, tmp_path: Path, ranks: int) -> None:
    rewards = [{"function": f"{corpus / 'mine.py'}:digits"}]
    settings = {"reinforce__rewards": rewards, "reinforce__overlong": "mask", "reinforce__mini_batches": 1}
    recipe = recipe_of(corpus, tmp_path, train_iters=1, **settings)
    (record,) = run_tiny(recipe, ranks)
    kept, cut = [], 0
    for group in groups_of(recipe.run_dir).values():
        totals = [row.total or 0.0 for row in group]
        spread = pstdev(totals)
        for row, total in zip(group, totals):
            cut += row.finish == "length" and spread > 0
            if row.finish == "length" or not spread:
                assert row.advantage is None
            else:
                assert row.advantage == pytest.approx((total - fmean(totals)) / spread)
                kept.append(row.advantage)
    assert cut and kept and abs(fmean(kept)) > 0.01
    assert record["policy loss"] == pytest.approx(-fmean(kept), rel=1e-5)  # the ratio is 1


def test_at_another_temperature_the_ratio_is_one_and_both_forms_learn_alike(corpus: Path, tmp_path: Path) -> None:
    found = {}
    for form in ("sequence", "token"):
        recipe = recipe_of(corpus, tmp_path / form, train_iters=2, reinforce__temperature=0.7, reinforce__form=form)
        found[form] = run_tiny(recipe, 1)
        first, second = found[form]
        assert first["ratio/max_dev"] == 0 < second["ratio/max_dev"] and "rollout/mismatch" not in first
    test_reinforce.same(found["token"], found["sequence"])
    at_1 = recipe_of(corpus, tmp_path / "at_1", train_iters=1)
    assert run_tiny(at_1, 1)[0]["entropy"] > 1.02 * found["token"][0]["entropy"]


@pytest.mark.parametrize("resample", [0, 2])
def test_a_run_ends_with_its_prompts(corpus: Path, tmp_path: Path, resample: int) -> None:
    """Amid an iteration, and amid a round that would draw further prompts."""
    rows = [chat(f"number {number}?", "yes") for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "rows", "path": str(tmp_path / "rows.jsonl"), "epochs": 1}
    recipe = recipe_of(
        corpus, tmp_path / "run", train_iters=9, data__sources=[source], data__global_batch_size=4,
        reinforce__resample=resample, reinforce__rewards=[{"function": f"{corpus / 'mine.py'}:seldom"}],
    )  # fmt: skip
    assert run_ranks(train_rank, 2, recipe) == [0, 0]
    assert iterations(recipe.run_dir) == [0, 1]
    asked = [{row.prompt for row in read_rollouts(recipe.run_dir, number)} for number in (0, 1)]
    assert asked == [set(range(8)), set(range(8, 12))]  # four are too few to replace those without spread
    assert [record["step"] for record in records(recipe)] == [1, 2, 3]


def test_a_held_out_set_has_its_supervised_loss_on_every_layout(corpus: Path, tmp_path: Path) -> None:
    held_out = [{"name": "held", "path": str(corpus / "text.jsonl")}]
    settings = {"data__eval_sources": held_out, "log__eval_interval": 2, "log__eval_iters": 1, "train_iters": 2}
    pipeline = {"parallel__pipeline_model_parallel_size": 2}
    alone, piped = (
        [record["eval/loss/held"] for record in run_tiny(recipe_of(corpus, tmp_path / name, **settings, **more), ranks)
         if "eval/loss/held" in record]
        for name, more, ranks in (("alone", {}, 1), ("piped", pipeline, 2))
    )  # fmt: skip
    assert len(alone) == 1 and alone[0] > 1 and piped == pytest.approx(alone, rel=1e-4)
