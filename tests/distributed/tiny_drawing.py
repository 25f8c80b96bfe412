"""A corpus of pictures to be drawn with latents and teachers, and a recipe that learns to draw them, small enough for tests."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.picture_arrays import cut_facts
from megatron_omni.data.row_files import write_rows
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from megatron_omni.platform.seeds import named_generator
from tests.distributed.test_picture_layouts import IMAGE, MODEL

WORDS = ("red", "green", "blue", "one", "two", "three")
VOCABULARY, STEPS, SIZES = 256 + 1 + len(ALL_SPECIALS) + 29, 4, ((16, 16), (8, 16))
FINGERPRINT = "f" * 64
"""Of the codec of pictures that made the latents."""
TRUNK = ["vision", "projectors", "attention", "norms", "experts", "shared_experts", "gate", "embeddings", "output"]


def drawing_corpus(folder: Path) -> Path:
    """Rows that draw from words, rows that edit, rows of text alone; two sizes. Latents and teachers are random, and lie beside."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    latents: list[Tensor] = []
    taught: dict[str, list[Tensor]] = {"task": [], "caption": [], "visual": []}
    for i in range(18):
        word, (width, height) = WORDS[i % 6], SIZES[i % 2]
        if i % 6 == 5:
            rows.append({"messages": _chat(f"say {word}", word)})
            continue
        pixels = numpy.full((height, width, 3), 40 * (i % 6), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        edits, generator = i % 3 == 1, named_generator(0, "row", i)
        named = {"target": f"latents.safetensors#{len(latents)}"}
        shape = (IMAGE.dit.latent_channels, height // IMAGE.downsampling, width // IMAGE.downsampling)
        latents += [torch.randn(*shape, generator=generator) for _ in range(1 + edits)]
        if edits:
            named["source"] = f"latents.safetensors#{len(latents) - 1}"
        teachers = {}
        for name, size in (
            ("task", (1, IMAGE.dit.task_size)),
            ("caption", (4, IMAGE.dit.caption_size)),
            ("visual", (4, IMAGE.dit.vision_size)),
        ):
            if name != "visual" or edits:
                teachers[name] = f"{name}.safetensors#{len(taught[name])}"
                taught[name].append(torch.randn(*size, generator=generator))
        row = {"messages": _chat(("<image> make it " if edits else "draw ") + word, f"{word} <generate>")}
        row |= {"targets": [f"{i}.png"], "teachers": teachers, "latents": named, "id": str(i)}
        rows.append(row | ({"images": [f"{(i + 6) % 18}.png"], "task": "edit"} if edits else {}))
    for i in {(i + 6) % 18 for i in range(18) if i % 3 == 1}:
        if not (folder / f"{i}.png").exists():
            Image.new("RGB", SIZES[i % 2]).save(folder / f"{i}.png")
    write_rows(
        folder / "latents.safetensors", latents, kind="latents", fingerprint=FINGERPRINT, about=cut_facts(_image())
    )
    for name, arrays in taught.items():
        write_rows(folder / f"{name}.safetensors", arrays, kind="teachers", fingerprint=name)
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "pictures.jsonl", [row for row in rows if "targets" in row])
    texts = [message["content"] for row in rows for message in row["messages"]]
    train_sentencepiece(texts * 8, folder / "tokenizer.model", vocab_size=VOCABULARY, specials=ALL_SPECIALS)
    return folder


def _image() -> ImageGeneratorConfig:
    return IMAGE


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def drawing_recipe(corpus: Path, run_dir: Path, *, file: str = "train.jsonl", **changes: Any) -> Recipe:
    """Of the model of test_picture_layouts.py; ``changes`` are dotted fields with ``__`` for the dot."""
    model = asdict(MODEL) | {"vocab_size": VOCABULARY}
    model["moe"] |= {"moe_aux_loss_coeff": 0.0, "moe_aux_loss_coeff_min": 0.0}
    model["vision"]["max_tiles_per_side"] = 1
    model["image"]["vae_fingerprint"] = FINGERPRINT
    values: dict[str, Any] = {
        "task": "generative", "train_iters": STEPS, "seed": 11, "run_dir": str(run_dir), "model": model, "freeze": TRUNK,
        "generative": {
            "losses": {"align_task": 0.3, "align_caption": 0.2, "align_visual": 0.1}, "drop": 0.3, "ema": 0.8,
        },
        "data": {
            "tokenizer": str(corpus / "tokenizer.model"), "seq_length": 128, "micro_batch_size": 2, "global_batch_size": 8,
            "batch_by": "mixed", "sources": [{"name": "train", "path": str(corpus / file)}],
            "eval_sources": [{"name": "held", "path": str(corpus / file)}],
        },
        "optim": {"lr": 5e-3, "lr_warmup_iters": 1, "lr_decay_iters": 20, "precision": "fp32", "weight_decay": 0.0},
        "checkpoint": {"save_interval": 1, "keep": 0},
        "log": {"interval": 1, "tensorboard": False, "expert_load": False, "eval_interval": 2, "eval_iters": 1},
    }  # fmt: skip
    for field, value in changes.items():
        *path, last = field.split("__")
        group = values
        for key in path:
            group = group.setdefault(key, {})
        group[last] = value
    return recipe_from_dict(values)
