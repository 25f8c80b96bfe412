"""Sources that are made of a picture: damage to be repaired, and its edges to be drawn from.

    noise      x + sigma n, n normal                                        sigma     of the range 0 to 1
    blur       Gaussian of sigma pixels, the picture mirrored at its border sigma     pixels
    rain       1 - (1 - x)(1 - r): streaks r, drawn or from ``file``        streaks   a thousandth of the pixels; length, strength
    low_light  gain x^gamma + sigma n                                       gain, gamma, sigma
    hole       squares of one grey                                          size      pixels, or below 1 of the shorter side;
                                                                            count, fill
    edges      Canny: Gaussian of sigma, Sobel, thinned, two thresholds     sigma, low, high   of Sobel's sum on 0 to 1

``{"kind": "noise", "sigma": 0.2}`` sets a number, ``{"sigma": [0.1, 0.3]}`` draws it between the two, and ``"noise"`` alone
takes the defaults. What is drawn follows from the kind and a key alone: the same in every epoch, on every layout, and for
whoever caches what models make of it. All of it acts on the picture as it lies on disk, before it is cut to a size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, label

from megatron_omni.data.errors import RecordError, encodable
from megatron_omni.platform.seeds import named_generator

Range = tuple[float, float]
Pixels = NDArray[np.float64]
"""[height, width, 3] from 0 to 1."""

KINDS: Mapping[str, Mapping[str, tuple[Range, Range]]] = {
    "noise": {"sigma": ((0.1, 0.3), (0, 2))},
    "blur": {"sigma": ((1, 3), (0, 100))},
    "rain": {"streaks": ((2, 6), (0, 100)), "length": ((0.1, 0.3), (0, 1)), "strength": ((0.3, 0.8), (0, 1))},
    "low_light": {"gain": ((0.1, 0.4), (0, 1)), "gamma": ((1, 2), (0.1, 10)), "sigma": ((0, 0.03), (0, 2))},
    "hole": {"size": ((0.2, 0.5), (0, 10_000)), "count": ((1, 1), (1, 100)), "fill": ((0.5, 0.5), (0, 1))},
    "edges": {"sigma": ((1, 1), (0, 100)), "low": ((0.4, 0.4), (0, 4)), "high": ((0.8, 0.8), (0, 4))},
}
"""Kind -> setting -> (default, allowed), each from .. to."""


@dataclass(frozen=True)
class Damage:
    """How a source is made."""

    kind: str
    settings: tuple[tuple[str, float, float], ...]
    """(name, from, to), all of the kind's, in their order."""
    file: str | None = None
    """Picture of rain."""


def read_damage(given: object, *, where: str) -> Damage:
    """``degrade`` of a row; RecordError names what is wrong with it."""
    fields = {"kind": given} if isinstance(given, str) else given
    if not isinstance(fields, dict) or not isinstance(fields.get("kind"), str) or fields["kind"] not in KINDS:
        raise _wrong(where, "degrade", given, "is no kind of damage", f"use one of {', '.join(KINDS)}")
    kind = fields["kind"]
    known = KINDS[kind]
    if unknown := sorted(map(str, fields.keys() - {"kind", *known, *(("file",) if kind == "rain" else ())})):
        raise _wrong(where, "degrade", unknown, f"mean nothing to {kind}", f"use {', '.join(known)}")
    file = fields.get("file")
    if file is not None and not (isinstance(file, str) and file and encodable(file)):
        raise _wrong(where, "degrade.file", file, "is no file name", "give a picture under the source's root")
    settings = []
    for name, (default, (least, most)) in known.items():
        value = fields.get(name)
        low, high = (
            default if value is None else value if isinstance(value, list) and len(value) == 2 else (value, value)
        )
        numbers = all(
            isinstance(n, int | float) and not isinstance(n, bool) and least <= n <= most for n in (low, high)
        )
        if not numbers or low > high:
            raise _wrong(
                where, f"degrade.{name}", value, "is no number, or two that rise,", f"from {least} to {most}; give such"
            )
        settings.append((name, float(low), float(high)))
    return Damage(kind, tuple(settings), file)


def damaged(picture: Image.Image, damage: Damage, *, key: str, rain: Image.Image | None = None) -> Image.Image:
    """The source that is made of an RGB picture. ``key`` decides what is drawn; ``rain`` is the picture in ``damage.file``."""
    generator = named_generator(0, "damage", damage.kind, key)
    values = {name: low + (high - low) * _uniform(generator) for name, low, high in damage.settings}
    x = np.asarray(picture, np.float64) / 255
    if damage.kind == "rain" and rain is not None:
        streaks = rain if rain.size == picture.size else rain.resize(picture.size, Image.Resampling.BICUBIC)
        return _picture(1 - (1 - x) * (1 - np.asarray(streaks, np.float64) / 255))
    return _picture(_MAKERS[damage.kind](x, values, generator))


def _noise(x: Pixels, values: Mapping[str, float], generator: torch.Generator) -> Pixels:
    return x + values["sigma"] * _normal(x.shape, generator)


def _blur(x: Pixels, values: Mapping[str, float], generator: torch.Generator) -> Pixels:
    return blurred(x, values["sigma"])


def _rain(x: Pixels, values: Mapping[str, float], generator: torch.Generator) -> Pixels:
    height, width = x.shape[:2]
    count = max(1, round(values["streaks"] * height * width / 1000))
    slant = 0.3 * (2 * _uniform(generator) - 1)
    drawn = Image.new("L", (width, height))
    pen = ImageDraw.Draw(drawn)
    for left, top, size, level in torch.rand(count, 4, generator=generator, dtype=torch.float64).tolist():
        reach = (0.5 + 0.5 * size) * values["length"] * height
        start = left * width, top * (height + reach) - reach
        pen.line([start, (start[0] + slant * reach, start[1] + reach)], fill=round(255 * (0.5 + 0.5 * level)))
    streaks = blurred(np.asarray(drawn, np.float64)[..., None] / 255, 0.5) * values["strength"]
    return 1 - (1 - x) * (1 - streaks)


def _low_light(x: Pixels, values: Mapping[str, float], generator: torch.Generator) -> Pixels:
    return values["gain"] * x ** values["gamma"] + values["sigma"] * _normal(x.shape, generator)


def _hole(x: Pixels, values: Mapping[str, float], generator: torch.Generator) -> Pixels:
    out, (height, width) = x.copy(), x.shape[:2]
    size = values["size"]
    side = min(max(1, round(size if size >= 1 else size * min(height, width))), height, width)
    for _ in range(round(values["count"])):
        top, left = (int(_uniform(generator) * (length - side + 1)) for length in (height, width))
        out[top : top + side, left : left + side] = values["fill"]
    return out


def _edges(x: Pixels, values: Mapping[str, float], generator: torch.Generator) -> Pixels:
    found = edges(x, sigma=values["sigma"], low=values["low"], high=values["high"])
    return np.repeat(found[..., None].astype(np.float64), 3, axis=2)


_MAKERS: Mapping[str, Callable[[Pixels, Mapping[str, float], torch.Generator], Pixels]] = {
    "noise": _noise, "blur": _blur, "rain": _rain, "low_light": _low_light, "hole": _hole, "edges": _edges,
}  # fmt: skip


def blurred(x: Pixels, sigma: float) -> Pixels:
    """[height, width, C] under a Gaussian of ``sigma`` pixels, cut off at 4 sigma, the picture mirrored at its border."""
    return gaussian_filter(x, (sigma, sigma, 0), mode="reflect", truncate=4.0) if sigma > 0 else x


def edges(x: Pixels, *, sigma: float = 1.0, low: float = 0.4, high: float = 0.8) -> NDArray[np.bool_]:
    """[height, width] Canny's edges of a picture [height, width, 3] from 0 to 1.

    Grey (Rec. 601) under a Gaussian; gradient by Sobel's sums; of neighbours across the edge the steepest; those above
    ``high``, and those above ``low`` that hang together with them.
    """
    grey = blurred((x @ np.array([0.299, 0.587, 0.114]))[..., None], sigma)[..., 0]
    g = np.pad(grey, 1, mode="symmetric")
    right = g[:-2, 2:] + 2 * g[1:-1, 2:] + g[2:, 2:] - g[:-2, :-2] - 2 * g[1:-1, :-2] - g[2:, :-2]
    down = g[2:, :-2] + 2 * g[2:, 1:-1] + g[2:, 2:] - g[:-2, :-2] - 2 * g[:-2, 1:-1] - g[:-2, 2:]
    steep = np.hypot(right, down)
    sector = np.round(np.arctan2(down, right) / (np.pi / 4)).astype(int) % 4
    around = np.pad(steep, 1)
    height, width = steep.shape
    thin = np.zeros_like(steep, dtype=bool)
    for number, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        after = around[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        before = around[1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
        thin |= (sector == number) & (steep >= after) & (steep > before)
    pieces, count = label(thin & (steep > low), structure=np.ones((3, 3)))
    kept = np.zeros(count + 1, dtype=bool)
    kept[np.unique(pieces[thin & (steep > high)])] = True
    kept[0] = False
    return kept[pieces]


def _picture(x: Pixels) -> Image.Image:
    return Image.fromarray(np.round(255 * x.clip(0, 1)).astype(np.uint8))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Pixels:
    return torch.randn(shape, generator=generator).double().numpy()


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _wrong(where: str, field: str, value: Any, problem: str, fix: str) -> RecordError:
    return RecordError(where, field=field, value=value, problem=problem, fix=fix, reason="bad_drawing")
