"""Rollouts of the engine against Hugging Face's ``generate``, on random models of the same active size, in one run.

    python -m benchmarks.bench_rollout --json FILE [--models mid_moe tiny] [--prompts 4] [--group 8] [--repeats 3]

A rollout is what an iteration of reinforcement samples: ``--group`` responses of 64 tokens, at temperature 1, to each of
``--prompts`` prompts of 512 tokens, with the log-probability of every token on our side (``Wanted.n``, the prompt's keys
and values computed once; Hugging Face: ``num_return_sequences``). Then what the prompt costs: the time to the first token
of all responses against that of a single one. Models as in bench_generate.py; one thread, thread CPU time, by turns,
medians. The file holds

    [{model, dtype, contender, tokens_per_s, ratio_to_hf}]
    [{model, dtype, responses, first_token_ms, ratio_to_one}]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench_generate import MODELS, Contenders, processor

PROMPT, NEW = 512, 64


def main(arguments: list[str] | None = None) -> int:
    """Parse, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mid_moe", "tiny"])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    from megatron_omni.platform.device import install

    install()
    import torch

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [{"machine": processor(), "torch": torch.__version__, "threads": 1}]
    for name in options.models:
        contenders = Contenders(name, options.dtype)
        contenders.check()
        rows += rollouts(contenders, options.prompts, options.group, options.repeats)
        rows += first_tokens(contenders, options.group, options.repeats)
        contenders.close()
        print("\n".join(str(row) for row in rows if row.get("model") == name), flush=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def rollouts(contenders: Contenders, prompts: int, group: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens a second of both."""
    ids = contenders.prompts(prompts, PROMPT)
    runs = {
        "omni": lambda: sampled(contenders, ids, group, NEW),
        "hf": lambda: hugging_face(contenders, ids, group),
    }
    found = {name: prompts * group * NEW / taken for name, taken in by_turns(runs, repeats).items()}
    return [
        {"model": contenders.name, "dtype": contenders.dtype, "contender": name, "tokens_per_s": round(rate, 1),
         "ratio_to_hf": round(rate / found["hf"], 3)}
        for name, rate in found.items()
    ]  # fmt: skip


def first_tokens(contenders: Contenders, group: int, repeats: int) -> list[dict[str, Any]]:
    """What the prompt of a group costs, against that of one response."""
    ids = contenders.prompts(1, PROMPT)
    runs = {str(n): lambda n=n: begun(contenders, ids[0], n) for n in (1, group)}
    found = by_turns(runs, 5 * repeats)
    return [
        {"model": contenders.name, "dtype": contenders.dtype, "responses": int(n), "first_token_ms": round(1e3 * taken, 2),
         "ratio_to_one": round(taken / found["1"], 3)}
        for n, taken in found.items()
    ]  # fmt: skip


def by_turns(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, one after the other; the first turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if turn:
                taken[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def sampled(contenders: Contenders, ids: Any, group: int, new: int) -> None:
    """``group`` responses to each row of ``ids`` by our engine."""
    from dataclasses import replace

    from benchmarks.bench_generate import request
    from megatron_omni.generation.batches import answered
    from megatron_omni.generation.request import Sampling

    wanted = {"n": group, "sampling": Sampling(temperature=1.0, seed=1), "reuse_prefix": False}
    with contenders.engine(max_running=len(ids) * group, max_batch_tokens=512, longest=PROMPT + NEW) as engine:
        requests = [replace(request(str(i), row, new, 0), **wanted) for i, row in enumerate(ids)]
        results = list(answered(engine, requests))
    assert len(results) == len(ids) * group and all(len(result.logprobs) == new for result in results)


def begun(contenders: Contenders, ids: Any, group: int) -> None:
    """Until ``group`` responses to ``ids`` have a token each."""
    from dataclasses import replace

    from benchmarks.bench_generate import request
    from megatron_omni.generation.request import Sampling, TokenEvent

    with contenders.engine(max_running=group, max_batch_tokens=512, longest=PROMPT + NEW) as engine:
        sampling, begun = Sampling(temperature=1.0, seed=1), set[int]()
        engine.submit(replace(request("0", ids, NEW, 0), n=group, sampling=sampling, reuse_prefix=False))
        while len(begun) < group:
            begun |= {event.sample for event in engine.step() if isinstance(event, TokenEvent)}
        engine.cancel("0")
        engine.step()


def hugging_face(contenders: Contenders, ids: Any, group: int) -> None:
    """The same by ``generate``."""
    import torch

    with torch.inference_mode():
        told = contenders.theirs.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=group
        )
    assert told.shape == (len(ids) * group, PROMPT + NEW)


if __name__ == "__main__":
    sys.exit(main())
