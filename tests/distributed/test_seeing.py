"""Tasks of kind ``image``: a tiny model draws records, pictures are compared with targets and seen by a judge of the test's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_omni.evaluation.pictures import frechet, psnr
from megatron_omni.evaluation.results import SampleResult, SkippedSample, read_samples, read_summary
from megatron_omni.evaluation.seeing import read_picture
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.test_evaluate import Outcome, run_command
from tests.drawing import drawing_rows
from tests.trained import Trained

JUDGE = """
import numpy as np

def brightest(pictures, names):
    assert all(one.dtype.name == "uint8" and one.ndim == 3 and len(one) == 3 for one in pictures)
    return [names[int(one.mean((1, 2)).argmax())] for one in pictures]

def mean(pictures):
    return np.stack([one.mean((1, 2)) for one in pictures])

def distance(pictures, wanted, sources, prompts):
    assert [source is None for source in sources] == ["<image>" not in prompt for prompt in prompts]
    return [float(np.abs(a.astype(float) - b).mean()) for a, b in zip(pictures, wanted)]

def too_few(pictures):
    return ["red"]
"""
TASKS = """
kind: image
data: rows.jsonl
tasks:
  psnr: {metric: psnr, drawing: {sweep: {steps: [2, 4]}}}
  copies: {metric: psnr, metric_settings: {against: source}}
  seen: {metric: exact_match, judge: "judge.py:brightest", judge_settings: {names: [red, green, blue]}}
  apart: {metric: judge_score, metric_settings: {higher_is_better: false}, judge: "judge.py:distance"}
  set: {metric: fd_judge, judge: "judge.py:mean"}
  writes: {metric: psnr, drawing: {begin: model}, max_new_tokens: 4, limit: 1}
  led: {metric: psnr, drawing: {begin: record}, limit: 1}
"""


@pytest.fixture(scope="module")
def folder(draws: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's pictures and rows of them, one that cannot be used; tasks and a judge."""
    folder = tmp_path_factory.mktemp("seeing")
    for file in draws.media.glob("*.png"):
        shutil.copy(file, folder)
    rows = [row | {"expected": "green"} for row in drawing_rows(folder)][:5]
    bad = json.loads(json.dumps(rows[0])) | {"targets": ["nowhere.png"], "id": "bad"}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], bad, *rows[3:]]))
    (folder / "judge.py").write_text(JUDGE)
    (folder / "tasks.yaml").write_text(TASKS)
    return folder


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _command(rank: Rank, words: list[str], port: int) -> Outcome:
    return run_command(rank, words, port)


def evaluated(
    run: Trained, folder: Path, out: Path, world_size: int = 1, *more: str, tasks: str = "tasks.yaml"
) -> Outcome:
    words = [str(run.run_dir), "--tasks", str(folder / tasks), "--out", str(out), "--batch-size", "3", *more]
    return run_ranks(_command, world_size, words, _port())[0]


@pytest.fixture(scope="module")
def results(draws: Trained, folder: Path) -> Path:
    outcome = evaluated(draws, folder, folder / "one")
    assert outcome.status == 0, outcome.err
    return folder / "one"


def lines_of(results: Path, task: str) -> list[SampleResult]:
    return [line for line in read_samples(results, task) if isinstance(line, SampleResult)]


def test_pictures_are_drawn_compared_and_seen(results: Path, folder: Path) -> None:
    summary = read_summary(results)
    assert set(summary.tasks) == {"psnr@steps=2", "psnr@steps=4", "copies", "seen", "apart", "set", "writes", "led"}
    for task in ("psnr@steps=2", "psnr@steps=4", "copies", "seen", "apart", "set"):
        (skipped,) = [line for line in read_samples(results, task) if isinstance(line, SkippedSample)]
        assert skipped.row == 3 and "nowhere.png" in skipped.message
        assert [line.row for line in lines_of(results, task)] == [0, 1, 2, 4, 5]
    for line in lines_of(results, "psnr@steps=4"):
        drawn, wanted = read_picture(results / line.drawn), read_picture(results / line.wanted)
        assert line.score == pytest.approx(psnr(drawn[None], wanted[None]).item()) and drawn.shape == (3, 16, 16)
    targets = [Image.open(folder / f"t{n}.png") for n in range(2)]
    assert torch.equal(read_picture(results / lines_of(results, "copies")[0].wanted), pixels(targets[0]))
    few, many = summary.tasks["psnr@steps=2"], summary.tasks["psnr@steps=4"]
    assert few.count == many.count == 5 and few.stderr is not None and few.digest != many.digest
    names = ("red", "green", "blue")
    for line in lines_of(results, "seen"):
        mean = read_picture(results / line.drawn).double().mean((1, 2))
        assert line.answer == line.extracted == names[int(mean.argmax())]
        assert line.expected == ["green"] and line.correct == (line.answer == "green")
    # without a source there is nothing that could be copied
    copies = {line.row: line.score for line in lines_of(results, "copies")}
    assert [row for row, score in copies.items() if score is not None] == [1, 4]
    assert summary.tasks["copies"].count == 2 and summary.tasks["copies"].not_scored == 3
    assert not summary.tasks["apart"].higher_is_better and summary.tasks["apart"].count == 5


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_a_distance_is_of_the_whole_set(results: Path) -> None:
    lines = lines_of(results, "set")
    assert all(line.score is None for line in lines)
    sides = [
        torch.stack([read_picture(results / getattr(line, name)).double().mean((1, 2)) for line in lines])
        for name in ("drawn", "wanted")
    ]
    summary = read_summary(results).tasks["set"]
    assert summary.score == pytest.approx(frechet(*sides)) and summary.count == 5 and summary.stderr is None


def test_what_stands_before_a_picture_changes_it(results: Path) -> None:
    """Nothing, what the model writes (which is told), or what the record's own answer has there."""
    (block, *_), (writes,), (led,) = (lines_of(results, task) for task in ("copies", "writes", "led"))
    assert writes.tokens == 4 and block.tokens == led.tokens == 0 and led.answer == ""
    drawn = [read_picture(results / line.drawn) for line in (block, writes, led)]
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[1], drawn[2])


def test_the_folder_has_a_figure_and_a_page(results: Path) -> None:
    assert (results / "sweep.png").is_file()
    page = (results / "index.html").read_text()
    assert "pictures/seen/0.png" in page and "pictures/seen/0.wanted.png" in page


@pytest.mark.parametrize("layout", ["", "parallel.pipeline_model_parallel_size=2"])
def test_a_start_on_another_layout_draws_what_is_missing(
    draws: Trained, folder: Path, results: Path, tmp_path: Path, layout: str
) -> None:
    """Two ranks, each with a share of the rows, or one with the language model's end and the generator; the same pictures."""
    out = Path(shutil.copytree(results, tmp_path / "out"))
    for task in ("psnr@steps=4", "seen"):
        file = out / "samples" / f"{task}.jsonl"
        kept = [line for line in file.read_text().splitlines(True) if json.loads(line)["row"] in (1, 3)]
        file.write_text("".join(kept))
        for row in (0, 2, 4, 5):
            (out / "pictures" / task / f"{row}.png").unlink()
        (out / "pictures" / task / "1.png").write_bytes(b"not drawn again")
    outcome = evaluated(draws, folder, out, 2, *([layout] if layout else []))
    assert outcome.status == 0, outcome.err
    for task in ("psnr@steps=4", "seen"):
        assert (out / "pictures" / task / "1.png").read_bytes() == b"not drawn again"
        for line, other in zip(lines_of(results, task), lines_of(out, task), strict=True):
            assert line.row == other.row
            if line.row != 1:
                one, two = (read_picture(place / line.drawn).int() for place in (results, out))
                assert (one - two).abs().max() <= 1, "rounding of another layout"


def test_what_cannot_be_is_one_error(draws: Trained, folder: Path, tmp_path: Path) -> None:
    (folder / "few.yaml").write_text("kind: image\ndata: rows.jsonl\nmetric: exact_match\njudge: judge.py:too_few\n")
    outcome = evaluated(draws, folder, tmp_path / "few", tasks="few.yaml")
    assert outcome.status == 2 and "gave 1 values for 5 pictures; it must return a text for each" in outcome.err
    outcome = evaluated(draws, folder, tmp_path / "vae", 1, "--vae", str(tmp_path / "nowhere"), tasks="few.yaml")
    assert outcome.status == 2 and "nowhere" in outcome.err
