"""Every kind of bad input at once: each is one counted, logged skip that names source, file and line or key, and the run
goes on; above ``data.max_bad_fraction`` it stops and says so. ``prepare_data`` finds all of them before a run."""

import json
import logging
import struct
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from megatron_omni.config.data import SourceConfig
from megatron_omni.data import loader as loader_module
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.loader_state import joined_state
from megatron_omni.data.prepare import index_files
from megatron_omni.data.tokenizer import Tokenizer
from tests.unit.test_decode_damage import png_header
from tests.unit.test_tar import write_tar
from tests.unit.tiny_data import row, tiny_recipe, tokenizer_file, write_clip, write_image, write_sound, write_source

GOOD = 6
UNFORESEEN = "the tokenizer fails on this"


@pytest.fixture(autouse=True)
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours that one text brings out."""
    encode = Tokenizer.encode

    def faulty(self: Tokenizer, text: str) -> list[int]:
        return [len(text) // 0] if text == UNFORESEEN else encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", faulty)


def ten_hours_in_a_hundred_bytes() -> bytes:
    size = 10 * 3600 * 48_000 * 2
    header = (
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        size + 36,
        b"WAVE",
        b"fmt ",
        16,
        1,
        1,
        48_000,
        96_000,
        2,
        16,
        b"data",
        size,
    )
    return struct.pack(*header) + bytes(100)


def bad_rows(folder: Path) -> dict[str, dict | str]:
    """Reason -> rows, their files written into ``folder``."""
    picture, sound = write_image(folder / "ok.png", size=(56, 56)), write_sound(folder / "ok.wav", 1.0)
    clip = write_clip(folder / "ok.mp4", [10, 60, 110], sound=True)
    flipped = bytearray(picture.read_bytes())
    flipped[41] ^= 0x10  # the first byte of the compressed pixels
    damaged = {
        "zero.png": b"", "zero.wav": b"", "zero.mp4": b"",
        "cut.png": picture.read_bytes()[:70], "cut.wav": sound.read_bytes()[:9000], "cut.mp4": clip.read_bytes()[:900],
        "flipped.png": bytes(flipped), "hours.wav": ten_hours_in_a_hundred_bytes(), "bomb.png": png_header(100_000, 100_000),
    }  # fmt: skip
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to("/etc/hostname")
    kinds = {"png": "image", "wav": "audio", "mp4": "video"}
    rows: dict[str, dict | str] = {}
    for name in ("gone.png", *damaged):
        kind = kinds[name.rpartition(".")[2]]
        rows[name] = row(f"<{kind}>", f"of {name}", **{f"{kind}s": [name]})
    return rows | {
        "no JSON": "{broken" + " " * 40,
        "markers": row("<image> and <image>", "one", images=["ok.png"]),
        "role": {"messages": [{"role": "king", "content": "hi"}, {"role": "assistant", "content": "x"}]},
        "empty answer": row("what?", "  "),
        "too long": row("q" * 400, "long"),
        "link": row("<image>", "a link", images=["link.png"]),
        "climbs": row("<image>", "up", images=["../ok.png"]),
        "absolute": row("<image>", "abs", images=["/etc/hostname"]),
        "tool": {"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x"}]},
        "remote": row("<image>", "far", images=["https://example.org/a.png"]),
        "unforeseen": row("<image>", UNFORESEEN, images=["ok.png"]),
    }


REASONS = {
    "missing_media", "unreadable_media", "not_json", "marker_count", "unknown_role", "empty_answer", "too_long", "path_escape",
    "tool_turn", "remote_media", "internal_error",
}  # fmt: skip


def sources(folder: Path) -> list[SourceConfig]:
    """All bad rows and ``GOOD`` good ones; and a tar with hostile members."""
    rows = [*bad_rows(folder).values(), *(row("<image>", f"good {i}", images=["ok.png"]) for i in range(GOOD))]
    picture = (folder / "ok.png").read_bytes()
    names = ["a/1.png", "../up.png", "/abs.png", "sym.png", "b/2.png"]
    members: list = [part for name in names for part in ((name, picture), (name.replace(".png", ".txt"), "a caption"))]
    tar = write_tar(folder / "members.tar", members, **{"sym.png": (tarfile.SYMTYPE, "/etc/hostname")})
    index_files([tar], tokenizer_file(folder))
    return [write_source(folder, "rows", rows), SourceConfig(name="tar", path=str(tar))]


def epochs(loader: StepLoader, num_steps: int) -> None:
    for _ in range(num_steps):
        assert sum(batch.num_samples for batch in loader.next_step()) == 8


@pytest.mark.parametrize("indexed", [False, True])
def test_each_is_a_counted_logged_skip_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    monkeypatch.setattr(loader_module, "_LOGGED_PER_REASON", 100)
    configs = sources(tmp_path)
    if indexed:
        index_files([Path(configs[0].path)], tokenizer_file(tmp_path))
    loader = StepLoader(tiny_recipe(tmp_path, configs, max_bad_fraction=1.0), data_rank=0, data_size=1)
    rows = len(loader.sources[0])
    assert rows <= 32
    with caplog.at_level(logging.WARNING):
        epochs(loader, 8)  # 64 samples are half from each source: all rows of both
    skips = loader.own_skips()
    assert {reason for source, reason in skips if source == "rows"} == REASONS
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) <= 1 and all("rows.jsonl" in record.getMessage() for record in tracebacks)
    assert {reason for source, reason in skips if source == "tar"} == {"unsafe_member"}
    said = {record.getMessage() for record in caplog.records}
    bad_lines = {text.split("rows.jsonl:")[1].split(":")[0] for text in said if "rows.jsonl:" in text}
    assert bad_lines == {str(number) for number in range(1, rows - GOOD + 1)}  # every bad row, by its line
    for name in ("gone.png", "zero.mp4", "cut.wav", "flipped.png", "hours.wav", "bomb.png"):
        assert any("rows.jsonl:" in text and f"{name}': " in text for text in said), name
    for key in ("../up", "/abs", "sym"):
        assert any(f"members.tar:{key}: " in text and "of tar (unsafe_member)" in text for text in said), key
    assert json.loads(json.dumps(loader.state_dict())) == loader.state_dict()


def test_counts_of_all_ranks_are_added_up_once_and_survive_a_resume(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, sources(tmp_path), max_bad_fraction=1.0)
    alone = StepLoader(recipe, data_rank=0, data_size=1)
    ranks = [StepLoader(recipe, data_rank=r, data_size=4) for r in range(4)]
    epochs(alone, 4)
    for _ in range(4):
        for rank in ranks:
            rank.next_step()
    together = sum((rank.own_skips() for rank in ranks), Counter())
    assert together == alone.own_skips() and together["rows", "unreadable_media"] and together["tar", "unsafe_member"]
    state = joined_state([rank.state_dict() for rank in ranks])
    resumed = [StepLoader(recipe, data_rank=r, data_size=2) for r in range(2)]
    for rank in resumed:
        rank.load_state_dict(state)
    assert sum((rank.own_skips() for rank in resumed), Counter()) == together
    assert joined_state([rank.state_dict() for rank in resumed]) == state
    assert state["tried"]["decoded"] == sum(rank._tried["decoded"] for rank in ranks)


def test_above_the_limit_the_run_stops_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "MIN_TRIED", 16)
    loader = StepLoader(tiny_recipe(tmp_path, sources(tmp_path), max_bad_fraction=0.2), data_rank=0, data_size=1)
    with pytest.raises(
        ValueError, match=r"more than data.max_bad_fraction = 0.2 \(.*: \d+.*\); the last one: .*Repair"
    ):
        epochs(loader, 10)
