"""scores.json of `make speak`, its table, and a page with players.

Reads what measure.py and loop.py wrote. Of the scores:

    wer             wrong, missing and surplus words by words, of the closed vocabulary of 64
    voice           share of clips that the judge of voices gives to the voice that was asked for
    swap_new, _old  with the name of another voice: clips given to that voice, and to the one before
    prompt_words    clips in which a word of the prompt is heard; prompt_planted: of recordings that do read it aloud
    style           of pitch, rate and loudness, the share that is as described
    length_ratio    codes by those of the recordings of the same words
    joins           prefix, none: neighbours (prompt `any`) that are given to one voice, with the second of sound before and
                    without; f0_ratio, energy_ratio: mean jumps of log F0 and of loudness at joins (a voice is named) by
                    those of neighbouring recordings; wer_shift: WER with the prefix less that without
    expert_use      smallest share of the tokens that an expert has in any layer, at the end of training
"""

import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from examples.quickstart.pictures import LOAD, read_metrics

REFERENCE = ("natural", "codec")
SCORES, PAGE, MEASURED = "scores.json", "index.html", "measured"
Rows = list[dict[str, Any]]


def measured(out: Path, name: str) -> Path:
    """File of measured rows."""
    return out / MEASURED / f"{name}.json"


def read(out: Path, name: str) -> dict[str, Any]:
    """Of a file of rows."""
    return json.loads(measured(out, name).read_text(encoding="utf-8"))


def scores_of(out: Path) -> dict[str, Any]:
    """All of scores.json but what says when and of what."""
    reference, speech = read(out, "reference"), read(out, "speech")
    return {
        **{kind: named_scores(reference[kind]["named"]) for kind in REFERENCE},
        "dense": named_scores(read(out, "dense")["named"]),
        "speech": {
            **named_scores(speech["named"]),
            **swap_scores(speech["swapped"]),
            "prompt_words": _mean([bool(row["of_prompt"]) for row in speech["named"]]),
            "prompt_planted": _mean([bool(row["of_prompt"]) for row in reference["planted"]["named"]]),
            "style": _mean([row["right"] for row in speech["styled"]]),
            "length_ratio": _ratio(speech["named"], "codes", "codes_natural"),
            "cut": sum(row["cut"] for row in speech["named"] + speech["joins"]),
            "expert_use": expert_use(out / "anneal" / "metrics.jsonl"),
        },
        "joins": join_scores(speech["joins"], reference["natural"]["joins"]),
        "whole": whole_scores(speech["whole"]),
        "streaming": stream_scores(speech["stream"]),
        "loop": loop_scores(read(out, "loop")["loop"]),
    }


def named_scores(rows: Rows) -> dict[str, float | int]:
    """Words and voice."""
    words = sum(len(row["said"]) for row in rows)
    return {
        "wer": round(sum(row["errors"] for row in rows) / max(words, 1), 4),
        "voice": _mean([row["named"] == row["voice"] for row in rows]),
        "count": len(rows),
    }


def swap_scores(rows: Rows) -> dict[str, float]:
    """Another voice's name."""
    return {
        "swap_new": _mean([row["named"] == row["swapped"] for row in rows]),
        "swap_old": _mean([row["named"] == row["voice"] for row in rows]),
    }


def join_scores(rows: Rows, natural: Rows) -> dict[str, float | int]:
    """Of neighbouring pieces."""

    def arm(kind: str, context: str) -> Rows:
        return [row for row in rows if (row["kind"], row["context"]) == (kind, context)]

    named, bare = arm("voice", "prefix"), arm("voice", "none")
    wers = [sum(row["errors"] for row in some) / max(sum(row["words"] for row in some), 1) for some in (named, bare)]
    first = Counter(row["named"][0] for row in arm("any", "prefix") if row["named"])
    return {
        "prefix": same_voice(arm("any", "prefix")),
        "none": same_voice(arm("any", "none")),
        "f0_ratio": _jump_ratio(named, natural, "pitch_octaves"),
        "energy_ratio": _jump_ratio(named, natural, "loudness_db"),
        "wer_shift": round(wers[0] - wers[1], 4),
        "most_common_first": round(max(first.values(), default=0) / max(sum(first.values()), 1), 4),
        "count": sum(max(0, len(row["named"]) - 1) for row in arm("any", "prefix")),
    }


def same_voice(rows: Rows) -> float:
    """Share of neighbours."""
    pairs = [pair for row in rows for pair in zip(row["named"], row["named"][1:])]
    return _mean([one == other and one is not None for one, other in pairs])


def jumps(rows: Rows, what: str) -> list[float]:
    """From each piece to the next, where both have a value."""
    found = [abs(b - a) for row in rows for a, b in zip(row[what], row[what][1:]) if a is not None and b is not None]
    return [value for value in found if np.isfinite(value)]


def _jump_ratio(rows: Rows, natural: Rows, what: str) -> float | None:
    made, recorded = jumps(rows, what), jumps(natural, what)
    return round(float(np.mean(made) / np.mean(recorded)), 4) if made and recorded else None


def stream_scores(rows: Rows) -> dict[str, float | bool | None]:
    """The worst signal to noise, times over all texts."""
    sound = sum(row["sound"] for row in rows)
    return {
        "snr_db": round(min((row["snr_db"] for row in rows), default=0.0), 2),
        "same_samples": bool(rows) and all(row["same_samples"] for row in rows),
        "rtf": round(sum(row["seconds"] for row in rows) / sound, 4) if sound else None,
        "first_sound_s": round(float(np.median([row["first_sound_s"] for row in rows])), 4) if rows else None,
    }


def whole_scores(rows: Rows) -> dict[str, Any]:
    """Of one long text: seconds, pieces that were cut at the limit, one voice at both ends, memory after a fifth and at last."""
    if not rows:
        return {}
    (row,) = rows
    return {
        "sound_s": round(row["sound"], 1),
        "pieces": row["pieces"],
        "cut": row["cut"],
        "same_voice": row["named"][0] is not None and row["named"][0] == row["named"][1],
        "memory_mib": row["memory_mib"],
    }


def loop_scores(rows: Rows) -> dict[str, float | int]:
    """Of questions that are answered aloud: what the language model wrote, and what is heard of what is right."""
    right = [row for row in rows if row["right"]]
    return {
        "voice": _mean([row["voice"] for row in rows]),
        "right_text": _mean([row["right"] for row in rows]),
        "right_by_ear": _mean([row["by_ear"] for row in right]),
        "count": len(rows),
    }


def expert_use(metrics: Path) -> float | None:
    """See the module; over the last quarter of the logged steps."""
    records = read_metrics(metrics)
    records = records[-max(1, len(records) // 4) :]
    uses: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for name, value in record.items():
            if found := LOAD.match(name):
                uses.setdefault((found[1], found[4]), []).append(value)
    means = [float(np.mean(values)) for values in uses.values()]
    return round(min(means), 4) if means else None


def _ratio(rows: Rows, above: str, below: str) -> float:
    return round(sum(row[above] for row in rows) / max(sum(row[below] for row in rows), 1), 4)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4) if values else 0.0


# -------------------------------------------------------------------------------------------------- to look at


def write(out: Path, scores: dict[str, Any]) -> None:
    """The page and, last, scores.json; print the table."""
    (out / PAGE).write_text(page(out, scores), encoding="utf-8")
    for name, value in lines(scores):
        print(f"{name:28} {value}")
    print(f"\nlisten at {out / PAGE}")
    (out / SCORES).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def lines(scores: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of every score."""
    found = []
    for name, value in scores.items():
        if isinstance(value, dict):
            found += [(f"{name} {key.replace('_', ' ')}", str(one)) for key, one in value.items()]
        elif name == "seconds":
            found.append((name, str(value)))
    return found


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
td,th{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #ddd}audio{width:13rem;height:2rem}.wide{overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#444}}"""


def page(out: Path, scores: dict[str, Any]) -> str:
    """Scores and players as one HTML page; the sounds lie beside it."""
    values = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in lines(scores))
    reference, speech = read(out, "reference"), read(out, "speech")
    clips = _players(out, speech["named"], reference["natural"]["named"])
    other = "".join(
        f"<tr><td>{escape(path.stem)}</td><td>{_player(out, path)}</td></tr>"
        for folder in ("speech", "loop", "reference")
        for path in sorted((out / MEASURED / folder).glob("*.ogg"))
        if not path.stem.startswith(("named.", "natural.", "codec."))
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>make speak</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<h1>Learning to speak</h1>
<p>{scores["started"]}, commit {escape(scores["commit"][:10])}, {scores["seconds"]:.0f} s.</p>
<h2>The same words: recorded, through the codec, spoken</h2>
<div class="wide"><table><tr><th>text</th><th>voice</th><th>recorded</th><th>codec</th><th>spoken</th><th>heard</th></tr>
{clips}</table></div>
<h2>Scores</h2><div class="wide"><table>{values}</table></div>
<h2>Others</h2><p>Names of other voices, styles, texts of three pieces (prompt any or a voice, with and without the sound
before), questions that the language model answers, prompts that are read aloud.</p>
<div class="wide"><table>{other}</table></div></html>
"""


def _players(out: Path, rows: Rows, natural: Rows) -> str:
    found = []
    for row in rows:
        files = [
            out / MEASURED / folder / f"{name}.{row['number']}.ogg"
            for folder, name in (("reference", "natural"), ("reference", "codec"), ("speech", "named"))
        ]
        if all(file.exists() for file in files):
            cells = "".join(f"<td>{_player(out, file)}</td>" for file in files)
            said, heard = " ".join(row["said"]), " ".join(row["heard"])
            found.append(f"<tr><td>{escape(said)}</td><td>{row['voice']}</td>{cells}<td>{escape(heard)}</td></tr>")
    return "".join(found)


def _player(out: Path, path: Path) -> str:
    return f'<audio controls preload="none" src="{escape(str(path.relative_to(out)))}"></audio>'
