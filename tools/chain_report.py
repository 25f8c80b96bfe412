"""What a chain shows on held-out data: a table of every stage, and how it reads (megatron_omni/evaluation/stages.py).

python tools/chain_report.py recipes/tiny/chain.yaml                                      # the chain's own run_dir
python tools/chain_report.py recipes/tiny/chain.yaml runs/seed_7 runs/seed_8 runs/seed_9  # several seeds, with their spread

Prints, and writes held_out.md into the (first) run directory.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_omni.chain import Chain, Stage, load_chain
from megatron_omni.evaluation import stages as reading


def main(arguments: list[str] | None = None) -> int:
    """Read the runs, print and write."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chain", type=Path, help="the chain's YAML file")
    parser.add_argument("run_dirs", nargs="*", type=Path, help="its run directories, one a seed (default: the file's)")
    words = parser.parse_args(arguments)
    try:
        chains = [load_chain(words.chain, [f"run_dir={run_dir}"]) for run_dir in words.run_dirs]
        chains = chains or [load_chain(words.chain)]
        text = report(chains)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    (chains[0].run_dir / "held_out.md").write_text(text + "\n", encoding="utf-8")
    return 0


def report(chains: list[Chain]) -> str:
    """The table over all ``chains`` (one recipe, several seeds) and the reading of each."""
    first = chains[0]
    trained = [stage for stage in first.stages if stage.recipe is not None]
    losses = [{s.name: reading.held_out_losses(s.run_dir) for s in chain.stages} for chain in chains]
    if not any(seed[stage.name] for seed in losses for stage in trained):
        raise ValueError(f"{first.run_dir}: no stage has evaluated anything; run the chain, with log.eval_interval > 0")
    blocks = [reading.table([stage.name for stage in trained], losses)]
    for chain, found in zip(chains, losses):
        blocks += [f"{chain.run_dir}:" if len(chains) > 1 else "", *(f"- {line}" for line in _lines(chain, found))]
    return "\n".join(blocks)


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


if __name__ == "__main__":
    sys.exit(main())
