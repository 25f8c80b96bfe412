"""Folders of codecs, of sound (codec_files.py) and of pictures (vae_files.py): a JSON document beside the weights.

    NAME.json           {"format": 1, "fingerprint": "...", "config": {field: value, ...}, "about": {...}}
    NAME.safetensors    weights by our names, in fp32 or fp16

The fingerprint is of the weights as they are read back (fp16 widened), so it says the same on every machine, and a damaged or
edited folder is refused. ``about`` is free: where the weights come from, recipe, licence.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from megatron_omni.config.ranges import out_of_range
from megatron_omni.foreign import read_json

FORMAT = 1
_KINDS: dict[Any, type | tuple[type, ...]] = {int: int, float: (int, float), list[int]: list}


def fingerprint_of(sizes: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of ``sizes`` as JSON, then of every weight in fp32 by name."""
    digest = hashlib.sha256(json.dumps(dict(sizes), sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def write_folder(
    weights_file: Path,
    config_file: Path,
    weights: Mapping[str, Tensor],
    *,
    fingerprint: str,
    config: Any,
    about: Mapping[str, Any] | None,
) -> None:
    """Write both files, the document last; their folder is made where it is not there. ``config`` is a dataclass.

    ValueError for weights that are not finite: nothing is written.
    """
    if lost := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
        dtype = weights[lost[0]].dtype
        raise ValueError(
            f"{weights_file.parent}: {lost[0]} has values that are not finite in {dtype}; nothing was written"
        )
    weights_file.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "config": dataclasses.asdict(config),
        "about": dict(about or {}),
    }
    text = json.dumps(document, indent=1) + "\n"
    _replace(weights_file, lambda path: path.write_bytes(save(dict(weights))))
    _replace(config_file, lambda path: path.write_text(text, encoding="utf-8"))


def read_document(path: Path) -> dict[str, Any]:
    """The JSON document ``path``, without reading weights; ValueError for what is none."""
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a table with format {FORMAT}; written by another version, or no codec")
    if not isinstance(document.get("fingerprint"), str) or not isinstance(document.get("config"), dict):
        raise ValueError(f"{path}: expected fingerprint and config")
    return cast(dict[str, Any], document)


def read_config[C](kind: type[C], values: Mapping[str, Any], path: Path) -> C:
    """``values`` of ``path`` as a dataclass ``kind``; ValueError for fields, types and numbers that it does not have.

    A field that is no number and no list of numbers must be a text.
    """
    fields = get_type_hints(kind)
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{path}: config.{unknown[0]}: no such field; written by a newer version")
    for name, value in values.items():
        expected = _KINDS.get(fields[name], str)
        items = value if isinstance(value, list) and expected is list else [value]
        right = isinstance(value, expected) and not any(isinstance(item, bool) for item in items)
        if not right or (expected is list and not all(isinstance(item, int) for item in items)):
            raise ValueError(f"{path}: config.{name}={value!r}: expected {fields[name]}")
    config = kind(**values)
    if problems := list(out_of_range(config)):
        raise ValueError(f"{path}: config.{problems[0]}")
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; ValueError for one that cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy the codec's folder again") from error


def load_weights(module: nn.Module, found: Mapping[str, Tensor], path: Path) -> None:
    """Fill ``module`` with ``found`` of ``path``, widened to fp32; ValueError for names, shapes or values that do not fit."""
    wanted = module.state_dict()
    for name in sorted(set(found) ^ set(wanted)):
        state = "is missing" if name in wanted else "has no place in this codec"
        raise ValueError(f"{path}: {name} {state}; copy the codec's folder again")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise ValueError(f"{path}: {name}: expected {list(wanted[name].shape)}, found {list(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} has values that are not finite; copy the codec's folder again")
    module.load_state_dict({name: value.float() for name, value in found.items()})


def check_fingerprint(actual: str, document: Mapping[str, Any], config_file: Path) -> None:
    """ValueError unless it is the one of ``document``."""
    if actual != document["fingerprint"]:
        raise ValueError(
            f"{config_file.parent}: fingerprint {actual[:12]} of the weights is not the {document['fingerprint'][:12]} that "
            f"{config_file.name} names: one of the two files is damaged or of another codec; copy the folder again"
        )


def rounded(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Its weights on the CPU in ``dtype``."""
    return {name: value.detach().cpu().to(dtype).contiguous() for name, value in module.state_dict().items()}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
