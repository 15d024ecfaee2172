"""What `verify` hands back: rows of property x reference, and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["held", "failed", "skipped", "peer differs", "peer agrees"]


@dataclass(frozen=True)
class Row:
    """One property against one reference.

    Attributes:
        subject: the variant or network that was verified.
        claim: the property.
        reference: against what, with its version; ``-`` for a property that needs none.
        status: ``held`` and ``failed`` are verdicts on us. ``skipped`` was not tried and counts as neither; a peer
            that differs from the textbook (or no longer does) is news about the peer, not about us.
        tried: examples that Hypothesis drew and that the property applies to.
        worst: the largest error in units of the rounding bound; at most 1 where it held, 0 for exact equality.
        detail: why it was skipped, by how much a peer differs, or what went wrong.
        line: the smallest failing case, as one line of Python that raises when it is run.
        required: the caller named this reference, so skipping it is no success.
    """

    subject: str
    claim: str
    reference: str
    status: Status
    tried: int = 0
    worst: float = 0.0
    detail: str = ""
    line: str = ""
    required: bool = False

    @property
    def stands(self) -> bool:
        """Whether this row leaves the certificate true."""
        return self.status != "failed" and not (self.status == "skipped" and self.required)

    @property
    def verdict(self) -> str:
        """The last column of the table."""
        return f"{self.status}: {self.detail}" if self.detail and self.status != "failed" else self.status

    @property
    def error(self) -> str:
        """The largest error in words."""
        return "exact" if self.worst == 0 else f"{self.worst:.2g}"


@dataclass(frozen=True)
class Certificate:
    """All rows of a verification; true exactly when everything that was asked for held.

    A certificate without any row that held is false: nothing was shown.
    """

    rows: tuple[Row, ...]
    examples: int
    seed: int

    def __bool__(self) -> bool:
        return all(row.stands for row in self.rows) and any(row.status == "held" for row in self.rows)

    def __add__(self, other: Certificate) -> Certificate:
        """Both certificates as one."""
        return Certificate(self.rows + other.rows, max(self.examples, other.examples), self.seed)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that did not hold."""
        return tuple(row for row in self.rows if row.status == "failed")

    def count(self, status: Status) -> int:
        """How many rows have a status."""
        return sum(row.status == status for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain data, for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"holds": bool(self), "examples": self.examples, "seed": self.seed, "rows": rows}

    def __str__(self) -> str:
        head = ("", "property", "reference", "examples", "worst error", "verdict")
        table, subject = [head], ""
        for row in self.rows:
            judged = row.status in ("held", "failed")
            table.append(
                (
                    "" if row.subject == subject else row.subject,
                    row.claim,
                    row.reference,
                    str(row.tried) if judged else "",
                    row.error if judged else "",
                    row.verdict,
                )
            )
            subject = row.subject
        lines = _aligned(table)
        for row in self.failures:
            lines += ["", f"{row.subject}: {row.claim} against {row.reference} fails: {row.detail}"]
            lines += ["smallest case:", row.line]
        drawn = f"(up to {self.examples} examples each, seed {self.seed}); errors are in units of the rounding bound."
        return "\n".join([*lines, "", f"{self.verdict} {drawn}"])

    @property
    def verdict(self) -> str:
        """Whether it holds, and how many rows there are of each status."""
        counts = ", ".join(
            f"{self.count(status)} {status}"
            for status in ("held", "failed", "skipped", "peer differs", "peer agrees")
            if self.count(status)
        )
        return f"{'HOLDS' if self else 'DOES NOT HOLD'}: {counts or 'nothing was tried'}"

    __repr__ = __str__


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[k]) for row in table) for k in range(5)]
    return [_line(row, widths) for row in table]


def _line(row: tuple[str, ...], widths: Sequence[int]) -> str:
    cells = [c.rjust(w) if k in (3, 4) else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=False))]
    return "  ".join([*cells, row[5]]).rstrip()
