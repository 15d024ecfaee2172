"""Declarations that a stranger may state, run by themselves: what each costs in seconds and memory, and how it ends.

``python hostile.py`` prints a line of JSON for each; `test_bounds` runs it under a limit of memory and reads them.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import superlora_tn as sl
from superlora_tn import (
    CP,
    AdapterSpec,
    Compose,
    Dense,
    Fastfood,
    FlatFold,
    Hadamard,
    Kronecker,
    Network,
    PhysicalFold,
    Shuffle,
    SpecError,
    TensorTrain,
    Tucker,
)
from superlora_tn.files.record import BOUNDS

Shapes = dict[str, tuple[int, int]]
SMALL: Shapes = {"w": (64, 64)}
MEGABYTE = 1 << 20
HEADROOM = 512 * MEGABYTE  # of address space above what the imports took, so that a blow-up ends as MemoryError


def planned(spec: AdapterSpec, shapes: Shapes = SMALL) -> None:
    """Lay a declaration out and plan every route of every different graph, as attaching does."""
    for graph in {graph for _, graph in spec.lay_out(shapes)}:
        sl.make_plan(graph, "delta")
        if not graph.is_flat:
            sl.make_plan(graph, "apply", 1024)


def complete(count: int, size: int = 2) -> AdapterSpec:
    """Nodes of which each two share a bond."""
    places: list[list[str]] = [[] for _ in range(count)]
    sizes = {}
    for a, b in itertools.combinations(range(count), 2):
        sizes[f"e{a}_{b}"] = size
        places[a].append(f"e{a}_{b}")
        places[b].append(f"e{a}_{b}")
    places[0].append("o")
    places[-1].append("i")
    return AdapterSpec(Network("o i", sizes, **{f"n{k}": " ".join(own) for k, own in enumerate(places)}))


def chain(count: int, modes: str = "o i", fold: PhysicalFold | None = None) -> AdapterSpec:
    """Nodes in a row; with a mode m, on the first one."""
    inner = {f"n{k}": f"b{k} b{k + 1}" for k in range(1, count - 1)}
    first = "m o b1" if modes.startswith("m") else "o b1"
    sizes = {f"b{k}": 2 for k in range(1, count)}
    return AdapterSpec(Network(modes, sizes, first=first, **inner, last=f"b{count - 1} i"), fold or PhysicalFold())


def nested(levels: int, width: int) -> AdapterSpec:
    """Products of products; the parts are shared in memory, so it takes no time to write."""
    part: Any = CP(1)
    for _ in range(levels):
        part = Hadamard(*[part] * width)
    return AdapterSpec(part)


def bonds(**sizes: int) -> AdapterSpec:
    """Two nodes that share bonds of these sizes."""
    held = " ".join(sizes)
    return AdapterSpec(Network("o i", sizes, a=f"o {held}", b=f"{held} i"))


def flat(order: int, **options: Any) -> AdapterSpec:
    """A CP on a flat fold."""
    return AdapterSpec(CP(2), FlatFold(order, **options))


def many(count: int, shape: Callable[[int], tuple[int, int]] = lambda k: (4, 4)) -> Shapes:
    """Many weights."""
    return {f"layers.{k}.q_proj": shape(k) for k in range(count)}


def maps(count: int, order: str = "GGGGGGGG") -> AdapterSpec:
    """Fixed maps in a row."""
    return AdapterSpec(CP(1), FlatFold(2), Compose(*[Fastfood(0.999, order=order)] * count))


SIDE = 2**48 - 2**21
PRIME, HARD = 2**47 - 115, 16776989 * 16777183  # the second has two factors of 24 bits
# name -> (what is done, what it ends in: "ok" or words of the error)
KINDS: dict[str, tuple[Callable[[], object], str]] = {
    "a size that no float holds": (lambda: AdapterSpec(Dense(), FlatFold(1)).count({"w": (SIDE, SIDE)}), "sizes up to"),
    "a root of one": (lambda: flat(2).count(many(8, lambda k: (SIDE, SIDE))), "ok"),
    "a prime": (lambda: sl.lokr(1).count({"w": (PRIME, PRIME)}), "ok"),
    "two large primes": (lambda: sl.lonkr(1, 4).count({"w": (HARD, HARD)}), "ok"),
    "many large sizes": (lambda: sl.lokr(1).count(many(2000, lambda k: (2**48 - 2 * k - 1, HARD))), "find their divisors"),
    "many shapes": (lambda: sl.lora(1).count(many(5000, lambda k: (k + 1, 2))), "5,000 different shapes"),
    "30,000 members": (lambda: AdapterSpec(CP(1), PhysicalFold("member out in")).count(many(30_000)), "ok"),
    "30,000 layers": (lambda: AdapterSpec(CP(1), PhysicalFold("layer out in")).count(many(30_000)), "ok"),
    "30,000 weights": (lambda: sl.lora(1).count(many(30_000)), "ok"),
    "30,000 groups": (lambda: flat(2, groups=30_000).count(many(30_000)), "ok"),
    "order 11": (lambda: planned(flat(11)), "ok"),
    "order 14": (lambda: planned(flat(14)), "ok"),
    "order 24": (lambda: planned(flat(24)), "ok"),
    "order 28": (lambda: planned(flat(28)), "hold 268,435,456 numbers for 4,096 elements"),
    "a Tucker of order 16": (lambda: planned(AdapterSpec(Tucker(2), FlatFold(16))), "ok"),
    "a train of order 20": (lambda: planned(AdapterSpec(TensorTrain(2), FlatFold(20))), "ok"),
    "splits": (lambda: planned(flat(2, splits=13)), "fewer splits"),
    "a multiple": (lambda: planned(flat(2, multiple=1 << 14)), "smaller multiple"),
    "padding of many groups": (lambda: planned(flat(20, groups="weight"), many(64, lambda k: (64, 64))), "lower order"),
    "six CPs multiplied": (lambda: planned(AdapterSpec(Hadamard(*[CP(2)] * 6))), "ok"),
    "64 CPs multiplied": (lambda: planned(AdapterSpec(Hadamard(*[CP(2)] * 64))), "ok"),
    "512 parts": (lambda: planned(AdapterSpec(Hadamard(*[Hadamard(*[CP(1)] * 32)] * 16))), "ok"),
    "2 to the 15 parts": (lambda: nested(15, 2), "parts in its parts"),
    "64 to the 15 parts": (lambda: nested(15, 64), "parts in its parts"),
    "nodes by parts and modes": (
        lambda: planned(AdapterSpec(Hadamard(*[CP(1)] * 64), FlatFold(24))),
        "1,536 nodes over 24 modes",
    ),
    "11 nodes that all share bonds": (lambda: planned(complete(11)), "ok"),
    "14 nodes that all share bonds": (lambda: planned(complete(14)), "an intermediate of"),
    "20 nodes that all share bonds": (lambda: planned(complete(20)), "nodes hold"),
    "60 nodes that all share bonds": (lambda: planned(complete(60)), "nodes hold"),
    "256 nodes in a row": (lambda: planned(chain(256)), "ok"),
    "257 nodes": (lambda: planned(chain(257)), "257 nodes; at most 256"),
    "a node of many indices": (lambda: planned(bonds(**{f"x{k}": 1 for k in range(20_000)})), "at most 64 axes"),
    "a huge bond": (lambda: planned(bonds(r=1 << 20, s=1 << 10)), "nodes hold 137,438,953,472 numbers"),
    "four huge bonds": (lambda: planned(bonds(**{f"r{k}": 1 << 20 for k in range(4)})), "nodes hold"),
    "a rank that is kept": (lambda: planned(AdapterSpec(CP(1 << 20, over="keep"))), "nodes hold"),
    "tables": (lambda: maps(16).count({"w": (512, 512)}), "tables of 33,554,432 numbers"),
    "shuffles": (lambda: AdapterSpec(CP(1), FlatFold(2), Compose(*[Shuffle()] * 16)).count({"w": (512, 512)}), "ok"),
    "tiny ratios": (lambda: AdapterSpec(CP(1), FlatFold(2), Compose(Fastfood(1e-200), Fastfood(1e-200))).count(SMALL), "ok"),
    "a scale that float32 lacks": (lambda: sl.lora(1, alpha=1e308), "alpha=1e+308"),
    "a number that cannot be written": (lambda: CP(10**5000), "too large to show"),
    "a size that cannot be written": (lambda: sl.lora(1).count({"w": (10**5000, 4)}), "too large to show"),
    "lists in lists": (lambda: AdapterSpec.from_dict(sl.lora(1).to_dict() | {"network": deep(900)}), "nests deeper"),
}


def deep(levels: int) -> Any:
    """Lists in lists."""
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


# --- random ones ----------------------------------------------------------------------------------------------------


def random_part(draw: random.Random, depth: int) -> Any:
    """A part with ranks and numbers of parts from small to far too large."""
    rank = draw.choice((1, 2, 3, 8, 64, 4096, 1 << 20))
    over = draw.choice(("refuse", "cap", "cap", "keep"))
    kind = draw.randrange(7 if depth else 5)
    if kind == 0:
        return CP(rank, draw.random() < 0.3, over)
    if kind == 1:
        return Tucker(rank, over=over)
    if kind == 2:
        return TensorTrain(rank, over=over)
    if kind == 3:
        return random_network(draw)
    if kind == 4:
        return Dense()
    parts = [random_part(draw, depth - 1)] * draw.choice((1, 2, 3, 8, 32, 64))
    return Kronecker(*parts) if kind == 5 else Hadamard(*parts)


def random_network(draw: random.Random) -> Network:
    """Nodes with many bonds, on two of them or on more."""
    count = draw.choice((2, 3, 8, 12, 20, 40, 200))
    places: list[list[str]] = [["o"], *[[] for _ in range(count - 2)], ["i"]]
    sizes = {}
    for k in range(draw.choice((1, 3, 10, 40, 200))):
        sizes[f"b{k}"] = draw.choice((1, 1, 2, 2, 3, 16, 1 << 16))
        for node in draw.sample(range(count), min(count, draw.choice((2, 2, 2, 3, count)))):
            places[node].append(f"b{k}")
    return Network("o i", sizes, **{f"n{k}": " ".join(own) for k, own in enumerate(places)})


def random_fold(draw: random.Random) -> Any:
    """A fold of any order, groups and splits."""
    if draw.random() < 0.5:
        return PhysicalFold(draw.choice(("out in", "member out in", "layer out in", "layer type out in")))
    order, groups = draw.choice((1, 2, 3, 5, 11, 17, 24, 32)), draw.choice((1, 2, 50, "weight"))
    return FlatFold(order, groups, draw.choice((None, None, 1, 2, 7, 32)), multiple=draw.choice((1, 1, 1, 4096)))


def random_case(seed: int) -> Callable[[], object]:
    """A declaration and weights, from a seed."""
    draw = random.Random(seed)

    def run() -> None:
        fold = random_fold(draw)
        projection = None
        if isinstance(fold, FlatFold) and draw.random() < 0.4:
            stages = [Fastfood(draw.choice((1.0, 0.5, 1e-3, 1e-200)), order=draw.choice(("BHPGH", "GGGGGGGG")))]
            projection = stages[0] if draw.random() < 0.5 else Compose(*stages * draw.choice((2, 16)))
        spec = AdapterSpec(random_part(draw, 2), fold, projection)
        text = json.dumps(spec.to_dict())
        if len(text) > BOUNDS.size or text.count(",") > BOUNDS.values:
            return  # no file may say so much
        spec = AdapterSpec.from_dict(json.loads(text))
        sides = (1, 2, 8, 64, 97, 768, 4099, PRIME)
        planned(spec, many(draw.choice((1, 2, 6)), lambda k: (draw.choice(sides), draw.choice(sides))))

    return run


def measured(name: str, run: Callable[[], object]) -> dict[str, Any]:
    """Run one; its processor seconds (others' load does not count), its growth in MB, and its end."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        run()
        end = "ok"
    except (SpecError, sl.PlanError) as error:
        end = f"refused: {error}"
    except BaseException as error:  # whatever else it is, is the finding
        end = f"{type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"name": name, "seconds": time.process_time() - start, "megabytes": grown, "end": end[:2000]}


def cases(arguments: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """All kinds, or random declarations of so many seeds."""
    if arguments:
        yield from ((f"seed {seed}", random_case(seed)) for seed in range(int(arguments[0])))
    else:
        yield from ((name, run) for name, (run, _) in KINDS.items())


if __name__ == "__main__":
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + HEADROOM, taken + HEADROOM))
    for title, case in cases(sys.argv[1:]):
        print(json.dumps(measured(title, case)), flush=True)
