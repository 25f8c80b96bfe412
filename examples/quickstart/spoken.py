"""Spoken answers for the quickstart's corpus: rows that teach a language model to write the turn that is spoken.

    python -m examples.quickstart.spoken --data DIR [--fast] [--seed N]

    DIR/train/say.jsonl, DIR/eval/say.held_out.jsonl

Half ask for a text to be read, half ask a question of the corpus (a picture, a word, a text; their English answers) and for
the answer to be spoken:

    "cat dog fish\\nread it as flite_slt."                "<image> what is it?\\nanswer as espeak_us."
    -> {"content": "cat", "speech": {"speaker": "espeak_us"}}

The ten training voices are asked for alike. Texts have one to three words of the 64; of two neighbours that the corpus
holds out, none is in training. Sound is not needed here: a speech generator makes it (docs/speech.md).
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from examples.quickstart.assets import Assets, load_assets
from examples.quickstart.compose import is_held_out

SIZE, EVAL_SIZE, FAST_SHARE = 4000, 240, 0.15
ASKED = ("image", "word", "text")
"""Sources whose questions are answered aloud."""
READ, ANSWER = "read it as {voice}.", "answer as {voice}."
"""The wording, which stands for the released one (data/speech_request.py) in few tokens; ``data.voice_request``."""
SPLITS = ("train", "held_out")


def compose_spoken(data: Path, *, seed: int = 0, size: int = SIZE, eval_size: int = EVAL_SIZE) -> None:
    """Write the rows of both splits beside the corpus that lies in ``data``."""
    for split, folder, suffix, count in (("train", "train", "", size), ("held_out", "eval", ".held_out", eval_size)):
        questions = [row for source in ASKED for row in _rows(data / folder / f"{source}{suffix}.jsonl")]
        questions = [row for row in questions if row["messages"][-1]["content"].isascii()]
        lines = []
        for index in range(count):
            rng = np.random.default_rng([seed, 1000, SPLITS.index(split), index])
            row = compose_row(load_assets(), rng, split, questions) | {
                "source": "say",
                "id": f"say.{split}.{index:06d}",
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        (data / folder / f"say{suffix}.jsonl").write_text("".join(lines), encoding="utf-8")


def compose_row(
    assets: Assets, rng: np.random.Generator, split: str, questions: list[dict[str, Any]]
) -> dict[str, Any]:
    """A text to read, or one of ``questions`` to answer aloud."""
    voice = assets.train_voices[int(rng.integers(len(assets.train_voices)))]
    if rng.random() < 0.5 or not questions:
        text = words(assets, rng, split)
        return {"messages": _turns(f"{text}\n{READ.format(voice=voice)}", text, voice)}
    row = questions[int(rng.integers(len(questions)))]
    question, answer = (turn["content"] for turn in row["messages"])
    return row | {"messages": _turns(f"{question}\n{ANSWER.format(voice=voice)}", answer, voice)}


def words(assets: Assets, rng: np.random.Generator, split: str) -> str:
    """One to three words; in training no two neighbours that are held out, in the other split some that are."""
    while True:
        chosen = rng.choice(64, size=int(rng.integers(1, 4)), replace=False).tolist()
        held_out = [is_held_out(a, b) for a, b in pairwise(chosen)]
        if (split == "train" and not any(held_out)) or (split != "train" and (any(held_out) or len(chosen) == 1)):
            return " ".join(assets.english[index] for index in chosen)


def _turns(question: str, answer: str, voice: str) -> list[dict[str, Any]]:
    speech = {"speaker": voice, "language": "English"}
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "speech": speech}]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Parse the command line and compose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--fast", action="store_true", help="as the corpus was made")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    share = FAST_SHARE if args.fast else 1
    compose_spoken(
        args.data, seed=args.seed, size=round(SIZE * share), eval_size=EVAL_SIZE // 4 if args.fast else EVAL_SIZE
    )


if __name__ == "__main__":
    main()
