"""What a chain shows on held-out data: a table of every stage, and how it reads (megatron_omni/evaluation/stages.py).

python tools/chain_report.py recipes/tiny/chain.yaml                                      # the chain's own run_dir
python tools/chain_report.py recipes/tiny/chain.yaml runs/seed_7 runs/seed_8 runs/seed_9  # several seeds, with their spread

Of stages of thinking it says what rewards, pairs and margins came to. Prints, and writes held_out.md (of a chain with
another name than chain.yaml: a file of that name) into the (first) run directory.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_omni.chain import load_chain, report, report_file


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
    report_file(chains[0]).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
