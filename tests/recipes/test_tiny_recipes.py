"""Every stage of the tiny chain trains a few steps from what the stage before it made, the upcycling included, over a small
corpus of the quickstart's kind; and the command that runs a chain stops, goes on and passes over what is finished.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # examples/ is not installed

from examples.quickstart import compose  # noqa: E402
from examples.quickstart.spoken import compose_spoken  # noqa: E402
from examples.quickstart.tokenizer import train_tokenizer  # noqa: E402
from examples.reason import corpus as questions  # noqa: E402
from megatron_omni.chain import Chain, load_chain, recipe_with_rows, run_pairs, run_upcycle  # noqa: E402
from megatron_omni.config.load import load_recipe  # noqa: E402
from megatron_omni.config.run import Recipe  # noqa: E402
from megatron_omni.config.validate import validate  # noqa: E402
from megatron_omni.data.tokenizer import IM_END, load_tokenizer  # noqa: E402
from megatron_omni.evaluation.stages import held_out_losses, read_records  # noqa: E402
from megatron_omni.rewards.rollouts import iterations, read_rollouts, write_rollouts  # noqa: E402
from tests.distributed.tiny_run import run_ranks, train_rank  # noqa: E402
from tests.recipes.rehearsal import make_start  # noqa: E402

CHAIN = ROOT / "recipes" / "tiny" / "chain.yaml"
SIZES = {"image": 24, "word": 16, "sound": 16, "video": 6, "text": 24}
SHORT = ("train_iters=2", "optim.lr_warmup_iters=0", "log.eval_iters=1", "log.interval=1", "data.global_batch_size=3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make quickstart`` leaves in runs/quickstart, small."""
    out = tmp_path_factory.mktemp("quickstart")
    compose.compose(out / "data", seed=3, sizes=SIZES, eval_size=4)
    compose_spoken(out / "data", seed=3, size=24, eval_size=4)
    text = (out / "data" / "tokenizer_corpus.txt").read_text(encoding="utf-8")
    train_tokenizer(text, out / "tokenizer.model")
    return out


def on(corpus: Path, recipe: Recipe) -> Recipe:
    """The recipe with its data from ``corpus``."""

    def moved(path: str) -> str:
        return path.replace("runs/quickstart", str(corpus))

    recipe.data.tokenizer = moved(recipe.data.tokenizer)
    for source in [*recipe.data.sources, *recipe.data.eval_sources]:
        source.path = moved(source.path)
    return recipe


def test_every_stage_trains_from_the_stage_before_it(corpus: Path, tmp_path: Path) -> None:
    chain = load_chain(CHAIN, [f"run_dir={tmp_path}", *SHORT], nproc_per_node=1)
    for stage in chain.stages:
        if stage.recipe is None:
            run_upcycle(chain, stage)
        else:
            recipe = on(corpus, stage.recipe)
            recipe.init_from = next((str(path) for path in chain.inputs(stage).values()), None)
            validate(recipe)
            assert run_ranks(train_rank, 1, recipe) == [0]
            assert set(held_out_losses(stage.run_dir)) == {"text", "image", "video", "word", "sound", "say"}
        assert stage.is_done
    last = read_records(chain.stages[-1].run_dir)
    assert {"moe/null_share", "moe/k/layer_2/0", "moe/load/layer_0/image/expert_3"} <= set(last[0])


def test_the_tiny_preference_recipe_learns_from_pairs(corpus: Path, tmp_path: Path) -> None:
    """On pairs made of the quickstart's rows: another row's answer is the one that was rejected."""
    short = [f"run_dir={tmp_path / 'dpo'}", *SHORT[:2], "log.interval=1", "data.global_batch_size=8"]
    recipe = on(corpus, load_recipe(CHAIN.parent / "7_dpo.yaml", short))
    for source, kind in zip(recipe.data.sources, ("image", "word", "video"), strict=True):
        lines = (corpus / "data" / "train" / f"{kind}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        answers = sorted({row["messages"][-1]["content"] for row in rows})
        for row in rows:
            row["rejected_response"] = next(a for a in answers if a != row["messages"][-1]["content"])
        source.path, source.root = str(tmp_path / f"{kind}.jsonl"), str(corpus / "data" / "train")
        Path(source.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.init_from = str(tmp_path / "start")
    start = dataclasses.replace(recipe, task="supervised", run_dir=recipe.init_from, init_from=None)
    run_ranks(make_start, 1, start)
    validate(recipe)
    assert run_ranks(train_rank, 1, recipe) == [0]
    first, second = (record for record in read_records(Path(recipe.run_dir)) if "dpo loss" in record)
    assert first["dpo loss"] == pytest.approx(math.log(2), rel=1e-12) and second["preference/margin"] > 0


def test_the_stages_of_thinking_train_from_each_other(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From drawn weights, which are never right: what they answered is written anew before pairs are made of it."""
    monkeypatch.chdir(ROOT)  # a reward is examples/reason/rewards.py
    questions.compose(corpus / "reason", sizes={"demonstrations": 2, "prompts": 8})
    chain = load_chain(
        CHAIN.with_name("chain_thinking.yaml"),
        [f"run_dir={tmp_path}", *SHORT, "data.global_batch_size=4", "data.micro_batch_size=4"],
        nproc_per_node=1,
    )
    for stage in chain.stages:
        for source in stage.recipe.data.sources if stage.recipe is not None else ():
            source.path = source.path.replace("runs/reason/data", str(corpus / "reason"))
        if stage.recipe is not None:
            on(corpus, stage.recipe)
    for stage in chain.stages:
        if stage.pairs is not None:
            answer_by_hand(chain.recipe_of(stage.pairs.rollouts))
            assert run_pairs(chain, stage)["by_kind"].keys() == {"inconsistent", "wrong"}
        else:
            recipe = recipe_with_rows(chain, stage)
            recipe.init_from = next((str(path) for path in chain.inputs(stage).values()), None)
            if stage is chain.stages[0]:
                recipe.init_from, recipe.freeze = None, []
            validate(recipe)
            assert run_ranks(train_rank, 1, recipe) == [0]
        assert stage.is_done
    assert read_records(chain.stage("7_dpo").run_dir)[0]["dpo loss"] == pytest.approx(math.log(2), abs=1e-6)


def answer_by_hand(recipe: Recipe) -> None:
    """Rollouts of a stage with answers that are right, contradict their thought, or are wrong."""
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    for number in iterations(recipe.run_dir):
        rollouts = []
        for one in read_rollouts(recipe.run_dir, number):
            end, answer = [(one.solution,) * 2, ("9", one.solution), ("9", "9")][one.g % 3]
            text = f"<think>so {end}</think>{answer}"
            ids = [*tokenizer.encode(text), tokenizer.special(IM_END)]
            rewards = {"right": float(answer == one.solution), "think_format": 1.0}
            told: dict[str, Any] = {
                "text": text,
                "token_ids": ids,
                "tokens": len(ids),
                "finish": "stop",
                "rewards": rewards,
            }
            rollouts.append(replace(one, **told))
        write_rollouts(recipe.run_dir, rollouts, iteration=number, rank=0, ranks=1)


def test_the_quickstart_recipes_name_what_the_chain_reads() -> None:
    """The chain's sources are the quickstart's files, so that ``make quickstart`` prepares its data."""
    quickstart = {s.path for s in load_recipe(ROOT / "recipes" / "tiny" / "quickstart.yaml").data.sources}
    quickstart.add("runs/quickstart/data/train/say.jsonl")  # spoken answers, which need no index
    for stage in load_chain(CHAIN).stages:
        if stage.recipe is not None:
            assert {source.path for source in stage.recipe.data.sources} <= quickstart
            assert stage.recipe.data.tokenizer == "runs/quickstart/tokenizer.model"


def two_stages(corpus: Path, tmp_path: Path) -> Path:
    """A chain of two text stages that take a while."""
    source = [{"name": "text", "path": str(corpus / "data" / "train" / "text.jsonl")}]
    recipe = {
        "extends": str(CHAIN.parent / "0_base.yaml"),
        "model": {"vision": None, "audio": None, "num_layers": 1},
        "data": {"sources": source, "eval_sources": [], "tokenizer": str(corpus / "tokenizer.model")},
        "checkpoint": {"save_interval": 0, "keep_best": None},
        "log": {"interval": 1, "eval_interval": 0},
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(recipe))
    stages: list[dict[str, Any]] = [
        {"name": "first", "recipe": "stage.yaml", "overrides": ["train_iters=100000"]},
        {"name": "second", "recipe": "stage.yaml", "init_from": "first", "overrides": ["train_iters=2"]},
    ]
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "stages": stages}))
    return file


def wait_for(what: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.2)


def test_the_command_stops_on_a_signal_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    file = two_stages(corpus, tmp_path)
    command = [sys.executable, "-m", "megatron_omni.cli.chain", str(file), "optim.lr_warmup_iters=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = tmp_path / "run" / "first"
    with (tmp_path / "early").open("w") as log:  # while the first stage starts up: nothing to save
        started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        wait_for(lambda: "\n$ " in (tmp_path / "early").read_text() or started.poll() is not None, 300)
        started.send_signal(signal.SIGTERM)
        assert started.wait(300) == 75, (tmp_path / "early").read_text()
    assert "start the chain again" in (tmp_path / "early").read_text() and not (first / "checkpoints").exists()
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        wait_for(lambda: len(read_records(first)) > 2 or started.poll() is not None, 600)
        started.send_signal(signal.SIGUSR1)
        assert started.wait(300) == 75, (tmp_path / "log").read_text()
    chain: Chain = load_chain(file, ["optim.lr_warmup_iters=0"])
    stopped = chain.stages[0].steps_done
    assert stopped is not None and 2 < stopped < 100_000 and not (tmp_path / "run" / "second").exists()

    # The goal of the first stage moves to two steps after where it was stopped.
    file.write_text(file.read_text().replace("train_iters=100000", f"train_iters={stopped + 2}"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [int(record["step"]) for record in read_records(first) if "lm loss" in record]
    assert steps == list(range(1, stopped + 3)), "every step once: the run was resumed, not started again"
    second = load_recipe(tmp_path / "run" / "second" / "resolved.yaml")
    assert second.init_from == str(first / "checkpoints" / f"iter_{stopped + 2:07d}")
    assert "first: " in done.stdout and f"at step {stopped} of {stopped + 2}" in done.stdout

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "all 2 stages are finished" in again.stdout and "==" not in again.stdout
