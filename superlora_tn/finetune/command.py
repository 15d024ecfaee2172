"""``superlora-tn finetune``: its words, and what it prints."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields

from superlora_tn.declare.checks import near
from superlora_tn.finetune.config import Config, keys, read_config
from superlora_tn.finetune.named import ConfigError

Add = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]
WORDS = "fine-tune a model by an adapter, as a YAML file says; a run that was stopped goes on"


def add_command(add: Add) -> argparse.ArgumentParser:
    """Add the command to a command line; `add` makes one from its name, its function and what it is for."""
    made = add("finetune", run, WORDS)
    made.usage = "%(prog)s [-h] [--json] CONFIG.yaml [--KEY VALUE ...]"
    words = "lines of 'key: value', and any key as a flag, before or behind the file's name; flags override the file"
    made.add_argument("words", nargs=argparse.REMAINDER, metavar="CONFIG.yaml --KEY VALUE", help=words)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = (f"{name:<13} {words}{f' ({usual})' * bool(usual)}" for name, usual, words in keys())
    wrap = textwrap.TextWrapper(width=100, initial_indent="  ", subsequent_indent=" " * 16)
    made.epilog = "\n".join(["keys, and their defaults:", *(wrap.fill(line) for line in lines)])
    return made


def run(args: argparse.Namespace) -> None:
    """Check the configuration, run it, and print what came out."""
    as_json = args.json or "--json" in args.words
    path, words = split(args.words)
    config = read_config(path, flags(words))
    from superlora_tn.finetune.run import finetune

    report = finetune(config)
    if not report:  # another process of several tells
        return
    if as_json:
        print(json.dumps(report, indent=1))
        return
    last: dict[str, float | None] = next((row for row in reversed(report["history"]) if "eval_loss" in row), {})
    measured = {name.removeprefix("eval_"): last[name] for name in ("eval_loss", "eval_accuracy") if name in last}
    scores = [f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in measured.items()]
    print(f"{report['parameters']:,} parameters on {report['targets']} weights, {report['steps']} steps")
    print(f"evaluation: {', '.join(scores)}" if scores else "no evaluation")
    pictures = [report["samples"]] if "samples" in report else []
    print("\n".join(["written:", *report["files"], *pictures, f"{config.output}/report.json"]))


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The configuration's file, and its flags, which stand on either side of it.

    Raises:
        ConfigError: no file, or several.
    """
    files, found, left = list[str](), list[str](), [word for word in words if word != "--json"]
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        found.append(word)
        if "=" not in word and left:
            found.append(left.pop(0))
    if not files:
        raise ConfigError("no file was given; write superlora-tn finetune CONFIG.yaml, and keys as flags: --rate 1e-3.")
    return files[0], [*found, *files[1:]]


def flags(words: Sequence[str]) -> dict[str, str]:
    """``--key value`` and ``--key=value`` by key; of a mapping also ``--settings.rank 4``.

    Raises:
        ConfigError: words that are neither, or a key without a value.
    """
    found: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' follows no key; write --key value, and a list as one word: \"[q_proj, v_proj]\".")
        if not equals:
            if not left:
                known = [f.name for f in fields(Config)]
                raise ConfigError(f"{word} has no value{'.' if name in known else '; ' + near(name, known)}")
            value = left.pop(0)
        if name in found:
            raise ConfigError(f"--{name} is given twice, as {found[name]} and as {value}; give it once.")
        found[name] = value
    return found
