"""What an export writes beside the weights: ``config.json``, how to generate, tokenizer, chat template, processor.

A file that the source brought (``hf/`` in the checkpoint) is kept; what our model or recipe decides is ours in it. The
chat template is the source's own until ``data.system_prompt`` is set: then it is ours, and puts that turn before a
conversation without one, as training did.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from megatron_omni.checkpoint import commit, uni_moe
from megatron_omni.checkpoint.families import FAMILIES
from megatron_omni.checkpoint.sources import read_json
from megatron_omni.checkpoint.tokenizer_files import copy_tokenizer, find_tokenizer, read_vocabulary, stop_ids
from megatron_omni.checkpoint.uni_moe_files import (
    PREPROCESSOR_FILE,
    TEMPLATE_FILE,
    chat_template,
    preprocessor_config,
)
from megatron_omni.config.run import Recipe

GENERATION_FILE = "generation_config.json"
STOP_FIELDS = ("eos_token_id", "pad_token_id")
GENERATOR_FIELD = "tune_image_generator"
"""Of ``config.json``. Where our model draws nothing it tells of weights that are carried."""
JINJA_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"

logger = logging.getLogger(__name__)


def write_documents(
    directory: Path, *, checkpoint: Path, documents: Path | None, recipe: Recipe, family: str, dtype: str
) -> None:
    """Everything but weights and ledger of an export of ``checkpoint`` into ``directory``.

    ``documents``: the directory with a folder of kept files for each family; ``dtype`` as ``bfloat16``.
    """
    folder = documents / family if documents is not None else None
    if folder is not None and folder.is_dir():
        for file in folder.iterdir():
            shutil.copyfile(file, directory / file.name)
    make = FAMILIES[family].config
    if make is None:  # an encoder alone: its own configuration
        return
    chats = family in ("qwen2", "uni_moe")
    tokenizer = find_tokenizer(checkpoint) if chats or family == "speech_gen" else None
    tokens = read_vocabulary(tokenizer).specials if tokenizer is not None else {}
    made = make(recipe.model, recipe.data, tokens, dtype)
    kept = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    _write_json(directory / "config.json", _merged(kept, made) if kept else made)
    if family == "uni_moe" and not (directory / PREPROCESSOR_FILE).is_file():
        if fields := preprocessor_config(recipe.model):
            _write_json(directory / PREPROCESSOR_FILE, fields)
        _write_json(directory / TEMPLATE_FILE, {"chat_template": chat_template(recipe.data.system_turn)})
    if tokenizer is not None:
        copy_tokenizer(tokenizer, directory)
        if chats:
            _write_stops(directory / GENERATION_FILE, tokens)
    if chats and recipe.data.system_turn:
        _write_template(directory, recipe.data.system_turn, of_processor=family == "uni_moe")
    elif family == "uni_moe" and _adds_no_system_turn(directory):
        logger.warning(
            "data.system_prompt is empty, so the exported chat template adds no system turn: the published processor fails "
            "on a conversation without one; train with data.system_prompt, or give a system turn in every prompt"
        )


def _write_stops(path: Path, tokens: dict[str, int]) -> None:
    """What ends an answer: without it a loader's ``generate`` goes on to its limit."""
    stops = {"eos_token_id": stop_ids(tokens), "pad_token_id": stop_ids(tokens)[-1]}
    _write_json(path, (read_json(path) if path.is_file() else {}) | stops)


def _write_template(directory: Path, system_prompt: str, *, of_processor: bool) -> None:
    """Our template in each file that a loader may take one from."""
    template = chat_template(system_prompt)
    if of_processor:
        _write_json(directory / TEMPLATE_FILE, {"chat_template": template})
    else:
        (directory / TEMPLATE_FILE).unlink(missing_ok=True)
    config = directory / TOKENIZER_CONFIG
    if config.is_file():
        _write_json(config, read_json(config) | {"chat_template": template})
    if not config.is_file() or (directory / JINJA_FILE).is_file():
        commit.write_text(directory / JINJA_FILE, template)


def _adds_no_system_turn(directory: Path) -> bool:
    """Whether the template is ours; of one that a source brought nothing is known."""
    file = directory / TEMPLATE_FILE
    return file.is_file() and read_json(file).get("chat_template") == chat_template("")


def _merged(kept: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """What the source said in words of its own stays; what our model decides is ours."""
    config = kept | {key: value for key, value in made.items() if key in kept and key != GENERATOR_FIELD}
    if made.get(GENERATOR_FIELD):
        config[GENERATOR_FIELD] = True
    for name in (uni_moe.OURS, "rope_theta", *STOP_FIELDS):
        if name in made:
            config[name] = made[name]
    if "dtype" in kept:  # how newer configurations call torch_dtype: what a loader rounds to
        config["dtype"] = made["torch_dtype"]
    for place in ("rope_parameters", "rope_scaling"):  # newer configurations have rope_theta in there
        if isinstance(table := kept.get(place), dict):
            ours = made.get("rope_scaling", {}) | {"rope_theta": made["rope_theta"]}
            config[place] = table | {key: value for key, value in ours.items() if key in table}
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    commit.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
