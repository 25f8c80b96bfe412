"""The tokenizer that travels with a checkpoint: compared between sources, completed with our special tokens, copied.

A vocabulary is known by the id of every token after the special tokens of docs/data.md were appended (as
``data/tokenizer.py`` does when it reads one), so that a source that has them in its file already equals one that has not.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from megatron_omni.data.tokenizer import (
    ALL_SPECIALS,
    AUDIO_END,
    AUDIO_PAD,
    AUDIO_START,
    ENDOFTEXT,
    IM_END,
    IMAGE_GENERATION_SPECIALS,
    SPEECH_SPECIALS,
    Tokenizer,
    load_tokenizer,
)
from megatron_omni.foreign import read_json

NEW_SPECIALS = (AUDIO_START, AUDIO_END, AUDIO_PAD, *SPEECH_SPECIALS, *IMAGE_GENERATION_SPECIALS)
"""What Uni-MoE-2.0 adds to Qwen2.5's special tokens."""
NAMES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.json",
        "chat_template.jinja",
    }
)
"""What belongs to a tokenizer in a Hugging Face directory."""


@dataclass(frozen=True)
class Vocabulary:
    """Which text becomes which ids."""

    path: Path
    digest: str
    """Of what is not special: pieces, merges, added tokens."""
    specials: dict[str, int]
    """Special tokens by name."""
    size: int
    """One more than the largest id."""
    appended: dict[str, int]
    """Special tokens that the file lacks and reading it appends."""


def find_tokenizer(directory: Path) -> Path | None:
    """The tokenizer inside a checkpoint of either kind, as ``data.tokenizer`` takes it; None when there is none."""
    for place in (directory, directory / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            return place
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    return None


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary at ``path``. ValueError for a file that is no tokenizer, or no place for our special tokens."""
    tokenizer = load_tokenizer(path)
    if path.suffix == ".model":
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Vocabulary(path, digest, dict(tokenizer.specials), tokenizer.vocab_size, {})
    file = path / "tokenizer.json" if path.is_dir() else path
    content: dict[str, Any] = read_json(file)
    added = content.get("added_tokens") or []
    plain = {token["content"]: token["id"] for token in added if token["content"] not in tokenizer.specials}
    parts = [content.get(part) for part in ("model", "normalizer", "pre_tokenizer")]
    text = json.dumps([*parts, plain], sort_keys=True)
    present = {token["content"] for token in added}
    known = _pieces(content)
    return Vocabulary(
        path=path,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        specials=dict(tokenizer.specials),
        size=tokenizer.vocab_size,
        appended={n: i for n, i in _ours(tokenizer).items() if n not in present and n not in known},
    )


def stop_ids(specials: dict[str, int]) -> list[int]:
    """Ids that end an answer: the end of a turn, and of a text."""
    return [specials[IM_END], specials[ENDOFTEXT]]


def check_same(first: Vocabulary, second: Vocabulary) -> None:
    """ValueError, naming both files and the first difference, unless both give the same ids."""
    for name in sorted(first.specials.keys() | second.specials.keys()):
        ids = first.specials.get(name), second.specials.get(name)
        if ids[0] != ids[1]:
            raise ValueError(
                f"{second.path}: another tokenizer than {first.path}: {name!r} has id {ids[1]}, expected {ids[0]}; "
                "their rows mean different tokens"
            )
    if first.digest != second.digest:
        raise ValueError(
            f"{second.path}: another tokenizer than {first.path}: found vocabulary {second.digest[:12]}, expected "
            f"{first.digest[:12]}; their rows mean different tokens"
        )


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Write the tokenizer at ``source`` into the directory ``target``, our special tokens in its files; the files."""
    target.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".model":
        return [Path(shutil.copyfile(source, target / "tokenizer.model"))]
    directory = source if source.is_dir() else source.parent
    written = [
        Path(shutil.copyfile(file, target / file.name))
        for file in sorted(directory.iterdir())
        if file.is_file() and file.name in NAMES and file.name != "tokenizer.json"
    ]
    model = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    appended = read_vocabulary(source).appended
    if appended:
        names = sorted(appended, key=appended.__getitem__)
        model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
        for name in names:
            assert model.token_to_id(name) == appended[name], name
    (target / "tokenizer.json").write_text(model.to_str(pretty=True), encoding="utf-8")  # save hides a full disk
    if appended and (target / "tokenizer_config.json").is_file():
        _list_added_tokens(target / "tokenizer_config.json", target / "tokenizer.json")
    return [*written, target / "tokenizer.json"]


def _ours(tokenizer: Tokenizer) -> dict[str, int]:
    return {name: tokenizer.specials[name] for name in ALL_SPECIALS if name in tokenizer.specials}


def _pieces(content: dict[str, Any]) -> set[str]:
    vocabulary = content.get("model", {}).get("vocab", {})
    return set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}


def _list_added_tokens(path: Path, model: Path) -> None:
    """``tokenizer_config.json`` repeats the added tokens; readers that start from there number an incomplete list anew."""
    config = read_json(path)
    added = read_json(model)["added_tokens"]
    config["added_tokens_decoder"] = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added
    }
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
