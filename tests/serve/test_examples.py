"""The job script and the demo of examples/serve; those that ask a server are tested with one (test_server.py)."""

import json
import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_job_script_serves(tmp_path: Path) -> None:
    """Its words are a command line that is accepted, with the keys' file where it looks for them."""
    from megatron_omni.cli.serve import parse

    text = (ROOT / "examples" / "serve" / "serve.sbatch").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "examples" / "serve" / "serve.sbatch"], check=False).returncode == 0
    (command,) = re.findall(r"^launch -m megatron_omni\.cli\.serve ((?:.*\\\n)*[^#\n]*)", text, re.MULTILINE)
    (tmp_path / "serve_keys.txt").write_text("a-long-secret\n")
    filled = command.replace("\\\n", " ").replace('"$checkpoint"', str(tmp_path)).replace('"$@"', "")
    filled = filled.replace("$SLURM_NTASKS_PER_NODE", "4").replace("serve_keys.txt", str(tmp_path / "serve_keys.txt"))
    parsed = parse(shlex.split(filled))
    assert parsed.overrides == ["parallel.tensor_model_parallel_size=4"] and parsed.settings.api_keys == (
        "a-long-secret",
    )


def test_the_demo_names_files_and_right_answers(tmp_path: Path) -> None:
    from examples.serve.demo import TRIES, suggestions

    held_out = tmp_path / "data" / "eval"
    held_out.mkdir(parents=True)
    for task in TRIES:
        kind = "images" if task == "image" else "audios"
        marker = f"<{kind[:-1]}>"
        turns = [{"role": "user", "content": f"{marker} what is it?"}, {"role": "assistant", "content": "a cat"}]
        (held_out / f"{task}.held_out.jsonl").write_text(
            json.dumps({"messages": turns, kind: [f"media/{task}.x"]}) + "\n"
        )
    lines = suggestions(tmp_path)
    assert len(lines) == 3
    assert lines[0] == f"attach {held_out}/media/image.x and ask 'what is it?'; right is 'a cat'"
