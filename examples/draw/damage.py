"""Fixed damage of the restoration test, and the classical ways to undo it.

    noise   Gaussian, sigma 0.2                  total variation (Chambolle), non-local means
    blur    Gaussian, sigma 2                    Wiener, Richardson-Lucy
    rain    streaks of assets/rain.png           median
    hole    24 x 24 grey pixels                  biharmonic fill, measured inside the hole

Pictures are float [H, W, 3] in [0, 1]. Settings of the baselines are those of ``GRIDS`` that are best on training pictures
(``tuned``). The formulas are the textbooks': Chambolle 2004; Buades, Coll, Morel 2005; Wiener with a white spectrum of
noise, 1 / k of the signal's; Richardson 1972; the fill solves the biharmonic equation, with the known pixels as its border.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

Picture = NDArray[np.float64]
RAIN = Path(__file__).parent / "assets" / "rain.png"
KINDS = ("noise", "blur", "rain", "hole")
SIGMA, BLUR_PX, HOLE_PX = 0.2, 2.0, 24
GREY = 0.65
INPUT_DB = (11.0, 20.0)
"""What a damaged picture of the test has; others are drawn anew."""


def damaged(picture: Picture, kind: str, seed: int) -> tuple[Picture, NDArray[np.bool_]]:
    """The damaged picture in whole bytes, and [H, W] where it is measured: everywhere, of a hole inside it."""
    made, where = _damaged(picture, kind, seed)
    return (np.clip(made, 0, 1) * 255).round() / 255, where


def _damaged(picture: Picture, kind: str, seed: int) -> tuple[Picture, NDArray[np.bool_]]:
    rng, everywhere = np.random.default_rng([61, KINDS.index(kind), seed]), np.ones(picture.shape[:2], dtype=bool)
    if kind == "noise":
        return picture + rng.normal(0, SIGMA, picture.shape), everywhere
    if kind == "blur":
        return ndimage.gaussian_filter(picture, (BLUR_PX, BLUR_PX, 0), mode="nearest"), everywhere
    if kind == "rain":
        streaks = np.asarray(Image.open(RAIN).convert("L"), dtype=np.float64)[..., None] / 255
        streaks = np.roll(streaks, tuple(int(one) for one in rng.integers(64, size=2)), axis=(0, 1))
        return picture * (1 - streaks) + streaks, everywhere
    y, x = (int(one) for one in rng.integers(0, picture.shape[0] - HOLE_PX + 1, size=2))
    inside = np.zeros(picture.shape[:2], dtype=bool)
    inside[y : y + HOLE_PX, x : x + HOLE_PX] = True
    return np.where(inside[..., None], GREY, picture), inside


def rain_layer(seed: int = 7, *, side: int = 64, drops: int = 150) -> NDArray[np.uint8]:
    """Slanted streaks, brightness as opacity: what assets/rain.png holds."""
    rng = np.random.default_rng(seed)
    layer = np.zeros((side, side))
    for _ in range(drops):
        x, y, length, bright = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(6, 14), rng.uniform(0.5, 0.95)
        for t in np.arange(0, length, 0.5):
            row, column = int(y + t) % side, int(x + 0.35 * t) % side
            layer[row, column] = max(layer[row, column], bright)
    return (255 * layer).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ classical ways


def total_variation(picture: Picture, weight: float, *, iterations: int = 40) -> Picture:
    """argmin_u TV(u) + |u - f|^2 / (2 weight): Chambolle's projections, all channels together."""
    dual = np.zeros((2, *picture.shape))
    for _ in range(iterations):
        slope = _gradient(_divergence(dual) - picture / weight)
        size = np.sqrt((slope**2).sum(axis=(0, 3), keepdims=True))
        dual = (dual + 0.24 * slope) / (1 + 0.24 * size)
    return picture - weight * _divergence(dual)


def _gradient(picture: Picture) -> Picture:
    slope = np.zeros((2, *picture.shape))
    slope[0, :-1], slope[1, :, :-1] = np.diff(picture, axis=0), np.diff(picture, axis=1)
    return slope


def _divergence(field: Picture) -> Picture:
    first, second = field[0].copy(), field[1].copy()
    first[-1], second[:, -1] = 0, 0
    first[1:] -= field[0, :-1]
    second[:, 1:] -= field[1, :, :-1]
    return first + second


def non_local_means(picture: Picture, strength: float, *, patch: int = 5, reach: int = 7) -> Picture:
    """Mean of pixels with weights exp(-max(0, d^2 - 2 sigma^2) / strength^2), d^2 the mean square between their patches."""
    total, weights = np.zeros_like(picture), np.zeros(picture.shape[:2])
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    height, width = picture.shape[:2]
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            other = padded[dy : dy + height, dx : dx + width]
            distance = ndimage.uniform_filter(((picture - other) ** 2).mean(axis=2), patch, mode="reflect")
            weight = np.exp(-np.maximum(0, distance - 2 * SIGMA**2) / strength**2)
            total += weight[..., None] * other
            weights += weight
    return total / weights[..., None]


def wiener(picture: Picture, k: float) -> Picture:
    """H* / (|H|^2 + k) in the frequencies, on the picture mirrored to twice its size; H is the blur's."""
    height, width = picture.shape[:2]
    mirrored = np.pad(picture, ((0, height), (0, width), (0, 0)), mode="symmetric")
    rows, columns = (np.exp(-2 * (np.pi * BLUR_PX * np.fft.fftfreq(2 * n)) ** 2) for n in (height, width))
    response = np.outer(rows, columns)[..., None]
    made = np.fft.fft2(mirrored, axes=(0, 1)) * response / (response**2 + k)
    return np.fft.ifft2(made, axes=(0, 1)).real[:height, :width]


def richardson_lucy(picture: Picture, iterations: float) -> Picture:
    """u <- u (f / (u * h)) * h."""
    made = np.full_like(picture, 0.5)
    for _ in range(int(iterations)):
        seen = ndimage.gaussian_filter(made, (BLUR_PX, BLUR_PX, 0), mode="nearest")
        share = picture / np.maximum(seen, 1e-6)
        made = made * ndimage.gaussian_filter(share, (BLUR_PX, BLUR_PX, 0), mode="nearest")
    return made


def median(picture: Picture, side: float) -> Picture:
    """Of a square around each pixel, channel by channel."""
    return ndimage.median_filter(picture, size=(int(side), int(side), 1), mode="nearest")


def biharmonic(picture: Picture, inside: NDArray[np.bool_]) -> Picture:
    """The Laplacian's Laplacian is nothing inside; at the picture's border the Laplacian is of the neighbours that exist."""
    height, width = inside.shape
    where = np.arange(height * width).reshape(height, width)
    laplacian = sparse.lil_matrix((height * width, height * width))
    for a, b in ((where[:-1], where[1:]), (where[:, :-1], where[:, 1:])):
        for one, other in ((a.ravel(), b.ravel()), (b.ravel(), a.ravel())):
            laplacian[one, other] = 1
    laplacian.setdiag(-np.asarray(laplacian.sum(axis=1)).ravel())
    square = (laplacian.tocsr() @ laplacian.tocsr())[inside.ravel()]
    unknown, known, flat = inside.ravel(), ~inside.ravel(), picture.reshape(-1, 3)
    solved = spsolve(square[:, unknown].tocsc(), -(square[:, known] @ flat[known]))
    made = flat.copy()
    made[unknown] = solved
    return made.reshape(picture.shape)


Method = Callable[[Picture, float], Picture]
METHODS: dict[str, dict[str, Method]] = {
    "noise": {"total variation": total_variation, "non-local means": non_local_means},
    "blur": {"Wiener": wiener, "Richardson-Lucy": richardson_lucy},
    "rain": {"median": median},
}
GRIDS: dict[str, Sequence[float]] = {
    "total variation": (0.1, 0.15, 0.2, 0.3), "non-local means": (0.1, 0.15, 0.2, 0.3),
    "Wiener": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "Richardson-Lucy": (10, 20, 40, 80, 160), "median": (3, 5, 7),
}  # fmt: skip


def psnr(picture: Picture, wanted: Picture, where: NDArray[np.bool_]) -> float:
    """Of what is shown: cut to [0, 1] and rounded to bytes."""
    shown = (np.clip(picture, 0, 1) * 255).round() / 255
    return float(-10 * np.log10(max(((shown - wanted)[where] ** 2).mean(), 1e-10)))


def tuned(clean: Sequence[Picture], kind: str) -> dict[str, float]:
    """Name of each method of a damage -> the setting that is best on clean training pictures."""
    found = {}
    for name, method in METHODS.get(kind, {}).items():
        scores = {}
        for setting in GRIDS[name]:
            made = [(method(damaged(one, kind, n)[0], setting), one) for n, one in enumerate(clean)]
            scores[setting] = np.mean([psnr(a, b, np.ones(b.shape[:2], dtype=bool)) for a, b in made])
        found[name] = max(scores, key=lambda one: scores[one])
    return found


def restored(picture: Picture, kind: str, where: NDArray[np.bool_], settings: dict[str, float]) -> dict[str, Picture]:
    """What each method makes of a damaged picture."""
    if kind == "hole":
        return {"biharmonic": biharmonic(picture, where)}
    return {name: METHODS[kind][name](picture, setting) for name, setting in settings.items()}
