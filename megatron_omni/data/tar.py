"""WebDataset tars: members grouped into samples by key, and read in place.

``a/0007.left.png`` has the key ``a/0007`` and the suffix ``left.png``; neighbours with the same key are one sample. A
tar is read by its headers only, each member is remembered as a byte range, and ``TarMember.load`` reads that range
without touching the rest. Nothing is ever unpacked, so names are labels and not paths; still a sample with a member
that could be one elsewhere (absolute, ``..``, a link, a device) is refused: such a tar is not what its maker meant.

Tars that were written one behind the other (``cat a.tar b.tar``) are one. What programs leave behind beside the files
of people (``._*``, ``.DS_Store``, ``__MACOSX/``) is no member.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from megatron_omni.data.decode.media import MediaBytes
from megatron_omni.foreign import open_regular, printable

_JUNK = ((".DS_Store",), ("Thumbs.db",), ("desktop.ini",))


@dataclass(frozen=True)
class TarMember:
    """A byte range of a tar that holds one file."""

    tar: str
    name: str
    start: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"

    def load(self) -> MediaBytes:
        """Its bytes; EOFError when the tar is shorter than it was."""
        file = os.open(self.tar, os.O_RDONLY)
        try:
            data = os.pread(file, self.num_bytes, self.start)
        finally:
            os.close(file)
        if len(data) < self.num_bytes:
            raise EOFError(f"{self}: the tar ends inside this member")
        return MediaBytes(str(self), data)


@dataclass
class TarSample:
    """The members of one key, in the order in which they lie in the tar."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """By suffix, in lower case."""
    problem: str = ""
    """Why the sample is refused; empty when it is not."""


def tar_samples(path: str | Path) -> Iterator[TarSample]:
    """The samples of a tar, from its headers; a tar that breaks off ends with a sample that says so.

    ValueError for a file that is no plain tar.
    """
    sample: TarSample | None = None
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            for info in _members(file):
                if info.isdir() or info.name.startswith(("./PaxHeaders", ".nv-meta/")) or is_junk(info.name):
                    continue
                key, suffix = split_name(info.name)
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key)
                problem = _problem(info, size)
                if not problem and suffix in sample.members:
                    problem = f"{info.name!r} is there twice"
                sample.problem = sample.problem or problem
                sample.members[suffix] = TarMember(str(path), info.name, info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if sample is None:
            raise ValueError(f"{path}: is no plain tar ({error}); compressed tars cannot be read in place") from error
        yield sample
        yield TarSample(f"after {sample.key}", problem=f"the tar is damaged or cut off here ({error})")
        return
    if sample is not None:
        yield sample


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Members from the first to the last; those behind an end mark too, which is two blocks of zeros."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # the library would keep every header
                yield info
            behind = _not_zero(file, tar.offset)
        if behind == start:  # the library takes what is no header for the end
            raise tarfile.ReadError(f"no header at byte {start}: damaged, or other data behind the end of the archive")
        start = behind


def _not_zero(file: BinaryIO, start: int) -> int | None:
    """The first block from ``start`` on that holds more than zeros; None up to the end of the file."""
    file.seek(start)
    while chunk := file.read(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            return start + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(chunk)
    return None


def is_junk(name: str) -> bool:
    """Whether a file is one that macOS or Windows leaves beside those of people."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or parts[-1:] in _JUNK or (bool(parts) and parts[-1].startswith("._"))


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member: the base name is cut at its first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _problem(info: tarfile.TarInfo, tar_bytes: int) -> str:
    path = PurePosixPath(info.name)
    if printable(info.name) != info.name:
        return f"{info.name!r} is no UTF-8 (a tar of another system)"
    if path.is_absolute():
        return f"{info.name!r} is an absolute path"
    if ".." in path.parts:
        return f"{info.name!r} climbs out with '..'"
    if not info.isreg():
        kind = "a symbolic link" if info.issym() else "a hard link" if info.islnk() else "no ordinary file"
        return f"{info.name!r} is {kind}"
    if info.sparse is not None:
        return f"{info.name!r} is a sparse file"
    if info.offset_data + info.size > tar_bytes:
        return f"{info.name!r} is cut off by the end of the tar"
    return ""
