"""Questions with media, requests of every kind, and a game of random arrivals, for tests and trials of the engine."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy
import torch

from megatron_omni.config.run import Recipe
from megatron_omni.data.record import parse_record
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.generation.batches import Result
from megatron_omni.generation.engine import Engine
from megatron_omni.generation.request import PromptEvent, Request, Sampling
from tests.distributed.tiny_run import make_corpus, tiny_recipe

TOLERANCE = 1e-5
TIE = 1e-4
"""Two best log-probabilities as close as this may change places."""
SAMPLED = Sampling(temperature=1.0, top_p=0.9, seed=5)
QUESTIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "repeat red green blue one two three"}]},
    {"messages": [{"role": "user", "content": "<image> which colour"}], "images": ["0.png"]},
    {"messages": [{"role": "user", "content": "one <audio> how high"}], "audios": ["1.wav"]},
    {"messages": [{"role": "user", "content": "<video> then <image> and <audio> three"}],
     "videos": ["v.mp4"], "images": ["2.png"], "audios": ["2.wav"]},
    {"messages": [{"role": "user", "content": "two " * 70}]},
    {"messages": [{"role": "user", "content": "x"}]},
]  # fmt: skip


def make_media(directory: Path) -> Path:
    """The corpus of the training tests and a clip without sound."""
    make_corpus(directory)
    with av.open(str(directory / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(16):
            pixels = numpy.full((32, 32, 3), 16 * i, dtype=numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return directory


def recipe_for(corpus: Path, **overrides: Any) -> Recipe:
    settings = {
        "data__min_frames": 2, "data__max_frames": 4, "data__max_frames_with_audio": 4, "data__seq_length": 512,
        "model__max_position_embeddings": 1024, **overrides,
    }  # fmt: skip
    return tiny_recipe(corpus, corpus / "run", **({"model__init_method_std": 0.25} | settings))


def placed_questions(corpus: Path) -> list[dict[str, Any]]:
    kinds = ("images", "audios", "videos")
    return [q | {kind: [str(corpus / file) for file in q.get(kind, [])] for kind in kinds} for q in QUESTIONS]


def prompts_of(builder: SampleBuilder, corpus: Path) -> list[Sample]:
    return [builder.build_prompt(parse_record(question)) for question in placed_questions(corpus)]


# ----------------------------------------------------------------------------------------------- requests and schedules


def requests_of(prompts: list[Sample]) -> list[Request]:
    """Greedy and sampled ones, with penalties, with several samples, and of any length."""
    kinds: list[dict[str, Any]] = [
        {"max_new_tokens": 9},
        {"max_new_tokens": 14, "sampling": SAMPLED},
        {"max_new_tokens": 30, "ignore_eos": True},
        {"max_new_tokens": 6, "n": 3, "sampling": replace(SAMPLED, seed=9)},
        {"max_new_tokens": 12, "min_new_tokens": 12,
         "sampling": Sampling(temperature=0.8, top_k=20, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3, seed=2)},
        {"max_new_tokens": 40, "ignore_eos": True, "sampling": Sampling(frequency_penalty=0.5)},
    ]  # fmt: skip
    return [
        Request(name=f"{p}.{k}", prompt=prompt, logprobs=2, **kind)
        for k, kind in enumerate(kinds)
        for p, prompt in enumerate(prompts)
        if (p + k) % 2 == 0
    ]


def by_name(results: Iterator[Result]) -> dict[tuple[str, int], Result]:
    return {(result.name, result.sample): result for result in results}


def played(engine: Engine, requests: list[Request], *, seed: int, cancelled: int = 0) -> dict[tuple[str, int], Result]:
    """Results of ``requests`` that arrive in random order at random steps; some others come and are cancelled."""
    pick = random.Random(seed)
    arrivals = [(pick.randrange(25), request) for request in requests]
    for i in range(cancelled):
        other = replace(pick.choice(requests), name=f"cancelled {i}")
        arrivals.append((pick.randrange(25), other))
    leaving = {f"cancelled {i}": pick.randrange(3, 40) for i in range(cancelled)}
    pick.shuffle(arrivals)
    results: dict[tuple[str, int], Result] = {}
    for step in range(10_000):
        for at, request in arrivals:
            if at == step:
                engine.submit(request)
        for name, at in leaving.items():
            if at == step:
                engine.cancel(name)
        for event in engine.step():
            if not isinstance(event, PromptEvent):
                key = event.name, event.sample
                results.setdefault(key, Result(name=event.name, sample=event.sample)).add(event)
        if step > 40 and not engine.busy:
            break
    for name in leaving:
        ends = [result.reason for result in results.values() if result.name == name]
        assert ends and set(ends) <= {"cancelled", "stop", "length"}
    state = engine.state()
    assert (state.running, state.waiting, state.cache_tokens) == (0, 0, 0)
    return {key: result for key, result in results.items() if key[0] not in leaving}


def assert_same_answers(got: dict[tuple[str, int], Result], alone: dict[tuple[str, int], Result]) -> int:
    """The same tokens, reasons and log-probabilities, up to a tie; how many of them met one."""
    assert got.keys() == alone.keys()
    ties = 0
    for key, expected in alone.items():
        result = got[key]
        tie = next((i for i, top in enumerate(expected.top) if top[0][1] - top[1][1] < TIE), None)
        tokens, wanted = ([*r.ids, *([r.end_id] if r.end_id is not None else [])] for r in (result, expected))
        if tie is not None and tokens != wanted:
            ties += 1
            assert tokens[:tie] == wanted[:tie], key
            continue
        assert (tokens, result.reason) == (wanted, expected.reason), key
        numpy.testing.assert_allclose(result.logprobs, expected.logprobs, rtol=0, atol=TOLERANCE, err_msg=str(key))
        assert result.usage is not None and expected.usage is not None
        assert result.usage.completion == expected.usage.completion == len(tokens)
    return ties


def extended(prompt: Sample, answer: list[int]) -> Sample:
    """``prompt`` and then ``answer``, as a sequence that was never cached."""
    new = torch.tensor(answer, dtype=torch.int64)
    positions = (prompt.next_position + torch.arange(len(answer))).expand(3, -1)
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, new]),
        labels=torch.cat([prompt.labels, torch.full_like(new, -100)]),
        position_ids=torch.cat([prompt.position_ids, positions], dim=1),
        modality=torch.cat([prompt.modality, torch.zeros_like(new)]),
    )
