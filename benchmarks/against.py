"""What does another checkout of this library take for the same steps? Two processes take turns, one round each.

``python benchmarks/against.py CHECKOUT``: each side runs its own library on this copy of `layer_overhead.py`, `sharing.py`
and `dispatch.py`, so that a change is seen where the machine's noise is larger than it. An overhead is (step - frozen step) /
frozen step, paired by round.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Runs = dict[str, Callable[[], Any]]


def runs_of(question: str) -> Runs:
    """Steps of one question, with this process's library."""
    import dispatch
    import layer_overhead
    import sharing
    import torch

    name, _, size = question.partition(" ")
    if name == "dispatch":
        x, gradient = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64)
        layers = {"frozen": layer_overhead.frozen(64)} | {
            kind: layer_overhead.ours(layer_overhead.linear(64), spec)
            for kind, spec in {"lora": dispatch.sl.lora(8), "lokr": dispatch.sl.lokr(8), "lotr": dispatch.sl.lotr(8)}.items()
        }
        return {kind: dispatch.repeated(layer_overhead.step(layer, x, gradient)) for kind, layer in layers.items()}
    width, tokens = map(int, size.split("x"))
    x = torch.randn(1, tokens, width, requires_grad=True)
    gradient = torch.randn(1, tokens, width)
    if name == "layer":
        layers = {k: v for k, v in layer_overhead.contestants(width).items() if not k.startswith(("peft", "lycoris"))}
        return {kind: layer_overhead.step(layer, x, gradient) for kind, layer in layers.items()}
    models = {"frozen": sharing.projections(layer_overhead.frozen, width)}
    for kind, spec in sharing.SPECS.items():
        models |= {f"{kind} {word}": sharing.block(width, spec, word == "shared") for word in ("apart", "shared")}
    return {kind: sharing.step(model, x, gradient) for kind, model in models.items()}


def work() -> None:
    """One side: a question a line in, one round's seconds a line out."""
    import torch

    torch.set_num_threads(2)
    runs, asked = Runs(), ""
    for line in sys.stdin:
        if line.strip() != asked:
            asked = line.strip()
            runs = runs_of(asked)
        runs["frozen"]()  # the other side has had the caches
        times = {}
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            times[name] = time.perf_counter() - start
        print(json.dumps(times), flush=True)


class Side:
    """A process that measures one checkout."""

    def __init__(self, checkout: Path, settings: dict[str, str]) -> None:
        paths = [checkout, checkout / "backends", HERE]
        environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, "-P", str(HERE / "against.py"), "--side"]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, question: str) -> dict[str, float]:
        """Seconds of each step, once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(question, file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


def overhead(rounds: list[dict[str, float]], name: str) -> float:
    """Median of the differences of neighbouring runs, as a fraction of the frozen step's median."""
    return statistics.median(r[name] - r["frozen"] for r in rounds) / statistics.median(r["frozen"] for r in rounds)


def main() -> None:
    """Measure this checkout beside the other."""
    import harness

    args = harness.arguments(__doc__ or "", repeats=60, checkout="", questions="dispatch,layer,sharing")
    other, own = Side(Path(args.checkout).resolve(), harness.WARM), Side(HERE.parent, harness.WARM)
    shapes = ("768x1576", "1024x512", "2048x256", "4096x64")
    rows = []
    for question in args.questions.split(","):
        for asked in [question] if question == "dispatch" else [f"{question} {shape}" for shape in shapes]:
            sides: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
            for k in range(args.repeats + 3):
                for word, side in (("before", other), ("after", own)) if k % 2 else (("after", own), ("before", other)):
                    found = side.round(asked)
                    if k >= 3:
                        sides[word].append(found)
            for name in sides["after"][0]:
                if name != "frozen":
                    before, after = (overhead(sides[word], name) for word in ("before", "after"))
                    rows.append({"steps": asked, "variant": name, "before": before, "after": after, "ratio": after / before})
    harness.report("against", args, rows)


if __name__ == "__main__":
    work() if "--side" in sys.argv else main()
