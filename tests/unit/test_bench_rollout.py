"""The benchmark of rollouts runs both contenders and sees the prompt computed once."""

import json
from pathlib import Path

from benchmarks.bench_rollout import main


def test_it_measures_rollouts_and_what_a_prompt_costs(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert main(["--json", str(file), "--models", "tiny", "--prompts", "1", "--group", "4", "--repeats", "1"]) == 0
    _, omni, hf, one, group = json.loads(file.read_text())
    assert (omni["contender"], hf["contender"], hf["ratio_to_hf"]) == ("omni", "hf", 1.0)
    assert omni["tokens_per_s"] > 0 and (one["responses"], group["responses"]) == (1, 4)
    assert group["ratio_to_one"] < 2  # four prompts would be near 4
