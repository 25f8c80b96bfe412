"""metrics.jsonl holds each step once, survives a crash, and throughput counts what was computed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.estimate import flops_per_token
from megatron_omni.estimate.flops import chunk_forward, tile_forward
from megatron_omni.estimate.pictures import picture_flops
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.metrics import MetricsWriter, Progress, progress_line, throughput


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"lm loss": 2.5})
    assert lines(tmp_path) == [{"step": 1, "lm loss": 2.5}]


def test_a_resumed_run_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        writer.write(step, {"lm loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lm lo')
    resumed = MetricsWriter(tmp_path, tensorboard=False, after_step=2)
    resumed.write(3, {"lm loss": 30.0})
    assert [(r["step"], r["lm loss"]) for r in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write(4, {"lm loss": 2.5, "moe/mean_k": 1.5, "tokens/s": 8.0})
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert seen == {"training/lm loss": [(4, 2.5)], "moe/mean_k": [(4, 1.5)], "training/tokens a second": [(4, 8.0)]}


def test_throughput_counts_measured_experts() -> None:
    recipe = Recipe()
    kwargs = {"tokens": 4000.0, "labels": 0.0, "samples": 4.0, "tiles": 0, "chunks": 0, "seconds": 2.0, "world_size": 2}
    kwargs["images"] = 0
    rates = throughput(recipe, **kwargs, mean_k=1.5, peak_tflops=None)
    expected = 4000 * flops_per_token(recipe.model, 1000, 1.5) / 2 / 2 / 1e12
    assert rates == {"tokens/s": 2000.0, "TFLOP/s": pytest.approx(expected)}
    with_peak = throughput(recipe, **kwargs, mean_k=1.5, peak_tflops=2 * expected)
    assert with_peak["MFU"] == pytest.approx(0.5)


def test_throughput_counts_the_encoders_on_what_they_saw() -> None:
    """3 tiles and 2 chunks a second on one rank; a frozen tower has no backward, and a frozen recipe's projector none."""
    rates = {}
    for freeze in ((), ("vision",), ("vision", "audio", "projectors")):
        recipe = Recipe(freeze=list(freeze))
        kwargs: dict[str, Any] = {"tokens": 1.0, "labels": 0.0, "samples": 1.0, "seconds": 1.0, "world_size": 1}
        kwargs |= {"mean_k": 1.0, "peak_tflops": None, "images": 0}
        without = throughput(recipe, tiles=0, chunks=0, **kwargs)["TFLOP/s"]
        rates[freeze] = (throughput(recipe, tiles=3, chunks=2, **kwargs)["TFLOP/s"] - without) * 1e12
    tile, chunk = tile_forward(recipe.model), chunk_forward(recipe.model)
    forward = 3 * sum(tile) + 2 * sum(chunk)
    assert rates[()] == pytest.approx(3 * forward)
    assert rates["vision",] == pytest.approx(3 * forward - 2 * 3 * tile.tower)
    assert rates["vision", "audio", "projectors"] == pytest.approx(forward)


def test_throughput_counts_the_pictures_that_are_drawn() -> None:
    """With a language model on top of it, without one alone."""
    values = {"task": "generative", "model": {"image": {}}, "freeze": ["vision", "audio", "projectors"]}
    kwargs: dict[str, Any] = {"tokens": 100.0, "labels": 0.0, "samples": 1.0, "tiles": 0, "chunks": 0, "seconds": 2.0}
    kwargs |= {"world_size": 1, "mean_k": 1.0, "peak_tflops": None}
    found = {}
    for conditions in ("model", "cached"):
        recipe = recipe_from_dict({**values, "generative": {"conditions": conditions}})
        found[conditions] = [throughput(recipe, images=images, **kwargs) for images in (0, 6)]
        without, drawn = found[conditions]
        assert (drawn["TFLOP/s"] - without["TFLOP/s"]) * 1e12 == pytest.approx(3 * picture_flops(recipe))
        assert drawn["pictures/s"] == 3 and without["pictures/s"] == 0
    assert found["cached"][0]["TFLOP/s"] == 0 < found["model"][0]["TFLOP/s"]
    assert "pictures/s" not in throughput(Recipe(), images=0, **kwargs)


def test_a_step_without_tokens_has_no_rate() -> None:
    nothing = {"tokens": 0, "labels": 0, "samples": 0, "tiles": 0, "chunks": 0, "images": 0}
    assert throughput(Recipe(), **nothing, seconds=1, world_size=1, mean_k=0, peak_tflops=None) == {}


def test_progress_in_a_log_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(10, initial=0, stream=stream)
    progress.advance()
    progress.show(
        1, {"lm loss": 2.0, "tokens/s": 100.0, "moe/mean_k": 1.25, "moe/null_share": 0.125, "time/optimizer": 0.01}
    )
    assert (
        stream.getvalue() == "step 1/10 | loss 2.0000 | tokens/s 100 | mean k 1.25 | null 12.5% | ms (optimizer 10)\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar_with_the_last_record() -> None:
    stream = Terminal()
    progress = Progress(10, initial=4, stream=stream)
    progress.advance()
    progress.show(5, {"lm loss": 2.0, "tokens/s": 100.0})
    progress.say("saved")
    progress.close()
    *_, said, last = stream.getvalue().strip().split("\n")
    assert said.endswith("saved")
    assert "5/10" in last and last.endswith("loss 2.0000 | tokens/s 100]")


def test_progress_line_leaves_out_what_was_not_measured() -> None:
    assert progress_line(3, 5, {}) == "step 3/5"


def test_part_timer_sums_and_restarts() -> None:
    ticks = iter([0.0, 1.0, 1.0, 3.0, 5.0, 6.0])
    timer = PartTimer(clock=lambda: next(ticks))
    for part in ("read", "compute", "read"):
        with timer.measure(part):
            pass
    assert timer.take() == {"read": 2.0, "compute": 2.0}
    assert timer.take() == {}


def test_a_part_inside_another_counts_for_itself_alone() -> None:
    ticks = iter([0.0, 1.0, 4.0, 6.0, 7.0])
    synchronized: list[int] = []
    timer = PartTimer(clock=lambda: next(ticks), synchronize=lambda: synchronized.append(1))
    with timer.measure("backward"):
        timer.exact = True
        with timer.measure("forward"):
            assert timer._stack == ["backward", "forward"]
        timer.exact = False
    assert timer.take() == {"backward": 1.0 + 2.0, "forward": 3.0}
    assert len(synchronized) == 2
    assert timer.total() == {"backward": 3.0, "forward": 3.0}
    assert timer.current() == ("between parts", 7.0 - 6.0)
