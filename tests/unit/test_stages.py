"""What is read off the records of a chain's stages, on records made by hand."""

import json
import runpy
from pathlib import Path

import pytest

from megatron_omni.evaluation import stages
from megatron_omni.evaluation.results import CheckpointFacts, Summary, TaskSummary

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def write(run_dir: Path, *records: dict[str, float]) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir


def routing_record(step: int, *, image: float, text: float, k: float = 1.5) -> dict[str, float]:
    return {
        "step": step,
        "moe/mean_k/layer_0": k,
        "moe/load/layer_0/image/expert_0": image,
        "moe/load/layer_0/text/expert_0": text,
        "moe/load/layer_0/image/expert_1": 0.5,
        "moe/load/layer_0/text/expert_1": 0.5,
        "moe/load/layer_0/image/null_0": 0.1,
        "moe/load/layer_0/text/null_0": 0.3,
        "moe/k/layer_0/0": 0.25,
        "moe/k/layer_0/1": 0.75,
    }


def test_the_last_evaluation_and_late_routing_count(tmp_path: Path) -> None:
    run_dir = write(
        tmp_path,
        {"step": 1, "eval/loss": 9.0, "eval/loss/image": 9.0, **routing_record(1, image=0.0, text=0.0, k=4.0)},
        {"step": 5, "eval/loss": 2.0, "eval/loss/image": 1.5, "eval/loss/text": 2.5},
        routing_record(8, image=0.8, text=0.2),
        routing_record(9, image=0.6, text=0.4),
    )
    assert stages.held_out_losses(run_dir) == {"image": 1.5, "text": 2.5}
    assert stages.slot_use(run_dir)[0]["image"]["expert 0"] == pytest.approx(0.7)
    assert stages.mean_k_by_layer(run_dir) == [1.5]
    assert stages.routing(run_dir) == [
        "layer 0: mean k 1.50, null used by 0.10 to 0.30 of a modality's tokens, expert 0 by image 0.70, text 0.30"
    ]
    assert stages.held_out_losses(tmp_path / "nothing") == {}


def test_scores_of_the_last_evaluation_and_of_the_command(tmp_path: Path) -> None:
    run_dir = write(
        tmp_path, {"step": 1, "eval/cer/word": 0.9}, {"step": 5, "eval/loss/word": 1.0, "eval/cer/word": 0.25},
    )  # fmt: skip
    assert stages.held_out_scores(run_dir) == {"cer word": 0.25}
    assert stages.held_out_losses(run_dir) == {"word": 1.0}
    facts = CheckpointFacts(path="x", iteration=5, digest="d")
    task = TaskSummary(
        file="f", digest="d", metric="anls", metric_settings={}, metric_version="v", rule="whole", higher_is_better=True,
        score=0.5, stderr=None, count=1, skipped={}, unparsed=0, changed_by_rule=0, not_scored=0, finish_reasons={},
        first_prompt="", group="",
    )  # fmt: skip
    summary = Summary(
        checkpoint=facts, version="0", ranks=1, wall_seconds=0.0, step_seconds=0.0, tasks={"doc": task}, groups={}
    )
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "summary.json").write_text(summary.to_json())
    assert stages.held_out_scores(run_dir) == {"cer word": 0.25, "anls doc": 0.5}


def test_table_and_readings_say_what_the_losses_are() -> None:
    first = {
        "vision": {"image": 1.0, "word": 3.0},
        "speech": {"image": 2.0, "word": 1.2},
        "sft": {"image": 0.9, "word": 1.3},
    }
    second = {
        "vision": {"image": 1.2, "word": 3.0},
        "speech": {"image": 2.0, "word": 1.2},
        "sft": {"image": 0.7, "word": 1.1},
    }
    assert stages.table(["vision", "absent", "sft"], [first, second]).splitlines() == [
        "| stage | image | word |",
        "|---|---|---|",
        "| vision | 1.100 +- 0.100 | 3.000 +- 0.000 |",
        "| sft | 0.800 +- 0.100 | 1.200 +- 0.100 |",
        "",
        "Mean of 2 seeds +- half the range between the lowest and the highest.",
    ]
    assert stages.own_modality({"vision": ["image"], "speech": ["word"]}, first) == [
        "vision on image: 1.000, better than speech (2.000)",
        "speech on word: 1.200, better than vision (3.000)",
    ]
    assert stages.own_modality({"vision": ["word"], "speech": []}, first) == [
        "vision on word: 3.000, NOT better than speech (1.200)"
    ]
    assert stages.against_best("sft", ["vision", "speech"], first) == [
        "sft on image: 0.900, at least as good as the best expert, vision (1.000)",
        "sft on word: 1.300, WORSE than the best expert, speech (1.200)",
    ]
    assert stages.change("vision", "sft", first) == [
        "sft on image: 1.000 -> 0.900 (-0.100)",
        "sft on word: 3.000 -> 1.300 (-1.700)",
    ]


def test_plot_moe_draws_three_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = runpy.run_path(str(TOOLS / "plot_moe.py"))["main"]
    run_dir = write(tmp_path / "run", *[routing_record(step, image=0.1 * step, text=0.2) for step in range(1, 9)])
    assert plot([str(run_dir), "--out", str(tmp_path / "pictures")]) == 0
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert [p.stem for p in pictures] == ["experts_by_modality", "experts_over_training", "experts_per_token"]
    assert all(p.stat().st_size > 5000 for p in pictures)
    assert plot([str(write(tmp_path / "dense", {"step": 1, "lm loss": 1.0}))]) == 2
    assert "log.expert_load" in capsys.readouterr().err


def test_chain_report_reads_every_stage_of_the_tiny_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = runpy.run_path(str(TOOLS / "chain_report.py"))["main"]
    chain = TOOLS.parent / "recipes" / "tiny" / "chain.yaml"
    assert report([str(chain), str(tmp_path)]) == 2  # nothing there yet
    losses = {"0_base": 3.0, "1_pretrain": 2.5, "2_vision": 2.0, "2_speech_understanding": 2.2, "2_speech_generation": 2.4,
              "3_sft": 1.0, "4_anneal": 0.9}  # fmt: skip
    for name, loss in losses.items():
        sets = {f"eval/loss/{s}": loss + i / 10 for i, s in enumerate(("text", "image", "video", "word", "sound"))}
        write(tmp_path / name, {"step": 9, "eval/loss": loss, **sets, **routing_record(9, image=0.9, text=0.1)})
    capsys.readouterr()
    assert report([str(chain), str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "held_out.md").read_text() == said
    for line in (
        "| 4_anneal | 0.900 | 1.000 | 1.100 | 1.200 | 1.300 |",
        "- 2_vision on image: 2.100, better than 2_speech_understanding (2.300)",
        "- 2_speech_understanding on word: 2.500, NOT better than 2_vision (2.300)",
        "- 3_sft on sound: 1.400, at least as good as the best expert, 2_vision (2.400)",
        "- 4_anneal on text: 1.000 -> 0.900 (-0.100)",
        "- 4_anneal, layer 0: mean k 1.50, null used by 0.10 to 0.30 of a modality's tokens, expert 0 by image 0.90, text 0.10",
    ):
        assert line in said.splitlines(), line
