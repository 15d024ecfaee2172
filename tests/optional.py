"""Libraries that tests use where they are installed."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

import pytest


def library(name: str) -> ModuleType:
    """A module of an optional library, or the test is skipped; what its import warns of is not ours."""
    if name.startswith(("transformers", "diffusers", "timm")):
        _without_broken_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def _without_broken_torchvision() -> None:
    """transformers takes a torchvision of another build of torch for a sound one, and then imports none of its models."""
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]
