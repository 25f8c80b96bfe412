"""A chain with pairs and prompts: its plan, what is refused, what each stage is handed, and what a stale stage is."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_omni.chain import Chain, check_inputs, load_chain, recipe_with_rows, report, run_pairs, training_command
from megatron_omni.checkpoint import commit
from megatron_omni.cli.chain import Signals, Stopped, main
from megatron_omni.config.load import load_recipe, recipe_to_yaml
from megatron_omni.data.tokenizer import load_tokenizer
from tests.unit.test_pairs_stage import ASTRAY, RIGHT, WRONG, Stage
from tests.unit.tiny_data import tokenizer_file

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "extends": str(ROOT / "recipes" / "tiny" / "0_base.yaml"),
    "checkpoint": {"keep_best": None},
    "model": {"vocab_size": 320},
}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A source of sums; what its chain's stage 6_gspo rolls out."""
    made = Stage(tmp_path, load_tokenizer(tokenizer_file(tmp_path)))
    made.recipe.run_dir = str(tmp_path / "run" / "6_gspo")
    return made


def write_chain(stage: Stage, **changes: dict[str, Any] | None) -> Path:
    """cold start, gspo, pairs, dpo, gspo over the stage's source, with stages changed by name (None: left out)."""
    data = {
        "tokenizer": str(stage.tokenizer.path), "eval_sources": [], "packing": False,
        "sources": [{"name": "sums", "path": str(stage.folder / "sums.jsonl")}],
    }  # fmt: skip
    rewards = [{"function": "number"}, {"function": "think_format", "weight": 0.5}]
    recipes = {
        "5_cold_start": BASE | {"data": data},
        "6_gspo": BASE | {"data": data, "task": "reinforce", "reinforce": {"rewards": rewards, "max_new_tokens": 16}},
        "7_dpo": BASE | {"data": data, "task": "preference"},
    }
    for name, recipe in recipes.items():
        (stage.folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    stages: list[dict[str, Any]] = [
        {"name": "5_cold_start", "recipe": "5_cold_start.yaml"},
        {"name": "6_gspo", "recipe": "6_gspo.yaml", "init_from": "5_cold_start"},
        {"name": "6_pairs", "pairs": {"rollouts": "6_gspo"}},
        {"name": "7_dpo", "recipe": "7_dpo.yaml", "init_from": "6_gspo", "data_from": "6_pairs"},
        {"name": "8_gspo", "recipe": "6_gspo.yaml", "init_from": "7_dpo", "prompts_from": {"rollouts": "6_gspo"}},
    ]
    for made in stages:
        made.update(changes.get(made["name"]) or {})
    stages = [made for made in stages if changes.get(made["name"], {}) is not None]
    file = stage.folder / "thinking.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(stage.folder / "run"), "stages": stages}))
    return file


def finish(chain: Chain, name: str) -> None:
    """What a training stage leaves behind when it has run with what the chain hands it, without its tensors."""
    stage = chain.stage(name)
    assert stage.recipe is not None
    recipe = recipe_with_rows(chain, stage)
    recipe.init_from = next((str(path) for path in chain.inputs(stage).values()), None)
    commit.begin(stage.checkpoints, stage.steps)
    (stage.run_dir / "resolved.yaml").write_text(recipe_to_yaml(recipe))
    commit.publish(stage.checkpoints, stage.steps, keep=0)


def roll_out(stage: Stage) -> None:
    texts = [(0, WRONG, 0.0), (1, RIGHT, 1.0), (2, ASTRAY, 1.0)]
    stage.write(
        *(stage.rollout(0, g, text, right) for g, text, right in texts),
        *(stage.rollout(1, g, RIGHT, 1.0) for g in range(3)),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"6_pairs": {"pairs": {"rollouts": "8_gspo"}}}, "6_pairs: rollouts: '8_gspo' comes later"),
        ({"6_pairs": {"pairs": {"rollouts": "5_cold_start"}}}, "'5_cold_start' is no earlier stage that has task reinforce"),
        ({"6_pairs": {"recipe": "7_dpo.yaml"}}, "6_pairs: has both of recipe and pairs"),
        ({"6_pairs": {"init_from": "6_gspo"}}, "6_pairs: init_from has no effect without a recipe"),
        ({"6_pairs": {"pairs": {"rollouts": "6_gspo", "correct": ["accuracy"]}}}, "6_pairs: correct: 'accuracy' is no reward of"),
        ({"6_pairs": {"pairs": {"rollouts": "6_gspo", "pairs_per_prompt": 0}}}, "pairs_per_prompt"),
        ({"7_dpo": {"init_from": "6_pairs"}}, "7_dpo: init_from: 6_pairs makes pairs and no weights"),
        ({"7_dpo": {"data_from": "6_gspo"}}, "7_dpo: data_from: '6_gspo' is no earlier stage that makes pairs"),
        ({"7_dpo": {"overrides": ["data.system_template=thinking"]}}, "7_dpo: data_from: its prompts have another system turn"),
        ({"7_dpo": {"prompts_from": {"rollouts": "6_gspo"}}}, "7_dpo: has both of data_from and prompts_from"),
        ({"8_gspo": {"recipe": "7_dpo.yaml"}}, "8_gspo: prompts_from: has task preference"),
        ({"8_gspo": {"prompts_from": {"rollouts": "6_gspo", "drop_solved": 1.5}}}, "drop_solved"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_runs(
    stage: Stage, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_chain(stage, **changes)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_the_plan_says_what_is_paired_and_read(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_chain(stage)), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for line in (
        "6_pairs: pairs (not started)", "rollouts of 6_gspo", "the thought ends with the answer (at least 0.5)",
        "6_pairs, all alike", "sums 1; without 80% of what 6_gspo solved",
    ):  # fmt: skip
        assert line in plan


def test_every_stage_gets_what_the_earlier_ones_made_and_stale_ones_are_refused(stage: Stage) -> None:
    chain = load_chain(write_chain(stage), ["seed=5"])
    for name in ("5_cold_start", "6_gspo"):
        finish(chain, name)
    roll_out(stage)
    pairs, dpo, last = (chain.stage(name) for name in ("6_pairs", "7_dpo", "8_gspo"))
    assert not pairs.is_done
    run_pairs(chain, pairs)
    assert pairs.is_done and json.loads((pairs.run_dir / "pairs.json").read_text())["pairs"] == 2
    (word,) = [word for word in training_command(chain, dpo, "python") if word.startswith("data.sources=")]
    assert dpo.recipe_file is not None
    (source,) = load_recipe(dpo.recipe_file, [word]).data.sources
    assert [source] == recipe_with_rows(chain, dpo).data.sources and source.weight == 2
    assert Path(source.path).parent.parent == pairs.run_dir and len(Path(source.path).read_text().splitlines()) == 2
    finish(chain, "7_dpo")
    (word,) = [word for word in training_command(chain, last, "python") if word.startswith("data.sources=")]
    assert (
        str(last.run_dir) in word
        and len(Path(recipe_with_rows(chain, last).data.sources[0].path).read_text().splitlines()) == 3
    )
    finish(chain, "8_gspo")
    for each in chain.stages:
        check_inputs(chain, each)
    assert "- 6_pairs: 2 pairs of 2 prompts (inconsistent 1, wrong 1)" in report([chain])

    # Rolled out anew: the pairs are stale, and made anew, so is what learned from the old ones.
    stage.write(*(stage.rollout(0, g, text, r) for g, text, r in [(0, WRONG, 0.0), (1, RIGHT, 1.0)]), iteration=1)
    with pytest.raises(ValueError, match=r"stage 6_pairs: was made from other rollouts than .* move .*6_pairs away"):
        check_inputs(chain, pairs)
    run_pairs(chain, pairs)
    check_inputs(chain, pairs)
    for name in ("7_dpo", "8_gspo"):
        with pytest.raises(ValueError, match=rf"stage {name}: reads rows of .*, but the chain hands it those of"):
            check_inputs(chain, chain.stage(name))


def test_the_command_makes_pairs_and_passes_over_them_when_it_is_started_again(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_chain(stage, **{"7_dpo": None, "8_gspo": None})
    chain = load_chain(file)
    for name in ("5_cold_start", "6_gspo"):
        finish(chain, name)
    assert main([str(file)]) == 2
    assert "stage 6_pairs: " in (error := capsys.readouterr().err) and "no rollouts" in error
    roll_out(stage)
    assert main([str(file)]) == 0
    said = capsys.readouterr().out
    assert "== 6_pairs ==" in said and "wrote 2 pairs of 2 prompts (inconsistent 1, wrong 1)" in said
    assert f"all 3 stages are finished: {chain.stage('6_pairs').run_dir}" in said
    assert (stage.folder / "run" / "thinking.md").read_text().startswith("- 6_pairs: 2 pairs")
    assert main([str(file)]) == 0
    assert "==" not in capsys.readouterr().out
    (stage.folder / "run" / "6_gspo" / "rollouts" / "iter_0000001.rank_0_of_1.jsonl").write_text("")
    assert main([str(file)]) == 2 and "made from other rollouts" in capsys.readouterr().err


def test_a_judge_that_is_away_stops_the_chain_to_be_started_again(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"url": "http://127.0.0.1:9/v1", "model": "m", "tries": 1, "timeout_seconds": 1.0}
    judged = {"rollouts": "6_gspo", "consistency": {"function": "judge", "settings": settings}}
    file = write_chain(stage, **{"6_pairs": {"pairs": judged}, "7_dpo": None, "8_gspo": None})
    for name in ("5_cold_start", "6_gspo"):
        finish(load_chain(file), name)
    roll_out(stage)
    assert main([str(file)]) == 75
    assert "the judge gave no score to 5 of 5 responses" in capsys.readouterr().err


def test_a_signal_in_the_moment_in_which_a_stage_starts_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the stage would outlive its chain and keep its lock."""
    signals, start = Signals(), subprocess.Popen.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        signals(signal.SIGTERM, None)

    monkeypatch.setattr(subprocess.Popen, "__init__", begin)
    assert signals.start([sys.executable, "-c", "import signal; signal.pause()"]) == -signal.SIGTERM
    assert signals.received and signals.child is None
    with pytest.raises(Stopped):
        signals(signal.SIGTERM, None)


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, megatron_omni.chain as c; c.load_chain; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
