"""The Inception network of FID, for weights that the user has: 2048 features of a picture.

Weights: ``pt_inception-2015-12-05-6726825d.pth``, the TensorFlow network of 2015-12-05 under the names of torchvision's
``inception_v3`` with 1008 classes; nothing here downloads it. As there:

    pictures     bilinear to 299 x 299 (align_corners off, no antialias), then 2 x / 255 - 1
    average      pooling leaves the padding out of its mean
    Mixed_7c     has max pooling in place of average pooling
    features     the mean over places of the last block

Values of other programs differ in the second digit where they resize otherwise. 23,850,960 parameters.
Sources: Szegedy et al. 2015 (Rethinking the Inception architecture); Heusel et al. 2017; the package pytorch-fid.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omni.checkpoint.untrusted import read_torch_file

WIDTH, SIDE, CLASSES = 2048, 299, 1008
AT_ONCE = 32


class _Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _Block(nn.Module):
    """Units by name; :meth:`chain` runs several."""

    def add(self, name: str, inputs: int, *units: tuple[int, int | tuple[int, int]], last_stride: int = 1) -> None:
        """``NAME_1``, ``NAME_2``, ... (``NAME`` alone where there is one): (outputs, kernel) each."""
        for number, (outputs, kernel) in enumerate(units, 1):
            stride = last_stride if number == len(units) else 1
            key = name if len(units) == 1 else f"{name}_{number}"
            self.add_module(key, _Unit(inputs, outputs, kernel, stride=stride, padded=stride == 1))
            inputs = outputs

    def chain(self, name: str, x: Tensor, last: int) -> Tensor:
        """``NAME_1`` to ``NAME_last``, or ``NAME`` where ``last`` is 0."""
        for key in [f"{name}_{number}" for number in range(1, last + 1)] or [name]:
            x = getattr(self, key)(x)
        return x


class _A(_Block):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.add("branch1x1", inputs, (64, 1))
        self.add("branch5x5", inputs, (48, 1), (64, 5))
        self.add("branch3x3dbl", inputs, (64, 1), (96, 3), (96, 3))
        self.add("branch_pool", inputs, (pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.chain(name, x, last) for name, last in (("branch1x1", 0), ("branch5x5", 2), ("branch3x3dbl", 3))]
        return torch.cat([*parts, self.chain("branch_pool", _average(x), 0)], 1)


class _B(_Block):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.add("branch3x3", inputs, (384, 3), last_stride=2)
        self.add("branch3x3dbl", inputs, (64, 1), (96, 3), (96, 3), last_stride=2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.chain("branch3x3", x, 0), self.chain("branch3x3dbl", x, 3)]
        return torch.cat([*parts, F.max_pool2d(x, 3, stride=2)], 1)


class _C(_Block):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.add("branch1x1", inputs, (192, 1))
        self.add("branch7x7", inputs, (width, 1), (width, (1, 7)), (192, (7, 1)))
        double = [(width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))]
        self.add("branch7x7dbl", inputs, (width, 1), *double)
        self.add("branch_pool", inputs, (192, 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.chain(name, x, last) for name, last in (("branch1x1", 0), ("branch7x7", 3), ("branch7x7dbl", 5))]
        return torch.cat([*parts, self.chain("branch_pool", _average(x), 0)], 1)


class _D(_Block):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.add("branch3x3", inputs, (192, 1), (320, 3), last_stride=2)
        self.add("branch7x7x3", inputs, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3), last_stride=2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.chain("branch3x3", x, 2), self.chain("branch7x7x3", x, 4)]
        return torch.cat([*parts, F.max_pool2d(x, 3, stride=2)], 1)


class _E(_Block):
    def __init__(self, inputs: int, *, max_pooled: bool) -> None:
        super().__init__()
        self.max_pooled = max_pooled
        self.add("branch1x1", inputs, (320, 1))
        self.branch3x3_1 = _Unit(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Unit(384, 384, (1, 3)), _Unit(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Unit(inputs, 448, 1), _Unit(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Unit(384, 384, (1, 3)), _Unit(384, 384, (3, 1))
        self.add("branch_pool", inputs, (192, 1))

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch3x3_1(x)
        two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pooled else _average(x)
        parts = [self.branch3x3_2a(one), self.branch3x3_2b(one), self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two)]
        return torch.cat([self.chain("branch1x1", x, 0), *parts, self.chain("branch_pool", pooled, 0)], 1)


class Inception(nn.Module):
    """uint8 pictures [B, 3, H, W] to features [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = _C(768, 128), _C(768, 160), _C(768, 160)
        self.Mixed_6e = _C(768, 192)
        self.Mixed_7a = _D(768)
        self.Mixed_7b, self.Mixed_7c = _E(1280, max_pooled=False), _E(2048, max_pooled=True)
        self.fc = nn.Linear(WIDTH, CLASSES)  # of the file; features are taken before it

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False) * (2 / 255) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def load_inception(file: Path) -> Inception:
    """The network with the weights in ``file`` (read as plain tensors alone). ValueError for another file."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give the weights of FID's Inception (docs/images_out.md)")
    state = {key: value for key, value in read_torch_file(file).items() if not key.endswith("num_batches_tracked")}
    with torch.device("meta"):
        network = Inception()
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    if wrong := sorted(state.keys() ^ wanted.keys()):
        had = "an unknown weight" if wrong[0] in state else "no weight"
        raise ValueError(f"{file}: has {had} {wrong[0]!r}; it is not FID's Inception under torchvision's names")
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            raise ValueError(f"{file}: {key!r}: expected {list(wanted[key].shape)}, found {list(value.shape)}")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{file}: {key!r} has values that are no numbers")
    network = network.to_empty(device="cpu")
    network.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    return network.eval().requires_grad_(False)


def features(network: Inception, pictures: Sequence[Tensor]) -> Tensor:
    """[N, 2048] of uint8 pictures [3, H, W], which may have different sizes."""
    found = []
    for first in range(0, len(pictures), AT_ONCE):
        resized = [
            F.interpolate(one[None].float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            for one in pictures[first : first + AT_ONCE]
        ]
        with torch.no_grad():
            found.append(network(torch.cat(resized)))
    return torch.cat(found)
