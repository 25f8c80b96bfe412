"""Small dense checkpoints in the Uni-MoE layout, with random weights and a tokenizer that lacks the new special tokens."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from megatron_omni.checkpoint.hf_config import qwen2_config
from megatron_omni.checkpoint.names import expand, qwen2_rows
from megatron_omni.checkpoint.uni_moe import config_to_theirs, uni_moe_rows, unused_shapes
from megatron_omni.config.data import DataConfig
from megatron_omni.config.model import ModelConfig
from megatron_omni.data.tokenizer import ALL_SPECIALS

OLD_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # fmt: skip # noqa: E501
FIRST_NEW = 256 + len(OLD_SPECIALS)
NUM_NEW = len(ALL_SPECIALS) - len(OLD_SPECIALS)
VOCABULARY = 320
WHISPER_TABLE = 11
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    mrope_section=[2, 1, 1], vocab_size=VOCABULARY, make_vocab_size_divisible_by=8, moe=None, vision=None, audio=None,
)  # fmt: skip


def write_tokenizer(directory: Path, *, swap: bool = False) -> Path:
    """Bytes and Qwen's special tokens; ``swap`` exchanges the ids of two bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if swap:
        alphabet[5], alphabet[6] = alphabet[6], alphabet[5]
    model = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_tokens([AddedToken(name, special=True, normalized=False) for name in OLD_SPECIALS])
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {}, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def dense_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    rows = qwen2_rows(model) if model.vision is None and model.audio is None else uni_moe_rows(model)
    shapes = {k: tuple(s) for entry in expand(rows) for k, s in zip(entry.theirs, entry.shapes)}
    return shapes | unused_shapes(model, whisper_vocabulary=WHISPER_TABLE)


def write_dense(
    directory: Path,
    model: ModelConfig = MODEL,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    like: Path | None = None,
    std: float = 0.2,
) -> Path:
    """A dense model; weights outside the feed-forward parts (and encoders) are those of ``like``, where given."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for key, shape in dense_shapes(model).items():
        value = torch.empty(shape).normal_(std=std, generator=generator)
        tensors[key] = (value + 1.0 if "norm" in key and key.endswith("weight") else value).to(dtype)
    if like is not None:
        trunk = {k: v for k, v in load_file(like / "model.safetensors").items() if ".mlp." not in k}
        tensors |= {k: v for k, v in trunk.items() if k.startswith(("model.", "lm_head."))}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory)
    name = str(dtype).removeprefix("torch.")
    if model.vision is None and model.audio is None:
        config: dict[str, Any] = qwen2_config(model, name)
    else:
        config = config_to_theirs(model, DataConfig(), tokens={}, dtype=name)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face directory, shards included."""
    files = sorted(directory.glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def change(directory: Path, edit: Any) -> Path:
    """Rewrite the weights of a directory after ``edit(tensors)``."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    return directory


def change_config(directory: Path, **fields: Any) -> Path:
    """Set fields of ``config.json``."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return directory


def omni(model: ModelConfig, like: ModelConfig) -> ModelConfig:
    """``model`` with the encoders of ``like``."""
    return dataclasses.replace(model, vision=like.vision, audio=like.audio)
