"""Measure the loop of `make speak`: questions -> the language model's spoken turns -> the speech generator -> the judges.

    torchrun --nproc-per-node 2 -m examples.speak.loop LANGUAGE_MODEL SPEECH_GENERATOR --data DIR --out FILE

FILE is a JSON object {"loop": rows}; a row has the question, what the model wrote (whether the turn names the voice that was
asked for, whether its text is right) and the word that is heard in its sound. Sounds to listen to lie beside it.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

from examples.speak.measure import REMEMBERED
from examples.speak.sounds import CODEC
from megatron_omni.platform.device import install

MAX_NEW_TOKENS = 64


def main() -> None:
    """Measure on all ranks; rank 0 writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("language_model", type=Path)
    parser.add_argument("speech_generator", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the corpus")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder that media are named from")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--codec", type=Path, default=CODEC)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    install()

    import torch.distributed as dist

    from examples.speak.listen import Listener
    from examples.speak.parts import SHOWN, gathered, speaking, write_sounds
    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.generation.speech import Utterance
    from megatron_omni.models.generators.codec import load_codec
    from megatron_omni.parallel.groups import destroy

    model = open_checkpoint(options.language_model)
    rows = written(model, options.data / "eval" / "asked.jsonl", root=options.root)
    codec = load_codec(options.codec)
    generator = open_checkpoint(options.speech_generator, pg=model.pg)
    utterances = [
        Utterance(name=str(n), prompt=row["prompt"], text=row["text"])
        for n, row in enumerate(rows)
        if row["prompt"] and row["text"]
    ]
    spoken = speaking(generator, codec)(utterances)
    listener = Listener(options.out.parent.parent.parent / REMEMBERED)
    names = spoken.names()
    waves = [spoken.wave(name) for name in names]
    heard = dict(zip(names, listener.heard(waves, codec.sample_rate, at_most=1)))
    everything = {name: said for found in gathered(heard) for name, said in found.items()}
    for n, row in enumerate(rows):
        row["by_ear"] = everything.get(str(n), []) == [row["expected"]]
    shown = {f"loop.{name}": wave for name, wave in zip(names, waves) if int(name) < SHOWN}
    write_sounds(options.out.parent / options.out.stem, shown, codec.sample_rate)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps({"loop": rows}) + "\n", encoding="utf-8")
    destroy()


def written(checkpoint: Any, path: Path, *, root: Path) -> list[dict[str, Any]]:
    """What the language model writes of every question; the same on all ranks."""
    from examples.speak.parts import BATCH
    from megatron_omni.data.sources import JsonlSource
    from megatron_omni.generation.batches import generate_windows
    from megatron_omni.generation.request import Wanted
    from megatron_omni.generation.speech_turn import parse_speech

    source, tokenizer = JsonlSource(path, name="asked", root=root), checkpoint.builder.tokenizer
    model = checkpoint.load_model()
    answers: dict[int, Any] = {}
    for _, window in generate_windows(
        model,
        lambda n: checkpoint.builder.build_prompt(source[n]),
        range(len(source)),
        wanted=Wanted(max_new_tokens=MAX_NEW_TOKENS),
        tokenizer=tokenizer,
        pg=checkpoint.pg,
        batch_size=BATCH,
    ):
        answers |= window
    rows = []
    for n in range(len(source)):
        record, turns = source[n], parse_speech(answers[n][0].ids, tokenizer)
        wanted = record.messages[-1].speech
        assert wanted is not None
        prompt, text = (tokenizer.decode(turns[0].prompt), tokenizer.decode(turns[0].text)) if turns else ("", "")
        rows.append(
            {
                "number": n, "id": record.id, "question": record.messages[0].content, "expected": wanted.spoken,
                "prompt": prompt, "text": text, "voice": prompt == wanted.prompt, "right": text == wanted.spoken,
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
