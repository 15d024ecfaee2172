"""What each command of the command line does: the request in words to declarations, and results to text or JSON."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from superlora_tn.contraction.plan import Plan, RouteChoice, table
from superlora_tn.contraction.profile import DEVICES
from superlora_tn.contraction.summed import choose_all
from superlora_tn.declare.checks import near
from superlora_tn.declare.fold import PhysicalFold, PhysicalGroup, Shape
from superlora_tn.declare.parts import Network, SpecError
from superlora_tn.network.budget import Budget
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.network.joined import joined
from superlora_tn.network.kernels import Kernels, lay_out
from superlora_tn.network.kernels import count as trained
from superlora_tn.network.spec import AdapterSpec

RANK, MODES, SHAPE, WEIGHTS = 8, "out in", "768x768", 24  # where none are given
MOST = 2**62  # the largest whole number of the library's own arguments
MOST_WEIGHTS = 100_000  # of one shape; each has a name, and the largest models have some thousands


class UsageError(ValueError):
    """What the user asked for makes no sense, or needs what is not there; the message says what does."""


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    if len(text) > len(f"{MOST}") or int(text) > MOST:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is more than {MOST:,}, beyond which nothing is counted")
    return int(text)


def make_spec(args: argparse.Namespace, shapes: Mapping[str, Shape]) -> AdapterSpec:
    """The spec that ``VARIANT [--rank R] [--set name=value ...]``, ``--network ... --node ...``, or ``--spec FILE`` says.

    Args:
        args: these words.
        shapes: (out, in) of the weights by name, which a budget is spent on.
    """
    return joined(_added(args, shapes), args.join or "add")


def _added(args: argparse.Namespace, shapes: Mapping[str, Shape]) -> AdapterSpec:
    if args.spec:
        refuse(args, ("variant", "rank", "set"), "goes with a variant, not with --spec")
        refuse(args, ("network", "node", "size", "modes", "heads"), "goes with --network, not with --spec")
        return read_spec(args.spec)
    if args.network:
        refuse(args, ("variant", "rank", "set"), "goes with a variant, not with --network")
        sizes = {name: _whole(f"--size {name}", value) for name, value in pairs(args.size).items()}
        nodes = pairs(args.node)
        for taken in {"self", "modes", "sizes", "crop"} & set(nodes):
            raise UsageError(f"a node cannot be named '{taken}'; choose another name.")
        return AdapterSpec(Network(args.network, sizes, **nodes), PhysicalFold(args.modes or MODES, args.heads))
    refuse(args, ("node", "size", "modes", "heads"), "goes with --network")
    if args.variant not in VARIANTS:
        known = near(args.variant, VARIANTS)
        asked = f"there is no variant '{args.variant}'; {known}" if args.variant else f"no variant was named; {known}"
        raise UsageError(f"{asked} Or give --network or --spec.")
    return variant_spec(args.variant, pairs([*args.set, *([] if args.rank is None else [f"rank={args.rank}"])]), shapes)


def read_spec(path: str) -> AdapterSpec:
    """The declaration of a JSON file of ``AdapterSpec.to_dict()``.

    Raises:
        UsageError: the file is no JSON.
        SpecError: its JSON declares no adapter.
        OSError: the file cannot be read.
    """
    try:
        return AdapterSpec.from_dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))
    except (ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise SpecError(f"{path}: {error}") from error
        raise UsageError(f"{path} is no JSON ({error}); write it with json.dumps(spec.to_dict()).") from error


def settings_of(variant: str) -> list[str]:
    """Names of a variant's settings; a map has no words on the command line."""
    return [name for name in inspect.signature(VARIANTS[variant]).parameters if name != "projection"]


def variant_spec(variant: str, given: Mapping[str, str], shapes: Mapping[str, Shape]) -> AdapterSpec:
    """A variant by its name with settings in words; a budget is spent on the shapes."""
    known = settings_of(variant)
    for name in given:
        if name not in known:
            raise UsageError(f"{variant} has no setting '{name}'; it has {', '.join(known)}.")
    settings: dict[str, Any] = {"rank": RANK} if "rank" in known and "budget" not in given else {}
    made = VARIANTS[variant](**settings | {name: _value(value) for name, value in given.items()})
    return made.choose(shapes).spec if isinstance(made, Budget) else made


def refuse(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Nothing that is given is ignored."""
    for name in names:
        if getattr(args, name) not in (None, "", []):
            raise UsageError(f"{'the variant' if name == 'variant' else f'--{name}'} {getattr(args, name)!r} {reason}.")


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """name=value, each name once."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UsageError(f"'{text}' is not name=value; write for instance factor=4.")
        if name in found:
            raise UsageError(f"'{name}' is given twice, as {found[name]} and as {value}; give it once.")
        found[name] = value
    return found


def _whole(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag}={text}: '{text}' is not a whole number.") from None


def _value(text: str) -> Any:
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value  # several ranks, or the sizes of axes


def _shapes(args: argparse.Namespace) -> dict[str, Shape]:
    words, weights = (args.shape or SHAPE).lower().split("x"), args.weights or WEIGHTS
    if len(words) != 2 or not all(w.isdecimal() for w in words):
        raise UsageError(f"--shape {args.shape!r} is not OUTxIN; write for instance 768x768.")
    shape = (_whole("--shape", words[0]), _whole("--shape", words[1]))
    if weights > MOST_WEIGHTS:
        raise UsageError(f"--weights {weights:,} is more than the {MOST_WEIGHTS:,} that are looked at; give fewer.")
    return {f"layer.{k}.weight": shape for k in range(weights)}


def _targets(args: argparse.Namespace) -> tuple[dict[str, Shape], Kernels | None, str]:
    """The weights of ``--model``, or of ``--shape`` and ``--weights``, with what is known of kernels, and in words."""
    if args.model is None:
        if args.targets:
            raise UsageError("--targets chooses of a model; give --model too, or --shape and --weights.")
        return _shapes(args), None, f"{args.weights or WEIGHTS} weights of {args.shape or SHAPE}"
    refuse(args, ("shape", "weights"), "says of what no model is given, and does not go with --model")
    from superlora_tn.tools.shapes import model_shapes

    shapes, kernels = model_shapes(args.model, args.targets)
    if not shapes:
        named = f" by the names {', '.join(args.targets)}" if args.targets else ""
        raise UsageError(f"{args.model} has no weight that could be adapted{named}.")
    elements = sum(d_out * d_in for d_out, d_in in shapes.values())
    return shapes, kernels, f"{len(shapes)} weights of {args.model}, {elements:,} numbers"


def _named(args: argparse.Namespace) -> str:
    """What was asked for, as a title."""
    name = args.variant or args.network or Path(args.spec).stem
    return f"{name}, {args.join}" if args.join and args.join != "add" else name


def show_json(data: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(data, indent=1))


def say(words: str) -> None:
    """Progress, and where files went: on stderr, so that stdout is the result alone."""
    print(words, file=sys.stderr, flush=True)


def plan(args: argparse.Namespace) -> None:
    """Print both routes of a variant or a network at given sizes; of a sum those of each of its networks."""
    if args.device not in DEVICES:
        raise UsageError(f"there is no device profile '{args.device}'; {near(args.device, DEVICES)}")
    shapes = _shapes(args)
    spec = make_spec(args, shapes)
    group, graph = spec.lay_out(shapes)[0]
    shape = group.shape if isinstance(group, PhysicalGroup) else next(iter(group.members.values()))[1:]
    device = DEVICES[args.device]
    found = choose_all(graph, shape, args.tokens, device, args.optimize, args.memory_limit)
    if args.json:
        terms = [
            {"equation": term.equation(), "crop_seconds": crop} | _plan_data(one)
            for (term, one), crop in zip(found.each, found.crops, strict=True)
        ]
        show_json(terms[0] | {"join": None if spec.join is None else str(spec.join), "terms": terms})
    else:
        print(found if graph.terms else found.each[0][1])
        maps = "of nodes" if spec.is_mapped else None
        for what, own in (("join", spec.join), ("projection", spec.projection), ("maps", maps)):
            if own is not None:
                print(f"{what:<10} {own}; its own work is not in these prices")
    if args.draw:
        from superlora_tn.tools import draw

        say(f"drawn: {draw.tree([one.chosen for _, one in found.each], args.draw)}")


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


def bench(args: argparse.Namespace) -> None:
    """Measure both routes under several optimizers, beside what the cost model predicts."""
    from superlora_tn.tools.measure import calibrate, check_measurable, measure_routes

    specs = {width: make_spec(args, {"layer": (width, width)}) for width in args.widths}
    if args.draw:
        from superlora_tn.tools import draw

        draw.check_ending(args.draw)
    for width, spec in specs.items():
        check_measurable(_named(args), spec, (width, width), args.optimizers, args.backend)
    say("measuring this machine")
    profile = calibrate()
    cases = [(w, t, o) for w in specs for t in args.tokens for o in args.optimizers]
    found = []
    for k, (width, tokens, optimizer) in enumerate(cases):
        say(f"{k + 1}/{len(cases)}: width {width}, {tokens} tokens, {optimizer}")
        found.append(measure_routes(_named(args), specs[width], (width, width), tokens, profile, optimizer, args.backend))
    agree = sum(m.agrees for m in found)
    if args.json:
        show_json({"device": asdict(profile), "agree": agree, "rows": [m.row() for m in found]})
    else:
        rows: list[tuple[str, ...]] = [
            ("width", "tokens", "optimizer", "apply ms", "predicted", "delta ms", "predicted", "ranked")
        ]
        for m in found:
            times = [f"{1e3 * side[route]:.3f}" for route in ("apply", "delta") for side in (m.measured, m.predicted)]
            rows.append((f"{m.shape[0]}", f"{m.tokens}", m.optimizer, *times, "right" if m.agrees else f"+{m.regret:.0%}"))
        print("\n".join(table(rows, "width tokens ms predicted apply delta")))
        print(f"{agree} of {len(found)} settings ranked as measured, on {profile.name}")
        if any(spec.join is not None or spec.is_mapped for spec in specs.values()):
            print("what maps of nodes and joins do beside the contraction is measured and not predicted")
    if args.draw:
        points = [(m.predicted[r], m.measured[r], r) for m in found for r in m.predicted]
        say(f"drawn: {draw.predictions(points, args.draw)}")


def verify(args: argparse.Namespace) -> int:
    """Verify presets by property and against references; progress goes to stderr."""
    from superlora_tn.verification import run

    return run(args.variants, args.examples, args.json, args.seed)


def draw(args: argparse.Namespace) -> None:
    """Draw the network of a variant."""
    from superlora_tn.tools import diagram

    shapes = _shapes(args)
    spec = make_spec(args, shapes)
    place = diagram.network(spec, shapes, args.out, _named(args))
    if args.json:
        show_json({"drawn": str(place), "equation": spec.lay_out(shapes)[0][1].equation()})
    else:
        print(f"drawn: {place}")


def list_variants(args: argparse.Namespace) -> None:
    """List the variants with their network and count; one that does not fit the weights, with the reason."""
    shapes, kernels, words = _targets(args)
    rows = [("variant", "parameters", "from", "network of one weight")]
    data: list[dict[str, Any]] = []
    refused = {}
    for name, maker in VARIANTS.items():
        rank = min(args.rank, 4) if name in ("lorta", "superlora") else args.rank
        summary = (inspect.getdoc(maker) or "").split("\n")[0]
        spec = variant_spec(name, {"rank": f"{rank}"} if "rank" in settings_of(name) else {}, shapes)
        try:
            count = trained(spec, shapes, kernels)
            equation = lay_out(spec, shapes, kernels)[0][2].equation(fixed=True)
        except SpecError as error:
            refused[name] = str(error)
            data.append({"variant": name, "refused": str(error), "summary": summary})
            continue
        rows.append((name, f"{count:,}", summary.split(":")[0], equation))
        data.append({"variant": name, "equation": equation, "parameters": count, "summary": summary})
    if args.json:
        show_json(data)
        return
    print(f"{words}, rank {args.rank} (lorta and superlora: {min(args.rank, 4)})")
    print("\n".join(table(rows, "parameters")))
    for name, reason in refused.items():
        print(f"{name} does not fit: {reason}")


def suggest(args: argparse.Namespace) -> None:
    """Print every variant at the setting that a budget buys, with its predicted cost."""
    from superlora_tn.tools.suggest import suggest

    if args.device not in DEVICES:
        raise UsageError(f"there is no device profile '{args.device}'; {near(args.device, DEVICES)}")
    shapes, kernels, _ = _targets(args)
    made = suggest(shapes, args.budget, tokens=args.tokens, device=DEVICES[args.device], kernels=kernels)
    if args.json:
        rows = [{"variant": s.variant, "parameters": s.count, **asdict(s.cost), "spec": s.spec.to_dict()} for s in made.found]
        show_json({"budget": made.budget, "found": rows, "refused": dict(made.refused)})
    else:
        print(made)


def demo(args: argparse.Namespace) -> None:
    """Run the embedded demo."""
    from superlora_tn.demo.demo import run

    run(Path(args.out), quick=args.quick, as_json=args.json)


def reproduce(args: argparse.Namespace) -> None:
    """Run one of the paper's experiments, which are a package of their own."""
    from superlora_tn.demo.experiments import ExperimentsError, find_experiments

    try:
        find_experiments()
    except ExperimentsError as error:
        raise UsageError(str(error)) from error
    from superlora_tn_paper.command import Request, reproduce
    from superlora_tn_paper.task import TaskError

    data = args.data or (os.environ.get("SUPERLORA_DATA") if args.scale != "full" else None) or None
    try:
        request = Request(args.experiment, Path(args.out), args.scale, data, args.model, args.domain, args.device)
        reproduce(request, args.json)
    except (TaskError, FloatingPointError) as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; what is finished is kept, and the same command goes on from there") from None
