"""What stands beside the weights in the released layout: the processor's files, as ``Qwen2VLProcessor`` reads them.

``preprocessor_config.json`` is read twice, by the SigLIP image processor and by the Whisper feature extractor, so it holds
the fields of both; ``size`` is a pair there, which is how the published code asks for the side of a tile. The chat
template renders turns as ``data/template.py`` does: a turn's text holds its media markers, which the caller replaces by
placeholders afterwards.
"""

import json
from typing import Any

from megatron_omni.config.model import ModelConfig
from megatron_omni.positions import SAMPLE_RATE

PROCESSOR = "Qwen2VLProcessor"
PREPROCESSOR_FILE, TEMPLATE_FILE = "preprocessor_config.json", "chat_template.json"
BICUBIC = 3
"""Pillow's number for it."""
N_FFT, HOP_SAMPLES = 400, 160
REFUSED_TOOLS = (
    "turns of tools are not supported: write a call as text of the assistant, its result as the next user turn"
)
TURNS = (
    "{% if tools %}{{ raise_exception('" + REFUSED_TOOLS + "') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('"
    + REFUSED_TOOLS
    + "') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_template(system_prompt: str) -> str:
    """Turns as ``data/template.py`` writes them: ``system_prompt``, unless empty, before a conversation without one.

    The published processor masks labels turn by turn, as system, user, assistant, and fails where the first is no
    system turn.
    """
    first = ""
    if system_prompt:
        turn = json.dumps(f"<|im_start|>system\n{system_prompt}<|im_end|>\n", ensure_ascii=False)
        first = "{% if messages[0]['role'] != 'system' %}{{ " + turn + " }}{% endif %}"
    return first + TURNS


def preprocessor_config(model: ModelConfig) -> dict[str, Any]:
    """Fields of the image processor and the feature extractor; empty for a ``model`` without encoders."""
    if model.vision is None and model.audio is None:
        return {}
    config: dict[str, Any] = {"processor_class": PROCESSOR}
    if model.vision is not None:
        side = model.vision.image_size
        config |= {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "size": [side, side],
            "crop_size": {"height": side, "width": side},
            "resample": BICUBIC,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_convert_rgb": True,
        }
    if model.audio is not None:
        seconds = model.audio.chunk_seconds
        config |= {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": model.audio.num_mel_bins,
            "sampling_rate": SAMPLE_RATE,
            "hop_length": HOP_SAMPLES,
            "chunk_length": int(seconds) if seconds == int(seconds) else seconds,
            "n_fft": N_FFT,
            "n_samples": round(seconds * SAMPLE_RATE),
            "nb_max_frames": round(seconds * SAMPLE_RATE) // HOP_SAMPLES,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
        }
    return config
