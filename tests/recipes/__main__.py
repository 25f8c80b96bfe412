"""Run the full recipes in miniature: ``python -m tests.recipes [NAME ...]``; see tests/recipes/miniature.py."""

import sys
import tempfile
import time
from pathlib import Path

from megatron_omni.platform.device import install

install()  # before anything imports megatron.core

from tests.recipes.miniature import cases  # noqa: E402
from tests.recipes.rehearsal import Rehearsal  # noqa: E402


def main(names: list[str]) -> int:
    """Rehearse all recipes or those named; a line for each, and the number of those that failed as the status."""
    chosen = [case for case in cases() if not names or case.path.stem in names or case.name in names]
    if not chosen:
        print(f"error: no recipe is called {' or '.join(names)}; there are {', '.join(c.name for c in cases())}")
        return 2
    failed, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="miniature-") as directory:
        rehearsal = Rehearsal(Path(directory))
        for case in chosen:
            start, why = time.monotonic(), ""
            try:
                small = rehearsal.run(case)
                told = f"{small.num_ranks} ranks, dropped: {small.dropped}"
            except Exception as error:  # one line a recipe, whatever it was
                failed, told = failed + 1, ""
                why = "\n".join(["", str(error), *getattr(error, "__notes__", [])])
            seconds = time.monotonic() - start
            print(f"{case.name}: {told}, {seconds:.0f} s, {'FAILED' if why else 'passed'}{why}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} passed in {time.monotonic() - began:.0f} s")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
