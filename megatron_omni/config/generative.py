"""What task ``generative`` is told: how a picture generator (``model.image``) and its projectors learn (docs/images_out.md)."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_omni.config.ranges import number


@dataclass(kw_only=True)
class GenerativeLosses:
    """Factor of each loss in their sum; 0: not computed."""

    lm: float = number(1.0, at_least=0, at_most=10**6)
    """Next-token prediction, mean over label tokens; with ``conditions: model`` alone."""
    flow: float = number(1.0, at_least=0, at_most=10**6)
    """Flow matching, mean over pictures."""
    align_task: float = number(0.0, at_least=0, at_most=10**6)
    """Distance of the task projector's rows to the teacher's, mean over pictures."""
    align_caption: float = number(0.0, at_least=0, at_most=10**6)
    """The same of the caption projector."""
    align_visual: float = number(0.0, at_least=0, at_most=10**6)
    """The same of the visual projector."""


@dataclass(kw_only=True)
class GenerativeConfig:
    """Task ``generative`` (docs/images_out.md)."""

    conditions: Literal["model", "cached", "teachers"] = "model"
    """Where the generator's conditions come from: the language model in this step; its hidden states on disk (``megatron-omni
    prepare --hidden``), without the language model; or teachers' embeddings in place of the projectors' outputs, without
    either."""
    losses: GenerativeLosses = field(default_factory=GenerativeLosses)
    """What is learned."""
    align_metric: Literal["directional", "mse"] = "directional"
    """Of the task's and the caption's rows: distance of directions, and of log lengths by ``align_norm``; or the plain squared
    distance (the visual rows' always)."""
    align_norm: float = number(0.01, at_least=0, at_most=10**6)
    """Factor of the distance of log lengths."""
    time: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the time t of a training picture: 0 is noise, 1 the picture."""
    shift: float = number(1.0, above=0, at_most=1000)
    """t becomes t s / (1 + (s - 1) t): above 1, more of it near the picture."""
    drop: float = number(0.05, at_least=0, at_most=1)
    """Share of the training pictures whose caption and task become the null condition."""
    drop_source: float = number(0.5, at_least=0, at_most=1)
    """Share of these whose source goes, too: noise in its place, and no rows of the vision encoder."""
    ema: float = number(0.0, at_least=0, below=1)
    """Decay of the running mean of the trained weights that is kept beside them; 0: none. The warm-up is min(decay,
    (1 + updates) / (10 + updates)). Drawing takes the mean (docs/images_out.md)."""
