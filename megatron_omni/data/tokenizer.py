"""Text <-> token ids, with one rule for special tokens: text can never produce one, only code can, by name.

A user who types ``<|im_end|>`` or ``<|image_pad|>`` gets ordinary text tokens; the chat template (data/template.py)
places the special ids itself. Two backends behind one class:

* ``SentencePieceTokenizer``: a ``.model`` file. Specials are its control symbols, which are never matched in text.
* ``HuggingFaceTokenizer``: a directory with ``tokenizer.json`` (Qwen2.5). Special tokens that the file lacks are
  appended in the order of ``ALL_SPECIALS``; for Qwen2.5, whose last id is 151664, that gives Uni-MoE-2.0's ids
  151665..151706, and any other outcome on a Qwen vocabulary is refused. Added tokens that the file itself marks as
  not special (``<tool_call>``, ``<|fim_prefix|>``) remain text, as in Qwen.

A ``tokenizer.json`` may carry settings that change what text becomes: truncation and padding (transformers writes them
into the file) and BPE dropout. They are switched off, and ``load_tokenizer`` tries that nothing cuts, fills or draws.

``train_sentencepiece`` makes a small tokenizer from a corpus, the same bytes for the same input.
"""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import sentencepiece
import tokenizers
import tokenizers.decoders

from megatron_omni.config.pictures import IMAGE_TOKENS, TASK_TOKENS

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
AUDIO_START = "<|audio_start|>"
AUDIO_END = "<|audio_end|>"
AUDIO_PAD = "<|audio_pad|>"

CORE_SPECIALS = (
    ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, AUDIO_START, AUDIO_END, AUDIO_PAD,
)  # fmt: skip
"""What every tokenizer must have: chat turns and media placeholders."""
SPEECH_START, SPEECH_END, SPEECH_PROMPT = "<|speech_start|>", "<|speech_end|>", "<|speech_prompt|>"
SPEECH_SPECIALS = (SPEECH_START, SPEECH_END, SPEECH_PROMPT, "<|speech_split|>")
"""Of a spoken answer (data/template.py); the last is used by nothing, the authors' code included."""
IMAGE_GENERATION_SPECIALS = IMAGE_TOKENS + TASK_TOKENS
"""Of a picture that is drawn (data/drawing.py)."""
ALL_SPECIALS = CORE_SPECIALS + SPEECH_SPECIALS + IMAGE_GENERATION_SPECIALS
QWEN_SPECIALS = frozenset({ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD})
NEW_SPECIALS = tuple(name for name in ALL_SPECIALS if name not in QWEN_SPECIALS)
"""What Uni-MoE-2.0-Omni adds to Qwen2.5's special tokens (151665..151706 there)."""

_PROBE, _TIMES = "Hello world, what is it? ", 256
_SENTENCEPIECE_SPACE = "\u2581"
_QWEN_IM_START_ID = 151644
_QWEN_FIRST_NEW_ID = 151665
"""Qwen2.5 ends at 151664; Uni-MoE-2.0 puts audio_start here and the rest of its new tokens behind it."""


class Tokenizer(ABC):
    """One vocabulary. ``specials`` maps the name of every special token to its id."""

    def __init__(self, specials: dict[str, int], vocab_size: int, path: Path) -> None:
        missing = [name for name in CORE_SPECIALS if name not in specials]
        if missing:
            raise ValueError(
                f"data.tokenizer = {str(path)!r} lacks the special tokens {', '.join(missing)}; make it with "
                "megatron_omni.data.tokenizer.train_sentencepiece, which adds them as control symbols"
            )
        self.path = path
        self.specials = specials
        self.vocab_size = vocab_size
        self._special_names = {token_id: name for name, token_id in specials.items()}
        self._texts: dict[int, str] = {}
        self._byte_strings: dict[int, bytes] = {}

    def special(self, name: str) -> int:
        """Id of a special token; ValueError when this vocabulary has none of that name."""
        try:
            return self.specials[name]
        except KeyError:
            raise ValueError(f"data.tokenizer = {str(self.path)!r} has no special token {name!r}") from None

    def is_special(self, token_id: int) -> bool:
        """Whether the id stands for a special token."""
        return token_id in self._special_names

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.specials[IM_END], self.specials[ENDOFTEXT]

    @property
    def pad_id(self) -> int:
        """Id written into padding; padding is recognised by segment_ids, never by this id."""
        return self.specials[ENDOFTEXT]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; names of special tokens in it are ordinary characters."""
        if not isinstance(text, str):
            raise ValueError(f"encode() takes text, got {type(text).__name__}")
        return self._encode(text) if text else []

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; special tokens are dropped or written by name, an id past the vocabulary becomes U+FFFD."""
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                parts.append(self._decode(run))
                run.clear()

        for token_id in map(int, ids):
            if token_id in self._special_names:
                if not skip_special:
                    flush()
                    parts.append(self._special_names[token_id])
            elif 0 <= token_id < self.vocab_size:
                run.append(token_id)
            else:
                flush()
                parts.append("\ufffd")
        flush()
        return "".join(parts)

    def text_of(self, token_id: int) -> str:
        """Text of one token by itself; remembered."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id])
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the UTF-8 of a text: perhaps a part of a character, nothing for a special token."""
        found = self._byte_strings.get(token_id)
        if found is None:
            found = self._byte_strings[token_id] = b"" if self.is_special(token_id) else self._bytes(token_id)
        return found

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _bytes(self, token_id: int) -> bytes: ...


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model whose control symbols are the special tokens."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"data.tokenizer = {str(path)!r} is no SentencePiece model: {error}") from error
        size = self._model.get_piece_size()
        specials = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        super().__init__(specials, size, path)

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, out_type=int))

    def _decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))

    def _bytes(self, token_id: int) -> bytes:
        piece = str(self._model.id_to_piece(token_id))
        if self._model.is_byte(token_id):  # <0xE4>
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token_id):
            return self._decode([token_id]).encode()
        return piece.replace(_SENTENCEPIECE_SPACE, " ").encode()


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` read by the tokenizers library."""

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise ValueError(f"data.tokenizer = {str(file)!r} is no tokenizer.json: {error}") from error
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        lacking = [name for name in ALL_SPECIALS if name not in vocabulary]
        self._model.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in lacking]
        )
        self._model.no_truncation()
        self._model.no_padding()
        if getattr(self._model.model, "dropout", None) is not None:
            self._model.model.dropout = None
        # Without this the library matches special tokens inside ordinary text.
        self._model.encode_special_tokens = True
        specials = {token.content: i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        for name in ALL_SPECIALS:  # listed in the file, but as an ordinary token: text could produce it
            if name not in specials:
                raise ValueError(f'{file}: {name!r} must be an added token with "special": true')
        if specials[IM_START] == _QWEN_IM_START_ID and specials[AUDIO_START] != _QWEN_FIRST_NEW_ID:
            raise ValueError(
                f"{file}: {AUDIO_START} would get id {specials[AUDIO_START]} instead of the released "
                f"weights' {_QWEN_FIRST_NEW_ID}; id {_QWEN_FIRST_NEW_ID} is taken by "
                f"{self._model.id_to_token(_QWEN_FIRST_NEW_ID)!r}. Use the Qwen2.5 tokenizer"
            )
        super().__init__(specials, max(self._model.get_vocab(with_added_tokens=True).values()) + 1, path)

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids, skip_special_tokens=False))

    def _bytes(self, token_id: int) -> bytes:
        token = self._model.id_to_token(token_id)
        written_in_bytes = isinstance(self._model.decoder, tokenizers.decoders.ByteLevel)
        if token is None or token_id in self._model.get_added_tokens_decoder() or not written_in_bytes:
            return self._decode([token_id]).encode()
        return bytes(_byte_of(character) for character in token)


@cache
def _byte_of(character: str) -> int:
    """The byte that a character of GPT-2's alphabet stands for: itself if it can be seen, else one of 256, 257, ..."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    code = ord(character)
    return code if code < 256 else sorted(set(range(256)) - set(visible))[code - 256]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at ``path``: a SentencePiece ``.model`` file, or a directory with ``tokenizer.json``."""
    path = Path(path)
    if not str(path) or str(path) == ".":
        raise ValueError("data.tokenizer is empty; give a SentencePiece .model file or a directory with tokenizer.json")
    if path.is_file() and path.suffix == ".model":
        return _checked(SentencePieceTokenizer(path))
    if (path / "tokenizer.json").is_file() or (path.is_file() and path.name == "tokenizer.json"):
        return _checked(HuggingFaceTokenizer(path))
    problem = "holds no tokenizer.json" if path.is_dir() else "is no .model file" if path.exists() else "does not exist"
    raise ValueError(
        f"data.tokenizer = {str(path)!r} {problem}; give a SentencePiece .model file or a directory with tokenizer.json"
    )


def _checked(tokenizer: Tokenizer) -> Tokenizer:
    """The same; ValueError for one that cuts text, fills it up, puts special tokens into it or draws.

    So twice the text gives twice the ids. What a tokenizer makes of letters is its own affair: one may drop capitals or
    spaces and write one sign for all that it does not know.
    """
    one, half, whole = (tokenizer.encode(_PROBE * times) for times in (1, _TIMES, 2 * _TIMES))
    cut, filled = len(whole) < 1.98 * len(half), len(one) > 2 * len(half) / _TIMES + 4
    if cut or filled or any(map(tokenizer.is_special, (*one, *whole))) or half != tokenizer.encode(_PROBE * _TIMES):
        raise ValueError(
            f"data.tokenizer = {str(tokenizer.path)!r} cuts, fills up or varies text ({_PROBE!r} written 1, {_TIMES} and "
            f"{2 * _TIMES} times gives {len(one)}, {len(half)} and {len(whole)} ids); take such settings out of the file"
        )
    return tokenizer


def train_sentencepiece(
    corpus: Iterable[str],
    model_path: str | Path,
    *,
    vocab_size: int,
    model_type: Literal["unigram", "bpe"] = "unigram",
    specials: Sequence[str] = CORE_SPECIALS,
    whole: Sequence[str] = (),
) -> Path:
    """Train a small tokenizer on the lines of ``corpus``; the same input gives the same bytes in ``model_path``.

    ``whole`` are strings of ordinary text that are one piece each wherever they stand.

    Text survives encode and decode unchanged: no normalisation, no added space, and bytes for characters that were not
    seen (so ``vocab_size`` holds 256 bytes, one unknown token and the specials before the first learned piece). The one
    exception is U+2581, SentencePiece's own sign for a space.
    """
    lines = [line for text in corpus for line in text.splitlines() if line]
    if not lines:
        raise ValueError("train_sentencepiece: the corpus has no text")
    smallest = 256 + 1 + len(specials) + len(whole)
    if vocab_size <= smallest:
        raise ValueError(
            f"train_sentencepiece: vocab_size = {vocab_size} must exceed {smallest} (bytes, specials and whole pieces)"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            control_symbols=list(specials),
            user_defined_symbols=list(whole),
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            shuffle_input_sentence=False,
            max_sentence_length=1 << 20,
            num_threads=1,  # more threads sum in another order: not the same bytes
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"train_sentencepiece: vocab_size = {vocab_size} does not fit this corpus: {error}") from error
    path = Path(model_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)
    return path
