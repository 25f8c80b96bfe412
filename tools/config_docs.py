"""Write docs/config.md from the recipe dataclasses, so that the page cannot drift from the code.

python tools/config_docs.py --write     # regenerate
python tools/config_docs.py             # print; exit 1 when the file on disk differs
"""

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import types
import typing
from pathlib import Path

from megatron_omni.config.data import DataConfig, EvalSourceConfig, SourceConfig
from megatron_omni.config.generators import CodecConfig, PictureCodecConfig, SpeechConfig
from megatron_omni.config.model import AudioConfig, LoraConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_omni.config.objectives import (
    CodecTrainingConfig,
    PictureCodecTrainingConfig,
    PreferenceConfig,
    ReinforceConfig,
    RewardConfig,
)
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.pictures import DiTConfig, ImageGeneratorConfig, ProjectorConfig, SamplingConfig
from megatron_omni.config.ranges import RANGE
from megatron_omni.config.run import CheckpointConfig, LogConfig, Recipe

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
GROUPS: list[tuple[str, type]] = [
    ("(top level)", Recipe),
    ("model", ModelConfig),
    ("model.moe", MoEConfig),
    ("model.vision", VisionConfig),
    ("model.audio", AudioConfig),
    ("model.speech", SpeechConfig),
    ("model.codec", CodecConfig),
    ("model.image", ImageGeneratorConfig),
    ("model.image.dit", DiTConfig),
    ("model.image.projectors", ProjectorConfig),
    ("model.image.sampling", SamplingConfig),
    ("model.picture_codec", PictureCodecConfig),
    ("model.lora", LoraConfig),
    ("parallel", ParallelConfig),
    ("data", DataConfig),
    ("data.sources[]", SourceConfig),
    ("data.eval_sources[], besides those of data.sources[]", EvalSourceConfig),
    ("optim", OptimConfig),
    ("reinforce", ReinforceConfig),
    ("reinforce.rewards[]", RewardConfig),
    ("preference", PreferenceConfig),
    ("codec", CodecTrainingConfig),
    ("picture_codec", PictureCodecTrainingConfig),
    ("checkpoint", CheckpointConfig),
    ("log", LogConfig),
]
INTRO = """# Configuration

A recipe is a YAML file with these fields; `extends: other.yaml` starts from another file, and `key=value` words on the
command line override single fields (`optim.lr=1e-5`, `model.moe=null`). An unknown field, a wrong type, a number
outside its range or a layout that cannot work is an error that names the field, the value and the fix. Numbers whose
range has no end in these tables end at 10^12. This page is written by `make docs` from `megatron_omni/config/`; edit
the docstrings there.

Files and words are read as YAML 1.2: `010` is ten, `1e-5` a number, and `no`, `off` or `1:30` are text. A field that
holds text keeps what was typed (`run_dir=010`). In paths a leading `~` is the home directory; `$` and `${...}` are
refused, so that a recipe means the same everywhere. Aliases (`&`, `*`) are refused as well.

## Sources by name

`data.sources` and `data.eval_sources` are lists of named sources. A list takes the place of the one in the file that is
extended. A mapping changes single sources of it by their names, adds new ones and, with null, takes some out:

    data.sources.image.weight=2                                      on the command line
    sources: {image: {weight: 2}, video: null, notes: {path: notes.jsonl}}      in a file that extends another

## Named parts

`freeze` and `optim.lr_scale` take names of parts of the model:

| part | parameters |
|---|---|
| `vision`, `audio` | the towers: SigLIP; Whisper encoder |
| `projectors` | what joins the towers to the language model: the vision MLP; the Q-former (queries included) and its projection |
| `image_projectors`, `image_generator` | of a model that draws (`model.image`): what leads from the block's hidden rows to the generator, with what stands for no words; the diffusion transformer |
| `codec_encoder`, `codec_decoder`, `discriminators` | of a codec (`model.codec`, `model.picture_codec`), which has no other parts; the last in adversarial training |
| `text_table`, `text_projection` | of a speech generator: the table of text embeddings, which is never trained, and the projection behind it |
| `attention`, `norms` | of the language model |
| `ffn` | dense FFN (a model without `moe`) |
| `experts`, `shared_experts`, `gate` | of the MoE layers |
| `embeddings`, `output` | word embeddings and output layer |
| `new_token_rows` | rows of the special tokens that Qwen2.5 does not have (42); trained even where `embeddings` and `output` are frozen, as a parameter of their own, unless named too. Such rows have no weight decay, and the `lr_scale` of their matrix |
"""  # noqa: E501


def field_docs(schema: type) -> dict[str, str]:
    """Docstring below each field."""
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, after in zip(body.body, [*body.body[1:], None]):
        text = getattr(after.value, "value", None) if isinstance(after, ast.Expr) else None
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            docs[node.target.id] = " ".join(text.split()) if isinstance(text, str) else ""
    return docs


def type_name(hint: object) -> str:
    """The type as a reader would write it."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(
            "null" if option is types.NoneType else type_name(option) for option in typing.get_args(hint)
        )
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def default_text(item: dataclasses.Field) -> str:
    """The default value, or the group that holds it."""
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
        return "see below" if dataclasses.is_dataclass(value) else f"`{value}`"
    return (
        "required" if item.default is dataclasses.MISSING else f"`{'null' if item.default is None else item.default}`"
    )


def render() -> str:
    """The page."""
    lines = [INTRO]
    for name, schema in GROUPS:
        summary = (schema.__doc__ or "").strip().splitlines()[0]
        lines += [
            f"## {name}",
            "",
            summary,
            "",
            "| field | type | default | range | meaning |",
            "|---|---|---|---|---|",
        ]
        docs, hints = field_docs(schema), typing.get_type_hints(schema)
        for item in (item for item in dataclasses.fields(schema) if item.name in docs):  # not those of a base
            kind = type_name(hints[item.name]).replace("|", "\\|")
            kind = re.sub(r"megatron_omni\.config\.\w+\.", "", kind)
            allowed = item.metadata.get(RANGE, "")
            lines.append(f"| `{item.name}` | {kind} | {default_text(item)} | {allowed} | {docs[item.name]} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Compare or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/config.md")
    page = render()
    if parser.parse_args().write:
        PAGE.write_text(page)
        return 0
    if not PAGE.is_file() or PAGE.read_text() != page:
        print("error: docs/config.md is out of date; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
