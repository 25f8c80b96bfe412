"""What a run of ``make reason`` leaves to read: scores.json, table, curves, and the same questions before and after.

Reads what training and measure.py wrote: ``metrics.jsonl`` of the stages and ``measured/*.json``. Seconds of a stage are wall
time of its process, by its ``goodput.jsonl``; *busy* seconds leave out its start and its saves.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.quickstart.pictures import read_metrics, smooth
from examples.reason.questions import CHANCE, SOURCES

SCORES, PAGE, ROLLOUTS, CURVES = "scores.json", "index.html", "rollouts.html", "curves.png"
STAGES = {"cold_start": "chosen", "gspo": "gspo", "dpo": "dpo", "gspo_2": "gspo_2"}
"""Stage -> what was measured of it."""
SHARES = ("greedy", "sampled", "no_think", "swapped_thought", "swapped_media", "format", "contradiction")
COLUMNS = (*SHARES, "length", "clipped", "count", "seconds")
SHOWN = 8
"""Questions of each source on the page of rollouts."""


def measured(out: Path, name: str) -> Path:
    """File of measure.py's results."""
    return out / "measured" / f"{name}.json"


def entries(out: Path, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Of a file of results, by the name of checkpoint or run and that of the set of questions."""
    found = json.loads(measured(out, name).read_text(encoding="utf-8"))
    return {(Path(one["checkpoint"]).name, Path(one["questions"]).name): one for one in found}


def choose(out: Path) -> Path:
    """The checkpoint of the cold start that is right most often, sampled, on the choice set; the first of equals."""
    found = [one for (_, name), one in entries(out, "cold_start").items() if name == "choice"]
    return Path(max(found, key=lambda one: one["scores"]["all"]["sampled"])["checkpoint"])


def stage_scores(out: Path) -> dict[str, Any]:
    """``chance`` and ``stages``, and room for the controls."""
    found = entries(out, "stages")
    stages = {}
    for stage, name in STAGES.items():
        scores = found[name, "held_out"]["scores"]["all"]
        run = out / stage
        kept = {key: scores[key] for key in (*SHARES, "length", "count")}
        stages[stage] = {**kept, "clipped": clipped(run), "seconds": round(wall(run), 1)}
    return {"chance": round(fmean(CHANCE.values()), 4), "stages": stages, "control": None, "sft_more": None}


def control_scores(out: Path) -> dict[str, Any]:
    """Of the controls."""
    found = entries(out, "controls")
    control, more = (found[name, "held_out"]["scores"]["all"] for name in ("control", "sft_more"))
    return {
        "control": {
            **{key: control[key] for key in ("sampled", "greedy", "count")},
            "iterations": iterations(out / "control"),
            "grad_norm": round(mean_of(out / "control", "grad-norm") or 0.0, 4),
        },
        "sft_more": {"sampled": more["sampled"], "count": more["count"]},
    }


def seed_scores(out: Path) -> dict[str, Any]:
    """Greedy and sampled accuracy of every seed of GSPO, their means, and what they started from."""
    found = entries(out, "seeds")
    runs = {name: {way: one["scores"]["all"][way] for way in ("greedy", "sampled")} for (name, _), one in found.items()}
    start = entries(out, "stages")["chosen", "held_out"]["scores"]["all"]
    means = {way: round(fmean(run[way] for run in runs.values()), 4) for way in ("greedy", "sampled")}
    return {"start": {way: start[way] for way in means}, "runs": runs, "mean": means}


# -------------------------------------------------------------------------------------------------- of training


def mean_of(run: Path, name: str) -> float | None:
    """Mean of a metric over the logged steps; None where it is in none."""
    values = [record[name] for record in read_metrics(run / "metrics.jsonl") if name in record]
    return fmean(values) if values else None


def clipped(run: Path) -> float | None:
    """Share of sequences that were clipped; None of a stage without ratios."""
    low, high = mean_of(run, "clip/low"), mean_of(run, "clip/high")
    return None if low is None or high is None else round(low + high, 4)


def iterations(run: Path) -> int:
    """Iterations of a reinforced run."""
    names = {path.name.split(".")[0] for path in (run / "rollouts").glob("iter_*.jsonl")}
    return len(names)


def wall(run: Path) -> float:
    """Seconds of a finished run."""
    return float(_goodput(run)["wall"])


def busy(run: Path) -> float:
    """Seconds of a finished run without its start and its saves."""
    found = _goodput(run)
    return float(found["wall"]) - sum(found["parts"].get(part, 0.0) for part in ("setup", "checkpoint"))


def _goodput(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "goodput.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(row for row in reversed(rows) if row.get("finished"))


def steps_in_the_time_of_gspo(out: Path) -> int:
    """Supervised steps that take as long on the same ranks as GSPO did."""
    steps = read_metrics(out / "cold_start" / "metrics.jsonl")[-1]["step"]
    return max(1, round(busy(out / "gspo") / busy(out / "cold_start") * steps))


# -------------------------------------------------------------------------------------------------- to look at


def write(out: Path, scores: dict[str, Any]) -> None:
    """Curves, pages and, last, scores.json; print the table."""
    draw_curves(out)
    write_rollouts(out)
    (out / PAGE).write_text(page(out, scores), encoding="utf-8")
    for line in table(scores):
        print("  ".join(f"{cell:>{max(10, len(head))}}" for cell, head in zip(line, ("stage          ", *COLUMNS))))
    print(f"\nlook at {out / PAGE} and {out / ROLLOUTS}")
    (out / SCORES).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def table(scores: dict[str, Any]) -> list[list[str]]:
    """Head and a line for each stage and control, as text."""
    rows = {**scores["stages"], "control": scores["control"], "sft_more": scores["sft_more"]}
    lines = [["stage", *COLUMNS]]
    for name, row in rows.items():
        if row is not None:
            lines.append([name, *(_cell(column, row.get(column)) for column in COLUMNS)])
    return lines


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if column == "count" else f"{value:.1f}" if column in ("length", "seconds") else f"{value:.3f}"


def draw_curves(out: Path) -> None:
    """Accuracy over the cold start; over the reinforced runs right answers, clipped sequences, length and entropy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    cold = axes[0, 0]
    found = entries(out, "cold_start")
    for number, (name, way) in enumerate(
        (name, way) for name in ("held_out", "choice") for way in ("greedy", "sampled")
    ):
        points = [(int(run.removeprefix("iter_")), one["scores"]["all"][way])
                  for (run, questions), one in found.items() if questions == name]  # fmt: skip
        cold.plot(*zip(*sorted(points)), marker=".", color=f"C{number}", label=f"{name.replace('_', ' ')}, {way}")
    cold.axvline(int((out / "chosen").resolve().name.removeprefix("iter_")), color="0.6", linestyle=":", label="chosen")
    cold.axhline(fmean(CHANCE.values()), color="0.6", linewidth=0.8, label="chance")
    cold.set(title="Cold start: right answers", xlabel="supervised step", ylim=(0, 1))
    runs = [name for name in ("gspo", "gspo_2", "control") if (out / name / "metrics.jsonl").exists()]
    panels = {
        axes[0, 1]: ("Reinforcement: right answers to the prompts of a step", "reward/right", (0, 1)),
        axes[1, 0]: ("Tokens of a response", "rollout/length", None),
        axes[1, 1]: ("Entropy of a token (nats)", "entropy", None),
    }
    for axis, (title, metric, limits) in panels.items():
        for number, run in enumerate(runs):
            records = read_metrics(out / run / "metrics.jsonl")
            points = [(record["step"], record[metric]) for record in records if metric in record]
            if points:
                steps, values = zip(*points)
                axis.plot(steps, values, color=f"C{number}", alpha=0.3, linewidth=0.8)
                axis.plot(steps, smooth(list(values), 8), color=f"C{number}", label=run)
        axis.set(title=title, xlabel="step", ylim=limits)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.title.set_fontsize(10)
    figure.savefig(out / CURVES, dpi=110)
    plt.close(figure)


def write_rollouts(out: Path) -> None:
    """The page of tools/show_rollouts.py over held-out questions: sampled responses before reinforcement and at the end."""
    from megatron_omni.evaluation.rollouts_page import write_rollouts_page

    moments = []
    for stage in ("cold_start", "gspo_2"):
        run = out / "held_out" / stage
        said = entries(out, "stages")[STAGES[stage], "held_out"]["responses"]["sampled"]
        _as_rollouts(run, said, out / "data" / "held_out")
        moments.append((run, 0))
    write_rollouts_page(out / ROLLOUTS, moments[1], moments[0])


def _as_rollouts(run: Path, said: Sequence[dict[str, Any]], questions: Path) -> None:
    """Measured responses as rollouts on disk."""
    from examples.reason.ask import read_questions
    from examples.reason.questions import contradicts
    from megatron_omni.evaluation.asking import media_of
    from megatron_omni.rewards.rollouts import Rollout, write_rollouts
    from megatron_omni.rewards.shape import is_well_formed

    asked = {one.record.id: (number, one) for number, one in enumerate(read_questions(questions, limit=SHOWN))}
    rows: list[Rollout] = []
    counts: dict[str, int] = {}
    for one in said:
        if one["id"] not in asked:
            continue
        number, question = asked[one["id"]]
        g = counts[one["id"]] = counts.get(one["id"], -1) + 1
        rewards = {
            "right": float(one["text"].rpartition("</think>")[2].strip() == one["expected"]),
            "format": float(is_well_formed(one["text"])),
            "contradicts": float(contradicts(one["text"])),
        }
        record = question.record
        turns = [{"role": turn.role, "content": turn.content} for turn in record.messages if turn.role != "assistant"]
        rows.append(Rollout(
            iteration=0, prompt=number, source=record.source, record=number, id=record.id, where=record.where, g=g,
            turns=turns, media=media_of(record), solution=question.expected, text=one["text"], tokens=one["tokens"],
            token_ids=(), finish="length" if one["cut"] else "stop", rewards=rewards, total=rewards["right"],
            advantage=None,
        ))  # fmt: skip
    write_rollouts(run, rows, iteration=0, rank=0, ranks=1)


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}img{max-width:100%}.wide{overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#444}img{filter:brightness(.9)}}"""


def page(out: Path, scores: dict[str, Any]) -> str:
    """Table and curves as one HTML page."""
    head, *lines = table(scores)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    by_source = "".join(
        f"<tr><td>{stage}, {source}</td>"
        + "".join(f"<td>{_cell(way, one['scores'][source][way])}</td>" for way in SHARES)
        + "</tr>"
        for (name, _), one in entries(out, "stages").items()
        for stage in [stage for stage, run in STAGES.items() if run == name]
        for source in SOURCES
    )
    heads = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in head)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>make reason</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<h1>Learning to think</h1>
<p>{scores["started"]}, commit {escape(scores["commit"][:10])}, {scores["seconds"]:.0f} s. A guess is right in
{scores["chance"]:.3f}. <a href="{ROLLOUTS}">The same questions before and after, with their media</a>.</p>
<div class="wide"><table><tr>{heads}</tr>{body}</table></div>
<p>Shares of right answers to held-out questions: greedy; sampled at temperature 1; greedy without a thought; that follow
another question's thought; with another question's media. Of sampled responses: well formed; answers that contradict the
thought; tokens. Clipped: share of the sequences of training.</p>
<img src="{CURVES}" alt="Curves of training">
<h2>By source</h2><div class="wide"><table><tr><th>stage</th>{"".join(f"<th>{name}</th>" for name in SHARES)}</tr>
{by_source}</table></div></html>
"""
