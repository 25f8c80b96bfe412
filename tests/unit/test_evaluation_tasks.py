"""Task files: prompts with examples, options and thinking; what a result says; and every bad input before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.config.data import EvalSourceConfig
from megatron_omni.config.thinking import EMPTY_THOUGHT, THINKING
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.evaluation.asking import Asked, prepare, shown
from megatron_omni.evaluation.results import SampleResult, SkippedSample
from megatron_omni.evaluation.summary import summarise
from megatron_omni.evaluation.task import Task, load_tasks, shipped_sets
from megatron_omni.generation.batches import Result
from megatron_omni.generation.request import Usage
from tests.unit.tiny_data import row, tiny_recipe, write_image, write_sound


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    return path


def ask(question: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **more}


def task_of(folder: Path, text: str, rows: list[Any], **settings: Any) -> Task:
    write_rows(folder / "rows.jsonl", rows)
    (folder / "t.yaml").write_text(f"data: rows.jsonl\n{text}")
    return load_tasks([str(folder / "t.yaml")], **settings)[0]


def answer(task: Task, number: int, text: str, thought: str = "", *, builder: SampleBuilder) -> SampleResult:
    """The line of a row whose answer is this."""
    asked = prepare(task, number, builder, name=str(number))
    assert isinstance(asked, Asked), asked
    usage = Usage(prompt=1, cached=0, completion=7)
    line = asked.take(0, Result(name="0.0", sample=0, text=text, reasoning=thought, reason="stop", usage=usage))
    assert isinstance(line, SampleResult)
    return line


@pytest.fixture
def builder(tmp_path: Path) -> SampleBuilder:
    return SampleBuilder(tiny_recipe(tmp_path, [], seq_length=2048, system_prompt="be brief"))


def test_examples_with_media_come_before_the_question(tmp_path: Path, builder: SampleBuilder) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", size=(56, 28))
    write_sound(tmp_path / "s.wav", 0.5)
    write_rows(
        tmp_path / "shots.jsonl",
        [
            row("<image> what?", "a cat", images=["a.png"]),
            row("<audio> heard?", "a dog", audios=["s.wav"]),
            row("x", "y"),
        ],
    )
    task = task_of(
        tmp_path, "metric: exact_match\nfew_shot: {data: shots.jsonl, count: 2}\n",
        [ask("<image> and this?", expected="a banana", images=["b.png"], id="q")],
    )  # fmt: skip
    line = answer(task, 0, "a banana", builder=builder)
    said = [(turn["role"], turn["content"]) for turn in line.prompt]
    assert said == [
        ("system", "be brief"), ("user", "<image> what?"), ("assistant", "a cat"), ("user", "<audio> heard?"),
        ("assistant", "a dog"), ("user", "<image> and this?"),
    ]  # fmt: skip
    assert [(m["kind"], Path(m["path"]).name) for m in line.media] == [
        ("image", "a.png"),
        ("audio", "s.wav"),
        ("image", "b.png"),
    ]
    asked = prepare(task, 0, builder, name="0")
    assert isinstance(asked, Asked)
    (request,) = asked.requests
    tiles = request.prompt.tiles
    assert tiles is not None and len(tiles) == 1 + 2  # b.png is two tiles
    assert (line.id, line.correct, line.tokens, line.expected) == ("q", True, 7, ["a banana"])
    assert summarise(task, {0: line}).first_prompt.endswith("<image> and this?<|im_end|>\n<|im_start|>assistant\n")


def test_options_are_shown_shuffled_and_the_right_letter_follows(tmp_path: Path, builder: SampleBuilder) -> None:
    options = ["cat", "dog", "banana", "violin"]
    rows = [
        ask("which?", options=options, expected="B"),
        ask("which?", options={"B": "dog", "A": "cat"}, expected="dog"),
    ]
    fixed = task_of(tmp_path, "metric: choice\nshow_options: true\n", rows)
    assert shown(fixed, 0).record.messages[-1].content == "which?\nA. cat\nB. dog\nC. banana\nD. violin"
    assert answer(fixed, 1, "The answer is (B)", builder=builder).correct is True
    orders = set()
    for seed in range(6):
        task = task_of(tmp_path, f"metric: choice\nshow_options: true\nshuffle_options: {seed}\n", rows)
        question = shown(task, 0)
        assert question.options is not None
        place = question.options.index("dog")
        assert question.expected == ("ABCD"[place],) and sorted(question.options) == sorted(options)
        assert answer(task, 0, f"({'ABCD'[place]}) dog", builder=builder).correct is True
        assert shown(task, 0) == question
        orders.add(question.options)
    assert len(orders) > 2


def test_thinking_asks_for_a_thought_and_judges_what_follows_it(tmp_path: Path, builder: SampleBuilder) -> None:
    rows = [
        ask("how many?", expected=3),
        {"messages": [{"role": "system", "content": "own"}, *row("n?", "4")["messages"]]},
    ]
    task = task_of(tmp_path, "metric: mean_relative_accuracy\nthinking: true\nsystem_prompt: Count.\n", rows)
    line = answer(task, 0, "so 3", "1 or 2", builder=builder)
    assert line.prompt[0] == {"role": "system", "content": f"{THINKING}\n\nCount."}
    assert (line.answer, line.thought, line.extracted, line.score) == ("<think>1 or 2</think>so 3", "1 or 2", "3", 1.0)
    assert answer(task, 1, "4", builder=builder).prompt[0]["content"] == f"{THINKING}\n\nCount.\n\nown"
    summary = summarise(task, {0: line, 1: answer(task, 1, "four", builder=builder)})
    assert (summary.unparsed, summary.changed_by_rule, summary.score) == (1, 1, 0.5)
    off = load_tasks([str(tmp_path / "t.yaml")], changes={"thinking": False})[0]
    assert answer(off, 0, "3", builder=builder).prompt[0]["content"] == "Count."
    assert off.digest == task.digest, "both ways can be compared"
    assert summarise(off, {0: answer(off, 0, "3", builder=builder)}).first_prompt.endswith(
        f"assistant\n{EMPTY_THOUGHT}"
    )
    asked = [prepare(t, 0, builder, name="q") for t in (task, off)]
    ends = [
        builder.tokenizer.decode(a.requests[0].prompt.input_ids.tolist())[-20:] for a in asked if isinstance(a, Asked)
    ]
    assert ends[0].endswith("assistant\n") and ends[1].endswith(EMPTY_THOUGHT)


def test_a_checkpoint_of_thinking_is_asked_as_it_was_trained_unless_the_task_says_otherwise(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, [], seq_length=2048, system_template="thinking", system_prompt="be brief")
    builder = SampleBuilder(recipe)
    rows = [ask("how many?", expected=3)]
    prompts = []
    for setting in ("", "thinking: true\n", "thinking: false\n"):
        task = task_of(tmp_path, f"metric: mean_relative_accuracy\n{setting}", rows)
        prompts.append(answer(task, 0, "3", builder=builder).prompt[0]["content"])
    assert prompts == [f"{THINKING}\n\nbe brief", f"{THINKING}\n\nbe brief", "be brief"]


def test_unusable_rows_are_skipped_with_their_reason(tmp_path: Path, builder: SampleBuilder) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    rows = [
        ask("<image>", expected="x", images=["none.png"], id="lost"), ask("<image>", expected="x", images=["bad.png"]),
        ask("word " * 5000, expected="x"), {"messages": "x"}, ask("<image>", expected="x"), ask("y", expected="x"),
    ]  # fmt: skip
    task = task_of(tmp_path, "metric: exact_match\n", rows)
    found = [prepare(task, number, builder, name="0") for number in range(len(task))]
    assert isinstance(found[-1], Asked)
    skipped = [one for one in found if isinstance(one, SkippedSample)]
    assert [one.skipped for one in skipped] == [
        "missing_media",
        "unreadable_media",
        "too_long",
        "bad_type",
        "marker_count",
    ]
    assert skipped[0].id == "lost" and "none.png" in skipped[0].message
    summary = summarise(task, {one.row: one for one in skipped})
    assert (summary.score, summary.count, sum(summary.skipped.values())) == (None, 0, 5)


def test_the_longest_answer_leaves_room_for_the_prompt(tmp_path: Path, builder: SampleBuilder) -> None:
    task = task_of(tmp_path, "metric: exact_match\nmax_new_tokens: 5000\nstop: ['.']\n", [ask("what?", expected="x")])
    asked = prepare(task, 0, builder, name="0")
    assert isinstance(asked, Asked)
    (request,) = asked.requests
    assert request.prompt.length + request.max_new_tokens == 2048 and request.stop == (".",)


def test_tasks_are_files_sets_and_held_out_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "image.held_out.jsonl", [row("a", "b"), row("c", "d")])
    (task,) = load_tasks([str(data)], changes={"metric": "exact_match"})
    assert (task.name, len(task), task.rule_name) == ("image.held_out", 2, "whole")
    held = EvalSourceConfig(name="held", path=str(data), metric="anls", limit=1)
    (same,) = load_tasks(["held"], eval_sources=[held])
    assert (same.name, len(same), same.config.metric) == ("held", 1, "anls")
    assert "quickstart" in shipped_sets()
    (tmp_path / "eval").mkdir()
    for name in ("image", "image_two", "word", "speech", "sound", "video", "text"):
        write_rows(tmp_path / "eval" / f"{name}.held_out.jsonl", [row("a", name)])
    tasks = load_tasks(["quickstart"], data=tmp_path)
    assert [task.name for task in tasks] == ["image", "image_two", "word", "speech", "sound", "video", "text"]
    assert {(task.config.max_new_tokens, task.config.metric, task.config.group) for task in tasks} == {
        (16, "exact_match", "quickstart")
    }


def test_a_digest_is_of_what_scores_depend_on(tmp_path: Path) -> None:
    rows = [row("a", "b")]
    first = task_of(tmp_path, "metric: exact_match\n", rows).digest
    other = tmp_path / "moved"
    other.mkdir()
    assert task_of(other, "metric: exact_match\nname: renamed\ngroup: g\n", rows).digest == first
    assert task_of(other, "metric: exact_match\n", [row("a", "c")]).digest != first
    assert task_of(other, "metric: exact_match\nlimit: 1\n", rows).digest != first


GOOD = [row("a", "b")]
BAD = {
    "no file": ("none.yaml", None, None, "none.yaml: no such task file"),
    "no such name": (
        "quickstat", None, None, "--tasks quickstat: no such file, and no set of that name; did you mean 'quickstart'?",
    ),
    "no metric": ("t.yaml", "data: rows.jsonl", GOOD, "t.yaml: t: metric is missing"),
    "unknown metric": (
        "t.yaml", "data: rows.jsonl\nmetric: exact", GOOD, "metric = 'exact' is unknown; did you mean 'exact_match'?",
    ),
    "unknown field": (
        "t.yaml", "data: rows.jsonl\nmetrics: wer", GOOD, "unknown field 'metrics'; did you mean 'metric'?",
    ),
    "unknown rule": (
        "t.yaml", "data: rows.jsonl\nmetric: wer\nrule: lastline", GOOD, "rule = 'lastline' is unknown; did you mean 'last_line'?",
    ),
    "after nothing": ("t.yaml", "data: rows.jsonl\nmetric: wer\nrule: 'after:'", GOOD, "names no text"),
    "no data": ("t.yaml", "metric: wer", GOOD, "data: has no value"),
    "no such data": ("t.yaml", "data: none.jsonl\nmetric: wer", GOOD, "none.jsonl"),
    "range": (
        "t.yaml", "data: rows.jsonl\nmetric: wer\nmax_new_tokens: 0", GOOD, "max_new_tokens=0: must be at least 1",
    ),
    "sampling": (
        "t.yaml", "data: rows.jsonl\nmetric: wer\nsampling: {top_p: 0.5}", GOOD, "top_p is 0.5 but temperature is 0",
    ),
    "missing column": (
        "t.yaml", "data: rows.jsonl\nmetric: wer", [*GOOD, ask("a")], "rows.jsonl:2: expected is missing",
    ),
    "expected": ("t.yaml", "data: rows.jsonl\nmetric: wer", [ask("a", expected={})], "rows.jsonl:1: expected = {}"),
    "no number": (
        "t.yaml", "data: rows.jsonl\nmetric: mean_relative_accuracy", GOOD, "rows.jsonl:1: expected = 'b' is no number",
    ),
    "options repeat": (
        "t.yaml", "data: rows.jsonl\nmetric: choice", [*GOOD[:0], ask("a", options=["x", "y", "X"], expected="A")],
        "rows.jsonl:1: options repeat: A and C are both 'X'",
    ),
    "letters": (
        "t.yaml", "data: rows.jsonl\nmetric: choice", [ask("a", options={"A": "x", "C": "y"}, expected="A")], "without a gap",
    ),
    "no options": (
        "t.yaml", "data: rows.jsonl\nmetric: choice\nshow_options: true", [ask("a", expected="A")], "options is missing",
    ),
    "shuffle": (
        "t.yaml", "data: rows.jsonl\nmetric: choice\nshuffle_options: 1", GOOD, "shuffle_options needs show_options",
    ),
    "own examples": (
        "t.yaml", "data: rows.jsonl\nmetric: wer\nfew_shot: {data: rows.jsonl}", GOOD, "few_shot.data is the task's own data",
    ),
    "perplexity with a rule": (
        "t.yaml", "data: rows.jsonl\nmetric: perplexity\nrule: whole", GOOD, "reads no answer",
    ),
    "twice": ("t.yaml t.yaml", "data: rows.jsonl\nmetric: wer", GOOD, "two tasks are called 't'"),
    "group": (
        "t.yaml", "group: g\ndata: rows.jsonl\ntasks: {a: {metric: wer}, b: {metric: anls}}", GOOD,
        "group 'g': b (anls) is better when higher and a (wer) when lower",
    ),
    "name": ("t.yaml", "data: rows.jsonl\nmetric: wer\nname: a/b", GOOD, "give a name and no path"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tasks_are_one_clear_error(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, text, rows, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("t.yaml").write_text(text + "\n")
    if rows is not None:
        write_rows(Path("rows.jsonl"), rows)
    with pytest.raises(ValueError) as caught:
        load_tasks(words.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_task_of_the_docs_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    lines = page.partition("    # chart.yaml\n")[2].partition("\n\n")[0].splitlines()
    (tmp_path / "chart.yaml").write_text("\n".join(line[4:] for line in lines))
    write_rows(tmp_path / "charts.jsonl", [row("<image> how much?", "Answer: 12%", images=["a.png"])])
    write_rows(tmp_path / "examples.jsonl", [row("one?", "Answer: 1"), row("two?", "Answer: 2")])
    (task,) = load_tasks([str(tmp_path / "chart.yaml")])
    assert (task.name, task.rule_name, len(task.examples), task.config.group) == (
        "chart",
        "after: Answer:",
        2,
        "documents",
    )
    assert task.rule("so the\nAnswer: 12 %", None) == "12 %"
