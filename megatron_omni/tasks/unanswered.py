"""A reward's service that does not answer: the run leaves to be started again, but not for ever.

A count in the run directory survives the starts; an iteration whose rewards came ends it.
"""

from pathlib import Path

import torch.distributed as dist

from megatron_omni.checkpoint.run_dir import UNANSWERED
from megatron_omni.foreign import read_text
from megatron_omni.parallel.sharing import from_rank_0
from megatron_omni.training.task import Interrupted

SHARE_LIMIT = 0.05
"""Of responses that got no score after all tries, above which an iteration is not trained on."""
MOST_STARTS = 3


class Unanswered:
    """Counts the starts of a run in which no iteration got its rewards."""

    def __init__(self, run_dir: str) -> None:
        self._path = Path(run_dir) / UNANSWERED

    def check(self, share: float, *, iteration: int) -> None:
        """With the share of an iteration's responses that got no score, the same on every rank: Interrupted where it is too
        large, RuntimeError where that has happened at :data:`MOST_STARTS` starts already. All ranks together."""
        if share <= SHARE_LIMIT:
            if dist.get_rank() == 0:
                self._path.unlink(missing_ok=True)
            return
        times = from_rank_0(self._count)
        said = f"iteration {iteration}: a reward's service gave no score to {share:.0%} of the responses"
        if times > MOST_STARTS:
            raise RuntimeError(f"{said}, as at the {MOST_STARTS} starts before; look at the service, then start again")
        raise Interrupted(f"{said}: nothing is learned from the others, they are sampled again at the next start")

    def _count(self) -> int:
        times = 1 + (int(read_text(self._path, most_bytes=20)) if self._path.exists() else 0)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(f"{times}\n", encoding="utf-8")
        return times
