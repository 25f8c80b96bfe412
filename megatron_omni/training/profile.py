"""A torch profiler trace of some steps: ``log.profile_steps: [first, last]`` on the ranks ``log.profile_ranks``.

Each of them writes ``profile/steps_<first>-<last>_rank<rank>.json.gz`` into the run directory (open it in Perfetto or
chrome://tracing). The parts of a step stand in it by their names (data, forward, backward, ...; platform/ranges.py).
With ``log.memory_snapshot`` it writes ``..._rank<rank>.memory.pickle`` beside it: every allocation of the GPU's memory in
these steps with its stack, for https://docs.pytorch.org/memory_viz. The traced steps are slower; leave the field empty
in a run that is timed.
"""

from pathlib import Path

from torch import profiler

from megatron_omni.checkpoint.run_dir import PROFILE
from megatron_omni.config.run import LogConfig
from megatron_omni.platform import snapshot


def check_snapshot(log: LogConfig) -> None:
    """ValueError for a memory snapshot on a machine that cannot take one."""
    if log.memory_snapshot and not snapshot.possible():
        raise ValueError(
            "log.memory_snapshot=true: only a GPU's allocations can be recorded, and this run has none; set it to false"
        )


class StepProfiler:
    """Traces the steps ``first`` to ``last``, both included, where ``rank`` is one of those that are asked for."""

    def __init__(self, run_dir: Path, log: LogConfig, *, rank: int) -> None:
        self._first, self._last = log.profile_steps if log.profile_steps and rank in log.profile_ranks else (0, -1)
        self._name = run_dir / PROFILE / f"steps_{self._first}-{self._last}_rank{rank}"
        self._memory = log.memory_snapshot
        self._profile: profiler.profile | None = None

    def before(self, step: int) -> None:
        """Begin when ``step`` is the first."""
        if step == self._first:
            if self._memory:
                snapshot.start()
            self._profile = profiler.profile(activities=profiler.supported_activities(), record_shapes=True)
            self._profile.start()

    def after(self, step: int) -> Path | None:
        """End when ``step`` is the last; the trace."""
        return self.stop() if self._profile is not None and step >= self._last else None

    def stop(self) -> Path | None:
        """Write what was traced so far, if anything; the trace."""
        if self._profile is None:
            return None
        self._profile.stop()
        self._name.parent.mkdir(parents=True, exist_ok=True)
        if self._memory:
            snapshot.write(self._name.with_name(f"{self._name.name}.memory.pickle"))
        path = self._name.with_name(f"{self._name.name}.json.gz")
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        return path
