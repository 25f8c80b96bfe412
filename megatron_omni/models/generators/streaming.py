"""Sound while codes arrive. The decoder sees its whole input (its GroupNorms and attention span it), so a window of it is
decoded instead, with codes on both sides as context:

    window k decodes codes [a - left, a + W + right), a = k W, and gives the sound of [a, a + W)

The first code of each window is faded from what the window before made of it (its first code of right context) to the
new one, linearly over a hop, so that there is no step. Against the whole decode the difference is stated as signal to noise
(docs/speech.md). What fits into one window is decoded whole, the same bits as ``Codec.decode``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_omni.models.generators.codec import Codec

LEFT_CODES, WINDOW_CODES, RIGHT_CODES = 40, 40, 10


class StreamingDecoder:
    """Codes of one sound in, pieces of its samples out; in all exactly ``hop`` samples a code."""

    def __init__(
        self, codec: "Codec", *, left: int = LEFT_CODES, window: int = WINDOW_CODES, right: int = RIGHT_CODES
    ) -> None:
        if left < 0 or window < 1 or right < 1:
            raise ValueError(f"left={left}, window={window}, right={right}: expected at least 0, 1 and 1 codes")
        self.codec, self.left, self.window, self.right = codec, left, window, right
        self._codes: list[int] = []
        """From ``left`` before the first code whose sound is not out yet."""
        self._context = 0
        """How many of them are context."""
        self._tail: Tensor | None = None
        """What the last window made of the next code, [hop]."""

    def push(self, codes: Sequence[int] | Tensor) -> Tensor:
        """Take the next ``codes``; the samples [n] that are ready, on the CPU in fp32, often none."""
        added = [int(code) for code in codes]
        self.codec.check_codes(torch.tensor([added], dtype=torch.int64))
        self._codes += added
        pieces = []
        while len(self._codes) - self._context >= self.window + self.right:
            pieces.append(self._decode(self.window))
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def finish(self) -> Tensor:
        """The samples of the codes that are left; the decoder is then as new."""
        count = len(self._codes) - self._context
        wave = self._decode(count) if count else torch.zeros(0)
        self._codes, self._context, self._tail = [], 0, None
        return wave

    def _decode(self, count: int) -> Tensor:
        """Sound of the next ``count`` codes."""
        device, hop = self.codec.codebook.embed.device, self.codec.hop_size
        some = self._codes[: self._context + count + self.right]
        wave = self.codec.decode(torch.tensor([some], device=device))[0].float().cpu()
        first, last = self._context * hop, (self._context + count) * hop
        piece, after = wave[first:last].clone(), wave[last : last + hop].clone()
        if self._tail is not None:
            rising = (torch.arange(hop) + 0.5) / hop
            piece[:hop] = piece[:hop] * rising + self._tail * (1 - rising)
        self._tail = after
        dropped = max(0, self._context + count - self.left)
        self._codes, self._context = self._codes[dropped:], min(self._context + count, self.left)
        return piece
