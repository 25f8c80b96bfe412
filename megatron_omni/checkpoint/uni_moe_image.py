"""The picture generator of Uni-MoE-2.0-Omni, and PixWizard's own file: their keys, both ways. Every weight is as it is there.

    ours                              the release                          PixWizard
    image.dit.X                       image_generator.model.X              X (``consolidated[_ema].00-of-01.pth``)
    image.caption.X                   image_hidden_fcs.0.X                 -
    image.task.X                      task_hidden_fcs.0.X                  -
    image.visual.X                    visual_hidden_fcs.0.X                -
    image.null_caption.weight         image_generator.null_caption.weight  -   ours alone: see below
    image.null_task.weight            image_generator.null_task.weight     -   ours alone
    (carried)                         image_generator.vae.X                -   read from a folder of diffusers' instead

The release keeps the caption of a picture without words in a file of its code, ``blank_caps.pt`` [2, 256, 2048], and reads the
first row of its second entry: that is ``null_caption``. Without the file it is zeros, which adds nothing to a picture; a guided
one is then another than the release's. Exports write both nulls under names that the published loader does not know and passes
over.

The release's ``config.json`` says that there is a generator, not how large it is: sizes are read off the weights. What no weight
says is as published: patches of 2, heads of the projectors 4, 256 chosen vision rows.

Sources: the published code of Uni-MoE-2.0-Omni (modeling_out.py, visual_gen_projector/layers.py) and of PixWizard
(models/model.py); the key list in docs/images_out.md. No released file was at hand.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_omni.checkpoint.hf_config import Fields
from megatron_omni.checkpoint.names import Row, Shape
from megatron_omni.checkpoint.sources import HuggingFaceSource, Source, ValuesSource
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.uni_moe import OURS as RECORDED
from megatron_omni.checkpoint.uni_moe import recorded_model
from megatron_omni.checkpoint.uni_moe_speech import KeptKeys
from megatron_omni.config.model import ModelConfig, VisionConfig
from megatron_omni.config.pictures import DiTConfig, ImageGeneratorConfig, ProjectorConfig, SamplingConfig
from megatron_omni.models.generators.image import ImageGenerator

OURS = "image."
DIT, CAPTION, TASK, VISUAL = (
    "image_generator.model.", "image_hidden_fcs.0.", "task_hidden_fcs.0.", "visual_hidden_fcs.0.",
)  # fmt: skip
NULLS = ("null_caption.", "null_task.")
PREFIXES = {
    "dit.": DIT, "caption.": CAPTION, "task.": TASK, "visual.": VISUAL, **{null: f"image_generator.{null}" for null in NULLS},
}  # fmt: skip
"""Ours, behind ``image.``, and theirs."""
KEYS = r"image_generator\.|(image|task|visual)_hidden_fcs\."
"""Pattern of what the generator's keys begin with, its VAE's among them."""
FIRST = "x_embedder.weight"
"""A key that every DiT of this kind has."""
PIXWIZARD_FILES = ("consolidated_ema.00-of-01.pth", "consolidated.00-of-01.pth")
"""In PixWizard's folder; the averaged weights are the ones that it draws with."""
BLANK_CAPTIONS = "blank_caps.pt"
NULLS_APART = "nulls"
"""Option of a source that has no nulls."""
RELEASED = ImageGeneratorConfig(
    projectors=ProjectorConfig(query_init="zero", input_positions=False),
    sampling=SamplingConfig(steps=59, guided_channels=3),
    image_token_repeat=2,
    blank_source="white",
    release=True,
)
"""As the published code draws, which calls 59 steps 60."""

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ weights


def image_rows(model: ModelConfig, options: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of the generator and its projectors under the release's names; none where the model does not draw.

    ``options``: ``nulls: apart`` leaves the nulls out, ``projectors: none`` the projectors of a generator that learned from
    teachers.
    """
    options = options or {}
    if model.image is None:
        return []
    shapes = _our_shapes(model, projectors=options.get("projectors") != "none")
    left_out = NULLS if options.get(NULLS_APART) == "apart" else ()
    return [_row(name, _their_name(name), shape) for name, shape in shapes.items() if not name.startswith(left_out)]


def null_rows(model: ModelConfig) -> list[Row]:
    """Of the null caption, which a release does not have among its weights."""
    return [row for row in image_rows(model) if row.ours.startswith(OURS + NULLS[0])]


def pixwizard_rows(model: ModelConfig, options: Mapping[str, str]) -> list[Row]:
    """Rows of the DiT alone, under PixWizard's own names."""
    prefix = options.get("prefix", "")
    shapes = _our_shapes(model, projectors=False)
    return [
        _row(name, prefix + name.removeprefix("dit."), shape)
        for name, shape in shapes.items()
        if name.startswith("dit.")
    ]


def _our_shapes(model: ModelConfig, *, projectors: bool) -> dict[str, Shape]:
    assert model.image is not None
    with torch.device("meta"):
        module: nn.Module = ImageGenerator(
            model.image, model.hidden_size, visual=model.vision is not None, projectors=projectors
        )
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _row(ours: str, theirs: str, shape: Shape) -> Row:
    return Row(ours=OURS + ours, theirs=(theirs,), shapes=(shape,))


def _their_name(name: str) -> str:
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def nulls_source(model: ModelConfig, file: Path | None) -> ValuesSource:
    """The null caption for a model whose source has none: of ``file`` (``blank_caps.pt``), else zeros and a warning.

    ConversionError for another file.
    """
    image = model.image
    assert image is not None
    if file is not None:
        row = _blank_caption(file, image.dit.caption_size)
    else:
        row = torch.zeros(1, image.dit.caption_size, dtype=torch.bfloat16)
        logger.warning(
            "no --blank-captions %s of the published code: the caption of a picture without words is zeros, and a guided "
            "picture is another than the release's", BLANK_CAPTIONS,
        )  # fmt: skip
    values = {entry.theirs[0]: row for entry in null_rows(model)}
    return ValuesSource("zeros" if file is None else str(file.absolute()), values)


def _blank_caption(file: Path, size: int) -> Tensor:
    """[1, size]: the first row of the second entry."""
    if not file.is_file():
        raise ConversionError(f"--blank-captions {file}: no such file")
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"{file}: not readable as a tensor ({type(error).__name__}: {reason})") from error
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if (
        not isinstance(value, Tensor)
        or value.dim() != 3
        or len(value) != 2
        or value.shape[2] != size
        or not value.shape[1]
    ):
        raise ConversionError(f"{file}: expected a tensor [2, tokens, {size}], found {found}")
    if not value.is_floating_point() or not bool(value.isfinite().all()):
        raise ConversionError(f"{file}: has values that are no finite numbers")
    return value[1, :1].clone()


# ------------------------------------------------------------------------------------------------ configuration


def image_of(source: Source, recorded: ImageGeneratorConfig | None) -> ImageGeneratorConfig | None:
    """The generator whose weights are in ``source`` under the release's names; None where it has none.

    ``recorded``: what our export left of its configuration, which says what weights do not.
    """
    shapes = {key: info.shape for key, info in source.infos().items()}
    if DIT + FIRST not in shapes:
        return recorded
    base = recorded or RELEASED
    dit = {key.removeprefix(DIT): shape for key, shape in shapes.items() if key.startswith(DIT)}
    image = dataclasses.replace(base, dit=_dit_of(dit, base.dit, source.label))
    if CAPTION + "in_fc.weight" not in shapes:
        return image
    caption = {key.removeprefix(CAPTION): shape for key, shape in shapes.items() if key.startswith(CAPTION)}
    return dataclasses.replace(image, projectors=_projectors_of(caption, base.projectors, source.label))


def _dit_of(shapes: Mapping[str, Shape], base: DiTConfig, place: str) -> DiTConfig:
    """Sizes of the DiT with weights of ``shapes``; what they do not say is of ``base``."""
    get = _Shapes(shapes, place)
    hidden, read = get.matrix(FIRST)
    heads = get.vector("layers.0.attention.gate")
    keys, caption = get.matrix("layers.0.attention.wk_y.weight")
    condition, task = get.matrix("task_embedder.1.weight")
    _, vision = get.matrix("layers.0.input_image_proj.weight")
    written, _ = get.matrix("final_layer.linear.weight")
    patch = base.patch_size**2
    if hidden % (4 * heads) or keys % (hidden // heads) or read % (2 * patch) or written not in (read // 2, read):
        raise ConversionError(
            f"{place}: {heads} heads of {hidden} channels, keys of {keys}, {read} values in and {written} out of a patch of "
            f"{base.patch_size} x {base.patch_size} are no generator of PixWizard's kind"
        )
    return dataclasses.replace(
        base,
        hidden_size=hidden,
        num_layers=get.count(r"layers\.(\d+)\."),
        num_attention_heads=heads,
        num_query_groups=keys // (hidden // heads),
        ffn_hidden_size=get.matrix("layers.0.feed_forward.w1.weight")[0],
        condition_size=condition,
        caption_size=caption,
        task_size=task,
        vision_size=vision,
        latent_channels=read // (2 * patch),
        learn_sigma=written == read,
    )


def _projectors_of(shapes: Mapping[str, Shape], base: ProjectorConfig, place: str) -> ProjectorConfig:
    get = _Shapes(shapes, place)
    queries = shapes.get("query_embs", ())
    if len(queries) != 3:
        raise ConversionError(
            f"{place}: '{CAPTION}query_embs': expected [1, rows, width], found {list(queries) or 'none'}"
        )
    return dataclasses.replace(
        base,
        hidden_size=get.matrix("in_fc.weight")[0],
        num_layers=get.count(r"tfm\.encoder\.layers\.(\d+)\."),
        ffn_hidden_size=get.matrix("tfm.encoder.layers.0.linear1.weight")[0],
        num_caption_rows=queries[1],
        input_positions="input_positions" in shapes,
    )


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Shapes by key; what is not there or of another kind is one error."""

    found: Mapping[str, Shape]
    place: str

    def matrix(self, key: str) -> tuple[int, int]:
        """Rows and columns."""
        shape = self.found.get(key, ())
        if len(shape) != 2 or not all(shape):
            raise ConversionError(
                f"{self.place}: expected a matrix {key!r} of a picture generator, found {self._said(key)}"
            )
        return shape[0], shape[1]

    def vector(self, key: str) -> int:
        """Length."""
        shape = self.found.get(key, ())
        if len(shape) != 1 or not all(shape):
            raise ConversionError(
                f"{self.place}: expected a vector {key!r} of a picture generator, found {self._said(key)}"
            )
        return shape[0]

    def count(self, pattern: str) -> int:
        """Layers whose number ``pattern`` finds; a number in one key must not make rows for ever."""
        numbers = {int(match[1]) for key in self.found if (match := re.match(pattern, key))}
        count = 1 + max(numbers, default=-1)
        if not 0 < count <= len(self.found):
            raise ConversionError(f"{self.place}: {count} layers do not fit its {len(self.found)} tensors")
        return count

    def _said(self, key: str) -> str:
        return str(list(self.found[key])) if key in self.found else "none"


def image_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` of an exported generator: the model group of the recipe."""
    return {
        "architectures": ["image_generator"],
        "torch_dtype": dtype,
        "tune_image_generator": True,
        RECORDED: {"model": dataclasses.asdict(model)},
    }


# ------------------------------------------------------------------------------------------------ sources


def open_image(path: Path) -> tuple[ModelConfig, str, Source, dict[str, str]]:
    """The generator at ``path``: a release's directory, PixWizard's file or the folder that holds it.

    Its model (the generator alone), family, weights, and the options of its rows.
    """
    place = next((path / name for name in PIXWIZARD_FILES if (path / name).is_file()), path)
    whole = HuggingFaceSource(place)
    if any(key.startswith(DIT) for key in whole.infos()):
        return _of_release(KeptKeys(place, KEYS), whole)
    prefix = next((one for one in ("", "model.", "module.") if one + FIRST in whole.infos()), None)
    if prefix is None:
        raise ConversionError(
            f"{place}: expected the key {DIT + FIRST!r} of a release or {FIRST!r} of PixWizard, found neither; give a "
            f"Uni-MoE-2.0-Omni directory, {PIXWIZARD_FILES[0]}, or the folder that holds it"
        )
    shapes = {key.removeprefix(prefix): info.shape for key, info in whole.infos().items()}
    dit = _dit_of(shapes, DiTConfig(), whole.label)
    model = ModelConfig(moe=None, vision=None, audio=None, image=ImageGeneratorConfig(dit=dit))
    return model, "pixwizard", whole, {"prefix": prefix}


def _of_release(source: KeptKeys, whole: HuggingFaceSource) -> tuple[ModelConfig, str, Source, dict[str, str]]:
    image, keys = image_of(source, _recorded(whole)), source.infos()
    assert image is not None
    model = ModelConfig(moe=None, audio=None, vision=None, image=image)
    options = nulls_option(source)
    if CAPTION + "in_fc.weight" in keys:
        model.hidden_size = keys[CAPTION + "in_fc.weight"].shape[-1]
        model.vision = VisionConfig() if any(key.startswith(VISUAL) for key in keys) else None
    else:
        options["projectors"] = "none"
    return model, "image_gen", source, options


def nulls_option(source: Source) -> dict[str, str]:
    """Options of the rows of a source under the release's names."""
    has_null = any(key.startswith(PREFIXES[NULLS[0]]) for key in source.infos())
    return {} if has_null else {NULLS_APART: "apart"}


def _recorded(source: HuggingFaceSource) -> ImageGeneratorConfig | None:
    """What our export left in ``config.json``."""
    file = source.path / "config.json"
    if not file.is_file():
        return None
    model = recorded_model(Fields(source.config(), file))
    return None if model is None else model.image
