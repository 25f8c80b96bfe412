"""How a process ends, as its launcher, a chain and the next start read it: its status, and files in the run directory."""

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_REQUEUE = 75
"""Stopped on a signal with a whole checkpoint: start me again (EX_TEMPFAIL of sysexits.h)."""
STOP_MARKER = "requeue"
"""Left together with ``EXIT_REQUEUE``: a launcher may swallow the status."""
ENDED_MARKER = "data_ended"
"""Holds the step after which the data ended, before ``train_iters``."""
