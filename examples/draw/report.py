"""scores.json of ``make draw``, its table, and a page with pictures.

Reads what measure.py wrote. What each score is: scoring.py, and

    judge           real, codec: held-out scenes that the judge sees whole, as they are and through the codec; psnr of the
                    codec; grid of drawn pictures
    unaligned       text to picture of a model that had no alignment, as many steps (CONTROLS=1, else null)
    think           with: riddles with their thought; swapped: with that of the next riddle; without: by a model that had the
                    thoughts cut out of training and prompt (CONTROLS=1, else null)
    understanding   the quickstart's held-out scores before and after
    frozen          tensors of the language model that are the same, bit for bit, before and after, and those that are not
"""

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from examples.draw import scoring
from examples.quickstart.pictures import read_metrics, smooth

SCORES, PAGE, MEASURED = "scores.json", "index.html", "measured"
NAMED = "recognise.png"
NUM_NAMED, NUM_SHOWN = 12, 24
STAGES = ("pictures", "align", "tasks", "anneal")
Row = dict[str, Any]


def measured(out: Path, name: str) -> Path:
    """File of measured rows; its pictures lie in the .npz beside it."""
    return out / MEASURED / f"{name}.json"


def read(out: Path, name: str) -> Row:
    """Of a file of rows; nothing where it was not measured."""
    path = measured(out, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def scores_of(out: Path) -> Row:
    """All of scores.json but what says when and of what."""
    reference, model = read(out, "reference"), read(out, "anneal")
    unaligned, bare = read(out, "unaligned"), read(out, "bare")
    thoughts = {name: scoring.mean([row["right"] for row in model[f"think_{name}"]]) for name in ("with", "swapped")}
    without = scoring.mean([row["right"] for row in bare["think_without"]]) if bare else None
    plain = scoring.text_scores(unaligned["draw"]) if unaligned else {"single": None, "both": None}
    return {
        "judge": reference["judge"] | {"grid": model["grid"]},
        "text_to_image": scoring.text_scores(model["draw"]) | {"fd_judge": model["fd_judge"]},
        "unaligned": {name: plain[name] for name in ("single", "both")},
        "edit": scoring.edit_scores(model["edit"]),
        "restore": scoring.restore_scores(model["restore"]),
        "edges": scoring.edge_scores(model["edges"]),
        "think": thoughts | {"without": without, "count": len(model["think_with"])},
        "understanding": {name: model["understanding"][name] for name in ("before", "after")},
        "frozen": model["understanding"]["frozen"],
    }


def write(out: Path, scores: Row) -> None:
    """The page and, last, scores.json; print the table."""
    name_sheet(out)
    (out / PAGE).write_text(page(out, scores), encoding="utf-8")
    for name, value in lines(scores):
        print(f"{name:36} {value}")
    print(f"\nlook at {out / PAGE}")
    (out / SCORES).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def lines(scores: Row, above: str = "") -> list[tuple[str, str]]:
    """Name and value of every score."""
    found = []
    for name, value in scores.items():
        if isinstance(value, dict):
            found += lines(value, f"{above}{name} ")
        elif above or name == "seconds":
            found.append((f"{above}{name}".replace("_", " "), str(value)))
    return found


# ---------------------------------------------------------------------------------------------------------- to look at


def pictures_of(out: Path, name: str, part: str) -> np.ndarray:
    """[N, 3, 64, 64] uint8 as they were drawn, in the order of the rows."""
    with np.load(measured(out, name).with_suffix(".npz")) as found:
        return found[part]


def name_sheet(out: Path) -> None:
    """The first drawn pictures with their numbers alone: to be named from the list before the prompts are read."""
    pictures = pictures_of(out, "anneal", "draw")[:NUM_NAMED]
    side, columns = 192, 4
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * (side + 20)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        x, y = number % columns * side, number // columns * (side + 20)
        sheet.paste(
            Image.fromarray(picture.transpose(1, 2, 0)).resize((side, side), Image.Resampling.NEAREST), (x, y + 20)
        )
        pen.text((x + 4, y + 4), str(number), fill="black")
    sheet.save(out / NAMED)


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}img{image-rendering:pixelated}
td,th{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #ddd}.wide{overflow-x:auto}.charts img{max-width:100%}
.sheet{display:flex;flex-wrap:wrap;gap:12px}.sheet figure{margin:0;font-size:12px;width:96px}.no{color:#b00}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#444}}"""


def page(out: Path, scores: Row) -> str:
    """Scores, sheets and curves as one HTML file."""
    values = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in lines(scores))
    model = read(out, "anneal")
    sheets = "".join(
        f"<h2>{title}</h2><div class=sheet>{_sheet(out, part, model[part])}</div>"
        for part, title in (
            ("draw", "Held-out captions, the first as they come"),
            ("edit", "Edits: source, drawn"),
            ("restore", "Restoration: damaged, drawn"),
            ("edges", "Edges to picture: edges, drawn"),
            ("think_with", "Riddles with their thought"),
        )
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>make draw</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<h1>Learning to draw</h1>
<p>{scores["started"]}, commit {escape(scores["commit"][:10])}, {scores["seconds"]:.0f} s. Pictures are not chosen: the first
of each set, 64 x 64 pixels. What the judge does not see right is red.</p>
{sheets}
<h2>Scores</h2><div class="wide"><table>{values}</table></div>
<h2>Guidance and steps</h2><div class=charts>{_chart(_sweep(model["sweep"]))}</div>
<h2>Training</h2><div class=charts>{_chart(_curves(out))}</div>
<h2>Costs</h2><div class="wide"><table>{_costs(out)}</table></div></html>
"""


def _sheet(out: Path, part: str, rows: list[Row]) -> str:
    drawn, found = pictures_of(out, "anneal", part), []
    sources = pictures_of(out, "anneal", f"{part}_source") if part in ("edit", "restore", "edges") else None
    for number, row in enumerate(rows[:NUM_SHOWN]):
        shown = [drawn[number]] if sources is None else [sources[number], drawn[number]]
        wrong = not row.get("right", row.get("changed", True))
        words = row.get("caption") or row.get("edit") or row.get("damage") or f"F1 {row['f1']:.2f}"
        said = escape(str(words) + (f" (seen: {row['seen']})" if wrong else ""))
        images = "".join(
            f'<img width=96 height=96 src="{_inline(Image.fromarray(one.transpose(1, 2, 0)))}">' for one in shown
        )
        found.append(f"<figure>{images}<figcaption{' class=no' if wrong else ''}>{said}</figcaption></figure>")
    return "".join(found)


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _chart(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _sweep(rows: list[Row]) -> Any:
    """Accuracy by guidance at the usual steps, and by steps at the usual guidance."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, name in zip(axes, ("guidance", "steps")):
        some = sorted((row for row in rows if row["varied"] == name), key=lambda row: row[name])
        for score in ("single", "both"):
            axis.plot([row[name] for row in some], [row[score] for row in some], "o-", label=score)
        axis.set_xlabel(name)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right, by the judge")
    axes[0].legend()
    return figure


def _curves(out: Path) -> Any:
    """Flow loss of every stage by task of the pictures, and distances from the teachers, over steps."""
    stages = [stage for stage in STAGES if (out / stage / "metrics.jsonl").exists()]
    figure, axes = plt.subplots(1, len(stages), figsize=(3 * len(stages) + 1, 3), layout="constrained", squeeze=False)
    for axis, stage in zip(axes[0], stages):
        records = read_metrics(out / stage / "metrics.jsonl")
        names = sorted(
            {name for record in records for name in record if name.startswith(("flow loss/task/", "align/"))}
        )
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            steps, losses = zip(*points)
            axis.plot(
                steps, smooth(list(losses), max(1, len(losses) // 20)), label=name.removeprefix("flow loss/task/")
            )
        axis.set_title(stage, fontsize=10)
        axis.set_xlabel("step")
        if names:
            axis.legend(fontsize=6)
    return figure


def _costs(out: Path) -> str:
    """Steps and seconds of training of each stage."""
    found = ["<tr><th>stage</th><th>steps</th><th>seconds a step, median</th><th>seconds</th></tr>"]
    for stage in STAGES:
        if (path := out / stage / "metrics.jsonl").exists():
            records = read_metrics(path)
            times = [record["step time"] for record in records if "step time" in record]
            steps, median = records[-1]["step"], float(np.median(times)) if times else 0.0
            found.append(f"<tr><td>{stage}</td><td>{steps}</td><td>{median:.3f}</td><td>{steps * median:.0f}</td></tr>")
    return "".join(found)
