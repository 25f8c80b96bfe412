"""What a speech generator's checkpoint knows of its data: voices and codec."""

import json
from pathlib import Path

import pytest

from megatron_omni.checkpoint.meaning import changes
from megatron_omni.config.data import DataConfig, SourceConfig
from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.codes import write_codes
from megatron_omni.data.speech_known import known_from_data


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_codes(
        tmp_path / "a.codes.safetensors", [[1, 2, 3]], fingerprint="ab" * 32, num_codes=8, codes_per_second=40.0
    )
    voices = [{"speaker": "Zoe", "codes": "a.codes.safetensors#0"}, {"style": "low"}, {"speaker": "Anna"}, "damaged"]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "speech": voice}]}
        for voice in voices
    ]
    rows += [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [SourceConfig(name="a", path=str(tmp_path / "a.jsonl"))]
    return Recipe(model=ModelConfig(speech=SpeechConfig(num_codes=8)), data=DataConfig(sources=sources))


def test_voices_and_codec_are_those_of_the_records(recipe: Recipe, tmp_path: Path) -> None:
    assert known_from_data(recipe) == (["Anna", "Zoe"], "ab" * 32)
    assert recipe.model.speech is not None
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "codec.json").write_text(json.dumps({"fingerprint": "cd" * 32}))
    recipe.model.speech.codec = str(tmp_path / "codec")
    assert known_from_data(recipe) == (["Anna", "Zoe"], "cd" * 32)


def test_weights_that_name_no_codec_keep_their_meaning() -> None:
    def model(fingerprint: str | None) -> ModelConfig:
        return ModelConfig(speech=SpeechConfig(codec_fingerprint=fingerprint))

    assert changes(model("a"), model(None)) == changes(model(None), model("a")) == []
    assert [change.field for change in changes(model("a"), model("b"))] == ["model.speech.codec_fingerprint"]
