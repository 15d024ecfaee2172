"""Writes benchmarks/README.md from the JSON files under results/: question, file, last result, machine and date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUESTIONS = {
    "layer_overhead": "What does an adapter add to a linear layer's training step, as a fraction of the frozen layer's?",
    "loha_designs": "Which way of contracting LoHa is cheapest? Overheads, and the floor that FLOPs alone set",
    "convolution": "What does an adapter add to a convolution's training step, as a fraction of the frozen layer's?",
    "sharing": "What does sharing x between q, k and v save? Overheads of three layers over the frozen ones",
    "dispatch": "What does Python cost on a tiny layer (batch 4, width 64), beside hand-written torch?",
    "memory": "How many MB more than the frozen layer's does a training step peak at?",
    "flat_memory": "How much memory does a flat fold's step peak at on ViT-B, beside dense fine-tuning?",
    "vit_step": "What does a whole ViT-B/16 training step cost?",
    "attach_large": "How long do planning and attaching take at Llama-3.1-405B's shapes?",
    "route_ranking": "Does the price rank the routes as the clock does? (settings where it does not)",
    "hadamard": "What does the fast Walsh-Hadamard transform cost beside plain copies?",
}
HEAD = """# Benchmarks

One file a question; each re-starts itself with glibc's thresholds raised (`--allocator default` measures as glibc
comes), runs all contestants interleaved in one process, prints a table and writes JSON under `results/`. Figures are
medians; overheads are medians of the differences of neighbouring runs. This page is written by
`python benchmarks/summary.py` from those files.
"""
NOTES = {
    "layer_overhead": """Rank 8, float32, forward and backward with a gradient for x. `lorta_cp` is a CP over
(layer, type, head, out, in).

LoHa of ranks (8, 8) has 64 = r1 r2 rank-one terms, so its six products are thin only by 64 and need 8 times LoRA's
FLOPs. At the frozen layer's own FLOP/s that alone is the overhead in the next table's last column, 0.8 to 1.15 times
PEFT's LoRA whole; with its passes over memory and the joined factors it runs at 1.1 to 2.0 times. The aim, 1.3 at
every shape, is not reached.""",
    "loha_designs": "Tried besides, and no faster: the joined factors with `in` and `out` contiguous, (r1 r2, in).",
    "memory": "Exact, from torch's record of allocations. The gradients of the adapter's parameters are included.",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [row.get(k, "") for k in keys]
        lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def section(name: str, question: str) -> str:
    """One benchmark's results, newest machine first."""
    parts = [f"## {question}\n\n`{name}.py`"]
    for path in sorted((HERE / "results").glob(f"{name}-*.json"), reverse=True):
        data = json.loads(path.read_text())
        machine = data["machine"]
        where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"
        parts.append(f"{where}, allocator {data['allocator']}:\n\n{table(data['rows'])}")
    return "\n\n".join([*parts, *([NOTES[name]] if name in NOTES else [])])


def main() -> None:
    """Write the page."""
    found = [section(name, q) for name, q in QUESTIONS.items() if list((HERE / "results").glob(f"{name}-*.json"))]
    (HERE / "README.md").write_text("\n\n".join([HEAD.strip(), *found]) + "\n")


if __name__ == "__main__":
    main()
