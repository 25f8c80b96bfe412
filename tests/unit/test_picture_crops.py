"""Cuts of targets and sources: the size, the middle, one part of both, and pictures that are none."""

import numpy as np
import pytest
from PIL import Image

from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.data.errors import RecordError
from megatron_omni.data.picture_crops import check_pair, check_target, cut_of, pixels_of, sizes_of

CONFIG = ImageGeneratorConfig(base_size=64, size_step=16)


def ramp(width: int, height: int) -> Image.Image:
    """Red says how far to the right a pixel is, green how far down."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.round(255 * np.stack([x, y, 0 * x], 2)).astype(np.uint8))


def test_a_picture_of_a_buckets_size_stays_as_it_is():
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    pixels = pixels_of(picture, cut_of(64, 64, CONFIG))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture))


@pytest.mark.parametrize("size", [(128, 128), (200, 100), (100, 210), (256, 64), (67, 45), (1000, 990)])
def test_the_middle_is_kept_and_as_much_as_fits(size):
    cut = cut_of(*size, CONFIG)
    assert (
        cut.size in sizes_of(CONFIG)
        and cut.left + cut.right == pytest.approx(1)
        and cut.top + cut.bottom == pytest.approx(1)
    )
    assert min(cut.left, cut.top) == 0  # one side is kept whole
    kept = (cut.right - cut.left) * size[0] / ((cut.bottom - cut.top) * size[1])
    assert kept == pytest.approx(cut.size[0] / cut.size[1], rel=1e-9)  # nothing is squeezed
    pixels = pixels_of(ramp(*size), cut).numpy() / 255
    assert pixels.shape == (3, cut.size[1], cut.size[0])
    for channel, axis, low, high in ((0, 1, cut.left, cut.right), (1, 0, cut.top, cut.bottom)):
        profile = pixels[channel].mean(axis=1 - axis)
        centres = low + (high - low) * (np.arange(len(profile)) + 0.5) / len(profile)
        assert np.abs(profile - centres)[2:-2].max() < 2.5 / 255


def test_a_source_of_another_size_is_cut_to_the_same_part():
    cut = cut_of(300, 100, CONFIG)
    target, source = (pixels_of(ramp(*size), cut).numpy().astype(int) for size in ((300, 100), (151, 50)))
    assert np.abs(target - source)[:, 2:-2, 2:-2].max() <= 3
    check_pair((300, 100), (151, 50), where="")
    with pytest.raises(RecordError, match="300x200") as caught:
        check_pair((300, 100), (300, 200), where="f:1")
    assert caught.value.reason == "misaligned"


@pytest.mark.parametrize(
    "size, reason",
    [((1, 1), "too_small"), ((15, 64), "too_small"), ((20_000, 100), "bad_aspect"), ((16, 65), "bad_aspect")],
)
def test_pictures_that_are_no_targets(size, reason):
    with pytest.raises(RecordError, match=r"^f:1: targets\[0\] = ") as caught:
        check_target(*size, CONFIG, field="targets[0]", where="f:1")
    assert caught.value.reason == reason


def test_the_least_and_the_longest_targets():
    for size in ((16, 16), (16, 64), (400, 100)):
        check_target(*size, CONFIG, field="", where="")
