"""What the leader of a replica keeps of an answer that has not finished, and the events that it makes of it."""

import numpy as np

from megatron_omni.generation.orders import Scored
from megatron_omni.generation.prefix import media_digests, prefixes
from megatron_omni.generation.request import (
    Alternatives,
    BlockEvent,
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

    def __init__(self, answer: Answer, request: Request, number: int, sample: int, stream: TextStream | None) -> None:
        self.answer, self.request, self.number, self.sample, self.stream = answer, request, number, sample, stream
        self.joined = False
        """The replica knows of it."""
        self.cached = 0
        self.ids = [*request.begins]
        """The tokens that it has said, those of blocks among them."""
        self.chosen = 0
        """Those that were chosen."""
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
            near_edge=scored.near_edge,
            text=piece.text,
            reasoning=piece.reasoning,
            is_end=is_end,
        )

    def block_event(self, number: int, hidden: bytes, vision: bytes) -> BlockEvent:
        """A picture that can be drawn."""
        return BlockEvent(name=self.request.name, sample=self.sample, number=number, hidden=hidden, vision=vision)

    def finished_event(
        self, reason: FinishReason, *, stop: int | str | None, message: str | None, routes: np.ndarray | None
    ) -> FinishedEvent:
        """The end, with the text that was held back."""
        last = Piece() if self.stream is None or isinstance(stop, str) else self.stream.flush()
        usage = Usage(
            prompt=self.request.prompt.length,
            cached=self.cached,
            completion=self.chosen,
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
            routes=routes,
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
