"""Sources that are made of a record's images when a sample is built (``degrade`` of a row, degradations.py).

What is drawn of the damage follows from the record itself: its id, its questions and the names of its targets. So rows that
are written again, by ``megatron-omni prepare`` with what models made of them, have the same sources, and so has a prompt.
"""

import hashlib
from functools import lru_cache
from pathlib import PurePath

from PIL import Image

from megatron_omni.data.decode import cpu
from megatron_omni.data.degradations import damaged
from megatron_omni.data.record import Record


def source_picture(record: Record, number: int, picture: Image.Image) -> Image.Image:
    """What stands in the place of image ``number`` of a record, itself or damaged. MediaError for a picture of rain that cannot
    be read."""
    damage = record.drawing.damage if record.drawing is not None else None
    if damage is None:
        return picture
    rain = _rain(damage.file) if damage.file is not None else None
    return damaged(cpu.to_rgb(picture), damage, key=f"{_key(record)} {number}", rain=rain)


def _key(record: Record) -> str:
    texts = [message.content for message in record.messages if message.role == "user"]
    names = [PurePath(str(file)).name for file in record.targets]
    return hashlib.sha256("\0".join([record.id, *texts, *names]).encode()).hexdigest()


@lru_cache(maxsize=8)
def _rain(file: str) -> Image.Image:
    return cpu.decode_image(file)
