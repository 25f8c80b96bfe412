"""The examples in every command's --help and module docstring: options that exist, recipes that exist, fields that exist."""

import contextlib
import importlib
import re
import shlex
from pathlib import Path

import pytest

from megatron_omni.cli.main import COMMANDS
from megatron_omni.cli.main import main as megatron_omni
from megatron_omni.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = re.compile(
    r"(?:megatron-omni (?=\w)|(?:torchrun|python)\b[^\n]*? -m megatron_omni\.cli\.)(\w+)\b((?:.*\\\n)*.*)"
)
SUBCOMMANDS = {"convert": ("import", "export", "roundtrip", "verify", "codec")}


def print_help(*words: str) -> None:
    with contextlib.suppress(SystemExit):
        megatron_omni([*words, "--help"])


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_fit_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in [(name,), *((name, sub) for sub in SUBCOMMANDS.get(name, ()))]:
        print_help(*words)
    text = capsys.readouterr().out
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) | {"-m"}
    examples = EXAMPLE.findall(text + "\n" + (importlib.import_module(f"megatron_omni.cli.{name}").__doc__ or ""))
    for command, rest in examples:
        assert command in COMMANDS, f"{command}: no such command"
        if command != name or re.match(r"[,.;:`)]", rest):
            continue  # mentioned in a sentence
        words = shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", rest.replace("\\\n", " ")), comments=True, posix=True)
        unknown = {word for word in words if word.startswith("--")} - options
        assert not unknown, f"{name}: --help shows {unknown}, which it does not take"
        files = [word for word in words if re.match(r"(recipes|tools|examples|docs)/", word)]
        assert all((ROOT / file).exists() for file in files), files
        settings = [word for word in words if re.fullmatch(r"[a-z_.0-9]+=[^A-Z]*", word) and word != "key=value"]
        recipe = next((f for f in files if not f.endswith("chain.yaml")), "recipes/tiny/quickstart.yaml")
        load_recipe(ROOT / recipe, settings)


def test_every_command_shows_an_example_or_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        print_help(name)
        assert f"usage: megatron-omni {name}" in capsys.readouterr().out
