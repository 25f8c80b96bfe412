"""What is asked of the engine and what it says: requests, how their tokens are chosen, and events. No torch.

    engine.submit(Request(name="a", prompt=sample, max_new_tokens=64, sampling=Sampling(temperature=1.0, seed=7)))
    while engine.busy:
        for event in engine.step():
            ...                                # TokenEvent, PromptEvent, BlockEvent and, last for every sample, FinishedEvent

A request is ``n`` samples of one prompt; an event names its request and its sample. What a sample says depends on the
prompt, the settings and its own seed: not on what else the engine computes beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    import numpy

    from megatron_omni.data.sample import Sample

MAX_LOGPROBS = 20
"""Alternatives whose log-probabilities may be asked for at each position."""
LEAST_LOGPROB = -9999.0
"""Where they are written as JSON, which has no infinity."""
MAX_SAMPLES = 64
"""Samples of one prompt."""
MAX_BLOCKS = 16
"""Pictures of one answer."""
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 256

FinishReason = Literal["stop", "length", "cancelled", "error"]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, field: str, value: object, need: str) -> None:
    if not condition:
        raise ValueError(f"{field} is {value}; it must be {need}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen (sampling.py has the formulas and their order)."""

    temperature: float = 0.0
    """0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Probability mass of the nucleus, in (0, 1]; 1 samples from the whole vocabulary."""
    top_k: int = 0
    """The most likely tokens that may be drawn; 0 for all."""
    min_p: float = 0.0
    """Least probability of a token that may be drawn, as a share of the most likely one's, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens of the prompt and the answer, multiplies the negative ones."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer has."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as the answer has it."""
    seed: int = 0
    """Names every draw, together with the token's number in the answer. Greedy decoding draws nothing."""

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or positive")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _require(_whole(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or a whole number above")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "in [0, 1]")
        _require(
            0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "positive"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        _require(_whole(self.seed), "seed", self.seed, "a whole number")
        if self.temperature == 0.0:
            for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                if getattr(self, name) != neutral:
                    raise ValueError(
                        f"{name} is {getattr(self, name)} but temperature is 0: greedy decoding ignores it, so set both"
                    )

    @property
    def penalised(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tokens that stand for a picture in an answer: the hidden states of the last layer at their places are what it is drawn
    from. Once the answer has the first, the others follow without a choice; they count as none of ``max_new_tokens``."""

    ids: tuple[int, ...]
    """All of them, in order. None but the first is ever chosen."""
    where: Literal["first", "end", "chosen"] = "chosen"
    """``first``: the answer begins with one. ``end``: one stands in the place of its end where it has none by then. ``chosen``:
    as the model decides."""
    most: int = 1
    """Of an answer; from then on no further one can be chosen."""
    vision: tuple[int, int] | None = None
    """First and last + 1 of the vision encoder's rows of the prompt that are told beside the hidden states."""

    def __post_init__(self) -> None:
        _require(len(self.ids) >= 1 and len({self.ids[0], *self.ids[1:]}) > 1 and self.ids[0] not in self.ids[1:], "block.ids",
                 self.ids, "at least two tokens, the first of which stands nowhere else")  # fmt: skip
        _require(_whole(self.most) and 1 <= self.most <= MAX_BLOCKS, "block.most", self.most, f"from 1 to {MAX_BLOCKS}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is wanted of a prompt. ValueError names the field that cannot be."""

    max_new_tokens: int
    """Longest answer, its end token included."""
    min_new_tokens: int = 0
    """Tokens before which neither an end token nor one of ``stop_ids`` can be chosen."""
    sampling: Sampling = GREEDY
    n: int = 1
    """Samples of the prompt. Sample 0 has the seed of ``sampling``, sample i ``derived_seed(seed, i)``; greedy ones are
    equal."""
    stop: tuple[str, ...] = ()
    """Text that ends the answer; it is never part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside the tokenizer's end tokens."""
    banned_ids: tuple[int, ...] = ()
    """Tokens that are never chosen, an end token among them too."""
    ignore_eos: bool = False
    """The tokenizer's end tokens do not end the answer."""
    logprobs: int | None = None
    """Log-probabilities under the model (before temperature and penalties) of the chosen token and of this many most
    likely ones."""
    prompt_logprobs: int | None = None
    """The same for every token of the prompt but the first, in one :class:`PromptEvent`."""
    text: bool = False
    """Events carry text. Asking for ``stop`` strings implies it."""
    reasoning: bool = False
    """Text between ``<think>`` and ``</think>`` is given apart (text.py)."""
    reuse_prefix: bool = True
    """May share the cache of an earlier prompt that begins alike, and may leave its own to later ones."""
    salt: str = ""
    """Only prompts of the same salt share: how fast an answer comes tells nothing of what others asked."""
    routes: bool = False
    """Which experts its tokens took is told with the end of each sample. Such a prompt is computed, whatever is cached."""
    block: Block | None = None
    """The answer may have pictures, each told in a :class:`BlockEvent`."""

    def __post_init__(self) -> None:
        _require(_whole(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens,
                 "at least 1")  # fmt: skip
        _require(_whole(self.min_new_tokens) and 0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens",
                 self.min_new_tokens, f"from 0 to max_new_tokens ({self.max_new_tokens})")  # fmt: skip
        _require(_whole(self.n) and 1 <= self.n <= MAX_SAMPLES, "n", self.n, f"from 1 to {MAX_SAMPLES}")
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"{len(self.stop)} texts", f"at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            _require(1 <= len(text) <= MAX_STOP_CHARACTERS, "stop", f"{len(text)} characters",
                     f"1 to {MAX_STOP_CHARACTERS} characters each")  # fmt: skip
        for name in ("stop_ids", "banned_ids"):
            ids = getattr(self, name)
            _require(all(_whole(i) and i >= 0 for i in ids), name, ids, "token ids, 0 or above")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or (_whole(value) and 0 <= value <= MAX_LOGPROBS), name, value,
                     f"None or from 0 to {MAX_LOGPROBS}")  # fmt: skip

    @property
    def has_text(self) -> bool:
        """Whether events carry text."""
        return self.text or self.reasoning or bool(self.stop)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request(Wanted):
    """One prompt and what is wanted of it. ValueError names the field that cannot be."""

    name: str
    """Names the request in events; no two that are in the engine together may share it."""
    prompt: "Sample"
    """``SampleBuilder.build_prompt``: ids, 3D positions, tiles and chunks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.name), "name", self.name, "a text")
        _require(self.prompt.length >= 1, "prompt", "0 tokens", "at least one token")

    @classmethod
    def of(cls, wanted: Wanted, *, name: str, prompt: "Sample") -> Self:
        """What is ``wanted`` of ``prompt``."""
        return cls(name=name, prompt=prompt, **{field.name: getattr(wanted, field.name) for field in fields(Wanted)})

    @property
    def begins(self) -> tuple[int, ...]:
        """Tokens that every answer begins with: a block's, or none."""
        return self.block.ids if self.block is not None and self.block.where == "first" else ()

    @property
    def num_tokens(self) -> int:
        """Positions that one sample may take: prompt and longest answer, blocks of pictures included."""
        blocks = 0 if self.block is None else self.block.most * len(self.block.ids)
        return self.prompt.length + self.max_new_tokens + blocks


Alternatives = tuple[tuple[int, float], ...]
"""(token id, log-probability) of the most likely tokens, falling."""


class TokenEvent(NamedTuple):
    """One more token of a sample. A tuple: there are as many as tokens, and it is made in a tenth of a dataclass's time."""

    name: str
    sample: int
    id: int
    logprob: float | None = None
    """Log-probability; None unless asked for."""
    top: Alternatives = ()
    near_edge: bool = False
    """Where log-probabilities are asked for: drawn so near the edge between two tokens that rounding could decide."""
    text: str = ""
    """Text of the answer that is certain with this token: whole characters, and no possible beginning of a stop string.
    The rest follows with later tokens or in the :class:`FinishedEvent`."""
    reasoning: str = ""
    """The same of the thought."""
    is_end: bool = False
    """An end token or one of ``stop_ids``, which a text or a list of ids leaves out unless asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEvent:
    """Log-probabilities of a prompt's tokens, before its first :class:`TokenEvent`."""

    name: str
    logprobs: tuple[float, ...]
    """Of tokens 1, 2, ... of the prompt, each given those before it."""
    top: tuple[Alternatives, ...]
    """The most likely tokens at those places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockEvent:
    """What a picture of a sample is drawn from, once its block has been computed."""

    name: str
    sample: int
    number: int
    """Of the picture in the sample."""
    hidden: bytes
    """[T, H] float32, little end first, in the order of the block's tokens."""
    vision: bytes = b""
    """[n, H] float32 of the rows that ``Block.vision`` names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a sample took, in tokens."""

    prompt: int
    cached: int
    """Tokens of the prompt whose keys and values were there already."""
    completion: int
    """Chosen tokens, an end token included, and no tokens of a block but a chosen first one."""
    reasoning: int = 0
    """Those of the completion that are thought."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedEvent:
    """The last event of a sample."""

    name: str
    sample: int
    reason: FinishReason
    usage: Usage
    stop: int | str | None = None
    """The token or the text that ended it; None for other reasons than ``stop``."""
    text: str = ""
    """Text of the answer that was held back until now."""
    reasoning: str = ""
    message: str | None = None
    """What went wrong, for ``error``."""
    routes: "numpy.ndarray | None" = field(default=None, compare=False, repr=False)
    """[tokens, MoE layers x bytes] uint8 of prompt and answer but its last token, which nothing was computed from
    (models/moe/routes.py); None unless asked for."""


Event = TokenEvent | PromptEvent | BlockEvent | FinishedEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """Counts for a look from outside (metrics, health)."""

    waiting: int
    """Samples that have no place yet, those that were set back among them."""
    running: int
    """Samples that are being computed."""
    cache_tokens: int
    """Positions of the cache that running samples hold."""
    prefix_tokens: int
    """Positions that are kept for prompts to come, and given up when a sample needs them."""
    budget_tokens: int
    """Positions of the whole cache."""
    set_back: int
    """Times that a sample lost its place and was computed again, since the start."""
    prompt_tokens: int
    """Tokens of prompts that were computed since the start."""
    cached_tokens: int
    """Tokens of prompts that the prefix cache gave since the start."""
    generated_tokens: int
    """Tokens that were chosen since the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """What a step was like, for metrics."""

    tokens: int = 0
    """Tokens that it computed, padding apart."""
    admitted: tuple[str, ...] = ()
    """Names of requests of which it was the first step."""
    encoded: tuple[tuple[Literal["image", "audio"], float], ...] = ()
    """Runs of an encoder, and the seconds that each took; on a GPU those of a step before may come with this one."""
    routing: tuple[tuple[float, float], ...] = ()
    """Of each MoE layer the real experts per token, and the null part of the selected slots; of every 64th step."""


class RequestEngine(Protocol):
    """What a caller sees of the engine (``engine.Engine``), on the rank that leads: rank 0 of a server."""

    def submit(self, request: Request) -> None:
        """Take a request. Nothing is computed before the next :meth:`step`; its n samples wait for a place in the order
        of arrival. ValueError where it can never be answered here: more tokens than the cache has positions, a token that
        the vocabulary has not, media that the model has no encoder for, a name that is taken."""
        ...

    def cancel(self, name: str) -> None:
        """End what is left of a request; an unknown or finished name is no error. Its memory is free from the next
        :meth:`step` on, which tells of every sample with a :class:`FinishedEvent` (``cancelled``)."""
        ...

    def pause(self, name: str) -> None:
        """Compute nothing more of a request before :meth:`resume`; an unknown or finished name is no error. It keeps its
        place while nobody needs it, and is not ``busy``."""
        ...

    def resume(self, name: str) -> None:
        """Go on with a paused request."""
        ...

    def step(self) -> list[Event]:
        """Compute one step: a token for every sample that decodes, and a part of the prompts that wait. The events of
        one sample come in order; a sample that cannot go on ends with ``error`` and leaves the others alone. Without
        work it computes nothing and returns at once, but call it every few seconds all the same: the other ranks wait
        for word from this one. An exception is the end of the engine."""
        ...

    @property
    def busy(self) -> bool:
        """Whether there is a request that has not finished, nor is paused."""
        ...

    def state(self) -> EngineState:
        """Counts as of the last step."""
        ...

    def weights_changed(self) -> None:
        """The weights are others from here on: what is kept of earlier prompts is forgotten. Only while no request
        is there."""
        ...

    def close(self) -> None:
        """Let the other ranks go (their ``follow()`` returns), free the cache and leave the model as it was."""
        ...


def check_ids(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """ValueError for a token id that the vocabulary has not."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{field} has token {token}; ids of this vocabulary are 0 to {vocab_size - 1}")
