"""A whole run in miniature for the training tests: a corpus of text, pictures and sound, and a recipe of two MoE
blocks.

Everything is drawn from fixed seeds; a step has micro-batches with pictures only, sound only or text only by chance
of the mixture.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import soundfile
from PIL import Image

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.data.tokenizer import train_sentencepiece
from megatron_omni.tasks.choice import task_of
from megatron_omni.training.loop import train
from megatron_omni.training.setup import Run, setup
from tests.distributed.harness import Rank, run_ranks

ROWS = 24
WORDS = ("red", "green", "blue", "low", "high", "one", "two", "three", "four", "five", "and", "then")


def make_corpus(directory: Path) -> Path:
    """Three sources of ``ROWS`` records and a held-out one, their media, and a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    pick, noise = random.Random(0), numpy.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"text": [], "image": [], "audio": []}
    for i in range(ROWS):
        words = " ".join(pick.choices(WORDS, k=pick.randint(2, 9)))
        rows["text"].append(chat(f"repeat {words}", words))
        colour = i % 3
        pixels = noise.integers(0, 60, (16, 16, 3), dtype=numpy.uint8)
        pixels[..., colour] += 180
        Image.fromarray(pixels).save(directory / f"{i}.png")
        rows["image"].append(chat("<image> which colour", WORDS[colour]) | {"images": [f"{i}.png"]})
        tone = numpy.sin(numpy.arange(16_000) * (0.05 if i % 2 else 0.5)) * 0.3 + noise.normal(0, 0.01, 16_000)
        soundfile.write(directory / f"{i}.wav", tone.astype(numpy.float32), 16_000)
        rows["audio"].append(chat("<audio> how high", "low" if i % 2 else "high") | {"audios": [f"{i}.wav"]})
    rows["held_out"] = [rows[kind].pop() for kind in ("text", "image", "audio") for _ in range(4)]
    for name, records in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [message["content"] for records in rows.values() for record in records for message in record["messages"]]
    train_sentencepiece(lines * 4, directory / "tokenizer.model", vocab_size=300)
    return directory


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# Overrides of tiny_recipe: layouts, and both overlaps with several gradient buckets.
TP, PP = {"parallel__tensor_model_parallel_size": 2}, {"parallel__pipeline_model_parallel_size": 2}
CP = {"parallel__context_parallel_size": 2}
EP = {"parallel__expert_model_parallel_size": 2}
OVERLAP = {
    "parallel__overlap_grad_reduce": True,
    "parallel__overlap_param_gather": True,
    "parallel__bucket_size": 3_000,
}


@cache
def tiny_values() -> dict[str, Any]:
    tower = {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
    return {
        "train_iters": 20,
        "seed": 11,
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "mrope_section": [2, 1, 1],
            "vocab_size": 300,
            "make_vocab_size_divisible_by": 8,
            "moe": {"moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 16},
            "vision": {
                **tower,
                "image_size": 16,
                "patch_size": 8,
                "num_layers": 1,
                "pooled_side": 2,
                "max_tiles_per_side": 2,
            },
            "audio": {
                **tower,
                "num_mel_bins": 16,
                "chunk_seconds": 1.5,
                "num_encoder_layers": 1,
                "num_decoder_layers": 1,
                "num_query_tokens": 10,
                "max_target_positions": 16,
            },
        },
        "data": {"seq_length": 128, "micro_batch_size": 2, "global_batch_size": 8, "batch_by": "mixed"},
        "optim": {"lr": 2e-3, "lr_warmup_iters": 2, "lr_decay_iters": 20, "precision": "fp32", "weight_decay": 0.01},
        "checkpoint": {"save_interval": 0},
        "log": {"interval": 1, "tensorboard": False, "expert_load": False},
    }


def tiny_recipe(corpus: Path, run_dir: Path, **overrides: Any) -> Recipe:
    """The tiny recipe on ``corpus``; ``overrides`` are dotted names with ``__`` for the dot."""
    sources = [{"name": name, "path": str(corpus / f"{name}.jsonl")} for name in ("text", "image", "audio")]
    values = json.loads(json.dumps(tiny_values()))
    values["run_dir"] = str(run_dir)
    values["data"] |= {"sources": sources, "tokenizer": str(corpus / "tokenizer.model")}
    for name, value in overrides.items():
        *path, last = name.split("__")
        group = values
        for key in path:
            group = group.setdefault(key, {})
        group[last] = value
    return recipe_from_dict(values)


def prepare(rank: Rank, recipe: Recipe) -> Run:
    """The run of ``recipe`` on this rank."""
    pg = rank.initialize(recipe.parallel)
    return setup(recipe, task_of(recipe), pg=pg)


def train_rank(rank: Rank, recipe: Recipe, before: Callable[[Run], None] | None = None) -> int:
    """Body of one rank: set up, ``before`` (faults to inject), train; the exit status."""
    run = prepare(rank, recipe)
    if before is not None:
        before(run)
    return train(run)


def run_tiny(recipe: Recipe, world_size: int, before: Callable[[Run], None] | None = None) -> list[dict[str, float]]:
    """Train on ``world_size`` ranks; the records of ``metrics.jsonl``."""
    statuses = run_ranks(train_rank, world_size, recipe, before)
    assert len(set(statuses)) == 1, f"ranks disagree about the exit status: {statuses}"
    return records(recipe)


def records(recipe: Recipe) -> list[dict[str, float]]:
    """The records of a run."""
    return [json.loads(line) for line in (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()]
