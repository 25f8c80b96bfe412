"""Blocks of pictures in answers: the rows that are told are those of one forward over the whole conversation, on every layout,
in any company, and wherever the block stands (image.md 8.7)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.generation.batches import Result, answered
from megatron_omni.generation.blocks import from_bytes
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.request import Block, Request
from megatron_omni.models.build import build_model
from megatron_omni.models.omni import OmniModel
from tests.distributed.generation_requests import SAMPLED, by_name, extended, make_media, played, prompts_of, recipe_for
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import EP, PP, TP

TAIL = (61, 62, 63, 64, 65, 66, 67)
"""Tokens of a block behind its first one."""
ROOMY = EngineLimits(max_running=12, cache_tokens=8192)
TIGHT = EngineLimits(max_running=4, max_batch_tokens=11, cache_tokens=256)
"""Blocks are computed in parts, and answers lose their places."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("blocks") / "corpus")


@pytest.fixture(scope="module")
def alone(corpus: Path) -> dict[str, Any]:
    return run_ranks(one_rank, 1, corpus)[0]


def requests_of(prompts: list[Sample], said: int) -> list[Request]:
    """``said``: what the model says somewhere in a greedy answer to prompt 0."""
    first = Block(ids=(60, *TAIL), where="first")
    asked: dict[str, dict[str, Any]] = {
        "first": {"block": first, "max_new_tokens": 6},
        "first alone": {"block": first, "max_new_tokens": 1, "ignore_eos": True},
        "end": {"block": Block(ids=(60, *TAIL), where="end"), "max_new_tokens": 9, "ignore_eos": True},
        "chosen": {"block": Block(ids=(said, *TAIL)), "max_new_tokens": 20, "ignore_eos": True},
        "twice": {"block": Block(ids=(said, *TAIL), most=2), "max_new_tokens": 24, "ignore_eos": True},
        "sampled": {"block": first, "max_new_tokens": 6, "n": 3, "sampling": SAMPLED, "ignore_eos": True},
    }
    requests = [Request(name=name, prompt=prompts[0], **settings) for name, settings in asked.items()]
    for number in (1, 3):  # with pictures: the rows of the second prompt's are told, too
        vision = None if number == 3 else (2, 4)
        requests.append(Request(name=f"seen {number}", prompt=prompts[number], max_new_tokens=3, ignore_eos=True,
                                block=replace(first, vision=vision)))  # fmt: skip
    return requests


def one_rank(rank: Rank, corpus: Path) -> dict[str, Any]:
    recipe = recipe_for(corpus)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model = build_model(recipe, pg)
    prompts = prompts_of(builder, corpus)

    def engine(limits: EngineLimits) -> Engine:
        return Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits)

    with engine(ROOMY) as one:
        (plain,) = answered(one, [Request(name="p", prompt=prompts[0], max_new_tokens=12, ignore_eos=True)])
    said = plain.ids[4]
    requests = requests_of(prompts, said)
    told: dict[str, Any] = {"said": said, "plain": plain.ids, "requests": requests}
    with engine(ROOMY) as one:
        told["alone"] = {k: r for request in requests for k, r in by_name(answered(one, [request])).items()}
    with engine(replace(ROOMY, prefix_cache=True)) as one:
        told["kept"] = played(one, requests, seed=1)
        told["kept again"] = played(one, requests, seed=2)
        assert one.state().cached_tokens > 0
    with engine(TIGHT) as one:
        told["tight"] = played(one, requests, seed=3, cancelled=4)
        told["set back"] = one.state().set_back
    with engine(replace(ROOMY, decoding="fixed")) as one:
        told["fixed"] = by_name(answered(one, requests))
    model.eval()
    told["rows"] = {key: whole_rows(model, requests, key, result) for key, result in told["alone"].items()}
    told["vision"] = model.vision(prompts[1].tiles).flatten(0, 1).detach()
    told["refused"] = refusals(engine(ROOMY), prompts)
    return told


def said_by(request: Request, result: Result) -> tuple[list[int], list[int]]:
    """All tokens of an answer, and where its blocks begin."""
    block = request.block
    assert block is not None
    tokens, begins = [], []
    if block.where == "first":
        tokens, begins = [*block.ids], [0]
    for token in result.ids:
        begin = token == block.ids[0] and len(begins) < block.most
        begins += [len(tokens)] if begin else []
        tokens += block.ids if begin else [token]
    if block.where == "end" and not begins:
        begins, tokens = [len(tokens)], [*tokens, *block.ids]
    return tokens, begins


@torch.no_grad()
def whole_rows(model: OmniModel, requests: list[Request], key: tuple[str, int], result: Result) -> list[Tensor]:
    """[T, H] of each block by one forward without a cache."""
    (request,) = (r for r in requests if r.name == key[0])
    tokens, begins = said_by(request, result)
    assert request.block is not None
    kept: list[Tensor] = []
    hook = model.language.decoder.final_norm.register_forward_hook(lambda _m, _i, output: kept.append(output))
    model(collate([extended(request.prompt, tokens)], pad_id=0), step=0, stochastic=False, compute_loss=False)
    hook.remove()
    starts = [request.prompt.length + begin for begin in begins]
    return [kept[0][start : start + len(request.block.ids), 0] for start in starts]


def refusals(engine: Engine, prompts: list[Sample]) -> dict[str, str]:
    bad: dict[str, Any] = {
        "vocabulary": Block(ids=(60, 100_000)),
        "vision": Block(ids=(60, 61), vision=(0, 9)),
    }
    told = {}
    with engine:
        for what, block in bad.items():
            with pytest.raises(ValueError) as caught:
                engine.submit(Request(name=what, prompt=prompts[0], max_new_tokens=2, block=block))
            told[what] = str(caught.value)
    return told


def rows_of(result: Result, width: int) -> list[Tensor | None]:
    return [from_bytes(event.hidden, width) for event in result.blocks]


def assert_same_rows(got: dict[tuple[str, int], Result], alone: dict[str, Any]) -> None:
    assert got.keys() == alone["rows"].keys()
    for key, expected in alone["rows"].items():
        rows = rows_of(got[key], expected[0].shape[1])
        assert [event.number for event in got[key].blocks] == [*range(len(expected))], key
        for own, wanted in zip(rows, expected, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5, msg=lambda m: f"{key}: {m}")  # noqa: B023


def test_rows_of_a_block_are_those_of_one_forward(alone: dict[str, Any]) -> None:
    assert_same_rows(alone["alone"], alone)
    rows = [rows for found in alone["rows"].values() for rows in found]
    assert len(rows) == 11 and min(float(r.std()) for r in rows) > 0.1, "rows too small to tell a mistake"


def test_rows_do_not_depend_on_what_runs_beside_them(alone: dict[str, Any]) -> None:
    assert alone["set back"] > 0, "the cache was not tight"
    for company in ("kept", "kept again", "tight", "fixed"):
        assert_same_rows(alone[company], alone)


def test_where_a_block_stands(alone: dict[str, Any]) -> None:
    plain, said, results = alone["plain"], alone["said"], alone["alone"]
    at = plain.index(said)
    counts = {key: len(result.blocks) for key, result in results.items()}
    assert counts.pop(("twice", 0)) == 2 and set(counts.values()) == {1}
    chosen = results["chosen", 0]
    assert chosen.ids[: at + 1] == plain[: at + 1] and said not in chosen.ids[at + 1 :] and len(chosen.ids) == 20
    assert results["twice", 0].ids.count(said) == 2
    end = results["end", 0]
    assert (end.ids, end.reason) == (plain[:9], "length")
    alone_first = results["first alone", 0]
    assert len(alone_first.ids) == 1 and alone_first.usage.completion == 1
    for result in results.values():
        assert not {*TAIL, 60} & {*result.ids}, "no other token of a block is chosen"
    assert len({tuple(results["sampled", i].ids) for i in range(3)}) > 1


def test_an_end_without_a_picture_becomes_one(corpus: Path) -> None:
    told = run_ranks(ended, 1, corpus)[0]
    assert (told["plain"].ids, told["drawn"].ids) == (told["plain"].ids, told["plain"].ids)
    assert told["plain"].reason == "stop" and len(told["drawn"].blocks) == 1


def ended(rank: Rank, corpus: Path) -> dict[str, Any]:
    """Of an answer that a stop token ends."""
    recipe = recipe_for(corpus)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    model, prompt = build_model(recipe, pg), prompts_of(builder, corpus)[0]
    with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=ROOMY) as engine:
        (long,) = answered(engine, [Request(name="p", prompt=prompt, max_new_tokens=12, ignore_eos=True)])
        stop = Request(name="stop", prompt=prompt, max_new_tokens=12, ignore_eos=True, stop_ids=(long.ids[6],))
        block = Block(ids=(60, *TAIL), where="end")
        drawn = replace(stop, name="drawn", block=block, banned_ids=())
        (plain,), (with_one,) = answered(engine, [stop]), answered(engine, [drawn])
    with_one.ids = with_one.ids[: len(plain.ids)]
    return {"plain": plain, "drawn": with_one}


def test_rows_of_the_vision_encoder_are_told(alone: dict[str, Any]) -> None:
    wanted = alone["vision"]
    (event,) = alone["alone"]["seen 1", 0].blocks
    torch.testing.assert_close(from_bytes(event.vision, wanted.shape[1]), wanted[2:4], rtol=1e-5, atol=1e-5)
    assert alone["alone"]["seen 3", 0].blocks[0].vision == b""


def test_what_cannot_be_is_refused(alone: dict[str, Any]) -> None:
    assert "block.ids has token 100000" in alone["refused"]["vocabulary"]
    assert "0 rows of pictures" in alone["refused"]["vision"]
    for bad in ({"ids": (5,)}, {"ids": (5, 6, 5)}, {"ids": (5, 6), "most": 0}, {"ids": (5, 6), "most": 17}):
        with pytest.raises(ValueError, match=r"block\."):
            Block(**bad)


# ---------------------------------------------------------------------------------------------------------------- layouts


def on_a_layout(rank: Rank, corpus: Path, layout: dict[str, Any], said: int) -> dict[tuple[str, int], Result]:
    recipe = recipe_for(corpus, **layout)
    pg = rank.initialize(recipe.parallel)
    builder = SampleBuilder(recipe)
    requests = requests_of(prompts_of(builder, corpus), said)
    with Engine(build_model(recipe, pg), tokenizer=builder.tokenizer, pg=pg, limits=ROOMY) as engine:
        if not engine.leads:
            engine.follow()
            return {}
        return played(engine, requests[pg.dp.rank() :: pg.dp.size()], seed=5)


@pytest.mark.parametrize("layout", [TP, PP, EP], ids=["TP2", "PP2", "EP2"])
def test_rows_are_the_same_on_every_layout(corpus: Path, alone: dict[str, Any], layout: dict[str, Any]) -> None:
    parts = run_ranks(on_a_layout, 2, corpus, layout, alone["said"])
    assert_same_rows({key: result for part in parts for key, result in part.items()}, alone)


def test_bytes_are_rows() -> None:
    rows = torch.randn(3, 5).bfloat16()
    from megatron_omni.generation.blocks import as_bytes

    assert torch.equal(from_bytes(as_bytes(rows), 5), rows.float()) and from_bytes(as_bytes(None), 5) is None
    assert numpy.frombuffer(as_bytes(torch.tensor([[1.0]])), "<f4").tolist() == [1.0]
