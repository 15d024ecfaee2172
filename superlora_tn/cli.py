"""The command line: ``superlora-tn COMMAND``, as ``superlora-tn --help`` lists them.

What is wrong with a request, and what the library or the system refuses, is one line on stderr and the exit status 2.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence

from superlora_tn import (
    AttachError,
    BackendError,
    CheckpointError,
    FitError,
    LayerError,
    PlanError,
    SpecError,
    VerifyError,
    commands,
)
from superlora_tn.commands import MODES, RANK, SHAPE, WEIGHTS, UsageError, count
from superlora_tn.contraction.profile import DEVICES
from superlora_tn.files.command import add_commands
from superlora_tn.finetune.command import add_command as add_finetune
from superlora_tn.network.catalogue import VARIANTS
from superlora_tn.network.joined import JOIN_NAMES
from superlora_tn.weights_command import add_weights_commands

__all__ = ["VARIANTS", "main", "parser"]

Command = Callable[[argparse.Namespace], int | None]

REFUSALS = (
    *(UsageError, SpecError, PlanError, AttachError, LayerError, CheckpointError, BackendError, VerifyError, FitError),
    OSError,
)
# The extra that brings a package which some command needs.
EXTRAS = dict.fromkeys(("matplotlib", "PIL", "rich", "sklearn", "transformers"), "demo") | {
    "hypothesis": "verify",
    "accelerate": "finetune",
    "datasets": "finetune",
    "diffusers": "finetune",
    "yaml": "finetune",
}


# Arguments in the library's words, and the flags that say the same.
FLAGS = (
    (r"sizes=\{'(\w+)': 8\}", r"--size \1=8"),
    (r"heads=\.\.\.", "--heads N"),
    (r"crop=True\.$", "a declaration with crop=True (--spec FILE)."),
    (r"base model; give it\.", "base model; give it: --base FILE."),
    (r"(adapts the parts .*); choose one\.", r"\1; choose one: --part NAME."),
    (r"part=\.\.\.", "--part NAME"),
    (r"\(model=\.\.\.\)", "(--model FOLDER)"),
    (r"\(linear=True\)", "(--linear)"),
    (r"leave part='.*' out", "leave --part out"),
    (r"force=True", "--force"),
)


class _Help(argparse.HelpFormatter):
    """Says each option's default, where there is one to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, "", []) or action.default == argparse.SUPPRESS or not action.option_strings
        return action.help if silent else f"{action.help} (default: %(default)s)"


def _network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variant", nargs="?", default="", metavar="VARIANT", help=f"one of {', '.join(VARIANTS)}")
    parser.add_argument("--rank", type=int, metavar="R", help=f"the variant's rank (default: {RANK}, where it has one)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting, e.g. factor=4")
    parser.add_argument("--network", default="", metavar="MODES", help="any network: '(o1 o2) (i1 i2)' with --node and --size")
    parser.add_argument("--node", action="append", default=[], metavar="NAME=INDICES", help="a node, e.g. w1='o1 i1'")
    parser.add_argument("--size", action="append", default=[], metavar="INDEX=SIZE", help="a bond's size, e.g. r=8")
    parser.add_argument("--spec", default="", metavar="FILE", help="any declaration: JSON of AdapterSpec.to_dict()")
    parser.add_argument("--join", default="", metavar="NAME", help=f"how dW joins W: {', '.join(JOIN_NAMES)} (default: add)")
    parser.add_argument("--modes", default="", help=f"the fold's modes, for --network (default: {MODES})")
    parser.add_argument("--heads", type=count, metavar="N", help="how many, for --network with the mode 'head'")


def parser(program: str = "superlora-tn") -> argparse.ArgumentParser:
    """The command line's grammar; the program's name is as the user typed it."""
    top = argparse.ArgumentParser(
        prog=program,
        description="Adapters as tensor networks: declare, count, plan, measure and verify them.",
        epilog=f"More about a command: {program} COMMAND --help",
    )
    listed = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, help_text: str) -> argparse.ArgumentParser:
        sentence = f"{help_text[0].upper()}{help_text[1:]}."
        made = listed.add_parser(name, help=help_text, description=sentence, formatter_class=_Help)
        made.set_defaults(run=run, wrong=made.error)
        return made

    demo = add("demo", commands.demo, "pre-train a small ViT on printed digits, adapt it to handwriting in seven ways")
    demo.add_argument("--quick", action="store_true", help="under a minute: shorter training, one seed")
    demo.add_argument("--out", default="out/demo", metavar="FOLDER", help="where figures and results go")
    again = add("reproduce", commands.reproduce, "run one of the paper's experiments; a run that was stopped goes on")
    again.add_argument("experiment", choices=("classification", "diffusion", "geometry"), help="which")
    words = "minutes on one core, hours to convergence (classification by early stopping, too), or the paper's size"
    again.add_argument("--scale", choices=("small", "converged", "early-stopping", "full"), default="small", help=words)
    again.add_argument("--data", help="the data folder (or SUPERLORA_DATA), or a data set's folder or hub name (full)")
    again.add_argument("--model", help="with --scale full: a folder or hub name of a vision transformer")
    words = "what classification and geometry adapt to with a data folder: tinyimagenet30 (default) or mnist"
    again.add_argument("--domain", metavar="NAME", help=words)
    again.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    again.add_argument("--out", default="out/reproduce", metavar="FOLDER", help="where reports, figures and finished jobs go")
    listing = add("variants", commands.list_variants, "list the variants with their networks and counts")
    listing.add_argument("--rank", type=int, default=RANK, metavar="R", help="of each; lorta's and superlora's is 4 at most")
    plan = add("plan", commands.plan, "plan the contraction of a variant or of any network")
    _network_arguments(plan)
    plan.add_argument("--tokens", type=count, default=1024, metavar="N", help="rows of the activation")
    plan.add_argument("--device", default="cpu", metavar="NAME", help=f"price for one of {', '.join(DEVICES)}")
    plan.add_argument("--optimize", default="dp", metavar="NAME", help="dp, or any of opt_einsum's optimizers by name")
    plan.add_argument("--memory-limit", type=count, metavar="BYTES", help="of the largest intermediate")
    plan.add_argument("--draw", metavar="PNG", help="draw the contraction tree")
    bench = add("bench", commands.bench, "measure routes and optimizers beside the predicted cost")
    _network_arguments(bench)
    bench.add_argument("--widths", type=count, nargs="+", default=[256, 768], metavar="N", help="in and out of the layer")
    bench.add_argument("--tokens", type=count, nargs="+", default=[64, 1024], metavar="N", help="rows of the activation")
    bench.add_argument("--optimizers", nargs="+", default=["dp", "greedy"], metavar="NAME", help="dp, or opt_einsum's by name")
    bench.add_argument("--backend", default="tensorly_torch", metavar="NAME", help="which runs the plans")
    bench.add_argument("--draw", metavar="PNG", help="plot predicted against measured")
    words = "sum or crop, of the language; or a declaration's JSON file, or an adapter's folder; none: all, with the reductions"
    proof = add("verify", commands.verify, "verify variants by property, and against formulas, TensorLy, PEFT and LyCORIS")
    proof.add_argument("variants", nargs="*", metavar="VARIANT", help=words)
    proof.add_argument("--examples", type=int, default=25, metavar="N", help="cases drawn for each claim")
    proof.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")
    drawing = add("draw", commands.draw, "draw the network of a variant or of any network")
    _network_arguments(drawing)
    drawing.add_argument("--out", default="network.png", metavar="PNG", help="where the picture goes")
    fitting = add("suggest", commands.suggest, "what a number of parameters buys of every variant, with its predicted cost")
    fitting.add_argument("budget", type=count, metavar="N", help="the most trainable parameters")
    fitting.add_argument("--tokens", type=count, default=1024, metavar="N", help="rows of the activation")
    fitting.add_argument("--device", default="cpu", metavar="NAME", help=f"price for one of {', '.join(DEVICES)}")
    for made in (listing, fitting, plan, drawing):
        made.add_argument("--shape", metavar="OUTxIN", help=f"of a weight (default: {SHAPE})")
        made.add_argument("--weights", type=count, metavar="N", help=f"how many such weights (default: {WEIGHTS})")
    for made in (listing, fitting):
        words = "the weights of a model instead: its folder with config.json, or its safetensors"
        made.add_argument("--model", metavar="PATH", help=words)
        made.add_argument("--targets", nargs="+", default=[], metavar="NAME", help="modules of it or their endings; none: all")
    taking, probing = add_weights_commands(add)
    looking, making = add_commands(add)
    learning = add_finetune(add)
    for made in (demo, again, listing, fitting, plan, bench, proof, drawing, taking, probing, looking, making, learning):
        made.add_argument("--json", action="store_true", help="print the result as JSON alone")
    return top


def main(argv: Sequence[str] | None = None, program: str = "superlora-tn") -> int:
    """Run the command line.

    Args:
        argv: the words behind the program's name; None takes the process's.
        program: its name, for help and errors.

    Returns:
        The exit status: 0; 1 where something verified does not hold; 2 for what is refused; 130 where it was stopped.
    """
    args, left = parser(program).parse_known_args(argv)
    if left and "words" in args:  # flags in front of the file, whose keys are not this grammar's
        args.words[:0] = left
    elif left:
        args.wrong(f"unrecognized arguments: {' '.join(left)}")
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except REFUSALS as error:
        return _refused(f"{program} {args.command}", _as_flags(_words(error), args.command), 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        words = f"this needs {package}, which is not installed: pip install 'superlora_tn[{EXTRAS[package]}]'"
        return _refused(f"{program} {args.command}", words, 2)
    except KeyboardInterrupt as error:
        return _refused(f"{program} {args.command}", str(error) or "stopped", 130)
    return int(status)


def _words(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _as_flags(words: str, command: str) -> str:
    """What the library says of its arguments, said of the flags; finetune's keys are lines of a file."""
    for pattern, flags in () if command == "finetune" else FLAGS:
        words = re.sub(pattern, flags, words)
    return words


def _refused(who: str, words: str, status: int) -> int:
    print(f"{who}: {words}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
