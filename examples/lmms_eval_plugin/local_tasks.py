"""Local tasks of ours in the real lmms-eval, with the model ``megatron_omni`` (``make lmms-eval``).

    .venv-lmms/bin/python examples/lmms_eval_plugin/local_tasks.py --checkpoint runs/quickstart --python .venv/bin/python \
        --data runs/quickstart/data/eval --out runs/lmms_eval [--rows 10] [--against RESULTS]

Held-out records of the quickstart become parquet files and task files under OUT/tasks; lmms-eval asks them of a server that
the plug-in starts. OUT/answers.jsonl has the answers, OUT/scores.json lmms-eval's scores. ``--against`` compares with the
answers of ``megatron-omni evaluate`` to the same records: status 1 where one differs.

Runs with the interpreter that has lmms-eval.
"""

import argparse
import json
import os
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

TASKS = {
    "image": "messages",
    "sound": "messages",
    "speech": "decoded_messages",
    "text": "messages",
    "video": "messages",
}
"""Held-out set of the quickstart -> the function that makes its messages."""
PREFIX = "quickstart_"
NEW_TOKENS = 32
YAML = """task: {task}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {parquet}}}}}
test_split: test
process_docs: !function task_functions.encoded_audio
output_type: generate_until
doc_to_messages: !function task_functions.{messages}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {new_tokens}, temperature: 0.0, do_sample: false, until: ["\\n\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICE = """task: {task}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {parquet}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{[answer, other]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
"""The right answer and that of the next record, by their log-probabilities."""


def write_tasks(data: Path, out: Path, rows: int) -> list[str]:
    """Parquet and task files of the first ``rows`` records of each held-out set; the names of the tasks."""
    import datasets

    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("task_functions.py"), out)
    names = []
    for kind, function in TASKS.items():
        table = read_records(data / f"{kind}.held_out.jsonl", rows)
        files = datasets.Dataset.from_dict(table)
        files = files.cast_column("images", datasets.Sequence(datasets.Image()))
        files = files.cast_column("audios", datasets.Sequence(datasets.Audio(decode=False)))
        parquet = out / f"{kind}.parquet"
        files.to_parquet(parquet)
        task = PREFIX + kind
        text = YAML.format(task=task, parquet=parquet.resolve(), messages=function, new_tokens=NEW_TOKENS)
        (out / f"{task}.yaml").write_text(text, encoding="utf-8")
        names.append(task)
    task = f"{PREFIX}text_choice"
    text = CHOICE.format(task=task, parquet=(out / "text.parquet").resolve())
    (out / f"{task}.yaml").write_text(text, encoding="utf-8")
    return [*names, task]


def read_records(file: Path, rows: int) -> dict[str, list[Any]]:
    """Columns of a parquet file: the question with its markers, the answer, and the media."""
    table: dict[str, list[Any]] = {name: [] for name in ("question", "answer", "other", "images", "audios", "videos")}
    for line in islice(file.open(encoding="utf-8"), rows):
        record = json.loads(line)
        question, answer = (message["content"] for message in record["messages"])
        table["question"].append(question)
        table["answer"].append(answer)
        for kind in ("images", "audios", "videos"):
            paths = [(file.parent / name).resolve() for name in record.get(kind, [])]
            found = (
                [str(p) for p in paths]
                if kind == "videos"
                else [{"bytes": p.read_bytes(), "path": p.name} for p in paths]
            )
            table[kind].append(found)
    answers = table["answer"]
    table["other"] = [*answers[1:], answers[0]]
    return table


def evaluate(tasks: list[str], folder: Path, model_args: str, *, simple: bool = False) -> dict[str, Any]:
    """What lmms-eval finds."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    found = simple_evaluate(
        model="megatron_omni",
        model_args=model_args,
        tasks=tasks,
        task_manager=manager,
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
        force_simple=simple,
    )
    assert found is not None
    return dict(found)


def compare(answers: list[dict[str, Any]], results: Path) -> int:
    """How many answers differ from those of ``megatron-omni evaluate``; each is printed."""
    different = 0
    for task in dict.fromkeys(line["task"] for line in answers):
        file = results / "samples" / f"{task.removeprefix(PREFIX)}.held_out.jsonl"
        theirs = {line["row"]: line for line in map(json.loads, file.open(encoding="utf-8"))}
        for line in answers:
            if line["task"] == task and line["answer"] != (other := theirs[line["row"]].get("answer")):
                different += 1
                print(f"{task}, row {line['row']}: {line['answer']!r} here, {other!r} there")
    print(f"{len(answers) - different} of {len(answers)} answers are those of {results}")
    return different


def main() -> int:
    """Write the tasks, ask them, print the scores, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--python", required=True, help="the interpreter that has megatron_omni")
    parser.add_argument("--data", type=Path, required=True, help="folder of the quickstart's held-out sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10, help="records of each set (default 10)")
    parser.add_argument("--against", type=Path, help="results folder of megatron-omni evaluate on the same records")
    options = parser.parse_args()
    tasks = write_tasks(options.data, options.out / "tasks", options.rows)
    model_args = f"checkpoint={options.checkpoint},python={options.python}"
    found = evaluate(tasks[:-1], options.out / "tasks", model_args)
    chosen = evaluate(tasks[-1:], options.out / "tasks", model_args, simple=True)
    results = found["results"] | chosen["results"]
    scores = {task: {k: v for k, v in results[task].items() if isinstance(v, float)} for task in tasks}
    answers = [
        {"task": task, "row": sample["doc_id"], "answer": sample["resps"][0][0], "expected": sample["target"]}
        for task in tasks[:-1]
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    ]
    (options.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in answers]
    (options.out / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    print(json.dumps(scores, indent=1))
    return 1 if options.against is not None and compare(answers, options.against) else 0


if __name__ == "__main__":
    sys.exit(main())
