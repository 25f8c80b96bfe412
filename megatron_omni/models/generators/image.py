"""What draws, on the last pipeline stage: projectors behind the language model's hidden rows, and the diffusion transformer.

    block         [TASK0..2][IMG0..n-1], the tokens of an answer that stand for one picture (config/pictures.py)
    hidden rows   of the last layer behind its norm, at the block's tokens                                [G, T, H]
    caption, task of the [IMG] and of the [TASK] rows; vision of the encoder's rows of the source picture (projectors.py)
    velocity      DiT(x_t, t; source, caption, task, vision)                                              (dit.py, flow.py)

Guidance has three branches, and training leaves conditions out as they do:

    c    caption, task vector 0, source, vision
    i    null caption, null task 0, source, vision
    u    null caption, null task 1, noise for the source, zeros for vision

Nulls are learned. The published code takes the task projector's second and third row in their place (``release``), and
the caption teacher's first row of an empty text, which is then the null caption. Rows of the null caption but the first
are masked.

Everything is whole on every tensor-parallel rank, each of which computes the same pictures and finds the whole gradient.
Where gradients are reduced while the backward goes on, every trained parameter must take part in every micro-batch: what
comes out of :meth:`ImageGenerator.conditions` leads to all projectors, and :meth:`ImageGenerator.idle` stands for a
micro-batch without pictures.

Shapes: G pictures, T tokens of a block, H width of the language model, R caption rows, N vision rows, D widths of the DiT.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_omni.config.pictures import TASK_TOKENS, ImageGeneratorConfig
from megatron_omni.models.encoders.weights import GeneratorFor, draw_normal, draw_parts, is_trainable
from megatron_omni.models.generators.dit import DiT
from megatron_omni.models.generators.flow import Branch
from megatron_omni.models.generators.projectors import QUERY_STD, TokenProjector, VisualProjector

BRANCHES: tuple[Branch, ...] = ("c", "i", "u")
"""Of guidance, in the order of the task's rows."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the pictures of a micro-batch are drawn from."""

    caption: Tensor
    """[G, R, D]."""
    caption_mask: Tensor
    """[G, R] bool, True at rows that count."""
    task: Tensor
    """[G, 3, D], as projected or taught."""
    vision: Sequence[Tensor | None]
    """Of each picture [N, D]; None where there is no source picture."""
    null_caption: Tensor
    """[1, D]."""
    null_task: Tensor | None
    """[2, D] for the branches i and u; None: ``task`` has them (released)."""
    vision_size: int
    """D of ``vision``."""

    def inputs(self, pictures: Sequence[int], branches: Branch | Sequence[Branch] = "c") -> dict[str, Tensor]:
        """Arguments of the DiT, ``caption``, ``caption_mask``, ``task`` and ``vision``, for the ``pictures`` of these numbers,
        each in its branch (or all in one). They have equally many vision rows, or none (:meth:`groups`)."""
        chosen: list[Branch] = [branches] * len(pictures) if isinstance(branches, str) else [*branches]
        assert len(chosen) == len(pictures)
        caption, mask = zip(*(self._caption(i, branch) for i, branch in zip(pictures, chosen)))
        return {
            "caption": torch.stack(caption),
            "caption_mask": torch.stack(mask),
            "task": torch.stack([self._task(i, branch) for i, branch in zip(pictures, chosen)]),
            "vision": self._vision(pictures, chosen),
        }

    def shown(self, pictures: Sequence[int], branches: Sequence[Branch]) -> Tensor | None:
        """[n]: which of ``pictures``, in their branches, have vision; None: all (``DiT.forward(shown=)``)."""
        there = [n for n, (i, branch) in enumerate(zip(pictures, branches)) if self._shows(i, branch)]
        return None if len(there) == len(pictures) else torch.tensor(there, dtype=torch.int64, device=self.task.device)

    def _shows(self, picture: int, branch: Branch) -> bool:
        return self.vision[picture] is not None and branch != "u"

    def groups(self, keys: Sequence[Hashable]) -> list[list[int]]:
        """Numbers of the pictures that the DiT can draw together: of equal ``keys`` (their sizes) and equally many vision
        rows, to which those without any are added."""
        found: dict[Hashable, dict[int | None, list[int]]] = {}
        for i, (key, rows) in enumerate(zip(keys, self.vision, strict=True)):
            found.setdefault(key, {}).setdefault(None if rows is None else len(rows), []).append(i)
        for by_rows in found.values():
            if None in by_rows and len(by_rows) > 1:
                blank = by_rows.pop(None)
                first = next(iter(by_rows))
                by_rows[first] = sorted(by_rows[first] + blank)
        return [pictures for by_rows in found.values() for pictures in by_rows.values()]

    def _caption(self, picture: int, branch: Branch) -> tuple[Tensor, Tensor]:
        if branch == "c":
            return self.caption[picture], self.caption_mask[picture]
        rows = len(self.caption[picture])
        mask = torch.zeros_like(self.caption_mask[picture])
        mask[0] = True
        return F.pad(self.null_caption.to(self.caption.dtype), (0, 0, 0, rows - 1)), mask

    def _task(self, picture: int, branch: Branch) -> Tensor:
        row = BRANCHES.index(branch)
        if row == 0 or self.null_task is None:
            return self.task[picture, row]
        return self.null_task[row - 1].to(self.task.dtype)

    def _vision(self, pictures: Sequence[int], branches: Sequence[Branch]) -> Tensor:
        rows = [self.vision[i] for i in pictures]
        lengths = {len(found) for found in rows if found is not None}
        assert len(lengths) <= 1, f"pictures of {sorted(lengths)} vision rows in one call"
        blank = self.caption.new_zeros(lengths.pop() if lengths else 1, self.vision_size)
        return torch.stack(
            [
                found if found is not None and self._shows(i, branch) else blank
                for i, found, branch in zip(pictures, rows, branches)
            ]
        )


class ImageGenerator(nn.Module):
    """Parameters ``caption.*``, ``task.*``, ``visual.*``, ``null_caption.*``, ``null_task.*``, ``dit.*``, in this order."""

    def __init__(
        self,
        config: ImageGeneratorConfig,
        hidden_size: int,
        *,
        visual: bool,
        projectors: bool = True,
        overlap: bool = False,
    ) -> None:
        """For a language model of width ``hidden_size``. ``visual``: it has a vision encoder. Without ``projectors`` it is to
        learn from teachers (:meth:`taught`). ``overlap``: see :class:`megatron_omni.models.omni.OmniModel`."""
        super().__init__()
        self.copies = 1
        """Ranks that compute the same pictures and whose gradients are summed: the context-parallel ones."""
        dit, inside = config.dit, config.projectors
        self.config, self.overlap, self.hidden_size = config, overlap, hidden_size
        self.caption = self.task = self.visual = None
        if projectors:
            num_inputs = config.num_image_tokens * config.image_token_repeat
            self.caption = TokenProjector(
                inside,
                hidden_size=hidden_size,
                num_inputs=num_inputs,
                num_rows=inside.num_caption_rows,
                out_size=dit.caption_size,
            )
            self.task = TokenProjector(
                inside,
                hidden_size=hidden_size,
                num_inputs=len(TASK_TOKENS),
                num_rows=inside.num_task_rows,
                out_size=dit.task_size,
            )
            self.visual = VisualProjector(hidden_size=hidden_size, out_size=dit.vision_size) if visual else None
        self.null_caption = LearnedRows(1, dit.caption_size)
        self.null_task = None if config.release else LearnedRows(len(BRANCHES) - 1, dit.task_size)
        self.dit = DiT(dit)

    def conditions(self, hidden: Tensor, vision: Sequence[Tensor | None]) -> Conditions:
        """What is drawn from ``hidden`` [G, T, H], G at least 1, and from the vision encoder's rows [N, H] of each source."""
        assert self.caption is not None and self.task is not None, "a generator without projectors learns from teachers"
        assert len(hidden) == len(vision) > 0 and hidden.shape[1] == len(self.config.block), hidden.shape
        task = self.task(hidden[:, : len(TASK_TOKENS)])
        caption = self.caption(hidden[:, len(TASK_TOKENS) :])
        rows, shown = self._projected(vision, like=hidden)
        mask = torch.ones(caption.shape[:2], dtype=torch.bool, device=caption.device)
        return self._found(caption, mask, task, shown, rows)

    def taught(self, teachers: Mapping[str, Tensor]) -> Conditions:
        """What is drawn from ``teachers`` (``Drawn.teachers``): caption rows and a task vector at least."""
        caption, mask, task = teachers["caption"], teachers["caption_mask"], teachers["task"]
        visual: Sequence[Tensor | None] = [None] * len(caption)
        if "visual" in teachers:
            pairs = zip(teachers["visual"], teachers["visual_mask"])
            visual = [rows[there] if there.any() else None for rows, there in pairs]
        dtype = self.null_caption.weight.dtype
        return self._found(
            caption.to(dtype), mask, task.to(dtype), [None if rows is None else rows.to(dtype) for rows in visual]
        )

    def idle(self, hidden: Tensor) -> Tensor:
        """0, for the loss of a micro-batch that draws nothing: its gradient reaches the language model's ``hidden`` rows
        [0, T, H], and every trained parameter where messages overlap with the backward."""
        nothing = hidden.flatten()[:0].sum()
        if not (self.overlap and torch.is_grad_enabled() and is_trainable(self)):
            return nothing
        if self.caption is None:
            dit = self.config.dit
            zeros = self.null_caption.weight.new_zeros
            found = self._found(
                zeros(1, 1, dit.caption_size), zeros(1, 1, dtype=torch.bool), zeros(1, 3, dit.task_size), [None]
            )
        else:
            found = self.conditions(hidden.new_zeros(1, len(self.config.block), self.hidden_size), [None])
        parts = [found.caption, found.task]
        if is_trainable(self.dit):
            side = self.config.dit.patch_size
            latents = found.caption.new_zeros(1, self.config.dit.latent_channels, side, side)
            time = latents.new_zeros(1)
            parts.append(self.dit(latents, time, source=latents, noise=None, **found.inputs([0])))
        return nothing + sum(part.flatten()[:0].sum() for part in parts)

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str, only: Collection[str] | None = None) -> None:
        """Initial values of every parameter, or of those called as in ``only``: each module has rules of its own."""
        for name, module in self.named_children():
            draw_parts(module, generator_for, prefix=f"{prefix}{name}.", only=only)

    def _projected(self, vision: Sequence[Tensor | None], *, like: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """All projected rows, and those of each source. Where there is no source, those of an empty row are all: the
        projector takes part."""
        given = [rows for rows in vision if rows is not None]
        if self.visual is None:
            assert not given, "vision rows for a model without an encoder"
            return like.new_zeros(0), [None] * len(vision)
        rows = self.visual(torch.cat(given) if given else like.new_zeros(1, self.hidden_size))
        parts = iter(rows.split([len(found) for found in given]) if given else ())
        return rows, [None if found is None else next(parts) for found in vision]

    def _found(
        self,
        caption: Tensor,
        mask: Tensor,
        task: Tensor,
        vision: Sequence[Tensor | None],
        *others: Tensor,
    ) -> Conditions:
        """These conditions and nulls. Whichever of them a loss uses, its gradient reaches all, and ``others``."""
        nulls = self.null_caption(), None if self.null_task is None else self.null_task()
        everything = [part for part in (caption, task, *nulls, *others) if part is not None]
        # + 0. Which pictures lose which of their conditions is drawn: a projector may be left out in a micro-batch.
        zero = torch.stack([part.flatten()[:0].float().sum() for part in everything]).sum().to(caption.dtype)
        null_caption, null_task = (None if null is None else null + zero for null in nulls)
        assert null_caption is not None
        return Conditions(
            caption=caption + zero,
            caption_mask=mask,
            task=task + zero,
            vision=[None if rows is None else rows + zero for rows in vision],
            null_caption=null_caption,
            null_task=null_task,
            vision_size=self.config.dit.vision_size,
        )


class LearnedRows(nn.Module):
    """[n, D], the same for every picture."""

    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))

    def forward(self) -> Tensor:
        """The rows. A call, not an attribute: weights that other ranks updated are waited for in a hook of it."""
        return self.weight

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str) -> None:
        """Initial values: small ones."""
        draw_normal(self.weight, QUERY_STD, generator_for(f"{prefix}weight"))
