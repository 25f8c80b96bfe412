"""Events of the engine as the bodies and streams that OpenAI's clients read: chat completions and text completions.

An ``Answer`` takes events and gives chunks of a stream; at the end it is the whole body. Text that came in several events
before it was sent is one chunk. Shapes: docs/serving.md.
"""

import codecs
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_omni.generation.request import LEAST_LOGPROB, Alternatives, Event, FinishedEvent, PromptEvent, TokenEvent
from megatron_omni.serve.errors import server_fault, unavailable
from megatron_omni.serve.jobs import Built
from megatron_omni.serve.link import ModelFacts
from megatron_omni.serve.speech_link import SpeechEvent


@dataclass
class Choice:
    """One answer as far as it has come, and what of it was not sent yet."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    """Those whose log-probabilities are wanted."""
    end: FinishedEvent | None = None
    sent_text: int = 0
    sent_reasoning: int = 0
    sent_tokens: int = 0
    begun: bool = False
    ended: bool = False

    def unsent(self) -> tuple[str, str, list[TokenEvent]]:
        """Text, thought and tokens since the last call."""
        text, reasoning = "".join(self.text[self.sent_text :]), "".join(self.reasoning[self.sent_reasoning :])
        tokens = self.tokens[self.sent_tokens :]
        self.sent_text, self.sent_reasoning, self.sent_tokens = len(self.text), len(self.reasoning), len(self.tokens)
        return text, reasoning, tokens


class Answer:
    """What both kinds of completion share. ``prompts`` are those of the request, by the names of their requests."""

    kind = ""
    chunk_kind = ""

    def __init__(
        self,
        name: str,
        facts: ModelFacts,
        prompts: Mapping[str, Built],
        *,
        n: int,
        logprobs: bool,
        seed: int,
        stop_ids: Sequence[int],
        token_bytes: Mapping[int, bytes],
    ) -> None:
        self.n, self.logprobs, self.token_bytes, self._stop_ids = n, logprobs, token_bytes, set(stop_ids)
        self.prompts = list(prompts.values())
        self._first = {prompt: number * n for number, prompt in enumerate(prompts)}
        self.choices = [Choice() for _ in range(n * len(prompts))]
        self.num_tokens = 0
        self._head = {
            "id": name, "object": self.kind, "created": int(time.time()), "model": facts.name,
            "system_fingerprint": facts.fingerprint, "seed": seed,
        }  # fmt: skip
        self._chunk_head = self._head | {"object": self.chunk_kind}

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(self._is_over(choice) for choice in self.choices)

    def take(self, events: Sequence[Event | SpeechEvent]) -> None:
        """More of the answer; ApiError where it failed."""
        for event in events:
            first = self._first[event.name]
            match event:
                case TokenEvent():
                    choice = self.choices[first + event.sample]
                    self.num_tokens += 1
                    self._add_text(choice, event.text, event.reasoning)
                    if self.logprobs and not event.is_end:
                        choice.tokens.append(event)
                case FinishedEvent():
                    if event.reason == "error":
                        raise server_fault(event.message or "the model could not go on with this request")
                    if event.reason == "cancelled":
                        raise unavailable("the request was cancelled by the server", code="cancelled")
                    choice = self.choices[first + event.sample]
                    choice.end = event
                    self._add_text(choice, event.text, event.reasoning)
                case PromptEvent():
                    self._take_prompt(first, event)

    def chunks(self, *, usage: bool) -> list[dict[str, Any]]:
        """What a stream says of that."""
        out = []
        for index, choice in enumerate(self.choices):
            if not choice.ended:
                for part in self._choice_chunks(choice):
                    chunk = self._chunk_head | {
                        "choices": [{"index": index, "logprobs": None, "finish_reason": None} | part]
                    }
                    out.append(chunk | {"usage": None} if usage else chunk)
                choice.ended = self._is_over(choice)
        return out

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that was asked for the counts."""
        return self._chunk_head | {"choices": [], "usage": self.usage()}

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [{"index": i} | self._whole(i, choice) for i, choice in enumerate(self.choices)]
        return self._head | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Counts of tokens."""
        prompt = sum(built.num_tokens for built in self.prompts)
        ends = [choice.end.usage for choice in self.choices if choice.end is not None]
        completion, reasoning = (sum(getattr(end, name) for end in ends) for name in ("completion", "reasoning"))
        cached = sum(choice.end.usage.cached for choice in self.choices[:: self.n] if choice.end is not None)
        by_kind = {f"{kind}_tokens": sum(b.tokens.get(kind, 0) for b in self.prompts)
                   for kind in ("text", "image", "audio", "video")}  # fmt: skip
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached, **by_kind},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def _is_over(self, choice: Choice) -> bool:
        return choice.end is not None

    def _end_of(self, choice: Choice) -> dict[str, Any]:
        assert choice.end is not None
        stop = choice.end.stop
        named = stop if isinstance(stop, str) or stop in self._stop_ids else None
        return {"finish_reason": choice.end.reason, "stop_reason": named}

    def _add_text(self, choice: Choice, text: str, reasoning: str) -> None:
        if text:
            choice.text.append(text)
        if reasoning:
            choice.reasoning.append(reasoning)

    def _take_prompt(self, first: int, event: PromptEvent) -> None:
        raise NotImplementedError

    def _choice_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(Answer):
    """``chat.completion`` and ``chat.completion.chunk``."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def _choice_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        if not choice.begun:
            choice.begun = True
            parts.append({"delta": {"role": "assistant", "content": ""}})
        text, reasoning, tokens = choice.unsent()
        if reasoning:
            parts.append({"delta": {"reasoning_content": reasoning}})
        if text or tokens:
            parts.append({"delta": {"content": text}})
            if tokens:
                parts[-1]["logprobs"] = self._logprobs(tokens)
        if choice.end is not None:
            parts.append({"delta": {}} | self._end_of(choice))
        return parts

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        logprobs = self._logprobs(choice.tokens) if self.logprobs else None
        return {"message": message, "logprobs": logprobs} | self._end_of(choice)

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        content = [
            self._entry(event.id, event.logprob) | {"top_logprobs": [self._entry(*item) for item in event.top]}
            for event in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self.token_bytes.get(token, b"")
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


class TextAnswer(Answer):
    """``text_completion``, with the prompt before it where ``echo`` asks for that."""

    kind = chunk_kind = "text_completion"

    def __init__(self, *args: Any, echo: bool, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.echo = echo
        self._prompt_logprobs: dict[int, PromptEvent] = {}
        self._empty = echo and all(built.max_new_tokens == 0 for built in self.prompts)
        """Only the prompt is wanted: the one token that the engine made is none of the answer."""

    def usage(self) -> dict[str, Any]:
        usage = super().usage()
        if self._empty:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _take_prompt(self, first: int, event: PromptEvent) -> None:
        self._prompt_logprobs[first // self.n] = event

    def _choice_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        text, _, tokens = choice.unsent()
        parts: list[dict[str, Any]] = []
        if text or tokens:
            logprobs = self._logprobs(len("".join(choice.text)) - len(text), self._rows(tokens)) if tokens else None
            parts.append({"text": text, "logprobs": logprobs})
        if choice.end is not None:
            parts.append({"text": ""} | self._end_of(choice))
        return parts

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        text, rows = "".join(choice.text), self._rows(choice.tokens)
        if self._empty:
            text, rows = "", []
        if self.echo:
            prompt = index // self.n
            ids = self.prompts[prompt].ids or ()
            said = self._prompt_logprobs.get(prompt)
            text = b"".join(self.token_bytes.get(token, b"") for token in ids).decode("utf-8", "replace") + text
            known: list[tuple[int, float | None, Alternatives]] = [(ids[0], None, ())]
            if said is not None:
                known += list(zip(ids[1:], said.logprobs, said.top, strict=True))
            rows = known + rows
        end = {"finish_reason": "length", "stop_reason": None} if self._empty else self._end_of(choice)
        return {"text": text, "logprobs": self._logprobs(0, rows) if self.logprobs else None} | end

    @staticmethod
    def _rows(tokens: Sequence[TokenEvent]) -> list[tuple[int, float | None, Alternatives]]:
        return [(event.id, event.logprob, event.top) for event in tokens]

    def _logprobs(self, offset: int, rows: Sequence[tuple[int, float | None, Alternatives]]) -> dict[str, Any]:
        offsets, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
        for token, _, _ in rows:
            offsets.append(offset)
            offset += len(decoder.decode(self.token_bytes.get(token, b"")))
        return {
            "tokens": [self._name(token) for token, _, _ in rows],
            "token_logprobs": [_finite(logprob) for _, logprob, _ in rows],
            "top_logprobs": [
                {self._name(i): _finite(value) for i, value in top} if logprob is not None else None
                for _, logprob, top in rows
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """Of a token in a table: its text, or its bytes where they are no whole characters, so that names differ."""
        data = self.token_bytes.get(token, b"")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
