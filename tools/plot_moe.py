"""How a mixture uses its experts, drawn from a run's metrics.jsonl: the paper's figures 7, 8 and 9.

python tools/plot_moe.py runs/tiny_chain/4_anneal [--out DIR]

experts_by_modality.png   figure 7: per modality and layer, how the selected slots divide over experts and null
experts_per_token.png     figure 8: per layer, share of tokens that use 0, 1, 2, ... real experts
experts_over_training.png figure 9: per layer, share of tokens that use each slot, over the steps of the run

Figures 7 and 8 are means over the last third of the run. Routing is that of training (experts are drawn, not sorted), of the
logged steps. Needs log.expert_load.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_omni.evaluation.stages import late_means, read_records, slot_use

MODALITIES = ("text", "image", "video", "audio")
MAX_PANELS = 4
"""Layers of figure 9, spread over the model."""
NULL_COLOUR = "#2ca02c"
EXPERT_COLOURS = ("#1f77b4", "#ff7f0e", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
_K = re.compile(r"moe/k/layer_(\d+)/(\d+)$")
_LOAD = re.compile(r"moe/load/layer_(\d+)/(\w+)/(expert|null)_(\d+)$")


def main(arguments: list[str] | None = None) -> int:
    """Draw the three pictures."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="run directory of a model with experts")
    parser.add_argument("--out", type=Path, help="where the pictures go (default: the run directory)")
    words = parser.parse_args(arguments)
    use, shares = slot_use(words.run_dir), late_means(words.run_dir, _K)
    if not use or not shares:
        print(
            f"error: {words.run_dir}/metrics.jsonl: holds no moe/load/* and moe/k/*; train with log.expert_load",
            file=sys.stderr,
        )
        return 2
    out = words.out or words.run_dir
    out.mkdir(parents=True, exist_ok=True)
    import matplotlib

    matplotlib.use("Agg")
    for name, draw in (
        ("experts_by_modality", lambda: by_modality(use)),
        ("experts_per_token", lambda: per_token(shares)),
        ("experts_over_training", lambda: over_training(words.run_dir)),
    ):
        figure = draw()
        figure.savefig(out / f"{name}.png", dpi=110)
        print(f"wrote {out / f'{name}.png'}")
    return 0


def by_modality(use: dict[int, dict[str, dict[str, float]]]) -> Any:
    """Figure 7: one panel a modality, one bar a layer, its parts the slots."""
    from matplotlib import pyplot as plt

    modalities = [m for m in MODALITIES if any(m in loads for loads in use.values())]
    figure, axes = plt.subplots(
        1, len(modalities), figsize=(3.0 * len(modalities) + 1.6, 3.6), sharey=True, layout="constrained", squeeze=False
    )
    layers = sorted(use)
    slots = sorted({slot for loads in use.values() for slot_loads in loads.values() for slot in slot_loads})
    for axis, modality in zip(axes[0], modalities):
        bottom = [0.0] * len(layers)
        for slot in slots:
            totals = [sum(use[layer].get(modality, {}).values()) or 1.0 for layer in layers]
            parts = [use[layer].get(modality, {}).get(slot, 0.0) / n for layer, n in zip(layers, totals)]
            axis.bar(layers, parts, 0.8, bottom=bottom, color=_colour(slot), label=_label(slot))
            bottom = [a + b for a, b in zip(bottom, parts)]
        axis.set_title(modality)
        axis.set_xlabel("layer")
        axis.set_xticks(_ticks(layers))
    axes[0][0].set_ylabel("share of the modality's assignments")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle("Experts by modality (mean over the last third of the run)")
    return figure


def per_token(found: dict[tuple[str, ...], float]) -> Any:
    """Figure 8: one bar a layer, its parts the tokens with 0, 1, 2, ... real experts; mean k as dots."""
    from matplotlib import pyplot as plt

    shares = {(int(layer), int(k)): value for (layer, k), value in found.items()}
    layers, counts = sorted({layer for layer, _ in shares}), sorted({k for _, k in shares})
    figure, axis = plt.subplots(figsize=(max(4.5, 0.4 * len(layers) + 3.5), 3.6), layout="constrained")
    colours = plt.get_cmap("viridis")
    bottom = [0.0] * len(layers)
    for k in counts:
        parts = [shares.get((layer, k), 0.0) for layer in layers]
        axis.bar(layers, parts, 0.8, bottom=bottom, color=colours(k / max(counts[-1], 1)), label=f"{k}")
        bottom = [a + b for a, b in zip(bottom, parts)]
    axis.set_xlabel("layer")
    axis.set_ylabel("share of tokens")
    axis.set_xticks(_ticks(layers))
    means = axis.twinx()
    means.plot(
        layers, [sum(k * shares.get((layer, k), 0.0) for k in counts) for layer in layers], "o-", color="#d62728"
    )
    means.set_ylabel("mean k (dots)", color="#d62728")
    means.set_ylim(0.0, max(*counts, 1))
    figure.legend(*axis.get_legend_handles_labels(), title="experts", loc="outside right center")
    figure.suptitle("Real experts per token")
    return figure


def over_training(run_dir: Path) -> Any:
    """Figure 9: one panel a layer, one line a slot; the mean over modalities, each counting the same."""
    from matplotlib import pyplot as plt

    lines: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for record in read_records(run_dir):
        sums: dict[tuple[int, str], list[float]] = {}
        for name, value in record.items():
            if match := _LOAD.match(name):
                layer, _, kind, number = match.groups()
                sums.setdefault((int(layer), f"{kind} {number}"), []).append(value)
        for (layer, slot), values in sums.items():
            lines.setdefault(layer, {}).setdefault(slot, []).append((record["step"], sum(values) / len(values)))
    layers = sorted(lines)
    if len(layers) > MAX_PANELS:
        layers = [layers[round(i * (len(layers) - 1) / (MAX_PANELS - 1))] for i in range(MAX_PANELS)]
    figure, axes = plt.subplots(
        1, len(layers), figsize=(3.2 * len(layers) + 1.6, 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, layer in zip(axes[0], layers):
        for slot in sorted(lines[layer]):
            axis.plot(*zip(*lines[layer][slot]), color=_colour(slot), label=_label(slot))
        axis.set_title(f"layer {layer}")
        axis.set_xlabel("step")
        axis.set_ylim(0.0, 1.0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of tokens that use it")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle("Experts over training (mean over modalities)")
    return figure


def _colour(slot: str) -> str:
    kind, number = slot.split()
    return NULL_COLOUR if kind == "null" else EXPERT_COLOURS[int(number) % len(EXPERT_COLOURS)]


def _label(slot: str) -> str:
    """As metrics.jsonl numbers them: expert 0 and so on; the null slots are one."""
    return "null" if slot.startswith("null") else slot


def _ticks(layers: list[int]) -> list[int]:
    return layers[:: max(1, len(layers) // 10)]


if __name__ == "__main__":
    sys.exit(main())
