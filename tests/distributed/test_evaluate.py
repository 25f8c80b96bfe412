"""``megatron-omni evaluate`` on a tiny model: layouts, kills, training's own scores, likelihoods, comparison, bad input."""

import contextlib
import io
import json
import math
import os
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.cli.evaluate import main, parse
from megatron_omni.evaluation import evaluate as evaluating
from megatron_omni.evaluation.held_out import HeldOutScores
from megatron_omni.evaluation.results import Line, SampleResult, SkippedSample, Summary, read_samples, read_summary
from megatron_omni.evaluation.running import answers_of
from megatron_omni.evaluation.task import load_tasks
from megatron_omni.generation.engine import EngineLimits
from megatron_omni.generation.load import open_checkpoint
from megatron_omni.training.setup import Run
from tests.distributed.harness import Rank, RankFailure, run_ranks
from tests.distributed.tiny_run import OVERLAP, chat, make_corpus, records, run_tiny, tiny_recipe
from tests.unit.test_results_page import data_of

TASKS = """
metric: cer
max_new_tokens: 5
group: tiny
tasks:
  held: {data: held_out.jsonl}
  exact: {data: mixed.jsonl, metric: exact_match, group: ""}
"""


@dataclass(frozen=True)
class Trained:
    run_dir: Path
    corpus: Path
    metrics: dict[str, float]
    """Of the last evaluation."""


def with_scores(run: Run) -> None:
    run.score = HeldOutScores(run.recipe)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three steps with large weights, so that answers differ; held-out sets are scored on the way, under both overlaps."""
    directory = tmp_path_factory.mktemp("evaluate")
    corpus = make_corpus(directory / "corpus")
    mixed = [
        json.loads(line) for name in ("image", "text") for line in (corpus / f"{name}.jsonl").read_text().splitlines()
    ]
    rows = [
        *mixed[:6],
        chat("<image> x", "one") | {"images": ["none.png"], "id": "lost"},
        *mixed[-6:],
        chat("long " * 200, "x"),
    ]
    lines = [json.dumps(row) for row in rows]
    lines[2] = '{"messages": "x"}'
    (corpus / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    (corpus / "tasks.yaml").write_text(TASKS)
    held_out = {"path": str(corpus / "held_out.jsonl"), "epochs": 1}
    sets = [
        {"name": "held", "metric": "perplexity", **held_out},
        {"name": "read", "metric": "cer", "max_new_tokens": 5, **held_out},
    ]
    settings: dict[str, Any] = {
        "model__init_method_std": 0.25,
        "data__eval_sources": sets,
        "log__eval_interval": 3,
        **OVERLAP,
    }
    recipe = tiny_recipe(corpus, directory / "run", train_iters=3, **settings)
    run_tiny(recipe, 2, with_scores)
    return Trained(directory / "run", corpus, records(recipe)[-1])


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


def run_command(rank: Rank, arguments: list[str], port: int, dies_after: int | None = None) -> Outcome:
    if rank.world_size > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in {"RANK": rank.index, "WORLD_SIZE": rank.world_size, **address}.items()}
    if dies_after is not None and rank.index == 0:
        evaluating.write_line = killed_at(dies_after)  # type: ignore[assignment]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return Outcome(status, out.getvalue(), err.getvalue())


def killed_at(count: int) -> Any:
    """``write_line`` until that many lines are there; of the next one the process only writes a half."""
    write, written = evaluating.write_line, []

    def write_line(file: Any, task: str, line: Line) -> None:
        if len(written) == count:
            file.write('{"task": "held", "row": 3, "id"')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, task, line)
        written.append(line)

    return write_line


def command(*arguments: object, ranks: int = 1, dies_after: int | None = None) -> list[Outcome]:
    """The outcome of the command on each rank, in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_ranks(run_command, ranks, [str(a) for a in arguments], port, dies_after)


def lines_of(out: Path, task: str) -> list[Any]:
    """Lines without what a clock says."""
    values = [
        line if isinstance(line, SkippedSample) else vars(line) | {"seconds": 0} for line in read_samples(out, task)
    ]
    assert all(isinstance(line, SkippedSample) or line["row"] >= 0 for line in values)
    return values


@pytest.fixture(scope="module")
def alone(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one rank."""
    out = tmp_path_factory.mktemp("alone") / "out"
    outcome = command(trained.run_dir, "--tasks", trained.corpus / "tasks.yaml", "--out", out, "--batch-size", 3)[0]
    assert outcome.status == 0, outcome.err
    return out


def test_samples_scores_and_what_could_not_be_used(trained: Trained, alone: Path) -> None:
    summary, lines = read_summary(alone), read_samples(alone, "exact")
    assert [line.row for line in lines] == list(range(14))
    assert {line.row: line.skipped for line in lines if isinstance(line, SkippedSample)} == {
        2: "bad_type", 6: "missing_media", 13: "too_long",
    }  # fmt: skip
    first = lines[0]
    assert isinstance(first, SampleResult)
    assert first.prompt == [{"role": "user", "content": "<image> which colour"}] and first.expected == ["red"]
    assert first.media == [{"kind": "image", "path": str(trained.corpus / "0.png")}]
    assert (first.finish_reason, first.tokens) in {("length", 5), *(("stop", n) for n in range(1, 6))}
    exact, held = summary.tasks["exact"], summary.tasks["held"]
    assert exact.skipped == {"bad_type": 1, "missing_media": 1, "too_long": 1} and exact.count == 11
    assert exact.first_prompt == "<|im_start|>user\n<image> which colour<|im_end|>\n<|im_start|>assistant\n"
    answers = [line for line in read_samples(alone, "held") if isinstance(line, SampleResult)]
    errors, letters = (sum(line.statistics[i] for line in answers if line.statistics) for i in (0, 1))
    assert held.score == errors / letters and held.stderr is not None and held.count == 12
    assert len({line.answer for line in answers}) > 3
    assert summary.groups["tiny"].tasks == ["held"] and summary.groups["tiny"].score == held.score
    assert 0 < summary.step_seconds <= summary.wall_seconds and summary.checkpoint.iteration == 3
    assert [(s["task"], s["row"]) for s in data_of(alone / "index.html")["samples"] if s["task"] == "exact"] == [
        ("exact", row) for row in range(14)
    ]
    table = (alone / "table.md").read_text()
    assert re.search(r"\| held +\| cer \(lower is better\)", table) and "mean of tiny" in table


def test_killed_twice_and_finished_on_four_ranks_it_is_the_same(trained: Trained, alone: Path, tmp_path: Path) -> None:
    words = [trained.run_dir, "--tasks", trained.corpus / "tasks.yaml", "--out", tmp_path / "out"]
    for ranks, dies_after in ((2, 2), (2, 1)):
        with pytest.raises(RankFailure):  # of whichever rank the harness hears first
            command(*words, ranks=ranks, dies_after=dies_after)
        assert (tmp_path / "out" / "parts" / "0.jsonl").read_text().endswith('"row": 3, "id"')
    assert not (tmp_path / "out" / "summary.json").exists()
    before = sum(len(read_samples(tmp_path / "out", task)) for task in ("held", "exact"))
    assert before >= 2  # of the first start; those of the second are in parts/
    last = command(*words, ranks=4)
    assert [outcome.status for outcome in last] == [0] * 4, last[0].err
    for task in ("held", "exact"):
        assert lines_of(tmp_path / "out", task) == lines_of(alone, task)
    mine, theirs = read_summary(tmp_path / "out"), read_summary(alone)
    assert mine.tasks == theirs.tasks and mine.ranks == 4
    assert not list((tmp_path / "out" / "parts").iterdir())
    again = command(*words)  # nothing is left to ask
    assert again[0].status == 0 and read_summary(tmp_path / "out").tasks == theirs.tasks


@pytest.mark.parametrize("size", ["tensor_model", "pipeline_model", "expert_model"])
def test_every_layout(trained: Trained, alone: Path, tmp_path: Path, size: str) -> None:
    words = [trained.run_dir, "--tasks", trained.corpus / "tasks.yaml", "--out", tmp_path / "out"]
    outcomes = command(*words, f"parallel.{size}_parallel_size=2", ranks=2)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert outcomes[1].out == ""
    assert lines_of(tmp_path / "out", "exact") == lines_of(alone, "exact")


def test_training_and_the_command_agree(trained: Trained, tmp_path: Path) -> None:
    """And the perplexity is what the loss over the same records says."""
    outcome = command(trained.run_dir, "--tasks", "held", "read", "--out", tmp_path / "out", ranks=2)[0]
    assert outcome.status == 0, outcome.err
    tasks = read_summary(tmp_path / "out").tasks
    assert tasks["read"].score == trained.metrics["eval/cer/read"]
    assert tasks["held"].score == pytest.approx(trained.metrics["eval/perplexity/held"], rel=1e-6)
    assert tasks["held"].score == pytest.approx(math.exp(trained.metrics["eval/loss/held"]), rel=1e-5)


def test_likelihood_of_options_is_that_of_their_perplexities(trained: Trained, tmp_path: Path) -> None:
    options = ["red", "and then blue four", "one"]
    question = {"messages": [{"role": "user", "content": "which one"}], "options": options}
    rows = [question | {"expected": "C"}]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "each.jsonl").write_text("".join(json.dumps(chat("which one", one)) + "\n" for one in options))
    (tmp_path / "t.yaml").write_text(
        "tasks: {c: {data: choice.jsonl, metric: likelihood_choice}, e: {data: each.jsonl, metric: perplexity}}"
    )
    assert command(trained.run_dir, "--tasks", tmp_path / "t.yaml", "--out", tmp_path / "out")[0].status == 0
    each = [
        line.statistics[0]
        for line in read_samples(tmp_path / "out", "e")
        if isinstance(line, SampleResult) and line.statistics
    ]
    best = max(range(3), key=lambda i: -each[i] / len(options[i]))
    (choice,) = read_samples(tmp_path / "out", "c")
    assert isinstance(choice, SampleResult) and choice.extracted == "ABC"[best] and choice.correct is (best == 2)


def ask_with_a_small_cache(rank: Rank, trained: Trained) -> list[tuple[int, Line]]:
    """Prompt lengths and lines of the held-out set."""
    checkpoint = open_checkpoint(trained.run_dir)
    (task,) = load_tasks(
        [str(trained.corpus / "held_out.jsonl")], changes={"metric": "exact_match", "max_new_tokens": 1}
    )
    limits = EngineLimits(max_running=2, cache_tokens=32)
    lines = answers_of(checkpoint.load_model(), checkpoint.builder, [task], pg=checkpoint.pg, limits=limits)[task.name]
    prompts = [checkpoint.builder.build_prompt(task.question(row).record) for row in range(len(task))]
    return [(prompt.length, lines[row]) for row, prompt in enumerate(prompts)]


def test_what_the_engine_cannot_take_is_skipped(trained: Trained) -> None:
    found = run_ranks(ask_with_a_small_cache, 1, trained)[0]
    fits = [length for length, line in found if isinstance(line, SampleResult)]
    refused = [(length, line) for length, line in found if isinstance(line, SkippedSample)]
    assert fits and refused and max(fits) < min(length for length, _ in refused)
    assert all(line.skipped == "too_long" and "raise cache_tokens" in line.message for _, line in refused)


def test_two_folders_are_compared_sample_by_sample(trained: Trained, alone: Path, tmp_path: Path) -> None:
    """The other folder has the answers of ``alone`` but for two that are made right, and one task of another digest."""
    task = trained.corpus / "tasks.yaml"
    out = tmp_path / "out"
    assert command(trained.run_dir, "--tasks", task, "--out", out)[0].status == 0
    path = out / "samples" / "exact.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    answered = [line for line in lines if line.get("correct") is False]
    for line in answered[:2]:
        line |= {"answer": line["expected"][0], "score": 1.0, "correct": True, "statistics": [1.0]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["--compare", str(alone), str(out)]) == 0
    changes = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    assert [(c["task"], c["row"], c["better"]) for c in changes] == [
        ("exact", line["row"], True) for line in answered[:2]
    ]
    page = data_of(out / "index.html")["samples"]
    assert [s["row"] for s in page if "before" in s and s.get("score") != s["before"].get("score")] == [
        line["row"] for line in answered[:2]
    ]
    assert re.search(r"\| exact \| .*\| 2 +\| 0 ", said.getvalue()) and re.search(
        r"\| held .*\| 0 +\| 0 ", said.getvalue()
    )
    summary = json.loads((alone / "summary.json").read_text())
    summary["tasks"]["held"]["digest"] = "x"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text(json.dumps(summary))
    refused = command(trained.run_dir, "--tasks", task, "--out", tmp_path / "new", "--against", tmp_path / "other")[0]
    assert refused.status == 2 and "other: held is another task there" in refused.err


def test_a_folder_of_another_evaluation_is_refused(trained: Trained, alone: Path) -> None:
    tasks = trained.corpus / "tasks.yaml"
    other = trained.corpus / "other.yaml"
    other.write_text(TASKS.replace("max_new_tokens: 5", "max_new_tokens: 6"))
    for words, message in (
        ([trained.run_dir, "--tasks", other], "holds results of another task held, exact"),
        ([trained.run_dir, "--tasks", "read"], "holds results of exact, held, not of read"),
        ([trained.run_dir, "--tasks", tasks, "data.video_fps=2"], "with other settings (changes was [])"),
    ):
        outcome = command(*words, "--out", alone)[0]
        assert outcome.status == 2 and message in outcome.err, outcome.err
    asked = json.loads((alone / "asked.json").read_text())
    asked["checkpoint"] |= {"digest": "x", "path": "elsewhere"}
    kept = (alone / "asked.json").read_text()
    (alone / "asked.json").write_text(json.dumps(asked))
    outcome = command(trained.run_dir, "--tasks", tasks, "--out", alone)[0]
    (alone / "asked.json").write_text(kept)
    assert outcome.status == 2 and "holds results of another checkpoint (elsewhere, not " in outcome.err


def test_a_task_of_which_nothing_can_be_used_is_bad_input(trained: Trained, tmp_path: Path) -> None:
    lost = chat("<image> x", "one") | {"images": ["none.png"]}
    (tmp_path / "lost.jsonl").write_text(json.dumps(lost) + "\n")
    words = [trained.run_dir, "--tasks", tmp_path / "lost.jsonl", "--metric", "anls", "--out", tmp_path / "out"]
    outcome = command(*words)[0]
    assert outcome.status == 2 and "lost: row 0 was not asked (missing_media)" in outcome.err
    assert "error: no sample of any task could be used" in outcome.err


BAD_COMMAND_LINES = {
    "nothing": ([], "no checkpoint"),
    "no tasks": (["{tmp}", "--out", "{tmp}/out"], "--tasks names no task"),
    "no out": (["{tmp}", "--tasks", "x"], "--out is missing"),
    "no such checkpoint": (["{tmp}/none", "--tasks", "x", "--out", "{tmp}/out"], "none: no such checkpoint"),
    "compare and more": (["{tmp}", "--compare", "a", "b"], "--compare takes two results folders"),
    "compare nothing": (["--compare", "{tmp}", "{tmp}"], "no summary.json there"),
    "against itself": (["{tmp}", "--tasks", "x", "--out", "{tmp}/o", "--against", "{tmp}/o"], "--against is the folder of --out"),
    "batch": (["{tmp}", "--tasks", "x", "--out", "{tmp}/out", "--batch-size", "0"], "--batch-size is 0"),
    "override": (["{tmp}", "--out", "{tmp}/out", "--tasks", "x", "--limit", "1", "optim.lr=1"], "optim.lr=1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_COMMAND_LINES)
def test_bad_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = BAD_COMMAND_LINES[name]
    assert main([word.format(tmp=tmp_path) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_overrides_may_follow_the_tasks(tmp_path: Path) -> None:
    request = parse([str(tmp_path), "--tasks", "a", "b", "data.video_fps=2", "--out", "o", "--think"])
    assert (request.tasks, request.overrides, request.changes) == (["a", "b"], ["data.video_fps=2"], {"thinking": True})


def test_a_summary_reads_back(alone: Path) -> None:
    summary = read_summary(alone)
    assert isinstance(summary, Summary) and json.loads(summary.to_json()) == json.loads(
        (alone / "summary.json").read_text()
    )
