"""From a task's line to a judge of sound: one of the package by its name, or ``FILE.py:NAME`` of the user's.

A judge is called as ``judge(waves, sample_rate=16000, **judge_settings)`` with float32 waves and returns a text for each: what
it hears. The task's metric compares that with what the record expects.

    words    Whisper tiny.en; with ``vocabulary`` (a list of words) and ``at_most`` (3) closed over them
    voice    the name of one of the voices in ``recordings``: {NAME: [FILE, ..]}, natural sounds of a second or more, relative to
             the task file
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omni.rewards.load import user_module
from megatron_omni.scoring import nearest
from megatron_omni.scoring.voice import at_rate

Wave = NDArray[np.float32]
Judge = Callable[[Sequence[Wave]], Sequence[str]]
SAMPLE_RATE = 16_000
SETTINGS = {"words": ("vocabulary", "at_most"), "voice": ("recordings",)}


@dataclass(frozen=True)
class JudgeOf:
    """A judge whose weights are not loaded yet."""

    name: str
    open: Callable[[], Judge]
    files: list[Path]
    """What its verdicts depend on beside its settings."""


def open_judge(name: str, settings: Mapping[str, Any], folder: Path) -> JudgeOf:
    """ValueError for an unknown judge, a setting that it does not have, and a file that is not there."""
    if not name:
        raise ValueError("judge is missing, which hears what is spoken; give words, voice, or FILE.py:NAME of yours")
    if name not in SETTINGS:
        return _of_file(name, settings, folder)
    for key in settings:
        if key not in SETTINGS[name]:
            raise ValueError(f"judge_settings: {name} has no setting {key!r}; {nearest(key, list(SETTINGS[name]))}")
    if name == "words":
        vocabulary, at_most = settings.get("vocabulary"), settings.get("at_most", 3)
        _check_words(vocabulary, at_most)
        return JudgeOf(name, partial(_words, vocabulary, at_most), [])
    files = _recordings(settings.get("recordings"), folder)
    return JudgeOf(name, partial(_voice, files), [file for some in files.values() for file in some])


def _check_words(vocabulary: object, at_most: object) -> None:
    known = vocabulary is None or (
        isinstance(vocabulary, list)
        and vocabulary
        and all(isinstance(w, str) and w and w == w.strip() for w in vocabulary)
    )
    if not known:
        raise ValueError(f"judge_settings.vocabulary = {vocabulary!r}: give a list of words, or leave it out")
    if type(at_most) is not int or at_most < 1:
        raise ValueError(f"judge_settings.at_most = {at_most!r}: give a whole number of words, at least 1")


def _recordings(given: object, folder: Path) -> dict[str, list[Path]]:
    if not isinstance(given, dict) or len(given) < 2 or not all(isinstance(v, list) and v for v in given.values()):
        raise ValueError("judge_settings.recordings: give the recordings of two voices or more, {NAME: [FILE, ..]}")
    files = {str(name): [folder / str(file) for file in some] for name, some in given.items()}
    for name, some in files.items():
        for file in some:
            if not file.is_file():
                raise ValueError(f"judge_settings.recordings.{name}: there is no file {file}")
    return files


def _words(vocabulary: list[str] | None, at_most: int) -> Judge:
    from megatron_omni.evaluation.judges.words import WordJudge

    judge = WordJudge(30)

    def hear(waves: Sequence[Wave]) -> list[str]:
        clips = [wave[: judge.seconds * SAMPLE_RATE] for wave in waves]
        if vocabulary is None:
            return judge.hear(clips)
        return [" ".join(said) for said in judge.choose(clips, vocabulary, at_most=at_most)]

    return hear


def _voice(files: Mapping[str, Sequence[Path]]) -> Judge:
    import soundfile

    from megatron_omni.evaluation.judges.voices import VoiceJudge

    recordings: dict[str, list[Wave]] = {}
    for name, some in files.items():
        for file in some:
            wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
            recordings.setdefault(name, []).append(at_rate(wave.mean(1), rate, SAMPLE_RATE))
    judge = VoiceJudge(recordings)
    return lambda waves: [judge.name(wave) or "" for wave in waves]


def _of_file(name: str, settings: Mapping[str, Any], folder: Path) -> JudgeOf:
    if not is_of_file(name):
        raise ValueError(f"judge = {name!r} is no judge; {nearest(name, list(SETTINGS))}, or FILE.py:NAME of yours")
    path, function = function_of(name, folder)
    return JudgeOf(name, lambda: partial(function, sample_rate=SAMPLE_RATE, **settings), [path])


def is_of_file(name: str) -> bool:
    """Whether ``name`` is FILE.py:NAME."""
    file, colon, _ = name.rpartition(":")
    return bool(colon) and file.endswith(".py")


def function_of(name: str, folder: Path) -> tuple[Path, Callable[..., Any]]:
    """File and function of a user's judge FILE.py:NAME; ValueError where one is not there."""
    file, _, attribute = name.rpartition(":")
    path = folder / Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"judge = {name!r}: there is no file {path}")
    function = getattr(user_module(path, "judge"), attribute, None)
    if not callable(function):
        raise ValueError(f"judge = {name!r}: {path} has no function {attribute!r}")
    return path, function
