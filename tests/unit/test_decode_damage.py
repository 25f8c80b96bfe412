"""Damaged and lying media files: a MediaError or a result for each, without the memory that a header asks for."""

import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_omni.data.decode import cpu
from megatron_omni.data.decode.media import MediaBytes, MediaError
from tests.stress.fuzz_decoders import Case, make_cases, outcome
from tests.unit.media_files import tone


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return make_cases(tmp_path_factory.mktemp("cases"), cpu)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged tags
def test_fifty_damages_of_every_kind_of_file(cases: list[Case], tmp_path: Path) -> None:
    """Seeds that tests.stress.fuzz_decoders does not begin with; it runs a thousand of each."""
    for case in cases:
        said = [outcome(case, seed, tmp_path) for seed in range(100_000, 100_050)]
        assert "refused" in said, case.name


def test_the_undamaged_files_are_read(cases: list[Case]) -> None:
    for case in cases:
        for reader in case.readers:
            reader(MediaBytes(case.name, case.data))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def refused_cheaply(function, *args, match: str, **kwargs) -> None:
    before = peak_bytes()
    with pytest.raises(MediaError, match=match):
        function(*args, **kwargs)
    assert peak_bytes() - before < 64 << 20


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (8_001, 8_000)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    bomb = MediaBytes("bomb.png", png_header(width, height))
    for function in (cpu.decode_image, cpu.probe_image):
        refused_cheaply(function, bomb, match="bomb.png': ")


def test_a_picture_within_the_limit_but_without_its_pixels_is_refused() -> None:
    refused_cheaply(cpu.decode_image, MediaBytes("thin.png", png_header(3_000, 1_000)), match=r"thin\.png': ")


def test_ten_hours_of_wav_in_a_hundred_bytes_are_refused() -> None:
    size = 10 * 3600 * 48_000 * 2
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, 1, 48_000, 96_000, 2, 16, b"data", size
    )
    wav = MediaBytes("long.wav", header + bytes(100))
    for function in (cpu.decode_audio, cpu.probe_audio):
        refused_cheaply(function, wav, match=r"long\.wav': is cut off")


def test_a_wav_that_was_streamed_is_read_to_its_end(tmp_path: Path) -> None:
    """A writer that cannot go back leaves the largest number, or none, as the size."""
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    for size in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
        data[4:8] = data[40:44] = size
        samples = cpu.decode_audio(MediaBytes("a.wav", bytes(data)))
        np.testing.assert_allclose(samples, tone(0.5), atol=2**-15)


def test_a_flac_that_promises_hours_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(0.5), 16_000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] |= 0x0F  # STREAMINFO ends with 36 bits of total samples, 4 of them here
    data[22:26] = b"\xff\xff\xff\xff"
    refused_cheaply(
        cpu.decode_audio, MediaBytes("a.flac", bytes(data)), match="is cut off|LibsndfileError", max_seconds=1e9
    )


def test_a_rate_that_no_sound_has_is_refused(tmp_path: Path) -> None:
    for rate in (1, 999, 2_000_000_000):
        soundfile.write(tmp_path / "a.wav", np.zeros(50, np.float32), rate)
        refused_cheaply(cpu.decode_audio, tmp_path / "a.wav", match=f"{rate} samples a second", max_seconds=1e9)
