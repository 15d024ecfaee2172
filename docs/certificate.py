"""Verifies the whole catalogue and writes certificate.md of it: ``python docs/certificate.py --examples 50``.

Without arguments the page is written anew from ``certificate.json``, which holds every row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from superlora_tn.tools.measure import machine
from superlora_tn.verification.certificate import Certificate, Row
from superlora_tn.verification.engine import run_all

HERE = Path(__file__).parent
ROWS = HERE / "certificate.json"
REFERENCES = ("formula", "paper", "tensorly", "peft", "lycoris")  # columns; a reference's version stands behind its name
TOGETHER = ("reductions", "peers")  # subjects that are no variant
PLAIN = Row("", "", "", "held")


def compact(row: Row) -> dict[str, object]:
    """What a row has of its own."""
    return {k: v for k, v in asdict(row).items() if k == "status" or v != getattr(PLAIN, k)}


def error(rows: Sequence[Row]) -> str:
    """The largest error of rows that held, in units of the rounding bound; nothing where there is no row."""
    return max(rows, key=lambda row: row.worst).error if rows else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    yield ""


def variants(rows: Sequence[Row]) -> Iterator[str]:
    """One line a variant: how many properties, and the worst error of these and against each reference."""
    names = [name for name in dict.fromkeys(row.subject for row in rows) if name not in TOGETHER]
    lines = []
    for name in names:
        own = [row for row in rows if row.subject == name]
        alone = [row for row in own if row.reference == "-"]
        beside = [[row for row in own if row.reference.split()[0] == column] for column in REFERENCES]
        lines.append([f"`{name}`", str(len(alone)), error(alone), *(error(found) for found in beside)])
    versions = {row.reference.split()[0]: row.reference for row in rows}
    yield from table(["", "properties", "worst", *(versions.get(c, c) for c in REFERENCES)], lines)


def page() -> str:
    """The text of certificate.md."""
    found = json.loads(ROWS.read_text())
    made = Certificate(tuple(Row(**{**asdict(PLAIN), **row}) for row in found["rows"]), found["examples"], found["seed"])
    if made.failures:
        raise SystemExit(f"a certificate with failures is not published:\n{made}")
    reductions = [row for row in made.rows if row.subject == "reductions"]
    peers = [row for row in made.rows if row.subject == "peers"]
    ran = "{device}, torch {torch}, {date}".format(**found["machine"])
    lines = [
        "# Certificate",
        "",
        f"**{made.verdict}**, up to {made.examples} examples of each property, seed {made.seed}. {ran}.",
        "Errors are in units of the rounding bound: up to 1 holds, exact is bit for bit. What each says and what is drawn:",
        "[verification](verify.md). All rows: [certificate.json](certificate.json). Written by",
        f"`python docs/certificate.py --examples {made.examples}`.",
        "",
        "## Each variant",
        "",
        "How many properties that need no reference held, and their worst error (near 1 for merges in bfloat16, which are one",
        "rounding); then that beside each reference, where it has such a method.",
        "",
        *variants(made.rows),
        "## Reductions",
        "",
        "Declarations that are equal, as dW from the same values.",
        "",
        *table(["", "is", "worst"], [[row.claim, row.reference, row.error] for row in reductions]),
        "## Where other libraries differ",
        "",
        "From the textbook's formula, each with an example: what the library gives, what the formula gives, and where.",
        "",
        *table(["what", "release", "example"], [[row.claim, row.reference, row.detail] for row in peers]),
    ]
    return "\n".join(lines)


def main() -> None:
    """Verify, where asked to; write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, help="verify first, with as many cases of each property")
    examples = parser.parse_args().examples
    if examples is not None:
        made = run_all((), examples, 0, lambda line: print(line, file=sys.stderr, flush=True))
        rows = ",\n ".join(json.dumps(compact(row)) for row in made.rows)
        head = json.dumps({"machine": machine(), "examples": made.examples, "seed": made.seed})[:-1]
        ROWS.write_text(f'{head}, "rows": [\n {rows}\n]}}\n')
    (HERE / "certificate.md").write_text(page())


if __name__ == "__main__":
    main()
