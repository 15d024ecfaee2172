"""Which adapters of which libraries can be read and written? Every cell is tried: writes docs/formats_tried.md from that.

``python benchmarks/tried_formats.py [METHOD ...]``. Reading: a library adapts a small random model by a method, fills the
adapter with random numbers and saves it; this library loads the file on a fresh copy of the model. Writing: this library
adapts the model and saves it in the library's format, and the library loads that. Either way both models are called with
one input, in float64. A number is the largest difference of their outputs, divided by the largest change that the adapter
makes; files are float32. What is refused has the words of the error below the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from formats_of_diffusers import DIFFUSERS, NAMES
from formats_of_others import LIBRARIES as OTHERS
from formats_of_others import Given, Library

import superlora_tn as sl

LIBRARIES = (*OTHERS[:-1], DIFFUSERS, OTHERS[-1])
PAGE = Path(__file__).resolve().parents[1] / "docs" / "formats_tried.md"
# Products of a few float32 factors, by two orders of summation; a wrong scale or a swapped axis is off by parts of one.
RIGHT = 1e-5
DECLARED = sl.Network("(o1 o2) (i1 i2)", {"r": 3, "o1": 2, "i1": 2}, a="o1 i1 r", b="o2 r", c="r i2")
# Our declarations: for all layers or linear ones alone, and how they are to be written.
WRITTEN: dict[str, tuple[Callable[[], sl.AdapterSpec], bool, dict[str, Any]]] = {
    "LoRA": (lambda: sl.lora(3, alpha=5), True, {}),
    "rsLoRA": (lambda: sl.lora(4, alpha=3, rslora=True), True, {}),
    "DoRA": (lambda: sl.dora(sl.lora(3, alpha=5)), False, {}),
    "LoHa": (lambda: sl.loha(2, alpha=3), True, {}),
    "LoKr": (lambda: sl.lokr(2, alpha=3), True, {}),
    "LoKr, both factors of low rank": (lambda: sl.lokr(1, decompose_both=True, alpha=2), False, {}),
    "LoKr, both factors dense": (lambda: sl.lokr(64, alpha=16), False, {}),
    "full": (lambda: sl.dense(), False, {}),
    "VeRA": (lambda: sl.vera(3), False, {}),
    "AdaLoRA": (lambda: sl.adalora(3, alpha=2), False, {}),
    "HiRA": (lambda: sl.hira(2), False, {}),
    "LoTR": (lambda: sl.lotr(3, alpha=5), True, {}),
    "LoNKr": (lambda: sl.lonkr(1, splits=3), False, {}),
    "LoRTA (flat)": (lambda: sl.lorta(2, alpha=3), False, {}),
    "LoRTA (CP)": (lambda: sl.lorta_cp(3), False, {}),
    "SuperLoRA": (lambda: sl.superlora(2, order=3, groups=2, projection=sl.Fastfood(0.5)), False, {}),
    "a declared network": (lambda: sl.AdapterSpec(DECLARED, alpha=2), False, {}),
    "LoTR at rank 2": (lambda: sl.lotr(3, alpha=5), False, {"rank": 2}),
    "LoHa within 20 %": (lambda: sl.loha(2, alpha=3), False, {"error": 0.2}),
}


def short(error: Exception, folder: Path) -> str:
    """The first sentence of an error, without this machine's paths."""
    words = str(error).splitlines()[0].replace(f"{folder}/", "").replace(str(folder), "the folder")
    return f"{type(error).__name__}: {words.partition('. ')[0].rstrip('.')}."


def difference(found: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> dict[str, Any]:
    """Of two outputs, in parts of what the adapter changes."""
    change = float((wanted - before).abs().max())
    error = float((found - wanted).abs().max()) / change if change else float("nan")
    return {"outcome": "right" if error < RIGHT else "wrong", "error": error}


def read_cell(make: Callable[[Path], Given]) -> dict[str, Any]:
    """What this library makes of a file that another one wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            given = make(folder)
        except Exception as error:
            return {"outcome": "theirs", "words": short(error, folder)}
        try:
            model = given.model()
            before = given.call(model)
            sl.load(model, given.path, dtype=torch.float64)
        except (sl.CheckpointError, sl.AttachError, sl.SpecError) as error:
            return {"outcome": "refused", "words": short(error, folder)}
        return difference(given.call(model), given.wanted(), before)


def write_cell(library: Library, spec: sl.AdapterSpec, every: bool, more: dict[str, Any]) -> dict[str, Any]:
    """What another library makes of a file that this one wrote."""
    targets = library.linear + library.convolutions if every else library.linear
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = library.model()
        before = library.call(model)
        tuned = sl.attach(model, spec, targets, dtype=torch.float64, seed=0)
        with torch.no_grad():
            for k, node in enumerate(tuned.parameters()):
                drawn = torch.linspace(1, 3 + k, node.numel(), dtype=node.dtype).mul(5).sin().reshape(node.shape)
                node.copy_((0.5 * drawn).float())
        try:
            report = tuned.save(folder, library.format, dtype=torch.float32, **library.options, **more)
        except (sl.CheckpointError, sl.AttachError, sl.SpecError) as error:
            return {"outcome": "refused", "words": short(error, folder)}
        wanted = nearest(tuned, report, library, targets) if more else library.call(model)
        try:
            found = library.read(folder, library.model())
        except Exception as error:
            return {"outcome": "theirs", "words": short(error, folder)}
        methods = sorted({row.method for row in report.rows})
        return {**difference(found, wanted, before), "as": " and ".join(methods), "stated": max(report.errors.values())}


def nearest(tuned: sl.Tuned, report: Any, library: Library, targets: list[str]) -> torch.Tensor:
    """The outputs of the model with each dW cut to the rank that was written, by a singular value decomposition."""
    model = library.model()
    with torch.no_grad():
        for row in report.rows:
            u, s, v = torch.linalg.svd(tuned.delta(row.name))
            rank = row.ranks[0]
            weight = model.get_submodule(row.name).weight
            assert isinstance(weight, torch.Tensor)
            weight += (u[:, :rank] * s[:rank] @ v[:rank]).reshape(weight.shape)
    return library.call(model)


def cells(only: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """All cells that can be tried with what is installed, or those of some methods."""
    for library in LIBRARIES:
        if not library.installed:
            continue
        for method, make in library.writes.items():
            if not only or method in only:
                yield {"direction": "read", "format": library.name, "method": method, **read_cell(make)}
        for method, (spec, every, more) in WRITTEN.items():
            if not only or method in only:
                yield {"direction": "written", "format": library.name, "method": method} | write_cell(
                    library, spec(), every, more
                )
    for name, make in NAMES.items():
        if not only or name in only:
            yield {"direction": "names", "format": "diffusers", "method": name, **read_cell(make)}


def page(rows: list[dict[str, Any]], machine: dict[str, Any], versions: dict[str, str]) -> str:
    """The rows as a page: a table for each direction, and the words of what is refused."""
    notes: dict[str, int] = {}
    about = " ".join((__doc__ or "").split("\n\n")[1].split("METHOD ...]``. ")[1].split())
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = ["# Formats that were tried", "", f"Written by `python benchmarks/tried_formats.py`. {about}", ""]
    lines += [f"{known}; {machine['date']}.", ""]
    names = [library.name for library in LIBRARIES]
    titles = {"read": "What we read of what they write", "written": "What they read of what we write"}
    for direction, title in titles.items():
        own = [r for r in rows if r["direction"] == direction]
        lines += [f"## {title}", "", f"| method | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for method in dict.fromkeys(r["method"] for r in own):
            found = {r["format"]: r for r in own if r["method"] == method}
            lines.append(f"| {method} | {' | '.join(_shown(found.get(name), notes) for name in names)} |")
        lines += ["", _legend(direction), ""]
    lines += ["## Names of other trainers", "", "| names | difference from diffusers |", "|---|---|"]
    lines += [f"| {r['method']} | {_shown(r, notes)} |" for r in rows if r["direction"] == "names"]
    lines += ["", _legend("names"), "", "## Words", ""]
    lines += [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join(lines) + "\n"


def _legend(direction: str) -> str:
    if direction == "read":
        return "An empty cell: the library has no such method. kohya's files are written by LyCORIS, a network module of it."
    if direction == "written":
        return (
            "Each cell says by which method the weights stand in the file. Cut ones (a rank, an error) are compared with the "
            "nearest matrices of that rank. kohya's files are read by LyCORIS, GGUF's by `gguf.GGUFReader` and llama.cpp's "
            "formula."
        )
    return "A small Flux; each trainer's names as its files have them, read by diffusers' own conversion and by this library."


def _shown(row: dict[str, Any] | None, notes: dict[str, int]) -> str:
    if row is None:
        return ""
    if row["outcome"] in ("right", "wrong"):
        wrong = "**differs** " if row["outcome"] == "wrong" else ""
        kind = f"{row['as']}, " if "as" in row else ""
        return f"{wrong}{kind}{row['error']:.0e}"
    said = {"refused": "refused", "theirs": "not theirs"}[row["outcome"]]
    return f"{said} [{notes.setdefault(row['words'], len(notes) + 1)}]"


def main() -> None:
    """Try all cells, or those of some methods, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="methods to try (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from superlora_tn.tools.measure import machine

    rows = []
    for row in cells(args.methods):
        rows.append(row)
        shown = row.get("words") or f"{row['error']:.1e} {row.get('as', '')}"
        print(row["direction"], row["format"], row["method"], row["outcome"], shown, flush=True)
    if not args.methods:
        facts = machine("cpu")
        versions = {library.package: library.version for library in LIBRARIES if library.installed}
        found = {"machine": facts, "versions": versions, "rows": rows}
        (harness.RESULTS / "formats.json").write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(page(rows, facts, versions))


if __name__ == "__main__":
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    main()
