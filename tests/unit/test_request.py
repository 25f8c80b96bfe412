"""Requests that cannot be answered are refused by the name of the field, before anything is computed."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_omni.generation.request import Request, Sampling, check_ids


def request(**settings: Any) -> Request:
    prompt: Any = SimpleNamespace(length=7)
    return Request(**({"name": "a", "prompt": prompt, "max_new_tokens": 5} | settings))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"name": ""}, "name"),
        ({"prompt": SimpleNamespace(length=0)}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 6}, "min_new_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x" * 257,)}, "stop"),
        ({"stop": ("x",) * 17}, "stop"),
        ({"stop_ids": (-1,)}, "stop_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
def test_bad_fields_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        request(**settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"top_k": 5}, "temperature is 0"),
        ({"min_p": 0.1}, "temperature is 0"),
    ],
)
def test_bad_sampling_is_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**settings)


def test_tokens_that_are_not_in_the_vocabulary_are_named() -> None:
    check_ids([0, 9], 10, "prompt")
    with pytest.raises(ValueError, match="prompt has token 10; ids of this vocabulary are 0 to 9"):
        check_ids([3, 10], 10, "prompt")


def test_penalties_make_a_choice_depend_on_the_answer() -> None:
    assert not Sampling(temperature=1.0, top_k=3).penalised
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", 0.5), ("frequency_penalty", -0.5)):
        assert Sampling(**{name: value}).penalised


def test_stop_texts_ask_for_text() -> None:
    assert not request().has_text
    assert request(stop=("\n",)).has_text and request(text=True).has_text and request(reasoning=True).has_text
    assert request().num_tokens == 12
