"""The layout of the released speech generator (MoE-TTS of Uni-MoE-2.0-Omni): its keys and shapes, both ways.

    qwenvl_embed_tokens in_fnn          table of text embeddings (frozen) and the projection behind it
    audio_embedding out_fnn             codes and marks, C + 9 rows: word embeddings; output layer, with a bias
    layers.N norm                       Qwen2; in each layer ``mlp.deepspeed_moe.gate.wg`` and
                                        ``mlp.deepspeed_moe.experts.deepspeed_experts.{e}``

A dense generator has ``layers.N.mlp.{gate,up,down}_proj`` instead. Its predecessor (``ar_ori_v2``) has its own table
``embed_tokens``, as wide as the model, instead of the first two: here that is a table with the identity behind it
(:class:`Fixed`), and only a model whose projection still is that goes back to it.

The same names stand in ``speech_gen_ep2.bin`` (a pickle, with or without the prefix ``speech_generator.``), in its
folder, and among the weights of the Omni release. None of these says how wide a head is (64, the Qwen2.5-0.5B that it
was made of) unless ``config.json`` does; all other sizes are read off the weights. Rotary base 10,000, epsilon 1e-6: the
defaults of the published ``Qwen2Config``. What export writes has ``config.json`` with the model group of the recipe.

Routing: DeepSpeed's top-2 gate, which is our mixture with ``top_k: 2``, no null and no shared experts, without its noise
and its capacity (docs/speech.md). Source: the published ``speech_generator_AR_MoE/ar_decoder.py``.

C codes, H hidden size.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_omni.checkpoint.hf_config import Fields
from megatron_omni.checkpoint.names import Cut, Row, dense_ffn_rows, trunk_rows
from megatron_omni.checkpoint.sources import HuggingFaceSource, read_json
from megatron_omni.checkpoint.tensor_files import ConversionError, TensorInfo
from megatron_omni.checkpoint.transforms import PadRows, Transform
from megatron_omni.checkpoint.uni_moe import GATE, OURS, ROUTED, moe_rows
from megatron_omni.config.generators import SpeechConfig, SpeechIds
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.estimate import padded_vocab_size

PREFIX = "speech_generator."
FILES = ("speech_gen_ep2.bin", "speech_generator.bin")
"""Names of the file in a folder of the release, and as its training script saves it."""
HEAD_SIZE, ROTARY_BASE, MAX_POSITIONS = 64, 10_000.0, 2048
NUM_MARKS = SpeechIds(0).num_outputs
TABLE, OWN_TABLE, PROJECTION, SPEECH_EMBEDDING, OUTPUT = (
    "qwenvl_embed_tokens.weight", "embed_tokens.weight", "in_fnn.", "audio_embedding.weight", "out_fnn."
)  # fmt: skip
SPEECH_BLOCK = "layers.{layer}."
SPEECH_GATE = SPEECH_BLOCK + "mlp.deepspeed_moe.gate.wg.weight"
SPEECH_ROUTED = SPEECH_BLOCK + "mlp.deepspeed_moe.experts.deepspeed_experts.{expert}."
WORD_EMBEDDINGS = (
    "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight",
    TABLE, PREFIX + TABLE,
)  # fmt: skip
"""Where a language model's directory, or a generator's, has the embeddings that become the table."""
_RENAMED = (
    (GATE, SPEECH_GATE),
    (ROUTED, SPEECH_ROUTED),
    ("model.embed_tokens.weight", SPEECH_EMBEDDING),
    ("lm_head.weight", OUTPUT + "weight"),
    ("model.", ""),
)

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Fixed:
    """Ours alone, of a fixed value: the identity [size, size], or zeros [size]. Theirs computes without it."""

    size: int
    is_matrix: bool

    def value(self, like: Tensor | None = None) -> Tensor:
        """In the dtype of ``like``."""
        made = torch.eye(self.size) if self.is_matrix else torch.zeros(self.size)
        return made if like is None else made.to(like.dtype)

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        assert not parts
        return self.value()

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        """Nothing. ConversionError where ours has learned something else."""
        if not torch.equal(tensor, self.value(tensor)):
            raise ConversionError(
                "text_projection: expected the identity, which an imported predecessor has, found trained values; the "
                "predecessor's layout has no place for them: freeze text_projection in training, or export without --like"
            )
        return []


def speech_rows(model: ModelConfig, options: Mapping[str, str]) -> list[Row]:
    """Rows of a generator, dense or a mixture. ``options``: ``prefix`` of the names, ``table: own`` for the predecessor.

    ConversionError for a mixture that the layout cannot hold.
    """
    speech = model.speech
    assert speech is not None
    _check_shape(model)
    rows = [row for row in trunk_rows(model) if row.layers is None or ".mlp." not in row.ours]
    last = max(i for i, row in enumerate(rows) if row.layers)
    rows[last + 1 : last + 1] = moe_rows(model) if model.moe is not None else dense_ffn_rows(model)
    outputs = model.vocab_size
    bias = Row(
        ours="language.output_layer.bias",
        theirs=(OUTPUT + "bias",),
        shapes=((outputs,),),
        transform=PadRows(outputs, padded_vocab_size(model)),
        cut=Cut(0),
    )
    prefix = options.get("prefix", PREFIX)
    return [_renamed(row, prefix) for row in [*_text_rows(model, speech, options), *rows, bias]]


def trunk_layer_rows(model: ModelConfig) -> list[Row]:
    """Layers and final norm of a dense Qwen2.5, under its own names."""
    rows = [*trunk_rows(model), *dense_ffn_rows(model)]
    layered = [row for row in rows if row.layers]
    return [*layered, next(row for row in rows if row.ours == "language.decoder.final_norm.weight")]


def table_rows(model: ModelConfig, options: Mapping[str, str]) -> list[Row]:
    """The table alone, from the word embeddings called ``options["key"]``."""
    assert model.speech is not None
    shape = model.speech.text_vocab_size, model.speech.text_hidden_size
    return [Row(ours="text_table.weight", theirs=(options["key"],), shapes=(shape,))]


def open_table(path: Path) -> tuple["KeptKeys", str]:
    """The word embeddings in a Hugging Face directory or a generator's, and their key."""
    for key in WORD_EMBEDDINGS:
        source = KeptKeys(weights_of(path), re.escape(key) + "$")
        if source.infos():
            return source, key
    raise ConversionError(f"{path}: expected word embeddings, one of {', '.join(WORD_EMBEDDINGS)}, found none")


def _text_rows(model: ModelConfig, speech: SpeechConfig, options: Mapping[str, str]) -> list[Row]:
    width, hidden = speech.text_hidden_size, model.hidden_size
    is_own = options.get("table") == "own"
    table = Row(
        ours="text_table.weight",
        theirs=(OWN_TABLE if is_own else TABLE,),
        shapes=((speech.text_vocab_size, width),),
    )
    if not is_own:
        shapes: dict[str, tuple[int, ...]] = {"weight": (hidden, width), "bias": (hidden,)}
        return [table] + [
            Row(ours=f"text_projection.{kind}", theirs=(PROJECTION + kind,), shapes=(shape,))
            for kind, shape in shapes.items()
        ]
    if width != hidden:
        raise ConversionError(
            f"model.speech.text_hidden_size={width}: the predecessor's table is as wide as the model, {hidden}"
        )
    fixed: dict[str, Transform] = {"weight": Fixed(hidden, True), "bias": Fixed(hidden, False)}
    return [table] + [
        Row(ours=f"text_projection.{kind}", theirs=(), shapes=(), transform=value) for kind, value in fixed.items()
    ]


def _renamed(row: Row, prefix: str) -> Row:
    names = []
    for name in row.theirs:
        for theirs, renamed in _RENAMED:
            if name.startswith(theirs):
                name = renamed + name.removeprefix(theirs)
                break
        names.append(prefix + name)
    return dataclasses.replace(row, theirs=tuple(names))


def _check_shape(model: ModelConfig) -> None:
    moe = model.moe
    if moe is not None and (moe.num_null_experts or moe.num_shared_experts):
        raise ConversionError(
            f"model.moe.num_null_experts={moe.num_null_experts}, num_shared_experts={moe.num_shared_experts}: a speech "
            "generator has routed experts alone; set both to 0"
        )
    if not (model.output_bias and model.untie_embeddings_and_output_weights and model.add_qkv_bias):
        raise ConversionError(
            f"model.output_bias={model.output_bias}, untie_embeddings_and_output_weights="
            f"{model.untie_embeddings_and_output_weights}, add_qkv_bias={model.add_qkv_bias}: the released speech generator "
            "has an output layer of its own with a bias, and biases of queries, keys and values; set all three to true"
        )


def released_arithmetic(model: ModelConfig) -> list[str]:
    """What the published code computes otherwise than ``model`` does, a line each."""
    found = []
    if model.rotary_base != ROTARY_BASE:
        found.append(f"model.rotary_base={model.rotary_base:g}, there {ROTARY_BASE:g}")
    if model.layernorm_epsilon != 1e-6:
        found.append(f"model.layernorm_epsilon={model.layernorm_epsilon:g}, there 1e-06")
    if model.moe is not None and model.moe.top_k != 2:
        found.append(f"model.moe.top_k={model.moe.top_k}, there 2")
    return found


# ------------------------------------------------------------------------------------------------ configuration


def released_moe(num_experts: int, ffn_hidden_size: int) -> MoEConfig:
    """DeepSpeed's top-2 gate as the release trains it, without its noise, its capacity and with a loss for balance."""
    return MoEConfig(
        num_routed_experts=num_experts,
        num_null_experts=0,
        num_shared_experts=0,
        moe_ffn_hidden_size=ffn_hidden_size,
        top_k=2,
        gradient_estimator="none",
        input_jitter=0.0,
        sample_experts=False,
        moe_aux_loss_coeff=0.01,
        moe_aux_loss_coeff_min=0.01,
    )


def speech_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` of an exported generator: the fields of the published module, and the model group of the recipe."""
    speech = model.speech
    assert speech is not None
    return {
        "architectures": ["LLM2TTSCodecAR"],
        "speech_generator_type": "ar_ori_v2_new",
        "torch_dtype": dtype,
        "idim": speech.text_hidden_size,
        "odim": speech.num_codes,
        "llm_vocab_size": speech.text_vocab_size,
        "transformer_attention_dim": model.hidden_size,
        "transformer_linear_units": model.moe.moe_ffn_hidden_size if model.moe is not None else model.ffn_hidden_size,
        "transformer_num_blocks": model.num_layers,
        "transformer_attention_heads": model.num_attention_heads,
        "transformer_kv_heads": model.num_query_groups,
        "transformer_dropout_rate": model.attention_dropout,
        "encoder_output_dim": model.hidden_size,
        "encoder_drop_rate": 0.0,
        "encoder_criterion": "ce",
        OURS: {"model": dataclasses.asdict(model)},
    }


class KeptKeys(HuggingFaceSource):
    """The tensors of a directory or file whose keys match ``pattern``; its configuration is not part of it."""

    def __init__(self, path: Path, pattern: str) -> None:
        super().__init__(path)
        self._kept = {key: info for key, info in super().infos().items() if re.match(pattern, key)}
        self.left_out = sorted(super().infos().keys() - self._kept.keys())

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._kept

    def files(self) -> list[Path]:
        return list(dict.fromkeys(info.path for info in self._kept.values()))


def weights_of(path: Path) -> Path:
    """The file, or directory with an index, that a generator's weights are read from; ``path`` may be the release."""
    for place in (path, path / "speech_gen"):
        for name in FILES:
            if (place / name).is_file():
                return place / name
    return path


def is_generator(path: Path) -> bool:
    """Whether a generator's weights lie at ``path``: its file, its folder, or an export of one; not a whole release."""
    said = _said(path / "config.json")
    if "model_type" in said:
        return False
    return path.is_file() or weights_of(path) != path or "speech_generator_type" in said


def open_source(path: Path) -> tuple[KeptKeys, dict[str, str]]:
    """Weights of the generator at ``path``, and the options of its rows. ConversionError where there is none."""
    source = KeptKeys(weights_of(path), "")
    prefix = PREFIX if any(key.startswith(PREFIX) for key in source.infos()) else ""
    if prefix:  # the whole release: its other weights are none of the generator's
        source = KeptKeys(weights_of(path), re.escape(prefix))
    if prefix + SPEECH_EMBEDDING not in source.infos():
        raise ConversionError(
            f"{source.path}: expected the key {prefix + SPEECH_EMBEDDING!r} of a speech generator, found none; give "
            f"{FILES[0]}, the folder that holds it, or a Uni-MoE-2.0-Omni directory"
        )
    return source, {"prefix": prefix, **({"table": "own"} if prefix + OWN_TABLE in source.infos() else {})}


def model_of(source: KeptKeys, options: Mapping[str, str], *, config: Path) -> ModelConfig:
    """The model whose weights ``source`` holds, by their shapes; ``config``: where a ``config.json`` may lie."""
    prefix = options["prefix"]
    shapes = {key.removeprefix(prefix): info.shape for key, info in source.infos().items()}
    place, said = source.path, _said(config)
    recorded = _recorded(said, config)
    table = OWN_TABLE if options.get("table") == "own" else TABLE
    (outputs, hidden), (text_vocab, text_hidden) = (
        _matrix(shapes, SPEECH_EMBEDDING, place),
        _matrix(shapes, table, place),
    )
    if outputs <= NUM_MARKS:
        raise ConversionError(f"{place}: {SPEECH_EMBEDDING!r}: expected more than {NUM_MARKS} rows, found {outputs}")
    layers = 1 + max((int(n) for n in _numbers(shapes, r"layers\.(\d+)\.")), default=-1)
    experts = 1 + max((int(n) for n in _numbers(shapes, r"layers\.\d+\..*deepspeed_experts\.(\d+)\.")), default=-1)
    _check_counts(place, layers, experts, len(shapes))
    first = SPEECH_ROUTED.format(layer=0, expert=0) if experts else "layers.0.mlp."
    ffn, _ = _matrix(shapes, first + "gate_proj.weight", place)
    (queries, _), (keys, _) = (_matrix(shapes, f"layers.0.self_attn.{name}_proj.weight", place) for name in "qk")
    head = _head_size(said, recorded, queries, config if said else place)
    base = recorded or ModelConfig(
        max_position_embeddings=MAX_POSITIONS, rotary_base=ROTARY_BASE, attention_dropout=0.0, vision=None, audio=None
    )
    moe = released_moe(experts, ffn) if experts else None
    if moe is not None and recorded is not None and recorded.moe is not None:
        moe = dataclasses.replace(recorded.moe, num_routed_experts=experts, moe_ffn_hidden_size=ffn)
    speech = SpeechConfig() if recorded is None or recorded.speech is None else recorded.speech
    return dataclasses.replace(
        base,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=queries // head,
        num_query_groups=keys // head,
        kv_channels=head,
        mrope_section=base.mrope_section if recorded is not None else [head // 2, 0, 0],
        vocab_size=outputs,
        output_bias=True,
        moe=moe,
        speech=dataclasses.replace(
            speech, num_codes=outputs - NUM_MARKS, text_vocab_size=text_vocab, text_hidden_size=text_hidden
        ),
    )


def generator_of(model: ModelConfig, table: tuple[int, ...]) -> ModelConfig:
    """A generator on the layers of a dense language ``model``, with a text table of shape ``table``."""
    if model.moe is not None or model.vision is not None or model.audio is not None:
        raise ConversionError("a speech generator starts from the layers of a dense text model (Qwen2.5-0.5B)")
    speech = SpeechConfig(text_vocab_size=table[0], text_hidden_size=table[1])
    return dataclasses.replace(
        model,
        vocab_size=speech.ids.num_outputs,
        untie_embeddings_and_output_weights=True,
        output_bias=True,
        rotary_base=ROTARY_BASE,
        mrope_section=[model.kv_channels // 2, 0, 0],
        max_position_embeddings=MAX_POSITIONS,
        speech=speech,
    )


def _said(config: Path) -> dict[str, Any]:
    return read_json(config) if config.is_file() else {}


def _recorded(said: Mapping[str, Any], config: Path) -> ModelConfig | None:
    """The recipe's model group that our export left, checked against the schema."""
    from megatron_omni.config.load import recipe_from_dict

    ours = said.get(OURS)
    if not isinstance(ours, dict) or not isinstance(ours.get("model"), dict) or not ours["model"].get("speech"):
        return None
    return recipe_from_dict({"model": ours["model"]}, origin=f"{config}: {OURS}").model


def _matrix(shapes: Mapping[str, tuple[int, ...]], key: str, place: Path) -> tuple[int, int]:
    found = shapes.get(key)
    if found is None or len(found) != 2 or not all(found):
        raise ConversionError(
            f"{place}: expected a matrix {key!r} of a speech generator, found {'none' if found is None else list(found)}"
        )
    return found[0], found[1]


def _numbers(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> set[str]:
    return {match[1] for key in shapes if (match := re.match(pattern, key))}


def _check_counts(place: Path, layers: int, experts: int, num_tensors: int) -> None:
    """A number in one key must not make rows for ever."""
    if layers == 0:
        raise ConversionError(f"{place}: expected keys 'layers.0...' of a speech generator, found none")
    if layers > num_tensors or experts > num_tensors:
        raise ConversionError(
            f"{place}: names layer {layers - 1} or expert {experts - 1}, which do not fit its {num_tensors} tensors"
        )


def _head_size(said: Mapping[str, Any], recorded: ModelConfig | None, queries: int, place: Path) -> int:
    """Width of a head, which no tensor says."""
    if recorded is not None:
        return recorded.kv_channels
    if "transformer_attention_heads" in said:
        heads = Fields(dict(said), place).size("transformer_attention_heads")
        if queries % heads:
            raise ConversionError(
                f"{place}: transformer_attention_heads: {heads} heads do not divide {queries} rows of q_proj"
            )
        return queries // heads
    if queries % HEAD_SIZE:
        raise ConversionError(
            f"{place}: {queries} rows of q_proj are no heads of {HEAD_SIZE}, the released width; put a config.json with "
            "transformer_attention_heads beside the weights"
        )
    return HEAD_SIZE
