"""``superlora-tn show`` and ``superlora-tn convert``: their words, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch

from superlora_tn.files.base_model import base_model
from superlora_tn.files.convert import convert
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.gguf import Architecture
from superlora_tn.files.show import check_picture, draw, show
from superlora_tn.files.writes import FORMATS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
Add = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def add_commands(add: Add) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Add both commands to a command line; `add` makes one from its name, its function and what it is for."""
    looking = add("show", show_command, "show what an adapter's file holds: method, ranks, scale, sizes, norms of dW")
    looking.add_argument("file", metavar="FILE", help="of this library, PEFT, LyCORIS, kohya, diffusers, GGUF and others")
    looking.add_argument("--draw", metavar="PNG", help="draw the norms, one bar a layer")
    making = add("convert", convert_command, "convert an adapter's file from any of the formats to any other")
    making.add_argument("source", metavar="SOURCE", help="an adapter's file or folder")
    making.add_argument("target", metavar="TARGET", help="where it goes: a folder, or a file")
    making.add_argument("--to", required=True, choices=FORMATS, help="the format")
    making.add_argument("--base", metavar="FILE", help="the base model's safetensors, or their folder: tells names and kernels")
    making.add_argument("--part", metavar="NAME", help="one part of a pipeline's adapter, such as unet")
    making.add_argument("--rank", type=int, metavar="R", help="the largest rank: all weights as plain LoRA")
    making.add_argument("--error", type=float, metavar="E", help="the largest relative error of a weight: likewise")
    making.add_argument("--dtype", choices=DTYPES, help="of the numbers")
    making.add_argument("--prefix", metavar="NAME", help="in front of the weights' names, where not the format's own")
    words = "replace what stands at TARGET, also what is no adapter, or one in another format"
    making.add_argument("--force", action="store_true", help=words)
    making.add_argument("--architecture", default="", metavar="NAME", help="of GGUF, such as llama or qwen2")
    making.add_argument("--heads", type=int, nargs=2, metavar="N", help="of q and of k, for GGUF's llama and its like")
    return looking, making


def show_command(args: argparse.Namespace) -> None:
    """Print what a file holds."""
    if args.draw:
        check_picture(args.draw)
    contents = show(args.file, _progress if sys.stderr.isatty() else None)
    print(json.dumps(contents.data(), indent=1) if args.json else contents)
    if args.draw:
        print(f"drawn: {draw(contents, args.draw)}", file=sys.stderr)


def _progress(done: int, count: int) -> None:
    end = "\n" if done == count else ""
    print(f"\r{done}/{count} weights", end=end, file=sys.stderr, flush=True)


def convert_command(args: argparse.Namespace) -> None:
    """Convert a file, and print each weight's error."""
    if args.to != "gguf" and (args.architecture or args.heads):
        raise CheckpointError(f"--architecture and --heads are for --to gguf; it was given --to {args.to}.")
    report = convert(
        args.source,
        args.target,
        args.to,
        base=base_model(args.base) if args.base else None,
        part=args.part,
        rank=args.rank,
        error=args.error,
        dtype=DTYPES.get(args.dtype),
        prefix=args.prefix,
        architecture=Architecture(args.architecture, tuple(args.heads) if args.heads else None),
        force=args.force,
    )
    if args.json:
        rows = [{**vars(row), "ranks": list(row.ranks)} for row in report.rows]
        print(json.dumps({"files": [str(f) for f in report.files], "rows": rows}, indent=1))
    else:
        print(report)
