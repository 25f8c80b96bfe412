"""The strip of README shows what was asked and answered, and chooses nothing by whether it is right."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from examples.quickstart.strip import draw_answers, frames_of, read_panels, spectrogram
from tests.unit.tiny_data import row, write_clip, write_image


def test_the_first_english_record_of_each_task_is_shown(tmp_path: Path) -> None:
    data = tmp_path / "data" / "eval"
    data.mkdir(parents=True)
    write_image(data / "a.png")
    write_clip(data / "v.mp4", [10, 60, 110, 160, 210])
    records = {
        "image": [row("<image> 图里有什么？", "猫", images=["a.png"]), row("<image> what?", "a dog", images=["a.png"])],
        "video": [row("<video> where?", "up", videos=["v.mp4"])],
    }
    rows = []
    for task, given in records.items():
        (data / f"{task}.held_out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in given))
        for record in given:
            question, answer = (message["content"] for message in record["messages"])
            rows.append({"set": f"{task}.held_out", "question": question, "expected": answer, "answer": "up"})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    panels = read_panels(tmp_path)
    assert [(panel["task"], panel["expected"], panel["answer"]) for panel in panels] == [
        ("image", "a dog", "up"),
        ("video", "up", "up"),
    ]
    draw_answers(panels, tmp_path / "strip.png")
    pixels = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB")).astype(int)
    for red, green, blue in ((214, 39, 40), (44, 160, 44)):  # one answer is wrong, one is right
        assert (np.abs(pixels - (red, green, blue)).sum(axis=2) < 20).any()
    levels = [frame.mean() for frame in frames_of(data / "v.mp4")]
    assert levels == sorted(levels) and len(levels) == 4


def test_a_tone_is_loudest_at_its_frequency() -> None:
    rate, hertz = 16_000, 2000
    wave = np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)
    assert spectrogram(wave).mean(axis=1).argmax() == hertz * 512 // rate
