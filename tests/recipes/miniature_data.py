"""Records for recipes in miniature: text, pictures, sound and clips with sound, and a held-out set of which the packed
sequences of a step have different media. Each also has a response that was rejected, for recipes that learn from
preferences; a reward for those that are reinforced is a function of a response's tokens. Speech generators learn spoken
answers with codes of a random codec, in recordings of several pieces. What draws learns from random latents of a random codec
of pictures, from random teachers and random rows of a language model.
"""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_omni.config.data import DataConfig
from megatron_omni.config.generators import CodecConfig, PictureCodecConfig
from megatron_omni.config.model import ModelConfig, VisionConfig
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.codes import write_codes
from megatron_omni.data.picture_arrays import cut_facts, hidden_facts
from megatron_omni.data.row_files import write_rows
from megatron_omni.data.tokenizer import ALL_SPECIALS, CORE_SPECIALS, SPEECH_SPECIALS, train_sentencepiece
from megatron_omni.models.generators.codec import Codec, save_codec
from megatron_omni.models.generators.conv_vae import ConvCodec
from megatron_omni.models.generators.vae_files import save_conv_codec
from megatron_omni.platform.seeds import named_generator
from tests.distributed.tiny_run import WORDS, chat, make_corpus
from tests.unit.media_files import tone, write_scenes

TOKENIZER, MIXED, HELD_OUT, REWARD_FILE = "tokenizer.model", "mixed.jsonl", "held_out.jsonl", "rewards.py"
SPOKEN, SPEECH_TOKENIZER = "spoken.jsonl", "speech.model"
"""The mixed records with spoken answers, and a tokenizer that has the marks for them."""
CODEC, CODES, CODED, CODED_HELD_OUT = "codec", "speech.codes.safetensors", "coded.jsonl", "coded_held_out.jsonl"
"""A codec, codes of recordings by it, and records that name them."""
DRAWING_TOKENIZER, PICTURE_CODEC, DRAWN, DRAWN_HELD_OUT = "drawing.model", "vae", "drawn.jsonl", "drawn_held_out.jsonl"
"""A tokenizer that has the tokens of a block, a codec of pictures, and records that draw."""
DRAWING_VOCABULARY = 336
"""Rows of the vocabulary where there are those tokens."""
DRAWN_SIZES = {"hidden": 32, "task": 8, "caption": 10, "visual": 6}
"""Widths of the language model and of the generator's conditions."""
NUM_CODES = 291
"""Of the codec: codes and marks are the miniature's vocabulary."""
REWARDS = """
def digits(completion_ids, **columns):
    return [sum(ids) % 5 / 4 for ids in completion_ids]
"""
FILLING = " ".join(WORDS)
"""An answer that fills more than half of a packed sequence with its question: no two such samples share one."""


def make_data(directory: Path) -> Path:
    """Write everything below ``directory``."""
    make_corpus(directory)
    (directory / REWARD_FILE).write_text(REWARDS)
    for number in range(4):
        write_scenes(
            directory / f"{number}.mp4", codec="mpeg4", num_frames=8, rate=4, size=(32, 32), sound=clip_sound()
        )
    kinds = {name: _rows(directory / f"{name}.jsonl") for name in ("text", "image", "audio")}
    clips = [chat("<video> what moves", WORDS[i]) | {"videos": [f"{i}.mp4"]} for i in range(4)]
    mixed = [row for rows in zip(*kinds.values(), strict=True) for row in rows]
    _write(directory / MIXED, mixed + clips)
    _write(directory / SPOKEN, [_spoken(row) for row in mixed + clips])
    text = [FILLING] * 40  # few characters: the vocabulary of the miniature is bytes and marks already
    specials = (*CORE_SPECIALS, *SPEECH_SPECIALS)
    train_sentencepiece(text, directory / SPEECH_TOKENIZER, vocab_size=290, specials=specials)
    media: list[dict[str, Any]] = [{}, {"images": ["0.png"]}, {"audios": ["1.wav"]}, {}]
    held_out = []
    for i in range(16):
        kind = media[i % len(media)]
        marker = "".join(f"<{name[:-1]}> " for name in kind)
        held_out.append(chat(f"{marker}repeat {WORDS[i % len(WORDS)]}", FILLING) | kind)
    _write(directory / HELD_OUT, held_out)
    _write_speech(directory)
    _write_drawn(directory)
    return directory


def _write_drawn(directory: Path) -> None:
    """Pictures of two sizes, half of them made from another one, with everything that a stage may read of them."""
    train_sentencepiece([FILLING] * 40, directory / DRAWING_TOKENIZER, vocab_size=325, specials=ALL_SPECIALS)
    codec = ConvCodec(
        PictureCodecConfig(
            channels=[4, 4, 4],
            encoder_blocks=[0, 0, 0],
            decoder_blocks=[0, 0, 0],
            pixel_channels=4,
            latent_scale=0.13025,
        )
    )
    save_conv_codec(codec.eval(), directory / PICTURE_CODEC)
    image = ImageGeneratorConfig(base_size=32)
    generator = torch.Generator().manual_seed(0)
    arrays: dict[str, list[torch.Tensor]] = {name: [] for name in ("latents", "hidden", "task", "caption", "visual")}

    def kept(name: str, *shape: int) -> str:
        arrays[name].append(torch.randn(*shape, generator=generator))
        return f"{name}.safetensors#{len(arrays[name]) - 1}"

    rows = []
    for number in range(32):
        edits, height = number % 2 == 0, (32, 16)[number // 2 % 2]
        Image.new("RGB", (32, height), (8 * number, 100, 100)).save(directory / f"drawn{number}.png")
        marker, sees = ("<image> ", ("target", "source")) if edits else ("", ("target",))
        row = chat(f"{marker}draw {WORDS[number % len(WORDS)]}", f"{FILLING[:6]} <generate>")
        teachers = {"task": kept("task", 1, DRAWN_SIZES["task"]), "caption": kept("caption", 6, DRAWN_SIZES["caption"])}
        hidden = {"rows": kept("hidden", len(image.block), DRAWN_SIZES["hidden"])}
        if edits:
            teachers["visual"] = kept("visual", 4, DRAWN_SIZES["visual"])
            hidden["vision"] = kept("hidden", 4, DRAWN_SIZES["hidden"])
            row |= {"images": [f"drawn{number}.png"]}
        row |= {"targets": [f"drawn{number}.png"], "teachers": teachers, "hidden": hidden}
        rows.append(row | {"latents": {name: kept("latents", 4, height // 8, 4) for name in sees}})
    for name, found in arrays.items():
        kind: Any = name if name in ("latents", "hidden") else "teachers"
        fingerprint = codec.fingerprint if kind == "latents" else name
        about = {"latents": cut_facts(image), "hidden": hidden_facts(_as_they_ask(image))}.get(kind)
        write_rows(directory / f"{name}.safetensors", found, kind=kind, fingerprint=fingerprint, about=about)
    _write(directory / DRAWN, rows[:20])
    _write(directory / DRAWN_HELD_OUT, rows[20:])


def _as_they_ask(image: ImageGeneratorConfig) -> Recipe:
    """What of the miniatures of recipes that draw decides what hidden states mean."""
    vision = VisionConfig(max_tiles_per_side=2)
    data = DataConfig(system_prompt="You are a helpful assistant.")
    return Recipe(model=ModelConfig(vision=vision, image=image), data=data)


def _write_speech(directory: Path) -> None:
    """Recordings of three pieces, each a record: the later ones have the codes before them as prefix."""
    codec = random_codec()
    fingerprint = save_codec(codec, directory / CODEC)
    voices = [
        {"speaker": "Jenny"},
        {"speaker": "Brian", "language": "Chinese"},
        {"style": "A low voice speaks slowly."},
    ]
    generator = torch.Generator().manual_seed(0)
    recordings, rows = [], []
    for number in range(24):
        sizes = [12 + (number + piece) % 9 for piece in range(3)]
        recordings.append(torch.randint(0, NUM_CODES, (sum(sizes),), generator=generator).tolist())
        for piece in range(3):
            said = chat("say it", WORDS[(number + piece) % len(WORDS)])
            start = sum(sizes[:piece])
            said["messages"][-1]["speech"] = {
                **voices[number % 3], "codes": f"{CODES}#{number}", "start": start, "stop": start + sizes[piece],
            }  # fmt: skip
            rows.append(said)
    rate = codec.config.sample_rate / codec.hop_size
    write_codes(directory / CODES, recordings, fingerprint=fingerprint, num_codes=NUM_CODES, codes_per_second=rate)
    _write(directory / CODED, rows[:-18])
    _write(directory / CODED_HELD_OUT, rows[-18:])


def random_codec() -> Codec:
    """40 codes a second of 1600 samples, as many as :data:`NUM_CODES`."""
    config = CodecConfig(
        sample_rate=1600, num_codes=NUM_CODES, code_size=8, strides=[5, 8], num_filters=2, hidden_size=64,
        ffn_hidden_size=32, num_layers=1,
    )  # fmt: skip
    codec = Codec(config)
    codec.draw_weights(lambda name: named_generator(0, name))
    entries = torch.randn(NUM_CODES, 8, generator=named_generator(0, "codes"))
    codec.codebook.start(entries, generator=named_generator(0, "start"))
    return codec.eval()


def _spoken(row: dict[str, Any]) -> dict[str, Any]:
    *before, answer = row["messages"]
    return row | {"messages": [*before, answer | {"speech": {"speaker": "Jenny"}}]}


def clip_sound() -> Any:
    return tone(2.0, rate=48000)


def question(directory: Path) -> dict[str, Any]:
    """A prompt with a picture and a sound."""
    asked = [{"role": "user", "content": "<image> which colour <audio> how high"}]
    return {"messages": asked, "images": [str(directory / "0.png")], "audios": [str(directory / "1.wav")]}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    pairs = (row | {"rejected_response": f"then {WORDS[i % len(WORDS)]}"} for i, row in enumerate(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
