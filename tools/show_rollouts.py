"""One HTML page of the rollouts of an iteration: prompts with media, responses, rewards, advantages.

python tools/show_rollouts.py runs/6_gspo                                  # the last iteration
python tools/show_rollouts.py runs/6_gspo --iteration 40 --before 1        # the same records then and now
python tools/show_rollouts.py runs/8_gspo --before-run runs/6_gspo --out page/index.html

Writes RUN/rollouts/iter_0000040.html unless --out says otherwise, and its media beside it in media/.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_omni.evaluation.rollouts_page import last_iteration, write_rollouts_page
from megatron_omni.rewards.rollouts import FOLDER


def main(arguments: list[str] | None = None) -> int:
    """Read the rollouts, write the page, print its path."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="run directory of a run of task reinforce")
    parser.add_argument("--iteration", type=int, help="default: the last one")
    parser.add_argument("--before", type=int, metavar="ITERATION", help="show as well what was answered then")
    parser.add_argument("--before-run", type=Path, help="of another run (default iteration: its last one)")
    parser.add_argument("--out", type=Path, help="the page's file")
    words = parser.parse_args(arguments)
    try:
        now = words.run_dir, words.iteration if words.iteration is not None else last_iteration(words.run_dir)
        before = None
        if words.before is not None or words.before_run is not None:
            run = words.before_run or words.run_dir
            before = run, words.before if words.before is not None else last_iteration(run)
        page = write_rollouts_page(words.out or words.run_dir / FOLDER / f"iter_{now[1]:07d}.html", now, before)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
