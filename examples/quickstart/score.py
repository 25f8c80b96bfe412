"""Score the quickstart: exact match of greedy answers, held out and harder, for the trained model and an untrained one.

    torchrun --nproc-per-node 2 -m examples.quickstart.score RUN_DIR [--data DIR] [--limit N]
    torchrun --nproc-per-node 2 -m examples.quickstart.score RUN_DIR --choice

`--choice` scores the sets that a recipe is chosen by (compose --choice) instead, and writes RUN_DIR/scores_choice.json
only. Otherwise writes RUN_DIR/scores.json ({task: {held_out, harder, untrained, chance, count}}), answers.jsonl with
every answer, and the pictures of pictures.py; prints the table and one example of each task. `untrained` is the same
model with its initial weights.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from megatron_omni.platform.device import install

MAX_NEW_TOKENS = 16
SHORT_STEPS = 500
"""Below, nothing is learned yet (docs/quickstart.md)."""


def main() -> None:
    """Score on all ranks; rank 0 writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--limit", type=int, default=None, help="records of each set (default all)")
    parser.add_argument("--data", type=Path, default=None, help="the corpus (default RUN_DIR/data)")
    parser.add_argument("--choice", action="store_true", help="the sets to choose a recipe by")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    install()

    import torch.distributed as dist

    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.models.build import build_model
    from megatron_omni.parallel.groups import destroy

    checkpoint = open_checkpoint(args.run_dir)
    data = args.data or args.run_dir / "data"
    chance = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["chance"]
    tasks = [task for task in chance if (data / "eval" / f"{task}.held_out.jsonl").exists()]
    model = checkpoint.load_model()
    if args.choice:
        chosen = score_all(checkpoint, model, tasks, "choice", data, args.limit)
        if dist.get_rank() == 0:
            scores = {task: round(score.score, 4) for task, score in chosen.items()}
            (args.run_dir / "scores_choice.json").write_text(json.dumps(scores, indent=1) + "\n")
            print("exact match on the sets to choose by: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        destroy()
        return
    untrained = score_all(
        checkpoint, build_model(checkpoint.recipe, checkpoint.pg), tasks, "held_out", data, args.limit
    )
    held_out, harder = (
        score_all(checkpoint, model, tasks, split, data, args.limit) for split in ("held_out", "harder")
    )
    if dist.get_rank() == 0:
        report(args.run_dir, tasks, held_out=held_out, harder=harder, untrained=untrained, chance=chance)
    destroy()


def score_all(
    checkpoint: Any, model: Any, tasks: list[str], split: str, data: Path, limit: int | None
) -> dict[str, "Scores"]:
    """Task -> its scores, as ``megatron-omni evaluate`` computes them; every rank calls it."""
    from megatron_omni.evaluation.results import counted
    from megatron_omni.evaluation.running import answers_of, limits_for
    from megatron_omni.evaluation.summary import summarise
    from megatron_omni.evaluation.task import load_tasks

    files = [str(data / "eval" / f"{task}.{split}.jsonl") for task in tasks]
    fields = {"metric": "exact_match", "max_new_tokens": MAX_NEW_TOKENS, "limit": limit}
    opened = load_tasks(files, changes=fields)
    lines = answers_of(model, checkpoint.builder, opened, pg=checkpoint.pg, limits=limits_for(60))
    scores = {}
    for name, task in zip(tasks, opened):
        summary, (answers, _) = summarise(task, lines[task.name]), counted(lines[task.name])
        scores[name] = Scores(task.name, summary.score or 0.0, summary.count, answers)
    return scores


class Scores(NamedTuple):
    """Of one set."""

    name: str
    score: float
    count: int
    answers: list[Any]
    """``SampleResult`` of evaluation/results.py, by row."""


def report(
    run_dir: Path, tasks: list[str], *, held_out: Any, harder: Any, untrained: Any, chance: dict[str, float]
) -> None:
    """Write scores, answers and pictures; print the table and an example of each task."""
    from examples.quickstart.pictures import draw_expert_use, draw_losses, draw_scores, read_metrics

    scores = {
        task: {
            "held_out": round(held_out[task].score, 4),
            "harder": round(harder[task].score, 4),
            "untrained": round(untrained[task].score, 4),
            "chance": chance[task],
            "count": held_out[task].count,
        }
        for task in tasks
    }
    (run_dir / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    with (run_dir / "answers.jsonl").open("w", encoding="utf-8") as out:
        for result in (result for split in (held_out, harder) for result in split.values()):
            for answer in result.answers:
                row = {
                    "set": result.name,
                    "question": answer.prompt[-1]["content"],
                    "expected": answer.expected[0],
                    "answer": answer.answer,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    records = read_metrics(run_dir / "metrics.jsonl")
    draw_losses(records, run_dir / "losses.png")
    draw_expert_use(records, run_dir / "expert_use.png")
    draw_scores(scores, run_dir / "scores.png")

    print(
        f"\n{'exact match of the greedy answer':<34}{'held out':>9}{'harder':>9}{'untrained':>11}{'chance':>9}{'count':>7}"
    )
    for task, score in scores.items():
        print(
            f"  {task:<32}{score['held_out']:>9.3f}{score['harder']:>9.3f}{score['untrained']:>11.3f}"
            f"{score['chance']:>9.4f}{score['count']:>7}"
        )
    if records[-1]["step"] < SHORT_STEPS:
        print(
            f"\nafter {records[-1]['step']} steps nearly every answer is still wrong, as it should be: this run shows "
            "that everything works, a full one what is learned"
        )
    print("\none held-out example of each:")
    for task in tasks:
        example = held_out[task].answers[0]
        verdict = "right" if example.correct else f"wrong, expected {example.expected[0]!r}"
        print(f"  {task}: {example.prompt[-1]['content']!r} -> {example.answer!r} ({verdict})")


if __name__ == "__main__":
    main()
