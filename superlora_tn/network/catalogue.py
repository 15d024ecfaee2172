"""All variants by name: the presets and their relatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection

from superlora_tn.declare.checks import SpecError, near, shown
from superlora_tn.network import variants
from superlora_tn.network.budget import Budget, Choice, Shapes, fit
from superlora_tn.network.kernels import Kernels
from superlora_tn.network.mapped import MAPPED
from superlora_tn.network.relatives import RELATIVES
from superlora_tn.network.spec import AdapterSpec

PRESETS = ("dense", "lora", "loha", "lokr", "lotr", "lonkr", "lorta", "superlora", "vera")
VARIANTS: dict[str, Callable[..., AdapterSpec | Budget]] = (
    {name: getattr(variants, name) for name in PRESETS} | RELATIVES | MAPPED
)


def size_setting(variant: str) -> str | None:
    """The setting that a number of parameters buys: ``count`` where numbers themselves are counted, else ``rank``, or None."""
    known = inspect.signature(VARIANTS[variant]).parameters
    return next((name for name in ("count", "rank") if name in known), None)


def bought(variant: str, budget: int, shapes: Shapes, kernels: Kernels | None = None) -> Choice:
    """The setting of a variant with the most parameters that a budget allows; its other settings are the defaults.

    Args:
        variant: its name.
        budget, shapes, kernels: see `fit`.

    Raises:
        SpecError: there is none, see `fit`.
    """
    maker, setting = VARIANTS[variant], size_setting(variant)

    def sized(size: int) -> AdapterSpec:
        made = maker(**{} if setting is None else {setting: size})
        assert isinstance(made, AdapterSpec)  # a Budget is made of budget= alone
        return made

    return fit(sized, budget, shapes, kernels)


def check_variants(owner: str, names: object) -> None:
    """Raise unless they are names of variants, in a list or the like."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise SpecError(f"{owner} was given variants={shown(names)}; give a list, such as variants=['lora', 'lokr'].")
    for name in names:
        if name not in VARIANTS:
            raise SpecError(f"{owner} was given the variant {shown(name)}; {near(name, VARIANTS)}")
