"""The same rollouts again, in other company and on other layouts: which responses are the same, token for token.

    python -m tests.stress.rollouts [--prompts 48] [--precisions fp32 bf16] [--ways "again" "tensor 2" ...]

Eight samples at temperature 1 of prompts with and without media, drawn as in task reinforce. The reference is one rank that
computes 32 responses at a time. ``again`` does the same once more and must give the same bits. Elsewhere rounding may move
a draw over the edge of a token's share of the cumulative distribution: in fp32 every response must be the reference's up to
a token whose draw lies within 1e-5 of an edge, at most one token in 10,000 drawn; in bf16 the share that differs is
reported. Routes of responses are compared up to there, too.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_omni.platform.device import install

install()  # before anything imports megatron.core

from megatron_omni.data.collate import collate  # noqa: E402
from megatron_omni.data.sample import Sample, SampleBuilder  # noqa: E402
from megatron_omni.generation.batches import Result, answered  # noqa: E402
from megatron_omni.generation.engine import Engine, EngineLimits  # noqa: E402
from megatron_omni.generation.request import Request, Sampling  # noqa: E402
from megatron_omni.generation.sampling import derived_seed, uniform_draw  # noqa: E402
from megatron_omni.models.build import build_model  # noqa: E402
from megatron_omni.models.moe.routes import flipped, num_slots  # noqa: E402
from megatron_omni.parallel.wrap import wrap_model  # noqa: E402
from tests.distributed.generation_requests import by_name, extended, make_media, prompts_of, recipe_for  # noqa: E402
from tests.distributed.harness import Rank, run_ranks  # noqa: E402

SAMPLES, TOKENS, SEED = 8, 64, 7
EDGE, MOST = 1e-5, 1e-4
"""Distance of a draw from an edge that rounding may bridge in fp32, and share of tokens that it may."""
ROOMY = EngineLimits(max_running=32, cache_tokens=16384)
WAYS: dict[str, tuple[dict[str, int], int, EngineLimits]] = {
    "again": ({}, 1, ROOMY),
    "7 at a time": ({}, 1, EngineLimits(max_running=7, max_batch_tokens=37, cache_tokens=2048)),
    "tensor 2": ({"tensor": 2}, 2, ROOMY),
    "pipeline 2": ({"pipeline": 2}, 2, ROOMY),
    "expert 2": ({"expert": 2}, 2, ROOMY),
    "tensor 2 x pipeline 2": ({"tensor": 2, "pipeline": 2}, 4, ROOMY),
}
Key = tuple[str, int]


class Difference(NamedTuple):
    """The first token of a response that another way drew otherwise."""

    key: Key
    place: int


def requests_of(builder: SampleBuilder, corpus: Path, count: int) -> list[Request]:
    """Prompts with words of their own at the end."""
    prompts = [prompt for prompt in prompts_of(builder, corpus) if prompt.length < 100]
    generator = torch.Generator().manual_seed(SEED)
    requests = []
    for number in range(count):
        words = torch.randint(20, builder.tokenizer.vocab_size, (number % 13 + 1,), generator=generator).tolist()
        start = prompts[number % len(prompts)]
        prompt = replace(extended(start, words), next_position=start.next_position + len(words))
        sampling = Sampling(temperature=1.0, seed=derived_seed(SEED, number))
        requests.append(
            Request(
                name=str(number), prompt=prompt, max_new_tokens=TOKENS, n=SAMPLES, sampling=sampling, routes=True,
                logprobs=0, reuse_prefix=False,
            )
        )  # fmt: skip
    return requests


def rolled_out(rank: Rank, corpus: Path, way: str, precision: str, count: int, std: float) -> dict[Key, Result] | None:
    """Responses to the requests that this rank leads."""
    sizes, _, limits = WAYS[way]
    layout = {f"parallel__{name}_model_parallel_size": size for name, size in sizes.items()}
    recipe = recipe_for(corpus, **layout, optim__precision=precision, model__init_method_std=std)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    mine = requests_of(builder, corpus, count)[pg.dp.rank() :: pg.dp.size()]
    model = wrap_model(build_model(recipe, pg), recipe, pg)  # in bf16 where that is asked for
    with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits) as engine:
        if engine.leads:
            with engine.leading():
                return by_name(answered(engine, mine))
        engine.follow()
    return None


def edges(rank: Rank, corpus: Path, found: list[tuple[Difference, list[int]]], count: int, std: float) -> list[float]:
    """Of each difference, given the tokens before it, how far its draw lies from an edge, by a forward of one rank in
    fp32."""
    recipe = recipe_for(corpus, model__init_method_std=std)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg).eval()
    requests = requests_of(builder, corpus, count)

    @torch.no_grad()
    def distance(difference: Difference, before: list[int]) -> float:
        name, sample = difference.key
        request = requests[int(name)]
        row: Sample = extended(request.prompt, before)
        logits = model(collate([row], pad_id=0), step=0, stochastic=False, compute_loss=False)[0, row.length - 1]
        cumulative = logits.double().softmax(-1).cumsum(-1)
        draw = uniform_draw(derived_seed(request.sampling.seed, sample), difference.place)
        return float((cumulative - draw).abs().min())

    return [distance(*one) for one in found]


def tokens_of(result: Result) -> list[int]:
    return [*result.ids, *([result.end_id] if result.end_id is not None else [])]


class Comparison(NamedTuple):
    """Of all responses, each up to the first token that was drawn otherwise."""

    differences: list[Difference]
    draws: int
    change: float
    """Mean |difference of log-probabilities| of a token that both drew."""
    flips: int
    places: int
    """Routes that differ, of how many."""


def compared(got: dict[Key, Result], reference: dict[Key, Result], slots: int) -> Comparison:
    """What differs from the reference."""
    found, draws, flips, places, changes = [], 0, 0, 0, list[float]()
    for key, expected in reference.items():
        mine, theirs = tokens_of(got[key]), tokens_of(expected)
        place = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
        draws += len(theirs) if place is None else place + 1
        if place is not None:
            found.append(Difference(key, place))
        changes += [abs(a - b) for a, b in zip(got[key].logprobs[:place], expected.logprobs)]
        assert got[key].routes is not None and expected.routes is not None
        known = len(expected.routes) - (0 if place is None else len(theirs) - 1 - place)
        one, other = got[key].routes[:known], expected.routes[:known]
        flips += int(flipped(one, other, num_slots=slots).sum())
        places += one.numel()
    return Comparison(found, draws, sum(changes) / max(len(changes), 1), flips, places)


def main() -> int:
    """Play all; status 1 where something differs that must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--init-std", type=float, default=0.1, help="of the weights: how far logits lie apart")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    common, failed = (options.prompts, options.init_std), False
    with tempfile.TemporaryDirectory() as directory:
        corpus = make_media(Path(directory) / "corpus")
        slots = num_slots(recipe_for(corpus).model.moe)  # type: ignore[arg-type]
        for precision in options.precisions:
            (reference,) = run_ranks(rolled_out, 1, corpus, "again", precision, *common, timeout_seconds=1800.0)
            for way in options.ways:
                told = run_ranks(rolled_out, WAYS[way][1], corpus, way, precision, *common, timeout_seconds=1800.0)
                got: dict[Key, Result] = {key: r for part in told if part is not None for key, r in part.items()}
                found, draws, change, flips, places = compared(got, reference, slots)
                line = (
                    f"{precision}, {way}: {len(found)} of {len(reference)} responses differ, {len(found) / draws:.1e} of "
                    f"{draws} draws; log-probabilities by {change:.1e}; {flips / places:.1e} of {places} routes"
                )
                bits = all(got[key].logprobs == expected.logprobs for key, expected in reference.items())
                failed |= way == "again" and not (bits and not found and not flips)
                if precision == "fp32" and found:
                    before = [(one, tokens_of(reference[one.key])[: one.place]) for one in found]
                    (distances,) = run_ranks(edges, 1, corpus, before, *common, timeout_seconds=600.0)
                    line += f"; draws at most {max(distances):.1e} from an edge"
                    failed |= max(distances) > EDGE or len(found) > max(1, MOST * draws)
                print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
