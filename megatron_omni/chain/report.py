"""What the stages of a chain show: held-out losses of all (evaluation/stages.py), and what pairs and rewards came to."""

from collections.abc import Sequence
from pathlib import Path

from megatron_omni.chain.config import PAIRS_REPORT
from megatron_omni.chain.plan import Chain, Stage
from megatron_omni.evaluation import stages as reading
from megatron_omni.foreign import read_json

FIGURES = {
    "reinforce": ("reward/mean", "groups/kept", "rollout/length"),
    "preference": ("preference/accuracy", "preference/margin"),
}
"""Metrics of a task that tell how it went, where metrics.jsonl has them."""


def report_file(chain: Chain) -> Path:
    """Where a chain's report lies: ``held_out.md``, or where two chains share a directory, each under its own name."""
    return chain.run_dir / ("held_out.md" if chain.name == "chain" else f"{chain.name}.md")


def report(chains: Sequence[Chain]) -> str:
    """The table over all ``chains`` (one recipe, several seeds) and the reading of each."""
    first = chains[0]
    trained = [stage for stage in first.stages if stage.recipe is not None]
    losses = [{s.name: reading.held_out_losses(s.run_dir) for s in chain.stages} for chain in chains]
    learned = [line for chain in chains for line in _thinking(chain)]
    if not learned and not any(seed[stage.name] for seed in losses for stage in trained):
        raise ValueError(f"{first.run_dir}: no stage has evaluated anything; run the chain, with log.eval_interval > 0")
    held_out = any(seed[stage.name] for seed in losses for stage in trained)
    blocks = [reading.table([stage.name for stage in trained], losses)] if held_out else []
    scores = [{s.name: reading.held_out_scores(s.run_dir) for s in chain.stages} for chain in chains]
    if any(found for seed in scores for found in seed.values()):
        blocks += ["", "Scores:", "", reading.table([stage.name for stage in trained], scores)]
    for chain, found in zip(chains, losses):
        lines = [*_lines(chain, found), *_thinking(chain)]
        blocks += [f"{chain.run_dir}:" if len(chains) > 1 else "", *(f"- {line}" for line in lines)]
    return "\n".join(blocks).lstrip("\n")


def _lines(chain: Chain, losses: dict[str, reading.Losses]) -> list[str]:
    by_name = {stage.name: stage for stage in chain.stages}
    lines: list[str] = []
    for merge in chain.stages:
        if merge.upcycle is None:
            continue
        experts = {
            name: _own_sets(by_name[name], losses[name])
            for role, name in merge.sources.items()
            if role != "base" and losses.get(name)
        }
        lines += reading.own_modality(experts, losses)
        for stage in chain.stages:
            if stage.sources.get("init_from") == merge.name and losses[stage.name]:
                lines += reading.against_best(stage.name, list(experts), losses)
                lines += _after(chain, stage, losses)
    return lines


def _after(chain: Chain, tuned: Stage, losses: dict[str, reading.Losses]) -> list[str]:
    """Of the stages that start from the fine-tuned mixture, and of its gate after the last of them."""
    lines, last = [], tuned
    for stage in chain.stages:
        if stage.sources.get("init_from") == tuned.name and losses[stage.name]:
            lines += reading.change(tuned.name, stage.name, losses)
            last = stage
    return [*lines, *(f"{last.name}, {line}" for line in reading.routing(last.run_dir))]


def _own_sets(stage: Stage, losses: reading.Losses) -> list[str]:
    assert stage.recipe is not None
    return [source.name for source in stage.recipe.data.sources if source.name in losses]


def _thinking(chain: Chain) -> list[str]:
    """Of the stages that were reinforced, made pairs or learned from them, at their beginning and their end."""
    lines = []
    for stage in chain.stages:
        if stage.pairs is not None and stage.is_done:
            made = read_json(stage.run_dir / PAIRS_REPORT)
            kinds = ", ".join(f"{kind} {count}" for kind, count in made["by_kind"].items())
            lines.append(f"{stage.name}: {made['pairs']} pairs of {made['prompts']} prompts ({kinds})")
        elif stage.recipe is not None and stage.recipe.task != "supervised":
            lines += reading.first_and_last(stage.name, stage.run_dir, FIGURES[stage.recipe.task])
    return lines
