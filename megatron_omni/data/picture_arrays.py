"""Latents, hidden states and teachers' embeddings of drawn pictures, read from disk and checked against the recipe.

    latents    [C, h, w]  of the VAE ``model.image.vae_fingerprint``, of pictures cut as this recipe cuts them
    hidden     [T, H] of the block, [N, H] of the source: of the language model ``model.image.hidden_fingerprint``, asked as
               this recipe asks (block, system turn, tiles)
    teachers   task [1 or 3, D], caption [R, D], visual [N, D], as wide as the DiT's ``task_size``, ``caption_size``,
               ``vision_size``

Where a recipe knows no fingerprint, all files of a run are of one. Another one is an error of the recipe, which ends the run:
such arrays train without a complaint and teach nonsense. A file that is missing or damaged costs its record.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.drawing import RowAt
from megatron_omni.data.errors import RecipeError, RecordError
from megatron_omni.data.row_files import Kind, RowFile, open_rows
from megatron_omni.foreign import ForeignError, open_regular, read_json

CUT_FIELDS = ("base_size", "size_step", "max_aspect", "latent_scale", "downsampling")
"""Fields of ``model.image`` that latents depend on beside the VAE."""
_TEACHER_BYTES = 1 << 28
"""Largest ``.npy`` file."""


def cut_facts(config: ImageGeneratorConfig) -> dict[str, float]:
    """What a file of latents says of how they were made."""
    return {name: getattr(config, name) for name in CUT_FIELDS}


def hidden_facts(recipe: Recipe) -> dict[str, Any]:
    """What hidden states on disk say of how they were made, beside the language model."""
    assert recipe.model.image is not None
    vision = recipe.model.vision
    return {
        "block": "".join(recipe.model.image.block),
        "system_turn": recipe.data.system_turn,
        "max_tiles_per_side": vision.max_tiles_per_side if vision is not None else 0,
    }


def vae_fingerprint(config: ImageGeneratorConfig) -> str | None:
    """Of the VAE whose latents a recipe takes; None where neither it nor its folder says so."""
    if config.vae_fingerprint is not None or config.vae is None:
        return config.vae_fingerprint
    path = Path(config.vae) / "vae.json"
    document = read_json(path) if path.is_file() else None
    found = document.get("fingerprint") if isinstance(document, dict) else None
    return found if isinstance(found, str) else None


class PictureArrays:
    """What a recipe's pictures have on disk."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.model.image is not None
        self.config, self.hidden_size = recipe.model.image, recipe.model.hidden_size
        self._fingerprints = {"latents": vae_fingerprint(self.config), "hidden": self.config.hidden_fingerprint}
        dit = self.config.dit
        self._widths = {"task": dit.task_size, "caption": dit.caption_size, "visual": dit.vision_size}
        self._facts: dict[str, Mapping[str, Any]] = {"latents": cut_facts(self.config), "hidden": hidden_facts(recipe)}
        self._checked: set[tuple[str, str]] = set()

    def latents(self, at: RowAt, *, field: str, where: str) -> Tensor:
        """[C, h, w] fp32."""
        found = self._array("latents", at, field=field, where=where).float()
        if found.ndim != 3 or len(found) != self.config.dit.latent_channels:
            raise RecipeError(
                f"{at}: latents {list(found.shape)}, and model.image.dit.latent_channels = {self.config.dit.latent_channels}; "
                "they are of another VAE"
            )
        return _finite(found, at, field, where)

    def hidden(self, at: RowAt, *, rows: int | None, field: str, where: str) -> Tensor:
        """[rows, H] of the language model, or as many as there are."""
        found = self._array("hidden", at, field=field, where=where)
        expected = found.shape[0] if rows is None else rows
        if found.ndim != 2 or tuple(found.shape) != (expected, self.hidden_size):
            raise RecipeError(
                f"{at}: hidden states {list(found.shape)}, and this model has {[expected, self.hidden_size]} (tokens of a block, "
                "model.hidden_size); they are of another model: run megatron-omni prepare --hidden again"
            )
        return _finite(found, at, field, where)

    def teacher(self, name: str, at: RowAt, *, where: str) -> Tensor:
        """[R, D] fp32 of a teacher of the projector ``name``."""
        field = f"teachers.{name}"
        if at.number is None:
            found = _npy(at.file, field, where)
        else:
            found = self._array("teachers", at, field=field, where=where, of=name).float()
        found = found[None] if found.ndim == 1 else found
        if found.ndim != 2 or found.shape[1] != self._widths[name] or (name == "task" and len(found) not in (1, 3)):
            rows = "1 or 3" if name == "task" else "any number of"
            raise RecordError(
                where, field=field, value=str(at),
                problem=f"is {list(found.shape)}, and the generator takes {rows} rows of {self._widths[name]} (model.image.dit)",
                fix="write what the teacher of these sizes gives", reason="bad_teacher",
            )  # fmt: skip
        return _finite(found, at, field, where)

    def _array(self, kind: Kind, at: RowAt, *, field: str, where: str, of: str = "") -> Tensor:
        assert at.number is not None
        try:
            file = open_rows(at.file, kind)
            found = file.array(at.number)
        except ValueError as error:
            raise RecordError(
                where,
                field=field,
                value=str(at),
                problem=str(error),
                fix="or take the row out",
                reason="unreadable_rows",
            ) from error
        self._check(kind, of, file)
        return found

    def _check(self, kind: Kind, of: str, file: RowFile) -> None:
        key = f"{kind} {of}", str(file.path)
        if key in self._checked:
            return
        wanted = self._fingerprints.setdefault(key[0] if of else kind, file.fingerprint)
        if wanted is None:
            self._fingerprints[kind] = file.fingerprint
        elif wanted != file.fingerprint:
            raise RecipeError(_foreign(kind, of, file, wanted))
        for name, value in self._facts.get(kind, {}).items():
            if (found := file.about.get(name)) != value:
                raise RecipeError(
                    f"{file.path}: {kind} made with {name} = {found!r}, and this recipe has {value!r}; set it to that, or run "
                    f"megatron-omni prepare --{kind} again"
                )
        self._checked.add(key)


def _foreign(kind: Kind, of: str, file: RowFile, wanted: str) -> str:
    found, wanted = file.fingerprint[:12], wanted[:12]
    if kind == "latents":
        return (
            f"{file.path}: latents of the VAE with fingerprint {found}, and this run has the VAE {wanted} (model.image.vae, "
            "vae_fingerprint); run megatron-omni prepare --latents with that one, or name the one that they are of"
        )
    if kind == "hidden":
        return (
            f"{file.path}: hidden states of the language model with fingerprint {found}, and this run has those of {wanted} "
            "(model.image.hidden_fingerprint); run megatron-omni prepare --hidden with one checkpoint for all data"
        )
    return f"{file.path}: embeddings of the teacher {found}, and other records name those of {wanted} as teachers.{of}; use one"


def _npy(file: str, field: str, where: str) -> Tensor:
    try:
        with open_regular(file) as stream:
            data = np.load(stream, allow_pickle=False) if _size(stream) <= _TEACHER_BYTES else None
        if data is None or data.dtype not in (np.float16, np.float32, np.float64) or not data.size:
            what = f"more than {_TEACHER_BYTES} bytes" if data is None else f"numbers of type {data.dtype}"
            raise ValueError(f"holds {what}: fp16, fp32 or fp64 are read")
    except (ForeignError, OSError, ValueError, EOFError) as error:
        raise RecordError(
            where, field=field, value=file, problem=f"cannot be read ({error})", fix="write it with numpy.save",
            reason="unreadable_rows",
        ) from error  # fmt: skip
    return torch.from_numpy(data.astype(np.float32))


def _size(stream: Any) -> int:
    size: int = stream.seek(0, 2)
    stream.seek(0)
    return size


def _finite(found: Tensor, at: RowAt, field: str, where: str) -> Tensor:
    if not bool(found.isfinite().all()):
        raise RecordError(
            where, field=field, value=str(at), problem="holds values that are not finite", fix="make it again",
            reason="not_finite",
        )  # fmt: skip
    return found


def known_arrays(named: Sequence[Mapping[str, RowAt]], number: int) -> Mapping[str, RowAt]:
    """Those of picture ``number`` of a record, none where it names none."""
    return named[number] if named else {}
