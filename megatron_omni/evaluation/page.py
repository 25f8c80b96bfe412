"""``index.html`` of a results folder: a page that a person can leaf through, with the media beside it in ``media/``.

One static file without outside resources, which opens from a disk as from a web server. Its data are JSON in a script
element; answers and everything else in them are shown as text, never as HTML (``results_page.html``). Texts are cut at
``MOST_CHARACTERS``: ``samples/`` has them whole.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_omni.evaluation.page_media import PageMedia, Shown
from megatron_omni.evaluation.results import Line, SampleResult, Summary, read_samples, read_summary
from megatron_omni.foreign import read_text

PAGE = "index.html"
MOST_CHARACTERS = 4000
"""Of one text: ten thousand samples stay a page that a telephone opens."""
_TEMPLATE = Path(__file__).with_name("results_page.html")
_DATA = "/*DATA*/"
_SCRIPT = re.compile(r"<script>\n(.*)</script>", re.DOTALL)


def write_page(results_dir: Path, against: Path | None = None) -> Path:
    """Write the page of a results folder, compared with that of another where ``against`` is given; its path.

    ValueError where one of them is no results folder.
    """
    summary = read_summary(results_dir)
    before = read_summary(against) if against is not None else None
    media = PageMedia(results_dir)
    samples = []
    for task in summary.tasks:
        earlier = {line.row: line for line in read_samples(against, task)} if against is not None else {}
        samples += [_sample(task, line, earlier.get(line.row), media) for line in read_samples(results_dir, task)]
    data = {"tasks": _tasks(summary, before), "facts": _facts(summary, before), "samples": samples}
    return save_page(results_dir / PAGE, _TEMPLATE, data)


def save_page(page: Path, template: Path, data: Mapping[str, Any]) -> Path:
    """The page of a template, whole or not at all: its data set in as JSON, its policy with the digest of its one script."""
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_name(f".{page.name}.partial")
    partial.write_text(_filled(read_text(template), data), encoding="utf-8")
    partial.replace(page)
    return page


def _filled(template: str, data: Mapping[str, Any]) -> str:
    found = _SCRIPT.search(template)
    assert found is not None
    # Only this script runs, whatever the data say.
    digest = base64.b64encode(hashlib.sha256(("\n" + found[1]).encode()).digest()).decode()
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # In a script element only "<" can end it or begin a comment; the two separators end a line in old browsers.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return template.replace("SCRIPT_DIGEST", digest).replace(_DATA, text)


def _facts(summary: Summary, before: Summary | None) -> dict[str, Any]:
    facts = {
        "checkpoint": summary.checkpoint.path,
        "iteration": summary.checkpoint.iteration,
        "version": summary.version,
    }
    if before is not None:
        facts |= {"against": before.checkpoint.path, "against_iteration": before.checkpoint.iteration}
    groups = {name: group.score for name, group in summary.groups.items()}
    return facts | {"groups": groups}


def _tasks(summary: Summary, before: Summary | None) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "group": task.group,
            "metric": task.metric,
            "version": task.metric_version,
            "rule": task.rule,
            "higher": task.higher_is_better,
            "score": task.score,
            "stderr": task.stderr,
            "count": task.count,
            "skipped": sum(task.skipped.values()),
            "unparsed": task.unparsed,
            "before": before.tasks[name].score if before is not None and name in before.tasks else None,
        }
        for name, task in summary.tasks.items()
    ]


def _sample(task: str, line: Line, earlier: Line | None, media: PageMedia) -> dict[str, Any]:
    """Short names: there are ten thousand of these."""
    out: dict[str, Any] = {"task": task, "row": line.row, "id": line.id}
    if not isinstance(line, SampleResult):
        return out | {"skipped": line.skipped, "message": _cut(line.message)}
    out |= {
        "prompt": [{"role": turn["role"], "text": _cut(turn["content"])} for turn in line.prompt],
        "media": [shown_medium(media.show(item["kind"], item["path"])) for item in line.media],
        "drawn": [
            {"kind": "image", "name": f"{name}: {file}", "file": file}
            for name, file in (("drawn", line.drawn), ("wanted", line.wanted))
            if file
        ],
        "expected": [_cut(text) for text in line.expected],
        "options": line.options and [_cut(text) for text in line.options],
        "answer": _cut(_without_thought(line)),
        "thought": line.thought and _cut(line.thought),
        "extracted": line.extracted and _cut(line.extracted),
        "score": line.score,
        "correct": line.correct,
        "reason": line.finish_reason,
        "seconds": line.seconds,
        "tokens": line.tokens,
    }
    if isinstance(earlier, SampleResult):
        out["before"] = {
            "answer": _cut(_without_thought(earlier)), "score": earlier.score, "correct": earlier.correct,
            "same": earlier.answer == line.answer,
        }  # fmt: skip
    elif earlier is not None:
        out["before"] = {"skipped": earlier.skipped}
    return out


def _without_thought(line: SampleResult) -> str:
    return line.answer.rpartition("</think>")[2].lstrip() if line.thought is not None else line.answer


def shown_medium(shown: Shown) -> dict[str, Any]:
    """As the script of a page wants it."""
    return {"kind": shown.kind, "name": shown.name, "file": shown.file} | (
        {"problem": shown.problem} if shown.problem else {}
    )


def _cut(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]} … ({more:,} more characters in samples/)"
