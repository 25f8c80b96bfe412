"""Running the stages of a chain: what each is handed, its command, and whether a started one was made of just that.

Training stages are subprocesses (torchrun, or ``launcher``), so that none leaves memory or process groups behind. What a
stage was made from stands in its ``resolved.yaml``, ``upcycle.json`` or ``pairs.json``: one whose predecessor was made anew
since is an error, not a guess.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_omni.chain.plan import Chain, Stage, checkpoint_at
from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.run_dir import RESOLVED
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.load import load_recipe
from megatron_omni.config.model import UPCYCLED_SHAPE
from megatron_omni.config.run import Recipe
from megatron_omni.foreign import read_json

UPCYCLE_REPORT = "upcycle.json"


def check_paths(chain: Chain) -> None:
    """ValueError for a stage that has yet to start from a path where nothing is."""
    for stage in chain.stages:
        for role, word in stage.sources.items():
            if stage.steps_done is None and isinstance(path := chain.source(word), Path) and not path.exists():
                raise ValueError(f"stage {stage.name}: {role}: {word!r} is no earlier stage and no checkpoint is there")
        taught = stage.pairs.demonstrations if stage.pairs is not None else None
        if stage.steps_done is None and taught is not None and not Path(taught).is_file():
            raise ValueError(f"stage {stage.name}: demonstrations: {taught!r} is no file")


def check_inputs(chain: Chain, stage: Stage) -> None:
    """ValueError unless what a started stage was made from is what the chain hands to it now."""
    if stage.steps_done is None:
        return
    if stage.pairs is not None:
        _check_pairs(chain, stage)
        return
    expected = {role: checkpoint_at(path) for role, path in chain.inputs(stage).items()}
    if stage.upcycle is not None:
        report = commit.iteration_dir(stage.checkpoints, 0) / UPCYCLE_REPORT
        found = read_json(report)["sources"]
    else:
        resolved = stage.run_dir / RESOLVED
        origin = load_recipe(resolved).init_from if resolved.is_file() else None
        found = {} if origin is None else {"init_from": origin}
        _check_rows(chain, stage)
    found = {role: checkpoint_at(Path(path)) for role, path in found.items()}
    if expected != found:
        raise ValueError(
            f"stage {stage.name}: was made from {_said(found)}, but the chain hands it {_said(expected)}; move {stage.run_dir} "
            "away to make it again, or take another run_dir"
        )


def _check_pairs(chain: Chain, stage: Stage) -> None:
    from megatron_omni.chain import pairs

    assert stage.pairs is not None
    was, now = pairs.made_of(stage.run_dir), pairs.inputs_of(stage.pairs, chain.recipe_of(stage.reads["rollouts"]))
    assert was is not None
    changed = [name for name in {**now, **was["inputs"]} if not _same(was["inputs"].get(name), now.get(name))]
    if changed:
        raise ValueError(
            f"stage {stage.name}: was made from other {', '.join(changed)} than the chain hands it; move {stage.run_dir} away "
            "to make it again, or take another run_dir"
        )


def _same(one: Any, other: Any) -> bool:
    from megatron_omni.chain.handed import digest_of

    return digest_of({"": one}) == digest_of({"": other})


def _check_rows(chain: Chain, stage: Stage) -> None:
    """Rows made for a stage lie in a folder that is named after what they were made of."""
    from megatron_omni.chain import prompts

    resolved = stage.run_dir / RESOLVED
    if not stage.reads or not resolved.is_file():
        return
    was = {str(Path(source.path).parent) for source in load_recipe(resolved).data.sources}
    if stage.prompts_from is not None and stage.recipe is not None:
        now = prompts.prompts_folder(stage.prompts_from, chain.recipe_of(stage.reads["prompts_from"]), stage.recipe)
    else:
        now = Path((handed_sources(chain, stage) or [])[0].path).parent
    if was != {str(now)}:
        raise ValueError(
            f"stage {stage.name}: reads rows of {', '.join(sorted(was))}, but the chain hands it those of {now}; move "
            f"{stage.run_dir} away to make it again, or take another run_dir"
        )


def handed_sources(chain: Chain, stage: Stage) -> list[SourceConfig] | None:
    """What a stage whose predecessors are finished reads in place of its recipe's sources; None: those."""
    if not stage.reads:
        return None
    from megatron_omni.chain import pairs, prompts

    if "data_from" in stage.reads:
        made = chain.stage(stage.reads["data_from"])
        assert stage.recipe is not None
        return pairs.pair_sources(made.run_dir, chain.recipe_of(made.reads["rollouts"]), stage.recipe)
    if stage.prompts_from is not None:
        assert stage.recipe is not None
        return prompts.left_sources(stage.prompts_from, chain.recipe_of(stage.reads["prompts_from"]), stage.recipe)
    return None


def recipe_with_rows(chain: Chain, stage: Stage) -> Recipe:
    """The recipe of a training stage over what it is handed."""
    assert stage.recipe is not None
    sources = handed_sources(chain, stage)
    if sources is None:
        return stage.recipe
    return dataclasses.replace(stage.recipe, data=dataclasses.replace(stage.recipe.data, sources=sources))


def run_pairs(chain: Chain, stage: Stage) -> Mapping[str, Any]:
    """Make the pairs of a stage; what pairs.json holds. ValueError, OSError, and pairs.Unanswered where a judge is away."""
    from megatron_omni.chain import pairs

    assert stage.pairs is not None
    return pairs.make_pairs(stage.pairs, chain.recipe_of(stage.reads["rollouts"]), stage.run_dir)


def _override(sources: list[SourceConfig]) -> str:
    """``data.sources=...`` with what is not as by default."""
    plain = dataclasses.asdict(SourceConfig(name="", path=""))
    given = [{k: v for k, v in dataclasses.asdict(source).items() if v != plain[k]} for source in sources]
    return f"data.sources={json.dumps(given, ensure_ascii=False)}"


def _said(inputs: dict[str, Path]) -> str:
    return ", ".join(map(str, inputs.values())) or "random weights"


def training_command(chain: Chain, stage: Stage, python: str) -> list[str]:
    """The subprocess of a training stage whose predecessors are finished."""
    launcher = (
        [python, "-m", "megatron_omni.platform.torchrun", "--standalone", "--nproc-per-node", str(chain.nproc_per_node)]
        if chain.launcher is None
        else chain.launcher.split()
    )
    inputs = [f"{role}={path}" for role, path in chain.inputs(stage).items()]
    sources = handed_sources(chain, stage)
    inputs += [] if sources is None else [_override(sources)]
    return [*launcher, "-m", "megatron_omni.cli.train", str(stage.recipe_file), *stage.overrides, *inputs]


def run_upcycle(chain: Chain, stage: Stage) -> Path:
    """Make the mixture of an upcycling stage; ValueError, CheckpointError or OSError as ``upcycle`` raises them."""
    from megatron_omni.checkpoint.upcycle import upcycle

    assert stage.upcycle is not None
    stage.run_dir.mkdir(parents=True, exist_ok=True)
    shape = [f"model.moe.{name}={getattr(stage.moe, name)}" for name in UPCYCLED_SHAPE] if stage.moe is not None else []
    return upcycle(chain.inputs(stage), stage.run_dir, trunk=stage.upcycle.trunk_role, overrides=shape)


def clean_environment() -> dict[str, str]:
    """This process's environment without what a torchrun around it said, which would mislead the one of a stage."""
    dropped = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE")
    prefixes = ("TORCHELASTIC_", "LOCAL_", "ROLE_")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(prefixes)}
    # torchrun gives its workers 30 seconds to save and leave; a large checkpoint takes longer.
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600", **kept}
