"""Media files to arrays: one interface, two back ends (``data.decoder`` of a recipe).

    cpu     Pillow, soundfile, PyAV: reads everything, and is the reference (cpu.py; container.py is its FFmpeg part)
    dali    NVIDIA DALI, on the GPU where there is one; what DALI cannot read goes to the CPU back end, file by file,
            counted and logged (dali.py)

Headers are read by the CPU functions ``probe_*`` whatever the back end: sizes must not depend on it.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_omni.data.decode import cpu
from megatron_omni.data.decode.media import MAX_AUDIO_SECONDS, Frame, FrameSampling, Media, Video


class Decoder(Protocol):
    """What decodes. Every method raises MediaError for a file that cannot be used; threads may share a decoder."""

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """Files that were left to the CPU back end, by reason."""

    def decode_image(self, file: Media) -> Image.Image:
        """The picture as 8-bit RGB, upright."""

    def decode_audio(self, file: Media, *, max_seconds: float = MAX_AUDIO_SECONDS) -> NDArray[np.float32]:
        """[samples] float32 mono 16 kHz."""

    def decode_video(
        self,
        file: Media,
        *,
        sampling: FrameSampling,
        max_sound_seconds: float = MAX_AUDIO_SECONDS,
        keep: Callable[[Frame], Frame] | None = None,
    ) -> Video:
        """Sampled frames with their true times, and the sound that goes with them.

        ``keep`` makes of each frame what is kept of it, before the next one is converted: memory then holds one frame
        of full size, however large and many they are.
        """


def open_decoder(name: Literal["cpu", "dali"]) -> Decoder:
    """The back end of this name; ValueError where it is not installed."""
    if name == "cpu":
        return cpu
    try:
        from megatron_omni.data.decode.dali import DaliDecoder
    except ImportError as error:
        raise ValueError(
            f"data.decoder = 'dali': NVIDIA DALI cannot be imported ({error}); install the extra "
            "(pip install 'megatron-omni[dali]') or set data.decoder = cpu"
        ) from error
    return DaliDecoder()
