"""Forms with files, as OpenAI's clients send them: what is in them byte for byte, and what is no form."""

import os

import pytest

from megatron_omni.serve.errors import ApiError
from megatron_omni.serve.forms import Field, is_form, read_form


def made(fields: dict[str, str], files: list[tuple[str, tuple[str, bytes]]]) -> tuple[str, bytes]:
    """A form as RFC 7578 has it."""
    mark = "----form" + "0123456789abcdef"
    parts = [(f'name="{name}"', text.encode()) for name, text in fields.items()]
    parts += [(f'name="{name}"; filename="{file}"\r\nContent-Type: image/png', data) for name, (file, data) in files]
    body = b"".join(
        f"--{mark}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts
    )
    return f"multipart/form-data; boundary={mark}", body + f"--{mark}--\r\n".encode()


def test_files_and_fields_come_through_byte_for_byte() -> None:
    nasty = os.urandom(5000) + b"\r\n--" + os.urandom(100) + b"\r\n\r\n--\r\n"
    kind, body = made(
        {"prompt": "ein Bär “so”", "n": "2"}, [("image[]", ("a b.png", nasty)), ("image[]", ("c.png", b""))]
    )
    assert is_form(kind) and not is_form("application/json")
    assert read_form(kind, body) == [
        Field("prompt", "ein Bär “so”".encode(), False), Field("n", b"2", False), Field("image", nasty, True),
        Field("image", b"", True),
    ]  # fmt: skip
    quoted = kind.replace("boundary=", 'boundary="') + '"'
    assert len(read_form(quoted, body)) == 4


def test_what_is_no_form_is_refused() -> None:
    kind, body = made({"n": "2"}, [("image", ("a.png", b"xyz"))])
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    bad = {
        "no boundary": ("multipart/form-data", body),
        "cut off": (kind, body[:-20]),
        "no header": ("multipart/form-data; boundary=x", b"--x\r\nabc\r\n--x--\r\n"),
        "no name": ("multipart/form-data; boundary=x", b"--x\r\nContent-Type: a/b\r\n\r\nabc\r\n--x--\r\n"),
        "encoded for mail": (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\nContent-Transfer-Encoding: base64\r\n\r\nabc\r\n--x--\r\n',
        ),
        "65 parts": ("multipart/form-data; boundary=x", part * 65 + b"--x--\r\n"),
    }  # fmt: skip
    for said, (content_type, data) in bad.items():
        with pytest.raises(ApiError, match=said) as caught:
            read_form(content_type, data)
        assert (caught.value.status, caught.value.code) == (400, "invalid_form")
    with pytest.raises(ApiError, match="no text in UTF-8"):
        _ = Field("prompt", b"\xff", False).text
