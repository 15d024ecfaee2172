"""Scripts that run in two processes by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A thread of gloo may still drop the last reduction while Python ends, and then torch aborts the process (pytorch#179291): so
# a script that has come to its end leaves without Python's own ending.
END = "\nimport os\nos._exit(0)\n"


def environment() -> dict[str, str]:
    paths = [HERE, HERE.parent, HERE.parent / "backends", *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def launched(script: str, folder: Path, *words: str, **variables: str) -> None:
    """Run a script in two processes that work in ``folder``."""
    (folder / "script.py").write_text(script + END)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py", *words]
    variables = {**environment(), **variables}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, cwd=folder, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
