"""tools/gpu_check.py without a GPU: every part's CPU twin for real, parts that fail or hang, objects that do not fit."""

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import prebuilt, report
from benchmarks.gpu_check.kernels import GOALS, SIZES, SMALL, goals
from benchmarks.gpu_check.parts import PARTS, Part, read_tests, run_parts
from megatron_omni.platform.device import accelerator_present

ROOT = Path(__file__).resolve().parents[2]
HERE = {"torch": "2.13.0+cu130", "python": "3.12", "machine": "x86_64", "sources": "0" * 64}


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_every_part_has_a_twin_that_passes_here(tmp_path):
    """The minutes are a limit, not what it takes."""
    out = tmp_path / "report"
    done = tool("--out", out, "--dry-run", "--minutes", "14")
    found = json.loads((out / report.JSON).read_text())
    parts = {part["name"]: part for part in found["parts"]}
    assert done.returncode == 0, done.stdout + done.stderr + "".join(p["cause"] for p in parts.values())
    assert list(parts) == [part.name for part in PARTS] and found["dry_run"]
    assert parts["ops"]["result"]["passed"] > 20 and parts["ops"]["result"]["failed"] == 0
    step = parts["step"]["result"]
    assert len(step["losses"]) == 5 and 0 < step["step_s"]["median"] < step["step_s"]["first"] * 10
    dispatch = "megatron_omni.models.moe.dispatcher:AllToAllDispatcher._dispatch"
    assert step["host_waits"] == sum(step["host_waits_by_site"].values()) >= step["host_waits_by_site"][dispatch] > 0
    assert step["memory"]["planned_peak_gib"] > step["memory"]["planned_between_steps_gib"] > 0
    assert sum(kernel["share"] for kernel in step["kernels"]) == pytest.approx(1, abs=0.3)
    timed = {(row["figure"], row["contender"]) for row in parts["kernels"]["result"]["rows"]}
    on_a_gpu = {(figure, who) for figure, who, _ in GOALS}
    assert on_a_gpu <= timed, "a goal that nothing measures"
    decoding = parts["decode"]["result"]["decode"]
    ways = ["ragged", "fixed"] if not accelerator_present() else ["ragged", "fixed", "captured"]
    assert [(row["batch"], row["decoding"]) for row in decoding] == [(batch, way) for batch in (1, 2) for way in ways]
    assert all(row["same_answers"] == 1 for row in decoding if row["decoding"] == "ragged")
    page = (out / report.PAGE).read_text()
    for title in (
        "dry run, nothing of this ran on a GPU",
        "## A training step",
        "Host waits of a step",
        "## A decoding step",
    ):
        assert title in page


def test_a_part_that_hangs_or_fails_ends_alone(tmp_path):
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    )
    hangs = child + "print(p.pid, flush=True); time.sleep(600)"
    fails = "print('so far so good'); open('/proc/nothing/here')"
    fine = "import json, sys; json.dump({'a': 1}, open(sys.argv[1], 'w'))"
    parts = [
        Part("hangs", "", 15, (), ("-c", hangs)),
        Part("fails", "", 60, (), ("-c", fails)),
        Part("silent", "", 60, (), ("-c", "pass")),
        Part("fine", "", 60, (), ("-c", fine, "{out}")),
    ]
    told = []
    outcomes = run_parts(parts, tmp_path, dry_run=True, minutes=195 / 60, say=told.append)
    by_name = {outcome.name: outcome for outcome in outcomes}
    assert told == outcomes
    assert {name: o.status for name, o in by_name.items()} == {
        "hangs": "timed out", "fails": "failed", "silent": "failed", "fine": "passed",
    }  # fmt: skip
    grandchild = int((tmp_path / "hangs.log").read_text())
    assert by_name["hangs"].cause == f"not done after 15 s; it printed last: {grandchild}"
    for _ in range(100):  # until it is reaped by whoever inherits it
        if not Path(f"/proc/{grandchild}").exists() or "State:\tZ" in Path(f"/proc/{grandchild}/status").read_text():
            break
        time.sleep(0.1)
    else:
        os.kill(grandchild, 9)
        pytest.fail("the child of the part lives on")
    assert "FileNotFoundError" in by_name["fails"].cause and "so far so good" in (tmp_path / "fails.log").read_text()
    assert by_name["silent"].cause == "it wrote no figures"
    assert by_name["fine"].result == {"a": 1}


def test_no_time_left_is_said(tmp_path):
    sleeps = Part("sleeps", "", 3, (), ("-c", "import time; time.sleep(60)"))
    first, second = run_parts(
        [sleeps, Part("late", "", 0.1, (), ())], tmp_path, dry_run=True, minutes=3.1 / 60, say=print
    )
    assert (first.status, second.status, second.cause) == ("timed out", "skipped", "no time was left")


@pytest.mark.skipif(accelerator_present(), reason="there is a GPU here")
def test_without_a_gpu_it_says_how(tmp_path):
    done = tool("--out", tmp_path / "new")
    assert done.returncode == 2 and not (tmp_path / "new").exists()
    assert re.fullmatch(
        r"error: no GPU: torch \S+ \(CUDA [\w.]+\) finds none; run this on a .* --dry-run .*\n", done.stderr
    )


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = {
        "--out is missing": ("--dry-run",),
        f"--out {tmp_path / 'full'}: is not an empty folder": ("--dry-run", "--out", tmp_path / "full"),
        "--minutes 0: must be above 0": ("--dry-run", "--out", tmp_path / "new", "--minutes", "0"),
        "--prebuilt with --dry-run": ("--dry-run", "--out", tmp_path / "new", "--prebuilt", tmp_path),
    }
    for message, arguments in cases.items():
        done = tool(*arguments)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "new").exists()


def packed(folder: Path, **changes: object) -> Path:
    """A folder as ``pack`` leaves it, of small files."""
    folder.mkdir()
    digests = {}
    for name in prebuilt.FILES:
        (folder / name).write_bytes(name.encode())
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
    manifest = HERE | {"gpus": ["sm_80", "sm_90a"], "files": digests} | changes
    (folder / prebuilt.MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_objects_that_fit_are_taken(tmp_path):
    prebuilt.check(packed(tmp_path / "ok"), HERE, capability=(9, 0))
    prebuilt.check(tmp_path / "ok", HERE, capability=(12, 0))  # PTX


@pytest.mark.parametrize(
    ("field", "value"), [("torch", "2.12.1"), ("python", "3.13"), ("machine", "aarch64"), ("sources", "1" * 64)]
)
def test_objects_for_something_else_are_named(tmp_path, field, value):
    folder = packed(tmp_path / "other", **{field: value})
    with pytest.raises(
        ValueError, match=re.escape(f"{folder}: made for {field} {value}, here is {field} {HERE[field]}; make")
    ):
        prebuilt.check(folder, HERE, capability=(9, 0))


def test_objects_that_cannot_be_used_are_named(tmp_path):
    folder = packed(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"compute capability \(8, 0\) and later, this GPU has \(7, 5\)"):
        prebuilt.check(folder, HERE, capability=(7, 5))
    (folder / "more").write_bytes(bytes(65 << 20))
    with pytest.raises(ValueError, match="65 MiB in all; at most 64 MiB"):
        prebuilt.check(folder, HERE, capability=None)
    (folder / prebuilt.FILES[1]).write_bytes(b"another")
    with pytest.raises(ValueError, match=r"_kernels_cuda.so: is not the file that was packed"):
        prebuilt.check(folder, HERE, capability=None)
    (folder / prebuilt.FILES[1]).unlink()
    with pytest.raises(ValueError, match=r"_kernels_cuda.so is missing; make it again"):
        prebuilt.check(folder, HERE, capability=None)
    (folder / prebuilt.MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match=r"prebuilt.json: is not the file that pack wrote"):
        prebuilt.check(folder, HERE, capability=None)
    with pytest.raises(ValueError, match=r"prebuilt.json is missing"):
        prebuilt.check(tmp_path, HERE, capability=None)


def test_objects_are_packed_and_put_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, "OPS", tmp_path / "here")
    prebuilt.OPS.mkdir()
    with pytest.raises(ValueError, match=r"_kernels.so is not built; run make ext-cuda"):
        prebuilt.pack(tmp_path / "packed")
    for name in prebuilt.FILES:
        (prebuilt.OPS / name).write_bytes(name.encode())
    prebuilt.pack(tmp_path / "packed")
    os.utime(prebuilt.OPS / prebuilt.FILES[1], (0, 0))
    with pytest.raises(ValueError, match=r"_kernels_cuda.so is older than .*; run make ext-cuda"):
        prebuilt.pack(tmp_path / "again")
    with pytest.raises(ValueError, match="packed: is not empty"):
        os.utime(prebuilt.OPS / prebuilt.FILES[1])
        prebuilt.pack(tmp_path / "packed")
    monkeypatch.setattr(prebuilt, "OPS", tmp_path / "there")
    prebuilt.OPS.mkdir()
    prebuilt.install(tmp_path / "packed")
    assert {path.name: path.read_bytes() for path in prebuilt.OPS.iterdir()} == {
        name: name.encode() for name in prebuilt.FILES
    }


def test_facts_here_are_those_of_this_machine():
    facts = prebuilt.facts_here()
    assert facts["torch"] == torch.__version__
    assert facts["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}" and len(facts["sources"]) == 64


def test_wheels_are_versions_of_what_is_installed():
    done = tool("--list-wheels")
    assert done.returncode == 0, done.stderr
    versions = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    assert {"megatron-core", "numpy", "pytest", "pluggy", "hypothesis"} <= versions.keys()
    assert versions["megatron-core"] == importlib.metadata.version("megatron-core")
    assert "torch" not in versions and not [
        name for name in versions if name.startswith("nvidia-cu") and name != "nvidia-cutlass"
    ]


def test_goals_are_judged():
    rows = [{"figure": "coarse fwd", "contender": "torch.bmm", "ratio": 0.95}]
    first, second = goals([*rows, {"figure": "coarse dgrad", "contender": "torch.bmm", "ratio": 0.5}])[:2]
    assert (first["reached"], first["met"]) == (0.95, True) and (second["reached"], second["met"]) == (0.5, False)
    assert all(goal["reached"] is None and not goal["met"] for goal in goals([]))
    assert SIZES.keys() == SMALL.keys()


def test_skipped_tests_show_nothing(tmp_path):
    file = tmp_path / "ops.json.xml"
    file.write_text(
        '<testsuites><testsuite><testcase name="a"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    assert read_tests(file) == ({"passed": 0, "failed": 0, "skipped": 1, "failures": []}, "no test ran: no GPU")
    file.write_text('<testsuite><testcase name="a"/><testcase name="b"><failure/></testcase></testsuite>')
    assert read_tests(file) == ({"passed": 1, "failed": 1, "skipped": 0, "failures": ["b"]}, "")
