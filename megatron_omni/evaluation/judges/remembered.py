"""What judges said of sounds, kept in a file by the hash of the sound, the judge and the question.

Natural recordings and what a codec makes of them are the same in every run, and judging a clip costs more than reading a
line. The file has JSON lines {"key", "said"}, each written at once, so several processes may share it; a line that was cut off
by a kill is passed over.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omni.foreign import parse_json

Wave = NDArray[np.float32]


class Remembered:
    """Verdicts on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._said: dict[str, Any] = dict(_lines(path)) if path.is_file() else {}

    def ask(self, judge: Callable[[Sequence[Wave]], Sequence[Any]], waves: Sequence[Wave], question: str) -> list[Any]:
        """``judge``'s verdicts on ``waves``; it is asked of those that are not known. ``question`` names judge and question
        with their versions; verdicts are values of JSON."""
        keys = [key_of(wave, question) for wave in waves]
        first = {key: number for number, key in reversed(list(enumerate(keys))) if key not in self._said}
        new = sorted(first.values())
        if new:
            self._keep({keys[n]: said for n, said in zip(new, judge([waves[n] for n in new]), strict=True)})
        return [self._said[key] for key in keys]

    def _keep(self, said: dict[str, Any]) -> None:
        # as it will be read again: a tuple is a list from the start
        lines = {key: json.dumps({"key": key, "said": value}) for key, value in said.items()}
        self._said |= {key: parse_json(line, "verdict")["said"] for key, line in lines.items()}
        with self.path.open("ab", buffering=0) as file:
            file.write("".join(line + "\n" for line in lines.values()).encode())


def key_of(wave: Wave, question: str) -> str:
    """SHA-256 of the samples and the question."""
    digest = hashlib.sha256(question.encode() + b"\0")
    digest.update(np.ascontiguousarray(wave, np.float32).tobytes())
    return digest.hexdigest()


def _lines(path: Path) -> list[tuple[str, Any]]:
    found = []
    for line in path.read_bytes().splitlines():
        try:
            values = parse_json(line, str(path))
            found.append((values["key"], values["said"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
