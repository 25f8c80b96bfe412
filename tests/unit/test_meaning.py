"""What gives weights their meaning is compared, every field of it, and nothing that a later stage may choose."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.checkpoint.meaning import FREE, MEDIA_POSITIONS, changes, check_handover
from megatron_omni.config.generators import CodecConfig, PictureCodecConfig, SpeechConfig
from megatron_omni.config.load import all_fields
from megatron_omni.config.model import LoraConfig, ModelConfig
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.data.tokenizer import train_sentencepiece

MODEL = ModelConfig(
    lora=LoraConfig(),
    speech=SpeechConfig(codec_fingerprint="of one"),
    codec=CodecConfig(),
    picture_codec=PictureCodecConfig(),
    image=ImageGeneratorConfig(vae_fingerprint="of one", hidden_fingerprint="of one"),
)
FIELDS = [name for name in all_fields() if name.startswith("model.")]


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value + 1
    if isinstance(value, list):
        return value[::-1] if value != value[::-1] else [*value, 1]
    return {"x": 1} if isinstance(value, dict) else "other"


def with_field(config: Any, name: str, value: Any) -> Any:
    """``config`` with the field ``name``, dotted, below the first word, set to ``value``."""
    _, first, *below = name.split(".")
    inside = with_field(getattr(config, first), ".".join([first, *below]), value) if below else value
    return dataclasses.replace(config, **{first: inside})


def field_of(model: ModelConfig, name: str) -> Any:
    value: Any = model
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_compared_or_named_as_free(name: str) -> None:
    changed = with_field(MODEL, name, another(field_of(MODEL, name)))
    found = [change.field for change in changes(changed, MODEL)]
    free = name in FREE or name.rpartition(".")[0] in FREE or name == "model.ffn_hidden_size"
    assert found == ([] if free else [name])
    dense = [dataclasses.replace(model, moe=None) for model in (changed, MODEL)]
    if name == "model.ffn_hidden_size":
        assert [change.field for change in changes(*dense)] == [name]


def test_the_list_names_what_exists_and_what_findings_named_is_compared() -> None:
    assert FREE - {"model.lora", "model.image.sampling"} <= set(FIELDS) and set(FIELDS) >= MEDIA_POSITIONS
    named = {"rotary_base", "mrope_section", "rope_theta_seconds", "layernorm_epsilon", "audio_only_1d"}
    assert not {f"model.{name}" for name in named} & FREE


def test_parts_that_one_side_lacks_are_no_change_and_text_knows_no_media_positions() -> None:
    text = dataclasses.replace(MODEL, vision=None, audio=None, moe=None, lora=None)
    assert changes(MODEL, text) == changes(text, MODEL) == []
    assert changes(dataclasses.replace(MODEL, rope_theta_seconds=7.0), text) == []
    assert [c.field for c in changes(dataclasses.replace(text, rope_theta_seconds=7.0), MODEL)] == [
        "model.rope_theta_seconds"
    ]


def test_numbers_that_were_written_with_fewer_digits_are_equal() -> None:
    assert changes(dataclasses.replace(MODEL, layernorm_epsilon=9.999999999e-7), MODEL) == []


def test_a_handover_names_field_values_and_both_ways_out(tmp_path: Path) -> None:
    texts = {"a": "the quick brown fox jumps over the lazy dog", "b": "pack my box with five dozen liquor jugs"}
    for name, text in texts.items():
        train_sentencepiece([text] * 20, tmp_path / f"{name}.model", vocab_size=294)
    a, b = tmp_path / "a.model", tmp_path / "b.model"
    now = dataclasses.replace(MODEL, rotary_base=1e4)
    with pytest.raises(ValueError, match=r"model.rotary_base=10000.0: the weights of run/x were made with 1000000.0.*set "
                       r"it back, or name model.rotary_base in init_allow_changed"):  # fmt: skip
        check_handover(now, MODEL, tokenizers=(None, None), origin="run/x")
    check_handover(now, MODEL, tokenizers=(None, None), origin="run/x", allowed=["model.rotary_base"])
    with pytest.raises(ValueError, match=rf"data.tokenizer='{b}': .*another tokenizer than {a}.*; set it to '{a}', or name "
                       r"data.tokenizer in init_allow_changed"):  # fmt: skip
        check_handover(MODEL, MODEL, tokenizers=(b, a), origin="run/x")
    check_handover(MODEL, MODEL, tokenizers=(b, a), origin="run/x", allowed=["data.tokenizer"])
