"""A speech generator and a codec small enough for tests, and micro-batches of speech."""

from dataclasses import replace

import torch

from megatron_omni.batch import OmniBatch
from megatron_omni.config.generators import CodecConfig, SpeechConfig
from megatron_omni.config.model import ModelConfig, MoEConfig
from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample
from megatron_omni.data.speech_sequence import speech_sample
from megatron_omni.models.generators.codec import Codec
from megatron_omni.platform.seeds import named_generator

SPEECH = SpeechConfig(num_codes=32, text_vocab_size=24, text_hidden_size=20)
DENSE = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    mrope_section=[4, 0, 0], rotary_base=1e4, vocab_size=SPEECH.ids.num_outputs, make_vocab_size_divisible_by=8,
    init_method_std=0.3, output_bias=True, moe=None, vision=None, audio=None, speech=SPEECH,
)  # fmt: skip
"""Wide weights: attention then weighs keys unevenly, and a wrong one shows."""
TOP_2 = MoEConfig(
    num_routed_experts=4, num_null_experts=0, num_shared_experts=0, top_k=2, moe_ffn_hidden_size=48, sample_experts=False,
    gradient_estimator="none", input_jitter=0.0,
)  # fmt: skip
MIXTURE = replace(DENSE, moe=TOP_2)
SIZES = {"short": [(2, 0, 3, 4), (1, 3, 2, 6)], "long": [(3, 5, 4, 8)], "empty": [(0, 0, 1, 1), (2, 2, 5, 9)]}
"""Micro-batches of samples: tokens of prompt, prefix, text and codes."""


def said(prompt: int, prefix: int, text: int, codes: int, *, seed: int = 0) -> dict[str, list[int]]:
    """So many tokens of each, at random."""
    generator = torch.Generator().manual_seed(seed)
    words, sounds = SPEECH.text_vocab_size, SPEECH.num_codes
    sizes = {"prompt": (prompt, words), "prefix": (prefix, sounds), "text": (text, words), "codes": (codes, sounds)}
    return {name: torch.randint(0, below, (n,), generator=generator).tolist() for name, (n, below) in sizes.items()}


def speech(prompt: int, prefix: int, text: int, codes: int, *, seed: int = 0) -> Sample:
    """The sample of :func:`said`."""
    return speech_sample(SPEECH.ids, **said(prompt, prefix, text, codes, seed=seed))


def batch_of(name: str, *, packed: bool = False) -> OmniBatch:
    """The micro-batch ``name`` of :data:`SIZES`, padded to 24 tokens or 48; ``packed``: in one sequence."""
    first = 10 * list(SIZES).index(name)
    samples = [speech(*sizes, seed=first + i) for i, sizes in enumerate(SIZES[name])]
    return collate(
        samples,
        pad_id=SPEECH.ids.padding,
        sample_ids=range(first, first + len(samples)),
        row_of=[0] * len(samples) if packed else None,
        multiple_of=24,
    )


def tiny_codec(num_codes: int = SPEECH.num_codes) -> Codec:
    """A random codec: 1600 samples a second, 16 a code."""
    config = CodecConfig(
        sample_rate=1600, num_codes=num_codes, code_size=8, strides=[4, 4], num_filters=2, hidden_size=64, ffn_hidden_size=32,
        num_layers=1,
    )  # fmt: skip
    codec = Codec(config)
    codec.draw_weights(lambda name: named_generator(0, name))
    codec.codebook.start(
        torch.randn(num_codes, 8, generator=named_generator(0, "codes")), generator=named_generator(0, "start")
    )
    return codec.eval()
