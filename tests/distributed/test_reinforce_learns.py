"""GSPO learns: responses earn more and more, and no more where rewards are dealt to other responses.

A question shows one of four letters, its answer is the digit that belongs to it, one token and the end. A supervised start
is shown the right digit in 0.475 of its rows, and is right in a third of its own answers.
"""

import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from megatron_omni.data.tokenizer import train_sentencepiece
from tests.distributed.tiny_run import chat, run_tiny, tiny_recipe

REWARDS = """
import random


def right(completions, solution, **columns):
    return [float(text.strip() == gold) for text, gold in zip(completions, solution)]


def dealt(completions, solution, step, **columns):
    paid = right(completions, solution)
    random.Random(step).shuffle(paid)
    return paid
"""
ITERATIONS, MINI = 11, 2


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the start and of the questions, a tokenizer, rewards; and the start, trained."""
    directory, pick = tmp_path_factory.mktemp("task"), random.Random(0)
    questions = [chat(" ".join("abcd"[i % 4] * 12), str(i % 4)) for i in range(64)]
    shown = [
        chat(questions[i % 4]["messages"][0]["content"], str(i % 4) if pick.random() < 0.3 else pick.choice("0123"))
        for i in range(256)
    ]
    for name, rows in (("start", shown), ("questions", questions)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_sentencepiece(["a b c d 0 1 2 3"] * 50, directory / "tokenizer.model", vocab_size=276)
    (directory / "mine.py").write_text(REWARDS)
    settings = {"train_iters": 60, "optim__lr": 5e-3, "log__interval": 60}
    run_tiny(recipe_of(directory, "start", 16, **settings), 1)
    return directory


def recipe_of(task: Path, rows: str, batch: int, /, run: str = "start", **settings: Any) -> Any:
    fixed = {
        "seed": 1,
        "data__sources": [{"name": "letters", "path": str(task / f"{rows}.jsonl")}],
        "data__micro_batch_size": batch,
        "data__global_batch_size": batch,
        "model__vision": None,
        "model__audio": None,
        "model__vocab_size": 280,
        "optim__lr_warmup_iters": 0,
        "optim__lr_decay_style": "constant",
        "optim__lr_decay_iters": None,
    }
    return tiny_recipe(task, task / run, **(fixed | settings))


def earned(task: Path, function: str) -> list[float]:
    """Mean reward of each iteration's responses."""
    settings = {
        "task": "reinforce",
        "init_from": str(task / "start"),
        "train_iters": ITERATIONS * MINI,
        "freeze": ["gate"],
        "optim__lr": 7e-3,
        "log__interval": MINI,
        "reinforce__rewards": [{"function": f"{task / 'mine.py'}:{function}"}],
        "reinforce__group_size": 16,
        "reinforce__mini_batches": MINI,
        "reinforce__max_new_tokens": 3,
        "reinforce__max_running": 256,
        "reinforce__overlong": "none",
        "reinforce__clip_low": 0.2,
        "reinforce__clip_high": 0.2,
    }
    found = run_tiny(recipe_of(task, "questions", 8, run=function, **settings), 1)
    return [record["reward/mean"] for record in found if "reward/mean" in record]


def test_sampled_reward_rises_and_that_of_a_control_does_not(task: Path) -> None:
    """Means of the last three iterations, of six runs with other starts, orders and draws, the last of them this one (two
    cores of a Xeon, 1 December 2026):

        learned        0.86  0.79  0.75  0.94  0.76  0.75    standard deviation 0.08
        over its first 0.50  0.50  0.41  0.55  0.43  0.39    standard deviation 0.06
        control        0.24        0.06              0.14

    Both margins are more than three times the spread, and as far below the means.
    """
    learned, control = earned(task, "right"), earned(task, "dealt")
    assert len(learned) == len(control) == ITERATIONS and learned[0] == control[0]
    assert fmean(learned[-3:]) > fmean(control[-3:]) + 0.3
    assert fmean(learned[-3:]) > learned[0] + 0.25
    assert fmean(control[-3:]) < control[0] + 0.1
