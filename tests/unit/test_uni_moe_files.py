"""The processor's files in the released layout: transformers' own classes read them and compute what ours compute."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from jinja2 import Environment
from PIL import Image
from transformers import AutoTokenizer, SiglipImageProcessor, WhisperFeatureExtractor

from megatron_omni.checkpoint.tokenizer_files import NEW_SPECIALS, copy_tokenizer, read_vocabulary
from megatron_omni.checkpoint.uni_moe_files import PREPROCESSOR_FILE, chat_template, preprocessor_config
from megatron_omni.config.model import AudioConfig, ModelConfig, VisionConfig
from megatron_omni.data.processors import image_tiles, log_mel
from megatron_omni.data.record import Message
from megatron_omni.data.template import MediaSpans, render
from megatron_omni.data.tokenizer import load_tokenizer
from megatron_omni.models.encoders.vision import normalised
from megatron_omni.positions import PositionRule
from tests.unit.dense_checkpoints import FIRST_NEW, write_tokenizer


def write_processor(directory: Path, model: ModelConfig) -> None:
    (directory / PREPROCESSOR_FILE).write_text(json.dumps(preprocessor_config(model)))


def rendered(template: str, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
    text: str = Environment().from_string(template).render(messages=messages, add_generation_prompt=prompt)
    return text


def test_the_image_processor_gives_our_tiles(tmp_path: Path) -> None:
    write_processor(tmp_path, ModelConfig())
    processor = SiglipImageProcessor.from_pretrained(tmp_path)
    noise = numpy.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=numpy.uint8)
    theirs = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    ours, grid = image_tiles(Image.fromarray(noise), VisionConfig())
    assert grid == (1, 1) and theirs.shape == ours.shape == (1, 3, 384, 384)
    torch.testing.assert_close(theirs, normalised(ours), rtol=0, atol=1e-6)
    # How the published code asks for the side of a tile.
    fields = json.loads((tmp_path / PREPROCESSOR_FILE).read_text())
    assert fields["size"][0] == fields["crop_size"]["height"] == 384


def test_the_feature_extractor_gives_our_log_mel(tmp_path: Path) -> None:
    write_processor(tmp_path, ModelConfig())
    extractor = WhisperFeatureExtractor.from_pretrained(tmp_path)
    wave = (0.1 * numpy.random.default_rng(0).standard_normal(16_000 * 3)).astype(numpy.float32)
    theirs = torch.from_numpy(extractor(wave, sampling_rate=16_000, return_tensors="np").input_features)
    ours = log_mel(wave, AudioConfig())
    assert theirs.shape == ours.shape == (1, 128, 3000)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_the_chat_template_is_chatml_with_text_alone() -> None:
    assert preprocessor_config(ModelConfig(vision=None, audio=None)) == {}
    turn = {
        "role": "user",
        "content": [{"type": "text", "text": "<image>\nwhat?"}, {"type": "image", "image": "a.png"}],
    }
    for template in (chat_template(""), chat_template("be quick")):  # a turn of the conversation's own comes first
        assert rendered(template, [{"role": "system", "content": "be kind"}, turn], prompt=True) == (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_tools_are_refused_with_a_way_out() -> None:
    """transformers gives templates ``raise_exception``."""

    def refuse(said: str) -> None:
        raise ValueError(said)

    template = Environment().from_string(chat_template("be kind"))
    question = {"role": "user", "content": "?"}
    for given in ({"messages": [question, {"role": "tool", "content": "3"}]}, {"messages": [question], "tools": [{}]}):
        with pytest.raises(
            ValueError, match=r"turns of tools are not supported: write a call as text of the assistant"
        ):
            template.render(given, raise_exception=refuse)


def published_labels(text: str) -> list[str]:
    """What the published processor learns of a rendered conversation, by its rule: it cuts at the starts of turns, passes
    over the first, which it takes for the system's, then takes a question and an answer each time."""
    turns = text.split("<|im_start|>")[1:]
    assert turns[0].startswith("system\n"), "IndexError there: what it takes for the question is the answer"
    learned = []
    for question, answer in zip(turns[1::2], turns[2::2], strict=True):
        assert question.startswith("user\n") and answer.startswith("assistant\n")
        learned.append(answer.removeprefix("assistant\n").removesuffix("\n"))
    return learned


@pytest.mark.parametrize(
    "prompt", ["You are a helpful assistant.", 'é 🦜 "quoted" \\n it\'s {{ x }} {% y %}\nnew line']
)
def test_the_published_processor_works_on_a_conversation_without_a_system_turn(tmp_path: Path, prompt: str) -> None:
    """And what it sees is what training saw, token for token."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    turns = [("user", "hi?"), ("assistant", "hello"), ("user", "and?"), ("assistant", "so")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = rendered(chat_template(prompt), messages)
    assert published_labels(text) == ["hello<|im_end|>", "so<|im_end|>"]
    with pytest.raises(AssertionError, match="IndexError"):
        published_labels(rendered(chat_template(""), messages))
    rule = PositionRule.from_config(ModelConfig(vision=None, audio=None))
    trained = render(
        [Message(role, content) for role, content in turns],
        MediaSpans(),
        tokenizer=tokenizer,
        rule=rule,
        system_prompt=prompt,
    )
    assert tokenizer.decode(trained.input_ids, skip_special=False) == text


def test_the_copied_tokenizer_has_the_new_tokens_for_transformers_too(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source")
    copy_tokenizer(source, tmp_path / "copy")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    before, after = read_vocabulary(source), read_vocabulary(tmp_path / "copy")
    assert before.specials == after.specials and not after.appended and set(before.appended) == set(NEW_SPECIALS)
    for name, token_id in before.appended.items():
        assert theirs.convert_tokens_to_ids(name) == token_id >= FIRST_NEW
        assert theirs(f"a{name}b").input_ids[1] == token_id
