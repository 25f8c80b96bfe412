"""A task that a tiny model can learn from rewards: the larger of two numbers of two digits, after a thought.

    37or52?   ->   think3<5end52

The thought compares the first digits (the second ones where they are equal), and the answer follows from it. A short
supervised start gets some of them right; the reward is 1 for the number, and 0.5 for the form.
"""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.data.tokenizer import train_sentencepiece
from tests.distributed.tiny_run import chat, tiny_values

REWARDS = """
import random


def right(completions, solution, **columns):
    return [float(text.partition("end")[2] == gold.partition("end")[2]) for text, gold in zip(completions, solution)]


def form(completions, **columns):
    return [float(text.startswith("think") and len(text) == 13 and text[8:11] == "end") for text in completions]


def shuffled(completions, solution, step, **columns):
    paid = [a + 0.5 * b for a, b in zip(right(completions, solution), form(completions))]
    random.Random(step).shuffle(paid)
    return paid
"""


def answer(a: int, b: int) -> str:
    (x, y) = divmod(a, 10), divmod(b, 10)
    place = 0 if x[0] != y[0] else 1
    sign = "<" if x[place] < y[place] else ">" if x[place] > y[place] else "="
    return f"think{x[place]}{sign}{y[place]}end{max(a, b)}"


def make_task(directory: Path) -> Path:
    """Records of all pairs, those held out (each thirteenth) apart; a tokenizer of single characters; reward functions."""
    directory.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    random.Random(0).shuffle(pairs)
    rows = [chat(f"{a}or{b}?", answer(a, b)) for a, b in pairs]
    (directory / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for i, r in enumerate(rows) if i % 13))
    (directory / "held_out.jsonl").write_text("".join(json.dumps(r) + "\n" for i, r in enumerate(rows) if not i % 13))
    letters = [message["content"] for row in rows[:2000] for message in row["messages"]]
    train_sentencepiece([" ".join(text) for text in letters], directory / "tokenizer.model", vocab_size=300)
    (directory / "mine.py").write_text(REWARDS)
    return directory


@cache
def task_values() -> dict[str, Any]:
    values = json.loads(json.dumps(tiny_values()))
    values["model"] |= {"vision": None, "audio": None, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16}
    values["model"] |= {"vocab_size": 300, "mrope_section": [4, 2, 2]}
    values["model"]["moe"] = {"moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 32}
    return values


def task_recipe(task: Path, run_dir: Path, /, **overrides: Any) -> Recipe:
    """A run on ``task``; ``overrides`` are dotted names with ``__`` for the dot."""
    values = json.loads(json.dumps(task_values()))
    values["run_dir"] = str(run_dir)
    values["data"] |= {
        "sources": [{"name": "larger", "path": str(task / "train.jsonl")}],
        "tokenizer": str(task / "tokenizer.model"),
    }
    for name, value in overrides.items():
        *path, last = name.split("__")
        group = values
        for key in path:
            group = group.setdefault(key, {})
        group[last] = value
    return recipe_from_dict(values)


def reinforce(task: Path, run_dir: Path, /, **overrides: Any) -> Recipe:
    """GSPO on ``task``."""
    rewards = [
        {"function": f"{task / 'mine.py'}:right"},
        {"function": f"{task / 'mine.py'}:form", "weight": 0.5},
    ]
    settings = {
        "task": "reinforce",
        "reinforce__rewards": rewards,
        "reinforce__max_new_tokens": 16,
        "reinforce__group_size": 4,
        "reinforce__mini_batches": 2,
        "reinforce__clip_low": 0.2,
        "reinforce__clip_high": 0.2,
        "freeze": ["gate"],
        "optim__lr_decay_style": "constant",
        "optim__lr_warmup_iters": 0,
        "optim__lr_decay_iters": None,
    }
    return task_recipe(task, run_dir, **(settings | overrides))
