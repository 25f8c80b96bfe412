"""A model that answers in spoken turns, a speech generator and a codec, all small enough to be trained for a test."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.data.tokenizer import ALL_SPECIALS, train_sentencepiece
from megatron_omni.models.generators.codec import Codec, save_codec
from megatron_omni.platform.seeds import named_generator
from tests.distributed.tiny_run import run_tiny, tiny_values
from tests.distributed.tiny_speech import tiny_codec

VOICES = ("Jenny", "Brian")
WORDS = ("red", "green")
"""Each is asked for in the voice of the same place."""
REQUEST = "as {voice}"
"""``data.voice_request`` of the model."""
VOCAB_SIZE = 336
SPEECH = {
    "num_codes": 32, "text_vocab_size": VOCAB_SIZE, "text_hidden_size": 20, "prefix_codes": 6, "least_prefix_codes": 3,
    "max_codes": 60, "min_split_tokens": 2, "max_split_tokens": 4, "voices": list(VOICES),
}  # fmt: skip


@dataclass(frozen=True)
class Speaking:
    """Run directories, and the folder of the codec."""

    model: Path
    speaker: Path
    codec: Path


def make_speaking(folder: Path) -> Speaking:
    """The model writes ``<|speech_start|>Language: English; Speaker: VOICE;<|speech_prompt|>WORD<|speech_end|>`` for
    "say WORD" and the request for a voice; what the speech generator makes of it is random, and the same each time."""
    prompts = [f"Language: English; Speaker: {voice};" for voice in VOICES]
    text = [*prompts, *(REQUEST.format(voice=voice) for voice in VOICES), "user assistant say blue", *WORDS]
    tokenizer = train_sentencepiece(text * 40, folder / "t.model", vocab_size=VOCAB_SIZE, specials=ALL_SPECIALS)
    said = [_row(f"say {word}\n{REQUEST.format(voice=voice)}", word, voice) for word, voice in zip(WORDS, VOICES)]
    _train(folder / "model", tokenizer, said, steps=70, data={"voice_request": REQUEST}, lr=1e-2)
    codes = [_row("say", word, voice, codes=list(range(12))) for word in WORDS for voice in VOICES]
    model = {
        "vocab_size": 41, "output_bias": True, "speech": SPEECH, "init_method_std": 0.3, "rotary_base": 1e4,
        "mrope_section": [4, 0, 0],
    }  # fmt: skip
    _train(folder / "speaker", tokenizer, codes, steps=1, model=model)
    save_codec(_codec(), folder / "codec")
    return Speaking(folder / "model", folder / "speaker", folder / "codec")


def _codec() -> Codec:
    """Random: 1600 samples a second, 40 a code."""
    codec = Codec(replace(tiny_codec().config, sample_rate=1600, strides=[5, 8], hidden_size=64, ffn_hidden_size=64))
    codec.draw_weights(lambda name: named_generator(0, name))
    drawn = torch.randn(32, codec.config.code_size, generator=named_generator(0, "codes"))
    codec.codebook.start(drawn, generator=named_generator(0, "start"))
    return codec.eval()


def _row(question: str, answer: str, voice: str, **speech: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": answer, "speech": {"speaker": voice, **speech}}
    return {"messages": [{"role": "user", "content": question}, said]}


def _train(
    run_dir: Path,
    tokenizer: Path,
    rows: list[dict[str, Any]],
    *,
    steps: int,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    lr: float = 2e-3,
) -> None:
    file = run_dir.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = json.loads(json.dumps(tiny_values()))
    values |= {"run_dir": str(run_dir), "train_iters": steps}
    values["model"] |= {"vision": None, "audio": None, "moe": None, "vocab_size": VOCAB_SIZE} | (model or {})
    values["data"] |= {"sources": [{"name": "said", "path": str(file)}], "tokenizer": str(tokenizer)} | (data or {})
    values["log"]["interval"] = steps
    values["optim"] |= {"lr": lr, "lr_decay_iters": steps}
    if steps < 2:
        values["optim"]["lr_warmup_iters"] = 0
    run_tiny(recipe_from_dict(values), 1)
