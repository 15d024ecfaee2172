"""Writes benchmarks/README.md from the JSON files under results/: question, file, last result, machine and date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUESTIONS = {
    "layer_overhead": "What does an adapter add to a linear layer's training step, as a fraction of the frozen layer's?",
    "layer_overhead_mkl": "The same with `--onednn off`, all products by MKL",
    "variants_against": "What does each variant add to a linear layer of 768 x 768, beside PEFT's own layer of it?",
    "loha_designs": "Which way of contracting LoHa is cheapest? Overheads, and what the count alone sets",
    "convolution": "What does an adapter add to a convolution's training step, as a fraction of the frozen layer's?",
    "beyond_linear": "What do adapters on tables, blocks, experts and on one another cost, beside PEFT's?",
    "sharing": "What does sharing x between q, k and v save? Overheads of three layers over the frozen ones",
    "dispatch": "What does Python cost on a tiny layer (batch 4, width 64), beside hand-written torch?",
    "memory": "How many MB more than the frozen layer's does a training step peak at?",
    "flat_memory": "How much memory does a flat fold's step peak at on ViT-B, beside dense fine-tuning?",
    "vit_step": "What does a whole ViT-B/16 training step cost?",
    "attach_large": "How long do planning and attaching take at Llama-3.1-405B's shapes?",
    "scale": "What do adapters of Llama-3.1-405B on 512 GPUs hold, move and compute? (docs/scale.md)",
    "route_ranking": "Does the price rank the routes as the clock does? (settings where it does not)",
    "hadamard": "What does the fast Walsh-Hadamard transform cost beside plain copies?",
    "against": "For developers: what do passes cost? Overheads of one version of this library beside an earlier one",
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
FLOPs. With oneDNN for these it stays within 1.2 times PEFT's LoRA, but for 64 tokens at 4096: 1.7 here and 2.2 in
the table of designs below. The aim was 1.3 at every shape.""",
    "variants_against": """Overheads over the frozen layer's step, forward and backward with a gradient for x, one
thread. Differences below 0.04 are noise. `fourier_ft`, `shira` and `waveft` are placed at the weight, as their dW is built in
any case; PEFT's SHiRA adds it to W likewise. Most of the others come to LoRA's cost, as they are cut into two thin halves. What
stays above has no such cut: HiRA multiplies W itself, RandLoRA's dW has full rank, C3A's transforms go over every row of x; and
LoHa's halves have the rank squared. OFT takes Cayley's exact transform on both sides (`use_cayley_neumann=False`; PEFT's
default, a series of five terms, is another map), BOFT one factor (PEFT has no more without a GPU).""",
    "layer_overhead_mkl": """So LoHa takes 1.5 times PEFT's LoRA at the first three shapes and 2.2 times at the fourth; the
others do not need oneDNN to stay below PEFT's LoRA.""",
    "loha_designs": """At 64 tokens and a width of 4096 the aim of 1.3 is below what the count allows: FLOPs at the frozen
layer's rate and bytes at a copy's, one after the other, already make 1.5 times PEFT's whole overhead. Reading W
empties the caches before each of forward and backward, and every product then starts cold. Tried besides at that shape, and
slower: joined factors (in, r1 r2) by either library, and the joined factors kept for backward.""",
    "convolution": """One image, channels and sizes as in a U-Net, float32, rank 8. Where a network can be cut between out
and in, x goes through the two halves; `lokr` cannot and builds dW, but `conv_lokr`
splits at the channel and runs as a chain.""",
    "beyond_linear": """Overheads over the frozen step, rank 8, float32, forward and backward. Embedding: 32,000 x 768, 2,048
tokens. Blocks: q and v of a fused qkv of 768, 1,576 tokens, beside PEFT's LoRA on all of it. Experts: 8 of 256 x 512 in one
parameter, of which each meets 128 rows, beside PEFT's `target_parameters`. Two: two LoRAs at once on a linear layer of 768,
1,576 tokens.""",
    "against": """A pass is one call of a model, during which its layers share what they compute alike. `--checkout` was the
last version without them (86ac75e). Both sides take turns, 80 rounds each; a side's
overhead is uncertain by about 0.01 of the frozen step, which is a large part of the smallest ones.""",
    "scale": """Counted on the meta device, for 8192 tokens a GPU; only the two last columns are times. The base's figures are
in `results/scale_base-cpu-warm.json`.""",
    "memory": "Exact, from torch's record of allocations. The gradients of the adapter's parameters are included.",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [row.get(k, "") for k in keys]
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A figure to three places, large ones in whole numbers."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def section(name: str, question: str) -> str:
    """One benchmark's results, newest machine first."""
    parts = [f"## {question}\n\n`{name.removesuffix('_mkl')}.py`"]
    for path in sorted((HERE / "results").glob(f"{name}-*.json"), reverse=True):
        data = json.loads(path.read_text())
        machine = data["machine"]
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] != '1')}"
        where = f"{machine['device']}, {threads}, torch {machine['torch']}, {machine['date']}"
        parts.append(f"{where}, allocator {data['allocator']}:\n\n{table(data['rows'])}")
    return "\n\n".join([*parts, *([NOTES[name]] if name in NOTES else [])])


def main() -> None:
    """Write the page."""
    found = [section(name, q) for name, q in QUESTIONS.items() if list((HERE / "results").glob(f"{name}-*.json"))]
    (HERE / "README.md").write_text("\n\n".join([HEAD.strip(), *found]) + "\n")


if __name__ == "__main__":
    main()
