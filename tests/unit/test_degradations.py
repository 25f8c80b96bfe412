"""Damage against its formulas, and that what is drawn of it follows from the key alone."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from megatron_omni.data.degradations import KINDS, blurred, damaged, edges, read_damage

SIZE = 64


def picture(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Smooth, with values far from 0 and 255, so that nothing is clipped."""
    noise = np.random.default_rng(seed).normal(size=(size[1], size[0], 3))
    smooth = gaussian_filter(noise, (6, 6, 0))
    return Image.fromarray((128 + 40 * smooth / np.abs(smooth).max()).astype(np.uint8))


def made(degrade, *, key: str = "a", image: Image.Image | None = None, **more) -> np.ndarray:
    return np.asarray(damaged(image or picture(), read_damage(degrade, where=""), key=key, **more), np.float64) / 255


CLEAN = np.asarray(picture(), np.float64) / 255


def test_noise_has_its_deviation_and_no_mean():
    noise = made({"kind": "noise", "sigma": 0.05}) - CLEAN
    assert abs(noise.mean()) < 0.05 * 4 / np.sqrt(noise.size) + 0.5 / 255
    assert noise.std() == pytest.approx(0.05, rel=0.03)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.06  # a draw for each channel


def test_blur_is_the_gaussian_written_out():
    sigma, reach = 2.0, 8
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    wide = np.pad(CLEAN, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    for y, x in ((0, 0), (5, 63), (30, 31), (63, 2)):
        window = wide[y : y + 2 * reach + 1, x : x + 2 * reach + 1]
        expected = (weights[..., None] * window).sum((0, 1))
        assert blurred(CLEAN, sigma)[y, x] == pytest.approx(expected, abs=1e-12)
        assert made({"kind": "blur", "sigma": sigma})[y, x] == pytest.approx(expected, abs=0.5 / 255 + 1e-9)


def test_rain_of_a_file_is_laid_over_as_light():
    rain = np.zeros((SIZE, SIZE, 3), np.uint8)
    rain[:, 10], rain[:, 20] = 255, 128
    wet = made("rain", rain=Image.fromarray(rain))
    assert (wet[:, 10] == 1).all() and np.abs(wet[:, 30] - CLEAN[:, 30]).max() < 1e-9
    assert wet[:, 20] == pytest.approx(1 - (1 - CLEAN[:, 20]) * (1 - 128 / 255), abs=0.5 / 255 + 1e-9)


def test_drawn_rain_only_brightens_and_is_streaks():
    wet = made({"kind": "rain", "streaks": 4, "strength": 0.8})
    change = wet - CLEAN
    assert change.min() > -1 / 255 and 0.02 < (change.max(axis=2) > 0.1).mean() < 0.6
    rows, columns = (np.abs(np.diff(change[..., 0], axis=axis)).mean() for axis in (0, 1))
    assert columns > 2 * rows  # they fall


def test_low_light_is_gain_times_a_power():
    dark = made({"kind": "low_light", "gain": 0.3, "gamma": 2, "sigma": 0})
    assert dark == pytest.approx(0.3 * CLEAN**2, abs=0.5 / 255 + 1e-9)


@pytest.mark.parametrize("size, side", [(24, 24), (0.25, 16), (500, SIZE)])
def test_a_hole_is_one_square_of_grey(size, side):
    out = made({"kind": "hole", "size": size, "fill": 1.0})
    rows, columns = np.nonzero((out != CLEAN).all(axis=2))
    assert len(rows) == side**2 and np.ptp(rows) == np.ptp(columns) == side - 1 and (out[rows, columns] == 1).all()


def test_edges_of_a_square_are_its_outline():
    x = np.zeros((40, 40, 3))
    x[10:30, 12:28] = 1.0
    found = edges(x)
    rows, columns = np.nonzero(found)
    assert {rows.min(), rows.max()} <= {9, 10, 29, 30} and {columns.min(), columns.max()} <= {11, 12, 27, 28}
    assert 60 <= found.sum() <= 80  # 72 places, one thick
    assert not found[14:26, 16:24].any() and not edges(np.full((20, 20, 3), 0.4)).any()
    shown = made("edges", image=Image.fromarray((255 * x).astype(np.uint8)))
    assert np.array_equal(shown[..., 0] == 1, found) and set(np.unique(shown)) == {0.0, 1.0}


def test_weak_edges_count_only_where_they_hang_together_with_strong_ones():
    x = np.zeros((20, 60, 3))
    x[10:, :30] = np.linspace(1.0, 0.2, 30)[None, :, None]  # its edge grows weak to the right
    x[10:, 40:50] = 0.2  # one that is weak all along
    strong, both = edges(x, low=2.0, high=2.0), edges(x, low=0.4, high=2.0)
    assert strong.any() and (both & strong).sum() == strong.sum() and both.sum() > strong.sum()
    assert not both[:, 38:52].any() and edges(x, low=0.4, high=0.4)[:, 38:52].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_follows_from_the_key(kind):
    image = picture(size=(50, 70))
    one, again, other = made(kind, image=image), made(kind, image=image), made(kind, key="b", image=image)
    assert one.shape == (70, 50, 3) and np.array_equal(one, again)
    assert kind == "edges" or not np.array_equal(one, other)


def test_a_number_between_two_is_drawn():
    deviations = [(made({"kind": "noise", "sigma": [0.02, 0.08]}, key=str(i)) - CLEAN).std() for i in range(12)]
    assert 0.019 < min(deviations) < 0.04 < 0.06 < max(deviations) < 0.085
