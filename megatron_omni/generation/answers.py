"""Answers to a prompt or to a file of records, written on rank 0 as they come.

    answer.txt      the answer to one prompt
    answer.json     where several samples or log-probabilities are wanted: {"answer", "samples"}
    answers.jsonl   a line for each record, in order: {"record", "id", "answer"}, or {"record", "id", "reason", "error"}
    request.json    what was asked: the checkpoint, the file and the settings that an answer depends on

With ``speech`` the spoken turns of answers are spoken (spoken_answers.py): "answer" is then without marks and prompts, and
"speech" says {"file", "seconds", "codes", "pieces", "cut", "prompt"}, or {"error"}; one prompt writes it to answer.json.

With ``drawing`` the pictures of answers are drawn (drawn_answers.py): "images" lists their files, one prompt writes it to
answer.json, too; "drawing" says {"error"} where one is missing, or {"note"} where the size is another than was asked for.

A line has "samples", too, where several or log-probabilities are wanted, of each {"answer", "finish_reason", "tokens":
[{"id", "text", "logprob", "top": [{"id", "text", "logprob"}]}]}, "tokens" only with log-probabilities.

A record's answer depends on nothing but itself and these settings (its number names it for the sampler), so a run that
ended early goes on after the last whole line; a directory with answers to another request is refused.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_omni.checkpoint.commit import write_text
from megatron_omni.data.decode.cpu import MediaError
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sample import Sample
from megatron_omni.data.sources import JsonlSource
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.foreign import parse_json, read_json
from megatron_omni.generation.batches import Result, generate_windows, shared
from megatron_omni.generation.drawn_answers import AnswerDrawer
from megatron_omni.generation.drawn_files import drawn_into
from megatron_omni.generation.engine import EngineLimits
from megatron_omni.generation.load import Checkpoint
from megatron_omni.generation.request import LEAST_LOGPROB, Wanted
from megatron_omni.generation.spoken_answers import AnswerSpeaker, continued
from megatron_omni.generation.wav import STANDARD_OUTPUT
from megatron_omni.parallel.sharing import from_rank_0

ANSWER, SAMPLES, ANSWERS, REQUEST = "answer.txt", "answer.json", "answers.jsonl", "request.json"
INTERNAL_ERROR = "internal_error"

logger = logging.getLogger(__name__)


def answer_one(
    checkpoint: Checkpoint,
    record: Record,
    *,
    out: Path,
    batch_size: int,
    limits: EngineLimits | None = None,
    think: bool | None = None,
    speech: AnswerSpeaker | None = None,
    sound: str = "",
    drawing: AnswerDrawer | None = None,
    picture: str = "",
    wanted: Wanted,
) -> bool:
    """Answer one prompt, speak it into the file ``sound``, draw it into ``picture``; all ranks call this together. Whether what
    was asked for is there. ValueError for a record that cannot be used."""
    limits = limits or EngineLimits()
    beginning = speech.beginning(record) if speech is not None else []
    # Before the weights: a bad file shows at once.
    prompt = built(checkpoint, record, think=think, speech=speech, drawing=drawing)
    wanted = _with_pictures(wanted, checkpoint, drawing, record, prompt)
    model = checkpoint.load_model()
    windows = generate_windows(
        model,
        lambda _: prompt,
        range(1),
        pg=checkpoint.pg,
        tokenizer=checkpoint.builder.tokenizer,
        batch_size=batch_size,
        limits=limits,
        wanted=wanted,
    )
    ((_, answers),) = windows
    said = _said(answers[0], checkpoint.builder.tokenizer)
    text = "".join(f"{result.text}\n" for result in answers[0])
    if speech is not None:
        said |= speech.speak(
            answers, {0: beginning}, file=lambda _: sound, batch_size=1, deterministic=limits.deterministic
        )[0]
        text = said["answer"] + "\n"
    if drawing is not None:
        said |= drawn_into(drawing, model, lambda _: record, answers, file=lambda _: picture, batch_size=batch_size)[0]
    error = said.get("speech", said.get("drawing", {})).get("error")
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ANSWER, text)
        if said.keys() & {"samples", "speech", "images"}:
            write_text(out / SAMPLES, json.dumps(said, ensure_ascii=False, indent=1) + "\n")
        print(text, end="", file=sys.stderr if sound == STANDARD_OUTPUT else sys.stdout)
        if note := said.get("drawing", {}).get("note"):
            print(note, file=sys.stderr)
        if error is not None:
            print(f"error: {error}", file=sys.stderr)
    return error is None


def built(
    checkpoint: Checkpoint,
    record: Record,
    *,
    think: bool | None,
    speech: AnswerSpeaker | None,
    drawing: AnswerDrawer | None = None,
) -> Sample:
    """The prompt of ``record``; where the answer is to be heard in a voice, with the beginning of its spoken turn."""
    if drawing is not None:
        return drawing.built(record, think=think)
    if speech is None:
        return checkpoint.builder.build_prompt(record, think=think)
    prompt = checkpoint.builder.build_prompt(speech.asked(record), think=think)
    return continued(prompt, speech.beginning(record))


def answer_all(
    checkpoint: Checkpoint,
    source: JsonlSource,
    *,
    changes: list[str],
    out: Path,
    wanted: Wanted,
    batch_size: int,
    limits: EngineLimits,
    think: bool | None = None,
    speech: AnswerSpeaker | None = None,
    sound: str = "",
    drawing: AnswerDrawer | None = None,
    picture: str = "",
) -> bool:
    """Answer every record of ``source`` that has no line yet, speak the answers into the folder ``sound`` and draw their
    pictures into the folder ``picture``; whether any record of the file has an answer.

    All ranks call this together. ``changes`` are overrides that an answer depends on, ``think`` switches the prompts
    (SampleBuilder.build_prompt). ValueError where ``out`` holds answers to something else.
    """
    asked = {
        "checkpoint": str(checkpoint.directory.absolute()),
        "jsonl": str(source.path.absolute()),
        "bytes": source.path.stat().st_size,
        **_as_asked(wanted),
        "deterministic": limits.deterministic,
        "changes": sorted(changes),
        "think": think,
    }
    if speech is not None:
        asked["speech"] = speech.wanted.as_asked() | {"folder": str(Path(sound).absolute())}
    if drawing is not None:
        asked["drawing"] = drawing.wanted.as_asked() | {"folder": str(Path(picture).absolute())}
    first = from_rank_0(lambda: _lines_there(out, asked))
    failed: dict[int, tuple[str, str]] = {}
    said: set[str] = set()

    def build_prompt(number: int) -> Sample | None:
        try:
            return built(checkpoint, source[number], think=think, speech=speech, drawing=drawing)
        except (RecordError, MediaError) as error:
            failed[number] = error.reason, str(error)
        except (OSError, MemoryError):  # the machine's fault, not the record's
            raise
        except Exception as error:  # whatever else a record raises is its own end, not the run's
            if type(error).__name__ not in said:
                said.add(type(error).__name__)
                logger.exception("%s: cannot be used, for a reason that nobody foresaw", source.where(number))
            failed[number] = INTERNAL_ERROR, f"{type(error).__name__}: {error}"
        return None

    def wanted_of(number: int, prompt: Sample) -> Wanted:
        return _with_pictures(wanted, checkpoint, drawing, source[number], prompt)

    if first < len(source):
        model = checkpoint.load_model()
        windows = generate_windows(
            model,
            build_prompt,
            range(first, len(source)),
            batch_size=batch_size,
            pg=checkpoint.pg,
            tokenizer=checkpoint.builder.tokenizer,
            wanted=wanted_of,
            limits=limits,
        )
        for numbers, answers in windows:
            errors = shared({n: failed[n] for n in numbers if n in failed}, checkpoint.pg)
            rows = {n: _said(samples, checkpoint.builder.tokenizer) for n, samples in answers.items()}
            if speech is not None:
                beginnings = {n: speech.beginning(source[n]) for n in answers}
                spoken = speech.speak(
                    answers, beginnings, file=lambda n: str(Path(sound) / f"{n}.wav"), batch_size=batch_size,
                    deterministic=limits.deterministic,
                )  # fmt: skip
                rows = {n: row | spoken[n] for n, row in rows.items()}
            if drawing is not None:
                shown = drawn_into(
                    drawing, model, source.__getitem__, answers, file=lambda n: str(Path(picture) / f"{n}.png"),
                    batch_size=batch_size,
                )  # fmt: skip
                rows = {n: row | shown[n] for n, row in rows.items()}
            from_rank_0(partial(_append, out, source, numbers, rows, errors))  # a full disk is no reason to wait
    return from_rank_0(lambda: _summary(out / ANSWERS, first)) > 0


def _with_pictures(
    wanted: Wanted, checkpoint: Checkpoint, drawing: AnswerDrawer | None, record: Record, prompt: Sample
) -> Wanted:
    """``wanted`` with the pictures of the answer, or without any."""
    if drawing is None:
        return replace(wanted, banned_ids=(*wanted.banned_ids, *checkpoint.builder.unwritten))
    return replace(wanted, block=drawing.asked(record, prompt))


def _as_asked(wanted: Wanted) -> dict[str, Any]:
    """The fields that an answer depends on, as JSON has them."""
    flat = asdict(wanted)
    flat |= flat.pop("sampling")
    del flat["routes"], flat["banned_ids"], flat["block"]  # said beside the answer; nothing that a command asks for
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def _said(samples: Sequence[Result], tokenizer: Tokenizer) -> dict[str, Any]:
    """What a line says of an answer."""
    said: dict[str, Any] = {"answer": samples[0].text}
    if len(samples) > 1 or samples[0].logprobs:
        said["samples"] = [_sample(result, tokenizer) for result in samples]
    return said


def _sample(result: Result, tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_bytes(token).decode("utf-8", "replace")
        return {"id": token, "text": text, "logprob": max(logprob, LEAST_LOGPROB)}

    said: dict[str, Any] = {"answer": result.text, "finish_reason": result.reason}
    if result.logprobs:
        chosen = zip(result.ids, result.logprobs, result.top)  # without the token that ended it
        said["tokens"] = [
            entry(token, logprob) | {"top": [entry(*item) for item in top]} for token, logprob, top in chosen
        ]
    return said


def _lines_there(out: Path, asked: dict[str, Any]) -> int:
    """Whole lines that an earlier run of the same request left in ``out``; what is not whole is cut off."""
    answers, request = out / ANSWERS, out / REQUEST
    if not answers.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_text(request, json.dumps(asked, indent=1) + "\n")
        return 0
    was = read_json(request) if request.is_file() else {}
    if was != asked:
        other = ", ".join(sorted(key for key in asked if was.get(key) != asked[key]))
        raise ValueError(
            f"{answers}: answers to another request ({other} differ); give another --out, or remove the file"
        )
    with answers.open("rb+") as file:
        whole = end = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole, end = whole + 1, end + len(line)
        file.truncate(end)
    return whole


def _append(
    out: Path, source: JsonlSource, numbers: range, said: dict[int, dict[str, Any]], errors: dict[int, tuple[str, str]]
) -> None:
    """Write a window's lines; say each record that could not be used."""
    with (out / ANSWERS).open("a", encoding="utf-8") as file:
        for n in numbers:
            row: dict[str, Any] = {"record": n, "id": _id(source, n)}
            if n in said:
                row |= said[n]
            else:
                row["reason"], row["error"] = errors[n]
                place = source.where(n)
                why = row["error"] if place in row["error"] else f"{place}: {row['error']}"
                print(f"no answer to record {n} (id {row['id']!r}): {why}", file=sys.stderr)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _id(source: JsonlSource, number: int) -> str | None:
    try:
        return source[number].id
    except RecordError:  # not even that could be read; the line's "error" says why
        return None


def _summary(answers: Path, first: int) -> int:
    """Print what the file holds; the number of its answers."""
    reasons: Counter[str | None] = Counter()
    with answers.open("rb") as file:
        for number, line in enumerate(file, 1):
            reasons[parse_json(line, f"{answers}:{number}").get("reason")] += 1
    found = reasons.pop(None, 0)
    without = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    before = f", {first} lines from an earlier start" if first else ""
    print(
        f"{found} answers in {answers}"
        + (f", {reasons.total()} records without one ({without})" if reasons else "")
        + before
    )
    if not found:
        print(f"error: no record could be used ({without}); {answers} says why of each", file=sys.stderr)
    return found
