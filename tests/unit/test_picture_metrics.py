"""PSNR, SSIM, F1 of edges and the Frechet distance against their definitions in float64, and what they refuse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from megatron_omni.evaluation.inception import Inception, features, load_inception
from megatron_omni.evaluation.pictures import edge_f1, frechet, psnr, ssim


def noise(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    values = np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)
    return torch.from_numpy(values)


def near(picture: Tensor, seed: int, by: int = 20) -> Tensor:
    change = np.random.default_rng(seed).integers(-by, by + 1, picture.shape)
    return (picture.int() + torch.from_numpy(change)).clamp(0, 255).byte()


# ------------------------------------------------------------------------------------------------ PSNR


def test_psnr_is_its_definition() -> None:
    wanted = noise(3, 3, 9, 14)
    drawn = near(wanted, 1)
    found = psnr(drawn, wanted)
    for one, a, b in zip(found.tolist(), drawn.numpy(), wanted.numpy(), strict=True):
        errors = [(int(x) - int(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)]
        assert one == pytest.approx(10 * math.log10(255**2 / (sum(errors) / len(errors))), abs=1e-10)
    assert psnr(wanted, wanted).tolist() == [100.0] * 3  # finite: it must not decide a mean
    white, black = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(white, black).item() == pytest.approx(0.0, abs=1e-12)


def test_psnr_of_a_part_knows_nothing_of_the_rest() -> None:
    wanted = noise(2, 3, 8, 8)
    drawn = wanted.clone()
    drawn[:, :, 2:4, 3:7] = near(wanted, 2)[:, :, 2:4, 3:7]
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:4, 3:7] = True
    inside = psnr(drawn[:, :, 2:4, 3:7], wanted[:, :, 2:4, 3:7])
    torch.testing.assert_close(psnr(drawn, wanted, where=hole), inside, rtol=0, atol=1e-12)
    assert psnr(drawn, wanted, where=~hole).tolist() == [100.0, 100.0]
    per_picture = torch.stack([hole, ~hole])
    assert psnr(drawn, wanted, where=per_picture).tolist() == [inside[0].item(), 100.0]
    with pytest.raises(ValueError, match="a picture without a pixel that counts"):
        psnr(drawn, wanted, where=torch.stack([hole, torch.zeros_like(hole)]))
    with pytest.raises(ValueError, match=r"must be bool \[2, 8, 8\]"):
        psnr(drawn, wanted, where=hole.float())


def luma(picture: Tensor) -> np.ndarray:
    """BT.601, 16 to 235, of [3, H, W]."""
    red, green, blue = picture.numpy().astype(np.float64) / 255
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def test_luma_is_that_of_deraining_papers() -> None:
    wanted = noise(1, 3, 12, 12)
    drawn = near(wanted, 3)
    mean = ((luma(drawn[0]) - luma(wanted[0])) ** 2).mean()
    assert psnr(drawn, wanted, luma=True).item() == pytest.approx(10 * math.log10(255**2 / mean), abs=1e-9)
    assert luma(torch.full((3, 1, 1), 255)).item() == pytest.approx(235.0)


# ------------------------------------------------------------------------------------------------ SSIM


def ssim_of(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al. 2004, window by window, of one channel [H, W]."""
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for row in range(first.shape[0] - 10):
        for column in range(first.shape[1] - 10):
            x, y = (one[row : row + 11, column : column + 11] for one in (first, second))
            mx, my = (weights * x).sum(), (weights * y).sum()
            sx, sy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            both = (weights * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2)))
    return float(np.mean(values))


def test_ssim_is_its_definition() -> None:
    wanted = noise(2, 3, 13, 16, low=40, high=90)
    drawn = near(wanted, 4, by=9)
    expected = [
        np.mean([ssim_of(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(x, y)])
        for x, y in zip(drawn.numpy(), wanted.numpy())
    ]
    assert ssim(drawn, wanted).tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim(drawn, wanted, luma=True).tolist() == pytest.approx(
        [ssim_of(luma(x), luma(y)) for x, y in zip(drawn, wanted)], abs=1e-10
    )
    assert ssim(wanted, wanted).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_ssim_of_flat_pictures_by_hand() -> None:
    one, other = (torch.full((1, 3, 11, 11), value, dtype=torch.uint8) for value in (100, 150))
    c1 = (0.01 * 255) ** 2
    assert ssim(one, other).item() == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(1, 3, 12, 12), noise(1, 3, 12, 12), "give uint8"),
        (noise(3, 12, 12), noise(3, 12, 12), "give uint8"),
        (noise(1, 1, 12, 12), noise(1, 1, 12, 12), "give uint8"),
        (noise(0, 3, 12, 12), noise(0, 3, 12, 12), "give uint8"),
        (noise(1, 3, 12, 12), noise(1, 3, 12, 16), "only pictures of one size"),
    ],
)
def test_other_pictures_are_refused(first: Tensor, second: Tensor, message: str) -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=message):
            measure(first, second)


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match="pictures of 20 x 10: SSIM needs sides of at least 11"):
        ssim(noise(1, 3, 10, 20), noise(1, 3, 10, 20))


# ------------------------------------------------------------------------------------------------ edges


def test_edge_f1_by_hand() -> None:
    wanted = torch.zeros(3, 6, 6, dtype=torch.bool)
    wanted[0, 2, :4] = True  # four edges
    drawn = torch.zeros_like(wanted)
    drawn[0, 2, 1:4] = True  # three hits,
    drawn[0, 5, 5] = True  # one wrong: precision 3/4, recall 3/4
    drawn[1, 0, 0] = True  # no edge is wanted there
    assert edge_f1(drawn, wanted).tolist() == pytest.approx([0.75, 0.0, 1.0])
    drawn[0, 5, 5] = False
    drawn[0, 3, 5] = True  # one row below and two columns beside the last edge
    assert edge_f1(drawn, wanted, tolerance=1)[0].item() == pytest.approx(2 * 0.75 * 1 / 1.75)
    assert edge_f1(drawn, wanted, tolerance=2)[0].item() == 1.0
    with pytest.raises(ValueError, match="give two of bool"):
        edge_f1(drawn.float(), wanted)


# ------------------------------------------------------------------------------------------------ Frechet


def distance_of(first: np.ndarray, second: np.ndarray) -> float:
    """Heusel et al. 2017, with a root of a matrix."""
    means = [one.mean(0) for one in (first, second)]
    spreads = [np.cov(one, rowvar=False) for one in (first, second)]
    root = sqrtm(spreads[0] @ spreads[1])
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(spreads[0] + spreads[1] - 2 * root.real))


@pytest.mark.parametrize("rows", [(40, 60), (5, 60), (40, 4)])
def test_frechet_is_its_definition(rows: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    mix = rng.standard_normal((6, 6))
    first = rng.standard_normal((rows[0], 6)) @ mix
    second = 0.5 + rng.standard_normal((rows[1], 6))
    found = frechet(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(distance_of(first, second), rel=1e-6)
    assert frechet(torch.from_numpy(second), torch.from_numpy(first)) == pytest.approx(found, rel=1e-10)


def test_frechet_of_what_can_be_said_without_arithmetic() -> None:
    features_ = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert frechet(features_, features_) == pytest.approx(0.0, abs=1e-10)
    assert frechet(features_, features_ + torch.tensor([3.0, 4.0, 0.0, 0.0])) == pytest.approx(25.0, abs=1e-9)
    scale = features_.var(0).sum().item()  # twice as wide: (1 + 4 - 2 * 2) of the variance
    mean = features_.mean(0).square().sum().item()
    assert frechet(features_, 2 * features_) == pytest.approx(scale + mean, rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(9, 4), "two rows or more"),
        (torch.zeros(9, 4), torch.zeros(9, 5), "of one width"),
        (torch.zeros(9, 4), torch.full((9, 4), float("nan")), "no numbers"),
    ],
)
def test_frechet_refuses_what_has_no_distance(first: Tensor, second: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet(first, second)


# ------------------------------------------------------------------------------------------------ Inception


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights under the released names; batch norms that are not the identity."""
    torch.manual_seed(0)
    network = Inception()
    state = network.state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif key.endswith("running_mean"):
            value.normal_(0, 0.1)
    return dict(state)


def test_inception_has_the_published_shape(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """23,834,568 parameters with 1000 classes, as torchvision tells of inception_v3 without its second classifier."""
    counted = {key: value for key, value in weights.items() if "running" not in key and "tracked" not in key}
    assert sum(value.numel() for value in counted.values()) - 8 * 2049 == 23_834_568
    assert len(weights) == 94 * 6 + 2
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3), "Mixed_6b.branch7x7dbl_2.conv.weight": (128, 128, 7, 1),
        "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1), "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3), "Mixed_7c.branch3x3dbl_3b.bn.running_var": (384,),
        "fc.weight": (1008, 2048),
    }  # fmt: skip
    assert {key: tuple(weights[key].shape) for key in shapes} == shapes
    torch.save(weights, tmp_path / "inception.pth")
    network = load_inception(tmp_path / "inception.pth")
    pictures = [noise(3, 70, 50, seed=1), noise(3, 299, 299, seed=2)]
    found = features(network, pictures)
    assert found.shape == (2, 2048) and bool(found.isfinite().all())
    # one at a time, and a picture of the network's own size as it is
    torch.testing.assert_close(features(network, pictures[1:]), found[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(pictures[1][None]), found[1:], rtol=1e-4, atol=1e-5)


def test_padding_is_no_part_of_an_average_and_the_last_block_takes_the_maximum() -> None:
    """What FID's network does otherwise than torchvision's: seen at a corner of a constant picture."""
    with torch.device("meta"):
        network = Inception()
    assert network.Mixed_7c.max_pooled and not network.Mixed_7b.max_pooled
    from megatron_omni.evaluation.inception import _average

    assert _average(torch.ones(1, 1, 4, 4)).tolist() == torch.ones(1, 1, 4, 4).tolist()


def test_another_file_is_one_error(weights: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    with pytest.raises(ValueError, match="no such file"):
        load_inception(file)
    for change, message in (
        ({"fc.weight": None}, "has no weight 'fc.weight'"),
        ({"AuxLogits.fc.bias": torch.zeros(3)}, "has an unknown weight 'AuxLogits.fc.bias'"),
        ({"fc.bias": torch.zeros(1000)}, r"'fc.bias': expected \[1008\], found \[1000\]"),
        ({"fc.bias": torch.full((1008,), float("nan"))}, "'fc.bias' has values that are no numbers"),
    ):
        torch.save({key: value for key, value in (weights | change).items() if value is not None}, file)
        with pytest.raises(ValueError, match=message):
            load_inception(file)
