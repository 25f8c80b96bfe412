"""What the leader of a replica keeps of an answer that has not finished, and the events that it makes of it."""

import numpy as np

from megatron_omni.batch import NO_RECORD
from megatron_omni.generation.prefix import media_digests, prefixes
from megatron_omni.generation.replica import Scored
from megatron_omni.generation.request import (
    Alternatives,
    FinishedEvent,
    FinishReason,
    PromptEvent,
    Request,
    TokenEvent,
    Usage,
)
from megatron_omni.generation.scheduler import Answer, Prefix
from megatron_omni.generation.text import Piece, TextStream


class Told:
    """One answer."""

    def __init__(
        self,
        answer: Answer,
        request: Request,
        number: int,
        sample: int,
        *,
        stream: TextStream | None,
        routes: "Routes | None",
    ) -> None:
        self.answer, self.request, self.number, self.sample = answer, request, number, sample
        self.stream, self.routes = stream, routes
        self.joined = False
        """The replica knows of it."""
        self.cached = 0
        self.ids: list[int] = []
        """The tokens that it has said."""
        self.of_prompt: list[tuple[float, Alternatives]] = []

    def prompt_event(self) -> PromptEvent:
        """What was asked of the prompt's tokens."""
        return PromptEvent(
            name=self.request.name,
            logprobs=tuple(logprob for logprob, _ in self.of_prompt),
            top=tuple(top[: self.request.prompt_logprobs] for _, top in self.of_prompt),
        )

    def token_event(self, scored: Scored, piece: Piece, *, is_end: bool) -> TokenEvent:
        """One more token, and the ``piece`` of text that is certain with it."""
        return TokenEvent(
            name=self.request.name,
            sample=self.sample,
            id=scored.token,
            logprob=scored.logprob,
            top=scored.top[: self.request.logprobs or 0],
            text=piece.text,
            reasoning=piece.reasoning,
            is_end=is_end,
        )

    def finished_event(self, reason: FinishReason, *, stop: int | str | None, message: str | None) -> FinishedEvent:
        """The end, with the text that was held back."""
        last = Piece() if self.stream is None or isinstance(stop, str) else self.stream.flush()
        usage = Usage(
            prompt=self.request.prompt.length,
            cached=self.cached,
            completion=len(self.ids),
            reasoning=0 if self.stream is None else self.stream.num_reasoning_tokens,
        )
        return FinishedEvent(
            name=self.request.name,
            sample=self.sample,
            reason=reason,
            usage=usage,
            stop=stop,
            text=last.text,
            reasoning=last.reasoning,
            message=message,
            routes=None if self.routes is None else self.routes.of_first(usage.prompt + usage.completion - 1),
        )

    def all_prefixes(self) -> list[Prefix] | None:
        """Beginnings of all that it has said: a conversation that goes on begins so. None: it is not kept."""
        if not self.answer.keep or not self.joined:
            return None
        sample, said = self.request.prompt, np.array(self.ids, dtype=np.int64)
        positions = np.broadcast_to(sample.next_position + np.arange(len(said)), (3, len(said)))
        return prefixes(
            np.concatenate([sample.input_ids.numpy(), said]),
            np.concatenate([sample.position_ids.numpy(), positions], axis=1),
            np.concatenate([media_digests(sample), np.zeros_like(said)]),
            salt=self.request.salt,
        )


class Routes:
    """Routes (models/moe/routes.py) of an answer's tokens as they are computed, [tokens, L n] uint8.

    A token that is computed again after its answer was set back keeps its first routes: those its next token was chosen
    with. Of several samples one computes the prompt; the others copy its keys and values, and have its routes.
    """

    def __init__(self, request: Request, width: int, *, sibling: "Routes | None") -> None:
        self._own = np.full((request.num_tokens, width), NO_RECORD, dtype=np.uint8)
        first = self._own[: request.prompt.length].copy()
        self._prompt: np.ndarray = first if sibling is None else sibling._prompt
        """Shared by the samples of a request."""

    def add(self, start: int, computed: np.ndarray) -> None:
        """Those of tokens ``start``, ``start`` + 1, ..."""
        for rows in (self._own, self._prompt):
            _fill(rows[start : start + len(computed)], computed)

    def of_first(self, num_tokens: int) -> np.ndarray:
        """[num_tokens, L n]."""
        _fill(self._own[: len(self._prompt)], self._prompt)
        return self._own[: max(num_tokens, 0)].copy()


def _fill(rows: np.ndarray, with_: np.ndarray) -> None:
    """Give the ``rows`` that have no record those of ``with_``, as far as there are any."""
    missing = np.flatnonzero(rows[:, -1] >= NO_RECORD)
    rows[missing] = with_[missing]
