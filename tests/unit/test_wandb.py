"""Weights & Biases as a second place for metrics: the real package offline, and the error where it is not installed."""

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
from megatron_omni.training.metrics import MetricsWriter, WandbRun


def recipe(run_dir: Path) -> Recipe:
    return recipe_from_dict({"run_dir": str(run_dir), "seed": 5, "log": {"wandb_project": "omni"}})


def test_a_package_that_is_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError) as caught:
        validate(recipe(tmp_path))
    said = "log.wandb_project='omni': the package wandb is not installed; run pip install 'megatron-omni[wandb]', or set it to null"
    assert said in str(caught.value)
    with pytest.raises(ValueError, match=r"log.wandb_project='': name a project, or set it to null"):
        validate(recipe_from_dict({"log": {"wandb_project": ""}}), check_files=False)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed (make wandb)")
def test_a_run_and_its_continuation_are_one_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run_dir = tmp_path / "speech"
    for start, steps in enumerate([(1, 2), (3,)]):
        writer = MetricsWriter(
            run_dir, tensorboard=False, after_step=2 * start, wandb=WandbRun(recipe(run_dir), run_dir)
        )
        for step in steps:
            writer.write(step, {"lm loss": 3.0 - step, "moe/mean_k": float("inf")})
        writer.finish()
        writer.close()
    number = (run_dir / "wandb_id").read_text().strip()
    files = sorted((run_dir / "wandb").glob(f"offline-run-*/run-{number}.wandb"))
    assert len(files) == 2, list((run_dir / "wandb").iterdir())
    first, second = (read(file) for file in files)
    assert [item for item in first["history"]] == [{"step": 1, "lm loss": 2.0}, {"step": 2, "lm loss": 1.0}]
    assert second["history"] == [{"step": 3, "lm loss": 0.0}]  # inf is no JSON, and is left out everywhere
    for told in (first, second):
        assert (told["project"], told["name"], told["id"]) == ("omni", "speech", number)
        assert told["config"]["seed"] == 5 and told["config"]["model"]["num_layers"] == 28
        assert told["exit"] == 0
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


BLOCK, HEADER = 32768, 7


def chunks(data: bytes) -> Iterator[bytes]:
    """Records of a log of LevelDB's kind: blocks of pieces, each with checksum, length and kind (1 or 4 ends a record)."""
    at, whole = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, at) if left >= HEADER else (0, 0, 0)
        if not kind:  # the rest of the block is empty
            at += left
            continue
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            yield whole
            whole = b""


def read(file: Path) -> dict[str, Any]:
    """What an offline run holds."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"history": [], "config": {}}
    for data in chunks(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run
            found |= {"project": run.project, "name": run.display_name, "id": run.run_id}
            found["config"] |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found["history"].append({key: value for key, value in items.items() if not key.startswith("_")})
        elif record.HasField("exit"):
            found["exit"] = record.exit.exit_code
    return found
