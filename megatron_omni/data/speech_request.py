"""What a user writes to have an answer spoken: a line behind the question that asks for a voice.

The released models were trained with the wording below, word by word, for reading a text aloud (``read``, English alone) and
for answering (English, Chinese); what is read or asked stands before it. A model of one's own may know another wording:
``data.voice_request`` of its recipe, with ``{voice}`` where the voice stands. How a style is asked for is not published; the
released frame is used, with the description in the place of "Jenny's voice".
"""

from dataclasses import replace
from typing import Literal

from megatron_omni.data.errors import RecordError
from megatron_omni.data.record import Record
from megatron_omni.data.spoken import language_of

Purpose = Literal["answer", "read"]
VOICE = "{voice}"
_FORMAT = (
    " in the following format: <speech start> token indicates the beginning of the speech response, followed by the text "
    "prompt. <prompt end> token indicates the end of the text prompt and the start of the speech output. <speech end> token "
    "indicates the end of the speech output."
)
RELEASED: dict[tuple[Purpose, str], str] = {
    ("read", "English"): f"You should read user's query in {VOICE}.\nGenerate{_FORMAT}",
    ("answer", "English"): f"You should listen to the user's question and respond in {VOICE}.\nAnswer{_FORMAT}",
    ("answer", "Chinese"): (
        f"请理解用户给出的语音问题并用{VOICE}进行回答。\n"
        "回答的格式如下：<speech start>字符表示语音回复的起始，文本提示词开始，<prompt end>字符表示文本提示词结束语音输出开始，"
        "<speech end>字符表示语音输出结束。"
    ),
}  # fmt: skip
_VOICES = {"English": "{}'s voice", "Chinese": "{}音色"}
_STYLES = {"English": "the following style: {}", "Chinese": "下面的风格：{}，"}


def released_request(
    *, voice: str | None = None, style: str | None = None, purpose: Purpose = "answer", language: str = "English"
) -> str:
    """The released wording for exactly one of ``voice`` and ``style``; ValueError for what was never published."""
    if (voice is None) == (style is None):
        raise ValueError("give a voice or a style, one of the two")
    if (purpose, language) not in RELEASED:
        known = ", ".join(f"{one} in {tongue}" for one, tongue in RELEASED)
        raise ValueError(f"no wording to {purpose} in {language} is published; there is one to {known}")
    named = _VOICES[language].format(voice) if voice is not None else _STYLES[language].format(style)
    return RELEASED[purpose, language].replace(VOICE, named)


def asked_to_speak(
    record: Record,
    *,
    voice: str | None = None,
    style: str | None = None,
    wording: str = "",
    purpose: Purpose = "answer",
) -> Record:
    """The record whose last question asks for a spoken answer; ``wording`` (``data.voice_request``) empty: the released.

    A question with Chinese characters is asked in Chinese where that wording is published. RecordError where the last turn
    is no question.
    """
    *before, last = record.messages
    if last.role != "user":
        raise RecordError(
            record.where, field="messages", value=[m.role for m in record.messages], problem="asks nothing",
            fix="end with a user turn", reason="bad_roles",
        )  # fmt: skip
    if wording:
        if (voice is None) == (style is None):
            raise ValueError("give a voice or a style, one of the two")
        request = wording.replace(VOICE, voice if voice is not None else str(style))
    else:
        language = language_of(last.content) if purpose == "answer" else "English"
        request = released_request(voice=voice, style=style, purpose=purpose, language=language)
    *first, text = last.pieces()
    joined = f"{text}\n{request}" if first or text else request
    asked = replace(last, content=f"{last.content}\n{request}", parts=(*first, joined))
    return replace(record, messages=(*before, asked))
