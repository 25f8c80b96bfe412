"""A torch profiler trace of some steps: ``log.profile_steps: [first, last]``.

Rank 0 writes ``profile/steps_<first>-<last>.json.gz`` into the run directory (open it in Perfetto or chrome://tracing).
The traced steps are slower; leave the field empty in a run that is timed.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import profiler

from megatron_omni.checkpoint.run_dir import PROFILE


class StepProfiler:
    """Traces the steps ``first`` to ``last``, both included; none when ``steps`` is empty."""

    def __init__(self, run_dir: Path, steps: Sequence[int]) -> None:
        self._first, self._last = steps if steps else (0, -1)
        self._directory = run_dir / PROFILE
        self._profile: profiler.profile | None = None

    def before(self, step: int) -> None:
        """Begin when ``step`` is the first."""
        if step == self._first:
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
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"steps_{self._first}-{self._last}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        return path
