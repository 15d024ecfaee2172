"""Where the paper's experiments are: a package of their own, installed, or beside the library in its checkout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import superlora_tn

PACKAGE = "superlora_tn_paper"
CHECKOUT = Path(superlora_tn.__file__).parents[1] / "benchmarks" / "paper"


class ExperimentsError(LookupError):
    """The experiments are not here; the message says how to get them."""


def find_experiments() -> None:
    """Make ``superlora_tn_paper`` importable in this process: as it is installed, else from the checkout.

    Raises:
        ExperimentsError: neither is there.
    """
    if importlib.util.find_spec(PACKAGE) is not None:
        return
    if not (CHECKOUT / PACKAGE / "__init__.py").is_file():
        raise ExperimentsError(
            f"the paper's experiments are a package of their own, {PACKAGE}, which is not installed here. Get a checkout of "
            "superlora_tn's repository, and either run this command from it or install them: pip install ./benchmarks/paper"
        )
    # At the end, so that nothing of the checkout hides what is installed; on the path, so that a loader's processes find it.
    sys.path.append(str(CHECKOUT))
    importlib.invalidate_caches()
