"""The vLLM side of bench_generate: answers prompts in an environment that has vLLM and nothing of this project.

    PYTHON benchmarks/vllm_contender.py MODEL --dtype float32 --longest 256

MODEL is a directory that ``save_pretrained`` wrote. Requests and replies are lines of JSON on standard input and output:

    {"prompts": [[id, ...], ...], "new": 128}  ->  {"ids": [[id, ...], ...], "cpu_seconds": 1.5}

The first reply, before any request, is ``{"vllm": version}``. One thread and one process; the clock is the CPU time of the
whole process. Nothing is kept between requests: the prefix cache is off. :class:`Vllm` is the other end, in bench_generate.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, whose CPU time is taken
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would take a core of its choice
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Vllm:
    """A process of ``python``, which has vLLM, with the model of ``folder``."""

    def __init__(self, python: Path, folder: Path, *, dtype: str, longest: int) -> None:
        self._log = (folder / "vllm.log").open("w")
        command = [python, __file__, folder, "--dtype", dtype, "--longest", longest]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment,
        )  # fmt: skip
        self.version: str = self._reply()["vllm"]

    def answer(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """Greedy tokens, ``new`` for each prompt, and the CPU seconds that they took."""
        assert self._process.stdin is not None
        say(self._process.stdin, {"prompts": prompts, "new": new})
        reply = self._reply()
        return reply["ids"], reply["cpu_seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._log.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            last = Path(self._log.name).read_text(errors="replace").splitlines()[-3:]
            raise RuntimeError(f"the process with vLLM ended with status {status}: {' | '.join(last)}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def main() -> int:
    """Answer until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt and its answer (default 256)")
    options = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no reply
    os.environ.update(SETTINGS)
    import vllm

    engine = vllm.LLM(
        model=options.model,
        dtype=options.dtype,
        max_model_len=options.longest,
        max_num_seqs=32,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    say(replies, {"vllm": vllm.__version__})
    for line in sys.stdin:
        asked = json.loads(line)
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
        start = time.process_time()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        spent = time.process_time() - start
        say(replies, {"ids": [list(one.outputs[0].token_ids) for one in outputs], "cpu_seconds": spent})
    return 0


def say(replies: Any, reply: dict[str, Any]) -> None:
    """Write one reply."""
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
