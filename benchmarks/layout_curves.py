"""Train the tests' tiny omni mixture for 20 steps on each layout, on this machine's CPU, and draw the loss curves.

python -m benchmarks.layout_curves --out docs/images/layout_curves.png
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"parallel__tensor_model_parallel_size": 2}),
    "PP2, recompute": (2, {"parallel__pipeline_model_parallel_size": 2, "parallel__recompute": "full"}),
    "EP2": (2, {"parallel__expert_model_parallel_size": 2}),
    "EP2, all-gather": (
        2,
        {"parallel__expert_model_parallel_size": 2, "model__moe__moe_token_dispatcher_type": "allgather"},
    ),
    "TP2 PP2 EP2": (
        4,
        {
            "parallel__tensor_model_parallel_size": 2,
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__expert_model_parallel_size": 2,
        },
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run all layouts, print the differences, draw."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="PNG to write")
    p.add_argument("--timeout", type=float, default=600.0, help="seconds for one layout (default 600)")
    options = p.parse_args(arguments)
    from megatron_omni.platform.device import install

    install()
    from tests.distributed.harness import run_ranks
    from tests.distributed.tiny_run import make_corpus, tiny_recipe, train_rank
    from tools.compare_losses import main as compare

    with tempfile.TemporaryDirectory() as directory:
        corpus = make_corpus(Path(directory) / "corpus")
        runs = []
        for name, (ranks, changes) in LAYOUTS.items():
            run = Path(directory) / f"run{len(runs)}"
            run_ranks(train_rank, ranks, tiny_recipe(corpus, run, **changes), timeout_seconds=options.timeout)
            runs.append(f"{name}={run}")
        return compare([*runs, "--assert-equal", "1e-5", "--plot", str(options.out)])


if __name__ == "__main__":
    sys.exit(main())
