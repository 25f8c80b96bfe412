"""The prompt of a voice or a style, and the codec that belongs to a speech generator."""

from pathlib import Path

import pytest

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.generation.voices import codec_for, prompt_for
from megatron_omni.models.generators.codec import save_codec
from tests.distributed.tiny_speech import tiny_codec

KNOWN = SpeechConfig(voices=["Jenny", "Brian"])


def test_prompts_are_those_of_records() -> None:
    assert prompt_for(KNOWN, "hello", voice="Jenny") == "Language: English; Speaker: Jenny;"
    assert prompt_for(KNOWN, "你好", voice="Brian") == "Language: Chinese; Speaker: Brian;"
    assert prompt_for(KNOWN, "ola", voice="Brian", language="Portuguese") == "Language: Portuguese; Speaker: Brian;"
    assert prompt_for(KNOWN, "hello", style="An old man whispers.") == "An old man whispers."
    assert prompt_for(SpeechConfig(), "hello", voice="Anna") == "Language: English; Speaker: Anna;"


def test_what_is_wrong_is_named_with_the_voices_there_are() -> None:
    for given, said in (
        ({"voice": "Anna"}, "'Anna', which this speech generator has not learned; its voices are Jenny, Brian"),
        ({}, "a voice or a style, one of the two; its voices are Jenny, Brian"),
        ({"voice": "Jenny", "style": "low"}, "one of the two"),
        ({"style": " "}, "style is empty"),
    ):
        with pytest.raises(ValueError, match=said):
            prompt_for(KNOWN, "hello", **given)
    for name in ("", "a; b"):
        with pytest.raises(ValueError, match="no semicolon"):
            prompt_for(SpeechConfig(), "hello", voice=name)


def test_the_codec_is_the_one_that_was_learned(tmp_path: Path) -> None:
    fingerprint = save_codec(tiny_codec(), tmp_path / "codec")
    ours = SpeechConfig(num_codes=32, codec=str(tmp_path / "codec"), codec_fingerprint=fingerprint)
    assert codec_for(ours, None).fingerprint == fingerprint
    assert codec_for(SpeechConfig(num_codes=32), tmp_path / "codec").fingerprint == fingerprint
    with pytest.raises(ValueError, match="names no codec"):
        codec_for(SpeechConfig(), None)
    with pytest.raises(ValueError, match="no such codec folder"):
        codec_for(ours, tmp_path / "other")
    with pytest.raises(ValueError, match=f"its fingerprint is {fingerprint[:12]}"):
        codec_for(SpeechConfig(num_codes=32, codec_fingerprint="0" * 64), tmp_path / "codec")
