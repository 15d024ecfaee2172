"""``superlora-tn extract`` and ``superlora-tn probe``: adapters from the difference of two checkpoints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping

from superlora_tn.commands import RANK, UsageError, count, pairs, read_spec, refuse, say, show_json, variant_spec
from superlora_tn.declare.checks import near
from superlora_tn.declare.fold import Shape
from superlora_tn.network.budget import fit
from superlora_tn.network.catalogue import VARIANTS, size_setting
from superlora_tn.network.kernels import Kernels
from superlora_tn.network.spec import AdapterSpec

Add = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def add_weights_commands(add: Add) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Add both commands to a command line; `add` makes one from its name, its function and what it is for."""
    taking = add("extract", extract, "make an adapter of the difference of two checkpoints of a model")
    taking.add_argument("base", metavar="BASE", help="the model before: a safetensors file, or a folder of them")
    taking.add_argument("tuned", metavar="TUNED", help="the same model after")
    taking.add_argument("--out", default="out/extracted", metavar="FOLDER", help="where the adapter goes")
    taking.add_argument("--variant", metavar="NAME", help=f"one of {', '.join(VARIANTS)} (default: lora)")
    taking.add_argument("--spec", metavar="FILE", help="any declaration in its place: JSON of AdapterSpec.to_dict()")
    taking.add_argument("--steps", type=count, default=200, metavar="N", help="of a fit at most, where there is no closed form")
    taking.add_argument("--rank", type=int, metavar="R", help=f"the variant's rank (default: {RANK}, where it has one)")
    taking.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting, e.g. factor=4")
    taking.add_argument("--budget", type=count, metavar="N", help="at most so many parameters, in place of a rank")
    taking.add_argument("--targets", nargs="+", default=[], metavar="NAME", help="modules or their endings; none takes all")
    _orientation(taking)
    probing = add("probe", probe, "how much of the difference of two checkpoints each structure holds, by parameters")
    probing.add_argument("base", metavar="BASE", help="the model before: a safetensors file, or a folder of them")
    probing.add_argument("tuned", metavar="TUNED", help="the same model after")
    words = "the most parameters of each fit; none takes 1/256, 1/64, 1/16 and 1/4 of dW's numbers"
    probing.add_argument("--budgets", type=count, nargs="+", metavar="N", help=words)
    probing.add_argument("--variants", nargs="+", default=[], metavar="NAME", help=f"some of {', '.join(VARIANTS)}")
    probing.add_argument("--targets", nargs="+", default=[], metavar="NAME", help="modules or their endings; none takes all")
    _orientation(probing)
    probing.add_argument("--steps", type=count, default=50, metavar="N", help="of a fit at most, where there is no closed form")
    probing.add_argument("--plot", metavar="PNG", help="draw energy against parameters")
    return taking, probing


def _orientation(parser: argparse.ArgumentParser) -> None:
    """What tells which axis of a weight is out, where the files do not."""
    words = "of config.json: tells which axis of a weight is out (default: beside the files)"
    parser.add_argument("--model", metavar="FOLDER", help=words)
    words = "weights of which nothing tells that are linear layers' and convolutions', (out, in)"
    parser.add_argument("--linear", action="store_true", help=words)


def extract(args: argparse.Namespace) -> None:
    """Make an adapter of two checkpoints, save it, and print each kind's errors."""
    from superlora_tn.tools import extract as tools

    if args.spec:
        refuse(args, ("variant", "rank", "set", "budget"), "goes with a variant, not with --spec")
    variant = args.variant or "lora"
    if variant not in VARIANTS:
        raise UsageError(f"there is no variant '{variant}'; {near(variant, VARIANTS)} Or give --spec.")
    given = pairs(args.set)
    bought = size_setting(variant)
    if args.budget is not None and ((args.rank is not None and bought == "rank") or {bought, "budget"} & set(given)):
        raise UsageError(f"--budget is in place of a {bought}; leave one of them out.")
    if args.budget is not None and bought is None:
        raise UsageError(f"{variant} has no rank or count that a budget could buy; choose another variant.")

    def declared(shapes: Mapping[str, Shape], kernels: Kernels) -> AdapterSpec:
        if args.spec:
            return read_spec(args.spec)
        own = given | ({} if args.rank is None else {"rank": str(args.rank)})
        if args.budget is None:
            return variant_spec(variant, own, shapes)

        def sized(size: int) -> AdapterSpec:
            return variant_spec(variant, own | {f"{bought}": str(size)}, shapes)

        return fit(sized, args.budget, shapes, kernels).spec

    orientation = {"model": args.model, "linear": args.linear}
    found = tools.extract(args.base, args.tuned, declared, args.targets, steps=args.steps, **orientation)
    found.adapter.write(args.out)
    if args.json:
        facts = {"folder": args.out, "parameters": found.adapter.num_parameters, "error": found.adapter.error}
        print(json.dumps({**facts, "errors": found.adapter.errors, "left": found.left, "untold": found.untold}, indent=1))
    else:
        print(f"{found}\nsaved: {args.out}")


def probe(args: argparse.Namespace) -> None:
    """Print how much of the difference of two checkpoints each structure holds at each number of parameters."""
    from superlora_tn.tools import draw
    from superlora_tn.tools.probe import PROBED, probe_checkpoints

    if args.plot:
        draw.check_ending(args.plot)
    variants = args.variants or PROBED
    given = (args.base, args.tuned, args.targets, args.budgets, variants)
    made = probe_checkpoints(*given, model=args.model, linear=args.linear, steps=args.steps)
    if args.json:
        rows = [
            {"variant": p.variant, "parameters": p.parameters, "energy": p.energy, "spec": p.spec.to_dict()}
            for p in made.points
        ]
        show_json({"numbers": made.numbers, "points": rows, "refused": dict(made.refused), "untold": made.untold})
    else:
        print(made)
    if args.plot:
        say(f"drawn: {made.plot(args.plot)}")
