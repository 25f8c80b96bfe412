"""Dense checkpoints into one mixture of experts with dynamic capacity, tensor by tensor (paper section 4; docs/upcycling.md).

    trunk (attention, norms, embeddings, output)   of the source named ``trunk``; where others differ from it, a warning
    routed experts E1 .. En                        the feed-forward parts of the sources, in order (vision, speech, speech, base)
    null experts                                   gate rows and nothing else
    shared expert s                                slice [s w, (s + 1) w) of the base feed-forward part: rows of gate and
                                                   up, columns of down; slices are disjoint
    gate                                           N(0, 0.02), [routed | null | shared] rows, seeded by its name
    rows of special tokens that the trunk's        mean of the other tokens' rows, in the embedding and the output matrix;
    tokenizer lacks                                the matrices grow only where these ids do not fit
    encoders and projectors                        vision from one source, audio from another

Speech generators (``model.speech``) are merged by the same rules: any number of dense ones in, routed experts in their
order out, no null and no shared experts; text table, projection, embeddings and output are part of the trunk.

The result is a :class:`~megatron_omni.checkpoint.sources.Source` of tensors in the released layout (``uni_moe.py``,
``uni_moe_speech.py``), made when they are asked for: the converter writes them as a distributed checkpoint or as a
Hugging Face directory. Nothing is held but the tensor in hand (and, for a comparison, pieces of the other sources').

F feed-forward width, w width of a shared expert, H hidden size.
"""

import dataclasses
import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_omni.checkpoint.commit import write_text
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.families import FAMILIES, Part
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.ledger import check_fields
from megatron_omni.checkpoint.names import Entry, expand
from megatron_omni.checkpoint.sources import Source, check_finite, read_json
from megatron_omni.checkpoint.tensor_files import ConversionError, TensorInfo, read_into, read_tensor, tensor_bytes
from megatron_omni.checkpoint.tokenizer_files import NEW_SPECIALS, copy_tokenizer, find_tokenizer
from megatron_omni.checkpoint.uni_moe import GENERATORS, unused_shapes
from megatron_omni.checkpoint.upcycle_shape import EMBEDDING, NAMES, check_mixture, upcycled_model
from megatron_omni.checkpoint.upcycle_sources import (
    DenseSource,
    OursSource,
    check_sources,
    family_of,
    merged_model,
    open_dense,
    perception_sources,
)
from megatron_omni.config.load import load_recipe, recipe_to_yaml
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.platform.seeds import named_generator

logger = logging.getLogger(__name__)

GATE_STD = 0.02
REPORT = "upcycle.json"
VOCABULARY_KEYS = (EMBEDDING, "lm_head.weight")
VISION_PREFIXES, AUDIO_PREFIXES = ("vision_tower.", "vision_aligner."), ("audio_tower.", "audio_aligner.")
PROJECTIONS = ("gate", "up", "down")
PIECE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a tensor of the result comes from."""

    source: str | None
    """Name of the source; None for what is drawn."""
    key: str | None
    how: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a source's tensors of one part lie from those that are used."""

    source: str
    part: str
    """``trunk``, ``vision`` or ``audio`` (encoder and projector)."""
    num_tensors: int
    """That differ."""
    largest: float
    """Largest relative difference |a - b| / |a| (Frobenius) of a tensor."""
    key: str
    """Of that tensor."""


@dataclass
class UpcycledSource:
    """The mixture as tensors in the released layout (a ``Source``)."""

    sources: Mapping[str, DenseSource]
    experts: tuple[str, ...]
    """Sources of the routed experts, in order; shared experts are slices of the last one."""
    trunk: str
    vision: str | None
    """Source of the vision encoder and projector; None for a model without."""
    audio: str | None
    model: ModelConfig
    """Of the result."""
    seed: int
    new_tokens: Mapping[str, int] = field(default_factory=dict)
    """Special tokens whose rows are set to the mean of the others."""
    label: str = "upcycled"
    origins: dict[str, Origin] = field(init=False)

    def __post_init__(self) -> None:
        assert self.model.moe is not None
        self.names = NAMES[family_of(self.model)]
        self._entries = expand(FAMILIES[self.names.family].rows(self.model, {}))
        self._shapes = _shapes(self._entries)
        self.origins = {key: self._origin(key) for key in self._shapes}
        for name, prefixes in ((self.vision, VISION_PREFIXES), (self.audio, AUDIO_PREFIXES)):
            self._add_unused(name, prefixes)
        self._gaps: dict[tuple[str, str], Difference] = {}
        self._infos = {key: self._info(key) for key in self.origins}

    # ------------------------------------------------------------------------------------------ as a Source

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the result; dtypes are those of the sources."""
        return self._infos

    def files(self) -> list[Path]:
        """Weights of all sources; their configurations describe dense models and stay behind."""
        files = [file for source in self.sources.values() for file in source.tensors.files()]
        return list(dict.fromkeys(file for file in files if file.suffix != ".json"))

    def read(self, key: str) -> Tensor:
        """Make one tensor."""
        origin, info = self.origins[key], self._infos[key]
        if origin.source is None:
            generator = named_generator(self.seed, "upcycle", key)
            tensor = torch.empty(info.shape).normal_(std=GATE_STD, generator=generator).to(info.dtype)
        else:
            tensor = self._read_finite(origin)
            if (part := self._part(key)) is not None:
                self._compare(part, key, tensor)
            if key in VOCABULARY_KEYS:
                tensor = self._with_new_rows(tensor)
        assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype, key
        return tensor

    # ------------------------------------------------------------------------------------------ reports

    def differences(self) -> list[Difference]:
        """Sources whose trunk or encoders are not the chosen ones, by what was read so far."""
        return list(self._gaps.values())

    def left_out(self) -> list[str]:
        """What sources have and the result has not: encoders that are configured otherwise, generators."""
        found = []
        for source in self.sources.values():
            for kind in ("vision", "audio"):
                theirs, chosen = getattr(source.model, kind), getattr(self.model, kind)
                if theirs is not None and theirs != chosen:
                    found.append(f"{source.path}: its {kind} encoder, which is not configured as the one that is used")
            number = sum(any(re.fullmatch(p, key) for p in GENERATORS) for key in source.tensors.infos())
            if number:
                found.append(f"{source.path}: {number} weights of generators; carry them with an import of their own")
            if number := getattr(source.tensors, "num_left_out", 0):
                found.append(f"{source.path}: {number} carried weights that the released layout has no place for")
        return found

    def report(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``upcycle.json``: ``lines`` are the ledger's, one for each tensor that was written, with its checksum."""
        return {
            "trunk": self.trunk,
            "experts": list(self.experts),
            "vision": self.vision,
            "audio": self.audio,
            "seed": self.seed,
            "sources": {name: str(source.path.absolute()) for name, source in self.sources.items()},
            "new_token_rows": dict(self.new_tokens),
            "differences": [dataclasses.asdict(difference) for difference in self.differences()],
            "tensors": [
                {
                    **{name: line[name] for name in ("key", "expert", "dtype", "shape", "sha256") if name in line},
                    "from": [{"as": key, **self._said(key)} for key in line["from"]],
                }
                for line in lines
            ],
        }

    def _said(self, key: str) -> dict[str, Any]:
        origin = self.origins[key]
        return {"source": origin.source, "key": origin.key, "how": origin.how}

    # ------------------------------------------------------------------------------------------ plan

    def _origin(self, key: str) -> Origin:
        names = self.names
        found = re.match(re.escape(names.block).replace(r"\{layer\}", r"(\d+)"), key)
        layer = found[1] if found else ""
        if key == names.gate.replace("{layer}", layer):
            return Origin(source=None, key=None, how=f"drawn from N(0, {GATE_STD}), seed {self.seed}")
        projection = key.rsplit(".", 2)[-2]
        dense = f"{names.block.format(layer=layer)}mlp.{projection}.weight"
        for number, name in enumerate(self.experts):
            if layer and key.startswith(names.routed.format(layer=layer, expert=number)):
                return Origin(source=name, key=dense, how=f"routed expert {number}: the feed-forward part")
        moe = self.model.moe
        assert moe is not None
        width, base = moe.moe_shared_expert_intermediate_size, self.experts[-1]
        for number in range(moe.num_shared_experts if layer and names.shared else 0):
            assert names.shared is not None
            if key.startswith(names.shared.format(layer=layer, shared=number)):
                part = (number * width, (number + 1) * width)
                axis = "columns" if projection == "down_proj" else "rows"
                how = f"shared expert {number}: {axis} {part[0]}..{part[1] - 1} of the feed-forward part"
                return Origin(source=base, key=dense, how=how, **{axis: part})  # type: ignore[arg-type]
        if key.startswith(VISION_PREFIXES):
            return Origin(source=self.vision, key=key, how="copied")
        if key.startswith(AUDIO_PREFIXES):
            return Origin(source=self.audio, key=key, how="copied")
        how = "copied"
        if key in VOCABULARY_KEYS and self.new_tokens:
            ids = sorted(self.new_tokens.values())
            how = f"copied; {len(ids)} rows {ids[0]}..{ids[-1]} of new special tokens are the mean of the others"
        return Origin(source=self.trunk, key=key, how=how)

    def _add_unused(self, name: str | None, prefixes: tuple[str, ...]) -> None:
        """Weights of the release that nothing reads, where the source has them."""
        if name is None:
            return
        present = self.sources[name].tensors.infos()
        for key in unused_shapes(self.model):
            if key.startswith(prefixes) and key in present:
                self.origins[key] = Origin(source=name, key=key, how="copied; not used by the model")
                self._shapes[key] = present[key].shape

    def _info(self, key: str) -> TensorInfo:
        """What it will be: every source was checked, so that only its dtype is to be asked."""
        origin = self.origins[key]
        source = self.sources[origin.source if origin.source is not None else self.trunk].tensors.infos()
        dtype = source[origin.key if origin.key is not None else self.names.embedding].dtype
        return TensorInfo(Path(self.label), key, dtype, self._shapes[key], 0)

    # ------------------------------------------------------------------------------------------ making

    def _part(self, key: str) -> str | None:
        """What ``key`` belongs to where other sources may have a tensor of its name that is not used."""
        if key.startswith(VISION_PREFIXES):
            return "vision"
        if key.startswith(AUDIO_PREFIXES):
            return "audio"
        return "trunk" if self.origins[key].how.startswith("copied") else None

    def _with_new_rows(self, matrix: Tensor) -> Tensor:
        """``matrix`` [V, H] with the mean of the old tokens' rows in the rows of the new ones, grown if they lie beyond."""
        new = sorted(self.new_tokens.values())
        if not new:
            return matrix
        vocabulary = self.sources[self.trunk].vocabulary
        assert vocabulary is not None
        ids = min(vocabulary.size, matrix.shape[0])  # rows beyond the tokenizer's ids stand for nothing
        there = [i for i in new if i < ids]
        total = sum(rows.double().sum(0) for rows in matrix[:ids].split(4096)) - matrix[there].double().sum(0)
        mean = total / (ids - len(there))
        if self.model.vocab_size > matrix.shape[0]:
            grown = matrix.new_zeros(self.model.vocab_size, matrix.shape[1])
            grown[: matrix.shape[0]] = matrix
            matrix = grown
        matrix[new] = mean.to(matrix.dtype)
        return matrix

    def _read_finite(self, origin: Origin) -> Tensor:
        assert origin.source is not None and origin.key is not None
        source = self.sources[origin.source].tensors
        info = source.infos()[origin.key]
        if origin.rows is not None:
            tensor = _read_rows(source, info, *origin.rows)
        elif origin.columns is not None:
            tensor = _read_columns(source, info, *origin.columns)
        else:
            tensor = source.read(origin.key)
        check_finite(tensor, info)
        return tensor

    def _compare(self, part: str, key: str, ours: Tensor) -> None:
        """Note how far the other sources' tensors ``key`` lie from ``ours``."""
        origin = self.origins[key].source
        assert origin is not None
        used = self.sources[origin].tensors.infos()[key]
        for name, source in self.sources.items():
            info = source.tensors.infos().get(key)
            if name == origin or info is None or info.shape != used.shape or (info == used and info.offset):
                continue  # absent, said by left_out, or the same bytes of the same file
            squared = 0.0
            for rows, piece in _pieces(source.tensors, info):
                if ours.dtype != piece.dtype or not torch.equal(ours[rows], piece):
                    check_finite(piece, info)
                    squared += float((ours[rows].double() - piece.double()).square().sum())
            if squared == 0.0:
                continue
            norm = sum(float(rows.double().square().sum()) for rows in ours.split(4096))
            relative = math.sqrt(squared / norm) if norm else math.inf
            before = self._gaps.get((name, part))
            if before is None or relative > before.largest:
                at, largest = key, relative
            else:
                at, largest = before.key, before.largest
            count = 1 + (before.num_tensors if before is not None else 0)
            self._gaps[name, part] = Difference(source=name, part=part, num_tensors=count, largest=largest, key=at)


def upcycle(
    paths: Mapping[str, Path],
    out: Path,
    *,
    trunk: str = "base",
    experts: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    layout: Layout | None = None,
    dtype: str = "auto",
    seed: int = 3407,
    token_rows: Literal["auto", "mean", "keep"] = "auto",
) -> Path:
    """Write ``out/checkpoints/iter_0000000`` from the dense checkpoints ``paths``; the directory.

    ``paths`` are in the order of the routed experts, the base last; ``experts`` names those that become one where a
    further source gives the trunk alone. ``overrides`` change the recipe (``model.moe.*``).
    ``token_rows``: rows of the special tokens that Qwen2.5 does not have. ``mean`` sets them to the mean of the others,
    ``auto`` does so unless the trunk's source knows better: a run has trained them, a directory whose tokenizer has them
    brings rows for them. ValueError for sources that do not fit together.
    """
    experts = tuple(paths if experts is None else experts)
    sources = {name: open_dense(name, path) for name, path in paths.items()}
    for note in check_sources(sources, trunk=trunk):
        logger.warning("%s", note)
    main = sources[trunk]
    assert main.vocabulary is not None
    new_tokens = _new_tokens(main, token_rows)
    base = merged_model(sources, trunk=trunk)
    num_rows = base.vocab_size if base.speech is None else base.speech.text_vocab_size
    if new_tokens:
        base = dataclasses.replace(base, vocab_size=max(base.vocab_size, main.vocabulary.size))
    elif main.vocabulary.size > num_rows:
        raise ValueError(
            f"{main.path}: expected rows for {main.vocabulary.size} token ids, found {num_rows}; choose --token-rows mean"
        )
    recipe = _recipe(upcycled_model(base, num_experts=len(experts)), overrides)
    check_mixture(recipe.model, base, num_experts=len(experts))
    vision, audio = perception_sources(sources, trunk=trunk)
    made = UpcycledSource(
        sources=sources,
        experts=experts,
        trunk=trunk,
        vision=vision,
        audio=audio,
        model=recipe.model,
        seed=seed,
        new_tokens=new_tokens,
    )
    family = FAMILIES[made.names.family]
    part = Part(family=made.names.family, source=made, rows=family.rows(recipe.model, {}), carried=family.carried)

    def report(directory: Path, ledger: Mapping[str, Any]) -> None:
        write_text(directory / REPORT, json.dumps(made.report(ledger["tensors"]), indent=1))

    with tempfile.TemporaryDirectory() as tokenizer:
        copy_tokenizer(main.vocabulary.path, Path(tokenizer))
        directory = import_checkpoint(
            [part], recipe, out, wanted=part.rows, layout=layout, dtype=dtype, tokenizer=find_tokenizer(Path(tokenizer)),
            command="upcycle", finishing=report,
        )  # fmt: skip
    for gap in made.differences():
        used = {"trunk": trunk, "vision": vision, "audio": audio}[gap.part]
        logger.warning(
            "the %s of %s differs from that of %s, which is used: %d tensors, the largest relative difference %.3g in %s",
            gap.part, gap.source, used, gap.num_tensors, gap.largest, gap.key,
        )  # fmt: skip
    for said in made.left_out():
        logger.warning("left out: %s", said)
    return directory


def read_report(path: Path) -> dict[str, Any]:
    """``upcycle.json``; ConversionError for one that is damaged."""
    report = read_json(path)
    kinds = {"sources": dict, "experts": list, "trunk": str, "seed": int, "new_token_rows": dict}
    check_fields([report], kinds, where=str(path))
    if unknown := {report["trunk"], *report["experts"]} - report["sources"].keys():
        raise ConversionError(f"{path}: damaged: names the source {unknown.pop()!r}, which it does not list")
    return report


def reopen(report: Mapping[str, Any], model: ModelConfig) -> UpcycledSource:
    """What made the directory with the ``upcycle.json`` ``report`` and the ``model``, from its sources once more."""
    return UpcycledSource(
        sources={name: open_dense(name, Path(path)) for name, path in report["sources"].items()},
        experts=tuple(report["experts"]),
        trunk=report["trunk"],
        vision=report.get("vision"),
        audio=report.get("audio"),
        model=model,
        seed=report["seed"],
        new_tokens=report["new_token_rows"],
    )


def _new_tokens(trunk: DenseSource, rule: str) -> dict[str, int]:
    vocabulary = trunk.vocabulary
    assert vocabulary is not None
    if trunk.model.speech is not None:
        if rule == "mean":
            raise ValueError(
                f"--token-rows mean: the text table of {trunk.path}, a speech generator, is another model's and is not "
                "trained; leave it out"
            )
        return {}
    if rule == "mean":
        return {name: vocabulary.specials[name] for name in NEW_SPECIALS if name in vocabulary.specials}
    untrained = trunk.tensors.untrained if isinstance(trunk.tensors, OursSource) else vocabulary.appended
    return dict(untrained) if rule == "auto" else {}


def _recipe(model: ModelConfig, overrides: Sequence[str]) -> Recipe:
    """A recipe of ``model`` with ``key=value`` changes, checked as any recipe is."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "upcycled.yaml"
        path.write_text(recipe_to_yaml(Recipe(model=model)), encoding="utf-8")
        return load_recipe(path, list(overrides))


def _shapes(entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    return {key: shape for entry in entries for key, shape in zip(entry.theirs, entry.shapes)}


def _pieces(source: Source, info: TensorInfo) -> Iterator[tuple[slice, Tensor]]:
    """The tensor at ``info`` in slices of its rows: cut from one read where it does not lie plainly in a file."""
    rows = info.shape[0] if info.shape else 1
    step = max(1, PIECE_BYTES // max(1, info.num_bytes // max(1, rows)))
    whole = source.read(info.key) if info.offset == 0 or step >= rows else None
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        yield part, _read_rows(source, info, part.start, part.stop) if whole is None else whole[part]


def _read_rows(source: Source, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows ``start`` .. ``stop`` - 1, and only their bytes where the tensor lies in a file."""
    if info.offset == 0:
        return source.read(info.key)[start:stop].clone()
    row = info.num_bytes // info.shape[0]
    return read_tensor(
        dataclasses.replace(info, shape=(stop - start, *info.shape[1:]), offset=info.offset + start * row)
    )


def _read_columns(source: Source, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Columns ``start`` .. ``stop`` - 1 of a matrix, row by row where it lies in a file."""
    if info.offset == 0:
        return source.read(info.key)[:, start:stop].contiguous()
    part = torch.empty(info.shape[0], stop - start, dtype=info.dtype)
    size = info.dtype.itemsize
    with info.path.open("rb", buffering=0) as file:
        for number, row in enumerate(part):
            offset = info.offset + (number * info.shape[1] + start) * size
            read_into(file, tensor_bytes(row), offset, what=f"{info.path}: {info.key!r}")
    return part
