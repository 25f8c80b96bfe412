"""Sound at any rate to the 16 kHz of the audio encoder, or to a codec's: polyphase filter, Kaiser window (beta 5), scipy's
defaults.
"""

from functools import lru_cache
from math import gcd

import numpy as np
from numpy.typing import NDArray

from megatron_omni.positions import SAMPLE_RATE


def to_sample_rate(samples: NDArray[np.float32], rate: int, *, wanted: int = SAMPLE_RATE) -> NDArray[np.float32]:
    """[samples] at ``rate`` Hz to ``wanted`` Hz; length ceil(n wanted / rate)."""
    if rate == wanted:
        return np.ascontiguousarray(samples, dtype=np.float32)
    from scipy.signal import resample_poly  # here: a tenth of the time of a start, and most sound has the rate

    divisor = gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    return resample_poly(samples, up, down, window=_low_pass(max(up, down))).astype(np.float32, copy=False)


@lru_cache(maxsize=8)
def _low_pass(factor: int) -> NDArray[np.float32]:
    """What resample_poly would design anew at every call."""
    from scipy.signal import firwin

    return firwin(20 * factor + 1, 1.0 / factor, window=("kaiser", 5.0)).astype(np.float32)
