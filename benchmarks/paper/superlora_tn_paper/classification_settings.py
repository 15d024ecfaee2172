"""Which settings the classification experiment compares, from under 100 to over 100,000 parameters on the small ViT.

Each variant's rank is the one whose count comes nearest to a wanted one, so that the questions of the report find pairs
of (nearly) equal counts on any model. Counts are wanted in units of LoRA's at rank 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from superlora_tn import (
    CP,
    AdapterSpec,
    Fastfood,
    FlatFold,
    Shuffle,
    SpecError,
    dense,
    lokr,
    lonkr,
    lora,
    lorta,
    lotr,
    superlora,
)
from superlora_tn.declare.fold import Shape
from superlora_tn.declare.maps import Projection
from superlora_tn.declare.parts import reference_rank

LEVEL = 0.63  # where groups, orders, maps and splits are compared: about a tenth of LoRA at rank 6
MOST = 4096  # ranks tried


@dataclass(frozen=True)
class Setting:
    """One setting of a variant, its parameters counted for the weights at hand.

    Attributes:
        variant: its line in the figures.
        family: variants of one family share a learning rate.
        structure: all but the rank, in words.
        order, groups: M and G; 0 where the variant has no such thing.
        projection: the fixed map.
    """

    variant: str
    family: str
    structure: str
    order: int
    groups: int
    projection: Projection | None
    spec: AdapterSpec
    parameters: int

    @property
    def rank(self) -> int | None:
        """The declared rank; None for dense fine-tuning."""
        return reference_rank(self.spec.network)

    @property
    def words(self) -> str:
        """The setting as the tables name it."""
        return f"{'' if self.rank is None else f'r={self.rank}'} {self.structure}".strip()

    @property
    def job(self) -> str:
        """A file name."""
        return f"{self.variant} {self.words}".strip().replace(" ", "_")


def nearest(make: Callable[[int], AdapterSpec], wanted: float, shapes: Mapping[str, Shape]) -> tuple[AdapterSpec, int]:
    """The spec whose count is nearest to the wanted one, among all ranks up to the first above it, and its count."""
    best, count = make(1), make(1).count(shapes)
    for rank in range(2, MOST):
        spec = make(rank)
        try:
            own = spec.count(shapes)
        except SpecError:  # a rank above a mode's size
            break
        if own <= count:  # the rank has no more effect
            break
        if abs(own - wanted) < abs(count - wanted):
            best, count = spec, own
        if own >= wanted:
            break
    return best, count


def _flat(order: int, groups: int, projection: Projection | None) -> str:
    words = [f"M={order} G={groups}" if order > 2 else f"G={groups}"]
    if isinstance(projection, Fastfood):
        words += [f"rho={projection.ratio:g}"] + ["tanh"] * projection.tanh
    return " ".join(words)


def settings(shapes: Mapping[str, Shape], more_lorta: Sequence[float] = ()) -> list[Setting]:
    """All settings for target weights (name -> (out, in)), dense fine-tuning first.

    Args:
        shapes: of the weights.
        more_lorta: wanted counts of further LoRTA settings (M=3, one group), in units of LoRA's at rank 1.
    """
    unit = lora(1).count(shapes)
    found: list[Setting] = []

    def add(
        variant: str,
        make: Callable[[int], AdapterSpec],
        wanted: float,
        flat: tuple[int, int, Projection | None] | None = None,
        family: str = "",
    ) -> None:
        spec, count = nearest(make, wanted * unit, shapes)
        order, groups, projection = flat or (0, 0, None)
        words = _flat(*flat).removeprefix(f"{variant[6:]} ") if flat else "K=3" if variant == "LoNKr" else ""
        found.append(Setting(variant, family or variant, words, order, groups, projection, spec, count))

    def add_lorta(wanted: float, order: int = 3, groups: int = 1, projection: Projection | None = None) -> None:
        kind = "shuffled LoRTA" if isinstance(projection, Shuffle) else "projected LoRTA" if projection else f"LoRTA M={order}"
        family = "projected LoRTA" if isinstance(projection, Fastfood) else "LoRTA"
        add(kind, lambda rank: lorta(rank, order, groups, projection), wanted, (order, groups, projection), family)

    def add_matrix(wanted: float, groups: int, stacked: bool, projection: Projection | None = None) -> None:
        variant = "2D" if stacked else "shuffled 2D reshape" if projection else "2D reshape"
        fold = FlatFold(2, groups, stacked=stacked)
        add(variant, lambda r: AdapterSpec(CP(r), fold, projection), wanted, (2, groups, projection), variant[-10:])

    add("dense", lambda _: dense(), 0)
    for rank in (1, 2, 4, 8, 16, 32):
        add("LoRA", lora, rank)
    for wanted, groups in ((0.54, 1), (4, 4)):
        add_matrix(wanted, groups, stacked=True)
    for wanted, groups in ((0.54, 1), (4, 1), (4, 4)):
        add_matrix(wanted, groups, stacked=False)
    add_matrix(4, 1, stacked=False, projection=Shuffle())
    for wanted in (0.375, 0.75):
        add("LoKr", lokr, wanted)
    add("LoNKr", lonkr, 0.375)
    for wanted in (0.18, 0.92):
        add("LoTR", lotr, wanted)
    for wanted, groups in ((0.12, 1), (LEVEL, 1), (LEVEL, 4), (1.47, 12), *((wanted, 1) for wanted in more_lorta)):
        add_lorta(wanted, groups=groups)
    add_lorta(LEVEL, order=4)
    for wanted in (0.02, 0.41):
        add_lorta(wanted, order=5)
    for projection in (Shuffle(), Fastfood(0.5), Fastfood(0.1), Fastfood(0.1, tanh=True), Fastfood(0.01)):
        add_lorta(LEVEL, projection=projection)
    add_lorta(0.028, projection=Fastfood(0.01))
    add("SuperLoRA K=2", lambda rank: superlora(rank, 3, 4, splits=2), LEVEL, (3, 4, None))
    return found
