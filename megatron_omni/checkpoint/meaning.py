"""What gives weights their meaning, compared wherever they change hands: ``load``, ``init_from``, a chain, upcycling.

A tensor that fits by name, shape and type computes something else all the same under another rotary base, another split
of the rotary frequencies, another epsilon, another number of heads or another tokenizer, and nothing fails. So every field
of the model counts unless it is listed in ``FREE`` (a new field counts until somebody lists it), and the vocabulary is
compared id by id. Needs neither torch nor megatron.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_omni.checkpoint.tokenizer_files import check_same, read_vocabulary
from megatron_omni.config.model import ModelConfig

FREE = frozenset(
    {
        "model.max_position_embeddings", "model.make_vocab_size_divisible_by", "model.init_method_std",
        "model.attention_dropout", "model.hidden_dropout", "model.lora",
        "model.moe.top_p", "model.moe.top_k", "model.moe.max_routed", "model.moe.sample_experts",
        "model.moe.gradient_estimator", "model.moe.fp32_gate", "model.moe.input_jitter", "model.moe.router_jitter_eps",
        "model.moe.moe_aux_loss_coeff", "model.moe.moe_aux_loss_coeff_min", "model.moe.moe_aux_loss_decay_iters",
        "model.moe.aux_loss_probs", "model.moe.aux_loss_counts_null", "model.moe.aux_loss_label_weight",
        "model.moe.capacity_factor", "model.moe.min_capacity", "model.moe.moe_token_dispatcher_type",
        "model.moe.kernels",
        "model.vision.max_tiles_per_side", "model.audio.max_chunks", "model.audio.query_init",
        "model.speech.text_table", "model.speech.codec", "model.speech.prefix_codes", "model.speech.least_prefix_codes",
        "model.speech.max_codes", "model.speech.min_split_tokens", "model.speech.max_split_tokens",
        "model.speech.least_codes_per_token", "model.speech.most_codes_per_token", "model.speech.voices",
        "model.image.weights", "model.image.vae", "model.image.base_size", "model.image.size_step",
        "model.image.max_aspect", "model.image.sampling", "model.image.dit.noisy_selection",
        "model.image.projectors.query_init",
    }
)  # fmt: skip
"""Fields of the model (with all below them) that a later stage may choose anew: limits, training's own settings, what may
change on any day. Low-rank adapters are merged where they differ (training/initial_weights.py)."""
MEDIA_POSITIONS = frozenset(
    {"model.mrope_section", "model.rope_theta_seconds", "model.audio_only_1d", "model.half_even_positions"}
)
"""Text alone has the same position on all three axes: weights that never saw media know nothing of these."""
UNKNOWN_WHERE_NULL = frozenset(
    {"model.speech.codec_fingerprint", "model.image.vae_fingerprint", "model.image.hidden_fingerprint"}
)
"""Fields that say nothing where they are null: released weights do not name their codec, nor their VAE."""
TOKENIZER = "data.tokenizer"


class Change(NamedTuple):
    """A field of the recipe that two sides of a hand-over have differently."""

    field: str
    """Dotted, as in a recipe."""
    now: object
    then: object
    """With which the weights were made."""


def changes(now: ModelConfig, then: ModelConfig) -> list[Change]:
    """What makes weights of ``then`` mean something else in ``now``.

    A part that one side has not (an encoder, the mixture) is no change: its tensors are missing or extra.
    """
    found = [change for change in differences(now, then, name="model") if not _is_free(change.field)]
    unknown = set() if then.vision is not None or then.audio is not None else MEDIA_POSITIONS
    if now.moe is not None or then.moe is not None:
        unknown = unknown | {"model.ffn_hidden_size"}  # of a dense model alone
    parts = {f"model.{part}" for part in ("vision", "audio", "moe", "image")}
    return [change for change in found if change.field not in unknown | parts]


def _is_free(field: str) -> bool:
    return field in FREE or field.rpartition(".")[0] in FREE


def differences(now: object, then: object, *, name: str) -> Iterator[Change]:
    """Every field that differs between two configurations, ``name`` being the field that holds them."""
    if is_dataclass(now) and type(now) is type(then):
        for field in fields(now):
            yield from differences(getattr(now, field.name), getattr(then, field.name), name=f"{name}.{field.name}")
    elif isinstance(now, float) and isinstance(then, float) and math.isclose(now, then):
        return  # one of them was written with fewer digits
    elif name in UNKNOWN_WHERE_NULL and None in (now, then):
        return
    elif now != then:
        yield Change(name, now, then)


def check_handover(
    now: ModelConfig,
    then: ModelConfig,
    *,
    tokenizers: tuple[Path | None, Path | None],
    origin: object,
    allowed: Sequence[str] = (),
) -> None:
    """ValueError, naming field and both values, unless weights of ``then`` keep their meaning in ``now``.

    ``tokenizers``: of now and then, as ``data.tokenizer`` names them; None (nothing to read) is not compared. ``origin``:
    where the weights come from, for the message. ``allowed``: fields that the user means to change.
    """
    for field, ours, theirs in changes(now, then):
        if field not in allowed:
            raise ValueError(
                f"{field}={ours}: the weights of {origin} were made with {theirs}, which gives them their meaning; set it "
                f"back, or name {field} in init_allow_changed"
            )
    if TOKENIZER not in allowed:
        check_tokenizers(*tokenizers, way_out=f"name {TOKENIZER} in init_allow_changed")


def check_tokenizers(now: Path | None, then: Path | None, *, way_out: str) -> None:
    """ValueError unless the tokenizer ``now`` gives every text the ids that the weights were trained with, ``then``."""
    if now is None or then is None or now == then:
        return
    try:
        check_same(read_vocabulary(then), read_vocabulary(now))
    except ValueError as error:
        raise ValueError(f"{TOKENIZER}={str(now)!r}: {error}; set it to {str(then)!r}, or {way_out}") from error
