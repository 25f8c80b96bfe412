"""The layouts of foreign checkpoints that conversion knows, each a name, its rows and what it carries along.

A family reads a directory's ``config.json`` into our configuration, gives the rows of its weights, and says which
further keys may be there. Those are *carried*: kept beside the checkpoint under our prefix of the same module
(``vision.tower.post_layernorm.weight``), because nothing here computes with them and a checkpoint written back needs
them. To add a model: rows in a module of its own, one entry in :data:`FAMILIES` (docs/checkpoints.md).
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_omni.checkpoint import uni_moe, uni_moe_image, uni_moe_speech
from megatron_omni.checkpoint.hf_config import qwen2_config, qwen2_model, siglip_vision, whisper_audio
from megatron_omni.checkpoint.names import (
    Row,
    projector_rows,
    qwen2_rows,
    siglip_rows,
    whisper_decoder_rows,
    whisper_encoder_rows,
)
from megatron_omni.checkpoint.sources import HuggingFaceSource, Source, ValuesSource
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.tokenizer_files import stop_ids
from megatron_omni.config.data import DataConfig
from megatron_omni.config.model import ModelConfig
from megatron_omni.models.encoders.weights import draw_normal, draw_weights
from megatron_omni.platform.seeds import named_generator

logger = logging.getLogger(__name__)

Options = dict[str, str]
"""What the rows of one directory need beside the configuration: the prefix of its names, which of two layouts."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a conversion and what is taken from it."""

    family: str
    source: Source
    rows: Sequence[Row]
    carried: tuple[str, ...] = ()
    """Patterns of keys without a row that are kept for a checkpoint written back."""
    same: dict[str, str] = field(default_factory=dict)
    """Key -> another key that must be equal to it, bit for bit (tied weights that are stored twice)."""
    options: Options = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One layout."""

    rows: Callable[[ModelConfig, Options], list[Row]]
    prefixes: Callable[[Options], list[tuple[str, str]]] = lambda options: []
    """(their prefix, ours) of carried weights."""
    carried: tuple[str, ...] = ()
    same: dict[str, str] = field(default_factory=dict)
    config: Callable[[ModelConfig, DataConfig, dict[str, int], str], dict[str, Any]] | None = None
    """``config.json`` from (model, data, special tokens, dtype); None where the source's own is written back."""
    wants: Callable[[ModelConfig], dict[str, tuple[int, ...]]] | None = None
    """The carried keys that an export always has; the others are written back where there are any."""


def carried_name(family: str, options: Options, key: str) -> str:
    """Under which a carried ``key`` of theirs is kept."""
    for theirs, ours in FAMILIES[family].prefixes(options):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return f"other.{family}.{key}"


def is_foreign(family: str, name: str) -> bool:
    """Whether a carried ``name`` belongs to no module of ours: a generator's, a text tower's."""
    return name.startswith(f"other.{family}.")


def their_name(family: str, options: Options, name: str) -> str | None:
    """The key of a carried ``name`` in this family; None where it has none."""
    if is_foreign(family, name):
        return name.removeprefix(f"other.{family}.")
    for theirs, ours in FAMILIES[family].prefixes(options):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return None


def _whisper_rows(model: ModelConfig, options: Options) -> list[Row]:
    assert model.audio is not None
    prefix = options.get("prefix", "model.")
    return [
        *whisper_encoder_rows(model.audio, prefix=f"{prefix}encoder."),
        *whisper_decoder_rows(model.audio, prefix=f"{prefix}decoder."),
    ]


def _siglip_rows(model: ModelConfig, options: Options) -> list[Row]:
    assert model.vision is not None
    return siglip_rows(model.vision, prefix=options.get("prefix", "vision_model."))


FAMILIES: dict[str, Family] = {
    "qwen2": Family(
        rows=lambda model, options: qwen2_rows(model),
        same={"lm_head.weight": "model.embed_tokens.weight"},
        config=lambda model, data, tokens, dtype: qwen2_config(
            model, dtype, stops=stop_ids(tokens) if tokens else None
        ),
    ),
    "siglip": Family(
        rows=_siglip_rows,
        prefixes=lambda options: [(options.get("prefix", "vision_model."), "vision.tower.")] if options else [],
        # Without a prefix of the tower's own, only what a tower has is its. The layers left out: see open_vision.
        carried=(r"(vision_model\.)?(post_layernorm|head)\..*", r"text_model\..*", r"logit_scale|logit_bias"),
    ),
    "whisper": Family(
        rows=_whisper_rows,
        prefixes=lambda options: [
            (f"{options.get('prefix', 'model.')}decoder.", "audio.qformer."),
            (f"{options.get('prefix', 'model.')}encoder.", "audio.tower."),
        ],
        carried=(r"(model\.)?decoder\.embed_tokens\.weight",),
        same={"proj_out.weight": "model.decoder.embed_tokens.weight"},
    ),
    "projectors": Family(rows=lambda model, options: projector_rows(model)),
    "uni_moe": Family(
        rows=lambda model, options: [*uni_moe.uni_moe_rows(model), *uni_moe_image.image_rows(model, options)],
        prefixes=lambda options: [
            (uni_moe.SIGLIP_PREFIX, "vision.tower."),
            (uni_moe.WHISPER_ENCODER_PREFIX, "audio.tower."),
            (uni_moe.WHISPER_DECODER_PREFIX, "audio.qformer."),
        ],
        carried=(
            re.escape(uni_moe.SIGLIP_PREFIX) + r"post_layernorm\..*",
            re.escape(uni_moe.WHISPER_DECODER_PREFIX) + r"embed_tokens\.weight",
            *uni_moe.GENERATORS,
        ),
        same={"lm_head.weight": "model.embed_tokens.weight"},
        config=lambda model, data, tokens, dtype: uni_moe.config_to_theirs(model, data, tokens=tokens, dtype=dtype),
        wants=uni_moe.unused_shapes,
    ),
    "speech_gen": Family(
        rows=uni_moe_speech.speech_rows,
        config=lambda model, data, tokens, dtype: uni_moe_speech.speech_config(model, dtype),
    ),
    # What draws, without a language model; a caption of no words for a release, which has it in another file.
    "image_gen": Family(
        rows=uni_moe_image.image_rows,
        carried=(r"image_generator\.vae\..*",),
        config=lambda model, data, tokens, dtype: uni_moe_image.image_config(model, dtype),
    ),
    "pixwizard": Family(rows=uni_moe_image.pixwizard_rows),
    "image_nulls": Family(rows=lambda model, options: uni_moe_image.null_rows(model)),
    # Layers of a language model under a generator, and the word embeddings that it reads text by.
    "speech_trunk": Family(rows=lambda model, options: uni_moe_speech.trunk_layer_rows(model)),
    "text_table": Family(rows=uni_moe_speech.table_rows),
}


# ------------------------------------------------------------------------------------------------ directories


def open_language(path: Path) -> tuple[ModelConfig, Part]:
    """The model in a Qwen2.5 or Uni-MoE directory, as its ``config.json`` says."""
    source = HuggingFaceSource(path)
    config, file = source.config(), path / "config.json"
    if uni_moe.is_uni_moe(config):
        model = uni_moe.model_from_theirs(config, file=file)
        model.image = uni_moe_image.image_of(source, model.image)
        part = _part("uni_moe", source, model, uni_moe_image.nulls_option(source) if model.image is not None else {})
        if model.image is not None:  # its keys have rows: one without is an error, not carried
            part = replace(part, carried=tuple(p for p in part.carried if p not in uni_moe.PICTURE_GENERATOR))
        return model, part
    if config.get("model_type") != "qwen2":
        known = ("qwen2", *uni_moe.MODEL_TYPES)
        raise ConversionError(
            f"{file}: model_type: expected one of {', '.join(known)}, found {config.get('model_type')!r}"
        )
    model = qwen2_model(config, file)
    return model, _part("qwen2", source, model, {})


def open_vision(path: Path, model: ModelConfig, *, drop_last: int = 1) -> tuple[ModelConfig, Part]:
    """``model`` with the tower in a SigLIP directory."""
    source = HuggingFaceSource(path)
    model.vision = siglip_vision(source.config(), path / "config.json", drop_last=drop_last)
    prefix = _prefix(source, ("vision_model.", ""), "embeddings.patch_embedding.weight")
    part = _part("siglip", source, model, {"prefix": prefix})
    kept = model.vision.num_layers
    left_out = tuple(rf"{re.escape(prefix)}encoder\.layers\.{n}\..*" for n in range(kept, kept + drop_last))
    return model, replace(part, carried=(*part.carried, *left_out))


def open_audio(path: Path, model: ModelConfig) -> tuple[ModelConfig, Part]:
    """``model`` with encoder and Q-former from a Whisper directory."""
    source = HuggingFaceSource(path)
    model.audio = whisper_audio(source.config(), path / "config.json")
    prefix = _prefix(source, ("model.", ""), "encoder.conv1.weight")
    return model, _part("whisper", source, model, {"prefix": prefix})


def open_projectors(path: Path, model: ModelConfig) -> Part:
    """Projectors and queries from a file or directory with ``vision_aligner.*`` and ``audio_aligner.*``."""
    return _part("projectors", HuggingFaceSource(path), model, {})


def draw_projectors(model: ModelConfig, *, seed: int) -> Part:
    """New projectors and queries, the ones that a run with this ``seed`` starts from."""

    def generator(name: str) -> torch.Generator:
        return named_generator(seed, "weights", name)

    values: dict[str, Tensor] = {}
    width = model.hidden_size
    if model.vision is not None:
        mlp = nn.Sequential(nn.Linear(model.vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        draw_weights(mlp, generator, prefix="vision.projector.")
        values |= {f"vision_aligner.{name}": p.detach() for name, p in mlp.named_parameters()}
    if model.audio is not None:
        linear = nn.Linear(model.audio.hidden_size, width)
        draw_weights(linear, generator, prefix="audio.projector.")
        values |= {f"audio_aligner.projector.{name}": p.detach() for name, p in linear.named_parameters()}
        queries = torch.empty(1, model.audio.num_query_tokens, model.audio.hidden_size)
        draw_normal(queries, 0.02, generator("audio.qformer.query_tokens"))
        values["audio_aligner.query_tokens"] = queries
    return _part("projectors", ValuesSource(f"drawn from seed {seed}", values), model, {})


def open_speech(path: Path) -> tuple[ModelConfig, Part]:
    """The speech generator at ``path``: its file, a folder that holds it, or a Uni-MoE-2.0-Omni directory."""
    source, options = uni_moe_speech.open_source(path)
    folder = source.path if source.path.is_dir() else source.path.parent
    model = uni_moe_speech.model_of(source, options, config=folder / "config.json")
    return model, _part("speech_gen", source, model, options)


def open_image(path: Path, blank_captions: Path | None) -> tuple[ModelConfig, list[Part]]:
    """The picture generator at ``path`` (:func:`megatron_omni.checkpoint.uni_moe_image.open_image`)."""
    model, family, source, options = uni_moe_image.open_image(path)
    return model, [_part(family, source, model, options), *_nulls(model, options, blank_captions)]


def _nulls(model: ModelConfig, options: Options, blank_captions: Path | None) -> list[Part]:
    """The part that fills what a release has in another file."""
    if uni_moe_image.NULLS_APART in options:
        return [_part("image_nulls", uni_moe_image.nulls_source(model, blank_captions), model, {})]
    if blank_captions is not None:
        raise ConversionError(
            f"--blank-captions {blank_captions}: for a released picture generator alone; leave it out"
        )
    return []


def open_speech_start(language: Path, table: Path) -> tuple[ModelConfig, list[Part]]:
    """A generator's start: layers of the dense text model in ``language``, the word embeddings of ``table``.

    Everything else of it (embeddings of codes, projection, output layer) is new and not written.
    """
    dense, _ = open_language(language)
    source = uni_moe_speech.KeptKeys(language, r"model\.(layers\.|norm\.)")
    words, key = uni_moe_speech.open_table(table)
    model = uni_moe_speech.generator_of(dense, words.infos()[key].shape)
    for said in (source, words):
        logger.warning("%s: %d weights are left out, %s", said.path, len(said.left_out), ", ".join(said.left_out[:3]))
    return model, [_part("speech_trunk", source, model, {}), _part("text_table", words, model, {"key": key})]


def _part(name: str, source: Source, model: ModelConfig, options: Options) -> Part:
    family = FAMILIES[name]
    same = family.same
    if name in ("qwen2", "uni_moe") and model.untie_embeddings_and_output_weights:
        same = {}
    if options.get("prefix") == "":
        same = {key: other.removeprefix("model.") for key, other in same.items()}
    return Part(
        family=name,
        source=source,
        rows=family.rows(model, options),
        carried=family.carried,
        same=same,
        options=options,
    )


def _prefix(source: HuggingFaceSource, prefixes: Iterable[str], name: str) -> str:
    for prefix in prefixes:
        if prefix + name in source.infos():
            return prefix
    raise ConversionError(f"{source.label}: expected the key {name!r} (or with a prefix), found none; another model?")


@dataclass(frozen=True, kw_only=True)
class OpenedSources:
    """The sources of one conversion."""

    model: ModelConfig
    parts: list[Part]
    wanted: list[Row]
    """Every row of the model; of a part alone where there is no language model."""


def open_sources(
    *,
    language: Path | None,
    vision: Path | None = None,
    audio: Path | None = None,
    projectors: Path | None = None,
    draw_seed: int | None = None,
    query_tokens: int | None = None,
    speech: Path | None = None,
    text_table: Path | None = None,
    image: Path | None = None,
    blank_captions: Path | None = None,
) -> OpenedSources:
    """The model that these directories make together. ConversionError where something is missing or given twice.

    ``speech``: a speech generator, which is a model of its own. ``text_table`` makes one of ``language``. ``image``: what
    draws, alone; ``blank_captions``: the file that a release has beside its weights.
    """
    others = [vision, audio, projectors, draw_seed, query_tokens]
    if image is not None:
        if any(other is not None for other in (*others, language, speech, text_table)):
            raise ConversionError(f"--image {image}: is what draws, alone; leave the other sources out")
        model, parts = open_image(image, blank_captions)
        return OpenedSources(model=model, parts=parts, wanted=[row for part in parts for row in part.rows])
    if speech is not None or text_table is not None:
        return _open_generator(speech, language, text_table, alone=all(other is None for other in others))
    if language is None and vision is None and audio is None:
        raise ConversionError("nothing to convert: give --hf, or --vision or --audio alone")
    model, parts = ModelConfig(moe=None, vision=None, audio=None), []
    if language is not None:
        model, part = open_language(language)
        parts += [part, *_nulls(model, part.options, blank_captions)]
        if part.family == "uni_moe" and (vision or audio or projectors or draw_seed is not None):
            raise ConversionError(f"{language}: is a whole model; leave out --vision, --audio and the projectors")
    if vision is not None:
        model, part = open_vision(vision, model)
        parts.append(part)
    if audio is not None:
        model, part = open_audio(audio, model)
        assert model.audio is not None
        model.audio.num_query_tokens = query_tokens or model.audio.num_query_tokens
        parts.append(part)
    if language is not None and parts[0].family == "qwen2" and (vision or audio):
        if (projectors is None) == (draw_seed is None):
            raise ConversionError(
                "encoders joined to a language model need projectors: give --projectors FILE or --draw-projectors SEED"
            )
        parts.append(open_projectors(projectors, model) if projectors else draw_projectors(model, seed=draw_seed or 0))
    elif projectors is not None or draw_seed is not None:
        raise ConversionError("projectors join encoders to a language model: give --hf and --vision or --audio too")
    wanted = [row for part in parts if part.family != "projectors" for row in part.rows]
    if parts[-1].family == "projectors":
        wanted += projector_rows(model)
    return OpenedSources(model=model, parts=parts, wanted=wanted)


def _open_generator(speech: Path | None, language: Path | None, table: Path | None, *, alone: bool) -> OpenedSources:
    if not alone:
        raise ConversionError("a speech generator has no encoders and no projectors: leave out their options")
    if speech is not None:
        if language is not None or table is not None:
            raise ConversionError(f"--speech {speech}: is a whole speech generator; leave out --hf and --text-table")
        model, part = open_speech(speech)
        return OpenedSources(model=model, parts=[part], wanted=list(part.rows))
    assert table is not None
    if language is None:
        raise ConversionError(
            f"--text-table {table}: give --hf too, the dense text model whose layers a generator starts from"
        )
    model, parts = open_speech_start(language, table)
    return OpenedSources(model=model, parts=parts, wanted=[row for part in parts for row in part.rows])
