"""torchrun that says nothing more than what happened when a run is stopped by a signal.

    python -m megatron_omni.platform.torchrun OPTIONS_OF_TORCHRUN -m megatron_omni.cli.train RECIPE

torchrun itself dies of SIGUSR1 and leaves its ranks behind, ends with a traceback when any other stop signal comes, and
reports ranks that leave with status 75 ("saved, start me again") as failures. Here SIGUSR1 is passed on to the ranks like
the other signals, and the status is

    128 + N   stopped by signal N: the ranks have had ``--shutdown-timeout`` seconds to save; whether they have is said by
              the file ``requeue`` in the run directory (what they returned, torchrun does not tell)
    75        they left with 75 by themselves
    other     torchrun's own
"""

import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_omni.config.outcome import EXIT_REQUEUE
from megatron_omni.platform.environment import set_cuda_defaults

STOP_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(words: Sequence[str]) -> int:
    """Run torchrun with ``words``; the status."""
    set_cuda_defaults()
    try:
        run.main(["--signals-to-handle", STOP_SIGNALS, *words])
    except SignalException as stop:
        print(f"stopped by {stop.sigval.name}", file=sys.stderr)
        return 128 + stop.sigval
    except ChildFailedError as error:
        # torchrun ends the others when the first has left.
        codes = {failure.exitcode for failure in error.failures.values()}
        if EXIT_REQUEUE not in codes or codes - {EXIT_REQUEUE, -signal.SIGTERM}:
            raise
        return EXIT_REQUEUE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
