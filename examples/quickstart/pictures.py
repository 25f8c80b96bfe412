"""The quickstart's pictures, from what training and scoring wrote: loss curves, expert use by modality, scores.

`metrics.jsonl` holds one record per logging step (docs of megatron_omni/training/metrics.py); expert use is the mean over
the records of the last third of training, so that it shows the trained router and not the first steps.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

LOAD = re.compile(r"moe/load/layer_(\d+)/(\w+)/(expert|null)_(\d+)$")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smooth(values: list[float], window: int) -> np.ndarray:
    """Running mean over at most `window` values before and including each."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_losses(records: list[dict[str, Any]], path: Path) -> None:
    """Loss of every source over training, held-out loss as dots, and the number of experts per token below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[3, 1], layout="constrained")
    names = sorted({name for record in records for name in record if name.startswith("loss/source/")})
    evaluated, window = False, max(1, min(8, len(records) // 20))
    for index, name in enumerate(names):
        points = [(record["step"], record[name]) for record in records if name in record]
        steps, losses = zip(*points)
        source, colour = name.removeprefix("loss/source/"), f"C{index}"
        top.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
        top.plot(steps, smooth(list(losses), window), color=colour, label=source)
        held_out = [(r["step"], r[f"eval/loss/{source}"]) for r in records if f"eval/loss/{source}" in r]
        if held_out:
            evaluated = True
            top.plot(*zip(*held_out), "o", color=colour, markersize=4)
    top.set_yscale("log")
    top.set_ylabel("loss per answer token (nats)")
    what = f"thin: as logged, thick: running mean of {window} points" if window > 1 else "as logged"
    top.set_title(f"Training loss by source ({what}{'; dots: held out' if evaluated else ''})", fontsize=11)
    for side in (top.yaxis.set_major_formatter, top.yaxis.set_minor_formatter):
        side(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else ""))
    top.legend(ncols=3, fontsize=9)
    top.grid(alpha=0.3)
    routed = [(r["step"], r["moe/mean_k"], r["moe/null_share"]) for r in records if "moe/mean_k" in r]
    if routed:
        steps, mean_k, null_share = zip(*routed)
        bottom.plot(steps, smooth(list(mean_k), window), label="real experts per token")
        bottom.plot(steps, smooth(list(null_share), window), label="share of null slots")
        bottom.legend(fontsize=9)
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def expert_use(records: list[dict[str, Any]]) -> dict[int, dict[str, dict[str, float]]]:
    """layer -> modality -> slot -> share of that modality's tokens that use it, over the last third of the records."""
    late = [record for record in records if record["step"] > records[-1]["step"] * 2 / 3]
    sums: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for record in late:
        for name, value in record.items():
            if match := LOAD.match(name):
                layer, modality, kind, index = match.groups()
                sums[int(layer), modality, f"{kind} {index}"].append(value)
    use: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for (layer, modality, slot), values in sums.items():
        use[layer][modality][slot] = sum(values) / len(values)
    return use


def draw_expert_use(records: list[dict[str, Any]], path: Path) -> None:
    """One heat map a layer: modalities down, slots across."""
    use = expert_use(records)
    if not use:
        return
    layers = sorted(use)
    figure, axes = plt.subplots(
        1, len(layers), figsize=(3.1 * len(layers) + 0.8, 3.2), layout="constrained", squeeze=False
    )
    modalities = [m for m in ("text", "image", "video", "audio") if any(m in use[layer] for layer in layers)]
    image = None
    for block, (axis, layer) in enumerate(zip(axes[0], layers)):
        slots = sorted({slot for loads in use[layer].values() for slot in loads})
        table = np.array([[use[layer][m].get(slot, np.nan) for slot in slots] for m in modalities])
        image = axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, column in np.ndindex(table.shape):
            shade = "white" if table[row, column] < 0.6 else "black"
            axis.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center", fontsize=8, color=shade)
        axis.set_xticks(range(len(slots)), slots, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(modalities)), modalities if block == 0 else [])
        axis.set_title(f"layer {layer}", fontsize=10)
    figure.suptitle("Share of each modality's tokens that use a slot (last third of training)", fontsize=11)
    if image is not None:
        figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scores(scores: dict[str, dict[str, float]], path: Path) -> None:
    """Bars: untrained, chance, harder and held-out exact match of every task."""
    figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
    kinds = [("held_out", "C0"), ("harder", "C1"), ("untrained", "C3"), ("chance", "0.6")]
    for place, (kind, colour) in enumerate(kinds):
        offsets = np.arange(len(scores)) + (place - 1.5) * 0.2
        values = [score[kind] for score in scores.values()]
        bars = axis.bar(offsets, values, 0.19, color=colour, label=kind.replace("_", " "))
        if place < 2:  # upright: two labels beside each other are wider than their bars
            axis.bar_label(bars, fmt="%.2f", fontsize=8, rotation=90, padding=2)
    axis.set_xticks(range(len(scores)), scores)
    axis.set_ylim(0, 1.2)
    axis.set_ylabel("exact match of the answer")
    axis.set_title("Greedy answers that are right to the letter", fontsize=11)
    figure.legend(ncols=4, fontsize=9, loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
