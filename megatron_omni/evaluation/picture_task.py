"""What tasks of kind ``image`` have of their own: settings of drawing, a row per setting of a sweep, checks, judges of pictures.

    kind: image
    data: held_out.jsonl            records that draw (docs/images_out.md): the target is what a picture is compared with
    metric: psnr                    or ssim, edge_f1, judge_score, fd_judge, fid (picture_metrics.py); or a metric of texts
    judge: my_judge.py:name         name(pictures, **judge_settings): a text for each picture, of fd_judge a vector;
                                    of judge_score name(pictures, wanted, sources, prompts, **judge_settings): a number
    drawing: {steps: 30, sweep: {text_guidance: [1, 2, 4]}}

Pictures are uint8 arrays [3, H, W]; a source is None where there is none, a prompt is the last question.

A sweep makes a task ``NAME@SETTING=VALUE`` of each value, the other settings as they are; ``sweep.png`` of the results folder shows
them (sweep.py).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from megatron_omni.config.ranges import number, out_of_range
from megatron_omni.data.record import Record
from megatron_omni.evaluation.judges.load import JudgeOf, function_of, is_of_file
from megatron_omni.evaluation.picture_metrics import PICTURE_METRICS, open_picture_metric
from megatron_omni.scoring import METRICS, Metric, nearest, open_metric

Pictures = Sequence[NDArray[Any]]
SWEPT = ("steps", "shift", "text_guidance", "image_guidance")


@dataclass(kw_only=True)
class DrawingConfig:
    """``drawing`` of a task: settings in the place of the checkpoint's (``model.image.sampling``). null: its own."""

    steps: int | None = number(None, at_least=1, at_most=1000)
    shift: float | None = number(None, above=0, at_most=1000)
    text_guidance: float | None = number(None, at_least=0, at_most=1000)
    image_guidance: float | None = number(None, at_least=0, at_most=1000)
    begin: Literal["block", "model", "record"] | None = None
    """What stands before the picture: nothing, whatever the model writes, or what the record's own answer has there. null:
    ``model`` where the task thinks, else ``block``."""
    sweep: dict[str, list[float]] = field(default_factory=dict)
    """Setting -> values of it: a task for each."""


def swept(drawing: DrawingConfig) -> Iterator[tuple[str, DrawingConfig]]:
    """("@SETTING=VALUE", settings) of each value of a sweep; ("", settings) without one. ValueError for what is no sweep."""
    if not drawing.sweep:
        yield "", drawing
    for setting, values in drawing.sweep.items():
        if setting not in SWEPT:
            raise ValueError(f"drawing.sweep: {setting!r} is no setting; {nearest(setting, list(SWEPT))}")
        if not values or len(set(values)) < len(values):
            raise ValueError(f"drawing.sweep.{setting} = {values}: give different numbers, one at least")
        for value in values:
            if setting == "steps" and value != int(value):
                raise ValueError(f"drawing.sweep.steps = {values}: steps are whole numbers")
            new: dict[str, Any] = {setting: int(value) if setting == "steps" else value}
            changed = dataclasses.replace(drawing, sweep={}, **new)
            if problem := next(out_of_range(changed), None):
                raise ValueError(f"drawing.sweep: {problem}")
            yield f"@{setting}={value:g}", changed


def open_drawing_metric(name: str, settings: Mapping[str, Any], folder: Path) -> Metric:
    """A metric of pictures, or one of the texts that a judge gives. ValueError as :func:`open_metric`."""
    if name in PICTURE_METRICS:
        return open_picture_metric(name, settings, folder)
    if name not in METRICS:
        raise ValueError(f"metric = {name!r} is unknown; {nearest(name, [*PICTURE_METRICS, *METRICS])}")
    metric = open_metric(name, settings)
    if metric.asks != "answer":
        raise ValueError(f"metric {name!r} reads no answer, and a judge of pictures gives one: give another")
    return metric


def open_picture_judge(name: str, settings: Mapping[str, Any], folder: Path, metric: Metric) -> JudgeOf | None:
    """The judge that ``metric`` needs, None where it needs none. ValueError for one too many, one too few, and none in the file."""
    needs = metric.asks == "answer" or getattr(metric, "uses_judge", False)
    if not needs:
        if name or settings:
            raise ValueError(
                f"judge = {name!r}: the metric compares pictures itself; leave judge and judge_settings out"
            )
        return None
    if not is_of_file(name):
        kinds = {"answer": "text", "picture": "number", "pictures": "vector"}
        wanted = f"which gives a {kinds[metric.asks]} for each picture"
        raise ValueError(f"judge = {name!r}: the metric needs a judge of yours, {wanted}: FILE.py:NAME")
    path, function = function_of(name, folder)
    return JudgeOf(name, lambda: partial(function, **settings), [path])


def has_one_picture(record: Record) -> bool:
    """Whether a record asks for one picture, in its last turn."""
    return len(record.targets) == 1 and record.messages[-1].num_drawn == 1
