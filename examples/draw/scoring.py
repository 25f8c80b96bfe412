"""Scores of pictures of ``make draw``: a row for each, and what rows add up to. Pictures are uint8 [3, 64, 64].

draw      right: the judge sees all that the caption says (arrangement, objects, count)
edit      changed: the judge sees the new object at its place and the arrangement as it was; kept: PSNR outside the
          square that the object stood in, beside the codec's there
restore   PSNR where the damage is measured (in the hole alone), of the input, of the best classical way, of the codec
edges     F1 of the drawn picture's Canny edges against those that were given, one pixel off allowed; of the codec's
grid      mean step of brightness across borders of the codec's blocks, by that inside them
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.draw import damage
from examples.draw.judge import Judge, Verdict, arrangement, verdicts
from examples.draw.scenes import Placed, Scene
from examples.quickstart.assets import load_assets
from megatron_omni.data.degradations import edges
from megatron_omni.evaluation.pictures import edge_f1, psnr

Pixels = NDArray[np.uint8]
Row = dict[str, Any]
EDGE_TOLERANCE = 1


def through(codec: Any, pictures: Sequence[Pixels]) -> list[Pixels]:
    """What a codec (``PictureCodec``) gives back."""
    if not len(pictures):
        return []
    return list(codec.decode(codec.encode(torch.from_numpy(np.stack(list(pictures))))).numpy())


def judged(judge: Judge, pictures: Sequence[Pixels]) -> list[Verdict]:
    """What is seen in each."""
    return verdicts(judge, torch.from_numpy(np.stack(list(pictures)))) if len(pictures) else []


def drawn_rows(judge: Judge, scenes: Sequence[Scene], pictures: Sequence[Pixels]) -> list[Row]:
    """Whether each is what it should show."""
    return [
        {"kind": scene.kind, "caption": scene.caption, "right": seen.right(scene), "seen": described(seen)}
        for scene, seen in zip(scenes, judged(judge, pictures))
    ]


def described(seen: Verdict) -> str:
    """A verdict as a caption."""
    if seen.arrangement == "one":
        return Scene("one", (seen.first,)).caption
    if seen.arrangement == "many":
        return Scene("many", (seen.first,), count=seen.count).caption
    return Scene("two", (seen.first, seen.second), seen.arrangement, 2).caption


def edit_rows(
    judge: Judge, rows: Sequence[Row], scenes: Sequence[Scene], pictures: Sequence[Pixels],
    targets: Sequence[Pixels], through_codec: Sequence[Pixels],
) -> list[Row]:  # fmt: skip
    """Of each edit whether it was made, and what else it kept."""
    found = []
    for row, scene, picture, target, codec, seen in zip(
        rows, scenes, pictures, targets, through_codec, judged(judge, pictures)
    ):
        edit = row["edit"]
        stood = Placed(tuple(tuple(one) for one in edit["objects"]), background=None).mask(edit["old"])  # type: ignore[arg-type]
        changed = seen.arrangement == arrangement(scene) and seen.at(edit["slot"]) == edit["new"]
        names = load_assets().english
        found.append({
            "edit": f"{names[edit['old']]} -> {names[edit['new']]}", "changed": changed, "seen": described(seen),
            "kept_psnr": _psnr(picture, target, ~stood), "codec_psnr": _psnr(codec, target, ~stood),
        })  # fmt: skip
    return found


def restore_rows(
    rows: Sequence[Row], pictures: Sequence[Pixels], sources: Sequence[Pixels], targets: Sequence[Pixels],
    through_codec: Sequence[Pixels], settings: dict[str, dict[str, float]],
) -> list[Row]:  # fmt: skip
    """Decibels of each restoration beside its input's, the best classical way's and the codec's."""
    found = []
    for row, picture, source, target, codec in zip(rows, pictures, sources, targets, through_codec):
        kind, given, clean = row["damage"], _floats(source), _floats(target)
        where = (given != clean).any(axis=2) if kind == "hole" else np.ones(clean.shape[:2], dtype=bool)
        if kind == "hole":  # a pixel of the hole that has the very grey counts as well
            lines, columns = where.any(axis=1).nonzero()[0], where.any(axis=0).nonzero()[0]
            where[lines.min() : lines.max() + 1, columns.min() : columns.max() + 1] = True
        classical = damage.restored(given, kind, where, settings[kind])
        scores = {name: damage.psnr(made, clean, where) for name, made in classical.items()}
        found.append({
            "damage": kind, "psnr": _psnr(picture, target, where), "input_psnr": _psnr(source, target, where),
            "codec_psnr": _psnr(codec, target, where), "classical": scores,
        })  # fmt: skip
    return found


def edge_rows(pictures: Sequence[Pixels], sources: Sequence[Pixels], through_codec: Sequence[Pixels]) -> list[Row]:
    """F1 of each, and of the true picture through the codec."""
    given = torch.from_numpy(np.stack([source[0] > 127 for source in sources]))
    scores = [
        edge_f1(torch.from_numpy(np.stack([edges(_floats(one)) for one in some])), given, tolerance=EDGE_TOLERANCE)
        for some in (pictures, through_codec)
    ]
    return [{"f1": float(one), "codec_f1": float(other)} for one, other in zip(*scores)]


def grid(pictures: Sequence[Pixels], block: int) -> float:
    """See the module; ``block`` is the codec's downsampling."""
    across, inside = [], []
    for picture in pictures:
        for axis in (1, 2):
            steps = np.abs(np.diff(picture.astype(np.float64), axis=axis)).mean(axis=(0, 3 - axis))
            border = np.arange(1, picture.shape[axis]) % block == 0
            across.append(steps[border].mean())
            inside.append(steps[~border].mean())
    return round(float(np.mean(across) / max(np.mean(inside), 1e-9)), 4)


def _floats(picture: Pixels) -> damage.Picture:
    return picture.transpose(1, 2, 0) / 255


def _psnr(picture: Pixels, target: Pixels, where: NDArray[np.bool_]) -> float:
    one, other = (torch.from_numpy(np.ascontiguousarray(each))[None] for each in (picture, target))
    return round(float(psnr(one, other, where=torch.from_numpy(where))[0]), 3)


# ------------------------------------------------------------------------------------------------------------- sums


def text_scores(rows: Sequence[Row]) -> Row:
    """Single objects, and two with their relation."""
    return {
        "single": mean([row["right"] for row in rows if row["kind"] == "one"]),
        "both": mean([row["right"] for row in rows if row["kind"] == "two"]),
        "count": len(rows),
    }


def edit_scores(rows: Sequence[Row]) -> Row:
    """Edits that were made, and what they kept."""
    sums = {name: mean([row[name] for row in rows]) for name in ("changed", "kept_psnr", "codec_psnr")}
    return sums | {"count": len(rows)}


def restore_scores(rows: Sequence[Row]) -> Row:
    """By damage; the baseline is the classical way with the best mean."""
    found = {}
    for kind in damage.KINDS:
        some = [row for row in rows if row["damage"] == kind]
        if not some:
            continue
        classical = {name: mean([row["classical"][name] for row in some]) for name in some[0]["classical"]}
        best = max(classical, key=lambda name: classical[name])
        found[kind] = {name: mean([row[name] for row in some]) for name in ("psnr", "input_psnr")} | {
            "baseline_psnr": classical[best], "baseline": best, "codec_psnr": mean([row["codec_psnr"] for row in some]),
            "count": len(some),
        }  # fmt: skip
    return found


def edge_scores(rows: Sequence[Row]) -> Row:
    """Means."""
    return {name: mean([row[name] for row in rows]) for name in ("f1", "codec_f1")} | {"count": len(rows)}


def mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return round(float(np.mean(values)), 4) if len(values) else 0.0
