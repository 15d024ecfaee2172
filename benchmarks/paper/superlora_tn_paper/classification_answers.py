"""The questions of the classification report, answered from the rows alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from superlora_tn_paper.differences import Difference, difference
from superlora_tn_paper.store import Data

EQUAL = 1.125  # counts that differ by an eighth at most count as equal
TENTH = (5.0, 20.0)  # "about a tenth": LoRA has so many times LoRTA's parameters


@dataclass(frozen=True)
class Pair:
    """Two settings side by side, and what the second has more (in accuracy)."""

    first: Data
    second: Data

    @property
    def difference(self) -> Difference:
        """Second less first."""
        return difference(self.first["accuracies"], self.second["accuracies"])


Test = Callable[[Data, Data], bool]


def pairs(rows: Sequence[Data], test: Test) -> Iterator[Pair]:
    """For each second row, the first row that the test allows and whose count is nearest, where both count as equal."""
    for second in rows:
        allowed = [first for first in rows if first is not second and test(first, second)]
        if allowed:
            first = min(allowed, key=lambda row: _apart(row, second))
            if _apart(first, second) <= EQUAL:
                yield Pair(first, second)


def _apart(one: Data, other: Data) -> float:
    """How many times the parameters of the smaller the larger has."""
    counts = sorted((one["parameters"], other["parameters"]))
    return float(counts[1] / counts[0])


def tenths(rows: Sequence[Data]) -> list[Pair]:
    """Each LoRA beside the unprojected LoRTA nearest to a tenth of its parameters."""
    found = []
    for lora in (r for r in rows if r["variant"] == "LoRA"):
        candidates = [r for r in rows if r["variant"].startswith("LoRTA")]
        fit = [r for r in candidates if TENTH[0] <= lora["parameters"] / r["parameters"] <= TENTH[1]]
        if fit:
            near = min(fit, key=lambda r: abs(math.log(lora["parameters"] / r["parameters"] / 10)))
            found.append(Pair(lora, near))
    return found


def reaching(rows: Sequence[Data]) -> list[Pair]:
    """LoRA's most accurate setting beside each unprojected LoRTA, of the fewest parameters first."""
    loras = [r for r in rows if r["variant"] == "LoRA"]
    others = sorted((r for r in rows if r["variant"].startswith("LoRTA")), key=lambda r: r["parameters"])
    top = max(loras, key=lambda r: statistics.fmean(r["accuracies"]), default=None)
    return [] if top is None else [Pair(top, other) for other in others]


def reach_answer(found: Sequence[Pair]) -> str:
    """From which number of parameters on does LoRTA reach LoRA's best?"""
    if not found or found[0].difference.error is None:
        return "Not answered: it takes a LoRA, a LoRTA and two seeds."
    top = found[0].first
    words = f"LoRA's best setting ({top['words']}, {top['parameters']:,} parameters, {_mean(top)})"
    on = len(found)
    while on and found[on - 1].difference.sign >= 0:
        on -= 1
    if on == len(found):
        last = found[-1].second
        return f"LoRTA reaches {words} at **no count**: with {last['parameters']:,} parameters, its most, it has {_mean(last)}."
    first = found[on].second
    return (
        f"LoRTA reaches {words} **from {first['parameters']:,} parameters on** ({first['variant']} {first['words']}, "
        f"{_mean(first)}): there and above it is not seen to be behind."
    )


def _mean(row: Data) -> str:
    return f"{100 * statistics.fmean(row['accuracies']):.1f} %"


def rank_pairs(rows: Sequence[Data]) -> list[Pair]:
    """LoRA of the fewest parameters beside LoRA of the most."""
    own = sorted((r for r in rows if r["variant"] == "LoRA"), key=lambda r: r["parameters"])
    return [Pair(own[0], own[-1])] if len(own) > 1 else []


def rank_answer(found: Sequence[Pair]) -> str:
    """Does accuracy depend on the number of parameters at all?"""
    if not found or found[0].difference.error is None:
        return "Not answered: it takes two LoRA settings and two seeds."
    times, d = _apart(found[0].first, found[0].second), found[0].difference
    if d.sign > 0:
        return f"Yes: {times:.0f} times LoRA's parameters gave more accuracy ({d.verdict})."
    return (
        f"**No**: {times:.0f} times LoRA's parameters gave no more accuracy here ({d.verdict}). So that some variant does as "
        "well with fewer says little at this scale."
    )


def _plain(row: Data) -> bool:
    return not row["projection"]


def _same_flat(first: Data, second: Data) -> bool:
    return bool(first["order"] == second["order"] >= 2 and first["groups"] == second["groups"])


QUESTIONS: tuple[tuple[str, str, Test], ...] = (
    (
        "What does grouping (G) give?",
        "more groups",
        lambda a, b: _plain(a) and a["variant"] == b["variant"] and b["groups"] > a["groups"] == 1,
    ),
    (
        "What does reshaping (2D to near-square 2D reshape) give?",
        "reshaping",
        lambda a, b: a["variant"] == "2D" and b["variant"] == "2D reshape",
    ),
    (
        "What does shuffling give?",
        "shuffling",
        lambda a, b: (
            _plain(a)
            and b["projection"] == "shuffle"
            and _same_flat(a, b)
            and b["variant"] == f"shuffled {a['variant'].partition(' M=')[0]}"
        ),
    ),
    (
        "What does a fixed projection give?",
        "projection",
        lambda a, b: (
            _plain(a)
            and a["variant"].startswith("LoRTA")
            and b["projection"].startswith("rho")
            and "tanh" not in b["projection"]
            and _same_flat(a, b)
        ),
    ),
    (
        "What does tanh behind the projection give?",
        "tanh",
        lambda a, b: b["projection"] == f"{a['projection']} tanh",
    ),
    (
        "What do more modes (LoRTA M=4, 5 beside M=3) give?",
        "more modes",
        lambda a, b: a["variant"] == "LoRTA M=3" and b["variant"] in ("LoRTA M=4", "LoRTA M=5") and a["groups"] == b["groups"],
    ),
    (
        "What does the Kronecker product of the general formula (K=2) give over LoRTA?",
        "K=2",
        lambda a, b: a["variant"] == "LoRTA M=3" and b["variant"] == "SuperLoRA K=2" and _same_flat(a, b),
    ),
)


def summary(found: Sequence[Pair], what: str) -> str:
    """One sentence over all pairs of a question."""
    if not found:
        return "Not answered: no two settings of this run have counts equal enough."
    judged = [p.difference for p in found]
    if any(d.error is None for d in judged):
        return "Not answered: one seed has no spread to judge by."
    gains, losses = sum(d.sign > 0 for d in judged), sum(d.sign < 0 for d in judged)
    clear = sum(d.clear and d.sign != 0 for d in judged)
    if gains == losses == 0:
        return f"At equal parameters {what} made no difference that {_count(len(found))} would show."
    words = f"Of {_count(len(found))}, {what} raised accuracy in {gains} and lowered it in {losses}; {clear} of these clearly."
    if clear == 0:
        words += " So nothing is settled at this scale."
    elif gains and losses:
        words += " The signs are mixed: it depends on the setting."
    return words


def _count(pairs: int) -> str:
    return "the one pair" if pairs == 1 else f"{pairs} pairs"


def tenth_answer(found: Sequence[Pair]) -> str:
    """Does LoRTA reach LoRA's accuracy with about a tenth of the parameters?"""
    if not found:
        return "Not answered: no LoRTA of this run has about a tenth of a LoRA's parameters."
    judged = [p.difference for p in found]
    if any(d.error is None for d in judged):
        return "Not answered: one seed has no spread to judge by."
    wins, level, behind = (sum(d.sign == sign for d in judged) for sign in (1, 0, -1))
    counts = (
        f"at {len(found)} levels of LoRA it was ahead at {wins}, no difference was seen at {level}, it was behind at {behind}"
    )
    clear = sum(d.clear and d.sign < 0 for d in judged)
    if behind == 0:
        return f"**Yes**: {counts}."
    if wins + level == 0:
        return f"**No, this did not reproduce at this scale**: {counts} (clearly at {clear})."
    return f"**In part**: {counts} (clearly at {clear})."
