"""Bodies of ``multipart/form-data`` (RFC 7578), which OpenAI's clients send where a request brings files.

Parts are split at the boundary and never decoded: base64 and quoted-printable are not used in HTTP and are refused. A name that
ends with ``[]`` is one of a list, as these clients write it.
"""

import re
from dataclasses import dataclass

from megatron_omni.serve.errors import ApiError, bad_request

MOST_PARTS = 64
_MOST_HEADER = 4096
_BOUNDARY = re.compile(
    r'multipart/form-data\s*;.*?boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', re.IGNORECASE | re.DOTALL
)
_NAME = re.compile(r'form-data\s*;.*?\bname="([^"]{0,200})"', re.IGNORECASE | re.DOTALL)
_FILE = re.compile(r'\bfilename="([^"]{0,1000})"', re.IGNORECASE)


@dataclass(frozen=True)
class Field:
    """One part of a form."""

    name: str
    data: bytes
    is_file: bool

    @property
    def text(self) -> str:
        """Of a part that is no file; ApiError for what is no UTF-8."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            raise bad_request(f"{self.name[:60]}: is no text in UTF-8", param=self.name[:60]) from None


def is_form(content_type: str) -> bool:
    """Whether a body is such a form, by its header."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def read_form(content_type: str, body: bytes) -> list[Field]:
    """The parts of a body in their order; ApiError 400 for what is no such form."""
    found = _BOUNDARY.match(content_type.strip())
    if found is None:
        raise _broken("its Content-Type names no boundary")
    mark = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(b"\r\n" + mark)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise _broken("it does not end with its boundary: it was cut off")
    parts = pieces[1:-1]
    if len(parts) > MOST_PARTS:
        raise bad_request(f"the form has {len(parts)} parts; at most {MOST_PARTS} are taken", code="invalid_form")
    return [_field(part) for part in parts]


def _field(part: bytes) -> Field:
    head, gap, data = part.partition(b"\r\n\r\n")
    if not gap or len(head) > _MOST_HEADER:
        raise _broken("a part has no header")
    headers: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise _broken("a part is encoded for mail: send its bytes as they are")
    disposition = headers.get("content-disposition", "")
    named = _NAME.search(disposition)
    if named is None:
        raise _broken("a part has no name")
    return Field(named[1].removesuffix("[]"), data, _FILE.search(disposition) is not None)


def _broken(problem: str) -> ApiError:
    return bad_request(f"the form cannot be read: {problem}", code="invalid_form")
