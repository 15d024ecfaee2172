"""Measure plans against the clock: this machine's balance, and a layer's step by each route and optimizer."""

from __future__ import annotations

import copy
import datetime
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora_tn.contraction.backend import backend as find_backend
from superlora_tn.contraction.plan import Route
from superlora_tn.contraction.profile import CPU, DEVICES, Device
from superlora_tn.contraction.search import Optimizer, PlanError
from superlora_tn.contraction.summed import choose_all
from superlora_tn.declare.fold import PhysicalGroup, Shape
from superlora_tn.model.attach import attach
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(run: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Seconds of the fastest of several runs, after a first one."""
    run()
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def calibrate(device: str | torch.device = "cpu") -> Device:
    """Measure the present machine's balance, in about a second.

    Args:
        device: where to measure.

    Returns:
        A `Device` with the FLOP/s of a large float32 product, the bytes/s of a large copy, and the seconds of a small
        operation, for `make_plan(..., device=...)` and `choose`.
    """
    place = torch.device(device)
    side = 1024 if place.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=place) for _ in range(2))
    large = torch.randn(1 << (24 if place.type == "cpu" else 28), device=place)
    copy, small = torch.empty_like(large), torch.randn(8, 8, device=place)
    with torch.no_grad():
        product = fastest(lambda: a @ b, place)
        moved = fastest(lambda: copy.copy_(large), place)

        def many() -> None:
            x = small
            for _ in range(100):
                x = x @ small

        operation = fastest(many, place) / 100
    shipped = DEVICES.get(place.type, CPU)  # what batched and thin products lose is taken from there
    speed, rate = 2 * side**3 / product, 2 * 4 * large.numel() / moved
    return replace(shipped, name=f"{place} as measured", flops=speed, bandwidth=rate, latency=operation)


@dataclass(frozen=True)
class Measurement:
    """One layer's step: predicted and measured seconds above the frozen layer's, by route."""

    label: str
    shape: Shape
    tokens: int
    optimizer: str
    predicted: dict[str, float]
    measured: dict[str, float]

    @property
    def agrees(self) -> bool:
        """Whether the prediction and the clock name the same faster route, or both routes are one contraction.

        For few parameters the best way of x through the network may be to build dW first; then there is no choice.
        """
        apply, delta = self.predicted["apply"], self.predicted["delta"]
        return abs(apply - delta) < 1e-3 * delta or min(self.predicted, key=self.predicted.__getitem__) == min(
            self.measured, key=self.measured.__getitem__
        )

    @property
    def regret(self) -> float:
        """How much slower the predicted route is than the faster one, as a fraction."""
        best = min(self.measured.values())
        return (self.measured[min(self.predicted, key=self.predicted.__getitem__)] - best) / abs(best)

    def row(self) -> dict[str, object]:
        """As plain data."""
        return {**asdict(self), "agrees": self.agrees, "regret": self.regret}


def check_measurable(label: str, spec: AdapterSpec, shape: Shape, optimizers: Sequence[Optimizer], name: str) -> None:
    """Raise for what `measure_routes` would refuse, before anything is measured.

    Args:
        label: a name for the declaration.
        spec: a declaration with a physical fold.
        shape: (out, in) of the layer.
        optimizers, name: which are to plan, and which backend is to run.

    Raises:
        PlanError: a flat fold, or no such optimizer.
        BackendError: no such backend.
    """
    group, graph = _one_group(label, spec, shape)
    for optimize in optimizers:
        choose_all(graph, group.shape, 1, CPU, optimize)
    find_backend(name)


def _one_group(label: str, spec: AdapterSpec, shape: Shape) -> tuple[PhysicalGroup, Graph]:
    """The group of one layer and its graph."""
    [(group, graph)] = spec.lay_out({"layer": shape})
    if not isinstance(group, PhysicalGroup):
        raise PlanError(f"{label} has a flat fold and so one route alone; there is nothing to compare. Use a physical fold.")
    return group, graph


def measure_routes(
    label: str,
    spec: AdapterSpec,
    shape: Shape,
    tokens: int,
    profile: Device,
    optimize: Optimizer = "dp",
    backend: str = "tensorly_torch",
    repeats: int = 7,
) -> Measurement:
    """Time a step (forward and backward) of the adapter alone by both routes, beside the prediction.

    Args:
        label: a name for the row.
        spec: a declaration with a physical fold.
        shape: (out, in) of the layer.
        tokens: rows of x.
        profile: the device to predict for.
        optimize, backend: as in `attach`.
        repeats: runs, of which the fastest counts.
    """
    group, graph = _one_group(label, spec, shape)
    predicted: dict[str, float] = {"apply": 0.0, "delta": 0.0}
    found = choose_all(graph, group.shape, tokens, profile, optimize)
    for (_, choice), cropped in zip(found.each, found.crops, strict=True):
        assert choice.apply is not None
        predicted["apply"] += choice.apply.price + cropped
        predicted["delta"] += choice.delta_price + cropped
    layers: dict[str, nn.Module] = {"frozen": nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)}
    routes: tuple[Route, ...] = ("apply", "delta")
    for route in routes:
        layers[route] = nn.Sequential(copy.deepcopy(layers["frozen"]))
        attach(layers[route], spec, ["0"], route=route, backend=backend, optimize=optimize)
    x, gradient = torch.randn(tokens, shape[1], requires_grad=True), torch.randn(tokens, shape[0])
    best = dict.fromkeys(layers, math.inf)
    for k in range(repeats + 2):  # in turns, so that a slow moment of the machine hits all alike
        for name, layer in layers.items():
            start = time.perf_counter()
            _step(layer, x, gradient)
            if k >= 2:
                best[name] = min(best[name], time.perf_counter() - start)
    measured: dict[str, float] = {route: best[route] - best["frozen"] for route in routes}
    return Measurement(label, shape, tokens, str(optimize), predicted, measured)


def _step(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    x.grad = None
    layer.zero_grad(set_to_none=True)
    torch.autograd.backward(layer(x), gradient)


def machine(device: str = "cpu") -> dict[str, str]:
    """What a measurement ran on: date, processor or GPU, threads, versions of torch and Python."""
    card = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    return {
        "date": datetime.date.today().isoformat(),
        "device": card,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()
