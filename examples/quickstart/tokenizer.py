"""Train the quickstart's SentencePiece tokenizer on the words and phrases of its corpus.

python -m examples.quickstart.tokenizer --corpus DIR/tokenizer_corpus.txt --out FILE.model
"""

import argparse
from pathlib import Path

from examples.quickstart.assets import load_voices
from megatron_omni.data.tokenizer import ALL_SPECIALS, load_tokenizer, train_sentencepiece

VOCAB_SIZE = 1024
WHOLE = ("<think>", "</think>", "<answer>", "</answer>", *"0123456789")
"""Marks of thinking and figures, beside the names of the voices: one piece each. Nothing here uses them yet; speech,
pictures and reinforcement learning start from this model and may not change its vocabulary."""


def train_tokenizer(text: str, path: Path) -> Path:
    """The quickstart's tokenizer from the lines of its corpus, written to `path`."""
    whole = [*WHOLE, *load_voices()]
    return train_sentencepiece(
        [text], path, vocab_size=VOCAB_SIZE, model_type="bpe", specials=ALL_SPECIALS, whole=whole
    )


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train_tokenizer(args.corpus.read_text(encoding="utf-8"), args.out)
    print(f"{args.out}: {load_tokenizer(args.out).vocab_size} pieces")


if __name__ == "__main__":
    main()
