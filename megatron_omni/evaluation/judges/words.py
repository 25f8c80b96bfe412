"""Which words are said: Whisper tiny.en, free or over a closed vocabulary.

Free: greedy decoding as Whisper is used. Closed: the same decoding, but it may write nothing except words of a list (in small
letters or with a capital, commas and full stops between them), at most so many. It is told the list, not the answer, nor
in which order; a wrong word is a wrong word of the list. On single recorded words, which are rare in what Whisper was
trained on, free decoding reads half of them wrong that a listener hears right; closed decoding a tenth (docs/speech.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, WhisperFeatureExtractor

from megatron_omni.evaluation.judges.whisper import TOKENIZER, WEIGHTS, load_whisper

Wave = NDArray[np.float32]
SAMPLE_RATE = 16_000
START, END, NO_TIMES = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"
SEPARATORS = (",", ".")
SILENT = 1e-3
"""A wave whose loudest sample is below has no words; Whisper would make some up."""
AT_ONCE = 16


@dataclass
class _Node:
    """A place in the tree of words' tokens."""

    after: dict[int, "_Node"] = field(default_factory=dict)
    word: str | None = None
    """The word that ends here."""


@dataclass(frozen=True)
class _Written:
    """What a clip's closed decoding has written."""

    node: _Node
    words: tuple[str, ...] = ()
    separated: bool = False


class Vocabulary:
    """The words that closed decoding may write."""

    def __init__(self, words: Sequence[str], at_most: int, tokenizer: Tokenizer) -> None:
        self._root, self._at_most = _Node(), at_most
        self._end = _id(tokenizer, END)
        self._separators = [_id(tokenizer, mark) for mark in SEPARATORS]
        for word in words:
            for form in {word, word[:1].upper() + word[1:]}:
                node = self._root
                for token in tokenizer.encode(" " + form, add_special_tokens=False).ids:
                    node = node.after.setdefault(token, _Node())
                node.word = word

    @property
    def start(self) -> _Written:
        """Nothing is written."""
        return _Written(self._root)

    def allowed(self, written: _Written) -> list[int]:
        """Tokens that may come next."""
        node, done = written.node, self.read(written)
        tokens = list(node.after)
        if node is self._root or node.word is not None:
            if node.word is not None and len(done) < self._at_most:
                tokens += self._root.after
            if done:
                tokens.append(self._end)
                if not written.separated:
                    tokens += self._separators
        if node is self._root and len(done) >= self._at_most:
            tokens = [self._end]
        return tokens

    def step(self, written: _Written, token: int) -> _Written:
        """What is written with ``token`` behind it."""
        if token in self._separators:
            return _Written(self._root, self.read(written), separated=True)
        if token in written.node.after:
            return _Written(written.node.after[token], written.words)
        return _Written(self._root.after[token], self.read(written))

    @staticmethod
    def read(written: _Written) -> tuple[str, ...]:
        """The words so far, with the one that may end here."""
        return written.words if written.node.word is None else (*written.words, written.node.word)


class WordJudge:
    """Hears words in waves."""

    def __init__(self, seconds: int = 10) -> None:
        """``seconds``: the longest wave; what is longer is an error, what is shorter is filled with silence.

        10 take a quarter of the time of 30, which Whisper was trained with, and read words as well (docs/speech.md).
        """
        self._model, self.seconds = load_whisper(seconds), seconds
        self._tokenizer = Tokenizer.from_file(str(TOKENIZER.find()))
        self._features = WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)
        self._end = _id(self._tokenizer, END)

    @property
    def version(self) -> str:
        """Names the judge in files of scores."""
        return f"whisper-tiny.en/1 weights={WEIGHTS.sha256[:12]} seconds={self.seconds}"

    @cached_property
    def _suppressed(self) -> list[int]:
        """Ids that are no text: marks, times, and the blank that Whisper may not begin with."""
        return list(range(self._end + 1, self._model.config.vocab_size))

    def hear(self, waves: Sequence[Wave], *, at_most_tokens: int = 48) -> list[str]:
        """What Whisper writes of each."""
        texts = []
        for encoded, waves_there in self._encoded(waves):
            rows = self._decode_free(encoded, at_most_tokens)
            texts += [self._tokenizer.decode(row).strip() if there else "" for row, there in zip(rows, waves_there)]
        return texts

    def choose(self, waves: Sequence[Wave], words: Sequence[str], *, at_most: int = 3) -> list[tuple[str, ...]]:
        """The words of the list that are heard in each, in their order; none in silence."""
        if not words or at_most < 1 or not all(word.strip() == word and word for word in words):
            raise ValueError(
                f"a closed vocabulary of {len(words)} words, at most {at_most}; give words without spaces around"
            )
        vocabulary = Vocabulary(words, at_most, self._tokenizer)
        said: list[tuple[str, ...]] = []
        for encoded, waves_there in self._encoded(waves):
            found = self._decode_closed(encoded, vocabulary)
            said += [one if there else () for one, there in zip(found, waves_there)]
        return said

    def _encoded(self, waves: Sequence[Wave]) -> Iterator[tuple[Tensor, list[bool]]]:
        """(encoder's states [B, positions, width], which of the waves are not silent), batch by batch."""
        for first in range(0, len(waves), AT_ONCE):
            batch = waves[first : first + AT_ONCE]
            for wave in batch:
                if len(wave) > self.seconds * SAMPLE_RATE:
                    raise ValueError(
                        f"a wave of {len(wave) / SAMPLE_RATE:.1f} s; the judge hears {self.seconds} s at a time, give shorter ones"
                    )
                if not np.isfinite(wave).all():
                    raise ValueError("a wave has samples that are no numbers")
            features = self._features(
                [np.asarray(wave, np.float32) for wave in batch], sampling_rate=SAMPLE_RATE, return_tensors="pt"
            ).input_features
            with torch.no_grad():
                encoded = self._model.model.encoder(features).last_hidden_state
            yield encoded, [len(wave) > 0 and float(np.abs(wave).max()) >= SILENT for wave in batch]

    def _decode_free(self, encoded: Tensor, at_most: int) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in encoded]
        ended = [False] * len(rows)
        steps = _Steps(self._model, encoded, self._begin)
        blank = _id(self._tokenizer, "Ġ")
        logits = steps.first()
        logits[:, [blank, self._end]] = -torch.inf
        for _ in range(at_most):
            logits[:, self._suppressed] = -torch.inf
            chosen = logits.argmax(-1).tolist()
            for row, token in enumerate(chosen):
                ended[row] |= token == self._end
                if not ended[row]:
                    rows[row].append(token)
            if all(ended):
                break
            logits = steps.next(chosen)
        return rows

    def _decode_closed(self, encoded: Tensor, vocabulary: Vocabulary) -> list[tuple[str, ...]]:
        written = [vocabulary.start for _ in encoded]
        ended = [False] * len(written)
        steps = _Steps(self._model, encoded, self._begin)
        logits = steps.first()
        while True:
            chosen = [self._end] * len(written)
            for row, one in enumerate(written):
                if ended[row]:
                    continue
                allowed = vocabulary.allowed(one)
                chosen[row] = allowed[int(logits[row, allowed].argmax())]
                ended[row] = chosen[row] == self._end
                if not ended[row]:
                    written[row] = vocabulary.step(one, chosen[row])
            if all(ended):
                return [vocabulary.read(one) for one in written]
            logits = steps.next(chosen)

    @cached_property
    def _begin(self) -> list[int]:
        return [_id(self._tokenizer, START), _id(self._tokenizer, NO_TIMES)]


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token  # the file's hash has been checked
    return found


class _Steps:
    """The decoder over a batch, token by token."""

    def __init__(self, model: Any, encoded: Tensor, begin: list[int]) -> None:
        self._model, self._encoded, self._begin = model, encoded, begin
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def first(self) -> Tensor:
        """Logits [B, vocabulary] of the first token."""
        return self._forward(torch.tensor([self._begin] * len(self._encoded)))

    def next(self, tokens: list[int]) -> Tensor:
        """Logits behind ``tokens``, one a clip."""
        return self._forward(torch.tensor(tokens).unsqueeze(1))

    def _forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            # by position: the argument's name has changed between versions of transformers
            out = self._model.model.decoder(ids, None, self._encoded, self._cache, use_cache=True)
            return self._model.proj_out(out.last_hidden_state[:, -1])
