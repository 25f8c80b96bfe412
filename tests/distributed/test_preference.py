"""Learning from preferences as a run: the reference, the first loss, layouts, and what a run that goes on must find."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_omni.config.outcome import EXIT_REQUEUE
from megatron_omni.config.run import Recipe
from megatron_omni.tasks import reference
from megatron_omni.tasks.preference import PreferenceTask
from megatron_omni.training.setup import Run
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.tiny_run import (
    CP,
    EP,
    PP,
    TP,
    WORDS,
    chat,
    make_corpus,
    records,
    run_tiny,
    tiny_recipe,
    train_rank,
)

STEPS = 4
METRICS = ("dpo loss", "preference/margin", "preference/chosen", "preference/rejected", "grad-norm")
LN_2 = -float(torch.nn.functional.logsigmoid(torch.zeros((), dtype=torch.float64)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of text, of pictures (some of which differ between the sides) and of sound."""
    folder = make_corpus(tmp_path_factory.mktemp("corpus"))
    for kind in ("text", "image", "audio", "held_out"):
        rows = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            answer = row["messages"][-1]["content"]
            other = WORDS[(i * 5 + 1) % len(WORDS)] + " then" * (i % 3)
            if kind == "image" and i % 4 == 3:
                row |= {"rejected_messages": chat(row["messages"][0]["content"], answer)["messages"]}
                row |= {"rejected_images": rows[i - 1]["images"]}
            else:
                row["rejected_response"] = other if other != answer else "two"
        (folder / f"{kind}_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def start(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a few supervised steps."""
    run_dir = tmp_path_factory.mktemp("start")
    run_tiny(tiny_recipe(corpus, run_dir, train_iters=3), 1)
    return str(run_dir)


def recipe_of(corpus: Path, run_dir: Path, start: str, **overrides: Any) -> Recipe:
    sources = [{"name": n, "path": str(corpus / f"{n}_pairs.jsonl")} for n in ("text", "image", "audio")]
    held_out = [{"name": "held", "path": str(corpus / "held_out_pairs.jsonl"), "epochs": 1}]
    settings = {
        "task": "preference", "init_from": start, "train_iters": STEPS, "freeze": ["gate", "vision", "audio"],
        "data__sources": sources, "optim__lr": 1e-3, "optim__lr_warmup_iters": 0, "data__eval_sources": held_out,
        "log__eval_interval": STEPS, "log__eval_iters": 4, "data__seq_length": 256,
    }  # fmt: skip
    return tiny_recipe(corpus, run_dir, **(settings | overrides))


def steps(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [record for record in found if "dpo loss" in record]


@pytest.fixture(scope="module")
def alone(corpus: Path, start: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """Directory and records of one rank's run."""
    run_dir = tmp_path_factory.mktemp("alone")
    return run_dir, run_tiny(recipe_of(corpus, run_dir, start), 1)


def assert_first_step(record: dict[str, float]) -> None:
    assert record["dpo loss"] == pytest.approx(LN_2, rel=1e-15) and record["preference/margin"] == 0.0
    assert record["preference/accuracy"] == 0.0
    assert all(record[f"loss/source/{name}"] == pytest.approx(LN_2, rel=1e-15) for name in ("text", "image", "audio"))


def test_the_first_loss_is_ln_2_and_the_margin_grows(alone: tuple[Path, list[dict[str, float]]]) -> None:
    first, *_, last = steps(alone[1])
    assert_first_step(first)
    assert last["preference/margin"] > 0.01 and last["dpo loss"] < LN_2 - 0.005 and last["preference/accuracy"] > 0.6
    assert first["preference/chosen"] < 0 and {"preference/chosen/modality/audio", "preference/margin/source/text"} <= {
        *first
    }
    held_out = next(record["eval/loss/held"] for record in alone[1] if "eval/loss/held" in record)
    assert 0.5 < held_out < LN_2 - 0.001


def test_the_reference_is_what_the_weights_of_the_start_say(alone: tuple[Path, list[dict[str, float]]]) -> None:
    """The means of step 1, before any update, are those of the file's first pairs; 16 bytes a pair."""
    found = reference.read(alone[0] / "reference.npz")
    assert found is not None
    first, table, held = steps(alone[1])[0], found.tables[""], found.tables["held"]
    assert table.steps == STEPS and np.isfinite(table.values[: 8 * STEPS]).all()
    assert table.values[:8].mean(0) == pytest.approx(
        [first["preference/chosen"], first["preference/rejected"]], rel=1e-12
    )
    assert held.ended and np.isfinite(held.values[:12]).all() and table.values.itemsize * 2 == 16


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, TP, id="tp2"),
        pytest.param(2, PP | {"parallel__recompute": "full"}, id="pp2-recompute"),
        pytest.param(2, EP, id="ep2"),
        pytest.param(2, CP, id="cp2"),
        pytest.param(1, {"preference__share_prompt": False}, id="separate"),
        pytest.param(1, {"data__micro_batch_size": 1}, id="other-micro-batches"),
    ],
)
def test_layouts_agree(
    corpus: Path,
    start: str,
    tmp_path: Path,
    alone: tuple[Path, list[dict[str, float]]],
    world_size: int,
    layout: dict[str, Any],
) -> None:
    found = run_tiny(recipe_of(corpus, tmp_path, start, **layout), world_size)
    assert_first_step(steps(found)[0])
    for mine, theirs in zip(steps(found), steps(alone[1]), strict=True):
        for name in METRICS:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-6), (name, mine["step"])
    held_out = [[record["eval/loss/held"] for record in run if "eval/loss/held" in record] for run in (found, alone[1])]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)


def test_bf16_begins_at_ln_2_too(corpus: Path, start: str, tmp_path: Path) -> None:
    """From drawn weights: those of the start are fp32."""
    recipe = recipe_of(
        corpus, tmp_path, start, optim__precision="bf16", train_iters=1, log__eval_interval=0, init_from=None
    )
    assert_first_step(steps(run_tiny(recipe, 1))[0])


def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(
    corpus: Path, start: str, tmp_path: Path, alone: tuple[Path, list[dict[str, float]]]
) -> None:
    """Also where it is made longer: what the reference lacks is of the weights of the start, not of those it has now."""
    run_tiny(recipe_of(corpus, tmp_path, start, train_iters=2, optim__lr_decay_iters=20), 1)
    assert reference.read(tmp_path / "reference.npz").tables[""].steps == 2  # type: ignore[union-attr]
    found = run_tiny(recipe_of(corpus, tmp_path, start, load="auto", optim__lr_decay_iters=20), 1)
    mine, theirs = steps(found), steps(alone[1])
    assert [record["step"] for record in mine] == [1, 2, 3, 4]
    for name in METRICS:
        assert [record[name] for record in mine] == [record[name] for record in theirs], name
    one, other = (reference.read(folder / "reference.npz") for folder in (tmp_path, alone[0]))
    assert one is not None and other is not None and one.digest == other.digest
    for name, table in other.tables.items():
        np.testing.assert_array_equal(one.tables[name].values[: 8 * STEPS], table.values[: 8 * STEPS])


def test_a_held_out_set_may_join_later(corpus: Path, start: str, tmp_path: Path, alone: Any) -> None:
    """Its reference is of the weights of the start; what is trained does not depend on it."""
    run_tiny(recipe_of(corpus, tmp_path, start, train_iters=2, data__eval_sources=[], log__eval_interval=0), 1)
    found = run_tiny(recipe_of(corpus, tmp_path, start, load="auto"), 1)
    assert [[r[name] for name in METRICS] for r in steps(found)] == [[r[n] for n in METRICS] for r in steps(alone[1])]
    held_out = [[record["eval/loss/held"] for record in run if "eval/loss/held" in record] for run in (found, alone[1])]
    assert held_out[0] == held_out[1]


def test_a_run_ends_with_its_pairs(corpus: Path, start: str, tmp_path: Path) -> None:
    """Sixty pairs once, eight a step: seven steps of the twenty."""
    sources = [{"name": n, "path": str(corpus / f"{n}_pairs.jsonl"), "epochs": 1} for n in ("text", "image", "audio")]
    recipe = recipe_of(corpus, tmp_path, start, data__sources=sources, train_iters=20, log__eval_interval=0)
    assert len(steps(run_tiny(recipe, 1))) == 7
    found = reference.read(tmp_path / "reference.npz")
    assert found is not None and found.tables[""].ended and found.tables[""].steps == 7


def test_a_run_goes_on_with_other_ranks(
    corpus: Path, start: str, tmp_path: Path, alone: tuple[Path, list[dict[str, float]]]
) -> None:
    recipe = recipe_of(corpus, tmp_path, start, log__eval_interval=0)
    run_ranks(train_rank, 2, recipe, stop_after_two)
    run_tiny(recipe_of(corpus, tmp_path, start, load="auto", log__eval_interval=0), 1)
    for mine, theirs in zip(steps(records(recipe)), steps(alone[1]), strict=True):
        for name in METRICS:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-6), (name, mine["step"])


def stop_after_two(run: Run) -> None:
    """Every rank gets the signal when it has made two steps."""
    batches = run.task.batches

    def stopping(*args: Any, **options: Any) -> Any:
        if run.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(*args, **options)

    run.task.batches = stopping  # type: ignore[method-assign]


def lose(run_dir: Path) -> None:
    (run_dir / "reference.npz").unlink()


def alter(run_dir: Path) -> None:
    found = reference.read(run_dir / "reference.npz")
    assert found is not None
    found.key["weights"]["checkpoint"] = "0" * 64
    found.write(run_dir / "reference.npz")


def cut(run_dir: Path) -> None:
    content = (run_dir / "reference.npz").read_bytes()
    (run_dir / "reference.npz").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "said"),
    [(lose, "there is none"), (alter, "it is of other weights, data or tokens"), (cut, "there is none")],
)
def test_a_run_that_goes_on_needs_its_reference(
    corpus: Path, start: str, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    run_tiny(recipe_of(corpus, tmp_path, start, train_iters=1, log__eval_interval=0), 1)
    damage(tmp_path)
    with pytest.raises(RankFailure, match=rf"reference that this run began with is needed to go on, and {said}"):
        run_tiny(recipe_of(corpus, tmp_path, start, train_iters=2, load="auto", log__eval_interval=0), 1)


def test_a_run_that_is_made_longer_needs_the_weights_of_its_start(corpus: Path, start: str, tmp_path: Path) -> None:
    run_tiny(recipe_of(corpus, tmp_path / "one", start, train_iters=1, log__eval_interval=0), 1)
    longer = recipe_of(corpus, tmp_path / "one", str(tmp_path / "one"), load="auto", log__eval_interval=0)
    with pytest.raises(
        RankFailure, match=r"the reference of this run lacks, and these are not the weights that it began with"
    ):
        run_tiny(longer, 1)


def test_a_reference_of_other_weights_or_settings_is_made_again(corpus: Path, start: str, tmp_path: Path) -> None:
    """In a directory where no checkpoint was written yet."""
    recipe = recipe_of(corpus, tmp_path, start, train_iters=1, log__eval_interval=0)
    run_ranks(only_reference, 1, recipe)
    first = (tmp_path / "reference.npz").stat().st_mtime_ns
    run_ranks(only_reference, 1, recipe)
    assert (tmp_path / "reference.npz").stat().st_mtime_ns == first, "what is there is taken"
    alter(tmp_path)
    run_ranks(only_reference, 1, recipe)
    again = reference.read(tmp_path / "reference.npz")
    assert again is not None and again.key["weights"]["checkpoint"] != "0" * 64 and again.tables[""].steps == 1
    recipe.data.system_prompt = "be brief"
    run_ranks(only_reference, 1, recipe)
    other = reference.read(tmp_path / "reference.npz")
    assert other is not None and other.key["weights"] == again.key["weights"] and other.digest != again.digest


def only_reference(rank: Any, recipe: Recipe) -> None:
    from tests.distributed.tiny_run import prepare

    run = prepare(rank, recipe)
    assert reference.complete_reference(run, expected=None, stop=lambda: False, moved=lambda: None) is not None


def stop_in_the_reference(run: Run) -> None:
    """A signal comes with its second step; the file is written every step."""
    reference.STEPS_AT_ONCE = 1
    asked = iter([False, True])
    complete = reference._completed

    def stopped(*args: Any, stop: Callable[[], bool], **options: Any) -> bool:
        return complete(*args, stop=lambda: next(asked, True), **options)

    reference._completed = stopped


def test_a_stop_while_the_reference_is_computed(corpus: Path, start: str, tmp_path: Path, alone: Any) -> None:
    recipe = recipe_of(corpus, tmp_path, start)
    assert run_ranks(train_rank, 1, recipe, stop_in_the_reference) == [EXIT_REQUEUE]
    partly = reference.read(tmp_path / "reference.npz")
    assert partly is not None and partly.tables[""].steps == 2 and not (tmp_path / "checkpoints").exists()
    assert run_ranks(train_rank, 1, recipe) == [0]
    for mine, theirs in zip(steps(records(recipe)), steps(alone[1]), strict=True):
        assert [mine[name] for name in METRICS] == [theirs[name] for name in METRICS]


def test_report_names_match_the_table(corpus: Path, tmp_path: Path, start: str) -> None:
    names = PreferenceTask(recipe_of(corpus, tmp_path, start)).report_names
    assert len(names) == len(set(names)) == 5 * (1 + 4 + 3) and names[0] == "dpo loss" and math.isfinite(LN_2)
