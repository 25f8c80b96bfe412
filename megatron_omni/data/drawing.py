"""Pictures that answers draw: where they stand in a record, and what is known of them.

    {"messages": [{"role": "user", "content": "<image>\\nMake the cat a dog."},
                  {"role": "assistant", "content": "Here it is: <generate>"}],
     "images": ["cat.png"], "targets": ["dog.png"], "task": "edit"}

    targets       the pictures to draw: as many files as answers hold ``<generate>``
    task          what is asked (TASKS, or a name of your own); by default text_to_image, with a source image_to_image
    instruction   what a teacher of the task projector is asked, where it is not the question
    degrade       makes the source out of the picture when a sample is built (degradations.py); without ``images`` it is
                  made of the targets
    teachers      {"task": .., "caption": .., "visual": ..}: embeddings of the user's teachers
    latents       {"target": .., "source": ..}: what a VAE made of the pictures
    hidden        {"rows": .., "vision": ..}: what the language model made of the block, and its encoder of the source

Of these three a row holds one object, or with several targets a list of one for each; their values are ``FILE#NUMBER``
(row_files.py), of ``teachers`` also ``FILE.npy``.

The *source* of a picture is the last ``<image>`` of the turn before its answer; a picture of task text_to_image has none.
In an answer of a row with ``targets``, ``<image>`` and a literal run ``[TASK0]`` .. ``[IMG31]`` (Uni-MoE-2.0's rows, where
``image_gen`` names the target) are read as ``<generate>``. In every other row all of these are ordinary characters. The
template writes a block of special tokens for each picture, which no text can become.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_omni.config.pictures import IMAGE_TOKENS, TASK_TOKENS
from megatron_omni.data.degradations import Damage, read_damage
from megatron_omni.data.errors import URL, RecordError, encodable

GENERATE = "<generate>"
DRAWN = "generate"
"""The kind of a picture that is drawn, among the pieces of an answer."""
TEXT_TO_IMAGE, IMAGE_TO_IMAGE = "text_to_image", "image_to_image"
FROM_SOURCE = (
    IMAGE_TO_IMAGE, "edit", "denoise", "deblur", "derain", "low_light", "inpaint", "edges", "depth", "pose", "segmentation",
)  # fmt: skip
TASKS = (TEXT_TO_IMAGE, *FROM_SOURCE)
"""Names of tasks that mean something: those of FROM_SOURCE need a source, text_to_image takes none."""
TEACHERS, LATENTS, HIDDEN = ("task", "caption", "visual"), ("target", "source"), ("rows", "vision")
KEYS = ("targets", "image_gen", "task", "instruction", "degrade", "teachers", "latents", "hidden")
GOLDEN = ("golden_task_embedding", "golden_caption_embedding", "golden_visual_embedding")
_MARKS = re.compile(
    rf"<generate>|<image>|{re.escape(''.join(TASK_TOKENS))}(?:{re.escape(''.join(IMAGE_TOKENS))})+"
)  # fmt: skip
_REST = re.compile(r"\[(?:IMG|TASK)\d+\]")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
_IN_FILE = re.compile(r"(.+\.safetensors)#(\d{1,12})", re.DOTALL)


@dataclass(frozen=True)
class RowAt:
    """An array in a file: its path, and the number in it; without a number the file is an ``.npy``."""

    file: str
    number: int | None = None

    def __str__(self) -> str:
        return self.file if self.number is None else f"{self.file}#{self.number}"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a record says of the pictures it draws."""

    task: str = ""
    """Empty: by the source, :meth:`task_of`."""
    instruction: str = ""
    damage: Damage | None = None
    """How sources are made of the record's images."""
    teachers: tuple[Mapping[str, RowAt], ...] = ()
    """Of each target, by TEACHERS; empty: there are none."""
    latents: tuple[Mapping[str, RowAt], ...] = ()
    """By LATENTS."""
    hidden: tuple[Mapping[str, RowAt], ...] = ()
    """By HIDDEN."""

    def task_of(self, source: int | None) -> str:
        """What a picture with this source, or none, is an example of."""
        return self.task or (TEXT_TO_IMAGE if source is None else IMAGE_TO_IMAGE)


def target_files(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The pictures that a row draws; RecordError for what is no list of files."""
    if found := [key for key in GOLDEN if row.get(key) not in (None, "", [])]:
        raise RecordError(
            where, field=found[0], value=row[found[0]], problem="is an embedding of the authors' own files",
            fix="write what your teachers made into FILE.npy, and name it in teachers (docs/images_out.md)",
            reason="unsupported_key",
        )  # fmt: skip
    given = [key for key in ("targets", "image_gen") if row.get(key) not in (None, [], "")]
    if not given:
        return ()
    name, value = given[0], row[given[0]]
    if len(given) > 1:
        raise _wrong(where, "targets / image_gen", value, "both are given", "give one")
    files = [value] if isinstance(value, str) else value
    if (
        not isinstance(files, list)
        or not files
        or not all(isinstance(file, str) and file and encodable(file) for file in files)
    ):
        raise _wrong(where, name, value, "is no list of file names", 'write ["file", ...]')
    for file in files:
        _check_local(where, name, file)
    return tuple(files)


def drawn_pieces(content: str, *, field: str, where: str) -> tuple[str, ...]:
    """text, DRAWN, text, ..., text of an answer that may draw; RecordError for a run of tokens that goes on behind a block."""
    texts = _MARKS.split(content)
    for text in texts[1:]:
        if found := _REST.match(text):
            raise _wrong(
                where, field, content, f"holds {found[0]} behind a whole block of tokens",
                f"write {GENERATE}, or the run [TASK0] .. [IMG31], the second half as often as you like",
            )  # fmt: skip
    return tuple(piece for text in texts for piece in (text, DRAWN))[:-1]


def shown(pieces: Sequence[str]) -> str:
    """The content of an answer with these pieces."""
    return "".join(GENERATE if i % 2 else piece for i, piece in enumerate(pieces))


def read_drawing(row: Mapping[str, Any], *, num_targets: int, where: str) -> Drawing:
    """What a row with targets says of them; RecordError names the key that is wrong."""
    task = row.get("task")
    if task is not None and (not isinstance(task, str) or not _NAME.fullmatch(task)):
        raise _wrong(where, "task", task, "is no name", f"write one of {', '.join(TASKS)}, or a word of your own")
    instruction = row.get("instruction", "")
    if not isinstance(instruction, str) or not encodable(instruction):
        raise _wrong(where, "instruction", instruction, "is no text", "write a string")
    damage = read_damage(row["degrade"], where=where) if row.get("degrade") else None
    named = {
        key: _named(row.get(key), key, names, num_targets, where)
        for key, names in (("teachers", TEACHERS), ("latents", LATENTS), ("hidden", HIDDEN))
    }
    return Drawing(task=task or "", instruction=instruction, damage=damage, **named)


def check_sources(drawing: Drawing, sources: Sequence[int | None], *, where: str) -> None:
    """RecordError for a task that needs a source where a picture has none."""
    if drawing.task in FROM_SOURCE and None in sources:
        raise RecordError(
            where, field="task", value=drawing.task,
            problem="needs a source, and the turn before the answer has no <image>",
            fix="write <image> there and its file in images, or name the task text_to_image", reason="no_source",
        )  # fmt: skip


def _named(
    given: object, key: str, names: tuple[str, ...], num_targets: int, where: str
) -> tuple[Mapping[str, RowAt], ...]:
    """One mapping of name to place for each target; empty where the key is not there."""
    if given in (None, {}, []):
        return ()
    each: list[Any] = given if isinstance(given, list) else [given]
    if len(each) != num_targets or not all(isinstance(one, dict) for one in each):
        raise _wrong(
            where,
            key,
            given,
            f"is not one object for each of the {num_targets} targets",
            f'write {{"{names[0]}": ...}}',
        )
    return tuple(_places(one, key, names, where) for one in each)


def _places(given: dict[str, Any], key: str, names: tuple[str, ...], where: str) -> Mapping[str, RowAt]:
    if unknown := sorted(map(str, given.keys() - set(names))):
        raise _wrong(where, key, unknown, "has keys that mean nothing there", f"use {', '.join(names)}")
    found = {}
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, str) or not value or not encodable(value):
            raise _wrong(where, f"{key}.{name}", value, "is no name of a file", "write FILE.safetensors#NUMBER")
        _check_local(where, f"{key}.{name}", value)
        if inside := _IN_FILE.fullmatch(value):
            found[name] = RowAt(inside[1], int(inside[2]))
        elif key == "teachers" and value.endswith(".npy"):
            found[name] = RowAt(value)
        else:
            kinds = "FILE.safetensors#NUMBER or FILE.npy" if key == "teachers" else "FILE.safetensors#NUMBER"
            raise _wrong(where, f"{key}.{name}", value, f"is not {kinds}", "megatron-omni prepare writes such rows")
    return found


def _check_local(where: str, field: str, file: str) -> None:
    if URL.match(file):
        raise RecordError(
            where, field=field, value=file, problem="is a URL, and files are read from disks only",
            fix="download it, and give the path under the source's root", reason="remote_media",
        )  # fmt: skip


def _wrong(where: str, field: str, value: object, problem: str, fix: str) -> RecordError:
    return RecordError(where, field=field, value=value, problem=problem, fix=fix, reason="bad_drawing")
