"""``config.json`` of Qwen2, SigLIP and Whisper to the fields of our configuration, and Qwen2's back.

What this model cannot compute (another activation, scaled rotary positions, sliding windows, another architecture) is
an error that names the file, the field, and what was expected.
"""

import logging
import math
from pathlib import Path
from typing import Any, NoReturn

from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.config.model import AudioConfig, ModelConfig, VisionConfig

ROTARY_FIELDS = ("rope_theta", "rope_type", "type", "mrope_section", "partial_rotary_factor")
"""What a table of rotary positions may say."""
LARGEST_SIZE = (1 << 31) - 1
"""Of anything that a configuration counts: far above every model, far below where products of two overflow."""
FRAMES_PER_SECOND = 50
TOKENS_PER_SECOND = 20 / 3
"""Of the Q-former: 20 tokens for 3 seconds."""

logger = logging.getLogger(__name__)


def qwen2_model(config: dict[str, Any], path: Path) -> ModelConfig:
    """A dense text model. ``path`` of the configuration, for messages."""
    field = Fields(config, path)
    field.expect("model_type", "qwen2")
    field.expect("hidden_act", "silu", default="silu")
    field.expect("use_sliding_window", False, default=False)
    base, _ = rotary(field, 10_000.0)
    hidden, heads = field.size("hidden_size"), field.size("num_attention_heads")
    head = field.size("head_dim", hidden // heads) if config.get("head_dim") is not None else hidden // heads
    return ModelConfig(
        num_layers=field.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=field.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=field.size("num_key_value_heads"),
        kv_channels=head,
        vocab_size=field.size("vocab_size"),
        max_position_embeddings=field.size("max_position_embeddings"),
        rotary_base=base,
        mrope_section=mrope_section(head),
        layernorm_epsilon=field.number("rms_norm_eps", 1e-6),
        untie_embeddings_and_output_weights=not field.flag("tie_word_embeddings", False),
        moe=None,
        vision=None,
        audio=None,
    )


def qwen2_config(model: ModelConfig, dtype: str, *, stops: list[int] | None = None) -> dict[str, Any]:
    """``config.json`` of a dense text model, as ``transformers`` reads it; ``dtype`` as ``bfloat16``, ``stops``: ids."""
    return {
        **({"eos_token_id": stops} if stops else {}),
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rotary_base,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_sliding_window": False,
        "torch_dtype": dtype,
    }


def siglip_vision(config: dict[str, Any], path: Path, *, drop_last: int = 1) -> VisionConfig:
    """The tower of SigLIP without its last ``drop_last`` layers (so400m: 26 of 27)."""
    if config.get("model_type") == "siglip":
        config = config.get("vision_config") or {}
    field = Fields(config, path)
    field.expect("model_type", "siglip_vision_model", default="siglip_vision_model")
    field.expect("hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    layers = field.size("num_hidden_layers", 12)
    if not 0 <= drop_last < layers:
        raise ConversionError(f"{path}: num_hidden_layers is {layers}: cannot leave out {drop_last}")
    image, patch = field.size("image_size", 224), field.size("patch_size", 16)
    return VisionConfig(
        image_size=image,
        patch_size=patch,
        hidden_size=field.size("hidden_size", 768),
        ffn_hidden_size=field.size("intermediate_size", 3072),
        num_layers=layers - drop_last,
        num_attention_heads=field.size("num_attention_heads", 12),
        pooled_side=min(12, image // patch),
    )


def whisper_audio(config: dict[str, Any], path: Path) -> AudioConfig:
    """Whisper's encoder, and its decoder as the Q-former."""
    field = Fields(config, path)
    field.expect("model_type", "whisper")
    field.expect("activation_function", "gelu", default="gelu")
    field.expect("scale_embedding", False, default=False)
    heads, ffn = field.size("encoder_attention_heads"), field.size("encoder_ffn_dim")
    field.expect("decoder_attention_heads", heads)
    field.expect("decoder_ffn_dim", ffn)
    seconds = field.size("max_source_positions") / FRAMES_PER_SECOND
    return AudioConfig(
        num_mel_bins=field.size("num_mel_bins"),
        chunk_seconds=seconds,
        hidden_size=field.size("d_model"),
        ffn_hidden_size=ffn,
        num_encoder_layers=field.size("encoder_layers"),
        num_decoder_layers=field.size("decoder_layers"),
        num_attention_heads=heads,
        num_query_tokens=max(1, round(seconds * TOKENS_PER_SECOND)),
        max_target_positions=field.size("max_target_positions"),
    )


def mrope_section(head_size: int) -> list[int]:
    """Rotary frequencies of time, height and width in the proportion 2 : 3 : 3 of the full model's [16, 24, 24]."""
    half = head_size // 2
    time = half // 4
    return [time, (half - time) // 2, half - time - (half - time) // 2]


def rotary(
    field: "Fields", default_base: float, *, types: tuple[str, ...] = ("default",)
) -> tuple[float, list[int] | None]:
    """Base of the rotary positions, and the mrope section where a table has one.

    As transformers reads them: the table ``rope_scaling``, else ``rope_parameters``; its ``rope_theta``, else that of the
    top level, else ``default_base``. ConversionError for what this model cannot compute (a type that is not in ``types``,
    tables nested by kind of layer, a part of the head, a setting unknown here), and for two tables that say different things.
    """
    top = field.number("rope_theta", default_base)
    if field.config.get("partial_rotary_factor") is not None and field.number("partial_rotary_factor") != 1:
        field.refuse("partial_rotary_factor", "1 (the whole head is rotated)")
    found: dict[str, tuple[float, list[int] | None]] = {}
    for place in ("rope_scaling", "rope_parameters"):
        table = field.inside(place)
        for name, value in table.config.items():
            if name in ("rope_type", "type"):  # Qwen's own instructions for YaRN say "type"
                if value not in types:
                    table.refuse(name, f"{' or '.join(map(repr, types))} (unscaled rotary positions)")
            elif name == "partial_rotary_factor" and value is not None and table.number(name) != 1:
                table.refuse(name, "1 (the whole head is rotated)")
            elif name not in ROTARY_FIELDS and value is not None:
                table.refuse(name, "no such setting: positions are unscaled and the same in all layers")
        if table.config:
            base = top if table.config.get("rope_theta") is None else table.number("rope_theta")
            found[place] = base, _section(table)
    for place, (base, _) in found.items():
        if base != top and "rope_theta" in field.config:
            logger.warning("%s: rope_theta is %g, in %s %g, which is taken", field.path, top, place, base)
    base, section = next(iter(found.values()), (top, None))
    for other, said in found.items():
        if said[0] != base or (said[1] is not None and section is not None and said[1] != section):
            field.refuse(other, f"what rope_scaling says, base {base:g} and section {section}: the two tables disagree")
        section = section or said[1]
    return base, section


def _section(table: "Fields") -> list[int] | None:
    section = table.config.get("mrope_section")
    if section is not None and not (
        isinstance(section, list) and section and all(type(part) is int and part > 0 for part in section)
    ):
        table.refuse("mrope_section", "a list of positive whole numbers")
    return section


class Fields:
    """Checked access to a configuration; ``group`` is where in the file it lies, for messages."""

    def __init__(self, config: dict[str, Any], path: Path, *, group: str = "") -> None:
        self.config, self.path, self._group = config, path, group

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number from ``least`` to LARGEST_SIZE."""
        value = self.config.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(name, f"a whole number from {least} on" if least != 1 else "a positive whole number")
        assert isinstance(value, int)
        if value > LARGEST_SIZE:
            self.refuse(name, f"at most {LARGEST_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number, as a float."""
        value = self.config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            self.refuse(name, "a number")
        assert value is not None
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        assert isinstance(value, bool)
        return value

    def table(self, name: str) -> dict[str, Any]:
        """A table; empty where there is none."""
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            self.refuse(name, "a table")
        assert isinstance(value, dict)
        return value

    def inside(self, name: str) -> "Fields":
        """The fields of a table."""
        return Fields(self.table(name), self.path, group=f"{self._group}{name}.")

    def expect(self, name: str, wanted: Any, *, default: Any = None) -> None:
        """The one value that this model computes."""
        if self.config.get(name, default) != wanted:
            self.refuse(name, repr(wanted))

    def refuse(self, name: str, expected: str) -> NoReturn:
        """ConversionError that names the file, the field, what was expected and found."""
        found = repr(self.config[name]) if name in self.config else "nothing"
        raise ConversionError(f"{self.path}: {self._group}{name}: expected {expected}, found {found}")
