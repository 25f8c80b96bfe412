"""Exact-match scoring: what counts, how records are batched and shared out, and what is left out."""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sources import JsonlSource
from megatron_omni.evaluation.scoring import TaskScore, score_source
from megatron_omni.generation import batches
from megatron_omni.generation.batches import Result
from megatron_omni.generation.request import Request
from megatron_omni.models.build import build_model
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import chat, make_corpus, tiny_recipe


class Group:
    """Stands for a process group of one or more ranks."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Groups:
    dp = mp = Group()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("scoring") / "corpus")


@pytest.fixture
def builder(corpus: Path) -> SampleBuilder:
    return SampleBuilder(tiny_recipe(corpus, corpus / "run"))


def source_of(corpus: Path, rows: list[dict[str, Any]], name: str) -> JsonlSource:
    path = corpus / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlSource(path, name=name)


def answering(monkeypatch: pytest.MonkeyPatch, builder: SampleBuilder, answer: Any) -> None:
    """Replace the model by ``answer(question text) -> text``."""

    class Answering:
        leads, broken = True, False

        def __init__(self, model: nn.Module, **_: Any) -> None: ...

        def __enter__(self) -> "Answering":
            return self

        def __exit__(self, *_: object) -> None: ...

        def leading(self) -> AbstractContextManager[None]:
            return nullcontext()

    def answered(engine: Answering, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            text = answer(builder.tokenizer.decode(request.prompt.input_ids.tolist()))
            yield Result(name=request.name, sample=0, ids=builder.tokenizer.encode(text))

    monkeypatch.setattr(batches, "Engine", Answering)
    monkeypatch.setattr(batches, "answered", answered)


def test_share_of_exact_answers(monkeypatch: pytest.MonkeyPatch, corpus: Path, builder: SampleBuilder) -> None:
    rows = [chat("say one", "one"), chat("say two", " two\n"), chat("say three", "three"), chat("say four", "Four")]
    answering(monkeypatch, builder, lambda text: next(w for w in ("one", "two", "four", "red three") if w[-4:] in text))
    score = score_source(nn.Identity(), builder, source_of(corpus, rows, "exact"), pg=Groups)
    assert (score.name, score.score, score.count, score.skipped) == ("exact", 0.5, 4, {})
    assert [answer.correct for answer in score.answers] == [True, True, False, False]
    assert [(a.row, a.question, a.expected) for a in score.answers][2] == (2, "say three", "three")
    limited = score_source(nn.Identity(), builder, source_of(corpus, rows, "exact"), pg=Groups, limit=3, batch_size=1)
    assert [answer.row for answer in limited.answers] == [0, 1, 2]


def test_unusable_records_are_counted_and_left_out(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, builder: SampleBuilder
) -> None:
    rows = [
        chat("say one", "one"),
        chat("<image> what", "one") | {"images": ["missing.png"]},
        {"messages": [{"role": "user", "content": "a question and no answer to it"}]},
        chat("long " * 200, "one"),
    ]
    answering(monkeypatch, builder, lambda text: "one")
    score = score_source(nn.Identity(), builder, source_of(corpus, rows, "unusable"), pg=Groups)
    assert (score.score, score.count) == (1.0, 1)
    assert score.skipped == {"missing_media": 1, "no_answer": 1, "too_long": 1}


def test_impossible_sizes_are_refused(corpus: Path, builder: SampleBuilder) -> None:
    source = source_of(corpus, [chat("say one", "one")], "sizes")
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_source(nn.Identity(), builder, source, pg=Groups, batch_size=0)
    with pytest.raises(ValueError, match="limit is 0"):
        score_source(nn.Identity(), builder, source, pg=Groups, limit=0)


def score_on_rank(rank: Rank, corpus: Path, experts: int) -> TaskScore:
    recipe = tiny_recipe(
        corpus, corpus / "run", model__init_method_std=0.25, parallel__expert_model_parallel_size=experts
    )
    pg = rank.initialize(recipe.parallel)
    source = JsonlSource(corpus / "held_out.jsonl", name="held_out")
    return score_source(
        build_model(recipe, pg), SampleBuilder(recipe), source, pg=pg, max_new_tokens=4, batch_size=2, limit=11
    )


@pytest.mark.parametrize("experts", [1, 2])
def test_data_parallel_ranks_share_the_work_and_know_the_whole(corpus: Path, experts: int) -> None:
    alone = run_ranks(score_on_rank, 1, corpus, 1)[0]
    assert alone.count == 11
    assert len({answer.answer for answer in alone.answers}) > 3
    assert run_ranks(score_on_rank, 2, corpus, experts) == [alone, alone]
