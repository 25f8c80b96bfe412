"""A codec on disk: a folder with ``codec.json`` and ``codec.safetensors`` (codec_folder.py; the window always in fp32)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_omni.config.generators import CodecConfig
from megatron_omni.models.generators.codec_folder import (
    check_fingerprint,
    fingerprint_of,
    load_weights,
    read_config,
    read_document,
    read_weights,
    rounded,
    write_folder,
)
from megatron_omni.models.nothing_drawn import NothingDrawn

if TYPE_CHECKING:
    from megatron_omni.models.generators.codec import Codec

CONFIG_FILE, WEIGHTS_FILE = "codec.json", "codec.safetensors"
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
    return fingerprint_of(sizes, {name: value for name, value in weights.items() if name not in ONLY_IN_TRAINING})


def save_codec(
    codec: "Codec", folder: Path, *, dtype: torch.dtype = torch.float32, about: Mapping[str, Any] | None = None
) -> str:
    """Write ``folder``, made where it is not there; the fingerprint of what it holds.

    In ``torch.float16`` weights are rounded, and the fingerprint is of the rounded ones. ValueError for a codebook that
    has not started, or weights that are not finite in ``dtype``.
    """
    if not codec.codebook.is_started:
        raise ValueError(f"{folder}: this codec has no codebook yet (it starts during training); nothing was written")
    kept = rounded(codec, dtype) | {WINDOW: codec.decoder.window.detach().cpu()}
    fingerprint = weights_fingerprint(codec.config, kept)
    write_folder(
        folder / WEIGHTS_FILE, folder / CONFIG_FILE, kept, fingerprint=fingerprint, config=codec.config, about=about
    )
    return fingerprint


def load_codec(folder: Path | str) -> "Codec":
    """The codec in ``folder``, in fp32 on the CPU, for inference. ValueError that names what is missing or damaged."""
    from megatron_omni.models.generators.codec import Codec

    folder = Path(folder)
    document = codec_document(folder)
    with NothingDrawn():
        codec = Codec(codec_config(document["config"], folder / CONFIG_FILE))
    load_weights(codec, read_weights(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    check_fingerprint(codec.fingerprint, document, folder / CONFIG_FILE)
    return codec.eval()


def codec_document(folder: Path) -> dict[str, Any]:
    """``codec.json`` of ``folder``, without reading weights: its fingerprint and configuration. ValueError for none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder}: no codec here ({CONFIG_FILE} is missing); the released one becomes such a folder by "
            "megatron-omni convert codec"
        )
    return read_document(path)


def codec_config(values: Mapping[str, Any], path: Path) -> CodecConfig:
    """``values`` of ``path`` as a configuration; ValueError for fields, types and numbers that it does not have."""
    config = read_config(CodecConfig, values, path)
    if config.encoder not in ("seanet", "mel"):
        raise ValueError(f"{path}: config.encoder={config.encoder!r}: expected seanet or mel")
    return config
