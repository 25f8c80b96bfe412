"""A spoken answer: what is said, in whose voice, and where the sound or its codes lie.

    {"role": "assistant", "content": "hello there", "speech": {"speaker": "Jenny"}}
    {"role": "assistant", "content": "80 GB", "speech": {"style": "A low-pitched old man speaks slowly.",
                                                         "text": "eighty gigabytes", "file": "x.flac"}}

    speaker | style   exactly one: a voice by name, or a description of one
    language          of the text, by default Chinese where it holds a Chinese character, else English; unused with a style
    text              what is said where the content is written otherwise; by default the content, without a thought
    file              the recording
    codes             ``NAME.codes.safetensors#17`` (data/codes.py) or a list of codes
    start, stop       the piece of the recording that is this answer, in codes; those before it are its prefix

A language model learns the turn ``<|speech_start|> prompt <|speech_prompt|> spoken <|speech_end|>`` (template.py) and needs
neither sound nor codes. A speech generator learns the codes. The prompt is the released wording (``PROMPT``) or the style.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_omni.config.thinking import THINK, THINK_END
from megatron_omni.data.errors import URL, RecordError, encodable

PROMPT = "Language: {language}; Speaker: {speaker};"
"""That names a voice, as the released speech generator was trained with it."""
KEYS = ("speaker", "style", "language", "text", "file", "codes", "start", "stop")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_IN_FILE = re.compile(r"(.+\.safetensors)#(\d{1,12})", re.DOTALL)
_NAME = re.compile(r"[^;\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class CodesAt:
    """Codes in a file: its path, and the number of the recording in it."""

    file: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Speech:
    """How an answer is spoken."""

    spoken: str
    """What is said."""
    prompt: str
    """What asks the speech generator for the voice."""
    speaker: str | None = None
    """Name of the voice; None: the prompt is a style."""
    language: str | None = None
    file: str | None = None
    """The recording."""
    codes: tuple[int, ...] | CodesAt | None = None
    """Of the whole recording."""
    start: int = 0
    """First code of the answer in the recording."""
    stop: int | None = None
    """The one behind its last; None: to the end."""

    def row(self, path: Callable[[str], str]) -> dict[str, Any]:
        """As a record has it, its files named by ``path``."""
        voice: dict[str, Any] = (
            {"style": self.prompt} if self.speaker is None else {"speaker": self.speaker, "language": self.language}
        )
        codes = self.codes
        found: dict[str, Any] = {
            **voice,
            "text": self.spoken,
            "file": None if self.file is None else path(self.file),
            "codes": f"{path(codes.file)}#{codes.number}" if isinstance(codes, CodesAt) else codes and list(codes),
            "start": self.start or None,
            "stop": self.stop,
        }
        return {name: value for name, value in found.items() if value is not None}


def voice_prompt(*, speaker: str, language: str) -> str:
    """The prompt that asks for a voice by name."""
    return PROMPT.format(language=language, speaker=speaker)


def language_of(text: str) -> str:
    """The language that a prompt names for a text: by its script."""
    return "Chinese" if _CHINESE.search(text) else "English"


def split_thought(content: str) -> tuple[str, str]:
    """An answer's thought with what separates it from the rest, empty where it has none, and the rest."""
    if not content.startswith(THINK) or THINK_END not in content:
        return "", content
    end = content.index(THINK_END) + len(THINK_END)
    said = content[end:].lstrip()
    return content[: len(content) - len(said)], said


def read_speech(given: object, *, content: str, field: str, where: str) -> Speech:
    """The speech of an answer with this content; RecordError names the key of ``field`` that is wrong."""
    return _Reader(field, where).read(given, content)


class _Reader:
    """Checks one ``speech`` of a row."""

    def __init__(self, field: str, where: str) -> None:
        self.field, self.where = field, where

    def read(self, given: object, content: str) -> Speech:
        if not isinstance(given, dict):
            raise self._wrong("", given, "is no object", 'write {"speaker": ...}')
        given = {key: value for key, value in given.items() if value is not None}
        if unknown := sorted(map(str, given.keys() - set(KEYS))):
            raise self._wrong(
                "", unknown, "has keys that mean nothing there", f"use {', '.join(KEYS)}", "unsupported_key"
            )
        text = self._text(given, "text") or split_thought(content)[1]
        if not text.strip():
            raise self._wrong("text", text, "says nothing", "write what is spoken", "empty_answer")
        speaker, language, prompt = self._voice(given, text)
        start, stop = self._range(given)
        codes = self._codes(given.get("codes"))
        if isinstance(codes, tuple) and (stop or start + 1) > len(codes):
            raise self._wrong("stop", stop, f"is past the {len(codes)} codes", "give a range inside them")
        return Speech(
            spoken=text, prompt=prompt, speaker=speaker, language=language, file=self._file(given), codes=codes,
            start=start, stop=stop,
        )  # fmt: skip

    def _voice(self, given: Mapping[str, Any], text: str) -> tuple[str | None, str | None, str]:
        """Speaker, language and prompt."""
        speaker, style = self._text(given, "speaker"), self._text(given, "style")
        if (speaker is None) == (style is None):
            both = {key: given[key] for key in ("speaker", "style") if key in given}
            raise self._wrong("speaker / style", both, "is not exactly one of the two", "name a voice or describe one")
        language = self._text(given, "language")
        if style is not None:
            return None, None, style
        assert speaker is not None
        language = language or language_of(text)
        for key, value in (("speaker", speaker), ("language", language)):
            if not _NAME.fullmatch(value):
                raise self._wrong(key, value, "holds a semicolon or a control character", "write a plain name")
        return speaker, language, voice_prompt(speaker=speaker, language=language)

    def _text(self, given: Mapping[str, Any], key: str) -> str | None:
        value = given.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip() or not encodable(value):
            raise self._wrong(key, value, "is no text", "write a string of valid Unicode that is not empty")
        return value

    def _file(self, given: Mapping[str, Any]) -> str | None:
        value = self._text(given, "file")
        return value if value is None else self._on_disk("file", value)

    def _codes(self, value: object) -> tuple[int, ...] | CodesAt | None:
        if value is None:
            return None
        if isinstance(value, str) and encodable(value) and (found := _IN_FILE.fullmatch(value)):
            return CodesAt(self._on_disk("codes", found[1]), int(found[2]))
        if isinstance(value, list) and value and all(type(code) is int and code >= 0 for code in value):
            return tuple(value)
        raise self._wrong(
            "codes", value, "is neither FILE.codes.safetensors#NUMBER nor a list of codes", "give one of the two"
        )

    def _on_disk(self, key: str, name: str) -> str:
        if URL.match(name):
            raise self._wrong(
                key, name, "is a URL, and media are read from files only",
                "download it, and give the path under the source's root", "remote_media",
            )  # fmt: skip
        return name

    def _range(self, given: Mapping[str, Any]) -> tuple[int, int | None]:
        start, stop = given.get("start", 0), given.get("stop")
        for key, value in (("start", start), ("stop", stop)):
            if value is not None and (type(value) is not int or value < 0):
                raise self._wrong(key, value, "is no number of codes", "write a whole number from 0 on")
        if stop is not None and stop <= start:
            raise self._wrong("stop", stop, f"is not behind start = {start}", "give a range that is not empty")
        if (start or stop is not None) and "codes" not in given and "file" not in given:
            raise self._wrong("start / stop", (start, stop), "is a piece of no recording", "give file or codes")
        return start, stop

    def _wrong(self, key: str, value: object, problem: str, fix: str, reason: str = "bad_speech") -> RecordError:
        field = f"{self.field}.{key}" if key else self.field
        return RecordError(self.where, field=field, value=value, problem=problem, fix=fix, reason=reason)
