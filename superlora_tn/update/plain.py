"""x through one matrix, or through two thin ones: products that a backend plans as any network."""

from __future__ import annotations

from superlora_tn.contraction.backend import compiled
from superlora_tn.contraction.plan import make_plan
from superlora_tn.contraction.profile import Device
from superlora_tn.declare.fold import Mode, Shape
from superlora_tn.declare.parts import Dense, Network, Part
from superlora_tn.network.expand import lower
from superlora_tn.update.base import NOMINAL_TOKENS, TOKEN_STEPS, Run, Settings


def by_matrix(shape: Shape, profile: Device, settings: Settings) -> Run:
    """x by dW (out, in) as it stands: the delta route's last part."""
    return _run(Dense(), shape, TOKEN_STEPS[-1], profile, settings)


def by_halves(shape: Shape, bond: int, profile: Device, settings: Settings) -> Run:
    """x by two thin matrices, (out, bond) and (bond, in)."""
    return _run(Network("o i", {"r": bond}, B="o r", A="r i"), shape, NOMINAL_TOKENS, profile, settings)


def _run(part: Part, shape: Shape, tokens: int, profile: Device, settings: Settings) -> Run:
    modes = (Mode("out", shape[0], "out"), Mode("in", shape[1], "in"))
    return compiled(make_plan(lower(part, modes), "apply", tokens, profile, settings.optimize), settings.backend)
