"""A tiny trained checkpoint that draws, its codec of pictures and its corpus, which tests of several folders share."""

import json
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

from megatron_omni.config.generators import PictureCodecConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from megatron_omni.models.generators.conv_vae import ConvCodec
from megatron_omni.models.generators.vae_files import save_conv_codec
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.platform.seeds import named_generator
from megatron_omni.training.setup import Run
from tests.distributed.tiny_run import WORDS, chat, make_corpus, run_tiny, tiny_recipe
from tests.trained import Trained

IMAGE: dict[str, Any] = {
    "dit": {
        "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 24,
        "condition_size": 12, "caption_size": 10, "task_size": 6, "vision_size": 8, "kept_vision_tokens": 2, "latent_channels": 3,
    },
    "projectors": {
        "hidden_size": 16, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 24, "num_caption_rows": 3,
    },
    "sampling": {"steps": 4, "text_guidance": 2.0},
    "num_image_tokens": 4, "latent_scale": 1.0, "downsampling": 4, "base_size": 16, "size_step": 8, "max_aspect": 4.0,
}  # fmt: skip
FROZEN = (
    "vision", "audio", "projectors", "attention", "norms", "experts", "shared_experts", "gate", "embeddings", "output",
)  # fmt: skip
VOCABULARY = 328
BLOCK = 7
"""Tokens: three of the task, four of the picture."""


def make_codec(folder: Path, *, seed: int = 0) -> str:
    """A codec whose weights are all drawn; its fingerprint."""
    config = PictureCodecConfig(
        latent_channels=3, channels=[6, 8], encoder_blocks=[1, 0], decoder_blocks=[0, 1], pixel_channels=5
    )
    codec = ConvCodec(config).eval()
    codec.draw_weights(lambda name: named_generator(seed, name))
    for name, value in codec.named_parameters():
        with torch.no_grad():
            value.add_(torch.randn(value.shape, generator=named_generator(seed + 1, name)) * 0.1)
    return save_conv_codec(codec, folder)


def drawing_rows(corpus: Path) -> list[dict[str, Any]]:
    """Pictures of words, and of another picture."""
    rows = []
    for i in range(8):
        pixels = numpy.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(corpus / f"t{i}.png")
        rows.append(
            chat(f"draw {('red', 'green', 'blue')[i % 3]}", "one <generate> two")
            | {"targets": [f"t{i}.png"], "id": f"w{i}"}
        )
        source = {"images": [f"{i}.png"], "targets": [f"t{i}.png"], "task": "edit", "id": f"s{i}"}
        rows.append(chat("<image> then blue", "<generate>") | source)
    return rows


def drawing_recipe(corpus: Path, run_dir: Path, **overrides: Any) -> Recipe:
    settings: dict[str, Any] = {
        "task": "generative", "model__init_method_std": 0.25, "data__seq_length": 256, "train_iters": 2, "optim__lr": 0.05,
        "optim__lr_warmup_iters": 0, "optim__weight_decay": 0.0, "model__moe__moe_aux_loss_coeff": 0.0,
        "freeze": [*FROZEN], "model__vocab_size": VOCABULARY,
        "model__image": {**IMAGE, "vae": str(corpus / "vae")}, "generative": {"ema": 0.5},
        "data__sources": [{"name": "drawn", "path": str(corpus / "drawn.jsonl")}], "data__global_batch_size": 4,
    }  # fmt: skip
    return tiny_recipe(corpus, run_dir, **(settings | overrides))


@torch.no_grad()
def stir(run: Run) -> None:
    """Weights of what draws as if it had learned much: gates let conditions through."""
    for name, parameter in unwrap_model(run.model).named_parameters():
        if name.startswith("image."):
            noise = torch.randn(parameter.shape, generator=named_generator(5, name))
            parameter.add_(0.3 * noise)


def train_drawing(directory: Path) -> Trained:
    """A run of two steps from weights with which pictures depend on words, source and noise."""
    corpus = make_corpus(directory / "corpus")
    make_codec(corpus / "vae")
    words = [" ".join(WORDS), "draw then one two"] * 40
    train_sentencepiece(words, corpus / "tokenizer.model", vocab_size=VOCABULARY, specials=ALL_SPECIALS)
    (corpus / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawing_rows(corpus)))
    run_tiny(drawing_recipe(corpus, directory / "draws"), 1, before=stir)
    return Trained(directory / "draws", corpus)
