"""Measure whether a checkpoint thinks: accuracy in five ways of asking, and what its thoughts are like.

    torchrun --nproc-per-node 2 -m examples.reason.measure CHECKPOINT ... --questions DIR ... --out FILE
        [--ways greedy sampled] [--samples 4] [--limit N] [--seed 0]

FILE is a JSON list with an entry for each checkpoint and set of questions: {"checkpoint", "questions"}, "scores" of "all",
"picture", "speech" and "clip", and the responses. Scores, each a share of ``count`` questions:

    greedy           right answers, at temperature 0
    sampled          right answers, at temperature 1 with ``--samples`` each; of these responses also
                     format (one whole thought first), contradiction (the answer is not what the thought comes to, or it
                     comes to nothing; questions.contradicts), length (tokens, the end token included), cut (no end token)
    no_think         right answers at temperature 0 without the system turn that asks for a thought
    swapped_thought  with the greedy thought of another question forced in: answers that follow it, of the questions where
                     that thought comes to something else than is right
    swapped_media    right answers, at temperature 0, with the media of another question

No score is a reward: rewards.py knows nothing of these rules.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.reason.ask import Asked, at_once, neighbours, prompt_of, read_questions, with_media_of, with_thought_of
from examples.reason.questions import SOURCES, contradicts, split
from megatron_omni.platform.device import install

WAYS = ("greedy", "sampled", "no_think", "swapped_thought", "swapped_media")
MAX_NEW_TOKENS = 20
"""The longest right answer has 14 tokens."""
BATCH = 64


@dataclass(frozen=True)
class Response:
    """What a model said."""

    source: str
    id: str
    expected: str
    text: str
    tokens: int
    cut: bool

    @property
    def right(self) -> bool:
        """The answer behind the thought, to the letter."""
        return split(self.text)[1] == self.expected


Ask = Callable[[Sequence[Asked], float, int], list[list[Response]]]
"""Questions, temperature and samples of each -> responses by question."""


def measure(ask: Ask, questions: Sequence[Asked], *, ways: Sequence[str], samples: int) -> dict[str, list[Response]]:
    """Responses by way of asking."""
    said: dict[str, list[Response]] = {}
    partner = neighbours(questions, seed=len(questions))
    if "greedy" in ways or "swapped_thought" in ways:
        said["greedy"] = _flat(ask(questions, 0.0, 1))
    if "sampled" in ways:
        said["sampled"] = _flat(ask(questions, 1.0, samples))
    if "no_think" in ways:
        said["no_think"] = _flat(ask([at_once(asked) for asked in questions], 0.0, 1))
    if "swapped_thought" in ways:
        thoughts = [said["greedy"][other].text for other in partner]
        forced = [with_thought_of(asked, thought) for asked, thought in zip(questions, thoughts)]
        said["swapped_thought"] = _flat(ask([asked for asked in forced if asked is not None], 0.0, 1))
    if "swapped_media" in ways:
        swapped = [with_media_of(asked, questions[other]) for asked, other in zip(questions, partner)]
        said["swapped_media"] = _flat(ask(swapped, 0.0, 1))
    return {way: said[way] for way in WAYS if way in ways}


def scores_of(said: dict[str, list[Response]]) -> dict[str, float | int]:
    """The scores of the table above; a way in which nothing was asked scores 0."""
    scores: dict[str, float | int] = {way: _mean([one.right for one in given]) for way, given in said.items()}
    if "sampled" in said:
        given = said["sampled"]
        scores |= {
            "format": _mean([split(one.text)[0] is not None and bool(split(one.text)[1]) for one in given]),
            "contradiction": _mean([contradicts(one.text) for one in given]),
            "length": _mean([one.tokens for one in given]),
            "cut": _mean([one.cut for one in given]),
        }
    counts = [len({one.id for one in given}) for way, given in said.items() if way != "swapped_thought"]
    return {**scores, "count": max(counts, default=0)}


def by_source(said: dict[str, list[Response]]) -> dict[str, dict[str, float | int]]:
    """Scores of all questions and of each source."""
    parts = {name: {way: [one for one in given if one.source == name] for way, given in said.items()}
             for name in SOURCES}  # fmt: skip
    return {"all": scores_of(said), **{name: scores_of(part) for name, part in parts.items()}}


def _flat(given: list[list[Response]]) -> list[Response]:
    return [response for responses in given for response in responses]


def _mean(values: Sequence[float]) -> float:
    return round(fmean(values), 4) if values else 0.0


def asker(checkpoint: Any, model: Any, *, seed: int) -> Ask:
    """Asks a model that is loaded; all ranks call what it returns together."""
    from megatron_omni.generation.batches import generate_windows
    from megatron_omni.generation.request import Sampling, Wanted

    tokenizer = checkpoint.builder.tokenizer

    def ask(questions: Sequence[Asked], temperature: float, samples: int) -> list[list[Response]]:
        wanted = Wanted(max_new_tokens=MAX_NEW_TOKENS, sampling=Sampling(temperature=temperature, seed=seed), n=samples)
        answers: dict[int, list[Any]] = {}
        for _, window in generate_windows(
            model,
            lambda n: prompt_of(questions[n], checkpoint.builder),
            range(len(questions)),
            wanted=wanted,
            tokenizer=tokenizer,
            pg=checkpoint.pg,
            batch_size=BATCH,
        ):
            answers |= window
        return [[response(asked, result) for result in answers[n]] for n, asked in enumerate(questions)]

    def response(asked: Asked, result: Any) -> Response:
        text, record = tokenizer.decode(result.ids), asked.record
        tokens = len(result.ids) + (result.end_id is not None)
        return Response(record.source, record.id, asked.expected, text, tokens, result.reason == "length")

    return ask


def main() -> None:
    """Measure on all ranks; rank 0 writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="run directories or checkpoints")
    parser.add_argument("--questions", type=Path, nargs="+", required=True, help="sets of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--samples", type=int, default=4, help="of each question at temperature 1")
    parser.add_argument("--limit", type=int, default=None, help="questions of each source (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    install()

    import torch.distributed as dist

    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.parallel.groups import destroy

    sets = {folder: read_questions(folder, limit=options.limit) for folder in options.questions}
    measured, pg = [], None
    for path in options.checkpoints:
        checkpoint = open_checkpoint(path, pg=pg)
        pg = checkpoint.pg
        ask = asker(checkpoint, checkpoint.load_model(), seed=options.seed)
        for folder, questions in sets.items():
            said = measure(ask, questions, ways=options.ways, samples=options.samples)
            rows = {way: [asdict(one) for one in given] for way, given in said.items()}
            entry = {"checkpoint": str(path), "questions": str(folder), "scores": by_source(said), "responses": rows}
            measured.append(entry)
            if dist.get_rank() == 0:
                shown = "  ".join(f"{name} {value}" for name, value in entry["scores"]["all"].items())
                print(f"{path}, {folder.name}: {shown}", flush=True)
    if dist.get_rank() == 0:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    destroy()


if __name__ == "__main__":
    main()
