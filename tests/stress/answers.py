"""Many random requests on every layout against each request alone on one rank (docs/generation.md).

    python -m tests.stress.answers [--requests 200] [--seed 0] [--layouts one "tensor 2" ...]

Prompts of 1 to 600 tokens, a third with media, greedy and sampled, up to four samples of one, random arrivals and
cancellations, and a cache that is too small for them: answers are set back. An answer that differs is compared up to the
first place where the lone run met a tie: its two best log-probabilities lie within 1e-4, or a router of it was within
1e-6 of choosing other experts for a token. Such requests are listed; the run fails where they are more than one in a
hundred, and where an answer differs before a tie.
"""

import argparse
import math
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
from megatron_omni.generation.request import PromptEvent, Request, Sampling, TokenEvent  # noqa: E402
from megatron_omni.models.build import build_model  # noqa: E402
from megatron_omni.models.moe.router import OmniRouter  # noqa: E402
from megatron_omni.ops.topp_route import RoutingRule, fixed_count, top_p_count  # noqa: E402
from tests.distributed.generation_requests import (  # noqa: E402
    TIE,
    by_name,
    extended,
    make_media,
    played,
    prompts_of,
    recipe_for,
)
from tests.distributed.harness import Rank, run_ranks  # noqa: E402

ROUTING_TIE = 1e-6
"""Probability by which a router may be from choosing otherwise and still be moved by rounding."""
MOST_TIES = 0.01
"""Share of the requests of which an answer may differ after a tie."""
LONGEST = 600
TIGHT = EngineLimits(max_running=12, max_batch_tokens=96, cache_tokens=3072)
LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "one": ({}, 1),
    "tensor 2": ({"tensor": 2}, 2),
    "pipeline 2": ({"pipeline": 2}, 2),
    "expert 2": ({"expert": 2}, 2),
    "tensor 2 x pipeline 2": ({"tensor": 2, "pipeline": 2}, 4),
}
Key = tuple[str, int]
Answers = dict[Key, Result]
Margins = dict[Key, list[float]]
"""For every token of an answer, how near any router came to choosing otherwise in its request up to there."""


def routing_margin(z: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    """[T] probability that would have to move for each token of logits ``z`` [T, >= E_d] to be routed otherwise: of a sum
    to reach ``top_p`` or not to, or of the last slot that is taken and the first that is not to change places."""
    p = torch.softmax(z[:, : rule.num_slots].double(), dim=1).sort(dim=1, descending=True).values
    margin = p.new_full((len(p),), math.inf)
    taken = fixed_count(rule.num_slots, top_p=rule.top_p, top_k=rule.top_k)
    if taken is None:
        margin = (p.cumsum(1)[:, :-1] - rule.top_p).abs().amin(1)
        count = top_p_count(p, rule.top_p)
    else:
        count = torch.full((len(p),), taken)
    steps = torch.cat([p[:, :-1] - p[:, 1:], p.new_full((len(p), 1), math.inf)], dim=1)
    return torch.minimum(margin, steps.gather(1, count.unsqueeze(1) - 1).squeeze(1))


class RoutingMargins:
    """The smallest margin of all routers of ``model`` since it was last asked for."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._least = math.inf
        for router in (m for m in model.modules() if isinstance(m, OmniRouter)):
            assert router.rule.mode == "masked_softmax" and router.rule.max_routed is None, "other rules, other margins"
            router.topp_route = self._noted(router.topp_route)

    def _noted(self, route: Any) -> Any:
        def call(z: torch.Tensor, rule: RoutingRule, **tokens: Any) -> Any:
            margins = routing_margin(z, rule)[~tokens["padding"]]
            self._least = min([self._least, *margins.tolist()])
            return route(z, rule, **tokens)

        return call

    def take(self) -> float:
        """What it was."""
        least, self._least = self._least, math.inf
        return least


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
    """Results of the requests that this rank leads, and set-backs; ``alone`` of each by itself, and margins."""
    recipe = recipe_for(corpus, **{f"parallel__{name}_model_parallel_size": size for name, size in parallel.items()})
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    requests = random_requests(prompts_of(builder, corpus), builder.tokenizer.vocab_size, count, seed)
    limits = replace(TIGHT, cache_tokens=8192) if alone else TIGHT
    model = build_model(recipe, pg)
    with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits) as engine:
        if not engine.leads:
            engine.follow()
            return None
        if alone:
            return one_by_one(engine, requests, RoutingMargins(model))
        mine = requests[pg.dp.rank() :: pg.dp.size()]
        if pg.ep.size() > 1:
            return by_name(answered(engine, mine)), engine.state().set_back
        results = played(engine, mine, seed=seed, cancelled=count // 8)
        return results, engine.state().set_back


def one_by_one(engine: Engine, requests: list[Request], routers: RoutingMargins) -> tuple[Answers, Margins]:
    """Results of each request by itself, and their margins."""
    results: Answers = {}
    margins: Margins = {}
    for request in requests:
        engine.submit(request)
        least = math.inf
        while engine.busy:
            events = engine.step()
            least = min(least, routers.take())
            for event in events:
                if isinstance(event, PromptEvent):
                    continue
                key = event.name, event.sample
                results.setdefault(key, Result(name=event.name, sample=event.sample)).add(event)
                if isinstance(event, TokenEvent):
                    margins.setdefault(key, []).append(least)
    return results, margins


def compared(got: Answers, alone: Answers, margins: Margins) -> tuple[dict[str, list[str]], list[str]]:
    """The answers that differ after a tie, by request, and those that differ otherwise."""
    ties: dict[str, list[str]] = {}
    wrong = []
    for key, expected in alone.items():
        if got[key].ids == expected.ids:
            continue
        place = next(i for i, (a, b) in enumerate(zip(got[key].ids, expected.ids)) if a != b)
        line = f"{key} at token {place}: {got[key].ids[place]} for {expected.ids[place]}"
        close = min(top[0][1] - top[1][1] for top in expected.top[: place + 1])
        if close < TIE:
            ties.setdefault(key[0], []).append(f"{line}, two best within {close:.1e}")
        elif margins[key][place] < ROUTING_TIE:
            ties.setdefault(key[0], []).append(f"{line}, a router within {margins[key][place]:.1e}")
        else:
            wrong.append(line)
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
        ((alone, margins),) = run_ranks(on_layout, 1, corpus, {}, *common[1:], True, timeout_seconds=3600.0)
        near = {key[0] for key, least in margins.items() if least[-1] < ROUTING_TIE}
        print(
            f"alone: {len(alone)} answers; a router within {ROUTING_TIE} in {len(near)} requests {sorted(near, key=int)}"
        )
        for name in options.layouts:
            sizes, ranks = LAYOUTS[name]
            start = time.monotonic()
            told = run_ranks(on_layout, ranks, corpus, sizes, *common[1:], False, timeout_seconds=3600.0)
            got = {key: result for part in told if part is not None for key, result in part[0].items()}
            ties, wrong = compared(got, alone, margins)
            set_back = sum(part[1] for part in told if part is not None)
            print(
                f"{name}: {options.requests} requests, {len(got)} answers, {set_back} set-backs, {len(ties)} requests differ "
                f"after a tie, {len(wrong)} answers wrong, {time.monotonic() - start:.0f} s",
                *(line for lines in ties.values() for line in lines),
                *wrong,
                sep="\n  ",
                flush=True,
            )
            failed |= bool(wrong) or got.keys() != alone.keys() or len(ties) > MOST_TIES * options.requests
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
