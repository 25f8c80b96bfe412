"""Many random requests on every layout against each request alone on one rank (docs/generation.md).

    python -m tests.stress.answers [--requests 200] [--seed 0] [--layouts one "tensor 2" ...]

Prompts of 1 to 600 tokens, a third with media, greedy and sampled, up to four samples of one, random arrivals and
cancellations, and a cache that is too small for them: answers are set back. An answer that differs is compared up to the
first place where the two best log-probabilities of the lone one lie within 1e-4; what differs before that is listed,
and the run fails.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_omni.platform.device import install

install()  # before anything imports megatron.core

from megatron_omni.data.sample import Sample, SampleBuilder  # noqa: E402
from megatron_omni.generation.batches import Result, answered  # noqa: E402
from megatron_omni.generation.engine import Engine, EngineLimits  # noqa: E402
from megatron_omni.generation.request import Request, Sampling  # noqa: E402
from megatron_omni.models.build import build_model  # noqa: E402
from tests.distributed.harness import Rank, run_ranks  # noqa: E402
from tests.distributed.test_generation import (  # noqa: E402
    TIE,
    by_name,
    extended,
    make_media,
    played,
    prompts_of,
    recipe_for,
)

LONGEST = 600
TIGHT = EngineLimits(max_running=12, max_batch_tokens=96, cache_tokens=3072)
LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "one": ({}, 1),
    "tensor 2": ({"tensor": 2}, 2),
    "pipeline 2": ({"pipeline": 2}, 2),
    "expert 2": ({"expert": 2}, 2),
    "tensor 2 x pipeline 2": ({"tensor": 2, "pipeline": 2}, 4),
}
Answers = dict[tuple[str, int], Result]


def random_requests(prompts: list[Sample], vocabulary: int, count: int, seed: int) -> list[Request]:
    """``count`` of them; media prompts go on with random text."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    empty = replace(prompts[-1], **{name: getattr(prompts[-1], name)[..., :0] for name in
                                    ("input_ids", "labels", "position_ids", "modality")}, next_position=0)  # fmt: skip
    requests = []
    for i in range(count):
        start = pick.choice(prompts[1:4]) if pick.random() < 1 / 3 else empty
        length = max(1, int(LONGEST ** pick.random()) - start.length)
        ids = torch.randint(20, vocabulary, (length,), generator=generator).tolist()
        prompt = extended(start, ids)
        prompt = replace(prompt, next_position=start.next_position + length)
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=i) if pick.random() < 0.4 else Sampling()
        requests.append(
            Request(
                name=str(i), prompt=prompt, max_new_tokens=int(100 ** pick.random()), sampling=sampling,
                n=4 if pick.random() < 0.1 else 1, logprobs=2, ignore_eos=True,
            )
        )  # fmt: skip
    return requests


def on_layout(rank: Rank, corpus: Path, parallel: dict[str, int], count: int, seed: int, alone: bool) -> Any:
    """Results of the requests that this rank leads, and set-backs."""
    recipe = recipe_for(corpus, **{f"parallel__{name}_model_parallel_size": size for name, size in parallel.items()})
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    requests = random_requests(prompts_of(builder, corpus), builder.tokenizer.vocab_size, count, seed)
    limits = replace(TIGHT, cache_tokens=8192) if alone else TIGHT
    with Engine(build_model(recipe, pg), tokenizer=builder.tokenizer, pg=pg, limits=limits) as engine:
        if not engine.leads:
            engine.follow()
            return None
        if alone:
            return {key: r for request in requests for key, r in by_name(answered(engine, [request])).items()}, 0
        mine = requests[pg.dp.rank() :: pg.dp.size()]
        if pg.ep.size() > 1:
            return by_name(answered(engine, mine)), engine.state().set_back
        results = played(engine, mine, seed=seed, cancelled=count // 8)
        return results, engine.state().set_back


def compared(got: Answers, alone: Answers) -> tuple[int, list[str]]:
    """How many answers differ after a tie, and those that differ otherwise."""
    ties, wrong = 0, []
    for key, expected in alone.items():
        if got[key].ids == expected.ids:
            continue
        place = next(i for i, (a, b) in enumerate(zip(got[key].ids, expected.ids)) if a != b)
        close = [top[0][1] - top[1][1] < TIE for top in expected.top[: place + 1]]
        if any(close):
            ties += 1
        else:
            wrong.append(f"{key} at token {place}: {got[key].ids[place]} for {expected.ids[place]}")
    return ties, wrong


def main() -> int:
    """Play all layouts; status 1 where an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        corpus = make_media(Path(directory) / "corpus")
        common = corpus, options.requests, options.seed
        ((alone, _),) = run_ranks(on_layout, 1, corpus, {}, *common[1:], True, timeout_seconds=3600.0)
        for name in options.layouts:
            sizes, ranks = LAYOUTS[name]
            start = time.monotonic()
            told = run_ranks(on_layout, ranks, corpus, sizes, *common[1:], False, timeout_seconds=3600.0)
            got = {key: result for part in told if part is not None for key, result in part[0].items()}
            ties, wrong = compared(got, alone)
            set_back = sum(part[1] for part in told if part is not None)
            print(
                f"{name}: {options.requests} requests, {len(got)} answers, {set_back} set-backs, {ties} differ after a tie, "
                f"{len(wrong)} wrong, {time.monotonic() - start:.0f} s",
                *wrong,
                sep="\n  ",
                flush=True,
            )
            failed |= bool(wrong) or got.keys() != alone.keys()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
