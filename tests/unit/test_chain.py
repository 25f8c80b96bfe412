"""A chain's plan: the order and the types of what is handed on, what counts as finished, and what a stale stage is."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_omni.chain import check_inputs, clean_environment, load_chain, training_command
from megatron_omni.checkpoint import commit
from megatron_omni.cli.chain import main
from megatron_omni.config.load import load_recipe, recipe_to_yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "recipes" / "tiny" / "chain.yaml"


def write_chain(path: Path, **changes: dict[str, Any] | None) -> Path:
    """The tiny chain with stages changed by name (None: left out)."""
    values = yaml.safe_load(TINY.read_text())
    values["run_dir"] = str(path / "run")
    for stage in values["stages"]:
        if "recipe" in stage:
            stage["recipe"] = str(TINY.parent / stage["recipe"])
        stage.update(changes.get(stage["name"]) or {})
    values["stages"] = [s for s in values["stages"] if changes.get(s["name"], {}) is not None]
    file = path / "chain.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def finish(run_dir: Path, step: int, *, origin: str | None = None, sources: dict[str, str] | None = None) -> Path:
    """What a run leaves behind, without its tensors."""
    root = run_dir / commit.CHECKPOINTS
    directory = commit.begin(root, step)
    if sources is not None:
        (directory / "upcycle.json").write_text(json.dumps({"sources": sources}))
    recipe = load_recipe(TINY.parent / "0_base.yaml")
    recipe.init_from = origin
    (run_dir / "resolved.yaml").write_text(recipe_to_yaml(recipe))
    return commit.publish(root, step, keep=0)


@pytest.mark.parametrize(
    "chain", sorted((ROOT / "recipes").rglob("chain*.yaml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_shipped_chains_load_and_recipes_name_the_same_origin(chain: Path) -> None:
    loaded = load_chain(chain)
    seen: set[Path] = set()
    for stage in loaded.stages:
        if stage.recipe_file is None or not stage.sources or stage.recipe_file in seen:
            continue
        seen.add(stage.recipe_file)  # a later round has the recipe of the first
        source = loaded.source(stage.sources["init_from"])
        expected = source if isinstance(source, Path) else source.run_dir
        assert load_recipe(stage.recipe_file).init_from == str(expected), stage.name
        assert load_recipe(stage.recipe_file).run_dir == str(stage.run_dir), stage.name


def test_warm_ups_keep_attention_frozen_and_sft_trains_what_table_2_says() -> None:
    for folder in ("", "tiny"):
        stages = {stage.name: stage for stage in load_chain(ROOT / "recipes" / folder / "chain.yaml").stages}
        frozen = {name: set(stage.recipe.freeze) for name, stage in stages.items() if stage.recipe}
        assert not {"vision", "audio", "attention", "ffn", "embeddings"} - frozen["1_pretrain"]
        assert "projectors" not in frozen["1_pretrain"]
        for name in ("2_vision", "2_speech_understanding", "2_speech_generation"):
            assert {"vision", "audio", "attention", "norms"} <= frozen[name]
            assert not {"ffn", "projectors"} & frozen[name]
        assert not {"experts", "shared_experts", "gate", "projectors"} & (frozen["3_sft"] | frozen["4_anneal"])
        assert {"vision", "attention"} <= frozen["3_sft"] and "vision" not in frozen["4_anneal"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"2_vision": {"init_from": "3_sft"}}, "2_vision: init_from: '3_sft' comes later"),
        ({"2_vision": {"name": "1_pretrain"}}, "two stages are called '1_pretrain'"),
        ({"2_vision": {"upcycle": {"base": "0_base"}}}, "2_vision: has both of recipe and upcycle"),
        (
            {"2_vision": {"overrides": ["model.hidden_size=192"]}},
            "stage 2_vision: model.hidden_size=192: the weights of 1_pretrain were made with 96",
        ),
        ({"2_vision": {"overrides": ["model.rope_theta_seconds=7"]}}, "2_vision: model.rope_theta_seconds=7.0: the weights"),
        ({"2_vision": {"overrides": ["model.audio=null"]}}, "only one of it and 1_pretrain, from which it starts, has model.audio"),
        ({"3_sft": {"overrides": ["model.layernorm_epsilon=0.1"]}}, "3_sft: model.layernorm_epsilon=0.1: the weights of upcycle"),
        ({"2_vision": {"overrides": ["optim.lrr=1"]}}, "stage 2_vision: override 'optim.lrr=1': unknown field"),
        ({"4_anneal": {"overrides": ["model.moe=null"]}}, "4_anneal: is dense but starts from 3_sft"),
        (
            {"2_vision": {"overrides": ["model.ffn_hidden_size=96", "init_allow_changed=[model.ffn_hidden_size]"]}},
            "2_vision has a feed-forward part 96 wide",
        ),
        ({"upcycle": {"upcycle": {"base": "1_pretrain"}}}, "1 sources make as many routed experts"),
        ({"upcycle": {"upcycle": {"base": "3_sft"}}}, "upcycle: base: '3_sft' comes later"),
        ({"1_pretrain": {"hand_on": "best", "overrides": ["checkpoint.keep_best=null"]}}, "hand_on=best needs"),
        ({"1_pretrain": {"hand_on": "worst"}}, "worst"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_chain(tmp_path, **changes)), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_stages_hand_on_their_checkpoints_and_stale_ones_are_refused(tmp_path: Path) -> None:
    chain = load_chain(write_chain(tmp_path, **{"1_pretrain": {"hand_on": "best"}}), ["seed=5"])
    stages = {stage.name: stage for stage in chain.stages}
    base, pretrain, vision = stages["0_base"], stages["1_pretrain"], stages["2_vision"]
    assert not base.is_done and base.steps_done is None and "init_from" not in base.sources
    finish(base.run_dir, base.steps - 1)
    assert base.steps_done == base.steps - 1 and not base.is_done
    first = finish(base.run_dir, base.steps)
    assert base.is_done and base.result == first
    command = training_command(chain, pretrain, "python")
    assert command[:6] == ["python", "-m", "megatron_omni.platform.torchrun", "--standalone", "--nproc-per-node", "2"]
    assert {f"init_from={first}", f"run_dir={pretrain.run_dir}", "load=auto", "seed=5"} <= set(command)

    # The best checkpoint is handed on, not the last.
    best = finish(pretrain.run_dir, 50, origin=str(first))
    (pretrain.checkpoints / commit.BEST).write_text(json.dumps({"step": 50, "metric": "eval/loss", "value": 1.0}))
    finish(pretrain.run_dir, 60, origin=str(first))
    assert chain.inputs(vision) == {"init_from": best}
    check_inputs(chain, pretrain)

    # A run started by hand from the run directory is the same hand-off.
    finish(pretrain.run_dir, 60, origin=str(base.run_dir))
    check_inputs(chain, pretrain)

    # The base goes on: what was made from its older checkpoint is stale.
    finish(base.run_dir, base.steps + 100)
    finish(pretrain.run_dir, 60, origin=str(first))
    with pytest.raises(ValueError, match=rf"stage 1_pretrain: was made from .*{base.steps}.*{base.steps + 100}.*move"):
        check_inputs(chain, pretrain)


def test_upcycling_takes_the_shape_of_its_consumer_and_remembers_its_sources(tmp_path: Path) -> None:
    stages: dict[str, Any] = {name: {"overrides": ["model.moe.num_shared_experts=1"]} for name in ("3_sft", "4_anneal")}
    chain = load_chain(write_chain(tmp_path, **stages))
    stage = next(stage for stage in chain.stages if stage.name == "upcycle")
    assert stage.moe is not None and stage.moe.num_shared_experts == 1
    assert list(stage.sources) == ["vision", "speech1", "speech2", "base"]  # the order of the routed experts
    made = {}
    for role, name in stage.sources.items():
        source = chain.source(name)
        assert not isinstance(source, Path) and source.recipe is not None
        made[role] = str(finish(source.run_dir, source.recipe.train_iters))
    finish(stage.run_dir, 0, sources=made)
    assert stage.is_done
    check_inputs(chain, stage)
    finish(stage.run_dir, 0, sources=made | {"vision": made["base"]})
    with pytest.raises(ValueError, match="stage upcycle: was made from"):
        check_inputs(chain, stage)


def test_a_launcher_replaces_torchrun_and_a_torchrun_around_the_chain_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = load_chain(write_chain(tmp_path), ["launcher=srun -N 2 torchrun --nnodes=2"])
    assert training_command(chain, chain.stages[0], "python")[:5] == ["srun", "-N", "2", "torchrun", "--nnodes=2"]
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    assert not {"RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & clean_environment().keys()
    assert main([str(write_chain(tmp_path))]) == 0  # rank 1 leaves the chain to rank 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main([str(write_chain(tmp_path)), "--dry-run"]) == 2


def test_a_path_without_a_checkpoint_is_refused_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_chain(tmp_path, **{"0_base": {"init_from": "nowhere"}}))]) == 2
    assert "stage 0_base: init_from: 'nowhere' is no earlier stage" in capsys.readouterr().err


def test_a_second_chain_on_the_same_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    file = write_chain(tmp_path)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([str(file)]) == 2
    assert "still at work" in capsys.readouterr().err
