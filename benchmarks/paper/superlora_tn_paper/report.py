"""``report.md``: the reports of all experiments whose results are in a folder, one after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from superlora_tn.demo.whole_file import whole_file
from superlora_tn_paper import classification_report, converged_report, diffusion_report, geometry_report
from superlora_tn_paper.store import Data


def _classification(result: Data) -> str:
    return converged_report.report(result) if result["scale"] == "converged" else classification_report.report(result)


REPORTS: dict[str, Callable[[Data], str]] = {
    "classification": _classification,
    "geometry": geometry_report.report,
    "diffusion": diffusion_report.report,
}


def text(out: Path) -> str:
    """The reports of the results that are in the folder."""
    found = {name: out / f"{name}.json" for name in REPORTS}
    parts = [REPORTS[name](json.loads(place.read_text())).strip() for name, place in found.items() if place.is_file()]
    return "\n\n".join(parts) + "\n"


def write(out: Path) -> Path:
    """Write ``report.md`` beside the results."""
    place = out / "report.md"
    with whole_file(place) as partial:
        partial.write_text(text(out))
    return place
