"""Events of the engine as OpenAI's bodies and chunks: what a stream says is what the whole body says."""

from dataclasses import fields
from multiprocessing.connection import Pipe
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from megatron_omni.generation.request import (
    EngineState,
    Event,
    FinishedEvent,
    PromptEvent,
    StepFacts,
    TokenEvent,
    Usage,
)
from megatron_omni.serve.answers import ChatAnswer, TextAnswer
from megatron_omni.serve.errors import ApiError
from megatron_omni.serve.jobs import Built
from megatron_omni.serve.link import Happened, ModelFacts, Ready, tell, told

FACTS = ModelFacts(
    name="m", created=1, fingerprint="iter_0000003-abc", seq_length=64, vocab_size=9, input_modalities=("text",)
)
TOKENS = {1: b"a", 2: b" b", 3: "é".encode()[:1], 4: "é".encode()[1:], 5: b"<think>"}
PROMPT = Built(tokens={"text": 3, "image": 4}, max_new_tokens=9, ids=(1, 3, 4), token_bytes=TOKENS)


def token(id: int, text: str = "", sample: int = 0, **fields: Any) -> TokenEvent:
    logprob = -0.5 * id
    return TokenEvent(
        name="p", sample=sample, id=id, text=text, logprob=logprob, top=((id, logprob), (9, -8.0)), **fields
    )


def end(sample: int = 0, reason: Any = "stop", **fields: Any) -> FinishedEvent:
    usage = Usage(prompt=7, cached=2, completion=4, reasoning=1)
    return FinishedEvent(name="p", sample=sample, reason=reason, usage=usage, **fields)


def chat(**settings: Any) -> ChatAnswer:
    defaults: dict[str, Any] = {"n": 1, "logprobs": False, "seed": 5, "stop_ids": (), "token_bytes": TOKENS}
    return ChatAnswer("chatcmpl-1", FACTS, {"p": PROMPT}, **(defaults | settings))


def text(**settings: Any) -> TextAnswer:
    defaults: dict[str, Any] = {
        "n": 1,
        "logprobs": True,
        "seed": 5,
        "stop_ids": (),
        "token_bytes": TOKENS,
        "echo": False,
    }
    return TextAnswer("cmpl-1", FACTS, {"p": PROMPT}, **(defaults | settings))


def streamed(answer: Any, steps: list[list[Event]], *, usage: bool = False) -> list[dict[str, Any]]:
    chunks = []
    for events in steps:
        answer.take(events)
        chunks += answer.chunks(usage=usage)
    return chunks


STEPS: list[list[Event]] = [
    [token(5, reasoning="hm")],
    [token(1, "a"), token(2, " b", sample=1), token(3, sample=0)],
    [],
    [token(4, "é"), end(sample=1, stop="x", text=" c")],
    [end(reason="length", text="!")],
]


def test_a_stream_of_two_choices_says_what_the_body_says() -> None:
    answer = chat(n=2, logprobs=True)
    chunks = streamed(answer, STEPS)
    assert answer.complete
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    body = answer.body()
    ChatCompletion.model_validate(body)
    for index, choice in enumerate(body["choices"]):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        said = "".join(part["delta"].get("content", "") for part in parts)
        thought = "".join(part["delta"].get("reasoning_content", "") for part in parts)
        assert (said, thought) == (choice["message"]["content"], choice["message"].get("reasoning_content", ""))
        entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
    first, second = body["choices"]
    assert (first["message"]["content"], first["message"]["reasoning_content"]) == ("aé!", "hm")
    assert (first["finish_reason"], first["stop_reason"]) == ("length", None)
    assert (second["message"]["content"], second["finish_reason"], second["stop_reason"]) == (" b c", "stop", "x")
    assert b"".join(bytes(entry["bytes"]) for entry in first["logprobs"]["content"]) == "<think>aé".encode()
    assert first["logprobs"]["content"][1]["top_logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert body["usage"]["prompt_tokens"] == 7 and body["usage"]["completion_tokens"] == 8
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == 4
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_counts_come_in_a_chunk_of_their_own() -> None:
    answer = chat()
    chunks = streamed(answer, [[token(1, "a")], [end()]], usage=True)
    assert all(chunk["usage"] is None for chunk in chunks)
    last = answer.usage_chunk()
    ChatCompletionChunk.model_validate(last)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 11


def test_the_end_token_is_none_of_the_answer_and_stop_ids_are_named() -> None:
    answer = chat(logprobs=True, stop_ids=(4,))
    answer.take([token(1, "a"), token(4, is_end=True), end(stop=4)])
    choice = answer.body()["choices"][0]
    assert choice["stop_reason"] == 4 and len(choice["logprobs"]["content"]) == 1
    answer = chat()
    answer.take([token(1, "a"), end(stop=2)])
    assert answer.body()["choices"][0]["stop_reason"] is None


def test_events_that_wait_together_are_one_chunk() -> None:
    answer = chat()
    chunks = streamed(answer, [[token(1, "a"), token(2, " b"), token(1, "a")]])
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "a ba"]


def test_a_text_with_its_prompt_has_the_log_probability_of_every_token() -> None:
    answer = text(echo=True)
    answer.take([PromptEvent(name="p", logprobs=(-1.0, float("-inf")), top=(((3, -1.0),), ((4, -2.0), (1, -3.0))))])
    answer.take([token(2, " b"), end()])
    choice = answer.body()["choices"][0]
    assert choice["text"] == "aé b"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", " b"]
    assert logprobs["token_logprobs"] == [None, -1.0, -9999.0, -1.0]
    assert logprobs["top_logprobs"] == [
        None,
        {"bytes:\\xc3": -1.0},
        {"bytes:\\xa9": -2.0, "a": -3.0},
        {" b": -1.0, "": -8.0},
    ]
    assert logprobs["text_offset"] == [0, 1, 1, 2]


def test_a_prompt_alone_has_no_answer() -> None:
    built = Built(tokens={"text": 3}, max_new_tokens=0, ids=(1, 2, 1), token_bytes=TOKENS)
    answer = TextAnswer(
        "c", FACTS, {"p": built}, n=1, logprobs=True, seed=0, stop_ids=(), token_bytes=TOKENS, echo=True
    )
    answer.take([PromptEvent(name="p", logprobs=(-1.0, -2.0), top=((), ())), token(2, " b"), end(reason="length")])
    body = answer.body()
    assert body["choices"][0]["text"] == "a ba" and body["choices"][0]["logprobs"]["token_logprobs"] == [
        None,
        -1.0,
        -2.0,
    ]
    assert body["usage"]["completion_tokens"] == 0 and body["choices"][0]["finish_reason"] == "length"


def test_a_stream_of_text_says_where_its_tokens_stand() -> None:
    answer = text()
    chunks = streamed(answer, [[token(1, "a")], [token(3)], [token(4, "é")], [token(2, " b")], [end(text="?")]])
    Completion.model_validate(answer.body())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer.body()["choices"][0]["text"] == "aé b?"
    assert chunks[0]["choices"][0]["logprobs"]["text_offset"] == [0]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_several_prompts_are_choices_in_their_order() -> None:
    settings = {"n": 2, "logprobs": False, "seed": 0, "stop_ids": (), "token_bytes": TOKENS, "echo": False}
    answer = TextAnswer("c", FACTS, {"p": PROMPT, "q": PROMPT}, **settings)
    usage = Usage(prompt=7, cached=3, completion=1)
    for name in "qp":
        for sample in (1, 0):
            said = FinishedEvent(name=name, sample=sample, reason="length", usage=usage, text=f"{name}{sample}")
            answer.take([TokenEvent(name=name, sample=sample, id=1), said])
    body = answer.body()
    assert [choice["text"] for choice in body["choices"]] == ["p0", "p1", "q0", "q1"]
    assert body["usage"]["prompt_tokens"] == 14 and body["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("cancelled", 503)])
def test_a_request_that_cannot_go_on_is_an_error(reason: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        chat().take([end(reason=reason, message="logits are not finite")])
    assert caught.value.status == status


def test_events_cross_the_link_as_they_are() -> None:
    usage = Usage(prompt=3, cached=1, completion=2, reasoning=1)
    token = TokenEvent(
        name="a", sample=1, id=7, logprob=-0.5, top=((7, -0.5), (9, -1.5)), near_edge=True, text="x", reasoning="y", is_end=True,
    )  # fmt: skip
    assert all(getattr(token, name) != default for name, default in TokenEvent._field_defaults.items())
    events = [
        token, PromptEvent(name="a", logprobs=(-1.0,), top=(((1, -2.0),),)),
        FinishedEvent(name="a", sample=1, reason="stop", usage=usage, stop="end", text="z"),
    ]  # fmt: skip
    state = EngineState(**{field.name: number for number, field in enumerate(fields(EngineState))})
    step = StepFacts(tokens=3, admitted=("a",), encoded=(("image", 0.5),), routing=((1.5, 0.25),))
    assert all(getattr(step, field.name) != field.default for field in fields(StepFacts)), "every field is sent"
    here, there = Pipe()
    for message in (
        Ready(), Happened(events=events, token_bytes={7: b"x"}, state=state, steps=(step,), step_seconds=0.5),
        Happened(events=[], state=state),
    ):  # fmt: skip
        tell(here, message)
        assert told(there) == message
