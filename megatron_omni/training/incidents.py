"""Steps that somebody should look at, with the samples they were made of: ``incidents.jsonl`` in the run directory.

Two kinds: *non-finite gradients* (the step changed nothing) and *loss spike* (the loss of a step is far above that of
the steps before it: above the median of the last ``WINDOW`` by more than ``DEVIATIONS`` times their spread, the median
absolute deviation, and by a tenth of the median). Where the mixture changes, a source joins or a weight moves, the loss
moves with it: only steps of one phase of the mixture are compared. A streak of such steps is told once. A line names
the step and, for every sample of it, its number in the run's order and the file and line that were drawn there (a record
that cannot be used has a stand-in: the loader's warnings name it).

Which samples a step took follows from the data cursor before and after it, the same on every rank and layout, so rank
0 can tell alone. A step that is run again after a resume may be reported again.
"""

import json
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_omni.checkpoint.run_dir import INCIDENTS
from megatron_omni.data.loader import Loader

FILE = INCIDENTS
WINDOW = 64
FEWEST = 16
"""Losses needed before one can be unusual."""
DEVIATIONS = 8.0
FLOOR = 0.1
"""Share of the median that an unusual loss exceeds it by at least."""
KEPT_STEPS = 4096
"""Steps whose samples are remembered: more than any log interval."""


def sample_ids(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[int]:
    """Samples of the steps between two states of a loader: those drawn or waiting before, less those that still wait."""
    start, end = (state["consumed_samples"] + len(state["waiting"]) for state in (before, after))
    return sorted({*before["waiting"], *range(start, end)} - {*after["waiting"]})


class SpikeDetector:
    """Knows the recent losses and says which is unusual."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._phase = 0
        self._streak = 0
        """Unusual losses in a row."""

    def add(self, loss: float, *, phase: int = 0) -> float | None:
        """The usual loss when ``loss`` is far above it and the one before was not, else None. ``phase``: of the mixture.

        An unusual loss does not become usual, unless ``WINDOW`` of them come in a row.
        """
        if phase != self._phase or self._streak >= WINDOW:
            self._recent.clear()
            self._phase, self._streak = phase, 0
        if len(self._recent) >= FEWEST:
            usual = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(value - usual) for value in self._recent)
            if loss > usual + max(DEVIATIONS * spread, FLOOR * abs(usual)):
                self._streak += 1
                return usual if self._streak == 1 else None
        self._streak = 0
        self._recent.append(loss)
        return None


class Incidents:
    """Rank 0's record of unusual steps."""

    def __init__(self, run_dir: Path, loader: Loader[Any]) -> None:
        self.path = run_dir / FILE
        self._loader = loader
        self._cursor = _cursor(loader)
        self._samples: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def note_step(self, step: int) -> None:
        """Remember which samples ``step`` took; call it once the loader has moved past them."""
        before, self._cursor = self._cursor, _cursor(self._loader)
        self._samples[step] = before, self._cursor
        self._samples.pop(step - KEPT_STEPS, None)

    def phase_of(self, step: int) -> int:
        """Phase of the mixture that the last sample of ``step`` was drawn in."""
        _, after = self._samples[step]
        return self._loader.mixture.phase_at(after["consumed_samples"] + len(after["waiting"]) - 1)

    def report(self, kind: str, step: int, facts: Mapping[str, float]) -> None:
        """Append a line about ``step``."""
        mixture, sources = self._loader.mixture, self._loader.sources
        samples = []
        for number in sample_ids(*self._samples[step]):
            draw = mixture.sample_at(number)
            samples.append({"id": number, "record": sources[draw.source].where(draw.row)})
        values = {
            name: value if value == value and abs(value) < float("inf") else str(value) for name, value in facts.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values, "samples": samples}) + "\n")


def _cursor(loader: Loader[Any]) -> dict[str, Any]:
    state = loader.state_dict()
    return {name: state[name] for name in ("consumed_samples", "waiting")}
