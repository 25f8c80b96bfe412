"""Sizes that a picture is learned and drawn at: buckets of about the same area.

A size (w, h), both multiples of ``step``, is a bucket where w h <= base_size^2 and it cannot grow by a step both ways:
(w + step) (h + step) > base_size^2; and its longer side is at most ``max_aspect`` times the shorter. This is the staircase
that PixWizard walks (its list for 768 has 145 sizes from 1536 x 384 to 384 x 1536). Without torch, so that data, models and
commands ask the same function.
"""

import math
from functools import cache

Size = tuple[int, int]
"""(width, height) in pixels."""


@cache
def buckets(base_size: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """All of them, the widest first. ValueError where the fields make none."""
    if step < 1 or base_size < step:
        raise ValueError(f"base_size={base_size}, size_step={step}: a picture is at least one step of at least 1 pixel")
    if not max_aspect >= 1:
        raise ValueError(f"max_aspect={max_aspect}: the longer side is at least as long as the shorter; at least 1")
    area = base_size**2 // step**2
    found = []
    for width in range(min(area, math.isqrt(int(area * max_aspect))), 0, -1):
        for height in range(max(1, area // (width + 1)), area // width + 1):
            if max(width, height) <= max_aspect * min(width, height) and (width + 1) * (height + 1) > area:
                found.append((width * step, height * step))
    if not found:
        raise ValueError(
            f"base_size={base_size}, size_step={step}, max_aspect={max_aspect}: no size fits; a larger max_aspect or "
            "a base_size that is a multiple of size_step has some"
        )
    return tuple(found)


def nearest_bucket(width: float, height: float, sizes: tuple[Size, ...]) -> Size:
    """The one of ``sizes`` whose sides are most nearly as ``width`` to ``height``; of equals the largest, then the widest.

    ValueError for a side below 1 or no size to choose from.
    """
    if not (1 <= width < math.inf and 1 <= height < math.inf):
        raise ValueError(f"size {width}x{height}: both sides are at least 1 pixel")
    if not sizes:
        raise ValueError("no sizes to choose from; see image.base_size")
    wanted = width / height

    def distance(size: Size) -> tuple[float, int, int]:
        aspect = size[0] / size[1]
        # The quotient of the larger by the smaller: the same for a picture and the one that lies on its side.
        return round(max(wanted / aspect, aspect / wanted), 12), -size[0] * size[1], -size[0]

    return min(sizes, key=distance)
