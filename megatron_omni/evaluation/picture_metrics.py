"""Metrics of tasks of kind ``image``: of a drawn picture beside the record's target or source, or of a whole set of them.

    psnr, ssim    against the target; ``against: source`` says how much of the source is still there
    edge_f1       Canny's edges (data/degradations.py) of the drawn picture against the target's; ``against: source``: against a
                  picture of edges that was given, white on black
    judge_score   the mean of numbers that the judge gives of pictures beside targets, sources and words: a CLIP score, LPIPS,
                  the error of an estimated depth, with networks of the user's
    fd_judge      Frechet distance of drawn pictures and targets on the features of a network of the user's, which the task's
                  judge gives: a vector for each picture. Never FID
    fid           the same on FID's Inception, with the weights in ``inception`` (inception.py)

Everything else of a picture is read by a judge that gives a text for each, and compared by the metrics of scoring/ (accuracy by a
classifier: ``metric: exact_match``). Distances are of whole sets: no sample has a score, and there is no standard error.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_omni.data.degradations import edges
from megatron_omni.evaluation.inception import features, load_inception
from megatron_omni.evaluation.pictures import LARGEST_DB, edge_f1, frechet, psnr, ssim
from megatron_omni.scoring import nearest
from megatron_omni.scoring.metric import Metric, Scored, mean_of

Against = Literal["target", "source"]
AT_ONCE = 64
"""Pictures of a set that a judge sees together."""
EDGE_LEVEL = 127
"""Of a picture of edges: above is an edge."""


class PictureMetric(Metric):
    """A number for each picture; the task's score is their mean."""

    asks = "picture"

    def __init__(self, against: str = "target") -> None:
        if against not in ("target", "source"):
            raise ValueError(f"metric_settings: against = {against!r}; it must be target or source")
        self.against = against

    def of_picture(self, drawn: Tensor, other: Tensor) -> Scored:
        """Of uint8 [3, H, W] and the target or source at its size."""
        return mean_of(self._value(drawn[None], other[None]))

    def _value(self, drawn: Tensor, other: Tensor) -> float:
        raise NotImplementedError


class PSNR(PictureMetric):
    """Decibels; ``luma``: of the brightness alone."""

    def __init__(self, luma: bool = False, against: str = "target") -> None:
        super().__init__(against)
        self.luma = _flag("luma", luma)
        self.version = f"psnr/1 luma={luma} against={against} most={LARGEST_DB:g}"

    def _value(self, drawn: Tensor, other: Tensor) -> float:
        return psnr(drawn, other, luma=self.luma).item()


class SSIM(PictureMetric):
    """Wang et al. 2004; ``luma``: of the brightness alone."""

    def __init__(self, luma: bool = False, against: str = "target") -> None:
        super().__init__(against)
        self.luma = _flag("luma", luma)
        self.version = f"ssim/1 gaussian=11,1.5 luma={luma} against={against}"

    def _value(self, drawn: Tensor, other: Tensor) -> float:
        return ssim(drawn, other, luma=self.luma).item()


class EdgeF1(PictureMetric):
    """``tolerance`` in pixels; ``sigma``, ``low`` and ``high`` are Canny's."""

    def __init__(
        self, tolerance: int = 0, sigma: float = 1.0, low: float = 0.4, high: float = 0.8, against: str = "target"
    ) -> None:
        super().__init__(against)
        if type(tolerance) is not int or not 0 <= tolerance <= 100:
            raise ValueError(f"metric_settings: tolerance = {tolerance!r}; it must be a whole number from 0 to 100")
        if not all(isinstance(one, int | float) for one in (sigma, low, high)) or sigma < 0 or not 0 <= low <= high:
            raise ValueError(
                f"metric_settings: sigma = {sigma!r}, low = {low!r}, high = {high!r}; they must be numbers, low at most high"
            )
        self.tolerance, self.canny = tolerance, {"sigma": float(sigma), "low": float(low), "high": float(high)}
        self.version = f"edge_f1/1 tolerance={tolerance} canny={sigma:g},{low:g},{high:g} against={against}"

    def _value(self, drawn: Tensor, other: Tensor) -> float:
        wanted = other.float().mean(1) > EDGE_LEVEL if self.against == "source" else self._edges(other)
        return edge_f1(self._edges(drawn), wanted, tolerance=self.tolerance).item()

    def _edges(self, pictures: Tensor) -> Tensor:
        maps = [edges(one.permute(1, 2, 0).numpy() / 255, **self.canny) for one in pictures]
        return torch.from_numpy(np.stack(maps))


class JudgeScore(Metric):
    """The judge's own number of each picture."""

    asks = "picture"
    uses_judge: ClassVar[bool] = True

    def __init__(self, higher_is_better: bool = True) -> None:
        self.higher_is_better = _flag("higher_is_better", higher_is_better)
        self.version = "judge_score/1"

    def of_numbers(self, given: object, count: int) -> list[Scored]:
        """Of what the judge gave of ``count`` pictures; ValueError unless that is a finite number for each."""
        found = np.asarray(given, dtype=np.float64)
        if found.shape != (count,) or not np.isfinite(found).all():
            raise ValueError(
                f"the judge gave {given!r:.80} for {count} pictures; judge_score needs a finite number for each"
            )
        return [mean_of(float(one)) for one in found]


class SetMetric(Metric):
    """A number for all pictures together, lower is better."""

    asks = "pictures"
    higher_is_better = False
    is_mean = False
    uses_judge: ClassVar[bool] = False

    def of_sets(self, drawn: Sequence[Tensor], wanted: Sequence[Tensor], judge: Callable[..., Any] | None) -> float:
        """Of uint8 [3, H, W] each."""
        raise NotImplementedError


class JudgeDistance(SetMetric):
    """Frechet distance on the features that the task's judge gives."""

    uses_judge = True

    def __init__(self) -> None:
        self.version = "fd_judge/1"

    def of_sets(self, drawn: Sequence[Tensor], wanted: Sequence[Tensor], judge: Callable[..., Any] | None) -> float:
        assert judge is not None
        return frechet(_vectors(judge, drawn), _vectors(judge, wanted))


class FID(SetMetric):
    """With the weights in the file ``inception``."""

    def __init__(self, inception: str) -> None:
        if not isinstance(inception, str) or not inception:
            raise ValueError(
                "metric_settings.inception is missing: the weights of FID's Inception (docs/images_out.md)"
            )
        self.inception = Path(inception)
        self.version = "fid/1 inception=2015-12-05 resize=torch-bilinear-299"

    def of_sets(self, drawn: Sequence[Tensor], wanted: Sequence[Tensor], judge: Callable[..., Any] | None) -> float:
        network = load_inception(self.inception)
        return frechet(features(network, drawn), features(network, wanted))


PICTURE_METRICS: Mapping[str, type[Metric]] = {
    "psnr": PSNR, "ssim": SSIM, "edge_f1": EdgeF1, "judge_score": JudgeScore, "fd_judge": JudgeDistance, "fid": FID,
}  # fmt: skip


def open_picture_metric(name: str, settings: Mapping[str, Any], folder: Path) -> Metric:
    """The metric of this name; ValueError for an unknown setting and for a file that is not there. Paths are relative to
    ``folder``."""
    kind = PICTURE_METRICS[name]
    known = list(inspect.signature(kind).parameters)
    for setting in settings:
        if setting not in known:
            raise ValueError(f"metric_settings: metric {name!r} has no setting {setting!r}; "
                             f"{nearest(setting, known) if known else 'it has none'}")  # fmt: skip
    if kind is FID:
        metric = FID(settings.get("inception", ""))
        metric.inception = folder / metric.inception.expanduser()
        if not metric.inception.is_file():
            raise ValueError(f"metric_settings.inception: there is no file {metric.inception}")
        return metric
    return kind(**settings)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"metric_settings: {name} = {value!r}; it must be true or false")
    return value


def _vectors(judge: Callable[..., Any], pictures: Sequence[Tensor]) -> Tensor:
    """[N, D] of what a judge gives, some pictures at a time."""
    found: list[Tensor] = []
    for first in range(0, len(pictures), AT_ONCE):
        some = [one.numpy() for one in pictures[first : first + AT_ONCE]]
        vectors = torch.as_tensor(np.asarray(judge(some), dtype=np.float64))
        if vectors.dim() != 2 or len(vectors) != len(some) or vectors.shape[1] != (found or [vectors])[0].shape[1]:
            raise ValueError(
                f"the judge gave values of shape {list(vectors.shape)} for {len(some)} pictures; fd_judge needs a vector of one "
                "length for each"
            )
        found.append(vectors)
    return torch.cat(found)
