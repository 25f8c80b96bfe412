"""Run the full recipes in miniature: ``python -m tests.recipes [NAME ...]``; see tests/recipes/miniature.py."""

import signal
import sys
import tempfile
import time
from pathlib import Path

from megatron_omni.platform.device import install

install()  # before anything imports megatron.core

from tests.distributed.harness import RankFailure  # noqa: E402
from tests.recipes.miniature import Case, Miniature, cases  # noqa: E402
from tests.recipes.rehearsal import Rehearsal  # noqa: E402

DIED = f"died with exit code {-signal.SIGSEGV}\n"


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
                small = twice(rehearsal, case)
                told = f"{small.num_ranks} ranks, dropped: {small.dropped}"
            except Exception as error:  # one line a recipe, whatever it was
                failed, told, why = failed + 1, "", f"\n{whole(error)}"
            seconds = time.monotonic() - start
            print(f"{case.name}: {told}, {seconds:.0f} s, {'FAILED' if why else 'passed'}{why}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} passed in {time.monotonic() - began:.0f} s")
    return min(failed, 1)


def twice(rehearsal: Rehearsal, case: Case) -> Miniature:
    """Rehearse; once more, and told, where a rank died of SIGSEGV. One did, in a thread of gloo, in some three hundred runs
    (docs/log.md): a fault of ours would come again."""
    try:
        return rehearsal.run(case)
    except RankFailure as error:
        if DIED not in str(error):
            raise
        print(f"{case.name}: a rank died of SIGSEGV, so once more\n{whole(error)}", flush=True)
    return rehearsal.run(case, attempt=2)


def whole(error: Exception) -> str:
    """The error and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
