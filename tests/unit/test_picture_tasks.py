"""Tasks of kind ``image``: what they are made of, their metrics and judges, sweeps, and every bad one before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_omni.data.degradations import edges
from megatron_omni.evaluation.picture_metrics import (
    PICTURE_METRICS,
    JudgeScore,
    PictureMetric,
    SetMetric,
    open_picture_metric,
)
from megatron_omni.evaluation.pictures import edge_f1, frechet, psnr, ssim
from megatron_omni.evaluation.results import TaskSummary
from megatron_omni.evaluation.sweep import FIGURE, points, write_sweep
from megatron_omni.evaluation.task import Task, load_tasks
from megatron_omni.scoring import METRICS

JUDGE = """
import numpy as np

def colour(pictures, names):
    return [names[int(one.mean((1, 2)).argmax())] for one in pictures]

def mean(pictures):
    return np.stack([one.mean((1, 2)) for one in pictures])

def flat(pictures):
    return [1.0 for one in pictures]
"""


def row(number: int, **more: Any) -> dict[str, Any]:
    asked = [
        {"role": "user", "content": "draw red"},
        {"role": "assistant", "content": "Here: <generate>"},
    ]
    return {"messages": asked, "targets": [f"{number}.png"], "id": str(number), **more}


def scene(size: int = 16, seed: int = 0) -> np.ndarray:
    picture = np.full((size, size, 3), 30, dtype=np.uint8)
    picture[4:12, 3 + seed % 3 : 12] = (200, 120, 60 + seed)
    return picture


def tasks_of(folder: Path, text: str, rows: list[Any] | None = None) -> list[Task]:
    (folder / "judge.py").write_text(JUDGE)
    lines = [row(n) for n in range(3)] if rows is None else rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (folder / "t.yaml").write_text(f"kind: image\ndata: rows.jsonl\n{text}")
    return load_tasks([str(folder / "t.yaml")])


def as_pixels(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.transpose(2, 0, 1).copy())


def test_a_picture_is_compared_with_its_target(tmp_path: Path) -> None:
    (task,) = tasks_of(tmp_path, "metric: psnr\nmetric_settings: {luma: true}")
    question = task.question(0)
    assert question.expected == ("Here: <generate>",) and question.record.targets == (str(tmp_path / "0.png"),)
    metric = task.metric
    assert isinstance(metric, PictureMetric) and task.judge is None
    drawn, wanted = as_pixels(scene()), as_pixels(scene(seed=1))
    assert metric.of_picture(drawn, wanted).score == psnr(drawn[None], wanted[None], luma=True).item()
    assert "luma=True" in metric.version and metric.is_mean and metric.higher_is_better
    for name, expected in (
        ("ssim", ssim(drawn[None], wanted[None]).item()),
        ("edge_f1", None),
    ):
        other = open_picture_metric(name, {}, tmp_path)
        assert isinstance(other, PictureMetric)
        if expected is None:
            maps = [torch.from_numpy(edges(one / 255))[None] for one in (scene(), scene(seed=1))]
            expected = edge_f1(*maps).item()
            assert 0 < expected < 1 and maps[0].any()
        assert other.of_picture(drawn, wanted).score == expected and other.of_picture(
            drawn, drawn
        ).score == pytest.approx(100.0 if name == "psnr" else 1.0)


def test_edges_may_be_given(tmp_path: Path) -> None:
    """A source that is a picture of edges, white on black, is what the drawn one's edges are compared with."""
    metric = open_picture_metric("edge_f1", {"against": "source", "tolerance": 1}, tmp_path)
    assert isinstance(metric, PictureMetric) and metric.against == "source"
    found = edges(scene() / 255)
    source = as_pixels(np.repeat(found[..., None] * np.uint8(255), 3, axis=2).astype(np.uint8))
    assert metric.of_picture(as_pixels(scene()), source).score == 1.0
    assert metric.of_picture(as_pixels(np.roll(scene(), 4, axis=0)), source).score < 0.7


def test_distances_are_of_whole_sets(tmp_path: Path) -> None:
    (task,) = tasks_of(tmp_path, "metric: fd_judge\njudge: judge.py:mean")
    assert isinstance(task.metric, SetMetric) and not task.metric.higher_is_better and task.judge is not None
    some = [as_pixels(scene(seed=n)) for n in range(4)]
    others = [as_pixels(scene(seed=n + 9)) for n in range(3)]
    vectors = [torch.stack([one.double().mean((1, 2)) for one in group]) for group in (some, others)]
    judge = task.judge.open()
    assert task.metric.of_sets(some, others, judge) == pytest.approx(frechet(*vectors), abs=1e-9)
    flat = tasks_of(tmp_path, "metric: fd_judge\njudge: judge.py:flat")[0]
    assert flat.judge is not None
    with pytest.raises(ValueError, match=r"shape \[4\] for 4 pictures; fd_judge needs a vector"):
        flat.metric.of_sets(some, others, flat.judge.open())  # type: ignore[attr-defined]


def test_a_judge_may_give_numbers(tmp_path: Path) -> None:
    metric = open_picture_metric("judge_score", {"higher_is_better": False}, tmp_path)
    assert isinstance(metric, JudgeScore) and not metric.higher_is_better
    assert [one.score for one in metric.of_numbers(np.array([1, 2.5]), 2)] == [1.0, 2.5]
    for given in ([1.0], [[1.0], [2.0]], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="for 2 pictures; judge_score needs a finite number for each"):
            metric.of_numbers(given, 2)


def test_a_judge_gives_a_text_that_any_metric_compares(tmp_path: Path) -> None:
    text = "metric: exact_match\njudge: judge.py:colour\njudge_settings: {names: [red, green, blue]}"
    (task,) = tasks_of(tmp_path, text, [row(0, expected="red")])
    assert task.judge is not None and task.judge.open()([as_pixels(scene()).numpy()]) == ["red"]
    assert task.question(0).expected == ("red",) and task.metric.asks == "answer"


def test_a_sweep_is_a_task_for_each_value(tmp_path: Path) -> None:
    text = "metric: psnr\ndrawing: {shift: 2, sweep: {steps: [4, 16], text_guidance: [1, 2.5]}}"
    tasks = tasks_of(tmp_path, text)
    assert [task.name for task in tasks] == ["t@steps=4", "t@steps=16", "t@text_guidance=1", "t@text_guidance=2.5"]
    assert [task.config.drawing.steps for task in tasks] == [4, 16, None, None]
    assert [task.config.drawing.text_guidance for task in tasks] == [None, None, 1, 2.5]
    assert all(task.config.drawing.shift == 2 for task in tasks)
    assert len({task.digest for task in tasks}) == 4
    (alone,) = tasks_of(tmp_path, "metric: psnr\ndrawing: {shift: 2, steps: 4}")
    assert alone.digest == tasks[0].digest


def summary(score: float | None, metric: str = "psnr") -> TaskSummary:
    return TaskSummary(
        file="t.yaml", digest="", metric=metric, metric_settings={}, metric_version="", rule="", higher_is_better=True,
        score=score, stderr=0.5, count=3, skipped={}, unparsed=0, changed_by_rule=0, not_scored=0, finish_reasons={},
        first_prompt="", group="",
    )  # fmt: skip


def test_the_figure_of_a_sweep(tmp_path: Path) -> None:
    tasks = {
        "t@steps=16": summary(24.0), "t@steps=4": summary(20.0), "other": summary(1.0), "t@text_guidance=2": summary(None),
        "t@text_guidance=1": summary(3.0),
    }  # fmt: skip
    assert points(tasks) == {
        "steps": {"t (psnr)": [(4.0, 20.0, 0.5), (16.0, 24.0, 0.5)]},
        "text_guidance": {"t (psnr)": [(1.0, 3.0, 0.5)]},
    }
    assert write_sweep(tmp_path, tasks) == tmp_path / FIGURE
    with Image.open(tmp_path / FIGURE) as figure:
        assert figure.width > figure.height > 300  # two panels
    assert write_sweep(tmp_path / "no", {"other": summary(1.0)}) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric: psnrr", "metric = 'psnrr' is unknown; did you mean 'psnr'"),
        ("metric: perplexity", "reads no answer, and a judge of pictures gives one"),
        ("metric: psnr\nmetric_settings: {luna: true}", "has no setting 'luna'; did you mean 'luma'"),
        ("metric: psnr\nmetric_settings: {luma: 1}", "luma = 1; it must be true or false"),
        ("metric: ssim\nmetric_settings: {against: me}", "against = 'me'; it must be target or source"),
        ("metric: edge_f1\nmetric_settings: {tolerance: -1}", "tolerance = -1; it must be a whole number"),
        ("metric: edge_f1\nmetric_settings: {low: 2}", "low at most high"),
        ("metric: psnr\njudge: judge.py:colour", "the metric compares pictures itself; leave judge"),
        ("metric: psnr\nrule: number", "compares pictures: leave out rule"),
        ("metric: exact_match", "a text for each picture: FILE.py:NAME"),
        ("metric: fd_judge", "a vector for each picture: FILE.py:NAME"),
        ("metric: judge_score", "a number for each picture: FILE.py:NAME"),
        ("metric: exact_match\njudge: words", "a text for each picture: FILE.py:NAME"),
        ("metric: exact_match\njudge: no.py:x", "there is no file"),
        ("metric: exact_match\njudge: judge.py:nobody", "has no function 'nobody'"),
        ("metric: fid", "metric_settings.inception is missing"),
        ("metric: fid\nmetric_settings: {inception: no.pth}", "there is no file"),
        ("metric: psnr\nstop: [x]", "stop means nothing to a picture"),
        ("metric: psnr\ndrawing: {steps: 0}", "drawing.steps=0: must be"),
        ("metric: psnr\ndrawing: {sweep: {step: [1]}}", "'step' is no setting; did you mean 'steps'"),
        ("metric: psnr\ndrawing: {sweep: {steps: []}}", "give different numbers, one at least"),
        ("metric: psnr\ndrawing: {sweep: {steps: [2, 2]}}", "give different numbers"),
        ("metric: psnr\ndrawing: {sweep: {steps: [2.5]}}", "steps are whole numbers"),
        ("metric: psnr\ndrawing: {sweep: {text_guidance: [-1]}}", "text_guidance=-1"),
    ],
)
def test_bad_tasks_are_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        tasks_of(tmp_path, text)
    assert message in str(error.value) and str(tmp_path / "t.yaml") in str(error.value)


def test_records_must_ask_for_one_picture(tmp_path: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(ValueError, match=r"rows\.jsonl:2.*needs a record that ends with one picture to draw"):
        tasks_of(tmp_path, "metric: psnr", [row(0), plain])
    (tmp_path / "t.yaml").write_text("kind: text\ndata: rows.jsonl\nmetric: exact_match\ndrawing: {steps: 3}")
    with pytest.raises(ValueError, match="drawing means nothing to a task of answers"):
        load_tasks([str(tmp_path / "t.yaml")])


def test_names_of_metrics_are_one_set() -> None:
    assert not set(PICTURE_METRICS) & set(METRICS)
