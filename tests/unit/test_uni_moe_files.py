"""The processor's files in the released layout: transformers' own classes read them and compute what ours compute."""

import json
from pathlib import Path

import numpy
import torch
from jinja2 import Environment
from PIL import Image
from transformers import AutoTokenizer, SiglipImageProcessor, WhisperFeatureExtractor

from megatron_omni.checkpoint.tokenizer_files import NEW_SPECIALS, copy_tokenizer, read_vocabulary
from megatron_omni.checkpoint.uni_moe_files import PREPROCESSOR_FILE, TEMPLATE_FILE, write_processor
from megatron_omni.config.model import AudioConfig, ModelConfig, VisionConfig
from megatron_omni.data.processors import image_tiles, log_mel
from tests.unit.dense_checkpoints import FIRST_NEW, write_tokenizer


def test_the_image_processor_gives_our_tiles(tmp_path: Path) -> None:
    write_processor(tmp_path, ModelConfig())
    processor = SiglipImageProcessor.from_pretrained(tmp_path)
    noise = numpy.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=numpy.uint8)
    theirs = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    ours, grid = image_tiles(Image.fromarray(noise), VisionConfig())
    assert grid == (1, 1) and theirs.shape == ours.shape == (1, 3, 384, 384)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
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


def test_the_chat_template_is_chatml_with_text_alone(tmp_path: Path) -> None:
    write_processor(tmp_path, ModelConfig(vision=None, audio=None))
    assert not (tmp_path / PREPROCESSOR_FILE).exists()
    template = json.loads((tmp_path / TEMPLATE_FILE).read_text())["chat_template"]
    turn = {
        "role": "user",
        "content": [{"type": "text", "text": "<image>\nwhat?"}, {"type": "image", "image": "a.png"}],
    }
    messages = [{"role": "system", "content": "be kind"}, turn]
    text = Environment().from_string(template).render(messages=messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_copied_tokenizer_has_the_new_tokens_for_transformers_too(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source")
    copy_tokenizer(source, tmp_path / "copy")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    before, after = read_vocabulary(source), read_vocabulary(tmp_path / "copy")
    assert before.specials == after.specials and not after.appended and set(before.appended) == set(NEW_SPECIALS)
    for name, token_id in before.appended.items():
        assert theirs.convert_tokens_to_ids(name) == token_id >= FIRST_NEW
        assert theirs(f"a{name}b").input_ids[1] == token_id
