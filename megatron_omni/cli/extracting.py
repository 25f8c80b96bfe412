"""``megatron-omni prepare --codes``: recordings through a codec, into files of codes and the rows that name them.

The data layer knows no model and the models know no data; here they meet.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.run import Recipe
from megatron_omni.config.shards import shard_paths
from megatron_omni.data.codes import codec_fingerprint
from megatron_omni.data.extract import Extracted, Rules, extract
from megatron_omni.data.recording_rows import Recordings, Voice
from megatron_omni.data.recordings import recordings_of
from megatron_omni.data.speech_segments import groups
from megatron_omni.data.spoken_text import normaliser
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.models.generators.codec import load_codec
from megatron_omni.platform.device import select_device

_LINE_SECONDS = 10.0


class CodecEncoder:
    """A codec of a folder as what :func:`extract` takes, on this process's device."""

    def __init__(self, folder: Path) -> None:
        self._device = select_device()
        self._codec = load_codec(folder).to(self._device)
        self.sample_rate, self.hop_size = self._codec.sample_rate, self._codec.hop_size
        self.num_codes, self.codes_per_second = self._codec.config.num_codes, self._codec.codes_per_second
        self.fingerprint = self._codec.fingerprint

    def encode(self, waves: NDArray[np.float32]) -> NDArray[np.int64]:
        """[B, n] codes of [B, n hop] sounds."""
        codes: NDArray[np.int64] = self._codec.encode(torch.from_numpy(waves).to(self._device)).cpu().numpy()
        return codes


def extracted(words: argparse.Namespace, recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """Make the codes of what the words of the command name; paths of the rows that were written, a pattern for each input.

    ValueError where nothing is named, no recording can be used, or the recipe is for another codec.
    """
    if not words.data and words.folder is None:
        raise ValueError("--codes: name what to make codes of: rows or tars with --data, or a folder with --folder")
    encoder = CodecEncoder(Path(words.codes))
    _check_codec(recipe, encoder, words.codes)
    voice = Voice(words.speaker, words.style, words.language)
    paths = [Path(file) for path in words.data for file in shard_paths(path)]
    paths += [words.folder] if words.folder is not None else []
    rules = _rules(words, recipe, tokenizer)
    made = []
    for path in paths:
        recordings = recordings_of(path, voice, root=words.root)
        progress = Progress(f"codes of {path.name}", len(recordings), "recordings")
        found = extract(recordings, encoder, rules, threads=words.workers, again=words.again, advance=progress.add)
        _tell(path, found)
        made.append(_pattern(recordings, found))
    return made


def _rules(words: argparse.Namespace, recipe: Recipe, tokenizer: Tokenizer) -> Rules:
    speech = recipe.model.speech or SpeechConfig()
    return Rules(
        longest_seconds=words.longest or speech.max_codes / speech.codes_per_second,
        normalise=normaliser() if words.normalise else None,
        group=lambda texts: groups(texts, tokenizer, speech),
    )


def _check_codec(recipe: Recipe, encoder: CodecEncoder, folder: str) -> None:
    speech = recipe.model.speech
    if speech is None or speech.codec is None:
        return
    wanted = codec_fingerprint(speech.codec)
    if wanted != encoder.fingerprint:
        raise ValueError(
            f"--codes {folder}: fingerprint {encoder.fingerprint[:12]}, and model.speech.codec = {speech.codec!r} of the "
            f"recipe has {wanted[:12]}; name the same codec in both"
        )


def _pattern(recordings: Recordings, found: Extracted) -> str:
    if not found.paths:
        first = f"; the first: {found.messages[0]}" if found.messages else ""
        raise ValueError(f"none of the {len(recordings)} recordings of {recordings.name!r} can be used{first}")
    return str(recordings.folder / f"{recordings.name}.spoken-*.jsonl")


def _tell(path: Path, found: Extracted) -> None:
    print(f"codes of {path}: {found.num_rows} rows, {found.seconds / 3600:.2f} h of sound")
    for reason, number in found.skipped.most_common():
        print(f"  left out ({reason}): {number}")
    for message in found.messages:
        print(f"  {message}")


class Progress:
    """A line on standard error every some seconds."""

    def __init__(self, name: str, total: int, items: str) -> None:
        self.name, self.total, self.items, self.done = name, total, items, 0
        self._started = self._shown = time.monotonic()

    def add(self, number: int) -> None:
        """``number`` more are done."""
        self.done += number
        now = time.monotonic()
        if now - self._shown >= _LINE_SECONDS:
            self._shown = now
            rate = self.done / (now - self._started)
            left = (self.total - self.done) / rate
            print(f"{self.name}: {self.done}/{self.total} {self.items}, {left:.0f} s left", file=sys.stderr)
