"""``megatron-omni prepare`` from a checkout that is not installed; see megatron_omni/cli/prepare.py."""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))  # for its processes

from megatron_omni.cli.prepare import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
