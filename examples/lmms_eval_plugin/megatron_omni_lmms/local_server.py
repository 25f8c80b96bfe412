"""A server of ours for the length of a run: started with an interpreter that has megatron_omni, ended with this process.

    python -m megatron_omni.cli.serve CHECKPOINT --port 0 OPTIONS

It ends when this process does, however that happens: asked to at the end and after Ctrl-C, by the kernel where this
process was killed (Linux).
"""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS = 3600.0
"""A large checkpoint on a busy file system."""
END_SECONDS = 60.0
DEFAULTS = (
    "--grace-seconds", "1", "--max-queue-seconds", "3600", "--max-request-seconds", "3600", "--max-body-mib", "128",
)  # fmt: skip
"""Nobody sits before an evaluation: a request may wait for the clips of sixty others. Options that are given stand above."""
_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
"""Looked up here: little may be done between fork and exec."""
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ADDRESS = re.compile(r"^serving .* at (https?://\S+)/ ", re.MULTILINE)


class LocalServer:
    """A server of ``checkpoint`` that takes requests at ``url``; RuntimeError with its last words where it ends at once."""

    def __init__(self, checkpoint: str, *, python: str = sys.executable, options: str = "") -> None:
        self.log = Path(tempfile.mkstemp(prefix="megatron_omni_server_", suffix=".log")[1])
        words = [python, "-m", "megatron_omni.cli.serve", checkpoint, "--port", "0", *DEFAULTS, *shlex.split(options)]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the server.
            self._process = subprocess.Popen(
                words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
                preexec_fn=_end_with_parent if _PRCTL else None,
            )  # fmt: skip
        self.stop = weakref.finalize(self, _stop, self._process, self.log)
        """Ends the server; called at the interpreter's end where nobody has called it before."""
        try:
            self.url = self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            said = self.log.read_text(encoding="utf-8", errors="replace")
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._process.returncode}:\n{said[-4000:]}")
            if (found := _ADDRESS.search(said)) and _is_ready(found[1]):
                return found[1]
            time.sleep(0.2)
        raise RuntimeError(f"the server is not ready after {START_SECONDS:g} s; see {self.log}")


def _end_with_parent() -> None:
    assert _PRCTL is not None
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """End it; what it said is kept where it did not end well."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode == 0:
        log.unlink(missing_ok=True)


def _is_ready(url: str) -> bool:
    try:
        return bool(urlopen(f"{url}/ready", timeout=10).status == 200)
    except (URLError, OSError):  # 503 while the model is loaded is an URLError, too
        return False
