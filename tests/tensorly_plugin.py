"""A pytest plug-in for TensorLy's own tests: each runs inside `planned()`, and the planner's use is printed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tensorly
from superlora_tn_backends import tenalg


@pytest.fixture(autouse=True)
def _planned() -> Iterator[None]:
    before = tensorly.backend.current_backend(), tensorly.tenalg.current_backend()
    with tenalg.planned():
        assert isinstance(tensorly.backend.current_backend(), tenalg.PlannedBackend)
        yield
    assert (tensorly.backend.current_backend(), tensorly.tenalg.current_backend()) == before


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """For the test that runs this: how many equations were planned, and how many calls found theirs planned."""
    info = tenalg.cache_info()
    terminalreporter.write_line(f"planned equations={info.misses} reused={info.hits}")
