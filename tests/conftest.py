"""What all tests share: Hypothesis profiles, one thread, a fixed seed.

``HYPOTHESIS_PROFILE=thorough`` draws ten times as many examples as the default profile, fresh ones at each run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

EXAMPLES = 30
# Drawing nested networks is slower than Hypothesis expects of a strategy, and no deadline survives a first torch call.
COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=EXAMPLES, derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=10 * EXAMPLES, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
# The tensors are small: more threads cost more than they save, and one thread sums in one order.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    """A test that leaves gradients off fails itself, and not those after it."""
    yield
    left_on = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert left_on


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for a test, and the same room for compiled programs, whatever ran before it."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # it counts how often a function was compiled, over all models, and stops at eight
        torch._dynamo.reset()
