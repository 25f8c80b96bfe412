"""A codec on disk: a folder with ``codec.json`` and ``codec.safetensors``.

    codec.json          {"format": 1, "fingerprint": "...", "config": {sample_rate: 24000, ...}, "about": {...}}
    codec.safetensors   weights by our names, in fp32 or fp16 (the window always in fp32)

The fingerprint is of the weights as they are read back (fp16 widened), so it says the same on every machine, and a damaged or
edited folder is refused. ``about`` is free: where the weights come from, recipe, licence.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from megatron_omni.config.generators import CodecConfig
from megatron_omni.config.ranges import out_of_range
from megatron_omni.foreign import read_json
from megatron_omni.models.nothing_drawn import NothingDrawn

if TYPE_CHECKING:
    from megatron_omni.models.generators.codec import Codec

CONFIG_FILE, WEIGHTS_FILE = "codec.json", "codec.safetensors"
FORMAT = 1
ONLY_IN_TRAINING = frozenset({"codebook.embed_avg", "codebook.cluster_size", "codebook.inited"})


IDLE = {"seanet": {"dropout", "num_mel_bins", "encoder_hidden_size"}, "mel": {"dropout", "num_filters"}}
WINDOW = "decoder.window"


def weights_fingerprint(config: CodecConfig, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of what decides codes and sound: sizes that are not the released ones, then every weight in fp32 by name.

    The running means of the codebook and ``dropout``, which only training reads, are left out, as are sizes of the other
    encoder.
    """
    released, idle = vars(CodecConfig()), IDLE[config.encoder]
    sizes = {name: value for name, value in vars(config).items() if value != released[name] and name not in idle}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        if name not in ONLY_IN_TRAINING:
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def save_codec(
    codec: "Codec", folder: Path, *, dtype: torch.dtype = torch.float32, about: Mapping[str, Any] | None = None
) -> str:
    """Write ``folder``, made where it is not there; the fingerprint of what it holds.

    In ``torch.float16`` weights are rounded, and the fingerprint is of the rounded ones. ValueError for a codebook that
    has not started, or weights that are not finite in ``dtype``.
    """
    if not codec.codebook.is_started:
        raise ValueError(f"{folder}: this codec has no codebook yet (it starts during training); nothing was written")
    kept = {name: value.detach().cpu().to(dtype).contiguous() for name, value in codec.state_dict().items()}
    kept[WINDOW] = codec.decoder.window.detach().cpu()
    if lost := [name for name, value in kept.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"{folder}: {lost[0]} has values that are not finite in {dtype}; nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT,
        "fingerprint": weights_fingerprint(codec.config, kept),
        "config": dataclasses.asdict(codec.config),
        "about": dict(about or {}),
    }
    _replace(folder / WEIGHTS_FILE, lambda path: path.write_bytes(save(kept)))
    _replace(
        folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    )
    return str(document["fingerprint"])


def load_codec(folder: Path | str) -> "Codec":
    """The codec in ``folder``, in fp32 on the CPU, for inference. ValueError that names what is missing or damaged."""
    from megatron_omni.models.generators.codec import Codec

    folder = Path(folder)
    document = codec_document(folder)
    with NothingDrawn():
        codec = Codec(codec_config(document["config"], folder / CONFIG_FILE))
    weights = folder / WEIGHTS_FILE
    try:
        found = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights}: cannot be read ({error}); copy the codec's folder again") from error
    _check_tensors(found, codec.state_dict(), weights)
    codec.load_state_dict({name: value.float() for name, value in found.items()})
    if (actual := codec.fingerprint) != document["fingerprint"]:
        raise ValueError(
            f"{folder}: fingerprint {actual[:12]} of the weights is not the {document['fingerprint'][:12]} that "
            f"{CONFIG_FILE} names: one of the two files is damaged or of another codec; copy the folder again"
        )
    return codec.eval()


def codec_document(folder: Path) -> dict[str, Any]:
    """``codec.json`` of ``folder``, without reading weights: its fingerprint and configuration. ValueError for none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder}: no codec here ({CONFIG_FILE} is missing); the released one becomes such a folder by "
            "megatron-omni convert codec"
        )
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a table with format {FORMAT}; written by another version, or no codec")
    if not isinstance(document.get("fingerprint"), str) or not isinstance(document.get("config"), dict):
        raise ValueError(f"{path}: expected fingerprint and config")
    return document


def codec_config(values: Mapping[str, Any], path: Path) -> CodecConfig:
    """``values`` of ``path`` as a configuration; ValueError for fields, types and numbers that it does not have."""
    fields = get_type_hints(CodecConfig)
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{path}: config.{unknown[0]}: no such field; written by a newer version")
    for name, value in values.items():
        kinds: dict[Any, type | tuple[type, ...]] = {int: int, float: (int, float), list[int]: list}
        kind = kinds.get(fields[name], str)
        items = value if isinstance(value, list) and kind is list else [value]
        right = isinstance(value, kind) and not any(isinstance(item, bool) for item in items)
        if not right or (kind is list and not all(isinstance(item, int) for item in items)):
            raise ValueError(f"{path}: config.{name}={value!r}: expected {fields[name]}")
    config = CodecConfig(**values)
    if config.encoder not in ("seanet", "mel"):
        raise ValueError(f"{path}: config.encoder={config.encoder!r}: expected seanet or mel")
    if problems := list(out_of_range(config)):
        raise ValueError(f"{path}: config.{problems[0]}")
    return config


def _check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    for name in sorted(set(found) ^ set(wanted)):
        state = "is missing" if name in wanted else "has no place in this codec"
        raise ValueError(f"{path}: {name} {state}; copy the codec's folder again")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise ValueError(f"{path}: {name}: expected {list(wanted[name].shape)}, found {list(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} has values that are not finite; copy the codec's folder again")


def _replace(path: Path, write: Any) -> None:
    """Whole or not at all: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
