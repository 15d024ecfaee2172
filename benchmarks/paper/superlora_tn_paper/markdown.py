"""The words that all reports share: tables, figures with their spread, and where a result was made."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from superlora_tn_paper.store import Data


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; all columns but the first two to the right."""
    bars = ["---" if k < 2 else "---:" for k in range(len(heading))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heading, bars, *rows))


def spread(values: Sequence[float]) -> float:
    """Standard deviation, 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation of shares, in percent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * spread(values):.1f}" if len(values) > 1 else mean


def where(result: Data) -> str:
    """Machine and date."""
    facts = result["machine"]
    threads = f"{facts['threads']} thread{'' if facts['threads'] == '1' else 's'}"
    return f"{facts['date']}, {facts['device']}, {threads}, torch {facts['torch']}."
