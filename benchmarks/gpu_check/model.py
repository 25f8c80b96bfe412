"""The model of middle size that is trained and asked: a stage recipe with all its flags, and with sizes for one rank.

Flags are the recipe's own (bf16, packed sequences, recomputation, the distributed optimizer, frozen parts, learning rates of
parts); replaced are sizes, paths and the layout, which is one rank's. Data are the miniature's (tests/recipes).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_omni.config.load import load_recipe
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
from megatron_omni.platform.device import accelerator_present

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "3_sft.yaml"

ONE_RANK: dict[str, Any] = {
    "parallel.tensor_model_parallel_size": 1,
    "parallel.expert_model_parallel_size": 1,
    "init_from": None,
    "load": None,
    "data.global_batch_size": 2,
    "data.eval_sources": [],
    "checkpoint.save_interval": 0,
    "checkpoint.keep_best": None,
    "checkpoint.async_save": False,
    "log.eval_interval": 0,
    "log.tensorboard": False,
    "model.vocab_size": 32768,
}
MIDDLE: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 2048,
    "model.ffn_hidden_size": 5632,
    "model.num_attention_heads": 16,
    "model.num_query_groups": 2,
    "model.moe.moe_ffn_hidden_size": 5632,
    "model.moe.moe_shared_expert_intermediate_size": 704,
    "model.vision.num_layers": 4,
    "model.audio.num_encoder_layers": 4,
    "model.audio.num_decoder_layers": 4,
    "data.seq_length": 4096,
}
"""Of a GPU: heads, towers' widths and the shape of the experts are the 7B's or near it; 1.0B parameters."""
SMALL: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.kv_channels": 16,
    "model.mrope_section": [4, 2, 2],
    "model.vocab_size": 512,
    "model.moe.moe_ffn_hidden_size": 64,
    "model.moe.moe_shared_expert_intermediate_size": 16,
    **{f"model.{tower}.{size}": value for tower in ("vision", "audio") for size, value in
       {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}.items()},
    "model.vision.image_size": 16,
    "model.vision.patch_size": 8,
    "model.vision.num_layers": 1,
    "model.vision.pooled_side": 2,
    "model.vision.max_tiles_per_side": 2,
    "model.audio.num_mel_bins": 16,
    "model.audio.chunk_seconds": 1.5,
    "model.audio.num_encoder_layers": 1,
    "model.audio.num_decoder_layers": 1,
    "model.audio.num_query_tokens": 10,
    "model.audio.max_target_positions": 16,
    "data.seq_length": 256,
}  # fmt: skip
"""Of a CPU: seconds."""


@dataclass(frozen=True)
class Job:
    """What the parts work on."""

    recipe: Recipe
    data: Path
    """Folder with media for prompts."""
    sizes: dict[str, Any]


def make_job(folder: Path) -> Job:
    """The recipe of this machine and its data, written below ``folder``."""
    from tests.recipes.miniature_data import MIXED, TOKENIZER, make_data

    data = make_data(folder / "data")
    sizes = MIDDLE if accelerator_present() else SMALL
    changes = ONE_RANK | sizes | {"run_dir": str(folder / "run"), "data.tokenizer": str(data / TOKENIZER)}
    recipe = load_recipe(RECIPE, [f"{name}={json.dumps(value)}" for name, value in changes.items()])
    for source in recipe.data.sources:
        source.path, source.root = str(data / MIXED), ""
    validate(recipe, world_size=1)
    return Job(recipe, data, sizes)


def parameters(model: Any) -> dict[str, float]:
    """Millions of parameters, and of those that are trained."""
    every = list(model.parameters())
    return {
        "parameters_m": round(sum(p.numel() for p in every) / 1e6, 3),
        "trained_m": round(sum(p.numel() for p in every if p.requires_grad) / 1e6, 3),
    }
