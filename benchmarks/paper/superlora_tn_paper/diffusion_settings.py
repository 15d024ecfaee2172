"""Which settings the diffusion experiment compares: the paper's four levels of parameters, each variant's rank to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from superlora_tn import CP, AdapterSpec, Choice, Fastfood, FlatFold, SpecError, fit, lora, lorta, superlora
from superlora_tn.declare.fold import Shape

PAPER_ELEMENTS = 565_248  # of all q and v weights of the paper's U-Net
# The most that a level's settings may count there: LoRA's r=8 and r=1, LoRTA's 1,060, and "below 100".
LEVELS = {"high": 75_776, "middle": 9_472, "low": 1_060, "extremely low": 100}
# The paper's middle level reaches up to here: for a variant whose smallest count is above the budget, as LoRA's on narrow nets.
MIDDLE_CEILING = 20_000


@dataclass(frozen=True)
class Setting:
    """One row: a level, a variant, its structure in words, and rank -> spec."""

    level: str
    variant: str
    structure: str
    make: Callable[[int], AdapterSpec]

    @property
    def job(self) -> str:
        """A file name."""
        kept = (letter if letter.isalnum() or letter in "=." else "-" for letter in f"{self.variant} {self.structure}".strip())
        return f"{self.level.replace(' ', '-')}_{''.join(kept)}"

    def choose(self, shapes: Mapping[str, Shape]) -> Choice:
        """The largest rank within the level's budget.

        Raises:
            SpecError: even the smallest costs more, or the largest is a lower level's.
        """
        elements = sum(o * i for o, i in shapes.values())
        try:
            choice = fit(self.make, level_budget(self.level, elements), shapes)
        except SpecError:
            if self.level != "middle":
                raise
            choice = fit(self.make, _share(MIDDLE_CEILING, elements), shapes)
        lower = [level for level in LEVELS if LEVELS[level] < LEVELS[self.level]]
        reach = level_budget(lower[0], elements) if lower else 0
        if choice.next_count is None and choice.count <= reach:
            raise SpecError(
                f"a budget of {choice.budget:,} parameters is far above the largest possible count, {choice.count:,}. "
                "Lower the budget, or raise the number of groups."
            )
        return choice


def level_budget(level: str, elements: int) -> int:
    """What a level's settings may count for weights of so many elements: the paper's proportion.

    The lowest level stays at its 100, for a part of so few would leave none to train.
    """
    return LEVELS[level] if level == "extremely low" else _share(LEVELS[level], elements)


def _share(parameters: int, elements: int) -> int:
    return max(1, round(parameters * elements / PAPER_ELEMENTS))


def _lora(level: str) -> Setting:
    return Setting(level, "LoRA", "", lora)


def _flat(level: str, groups: int) -> Setting:
    return Setting(level, "2D", f"G={groups}", lambda rank: AdapterSpec(CP(rank), FlatFold(2, groups, stacked=True)))


def _reshaped(level: str, groups: int, ratio: float = 1.0) -> Setting:
    variant, structure, projection = _projected("2D reshape", f"G={groups}", ratio)
    return Setting(level, variant, structure, lambda rank: superlora(rank, 2, groups, projection=projection))


def _lorta(level: str, order: int, groups: int, ratio: float = 1.0) -> Setting:
    variant, structure, projection = _projected("LoRTA", f"M={order} G={groups}", ratio)
    return Setting(level, variant, structure, lambda rank: lorta(rank, order, groups, projection))


def _lonkr(level: str, groups: int) -> Setting:
    return Setting(level, "LoNKr", f"K=3 G={groups}", lambda rank: superlora(rank, 2, groups, splits=3))


def _projected(variant: str, structure: str, ratio: float) -> tuple[str, str, Fastfood | None]:
    if ratio == 1.0:
        return variant, structure, None
    return f"{variant} projected", f"{structure} rho={ratio:g}", Fastfood(ratio)


def settings() -> list[Setting]:
    """All settings; on the paper's U-Net they come out as those of its table, and a few beside them."""
    return [
        _lora("high"),
        _flat("high", 8),
        _reshaped("high", 8),
        _lorta("high", 3, 12),
        _lonkr("high", 12),
        _lora("middle"),
        _flat("middle", 1),
        _reshaped("middle", 1),
        _reshaped("middle", 4),
        _reshaped("middle", 4, 0.5),
        _lonkr("middle", 64),
        _lorta("middle", 3, 12),
        _lorta("middle", 3, 1),
        _lora("low"),
        _flat("low", 1),
        _lonkr("low", 4),
        _lorta("low", 3, 1),
        _lorta("low", 4, 1),
        _lorta("low", 3, 4, 0.01),
        _reshaped("extremely low", 1),
        _lonkr("extremely low", 1),
        _lorta("extremely low", 5, 1),
    ]
