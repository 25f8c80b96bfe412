"""The driver of ``make reason``: what it refuses, which checkpoint it chooses, and the shape of what it reports."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # examples/ is not installed

from examples.quickstart import onward  # noqa: E402
from examples.quickstart.repeat import GOALS  # noqa: E402
from examples.quickstart.run import Steps  # noqa: E402
from examples.reason import report, run  # noqa: E402
from examples.reason.questions import SOURCES  # noqa: E402
from megatron_omni.chain import load_chain  # noqa: E402
from megatron_omni.config.load import load_recipe  # noqa: E402


def entry(checkpoint: str, questions: str, **scores: float) -> dict:
    filled = {name: 0.5 for name in (*report.SHARES, "length", "cut")} | {"count": 12} | scores
    return {
        "checkpoint": checkpoint, "questions": questions, "responses": {"sampled": []},
        "scores": {name: filled for name in ("all", *SOURCES)},
    }  # fmt: skip


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What the stages of a run leave, as far as the report reads it."""
    for name, seconds in (("cold_start", 40.0), ("gspo", 90.0), ("dpo", 20.0), ("gspo_2", 30.0), ("control", 90.0)):
        ratios = {"clip/low": 0.01, "clip/high": 0.03} if name.startswith("gspo") else {}
        steps = [{"step": step, "reward/right": 0.4, "grad-norm": 1.5, **ratios} for step in (10, 20)]
        lines(tmp_path / name / "metrics.jsonl", steps)
        rows = [{"wall": 1.0, "parts": {}}, {"wall": seconds, "parts": {"setup": 10.0, "data": 3.0}, "finished": True}]
        lines(tmp_path / name / "goodput.jsonl", rows)
    report.measured(tmp_path, "x").parent.mkdir()
    cold = [entry(f"c/iter_000000{step}", questions, sampled=sampled)
            for step, sampled in ((1, 0.3), (2, 0.6), (3, 0.6)) for questions in ("d/choice", "d/held_out")]  # fmt: skip
    cold[5]["scores"]["all"]["sampled"] = 0.9  # of the held-out set, by which nothing is chosen
    stages = [entry(f"r/{name}", "d/held_out") for name in report.STAGES.values()]
    controls = [entry("r/control", "d/held_out", sampled=0.4), entry("r/sft_more", "d/held_out", sampled=0.45)]
    for name, found in (("cold_start", cold), ("stages", stages), ("controls", controls)):
        report.measured(tmp_path, name).write_text(json.dumps(found))
    return tmp_path


def test_a_quickstart_below_its_goals_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {task: {"held_out": goal} for task, goal in GOALS.items()}
    assert onward.below_goals(good) == []
    assert onward.below_goals({**good, "speech": {"held_out": 0.8}}) == ["speech 0.800 (goal 0.85)"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / run.QUICKSTART).mkdir(parents=True)
    (tmp_path / run.QUICKSTART / "scores.json").write_text(json.dumps({**good, "video": {"held_out": 0.1}}))
    with pytest.raises(SystemExit, match=r"runs/quickstart is below .*video 0\.100 \(goal 0\.85\)"):
        onward.start_from_quickstart(Steps(), fast=False)


def test_a_finished_run_is_not_deleted_without_being_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / run.OUT).mkdir(parents=True)
    (tmp_path / run.OUT / report.SCORES).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run"])
    with pytest.raises(SystemExit, match=r"holds a finished run.*OVERWRITE=1"):
        run.main()


def test_the_checkpoint_is_chosen_on_the_choice_set(finished: Path) -> None:
    assert report.choose(finished) == Path("c/iter_0000002")


def test_scores_have_the_agreed_shape(finished: Path) -> None:
    scores = report.stage_scores(finished)
    assert list(scores["stages"]) == ["cold_start", "gspo", "dpo", "gspo_2"]
    for name, stage in scores["stages"].items():
        assert sorted(stage) == sorted(
            ("greedy", "sampled", "count", "no_think", "swapped_thought", "swapped_media", "format", "contradiction",
             "length", "clipped", "seconds")
        )  # fmt: skip
        assert stage["clipped"] == (0.04 if name.startswith("gspo") else None)
    assert scores["stages"]["dpo"]["seconds"] == 20.0 and scores["control"] is scores["sft_more"] is None
    controls = report.control_scores(finished)
    assert controls["control"] == {"sampled": 0.4, "greedy": 0.5, "count": 12, "iterations": 0, "grad_norm": 1.5}
    assert controls["sft_more"] == {"sampled": 0.45, "count": 12}
    table = report.table({**scores, **controls})
    assert [line[0] for line in table] == ["stage", *scores["stages"], "control", "sft_more"]
    assert {len(line) for line in table} == {len(table[0])}


def test_supervised_control_trains_as_long_as_gspo_did(finished: Path) -> None:
    """80 busy seconds of GSPO against 30 of 20 supervised steps."""
    assert report.steps_in_the_time_of_gspo(finished) == round(80 / 30 * 20)


def test_recipes_read_what_the_driver_makes() -> None:
    cold, gspo = load_recipe(run.COLD_START), load_recipe(run.GSPO)
    assert cold.init_from == str(run.QUICKSTART) and cold.run_dir == str(run.OUT / "cold_start")
    assert cold.checkpoint.keep == 0 and cold.train_iters % cold.checkpoint.save_interval == 0
    assert [source.path for source in cold.data.sources if source.name in SOURCES] == [
        f"{run.OUT}/data/demonstrations/{name}.jsonl" for name in SOURCES
    ]
    assert [source.path for source in gspo.data.sources] == [f"{run.OUT}/data/prompts/{name}.jsonl" for name in SOURCES]
    chain = load_chain(Path(run.CHAIN), [])
    assert [stage.name for stage in chain.stages] == ["gspo", "pairs", "dpo", "gspo_2"]
    assert [str(stage.run_dir) for stage in chain.stages if stage.name in run.RUNS] == [
        f"{run.OUT}/{n}" for n in run.RUNS
    ]
