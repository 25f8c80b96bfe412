"""From a recipe's sources to the components of the order (mixture.py).

``data.weight_by: tokens``: weights are shares of the tokens, so a source's samples are drawn at weight / mean tokens of
its samples. ``data.balance: modality``: each source is divided by the class of its samples (the first of video, image
and audio that a sample holds, else text), and every class gives equally many samples, as in the paper's annealing; inside
a class the sources keep the proportions they would have had. Both ask the index.
"""

from collections.abc import Sequence

import numpy as np

from megatron_omni.config.data import DataConfig, SourceConfig
from megatron_omni.data.index import HAS_ANSWER, HOLDS
from megatron_omni.data.mixture import Component
from megatron_omni.data.sizes import SizeRule
from megatron_omni.data.sources import Source
from megatron_omni.data.summary import mean_tokens

CLASSES = ("video", "image", "audio", "text")


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
    flags = source.holds()
    if flags is None:
        raise _no_index(source, "data.balance = 'modality'")
    found, taken = [], (flags & HAS_ANSWER) == 0
    for name in CLASSES:
        held = ~taken if name == "text" else (flags & HOLDS[name] > 0) & ~taken
        taken = taken | held
        rows = np.flatnonzero(held)
        if len(rows):
            part = _component(config, f"{config.name}/{name}", len(rows), scale * len(rows) / len(source))
            found.append(
                Component(**{**vars(part), "group": name, "source": number, "rows": rows})  # type: ignore[arg-type]
            )
    if not found:
        raise ValueError(f"data source {config.name!r}: no record of it can be used; see its summary")
    return found


def _scaled(weight: float, scale: float) -> float:
    return weight if scale == 1.0 else float(f"{weight * scale:.9g}")


def _no_index(source: Source, setting: str) -> ValueError:
    return ValueError(f"{setting}: source {source.name!r} has no index; run tools/prepare_data.py")
