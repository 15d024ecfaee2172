"""The command line: ``superlora-tn demo | reproduce | variants | plan | bench | verify | draw``."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from superlora_tn.contraction.plan import Plan, RouteChoice, choose, table
from superlora_tn.contraction.profile import DEVICES
from superlora_tn.contraction.search import PlanError
from superlora_tn.declare.fold import PhysicalFold
from superlora_tn.declare.parts import Network, SpecError
from superlora_tn.network import variants
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.verification import VerifyError

VARIANTS: dict[str, Callable[..., AdapterSpec]] = {
    name: getattr(variants, name) for name in ("dense", "lora", "loha", "lokr", "lotr", "lonkr", "lorta", "superlora", "vera")
}


class UsageError(ValueError):
    """What the user asked for makes no sense; the message says what does."""


def make_spec(args: argparse.Namespace) -> AdapterSpec:
    """The spec that ``VARIANT [--rank R] [--set name=value ...]`` or ``--network ... --node ... --size ...`` names."""
    if args.network:
        nodes = dict(_pair(text) for text in args.node)
        sizes = {name: _whole(value) for name, value in map(_pair, args.size)}
        fold = PhysicalFold(args.modes, args.heads)
        return AdapterSpec(Network(args.network, sizes, **nodes), fold)
    if args.variant not in VARIANTS:
        raise UsageError(f"there is no variant '{args.variant}'; choose one of {', '.join(VARIANTS)}, or give --network.")
    maker = VARIANTS[args.variant]
    known = inspect.signature(maker).parameters
    settings: dict[str, Any] = {"rank": args.rank} if "rank" in known else {}
    for name, value in map(_pair, args.set):
        if name not in known or name == "projection":
            raise UsageError(
                f"{args.variant} has no setting '{name}'; it has {', '.join(k for k in known if k != 'projection')}."
            )
        settings[name] = _value(value)
    return maker(**settings)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"'{text}' is not name=value; write for instance factor=4.")
    return name.strip(), value.strip()


def _whole(text: str) -> int:
    if not text.isdigit():
        raise UsageError(f"'{text}' is not a whole number.")
    return int(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False", "None") else text)
    except ValueError:
        return text


def _shapes(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    words = args.shape.lower().split("x")
    if len(words) != 2 or not all(w.isdigit() for w in words):
        raise UsageError(f"--shape {args.shape!r} is not OUTxIN; write for instance 768x768.")
    shape = (int(words[0]), int(words[1]))
    return {f"layer.{k}.weight": shape for k in range(args.weights)}


def _first_graph(args: argparse.Namespace) -> tuple[Graph, tuple[int, int]]:
    shapes = _shapes(args)
    return make_spec(args).lay_out(shapes)[0][1], next(iter(shapes.values()))


def plan_command(args: argparse.Namespace) -> None:
    """Print both routes of a variant or a network at given sizes."""
    graph, shape = _first_graph(args)
    if args.device not in DEVICES:
        raise UsageError(f"there is no device profile '{args.device}'; choose one of {', '.join(DEVICES)}.")
    choice = choose(graph, shape, args.tokens, DEVICES[args.device], args.optimize, args.memory_limit)
    print(json.dumps(_plan_data(choice), indent=1) if args.json else choice)
    if args.draw:
        from superlora_tn.tools import draw

        print(f"drawn: {draw.tree(choice.chosen, args.draw)}", file=sys.stderr)


def _plan_data(choice: RouteChoice) -> dict[str, Any]:
    """A choice of routes as plain data."""

    def one(plan: Plan, price: float) -> dict[str, Any]:
        return {
            "equation": plan.equation,
            "symbols": plan.symbols,
            "path": plan.path,
            "steps": [asdict(s) for s in plan.steps],
            "flops": plan.flops,
            "bytes": plan.bytes,
            "peak_bytes": plan.peak,
            "price_seconds": price,
        }

    routes = {"delta": one(choice.delta, choice.delta_price)}
    if choice.apply is not None:
        routes["apply"] = one(choice.apply, choice.apply.price)
    return {"chosen": choice.route, "tokens": choice.tokens, "routes": routes}


def bench_command(args: argparse.Namespace) -> None:
    """Measure both routes under several optimizers, beside what the cost model predicts."""
    from superlora_tn.tools.measure import calibrate, measure_routes

    spec, profile = make_spec(args), calibrate()
    cases = [(w, t, o) for w in args.widths for t in args.tokens for o in args.optimizers]
    found = []
    for k, (width, tokens, optimizer) in enumerate(cases):
        print(f"{k + 1}/{len(cases)}: width {width}, {tokens} tokens, {optimizer}", file=sys.stderr)
        found.append(
            measure_routes(args.variant or args.network, spec, (width, width), tokens, profile, optimizer, args.backend)
        )
    agree = sum(m.agrees for m in found)
    if args.json:
        print(json.dumps({"device": asdict(profile), "agree": agree, "rows": [m.row() for m in found]}, indent=1))
    else:
        rows: list[tuple[str, ...]] = [
            ("width", "tokens", "optimizer", "apply ms", "predicted", "delta ms", "predicted", "ranked")
        ]
        for m in found:
            times = [f"{1e3 * side[route]:.3f}" for route in ("apply", "delta") for side in (m.measured, m.predicted)]
            rows.append((f"{m.shape[0]}", f"{m.tokens}", m.optimizer, *times, "right" if m.agrees else f"+{m.regret:.0%}"))
        print("\n".join(table(rows, "width tokens ms predicted apply delta")))
        print(f"{agree} of {len(found)} settings ranked as measured, on {profile.name}")
    if args.draw:
        from superlora_tn.tools import draw

        points = [(m.predicted[r], m.measured[r], r) for m in found for r in m.predicted]
        print(f"drawn: {draw.predictions(points, args.draw)}", file=sys.stderr)


def verify_command(args: argparse.Namespace) -> int:
    """Verify presets by property and against references."""
    from superlora_tn.verification import run

    return run(args.variants, args.examples, args.json, args.seed)


def draw_command(args: argparse.Namespace) -> None:
    """Draw the network of a variant."""
    from superlora_tn.tools import draw

    graph, _ = _first_graph(args)
    print(f"drawn: {draw.network(graph, args.out, args.variant or args.network)}")


def variants_command(args: argparse.Namespace) -> None:
    """List the variants with their network and count."""
    shapes = _shapes(args)
    rows = [("variant", "network of one weight", "parameters", "from")]
    data = []
    for name, maker in VARIANTS.items():
        rank = min(args.rank, 4) if name in ("lorta", "superlora") else args.rank
        spec = maker(**({"rank": rank} if "rank" in inspect.signature(maker).parameters else {}))
        count, graph = spec.count(shapes), spec.lay_out(shapes)[0][1]
        summary = (inspect.getdoc(maker) or "").split("\n")[0]
        rows.append((name, graph.equation(fixed=True), f"{count:,}", summary.split(":")[0]))
        data.append({"variant": name, "equation": graph.equation(fixed=True), "parameters": count, "summary": summary})
    if args.json:
        print(json.dumps(data, indent=1))
        return
    print(f"{args.weights} weights of {args.shape}, rank {args.rank} (lorta and superlora: {min(args.rank, 4)})")
    print("\n".join(table(rows, "parameters")))


def demo_command(args: argparse.Namespace) -> None:
    """Run the embedded demo."""
    try:
        from superlora_tn.demo.demo import run
    except ImportError as error:
        raise UsageError(f"the demo needs the extra packages: pip install 'superlora_tn[demo]' ({error}).") from error
    run(Path(args.out), quick=args.quick, as_json=args.json)


def reproduce_command(args: argparse.Namespace) -> int:
    """Run one of the paper's experiments."""
    try:
        from superlora_tn.demo.experiments import find_experiments

        find_experiments()
        from superlora_tn_paper.command import Request, reproduce
        from superlora_tn_paper.task import TaskError
    except ImportError as error:
        raise UsageError(f"this needs the extra packages: pip install 'superlora_tn[reproduce]' ({error}).") from error
    data = args.data or (os.environ.get("SUPERLORA_DATA") if args.scale == "small" else None) or None
    try:
        request = Request(args.experiment, Path(args.out), args.scale, data, args.model, args.domain, args.device)
        reproduce(request, args.json)
    except TaskError as error:
        raise UsageError(str(error)) from error
    return 0


def _network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variant", nargs="?", default="", help=f"one of {', '.join(VARIANTS)}")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting, e.g. factor=4")
    parser.add_argument("--network", default="", metavar="MODES", help="any network: '(o1 o2) (i1 i2)' with --node and --size")
    parser.add_argument("--node", action="append", default=[], metavar="NAME=INDICES", help="a node, e.g. w1='o1 i1'")
    parser.add_argument("--size", action="append", default=[], metavar="INDEX=SIZE", help="a bond's size, e.g. r=8")
    parser.add_argument("--modes", default="out in", help="the fold's modes, for --network")
    parser.add_argument("--heads", type=int, help="for the mode 'head'")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="superlora-tn", description="Adapters as tensor networks.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], help_text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=help_text, description=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        made.set_defaults(run=run)
        return made

    demo = add("demo", demo_command, "pre-train a small ViT on printed digits, adapt it to handwriting with every variant")
    demo.add_argument("--quick", action="store_true", help="under a minute: shorter training, one seed")
    demo.add_argument("--out", default="out/demo", help="where figures and results go")
    again = add("reproduce", reproduce_command, "run one of the paper's experiments; a run that was stopped goes on")
    again.add_argument("experiment", choices=("classification", "diffusion", "geometry"), help="which")
    again.add_argument("--scale", choices=("small", "full"), default="small", help="minutes on one core, or the paper's size")
    again.add_argument("--data", help="the data folder (small; or SUPERLORA_DATA), or a data set's folder or hub name (full)")
    again.add_argument("--model", help="with --scale full: a folder or hub name of a vision transformer")
    again.add_argument("--domain", default="tinyimagenet30", help="of classification with a data folder; or mnist")
    again.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    again.add_argument("--out", default="out/reproduce", help="where reports, figures and finished jobs go")
    listing = add("variants", variants_command, "list the variants with their networks and counts")
    listing.add_argument("--rank", type=int, default=8)
    plan = add("plan", plan_command, "plan the contraction of a variant or of any network")
    _network_arguments(plan)
    plan.add_argument("--tokens", type=int, default=1024, help="rows of the activation")
    plan.add_argument("--device", default="cpu", help="price for: " + ", ".join(DEVICES))
    plan.add_argument("--optimize", default="dp", help="dp, or any of opt_einsum's optimizers by name")
    plan.add_argument("--memory-limit", type=int, help="bytes of the largest intermediate")
    plan.add_argument("--draw", metavar="PNG", help="draw the contraction tree")
    bench = add("bench", bench_command, "measure routes and optimizers beside the predicted cost")
    _network_arguments(bench)
    bench.add_argument("--widths", type=int, nargs="+", default=[256, 768], help="in and out of the layer")
    bench.add_argument("--tokens", type=int, nargs="+", default=[64, 1024], help="rows of the activation")
    bench.add_argument("--optimizers", nargs="+", default=["dp", "greedy"], help="dp, or opt_einsum's by name")
    bench.add_argument("--backend", default="tensorly_torch", help="the backend")
    bench.add_argument("--draw", metavar="PNG", help="plot predicted against measured")
    proof = add("verify", verify_command, "verify variants by property, and against formulas, TensorLy, PEFT and LyCORIS")
    proof.add_argument("variants", nargs="*", metavar="VARIANT", help="none: all, the reductions, and where peers differ")
    proof.add_argument("--examples", type=int, default=25, help="cases drawn for each claim")
    proof.add_argument("--seed", type=int, default=0, help="of the draws")
    drawing = add("draw", draw_command, "draw the network of a variant or of any network")
    _network_arguments(drawing)
    drawing.add_argument("--out", default="network.png", help="where the picture goes")
    for made in (listing, plan, drawing):
        made.add_argument("--shape", default="768x768", help="OUTxIN of a weight")
        made.add_argument("--weights", type=int, default=24, help="how many such weights")
    for made in (demo, again, listing, plan, bench, proof):
        made.add_argument("--json", action="store_true", help="machine-readable output")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, or 2 for a wrong request."""
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args) or 0
    except (SpecError, PlanError, UsageError, VerifyError) as error:
        print(f"superlora-tn {args.command}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
