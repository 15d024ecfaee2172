"""Updates of any declaration that are not added to the weight: DoRA, and products from either side, by name."""

from __future__ import annotations

from dataclasses import replace

from superlora_tn.declare.checks import near
from superlora_tn.declare.joins import Join, Magnitude, Multiply
from superlora_tn.declare.parts import SpecError, shown
from superlora_tn.network.spec import AdapterSpec

# How an update joins the weight, by the words of configurations and of the command line.
JOIN_NAMES: dict[str, Join | None] = {
    "add": None,
    "dora": Magnitude(),
    "left": Multiply("left"),
    "right": Multiply("right"),
}


def dora(spec: AdapterSpec, detached: bool = True) -> AdapterSpec:
    """DoRA of any declaration: ``W' = m (W + dW) / ||W + dW||`` row by row (Liu et al. 2024), ``sl.dora(sl.lokr(4))``.

    Count: the declaration's, and one number for each row (output) of each weight.

    Args:
        spec: how dW is declared.
        detached: the norm gets no gradient, as in the paper's section 4.3 and PEFT; False differentiates it too.

    Raises:
        SpecError: not a declaration, or one that joins otherwise already.
    """
    if not isinstance(spec, AdapterSpec):
        raise SpecError(
            f"dora was given {shown(spec)}; give a declaration such as superlora_tn.lora(8) (of a budget, what it buys)."
        )
    if spec.join is not None:
        raise SpecError(f"dora was given a declaration that joins otherwise already ({spec.join}); give one with join=None.")
    return replace(spec, join=Magnitude(detached))


def joined(spec: AdapterSpec, name: str) -> AdapterSpec:
    """A declaration with the join of a name; ``"add"`` leaves it as it is.

    Raises:
        SpecError: an unknown name, or a declaration that joins otherwise already.
    """
    if name not in JOIN_NAMES:
        raise SpecError(f"there is no join {shown(name)}; {near(name, JOIN_NAMES)}")
    if name == "add":
        return spec
    if spec.join is not None:
        raise SpecError(f"join '{name}' was given for a declaration that joins otherwise already ({spec.join}); leave it out.")
    return replace(spec, join=JOIN_NAMES[name])
