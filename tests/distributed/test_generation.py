"""The engine: every answer is what its request alone gives, on one rank and on every kind of layout.

The model is the tiny recipe with larger initial weights, so that its logits differ enough for answers to vary. Answers
are compared up to the first place where two best logits of the lone answer lie closer than rounding can tell.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_omni.data.collate import collate
from megatron_omni.data.record import parse_record
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.generation.batches import Result, answered, generate
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.fixed_steps import _Step
from megatron_omni.generation.request import Event, FinishedEvent, PromptEvent, Request
from megatron_omni.models.build import build_model
from megatron_omni.models.omni import OmniModel
from megatron_omni.platform.host_waits import HostWaits
from tests.distributed.generation_requests import (
    TOLERANCE,
    assert_same_answers,
    by_name,
    extended,
    make_media,
    placed_questions,
    played,
    prompts_of,
    recipe_for,
    requests_of,
)
from tests.distributed.harness import Rank, run_ranks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("generation") / "corpus")


ROOMY = EngineLimits(max_running=16, cache_tokens=8192)
TIGHT = EngineLimits(max_running=5, max_batch_tokens=37, cache_tokens=640)


@pytest.fixture(scope="module")
def alone(corpus: Path) -> dict[str, Any]:
    """What one rank computes of each request by itself: the reference of everything else."""
    return run_ranks(one_rank, 1, corpus)[0]


def one_rank(rank: Rank, corpus: Path) -> dict[str, Any]:
    recipe = recipe_for(corpus)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    model.train()
    model.vision.eval()
    modes = [module.training for module in model.modules()]
    prompts = prompts_of(builder, corpus)
    requests = requests_of(prompts)
    encoded: list[tuple[str, int]] = []
    for name in ("vision", "audio"):
        getattr(model, name).register_forward_pre_hook(lambda _, x, name=name: encoded.append((name, len(x[0]))))

    def engine(limits: EngineLimits) -> Engine:
        return Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits)

    result: dict[str, Any] = {"taught": taught_positions(builder, corpus)}
    with engine(ROOMY) as one:
        result["alone"] = {k: r for request in requests for k, r in by_name(answered(one, [request])).items()}
    result["modes"] = modes, [module.training for module in model.modules()]
    encoded.clear()
    with engine(ROOMY) as together:
        result["together"] = by_name(answered(together, [r for r in requests if r.name.endswith(".0")]))
        result["encoded"] = list(encoded)
    result["fixed"], result["operations"] = fixed_steps(engine, requests)
    with engine(TIGHT) as tight:
        result["tight"] = played(tight, requests, seed=1, cancelled=6)
        result["set back"] = tight.state().set_back
    model.eval()
    result["full"] = full_logprobs(model, requests, result["alone"])
    result["prompts"] = prompt_logprobs(engine, model, prompts)
    result["prefixes"] = conversation(engine, builder, corpus, prompts)
    result["ends"] = ends(engine, builder, prompts)
    result["refused"] = refusals(engine, builder, prompts)
    result["generate"] = generate(model, prompts, tokenizer=builder.tokenizer, max_new_tokens=9, pg=pg)
    result["none"] = generate(model, [], tokenizer=builder.tokenizer, max_new_tokens=1, pg=pg)
    result["not finite"] = spoilt(engine, model, requests)
    return result


class Operations(TorchDispatchMode):
    """What is computed inside, in order: names and the sizes of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tree_map_only(Tensor, lambda t: (t.shape, t.dtype), output)))
        return output


def fixed_steps(
    engine: Callable[[EngineLimits], Engine], requests: list[Request]
) -> tuple[dict[tuple[str, int], Result], dict[tuple[int, int], list[Any]]]:
    """Results with decoding steps of fixed shapes; the operations of each step by (rows, keys). No step may wait."""
    operations: dict[tuple[int, int], list[Any]] = {}
    compute = _Step.compute

    def watched(step: _Step) -> Tensor:
        size = step.inputs.shape[1], step._keys
        if size not in operations:
            compute(step)  # constants of a size are made once: recording a graph, too, computes before it records
        with HostWaits(allowed={}), Operations() as inside:
            output = compute(step)
        operations.setdefault(size, []).append(inside.seen)
        return output

    limits = replace(ROOMY, max_running=7, cache_tokens=2048, decoding="fixed")
    with patch.object(_Step, "compute", watched), engine(limits) as one:
        one._replica.cache.reach(limits.cache_tokens)  # as on a GPU: rows that grow are other sizes
        return played(one, requests, seed=3, cancelled=2), operations


def full_logprobs(model: OmniModel, requests: list[Request], alone: dict[tuple[str, int], Result]) -> list[Any]:
    """(what the engine said, what a forward of the whole sequence without a cache says) of every token."""
    pairs = []
    for request in requests:
        for sample in range(request.n):
            result = alone[request.name, sample]
            tokens = [*result.ids, *([result.end_id] if result.end_id is not None else [])]
            logits = whole_logits(model, extended(request.prompt, tokens))[request.prompt.length - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
            pairs.append((result.logprobs, expected.tolist()))
    return pairs


@torch.no_grad()
def whole_logits(model: OmniModel, sample: Sample) -> Tensor:
    """[L, V] by one forward without a cache."""
    return model(collate([sample], pad_id=0), step=0, stochastic=False, compute_loss=False)[0, : sample.length].double()


def prompt_logprobs(
    engine: Callable[[EngineLimits], Engine], model: OmniModel, prompts: list[Sample]
) -> list[tuple[PromptEvent, Tensor]]:
    """What the engine says of the tokens of a prompt that it takes in parts, and what one forward says."""
    asked = []
    for prompt in (prompts[3], prompts[4]):
        with engine(TIGHT) as one:
            one.submit(Request(name="p", prompt=prompt, max_new_tokens=1, prompt_logprobs=3))
            events: list[Event] = []
            while one.busy:
                events += one.step()
        (event,) = (e for e in events if isinstance(e, PromptEvent))
        logprobs = whole_logits(model, prompt)[:-1].log_softmax(-1)
        asked.append((event, logprobs.gather(1, prompt.input_ids[1:].unsqueeze(1)).squeeze(1)))
    return asked


def conversation(
    engine: Callable[[EngineLimits], Engine], builder: SampleBuilder, corpus: Path, prompts: list[Sample]
) -> dict[str, Any]:
    """Usage and log-probabilities with a prefix cache, cold and warm, and of a prompt with another picture."""
    words = "red green " * 20

    def about(picture: str) -> Request:
        question = {"messages": [{"role": "user", "content": f"{words}<image> which {words}"}],
                    "images": [str(corpus / picture)]}  # fmt: skip
        prompt = builder.build_prompt(parse_record(question))
        return Request(name=picture, prompt=prompt, max_new_tokens=5, ignore_eos=True, logprobs=0)

    def ask(one: Engine, request: Request) -> tuple[int, list[float]]:
        (result,) = answered(one, [request])
        assert result.usage is not None
        return result.usage.cached, result.logprobs

    with engine(replace(ROOMY, prefix_cache=True)) as one:
        told = {"cold": ask(one, about("0.png")), "warm": ask(one, about("0.png"))}
        told["other picture"] = ask(one, about("1.png"))
        (first,) = answered(one, [replace(about("0.png"), max_new_tokens=70, name="long")])
        longer = extended(about("0.png").prompt, [*first.ids, 7, 8, 9])
        longer = replace(longer, next_position=longer.next_position + len(first.ids) + 3)
        told["goes on"] = ask(one, replace(about("0.png"), prompt=longer))
        told["salted"] = ask(one, replace(about("0.png"), salt="another"))
        told["apart"] = ask(one, replace(about("0.png"), reuse_prefix=False))
        one.weights_changed()
        told["new weights"] = ask(one, about("0.png"))
        assert one.state().cached_tokens > 0 and one.state().prefix_tokens > 0
    with engine(ROOMY) as one:
        told["other picture alone"] = ask(one, about("1.png"))
        told["goes on alone"] = ask(one, replace(about("0.png"), prompt=longer))
    return told


def ends(engine: Callable[[EngineLimits], Engine], builder: SampleBuilder, prompts: list[Sample]) -> dict[str, Any]:
    """How answers to one prompt end that differ in nothing else."""
    told: dict[str, Any] = {}
    with engine(ROOMY) as one:

        def ask(name: str, **settings: Any) -> Result:
            request = Request(name=name, prompt=prompts[0], max_new_tokens=24, text=True, ignore_eos=True)
            (result,) = answered(one, [replace(request, **settings)])
            told[name] = result
            return result

        whole = ask("whole")
        middle = whole.text[len(whole.text) // 2 :][:3]
        ask("stop string", stop=(middle,))
        ask("stop id", stop_ids=(whole.ids[7],))
        ask("too early", stop_ids=(whole.ids[7],), min_new_tokens=12)
    told["decoded"] = builder.tokenizer.decode(whole.ids)
    told["middle"] = middle
    return told


def refusals(engine: Callable[[EngineLimits], Engine], builder: SampleBuilder, prompts: list[Sample]) -> dict[str, str]:
    """What is said of requests that cannot be answered."""
    prompt = prompts[1]
    assert prompt.tiles is not None
    bad = {
        "cache": {"max_new_tokens": 800},
        "vocabulary": {"prompt": replace(prompt, input_ids=prompt.input_ids + 100_000)},
        "stop": {"stop_ids": (100_000,)},
        "tiles": {"prompt": replace(prompt, tiles=torch.cat([prompt.tiles] * 2))},
        "no tiles": {"prompt": replace(prompt, tiles=None)},
        "name": {"name": "taken"},
    }
    told = {}
    with engine(replace(ROOMY, cache_tokens=512)) as one:
        one.submit(Request(name="taken", prompt=prompt, max_new_tokens=1))
        for what, change in bad.items():
            request = replace(Request(name="r", prompt=prompt, max_new_tokens=4), **change)
            try:
                one.submit(request)
            except ValueError as error:
                told[what] = str(error)
        assert one.state().waiting == 1
        one.cancel("unknown")
    return told


def spoilt(engine: Callable[[EngineLimits], Engine], model: OmniModel, requests: list[Request]) -> dict[str, Any]:
    """Events of a step whose logits are no numbers, and answers after the weights were repaired."""
    weight = model.language.output_layer.weight
    plain = requests[0]
    with engine(ROOMY) as one:
        (before,) = answered(one, [plain])
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] = torch.nan
        one.submit(plain)
        events = one.step()
        with torch.no_grad():
            weight.copy_(kept)
        (after,) = answered(one, [plain])
        assert one.state().cache_tokens == 0
    return {"events": events, "before": before.ids, "after": after.ids}


def taught_positions(builder: SampleBuilder, corpus: Path) -> list[tuple[Tensor, int]]:
    """Per question: 3D positions of a given answer, as training sees them, and the position after the prompt."""
    answer = {"role": "assistant", "content": "one two three four five and then red green"}
    taught = []
    for question in placed_questions(corpus):
        record = parse_record(question | {"messages": [*question["messages"], answer]})
        prompt, sample = builder.build_prompt(record), builder.build_sample(record)
        assert torch.equal(prompt.input_ids, sample.input_ids[: prompt.length])
        taught.append((sample.position_ids[:, prompt.length :], prompt.next_position))
    return taught


def test_log_probabilities_equal_a_forward_of_the_whole_sequence(alone: dict[str, Any]) -> None:
    spread = [value for told, _ in alone["full"] for value in told]
    assert numpy.std(spread) > 0.5, "logits too alike to tell a mistake"
    for told, expected in alone["full"]:
        numpy.testing.assert_allclose(told, expected, rtol=0, atol=TOLERANCE)


def test_positions_of_an_answer_are_those_of_training(alone: dict[str, Any]) -> None:
    for taught, following in alone["taught"]:
        assert torch.equal(taught, (following + torch.arange(taught.shape[1])).expand(3, -1))


def test_prompts_are_scored_as_by_one_forward(alone: dict[str, Any]) -> None:
    for event, expected in alone["prompts"]:
        numpy.testing.assert_allclose(event.logprobs, expected, rtol=0, atol=TOLERANCE)
        assert all(len(top) == 3 and top[0][1] >= top[1][1] >= top[2][1] for top in event.top)


def test_answers_do_not_depend_on_what_runs_beside_them(alone: dict[str, Any]) -> None:
    assert alone["set back"] > 0, "the cache was not tight"
    assert assert_same_answers(alone["tight"], alone["alone"]) <= 1
    only = {key: result for key, result in alone["alone"].items() if key[0].endswith(".0")}
    assert assert_same_answers(alone["together"], only) <= 1


def test_steps_of_fixed_shapes_give_the_same_answers(alone: dict[str, Any]) -> None:
    assert assert_same_answers(alone["fixed"], alone["alone"]) <= 1


def test_two_decoding_steps_of_one_size_are_the_same_operations_and_never_wait(alone: dict[str, Any]) -> None:
    """What a CUDA graph needs. That no step waited is asserted where they ran."""
    operations = alone["operations"]
    assert {rows for rows, _ in operations} == {1, 4, 8} and {keys for _, keys in operations} == {256, 512}
    assert all(len(steps) > 1 for steps in operations.values()) and sum(map(len, operations.values())) > 40
    for size, steps in operations.items():
        assert all(step == steps[0] for step in steps), size


def test_samples_of_a_request_differ(alone: dict[str, Any]) -> None:
    groups: dict[str, list[list[int]]] = {}
    for (name, _), result in alone["alone"].items():
        if name.endswith(".3"):
            groups.setdefault(name, []).append(result.ids)
    assert groups and all(len(ids) == 3 and ids[0] != ids[1] != ids[2] for ids in groups.values())


def test_media_of_requests_that_come_together_are_encoded_together_and_once(alone: dict[str, Any]) -> None:
    # Questions 0, 2 and 4 were asked: one clip of sound, no picture.
    assert alone["encoded"] == [("audio", 1)]


def test_modes_are_restored(alone: dict[str, Any]) -> None:
    before, after = alone["modes"]
    assert before == after
    assert len(set(before)) == 2


def test_prefixes_are_shared_where_tokens_positions_and_media_are_the_same(alone: dict[str, Any]) -> None:
    told = alone["prefixes"]
    cached = {name: told[name][0] for name in told}
    assert cached["cold"] == cached["salted"] == cached["apart"] == cached["new weights"] == 0
    assert cached["warm"] >= 128 and cached["goes on"] > cached["warm"]
    assert 0 < cached["other picture"] < cached["warm"], "the words before the picture alone"
    for warm, cold in (("warm", "cold"), ("other picture", "other picture alone"), ("goes on", "goes on alone"),
                       ("salted", "cold"), ("apart", "cold"), ("new weights", "cold")):  # fmt: skip
        numpy.testing.assert_allclose(told[warm][1], told[cold][1], rtol=0, atol=TOLERANCE, err_msg=warm)


def test_answers_end_where_they_are_asked_to(alone: dict[str, Any]) -> None:
    told = alone["ends"]
    whole = told["whole"]
    assert (whole.reason, len(whole.ids)) == ("length", 24)
    assert whole.text == told["decoded"]
    stopped = told["stop string"]
    assert (stopped.reason, stopped.stop) == ("stop", told["middle"])
    assert stopped.text == whole.text[: whole.text.index(told["middle"])]
    first = whole.ids.index(whole.ids[7])
    assert (told["stop id"].ids, told["stop id"].end_id) == (whole.ids[:first], whole.ids[7])
    early = told["too early"]
    assert len(early.ids) >= 12 and whole.ids[7] not in early.ids[:12]


def test_requests_that_cannot_be_answered_are_refused_and_leave_nothing(alone: dict[str, Any]) -> None:
    refused = alone["refused"]
    assert "512 positions of the cache" in refused["cache"]
    assert "prompt has token" in refused["vocabulary"] and "stop_ids has token" in refused["stop"]
    assert "placeholders for 2 encoder inputs" in refused["tiles"]
    assert "placeholders for 0 encoder inputs" in refused["no tiles"]
    assert "'taken'" in refused["name"]


def test_generate_gives_the_same_answers(alone: dict[str, Any]) -> None:
    for p, ids in enumerate(alone["generate"]):
        if p % 2 == 0:
            assert ids == alone["alone"][f"{p}.0", 0].ids
    assert alone["none"] == []


def test_logits_that_are_not_finite_end_their_answer_and_leave_nothing_behind(alone: dict[str, Any]) -> None:
    (event,) = alone["not finite"]["events"]
    assert isinstance(event, FinishedEvent) and event.reason == "error"
    assert "not finite" in (event.message or "")
    assert alone["not finite"]["before"] == alone["not finite"]["after"]


# ---------------------------------------------------------------------------------------------------------- deterministic


def same_bits(rank: Rank, corpus: Path) -> list[dict[str, Any]]:
    """Log-probabilities of the same requests in all kinds of company."""
    recipe = recipe_for(corpus)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    requests = [r for r in requests_of(prompts_of(builder, corpus)) if r.name[-1] in "035"]
    told = []
    for limits in (
        EngineLimits(max_running=1, cache_tokens=2048, max_batch_tokens=600),
        EngineLimits(max_running=16, cache_tokens=8192, max_batch_tokens=600),
        EngineLimits(max_running=16, cache_tokens=4096, max_batch_tokens=64, prefix_cache=True),
        EngineLimits(max_running=3, cache_tokens=1024, max_batch_tokens=7),
        EngineLimits(max_running=5, cache_tokens=1024, max_batch_tokens=37),
    ):
        with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=replace(limits, deterministic=True)) as engine:
            if limits.max_running == 1:
                results = by_name(answered(engine, requests))
            else:
                results = played(engine, requests, seed=limits.max_batch_tokens, cancelled=3)
            if limits.prefix_cache:
                played(engine, requests, seed=3)
                assert engine.state().cached_tokens > 0
            told.append({k: (r.ids, r.logprobs, r.top) for k, r in results.items()})
    return told


def test_deterministic_answers_have_the_same_bits_in_any_company(corpus: Path) -> None:
    first, *others = run_ranks(same_bits, 1, corpus)[0]
    for other in others:
        assert other == first


# --------------------------------------------------------------------------------------------------------------- layouts


def on_layout(rank: Rank, corpus: Path, parallel: dict[str, int], shares: list[list[int]]) -> dict[str, Any] | None:
    """The answers that this rank leads: of the requests whose numbers its replica is given."""
    recipe = recipe_for(corpus, **{f"parallel__{name}_model_parallel_size": size for name, size in parallel.items()})
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    mine = [requests_of(prompts_of(builder, corpus))[i] for i in shares[pg.dp.rank()]]
    with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=TIGHT) as engine:
        if not engine.leads:
            engine.follow()
            engine.follow()
            return None
        with engine.leading():
            results = by_name(answered(engine, mine)) if pg.ep.size() > 1 else played(engine, mine, seed=4, cancelled=3)
        again = by_name(answered(engine, mine[:1])) if mine or pg.ep.size() > 1 else {}
        assert all(results[key].ids == result.ids for key, result in again.items())
    return results


ALL = list(range(18))
LAYOUTS: dict[str, tuple[dict[str, int], int, list[list[int]]]] = {
    "tensor 2": ({"tensor": 2}, 2, [ALL]),
    "pipeline 2": ({"pipeline": 2}, 2, [ALL]),
    "expert 2": ({"expert": 2}, 2, [ALL[::2], ALL[1:6:2]]),
    "expert 2, one rank without requests": ({"expert": 2}, 2, [[], [1, 0]]),
    "tensor 2 and expert 2": ({"tensor": 2, "expert": 2}, 2, [ALL]),
    "tensor 2 x pipeline 2": ({"tensor": 2, "pipeline": 2}, 4, [ALL]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_one_ranks_answers(name: str, corpus: Path, alone: dict[str, Any]) -> None:
    parallel, world_size, shares = LAYOUTS[name]
    results = [result for result in run_ranks(on_layout, world_size, corpus, parallel, shares) if result is not None]
    assert len(results) == len(shares)
    names = list(dict.fromkeys(key[0] for key in alone["alone"]))
    for numbers, result in zip(shares, results):
        wanted = {names[i] for i in numbers}
        assert assert_same_answers(result, {k: r for k, r in alone["alone"].items() if k[0] in wanted}) <= 1
