"""Run a script of PEFT's with superlora_tn's plug-in known to PEFT: ``python with_plugin.py run.py -v experiments/...``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import superlora_tn.peft  # noqa: F401  registers the method


def main() -> None:
    """Run the script that the first argument names, with the arguments behind it, as Python itself would."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: with_plugin.py SCRIPT [ARGUMENT ...]")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
