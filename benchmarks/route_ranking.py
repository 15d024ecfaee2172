"""Does the price rank the two routes as the clock does? A grid of 200 settings of variants, sizes and tokens.

Each setting is one layer's step (forward and backward) by each route, beside the prediction.
"""

from __future__ import annotations

import harness

import superlora_tn as sl
from superlora_tn.contraction.profile import CPU
from superlora_tn.tools.measure import Measurement, machine, measure_routes

WIDTHS = (64, 128, 256, 512, 1024)
TOKENS = (8, 64, 512, 4096)
SPECS = {
    "lora 8": sl.lora(8),
    "lora 32": sl.lora(32),
    "loha 4": sl.loha(4),
    "loha 8": sl.loha(8),
    "loha 16": sl.loha(16),
    "lokr 8": sl.lokr(8),
    "lokr dense": sl.lokr(512),
    "lotr 16": sl.lotr(16),
    "tt 8": sl.AdapterSpec(sl.TensorTrain(8), sl.PhysicalFold("layer type head out in", heads=8)),
    "kron lokr x lora": sl.AdapterSpec(sl.Hadamard(sl.CP(4), sl.Kronecker(sl.CP(4, True), sl.CP(4, True)))),
}


def measure(repeats: int) -> list[Measurement]:
    """The whole grid."""
    return [
        measure_routes(name, spec, (width, width), tokens, CPU, repeats=repeats)
        for name, spec in SPECS.items()
        for width in WIDTHS
        for tokens in TOKENS
    ]


def main() -> None:
    """Measure, and print where the prediction was wrong."""
    args = harness.arguments(__doc__ or "", repeats=5)
    found = measure(args.repeats)
    agree = sum(m.agrees for m in found)
    wrong = [m for m in found if not m.agrees]
    print(f"{agree} of {len(found)} settings ranked as measured ({agree / len(found):.1%}); the others, by what they cost:")
    rows = [
        {
            "network": m.label,
            "width": m.shape[0],
            "tokens": m.tokens,
            **{f"{r} predicted us": 1e6 * m.predicted[r] for r in m.predicted},
            **{f"{r} measured us": 1e6 * m.measured[r] for r in m.measured},
            "regret": m.regret,
        }
        for m in sorted(wrong, key=lambda m: -m.regret)
    ]
    rows = rows or [{"network": "none"}]
    if not args.no_save:
        name = f"route_ranking_all-{args.device}-{args.allocator}.json"
        harness.RESULTS.mkdir(exist_ok=True)
        import json

        body = {"machine": machine(args.device), "agree": agree, "of": len(found), "rows": [m.row() for m in found]}
        (harness.RESULTS / name).write_text(json.dumps(body, indent=1) + "\n")
    harness.report("route_ranking", args, rows)


if __name__ == "__main__":
    main()
