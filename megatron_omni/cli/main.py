"""``megatron-omni COMMAND ...``: the table of commands. Only the chosen one's module is imported.

Each command is a module of this package with ``main(arguments) -> exit status``; ``python -m megatron_omni.cli.COMMAND``
is the same, which is what torchrun needs.
"""

import importlib
import sys

from megatron_omni.config.outcome import EXIT_BAD_INPUT

COMMANDS = {
    "train": "train a model from a recipe (several processes: torchrun -m megatron_omni.cli.train)",
    "chain": "run the stages of a chain of recipes in order",
    "generate": "answer a prompt, or a file of records, with a trained checkpoint",
    "speak": "say a text with a trained speech generator",
    "evaluate": "score a checkpoint on tasks, and compare results",
    "serve": "answer over HTTP as OpenAI's API does, with a page to talk to the model",
    "convert": "Hugging Face directories to checkpoints and back; compare and verify",
    "upcycle": "make one mixture of experts of several dense checkpoints",
    "prepare": "index the data of a recipe and say what it holds",
    "preflight": "write one page with what a recipe will train on",
    "plan": "memory and time of a layout on so many GPUs",
    "doctor": "check that this machine is fit for training",
}


def usage() -> str:
    """What ``megatron-omni --help`` prints."""
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: megatron-omni COMMAND ...", "", *lines, "", "megatron-omni COMMAND --help says more of each"]
    )


def main(arguments: list[str] | None = None) -> int:
    """Hand the words after the command to its module; exit status of the command."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not words or words[0] not in COMMANDS:
        said = f"unknown command {words[0]!r}" if words else "no command"
        print(f"error: {said}; one of {', '.join(COMMANDS)} (see megatron-omni --help)", file=sys.stderr)
        return EXIT_BAD_INPUT
    return int(importlib.import_module(f"megatron_omni.cli.{words[0]}").main(words[1:]))


if __name__ == "__main__":
    sys.exit(main())
