"""Bodies of requests: what is accepted, and one short error with the path of the field for everything else."""

from typing import Any

import pytest

from megatron_omni.serve.errors import ApiError
from megatron_omni.serve.schema import ChatRequest, CompletionRequest, parse

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER]} | fields


def refusal(model: Any, body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(model, body)
    assert caught.value.status == 400 and len(caught.value.message) < 700
    return caught.value


def test_what_openais_client_sends_is_accepted() -> None:
    body = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "data:,x", "detail": "auto"}},
                {"type": "text", "text": "what?"},
                {"type": "input_audio", "input_audio": {"data": "eA==", "format": "mp3"}},
                {"type": "audio_url", "audio_url": {"url": "data:,x"}},
                {"type": "video_url", "video_url": {"url": "data:,x"}},
            ]},
            {"role": "assistant", "content": "a cat", "refusal": None, "reasoning_content": "hm", "tool_calls": []},
            USER,
        ],
        max_completion_tokens=5, stop="x", n=2, logprobs=True, top_logprobs=3, stream=True, seed=-4, temperature=1,
        stream_options={"include_usage": True}, tools=[], store=False, response_format={"type": "text"}, user="me",
        presence_penalty=None, chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    wanted = parse(ChatRequest, body)
    assert (wanted.max_new_tokens, wanted.stops, wanted.num_top_logprobs, wanted.temperature) == (5, ("x",), 3, 1.0)
    assert wanted.chat_template_kwargs.enable_thinking is False
    assert wanted.presence_penalty == 0.0 and wanted.include_usage


BAD = {
    "unknown in the template's": ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking", "did you mean"),
    "unknown field": ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    "unknown in a part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "x"}}]}]},
        "messages[0].content[0].image_url.uri", "did you mean 'url'?",
    ),
    "unknown in a message": ({"messages": [USER | {"contents": "x"}]}, "messages[0].contents", "did you mean 'content'?"),
    "text for a number": ({"temperature": "0.5"}, "temperature", "valid number"),
    "true for a number": ({"n": True}, "n", "valid integer"),
    "too hot": ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    "not a number": ({"temperature": float("nan")}, "temperature", "less than or equal to 2"),
    "top_p of 0": ({"top_p": 0}, "top_p", "greater than 0"),
    "many answers": ({"n": 9}, "n", "less than or equal to 8"),
    "a huge seed": ({"seed": 1 << 70}, "seed", ""),
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "messages of text": ({"messages": "hi"}, "messages", "valid list"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "'user'"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]", "'image_url'"),
    "a picture in a system turn": (
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, USER]},
        "messages[0].content[0].image_url", "known are type, text",
    ),
    "detail": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "low"}}]}]},
        "messages[0].content[0].image_url.detail", "auto",
    ),
    "ends with an answer": ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages", "must be the user's"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
    "a schema": ({"response_format": {"type": "json_schema"}}, "response_format.type", "text"),
    "bias": ({"logit_bias": {"1": 2}}, "logit_bias", "is not supported"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "at least 1"),
    "five stops": ({"stop": ["a"] * 5}, "stop", "at most 4"),
    "an empty stop": ({"stop": ""}, "stop", "1 to 256 characters"),
    "top of nothing": ({"top_logprobs": 3}, "top_logprobs", '"logprobs": true'),
    "usage of no stream": ({"stream_options": {"include_usage": True}}, "stream_options", '"stream": true'),
    "least above most": ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "above the 4"),
    "stored sound": ({"messages": [USER, {"role": "assistant", "content": "x", "audio": {"id": "a"}}, USER]},
                     "messages[1].audio", "stores nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_field_is_named(name: str) -> None:
    fields, param, said = BAD[name]
    error = refusal(ChatRequest, chat(**fields))
    assert error.param == param, error.message
    assert said in error.message and error.param in error.message
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [[], None, 3, "x"])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert "must be a JSON object" in refusal(ChatRequest, body).message


def test_unknown_fields_can_be_dropped() -> None:
    body = chat(extra=1, messages=[USER | {"more": 2}])
    assert parse(ChatRequest, body, ignore_unknown=True).messages[0].content == "hi"


def test_thousands_of_errors_are_a_short_message() -> None:
    error = refusal(ChatRequest, chat(messages=[{"role": "user", "content": i} for i in range(4000)]))
    assert error.param == "messages[0].content" and "more" in error.message
    refusal(ChatRequest, chat(**{"x" * 100_000: 1}))
    refusal(ChatRequest, chat(messages=[{"role": "x" * 100_000}]))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_of_completions(prompt: Any, prompts: list[Any]) -> None:
    wanted = parse(CompletionRequest, {"model": "m", "prompt": prompt})
    assert wanted.prompts == prompts and wanted.max_new_tokens == 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"max_tokens": 0}, "max_tokens"), ({"echo": True, "stream": True}, "echo"), ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"), ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
    ],
)  # fmt: skip
def test_bad_completions_are_named(fields: dict[str, Any], param: str) -> None:
    assert refusal(CompletionRequest, {"model": "m", "prompt": "a"} | fields).param == param
