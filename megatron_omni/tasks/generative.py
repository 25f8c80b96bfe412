"""Training of what draws (``model.image``): flow matching, alignment of the projectors to teachers, and the language model's loss.

    loss = w_lm lm  +  sum over pictures g of the step of
                       (w_flow flow_g + w_task task_g + w_caption caption_g + w_visual visual_g) / G

lm as in supervised training (losses/lm.py), flow of losses/flow.py, alignment of losses/align.py. G counts the pictures of the
global batch, so the loss depends neither on the layout nor on the cut into micro-batches; a picture without a teacher adds
nothing to that teacher's term. ``loss_weight`` of a source weighs its pictures as it weighs its tokens.

Where conditions come from (``generative.conditions``):

    model     the language model of this step: hidden states of its last layer at the block of each picture, the vision
              encoder's rows of each source, projected (models/generators/image.py). Frozen, it keeps no graph
    cached    the same rows from disk: neither language model nor encoder is built
    teachers  teachers' embeddings in the projectors' place, which are not built either

Targets and sources are latents, or pixels that the codec of pictures (``model.image.vae``) turns into latents here.

Report: ``loss`` (the sum), ``lm loss`` and its breakdown, ``flow loss``, of each task and of each quarter of t, ``align/*`` and the
cosines of what was found with what was taught.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.generative_checks import trains_mixture
from megatron_omni.config.run import Recipe
from megatron_omni.data.drawing import TASKS
from megatron_omni.drawn import TEACHERS, Drawn
from megatron_omni.losses.align import align_caption, align_visual, centred, cosines
from megatron_omni.losses.flow import flow_report, flow_report_names, picture_losses
from megatron_omni.models.context_parallel import counted_once
from megatron_omni.models.generators.flow import path, target
from megatron_omni.models.generators.image import Conditions, ImageGenerator
from megatron_omni.models.generators.vae import PictureCodec, load_picture_codec
from megatron_omni.parallel.sharing import StepData
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.tasks.averages import Averages
from megatron_omni.tasks.picture_draws import PictureDraw, draw_picture, draw_selection, latents_of, owners_of, white
from megatron_omni.tasks.supervised import SupervisedTask
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.setup import Run
from megatron_omni.training.task import LossFunction, StepInfo

ALIGNED = (*(f"align/{name}" for name in TEACHERS), *(f"cosine/{name}" for name in TEACHERS))
"""Rows of the report."""


class GenerativeTask(SupervisedTask):
    """See the module."""

    asked: ClassVar[Mapping[str, bool]] = {"drawn": True}

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.data.sources)
        assert recipe.model.image is not None
        self.config, self.image, self.seed = recipe.generative, recipe.model.image, recipe.seed
        self.lm_names = self.report_names
        self.flow_names = flow_report_names(TASKS)
        self.report_names = ["loss", *self.lm_names, *self.flow_names, *ALIGNED]
        self.held_out_names = ("lm loss", *self.flow_names, *ALIGNED)
        # What is read of a frozen language model is what it says when it answers.
        self.stochastic = trains_mixture(recipe)
        self.codec: PictureCodec | None = None
        self.averages: Averages | None = None

    def begin(self, run: Run) -> None:
        """See :class:`megatron_omni.training.task.Task`."""
        if self.config.ema:
            self.averages = Averages(run, decay=self.config.ema)

    # -------------------------------------------------------------------------------------------- running means

    def batches(
        self, run: Run, *, timer: PartTimer, stop: Callable[[], bool], written: Callable[[], bool]
    ) -> tuple[StepData | None, dict[str, int]]:
        """See :class:`Task`. The running means first take in the step before."""
        self._settle(run)
        return super().batches(run, timer=timer, stop=stop, written=written)

    def own_tensors(self, run: Run) -> list[Any]:
        """See :class:`Task`: the running means."""
        self._settle(run)
        return [] if self.averages is None else self.averages.sharded()

    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """See :class:`Task`."""
        if self.averages is not None:
            self.averages.updates = run.state.updates

    def _settle(self, run: Run) -> None:
        if self.averages is not None:
            self.averages.follow(run)

    # -------------------------------------------------------------------------------------------- steps

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """See :class:`megatron_omni.training.task.Task`."""
        unread = info.training and not self.config.losses.lm  # the output layer then has nothing to compute
        read = batch
        if unread:
            read = replace(batch, label_places=batch.label_places[:0], part_labels=tuple(0 for _ in batch.part_labels))
        output, lm_of = super().forward_step(read, model, info=info)

        def loss_function(found: Any) -> tuple[Tensor, Tensor]:
            token_loss, hidden, vision = found
            image = cast(ImageGenerator, unwrap_model(cast(Any, model)).image)
            lm, lm_report = lm_of(token_loss)
            if self.config.conditions != "model":
                lm_report = torch.zeros_like(lm_report)
            drawing, picture_report = self._pictures(batch, image, hidden, vision, info)
            drawing = counted_once(drawing, image.copies)
            # Without it the backward still goes down to the embeddings (ImageGenerator.idle), where expert-parallel ranks meet.
            loss = self.config.losses.lm * lm + drawing if self.config.losses.lm else drawing
            return loss, torch.cat([_whole(loss, batch, info).to(lm_report), lm_report, picture_report.to(lm_report)])

        return output, loss_function

    def _pictures(
        self, batch: OmniBatch, image: ImageGenerator, hidden: Tensor, vision: Sequence[Tensor | None], info: StepInfo
    ) -> tuple[Tensor, Tensor]:
        """Share of the pictures of ``batch`` in the loss, and their rows of the report."""
        drawn, rows = batch.drawn, len(self.flow_names) + len(ALIGNED)
        dtype = image.null_caption.weight.dtype
        if drawn is None:
            return image.idle(hidden.to(dtype)).float(), torch.zeros(rows, 2, dtype=torch.float64, device=hidden.device)
        conditions = self._conditions(
            image, drawn, hidden.to(dtype), [None if v is None else v.to(dtype) for v in vision]
        )
        weight = self._picture_weights(batch, drawn, info)
        aligned, align_report = self._aligned(conditions, drawn)
        total = sum((w * losses for w, losses in aligned), torch.zeros(len(drawn), device=hidden.device))
        flow_rows = torch.zeros(len(self.flow_names), 2, dtype=torch.float64, device=hidden.device)
        if self.config.losses.flow:
            losses, times = self._flow(conditions, drawn, image, info)
            total = total + self.config.losses.flow * losses
            flow_rows = flow_report(losses, times, drawn.tasks, TASKS)
        # + 0: whichever losses there are, the gradient reaches all projectors and the language model.
        reached = conditions.caption.flatten()[:0].float().sum()
        share = (total * weight).sum() / max(info.num_images, 1) + reached
        return share, torch.cat([flow_rows, align_report])

    def _conditions(
        self, image: ImageGenerator, drawn: Drawn, hidden: Tensor, vision: Sequence[Tensor | None]
    ) -> Conditions:
        if self.config.conditions == "teachers":
            if drawn.teachers is None or not drawn.teachers.keys() >= {"task", "caption"}:
                raise ValueError(
                    f"generative.conditions=teachers: pictures of {sorted(set(drawn.tasks))} have no embeddings to be drawn from; "
                    "give their records teachers.task and teachers.caption"
                )
            return image.taught(drawn.teachers)
        if len(hidden) != len(drawn):
            raise ValueError(
                f"generative.conditions={self.config.conditions}: {len(drawn)} pictures without hidden states; make them with "
                "megatron-omni prepare --hidden, or set it to model"
            )
        return image.conditions(hidden, vision)

    def _picture_weights(self, batch: OmniBatch, drawn: Drawn, info: StepInfo) -> Tensor:
        """[G]: ``loss_weight`` of each picture's source."""
        if self._loss_weights is None or not info.training:
            return torch.ones(len(drawn), device=drawn.places.device)
        sources = batch.source_ids.t().flatten()[drawn.places[:, 0]]
        return self._loss_weights.to(sources.device)[sources.clamp(min=0)]

    # -------------------------------------------------------------------------------------------- flow matching

    def _flow(
        self, conditions: Conditions, drawn: Drawn, image: ImageGenerator, info: StepInfo
    ) -> tuple[Tensor, Tensor]:
        """[G] loss and [G] time of each picture."""
        channels, device = self.image.dit.latent_channels, drawn.places.device
        if None in drawn.targets:
            raise ValueError("generative.losses.flow: a picture has no target; give it one, or set the loss to 0")
        both = latents_of([*drawn.targets, *drawn.sources], self._codec, channels=channels)
        targets, sources = cast(list[Tensor], both[: len(drawn)]), both[len(drawn) :]
        owners = owners_of(drawn)
        draws = [
            draw_picture(self.config, latents.shape, seed=self.seed, info=info, sample=sample, number=number)
            for latents, (sample, number) in zip(targets, owners)
        ]
        losses: list[Tensor] = [torch.empty(0)] * len(drawn)
        for numbers in conditions.groups([tuple(latents.shape) for latents in targets]):
            own = [draws[i] for i in numbers]
            x1 = torch.stack([targets[i] for i in numbers])
            x0 = torch.stack([draw.noise for draw in own]).to(device)
            t = torch.stack([draw.time for draw in own]).to(device)
            source = torch.stack([self._source(sources[i], targets[i], draws[i]) for i in numbers])
            branches = [draw.branch for draw in own]
            inputs, shown = conditions.inputs(numbers, branches), conditions.shown(numbers, branches)
            noise = self._selection(inputs["vision"].shape[1], [owners[i] for i in numbers], info, device)
            velocity = image.dit(path(x1, x0, t), t, source=source, noise=noise, shown=shown, **inputs)
            for i, loss in zip(numbers, picture_losses(velocity, target(x1, x0)).unbind()):
                losses[i] = loss
        return torch.stack(losses), torch.stack([draw.time for draw in draws])

    def _source(self, source: Tensor | None, latents: Tensor, draw: PictureDraw) -> Tensor:
        """What stands beside a noisy picture: its source, noise where that is left out, zeros or white where there is none."""
        if draw.blank is not None:
            return draw.blank.to(latents.device)
        if source is not None:
            if source.shape != latents.shape:
                raise ValueError(
                    f"a source of latents {list(source.shape)} for a target of {list(latents.shape)}: the two are cut to one size"
                )
            return source
        if self.image.blank_source == "none":
            return torch.zeros_like(latents)
        return white(latents.shape, self._codec(latents.device), latents.device)

    def _codec(self, device: torch.device) -> PictureCodec:
        """The codec of pictures, read when there are the first pixels. ValueError for none, and for one that is not the model's."""
        if self.codec is None:
            if self.image.vae is None:
                raise ValueError(
                    "model.image.vae is null, and pictures are to become latents: name the folder of the codec of pictures, or "
                    "make latents (megatron-omni prepare --latents)"
                )
            self.codec = load_picture_codec(self.image.vae).to(device)
            self.codec.check(self.image)
        return self.codec

    def _selection(
        self, num_rows: int, owners: Sequence[tuple[int, int]], info: StepInfo, device: torch.device
    ) -> Tensor | None:
        """[B, layers, N] noise of the choice of vision rows, where there is a choice that is random."""
        dit = self.image.dit
        if not 0 < dit.kept_vision_tokens < num_rows or not (info.training or dit.noisy_selection):
            return None
        noise = [
            draw_selection(dit.num_layers, num_rows, seed=self.seed, info=info, sample=sample, number=number)
            for sample, number in owners
        ]
        return torch.stack(noise).to(device)

    # -------------------------------------------------------------------------------------------- alignment

    def _aligned(self, conditions: Conditions, drawn: Drawn) -> tuple[list[tuple[float, Tensor]], Tensor]:
        """(weight, [G] loss) of each teacher that is learned from, and the report's rows :data:`ALIGNED`."""
        report = torch.zeros(len(ALIGNED), 2, dtype=torch.float64, device=drawn.places.device)
        found: list[tuple[float, Tensor]] = []
        if self.config.conditions == "teachers" or drawn.teachers is None:
            return found, report
        for row, name in enumerate(TEACHERS):
            weight = getattr(self.config.losses, f"align_{name}")
            if not weight or name not in drawn.teachers:
                continue
            made, taught, mask = _pair(name, conditions, drawn.teachers)
            losses = self._distance(name, made, taught, mask)
            there = mask.any(dim=1)
            found.append((weight, losses))
            cosine = cosines(*((centred(made), centred(taught)) if name == "task" else (made, taught)), mask)
            for place, values in ((row, losses.detach()), (len(TEACHERS) + row, cosine)):
                report[place] = torch.stack([(values * there).sum(), there.sum()]).double()
        return found, report

    def _distance(self, name: str, made: Tensor, taught: Tensor, mask: Tensor) -> Tensor:
        """[G] of rows [G, R, D] under a mask [G, R]; 0 where a picture has none."""
        metric, norm = self.config.align_metric, self.config.align_norm
        if name == "visual":
            shown = mask.unsqueeze(-1)
            share = mask.float().mean(dim=1).clamp(min=1 / mask.shape[1])  # rows that only fill up are 0 and count none
            return align_visual(made.float() * shown, taught.float() * shown) / share
        if name == "task" and metric == "directional":  # what the generator's LayerNorm lets through
            made, taught = centred(made.float()), centred(taught.float())
        return align_caption(made, taught, mask, metric=metric, norm_weight=norm)


def _pair(name: str, conditions: Conditions, teachers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [G, R, D] of the projector and of the teacher, and which of them count. ValueError for other sizes."""
    taught, mask = teachers[name], teachers[f"{name}_mask"]
    if name == "visual":
        made = torch.zeros_like(taught, dtype=conditions.caption.dtype)
        for number, rows in enumerate(conditions.vision):
            if rows is not None and len(rows) != len(made[number]):
                raise ValueError(
                    f"teachers.visual: {len(made[number])} rows for a source of {len(rows)} rows of the vision encoder; a teacher "
                    "gives one for each, in their order: tile by tile"
                )
        blank = made[0]
        made = torch.stack([blank if rows is None else rows for rows in conditions.vision])
        shown = [rows is not None for rows in conditions.vision]
        mask = mask & torch.tensor(shown, device=mask.device).unsqueeze(1)
    else:
        made = conditions.task if name == "task" else conditions.caption
        count = min(made.shape[1], taught.shape[1])  # the queries stand for a caption's first rows
        made, taught, mask = made[:, :count], taught[:, :count], mask[:, :count]
    if made.shape[2] != taught.shape[2]:
        raise ValueError(
            f"teachers.{name}: {taught.shape[2]} wide, the generator takes {made.shape[2]} (model.image.dit); they are of "
            "another teacher"
        )
    return made, taught, mask


def _whole(loss: Tensor, batch: OmniBatch, info: StepInfo) -> Tensor:
    """[1, 2] of the sum of all losses: over steps a mean over pictures, or over label tokens where a step has no picture."""
    whole, own = (info.num_images, batch.num_images) if info.num_images else (info.divisor, batch.num_label_tokens)
    return torch.stack([loss.detach().double() * whole, loss.new_tensor(own, dtype=torch.float64)]).unsqueeze(0)
