"""What the stages of a chain show on held-out data, from the ``metrics.jsonl`` that each leaves: a table and its reading.

Rows are training stages, columns the held-out sets that all of them evaluate; an entry is the mean loss (nats per answer
token) of the last evaluation, over several seeds mean +- half the range. Scores of sets that name a metric have a table of their
own, and so have results of ``megatron-omni evaluate`` in the folder ``evaluation`` of a stage. Read off the losses:

1. each warmed-up dense expert is better at its own sets (those named like a source it trained on) than the other experts,
2. the mixture after fine-tuning is at least as good as the best of them on every set,
3. annealing makes no set worse,
4. the gate uses experts differently by modality, leaves tokens to the null expert, and spends more on some layers.

Nothing is gated: what does not come out so is printed as it is.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_omni.evaluation.results import SUMMARY, read_summary
from megatron_omni.foreign import parse_json, read_text

Losses = dict[str, float]
"""Held-out set -> loss."""

RESULTS = "evaluation"
"""Folder of a run with results of ``megatron-omni evaluate``."""
_EVAL = "eval/loss/"
_LOAD = re.compile(r"moe/load/layer_(\d+)/(\w+)/(expert|null)_(\d+)$")
_MEAN_K = re.compile(r"moe/mean_k/layer_(\d+)$")


def read_records(run_dir: Path) -> list[dict[str, float]]:
    """Records of a run's ``metrics.jsonl``; none where there is no such file."""
    file = run_dir / "metrics.jsonl"
    return [parse_json(line, str(file)) for line in read_text(file).splitlines()] if file.is_file() else []


def held_out_losses(run_dir: Path) -> Losses:
    """Losses of the last evaluation of a run."""
    found: Losses = {}
    for record in read_records(run_dir):
        found = {k.removeprefix(_EVAL): v for k, v in record.items() if k.startswith(_EVAL)} or found
    return found


def held_out_scores(run_dir: Path) -> Losses:
    """``METRIC SET`` -> score, of the last evaluation of a run, and of the results in its folder ``evaluation``."""
    found: Losses = {}
    for record in read_records(run_dir):
        scores = {k.removeprefix("eval/") for k in record if k.startswith("eval/") and not k.startswith("eval/loss")}
        found = {name.replace("/", " ", 1): record[f"eval/{name}"] for name in sorted(scores)} or found
    if (run_dir / RESULTS / SUMMARY).is_file():
        tasks = read_summary(run_dir / RESULTS).tasks
        found |= {f"{task.metric} {name}": task.score for name, task in tasks.items() if task.score is not None}
    return found


def first_and_last(name: str, run_dir: Path, metrics: Sequence[str], *, share: float = 1 / 5) -> list[str]:
    """A line of the means of ``metrics`` over the first and the last ``share`` of the records that have them."""
    records, found = read_records(run_dir), []
    for metric in metrics:
        values = [record[metric] for record in records if metric in record]
        if values:
            some = max(1, round(share * len(values)))
            ends = (sum(part) / some for part in (values[:some], values[-some:]))
            found.append(f"{metric} {' -> '.join(f'{mean:.3f}' for mean in ends)}")
    return [f"{name}: {', '.join(found)}"] if found else []


def late_means(run_dir: Path, pattern: re.Pattern[str], *, share: float = 1 / 3) -> dict[tuple[str, ...], float]:
    """Mean over the last ``share`` of the steps of every metric that matches ``pattern``, by its groups."""
    records = read_records(run_dir)
    sums: dict[tuple[str, ...], list[float]] = {}
    for record in records:
        if record["step"] > records[-1]["step"] * (1 - share):
            for name, value in record.items():
                if match := pattern.match(name):
                    sums.setdefault(match.groups(), []).append(value)
    return {key: sum(values) / len(values) for key, values in sums.items()}


def slot_use(run_dir: Path) -> dict[int, dict[str, dict[str, float]]]:
    """layer -> modality -> slot -> share of that modality's tokens that use it, late in training."""
    use: dict[int, dict[str, dict[str, float]]] = {}
    for (layer, modality, kind, number), value in late_means(run_dir, _LOAD).items():
        use.setdefault(int(layer), {}).setdefault(modality, {})[f"{kind} {number}"] = value
    return use


def mean_k_by_layer(run_dir: Path) -> list[float]:
    """Real experts per token of each layer, late in training."""
    found = late_means(run_dir, _MEAN_K)
    return [found[key] for key in sorted(found, key=lambda key: int(key[0]))]


def table(stages: Sequence[str], seeds: Sequence[Mapping[str, Losses]]) -> str:
    """Markdown table of ``seeds`` (stage -> losses, one mapping a seed); over several it says what +- is."""
    sets = list(dict.fromkeys(name for seed in seeds for stage in stages for name in seed.get(stage, {})))
    lines = [f"| stage | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for stage in stages:
        values = [[seed[stage][name] for seed in seeds if name in seed.get(stage, {})] for name in sets]
        if any(values):
            lines.append(f"| {stage} | {' | '.join(map(_entry, values))} |")
    if len(seeds) > 1:
        lines.append(f"\nMean of {len(seeds)} seeds +- half the range between the lowest and the highest.")
    return "\n".join(lines)


def _entry(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} +- {(max(values) - min(values)) / 2:.3f}"


def own_modality(experts: Mapping[str, Sequence[str]], losses: Mapping[str, Losses]) -> list[str]:
    """Reading 1: ``experts`` maps a warm-up to its own sets."""
    lines = []
    for expert, sets in experts.items():
        for name in sets:
            others = {other: losses[other][name] for other in experts if other != expert}
            best = min(others, key=others.__getitem__)
            gap = others[best] - losses[expert][name]
            verdict = "better" if gap > 0 else "NOT better"
            lines.append(f"{expert} on {name}: {losses[expert][name]:.3f}, {verdict} than {best} ({others[best]:.3f})")
    return lines


def against_best(stage: str, experts: Sequence[str], losses: Mapping[str, Losses]) -> list[str]:
    """Reading 2: ``stage`` against the best of ``experts`` on every set."""
    lines = []
    for name, value in losses[stage].items():
        best = min(experts, key=lambda expert: losses[expert][name])
        verdict = "at least as good as" if value <= losses[best][name] else "WORSE than"
        lines.append(f"{stage} on {name}: {value:.3f}, {verdict} the best expert, {best} ({losses[best][name]:.3f})")
    return lines


def change(before: str, after: str, losses: Mapping[str, Losses]) -> list[str]:
    """Reading 3: what ``after`` changed."""
    return [
        f"{after} on {name}: {losses[before][name]:.3f} -> {value:.3f} ({value - losses[before][name]:+.3f})"
        for name, value in losses[after].items()
    ]


def routing(run_dir: Path) -> list[str]:
    """Reading 4, late in training: mean k and null use by layer, and how far modalities differ in an expert."""
    use, mean_k = slot_use(run_dir), mean_k_by_layer(run_dir)
    lines = []
    for layer, modalities in sorted(use.items()):
        slots = sorted({slot for loads in modalities.values() for slot in loads})
        experts = [slot for slot in slots if slot.startswith("expert")]
        spread = {s: max(m.get(s, 0.0) for m in modalities.values()) - min(m.get(s, 0.0) for m in modalities.values())
                  for s in experts}  # fmt: skip
        widest = max(spread, key=spread.__getitem__)
        shares = ", ".join(f"{modality} {loads.get(widest, 0.0):.2f}" for modality, loads in modalities.items())
        nulls = [sum(v for slot, v in loads.items() if slot.startswith("null")) for loads in modalities.values()]
        lines.append(
            f"layer {layer}: mean k {mean_k[layer]:.2f}, null used by {min(nulls):.2f} to {max(nulls):.2f} of a modality's "
            f"tokens, {widest} by {shares}"
        )
    return lines
