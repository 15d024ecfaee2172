"""All of one accelerator in ten minutes: its rates, what adapters cost on a layer, decoding, CUDA graphs, memory.

``python benchmarks/gpu.py --device cuda``. Rows are printed and written to ``results/gpu-<device>.json`` as they are measured,
and none is begun after ``--minutes``; what is left is named at the end. ``--quick`` measures small sizes, to try it on a CPU.
An overhead is (step with adapter - step of the frozen layer) / step of the frozen layer, interleaved in this one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import layer_overhead
import torch
from torch import Tensor, nn

from superlora_tn.tools.measure import machine

SHAPES = ((768, 50432), (2048, 8192), (4096, 8192))
DECODED = (1, 4, 16, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = ("lora", "lokr", "loha", "lotr", "lorta_cp")
Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]


class Bench:
    """The settings of one run, and its measurements.

    Args:
        device: torch's name of it.
        quick: small sizes, few repeats.
    """

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.repeats = device, 3 if quick else 30
        self.shapes = ((64, 128), (128, 64)) if quick else SHAPES
        self.decoding = 64 if quick else 4096
        self.large = 512 if quick else 8192
        self.is_cuda = device.startswith("cuda")

    def jobs(self) -> Iterator[Job]:
        """Names and measurements, the most telling first."""
        yield "rates", self.rates
        for compiled in (False, True):
            for width, tokens in self.shapes:
                for name, dtype in DTYPES.items():
                    how = "compiled" if compiled else "eager"
                    yield f"layer {width}x{tokens} {name} {how}", lambda a=(width, tokens, dtype, compiled): self.layer(*a)
        for tokens in DECODED:
            for name, dtype in DTYPES.items():
                yield f"decode {self.decoding}x{tokens} {name}", lambda a=(tokens, dtype): self.decode(*a)
        if self.is_cuda:
            for width, tokens in self.shapes:
                yield f"graphed {width}x{tokens} bfloat16", lambda a=(width, tokens): self.graphed(*a)
                yield f"memory {width}x{tokens} bfloat16", lambda a=(width, tokens): self.memory(*a)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median seconds of one call."""
        return statistics.median(harness.interleaved({"": run}, self.repeats, self.device)[""])

    def rates(self) -> Row:
        """GB/s of a copy (read and write counted) and TFLOP/s of square products."""
        n = self.large
        source = torch.randn(n, n, device=self.device)
        target = torch.empty_like(source)
        row: Row = {"copy GB/s": 2 * source.nbytes / self.seconds(lambda: target.copy_(source)) / 1e9}
        for name, dtype in DTYPES.items():
            a = source.to(dtype)
            row[f"{name} TFLOP/s"] = 2 * n**3 / self.seconds(lambda a=a: a @ a) / 1e12
        return row

    def contestants(self, width: int, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The frozen layer, ours, PEFT's and LyCORIS's."""
        torch.manual_seed(0)
        return {name: layer.to(self.device, dtype) for name, layer in layer_overhead.contestants(width).items()}

    def x(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Random numbers on the device."""
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def layer(self, width: int, tokens: int, dtype: torch.dtype, compiled: bool) -> Row:
        """Overheads of a training step."""
        x, gradient = self.x(1, tokens, width, dtype=dtype).requires_grad_(), self.x(1, tokens, width, dtype=dtype)
        layers = self.contestants(width, dtype)
        if compiled:
            torch._dynamo.reset()
            layers = {name: torch.compile(layer) for name, layer in layers.items() if name in ("frozen", "peft_lora", *OURS)}
        return self._overheads({name: layer_overhead.step(layer, x, gradient) for name, layer in layers.items()})

    def decode(self, tokens: int, dtype: torch.dtype) -> Row:
        """Overheads of a call without gradients on few tokens."""
        x = self.x(tokens, 1, self.decoding, dtype=dtype)
        with torch.no_grad():
            return self._overheads({name: lambda m=m: m(x) for name, m in self.contestants(self.decoding, dtype).items()})

    def graphed(self, width: int, tokens: int) -> Row:
        """Overheads of a training step that a CUDA graph replays: what is left is the device's own work."""
        dtype = torch.bfloat16
        x, gradient = self.x(1, tokens, width, dtype=dtype).requires_grad_(), self.x(1, tokens, width, dtype=dtype)
        runs = {}
        for name, layer in self.contestants(width, dtype).items():
            if name in ("frozen", "peft_lora", *OURS):
                runs[name] = replayed(layer_overhead.step(layer, x, gradient))
        return self._overheads(runs)

    def memory(self, width: int, tokens: int) -> Row:
        """MB that a training step's peak lies above the frozen layer's."""
        dtype, peaks = torch.bfloat16, dict[str, float]()
        x, gradient = self.x(1, tokens, width, dtype=dtype).requires_grad_(), self.x(1, tokens, width, dtype=dtype)
        for name, layer in self.contestants(width, dtype).items():
            run = layer_overhead.step(layer, x, gradient)
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        return {"frozen MB": peaks["frozen"], **{n: p - peaks["frozen"] for n, p in peaks.items() if n != "frozen"}}

    def _overheads(self, runs: dict[str, Callable[[], Any]]) -> Row:
        times = harness.interleaved(runs, self.repeats, self.device)
        return {"frozen ms": statistics.median(times["frozen"]) * 1e3, **harness.overheads(times, "frozen")}


def replayed(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> None:
    """Measure until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", help="the JSON file (default: results/gpu-<device>.json)")
    args = parser.parse_args()
    end, bench = time.monotonic() + 60 * args.minutes, Bench(args.device, args.quick)
    rows: list[Row] = []
    out = args.out or harness.RESULTS / f"gpu-{args.device}.json"
    body = {"benchmark": "gpu", "machine": machine(args.device), "allocator": "device's", "quick": args.quick, "rows": rows}
    left: list[str] = []
    for name, job in bench.jobs():
        if time.monotonic() > end:
            left.append(name)
            continue
        try:
            found = job()
        except Exception as error:  # one contestant that cannot run must not cost the other rows
            found = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        rows.append({"measured": name, **found})
        print("  ".join([name.ljust(36), *(f"{k} {harness.cell(v)}" for k, v in found.items())]), flush=True)
        with open(out, "w") as file:
            file.write(json.dumps(body | {"left": left}, indent=1) + "\n")
    if left:
        print(f"no time for: {', '.join(left)}")


if __name__ == "__main__":
    main()
