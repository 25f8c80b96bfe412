"""``megatron-omni upcycle`` from a checkout that is not installed; see megatron_omni/cli/upcycle.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omni.cli.upcycle import main

if __name__ == "__main__":
    sys.exit(main())
