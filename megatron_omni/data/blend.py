"""From a recipe's sources to the components of the order (mixture.py).

``data.weight_by: tokens``: weights are shares of the tokens, so a source's samples are drawn at weight / mean tokens of
its samples. ``data.balance: modality``: each source is divided by the class of its samples (the first of video, image
and audio that a sample holds, else text), and every class gives equally many samples, as in the paper's annealing; inside
a class the sources keep the proportions they would have had. Both ask the index.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from megatron_omni.config.data import DataConfig, SourceConfig
from megatron_omni.data.index import HAS_ANSWER, HOLDS
from megatron_omni.data.mixture import Component
from megatron_omni.data.sizes import SizeRule
from megatron_omni.data.sources import Source
from megatron_omni.data.summary import mean_tokens

CLASSES = ("video", "image", "audio", "text")
_BLOCK = 1 << 10
"""Rows of which one number is kept in memory, for each class."""
_SLAB = 1 << 22
"""Rows that are counted at once."""


def components(
    configs: Sequence[SourceConfig], sources: Sequence[Source], *, data: DataConfig, sizes: SizeRule
) -> list[Component]:
    """The components of a mixture, in the order of its sources."""
    made: list[Component] = []
    for number, (config, source) in enumerate(zip(configs, sources, strict=True)):
        scale = 1.0
        if data.weight_by == "tokens":
            mean = mean_tokens(source, sizes)
            if mean is None:
                raise _no_index(source, "data.weight_by = 'tokens'")
            scale = 1.0 / mean
        if data.balance == "none":
            made.append(_component(config, config.name, len(source), scale))
        else:
            made += _by_class(config, source, number, scale)
    return made


def _component(config: SourceConfig, name: str, num_rows: int, scale: float) -> Component:
    return Component(
        name=name,
        num_rows=num_rows,
        weight=_scaled(config.weight, scale),
        from_sample=config.from_sample,
        reweight=tuple((at, _scaled(weight, scale)) for at, weight in sorted(config.reweight.items())),
        epochs=config.epochs,
    )


def _by_class(config: SourceConfig, source: Source, number: int, scale: float) -> list[Component]:
    """One component for each class of samples that a source holds; rows that no recipe can use are in none."""
    flags = source.flags()
    if flags is None:
        raise _no_index(source, "data.balance = 'modality'")
    found = []
    for name in CLASSES:
        rows = ClassRows(flags, name)
        if len(rows):
            part = _component(config, f"{config.name}/{name}", len(rows), scale * len(rows) / len(source))
            found.append(
                Component(**{**vars(part), "group": name, "source": number, "rows": rows})  # type: ignore[arg-type]
            )
    if not found:
        raise ValueError(f"data source {config.name!r}: no record of it can be used; see its summary")
    return found


class ClassRows(Sequence[int]):
    """The row numbers of one class of a source in ascending order, without a list of them.

    Kept is one count for each ``_BLOCK`` rows; inside a block the rows are found in the mapped index.
    """

    def __init__(self, flags: Sequence[NDArray[np.uint8]], name: str) -> None:
        """``flags``: [rows] of each file of the source."""
        higher = CLASSES[: CLASSES.index(name)]
        self._flags, self._wanted = flags, HAS_ANSWER | HOLDS.get(name, 0)
        self._compared = self._wanted | sum(HOLDS[other] for other in higher)
        self._first_rows = [0, *accumulate(len(file) for file in flags)]
        self._first_blocks = [0, *accumulate(-(-len(file) // _BLOCK) for file in flags)]
        counts = [self._counts(file[start : start + _SLAB]) for file in flags for start in range(0, len(file), _SLAB)]
        self._ends = np.concatenate([np.zeros(0, np.int64), *counts]).cumsum()  # [blocks] rows up to the end of each

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        """Row number of the ``place``-th row of the class."""
        block = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[block - 1]) if block else 0
        file = bisect_right(self._first_blocks, block) - 1
        start = (block - self._first_blocks[file]) * _BLOCK
        rows = np.flatnonzero(self._is_here(self._flags[file][start : start + _BLOCK]))
        return self._first_rows[file] + start + int(rows[place - before])

    def _is_here(self, flags: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return (flags & self._compared) == self._wanted

    def _counts(self, flags: NDArray[np.uint8]) -> NDArray[np.int64]:
        return np.add.reduceat(self._is_here(flags), range(0, len(flags), _BLOCK), dtype=np.int64)


def _scaled(weight: float, scale: float) -> float:
    return weight if scale == 1.0 else float(f"{weight * scale:.9g}")


def _no_index(source: Source, setting: str) -> ValueError:
    return ValueError(f"{setting}: source {source.name!r} has no index; run megatron-omni prepare")
