"""What every benchmark shares: one process, interleaved runs, medians, and a table beside a JSON file.

Freshly mapped large tensors cost page faults that hide the arithmetic, so a benchmark starts itself again with
glibc's thresholds raised (`warm`); ``--allocator default`` measures as glibc comes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
WARM = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_ARENA_MAX": "1",
}


def arguments(question: str, **defaults: Any) -> argparse.Namespace:
    """Command-line arguments common to all benchmarks; re-starts the process with the asked allocator settings."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on the CPU")
    parser.add_argument("--repeats", type=int, default=defaults.pop("repeats", 30), help="interleaved runs of each")
    parser.add_argument("--allocator", choices=("warm", "default"), default="warm")
    parser.add_argument("--no-save", action="store_true", help="print only")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", default=value, type=type(value))
    args = parser.parse_args()
    if args.allocator == "warm" and any(os.environ.get(k) != v for k, v in WARM.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WARM})
    torch.set_num_threads(args.threads)
    return args


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu", warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(repeats + warmup):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if k >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def overheads(times: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """Overhead over the base as a fraction of it: median of the differences of neighbouring runs."""
    middle = statistics.median(times[base])
    return {
        name: statistics.median(a - b for a, b in zip(own, times[base], strict=True)) / middle
        for name, own in times.items()
        if name != base
    }


def highest_live(run: Callable[[], Any]) -> int:
    """The highest sum of live bytes that one call allocates on the CPU, exact, from torch's record of allocations.

    What the call frees must have been allocated in it: whatever is freed besides would count as negative.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = highest = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


def report(name: str, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table and write them as JSON."""
    keys = list(rows[0])
    text = [keys, *([cell(row.get(k)) for k in keys] for row in rows)]
    widths = [max(len(line[c]) for line in text) for c in range(len(keys))]
    for line in text:
        print("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))
    if args.no_save:
        return
    from superlora_tn.tools.measure import machine  # here, as older versions lack it and are measured too (against.py)

    RESULTS.mkdir(exist_ok=True)
    suffix = f"{args.device}-{args.allocator}"
    body = {"benchmark": name, "machine": machine(args.device), "allocator": args.allocator, "rows": rows}
    (RESULTS / f"{name}-{suffix}.json").write_text(json.dumps(body, indent=1) + "\n")


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
