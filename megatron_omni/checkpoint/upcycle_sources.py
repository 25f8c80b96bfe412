"""The dense checkpoints that are upcycled, of either kind, under Hugging Face names, and whether they fit together.

A source is a Hugging Face directory (Qwen2.5, or a dense model in the Uni-MoE layout), a dense speech generator in its
released layout, or a checkpoint of a run here, whose
tensors are given their Hugging Face names as they are read. Every key and shape of each is checked before anything is
written, by the same plan that an import makes.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.convert import CARRIED
from megatron_omni.checkpoint.export import Opened, open_ours
from megatron_omni.checkpoint.families import FAMILIES, Part, open_language, open_speech, their_name
from megatron_omni.checkpoint.meaning import Change, changes
from megatron_omni.checkpoint.names import Entry, expand
from megatron_omni.checkpoint.plan import make_plan
from megatron_omni.checkpoint.sources import Source
from megatron_omni.checkpoint.tensor_files import ConversionError, TensorInfo, read_tensor
from megatron_omni.checkpoint.tokenizer_files import Vocabulary, check_same, find_tokenizer, read_vocabulary
from megatron_omni.checkpoint.uni_moe_speech import PREFIX, is_generator
from megatron_omni.config.model import ModelConfig

SAME_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "add_qkv_bias", "untie_embeddings_and_output_weights", "rotary_base", "layernorm_epsilon",
)  # fmt: skip
"""Of the language model: what sources must agree about, or their weights do not fit together."""


@dataclass(frozen=True, kw_only=True)
class DenseSource:
    """One dense checkpoint as tensors in Hugging Face names."""

    name: str
    """As ``--trunk`` names it: base, vision, speech1, speech2, expert1."""
    path: Path
    tensors: Source
    model: ModelConfig
    vocabulary: Vocabulary | None
    """None where it brings no tokenizer."""


class OursSource:
    """A distributed checkpoint as tensors in the released layout."""

    def __init__(self, opened: Opened) -> None:
        self.label = str(opened.directory)
        family = family_of(opened.recipe.model)
        self.untrained: dict[str, int] = opened.ledger.get("appended_tokens", {})
        """Special tokens whose rows nobody has trained; a run, which has no ledger, trains all of them."""
        self._opened = opened
        self._places: dict[str, tuple[Entry, int]] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._last: tuple[Entry, list[Tensor]] | None = None
        stored = opened.reader.tensors
        for entry in expand(FAMILIES[family].rows(opened.recipe.model, {})):
            found = stored.get(entry.ours)
            if found is None:
                raise ConversionError(
                    f"{opened.directory}: expected the tensor {entry.ours!r}, found none of that name"
                )
            if found.shape != entry.global_shape:
                raise ConversionError(
                    f"{opened.directory}: {entry.ours!r}: expected shape {list(entry.global_shape)}, found "
                    f"{list(found.shape)}"
                )
            for part, (key, shape) in enumerate(zip(entry.theirs, entry.shapes)):
                self._places[key] = entry, part
                self._infos[key] = TensorInfo(opened.directory, key, found.dtype, shape, 0)
        known = FAMILIES[family].carried
        carried = {their_name(family, {}, name): info for name, info in opened.carried.items()}
        self._carried = {
            key: dataclasses.replace(info, key=key)
            for key, info in carried.items()
            if key is not None and any(re.fullmatch(pattern, key) for pattern in known)
        }
        self.num_left_out = len(opened.carried) - len(self._carried)
        """Carried weights that the released layout has no place for: SigLIP's last layer and text tower."""
        self._infos |= self._carried

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, key: str) -> Tensor:
        """The gate and up matrices of a layer are one tensor here, read once for both."""
        if key in self._carried:
            return read_tensor(self._carried[key])
        entry, part = self._places[key]
        if self._last is None or self._last[0] is not entry:
            self._last = None
            tensor = self._opened.reader.read(entry.ours, index=entry.expert)
            pieces = entry.transform.to_theirs(tensor)
            if len(pieces) == 1:  # an embedding matrix is not held twice
                return pieces[0].contiguous()
            self._last = entry, [piece.clone() for piece in pieces]
        _, parts = self._last
        if part == len(parts) - 1:
            self._last = None
        return parts[part].clone() if part < len(parts) - 1 else parts[part]

    def files(self) -> list[Path]:
        directory = self._opened.directory
        beside = [directory / name for name in (".metadata", CARRIED)]
        return [*sorted(directory.glob("*.distcp")), *(file for file in beside if file.is_file())]


class Prefixed:
    """A speech generator whose keys lack the prefix that the release gives them among other weights."""

    def __init__(self, source: Source) -> None:
        self.label, self._source = source.label, source
        self._infos = {
            PREFIX + key: dataclasses.replace(info, key=PREFIX + key) for key, info in source.infos().items()
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, key: str) -> Tensor:
        """One tensor."""
        return self._source.read(key.removeprefix(PREFIX))

    def files(self) -> list[Path]:
        return self._source.files()


def family_of(model: ModelConfig) -> str:
    """The layout that a mixture of models like this is written in."""
    return "uni_moe" if model.speech is None else "speech_gen"


def open_dense(name: str, path: Path) -> DenseSource:
    """The dense checkpoint at ``path``: a Hugging Face directory, a speech generator, a run, or one checkpoint of ours.

    ConversionError names the file, the key or field, what was expected and what was found.
    """
    path = path.absolute()  # upcycle.json keeps it
    source: Source | None = None
    if is_generator(path):
        model, part = open_speech(path)
        directory = path if path.is_dir() else path.parent
        if "table" in part.options:
            raise ConversionError(
                f"{path}: is a predecessor with a text table of its own; bring it into today's layout first (megatron-omni "
                "convert import --speech), and name what that writes"
            )
        source = part.source if part.options["prefix"] else Prefixed(part.source)
    elif (path / "config.json").is_file():
        model, part = open_language(path)
        directory = path
    else:
        try:
            opened = open_ours(path, check=True)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error
        model, directory = opened.recipe.model, opened.directory
        if model.moe is None:
            family = FAMILIES[family_of(model)]
            part = Part(
                family=family_of(model),
                source=OursSource(opened),
                rows=family.rows(model, {}),
                carried=family.carried,
            )
    if model.moe is not None:
        raise ConversionError(f"{path}: is a mixture of experts already; expected a dense checkpoint")
    make_plan([part], part.rows)
    tokenizer = find_tokenizer(directory)
    return DenseSource(
        name=name,
        path=path,
        tensors=source if source is not None else part.source,
        model=model,
        vocabulary=None if tokenizer is None else read_vocabulary(tokenizer),
    )


def _disagreements(now: ModelConfig, then: ModelConfig) -> list[Change]:
    """What keeps two dense models from being merged. Each may have encoders of its own; where one has none, what only
    media have (their positions) is unknown of it.
    """
    both_ways = {change.field for change in changes(then, now)}
    return [
        change
        for change in changes(now, then)
        if change.field in both_ways and not change.field.startswith(("model.vision.", "model.audio.", "model.image."))
    ]


def check_sources(sources: Mapping[str, DenseSource], *, trunk: str) -> list[str]:
    """ValueError unless the sources fit together; notes about what could not be checked."""
    notes: list[str] = []
    if trunk not in sources:
        raise ValueError(f"--trunk {trunk}: there is no such source; choose one of {', '.join(sources)}")
    main = sources[trunk]
    for other in sources.values():
        if (other.model.speech is None) != (main.model.speech is None):
            kinds = ["a language model" if s.model.speech is None else "a speech generator" for s in (other, main)]
            raise ConversionError(
                f"{other.path}: is {kinds[0]}, and {main.path} is {kinds[1]}; only models of one kind can be merged"
            )
    if main.vocabulary is None:
        raise ConversionError(f"{main.path}: expected a tokenizer (tokenizer.json or tokenizer.model), found none")
    for other in sources.values():
        for change in _disagreements(other.model, main.model):
            raise ConversionError(
                f"{other.path}: {change.field}: expected {change.then} as in {main.path}, found {change.now}; only models "
                "of one architecture and size, whose weights mean the same, can be merged"
            )
        if other.vocabulary is None:
            notes.append(f"{other.path}: has no tokenizer, so nothing shows that it was trained with {main.path}'s")
        else:
            check_same(main.vocabulary, other.vocabulary)
    return notes


def perception_sources(sources: Mapping[str, DenseSource], *, trunk: str) -> tuple[str | None, str | None]:
    """Names of the sources that the vision and the audio encoder come from; None where nobody has one.

    Vision from the vision run, audio from the first speech run, else from the trunk's source, else from whoever has it.
    """

    def first(kind: str, preferred: str) -> str | None:
        names = dict.fromkeys([preferred, trunk, *sources])
        return next((n for n in names if n in sources and getattr(sources[n].model, kind) is not None), None)

    return first("vision", "vision"), first("audio", "speech1")


def merged_model(sources: Mapping[str, DenseSource], *, trunk: str) -> ModelConfig:
    """The dense model of the trunk's source with the encoders' shapes of theirs."""
    vision, audio = perception_sources(sources, trunk=trunk)
    return dataclasses.replace(
        sources[trunk].model,
        vision=sources[vision].model.vision if vision else None,
        audio=sources[audio].model.audio if audio else None,
        image=None,
    )
