"""Pictures as PNG files that say how they were drawn.

    tEXt/iTXt   prompt           what was asked, as text
                megatron_omni    JSON: seed, steps, guidance, size, model and so on

Programs that show a picture's text find both; :func:`facts_of` reads them back.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from megatron_omni.checkpoint.commit import write_bytes
from megatron_omni.foreign import parse_json

PROMPT, FACTS = "prompt", "megatron_omni"
_MOST_CHARACTERS = 100_000
"""Of a prompt in a picture."""


def png_bytes(pixels: Tensor, facts: Mapping[str, Any], *, prompt: str = "") -> bytes:
    """A PNG file of ``pixels`` [3, H, W] uint8, drawn in sRGB."""
    info = PngImagePlugin.PngInfo()
    if prompt:
        info.add_itxt(PROMPT, prompt[:_MOST_CHARACTERS].replace("\0", ""))
    info.add_itxt(FACTS, json.dumps(facts, ensure_ascii=False))
    data = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def write_png(file: str | Path, pixels: Tensor, facts: Mapping[str, Any], *, prompt: str = "") -> None:
    """The same as a file, which is there whole or not at all."""
    write_bytes(Path(file), png_bytes(pixels, facts, prompt=prompt))


def facts_of(file: str | Path) -> tuple[str, dict[str, Any]]:
    """(prompt, facts) of a picture that was written here; ValueError for another one."""
    with Image.open(file) as image:
        text = image.info
        if FACTS not in text:
            raise ValueError(f"{file}: says nothing of how it was drawn ({FACTS})")
        return str(text.get(PROMPT, "")), parse_json(str(text[FACTS]).encode(), f"{file}: {FACTS}")
