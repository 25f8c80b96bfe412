"""The stage ``pairs``: rollouts of a reinforced stage in, rows to learn preferences from out.

    run_dir/pairs_<digest>/SOURCE.jsonl   {"messages": [.., chosen], "rejected_response": .., media and columns of the record,
                                           "pair": {"kind", "iteration", "chosen", "rejected"}}
    run_dir/pairs.json                    inputs by hash, counts by reason; written last
    run_dir/judge.*.jsonl                 what a judge said (a second start asks nothing twice)

A pure function of its inputs and the judge. A prompt's responses are those of the last iteration that asked it: the nearest
to the weights that preferences are learned on. Text goes through encode(decode(ids)), as the trainer will encode it; a
response that comes back as other tokens is dropped and counted, and so is one that was cut.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_omni.chain.config import PAIRS_REPORT, PairsConfig
from megatron_omni.chain.handed import (
    digest_of,
    file_digest,
    folder_of,
    handed,
    opened,
    root_of,
    row_of,
    source_digests,
    write_rows,
)
from megatron_omni.chain.verify import DEMONSTRATION, Pair, Response, choose, correct_rewards, fault, is_right
from megatron_omni.checkpoint.commit import write_text
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.objectives import RewardConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.record import Message, Record, RecordError
from megatron_omni.data.sources import JsonlSource, Source
from megatron_omni.data.tokenizer import IM_END, Tokenizer, load_tokenizer
from megatron_omni.foreign import read_json
from megatron_omni.rewards import Rewards, Scores, columns_of
from megatron_omni.rewards.answer import Values
from megatron_omni.rewards.consistency import consistency
from megatron_omni.rewards.rollouts import FOLDER, Rollout, iterations, read_rollouts
from megatron_omni.rewards.shape import is_well_formed, repeated_share

MOST_UNANSWERED = 0.05
"""Share of the responses that a judge may leave without a score."""
_BATCH = 256
"""Responses that are judged in one call."""


class Unanswered(Exception):
    """The judge left too many responses without a score; what it said is kept, so the next start asks for the rest."""


def inputs_of(config: PairsConfig, recipe: Recipe) -> dict[str, Any]:
    """Everything that the pairs depend on, files by their hash. ``recipe`` is that of the stage that rolled out."""
    settings = dataclasses.asdict(config)
    function = config.consistency.function.rpartition(":")[0] if config.consistency is not None else ""
    files = {"demonstrations": config.demonstrations, "consistency": function if function.endswith(".py") else None}
    tokenizer = Path(recipe.data.tokenizer)
    return {
        "settings": {name: value for name, value in settings.items() if name not in ("rollouts", "demonstrations")},
        "rewards": [dataclasses.asdict(reward) for reward in recipe.reinforce.rewards],
        "rollouts": {str(file): file_digest(file) for file in rollout_files(Path(recipe.run_dir))},
        "sources": source_digests(recipe.data.sources),
        "tokenizer": file_digest(tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"),
        **{name: file_digest(Path(file)) for name, file in files.items() if file},
    }


def rollout_files(run_dir: Path) -> list[Path]:
    """ValueError where there is none."""
    files = sorted((run_dir / FOLDER).glob("iter_*.jsonl"))
    if not files:
        raise ValueError(f"{run_dir / FOLDER}: no rollouts; run the stage that makes them, of task reinforce")
    return files


def last_rollouts(run_dir: Path) -> dict[tuple[str, int], list[Rollout]]:
    """Of every record that was asked, the responses of the last iteration that asked it, in order."""
    found: dict[tuple[str, int], list[Rollout]] = {}
    for iteration in iterations(run_dir):
        groups: dict[tuple[str, int], list[Rollout]] = {}
        for rollout in read_rollouts(run_dir, iteration):
            groups.setdefault(rollout.place, []).append(rollout)
        found |= groups
    return {place: found[place] for place in sorted(found)}


def made_of(run_dir: Path) -> dict[str, Any] | None:
    """What pairs.json says; None before it is there."""
    return read_json(run_dir / PAIRS_REPORT) if (run_dir / PAIRS_REPORT).is_file() else None


def pair_sources(run_dir: Path, rolled: Recipe, reader: Recipe) -> list[SourceConfig]:
    """The rows of finished pairs as sources of ``reader``, drawn alike, each as often as its first source says.

    ``rolled`` is the recipe of the stage that rolled out.
    """
    report = made_of(run_dir)
    assert report is not None
    folder, counts = folder_of(run_dir, "pairs", report["digest"]), report["by_source"]
    epochs = reader.data.sources[0].epochs if reader.data.sources else None
    return [
        dataclasses.replace(handed(source, folder), weight=float(counts[source.name]), epochs=epochs)
        for source in rolled.data.sources
        if counts.get(source.name)
    ]


def make_pairs(config: PairsConfig, recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Write the pairs and say what pairs.json holds. ValueError for inputs that cannot work, :class:`Unanswered`."""
    inputs = inputs_of(config, recipe)
    digest = digest_of(inputs)
    names = correct_rewards(config, recipe)
    sources = opened(recipe.data.sources, "pairs")
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    groups = last_rollouts(Path(recipe.run_dir))
    records = {place: _record(group[0], sources) for place, group in groups.items()}
    run_dir.mkdir(parents=True, exist_ok=True)
    verified = {place: [_verified(one, names, config, tokenizer) for one in group] for place, group in groups.items()}
    verified = _judged(verified, groups, records, config, run_dir)
    unsolved = [records[place] for place, group in verified.items() if all(r.right is False for r in group)]
    taught = _demonstrations(config, recipe, names, unsolved, tokenizer, run_dir)
    rows: dict[str, list[dict[str, Any]]] = {source.name: [] for source in recipe.data.sources}
    roots = {source.name: root_of(source) for source in recipe.data.sources}
    responses, without, kinds = Counter[str](), Counter[str](), Counter[str]()
    for place, group in verified.items():
        responses.update(_said(response, config) for response in group)
        pairs, why = choose(group, taught.get(records[place].id), config)
        without.update([why] if why else [])
        kinds.update(pair.kind for pair in pairs)
        kinds.update(DEMONSTRATION for pair in pairs if pair.chosen.name == DEMONSTRATION)
        rows[place[0]] += [_row(pair, records[place], roots[place[0]]) for pair in pairs]
    if not any(rows.values()):
        raise ValueError(
            f"pairs: none of {len(groups)} prompts gives a pair (prompts: {_listed(without)}; responses: "
            f"{_listed(responses)}); roll out more, or change what is right or consistent"
        )
    write_rows(folder_of(run_dir, "pairs", digest), {name: found for name, found in rows.items() if found})
    report = {
        "digest": digest, "pairs": sum(map(len, rows.values())), "prompts": len(groups),
        "by_source": {name: len(found) for name, found in rows.items()}, "by_kind": dict(kinds),
        "prompts_without": dict(without), "responses": dict(responses), "inputs": inputs,
    }  # fmt: skip
    write_text(run_dir / PAIRS_REPORT, json.dumps(report, indent=1) + "\n")
    return report


def _record(rollout: Rollout, sources: Mapping[str, Source]) -> Record:
    """The record that a rollout answers; ValueError where the data are others by now."""
    try:
        record = sources[rollout.source][rollout.record]
        asked = [m.content for m in record.messages if m.role == "user"]
        if asked == [turn["content"] for turn in rollout.turns if turn["role"] == "user"]:
            return record
    except (KeyError, IndexError, RecordError):
        pass
    raise ValueError(
        f"rollout {rollout.iteration}.{rollout.g} of {rollout.where}: source {rollout.source!r} has another record there now; "
        "leave the data alone, or roll out again"
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _row(pair: Pair, record: Record, root: Path) -> dict[str, Any]:
    row = row_of(dataclasses.replace(record, messages=_asked(record)), root)
    row["messages"].append({"role": "assistant", "content": pair.chosen.text})
    row["rejected_response"] = pair.rejected.text
    row["pair"] = {"kind": pair.kind, "chosen": pair.chosen.name, "rejected": pair.rejected.name}
    return row


# ---------------------------------------------------------------------------------------------------- what responses are


def _verified(rollout: Rollout, names: Sequence[str], config: PairsConfig, tokenizer: Tokenizer) -> Response:
    """All but whether its thought leads to its answer."""
    return Response(
        name=f"{rollout.iteration}.{rollout.g}",
        text=(text := tokenizer.decode(rollout.token_ids)),
        tokens=rollout.tokens,
        right=is_right(rollout.rewards, names, config),
        well_formed=is_well_formed(text),
        repetition=repeated_share(rollout.token_ids),
        whole=rollout.finish == "stop" and comes_back(rollout.token_ids, tokenizer),
    )


def comes_back(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a response is, with its end token, what the trainer makes of its text."""
    return [*tokenizer.encode(tokenizer.decode(ids)), tokenizer.special(IM_END)] == list(ids)


def _said(response: Response, config: PairsConfig) -> str:
    """What a response counts as in the report."""
    if not response.whole:
        return "cut_or_other_tokens"
    if response.right is None:
        return "not_rated"
    if response.right and response.consistent is None and response.well_formed:
        return "not_judged"
    found = fault(response, config)
    return found or ("right" if response.right else "wrong_and_malformed")


def _judged(
    verified: Mapping[tuple[str, int], list[Response]],
    groups: Mapping[tuple[str, int], list[Rollout]],
    records: Mapping[tuple[str, int], Record],
    config: PairsConfig,
    run_dir: Path,
) -> dict[tuple[str, int], list[Response]]:
    """Those that are whole and right, with what says whether they are consistent."""
    asked = [
        (place, number)
        for place, responses in verified.items()
        for number, response in enumerate(responses)
        if response.whole and response.right
    ]
    values = _consistency(
        config.consistency,
        [verified[place][number].text for place, number in asked],
        [groups[place][number].token_ids for place, number in asked],
        [records[place] for place, _ in asked],
        run_dir,
    )
    out = {place: list(responses) for place, responses in verified.items()}
    for (place, number), value in zip(asked, values, strict=True):
        out[place][number] = dataclasses.replace(out[place][number], consistent=_holds(value, config))
    return out


def _holds(value: float | None, config: PairsConfig) -> bool | None:
    return None if value is None else value >= config.consistent_at


def _consistency(
    reward: RewardConfig | None,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    records: Sequence[Record],
    run_dir: Path,
) -> Values:
    """Of whole responses to the prompts of ``records``; :class:`Unanswered` where the judge is away."""
    if reward is None:
        return consistency(completions=texts)
    if reward.function == "judge":
        reward = dataclasses.replace(reward, settings={"template": "consistent", **reward.settings})
    values: Values = []
    unanswered = 0.0
    with Rewards([reward], run_dir=run_dir) as rewards:
        for start in range(0, len(texts), _BATCH):
            part = slice(start, start + _BATCH)
            scores = _scores(rewards, texts[part], ids[part], records[part])
            unanswered += scores.unanswered_share * len(texts[part])
            values += scores.values[rewards.names[0]]
    if unanswered > MOST_UNANSWERED * len(texts):
        raise Unanswered(
            f"the judge gave no score to {unanswered:.0f} of {len(texts)} responses; what it said is kept, so start again "
            "when it answers"
        )
    return values


def _scores(rewards: Rewards, texts: Sequence[str], ids: Sequence[Sequence[int]], records: Sequence[Record]) -> Scores:
    return rewards.score(
        completions=texts,
        prompts=["\n".join(turn.content for turn in _asked(record)) for record in records],
        completion_ids=ids,
        finish_reasons=["stop"] * len(texts),
        step=0,
        columns=columns_of([one.extra for one in records], [one.answer or None for one in records]),
        records=[one.where for one in records],
    )


def _asked(record: Record) -> tuple[Message, ...]:
    """Its turns without the answer at its end."""
    return record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages


# ---------------------------------------------------------------------------------------------------- demonstrations


def _demonstrations(
    config: PairsConfig,
    recipe: Recipe,
    names: Sequence[str],
    unsolved: Sequence[Record],
    tokenizer: Tokenizer,
    run_dir: Path,
) -> dict[str, Response]:
    """A teacher's answers by the id of their prompt, checked by what checked the responses."""
    if config.demonstrations is None:
        return {}
    answers = _taught(Path(config.demonstrations))
    records = [record for record in unsolved if record.id in answers]
    if not records:
        return {}
    texts = [answers[record.id] for record in records]
    ids = [[*tokenizer.encode(text), tokenizer.special(IM_END)] for text in texts]
    configs = [reward for reward in recipe.reinforce.rewards if reward.function.rpartition(":")[2] in names]
    with Rewards(configs, run_dir=run_dir) as rewards:
        values = _scores(rewards, texts, ids, records).values
    consistency = _consistency(config.consistency, texts, ids, records, run_dir)
    return {
        record.id: Response(
            name=DEMONSTRATION,
            text=texts[place],
            tokens=len(ids[place]),
            right=is_right({key: of[place] for key, of in values.items()}, names, config),
            well_formed=is_well_formed(texts[place]),
            repetition=repeated_share(ids[place]),
            whole=comes_back(ids[place], tokenizer),
            consistent=_holds(consistency[place], config),
        )
        for place, record in enumerate(records)
    }


def _taught(path: Path) -> dict[str, str]:
    """id -> the answer at the end of a row; ValueError for a row without one of them, and for an id that is there twice."""
    source = JsonlSource(path, name="demonstrations", root="/")
    answers: dict[str, str] = {}
    for number in range(len(source)):
        try:
            record = source[number]
        except RecordError as error:
            raise ValueError(f"demonstrations: {error}") from error
        if not record.id or not record.answer:
            what = "id" if not record.id else "answer at its end"
            raise ValueError(
                f"demonstrations: {record.where}: has no {what}; a row names its prompt by id and answers it"
            )
        if record.id in answers:
            raise ValueError(f"demonstrations: {record.where}: id {record.id!r} is there twice; keep one of them")
        answers[record.id] = record.answer
    return answers
