"""Pictures that answers draw: what the generator is to learn of them, sample by sample and as a micro-batch.

A drawn picture stands in an answer as a block of T tokens (task and image tokens). Its *places* are those whose input is a
token of the block: the language model's hidden states there are what the projectors read. Everything else of a picture goes
past the language model: the target, the source that it was made from, what teachers said of both.

Targets and sources are pixels, [3, H, W] uint8, or latents of the picture codec, [C, h, w] floating (already scaled); a
micro-batch may hold several sizes, so these are lists. Only the last pipeline stage has a :class:`Drawn`, as only the first has
pixels for the encoders.

Shapes: G pictures, T tokens of a block, S tokens and B rows of the micro-batch, H hidden size of the language model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

TEACHERS = ("task", "caption", "visual")
"""What can be known of a picture from teachers: rows [3, D] of the instruction, [R, D] of the caption, [N, D] of the source."""
_LISTS = ("targets", "sources", "vision")
_STACKED = ("sample_ids", "numbers", "places", "hidden")


@dataclass(frozen=True, kw_only=True)
class DrawnPicture:
    """One picture of a sample."""

    offsets: Tensor
    """[T] int64: its block's tokens, as positions in the sample."""
    task: str = ""
    """What it is an example of (``denoise``), for the report; empty: not said."""
    target: Tensor | None = None
    """Pixels or latents; None where only the projectors learn."""
    source: Tensor | None = None
    """The same of the picture that it is made from, of the target's size; None: from nothing."""
    vision_rows: tuple[int, int] | None = None
    """First and last + 1 of the vision encoder's rows of the source, counted in the sample; None without a source."""
    vision: Tensor | None = None
    """[n, H] these rows, where they were kept."""
    hidden: Tensor | None = None
    """[T, H] hidden states at ``offsets``, where they were kept."""
    teachers: Mapping[str, Tensor] = field(default_factory=dict)
    """By a name of :data:`TEACHERS`; a task with one row is that of the whole condition."""

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*own, *self.teachers.values()))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Those of a micro-batch, in the order of its samples."""

    sample_ids: Tensor
    """[G] int64, as those of the tokens."""
    numbers: Tensor
    """[G] int64: which of its sample's pictures. With the sample's id it names the picture for every random draw."""
    places: Tensor
    """[G, T] int64: the block's tokens as places in the flattened [S, B] grid."""
    targets: list[Tensor | None]
    """Pixels or latents of each."""
    sources: list[Tensor | None]
    """The same."""
    vision_rows: list[tuple[int, int] | None]
    """Of each source: first and last + 1 of the vision encoder's rows of the micro-batch."""
    vision: list[Tensor | None]
    """[n, H] of each, where they were kept."""
    tasks: list[str]
    """Name of each one's task."""
    hidden: Tensor | None = None
    """[G, T, H] where they were kept."""
    teachers: dict[str, Tensor] | None = None
    """``task`` [G, 3, D], ``caption`` [G, R, D], ``visual`` [G, N, D], and with ``_mask`` behind its name which rows of each are
    there, [G, 3], [G, R], [G, N] bool; None without any."""

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def wants_pixels(self) -> bool:
        """Whether rows of the vision encoder are to be computed for it."""
        return any(rows is not None and kept is None for rows, kept in zip(self.vision_rows, self.vision))

    def to(self, device: torch.device | str) -> "Drawn":
        """The same on another device."""
        moved: dict[str, Any] = {n: None if (t := getattr(self, n)) is None else _moved(t, device) for n in _STACKED}
        for name in _LISTS:
            moved[name] = [None if t is None else _moved(t, device) for t in getattr(self, name)]
        if self.teachers is not None:
            moved["teachers"] = {name: _moved(t, device) for name, t in self.teachers.items()}
        return replace(self, **moved)

    @classmethod
    def of(
        cls,
        samples: Sequence[tuple[DrawnPicture, ...]],
        *,
        sample_ids: Sequence[int],
        places: Sequence[tuple[int, int]],
        vision_starts: Sequence[int],
        num_rows: int,
    ) -> "Drawn | None":
        """Of samples that stand at ``places`` (row, start) of a grid of ``num_rows`` rows, and whose first rows of the vision
        encoder are ``vision_starts``; None where they draw nothing. ValueError for pictures of which some alone have hidden
        states, or whose blocks differ in length."""
        found = [
            (picture, sample, number, start * num_rows + row, first)
            for pictures, sample, (row, start), first in zip(samples, sample_ids, places, vision_starts, strict=True)
            for number, picture in enumerate(pictures)
        ]
        if not found:
            return None
        pictures = [picture for picture, *_ in found]
        if len({len(picture.offsets) for picture in pictures}) > 1:
            raise ValueError(
                f"blocks of {sorted({len(p.offsets) for p in pictures})} tokens in one micro-batch; they have one length"
            )
        hidden = [picture.hidden for picture in pictures if picture.hidden is not None]
        if len(hidden) not in (0, len(pictures)):
            raise ValueError(
                f"{len(hidden)} of {len(pictures)} drawn pictures have hidden states; prepare them for all records"
            )
        return cls(
            sample_ids=torch.tensor([sample for _, sample, *_ in found]),
            numbers=torch.tensor([number for _, _, number, *_ in found]),
            places=torch.stack([picture.offsets * num_rows + place for picture, _, _, place, _ in found]),
            targets=[picture.target for picture in pictures],
            sources=[picture.source for picture in pictures],
            vision_rows=[
                None if rows is None else (first + rows[0], first + rows[1])
                for rows, first in ((picture.vision_rows, first) for picture, *_, first in found)
            ],
            vision=[picture.vision for picture in pictures],
            tasks=[picture.task for picture in pictures],
            hidden=torch.stack(hidden) if hidden else None,
            teachers=_stacked_teachers(pictures),
        )

    # -------------------------------------------------------------------------------------------- as numbers and tensors

    def tensors(self) -> list[Tensor | None]:
        """All tensors of it, in a fixed order: :meth:`of_tensors` reads it back."""
        stacked = [getattr(self, name) for name in _STACKED]
        lists = [tensor for name in _LISTS for tensor in getattr(self, name)]
        teachers = [(self.teachers or {}).get(name) for name in _teacher_names()]
        return [*stacked, *teachers, *lists]

    @classmethod
    def of_tensors(
        cls, tensors: Sequence[Tensor | None], *, tasks: Sequence[str], vision_rows: Sequence[Sequence[int]]
    ) -> "Drawn":
        """The pictures whose :meth:`tensors` these are; the rest is known on the host."""
        count, names = len(tasks), _teacher_names()
        stacked = dict(zip(_STACKED, tensors))
        taught = {name: t for name, t in zip(names, tensors[len(_STACKED) :]) if t is not None}
        rest = tensors[len(_STACKED) + len(names) :]
        lists = {name: list(rest[i * count : (i + 1) * count]) for i, name in enumerate(_LISTS)}
        rows = [None if first < 0 else (first, last) for first, last in vision_rows]
        return cls(**stacked, **lists, tasks=list(tasks), vision_rows=rows, teachers=taught or None)  # type: ignore[arg-type]


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _teacher_names() -> list[str]:
    return [name for teacher in TEACHERS for name in (teacher, f"{teacher}_mask")]


def _stacked_teachers(pictures: Sequence[DrawnPicture]) -> dict[str, Tensor] | None:
    """``Drawn.teachers``: rows of pictures that have fewer, or none, are zeros with a mask of false."""
    found: dict[str, Tensor] = {}
    for name in TEACHERS:
        own = [picture.teachers.get(name) for picture in pictures]
        there = [rows for rows in own if rows is not None]
        if not there:
            continue
        if len({rows.shape[1] for rows in there}) > 1:
            raise ValueError(
                f"teachers' {name}: widths {sorted({rows.shape[1] for rows in there})} in one micro-batch; they are of one teacher"
            )
        longest = 3 if name == "task" else max(map(len, there))
        rows = there[0].new_zeros(len(own), longest, there[0].shape[1])
        mask = torch.zeros(len(own), longest, dtype=torch.bool)
        for index, given in enumerate(own):
            if given is not None:
                rows[index, : len(given)], mask[index, : len(given)] = given, True
        found |= {name: rows, f"{name}_mask": mask}
    return found or None
