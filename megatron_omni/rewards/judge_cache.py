"""What a judge has said, in ``run_dir/judge.jsonl``: a run that resumes asks nothing twice.

    {"key": sha256 of endpoint, request and template, "score": 0.5}

One file a data rank (``judge_rank_1.jsonl``), so that two machines never write into one; all are read. A line is written
whole or is no line: one that a kill has cut is passed over.
"""

import hashlib
import json
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron_omni.foreign import ForeignError, decode_text, parse_json, read_bytes

logger = logging.getLogger(__name__)
CACHES = "judge*.jsonl"
"""The files of a run directory."""
_MOST_BYTES = 1 << 32


class JudgeCache:
    """Scores by key."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / ("judge.jsonl" if rank == 0 else f"judge_rank_{rank}.jsonl")
        self._scores: dict[str, float] = {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        for path in sorted(run_dir.glob(CACHES)):
            self._read(path)

    def _read(self, path: Path) -> None:
        lines = read_bytes(path, most_bytes=_MOST_BYTES).split(b"\n")
        cut = 0
        for line in filter(None, lines):
            try:
                row = parse_json(decode_text(line, str(path)), str(path))
                key, score = row["key"], row["score"]
                if not (isinstance(key, str) and isinstance(score, int | float) and math.isfinite(score)):
                    raise TypeError("not a score")
                self._scores[key] = float(score)
            except (ForeignError, LookupError, TypeError):
                cut += 1
        if cut:
            logger.warning("%s: %d lines are no scores and are passed over", path, cut)

    @staticmethod
    def key(endpoint: str, body: Mapping[str, Any]) -> str:
        """Of everything that decides the answer."""
        asked = json.dumps([endpoint, body], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def get(self, key: str) -> float | None:
        """The score, or None where it has not been asked."""
        return self._scores.get(key)

    def put(self, key: str, score: float) -> None:
        """Kept, and on disk when this returns."""
        line = json.dumps({"key": key, "score": score}).encode() + b"\n"
        with self._lock:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                ended = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
                self._file = self._path.open("ab", buffering=0)
                line = line if ended else b"\n" + line
            self._file.write(line)
            self._scores[key] = score

    def close(self) -> None:
        """End writing."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
