"""WavTokenizer's released checkpoint and configuration: into a codec of ours and back, by their own keys.

    theirs                                                             ours
    feature_extractor.encodec.encoder.model.N...conv.conv.weight_g     encoder.seanet.layers.N...conv.parametrizations...original0
    feature_extractor.encodec.encoder.model.N...conv.conv.weight_v     encoder.seanet.layers.N...conv.parametrizations...original1
    feature_extractor.encodec.quantizer.vq.layers.0._codebook.X        codebook.X
    backbone.X                                                         decoder.X
    head.out.X, head.istft.window                                      decoder.out.X, decoder.window
    feature_extractor.encodec.decoder.*                                a SEANet decoder that nothing runs: dropped
    multiperioddisc.* multiresddisc.* dac.* dacdiscriminator.* melspec_loss.*     of their training: dropped

Every key is one of these or an error. Weights are kept as they are, weight norm included, so that what is written back has the same
bits; the dropped decoder is written as zeros, which their loader asks for by name. Of their yaml only numbers and the last word
of three class names are read; nothing that it names is imported. The checkpoint is read by untrusted.py.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.encodec.modeling_encodec import EncodecConvTranspose1d, EncodecDecoder

from megatron_omni.checkpoint.hf_config import Fields
from megatron_omni.checkpoint.tensor_files import ConversionError, read_header, read_tensor
from megatron_omni.checkpoint.untrusted import read_torch_file
from megatron_omni.config.generators import CodecConfig
from megatron_omni.config.yaml_text import Plain, core_value, read_yaml
from megatron_omni.foreign import read_text
from megatron_omni.models.encoders.codec import encodec_config
from megatron_omni.models.generators.codec import Codec
from megatron_omni.models.nothing_drawn import NothingDrawn

ENCODEC = "feature_extractor.encodec."
UNUSED_DECODER = f"{ENCODEC}decoder."
DROPPED = (UNUSED_DECODER, "multiperioddisc.", "multiresddisc.", "dac.", "dacdiscriminator.", "melspec_loss.")
UNUSED_STRIDES = [8, 5, 4, 2]
FIRST_CONVOLUTION = f"{ENCODEC}encoder.model.0.conv.conv.weight_v"
FIXED = {"num_filters": 32, "code_size": 512}
"""In their source, not in their configuration."""
CHECKPOINT_FILE, YAML_FILE = "wavtokenizer.ckpt", "config.yaml"
logger = logging.getLogger(__name__)

CHECKPOINT_SUFFIXES = (".ckpt", ".pt", ".bin", ".safetensors")
WINDOW_TOLERANCE = 1e-3  # of half precision


@dataclass
class Released:
    """A checkpoint of theirs, read."""

    codec: Codec
    used: int
    """Keys that are in the codec."""
    dropped: dict[str, int]
    """Keys that have no use, counted by the start of their names."""


def their_key(name: str) -> str:
    """The released key of our weight ``name``."""
    part, _, rest = name.partition(".")
    if part == "codebook":
        return f"{ENCODEC}quantizer.vq.layers.0._codebook.{rest}"
    if part == "decoder":
        return {"window": "head.istft.window"}.get(rest, f"{'head' if rest.startswith('out.') else 'backbone'}.{rest}")
    assert name.startswith("encoder.seanet.layers.")
    return f"{ENCODEC}encoder.model.{_their_module(name.removeprefix('encoder.seanet.layers.'))}"


def _their_module(rest: str) -> str:
    """Of SEANet's modules: transformers' names to theirs."""
    rest = rest.replace("parametrizations.weight.original0", "weight_g")
    rest = rest.replace("parametrizations.weight.original1", "weight_v")
    return re.sub(r"\bconv\.(?=weight_|bias)", "conv.conv.", rest)


# ------------------------------------------------------------------------------------------------ in


def find_released(source: Path, yaml: Path | None) -> tuple[Path, Path]:
    """Checkpoint and yaml of ``source``, a checkpoint or a folder with one; ``yaml`` where it is named.

    A ``.ckpt`` goes before other files of weights: the folder ``speech_gen/`` of a release holds the generator's as well.
    """
    if not source.is_dir():
        return source, yaml or _only(source.parent, ".yaml", ".yml", what="yaml; name it with --yaml")
    named = any(path.suffix == CHECKPOINT_SUFFIXES[0] for path in source.iterdir())
    suffixes = CHECKPOINT_SUFFIXES[:1] if named else CHECKPOINT_SUFFIXES
    checkpoint = _only(source, *suffixes, what="checkpoint; name the file itself")
    return checkpoint, yaml or _only(source, ".yaml", ".yml", what="yaml; name it with --yaml")


def _only(folder: Path, *suffixes: str, what: str) -> Path:
    found = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConversionError(f"{folder}: expected one {what} (found {names})")
    return found[0]


def read_released(checkpoint: Path, yaml: Path) -> Released:
    """The codec in ``checkpoint``. ConversionError for a key too many or too few, a shape, a value that is not finite."""
    state = _read_state(checkpoint)
    with NothingDrawn():
        codec = Codec(released_config(yaml, _num_filters(state, checkpoint)))
    wanted = {their_key(name): name for name in codec.state_dict()}
    dropped: dict[str, int] = {}
    for key in set(state) - set(wanted):
        start = next((start for start in DROPPED if key.startswith(start)), None)
        if start is None:
            raise ConversionError(f"{checkpoint}: {key!r}: no such weight in WavTokenizer's architecture")
        dropped[f"{start}*"] = dropped.get(f"{start}*", 0) + 1
    for key, name in wanted.items():
        if key not in state:
            raise ConversionError(f"{checkpoint}: {key!r} is missing; it may be no WavTokenizer, or not whole")
        _check(checkpoint, key, state[key], codec.state_dict()[name])
    codec.load_state_dict({name: state[key].float() for key, name in wanted.items()})
    _check_meaning(checkpoint, codec)
    return Released(codec.eval(), len(wanted), dropped)


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return {key: read_tensor(info) for key, info in read_header(path).items()}
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    return read_torch_file(path)


def _num_filters(state: Mapping[str, Tensor], path: Path) -> int:
    if FIRST_CONVOLUTION not in state:
        raise ConversionError(f"{path}: {FIRST_CONVOLUTION!r} is missing; it may be no WavTokenizer, or not whole")
    return state[FIRST_CONVOLUTION].shape[0]


def _check(path: Path, key: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise ConversionError(f"{path}: {key!r}: expected {list(wanted.shape)}, found {list(found.shape)}")
    if found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConversionError(f"{path}: {key!r}: expected floats of 32 or 16 bits, found {found.dtype}")
    if not bool(found.isfinite().all()):
        raise ConversionError(f"{path}: {key!r} has values that are not finite")


def _check_meaning(path: Path, codec: Codec) -> None:
    if not codec.codebook.is_started:
        raise ConversionError(f"{path}: its codebook was never started (inited is 0): it was not trained")
    expected = torch.hann_window(codec.decoder.window.shape[0])
    if bool(((codec.decoder.window - expected).abs() > WINDOW_TOLERANCE).any()):
        raise ConversionError(f"{path}: 'head.istft.window': expected a periodic Hann window, found another")


def released_config(path: Path, num_filters: int) -> CodecConfig:
    """Sizes in their yaml; ConversionError for what this architecture does not compute."""
    try:
        document = _values(read_yaml(read_text(path)))
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConversionError(f"{path}: expected a table with model.init_args")
    model = Fields(document, path).inside("model").inside("init_args")
    features = _arguments(model, "feature_extractor", "EncodecFeatures")
    backbone = _arguments(model, "backbone", "VocosBackbone")
    head = _arguments(model, "head", "ISTFTHead")
    features.expect("num_quantizers", 1, default=1)
    strides = features.config.get("dowmsamples")
    if not isinstance(strides, list) or not strides or not all(type(n) is int and 0 < n < 1000 for n in strides):
        features.refuse("dowmsamples", "a list of whole numbers")
    config = CodecConfig(
        sample_rate=model.size("sample_rate", 24_000),
        num_codes=features.size("vq_bins"),
        code_size=backbone.size("input_channels"),
        encoder="seanet",
        strides=list(reversed(strides)),
        num_filters=num_filters,
        hidden_size=backbone.size("dim"),
        ffn_hidden_size=backbone.size("intermediate_dim"),
        num_layers=backbone.size("num_layers"),
        num_bandwidths=backbone.size("adanorm_num_embeddings"),
    )
    head.expect("dim", config.hidden_size)
    head.expect("hop_length", config.hop_size)
    head.expect("n_fft", 4 * config.hop_size)
    head.expect("padding", "same", default="same")
    return config


def _arguments(model: Fields, name: str, class_name: str) -> Fields:
    """``init_args`` of a part; its class is compared by name, never looked up."""
    part = model.inside(name)
    if str(part.config.get("class_path", "")).rpartition(".")[2] != class_name:
        part.refuse("class_path", f"a path that ends with {class_name}; no other class is read, and none is imported")
    return part.inside("init_args")


def _values(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(key): _values(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_values(value) for value in node]
    return core_value(node) if isinstance(node, Plain) else node


# ------------------------------------------------------------------------------------------------ out


def write_released(codec: Codec, folder: Path) -> list[Path]:
    """``wavtokenizer.ckpt`` and ``config.yaml`` in ``folder``, as their own loader reads them; the two files.

    ValueError for a codec with the log-mel encoder, which theirs does not have. A warning for sizes that are fixed in their
    source.
    """
    if codec.config.decoder_span:
        raise ValueError(
            f"{folder}: this codec has decoder_span {codec.config.decoder_span}; WavTokenizer's decoder has none, so there is "
            "no released form of it"
        )
    if codec.config.encoder != "seanet":
        raise ValueError(
            f"{folder}: this codec has the encoder {codec.config.encoder!r}; WavTokenizer has only seanet, so there is no "
            "released form of it"
        )
    for field, value in FIXED.items():
        if (ours := getattr(codec.config, field)) != value:
            logger.warning("%s is %d here and %d in their source, which cannot read this", field, ours, value)
    state = {their_key(name): value.detach().cpu() for name, value in codec.state_dict().items()}
    state |= dict(unused_decoder(codec.config))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / CHECKPOINT_FILE, folder / YAML_FILE]
    torch.save({"state_dict": state}, files[0])
    files[1].write_text(released_yaml(codec.config), encoding="utf-8")
    return files


def unused_decoder(config: CodecConfig) -> Iterator[tuple[str, Tensor]]:
    """The SEANet decoder that is in their files and that nothing runs, silent: directions 1, all else 0."""
    theirs = encodec_config(config)
    theirs.upsampling_ratios = UNUSED_STRIDES
    with torch.device("meta"):
        decoder = EncodecDecoder(theirs)
    for name, value in decoder.state_dict().items():
        key = _their_module(name.removeprefix("layers."))
        if isinstance(decoder.layers[int(name.split(".")[1])], EncodecConvTranspose1d):
            key = key.replace("conv.conv.", "convtr.convtr.")
        fill = 1.0 if key.endswith("weight_v") else 0.0
        yield f"{UNUSED_DECODER}model.{key}", torch.full(value.shape, fill)


def released_yaml(config: CodecConfig) -> str:
    """What their loader builds the model from."""
    return f"""\
model:
  class_path: decoder.experiment.WavTokenizer
  init_args:
    sample_rate: {config.sample_rate}
    feature_extractor:
      class_path: decoder.feature_extractors.EncodecFeatures
      init_args:
        encodec_model: encodec_24khz
        bandwidths: [{", ".join(["6.6"] * config.num_bandwidths)}]
        train_codebooks: true
        num_quantizers: 1
        dowmsamples: {list(reversed(config.strides))}
        vq_bins: {config.num_codes}
        vq_kmeans: 200
    backbone:
      class_path: decoder.models.VocosBackbone
      init_args:
        input_channels: {config.code_size}
        dim: {config.hidden_size}
        intermediate_dim: {config.ffn_hidden_size}
        num_layers: {config.num_layers}
        adanorm_num_embeddings: {config.num_bandwidths}
    head:
      class_path: decoder.heads.ISTFTHead
      init_args:
        dim: {config.hidden_size}
        n_fft: {4 * config.hop_size}
        hop_length: {config.hop_size}
        padding: same
"""
