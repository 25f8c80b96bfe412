"""What makes sound (speaker_process.py) or pictures (painter_process.py): a process of its own beside the engine's.

It is one rank of its own, started by ``megatron-omni serve`` with an inherited descriptor, one end of a pair of sockets to the
process that speaks HTTP (maker_client.py). It takes no signals: when the other end is closed, it leaves. No torch here.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from megatron_omni.config.outcome import EXIT_FAILURE

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Of the launcher: this process is a world of its own."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MakerFailed:
    """Nothing will be made."""

    message: str


def run(words: Sequence[str], serve: Callable[[Connection, str, str, int], None], *, who: str) -> int:
    """``serve(link, checkpoint, codec's folder or nothing, how many together)`` of the command's ``words`` until the other end
    is closed; the exit status. What ``serve`` raises is told to the other end and logged; ``who`` says who has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name in [name for name in os.environ if name in PLACE or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    link = Connection(int(words[0]))
    try:
        serve(link, words[1], words[2], int(words[3]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except ValueError as error:
        return _failed(link, str(error))
    except Exception:
        logger.exception("%s ends", who)
        return _failed(link, f"{who} has ended; the server's log says why")
    return 0


def _failed(link: Connection, message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    with suppress(OSError):
        link.send(MakerFailed(message))
    return EXIT_FAILURE
